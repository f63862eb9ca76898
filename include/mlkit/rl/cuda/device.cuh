// What rl's kernels share: wide loads and stores, arithmetic that is the same on both sides, warps and blocks.
#pragma once

#include <cmath>
#include <limits>

#include "../../core/cuda.cuh"
#include "../../core/cuda/ptx.cuh"
#include "../steps.hpp"

namespace MLKIT_NAMESPACE::rl::detail {

namespace ptx = mlkit::detail::ptx;

inline constexpr int warp_threads = 32;
inline constexpr unsigned whole_warp = 0xffffffffu;

// a b + c, rounded once.
__device__ __forceinline__ float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}
__device__ __forceinline__ double fused(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return ::fma(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

template <class T>
__device__ __forceinline__ T not_a_number() {
  return static_cast<T>(__builtin_nanf(""));
}

// Sixteen bytes of elements.
template <class T>
struct alignas(16) quad {
  static constexpr int count = 16 / static_cast<int>(sizeof(T));
  T of[count];
};

template <class T>
__device__ __forceinline__ bool on_quad(const T* p) {
  return (reinterpret_cast<std::uintptr_t>(p) & 15) == 0;
}
template <class T>
__device__ __forceinline__ quad<T> load_quad(const T* p) {
  return mlkit::detail::bit_cast<quad<T>>(*reinterpret_cast<const uint4*>(p));
}
template <class T>
__device__ __forceinline__ void store_quad(T* p, const quad<T>& q) {
  *reinterpret_cast<uint4*>(p) = mlkit::detail::bit_cast<uint4>(q);
}

// Elements p[0], p[step], ... as far as there are any, up to N; where Wide, 16 bytes at a time if they lie so. The
// others are 0.
template <int N, bool Wide, class T>
__device__ __forceinline__ void load_steps(const T* p, index_t step, int count, T (&to)[N]) {
  constexpr int wide = quad<T>::count;
  if constexpr (Wide && N % wide == 0) {
    if (step == 1 && count == N && on_quad(p)) {
#pragma unroll
      for (int i = 0; i < N; i += wide) {
        const quad<T> q = load_quad(p + i);
#pragma unroll
        for (int j = 0; j < wide; ++j) to[i + j] = q.of[j];
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = i < count ? p[i * step] : T{};
}
template <int N, bool Wide, class T>
__device__ __forceinline__ void store_steps(T* p, index_t step, int count, const T (&from)[N]) {
  constexpr int wide = quad<T>::count;
  if constexpr (Wide && N % wide == 0) {
    if (step == 1 && count == N && on_quad(p)) {
#pragma unroll
      for (int i = 0; i < N; i += wide) {
        quad<T> q;
#pragma unroll
        for (int j = 0; j < wide; ++j) q.of[j] = from[i + j];
        store_quad(p + i, q);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < count) p[i * step] = from[i];
}

// 1 in each byte that is not 0.
__device__ __forceinline__ std::uint32_t set_flags(std::uint32_t bytes) {
  return ((bytes | ((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu)) >> 7) & 0x01010101u;
}

// Flags p[0], p[step], ..., byte i of the result for step i; 0 beyond count.
template <int N, bool Wide>
__device__ __forceinline__ std::uint32_t load_flags(const std::uint8_t* p, index_t step, int count) {
  static_assert(N == 4);
  if (Wide && step == 1 && count >= N && (reinterpret_cast<std::uintptr_t>(p) & 3) == 0)
    return *reinterpret_cast<const std::uint32_t*>(p);
  std::uint32_t all = 0;
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < count) all |= std::uint32_t{p[i * step]} << (8 * i);
  return all;
}

// A number of storage as one of sums, and back.
template <class T>
__device__ __forceinline__ accumulator_t<T> widen_one(const T& x) {
  if constexpr (std::is_same_v<T, f16>)
    return ptx::widen_f16(x.bits);
  else
    return static_cast<accumulator_t<T>>(x);
}
template <class T>
__device__ __forceinline__ T narrow_one(accumulator_t<T> x) {
  if constexpr (std::is_same_v<T, bf16>)
    return bf16::from_bits(static_cast<std::uint16_t>(ptx::pack_bf16(x, 0.0f)));
  else if constexpr (std::is_same_v<T, f16>)
    return f16::from_bits(static_cast<std::uint16_t>(ptx::pack_f16(x, 0.0f)));
  else
    return x;
}

// Where sequence b is: tokens [first, last) of a row. Starts that make no sense end within the tokens.
struct token_range {
  index_t row, first = 0, last;

  __device__ __forceinline__ token_range(const sequence_places& places, index_t b, index_t tokens)
      : row(b), last(places.time) {
    if (!places.starts) return;
    row = 0;
    first = min(max(index_t{places.starts[b]}, index_t{0}), tokens);
    last = min(max(index_t{places.starts[b + 1]}, first), tokens);
  }
};

}  // namespace MLKIT_NAMESPACE::rl::detail
