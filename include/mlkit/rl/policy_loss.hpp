// Policy and value losses with their gradients and statistics, in one pass over log-probabilities.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "../core/tensor.hpp"
#include "../simd/math.hpp"
#include "lanes.hpp"
#include "policy_terms.hpp"
#include "steps.hpp"

namespace MLKIT_NAMESPACE::rl {

/// What a policy loss is computed from. All are of one shape: [batch, time], or the [tokens] of packed sequences. What
/// was stored time-major is given by its transposed view, which runs as fast. A mask may stand beside cu_seqlens.
template <storage T>
struct policy_batch {
  using value_type = T;

  sequence_view<const T> log_probs = {};      ///< of the actions, under the policy that learns
  sequence_view<const T> old_log_probs = {};  ///< under the policy that acted
  sequence_view<const T> advantages = {};
  sequence_view<const T> entropies = {};   ///< of the policy that learns; needed for a bonus
  sequence_view<const T> values = {};      ///< if the critic is trained too
  sequence_view<const T> old_values = {};  ///< needed for value_clip
  sequence_view<const T> returns = {};     ///< what values should be
  flag_view mask = {};                     ///< tokens that count; without it all do
  sequence_starts cu_seqlens = {};         ///< [sequences + 1] starts of packed sequences
};

/// Where gradients of the loss go; what is left out is not written. All of policy_batch's shape. A token that does not
/// count gets 0.
template <storage T>
struct policy_gradients {
  sequence_view<T> log_probs = {};
  sequence_view<T> values = {};
  sequence_view<T> entropies = {};
};

/// How the parts of a loss are weighed: policy + value * value loss - entropy * entropy.
struct loss_options {
  double value_clip = 0;  ///< values are held within this of the old ones; 0: they are not
  double value = 0.5;     ///< coefficient of the value loss, where there are values
  double entropy = 0;     ///< coefficient of the entropy bonus
};

/// What ppo_loss may be told.
struct ppo_options {
  double clip = 0.2;      ///< ratios are held in [1 - clip, 1 + clip]; in [0, 1]
  double clip_high = -1;  ///< ... or in [1 - clip, 1 + clip_high]; negative: as clip
  double dual_clip = 0;   ///< above 1: the bound of dual_clip; 0: none
  double value_clip = 0;  ///< values are held within this of the old ones; 0: they are not
  double value = 0.5;     ///< coefficient of the value loss, where there are values
  double entropy = 0;     ///< coefficient of the entropy bonus
  double tokens = 0;      ///< what sums over tokens are divided by; 0: the tokens that count
};

/// What became of a batch. Losses and entropy are aggregated as the loss is; the rest are of the tokens that count,
/// each alike. Of no tokens all are 0, and ratios 1.
struct policy_stats {
  double loss = 0;  ///< policy_loss + value coefficient * value_loss - entropy coefficient * entropy
  double policy_loss = 0, value_loss = 0, entropy = 0;
  double kl_k1 = 0;          ///< mean of logp_old - logp: an estimate of KL(old || new), which may be negative
  double kl_k3 = 0;          ///< mean of r - 1 - log r: one that is not, and varies less
  double clip_fraction = 0;  ///< of tokens whose policy loss a clip holds, which is where it takes the gradient away
  double value_clip_fraction = 0;  ///< of tokens whose value loss is the clipped one
  double explained_variance = 0;   ///< 1 - Var(R - v) / Var(R); NaN where Var(R) = 0 or there are no values
  double ratio_min = 1, ratio_max = 1;
  index_t tokens = 0, sequences = 0;  ///< that count, and that have such tokens
};

/// What a value loss is computed from; shapes as in policy_batch.
template <storage T>
struct value_batch {
  using value_type = T;

  sequence_view<const T> values = {};
  sequence_view<const T> old_values = {};  ///< needed for clip
  sequence_view<const T> returns = {};
  flag_view mask = {};
  sequence_starts cu_seqlens = {};
};

/// What value_loss may be told.
struct value_options {
  double clip = 0;  ///< values are held within this of the old ones; 0: they are not
};

/// What became of values; as in policy_stats.
struct value_stats {
  double loss = 0, clip_fraction = 0, explained_variance = 0;
  index_t tokens = 0, sequences = 0;
};

namespace detail {

template <class B>
inline constexpr bool is_policy_batch = false;
template <class T>
inline constexpr bool is_policy_batch<policy_batch<T>> = true;
template <class B>
inline constexpr bool is_value_batch = false;
template <class T>
inline constexpr bool is_value_batch<value_batch<T>> = true;

// The policy of a value loss alone.
struct no_policy {};

// Partial sums are those of so many tokens, whoever computes them.
inline constexpr index_t tokens_of_block = 512;

// Where sequences are in the order in which tokens are visited. Turned: token i is of sequence i mod sequences.
struct token_sequences {
  index_t sequences = 0, length = 0;
  const std::int32_t* starts = nullptr;
  bool turned = false;

