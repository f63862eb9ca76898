// The functions of simd/math.hpp against the C library in a wider type: floats over a dense stride through all bit
// patterns, doubles at random and at the boundaries, on every instruction set of this machine.
#include <mlkit/simd/math.hpp>

#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#define MLKIT_FOREACH "simd/math_kernels-inl.hpp"
#include <mlkit/simd/foreach_isa.hpp>

#include "available_sets.hpp"

namespace {

#if defined(__x86_64__)
using quad = __float128;
#else
using quad = long double;  // binary128 on AArch64
#endif

// What a reference is computed in: double for float, long double for double. An argument too long for it comes as a
// quad.
template <class T>
using wide = std::conditional_t<std::is_same_v<T, float>, double, long double>;

struct reference {
  long double value;
  long double scale;  // the bound is in units in the last place of this magnitude
};

template <class W>
W exp_of(quad x) {
  const W high = static_cast<W>(x);
  if (!(std::fabs(high) < 1e4)) return std::exp(high);
  return std::exp(high) * (1 + static_cast<W>(x - static_cast<quad>(high)));
}
// The normal distribution at -a, its argument corrected to first order for the rounding of a / sqrt 2.
template <class W>
W normal_tail(quad a) {
  const quad inv_sqrt2 = static_cast<quad>(0.70710678118654752440L) + static_cast<quad>(-8.0116687634e-21L);
  const quad y = a * inv_sqrt2;
  if (!(a < 1e4)) return a > 0 ? W(0) : static_cast<W>(a);
  const W high = static_cast<W>(y), low = static_cast<W>(y - static_cast<quad>(high));
  return W(0.5L) * std::erfc(high) - low * exp_of<W>(-y * y) * W(0.56418958354775628695L);
}
template <class W>
quad cubic(quad a) {  // 2 sqrt(2 / pi) (a + 0.044715 a^3)
  const quad c = static_cast<quad>(1.59576912160573071176L) + static_cast<quad>(-2.6e-21L);
  return c * (a + static_cast<quad>(44715) / 1000000 * a * a * a);
}
template <class W>
W logistic_tail(quad v) {  // sigmoid(-v), v >= 0
  const W e = exp_of<W>(-v);
  return e / (1 + e);
}

// max(x, 0) - a S(-a)
template <class W>
reference gated(W x, W gate) {
  const W a = std::fabs(x), tail = gate == 0 ? W(0) : a * gate;
  const W y = x > 0 ? x - tail : -tail;
  return {y, y};
}
template <class W>
reference gated_derivative(W x, W gate, W slope) {
  const W a = std::fabs(x), other = gate == 0 ? W(0) : a * slope, tail = gate - other;
  return {x > 0 ? 1 - tail : tail, x > 0 ? W(1) : std::max(gate, other)};
}

#define MLKIT_TEST_FUNCTION(name, float_bound, double_bound, ...)  \
  struct name##_case {                                             \
    static constexpr const char* label = #name;                    \
    static constexpr double bound[] = {float_bound, double_bound}; \
    template <class T>                                             \
    static void run(const T* in, T* out, int n) {                  \
      MLKIT_SELECT(name##_array<T>)(in, out, n);                   \
    }                                                              \
    template <class W>                                             \
    static reference expected(W x) {                               \
      __VA_ARGS__                                                  \
    }                                                              \
  };
#define MLKIT_TEST_VALUE(expression) \
  const W y = expression;            \
  return {y, y};

MLKIT_TEST_FUNCTION(exp, 1, 1, MLKIT_TEST_VALUE(std::exp(x)))
MLKIT_TEST_FUNCTION(exp2, 1, 1, MLKIT_TEST_VALUE(std::exp2(x)))
MLKIT_TEST_FUNCTION(log, 1, 1, MLKIT_TEST_VALUE(std::log(x)))
MLKIT_TEST_FUNCTION(erf, 1.5, 1.5, MLKIT_TEST_VALUE(std::erf(x)))
MLKIT_TEST_FUNCTION(tanh, 2.75, 2.75, MLKIT_TEST_VALUE(std::tanh(x)))
MLKIT_TEST_FUNCTION(sigmoid, 2.75, 2.75, MLKIT_TEST_VALUE(x > 0 ? 1 / (1 + std::exp(-x)) : logistic_tail<W>(-x)))
MLKIT_TEST_FUNCTION(silu, 3.5, 3.5, return gated(x, logistic_tail<W>(std::fabs(x)));)
MLKIT_TEST_FUNCTION(gelu, 5, 5, return gated(x, normal_tail<W>(std::fabs(x)));)
MLKIT_TEST_FUNCTION(gelu_tanh, 3.5, 3.5, return gated(x, logistic_tail<W>(cubic<W>(std::fabs(x))));)
MLKIT_TEST_FUNCTION(relu, 0, 0, MLKIT_TEST_VALUE(x < 0 ? W(0) : x))

MLKIT_TEST_FUNCTION(tanh_derivative, 4.5, 4.5, const W e = std::exp(-2 * std::fabs(x));
                    MLKIT_TEST_VALUE(4 * e / ((1 + e) * (1 + e))))
MLKIT_TEST_FUNCTION(sigmoid_derivative, 4.5, 4.5, const W e = std::exp(-std::fabs(x));
                    MLKIT_TEST_VALUE(e / ((1 + e) * (1 + e))))
MLKIT_TEST_FUNCTION(silu_derivative, 5, 5, const W s = logistic_tail<W>(std::fabs(x));
                    return gated_derivative(x, s, s*(1 - s));)
MLKIT_TEST_FUNCTION(gelu_derivative, 5, 5, const quad a = std::fabs(x);
                    return gated_derivative(x, normal_tail<W>(a), exp_of<W>(-a* a / 2) * W(0.39894228040143267794L));)
MLKIT_TEST_FUNCTION(gelu_tanh_derivative, 6, 6, const W a = std::fabs(x); const W s = logistic_tail<W>(cubic<W>(a));
                    const W slope = W(1.59576912160573071176L) * (1 + W(0.134145L) * a * a);
                    return gated_derivative(x, s, s*(1 - s) * slope);)

// |y - exact| in units in the last place of the scale; an infinite y counts as the next power of two.
template <class T>
double ulps(T y, const reference& exact) {
  using limits = std::numeric_limits<T>;
  const long double infinite = std::ldexp(1.0L, limits::max_exponent);
  const auto finite = [&](long double v) { return std::isinf(v) ? std::copysign(infinite, v) : v; };
  if (std::isnan(exact.value)) return std::isnan(y) ? 0 : 1e9;
  if (std::isnan(y)) return 1e9;
  const long double scale = std::min(std::fabs(finite(exact.scale)), infinite * 0.75L);
  const int exponent = std::max(scale > 0 ? std::ilogb(scale) : limits::min_exponent - 1, limits::min_exponent - 1);
  const long double error = std::fabs(finite(y) - std::clamp(exact.value, -infinite, infinite));
  return static_cast<double>(std::ldexp(error, limits::digits - 1 - exponent));
}

template <class T>
struct worst {
  double ulps = 0;
  T at = 0, got = 0;
};

// Runs one case over inputs on every set; keeps the worst of each set.
template <class Case, class T>
void measure(const std::vector<T>& in, std::vector<worst<T>>& worsts) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  const int n = static_cast<int>(in.size());
  std::vector<reference> exact(n);
  for (int i = 0; i < n; ++i) exact[i] = Case::expected(static_cast<wide<T>>(in[i]));
  std::vector<T> out(n);
  const auto sets = available_sets();
  for (std::size_t s = 0; s < sets.size(); ++s) {
    mlkit::set_isa(sets[s]);
    Case::run(in.data(), out.data(), n);
    for (int i = 0; i < n; ++i) {
      const double e = ulps(out[i], exact[i]);
      if (e > worsts[s].ulps) worsts[s] = {e, in[i], out[i]};
    }
  }
}

