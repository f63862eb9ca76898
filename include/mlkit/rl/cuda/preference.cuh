// Losses of pairs, of labelled and of ranked completions on a GPU, and sums over the tokens of sequences.
#pragma once

#include "../preference.hpp"
#include "group.cuh"
#include "sums.cuh"

namespace MLKIT_NAMESPACE::rl::detail {

template <class T, int N>
__device__ __forceinline__ void load_strided(const strided<const T>& v, const token_run& run, T (&to)[N]) {
  if (v.data) return load_steps<N, true>(v.data + run.first * v.step, v.step, run.count, to);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = T{};
}
template <class T, int N>
__device__ __forceinline__ void store_strided(const strided<T>& v, const token_run& run, const T (&from)[N]) {
  if (v.data) store_steps<N, true>(v.data + run.first * v.step, v.step, run.count, from);
}

template <class T, class Loss>
struct pair_terms {
  using number = T;
  static constexpr int sums = 4, maxima = 0, each = run_tokens<T>;
  strided<const T> operands[5];
  strided<T> d_chosen, d_rejected, losses;
  T factor;
  Loss loss;

  __device__ __forceinline__ void operator()(const token_run& run, double (&x)[4]) const {
    T in[5][each], of_chosen[each], of_rejected[each], value[each];
#pragma unroll
    for (int k = 0; k < 5; ++k) load_strided(operands[k], run, in[k]);
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const pair_term<T> t = loss(pair_point<T>{in[0][i], in[1][i], in[2][i], in[3][i], in[4][i]});
      value[i] = t.loss, of_chosen[i] = t.d_chosen * factor, of_rejected[i] = t.d_rejected * factor;
      if (i >= run.count) continue;
      x[0] += static_cast<double>(t.loss), x[1] += t.chosen_reward > t.rejected_reward ? 1.0 : 0.0;
      x[2] += static_cast<double>(t.chosen_reward), x[3] += static_cast<double>(t.rejected_reward);
    }
    store_strided(d_chosen, run, of_chosen);
    store_strided(d_rejected, run, of_rejected);
    store_strided(losses, run, value);
  }
};
struct pair_result {
  preference_stats* to;
  index_t n;
  double normaliser;
  __device__ __forceinline__ void operator()(const double (&x)[4]) const {
    const double count = static_cast<double>(n);
    preference_stats s;
    s.loss = x[0] / normaliser, s.accuracy = x[1] / count, s.chosen_reward = x[2] / count;
    s.rejected_reward = x[3] / count, s.pairs = n;
    *to = s;
  }
};

template <class T, class Loss>
device_value<preference_stats> run_pairs(const cuda& exec, const pair_problem<T, Loss>& p, double normaliser) {
  constexpr std::string_view function = "rl::preference_loss";
  if (p.n == 0) return known_value(function, exec, preference_stats{});
  device_value<preference_stats> stats(exec);
  pair_terms<T, Loss> f{{}, p.d_chosen, p.d_rejected, p.losses, p.factor, *p.loss};
  std::copy_n(p.operands, 5, f.operands);
  sum_tokens(function, exec, f, 1, p.n, pair_result{stats.data(), p.n, normaliser});
  return stats;
}

template <class T>
struct kto_terms {
  using number = T;
  static constexpr int sums = 4, maxima = 0, each = run_tokens<T>;
  kto_problem<T> p;

  __device__ __forceinline__ void operator()(const token_run& run, double (&x)[4]) const {
    T now[each], then[each], d[each], value[each];
    load_strided(p.log_probs, run, now);
    load_strided(p.reference, run, then);
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const bool desirable = i < run.count && p.desirable.data[(run.first + i) * p.desirable.step] != 0;
      const kto::term<T> t = p.loss(now[i], then[i], desirable);
      value[i] = t.loss, d[i] = t.d_log_prob * p.factor;
      if (i >= run.count) continue;
      x[0] += static_cast<double>(t.loss);
      x[1] += desirable ? static_cast<double>(t.reward) : 0.0;
      x[2] += desirable ? 0.0 : static_cast<double>(t.reward);
      x[3] += desirable ? 1.0 : 0.0;
    }
    store_strided(p.d_log_probs, run, d);
    store_strided(p.losses, run, value);
  }
};
struct kto_result {
  kto_stats* to;
  index_t n;
  double normaliser;
  __device__ __forceinline__ void operator()(const double (&x)[4]) const {
    kto_stats s;
    s.desirable = static_cast<index_t>(x[3]), s.undesirable = n - s.desirable;
    s.loss = x[0] / normaliser;
    s.desirable_reward = s.desirable == 0 ? 0 : x[1] / static_cast<double>(s.desirable);
    s.undesirable_reward = s.undesirable == 0 ? 0 : x[2] / static_cast<double>(s.undesirable);
    *to = s;
  }
};
template <class T>
device_value<kto_stats> run_kto(const cuda& exec, const kto_problem<T>& p, double normaliser) {
  constexpr std::string_view function = "rl::preference_loss";
  if (p.n == 0) return known_value(function, exec, kto_stats{});
  device_value<kto_stats> stats(exec);
  sum_tokens(function, exec, kto_terms<T>{p}, 1, p.n, kto_result{stats.data(), p.n, normaliser});
  return stats;
}