  index_t begin(index_t b) const noexcept { return starts ? starts[b] : b * length; }
  index_t end(index_t b) const noexcept { return begin(b + 1); }
  index_t at(index_t i) const noexcept {
    return starts ? std::upper_bound(starts, starts + sequences + 1, i) - starts - 1 : i / length;
  }
};

// Sums over the tokens of a block; those of losses are weighted.
struct loss_sums {
  double policy = 0, value = 0, entropy = 0, k1 = 0, k3 = 0, clipped = 0, value_clipped = 0;
  double error = 0, square_error = 0, target = 0, square_target = 0;  // of R - v and R, less those of the first token
  double ratio_min = std::numeric_limits<double>::infinity(), ratio_max = -ratio_min;
};

// What one thread works in.
template <class T>
struct policy_scratch {
  using A = accumulator_t<T>;
  alignas(64) A weight[tokens_of_block];
  alignas(64) A ratio[tokens_of_block];
  alignas(64) A slope[tokens_of_block];
  alignas(64) T in[3][tokens_of_block];
  alignas(64) T out[tokens_of_block];
  alignas(64) std::uint8_t mask[tokens_of_block];
};

template <class T>
struct loss_operands {
  using value_type = T;
  using A = accumulator_t<T>;

  plane_shape shape = {};
  plane<const T> log_probs = {}, old_log_probs = {}, advantages = {}, entropies = {}, values = {}, old_values = {},
                 returns = {};
  plane<const std::uint8_t> mask = {};
  plane<T> dlog_probs = {}, dvalues = {}, dentropies = {};
  clipped_value value = {};
  A value_coefficient = 1, entropy_coefficient = 0;
  A first_error = 0, first_return = 0;

  token_sequences sequences = {};
  bool weights_differ = false;
  A weight = 0;                // of every token
  const A* weights = nullptr;  // of the tokens of each sequence
  A* sequence_ratios = nullptr;
  A* sequence_slopes = nullptr;

  // The same operands, sequence after sequence.
  struct {
    plane_shape shape = {};
    plane<const T> log_probs = {}, old_log_probs = {}, advantages = {};
    plane<const std::uint8_t> mask = {};
  } by_sequence = {};
};

template <class T, class Policy>
struct policy_loss_problem : loss_operands<T> {
  using policy_type = Policy;
  Policy policy = {};
};

template <class Problem>
struct policy_loss_kernels {
  void (*run)(const Problem&, index_t begin, index_t n, loss_sums&,
              policy_scratch<typename Problem::value_type>&) noexcept;
  void (*run_sequence)(const Problem&, index_t b, policy_scratch<typename Problem::value_type>&) noexcept;
};

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::rl

#define MLKIT_FOREACH "../rl/cpu/policy_loss-inl.hpp"
#include "../simd/foreach_isa.hpp"

namespace MLKIT_NAMESPACE::rl {
namespace detail {

// The operands of one call, and the shape of the first, which all have.
struct batch_check {
  arguments& call;
  std::string_view function, of;
  extents_t<2> shape;
  bool on_host = true;  // the host can look at cu_seqlens

