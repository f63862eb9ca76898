// Policy losses straight from logits: the loss, its statistics and the gradient of the logits, which are read once.
#pragma once

#include "functions.hpp"
#include "log_probs.hpp"
#include "policy_loss.hpp"

namespace MLKIT_NAMESPACE::rl {

/// How logits become log-probabilities.
struct logits_options {
  double temperature = 1;  ///< logits are divided by it; > 0
};

/// What a policy loss over logits writes; what is left out is not. Of the batch's shape, but for the logits' gradient.
template <storage T, int Rank>
struct logits_gradients {
  using A = accumulator_t<T>;
  tensor_view<T, Rank> logits = {};  ///< of logits' shape; may be the logits themselves, which it then replaces
  sequence_view<A> values = {};      ///< gradient of the values
  sequence_view<A> log_probs = {};   ///< the tokens' log-probabilities (no gradient); 0 where masked
  sequence_view<A> entropies = {};   ///< the rows' entropies (no gradient); 0 where masked
};

namespace detail {

// The gradient of one row's logits, from its log-probability.
template <class A, class Policy>
struct token_slopes {
  const Policy& policy;
  const policy_batch<A>& batch;
  const token_sequences& sequences;
  const A* weights;
  index_t time;
  A entropy;

  token_gradient<A> operator()(index_t row, A log_prob) const noexcept {
    const index_t b = row / time, t = row - b * time;
    const A weight = weights[sequences.starts ? sequences.at(row) : b];
    A ratio = 1;
    if constexpr (uses_ratio<Policy>)
      ratio = exp_of(
          clamp(log_prob - batch.old_log_probs(b, t), static_cast<A>(-most_log_ratio), static_cast<A>(most_log_ratio)));
    const policy_token<A> token = policy(ratio, batch.advantages(b, t), log_prob);
    return {weight * token.slope, -entropy * weight};
  }
};

// The loss of a batch whose logits p has, checked.
template <class T, class A, class Policy, class Aggregation>
policy_stats run_logits_policy(const cpu& exec, logits_problem<T>& p, policy_batch<A>& batch, const extents_t<2>& shape,
                               const Policy& policy, const Aggregation& aggregate, const loss_options& o,
                               const policy_gradients<A>& grads, const sequence_view<A>& log_probs_out,
                               const sequence_view<A>& entropies_out) {
  const weigher weight(aggregate);
  // Log-probabilities and entropies of all rows, in the user's memory or in our own.
  const bool with_entropy = o.entropy != 0 || is_given(entropies_out);
  const index_t rows = shape[0] * shape[1];
  const workspace<A> own(2 * rows);
  const auto memory = [&](const sequence_view<A>& v, index_t at) -> matrix_view<A> {
    return is_given(v) ? matrix_view<A>(v) : matrix_view<A>(own.data() + at * rows, shape);
  };
  const matrix_view<A> log_probs = memory(log_probs_out, 0), entropies = memory(entropies_out, 1);
  batch.log_probs = tensor_view<const A, 2>(log_probs);
  if (with_entropy) batch.entropies = tensor_view<const A, 2>(entropies);
  if (rows == 0) return run_policy_batch(exec, batch, policy, weight, o, grads);

  p.with_entropy = with_entropy;
  const auto keep = [&](index_t row, A l, A h) {
    const index_t b = row / shape[1], t = row - b * shape[1];
    log_probs(b, t) = l;
    entropies(b, t) = h;
  };
  if (p.mask)
    for (index_t i = 0; i < rows; ++i)
      if (!p.keeps(i)) keep(i, A{}, A{});
  if constexpr (of_sequence<Policy>) {
    // The ratio of a sequence is known behind its last token: logits are read again for the gradient.
    const auto gradient = std::exchange(p.gradient, nullptr);
    run_logits(exec, p, [&](index_t row, A l, A h, A) { return keep(row, l, h), token_gradient<A>{}; });
    const workspace<A> slopes(2 * rows);
    policy_gradients<A> all = grads;
    all.log_probs = matrix_view<A>(slopes.data(), shape);
    if (with_entropy) all.entropies = matrix_view<A>(slopes.data() + rows, shape);
    const policy_stats stats = run_policy_batch(exec, batch, policy, weight, o, all);
    p.gradient = gradient;
    if (gradient)
      run_logits(exec, p, [&](index_t row, A, A, A) {
        return token_gradient<A>{slopes.data()[row], with_entropy ? slopes.data()[rows + row] : A{}};
      });
    return stats;
  } else {
    const token_sequences sequences = sequences_of(shape, {}, batch.cu_seqlens);
    const workspace<A> weights(sequences.sequences);
    weigh_tokens(plane_by_sequence(batch.mask), sequences, weight, weights.data());
    const token_slopes<A, Policy> slopes{policy, batch, sequences, weights.data(), shape[1], static_cast<A>(o.entropy)};
    run_logits(exec, p, [&](index_t row, A l, A h, A) {
      keep(row, l, h);
      return slopes(row, l);
    });
    return run_policy_batch(exec, batch, policy, weight, o, grads);
  }
}

template <class T, int Rank, executor Executor, class Policy, class Aggregation>
result_t<Executor, policy_stats> logits_policy_loss(std::string_view function, const Executor& exec,
                                                    const tensor_view<const T, Rank>& logits,
                                                    const token_ids<Rank - 1>& tokens, const logits_options& of_logits,
                                                    const policy_batch<accumulator_t<T>>& given_batch,
                                                    const Policy& policy, const Aggregation& aggregate,
                                                    const loss_options& o, const logits_gradients<T, Rank>& out) {
  using A = accumulator_t<T>;
  arguments call(function, exec);
  policy_batch<A> batch = given_batch;
  const auto refuse = [&](std::string_view name, const auto& v) {
    if (is_given(v)) fail_value(function, ": ", name, " is given, but logits say what it is");
  };
  refuse("log_probs", batch.log_probs);
  refuse("entropies", batch.entropies);
  extents_t<2> shape{1, logits.extents[0]};
  if constexpr (Rank == 3) shape = {logits.extents[0], logits.extents[1]};
  log_prob_options<Rank - 1> options{.temperature = of_logits.temperature};
  if (is_given(batch.mask)) {
    check_same_shape<2>(function, "mask", batch.mask.extents, "logits' rows", shape);
    check_view(function, "mask", batch.mask);
    if constexpr (Rank == 3)
      options.mask = tensor_view<const std::uint8_t, 2>(batch.mask);
    else
      options.mask = tensor_view<const std::uint8_t, 1>(batch.mask.data, {shape[1]}, {batch.mask.strides[1]});
  }
  auto p = make_logits_problem<T, Rank - 1>(call, function, logits, tokens, options, looks_at_data<Executor>,
                                            same_memory(out.logits, logits));
  const policy_gradients<A> grads{.values = out.values};
  batch.mask = {};  // which is named already
  check_policy_batch(call, function, "logits' rows", shape, batch, uses_ratio<Policy>, true, o, grads,
                     looks_at_data<Executor>);
  batch.mask = given_batch.mask;
  const batch_check check{call, function, "logits' rows", shape, looks_at_data<Executor>};
  check.output("log_probs", out.log_probs);
  check.output("entropies", out.entropies);
  if (is_given(out.logits)) set_gradient<T, Rank>(call, function, out.logits, logits, p);
  return run_logits_policy(exec, p, batch, shape, policy, aggregate, o, grads, out.log_probs, out.entropies);
}

}  // namespace detail

/// policy_loss of the log-probabilities and entropies that logits give, and the gradient with respect to the logits,
///   dz_j = 1 / tau (g (1[j = y] - p_j) + w entropy p_j (log p_j + H)),   g = w d term / d logp,
/// written while the row is in cache: nothing of the logits' size is stored besides. logits [batch, time, vocabulary],
/// or [tokens, vocabulary] with a batch of [tokens]; tokens of their leading shape, std::int32_t or std::int64_t; f32,
/// f64, bf16 and f16; the batch is of the type of sums, f32 (f64 for f64), and has no log_probs or entropies. Rows that
/// the mask leaves out are not read, and their gradient is 0. With o.entropy = 0 and no entropies wanted, none are
/// computed.
///
/// Errors are those of log_probs_and_gradient and policy_loss; value_error for a batch that has log_probs or entropies
/// of its own. The same bits for any number of threads. Logits are read once and their gradient is written once; terms
/// with the ratio of a sequence (gspo) read the logits twice.
template <executor Executor, detail::logits_like Logits, policy_term Policy, aggregation Aggregation>
detail::result_t<Executor, policy_stats> policy_loss(
    const Executor& exec, const Logits& logits, const token_ids<detail::token_rank<const Logits>>& tokens,
    const logits_options& of_logits, const policy_batch<accumulator_t<element_t<const Logits>>>& batch,
    const Policy& policy, const Aggregation& aggregate, const loss_options& o,
    const logits_gradients<element_t<const Logits>, detail::token_rank<const Logits> + 1>& out) {
  constexpr std::string_view function = "rl::policy_loss";
  using T = element_t<const Logits>;
  constexpr int rank = detail::token_rank<const Logits> + 1;
  detail::check_term(function, policy);
  detail::check_aggregation(function, aggregate);
  const tensor_view<const T, rank> z = as_view(logits);
  return detail::logits_policy_loss<T, rank>(function, exec, z, tokens, of_logits, batch, policy, aggregate, o, out);
}

/// ppo_loss of the log-probabilities and entropies that logits give; otherwise as policy_loss over logits.
///
///     auto stats = rl::ppo_loss(exec, logits, actions, {}, {.old_log_probs = old, .advantages = adv},
///                               {.clip = 0.2f, .entropy = 0.01f}, {.logits = dlogits});
template <executor Executor, detail::logits_like Logits>
detail::result_t<Executor, policy_stats> ppo_loss(
    const Executor& exec, const Logits& logits, const token_ids<detail::token_rank<const Logits>>& tokens,
    const logits_options& of_logits, const policy_batch<accumulator_t<element_t<const Logits>>>& batch,
    const ppo_options& o, const logits_gradients<element_t<const Logits>, detail::token_rank<const Logits> + 1>& out) {
  constexpr std::string_view function = "rl::ppo_loss";
  using T = element_t<const Logits>;
  constexpr int rank = detail::token_rank<const Logits> + 1;
  const auto [policy, aggregate, parts] = detail::parts_of_ppo(function, o);
  const tensor_view<const T, rank> z = as_view(logits);
  return detail::logits_policy_loss<T, rank>(function, exec, z, tokens, of_logits, batch, policy, aggregate, parts,
                                             out);
}

}  // namespace MLKIT_NAMESPACE::rl
