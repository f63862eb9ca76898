// The built-in variables and functions of CUDA C++ that mlkit's kernels use.
#pragma once

#include <math.h>  // NOLINT: kernels call them without std::

#include <bit>
#include <cmath>
#include <type_traits>

#include "kernel.hpp"

#define threadIdx (::cuda_emulation::thread_index())
#define blockIdx (::cuda_emulation::block_index())
inline constexpr int warpSize = 32;

// Where in the source a call stands: all threads that meet stand at the same place.
#define MLKIT_EMULATED_PLACE int line = __builtin_LINE(), const char *file = __builtin_FILE()

inline void __syncthreads(MLKIT_EMULATED_PLACE) { ::cuda_emulation::barrier(0, 0, "__syncthreads", line, file); }
void __syncwarp(unsigned mask = 0xffffffffu, MLKIT_EMULATED_PLACE);
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {}

namespace cuda_emulation {

template <class T>
T shuffle(const char* name, pick how, unsigned mask, T value, unsigned lane, int width, int line, const char* file) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 32 and 64 bit numbers");
  T result;
  warp_call call{.name = name,
                 .mask = mask,
                 .evaluate = exchange_lanes,
                 .in = &value,
                 .out = &result,
                 .bytes = sizeof(T),
                 .argument = static_cast<int>(how) << 8 | static_cast<int>(lane & 0xffu),
                 .width = width};
  meet(call, line, file);
  return result;
}
unsigned vote(const char* name, unsigned mask, int predicate, int line, const char* file);

}  // namespace cuda_emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, MLKIT_EMULATED_PLACE) {
  using namespace cuda_emulation;
  return shuffle("__shfl_sync", pick::index, mask, value, static_cast<unsigned>(lane), width, line, file);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, MLKIT_EMULATED_PLACE) {
  using namespace cuda_emulation;
  return shuffle("__shfl_up_sync", pick::up, mask, value, delta, width, line, file);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, MLKIT_EMULATED_PLACE) {
  using namespace cuda_emulation;
  return shuffle("__shfl_down_sync", pick::down, mask, value, delta, width, line, file);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, MLKIT_EMULATED_PLACE) {
  using namespace cuda_emulation;
  return shuffle("__shfl_xor_sync", pick::exclusive_or, mask, value, static_cast<unsigned>(lane_mask), width, line,
                 file);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, MLKIT_EMULATED_PLACE) {
  return cuda_emulation::vote("__ballot_sync", mask, predicate, line, file);
}
inline int __any_sync(unsigned mask, int predicate, MLKIT_EMULATED_PLACE) {
  return cuda_emulation::vote("__any_sync", mask, predicate, line, file) != 0;
}
inline int __all_sync(unsigned mask, int predicate, MLKIT_EMULATED_PLACE) {
  return cuda_emulation::vote("__all_sync", mask, predicate, line, file) == mask;
}
#undef MLKIT_EMULATED_PLACE

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, std::type_identity_t<T> value) {
  *p = value;
}
template <class T>
void __stcg(T* p, std::type_identity_t<T> value) {
  *p = value;
}

// They return what was there before.
int atomicAdd(int* p, int value);
unsigned atomicAdd(unsigned* p, unsigned value);
unsigned long long atomicAdd(unsigned long long* p, unsigned long long value);
float atomicAdd(float* p, float value);
double atomicAdd(double* p, double value);
int atomicMax(int* p, int value);
unsigned atomicMax(unsigned* p, unsigned value);
unsigned long long atomicMax(unsigned long long* p, unsigned long long value);
int atomicMin(int* p, int value);
unsigned atomicMin(unsigned* p, unsigned value);
unsigned long long atomicMin(unsigned long long* p, unsigned long long value);
int atomicOr(int* p, int value);
unsigned atomicOr(unsigned* p, unsigned value);
int atomicAnd(int* p, int value);
unsigned atomicAnd(unsigned* p, unsigned value);
int atomicExch(int* p, int value);
unsigned atomicExch(unsigned* p, unsigned value);
unsigned long long atomicExch(unsigned long long* p, unsigned long long value);
float atomicExch(float* p, float value);
int atomicCAS(int* p, int expected, int value);
unsigned atomicCAS(unsigned* p, unsigned expected, unsigned value);
unsigned long long atomicCAS(unsigned long long* p, unsigned long long expected, unsigned long long value);

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= ((x >> i) & 1u) << (31 - i);
  return r;
}
/// Byte i of the result is byte (selector >> 4 i) & 7 of the eight of low and high.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const std::uint64_t both = std::uint64_t{high} << 32 | low;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) r |= static_cast<unsigned>(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(std::uint64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }

inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long min(long a, long b) { return b < a ? b : a; }
inline long max(long a, long b) { return a < b ? b : a; }
inline unsigned long min(unsigned long a, unsigned long b) { return b < a ? b : a; }
inline unsigned long max(unsigned long a, unsigned long b) { return a < b ? b : a; }
inline long long min(long long a, long long b) { return b < a ? b : a; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return b < a ? b : a; }
inline unsigned long long max(unsigned long long a, unsigned long long b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