template <class Case, class T>
void report(const std::vector<worst<T>>& worsts) {
  const auto sets = available_sets();
  for (std::size_t s = 0; s < sets.size(); ++s) {
    INFO(Case::label << " on " << mlkit::isa_name(sets[s]) << " at " << std::hexfloat << worsts[s].at << " gives "
                     << worsts[s].got);
    if (std::getenv("MLKIT_TEST_VERBOSE"))
      std::printf("%-22s f%zu %-12s %.3f ulp at %.9g (%a) -> %.9g\n", Case::label, sizeof(T) * 8,
                  mlkit::isa_name(sets[s]), worsts[s].ulps, double(worsts[s].at), double(worsts[s].at),
                  double(worsts[s].got));
    CHECK(worsts[s].ulps <= Case::bound[sizeof(T) / 8]);
  }
}

template <class T, class Bits>
T from_bits(Bits b) {
  T x;
  std::memcpy(&x, &b, sizeof x);
  return x;
}

template <class Case>
void sweep_floats(std::uint64_t stride) {
  const restore_isa restore;
  std::vector<worst<float>> worsts(mlkit::isa_count);
  std::vector<float> in(1 << 14);
  for (std::uint64_t b = 0; b <= 0xffffffffu;) {
    for (float& x : in) x = from_bits<float>(static_cast<std::uint32_t>(b)), b += stride;
    measure<Case>(in, worsts);
  }
  // Around every power of two, and the special values.
  std::size_t at = 0;
  for (std::uint32_t sign : {0u, 0x80000000u})
    for (std::uint32_t e = 0; e <= 255; ++e)
      for (int d = -8; d < 8; ++d)
        in[at++ % in.size()] = from_bits<float>(sign | ((e << 23) + static_cast<std::uint32_t>(d) % 0x7fffffffu));
  measure<Case>(in, worsts);
  report<Case>(worsts);
}

