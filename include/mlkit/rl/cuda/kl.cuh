// KL divergences of tokens on a GPU, in one pass; rewards have the scores added behind it.
#pragma once

#include "../kl.hpp"
#include "sums.cuh"

namespace MLKIT_NAMESPACE::rl::detail {

// How many tokens count.
template <class T>
struct counted_only {
  using number = T;
  static constexpr int sums = 1, maxima = 0, each = run_tokens<T>;
  device_plane<const std::uint8_t> mask;

  __device__ __forceinline__ void operator()(const token_run& run, double (&x)[1]) const {
    x[0] += static_cast<double>(__popc(run.kept<each>(mask)));
  }
};

template <class T, class Estimator>
struct kl_tokens_of {
  using number = T;
  static constexpr int sums = 2, maxima = 0, each = run_tokens<T>;
  device_plane<const T> log_probs, reference;
  device_plane<const std::uint8_t> mask;
  device_plane<T> out;
  double value_factor, derivative_factor;
  const double* divisor;  // of the derivatives, where only the device knows it
  Estimator estimator;

  __device__ __forceinline__ void operator()(const token_run& run, double (&x)[2]) const {
    const unsigned bits = run.kept<each>(mask);
    T now[each], then[each], result[each];
    run.load(log_probs, now);
    run.load(reference, then);
    // One of them, and not their sum: 0 times what is not wanted need not be 0.
    const bool of_values = value_factor != 0;
    const T factor = static_cast<T>(of_values      ? value_factor
                                    : !divisor     ? derivative_factor
                                    : *divisor > 0 ? derivative_factor / *divisor
                                                   : 0);
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const kl_estimate<T> e = estimator(now[i] - then[i]);
      const bool counts = bits >> i & 1;
      result[i] = counts ? factor * (of_values ? e.value : e.derivative) : T{};
      if (counts) x[0] += static_cast<double>(e.value), x[1] += 1;
    }
    if (out) run.store(out, result);
  }
};

template <class Stats>
struct kl_result {
  Stats* to;
  double coefficient, normaliser;       // of a loss; a normaliser of 0 is the number of tokens
  const unsigned long long* sequences;  // of rewards

  __device__ __forceinline__ void operator()(const double (&x)[2]) const {
    Stats s;
    s.total = x[0], s.tokens = static_cast<index_t>(x[1]);
    if constexpr (std::is_same_v<Stats, kl_loss_stats>) {
      const double n = normaliser > 0 ? normaliser : x[1];
      s.loss = s.tokens == 0 ? 0 : coefficient / n * s.total;
    }
    if constexpr (std::is_same_v<Stats, kl_reward_stats>) s.sequences = static_cast<index_t>(*sequences);
    *to = s;
  }
};

template <class T, class Estimator, class Stats>
void launch_kl(std::string_view function, const cuda& exec, const kl_batch<T>& in, const Estimator& estimator,
               double value_factor, double derivative_factor, const double* divisor, const sequence_view<T>& out,
               const kl_result<Stats>& result) {
  const plane_shape s = shape_of_planes(in.log_probs, in.reference, in.mask, out);
  sum_tokens(function, exec,
             kl_tokens_of<T, Estimator>{plane_of(in.log_probs, s), plane_of(in.reference, s), plane_of(in.mask, s),
                                        plane_of(out, s), value_factor, derivative_factor, divisor, estimator},
             s.rows, s.cols, result);
}

template <class T, class Estimator>
device_value<kl_stats> run_kl(by_executor, const cuda& exec, const kl_batch<T>& in, const Estimator& estimator,
                              T value_factor, T derivative_factor, const sequence_view<T>& out) {
  constexpr std::string_view function = "rl::kl";
  if (in.log_probs.empty()) return known_value(function, exec, kl_stats{});
  device_value<kl_stats> stats(exec);
  launch_kl(function, exec, in, estimator, static_cast<double>(value_factor), static_cast<double>(derivative_factor),
            nullptr, out, kl_result<kl_stats>{stats.data(), 0, 0, nullptr});
  return stats;
}

