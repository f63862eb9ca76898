// Advantages among the completions of a prompt on a GPU: a warp to a group, in f64.
#pragma once

#include "../group.hpp"
#include "whiten.cuh"

namespace MLKIT_NAMESPACE::rl::detail {

// Where groups are; offsets that make no sense end within the rewards.
struct device_groups {
  index_t count, size, elements;
  const std::int32_t* offsets;
  index_t step;

  device_groups(const group_places& p, index_t n)
      : count(p.count), size(p.size), elements(n), offsets(p.offsets.data), step(p.offsets.strides[0]) {}
  __device__ __forceinline__ index_t begin(index_t g) const {
    return offsets ? min(max(index_t{offsets[g * step]}, index_t{0}), elements) : g * size;
  }
  __device__ __forceinline__ index_t end(index_t g) const { return max(begin(g + 1), begin(g)); }
};

// What is made of the moments of a group: out = (r - mean) factor.
enum class group_scale { none, deviation, others };
struct group_method {
  group_scale scale;
  double epsilon;
  bool population, centers;
};

template <class T, class Out>
__global__ void __launch_bounds__(sum_threads) group_kernel(const T* rewards, index_t step, const device_groups groups,
                                                            const group_method how, Out* out, index_t out_step) {
  const int lane = static_cast<int>(threadIdx.x) % warp_threads;
  const index_t g = (index_t{blockIdx.x} * sum_threads + threadIdx.x) / warp_threads;
  if (g >= groups.count) return;
  const index_t begin = groups.begin(g), end = groups.end(g);
  if (begin == end) return;
  const double n = static_cast<double>(end - begin), first = static_cast<double>(rewards[begin * step]);
  double mean = 0, factor = 1;
  if (how.centers) {
    double sum = 0;  // from the first, so that equal rewards deviate by nothing
    for (index_t i = begin + lane; i < end; i += warp_threads) sum += static_cast<double>(rewards[i * step]) - first;
    mean = first + sum_warp(sum) / n;
  }
  if (how.scale == group_scale::others) factor = n > 1 ? n / (n - 1) : 0;
  if (how.scale == group_scale::deviation) {
    double squares = 0;
    for (index_t i = begin + lane; i < end; i += warp_threads) {
      const double d = static_cast<double>(rewards[i * step]) - mean;
      squares += d * d;
    }
    squares = sum_warp(squares);
    const double of = how.population ? n : n - 1, variance = of > 0 ? squares / of : 0;
    factor = variance > 0 || !(variance == variance) ? 1 / (::sqrt(variance) + how.epsilon) : 0;
  }
  __syncwarp();  // out may be the rewards, of which all have been read but each thread's own
  for (index_t i = begin + lane; i < end; i += warp_threads)
    out[i * out_step] = static_cast<Out>((static_cast<double>(rewards[i * step]) - mean) * factor);
}
template <class T>
__global__ void __launch_bounds__(sum_threads)
    scale_kernel(const double* x, index_t n, const moments* of, const whitening how, T* out, index_t out_step) {
  const index_t i = index_t{blockIdx.x} * sum_threads + threadIdx.x;
  if (i >= n) return;
  const whiten_factors w = how(*of);
  out[i * out_step] = static_cast<T>((x[i] - w.mean) * w.factor);
}

// Blocks that have a warp for each group.
inline unsigned warps_of_groups(std::string_view function, const group_places& places) {
  return checked_blocks(function, ceil_div(places.count * warp_threads, sum_threads), places.count, "groups");
}

template <class T, class Out>
void launch_groups(std::string_view function, const cuda& exec, const vector_view<const T>& r,
                   const group_places& places, const group_method& how, Out* out, index_t out_step) {
  launch(function, exec, group_kernel<T, Out>, {warps_of_groups(function, places), sum_threads}, r.data, r.strides[0],
         device_groups(places, r.extent(0)), how, out, out_step);
}

template <class T>
void advantages_of(const cuda& exec, std::string_view function, const vector_view<const T>& r,
                   const group_places& places, const grpo& o, const vector_view<T>& out) {
  check_non_negative(function, "epsilon", o.epsilon);
  launch_groups(function, exec, r, places,
                {group_scale::deviation, o.epsilon, o.variance == variance_of::population, true}, out.data,
                out.strides[0]);
}
template <class T>
void advantages_of(const cuda& exec, std::string_view function, const vector_view<const T>& r,
                   const group_places& places, const dr_grpo&, const vector_view<T>& out) {
  launch_groups(function, exec, r, places, {group_scale::none, 0, false, true}, out.data, out.strides[0]);
}
template <class T>
void advantages_of(const cuda& exec, std::string_view function, const vector_view<const T>& r,
                   const group_places& places, const rloo&, const vector_view<T>& out) {
  launch_groups(function, exec, r, places, {group_scale::others, 0, false, true}, out.data, out.strides[0]);
}
template <class T>
void advantages_of(const cuda& exec, std::string_view function, const vector_view<const T>& r,
                   const group_places& places, const reinforce_pp& o, const vector_view<T>& out) {
  check_non_negative(function, "epsilon", o.epsilon);
  const index_t n = r.extent(0);
  if (n == 0 && !o.over_ranks) return;
  device_memory<double> centered(exec, n);
  launch_groups(function, exec, r, places, {group_scale::none, 0, false, o.group_baseline}, centered.data(), 1);
  const vector_view<const double> x(centered.data(), {n});
  device_value<moments> m = run_moments(exec, plan_moments(x, mask_view<1>{}));
  if (o.over_ranks) m = known_value(function, exec, o.over_ranks(m.get()));
  launch(function, exec, scale_kernel<T>, {static_cast<unsigned>(ceil_div(n, sum_threads)), sum_threads},
         centered.data(), n, m.data(), whitening{o.epsilon, 0, o.variance == variance_of::population, true}, out.data,
         out.strides[0]);
}

template <class T, class I>
__global__ void __launch_bounds__(sum_threads)
    best_kernel(const vector_view<const T> rewards, const device_groups groups, const vector_view<I> best) {
  const int lane = static_cast<int>(threadIdx.x) % warp_threads;
  const index_t g = (index_t{blockIdx.x} * sum_threads + threadIdx.x) / warp_threads;
  if (g >= groups.count) return;
  const index_t end = groups.end(g);
  accumulator_t<T> most{};
  long long at = -1;  // of the first of those that are the largest; there is none yet
  for (index_t i = groups.begin(g) + lane; i < end; i += warp_threads) {
    const accumulator_t<T> x = widen_one(rewards(i));
    if (at < 0 ? x == x : x > most) most = x, at = i;
  }
#pragma unroll
  for (unsigned d = warp_threads / 2; d > 0; d /= 2) {
    const accumulator_t<T> far = __shfl_down_sync(whole_warp, most, d);
    const long long far_at = __shfl_down_sync(whole_warp, at, d);
    if (far_at >= 0 && (at < 0 || far > most || (far == most && far_at < at))) most = far, at = far_at;
  }
  if (lane == 0) best(g) = static_cast<I>(at);
}
template <class T, class I>
void find_best(std::string_view function, const cuda& exec, const vector_view<const T>& r, const group_places& places,
               const vector_view<I>& best) {
  launch(function, exec, best_kernel<T, I>, {warps_of_groups(function, places), sum_threads}, r,
         device_groups(places, r.extent(0)), best);
}

}  // namespace MLKIT_NAMESPACE::rl::detail
