// Moments of what a mask keeps, and whitening by them, on a GPU: parts of 4096 elements by a block each, about the
// part's own mean; then the parts in a fixed order.
#pragma once

#include "../whiten.hpp"
#include "sums.cuh"

namespace MLKIT_NAMESPACE::rl::detail {

// What a thread has of a part's 4096 elements: so many runs.
template <class T>
inline constexpr int moment_rounds = 16 / run_tokens<T>;
inline constexpr index_t moment_elements = index_t{sum_threads} * 16;

struct whiten_factors {
  double mean, factor, shift;
};

template <class Moments>
__device__ __forceinline__ Moments merge_moments(const Moments& a, const Moments& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const double na = static_cast<double>(a.count), nb = static_cast<double>(b.count), n = na + nb, d = b.mean - a.mean;
  Moments r;
  r.count = a.count + b.count, r.mean = a.mean + d * (nb / n), r.m2 = a.m2 + b.m2 + d * d * (na * nb / n);
  return r;
}

template <class T>
__global__ void __launch_bounds__(sum_threads, 4)
    moments_kernel(device_plane<const T> x, device_plane<const std::uint8_t> mask, index_t rows, index_t cols,
                   moments* parts) {
  using A = accumulator_t<T>;
  constexpr int each = run_tokens<T>;
  __shared__ double about;
  A kept[moment_rounds<T>][each];
  unsigned bits[moment_rounds<T>];
  const index_t n = rows * cols;
#pragma unroll
  for (int r = 0; r < moment_rounds<T>; ++r) {
    const index_t first = blockIdx.x * moment_elements + (index_t{r} * sum_threads + threadIdx.x) * each;
    bits[r] = 0;
    T values[each] = {};
    if (first < n) {
      const token_run run(first, n - first < each ? static_cast<int>(n - first) : each, rows, cols);
      run.load(x, values);
      bits[r] = run.kept<each>(mask);
    }
#pragma unroll
    for (int i = 0; i < each; ++i) kept[r][i] = widen_one(values[i]);
  }
  const double least = -static_cast<double>(__builtin_inff());
  double sums[4] = {0, 0, least, least};  // and the largest, and that of the negatives
#pragma unroll
  for (int r = 0; r < moment_rounds<T>; ++r)
#pragma unroll
    for (int i = 0; i < each; ++i)
      if (bits[r] >> i & 1) {
        const double x_i = static_cast<double>(kept[r][i]);
        sums[0] += x_i, sums[1] += 1;
        sums[2] = ::fmax(sums[2], x_i), sums[3] = ::fmax(sums[3], -x_i);
      }
  sum_block<2, 2>(sums);
  const double count = sums[1];
  // Elements of one value do not deviate from it, however their sum is rounded.
  if (threadIdx.x == 0) about = sums[2] == -sums[3] && sums[0] == sums[0] ? sums[2] : count > 0 ? sums[0] / count : 0;
  __syncthreads();
  const double mean = about;
  double deviations[2] = {0, 0};
#pragma unroll
  for (int r = 0; r < moment_rounds<T>; ++r)
#pragma unroll
    for (int i = 0; i < each; ++i)
      if (bits[r] >> i & 1) {
        const double d = static_cast<double>(kept[r][i]) - mean;
        deviations[0] += d, deviations[1] += d * d;
      }
  sum_block<2, 0>(deviations);
  if (threadIdx.x != 0) return;
  moments m;
  if (count > 0) {
    const double rest = deviations[0] / count;
    m.count = static_cast<index_t>(count), m.mean = mean + rest;
    m.m2 = deviations[1] - deviations[0] * rest;
    if (m.m2 < 0) m.m2 = 0;
  }
  parts[blockIdx.x] = m;
}

// The moments of all parts: each thread those of a stretch, and then the threads.
template <class Moments>
__global__ void __launch_bounds__(sum_threads) merge_kernel(const Moments* parts, index_t count, Moments* to) {
  __shared__ index_t counts[sum_threads];
  __shared__ double means[sum_threads], squares[sum_threads];
  const index_t stretch = (count + sum_threads - 1) / sum_threads, first = index_t{threadIdx.x} * stretch;
  Moments m;
  for (index_t i = first; i < first + stretch && i < count; ++i) m = merge_moments(m, parts[i]);
  for (unsigned half = sum_threads / 2;; half /= 2) {
    counts[threadIdx.x] = m.count, means[threadIdx.x] = m.mean, squares[threadIdx.x] = m.m2;
    __syncthreads();
    if (half == 0) break;
    if (threadIdx.x < half) {
      Moments far;
      far.count = counts[threadIdx.x + half], far.mean = means[threadIdx.x + half];
      far.m2 = squares[threadIdx.x + half];
      m = merge_moments(m, far);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) *to = m;
}

template <class A>
inline constexpr double largest = sizeof(A) == 8 ? 1.7976931348623157e308 : 0x1.fffffep127;

// What elements are whitened by.
struct whitening {
  double epsilon, variance_epsilon;
  bool population, shift_mean;

  __device__ __forceinline__ whiten_factors operator()(const moments& m) const {
    const index_t n = population ? m.count : m.count - 1;
    const double variance = n > 0 ? m.m2 / static_cast<double>(n) : 0;
    // Moments that are not finite, which the CPU refuses, make all elements NaN.
    const double factor =
        variance > 0 || !(variance == variance) ? 1 / (::sqrt(variance + variance_epsilon) + epsilon) : 0;
    return {m.mean, factor, shift_mean ? 0 : m.mean};
  }
};

template <class T, class Out>
__global__ void __launch_bounds__(sum_threads)
    whiten_kernel(device_plane<const T> x, device_plane<const std::uint8_t> mask, device_plane<Out> out, index_t rows,
                  index_t cols, const moments* of, const whitening how) {
  using A = accumulator_t<T>;
  constexpr int each = run_tokens<T>;
  const index_t n = rows * cols;
  const whiten_factors w = how(*of);
  // So that no deviation is above the largest A: none is above the root of their squares' sum.
  constexpr double most = largest<A>;
  const double scale = ::sqrt(of->m2) > most / 2 ? 0x1p-4 : 1, of_all = scale * w.mean, inverse = w.factor / scale;
  const A mean = static_cast<A>(of_all), rest = static_cast<A>(of_all - static_cast<double>(mean)),
          factor = static_cast<A>(inverse > most ? most : inverse), shift = static_cast<A>(w.shift),
          by = static_cast<A>(scale);
#pragma unroll 2
  for (int r = 0; r < moment_rounds<T>; ++r) {
    const index_t first = blockIdx.x * moment_elements + (index_t{r} * sum_threads + threadIdx.x) * each;
    if (first >= n) return;
    const token_run run(first, n - first < each ? static_cast<int>(n - first) : each, rows, cols);
    T values[each];
    Out result[each];
    run.load(x, values);
    const unsigned bits = run.kept<each>(mask);
#pragma unroll
    for (int i = 0; i < each; ++i)
      result[i] = narrow_one<Out>(fused(fused(widen_one(values[i]), by, -mean) - rest, factor, shift));
    run.store_kept(out, result, bits);
  }
}

template <class T>
void launch_moments(std::string_view function, const cuda& exec, const plane_shape& s, const plane<const T>& x,
                    const plane<const std::uint8_t>& mask, moments* to) {
  const index_t parts = ceil_div(s.rows * s.cols, moment_elements);
  if (parts > INT32_MAX) fail_shape(function, ": ", s.rows * s.cols, " elements are more than a GPU takes in one call");
  const device_memory<moments> of_parts(exec, parts);
  launch(function, exec, moments_kernel<T>, {static_cast<unsigned>(parts), sum_threads}, x, mask, s.rows, s.cols,
         of_parts.data());
  launch(function, exec, merge_kernel<moments>, {1, sum_threads}, of_parts.data(), parts, to);
}

template <class T>
device_value<moments> run_moments(const cuda& exec, const moments_problem<T>& p) {
  if (p.shape.rows * p.shape.cols == 0) return known_value("rl::find_moments", exec, moments{});
  device_value<moments> m(exec);
  launch_moments("rl::find_moments", exec, p.shape, p.x, p.mask, m.data());
  return m;
}

template <class T, class Out, int Rank>
device_value<moments> run_whiten(by_executor, std::string_view function, const cuda& exec,
                                 const tensor_view<const T, Rank>& x, const mask_view<Rank>& mask,
                                 const whiten_options& o, const tensor_view<Out, Rank>& out) {
  if (x.empty() && !o.over_ranks) return known_value(function, exec, moments{});
  const plane_shape s = shape_of_planes(x, out, mask.values);
  device_value<moments> m(exec);
  if (x.empty())
    m = known_value(function, exec, moments{});
  else
    launch_moments(function, exec, s, plane_of(x, s), plane_of(mask.values, s), m.data());
  if (o.over_ranks) m = known_value(function, exec, o.over_ranks(m.get()));
  const whitening how{o.epsilon, o.variance_epsilon, o.variance == variance_of::population, o.shift_mean};
  launch(function, exec, whiten_kernel<T, Out>,
         {static_cast<unsigned>(ceil_div(s.rows * s.cols, moment_elements)), sum_threads}, plane_of(x, s),
         plane_of(mask.values, s), plane_of(out, s), s.rows, s.cols, m.data(), how);
  return m;
}

}  // namespace MLKIT_NAMESPACE::rl::detail
