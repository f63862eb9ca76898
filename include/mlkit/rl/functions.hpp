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

template <class T>
using bits_of = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;

/// condition ? a : b, of bits: of the operator, GCC makes a branch where it can compute what follows on one side.
template <std::floating_point T>
MLKIT_RL_INLINE T choose(bool condition, T a, T b) noexcept {
#if defined(__CUDA_ARCH__)
  return condition ? a : b;
#else
  using U = std::make_unsigned_t<bits_of<T>>;
  const U mask = U{} - static_cast<U>(condition);
  return mlkit::detail::bit_cast<T>(
      static_cast<U>((mlkit::detail::bit_cast<U>(a) & mask) | (mlkit::detail::bit_cast<U>(b) & ~mask)));
#endif
}

/// x within [low, high]; NaN stays.
template <std::floating_point T>
MLKIT_RL_INLINE T bounded(T x, T low, T high) noexcept {
  return choose(x > high, high, choose(x < low, low, x));
}

#if !defined(__CUDA_ARCH__)

// coefficients[I] + x (coefficients[I + 1] + ...), without the loop that would be one within a loop.
template <std::size_t I = 0, class T, std::size_t N>
MLKIT_ALWAYS_INLINE T horner(T x, const T (&coefficients)[N]) noexcept {
  if constexpr (I + 1 == N)
    return coefficients[I];
  else
    return horner<I + 1>(x, coefficients) * x + coefficients[I];
}

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
    x = bounded(x, table::exp_min, table::exp_max);
    n = round_to_integer(x * table::log2_e);
    r = (x - n * table::ln2_high) - n * table::ln2_low;
    rest_curve = r * r * horner(r, table::exp);
  }
  MLKIT_ALWAYS_INLINE T value() const noexcept {
    const T s = T(1) + r, mantissa = s + (rest_curve + (r - (s - T(1)))), half = round_to_integer(n * T(0.5));
    return mantissa * power_of_two(half) * power_of_two(n - half);
  }
  // e^x - 1, where 2^n is in the normal range.
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
      (static_cast<U>(above) + (static_cast<U>(table::bias) << table::mantissa_bits)) >> table::mantissa_bits;
  const T e = mlkit::detail::bit_cast<T>(static_cast<U>(biased | mlkit::detail::bit_cast<U>(table::integer_shift))) -
              (table::integer_shift + static_cast<T>(table::bias));
  const T f = mlkit::detail::bit_cast<T>(static_cast<I>((above & mask) + table::sqrt_half)) - T(1);
  const T s = f / (f + T(2)), z = s * s, half_square = f * f * T(0.5);
  const T r = s * (z * horner(z, table::log) + half_square) + e * table::ln2_low;
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

// e^x - 1 for |x| <= 80.
template <std::floating_point T>
MLKIT_RL_INLINE T expm1_of(T x) noexcept {
#if defined(__CUDA_ARCH__)
  return ::expm1(x);
#else
  return exp_split<T>(x).minus_one();
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
    const bool negative = x < 0;
    const T e = exp_of(choose(negative, x, -x)), inverse = T(1) / (T(1) + e);
    value = choose(negative, x, T(0)) - log1p_of(e);
    derivative = choose(negative, inverse, e * inverse);
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
    const T e = exp_of(x), u = T(1) - e;
    complement = choose(near_zero, -expm1_of(choose(x < T(-1), T(-1), x)), u);
    value = log_of_normal(complement) + choose(near_zero, T(0), ((T(1) - u) - e) / u);
#endif
  }
};

}  // namespace MLKIT_NAMESPACE::rl::detail
