// Policy and value losses on a GPU, in one pass over tokens. Where a mask or packing makes it necessary, tokens that
// count are counted before; terms with the ratio of a sequence have a pass over sequences before.
#pragma once

#include "../policy_loss.hpp"
#include "sums.cuh"

namespace MLKIT_NAMESPACE::rl::detail {

// Where sequences are in the order in which tokens are visited, as token_sequences has it. Starts that make no sense
// end within the tokens.
struct device_sequences {
  index_t sequences, length, tokens;
  const std::int32_t* starts;
  bool turned;

  device_sequences(const token_sequences& s, index_t n)
      : sequences(s.sequences), length(s.length), tokens(n), starts(s.starts), turned(s.turned) {}
  __device__ __forceinline__ index_t begin(index_t b) const {
    return starts ? min(max(index_t{starts[b]}, index_t{0}), tokens) : b * length;
  }
  __device__ __forceinline__ index_t end(index_t b) const {
    return starts ? max(begin(b + 1), begin(b)) : begin(b + 1);
  }
  // The sequence of token i.
  __device__ __forceinline__ index_t at(index_t i) const {
    if (!starts) return turned ? i % sequences : i / length;
    index_t low = 0, high = sequences;
    while (high - low > 1) {
      const index_t middle = (low + high) / 2;
      if (begin(middle) <= i)
        low = middle;
      else
        high = middle;
    }
    return low;
  }
};

// Tokens that count, and what each of them weighs.
template <class A>
struct token_plan {
  index_t tokens, sequences;
  index_t first_row, first_col;  // of the first that counts
  A weight;
  std::conditional_t<sizeof(A) == 8, index_t, int> weights_differ;  // there is one to each sequence
};

// counts[b] = tokens of sequence b that count, whose rows `mask` has. A block to a sequence, or, of turned ones, a
// thread.
template <class Sequences>
__global__ void __launch_bounds__(sum_threads)
    count_kernel(device_plane<const std::uint8_t> mask, const Sequences of, index_t* counts) {
  __shared__ unsigned long long total;
  if (of.turned) {
    const index_t b = index_t{blockIdx.x} * sum_threads + threadIdx.x;
    if (b >= of.sequences) return;
    index_t n = 0;
    for (index_t t = 0; t < of.length; ++t) n += *mask.at(b, t) != 0;
    counts[b] = n;
    return;
  }
  const index_t b = blockIdx.x, row = of.starts ? 0 : b, first = of.starts ? of.begin(b) : 0,
                n = of.end(b) - of.begin(b);
  if (!mask) {
    if (threadIdx.x == 0) counts[b] = n;
    return;
  }
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  unsigned long long here = 0;
  for (index_t t = index_t{threadIdx.x} * 4; t < n; t += sum_threads * 4) {
    const int count = n - t < 4 ? static_cast<int>(n - t) : 4;
    here +=
        static_cast<unsigned>(__popc(set_flags(load_flags<4, true>(mask.at(row, first + t), mask.col_stride, count))));
  }
  atomicAdd(&total, here);
  __syncthreads();
  if (threadIdx.x == 0) counts[b] = static_cast<index_t>(total);
}

// The weights of all sequences from their counts; one block.
template <class A, class Aggregation>
__global__ void __launch_bounds__(sum_threads)
    weigh_kernel(device_plane<const std::uint8_t> mask, const device_sequences of, const index_t* counts,
                 const Aggregation aggregate, A* weights, token_plan<A>* plan) {
  __shared__ unsigned long long tokens, sequences, first;
  __shared__ int differ;
  if (threadIdx.x == 0) tokens = sequences = 0, first = ~0ull, differ = 0;
  __syncthreads();
  unsigned long long here = 0, filled = 0, earliest = ~0ull;
  for (index_t b = threadIdx.x; b < of.sequences; b += sum_threads) {
    const index_t n = counts[b];
    if (n == 0) continue;
    here += static_cast<unsigned long long>(n), ++filled;
    if (earliest == ~0ull) earliest = static_cast<unsigned long long>(b);
  }
  atomicAdd(&tokens, here);
  atomicAdd(&sequences, filled);
  // The smallest, by the largest of what it lacks.
  __shared__ unsigned long long lacks;
  if (threadIdx.x == 0) lacks = 0;
  __syncthreads();
  if (earliest != ~0ull) atomicMax(&lacks, ~0ull - earliest);
  __syncthreads();
  if (threadIdx.x == 0) first = ~0ull - lacks;
  __syncthreads();
  const token_counts all{0, static_cast<double>(tokens), static_cast<double>(sequences)};
  const auto weight_of = [&](index_t n) {
    return static_cast<A>(aggregate.weight(token_counts{static_cast<double>(n), all.tokens, all.sequences}));
  };
  if (tokens == 0) {
    if (threadIdx.x == 0) *plan = {0, 0, 0, 0, A{}, 0};
    return;
  }
  const index_t b0 = static_cast<index_t>(first);
  const A weight = weight_of(counts[b0]);
  int different = 0;
  for (index_t b = threadIdx.x; b < of.sequences; b += sum_threads) {
    const A w = counts[b] > 0 ? weight_of(counts[b]) : weight;
    weights[b] = w;
    different |= w != weight;
  }
  if (different) atomicMax(&differ, 1);
  __syncthreads();
  if (threadIdx.x >= warp_threads) return;
  // The first token that counts of the first sequence that has any.
  const index_t row = of.starts ? 0 : b0, begin = of.starts ? of.begin(b0) : 0, n = of.end(b0) - of.begin(b0);
  index_t at = 0;
  for (index_t base = 0; mask && base < n; base += warp_threads) {
    const index_t t = base + threadIdx.x;
    const unsigned some = __ballot_sync(whole_warp, t < n && *mask.at(row, begin + t) != 0);
    at = base + __ffs(static_cast<int>(some)) - 1;
    if (some) break;
  }
  if (threadIdx.x == 0)
    *plan = {static_cast<index_t>(tokens), static_cast<index_t>(sequences), row, begin + at, weight, differ};
}

// Weights of tokens, known to the host where all of them count, else in device memory.
template <class A>
struct device_weights {
  token_plan<A> known;
  const token_plan<A>* found;
  const A* weights;

