// Cross-entropy of completions: labels that are ignored, shifted or packed, and the gradient in the same pass.
#pragma once

#include "labels.hpp"
#include "log_probs.hpp"

namespace MLKIT_NAMESPACE::rl {
namespace detail {

template <class T>
cross_entropy_result run_cross_entropy(const cpu& exec, logits_problem<T>& p, const row_labels& targets,
                                       const cross_entropy_options& o) {
  using A = accumulator_t<T>;
  const extents_t<2> rows{p.batch, p.time};
  p.tokens = tensor_view<const std::int64_t, 2>(targets.of.data(), rows);
  p.mask = tensor_view<const std::uint8_t, 2>(targets.counts.data(), rows);
  if (p.rows() == 0) return {};

  const auto total = MLKIT_SELECT_WITHOUT_BF16(logits_entry<T>)().total;
  const A smoothing = static_cast<A>(o.label_smoothing), rest = 1 - smoothing;
  const A scale = static_cast<A>(1 / targets.divisor);
  std::vector<A> losses(static_cast<std::size_t>(p.rows()));
  run_logits(exec, p, [&](index_t row, A logp, A, A lse) {
    A loss = -logp;
    if (smoothing > 0)
      loss = rest * loss - smoothing * (total(p, row) * p.inverse_temperature / static_cast<A>(p.classes) - lse);
    losses[static_cast<std::size_t>(row)] = loss;
    return token_gradient<A>{-rest * scale, 0, -smoothing * scale};
  });
  cross_entropy_result result{0, targets.count};
  for (std::size_t i = 0; i < losses.size(); ++i)
    if (targets.counts[i]) result.loss += static_cast<double>(losses[i]);
  result.loss /= targets.divisor;
  return result;
}

template <class T, int Rank, executor Executor>
result_t<Executor, cross_entropy_result> cross_entropy(const Executor& exec,
                                                       const tensor_view<const T, Rank + 1>& logits,
                                                       const token_ids<Rank>& labels, const cross_entropy_options& o,
                                                       const tensor_view<T, Rank + 1>* dlogits) {
  constexpr std::string_view function = "rl::cross_entropy";
  arguments call(function, exec);
  check_view(function, "logits", logits);
  const extents_t<Rank> shape = leading<Rank>(logits.extents);
  const auto problem = [&] {
    auto p = make_rows<T, Rank>(logits, o.temperature);
    if (!dlogits || !same_memory(*dlogits, logits)) call.reads("logits", logits);
    if (dlogits) set_gradient(call, function, *dlogits, logits, p);
    return p;
  };
  if constexpr (looks_at_data<Executor>) {
    const row_labels targets(call, function, labels, "logits' rows", shape, logits.extents[Rank], o);
    auto p = problem();
    return run_cross_entropy(exec, p, targets, o);
  } else {
    const sequence_places places = check_labels<Rank>(call, function, labels, "logits' rows", shape, o, false);
    auto p = problem();
    labels.visit([&](const auto& v) { p.tokens = as_rows(v); });
    return run_cross_entropy(exec, p, places, o);
  }
}

}  // namespace detail

/// The loss of predicting labels: with p the softmax of a row's logits over the temperature and e the label smoothing,
///   loss = 1/N sum over the rows that count of (1 - e) (-log p_y) + e / V sum_j (-log p_j),
/// N the number of rows that count or the normaliser that options give: the count over all ranks and micro-batches,
/// where those share a mean. logits [rows, vocabulary] or [batch, time, vocabulary], any strides; labels of their
/// leading shape, std::int32_t or std::int64_t. Returns the loss and the number of rows that count.
///
/// A row counts unless its label is options.ignore, -100 by default. With options.shift row t predicts label t + 1,
/// within [batch, time]'s sequences or those of cu_seqlens, so that labels are the tokens themselves, and those of
/// prompts are ignored. Rows that do not count are not read, whatever they hold. Where none counts, the loss is 0.
///
/// f32, f64, bf16 and f16; a row's loss is f32 (f64 for f64), and their sum is f64. The same bits for any number of
/// threads. Throws shape_error where shapes do not fit or memory overlaps; value_error for options out of their ranges,
/// for starts that decrease or do not span the tokens, and for a label that is neither within the vocabulary nor
/// ignored, named by its index, before anything is written. Reads logits once. Szegedy et al.: "Rethinking the
/// Inception architecture", 2016, section 7, of label smoothing.
///
/// With a mlkit::cuda the result is a device_value, which waits where it is asked for and not before; a label that is
/// neither within the vocabulary nor ignored makes the loss, and its row's gradient, NaN.
template <executor Executor, detail::logits_like Logits>
detail::result_t<Executor, cross_entropy_result> cross_entropy(
    const Executor& exec, const Logits& logits, const token_ids<detail::token_rank<const Logits>>& labels,
    const cross_entropy_options& options = {}) {
  using T = element_t<const Logits>;
  constexpr int rank = detail::token_rank<const Logits>;
  return detail::cross_entropy<T, rank>(exec, tensor_view<const T, rank + 1>(as_view(logits)), labels, options,
                                        static_cast<const tensor_view<T, rank + 1>*>(nullptr));
}

/// The same, and its gradient: dlogits, of logits' shape and type, becomes dloss / dlogits, in the same pass. It may be
/// logits itself, which it then replaces. Rows that do not count get 0.
template <executor Executor, detail::logits_like Logits, detail::logits_like Gradient>
detail::result_t<Executor, cross_entropy_result> cross_entropy(
    const Executor& exec, const Logits& logits, const token_ids<detail::token_rank<const Logits>>& labels,
    const cross_entropy_options& options, Gradient&& dlogits) {
  using T = element_t<const Logits>;
  constexpr int rank = detail::token_rank<const Logits>;
  detail::check_gradient_type<Logits, Gradient>();
  const tensor_view<T, rank + 1> dz = as_view(dlogits);
  return detail::cross_entropy<T, rank>(exec, tensor_view<const T, rank + 1>(as_view(logits)), labels, options, &dz);
}

}  // namespace MLKIT_NAMESPACE::rl
