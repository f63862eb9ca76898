// Generalized advantage estimation.
#pragma once

#include "rollout.hpp"

namespace MLKIT_NAMESPACE::rl {

/// What gae may be told; both in [0, 1].
struct gae_options {
  double gamma = 0.99;   ///< the discount
  double lambda = 0.95;  ///< 0: the TD error alone; 1: the discounted return less the value
};

/// What gae writes; either may be left out.
template <class T = float>
struct advantages {
  sequence_view<T> advantages = {};  ///< A_t
  sequence_view<T> returns = {};     ///< A_t + V_t, the targets of TD(lambda)
};

namespace detail {

template <class T>
struct gae_rule {
  using value_type = T;
  static constexpr int inputs = 2, outputs = 2, carried = 1, lookahead = 1;
  static constexpr bool carries_through_mask = false;
  T gamma, decay;
};

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::rl

#define MLKIT_FOREACH "../rl/cpu/advantages-inl.hpp"
#include "../simd/foreach_isa.hpp"

namespace MLKIT_NAMESPACE::rl {

/// A_t = d_t + gamma lambda A_{t+1},   d_t = r_t + gamma v' - V_t,   returns_t = A_t + V_t,
/// where v' = V_{t+1} within an episode, 0 behind a terminated step, final_values[t] behind a truncated one, and behind
/// the window's last step bootstrap[b] or, where that is not given, final_values there. A_{t+1} is 0 behind an
/// episode's or window's last step.
///
/// Inputs and outputs are [batch, time]: time-major storage is a transposed view, which runs as fast. Or [tokens] of
/// packed sequences with cu_seqlens. A masked step is passed over: the step before it sees the value and advantage of
/// the next one that counts, and the outputs there are 0. `done_begins{}` as the last argument for flags that say it of
/// the step before. f32 or f64 (`gae<double>`).
///
/// Throws shape_error where shapes differ or memory overlaps; value_error for gamma or lambda outside [0, 1], rewards
/// that count and are not finite, a truncation without final_values, a window whose last step is not terminated without
/// either bootstrap or final_values, a mask beside cu_seqlens; nothing is written then. Values that are not finite make
/// the outputs of their own and earlier steps of the episode so, and no others. The bits depend on a sequence's own
/// steps alone, not on the layout, its neighbours or the number of threads. Bound by memory: a step reads two numbers
/// and two flags and writes two numbers; rewards are read once more beforehand. Schulman et al., arXiv 1506.02438.
///
/// With a mlkit::cuda nothing of the data is looked at beforehand: rewards that are not finite make the outputs of
/// their own and earlier steps of the episode so; a value that a truncation or a window's end lacks is NaN; starts are
/// held within the tokens. The bits then depend on a sequence's own steps, on whether these lie along memory or beside
/// those of other sequences, and on nothing else: where they lie beside (time-major), also on whether there are many.
template <class T = float, executor Executor, class Done = done_ends>
void gae(const Executor& exec, const rollout<std::type_identity_t<T>>& in, const gae_options& options,
         const advantages<std::type_identity_t<T>>& out, Done = {}) {
  constexpr std::string_view function = "rl::gae";
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>, "rl: advantages are float or double");
  using Problem = detail::scan_problem<detail::gae_rule<T>>;
  detail::check_unit_interval(function, "gamma", options.gamma);
  detail::check_unit_interval(function, "lambda", options.lambda);
  Problem p{.rule = {static_cast<T>(options.gamma), static_cast<T>(options.gamma * options.lambda)}};
  detail::scan_call<Problem> call(function, exec, p);
  call.steps("rewards", in.rewards, in.cu_seqlens, p.in[0]);
  call.read("values", in.values, p.in[1]);
  call.template episodes<Done>(in);
  call.write_optional("advantages", out.advantages, p.out[0]);
  call.write_optional("returns", out.returns, p.out[1]);
  run_scan(function, exec, p, detail::scan_needs{});
}

}  // namespace MLKIT_NAMESPACE::rl