template <class T>
__global__ void __launch_bounds__(sum_threads)
    difference_kernel(strided<const T> log_probs, strided<const T> reference, index_t n, double* to) {
  const index_t i = index_t{blockIdx.x} * sum_threads + threadIdx.x;
  if (i < n) to[i] = static_cast<double>(*log_probs.at(i)) - static_cast<double>(*reference.at(i));
}
// The mean, not below 0; NaN stays.
template <class Moments>
__global__ void reference_point_kernel(const Moments* of, double* to) {
  *to = of->mean < 0 ? 0 : of->mean;
}

template <class T>
device_value<double> run_reference_point(by_executor, const cuda& exec, std::string_view function,
                                         const vector_view<const T>& log_probs, const vector_view<const T>& reference,
                                         const merge_over_ranks& over_ranks) {
  const index_t n = log_probs.extent(0);
  const device_memory<double> differences(exec, n);
  launch(function, exec, difference_kernel<T>,
         {checked_blocks(function, ceil_div(n, sum_threads), n, "elements"), sum_threads}, log_probs, reference, n,
         differences.data());
  device_value<moments> m =
      run_moments(exec, plan_moments(vector_view<const double>(differences.data(), {n}), mask_view<1>{}));
  if (over_ranks) m = known_value(function, exec, over_ranks(m.get()));
  device_value<double> point(exec);
  launch(function, exec, reference_point_kernel<moments>, {1, 1}, m.data(), point.data());
  return point;
}

// What the K-wise kernels are given.
template <class T>
struct device_k_wise {
  device_groups groups;
  strided<const T> rewards;
  strided<const std::int32_t> ranks;
  strided<T> d_rewards;
  double normaliser;      // 0: the prompts with a pair,
  const double* prompts;  // which the device counts

  // Ranks are compared, or places.
  __device__ __forceinline__ std::int64_t rank(index_t i) const { return ranks.data ? *ranks.at(i) : i; }
  __device__ __forceinline__ double divisor() const {
    return normaliser > 0 ? normaliser : *prompts > 0 ? *prompts : 1;
  }
};

// Prompts that have a pair to compare: a thread to each, and the sum by finish_kernel.
template <class T>
__global__ void __launch_bounds__(sum_threads) count_prompts_kernel(const device_k_wise<T> p, double* parts) {
  const index_t g = index_t{blockIdx.x} * sum_threads + threadIdx.x;
  double pair[1] = {0};
  if (g < p.groups.count) {
    const index_t begin = p.groups.begin(g), end = p.groups.end(g);
    for (index_t i = begin + 1; i < end && pair[0] == 0; ++i) pair[0] = p.rank(i) != p.rank(begin) ? 1 : 0;
  }
  sum_block<1, 0>(pair);
  if (threadIdx.x == 0) parts[blockIdx.x] = pair[0];
}

// A warp to a prompt. A thread has a completion against all others, so that each pair is seen from both of its sides;
// the better one's counts.
template <class T>
__global__ void __launch_bounds__(sum_threads) k_wise_kernel(const device_k_wise<T> p, double* parts) {
  const int lane = static_cast<int>(threadIdx.x) % warp_threads;
  const index_t g = (index_t{blockIdx.x} * sum_threads + threadIdx.x) / warp_threads;
  double x[5] = {0, 0, 0, 0, 0};  // loss, right, chosen, rejected, pairs
  if (g < p.groups.count) {
    const index_t begin = p.groups.begin(g), end = p.groups.end(g);
    double pairs = 0;  // of this thread's completions, from both sides
    for (index_t i = begin + lane; i < end; i += warp_threads) {
      const std::int64_t rank = p.rank(i);
      const T reward = *p.rewards.at(i);
      double gradient = 0;
      for (index_t j = begin; j < end; ++j) {
        const std::int64_t other_rank = p.rank(j);
        if (other_rank == rank) continue;
        const T other = *p.rewards.at(j);
        const bool better = rank < other_rank;
        const T difference = better ? reward - other : other - reward;
        const log_sigmoid<T> s(difference);
        const double slope = static_cast<double>(s.derivative);
        gradient += better ? -slope : slope, pairs += 1;
        if (!better) continue;
        x[0] -= static_cast<double>(s.value), x[1] += difference > 0 ? 1.0 : 0.0;
        x[2] += static_cast<double>(reward), x[3] += static_cast<double>(other), x[4] += 1;
      }
      if (p.d_rewards.data) *p.d_rewards.at(i) = static_cast<T>(gradient);
    }
    pairs = sum_warp(pairs) / 2;
    if (pairs > 0) x[0] /= pairs;
    if (p.d_rewards.data) {
      const double factor = pairs > 0 ? 1 / (pairs * p.divisor()) : 0;
      for (index_t i = begin + lane; i < end; i += warp_threads)
        *p.d_rewards.at(i) = static_cast<T>(static_cast<double>(*p.d_rewards.at(i)) * factor);
    }
  }
  sum_block<5, 0>(x);
  if (threadIdx.x == 0)
#pragma unroll
    for (int i = 0; i < 5; ++i) parts[blockIdx.x * index_t{5} + i] = x[i];
}
template <class T>
struct k_wise_result {
  device_k_wise<T> p;
  preference_stats* to;
  __device__ __forceinline__ void operator()(const double (&x)[5]) const {
    const double pairs = x[4] > 0 ? x[4] : 1;
    preference_stats s;
    s.loss = x[0] / p.divisor(), s.accuracy = x[1] / pairs, s.chosen_reward = x[2] / pairs;
    s.rejected_reward = x[3] / pairs, s.pairs = static_cast<index_t>(x[4]);
    *to = s;
  }
};