  template <class T>
  void view(std::string_view name, const tensor_view<T, 2>& v) const {
    check_same_shape<2>(function, name, v.extents, of, shape);
    check_view(function, name, v);
  }
  template <class T>
  void input(std::string_view name, const tensor_view<T, 2>& v) const {
    view(name, v);
    call.reads(name, v);
  }
  template <class T>
  void optional(std::string_view name, const tensor_view<T, 2>& v) const {
    if (is_given(v)) input(name, v);
  }
  template <class T>
  void output(std::string_view name, const tensor_view<T, 2>& v) const {
    if (!is_given(v)) return;
    view(name, v);
    call.writes(name, v);
  }
  void sequences(const flag_view& mask, const sequence_starts& cu_seqlens) const {
    optional("mask", mask);
    if (!is_given(cu_seqlens)) return;
    if (shape[0] != 1)
      fail_shape(function, ": ", of, " has shape ", shape_text<2>(shape),
                 ", but cu_seqlens packs sequences of [tokens] alone");
    if (on_host)
      check_starts(function, cu_seqlens, shape[1]);
    else
      check_unread_starts(function, cu_seqlens);
    if (cu_seqlens.extent(0) > 1 && cu_seqlens.stride(0) != 1)
      fail_shape(function, ": cu_seqlens has a stride of ", cu_seqlens.stride(0), ", not 1");
    call.reads("cu_seqlens", cu_seqlens);
  }
};

inline token_sequences sequences_of(const extents_t<2>& shape, const plane_shape& visited,
                                    const sequence_starts& cu_seqlens) noexcept {
  if (is_given(cu_seqlens)) return {cu_seqlens.extent(0) - 1, 0, cu_seqlens.data, false};
  return {shape[0], shape[1], nullptr, visited.turned};
}

// A plane whose rows are sequences.
template <class T>
plane<T> plane_by_sequence(const tensor_view<T, 2>& v) noexcept {
  return {v.data, v.strides[0], v.strides[1]};
}

// Tokens that count: how many, of each sequence, and where the first is.
struct counted_tokens {
  index_t tokens = 0, sequences = 0;
  index_t first_row = 0, first_col = 0;
};

// counts[b] = tokens of sequence b that count. `mask` has sequences as rows, or is null.
inline counted_tokens count_tokens(const plane<const std::uint8_t>& mask, const token_sequences& of, index_t* counts) {
  counted_tokens n;
  const auto row_of = [&](index_t b) { return of.starts ? index_t{0} : b; };
  const auto col_of = [&](index_t b) { return of.starts ? index_t{of.starts[b]} : index_t{0}; };
  const auto length = [&](index_t b) { return of.end(b) - of.begin(b); };
  if (!mask.data) {
    for (index_t b = 0; b < of.sequences; ++b) counts[b] = length(b);
  } else if (of.turned) {
    std::fill_n(counts, of.sequences, index_t{0});
    for (index_t t = 0; t < of.length; ++t)
      for (index_t b = 0; b < of.sequences; ++b) counts[b] += *mask.at(b, t) != 0;
  } else if (mask.col_stride == 1) {
    const auto count = MLKIT_SELECT_WITHOUT_BF16(count_kept);
    for (index_t b = 0; b < of.sequences; ++b) counts[b] = count(mask.at(row_of(b), col_of(b)), length(b));
  } else {
    for (index_t b = 0; b < of.sequences; ++b) {
      counts[b] = 0;
      for (index_t t = 0; t < length(b); ++t) counts[b] += *mask.at(row_of(b), col_of(b) + t) != 0;
    }
  }
  for (index_t b = 0; b < of.sequences; ++b) {
    if (counts[b] == 0) continue;
    if (n.sequences == 0) {
      n.first_row = row_of(b);
      n.first_col = col_of(b);
      while (mask.data && *mask.at(n.first_row, n.first_col) == 0) ++n.first_col;
    }
    ++n.sequences;
    n.tokens += counts[b];
  }
  return n;
}

// What sums over all tokens say of returns and values.
inline double explained_variance(const loss_sums& s, double n) noexcept {
  const double residual = s.square_error - s.error * s.error / n, spread = s.square_target - s.target * s.target / n;
  return spread > 0 ? 1 - residual / spread : std::numeric_limits<double>::quiet_NaN();
}

// An aggregation, without its type.
class weigher {
 public:
  template <class Aggregation>
  explicit weigher(const Aggregation& g) noexcept
      : aggregate_(&g), weight_([](const void* a, const token_counts& n) {
          return static_cast<double>(static_cast<const Aggregation*>(a)->weight(n));
        }) {}
  double operator()(const token_counts& n) const { return weight_(aggregate_, n); }

