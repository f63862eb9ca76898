// Linear maps, plain and adapted (LoRA, DoRA), and the layer that holds their parameters.
#pragma once

#include <array>
#include <optional>

#include "../lora/dora.hpp"
#include "../lora/merge.hpp"
#include "ops.hpp"

namespace MLKIT_NAMESPACE::nn {

/// LoRA's factors on a tape: down [rank, in], up [out, rank], and s = alpha / rank.
template <real T>
struct lora_factors {
  var<T> down, up;
  T scale;
};
/// DoRA's factors: LoRA's and magnitude [out], the length that each row of W + s up down is given.
template <real T>
struct dora_factors {
  var<T> down, up, magnitude;
  T scale;
};

namespace detail {

template <real T>
void check_linear(std::string_view function, const var<T>& x, const var<T>& w, const var<T>& bias) {
  if (w.shape().rank() != 2) fail_shape(function, ": w has shape ", w.shape().text(), ", but must be [out, in]");
  check_extent(function, "x", "columns", x.columns(), "w", w.columns());
  if (bias) check_extent(function, "bias", "elements", bias.size(), "w", w.rows());
}

template <real T>
void check_factors(std::string_view function, const var<T>& w, const var<T>& down, const var<T>& up) {
  check_extent(function, "down", "columns", down.columns(), "w", w.columns());
  check_extent(function, "up", "rows", up.rows(), "w", w.rows());
  check_extent(function, "up", "columns", up.columns(), "down", down.rows());
}

// W and b as the kernels take them.
template <real T>
lora::dense<T> base_of(const var<T>& w, const var<T>& bias) {
  if (bias) return lora::dense<T>(w.matrix(), vector_view<const T>(bias.data(), {bias.size()}));
  return lora::dense<T>(w.matrix());
}

// What W and b get from y's gradient, where they are trained.
template <real T>
void base_gradients(const cpu& exec, const var<T>& x, const var<T>& w, const var<T>& bias, const var<T>& y) {
  if (w.needs_grad()) matmul(exec, transposed(y.grad()), x.matrix(), w.grad(), epilogue{accumulate{}});
  if (bias && bias.needs_grad())
    add_column_sums(exec, y.rows(), y.columns(), bias.grad_data(),
                    [d = y.grad_data(), columns = y.columns()](index_t r, index_t c) { return d[r * columns + c]; });
}

// The map with an adapter of any of lora's kinds; `factors` are down, up and, for DoRA, magnitude.
template <real T, class Adapter>
var<T> adapted_linear(var<T> x, var<T> w, var<T> bias, const Adapter& adapter, std::array<var<T>, 3> factors) {
  tape<T>& t = x.on();
  const var<T> y = t.make(x.shape().with_columns(w.rows()), {x, w, bias, factors[0], factors[1], factors[2]});
  const index_t rank = factors[0].rows(), rows = x.rows(), in = x.columns();
  lora::linear_options<T> options;
  options.accumulate = true;
  if (y.needs_grad()) {
    options.h = {t.scratch(rows * rank), {rows, rank}};
    if (factors[2]) options.z = {t.scratch(rows * w.rows()), {rows, w.rows()}};
  }
  lora::linear(t.exec(), x.matrix(), base_of(w, bias), adapter, y.matrix(), options);
  t.on_backward(y, [=] {
    tape<T>& on = y.on();
    // A gradient that nobody wants goes to scratch memory; that of x is written, or added where one has arrived.
    const auto gradient = [&](const var<T>& v) {
      return v.needs_grad() ? v.grad() : matrix_view<T>(on.scratch(v.size()), {v.rows(), v.columns()});
    };
    lora::gradients<T> gradients(gradient(factors[0]), gradient(factors[1]));
    if (factors[2]) gradients.dmagnitude = {gradient(factors[2]).data, {factors[2].size()}};
    matrix_view<T> dx;
    T* fresh = nullptr;
    if (x.needs_grad()) {
      fresh = x.fresh_grad();
      dx = {fresh ? fresh : on.scratch(rows * in), {rows, in}};
    }
    lora::linear_backward(on.exec(), x.matrix(), base_of(w, bias), adapter, y.grad(), gradients, dx, options);
    if (x.needs_grad() && !fresh) {
      T* sum = x.grad_data();
      for_each(on.exec(), rows * in, [sum, d = dx.data](index_t i) { sum[i] += d[i]; });
    }
    base_gradients(on.exec(), x, w, bias, y);
  });
  return y;
}

}  // namespace detail

/// y = x W^T + b. x [..., in], w [out, in], bias [out] or empty, y [..., out].
template <real T>
var<T> linear(var<T> x, var<T> w, var<T> bias = {}) {
  detail::check_linear("nn::linear", x, w, bias);
  tape<T>& t = x.on();
  const var<T> y = t.make(x.shape().with_columns(w.rows()), {x, w, bias});
  lora::linear(t.exec(), x.matrix(), detail::base_of(w, bias), y.matrix());
  t.on_backward(y, [=] {
    const cpu& exec = y.on().exec();
    if (x.needs_grad()) {
      if (T* dx = x.fresh_grad())
        matmul(exec, y.grad(), w.matrix(), matrix_view<T>(dx, {x.rows(), x.columns()}));
      else
        matmul(exec, y.grad(), w.matrix(), x.grad(), epilogue{accumulate{}});
    }
    detail::base_gradients(exec, x, w, bias, y);
  });
  return y;
}

/// y = x W^T + b + s (x down^T) up^T. Hu et al.: "LoRA: low-rank adaptation of large language models", 2021.
/// W gets a gradient only if it is trainable; x always gets the whole one, through W and through the factors.
template <real T>
var<T> linear(var<T> x, var<T> w, var<T> bias, lora_factors<T> factors) {
  detail::check_linear("nn::linear", x, w, bias);
  detail::check_factors("nn::linear", w, factors.down, factors.up);
  const lora::adapter_view<T> adapter{factors.down.matrix(), factors.up.matrix(), static_cast<double>(factors.scale)};
  return detail::adapted_linear<T>(x, w, bias, adapter, {factors.down, factors.up, {}});
}

/// y = g * (x W^T + s (x down^T) up^T) + b with g = magnitude / |W + s up down|, one factor per output; the norm is
/// held constant in backward. Liu et al.: "DoRA: weight-decomposed low-rank adaptation", 2024, section 4.3. W stays
/// frozen: throws value_error if it is trainable.
template <real T>
var<T> linear(var<T> x, var<T> w, var<T> bias, dora_factors<T> factors) {
  detail::check_linear("nn::linear", x, w, bias);
  detail::check_factors("nn::linear", w, factors.down, factors.up);
  detail::check_extent("nn::linear", "magnitude", "elements", factors.magnitude.size(), "w", w.rows());
  if (w.needs_grad()) detail::fail_value("nn::linear: w is trainable, but DoRA wants it frozen");
  tape<T>& t = x.on();
  const lora::adapter_view<T> plain{factors.down.matrix(), factors.up.matrix(), static_cast<double>(factors.scale)};
  lora::dora<T> adapter(plain, vector_view<const T>(factors.magnitude.data(), {w.rows()}));
  const auto norms = lora::adapted_norms(t.exec(), detail::base_of(w, {}), plain);
  T* kept = t.scratch(w.rows());  // forward and backward use the same norms
  std::copy(norms.norms.begin(), norms.norms.end(), kept);
  adapter.norms = {kept, {w.rows()}};
  return detail::adapted_linear<T>(x, w, bias, adapter, {factors.down, factors.up, factors.magnitude});
}

/// How a linear layer is adapted.
struct adapter_options {
  index_t rank = 4;
  double alpha = 4;   ///< the update is scaled by alpha / rank
  bool rs = false;    ///< by alpha / sqrt(rank) instead (rsLoRA)
  bool dora = false;  ///< with a trainable magnitude per output
};

/// A linear map with its parameters, "<scope>.weight" [out, in] and "<scope>.bias" [out], and, once adapt() is called,
/// an adapter beside it.
template <real T>
class linear_layer {
 public:
  parameter<T>* weight;
  parameter<T>* bias = nullptr;

