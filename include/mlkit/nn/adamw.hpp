// AdamW over a list of parameters.
#pragma once

#include <cmath>

#include "../core/arguments.hpp"
#include "elementwise.hpp"
#include "tape.hpp"

namespace MLKIT_NAMESPACE::nn {

/// Options of AdamW, with the defaults of the paper and of PyTorch.
struct adamw_options {
  double rate = 1e-3;
  double beta1 = 0.9, beta2 = 0.999;
  double epsilon = 1e-8;
  double decay = 0.01;  ///< decoupled weight decay
};

namespace detail {

inline void check_adamw(std::string_view function, const adamw_options& o) {
  const auto finite = [](double value) { return value >= 0 && std::isfinite(value); };
  if (!finite(o.rate) || !(o.beta1 >= 0 && o.beta1 < 1) || !(o.beta2 >= 0 && o.beta2 < 1) || !finite(o.epsilon) ||
      !finite(o.decay))
    fail_value(function, ": rate = ", o.rate, ", beta1 = ", o.beta1, ", beta2 = ", o.beta2, ", epsilon = ", o.epsilon,
               ", decay = ", o.decay, ": one is outside its range");
}

}  // namespace detail

/// One AdamW step on one tensor: p, gradient, first and second moment, all runs of n elements that share no memory;
/// `step` counts from 1.
///
///     p *= 1 - rate decay;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
///     p -= rate / (1 - b1^step) * m / (sqrt(v / (1 - b2^step)) + epsilon)
///
/// Loshchilov, Hutter: "Decoupled weight decay regularization", 2019; the decay comes before the update, as in PyTorch.
template <real T>
void adamw_update(const cpu& exec, const adamw_options& o, index_t step, vector_view<T> p,
                  vector_view<const T> gradient, vector_view<T> m, vector_view<T> v) {
  detail::check_extent("nn::adamw_update", "gradient", "elements", gradient.size(), "p", p.size());
  detail::check_extent("nn::adamw_update", "m", "elements", m.size(), "p", p.size());
  detail::check_extent("nn::adamw_update", "v", "elements", v.size(), "p", p.size());
  if (step < 1) detail::fail_value("nn::adamw_update: step = ", step, ", but steps count from 1");
  detail::check_adamw("nn::adamw_update", o);
  detail::check_run("nn::adamw_update", "p", p);
  detail::check_run("nn::adamw_update", "gradient", gradient);
  detail::check_run("nn::adamw_update", "m", m);
  detail::check_run("nn::adamw_update", "v", v);
  detail::arguments call("nn::adamw_update", exec);
  call.reads("gradient", gradient);
  call.writes("p", p);
  call.writes("m", m);
  call.writes("v", v);
  const T keep = static_cast<T>(1 - o.rate * o.decay);
  const T b1 = static_cast<T>(o.beta1), b2 = static_cast<T>(o.beta2);
  const T c1 = static_cast<T>(1 - o.beta1), c2 = static_cast<T>(1 - o.beta2);
  const T size = static_cast<T>(o.rate / (1 - std::pow(o.beta1, static_cast<double>(step))));
  const T root = static_cast<T>(1 / std::sqrt(1 - std::pow(o.beta2, static_cast<double>(step))));
  const T epsilon = static_cast<T>(o.epsilon);
  T *pp = p.data, *pm = m.data, *pv = v.data;
  const T* pg = gradient.data;
  detail::for_each(exec, p.size(), [=](index_t i) {
    const T g = pg[i];
    const T first = b1 * pm[i] + c1 * g, second = b2 * pv[i] + c2 * g * g;
    pm[i] = first;
    pv[i] = second;
    pp[i] = pp[i] * keep - size * first / (std::sqrt(second) * root + epsilon);
  });
}

/// What a training loop asks of an optimizer: step with what backward has left in the parameters' `grad`, then forget
/// it.
template <class O>
concept optimizer = requires(O& o, const cpu& exec) {
  o.step(exec);
  o.set_rate(1.0);
};

/// AdamW. Parameters that backward has not reached since the last step are left alone, as in PyTorch.
template <real T>
class adamw {
 public:
  /// Throws value_error for options outside their range and for a parameter that is null.
  explicit adamw(std::vector<parameter<T>*> over, adamw_options o = {}) : options_(o) {
    detail::check_adamw("nn::adamw", o);
    for (std::size_t i = 0; i < over.size(); ++i)
      if (!over[i]) detail::fail_value("nn::adamw: parameter ", i, " is null");
    for (parameter<T>* p : over) slots_.push_back({p, vector<T>({p->size()}), vector<T>({p->size()}), 0});
  }

  /// Throws value_error for a rate that is negative or not finite.
  void set_rate(double rate) {
    adamw_options o = options_;
    o.rate = rate;
    detail::check_adamw("nn::adamw::set_rate", o);
    options_ = o;
  }
  const adamw_options& options() const noexcept { return options_; }

  /// Updates the parameters and clears their gradients.
  void step(const cpu& exec) {
    for (slot& s : slots_) {
      if (!std::exchange(s.p->has_grad, false)) continue;
      adamw_update<T>(exec, options_, ++s.steps, s.p->value, std::as_const(s.p->grad).view(), s.m, s.v);
    }
  }

 private:
  struct slot {
    parameter<T>* p;
    vector<T> m, v;
    index_t steps;
  };
  adamw_options options_;
  std::vector<slot> slots_;
};

}  // namespace MLKIT_NAMESPACE::nn
