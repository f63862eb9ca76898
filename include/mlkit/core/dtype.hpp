// Storage types: f32, f64, bf16 and f16, and the type that sums of each are accumulated in.
#pragma once

#include <concepts>
#include <type_traits>

#include "config.hpp"

namespace MLKIT_NAMESPACE {

namespace detail {

// std::bit_cast, but callable from device code too.
template <class To, class From>
  requires(sizeof(To) == sizeof(From) && std::is_trivially_copyable_v<To> && std::is_trivially_copyable_v<From>)
MLKIT_HOST_DEVICE constexpr To bit_cast(const From& from) noexcept { return __builtin_bit_cast(To, from); }

}  // namespace detail

/// bfloat16: the upper half of an IEEE binary32. Conversion from float rounds to nearest even; a NaN stays a (quiet)
/// NaN.
struct bf16 {
  std::uint16_t bits;

  bf16() = default;
  MLKIT_HOST_DEVICE constexpr explicit bf16(float value) noexcept
      : bits(round(detail::bit_cast<std::uint32_t>(value))) {}
  MLKIT_HOST_DEVICE constexpr operator float() const noexcept {
    return detail::bit_cast<float>(std::uint32_t{bits} << 16);
  }
  MLKIT_HOST_DEVICE static constexpr bf16 from_bits(std::uint16_t bits) noexcept {
    bf16 x{};
    x.bits = bits;
    return x;
  }

 private:
  MLKIT_HOST_DEVICE static constexpr std::uint16_t round(std::uint32_t u) noexcept {
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return static_cast<std::uint16_t>(nan ? (u >> 16) | 0x40u : rounded);
  }
};

/// IEEE binary16. Conversion from float rounds to nearest even; overflow gives infinity; a NaN stays a (quiet) NaN.
struct f16 {
  std::uint16_t bits;

  f16() = default;
  MLKIT_HOST_DEVICE constexpr explicit f16(float value) noexcept
      : bits(round(detail::bit_cast<std::uint32_t>(value))) {}
  MLKIT_HOST_DEVICE constexpr operator float() const noexcept { return widen(bits); }
  MLKIT_HOST_DEVICE static constexpr f16 from_bits(std::uint16_t bits) noexcept {
    f16 x{};
    x.bits = bits;
    return x;
  }

 private:
  MLKIT_HOST_DEVICE static constexpr std::uint16_t round(std::uint32_t u) noexcept {
    const std::uint32_t sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u | ((u >> 13) & 0x3ffu));
    if (u >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // rounds to 2^16 or more
    if (u < 0x38800000u) {                                                    // below 2^-14: subnormal, units of 2^-24
      const std::uint32_t shift = 126u - (u >> 23);                           // 14..126
      if (shift > 25u) return static_cast<std::uint16_t>(sign);
      const std::uint32_t mantissa = (u & 0x7fffffu) | 0x800000u;
      const std::uint32_t half = 1u << (shift - 1u);
      const std::uint32_t rest = mantissa & ((1u << shift) - 1u);
      std::uint32_t value = mantissa >> shift;
      if (rest > half || (rest == half && (value & 1u))) ++value;
      return static_cast<std::uint16_t>(sign | value);
    }
    const std::uint32_t rounded = u + 0xfffu + ((u >> 13) & 1u);
    return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
  }
  MLKIT_HOST_DEVICE static constexpr float widen(std::uint16_t h) noexcept {
    const std::uint32_t sign = (h & 0x8000u) << 16;
    const std::uint32_t exponent = (h >> 10) & 0x1fu;
    const std::uint32_t mantissa = h & 0x3ffu;
    if (exponent == 0) {
      const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
      return detail::bit_cast<float>(detail::bit_cast<std::uint32_t>(magnitude) | sign);
    }
    if (exponent == 31) return detail::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
    return detail::bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  }
};

/// The types that tensors are stored in.
template <class T>
concept storage = std::same_as<T, float> || std::same_as<T, double> || std::same_as<T, bf16> || std::same_as<T, f16>;

/// The type that sums over T are accumulated in: double for double, else float.
template <storage T>
using accumulator_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// "f32", "f64", "bf16" or "f16", for messages and reports.
template <storage T>
constexpr const char* dtype_name() noexcept {
  if constexpr (std::is_same_v<T, float>) return "f32";
  if constexpr (std::is_same_v<T, double>) return "f64";
  if constexpr (std::is_same_v<T, bf16>) return "bf16";
  if constexpr (std::is_same_v<T, f16>) return "f16";
}

}  // namespace MLKIT_NAMESPACE
