// Loops that the tape's operations share: element by element, row by row, and sums in an order that is always the same.
#pragma once

#include <vector>

#include "../core/cpu.hpp"
#include "../simd/math.hpp"
#include "parameter.hpp"

// MLKIT_SIMD on a loop that also sums into the variables named.
#if defined(_OPENMP) || defined(MLKIT_OPENMP_SIMD)
#define MLKIT_SIMD_SUM(...) MLKIT_PRAGMA(omp simd reduction(+ : __VA_ARGS__))
#else
#define MLKIT_SIMD_SUM(...)
#endif

#define MLKIT_FOREACH "../nn/cpu/elementwise-inl.hpp"
#include "../simd/foreach_isa.hpp"
#undef MLKIT_SIMD_SUM

namespace MLKIT_NAMESPACE::nn::detail {

using namespace ::mlkit::detail;

/// check_view for a vector that is read or written as one run of memory.
template <class T>
void check_run(std::string_view function, std::string_view name, const vector_view<T>& v) {
  check_view(function, name, v);
  if (!v.contiguous())
    fail_shape(function, ": ", name, " has stride ", v.stride(0), ", but its elements must follow each other");
}

// Elements to a task. Tasks are cut here and nowhere else, so that the vectors' tails fall on the same elements for any
// number of threads.
inline constexpr index_t grain = 8192;

/// f(begin, end) for blocks of [0, n), in parallel where that pays.
template <std::invocable<index_t, index_t> F>
void for_blocks(const cpu& exec, index_t n, const F& f) {
  if (n <= grain)
    f(0, n);
  else
    parallel_for(exec, ceil_div(n, grain), [&](index_t b) { f(b * grain, std::min(n, (b + 1) * grain)); });
}

/// f(i) for i in [0, n), at the instruction set's full width where f can be vectorised. f writes element i alone.
template <std::invocable<index_t> F>
void for_each(const cpu& exec, index_t n, const F& f) {
  const auto run = MLKIT_SELECT_WITHOUT_BF16(for_range<F>);
  for_blocks(exec, n, [&](index_t begin, index_t end) { run(begin, end, f); });
}

/// f(row) for each of `rows` rows of `columns` elements.
template <std::invocable<index_t> F>
void for_rows(const cpu& exec, index_t rows, index_t columns, const F& f) {
  if (rows * columns <= grain)
    for (index_t r = 0; r < rows; ++r) f(r);
  else
    parallel_for(exec, rows, f);
}

/// The sum of f(i) over [0, n) in double: blocks of `grain`, then the blocks in order.
template <std::invocable<index_t> F>
double sum_of(const cpu& exec, index_t n, const F& f) {
  std::vector<double> partial(static_cast<std::size_t>(ceil_div(n, grain)));
  const auto block = [&](index_t b) {
    double s = 0;
    for (index_t i = b * grain, end = std::min(n, (b + 1) * grain); i < end; ++i) s += static_cast<double>(f(i));
    partial[static_cast<std::size_t>(b)] = s;
  };
  parallel_for(exec, ceil_div(n, grain), block);
  double s = 0;
  for (const double p : partial) s += p;
  return s;
}

/// out[c] += sum over rows of f(r, c). Rows are added in blocks of 64, which keeps the rounding error of long sums
/// small; columns are what threads share.
template <real T, class F>
void add_column_sums(const cpu& exec, index_t rows, index_t columns, T* out, const F& f) {
  constexpr index_t strip = 64;
  const auto one = [&](index_t s) {
    const index_t first = s * strip, count = std::min(strip, columns - first);
    T total[strip] = {};
    for (index_t r0 = 0; r0 < rows; r0 += 64) {
      T block[strip] = {};
      for (index_t r = r0, end = std::min(rows, r0 + 64); r < end; ++r)
        for (index_t c = 0; c < count; ++c) block[c] += f(r, first + c);
      for (index_t c = 0; c < count; ++c) total[c] += block[c];
    }
    for (index_t c = 0; c < count; ++c) out[first + c] += total[c];
  };
  if (rows * columns <= grain)
    for (index_t s = 0; s < ceil_div(columns, strip); ++s) one(s);
  else
    parallel_for(exec, ceil_div(columns, strip), one);
}

}  // namespace MLKIT_NAMESPACE::nn::detail
