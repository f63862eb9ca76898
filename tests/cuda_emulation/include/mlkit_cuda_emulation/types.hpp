// CUDA C++'s keywords, and its vector types.
#pragma once

#include <cstddef>
#include <cstdint>

// By its visibility symbols.cpp knows a kernel from other functions, unless it has internal linkage.
#define __global__ __attribute__((visibility("protected")))
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One for each host thread, which runs one block at a time. The symbol table of the program says where they are and how
// large: symbols.cpp. No two of them share a line of checker.cpp's.
#define __shared__ static thread_local __attribute__((aligned(64), used, unused))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) noexcept : x(x_), y(y_), z(z_) {}
};

#define MLKIT_EMULATED_VECTORS(name, T, a1, a2, a4)                              \
  struct __attribute__((aligned(a1))) name##1 {                                  \
    T x;                                                                         \
  };                                                                             \
  struct __attribute__((aligned(a2))) name##2 {                                  \
    T x, y;                                                                      \
  };                                                                             \
  struct __attribute__((aligned(a1))) name##3 {                                  \
    T x, y, z;                                                                   \
  };                                                                             \
  struct __attribute__((aligned(a4))) name##4 {                                  \
    T x, y, z, w;                                                                \
  };                                                                             \
  constexpr name##1 make_##name##1(T x) noexcept { return {x}; }                 \
  constexpr name##2 make_##name##2(T x, T y) noexcept { return {x, y}; }         \
  constexpr name##3 make_##name##3(T x, T y, T z) noexcept { return {x, y, z}; } \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) noexcept { return {x, y, z, w}; }

MLKIT_EMULATED_VECTORS(char, signed char, 1, 2, 4)
MLKIT_EMULATED_VECTORS(uchar, unsigned char, 1, 2, 4)
MLKIT_EMULATED_VECTORS(short, short, 2, 4, 8)
MLKIT_EMULATED_VECTORS(ushort, unsigned short, 2, 4, 8)
MLKIT_EMULATED_VECTORS(int, int, 4, 8, 16)
MLKIT_EMULATED_VECTORS(uint, unsigned, 4, 8, 16)
MLKIT_EMULATED_VECTORS(longlong, long long, 8, 16, 16)
MLKIT_EMULATED_VECTORS(ulonglong, unsigned long long, 8, 16, 16)
MLKIT_EMULATED_VECTORS(float, float, 4, 8, 16)
MLKIT_EMULATED_VECTORS(double, double, 8, 16, 16)
#undef MLKIT_EMULATED_VECTORS