  __device__ __forceinline__ token_plan<A> plan() const { return found ? *found : known; }
};
template <class A>
struct weight_memory {
  device_memory<index_t> counts;
  device_memory<A> weights;
  device_memory<token_plan<A>> plan;
};

// `mask` has sequences as rows, or is null.
template <class A, class Aggregation>
device_weights<A> weigh(std::string_view function, const cuda& exec, const plane<const std::uint8_t>& mask,
                        const token_sequences& of, index_t tokens, const Aggregation& aggregate,
                        weight_memory<A>& memory) {
  if (!mask.data && !of.starts) {
    const double sequences = static_cast<double>(of.sequences);
    const token_counts n{static_cast<double>(of.length), static_cast<double>(tokens), sequences};
    return {{tokens, of.sequences, 0, 0, static_cast<A>(aggregate.weight(n)), 0}, nullptr, nullptr};
  }
  const index_t sequences = of.sequences;
  memory = {device_memory<index_t>(exec, sequences), device_memory<A>(exec, sequences),
            device_memory<token_plan<A>>(exec, 1)};
  const device_sequences d(of, tokens);
  const index_t blocks = of.turned ? ceil_div(sequences, sum_threads) : sequences;
  if (blocks > INT32_MAX) fail_shape(function, ": ", sequences, " sequences are more than a GPU takes in one call");
  launch(function, exec, count_kernel<device_sequences>, {static_cast<unsigned>(blocks), sum_threads}, mask, d,
         memory.counts.data());
  launch(function, exec, weigh_kernel<A, Aggregation>, {1, sum_threads}, mask, d, memory.counts.data(), aggregate,
         memory.weights.data(), memory.plan.data());
  return {{}, memory.plan.data(), memory.weights.data()};
}

// e^d and e^d - 1 - d of a bounded exponent, the latter without cancellation near 0.
template <class A>
__device__ __forceinline__ A exp_excess(A d, A ratio) {
  if (!((d < 0 ? -d : d) < A(0.25))) return (ratio - A(1)) - d;
  A series = A(1) / 3628800;
  constexpr A inverse[] = {A(1) / 362880, A(1) / 40320, A(1) / 5040, A(1) / 720,
                           A(1) / 120,    A(1) / 24,    A(1) / 6,    A(1) / 2};
#pragma unroll
  for (const A c : inverse) series = fused(series, d, c);
  return d * d * series;
}
template <class A>
__device__ __forceinline__ A held_exponent(A d) {
  return d < A(-most_log_ratio) ? A(-most_log_ratio) : d > A(most_log_ratio) ? A(most_log_ratio) : d;
}

// The ratio of each sequence and the mean of its slopes; a block to a sequence, whose rows the planes have.
template <class T, class Policy>
__global__ void __launch_bounds__(sum_threads)
    sequence_ratio_kernel(device_plane<const T> log_probs, device_plane<const T> old_log_probs,
                          device_plane<const T> advantages, device_plane<const std::uint8_t> mask,
                          const device_sequences of, const Policy policy, accumulator_t<T>* ratios,
                          accumulator_t<T>* slopes) {
  using A = accumulator_t<T>;
  __shared__ double mean;
  const index_t b = blockIdx.x, row = of.starts ? 0 : b, first = of.starts ? of.begin(b) : 0,
                n = of.end(b) - of.begin(b);
  double sums[2] = {0, 0};
  for (index_t t = threadIdx.x; t < n; t += sum_threads) {
    if (mask && *mask.at(row, first + t) == 0) continue;
    sums[0] +=
        static_cast<double>(widen_one(*log_probs.at(row, first + t)) - widen_one(*old_log_probs.at(row, first + t)));
    sums[1] += 1;
  }
  sum_block<2, 0>(sums);
  if (threadIdx.x == 0) mean = sums[1] > 0 ? sums[0] / sums[1] : 0;
  const double count = sums[1];
  __syncthreads();
  const A ratio = ::exp(held_exponent(static_cast<A>(mean)));
  double slope[1] = {0};
  if constexpr (!constant_ratio<Policy>) {
    for (index_t t = threadIdx.x; t < n; t += sum_threads) {
      if (mask && *mask.at(row, first + t) == 0) continue;
      const policy_token<A> token =
          policy(ratio, widen_one(*advantages.at(row, first + t)), widen_one(*log_probs.at(row, first + t)));
      slope[0] += static_cast<double>(token.slope);
    }
    sum_block<1, 0>(slope);
  }
  if (threadIdx.x == 0) {
    ratios[b] = ratio;
    slopes[b] = count > 0 ? static_cast<A>(slope[0] / count) : A{};
  }
}

// Sums of loss_tokens, and behind them the largest ratio and the largest of what is -ratio.
enum loss_sum : int {
  of_policy,
  of_value,
  of_entropy,
  of_k1,
  of_k3,
  of_clipped,
  of_value_clipped,
  of_error,
  of_square_error,
  of_target,
  of_square_target,
  of_sums
};

template <class T, class Policy>
struct loss_tokens {
  using A = accumulator_t<T>;
  static constexpr bool has_policy = !std::is_same_v<Policy, no_policy>;
  using number = A;
  static constexpr int sums = of_sums, maxima = 2, each = run_tokens<T>;

