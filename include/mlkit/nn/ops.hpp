// Operations without parameters of their own: scaling, sums, looking up, activations; with them, products and layouts.
#pragma once

#include "../core/functors.hpp"
#include "broadcast.hpp"
#include "layout.hpp"

namespace MLKIT_NAMESPACE::nn {

/// factor * x + offset.
template <real T>
var<T> scale(var<T> x, std::type_identity_t<T> factor, std::type_identity_t<T> offset = 0) {
  tape<T>& t = x.on();
  const var<T> y = t.make(x.shape(), {x});
  const T* px = x.data();
  T* py = y.data();
  const index_t n = x.size();
  detail::for_each(t.exec(), n, [=](index_t i) { py[i] = factor * px[i] + offset; });
  t.on_backward(y, [=] {
    const T* dy = y.grad_data();
    T* dx = x.grad_data();
    detail::for_each(y.on().exec(), n, [=](index_t i) { dx[i] += factor * dy[i]; });
  });
  return y;
}

template <real T>
var<T> operator*(std::type_identity_t<T> factor, var<T> x) {
  return scale(x, factor);
}

/// The sum of all elements, one number.
template <real T>
var<T> sum(var<T> x) {
  tape<T>& t = x.on();
  const var<T> y = t.make(shape{}, {x});
  const T* px = x.data();
  *y.data() = static_cast<T>(detail::sum_of(t.exec(), x.size(), [=](index_t i) { return px[i]; }));
  t.on_backward(y, [=] {
    const T g = *y.grad_data();
    T* dx = x.grad_data();
    detail::for_each(y.on().exec(), x.size(), [=](index_t i) { dx[i] += g; });
  });
  return y;
}

/// Rows of a table: table [n, d], ids in [0, n), result [ids, d], or [..., d] for ids of the shape that is given:
/// tokens of several texts are ids of shape [texts, tokens]. Equal ids add up in the gradient, in their order.
template <real T>
var<T> embedding(var<T> table, std::span<const std::int32_t> ids, const shape& of_ids) {
  const index_t n = table.rows(), d = table.columns(), count = static_cast<index_t>(ids.size());
  if (of_ids.size() != count)
    detail::fail_shape("nn::embedding: there are ", count, " ids, which do not fill ", of_ids.text());
  for (std::size_t i = 0; i < ids.size(); ++i)
    if (ids[i] < 0 || ids[i] >= n)
      detail::fail_value("nn::embedding: id ", ids[i], " at place ", i, " is outside the table of ", n, " rows");
  tape<T>& t = table.on();
  const var<T> y = t.make(of_ids.followed_by(d), {table});
  auto* kept = t.template scratch_of<std::int32_t>(count);
  std::copy(ids.begin(), ids.end(), kept);
  for (index_t r = 0; r < count; ++r) std::copy_n(table.data() + kept[r] * d, d, y.data() + r * d);
  t.on_backward(y, [=] {
    const T* dy = y.grad_data();
    T* dt = table.grad_data();
    for (index_t r = 0; r < count; ++r)
      for (index_t c = 0; c < d; ++c) dt[kept[r] * d + c] += dy[r * d + c];
  });
  return y;
}
template <real T>
var<T> embedding(var<T> table, std::span<const std::int32_t> ids) {
  return embedding(table, ids, shape{static_cast<index_t>(ids.size())});
}

/// What activate accepts: mlkit's functors (silu, gelu, gelu_tanh, relu, tanh, sigmoid) and any of the user's own that
/// have f(x) and f.derivative(x) for a scalar x.
template <class F, class T>
concept activation = requires(const F& f, T x) {
  { f(x) } -> std::convertible_to<T>;
  { f.derivative(x) } -> std::convertible_to<T>;
};

/// f(x), element by element: activate(x, mlkit::silu{}).
template <real T, activation<T> F>
var<T> activate(var<T> x, F f) {
  tape<T>& t = x.on();
  const var<T> y = t.make(x.shape(), {x});
  const index_t n = x.size();
  const auto forward = MLKIT_SELECT_WITHOUT_BF16(activate_range<F, T>);
  const T* px = x.data();
  T* py = y.data();
  detail::for_blocks(t.exec(), n, [&](index_t begin, index_t end) { forward(begin, end, f, px, py); });
  t.on_backward(y, [=] {
    const auto backward = MLKIT_SELECT_WITHOUT_BF16(activate_gradient_range<F, T>);
    const T* dy = y.grad_data();
    T* dx = x.grad_data();
    detail::for_blocks(y.on().exec(), n, [&](index_t begin, index_t end) { backward(begin, end, f, px, dy, dx); });
  });
  return y;
}

}  // namespace MLKIT_NAMESPACE::nn
