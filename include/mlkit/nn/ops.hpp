// Operations without parameters of their own: sums, products, joining, looking up, activations.
#pragma once

#include "../core/functors.hpp"
#include "elementwise.hpp"
#include "tape.hpp"

namespace MLKIT_NAMESPACE::nn {
namespace detail {

// Whether b is repeated over the rows of a: a vector of a's last extent beside a matrix or more.
template <real T>
bool repeats(std::string_view function, const var<T>& a, const var<T>& b) {
  if (a.shape() == b.shape()) return false;
  if (b.shape().rank() == 1 && b.size() == a.columns()) return true;
  fail_shape(function, ": the first operand has shape ", a.shape().text(), ", but the second has ", b.shape().text(),
             ", which is neither that nor one row of it");
}

}  // namespace detail

/// a + b. b has a's shape, or is one row [columns] that is added to every row.
template <real T>
var<T> add(var<T> a, var<T> b) {
  const bool row = detail::repeats("nn::add", a, b);
  tape<T>& t = a.on();
  const var<T> y = t.make(a.shape(), {a, b});
  const index_t n = a.size(), columns = a.columns();
  const T *pa = a.data(), *pb = b.data();
  T* py = y.data();
  if (row)
    detail::for_rows(t.exec(), a.rows(), columns, [=](index_t r) {
      for (index_t c = 0; c < columns; ++c) py[r * columns + c] = pa[r * columns + c] + pb[c];
    });
  else
    detail::for_each(t.exec(), n, [=](index_t i) { py[i] = pa[i] + pb[i]; });
  t.on_backward(y, [=] {
    const cpu& exec = y.on().exec();
    const T* dy = y.grad_data();
    const auto pass = [&](const var<T>& to) {
      T* d = to.grad_data();
      detail::for_each(exec, n, [=](index_t i) { d[i] += dy[i]; });
    };
    if (a.needs_grad()) pass(a);
    if (!b.needs_grad()) return;
    if (row)
      detail::add_column_sums(exec, a.rows(), columns, b.grad_data(),
                              [=](index_t r, index_t c) { return dy[r * columns + c]; });
    else
      pass(b);
  });
  return y;
}

/// a * b, element by element. b has a's shape, or is one row [columns] that multiplies every row.
template <real T>
var<T> multiply(var<T> a, var<T> b) {
  const bool row = detail::repeats("nn::multiply", a, b);
  tape<T>& t = a.on();
  const var<T> y = t.make(a.shape(), {a, b});
  const index_t rows = a.rows(), columns = a.columns();
  const index_t step = row ? 0 : columns;  // from one row of b to the next
  const T *pa = a.data(), *pb = b.data();
  T* py = y.data();
  detail::for_rows(t.exec(), rows, columns, [=](index_t r) {
    for (index_t c = 0; c < columns; ++c) py[r * columns + c] = pa[r * columns + c] * pb[r * step + c];
  });
  t.on_backward(y, [=] {
    const cpu& exec = y.on().exec();
    const T* dy = y.grad_data();
    if (a.needs_grad()) {
      T* da = a.grad_data();
      detail::for_rows(exec, rows, columns, [=](index_t r) {
        for (index_t c = 0; c < columns; ++c) da[r * columns + c] += dy[r * columns + c] * pb[r * step + c];
      });
    }
    if (!b.needs_grad()) return;
    T* db = b.grad_data();
    if (row)
      detail::add_column_sums(exec, rows, columns, db,
                              [=](index_t r, index_t c) { return dy[r * columns + c] * pa[r * columns + c]; });
    else
      detail::for_each(exec, rows * columns, [=](index_t i) { db[i] += dy[i] * pa[i]; });
  });
  return y;
}

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
var<T> operator+(var<T> a, var<T> b) {
  return add(a, b);
}
template <real T>
var<T> operator*(var<T> a, var<T> b) {
  return multiply(a, b);
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

/// Joins values along the last dimension: [rows, c0], [rows, c1], ... to [rows, c0 + c1 + ...].
template <real T>
var<T> concat(std::vector<var<T>> parts) {
  if (parts.empty()) detail::fail_value("nn::concat: nothing to join");
  index_t columns = 0;
  for (const var<T>& p : parts) {
    if (p.shape().with_columns(0) != parts[0].shape().with_columns(0))
      detail::fail_shape("nn::concat: a part has shape ", p.shape().text(), ", but the first has ",
                         parts[0].shape().text());
    columns += p.columns();
  }
  tape<T>& t = parts[0].on();
  const var<T> y = t.make(parts[0].shape().with_columns(columns), parts);
  const index_t rows = y.rows();
  index_t at = 0;
  for (const var<T>& p : parts) {
    for (index_t r = 0; r < rows; ++r)
      std::copy_n(p.data() + r * p.columns(), p.columns(), y.data() + r * columns + at);
    at += p.columns();
  }
  t.on_backward(y, [y, rows, columns, parts = std::move(parts)] {
    const T* dy = y.grad_data();
    index_t from = 0;
    for (const var<T>& p : parts) {
      const index_t width = p.columns();
      if (p.needs_grad()) {
        T* d = p.grad_data();
        for (index_t r = 0; r < rows; ++r)
          for (index_t c = 0; c < width; ++c) d[r * width + c] += dy[r * columns + from + c];
      }
      from += width;
    }
  });
  return y;
}

/// Columns [first, first + count) of the last dimension.
template <real T>
var<T> slice(var<T> x, index_t first, index_t count) {
  const index_t columns = x.columns();
  if (first < 0 || count < 0 || first > columns || count > columns - first)
    detail::fail_shape("nn::slice: ", count, " columns from ", first, " on are asked for, but x has ", columns);
  tape<T>& t = x.on();
  const var<T> y = t.make(x.shape().with_columns(count), {x});
  const index_t rows = x.rows();
  for (index_t r = 0; r < rows; ++r) std::copy_n(x.data() + r * columns + first, count, y.data() + r * count);
  t.on_backward(y, [=] {
    const T* dy = y.grad_data();
    T* dx = x.grad_data();
    for (index_t r = 0; r < rows; ++r)
      for (index_t c = 0; c < count; ++c) dx[r * columns + first + c] += dy[r * count + c];
  });
  return y;
}

/// Rows of a table: table [n, d], ids in [0, n), result [ids, d]. Equal ids add up in the gradient, in their order.
template <real T>
var<T> embedding(var<T> table, std::span<const std::int32_t> ids) {
  const index_t n = table.rows(), d = table.columns(), count = static_cast<index_t>(ids.size());
  for (const std::int32_t id : ids)
    if (id < 0 || id >= n) detail::fail_value("nn::embedding: id ", id, " is outside the table of ", n, " rows");
  tape<T>& t = table.on();
  const var<T> y = t.make({count, d}, {table});
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
  const auto forward = MLKIT_SELECT(activate_range<F, T>);
  const T* px = x.data();
  T* py = y.data();
  detail::for_blocks(t.exec(), n, [&](index_t begin, index_t end) { forward(begin, end, f, px, py); });
  t.on_backward(y, [=] {
    const auto backward = MLKIT_SELECT(activate_gradient_range<F, T>);
    const T* dy = y.grad_data();
    T* dx = x.grad_data();
    detail::for_blocks(y.on().exec(), n, [&](index_t begin, index_t end) { backward(begin, end, f, px, dy, dx); });
  });
  return y;
}

}  // namespace MLKIT_NAMESPACE::nn
