// What LoRA's tests compute with: random tensors, and naive loops in f64.
#pragma once

#include <cmath>
#include <functional>
#include <mlkit/core/random.hpp>
#include <mlkit/core/tensor.hpp>
#include <vector>

namespace reference {

using mlkit::index_t;

// A row-major matrix of f64.
struct mat {
  index_t rows = 0, cols = 0;
  std::vector<double> v;

  mat() = default;
  mat(index_t r, index_t c) : rows(r), cols(c), v(static_cast<std::size_t>(r * c)) {}
  double& operator()(index_t i, index_t j) { return v[static_cast<std::size_t>(i * cols + j)]; }
  double operator()(index_t i, index_t j) const { return v[static_cast<std::size_t>(i * cols + j)]; }
};

template <class M>
mat from(const M& m) {
  const auto view = mlkit::as_view(m);
  mat r(view.extent(0), view.extent(1));
  for (index_t i = 0; i < r.rows; ++i)
    for (index_t j = 0; j < r.cols; ++j) r(i, j) = static_cast<double>(view(i, j));
  return r;
}

inline mat multiply(const mat& a, const mat& b) {
  mat c(a.rows, b.cols);
  for (index_t i = 0; i < a.rows; ++i)
    for (index_t j = 0; j < b.cols; ++j) {
      double sum = 0;
      for (index_t k = 0; k < a.cols; ++k) sum += a(i, k) * b(k, j);
      c(i, j) = sum;
    }
  return c;
}
inline mat transpose(const mat& a) {
  mat t(a.cols, a.rows);
  for (index_t i = 0; i < a.rows; ++i)
    for (index_t j = 0; j < a.cols; ++j) t(j, i) = a(i, j);
  return t;
}
inline mat add(const mat& a, const mat& b, double factor = 1) {
  mat c = a;
  for (std::size_t i = 0; i < c.v.size(); ++i) c.v[i] += factor * b.v[i];
  return c;
}
inline mat times(const mat& a, const mat& b) {
  mat c = a;
  for (std::size_t i = 0; i < c.v.size(); ++i) c.v[i] *= b.v[i];
  return c;
}
inline mat scaled(mat a, double factor) {
  for (double& x : a.v) x *= factor;
  return a;
}
inline mat scale_columns(mat a, const std::vector<double>& g) {
  for (index_t i = 0; i < a.rows; ++i)
    for (index_t j = 0; j < a.cols; ++j) a(i, j) *= g[static_cast<std::size_t>(j)];
  return a;
}

// Rounded to T, as a chain of separate operations rounds its intermediate results.
template <class T>
mat rounded(mat m) {
  for (double& x : m.v) x = static_cast<double>(T(static_cast<float>(x)));
  return m;
}

// What dropout multiplies its input by, word by word as its definition says.
inline mat mask_of(index_t rows, index_t cols, double p, std::uint64_t seed, std::uint64_t stream) {
  const mlkit::random_stream random{seed, stream};
  mat m(rows, cols);
  for (index_t i = 0; i < rows * cols; ++i)
    m.v[static_cast<std::size_t>(i)] =
        random.bits(static_cast<std::uint64_t>(i)) >= static_cast<std::uint32_t>(p * 0x1p32) ? 1 / (1 - p) : 0;
  return m;
}

// The largest difference, relative to the largest value expected.
template <class M>
double difference(const M& have, const mat& want) {
  const auto view = mlkit::as_view(have);
  double worst = 0, largest = 1e-30;
  for (index_t i = 0; i < want.rows; ++i)
    for (index_t j = 0; j < want.cols; ++j) {
      const double d = std::abs(static_cast<double>(view(i, j)) - want(i, j));
      worst = std::isnan(d) ? d : std::max(worst, d);
      largest = std::max(largest, std::abs(want(i, j)));
    }
  return worst / largest;
}

// Elements are N(0, 1) * size, rounded to T.
template <class T>
void fill(mlkit::tensor<T, 2>& t, std::uint64_t seed, float size = 1) {
  const mlkit::random_stream random{seed, 77};
  for (index_t i = 0; i < t.size(); ++i)
    t.data()[i] = static_cast<T>(size * random.normal(static_cast<std::uint64_t>(i)));
}
template <class T>
mlkit::matrix<T> normal(index_t rows, index_t cols, std::uint64_t seed, float size = 1) {
  mlkit::matrix<T> m({rows, cols});
  fill(m, seed, size);
  return m;
}
template <class T>
mlkit::vector<T> normal_vector(index_t n, std::uint64_t seed, float size = 1, float offset = 0) {
  mlkit::vector<T> v({n});
  const mlkit::random_stream random{seed, 78};
  for (index_t i = 0; i < n; ++i)
    v.data()[i] = static_cast<T>(offset + size * random.normal(static_cast<std::uint64_t>(i)));
  return v;
}

// Error allowed to a product of this depth, relative to the largest result: rounding of the output, and of sums.
template <class T>
double tolerance() {
  if constexpr (std::is_same_v<T, double>) return 1e-13;
  if constexpr (std::is_same_v<T, float>) return 3e-6;
  if constexpr (std::is_same_v<T, mlkit::bf16>) return 0.02;
  return 0.003;
}

}  // namespace reference