  /// What adapt() adds: "<scope>.lora_A.weight", "<scope>.lora_B.weight" and, for DoRA,
  /// "<scope>.lora_magnitude_vector".
  struct adapter {
    parameter<T>* down;
    parameter<T>* up;
    parameter<T>* magnitude;  // null without DoRA
    adapter_options options;
    double scale() const noexcept {
      const double r = static_cast<double>(options.rank);
      return options.alpha / (options.rs ? std::sqrt(r) : r);
    }
  };

  linear_layer(const scope<T>& in, index_t inputs, index_t outputs, bool with_bias = true) : path_(in.path()) {
    const uniform start{1 / std::sqrt(static_cast<double>(inputs))};  // PyTorch's: Kaiming with a = sqrt(5)
    weight = &in.add("weight", {outputs, inputs}, start);
    if (with_bias) bias = &in.add("bias", {outputs}, start);
  }

  index_t inputs() const noexcept { return weight->shape[1]; }
  index_t outputs() const noexcept { return weight->shape[0]; }
  /// Where the layer stands in the model: "blocks.0.up".
  const std::string& path() const noexcept { return path_; }

  /// Puts an adapter beside the weight, its parameters in a store of their own, and leaves the layer's output as it
  /// was: up starts at 0, down like a linear layer's weight, magnitude at the lengths of the rows of W. Freezing the
  /// weight is the caller's choice. Throws value_error for a rank that is not positive or an alpha that is not finite.
  void adapt(parameters<T>& store, const adapter_options& o) {
    if (o.rank < 1) detail::fail_value("nn::linear_layer::adapt: rank = ", o.rank, " is not positive");
    if (!std::isfinite(o.alpha)) detail::fail_value("nn::linear_layer::adapt: alpha = ", o.alpha, " is not finite");
    const scope<T> in(store, path_);
    adapter a{nullptr, nullptr, nullptr, o};
    a.down = &in.add("lora_A.weight", {o.rank, inputs()}, uniform{1 / std::sqrt(static_cast<double>(inputs()))});
    a.up = &in.add("lora_B.weight", {outputs(), o.rank}, zeros{});
    if (o.dora)
      a.magnitude = &in.add("lora_magnitude_vector", {outputs()}, [&](random_stream, index_t row) {
        double square = 0;
        for (index_t c = 0; c < inputs(); ++c) square += std::pow(static_cast<double>(weight->matrix()(row, c)), 2);
        return std::sqrt(square);
      });
    adapter_ = a;
  }
  /// The adapter, or null.
  const adapter* adapted() const noexcept { return adapter_ ? &*adapter_ : nullptr; }
  /// Removes the adapter from the layer; its parameters stay in their store.
  void remove_adapter() noexcept { adapter_.reset(); }
  /// Puts the adapter, at its strength, into the weight, and removes it: the same outputs, at the cost of a plain
  /// layer.
  void merge(const cpu& exec) {
    if (!adapter_) return;
    if (strength_ != 0) {
      const lora::adapter_view<T> plain{std::as_const(*adapter_->down).matrix(), std::as_const(*adapter_->up).matrix(),
                                        adapter_->scale() * strength_};
      if (adapter_->magnitude)
        lora::merge(exec, weight->matrix(), lora::dora<T>(plain, adapter_->magnitude->value));
      else
        lora::merge(exec, weight->matrix(), plain);
    }
    adapter_.reset();
  }
  /// Scales the update: 1 as trained, 0 exactly the base.
  void set_strength(double strength) noexcept { strength_ = strength; }