  device_plane<const T> log_probs, old_log_probs, advantages, entropies, values, old_values, returns;
  device_plane<const std::uint8_t> mask;
  device_plane<T> dlog_probs, dvalues, dentropies;
  device_plane<const T> values_by_sequence, returns_by_sequence;
  Policy policy;
  clipped_value value;
  A value_coefficient, entropy_coefficient;
  device_sequences of;
  device_weights<A> weigh;
  const A *sequence_ratios, *sequence_slopes;

  __device__ __forceinline__ void operator()(const token_run& run, double (&x)[sums + maxima]) const {
    const token_plan<A> plan = weigh.plan();
    const unsigned bits = run.kept<each>(mask);
    A weight[each];
#pragma unroll
    for (int i = 0; i < each; ++i)
      weight[i] = plan.weights_differ && i < run.count ? weigh.weights[of.at(run.first + i)] : plan.weight;
    if constexpr (has_policy) {
      add_policy(run, bits, weight, x);
      if (entropies) {
        T h[each], slope[each];
        run.load(entropies, h);
#pragma unroll
        for (int i = 0; i < each; ++i) {
          const bool counts = bits >> i & 1;
          x[of_entropy] += counts ? static_cast<double>(widen_one(h[i]) * weight[i]) : 0.0;
          slope[i] = narrow_one<T>(counts ? weight[i] * -entropy_coefficient : A{});
        }
        if (dentropies) run.store(dentropies, slope);
      }
    }
    if (values) add_value(run, bits, weight, plan, x);
  }

