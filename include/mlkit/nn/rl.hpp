// Operations of reinforcement learning between values on a tape: log-probabilities of tokens, PPO's loss,
// Bradley-Terry.
#pragma once

#include "../rl/log_probs.hpp"
#include "../rl/policy_loss.hpp"
#include "../rl/preference.hpp"
#include "layout.hpp"

namespace MLKIT_NAMESPACE::nn {

/// What a policy says of the tokens that it chose, each [tokens].
template <real T>
struct token_outcomes {
  var<T> log_probs;  ///< log p of the token
  var<T> entropies;  ///< of the distribution that it was drawn from
};

/// log softmax(logits / temperature) of a token for each row, and the entropy of that softmax. logits [tokens,
/// classes], one id for each row. Probabilities that were sampled at a temperature are to be taken again at the same.
/// Nothing of logits' size is stored; backward takes the sums again. Errors as rl::log_probs.
template <real T>
token_outcomes<T> token_log_probs(var<T> logits, std::span<const std::int32_t> ids, double temperature = 1) {
  tape<T>& t = logits.on();
  const index_t rows = logits.rows();
  const var<T> both = t.make({2, rows}, {logits});
  auto* kept = t.template scratch_of<std::int32_t>(static_cast<index_t>(ids.size()));
  std::copy(ids.begin(), ids.end(), kept);
  const vector_view<const std::int32_t> tokens(kept, {static_cast<index_t>(ids.size())});
  const auto half = [rows](T* data, index_t i) { return vector_view<T>(data + i * rows, {rows}); };
  rl::log_probs(t.exec(), logits.matrix(), tokens, {.temperature = temperature},
                {.logp = half(both.data(), 0), .entropy = half(both.data(), 1)});
  t.on_backward(both, [=] {
    tape<T>& on = both.on();
    T* const fresh = logits.fresh_grad();
    T* const to = fresh ? fresh : on.scratch(logits.size());
    rl::log_probs_backward(on.exec(), logits.matrix(), tokens, {.temperature = temperature},
                           {.dlogp = half(both.grad_data(), 0), .dentropy = half(both.grad_data(), 1)},
                           matrix_view<T>(to, {rows, logits.columns()}));
    if (!fresh)
      detail::for_each(on.exec(), logits.size(), [sum = logits.grad_data(), to](index_t i) { sum[i] += to[i]; });
  });
  const auto part = [&](index_t i) { return reshape(slice(both, i, 1, 0), {rows}); };
  return {part(0), part(1)};
}

/// What of a policy loss is learnt; values and entropies may be left out.
template <real T>
struct policy_vars {
  var<T> log_probs = {}, values = {}, entropies = {};
};

/// rl::ppo_loss on a tape: one number, whose gradient reaches `vars`, all of one size [tokens], or [batch, time] where
/// log_probs are. `data` holds the rest: log-probabilities when the tokens were drawn, advantages, returns, old values,
/// a mask or starts. What became of the batch goes to `stats`, if it is given. Loss and gradients are of one pass.
template <real T>
var<T> ppo_loss(const policy_vars<T>& vars, rl::policy_batch<T> data, const rl::ppo_options& o,
                rl::policy_stats* stats = nullptr) {
  constexpr std::string_view name = "nn::ppo_loss";
  const var<T> first = vars.log_probs;
  tape<T>& t = first.on();
  const index_t n = first.size();
  const bool grid = first.shape().rank() == 2;
  const auto steps = [&](auto* data) {
    using U = std::remove_pointer_t<decltype(data)>;
    const index_t rows = grid ? first.shape()[0] : 1;
    return rl::sequence_view<U>(matrix_view<U>(data, {rows, rows ? n / rows : 0}));
  };
  const std::array<var<T>, 3> inputs{first, vars.values, vars.entropies};
  std::array<T*, 3> gradients{};
  for (std::size_t i = 0; i < 3; ++i) {
    if (!inputs[i]) continue;
    if (inputs[i].size() != n)
      detail::fail_shape(name, ": ", i == 1 ? "values" : "entropies", " has shape ", inputs[i].shape().text(),
                         ", but log_probs has ", first.shape().text());
    if (inputs[i].needs_grad()) gradients[i] = t.scratch(n);
  }
  const var<T> y = t.make(shape{}, inputs);
  data.log_probs = steps(static_cast<const T*>(first.data()));
  if (vars.values) data.values = steps(static_cast<const T*>(vars.values.data()));
  if (vars.entropies) data.entropies = steps(static_cast<const T*>(vars.entropies.data()));
  rl::policy_gradients<T> to;
  if (gradients[0]) to.log_probs = steps(gradients[0]);
  if (gradients[1]) to.values = steps(gradients[1]);
  if (gradients[2]) to.entropies = steps(gradients[2]);
  const rl::policy_stats found = rl::ppo_loss(t.exec(), data, o, to);
  *y.data() = static_cast<T>(found.loss);
  if (stats) *stats = found;
  t.on_backward(y, [=] {
    const T factor = *y.grad_data();
    for (std::size_t i = 0; i < 3; ++i)
      if (gradients[i])
        detail::for_each(y.on().exec(), n, [sum = inputs[i].grad_data(), d = gradients[i], factor](index_t j) {
          sum[j] += factor * d[j];
        });
  });
  return y;
}

/// rl::preference_loss of pairs on a tape: one number, whose gradient reaches `chosen` and `rejected`, both of one
/// size: scores of a reward model for rl::bradley_terry, log-probabilities of completions for rl::dpo and its like.
/// `rest` holds what else the loss takes: margins, or log-probabilities under the reference.
template <real T, rl::pair_loss Loss = rl::bradley_terry>
var<T> preference_loss(var<T> chosen, var<T> rejected, const Loss& loss = {},
                       typename Loss::template inputs<T> rest = {}, rl::preference_stats* stats = nullptr) {
  detail::check_extent("nn::preference_loss", "rejected", "elements", rejected.size(), "chosen", chosen.size());
  tape<T>& t = chosen.on();
  const index_t n = chosen.size();
  const var<T> y = t.make(shape{}, {chosen, rejected});
  const vector_view<T> slopes[] = {{t.scratch(n), {n}}, {t.scratch(n), {n}}};
  rest.chosen = vector_view<const T>(chosen.data(), {n});
  rest.rejected = vector_view<const T>(rejected.data(), {n});
  const rl::preference_stats found =
      rl::preference_loss<T>(t.exec(), rest, loss, {.chosen = slopes[0], .rejected = slopes[1]});
  *y.data() = static_cast<T>(found.loss);
  if (stats) *stats = found;
  t.on_backward(y, [=] {
    const T factor = *y.grad_data();
    const auto pass = [&](const var<T>& to, const T* slope) {
      if (!to.needs_grad()) return;
      detail::for_each(y.on().exec(), n, [d = to.grad_data(), slope, factor](index_t i) { d[i] += factor * slope[i]; });
    };
    pass(chosen, slopes[0].data);
    pass(rejected, slopes[1].data);
  });
  return y;
}

}  // namespace MLKIT_NAMESPACE::nn
