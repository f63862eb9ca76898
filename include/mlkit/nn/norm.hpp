// Layer normalisation and RMS normalisation over the last dimension.
#pragma once

#include "ops.hpp"

namespace MLKIT_NAMESPACE::nn {
namespace detail {

template <bool Centred, real T>
var<T> normalise(std::string_view function, var<T> x, var<T> gain, var<T> bias, double epsilon) {
  const index_t rows = x.rows(), columns = x.columns();
  if (columns == 0) fail_shape(function, ": x has shape ", x.shape().text(), ", without columns");
  if (!(epsilon >= 0)) fail_value(function, ": epsilon = ", epsilon, " is negative");
  const auto check = [&](std::string_view name, const var<T>& v) {
    check_extent(function, name, "elements", v.size(), "x", columns);
  };
  if (gain) check("gain", gain);
  if (bias) check("bias", bias);

  tape<T>& t = x.on();
  const var<T> y = t.make(x.shape(), {x, gain, bias});
  T* kept = t.scratch(rows * 2);  // mean and r of each row
  const T *px = x.data(), *pg = gain ? gain.data() : nullptr, *pb = bias ? bias.data() : nullptr;
  T* py = y.data();
  const auto forward = MLKIT_SELECT_WITHOUT_BF16(normalise_row<Centred, T>);
  for_rows(t.exec(), rows, columns, [=](index_t r) {
    forward(columns, px + r * columns, pg, pb, static_cast<T>(epsilon), py + r * columns, kept + 2 * r);
  });
  t.on_backward(y, [=] {
    const cpu& exec = y.on().exec();
    const T* dy = y.grad_data();
    if (x.needs_grad()) {
      T* dx = x.grad_data();
      const auto backward = MLKIT_SELECT_WITHOUT_BF16(normalise_row_gradient<Centred, T>);
      for_rows(exec, rows, columns, [=](index_t r) {
        backward(columns, px + r * columns, pg, kept + 2 * r, dy + r * columns, dx + r * columns);
      });
    }
    if (gain && gain.needs_grad())
      add_column_sums(exec, rows, columns, gain.grad_data(), [=](index_t r, index_t c) {
        return dy[r * columns + c] * (px[r * columns + c] - kept[2 * r]) * kept[2 * r + 1];
      });
    if (bias && bias.needs_grad())
      add_column_sums(exec, rows, columns, bias.grad_data(), [=](index_t r, index_t c) { return dy[r * columns + c]; });
  });
  return y;
}

}  // namespace detail

/// (x - mean) / sqrt(var + epsilon) * gain + bias over the last dimension; var is the biased one. gain, bias [columns],
/// each may be empty. Ba, Kiros, Hinton: "Layer normalization", 2016.
template <real T>
var<T> layer_norm(var<T> x, var<T> gain = {}, var<T> bias = {}, double epsilon = 1e-5) {
  return detail::normalise<true>("nn::layer_norm", x, gain, bias, epsilon);
}
/// x / sqrt(mean(x^2) + epsilon) * gain over the last dimension. gain [columns].
/// Zhang, Sennrich: "Root mean square layer normalization", 2019.
template <real T>
var<T> rms_norm(var<T> x, var<T> gain = {}, double epsilon = 1e-5) {
  return detail::normalise<false, T>("nn::rms_norm", x, gain, {}, epsilon);
}

/// A layer normalisation with its parameters, "<scope>.weight" and "<scope>.bias".
template <real T>
struct layer_norm_layer {
  parameter<T>* gain;
  parameter<T>* bias;

  layer_norm_layer(const scope<T>& in, index_t columns)
      : gain(&in.add("weight", {columns}, ones{})), bias(&in.add("bias", {columns}, zeros{})) {}
  var<T> operator()(var<T> x) const { return layer_norm(x, x.on().use(*gain), x.on().use(*bias)); }
};

}  // namespace MLKIT_NAMESPACE::nn