template <class Case>
void sweep_doubles() {
  const restore_isa restore;
  std::vector<worst<double>> worsts(mlkit::isa_count);
  std::mt19937_64 random(7);
  std::vector<double> in;
  const auto uniform = [&](double low, double high, int n) {
    std::uniform_real_distribution<double> u(low, high);
    for (int i = 0; i < n; ++i) in.push_back(u(random));
  };
  uniform(-1, 1, 20000);
  uniform(-8, 8, 20000);
  uniform(-40, 40, 20000);
  uniform(-1100, 1100, 10000);
  for (int i = 0; i < 20000; ++i) in.push_back(from_bits<double>(random()));  // all exponents, also NaN
  for (std::uint64_t sign : {std::uint64_t{0}, std::uint64_t{1} << 63})
    for (std::uint64_t e = 0; e <= 2047; ++e)
      for (int d = -2; d < 2; ++d)
        in.push_back(from_bits<double>(sign | ((e << 52) + static_cast<std::uint64_t>(d)) % 0x7fffffffffffffffu));
  while (in.size() % 16) in.push_back(0);
  measure<Case>(in, worsts);
  report<Case>(worsts);
}

#define MLKIT_ALL_CASES                                                                                              \
  exp_case, exp2_case, log_case, erf_case, tanh_case, sigmoid_case, silu_case, gelu_case, gelu_tanh_case, relu_case, \
      tanh_derivative_case, sigmoid_derivative_case, silu_derivative_case, gelu_derivative_case,                     \
      gelu_tanh_derivative_case

}  // namespace

TEMPLATE_TEST_CASE("f32 functions keep their bounds over the whole range", "[math]", MLKIT_ALL_CASES) {
  sweep_floats<TestType>(4099);
}

TEMPLATE_TEST_CASE("f32 functions keep their bounds for every input", "[.exhaustive]", MLKIT_ALL_CASES) {
  sweep_floats<TestType>(1);
}

TEMPLATE_TEST_CASE("f32 functions keep their bounds for one input in 61", "[.dense]", MLKIT_ALL_CASES) {
  sweep_floats<TestType>(61);
}

TEMPLATE_TEST_CASE("f64 functions keep their bounds", "[math]", MLKIT_ALL_CASES) { sweep_doubles<TestType>(); }

