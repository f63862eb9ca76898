// Elements under another shape or in another order: reshaping, exchanging dimensions, joining, cutting.
#pragma once

#include "elementwise.hpp"
#include "tape.hpp"

namespace MLKIT_NAMESPACE::nn {

/// The same elements under another shape of the same size.
template <real T>
var<T> reshape(var<T> x, const shape& s) {
  if (s.size() != x.size())
    detail::fail_shape("nn::reshape: x has shape ", x.shape().text(), ", which does not fill ", s.text());
  tape<T>& t = x.on();
  const var<T> y = t.make(s, {x});
  std::copy_n(x.data(), x.size(), y.data());
  t.on_backward(y, [=] {
    const T* dy = y.grad_data();
    T* dx = x.grad_data();
    detail::for_each(y.on().exec(), x.size(), [=](index_t i) { dx[i] += dy[i]; });
  });
  return y;
}

namespace detail {

// The dimension that a caller means: counted from the front, or below 0 from the back.
inline int dimension_of(std::string_view function, const shape& s, int dimension) {
  const int d = dimension < 0 ? dimension + s.rank() : dimension;
  if (d < 0 || d >= s.rank())
    fail_value(function, ": dimension = ", dimension, " is none of the ", s.rank(), " of shape ", s.text());
  return d;
}

// The product of s's extents [first, last).
inline index_t product_of(const shape& s, int first, int last) noexcept {
  index_t n = 1;
  for (int d = first; d < last; ++d) n *= s[d];
  return n;
}

// f(y's offset, x's offset) for every element of y, whose extents are `extents` and whose elements lie `strides` apart
// in x.
template <class F>
void for_permuted(const cpu& exec, std::array<index_t, 4> extents, std::array<index_t, 4> strides, const F& f) {
  for_rows(exec, extents[0] * extents[1] * extents[2], extents[3], [=](index_t row) {
    const index_t i2 = row % extents[2], i1 = row / extents[2] % extents[1], i0 = row / extents[2] / extents[1];
    const index_t from = i0 * strides[0] + i1 * strides[1] + i2 * strides[2];
    for (index_t i = 0; i < extents[3]; ++i) f(row * extents[3] + i, from + i * strides[3]);
  });
}

}  // namespace detail

/// The dimensions in another order: dimension d of the result is dimension order[d] of x, so that
/// permute(x, {0, 2, 3, 1}) of [n, c, h, w] is [n, h, w, c]. Throws value_error if `order` does not name each dimension
/// once.
template <real T>
var<T> permute(var<T> x, std::initializer_list<int> order) {
  const int rank = x.shape().rank();
  std::array<index_t, 4> extents{1, 1, 1, 1}, strides{};  // of the result, from the back
  unsigned seen = 0;
  index_t e[shape::max_rank] = {};
  int d = 0;
  if (static_cast<int>(order.size()) != rank)
    detail::fail_value("nn::permute: order has ", order.size(), " dimensions, but x has shape ", x.shape().text());
  for (const int from : order) {
    if (from < 0 || from >= rank || (seen >> from & 1u))
      detail::fail_value("nn::permute: order names dimension ", from, from < 0 || from >= rank ? "" : " twice",
                         ", but x has shape ", x.shape().text());
    seen |= 1u << from;
    e[d] = x.shape()[from];
    const auto at = static_cast<std::size_t>(shape::max_rank - rank + d++);
    extents[at] = x.shape()[from];
    strides[at] = detail::product_of(x.shape(), from + 1, rank);
  }
  tape<T>& t = x.on();
  const var<T> y = t.make(shape(e, rank), {x});
  detail::for_permuted(t.exec(), extents, strides,
                       [py = y.data(), px = x.data()](index_t to, index_t from) { py[to] = px[from]; });
  t.on_backward(y, [=] {
    detail::for_permuted(y.on().exec(), extents, strides,
                         [dy = y.grad_data(), dx = x.grad_data()](index_t to, index_t from) { dx[from] += dy[to]; });
  });
  return y;
}

/// The last two dimensions exchanged: [n, c, hw] becomes [n, hw, c].
template <real T>
var<T> transpose(var<T> x) {
  switch (x.shape().rank()) {
    case 2: return permute(x, {1, 0});
    case 3: return permute(x, {0, 2, 1});
    case 4: return permute(x, {0, 1, 3, 2});
    default: detail::fail_shape("nn::transpose: x has shape ", x.shape().text(), ", which has no two last dimensions");
  }
}

/// Joins values along one dimension, by default the last: [rows, c0], [rows, c1], ... to [rows, c0 + c1 + ...], or
/// channels of images with dimension 1. All other extents are the same; a negative dimension counts from the back.
template <real T>
var<T> concat(std::vector<var<T>> parts, int dimension = -1) {
  if (parts.empty()) detail::fail_value("nn::concat: nothing to join");
  const shape& first = parts[0].shape();
  const int d = detail::dimension_of("nn::concat", first, dimension);
  index_t total = 0;
  for (const var<T>& p : parts) {
    if (p.shape().rank() != first.rank() || p.shape().with(d, 0) != first.with(d, 0))
      detail::fail_shape("nn::concat: a part has shape ", p.shape().text(), ", but the first has ", first.text());
    total += p.shape()[d];
  }
  tape<T>& t = parts[0].on();
  const var<T> y = t.make(first.with(d, total), parts);
  const index_t rows = detail::product_of(y.shape(), 0, d), columns = detail::product_of(y.shape(), d, first.rank());
  const auto width = [d](const var<T>& p) { return detail::product_of(p.shape(), d, p.shape().rank()); };
  index_t at = 0;
  for (const var<T>& p : parts) {
    const index_t w = width(p);
    detail::for_rows(t.exec(), rows, w, [=, from = p.data(), to = y.data() + at](index_t r) {
      std::copy_n(from + r * w, w, to + r * columns);
    });
    at += w;
  }
  t.on_backward(y, [y, rows, columns, width, parts = std::move(parts)] {
    const T* dy = y.grad_data();
    for (const var<T>& p : parts) {
      const index_t w = width(p);
      if (p.needs_grad())
        detail::for_rows(y.on().exec(), rows, w, [=, dp = p.grad_data()](index_t r) {
          for (index_t c = 0; c < w; ++c) dp[r * w + c] += dy[r * columns + c];
        });
      dy += w;
    }
  });
  return y;
}

/// Elements [first, first + count) of one dimension, by default the last; a negative dimension counts from the back.
template <real T>
var<T> slice(var<T> x, index_t first, index_t count, int dimension = -1) {
  const int d = detail::dimension_of("nn::slice", x.shape(), dimension), rank = x.shape().rank();
  const index_t extent = x.shape()[d];
  if (first < 0 || count < 0 || first > extent || count > extent - first)
    detail::fail_shape("nn::slice: ", count, d == rank - 1 ? " columns" : " elements", " from ", first,
                       " on are asked for, but x has ", extent);
  tape<T>& t = x.on();
  const var<T> y = t.make(x.shape().with(d, count), {x});
  const index_t rows = detail::product_of(x.shape(), 0, d), inner = detail::product_of(x.shape(), d + 1, rank);
  const index_t columns = extent * inner, width = count * inner, at = first * inner;
  detail::for_rows(t.exec(), rows, width, [=, px = x.data(), py = y.data()](index_t r) {
    std::copy_n(px + r * columns + at, width, py + r * width);
  });
  t.on_backward(y, [=] {
    detail::for_rows(y.on().exec(), rows, width, [=, dy = y.grad_data(), dx = x.grad_data()](index_t r) {
      for (index_t c = 0; c < width; ++c) dx[r * columns + at + c] += dy[r * width + c];
    });
  });
  return y;
}

}  // namespace MLKIT_NAMESPACE::nn