template <class T, class Estimator>
device_value<kl_loss_stats> run_kl_loss(by_executor, const cuda& exec, const kl_batch<T>& in, const kl_loss_options& o,
                                        const Estimator& estimator, const sequence_view<T>& gradient) {
  constexpr std::string_view function = "rl::kl_loss";
  if (in.log_probs.empty()) return known_value(function, exec, kl_loss_stats{});
  device_memory<double> counted;
  double normaliser = o.normaliser;
  if (normaliser == 0 && !in.mask.data) normaliser = static_cast<double>(in.log_probs.size());
  if (normaliser == 0) {
    counted = device_memory<double>(exec, 1);
    const plane_shape s = shape_of_planes(in.mask);
    sum_tokens(function, exec, counted_only<T>{plane_of(in.mask, s)}, s.rows, s.cols, keep_count{counted.data()});
  }
  device_value<kl_loss_stats> stats(exec);
  launch_kl(function, exec, in, estimator, 0, normaliser > 0 ? o.coefficient / normaliser : o.coefficient,
            counted.data(), gradient, kl_result<kl_loss_stats>{stats.data(), o.coefficient, normaliser, nullptr});
  return stats;
}

// rewards of the last token that counts += scores, a warp to a sequence; sequences that have one are counted.
template <class T>
__global__ void __launch_bounds__(sum_threads)
    score_kernel(const sequence_places places, index_t tokens, stream<const std::uint8_t> mask, stream<const T> scores,
                 stream<T> rewards, unsigned long long* sequences) {
  const int lane = static_cast<int>(threadIdx.x) % warp_threads;
  const index_t b = (index_t{blockIdx.x} * sum_threads + threadIdx.x) / warp_threads;
  if (b >= places.sequences) return;
  const token_range range(places, b, tokens);
  const index_t row = range.row, first = range.first, last = range.last;
  index_t at = last - 1;
  for (index_t top = last; mask && top > first; top -= warp_threads) {
    const index_t t = top - 1 - lane;
    const unsigned some = __ballot_sync(whole_warp, t >= first && *mask.at(row, t) != 0);
    at = some ? top - __ffs(static_cast<int>(some)) : first - 1;
    if (some) break;
  }
  if (lane != 0 || at < first) return;
  atomicAdd(sequences, 1ull);
  if (scores) *rewards.at(row, at) += *scores.at(b, 0);
}

template <class T, class Estimator>
device_value<kl_reward_stats> run_kl_rewards(by_executor, const cuda& exec, std::string_view function,
                                             const kl_batch<T>& in, const sequence_places& places,
                                             const batch_view<const T>& scores, double beta, const Estimator& estimator,
                                             const sequence_view<T>& rewards) {
  if (in.log_probs.empty()) return known_value(function, exec, kl_reward_stats{});
  const index_t blocks = ceil_div(places.sequences * warp_threads, sum_threads);
  if (blocks > INT32_MAX)
    fail_shape(function, ": ", places.sequences, " sequences are more than a GPU takes in one call");
  device_memory<unsigned long long> sequences(exec, 1);
  device_value<kl_reward_stats> stats(exec);
  launch(function, exec, set_kernel<unsigned long long>, {1, 1}, sequences.data(), 0ull);
  // Twice: first for how many sequences have a token, which the statistics say; the scores follow the divergence.
  const launch_shape shape{static_cast<unsigned>(blocks), sum_threads};
  launch(function, exec, score_kernel<T>, shape, places, in.log_probs.size(), stream<const std::uint8_t>(in.mask),
         stream<const T>{}, stream<T>{}, sequences.data());
  launch_kl(function, exec, in, estimator, -beta, 0, nullptr, rewards,
            kl_result<kl_reward_stats>{stats.data(), 0, 0, sequences.data()});
  if (is_given(scores))
    launch(function, exec, score_kernel<T>, shape, places, in.log_probs.size(), stream<const std::uint8_t>(in.mask),
           stream<const T>(scores), stream<T>(rewards), sequences.data());
  return stats;
}

}  // namespace MLKIT_NAMESPACE::rl::detail