  __device__ __forceinline__ void add_policy(const token_run& run, unsigned bits, const A (&weight)[each],
                                             double (&x)[sums + maxima]) const {
    T now[each], old[each], advantage[each], slope[each];
    run.load(log_probs, now);
    run.load(advantages, advantage);
    if (old_log_probs) run.load(old_log_probs, old);
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const bool counts = bits >> i & 1;
      const A logp = widen_one(now[i]);
      A ratio = 1;
      if (old_log_probs) {
        const A d = held_exponent(logp - widen_one(old[i]));
        ratio = ::exp(d);
        x[of_k1] += counts ? static_cast<double>(-d) : 0.0;
        x[of_k3] += counts ? static_cast<double>(exp_excess(d, ratio)) : 0.0;
      }
      A of_mean = 0;
      if constexpr (of_sequence<Policy>) {
        const index_t b = i < run.count ? of.at(run.first + i) : 0;
        ratio = sequence_ratios[b], of_mean = sequence_slopes[b];
      }
      const policy_token<A> token = policy(ratio, widen_one(advantage[i]), logp);
      A g = token.slope;
      if constexpr (of_sequence<Policy> && !constant_ratio<Policy>) g = of_mean;
      slope[i] = narrow_one<T>(counts ? weight[i] * g : A{});
      if (!counts) continue;
      x[of_policy] += static_cast<double>(weight[i] * token.loss);
      x[of_clipped] += token.clipped ? 1.0 : 0.0;
      x[sums] = ::fmax(x[sums], static_cast<double>(ratio));
      x[sums + 1] = ::fmax(x[sums + 1], -static_cast<double>(ratio));
    }
    if (dlog_probs) run.store(dlog_probs, slope);
  }

  __device__ __forceinline__ void add_value(const token_run& run, unsigned bits, const A (&weight)[each],
                                            const token_plan<A>& plan, double (&x)[sums + maxima]) const {
    T now[each], old[each], target[each], slope[each];
    run.load(values, now);
    run.load(returns, target);
    if (old_values) run.load(old_values, old);
    A first_return = 0, first_error = 0;
    if (plan.tokens > 0) {
      first_return = widen_one(*returns_by_sequence.at(plan.first_row, plan.first_col));
      first_error = first_return - widen_one(*values_by_sequence.at(plan.first_row, plan.first_col));
    }
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const bool counts = bits >> i & 1;
      const A v = widen_one(now[i]), r = widen_one(target[i]);
      const policy_token<A> token = value(v, old_values ? widen_one(old[i]) : v, r);
      slope[i] = narrow_one<T>(counts ? weight[i] * token.slope * value_coefficient : A{});
      if (!counts) continue;
      x[of_value] += static_cast<double>(weight[i] * token.loss);
      x[of_value_clipped] += token.clipped ? 1.0 : 0.0;
      const double e = static_cast<double>((r - v) - first_error), s = static_cast<double>(r - first_return);
      x[of_error] += e, x[of_square_error] += e * e;
      x[of_target] += s, x[of_square_target] += s * s;
    }
    if (dvalues) run.store(dvalues, slope);
  }
};

// What a pass's sums say.
template <class A, class Stats>
struct loss_result {
  device_weights<A> weigh;
  double value, entropy;  // coefficients
  bool has_values, has_ratio;
  Stats* to;

  __device__ __forceinline__ void operator()(const double (&x)[of_sums + 2]) const {
    const token_plan<A> plan = weigh.plan();
    const double n = static_cast<double>(plan.tokens), unknown = not_a_number<double>();
    Stats s{};
    s.explained_variance = unknown;
    s.tokens = plan.tokens, s.sequences = plan.sequences;
    if (plan.tokens > 0) {
      if (has_values) {
        const double residual = x[of_square_error] - x[of_error] * x[of_error] / n,
                     spread = x[of_square_target] - x[of_target] * x[of_target] / n;
        if (spread > 0) s.explained_variance = 1 - residual / spread;
      }
      if constexpr (std::is_same_v<Stats, value_stats>) {
        s.loss = x[of_value], s.clip_fraction = x[of_value_clipped] / n;
      } else {
        s.loss = x[of_policy] + (has_values ? value * x[of_value] : 0) - entropy * x[of_entropy];
        s.policy_loss = x[of_policy], s.value_loss = x[of_value], s.entropy = x[of_entropy];
        s.kl_k1 = x[of_k1] / n, s.kl_k3 = x[of_k3] / n;
        s.clip_fraction = x[of_clipped] / n, s.value_clip_fraction = x[of_value_clipped] / n;
        s.ratio_max = x[of_sums], s.ratio_min = -x[of_sums + 1];
      }
    }
    *to = s;
  }
};

