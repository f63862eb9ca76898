// What the tests of rl share: random data, masks, and what an exception says.
#pragma once

#include <catch2/catch.hpp>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mlkit/core/random.hpp>
#include <mlkit/core/tensor.hpp>
#include <string>
#include <vector>

namespace rl_test {

using mlkit::index_t;
inline constexpr double inf = std::numeric_limits<double>::infinity();
inline constexpr double no_number = std::numeric_limits<double>::quiet_NaN();

// Normal numbers, as T rounds them.
template <class T>
std::vector<T> normal(index_t n, std::uint64_t stream, double size = 1, double shift = 0) {
  const mlkit::random_stream random{11, stream};
  std::vector<T> x(static_cast<std::size_t>(n));
  for (index_t i = 0; i < n; ++i)
    x[static_cast<std::size_t>(i)] = static_cast<T>(
        static_cast<float>(shift + size * static_cast<double>(random.normal(static_cast<std::uint64_t>(i)))));
  return x;
}

template <class T>
mlkit::tensor<T, 2> normal_matrix(index_t rows, index_t cols, std::uint64_t stream, double size = 1, double shift = 0) {
  mlkit::tensor<T, 2> m({rows, cols});
  const std::vector<T> x = normal<T>(rows * cols, stream, size, shift);
  std::copy(x.begin(), x.end(), m.data());
  return m;
}
template <class T>
mlkit::tensor<T, 1> normal_vector(index_t n, std::uint64_t stream, double size = 1, double shift = 0) {
  mlkit::tensor<T, 1> v({n});
  const std::vector<T> x = normal<T>(n, stream, size, shift);
  std::copy(x.begin(), x.end(), v.data());
  return v;
}

// Bytes that are set with the given probability.
inline std::vector<std::uint8_t> bytes(index_t n, std::uint64_t stream, double probability) {
  const mlkit::random_stream random{13, stream};
  std::vector<std::uint8_t> m(static_cast<std::size_t>(n));
  for (index_t i = 0; i < n; ++i)
    m[static_cast<std::size_t>(i)] = static_cast<double>(random.uniform(static_cast<std::uint64_t>(i))) < probability;
  return m;
}

template <class F>
std::string said(F&& f) {
  try {
    f();
  } catch (const mlkit::error& e) {
    return e.what();
  }
  return "nothing";
}

// Two passes.
struct naive {
  double count = 0, mean = 0, m2 = 0;

  template <class T>
  explicit naive(const std::vector<T>& x, const std::vector<std::uint8_t>& mask = {}) {
    for (std::size_t i = 0; i < x.size(); ++i)
      if (mask.empty() || mask[i]) mean += static_cast<double>(x[i]), ++count;
    mean = count > 0 ? mean / count : 0;
    for (std::size_t i = 0; i < x.size(); ++i)
      if (mask.empty() || mask[i]) m2 += (static_cast<double>(x[i]) - mean) * (static_cast<double>(x[i]) - mean);
  }
};

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class T>
inline constexpr double epsilon_of = std::is_same_v<T, double>       ? 0x1p-52
                                     : std::is_same_v<T, float>      ? 0x1p-23
                                     : std::is_same_v<T, mlkit::f16> ? 0x1p-10
                                                                     : 0x1p-7;

}  // namespace rl_test