namespace {

template <class Case, class T>
T at(T x) {
  T in[16], out[16];
  std::fill_n(in, 16, x);
  Case::run(in, out, 16);
  for (T y : out) REQUIRE(std::memcmp(&y, &out[0], sizeof(T)) == 0);
  return out[0];
}

template <class T>
bool same(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

}  // namespace

TEMPLATE_TEST_CASE("functions at zeros, infinities and NaN", "[math]", float, double) {
  using T = TestType;
  const restore_isa restore;
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN(), zero = 0;
  for (mlkit::isa set : available_sets()) {
    mlkit::set_isa(set);
    INFO(mlkit::isa_name(set));
    CHECK(same(at<exp_case>(zero), T(1)));
    CHECK(same(at<exp_case>(-zero), T(1)));
    CHECK(same(at<exp_case>(inf), inf));
    CHECK(same(at<exp_case>(-inf), zero));
    CHECK(same(at<exp2_case>(inf), inf));
    CHECK(same(at<exp2_case>(-inf), zero));
    for (int k = std::numeric_limits<T>::min_exponent - std::numeric_limits<T>::digits;
         k < std::numeric_limits<T>::max_exponent; ++k)
      CHECK(same(at<exp2_case>(T(k)), std::ldexp(T(1), k)));  // powers of two are exact, subnormal ones too
    CHECK(same(at<log_case>(zero), -inf));
    CHECK(same(at<log_case>(-zero), -inf));
    CHECK(same(at<log_case>(inf), inf));
    CHECK(same(at<log_case>(T(1)), zero));
    CHECK(std::isnan(at<log_case>(T(-1))));
    CHECK(std::isnan(at<log_case>(-inf)));
    CHECK(std::isnan(at<log_case>(-std::numeric_limits<T>::denorm_min())));
    CHECK(same(at<tanh_case>(inf), T(1)));
    CHECK(same(at<tanh_case>(-inf), T(-1)));
    CHECK(same(at<erf_case>(inf), T(1)));
    CHECK(same(at<erf_case>(-inf), T(-1)));
    CHECK(same(at<sigmoid_case>(inf), T(1)));
    CHECK(same(at<sigmoid_case>(-inf), zero));
    CHECK(same(at<sigmoid_case>(zero), T(0.5)));
    CHECK(same(at<relu_case>(-inf), zero));
    for (T x : {zero, -zero}) {  // odd or gated functions keep the sign of zero
      CHECK(same(at<tanh_case>(x), x));
      CHECK(same(at<erf_case>(x), x));
      CHECK(same(at<silu_case>(x), x));
      CHECK(same(at<gelu_case>(x), x));
      CHECK(same(at<gelu_tanh_case>(x), x));
    }
    CHECK(same(at<silu_case>(inf), inf));
    CHECK(same(at<gelu_case>(inf), inf));
    CHECK(same(at<gelu_tanh_case>(inf), inf));
    CHECK(same(at<silu_case>(-inf), -zero));
    CHECK(same(at<gelu_case>(-inf), -zero));
    CHECK(same(at<gelu_tanh_case>(-inf), -zero));
    CHECK(same(at<gelu_derivative_case>(inf), T(1)));
    CHECK(same(at<gelu_derivative_case>(-inf), T(-0.0)));
    CHECK(same(at<silu_derivative_case>(inf), T(1)));
    CHECK(same(at<tanh_derivative_case>(inf), zero));
    CHECK(same(at<tanh_derivative_case>(zero), T(1)));
    CHECK(std::isnan(at<exp_case>(nan)));
    CHECK(std::isnan(at<exp2_case>(nan)));
    CHECK(std::isnan(at<log_case>(nan)));
    CHECK(std::isnan(at<erf_case>(nan)));
    CHECK(std::isnan(at<tanh_case>(nan)));
    CHECK(std::isnan(at<sigmoid_case>(nan)));
    CHECK(std::isnan(at<silu_case>(nan)));
    CHECK(std::isnan(at<gelu_case>(nan)));
    CHECK(std::isnan(at<gelu_tanh_case>(nan)));
    CHECK(std::isnan(at<relu_case>(nan)));
  }
}

namespace {

struct users_own {
  template <class T>
  T operator()(T x) const {
    return x * x + 1;
  }
  template <class T>
  T derivative(T x) const {
    return x + x;
  }
};

// The scalar and the vector form of a functor, and its derivative against central differences.
template <class F, class T>
void check_functor(const F& f) {
  const double tolerance = sizeof(T) == 4 ? 6e-7 : 2e-14;  // of the scalar f64 tail
  std::vector<T> in, values(512), derivatives(512);
  for (int i = 0; i < 512; ++i) in.push_back(T(-8 + i / 32.0 + 1e-3));
  const auto run = MLKIT_SELECT(evaluate_array<F, T>);
  run(f, in.data(), values.data(), derivatives.data(), 512);
  for (int i = 0; i < 512; ++i) {
    const double x = static_cast<double>(in[i]), h = 1e-5;
    INFO("x = " << x);
    CHECK(values[i] == Approx(f(in[i])).epsilon(tolerance).margin(0));
    CHECK(derivatives[i] == Approx(f.derivative(in[i])).epsilon(tolerance).margin(tolerance));
    CHECK(f.derivative(x) == Approx((f(x + h) - f(x - h)) / (2 * h)).epsilon(1e-8).margin(1e-9));
  }
}

}  // namespace

TEMPLATE_TEST_CASE("functors give the same on scalars and registers, and their derivatives", "[functors]", float,
                   double) {
  const restore_isa restore;
  for (mlkit::isa set : available_sets()) {
    mlkit::set_isa(set);
    INFO(mlkit::isa_name(set));
    check_functor<mlkit::relu, TestType>({});
    check_functor<mlkit::gelu, TestType>({});
    check_functor<mlkit::gelu_tanh, TestType>({});
    check_functor<mlkit::silu, TestType>({});
    check_functor<mlkit::tanh, TestType>({});
    check_functor<mlkit::sigmoid, TestType>({});
    check_functor<mlkit::identity, TestType>({});
    check_functor<mlkit::scale, TestType>({0.75f});
    check_functor<users_own, TestType>({});
  }
}

TEST_CASE("gelu, gelu_tanh and silu give the values that PyTorch prints", "[functors]") {
  // torch 2: F.gelu(x), F.gelu(x, approximate="tanh"), F.silu(x) at float64
  CHECK(mlkit::gelu{}(1.0) == Approx(0.8413447460685429).epsilon(1e-15));
  CHECK(mlkit::gelu{}(-1.0) == Approx(-0.15865525393145707).epsilon(1e-15));
  CHECK(mlkit::gelu_tanh{}(1.0) == Approx(0.8411919906082768).epsilon(1e-15));
  CHECK(mlkit::gelu_tanh{}(-1.0) == Approx(-0.15880800939172324).epsilon(1e-14));
  CHECK(mlkit::silu{}(1.0) == Approx(0.7310585786300049).epsilon(1e-15));
  CHECK(mlkit::silu{}(-1.0) == Approx(-0.2689414213699951).epsilon(1e-15));
}
