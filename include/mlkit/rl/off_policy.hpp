// UPGO and Retrace.
#pragma once

#include "vtrace.hpp"

namespace MLKIT_NAMESPACE::rl {

/// What upgo may be told.
struct upgo_options {
  double gamma = 0.99;  ///< in [0, 1]
};

/// What upgo writes; either may be left out.
template <class T = float>
struct upgo_outputs {
  sequence_view<T> returns = {};     ///< G_t
  sequence_view<T> advantages = {};  ///< G_t - V_t
};

/// A rollout with the values of actions; members as in rollout.
template <class T = float>
struct action_value_rollout {
  sequence_view<const T> rewards = {};          ///< r_t
  sequence_view<const T> action_values = {};    ///< Q(s_t, a_t)
  sequence_view<const T> expected_values = {};  ///< E_pi Q(s_t, .), over the learned policy's actions
  sequence_view<const T> log_ratios = {};       ///< log pi(a_t | s_t) - log mu(a_t | s_t)
  flag_view terminated = {};
  flag_view truncated = {};
  sequence_view<const T> final_values = {};  ///< E_pi Q of the observation behind step t
  batch_view<const T> bootstrap = {};        ///< E_pi Q of the observation behind the window
  batch_flags last_terminated = {};
  batch_flags last_truncated = {};
  flag_view mask = {};
  sequence_starts cu_seqlens = {};
};

/// What retrace may be told; both in [0, 1].
struct retrace_options {
  double gamma = 0.99;
  double lambda = 1;
};

namespace detail {

template <class T>
struct upgo_rule {
  using value_type = T;
  static constexpr int inputs = 2, outputs = 2, carried = 2, lookahead = 2;
  static constexpr bool carries_through_mask = false;
  T gamma;
};

template <class T>
struct retrace_rule {
  using value_type = T;
  static constexpr int inputs = 4, outputs = 1, carried = 2, lookahead = 1;
  static constexpr bool carries_through_mask = false;
  T gamma, lambda;
};

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::rl

#define MLKIT_FOREACH "../rl/cpu/off_policy-inl.hpp"
#include "../simd/foreach_isa.hpp"

namespace MLKIT_NAMESPACE::rl {

/// G_t = r_t + gamma (u ? G_{t+1} : V_{t+1}), where u = [r_{t+1} + gamma V_{t+2} >= V_{t+1}]: the return of the
/// trajectory as long as it does better than expected. V_{t+2} is v' of step t + 1 as gae has it, as are the ends of
/// episodes and windows, behind which G is v' too.
///
/// Layouts, masks, packed sequences, `done_begins{}`, types, errors and bits are gae's. A step reads two numbers and
/// two flags and writes two numbers. Vinyals et al., Grandmaster level in StarCraft II, Nature 575, 2019, Methods.
template <class T = float, executor Executor, class Done = done_ends>
void upgo(const Executor& exec, const rollout<std::type_identity_t<T>>& in, const upgo_options& options,
          const upgo_outputs<std::type_identity_t<T>>& out, Done = {}) {
  constexpr std::string_view function = "rl::upgo";
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>, "rl: UPGO is of float or double");
  using Problem = detail::scan_problem<detail::upgo_rule<T>>;
  detail::check_unit_interval(function, "gamma", options.gamma);
  Problem p{.rule = {static_cast<T>(options.gamma)}};
  detail::scan_call<Problem> call(function, exec, p);
  call.steps("rewards", in.rewards, in.cu_seqlens, p.in[0]);
  call.read("values", in.values, p.in[1]);
  call.template episodes<Done>(in);
  call.write_optional("returns", out.returns, p.out[0]);
  call.write_optional("advantages", out.advantages, p.out[1]);
  run_scan(function, exec, p, detail::scan_needs{});
}

/// G_t = r_t + gamma (E_pi Q_{t+1} + c_{t+1} (G_{t+1} - Q(s_{t+1}, a_{t+1}))),   c = lambda min(1, exp(log_ratios)),
/// the exponent clamped to +-20: the targets of Q(s_t, a_t). Behind a terminated step there is only r_t; behind a
/// truncated one r_t + gamma final_values[t]; behind the window r_t + gamma bootstrap[b] or final_values of the last
/// step.
///
/// Layouts, masks, packed sequences, `done_begins{}`, types, errors and bits are gae's. A step reads four numbers and
/// two flags and writes a number. Munos et al., arXiv 1606.02647.
template <class T = float, executor Executor, class Done = done_ends>
void retrace(const Executor& exec, const action_value_rollout<std::type_identity_t<T>>& in,
             const retrace_options& options, const sequence_view<std::type_identity_t<T>>& returns, Done = {}) {
  constexpr std::string_view function = "rl::retrace";
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>, "rl: Retrace is of float or double");
  using Problem = detail::scan_problem<detail::retrace_rule<T>>;
  detail::check_unit_interval(function, "gamma", options.gamma);
  detail::check_unit_interval(function, "lambda", options.lambda);
  Problem p{.rule = {static_cast<T>(options.gamma), static_cast<T>(options.lambda)}};
  detail::scan_call<Problem> call(function, exec, p);
  call.steps("rewards", in.rewards, in.cu_seqlens, p.in[0]);
  call.read("action_values", in.action_values, p.in[1]);
  call.read("expected_values", in.expected_values, p.in[2]);
  call.read("log_ratios", in.log_ratios, p.in[3]);
  call.template episodes<Done>(in);
  call.write("returns", returns, p.out[0]);
  run_scan(function, exec, p, detail::scan_needs{});
}

}  // namespace MLKIT_NAMESPACE::rl
