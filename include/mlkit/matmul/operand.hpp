// Operands: what a matrix product reads. A view, or any source that can produce runs of its elements (a prologue).
#pragma once

#include <type_traits>

#include "../core/view.hpp"

namespace MLKIT_NAMESPACE {

/// A source of matrix elements that are produced while a panel is packed: dequantised, scaled, masked, ...
///
/// `decode(row, col, count, out)` writes elements [row, col .. col + count) of the source to out[0 .. count), in the
/// type of out (float, double or bf16). It is called once for each element of a panel, never for the whole matrix at
/// once, from several threads at once, and must not throw.
///
/// A source may have `check(function, name)`, which throws for what cannot be read, and `each_view(use)`, which calls
/// use(part, view) for the memory that it reads, so that an output in the same place is refused.
template <class S>
concept matrix_source = !viewable<S, 2> && requires(const S& s) {
  { s.rows() } -> std::convertible_to<index_t>;
  { s.cols() } -> std::convertible_to<index_t>;
  typename S::value_type;
};

/// A source transposed: element [i, j] is element [j, i] of what it wraps.
template <matrix_source S>
struct transposed_source {
  using value_type = typename S::value_type;
  S source;
  index_t rows() const noexcept { return source.cols(); }
  index_t cols() const noexcept { return source.rows(); }
};

template <matrix_source S>
  requires(!has_view<S>)
constexpr transposed_source<S> transposed(const S& source) noexcept { return {source}; }

/// The elements of a view, each passed through `f(x, row, col)` or `f(x)` while it is read: a prologue on an operand.
/// matmul(exec, prologue{x, [](float v) { return v * v; }}, w, y).
template <class T, class F>
struct prologue {
  static_assert(
      !requires(const F& f) { f.check("", index_t{}, index_t{}); },
      "prologue: what a stage of an epilogue reads is not checked here; read it in a callable");

  using value_type = T;
  matrix_view<const T> view;
  F f;

  template <viewable<2> X>
  prologue(X&& x, F function) : view(as_view(x)), f(std::move(function)) {}

  index_t rows() const noexcept { return view.extent(0); }
  index_t cols() const noexcept { return view.extent(1); }
  void check(std::string_view function, std::string_view name) const { detail::check_view(function, name, view); }
  template <class Function>
  void each_view(Function&& use) const {
    use("", view);
  }
  template <class U>
  void decode(index_t row, index_t col, int count, U* MLKIT_RESTRICT out) const noexcept {
    using A = accumulator_t<T>;
    const T* p = view.data + row * view.strides[0] + col * view.strides[1];
    for (int i = 0; i < count; ++i) {
      const A x = static_cast<A>(p[i * view.strides[1]]);
      if constexpr (std::is_invocable_v<const F&, A, index_t, index_t>)
        out[i] = static_cast<U>(f(x, row, col + i));
      else
        out[i] = static_cast<U>(f(x));
    }
  }
};
template <viewable<2> X, class F>
prologue(X&&, F) -> prologue<element_t<std::remove_reference_t<X>>, F>;

namespace detail {

/// A dense matrix in memory, as a source: element [row, col] at data[row * row_stride + col * col_stride].
template <class T>
struct dense_source {
  using value_type = T;
  const T* data = nullptr;
  index_t n_rows = 0, n_cols = 0;
  index_t row_stride = 0, col_stride = 0;
  index_t rows() const noexcept { return n_rows; }
  index_t cols() const noexcept { return n_cols; }
};

template <class S>
inline constexpr bool is_transposed = false;
template <class S>
inline constexpr bool is_transposed<transposed_source<S>> = true;

template <class S>
inline constexpr bool is_dense = false;
template <class T>
inline constexpr bool is_dense<dense_source<T>> = true;

/// One operand of a product, seen as lines (rows of a, columns of b) of depth k.
/// depth_first: a run of the source goes along k, so that line l is source row l; else along lines, and source row p is
/// depth p of all lines.
template <class Source>
struct operand {
  using source_type = Source;
  Source source;
  bool depth_first;
  index_t lines() const noexcept { return depth_first ? source.rows() : source.cols(); }
  index_t depth() const noexcept { return depth_first ? source.cols() : source.rows(); }
};

template <class T>
operand<dense_source<T>> dense_operand(const matrix_view<const T>& v, int line_dim) noexcept {
  const int depth_dim = 1 - line_dim;
  const bool depth_first = v.stride(depth_dim) == 1 || v.stride(line_dim) != 1;
  const int row = depth_first ? line_dim : depth_dim, col = 1 - row;
  return {{v.data, v.extent(row), v.extent(col), v.stride(row), v.stride(col)}, depth_first};
}

// The left operand: lines are rows.
template <class X>
auto left_operand(const X& x) {
  if constexpr (viewable<const X, 2>)
    return dense_operand<element_t<const X>>(as_view(x), 0);
  else if constexpr (is_transposed<X>)
    return operand<decltype(x.source)>{x.source, false};
  else
    return operand<X>{x, true};
}

// The right operand: lines are columns.
template <class X>
auto right_operand(const X& x) {
  if constexpr (viewable<const X, 2>)
    return dense_operand<element_t<const X>>(as_view(x), 1);
  else if constexpr (is_transposed<X>)
    return operand<decltype(x.source)>{x.source, true};
  else
    return operand<X>{x, false};
}

template <class X>
concept matmul_operand = viewable<X, 2> || matrix_source<std::remove_cvref_t<X>>;

template <class X>
struct operand_value {
  using type = typename X::value_type;
};
template <class X>
  requires viewable<X, 2>
struct operand_value<X> {
  using type = element_t<X>;
};

// The type that a product of these operand types is multiplied in.
template <class A, class B>
struct product_type {
  static_assert(std::is_same_v<A, double> == std::is_same_v<B, double>,
                "matmul: f64 operands multiply f64 operands only; convert one of them");
  using type = std::conditional_t<std::is_same_v<A, double>, double,
                                  std::conditional_t<std::is_same_v<A, bf16> && std::is_same_v<B, bf16>, bf16, float>>;
};
template <class A, class B>
using product_type_t = typename product_type<A, B>::type;

}  // namespace detail
}  // namespace MLKIT_NAMESPACE
