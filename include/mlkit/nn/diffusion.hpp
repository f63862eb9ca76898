// Diffusion: noise schedules, the forward process, DDPM's posterior and DDIM sampling, for any model that predicts
// noise.
#pragma once

#include <cmath>
#include <numbers>
#include <span>
#include <utility>
#include <vector>

#include "elementwise.hpp"

namespace MLKIT_NAMESPACE::nn {

/// A variance-preserving noise schedule: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps for t = 1 .. steps, abar_0 = 1,
/// abar_t = prod_{s <= t} (1 - beta_s). Tables are in double.
class noise_schedule {
 public:
  /// beta_t from `first` to `last` in equal steps. Ho, Jain, Abbeel: "Denoising diffusion probabilistic models", 2020.
  static noise_schedule linear(index_t steps, double first = 1e-4, double last = 0.02) {
    noise_schedule s("nn::noise_schedule::linear", steps);
    for (index_t t = 1; t <= steps; ++t)
      s.push(steps == 1 ? first : first + (last - first) * static_cast<double>(t - 1) / static_cast<double>(steps - 1));
    return s;
  }
  /// abar_t = f(t) / f(0), f(t) = cos^2((t / steps + offset) / (1 + offset) pi / 2), no beta above `cap`.
  /// Nichol, Dhariwal: "Improved denoising diffusion probabilistic models", 2021, equation 17.
  static noise_schedule cosine(index_t steps, double offset = 0.008, double cap = 0.999) {
    noise_schedule s("nn::noise_schedule::cosine", steps);
    const auto f = [&](index_t t) {
      const double c = std::cos((static_cast<double>(t) / static_cast<double>(steps) + offset) / (1 + offset) *
                                std::numbers::pi / 2);
      return c * c;
    };
    for (index_t t = 1; t <= steps; ++t) s.push(std::min(cap, 1 - f(t) / f(t - 1)));
    return s;
  }

  index_t steps() const noexcept { return static_cast<index_t>(beta_.size()) - 1; }
  /// beta_t, t in [1, steps].
  double beta(index_t t) const { return beta_[at("beta", t, 1)]; }
  /// abar_t, t in [0, steps].
  double alpha_bar(index_t t) const { return alpha_bar_[at("alpha_bar", t, 0)]; }
  /// The variance of q(x_{t-1} | x_t, x_0): (1 - abar_{t-1}) / (1 - abar_t) beta_t. 0 at t = 1.
  double posterior_variance(index_t t) const { return (1 - alpha_bar(t - 1)) / (1 - alpha_bar(t)) * beta(t); }
  /// The mean of q(x_{t-1} | x_t, x_0) is first * x_0 + second * x_t.
  std::pair<double, double> posterior_mean(index_t t) const {
    return {std::sqrt(alpha_bar(t - 1)) * beta(t) / (1 - alpha_bar(t)),
            std::sqrt(1 - beta(t)) * (1 - alpha_bar(t - 1)) / (1 - alpha_bar(t))};
  }

  /// x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, with a t in [0, steps] for each row. All [n, d].
  template <real T>
  void add_noise(const cpu& exec, matrix_view<const T> x0, std::span<const std::int32_t> t, matrix_view<const T> eps,
                 matrix_view<T> out) const {
    constexpr std::string_view name = "nn::noise_schedule::add_noise";
    detail::check_extent(name, "t", "elements", static_cast<index_t>(t.size()), "the number of rows of x0",
                         x0.extent(0));
    for (int d = 0; d < 2; ++d) {
      detail::check_extent(name, "eps", d ? "columns" : "rows", eps.extent(d), "x0", x0.extent(d));
      detail::check_extent(name, "out", d ? "columns" : "rows", out.extent(d), "x0", x0.extent(d));
    }
    detail::check_view(name, "x0", x0);
    detail::check_view(name, "eps", eps);
    detail::check_output(name, "out", out);
    for (const std::int32_t step : t) at("add_noise", step, 0);
    detail::check_disjoint(name, "out", out, "x0", x0);
    detail::check_disjoint(name, "out", out, "eps", eps);
    detail::for_rows(exec, x0.extent(0), x0.extent(1), [&](index_t r) {
      const double a = alpha_bar_[static_cast<std::size_t>(t[static_cast<std::size_t>(r)])];
      const T signal = static_cast<T>(std::sqrt(a)), noise = static_cast<T>(std::sqrt(1 - a));
      for (index_t c = 0; c < x0.extent(1); ++c) out(r, c) = signal * x0(r, c) + noise * eps(r, c);
    });
  }

