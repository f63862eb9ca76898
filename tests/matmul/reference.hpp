// What the tests of matrix products share: matrices of every layout between guards, naive products in f64, tolerances.
#pragma once

#include <catch2/catch.hpp>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mlkit/matmul.hpp>
#include <string>
#include <vector>

namespace reference {

using mlkit::index_t;

// splitmix64, keyed by (seed, counter).
inline std::uint64_t random_bits(std::uint64_t seed, std::uint64_t counter) {
  std::uint64_t z = (seed * 0x9e3779b97f4a7c15u) ^ (counter + 1) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}
inline double uniform(std::uint64_t seed, std::uint64_t counter) {  // [-1, 1)
  return static_cast<double>(random_bits(seed, counter) >> 11) * 0x1p-52 - 1.0;
}
inline index_t pick(std::uint64_t seed, std::uint64_t counter, index_t count) {  // [0, count)
  return static_cast<index_t>(random_bits(seed, counter) % static_cast<std::uint64_t>(count));
}

template <class T>
T from_double(double x) {
  if constexpr (std::is_same_v<T, double>)
    return x;
  else
    return T(static_cast<float>(x));
}
template <class T>
double to_double(T x) {
  if constexpr (std::is_same_v<T, double>)
    return x;
  else
    return static_cast<double>(static_cast<float>(x));
}

enum class layout {
  rows,
  columns,
  padded_rows,
  padded_columns,
  strided,
  rows_reversed,
  columns_reversed,
  strided_reversed
};
inline constexpr int layouts = 8;
inline const char* name(layout l) {
  constexpr const char* names[] = {"rows",    "columns",       "padded rows",      "padded columns",
                                   "strided", "rows reversed", "columns reversed", "strided reversed"};
  return names[static_cast<int>(l)];
}

// A matrix in a layout, with poison in every gap between its elements and for `guard` elements on both ends.
template <class T>
class guarded {
 public:
  static constexpr index_t guard = 80;

  guarded(index_t rows, index_t cols, layout l) {
    index_t row_stride = cols, col_stride = 1;
    switch (l) {
      case layout::rows:
      case layout::rows_reversed: break;
      case layout::padded_rows: row_stride = cols + 3; break;
      case layout::columns:
      case layout::columns_reversed: row_stride = 1, col_stride = rows; break;
      case layout::padded_columns: row_stride = 1, col_stride = rows + 5; break;
      case layout::strided:
      case layout::strided_reversed: row_stride = 3 * cols + 2, col_stride = 3; break;
    }
    const index_t span = std::max<index_t>(0, rows - 1) * row_stride + std::max<index_t>(0, cols - 1) * col_stride + 1;
    storage_.assign(static_cast<std::size_t>(span + 2 * guard), poison());
    T* first = storage_.data() + guard;
    if (l == layout::rows_reversed || l == layout::strided_reversed) {
      first += std::max<index_t>(0, rows - 1) * row_stride;
      row_stride = -row_stride;
    }
    if (l == layout::columns_reversed || l == layout::strided_reversed) {
      first += std::max<index_t>(0, cols - 1) * col_stride;
      col_stride = -col_stride;
    }
    view_ = {first, {rows, cols}, {row_stride, col_stride}};
  }
  guarded(const guarded&) = delete;

  mlkit::matrix_view<T> view() const { return view_; }

  void fill(std::uint64_t seed) {
    for (index_t i = 0; i < view_.extent(0); ++i)
      for (index_t j = 0; j < view_.extent(1); ++j)
        view_(i, j) = from_double<T>(uniform(seed, static_cast<std::uint64_t>(i * view_.extent(1) + j)));
  }

  // Whether every element outside of the view still holds the poison.
  bool untouched_outside() const {
    std::vector<bool> inside(storage_.size());
    for (index_t i = 0; i < view_.extent(0); ++i)
      for (index_t j = 0; j < view_.extent(1); ++j)
        inside[static_cast<std::size_t>(&view_(i, j) - storage_.data())] = true;
    const T expected = poison();
    for (std::size_t i = 0; i < storage_.size(); ++i)
      if (!inside[i] && std::memcmp(&storage_[i], &expected, sizeof(T)) != 0) return false;
    return true;
  }

  const std::vector<T>& storage() const { return storage_; }

 private:
  // A NaN, so that what is read from outside shows in the results.
  static T poison() { return from_double<T>(std::numeric_limits<double>::quiet_NaN()); }

