// Losses: one number from a prediction.
#pragma once

#include "../rl/cross_entropy.hpp"
#include "ops.hpp"

namespace MLKIT_NAMESPACE::nn {

/// The mean over all elements of (prediction - target)^2. Both have the same shape; either may need a gradient.
template <real T>
var<T> mse(var<T> prediction, var<T> target) {
  if (prediction.shape() != target.shape())
    detail::fail_shape("nn::mse: prediction has shape ", prediction.shape().text(), ", but target has ",
                       target.shape().text());
  const index_t n = prediction.size();
  if (n == 0) detail::fail_shape("nn::mse: prediction has shape ", prediction.shape().text(), ", without elements");
  tape<T>& t = prediction.on();
  const var<T> y = t.make(shape{}, {prediction, target});
  const T *p = prediction.data(), *q = target.data();
  *y.data() = static_cast<T>(detail::sum_of(t.exec(), n,
                                            [=](index_t i) {
                                              const double d = static_cast<double>(p[i]) - static_cast<double>(q[i]);
                                              return d * d;
                                            }) /
                             static_cast<double>(n));
  t.on_backward(y, [=] {
    const T factor = *y.grad_data() * T{2} / static_cast<T>(n);
    const auto pass = [&](const var<T>& to, T sign) {
      T* d = to.grad_data();
      detail::for_each(y.on().exec(), n, [=](index_t i) { d[i] += sign * (p[i] - q[i]); });
    };
    if (prediction.needs_grad()) pass(prediction, factor);
    if (target.needs_grad()) pass(target, -factor);
  });
  return y;
}

/// The label that cross_entropy leaves out: prompts and padding.
inline constexpr std::int32_t ignore_label = -100;

/// The mean of -log softmax(logits)[label] over the rows whose label is not ignore_label.
/// logits [..., classes], one label for each row, in [0, classes). The largest logit is subtracted first, so that no
/// exponential overflows. Throws value_error if every row is ignored. The gradient is computed in the same pass: see
/// rl::cross_entropy.
template <real T>
var<T> cross_entropy(var<T> logits, std::span<const std::int32_t> labels) {
  const index_t rows = logits.rows(), classes = logits.columns();
  detail::check_extent("nn::cross_entropy", "labels", "elements", static_cast<index_t>(labels.size()),
                       "the number of logit rows", rows);
  bool counts = false;
  for (const std::int32_t label : labels) {
    if (label == ignore_label) continue;
    if (label < 0 || label >= classes)
      detail::fail_value("nn::cross_entropy: label ", label, " is outside the ", classes, " classes");
    counts = true;
  }
  if (!counts) detail::fail_value("nn::cross_entropy: no row has a label");
  tape<T>& t = logits.on();
  const var<T> y = t.make(shape{}, {logits});
  const vector_view<const std::int32_t> of(labels.data(), {rows});
  const rl::cross_entropy_options options{.ignore = ignore_label};
  if (!y.needs_grad()) {
    *y.data() = static_cast<T>(rl::cross_entropy(t.exec(), logits.matrix(), of, options).loss);
    return y;
  }
  T* const gradient = t.scratch(logits.size());
  *y.data() = static_cast<T>(
      rl::cross_entropy(t.exec(), logits.matrix(), of, options, matrix_view<T>(gradient, {rows, classes})).loss);
  t.on_backward(y, [=] {
    const T factor = *y.grad_data();
    if (T* const fresh = logits.fresh_grad())
      detail::for_each(y.on().exec(), rows * classes, [=](index_t i) { fresh[i] = factor * gradient[i]; });
    else
      detail::for_each(y.on().exec(), rows * classes,
                       [=, d = logits.grad_data()](index_t i) { d[i] += factor * gradient[i]; });
  });
  return y;
}

}  // namespace MLKIT_NAMESPACE::nn
