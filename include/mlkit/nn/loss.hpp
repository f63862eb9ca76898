// Losses: one number from a prediction.
#pragma once

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
/// exponential overflows. Throws value_error if every row is ignored.
template <real T>
var<T> cross_entropy(var<T> logits, std::span<const std::int32_t> labels) {
  const index_t rows = logits.rows(), classes = logits.columns();
  detail::check_extent("nn::cross_entropy", "labels", "elements", static_cast<index_t>(labels.size()),
                       "the number of logit rows", rows);
  index_t counted = 0;
  for (const std::int32_t label : labels) {
    if (label == ignore_label) continue;
    if (label < 0 || label >= classes)
      detail::fail_value("nn::cross_entropy: label ", label, " is outside the ", classes, " classes");
    ++counted;
  }
  if (counted == 0) detail::fail_value("nn::cross_entropy: no row has a label");
  tape<T>& t = logits.on();
  const var<T> y = t.make(shape{}, {logits});
  auto* kept = t.template scratch_of<std::int32_t>(rows);
  std::copy(labels.begin(), labels.end(), kept);
  T* log_sum = t.scratch(rows);
  const T* p = logits.data();
  detail::for_rows(t.exec(), rows, classes, [=](index_t r) {
    const T* a = p + r * classes;
    const T high = *std::max_element(a, a + classes);
    double s = 0;
    for (index_t c = 0; c < classes; ++c) s += static_cast<double>(std::exp(a[c] - high));
    log_sum[r] = high + static_cast<T>(std::log(s));
  });
  const double total = detail::sum_of(t.exec(), rows, [=](index_t r) {
    return kept[r] == ignore_label ? 0.0 : static_cast<double>(log_sum[r] - p[r * classes + kept[r]]);
  });
  *y.data() = static_cast<T>(total / static_cast<double>(counted));
  t.on_backward(y, [=] {
    const T factor = *y.grad_data() / static_cast<T>(counted);
    T* d = logits.grad_data();
    detail::for_rows(y.on().exec(), rows, classes, [=](index_t r) {
      if (kept[r] == ignore_label) return;
      for (index_t c = 0; c < classes; ++c)
        d[r * classes + c] += factor * (std::exp(p[r * classes + c] - log_sum[r]) - (c == kept[r] ? T{1} : T{0}));
    });
  });
  return y;
}

}  // namespace MLKIT_NAMESPACE::nn
