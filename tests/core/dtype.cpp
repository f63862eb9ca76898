// bf16 and f16: all bit patterns, and rounding against a rule stated in f64 that shares nothing with the
// implementation.
#include <mlkit/core/dtype.hpp>

#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// A binary format of the given precision (with the hidden bit) and smallest normal exponent.
struct format {
  int precision, min_exponent, max_exponent;
};
constexpr format bf16_format{8, -126, 127}, f16_format{11, -14, 15};

template <class Half>
constexpr format format_of = std::is_same_v<Half, mlkit::bf16> ? bf16_format : f16_format;

// The value of a bit pattern, by the definition of the format.
double value_of(std::uint16_t bits, format f) {
  const int mantissa_bits = f.precision - 1, exponent = (bits & 0x7fff) >> mantissa_bits;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == f.max_exponent - f.min_exponent + 2)
    return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(mantissa, f.min_exponent - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), f.min_exponent - mantissa_bits + exponent - 1);
}

// x to the nearest multiple of the unit in the last place, ties to even, as nearbyint has it.
double rounded(double x, format f) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), f.min_exponent) - f.precision + 1;
  const double y = std::ldexp(std::nearbyint(std::ldexp(x, -exponent)), exponent);
  return std::fabs(y) >= std::ldexp(1.0, f.max_exponent + 1) ? std::copysign(INFINITY, x) : y;
}

template <class Half>
void check_rounding(float x) {
  const Half h(x);
  const double want = rounded(static_cast<double>(x), format_of<Half>);
  const double have = value_of(h.bits, format_of<Half>);
  if (!(have == want) || std::signbit(have) != std::signbit(x)) {
    INFO(x << " rounds to " << have << ", not " << want);
    REQUIRE(false);
  }
}

float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace

TEMPLATE_TEST_CASE("every 16-bit pattern widens exactly and narrows back to itself", "[dtype]", mlkit::bf16,
                   mlkit::f16) {
  for (int b = 0; b <= 0xffff; ++b) {
    const auto bits = static_cast<std::uint16_t>(b);
    const float x = TestType::from_bits(bits);
    const double want = value_of(bits, format_of<TestType>);
    if (std::isnan(want)) {
      const auto back = TestType(x);
      REQUIRE(std::isnan(x));
      REQUIRE(std::isnan(static_cast<float>(back)));
      // Sign and payload stay; a signalling NaN becomes quiet.
      REQUIRE(back.bits == (bits | 1u << (format_of<TestType>.precision - 2)));
    } else {
      REQUIRE(static_cast<double>(x) == want);
      REQUIRE(std::signbit(x) == std::signbit(want));
      REQUIRE(TestType(x).bits == bits);
    }
  }
}

TEMPLATE_TEST_CASE("floats round to nearest, ties to even", "[dtype]", mlkit::bf16, mlkit::f16) {
  for (int b = 0; b < 0x7fff; ++b) {  // the middle of each pair of neighbours, and the floats beside it
    const double low = value_of(static_cast<std::uint16_t>(b), format_of<TestType>);
    const double high = value_of(static_cast<std::uint16_t>(b + 1), format_of<TestType>);
    if (!std::isfinite(low) || !std::isfinite(high)) continue;
    const float middle = static_cast<float>((low + high) / 2);
    for (float x : {middle, std::nextafter(middle, INFINITY), std::nextafter(middle, -INFINITY)}) {
      check_rounding<TestType>(x);
      check_rounding<TestType>(-x);
    }
  }
  for (std::uint64_t b = 0; b < 0x7f800000u; b += 977) {
    check_rounding<TestType>(float_of(static_cast<std::uint32_t>(b)));
    check_rounding<TestType>(-float_of(static_cast<std::uint32_t>(b)));
  }
}

TEMPLATE_TEST_CASE("overflow gives infinity", "[dtype]", mlkit::bf16, mlkit::f16) {
  const bool half = std::is_same_v<TestType, mlkit::f16>;
  CHECK(std::isinf(static_cast<float>(TestType(INFINITY))));
  CHECK(static_cast<float>(TestType(-INFINITY)) == -INFINITY);
  CHECK(std::isinf(static_cast<float>(TestType(half ? 65520.0f : 0x1.ffp127f))));
  CHECK(static_cast<float>(TestType(half ? 65519.0f : 0x1.fep127f)) == (half ? 65504.0f : 0x1.fep127f));
  CHECK(std::isinf(static_cast<float>(TestType(std::numeric_limits<float>::max()))));
}

TEST_CASE("conversions are constant expressions", "[dtype]") {
  static_assert(float(mlkit::bf16(1.0f + 1.0f / 256)) == 1.0f);
  static_assert(float(mlkit::f16(0.1f)) == 0x1.998p-4f);
  static_assert(mlkit::f16(1.0f).bits == 0x3c00 && mlkit::bf16(1.0f).bits == 0x3f80);
  static_assert(std::is_same_v<mlkit::accumulator_t<mlkit::bf16>, float> &&
                std::is_same_v<mlkit::accumulator_t<double>, double>);
  CHECK(std::string(mlkit::dtype_name<mlkit::bf16>()) == "bf16");
}

#if defined(__x86_64__)
namespace {
__attribute__((target("f16c"))) std::uint16_t by_hardware(float x) {
  return static_cast<std::uint16_t>(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT), 0));
}
__attribute__((target("f16c"))) float by_hardware(std::uint16_t h) {
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
}
}  // namespace

TEST_CASE("f16 is what F16C computes, NaN included", "[dtype]") {
  if (!__builtin_cpu_supports("avx2")) return;
  for (std::uint64_t b = 0; b <= 0xffffffffu; b += 509) {
    const float x = float_of(static_cast<std::uint32_t>(b));
    if (mlkit::f16(x).bits != by_hardware(x)) REQUIRE(mlkit::f16(x).bits == by_hardware(x));
  }
  for (int b = 0; b <= 0xffff; ++b) {
    const auto bits = static_cast<std::uint16_t>(b);
    const float x = mlkit::f16::from_bits(bits), y = by_hardware(bits);
    if (std::isnan(y))
      REQUIRE(std::isnan(x));
    else
      REQUIRE(std::memcmp(&x, &y, 4) == 0);
  }
}
#endif
