// The products that adapters are made of, and how they end. Nothing is checked here.
#pragma once

#include "../matmul/matmul.hpp"
#include "adapter.hpp"
#include "base.hpp"

namespace MLKIT_NAMESPACE {
class cuda;  // core/cuda.cuh
}

namespace MLKIT_NAMESPACE::lora::detail {

/// ((x * value * rows[row] -> kept) * columns[col] + bias[col] + row_bias[row] + add[row, col]) * last[row], where null
/// means absent. One type of stage for all of LoRA's products, so that they share their kernels.
template <class A, class B, class Out>
struct finish {
  A value = 1;
  const A* rows = nullptr;
  const A* columns = nullptr;
  const B* bias = nullptr;
  const Out* add = nullptr;
  index_t add_row = 0, add_column = 1;
  const A* last = nullptr;
  const B* row_bias = nullptr;
  A* kept = nullptr;  // [row, col], where each row is a run
  index_t kept_row = 0;

  MLKIT_HOST_DEVICE constexpr A operator()(A x, index_t row, index_t col) const noexcept {
    x = x * (rows ? value * rows[row] : value);
    if (kept) kept[row * kept_row + col] = x;
    if (columns) x = x * columns[col];
    if (bias) x = x + static_cast<A>(bias[col]);
    if (row_bias) x = x + static_cast<A>(row_bias[row]);
    if (add) x = x + static_cast<A>(add[row * add_row + col * add_column]);
    return last ? x * last[row] : x;
  }

  bool changes_nothing() const noexcept {
    return value == 1 && !rows && !columns && !bias && !add && !last && !row_bias && !kept;
  }

  finish& keeping(const matrix_view<A>& c) noexcept {
    kept = c.data;
    kept_row = c.stride(0);
    return *this;
  }
  finish& adding(const matrix_view<Out>& c) noexcept {
    add = c.data;
    add_row = c.stride(0);
    add_column = c.stride(1);
    return *this;
  }
};

/// (x + w[ids[row], col]) * factors[col]: the rows of an embedding's weight; factors may be null.
template <class W, class I, class A>
struct add_token_rows {
  matrix_view<const W> w;
  const I* ids;
  const A* factors = nullptr;

  MLKIT_HOST_DEVICE constexpr A operator()(A x, index_t row, index_t col) const noexcept {
    x = x + static_cast<A>(w(ids[row], col));
    return factors ? x * factors[col] : x;
  }
};

// The type that sums over these element types are kept in.
template <class... T>
using sums_t = std::conditional_t<(std::is_same_v<T, double> || ...), double, float>;

template <class... T>
constexpr void check_types() {
  static_assert((std::is_same_v<T, double> && ...) || (!std::is_same_v<T, double> && ...),
                "lora: f64 goes with f64 alone: x, base, adapter and outputs are all f64, or none is");
}

// What an operand of depth 0 points at: nothing of it is read, but an address may be computed.
template <class T>
inline constexpr T no_elements{};

/// Refuses executors that a function has no kernels for.
template <class Executor>
constexpr void check_on_cpu() {
  static_assert(std::is_same_v<Executor, cpu>,
                "lora: this function runs on mlkit::cpu alone; docs/support.md says which run on a GPU");
}

/// An operand of depth 0: what a segment without an adapter multiplies.
template <class T>
operand<dense_source<T>> nothing(index_t lines) noexcept {
  return {{&no_elements<T>, lines, 0, 0, 1}, true};
}

/// c = epilogue(left right + left2 right2): columns appended along k.
template <class E, class Left, class Right, class Left2, class Right2, class C, class Stage>
void multiply(const cpu& exec, const operand<Left>& left, const operand<Right>& right, const operand<Left2>& left2,
              const operand<Right2>& right2, const matrix_view<C>& c, const Stage& stage) {
  const epilogue<Stage> e{stage};
  run_product<E>(exec, make_product(c, e, segment<Left, Right>{left, right}, segment<Left2, Right2>{left2, right2}));
}

template <class T>
matrix_view<T> rows_of(const matrix_view<T>& v, index_t first, index_t count) noexcept {
  return {v.data + first * v.stride(0), {count, v.extent(1)}, v.strides};
}

template <class T>
matrix_view<const T> as_const(const matrix_view<T>& v) noexcept {
  return v;
}

// Calls f with c as A: what f adds to it in several steps is rounded to c's type once, at the end.
template <class A, class G, class F>
void summed_as(const matrix_view<G>& c, F&& f) {
  if constexpr (std::is_same_v<A, G>) {
    f(c);
  } else {
    const workspace<A> memory(c.size());
    const matrix_view<A> sums(memory.data(), c.extents);
    for (index_t i = 0; i < c.extent(0); ++i)
      for (index_t j = 0; j < c.extent(1); ++j) sums(i, j) = static_cast<A>(c(i, j));
    f(sums);
    for (index_t i = 0; i < c.extent(0); ++i)
      for (index_t j = 0; j < c.extent(1); ++j) c(i, j) = static_cast<G>(sums(i, j));
  }
}

// The operands of a dense matrix.
template <class T>
operand<dense_source<std::remove_const_t<T>>> left_of(const matrix_view<T>& v) noexcept {
  return dense_operand<std::remove_const_t<T>>(v, 0);
}
template <class T>
operand<dense_source<std::remove_const_t<T>>> right_of(const matrix_view<T>& v) noexcept {
  return dense_operand<std::remove_const_t<T>>(v, 1);
}

template <class Base>
using bias_t = typename std::remove_cvref_t<decltype(std::declval<const Base&>().bias)>::value_type;

// Tokens whose h is held at once, so that scratch memory does not grow with their number.
inline constexpr index_t tokens_at_once = 8192;

}  // namespace MLKIT_NAMESPACE::lora::detail

#define MLKIT_FOREACH "../lora/cpu/stages-inl.hpp"
#include "../simd/foreach_isa.hpp"