 private:
  const void* aggregate_;
  double (*weight_)(const void*, const token_counts&);
};

// weights[b] = the weight of the tokens of sequence b. Where none counts it is that of another sequence, so that
// weights differ where they must alone.
template <class A>
counted_tokens weigh_tokens(const plane<const std::uint8_t>& mask, const token_sequences& of, const weigher& weight,
                            A* weights) {
  const workspace<index_t> counts(of.sequences);
  const counted_tokens n = count_tokens(mask, of, counts.data());
  A any = 0;
  for (index_t pass = 0; pass < 2; ++pass)
    for (index_t b = 0; b < of.sequences; ++b) {
      const auto here = static_cast<double>(counts.data()[b]);
      if (pass == 1 && here == 0) weights[b] = any;
      if (pass == 0 && here > 0)
        any = weights[b] =
            static_cast<A>(weight({here, static_cast<double>(n.tokens), static_cast<double>(n.sequences)}));
    }
  return n;
}

// Weighs tokens, runs the kernel over blocks of them, and adds up.
template <class T, class Policy>
loss_sums run_policy_loss(const cpu& exec, policy_loss_problem<T, Policy>& p, const weigher& weight,
                          const plane<const std::uint8_t>& mask, const plane<const T>& values,
                          const plane<const T>& returns, counted_tokens& counted) {
  using A = accumulator_t<T>;
  using Problem = policy_loss_problem<T, Policy>;
  const index_t sequences = p.sequences.sequences, tokens = p.shape.rows * p.shape.cols;
  const workspace<A> per_sequence(3 * sequences);
  A* const weights = per_sequence.data();
  counted = weigh_tokens(mask, p.sequences, weight, weights);
  loss_sums total;
  if (counted.tokens > 0) {
    p.weight = weights[0];
    p.weights_differ = std::any_of(weights, weights + sequences, [&](A w) { return w != p.weight; });
    p.weights = weights;
    if (values.data) {
      const auto at = [&](const plane<const T>& v) {
        return static_cast<A>(*v.at(counted.first_row, counted.first_col));
      };
      p.first_return = at(returns);
      p.first_error = p.first_return - at(values);
    }
  }
  const index_t blocks = ceil_div(tokens, tokens_of_block);
  const workspace<loss_sums> partial(blocks);
  const auto kernels = MLKIT_SELECT_WITHOUT_BF16(policy_loss_entry<Problem>)();
  const cpu limited = threads_for(exec, tokens);
  if constexpr (rl::detail::of_sequence<Policy>) {
    p.sequence_ratios = per_sequence.data() + sequences;
    p.sequence_slopes = per_sequence.data() + 2 * sequences;
    parallel_ranges(limited, sequences, [&](index_t begin, index_t end) {
      const workspace<policy_scratch<T>> scratch(1);
      for (index_t b = begin; b < end; ++b) kernels.run_sequence(p, b, *scratch.data());
    });
  }
  parallel_ranges(limited, blocks, [&](index_t begin, index_t end) {
    const workspace<policy_scratch<T>> scratch(1);
    for (index_t i = begin; i < end; ++i) {
      loss_sums& sums = partial.data()[i];
      sums = {};
      kernels.run(p, i * tokens_of_block, std::min(tokens_of_block, tokens - i * tokens_of_block), sums,
                  *scratch.data());
    }
  });
  for (index_t i = 0; i < blocks; ++i) {
    const loss_sums& s = partial.data()[i];
    total.policy += s.policy;
    total.value += s.value;
    total.entropy += s.entropy;
    total.k1 += s.k1;
    total.k3 += s.k3;
    total.clipped += s.clipped;
    total.value_clipped += s.value_clipped;
    total.error += s.error;
    total.square_error += s.square_error;
    total.target += s.target;
    total.square_target += s.square_target;
    total.ratio_min = std::min(total.ratio_min, s.ratio_min);
    total.ratio_max = std::max(total.ratio_max, s.ratio_max);
  }
  return total;
}

template <class T>
plane<T> plane_or_none(const tensor_view<T, 2>& v, const plane_shape& s) noexcept {
  return v.data ? plane_of(v, s) : plane<T>{};
}

inline void check_aggregation(std::string_view function, const auto& aggregate) {
  if constexpr (requires { aggregate.check(function); }) aggregate.check(function);
}

// Everything of a batch but log_probs, whose shape is given. with_ratio: old_log_probs are needed.
template <class T>
void check_policy_batch(arguments& call, std::string_view function, std::string_view of, const extents_t<2>& shape,
                        const policy_batch<T>& batch, bool with_ratio, bool with_entropies, const loss_options& o,
                        const policy_gradients<T>& grads, bool on_host = true) {
  check_non_negative(function, "value_clip", o.value_clip);
  check_non_negative(function, "value", o.value);
  if (!std::isfinite(o.entropy)) fail_value(function, ": entropy = ", o.entropy, " is not finite");
  const batch_check check{call, function, of, shape, on_host};
  if (shape[0] * shape[1] != 0) {
    const auto needs = [&](std::string_view what, const auto&... names) {
      fail_value(function, ": ", what, " is not given", names...);
    };
    if (!is_given(batch.advantages)) needs("advantages");
    if (with_ratio && !is_given(batch.old_log_probs)) needs("old_log_probs");
    if (o.entropy != 0 && !with_entropies) needs("entropies", ", but entropy = ", o.entropy);
    if (is_given(batch.values) && !is_given(batch.returns)) needs("returns", ", but values is");
    if (is_given(batch.values) && o.value_clip != 0 && !is_given(batch.old_values))
      needs("old_values", ", but value_clip = ", o.value_clip);
    if (is_given(grads.values) && !is_given(batch.values)) needs("values", ", but its gradient is asked for");
    if (is_given(grads.entropies) && !is_given(batch.entropies)) needs("entropies", ", but its gradient is asked for");
  }
  check.optional("advantages", batch.advantages);
  check.optional("old_log_probs", batch.old_log_probs);
  check.optional("entropies", batch.entropies);
  check.optional("values", batch.values);
  check.optional("old_values", batch.old_values);
  check.optional("returns", batch.returns);
  check.sequences(batch.mask, batch.cu_seqlens);
  check.output("the gradient of log_probs", grads.log_probs);
  check.output("the gradient of values", grads.values);
  check.output("the gradient of entropies", grads.entropies);
}

// What a batch that was checked gives.
template <class T, class Policy, class Aggregation>
policy_stats run_policy_batch(by_executor, const cpu& exec, const policy_batch<T>& batch, const Policy& policy,
                              const Aggregation& aggregate, const loss_options& o, const policy_gradients<T>& grads) {
  return run_policy_batch(exec, batch, policy, weigher(aggregate), o, grads);
}
template <class T, class Policy>
policy_stats run_policy_batch(const cpu& exec, const policy_batch<T>& batch, const Policy& policy,
                              const weigher& weight, const loss_options& o, const policy_gradients<T>& grads) {
  policy_stats stats;
  stats.explained_variance = std::numeric_limits<double>::quiet_NaN();
  if (batch.log_probs.empty()) return stats;
  using A = accumulator_t<T>;
  const plane_shape shape =
      shape_of_planes(batch.log_probs, batch.old_log_probs, batch.advantages, batch.entropies, batch.values,
                      batch.old_values, batch.returns, batch.mask, grads.log_probs, grads.values, grads.entropies);
  policy_loss_problem<T, Policy> p;
  p.shape = shape;
  p.log_probs = plane_of(batch.log_probs, shape);
  p.old_log_probs = plane_or_none(batch.old_log_probs, shape);
  p.advantages = plane_of(batch.advantages, shape);
  p.entropies = plane_or_none(batch.entropies, shape);
  p.values = plane_or_none(batch.values, shape);
  p.old_values = plane_or_none(batch.old_values, shape);
  p.returns = plane_or_none(batch.returns, shape);
  p.mask = plane_or_none(batch.mask, shape);
  p.dlog_probs = plane_or_none(grads.log_probs, shape);
  p.dvalues = plane_or_none(grads.values, shape);
  p.dentropies = plane_or_none(grads.entropies, shape);
  p.policy = policy;
  if (o.value_clip > 0) p.value.clip = o.value_clip;
  p.value_coefficient = static_cast<A>(o.value);
  p.entropy_coefficient = static_cast<A>(o.entropy);
  p.sequences = sequences_of(batch.log_probs.extents, shape, batch.cu_seqlens);
  p.by_sequence.shape = {batch.log_probs.extents[0], batch.log_probs.extents[1]};
  p.by_sequence.log_probs = plane_by_sequence(batch.log_probs);
  p.by_sequence.old_log_probs = plane_by_sequence(batch.old_log_probs);
  p.by_sequence.advantages = plane_by_sequence(batch.advantages);
  p.by_sequence.mask = plane_by_sequence(batch.mask);
  counted_tokens counted;
  const loss_sums s = run_policy_loss<T>(exec, p, weight, p.by_sequence.mask, plane_by_sequence(batch.values),
                                         plane_by_sequence(batch.returns), counted);
  if (counted.tokens == 0) return stats;
  const double n = static_cast<double>(counted.tokens);
  stats = {.loss = s.policy + (is_given(batch.values) ? o.value * s.value : 0) - o.entropy * s.entropy,
           .policy_loss = s.policy,
           .value_loss = s.value,
           .entropy = s.entropy,
           .kl_k1 = s.k1 / n,
           .kl_k3 = s.k3 / n,
           .clip_fraction = s.clipped / n,
           .value_clip_fraction = s.value_clipped / n,
           .explained_variance = explained_variance(s, n),
           .ratio_min = s.ratio_min,
           .ratio_max = s.ratio_max,
           .tokens = counted.tokens,
           .sequences = counted.sequences};
  return stats;
}

template <class T, class Aggregation>
value_stats run_value_batch(by_executor, const cpu& exec, const value_batch<T>& batch, const value_options& o,
                            const sequence_view<T>& dvalues, const Aggregation& aggregate) {
  value_stats stats{.explained_variance = std::numeric_limits<double>::quiet_NaN()};
  if (batch.values.empty()) return stats;
  const plane_shape shape = shape_of_planes(batch.values, batch.old_values, batch.returns, batch.mask, dvalues);
  policy_loss_problem<T, no_policy> p;
  p.shape = shape;
  p.values = plane_of(batch.values, shape);
  p.old_values = plane_or_none(batch.old_values, shape);
  p.returns = plane_of(batch.returns, shape);
  p.mask = plane_or_none(batch.mask, shape);
  p.dvalues = plane_or_none(dvalues, shape);
  if (o.clip > 0) p.value.clip = o.clip;
  p.sequences = sequences_of(batch.values.extents, shape, batch.cu_seqlens);
  counted_tokens counted;
  const loss_sums s = run_policy_loss<T>(exec, p, weigher(aggregate), plane_by_sequence(batch.mask),
                                         plane_by_sequence(batch.values), plane_by_sequence(batch.returns), counted);
  if (counted.tokens == 0) return stats;
  const double n = static_cast<double>(counted.tokens);
  return {.loss = s.value,
          .clip_fraction = s.value_clipped / n,
          .explained_variance = explained_variance(s, n),
          .tokens = counted.tokens,
          .sequences = counted.sequences};
}

template <class T, executor Executor, class Policy, class Aggregation>
result_t<Executor, policy_stats> policy_loss(std::string_view function, const Executor& exec,
                                             const policy_batch<T>& batch, const Policy& policy,
                                             const Aggregation& aggregate, const loss_options& o,
                                             const policy_gradients<T>& grads) {
  arguments call(function, exec);
  check_view(function, "log_probs", batch.log_probs);
  call.reads("log_probs", batch.log_probs);
  check_policy_batch(call, function, "log_probs", batch.log_probs.extents, batch, uses_ratio<Policy>,
                     is_given(batch.entropies), o, grads, looks_at_data<Executor>);
  return run_policy_batch(by_executor{}, exec, batch, policy, aggregate, o, grads);
}

// What ppo_options mean.
struct ppo_parts {
  dual_clip<ppo_clip> policy;
  token_mean aggregate;
  loss_options parts;
};
inline ppo_parts parts_of_ppo(std::string_view function, const ppo_options& o) {
  check_unit_interval(function, "clip", o.clip);
  if (!std::isfinite(o.clip_high)) fail_value(function, ": clip_high = ", o.clip_high, " is not finite");
  if (o.dual_clip != 0 && !(o.dual_clip > 1))
    fail_value(function, ": dual_clip = ", o.dual_clip, " is neither 0 nor above 1");
  check_non_negative(function, "tokens", o.tokens);
  return {{.bound = o.dual_clip != 0 ? o.dual_clip : std::numeric_limits<double>::infinity(),
           .term = {.low = o.clip, .high = o.clip_high < 0 ? o.clip : o.clip_high}},
          {o.tokens},
          {.value_clip = o.value_clip, .value = o.value, .entropy = o.entropy}};
}

}  // namespace detail

/// The loss of a policy, of its values and of its entropy, its gradients and what is to be known of it, in one pass:
///   loss = sum over tokens of w (term(r, A, logp) + value clipped_value(v, v_old, R) - entropy H),
/// with r = exp(logp - logp_old), the exponent held in [-20, 20], `term` a policy_term (ppo_clip, dual_clip, gspo,
/// cispo, policy_gradient, or one of the user's own) and w the weight that the aggregation gives (token_mean,
/// sequence_mean_of_sums, sequence_mean_of_means, sum_over). Gradients are those of `loss`; where the exponent is held,
/// that of r is still taken for r. Tokens that the mask leaves out are never read into a result, whatever they hold; if
/// all are, losses and gradients are 0.
///
/// Operands are [batch, time], or [tokens] with cu_seqlens; tokens without cu_seqlens are one sequence. f32, f64, bf16
/// and f16; computed in f32 (f64 for f64), sums of 512 tokens too, those of all in f64. Throws shape_error where shapes
/// differ or a gradient overlaps what is read; value_error for options out of range, operands that the options need and
/// starts that are none, before anything is written. The same bits for any number of threads. Reads each operand and
/// writes each gradient once; terms with the ratio of a sequence read log-probabilities and advantages twice.
///
/// With a mlkit::cuda statistics are a device_value: in device memory when the stream gets there, and waited for where
/// they are asked for. Terms and aggregations are then called by device code.
template <class T = float, executor Executor, class Batch = policy_batch<T>, policy_term Policy,
          aggregation Aggregation>
  requires(detail::is_policy_batch<Batch>)
detail::result_t<Executor, policy_stats> policy_loss(const Executor& exec, const Batch& batch, const Policy& policy,
                                                     const Aggregation& aggregate, const loss_options& o,
                                                     const policy_gradients<typename Batch::value_type>& grads) {
  constexpr std::string_view function = "rl::policy_loss";
  detail::check_term(function, policy);
  detail::check_aggregation(function, aggregate);
  return detail::policy_loss(function, exec, batch, policy, aggregate, o, grads);
}

/// policy_loss with PPO's clip (and the dual one, if asked for) and the mean over tokens:
///   loss = mean of max(-A r, -A clip(r, 1 - clip, 1 + clip)) + value mean of 1/2 max((v - R)^2, (v_clipped - R)^2)
///          - entropy mean of H.
/// Schulman et al.: "Proximal policy optimization algorithms", 2017. Shapes, types, errors and cost are policy_loss's.
///
///     rl::policy_batch<float> batch{.log_probs = logp, .old_log_probs = old, .advantages = adv, .mask = mask};
///     auto stats = rl::ppo_loss(exec, batch, {.clip = 0.2f}, {.log_probs = dlogp});
template <class T = float, executor Executor, class Batch = policy_batch<T>>
  requires(detail::is_policy_batch<Batch>)
detail::result_t<Executor, policy_stats> ppo_loss(const Executor& exec, const Batch& batch, const ppo_options& o,
                                                  const policy_gradients<typename Batch::value_type>& grads) {
  constexpr std::string_view function = "rl::ppo_loss";
  const auto [policy, aggregate, parts] = detail::parts_of_ppo(function, o);
  return detail::policy_loss(function, exec, batch, policy, aggregate, parts, grads);
}

/// The loss of values alone, for critics that are trained apart:
///   sum over tokens of w 1/2 max((v - R)^2, (v_old + clip(v - v_old, -clip, clip) - R)^2),
/// and its gradient with respect to v, which may be left out. Shapes, types, errors and cost are policy_loss's.
template <class T = float, executor Executor, class Batch = value_batch<T>, aggregation Aggregation = token_mean>
  requires(detail::is_value_batch<Batch>)
detail::result_t<Executor, value_stats> value_loss(const Executor& exec, const Batch& batch, const value_options& o,
                                                   const sequence_view<typename Batch::value_type>& dvalues,
                                                   const Aggregation& aggregate = {}) {
  constexpr std::string_view function = "rl::value_loss";
  using namespace detail;
  arguments call(function, exec);
  check_view(function, "values", batch.values);
  call.reads("values", batch.values);
  const batch_check check{call, function, "values", batch.values.extents, looks_at_data<Executor>};
  check.input("returns", batch.returns);
  if (o.clip != 0 && !batch.values.empty() && !is_given(batch.old_values))
    fail_value(function, ": old_values is not given, but clip = ", o.clip);
  check.optional("old_values", batch.old_values);
  check.sequences(batch.mask, batch.cu_seqlens);
  check_non_negative(function, "clip", o.clip);
  check_aggregation(function, aggregate);
  check.output("dvalues", dvalues);

  return run_value_batch(by_executor{}, exec, batch, o, dvalues, aggregate);
}

}  // namespace MLKIT_NAMESPACE::rl