  var<T> operator()(var<T> x) const {
    tape<T>& t = x.on();
    const var<T> w = t.use(*weight), b = bias ? t.use(*bias) : var<T>{};
    if (!adapter_ || strength_ == 0) return linear(x, w, b);
    const var<T> down = t.use(*adapter_->down), up = t.use(*adapter_->up);
    const T scale = static_cast<T>(adapter_->scale() * strength_);
    if (adapter_->magnitude) return linear(x, w, b, dora_factors<T>{down, up, t.use(*adapter_->magnitude), scale});
    return linear(x, w, b, lora_factors<T>{down, up, scale});
  }

 private:
  std::string path_;
  std::optional<adapter> adapter_;
  double strength_ = 1;
};

/// A model whose linear layers can be named one after the other.
template <class M, class T>
concept adaptable = requires(M& model) {
  model.each_linear([](linear_layer<T>&) {});
};

/// Puts an adapter beside every linear layer of a model, or, as PEFT's target_modules does, beside those alone whose
/// path is one of `targets` or ends with "." and one of them: {"to_q", "to_k", "to_v", "to_out.0"} are the projections
/// of attention. All go to one store. Throws value_error, before any layer is changed, for a target that no layer has.
template <real T, adaptable<T> M>
void adapt(M& model, parameters<T>& store, const adapter_options& o, const std::vector<std::string>& targets = {}) {
  const auto names = [](std::string_view path, std::string_view target) {
    return path.ends_with(target) && (path.size() == target.size() || path[path.size() - target.size() - 1] == '.');
  };
  for (const std::string& target : targets) {
    bool found = false;
    model.each_linear([&](linear_layer<T>& layer) { found = found || names(layer.path(), target); });
    if (!found) detail::fail_value("nn::adapt: the model has no linear layer ", target);
  }
  model.each_linear([&](linear_layer<T>& layer) {
    if (targets.empty() || std::any_of(targets.begin(), targets.end(),
                                       [&](const std::string& target) { return names(layer.path(), target); }))
      layer.adapt(store, o);
  });
}

}  // namespace MLKIT_NAMESPACE::nn
