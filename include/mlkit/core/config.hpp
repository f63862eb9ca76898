// Version, ABI namespace and the few macros that the rest of mlkit stands on.
#pragma once

#define MLKIT_VERSION_MAJOR 0
#define MLKIT_VERSION_MINOR 1
#define MLKIT_VERSION_PATCH 0

// Defined as 1: kernels are compiled for the narrowest and the widest instruction set alone, in half the time; for
// builds that look for faults rather than speed.
#if !defined(MLKIT_TWO_SETS)
#define MLKIT_TWO_SETS 0
#endif

// Every entity of mlkit lives in this inline namespace. Translation units compiled with and without OpenMP, or for all
// and for two instruction sets, hold different bodies under the same names, so they get different ABI namespaces and
// never mix silently.
#if defined(_OPENMP) && !defined(MLKIT_NO_OPENMP)
#define MLKIT_USE_OPENMP 1
#if MLKIT_TWO_SETS
#define MLKIT_ABI v0_openmp_two_sets
#else
#define MLKIT_ABI v0_openmp
#endif
#else
#define MLKIT_USE_OPENMP 0
#if MLKIT_TWO_SETS
#define MLKIT_ABI v0_two_sets
#else
#define MLKIT_ABI v0
#endif
#endif

#define MLKIT_NAMESPACE mlkit::inline MLKIT_ABI

#if defined(__CUDACC__)
#define MLKIT_HOST_DEVICE __host__ __device__
#pragma nv_diag_suppress 1675  // nvcc's front end does not know GCC's unroll pragma; the host compiler behind it does
#else
#define MLKIT_HOST_DEVICE
#endif

#define MLKIT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define MLKIT_UNROLL MLKIT_PRAGMA(clang loop unroll(full))
#elif defined(__GNUC__)
#define MLKIT_UNROLL MLKIT_PRAGMA(GCC unroll 64)
#else
#define MLKIT_UNROLL
#endif

// On a loop whose steps do not depend on each other. `omp simd` makes GCC vectorise it at -O2 already, but a compiler
// without -fopenmp or -fopenmp-simd warns of it; MLKIT_OPENMP_SIMD says that it has the latter, which it does not tell.
#if defined(_OPENMP) || defined(MLKIT_OPENMP_SIMD)
#define MLKIT_SIMD MLKIT_PRAGMA(omp simd)
#elif defined(__GNUC__) && !defined(__clang__)
#define MLKIT_SIMD MLKIT_PRAGMA(GCC ivdep)
#else
#define MLKIT_SIMD
#endif

#if defined(__GNUC__)
#define MLKIT_ALWAYS_INLINE inline __attribute__((always_inline))
#define MLKIT_RESTRICT __restrict__
#else
#define MLKIT_ALWAYS_INLINE inline
#define MLKIT_RESTRICT
#endif

#include <cstddef>
#include <cstdint>

namespace MLKIT_NAMESPACE {

/// Sizes, offsets and strides. Signed, 64 bits, counted in elements unless a name says bytes.
using index_t = std::int64_t;

namespace detail {

MLKIT_HOST_DEVICE constexpr index_t ceil_div(index_t a, index_t b) noexcept { return (a + b - 1) / b; }
MLKIT_HOST_DEVICE constexpr index_t round_up(index_t a, index_t b) noexcept { return ceil_div(a, b) * b; }

}  // namespace detail
}  // namespace MLKIT_NAMESPACE
