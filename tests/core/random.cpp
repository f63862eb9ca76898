// The counter-based generator: published known answers, moments, and independence of order.
#include <mlkit/core/random.hpp>

#include <catch2/catch.hpp>
#include <cmath>
#include <vector>

using mlkit::philox4x32;

TEST_CASE("Philox4x32-10 gives the known answers of Random123", "[random]") {
  // kat_vectors of the Random123 distribution: zeros, ones, digits of pi.
  CHECK(philox4x32::generate({0, 0, 0, 0}, {0, 0}) ==
        philox4x32::counter_type{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  CHECK(philox4x32::generate({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}) ==
        philox4x32::counter_type{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(philox4x32::generate({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
        philox4x32::counter_type{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
  static_assert(philox4x32::generate({0, 0, 0, 0}, {0, 0})[0] == 0x6627e8d5);
}

TEST_CASE("a stream is its counter, key and index", "[random]") {
  const mlkit::random_stream s{0x299f31d0a4093822u, 0x0370734413198a2eu};
  const auto block = philox4x32::generate({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0});
  CHECK(s.block(0x85a308d3243f6a88u) == block);
  for (std::uint64_t b : {std::uint64_t{0}, std::uint64_t{5}, std::uint64_t{1} << 40})
    for (unsigned i = 0; i < 4; ++i) CHECK(s.bits(4 * b + i) == s.block(b)[i]);
}

TEST_CASE("uniform numbers lie in [0, 1) and have a uniform's moments", "[random]") {
  const mlkit::random_stream s{1, 2};
  constexpr int n = 1 << 20;
  double mean = 0, square = 0, lag = 0;
  std::vector<int> bins(64);
  for (int i = 0; i < n; ++i) {
    const float u = s.uniform(i);
    REQUIRE((u >= 0 && u < 1 && u * 0x1p24f == std::floor(u * 0x1p24f)));
    mean += u, square += double(u) * u, lag += (u - 0.5) * (s.uniform(i + 1) - 0.5);
    ++bins[static_cast<std::size_t>(u * 64)];
  }
  CHECK(mean / n == Approx(0.5).margin(5 * 0.2887 / 1024));  // five standard errors each
  CHECK(square / n == Approx(1.0 / 3).margin(5 * 0.2981 / 1024));
  CHECK(lag / n == Approx(0).margin(5 * (1.0 / 12) / 1024));
  double chi = 0;
  for (int b : bins) chi += (b - n / 64.0) * (b - n / 64.0) / (n / 64.0);
  CHECK(chi < 120);  // 63 degrees of freedom: mean 63, standard deviation 11
}

TEST_CASE("normal numbers have a normal's moments and tails", "[random]") {
  const mlkit::random_stream s{3, 4};
  constexpr int n = 1 << 20;
  double m[5] = {}, lag = 0;
  int beyond_two = 0;
  for (int i = 0; i < n; ++i) {
    const double z = s.normal(i);
    for (int k = 1; k <= 4; ++k) m[k] += std::pow(z, k) / n;
    lag += z * s.normal(i + 1) / n;
    beyond_two += std::fabs(z) > 2;
  }
  CHECK(m[1] == Approx(0).margin(5.0 / 1024));
  CHECK(m[2] == Approx(1).margin(5 * std::sqrt(2.0) / 1024));
  CHECK(m[3] == Approx(0).margin(5 * std::sqrt(15.0) / 1024));
  CHECK(m[4] == Approx(3).margin(5 * std::sqrt(96.0) / 1024));
  CHECK(lag == Approx(0).margin(5.0 / 1024));
  CHECK(beyond_two / double(n) == Approx(0.0455003).margin(5 * 0.2084 / 1024));
}

TEST_CASE("streams and seeds differ", "[random]") {
  int same = 0;
  for (int i = 0; i < 10000; ++i) {
    const auto a = mlkit::random_stream{1, 0}.bits(i);
    same += a == mlkit::random_stream{2, 0}.bits(i);
    same += a == mlkit::random_stream{1, 1}.bits(i);
    same += a == mlkit::random_stream{1, std::uint64_t{1} << 32}.bits(i);
    same += a == mlkit::random_stream{std::uint64_t{1} << 32 | 1, 0}.bits(i);
  }
  CHECK(same < 5);
}