 private:
  noise_schedule(std::string_view function, index_t steps) : beta_{0}, alpha_bar_{1} {
    if (steps < 1) detail::fail_value(function, ": steps = ", steps, " is not positive");
  }
  void push(double beta) {
    if (!(beta > 0 && beta < 1)) detail::fail_value("nn::noise_schedule: beta = ", beta, " is outside (0, 1)");
    beta_.push_back(beta);
    alpha_bar_.push_back(alpha_bar_.back() * (1 - beta));
  }
  std::size_t at(std::string_view what, index_t t, index_t low) const {
    if (t < low || t > steps())
      detail::fail_value("nn::noise_schedule::", what, ": t = ", t, " is outside [", low, ", ", steps(), "]");
    return static_cast<std::size_t>(t);
  }

  std::vector<double> beta_, alpha_bar_;  // index t; beta_[0] is unused
};

/// How to sample.
struct ddim_options {
  index_t steps = 50;      ///< how many of the schedule's steps to take, evenly spaced, the last of them included
  double eta = 0;          ///< 0: deterministic (DDIM); 1: the posterior's variance (DDPM)
  double clip = 1;         ///< the predicted x_0 is kept within [-clip, clip]; 0: left as it is
  std::uint64_t seed = 0;  ///< of the noise that eta > 0 adds
};

namespace detail {

inline void check_ddim(std::string_view function, const ddim_options& o) {
  for (const auto& [name, value] : {std::pair("eta", o.eta), std::pair("clip", o.clip)})
    if (!(value >= 0) || !std::isfinite(value)) fail_value(function, ": ", name, " = ", value, " is outside [0, inf)");
}

}  // namespace detail

/// One step of DDIM from time t to an earlier time s, in place:
///     x_0 = (x - sqrt(1 - abar_t) eps) / sqrt(abar_t)
///     x  <- sqrt(abar_s) x_0 + sqrt(1 - abar_s - sigma^2) eps + sigma z
///     sigma = eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s)
/// Where x_0 is clipped, eps is taken anew from it. x, eps [n, d]; z is a standard normal that depends
/// on (seed, t, row, column) alone. Song, Meng, Ermon: "Denoising diffusion implicit models", 2021, equations 12
/// and 16.
template <real T>
void ddim_step(const cpu& exec, const noise_schedule& schedule, index_t t, index_t s, matrix_view<const T> eps,
               matrix_view<T> x, const ddim_options& o = {}) {
  if (s < 0 || s >= t) detail::fail_value("nn::ddim_step: s = ", s, " is not before t = ", t);
  detail::check_ddim("nn::ddim_step", o);
  for (int d = 0; d < 2; ++d)
    detail::check_extent("nn::ddim_step", "eps", d ? "columns" : "rows", eps.extent(d), "x", x.extent(d));
  detail::check_view("nn::ddim_step", "eps", eps);
  detail::check_output("nn::ddim_step", "x", x);
  detail::check_disjoint("nn::ddim_step", "x", x, "eps", eps);
  const double at = schedule.alpha_bar(t), as = schedule.alpha_bar(s);
  const double sigma = o.eta * std::sqrt((1 - as) / (1 - at) * (1 - at / as));
  const T signal_t = static_cast<T>(std::sqrt(at)), noise_t = static_cast<T>(std::sqrt(1 - at));
  const T signal_s = static_cast<T>(std::sqrt(as));
  const T noise_s = static_cast<T>(std::sqrt(std::max(0.0, 1 - as - sigma * sigma)));
  const T clip = static_cast<T>(o.clip), spread = static_cast<T>(sigma);
  const random_stream stream{o.seed, static_cast<std::uint64_t>(t)};
  detail::for_rows(exec, x.extent(0), x.extent(1), [=](index_t r) {
    for (index_t c = 0; c < x.extent(1); ++c) {
      T e = eps(r, c), x0 = (x(r, c) - noise_t * e) / signal_t;
      if (clip > 0 && std::abs(x0) > clip) {
        x0 = std::clamp(x0, -clip, clip);
        e = (x(r, c) - signal_t * x0) / noise_t;
      }
      x(r, c) = signal_s * x0 + noise_s * e;
      if (spread > 0) x(r, c) += spread * T{stream.normal(static_cast<std::uint64_t>(r * x.extent(1) + c))};
    }
  });
}

/// Samples from noise: x [n, d] holds x_steps on entry and x_0 on return. `predict(x, t, eps)` writes the model's noise
/// for x at time t, the same t for every row, to eps [n, d].
template <real T, class Predict>
  requires std::invocable<Predict&, matrix_view<const T>, index_t, matrix_view<T>>
void ddim_sample(const cpu& exec, const noise_schedule& schedule, Predict&& predict, matrix_view<T> x,
                 const ddim_options& o = {}) {
  if (o.steps < 1 || o.steps > schedule.steps())
    detail::fail_value("nn::ddim_sample: steps = ", o.steps, " is outside [1, ", schedule.steps(), "]");
  detail::check_ddim("nn::ddim_sample", o);
  detail::check_output("nn::ddim_sample", "x", x);
  matrix<T> eps({x.extent(0), x.extent(1)});
  for (index_t i = o.steps; i > 0; --i) {
    const index_t t = schedule.steps() * i / o.steps, s = schedule.steps() * (i - 1) / o.steps;
    predict(matrix_view<const T>(x), t, eps.view());
    ddim_step<T>(exec, schedule, t, s, eps, x, o);
  }
}

/// Classifier-free guidance: eps = unconditional + strength (conditional - unconditional), into `conditional`. Both are
/// runs of n elements.
/// Ho, Salimans: "Classifier-free diffusion guidance", 2022.
template <real T>
void guide(const cpu& exec, double strength, vector_view<const T> unconditional, vector_view<T> conditional) {
  detail::check_extent("nn::guide", "conditional", "elements", conditional.size(), "unconditional",
                       unconditional.size());
  detail::check_run("nn::guide", "unconditional", unconditional);
  detail::check_run("nn::guide", "conditional", conditional);
  detail::check_disjoint("nn::guide", "conditional", conditional, "unconditional", unconditional);
  if (!std::isfinite(strength)) detail::fail_value("nn::guide: strength = ", strength, " is not finite");
  const T g = static_cast<T>(strength), *u = unconditional.data;
  T* c = conditional.data;
  detail::for_each(exec, conditional.size(), [=](index_t i) { c[i] = u[i] + g * (c[i] - u[i]); });
}

/// Sinusoids of a time: [sin(t w_0), ..., sin(t w_{d/2-1}), cos(t w_0), ...], w_i = period^(-i / (d/2)). out [n, d],
/// d even. Vaswani et al.: "Attention is all you need", 2017, section 3.5.
template <real T>
void time_features(std::span<const std::int32_t> t, matrix_view<T> out, double period = 10000) {
  detail::check_extent("nn::time_features", "out", "rows", out.extent(0), "t", static_cast<index_t>(t.size()));
  if (out.extent(1) % 2) detail::fail_shape("nn::time_features: out has ", out.extent(1), " columns, an odd number");
  detail::check_output("nn::time_features", "out", out);
  if (!(period > 0) || !std::isfinite(period))
    detail::fail_value("nn::time_features: period = ", period, " is outside (0, inf)");
  const index_t half = out.extent(1) / 2;
  for (index_t i = 0; i < half; ++i) {
    const double w = std::pow(period, -static_cast<double>(i) / static_cast<double>(half));
    for (index_t r = 0; r < out.extent(0); ++r) {
      const double angle = w * t[static_cast<std::size_t>(r)];
      out(r, i) = static_cast<T>(std::sin(angle));
      out(r, half + i) = static_cast<T>(std::cos(angle));
    }
  }
}

}  // namespace MLKIT_NAMESPACE::nn
