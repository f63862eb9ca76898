// vec<T>: every operation lane by lane against scalar code, loads and stores of every length at every misalignment.
#include <mlkit/simd/vec.hpp>

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#define MLKIT_FOREACH "simd/vec_kernels-inl.hpp"
#include <mlkit/simd/foreach_isa.hpp>

#include "available_sets.hpp"

namespace {

template <class T>
bool same_bits(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0 || (a != a && b != b);
}

template <class T>
T sum_of_halves(std::vector<T> v) {
  for (std::size_t half = v.size() / 2; half > 0; half /= 2)
    for (std::size_t i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

template <class T>
T volatile_product(T a, T b) {
  volatile T product = a * b;
  return product;
}

template <class F>
void on_every_set(F f) {
  const restore_isa restore;
  for (mlkit::isa set : available_sets()) {
    mlkit::set_isa(set);
    INFO(mlkit::isa_name(set));
    f(set);
  }
}

}  // namespace

TEMPLATE_TEST_CASE("every operation does on each lane what it does on a scalar", "[vec]", float, double) {
  using T = TestType;
  on_every_set([](mlkit::isa set) {
    const int w = MLKIT_SELECT(vec_width<T>)();
    std::mt19937 random(5);
    std::uniform_real_distribution<T> u(-4, 4);
    const T nan = std::numeric_limits<T>::quiet_NaN(), inf = std::numeric_limits<T>::infinity();
    const std::vector<T> special = {
        0, -T(0), inf, -inf, nan, 1, std::numeric_limits<T>::denorm_min(), std::numeric_limits<T>::max()};
    for (int round = 0; round < 100; ++round) {
      std::vector<T> a(w), b(w), c(w);
      for (int i = 0; i < w; ++i) {
        a[i] = u(random), b[i] = round % 3 ? u(random) : a[i], c[i] = u(random);
        if (round % 4 == 3) a[i] = special[random() % special.size()], b[i] = special[random() % special.size()];
      }
      std::vector<T> out(40 * w);
      MLKIT_SELECT(vec_arithmetic<T>)(a.data(), b.data(), c.data(), out.data());
      const T* at = out.data();
      const auto expect = [&](const char* what, auto f) {
        for (int i = 0; i < w; ++i)
          if (!same_bits(at[i], static_cast<T>(f(i)))) {
            INFO(what << " lane " << i << " of " << a[i] << ", " << b[i] << ", " << c[i] << " gives " << at[i]);
            CHECK(false);
          }
        at += w;
      };
      const T s = b[0];
#define MLKIT_EXPECT(expression) expect(#expression, [&](int i) { return expression; })
      MLKIT_EXPECT(a[i] + b[i]);
      MLKIT_EXPECT(a[i] - b[i]);
      MLKIT_EXPECT(a[i] * b[i]);
      MLKIT_EXPECT(a[i] / b[i]);
      MLKIT_EXPECT(-a[i]);
      MLKIT_EXPECT(a[i] + s);
      MLKIT_EXPECT(a[i] - s);
      MLKIT_EXPECT(a[i] * s);
      MLKIT_EXPECT(a[i] / s);
      MLKIT_EXPECT(s + a[i]);
      MLKIT_EXPECT(s - a[i]);
      MLKIT_EXPECT(s * a[i]);
      MLKIT_EXPECT(s / a[i]);
      MLKIT_EXPECT(a[i] + b[i]);  // += and the like
      MLKIT_EXPECT(a[i] - b[i]);
      MLKIT_EXPECT(a[i] * b[i]);
      MLKIT_EXPECT(a[i] / b[i]);
      if (set == mlkit::isa::baseline && MLKIT_X86)
        expect("a * b + c", [&](int i) { return volatile_product(a[i], b[i]) + c[i]; });
      else
        MLKIT_EXPECT(std::fma(a[i], b[i], c[i]));
      MLKIT_EXPECT(a[i] > b[i] ? a[i] : b[i]);  // the second where either is NaN
      MLKIT_EXPECT(a[i] < b[i] ? a[i] : b[i]);
      MLKIT_EXPECT(std::fabs(a[i]));
      expect("broadcast", [&](int) { return s; });
      expect("zero", [](int) { return T(0); });
      MLKIT_EXPECT(a[i] < b[i] ? a[i] : b[i]);
      MLKIT_EXPECT(a[i] > b[i] ? a[i] : b[i]);
      MLKIT_EXPECT(a[i] <= b[i] ? a[i] : b[i]);
      MLKIT_EXPECT(a[i] >= b[i] ? a[i] : b[i]);
      MLKIT_EXPECT(a[i] == b[i] ? a[i] : c[i]);
      MLKIT_EXPECT(a[i] != b[i] ? a[i] : c[i]);
      MLKIT_EXPECT(a[i]);
      MLKIT_EXPECT(-a[i]);
      CHECK(same_bits(*at++, sum_of_halves(a)));
      if (std::none_of(a.begin(), a.end(), [](T x) { return x != x; }))
        CHECK(*at == *std::max_element(a.begin(), a.end()));
    }
  });
}

namespace {

// Loads and stores n elements at every misalignment, between guards, and at the very end of the buffer.
template <class T, class Memory>
void check_memory(int w) {
  constexpr unsigned char guard = 0xa5;
  for (int n = -1; n <= w; ++n) {  // -1: a whole register
    const int count = n < 0 ? w : n;
    for (std::size_t shift = 0; shift < 64 / sizeof(Memory); ++shift) {
      std::vector<Memory> memory(shift + static_cast<std::size_t>(count) + (n < 0 ? 0 : 3));
      std::memset(static_cast<void*>(memory.data()), guard, memory.size() * sizeof(Memory));
      Memory* p = memory.data() + shift;
      for (int i = 0; i < count; ++i) p[i] = Memory(static_cast<T>(i + 1));

      std::vector<T> lanes(w, T(99));
      MLKIT_SELECT(vec_load<T, Memory>)(p, n, lanes.data());
      for (int i = 0; i < w; ++i) REQUIRE(lanes[i] == (i < count ? static_cast<T>(i + 1) : T(0)));

      for (int i = 0; i < w; ++i) lanes[i] = static_cast<T>(-2 - i);
      MLKIT_SELECT(vec_store<T, Memory>)(lanes.data(), p, n);
      for (int i = 0; i < count; ++i) REQUIRE(static_cast<T>(p[i]) == static_cast<T>(-2 - i));
      const auto* bytes = reinterpret_cast<const unsigned char*>(memory.data());
      for (std::size_t i = 0; i < memory.size() * sizeof(Memory); ++i)
        if (i < shift * sizeof(Memory) || i >= (shift + static_cast<std::size_t>(count)) * sizeof(Memory))
          REQUIRE(bytes[i] == guard);
    }
  }
}

}  // namespace

TEST_CASE("loads and stores touch n elements and no more, wherever they start", "[vec]") {
  on_every_set([](mlkit::isa) {
    check_memory<float, float>(MLKIT_SELECT(vec_width<float>)());
    check_memory<double, double>(MLKIT_SELECT(vec_width<double>)());
    check_memory<float, mlkit::bf16>(MLKIT_SELECT(vec_width<float>)());
    check_memory<float, mlkit::f16>(MLKIT_SELECT(vec_width<float>)());
  });
}

TEMPLATE_TEST_CASE("registers convert 16-bit types as the scalar types do", "[vec]", mlkit::bf16, mlkit::f16) {
  on_every_set([](mlkit::isa) {
    const int w = MLKIT_SELECT(vec_width<float>)();
    std::vector<float> lanes(w);
    std::vector<TestType> halves(w);
    for (int b = 0; b <= 0xffff; b += w) {
      for (int i = 0; i < w; ++i) halves[i] = TestType::from_bits(static_cast<std::uint16_t>(b + i));
      MLKIT_SELECT(vec_load<float, TestType>)(halves.data(), -1, lanes.data());
      for (int i = 0; i < w; ++i) REQUIRE(same_bits(lanes[i], static_cast<float>(halves[i])));
    }
    for (std::uint64_t b = 0; b <= 0xffffffffu; b += 1009u * static_cast<unsigned>(w)) {
      for (int i = 0; i < w; ++i) {
        const auto bits = static_cast<std::uint32_t>(b + 1009u * static_cast<unsigned>(i));
        std::memcpy(&lanes[i], &bits, 4);
      }
      MLKIT_SELECT(vec_store<float, TestType>)(lanes.data(), halves.data(), -1);
      for (int i = 0; i < w; ++i)
        if (halves[i].bits != TestType(lanes[i]).bits) REQUIRE(halves[i].bits == TestType(lanes[i]).bits);
    }
  });
}

TEST_CASE("the set is chosen, named and refused as documented", "[isa]") {
  const restore_isa restore;
  CHECK(mlkit::isa_available(mlkit::isa::baseline));
  bool below = true;
  for (int i = 0; i < mlkit::isa_count; ++i) {
    const auto set = static_cast<mlkit::isa>(i);
    const bool have = mlkit::isa_available(set);
    if (!MLKIT_TWO_SETS) CHECK((!have || below));  // each set includes those before it
    below = have;
    if (have) {
      mlkit::set_isa(set);
      CHECK(mlkit::active_isa() == set);
      CHECK(mlkit::detail::best_isa() >= std::min(set, mlkit::isa::avx512));  // avx512_bf16 only where it pays
    } else {
      CHECK_THROWS_WITH(mlkit::set_isa(set),
                        std::string("mlkit::value_error: set_isa: this machine does not have ") + mlkit::isa_name(set));
    }
  }
}

TEST_CASE("MLKIT_FORCE_ISA lowers the choice, and is refused if it names no set", "[isa]") {
  const char* const set = std::getenv("MLKIT_FORCE_ISA");
  const std::string before = set ? set : "";
  const auto initial = [](const char* name) {
    setenv("MLKIT_FORCE_ISA", name, 1);
    return mlkit::detail::initial_isa();
  };
  CHECK(initial("baseline") == mlkit::isa::baseline);
  CHECK(initial("") == mlkit::detail::best_isa());
  CHECK_THROWS_WITH(
      initial("avx1024"),
      "mlkit::value_error: MLKIT_FORCE_ISA = avx1024 is none of baseline, avx2, avx512, avx512_bf16, amx");
  CHECK_THROWS_AS(initial("AVX2"), mlkit::value_error);
  CHECK_THROWS_AS(initial(" baseline"), mlkit::value_error);
  for (int i = 0; i < mlkit::isa_count; ++i) {
    const auto each = static_cast<mlkit::isa>(i);
    if (mlkit::isa_available(each))
      CHECK(initial(mlkit::isa_name(each)) == each);
    else
      CHECK_THROWS_WITH(initial(mlkit::isa_name(each)), Catch::Contains("which this machine does not have"));
  }
  if (set)
    setenv("MLKIT_FORCE_ISA", before.c_str(), 1);
  else
    unsetenv("MLKIT_FORCE_ISA");
}