  std::vector<T> storage_;
  mlkit::matrix_view<T> view_;
};

// Half a unit in the last place of 1: the largest relative error of rounding to T.
template <class T>
constexpr double rounding() {
  return std::is_same_v<T, double>       ? 0x1p-53
         : std::is_same_v<T, float>      ? 0x1p-24
         : std::is_same_v<T, mlkit::f16> ? 0x1p-11
                                         : 0x1p-8;
}

// Sums of products, and of their magnitudes, in f64.
struct sums {
  index_t rows = 0, cols = 0, depth = 0;
  std::vector<double> value, magnitude;
  double& operator()(index_t i, index_t j) { return value[static_cast<std::size_t>(i * cols + j)]; }
  double size(index_t i, index_t j) const { return magnitude[static_cast<std::size_t>(i * cols + j)]; }
};

template <class A, class B>
sums naive(mlkit::matrix_view<A> a, mlkit::matrix_view<B> b) {
  const index_t m = a.extent(0), n = b.extent(1), depth = a.extent(1);
  sums s{m, n, depth, std::vector<double>(static_cast<std::size_t>(m * n)),
         std::vector<double>(static_cast<std::size_t>(m * n))};
  std::vector<double> row(static_cast<std::size_t>(n));
  for (index_t k = 0; k < depth; ++k) {
    for (index_t j = 0; j < n; ++j) row[static_cast<std::size_t>(j)] = to_double(b(k, j));
    for (index_t i = 0; i < m; ++i) {
      const double x = to_double(a(i, k));
      double* value = s.value.data() + i * n;
      double* magnitude = s.magnitude.data() + i * n;
      for (index_t j = 0; j < n; ++j) {
        const double product = x * row[static_cast<std::size_t>(j)];
        value[j] += product;
        magnitude[j] += std::fabs(product);
      }
    }
  }
  return s;
}

// The tolerance of one element: a sum of k products in f32 (f64 for f64) errs by at most (4 + sqrt(k) / 4) half units
// of S = sum |a||b|, where the worst case is k; the result is rounded once to T.
template <class T>
double tolerance(double exact, double magnitude, index_t depth) {
  const double units = 4 + 0.25 * std::sqrt(static_cast<double>(depth));
  const double sum_error = units * (std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24) * magnitude;
  const double smallest = std::is_same_v<T, mlkit::f16> ? 0x1p-24 : 1e-38;
  return sum_error + rounding<T>() * (std::fabs(exact) + sum_error) + smallest;
}

// Compares c with what is expected, and says where it first differs.
template <class T>
void expect(mlkit::matrix_view<T> c, sums& s, const std::string& what) {
  index_t wrong = 0;
  std::string first;
  for (index_t i = 0; i < s.rows; ++i)
    for (index_t j = 0; j < s.cols; ++j) {
      const double got = to_double(c(i, j)), want = s(i, j);
      const bool same = std::isfinite(want) ? std::fabs(got - want) <= tolerance<T>(want, s.size(i, j), s.depth)
                                            : (std::isnan(want) ? std::isnan(got) : got == want);
      if (!same && wrong++ == 0)
        first = what + ": c(" + std::to_string(i) + ", " + std::to_string(j) + ") = " + std::to_string(got) +
                ", expected " + std::to_string(want);
    }
  INFO(first << ", " << wrong << " of " << s.rows * s.cols << " wrong");
  REQUIRE(wrong == 0);
}

struct shape {
  index_t m, n, k;
};

inline std::string describe(const shape& s, layout a, layout b, layout c) {
  return std::string(mlkit::isa_name(mlkit::active_isa())) + " " + std::to_string(s.m) + "x" + std::to_string(s.n) +
         "x" + std::to_string(s.k) + ", a in " + name(a) + ", b in " + name(b) + ", c in " + name(c);
}

// c = a b of one shape and layout, against the naive product, with all guards intact.
template <class A, class B, class C>
void check_product(const shape& s, layout la, layout lb, layout lc, std::uint64_t seed = 1, int threads = 2) {
  guarded<A> a(s.m, s.k, la);
  guarded<B> b(s.k, s.n, lb);
  guarded<C> c(s.m, s.n, lc);
  a.fill(seed);
  b.fill(seed + 1000);
  sums expected = naive(a.view(), b.view());
  mlkit::matmul(mlkit::cpu{.threads = threads}, a.view(), b.view(), c.view());
  const std::string what = describe(s, la, lb, lc);
  expect(c.view(), expected, what);
  INFO(what);
  REQUIRE(c.untouched_outside());
}

template <class A, class B, class C>
void check_product(const shape& s, std::uint64_t seed) {
  check_product<A, B, C>(s, static_cast<layout>(pick(seed, 1, layouts)), static_cast<layout>(pick(seed, 2, layouts)),
                         static_cast<layout>(pick(seed, 3, layouts)), seed);
}

// Runs f once for each instruction set of this machine, or for the one that MLKIT_FORCE_ISA names.
template <class F>
void for_each_isa(F&& f) {
  const mlkit::isa before = mlkit::active_isa();
  const bool forced = std::getenv("MLKIT_FORCE_ISA") != nullptr;
  for (int i = 0; i < mlkit::isa_count; ++i) {
    const auto set = static_cast<mlkit::isa>(i);
    if (forced ? set != before : !mlkit::isa_available(set)) continue;
    mlkit::set_isa(set);
    f();
  }
  mlkit::set_isa(before);
}

}  // namespace reference