template <class T>
device_value<preference_stats> run_k_wise(std::string_view function, const cuda& exec, const k_wise_problem<T>& p,
                                          index_t n, double normaliser) {
  if (n == 0 || p.places.count == 0) return known_value(function, exec, preference_stats{});
  const unsigned blocks = warps_of_groups(function, p.places);
  const auto count = static_cast<index_t>(blocks), counting = ceil_div(p.places.count, index_t{sum_threads});
  const device_memory<double> prompts(exec, 1), parts(exec, 5 * count);
  const device_k_wise<T> d{device_groups(p.places, n), p.rewards, p.ranks, p.d_rewards, normaliser, prompts.data()};
  if (normaliser == 0) {
    launch(function, exec, count_prompts_kernel<T>, {static_cast<unsigned>(counting), sum_threads}, d, parts.data());
    launch(function, exec, finish_kernel<1, 0, keep_count>, {1, sum_threads}, keep_count{prompts.data()}, parts.data(),
           counting);
  }
  device_value<preference_stats> stats(exec);
  launch(function, exec, k_wise_kernel<T>, {blocks, sum_threads}, d, parts.data());
  launch(function, exec, finish_kernel<5, 0, k_wise_result<T>>, {1, sum_threads}, k_wise_result<T>{d, stats.data()},
         parts.data(), count);
  return stats;
}

// A warp to a sequence: the sum or mean of its tokens that count; or, of slopes, what each of them has of the
// sequence's.
template <class T, bool Slopes>
__global__ void __launch_bounds__(sum_threads)
    sequence_kernel(const sequence_places places, index_t tokens, stream<const T> log_probs,
                    stream<const std::uint8_t> mask, bool mean, stream<const T> d_out, stream<T> out) {
  const int lane = static_cast<int>(threadIdx.x) % warp_threads;
  const index_t b = (index_t{blockIdx.x} * sum_threads + threadIdx.x) / warp_threads;
  if (b >= places.sequences) return;
  const token_range range(places, b, tokens);
  const index_t row = range.row, first = range.first, last = range.last;
  double sum = 0, kept = 0;
  for (index_t t = first + lane; t < last; t += warp_threads) {
    if (mask && *mask.at(row, t) == 0) continue;
    kept += 1;
    if constexpr (!Slopes) sum += static_cast<double>(*log_probs.at(row, t));
  }
  kept = sum_warp(kept);
  if constexpr (Slopes) {
    const T of = *d_out.at(b, 0), d = mean && kept > 0 ? of / static_cast<T>(kept) : of;
    for (index_t t = first + lane; t < last; t += warp_threads)
      *out.at(row, t) = !mask || *mask.at(row, t) != 0 ? d : T{};
  } else {
    sum = sum_warp(sum);
    if (lane == 0) *out.at(b, 0) = static_cast<T>(mean && kept > 0 ? sum / kept : sum);
  }
}
template <bool Slopes, class T>
void launch_sequences(std::string_view function, const cuda& exec, const sequence_sum_problem<T>& p, index_t tokens,
                      const stream<const T>& d_out, const stream<T>& out) {
  const index_t count = p.places.sequences;
  launch(function, exec, sequence_kernel<T, Slopes>,
         {checked_blocks(function, ceil_div(count * warp_threads, sum_threads), count, "sequences"), sum_threads},
         p.places, tokens, p.log_probs, p.mask, p.mean, d_out, out);
}
template <class T>
void run_sequence_sums(const cuda& exec, const sequence_sum_problem<T>& p, index_t tokens, const batch_view<T>& out) {
  launch_sequences<false>("rl::sequence_log_probs", exec, p, tokens, stream<const T>{}, stream<T>(out));
}
template <class T>
void run_sequence_slopes(const cuda& exec, const sequence_sum_problem<T>& p, index_t tokens,
                         const batch_view<const T>& d_out, const sequence_view<T>& d_log_probs) {
  launch_sequences<true>("rl::sequence_log_probs_backward", exec, p, tokens, stream<const T>(d_out),
                         stream<T>(d_log_probs));
}

}  // namespace MLKIT_NAMESPACE::rl::detail