template <class T, class Policy, class Aggregation>
device_value<policy_stats> run_policy_batch(by_executor, const cuda& exec, const policy_batch<T>& batch,
                                            const Policy& policy, const Aggregation& aggregate, const loss_options& o,
                                            const policy_gradients<T>& grads) {
  constexpr std::string_view function = "rl::policy_loss";
  using A = accumulator_t<T>;
  if (batch.log_probs.empty()) {
    policy_stats none;
    none.explained_variance = std::numeric_limits<double>::quiet_NaN();
    return known_value(function, exec, none);
  }
  const plane_shape s =
      shape_of_planes(batch.log_probs, batch.old_log_probs, batch.advantages, batch.entropies, batch.values,
                      batch.old_values, batch.returns, batch.mask, grads.log_probs, grads.values, grads.entropies);
  const token_sequences of = sequences_of(batch.log_probs.extents, s, batch.cu_seqlens);
  const index_t tokens = s.rows * s.cols;
  const plane<const std::uint8_t> mask = plane_by_sequence(batch.mask);
  weight_memory<A> memory;
  const device_weights<A> weights = weigh<A>(function, exec, mask, of, tokens, aggregate, memory);
  device_memory<A> of_sequences;
  const A *ratios = nullptr, *slopes = nullptr;
  if constexpr (of_sequence<Policy>) {
    of_sequences = device_memory<A>(exec, 2 * of.sequences);
    ratios = of_sequences.data(), slopes = ratios + of.sequences;
    launch(function, exec, sequence_ratio_kernel<T, Policy>, {static_cast<unsigned>(of.sequences), sum_threads},
           plane_by_sequence(batch.log_probs), plane_by_sequence(batch.old_log_probs),
           plane_by_sequence(batch.advantages), mask, device_sequences(of, tokens), policy, of_sequences.data(),
           of_sequences.data() + of.sequences);
  }
  clipped_value value;
  if (o.value_clip > 0) value.clip = o.value_clip;
  const loss_tokens<T, Policy> f{plane_of(batch.log_probs, s),
                                 plane_or_none(batch.old_log_probs, s),
                                 plane_of(batch.advantages, s),
                                 plane_or_none(batch.entropies, s),
                                 plane_or_none(batch.values, s),
                                 plane_or_none(batch.old_values, s),
                                 plane_or_none(batch.returns, s),
                                 plane_or_none(batch.mask, s),
                                 plane_or_none(grads.log_probs, s),
                                 plane_or_none(grads.values, s),
                                 plane_or_none(grads.entropies, s),
                                 plane_by_sequence(batch.values),
                                 plane_by_sequence(batch.returns),
                                 policy,
                                 value,
                                 static_cast<A>(o.value),
                                 static_cast<A>(o.entropy),
                                 device_sequences(of, tokens),
                                 weights,
                                 ratios,
                                 slopes};
  device_value<policy_stats> stats(exec);
  sum_tokens(function, exec, f, s.rows, s.cols,
             loss_result<A, policy_stats>{weights, o.value, o.entropy, is_given(batch.values),
                                          is_given(batch.old_log_probs), stats.data()});
  return stats;
}

template <class T, class Aggregation>
device_value<value_stats> run_value_batch(by_executor, const cuda& exec, const value_batch<T>& batch,
                                          const value_options& o, const sequence_view<T>& dvalues,
                                          const Aggregation& aggregate) {
  constexpr std::string_view function = "rl::value_loss";
  using A = accumulator_t<T>;
  if (batch.values.empty()) {
    value_stats none;
    none.explained_variance = std::numeric_limits<double>::quiet_NaN();
    return known_value(function, exec, none);
  }
  const plane_shape s = shape_of_planes(batch.values, batch.old_values, batch.returns, batch.mask, dvalues);
  const token_sequences of = sequences_of(batch.values.extents, s, batch.cu_seqlens);
  const index_t tokens = s.rows * s.cols;
  weight_memory<A> memory;
  const device_weights<A> weights =
      weigh<A>(function, exec, plane_by_sequence(batch.mask), of, tokens, aggregate, memory);
  clipped_value value;
  if (o.clip > 0) value.clip = o.clip;
  const plane<const T> none;
  const loss_tokens<T, no_policy> f{none,
                                    none,
                                    none,
                                    none,
                                    plane_of(batch.values, s),
                                    plane_or_none(batch.old_values, s),
                                    plane_of(batch.returns, s),
                                    plane_or_none(batch.mask, s),
                                    plane<T>{},
                                    plane_or_none(dvalues, s),
                                    plane<T>{},
                                    plane_by_sequence(batch.values),
                                    plane_by_sequence(batch.returns),
                                    no_policy{},
                                    value,
                                    A(1),
                                    A(0),
                                    device_sequences(of, tokens),
                                    weights,
                                    nullptr,
                                    nullptr};
  device_value<value_stats> stats(exec);
  sum_tokens(function, exec, f, s.rows, s.cols, loss_result<A, value_stats>{weights, 1, 0, true, false, stats.data()});
  return stats;
}

}  // namespace MLKIT_NAMESPACE::rl::detail
