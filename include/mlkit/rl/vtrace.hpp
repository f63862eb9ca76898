// V-trace: off-policy values and policy advantages with clipped importance weights.
#pragma once

#include "rollout.hpp"

namespace MLKIT_NAMESPACE::rl {

/// A rollout of another policy than that which is learned; members as in rollout.
template <class T = float>
struct off_policy_rollout {
  sequence_view<const T> rewards = {};     ///< r_t
  sequence_view<const T> values = {};      ///< V_t, of the observation that step t started from
  sequence_view<const T> log_ratios = {};  ///< log pi(a_t | s_t) - log mu(a_t | s_t): learned less behaviour policy
  flag_view terminated = {};
  flag_view truncated = {};
  sequence_view<const T> final_values = {};
  batch_view<const T> bootstrap = {};
  batch_flags last_terminated = {};
  batch_flags last_truncated = {};
  flag_view mask = {};
  sequence_starts cu_seqlens = {};
};

/// What vtrace may be told. A clip is 0 or more, or infinite.
struct vtrace_options {
  double gamma = 0.99;         ///< in [0, 1]
  double lambda = 1;           ///< in [0, 1]
  double rho_clip = 1;         ///< of the weights of the errors: towards which policy's values it goes
  double c_clip = 1;           ///< of the weights along the trace: how far it sees
  double policy_rho_clip = 1;  ///< of the weights of the policy advantage
};

/// What vtrace writes; either may be left out.
template <class T = float>
struct vtrace_outputs {
  sequence_view<T> vs = {};          ///< the targets of the values
  sequence_view<T> advantages = {};  ///< of the policy gradient, weight included
};

namespace detail {

template <class T>
struct vtrace_rule {
  using value_type = T;
  static constexpr int inputs = 3, outputs = 2, carried = 1, lookahead = 1;
  static constexpr bool carries_through_mask = false;
  T gamma, lambda, rho_clip, c_clip, policy_rho_clip;
};

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::rl

#define MLKIT_FOREACH "../rl/cpu/vtrace-inl.hpp"
#include "../simd/foreach_isa.hpp"

namespace MLKIT_NAMESPACE::rl {

/// vs_t = V_t + e_t,   e_t = rho_t (r_t + gamma v' - V_t) + gamma c_t e_{t+1},
/// rho_t = min(rho_clip, w_t), c_t = lambda min(c_clip, w_t), w_t = exp(log_ratios), the exponent clamped to +-20;
/// v' and the ends of episodes and windows as gae has them. And the policy advantage
///   min(policy_rho_clip, w_t) (r_t + gamma q' - V_t),   q' = lambda vs_{t+1} + (1 - lambda) V_{t+1} within an episode,
///   else
/// v'.
///
/// Layouts, masks, packed sequences, `done_begins{}`, types, errors and bits are gae's; value_error also for clips that
/// are negative or NaN. A log-ratio of NaN makes its own and earlier steps of the episode so. A step reads three
/// numbers and two flags and writes two numbers. On a GPU products of c_t above 1 may overflow: see affine_scan.
/// Espeholt et al., arXiv 1802.01561, sections 4.1 and 4.2.
template <class T = float, executor Executor, class Done = done_ends>
void vtrace(const Executor& exec, const off_policy_rollout<std::type_identity_t<T>>& in, const vtrace_options& options,
            const vtrace_outputs<std::type_identity_t<T>>& out, Done = {}) {
  constexpr std::string_view function = "rl::vtrace";
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>, "rl: V-trace is of float or double");
  using Problem = detail::scan_problem<detail::vtrace_rule<T>>;
  detail::check_unit_interval(function, "gamma", options.gamma);
  detail::check_unit_interval(function, "lambda", options.lambda);
  detail::check_bound(function, "rho_clip", options.rho_clip);
  detail::check_bound(function, "c_clip", options.c_clip);
  detail::check_bound(function, "policy_rho_clip", options.policy_rho_clip);
  Problem p{.rule = {static_cast<T>(options.gamma), static_cast<T>(options.lambda), static_cast<T>(options.rho_clip),
                     static_cast<T>(options.c_clip), static_cast<T>(options.policy_rho_clip)}};
  detail::scan_call<Problem> call(function, exec, p);
  call.steps("rewards", in.rewards, in.cu_seqlens, p.in[0]);
  call.read("values", in.values, p.in[1]);
  call.read("log_ratios", in.log_ratios, p.in[2]);
  call.template episodes<Done>(in);
  call.write_optional("vs", out.vs, p.out[0]);
  call.write_optional("advantages", out.advantages, p.out[1]);
  run_scan(function, exec, p, detail::scan_needs{});
}

}  // namespace MLKIT_NAMESPACE::rl
