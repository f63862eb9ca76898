// vec<T>: one SIMD register of float or double, in each instruction set's namespace.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../core/dtype.hpp"
#include "isa.hpp"

#if MLKIT_X86
#if defined(__GNUC__) && \
    !defined(__clang__)  // GCC's own intrinsics read registers that they leave undefined on purpose
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define MLKIT_FOREACH "vec-inl.hpp"
#include "foreach_isa.hpp"
