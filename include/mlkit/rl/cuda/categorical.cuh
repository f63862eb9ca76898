// Categorical and multi-discrete policies on a GPU: log-probabilities and gradients are log_probs.cuh's, choice after
// choice; here actions are drawn.
#pragma once

#include "../categorical.hpp"
#include "log_probs.cuh"
#include "sums.cuh"

namespace MLKIT_NAMESPACE::rl::detail {

template <class A>
inline constexpr bool differentiates<add_choice<A>> = false;

template <class A>
__global__ void __launch_bounds__(sum_threads)
    no_choice_kernel(const vector_view<A> logp, const vector_view<A> entropy, index_t rows) {
  const index_t r = index_t{blockIdx.x} * sum_threads + threadIdx.x;
  if (r >= rows) return;
  if (logp.data) logp(r) = A{};
  if (entropy.data) entropy(r) = A{};
}
template <class A>
void write_no_choice(by_executor, std::string_view function, const cuda& exec, index_t rows,
                     const policy_log_probs<A>& out) {
  launch(function, exec, no_choice_kernel<A>,
         {checked_blocks(function, ceil_div(rows, sum_threads), rows, "rows"), sum_threads}, out.logp, out.entropy,
         rows);
}

// Draws as sample_class does: a warp takes a row, or of many classes a block, each of its warps a part of them. The
// warp whose part holds the number goes through it again. What cannot be drawn from gives -1.
template <class T, class I>
__global__ void __launch_bounds__(most_row_threads)
    sample_kernel(const matrix_view<const T> logits, const random_stream random, std::uint64_t first,
                  std::uint64_t step, I* actions, index_t action_step) {
  using A = accumulator_t<T>;
  constexpr int most_warps = most_row_threads / warp_threads;
  __shared__ A tops[most_warps];
  __shared__ double shares[most_warps];
  const int lane = static_cast<int>(threadIdx.x) % warp_threads, warp = static_cast<int>(threadIdx.x) / warp_threads,
            warps = static_cast<int>(blockDim.x) / warp_threads;
  const index_t row = index_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (row >= logits.extent(0)) return;
  const index_t n = logits.extent(1), class_step = logits.stride(1), together = index_t{warps} * warp_threads,
                part = (n + together - 1) / together * warp_threads, begin = warp * part, end = min(n, begin + part);
  const T* const z = logits.data + row * logits.stride(0);

  A top = no_logit<A>();
  for (index_t j = begin + lane; j < end; j += warp_threads) top = larger(top, widen_one(z[j * class_step]));
#pragma unroll
  for (int d = warp_threads / 2; d > 0; d /= 2) top = larger(top, __shfl_xor_sync(whole_warp, top, d));
  if (warps > 1) {
    if (lane == 0) tops[warp] = top;
    __syncthreads();
    for (int w = 0; w < warps; ++w) top = larger(top, tops[w]);
  }
  const auto weight = [&](index_t j) { return static_cast<double>(exp_of(widen_one(z[j * class_step]) - top)); };
  double share = 0;
  for (index_t j = begin + lane; j < end; j += warp_threads) share += weight(j);
  share = sum_warp(share);
  double total = share, below = 0;
  if (warps > 1) {
    if (lane == 0) shares[warp] = share;
    __syncthreads();
    total = 0;
    for (int w = 0; w < warps; ++w) total += shares[w];
  }

  I* const to = actions + row * action_step;
  if (!(total > 0 && total < static_cast<double>(__builtin_inff()))) {  // NaN too
    if (threadIdx.x == 0) *to = -1;
    return;
  }
  const double target = static_cast<double>(random.uniform(first + static_cast<std::uint64_t>(row) * step)) * total;
  if (warps > 1) {
    int chosen = 0;
    double sum = 0;
    for (int w = 0; w < warps && sum <= target; ++w) {
      if (shares[w] > 0) chosen = w, below = sum;
      sum += shares[w];
    }
    if (warp != chosen) return;
  }
  index_t action = -1;  // the last of positive weight: rounding may leave the target at the end
  for (index_t at = begin; at < end; at += warp_threads) {
    const index_t j = at + lane;
    const double own = j < end ? weight(j) : 0;
    double up_to = own;
#pragma unroll
    for (unsigned d = 1; d < warp_threads; d *= 2) {
      const double far = __shfl_up_sync(whole_warp, up_to, d);
      if (lane >= static_cast<int>(d)) up_to += far;
    }
    const unsigned possible = __ballot_sync(whole_warp, own > 0),
                   above = __ballot_sync(whole_warp, own > 0 && below + up_to > target);
    if (above) {
      action = at + __ffs(static_cast<int>(above)) - 1;
      break;
    }
    if (possible) action = at + warp_threads - 1 - __clz(static_cast<int>(possible));
    below += __shfl_sync(whole_warp, up_to, warp_threads - 1);
  }
  if (lane == 0) *to = static_cast<I>(action);
}

template <class T, class I>
void run_sample(std::string_view function, const cuda& exec, const choices<T>& c, const random_stream& random,
                const matrix_view<I>& actions, index_t first) {
  constexpr index_t classes_of_warp = 1024;
  const index_t rows = c.logits.extent(0);
  const auto step = static_cast<std::uint64_t>(c.count());
  for (index_t i = 0; i < c.count(); ++i) {
    const matrix_view<const T> z = c.of(c.logits, i);
    launch_shape shape;
    if (z.extent(1) <= classes_of_warp) {
      shape.block = dim3(warp_threads, rows_of_warps);
    } else {
      unsigned threads = 2 * warp_threads;
      while (threads < most_row_threads && threads * 32 <= z.extent(1)) threads *= 2;
      shape.block = dim3(threads);
    }
    shape.grid = dim3(checked_blocks(function, ceil_div(rows, shape.block.y), rows, "rows"));
    launch(function, exec, sample_kernel<T, I>, shape, z, random,
           static_cast<std::uint64_t>(first) * step + static_cast<std::uint64_t>(i), step,
           actions.data + i * actions.strides[1], actions.strides[0]);
  }
}

}  // namespace MLKIT_NAMESPACE::rl::detail
