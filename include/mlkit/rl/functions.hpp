// exp, log(sigmoid) and log(1 - exp) of one float or double, in arithmetic without branches: a loop over them is
// vectorised for the set that it is compiled for, and device code runs them too.
#pragma once

#include <cmath>
#include <concepts>

#include "../simd/math.hpp"

// What is called in loops that are to be vectorised must be inlined into them, whatever its size.
#define MLKIT_RL_INLINE MLKIT_HOST_DEVICE MLKIT_ALWAYS_INLINE

namespace MLKIT_NAMESPACE::rl::detail {

using namespace mlkit::detail;

#if !defined(__CUDA_ARCH__)

template <class T>
using bits_of = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;

// 2^n for an integer n in the normal range.
template <std::floating_point T>
MLKIT_ALWAYS_INLINE T power_of_two(T n) noexcept {
  using table = math_table<T>;
  using U = std::make_unsigned_t<bits_of<T>>;
  const T shifted = n + (table::round_shift + static_cast<T>(table::bias));
  return mlkit::detail::bit_cast<T>(static_cast<U>(mlkit::detail::bit_cast<U>(shifted) << table::mantissa_bits));
}

template <std::floating_point T>
MLKIT_ALWAYS_INLINE T round_to_integer(T x) noexcept {
  return (x + math_table<T>::round_shift) - math_table<T>::round_shift;
}

// e^x = (1 + rest) 2^n with rest = e^r - 1, |r| <= ln(2) / 2; x is kept within [exp_min, exp_max], NaN stays.
template <std::floating_point T>
struct exp_split {
  T r, rest_curve, n;

  MLKIT_ALWAYS_INLINE explicit exp_split(T x) noexcept {
    using table = math_table<T>;
    x = x < table::exp_min ? table::exp_min : x;
    x = x > table::exp_max ? table::exp_max : x;
    n = round_to_integer(x * table::log2_e);
    r = (x - n * table::ln2_high) - n * table::ln2_low;
    T curve = table::exp[std::size(table::exp) - 1];
    MLKIT_UNROLL
    for (std::size_t i = std::size(table::exp) - 1; i > 0; --i) curve = curve * r + table::exp[i - 1];
    rest_curve = r * r * curve;
  }
  MLKIT_ALWAYS_INLINE T value() const noexcept {
    const T s = T(1) + r, mantissa = s + (rest_curve + (r - (s - T(1)))), half = round_to_integer(n * T(0.5));
    return mantissa * power_of_two(half) * power_of_two(n - half);
  }
  // e^x - 1, for |x| below 1 or so.
  MLKIT_ALWAYS_INLINE T minus_one() const noexcept {
    const T power = power_of_two(n);
    return (rest_curve + r) * power + (power - T(1));
  }
};

// log(u) for a positive, normal, finite u: 2^e m with m in [sqrt(1/2), sqrt(2)), log(m) = 2 atanh(f / (2 + f)).
template <std::floating_point T>
MLKIT_ALWAYS_INLINE T log_of_normal(T u) noexcept {
  using table = math_table<T>;
  using I = bits_of<T>;
  using U = std::make_unsigned_t<I>;
  constexpr I mask = (I{1} << table::mantissa_bits) - 1;
  const I above = mlkit::detail::bit_cast<I>(u) - table::sqrt_half;
  const U biased =
      static_cast<U>(above + (static_cast<I>(table::bias) << table::mantissa_bits)) >> table::mantissa_bits;
  const T e = mlkit::detail::bit_cast<T>(static_cast<U>(biased | mlkit::detail::bit_cast<U>(table::integer_shift))) -
              (table::integer_shift + static_cast<T>(table::bias));
  const T f = mlkit::detail::bit_cast<T>(static_cast<I>((above & mask) + table::sqrt_half)) - T(1);
  const T s = f / (f + T(2)), z = s * s, half_square = f * f * T(0.5);
  T curve = table::log[std::size(table::log) - 1];
  MLKIT_UNROLL
  for (std::size_t i = std::size(table::log) - 1; i > 0; --i) curve = curve * z + table::log[i - 1];
  const T r = s * (z * curve + half_square) + e * table::ln2_low;
  return e * table::ln2_high + (f - (half_square - r));
}

#endif

/// e^x, within 2 units in the last place.
template <std::floating_point T>
MLKIT_RL_INLINE T exp_of(T x) noexcept {
#if defined(__CUDA_ARCH__)
  return ::exp(x);
#else
  return exp_split<T>(x).value();
#endif
}

// log(1 + e) for e >= -1/2.
template <std::floating_point T>
MLKIT_RL_INLINE T log1p_of(T e) noexcept {
#if defined(__CUDA_ARCH__)
  return ::log1p(e);
#else
  const T u = T(1) + e;
  return log_of_normal(u) + (e - (u - T(1))) / u;  // what the rounding of u lost
#endif
}

/// log(sigmoid(x)) and its derivative sigmoid(-x). No x overflows; x far below 0 gives x.
template <std::floating_point T>
struct log_sigmoid {
  T value, derivative;

  MLKIT_RL_INLINE explicit log_sigmoid(T x) noexcept {
    const T e = exp_of(x < 0 ? x : -x), inverse = T(1) / (T(1) + e);
    value = (x < 0 ? x : T(0)) - log1p_of(e);
    derivative = x < 0 ? inverse : e * inverse;
  }
};

/// log(1 - e^x) for x < 0, and 1 - e^x beside it, both with relative accuracy at either end. Maechler: "Accurately
/// computing log(1 - exp(-|a|))", 2012.
template <std::floating_point T>
struct log1mexp {
  T value, complement;

  MLKIT_RL_INLINE explicit log1mexp(T x) noexcept {
#if defined(__CUDA_ARCH__)
    complement = -::expm1(x);
    value = x > T(-0.69314718055994530942) ? ::log(complement) : ::log1p(-::exp(x));
#else
    const bool near_zero = x > T(-0.69314718055994530942);
    const exp_split<T> near(x < T(-1) ? T(-1) : x);
    const T e = exp_of(x), u = T(1) - e;
    complement = near_zero ? -near.minus_one() : u;
    value = log_of_normal(complement) + (near_zero ? T(0) : ((T(1) - u) - e) / u);
#endif
  }
};

}  // namespace MLKIT_NAMESPACE::rl::detail
