// How kernels read operands and write outputs.
#pragma once

#include "../../core/cuda.cuh"
#include "../../core/cuda/ptx.cuh"
#include "../product.hpp"

namespace MLKIT_NAMESPACE::detail {

/// Element [row, col] of a source as an A. Every source that a kernel takes has an overload.
template <class A, class T>
__device__ __forceinline__ A element(const dense_source<T>& s, index_t row, index_t col) {
  return static_cast<A>(s.data[row * s.row_stride + col * s.col_stride]);
}

/// An operand as kernels take it.
template <class Source>
struct device_operand {
  Source source;
  bool depth_first;
  index_t lines, depth;

  device_operand(const operand<Source>& op) noexcept
      : source(op.source), depth_first(op.depth_first), lines(op.lines()), depth(op.depth()) {}
};

/// What a kernel is given: stage(left right + left2 right2), where lines of the left are rows of c and lines of the
/// right its columns. Each product has a depth of its own, which may be 0.
template <class Left, class Right, class Left2, class Right2, class Out, class Stage>
struct device_product {
  device_operand<Left> left;
  device_operand<Right> right;
  device_operand<Left2> left2;
  device_operand<Right2> right2;
  matrix_view<Out> c;
  Stage stage;

  // c[row, col] = stage(x).
  template <class A>
  __device__ __forceinline__ void store(A x, index_t row, index_t col) const {
    c.data[row * c.stride(0) + col * c.stride(1)] = static_cast<Out>(finish_element(stage, x, row, col, A{}));
  }
};

// 16-bit types in pairs: two f32 as one word, the first in its low half.
template <class E>
__device__ __forceinline__ std::uint32_t pack_pair(float low, float high) {
  if constexpr (std::is_same_v<E, bf16>)
    return ptx::pack_bf16(low, high);
  else
    return ptx::pack_f16(low, high);
}
template <class E>
__device__ __forceinline__ void multiply_tiles(float (&d)[4], const std::uint32_t (&a)[4],
                                               const std::uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<E, bf16>)
    ptx::mma_bf16(d, a, b);
  else
    ptx::mma_f16(d, a, b);
}

/// Types that tensor cores multiply.
template <class E>
inline constexpr bool is_half = std::is_same_v<E, bf16> || std::is_same_v<E, f16>;

/// A dense operand whose lines are runs along the depth that 16-byte loads reach: all starts are multiples of 16 bytes,
/// and a whole number of loads makes a line.
template <class T>
bool reached_by_vectors(const operand<dense_source<T>>& op) noexcept {
  constexpr index_t lanes = 16 / sizeof(T);
  const auto& s = op.source;
  return op.depth_first && (s.col_stride == 1 || s.cols() == 1) && s.cols() % lanes == 0 &&
         (s.row_stride % lanes == 0 || s.rows() == 1) && reinterpret_cast<std::uintptr_t>(s.data) % 16 == 0;
}

inline dim3 grid_of(index_t x, index_t y = 1) noexcept {
  return {static_cast<unsigned>(x), static_cast<unsigned>(y), 1};
}

}  // namespace MLKIT_NAMESPACE::detail
