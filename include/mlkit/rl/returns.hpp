// Discounted returns, TD(lambda) returns and n-step returns.
#pragma once

#include "rollout.hpp"

namespace MLKIT_NAMESPACE::rl {

/// What discounted_returns may be told.
struct discount_options {
  double gamma = 0.99;  ///< in [0, 1]
};

/// What td_lambda_returns may be told; both in [0, 1].
struct td_lambda_options {
  double gamma = 0.99;
  double lambda = 0.95;  ///< 0: one-step targets; 1: discounted returns
};

/// What n_step_returns may be told.
struct n_step_options {
  double gamma = 0.99;  ///< in [0, 1]
  index_t steps = 1;    ///< how many rewards a return holds, 1 or more
};

namespace detail {

template <class T>
struct discount_rule {
  using value_type = T;
  static constexpr int inputs = 1, outputs = 1, carried = 0, lookahead = 0;
  static constexpr bool carries_through_mask = false;
  T gamma;
};

template <class T>
struct td_lambda_rule {
  using value_type = T;
  static constexpr int inputs = 2, outputs = 1, carried = 1, lookahead = 1;
  static constexpr bool carries_through_mask = false;
  T gamma, decay, rest;  // gamma lambda, gamma (1 - lambda)
};

// Inputs of n-step returns; the kernel is a scan's only in how it looks at them.
template <class T>
struct n_step_rule : td_lambda_rule<T> {
  index_t steps = 1;
};

template <class Problem>
struct n_step_kernels {
  using T = typename Problem::value_type;
  void (*run)(const Problem&, index_t sequence, T* scratch) noexcept;
  bool (*all_finite)(const T*, index_t) noexcept;
  bool (*any_byte)(const std::uint8_t*, index_t) noexcept;
};

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::rl

#define MLKIT_FOREACH "../rl/cpu/returns-inl.hpp"
#include "../simd/foreach_isa.hpp"

namespace MLKIT_NAMESPACE::rl {
namespace detail {

template <class Problem>
void run_n_step(std::string_view function, const cpu& exec, Problem& p) {
  using T = typename Problem::value_type;
  if (p.sequences == 0 || p.batch == 0 || p.time == 0) return;
  const auto kernels = MLKIT_SELECT_WITHOUT_BF16(n_step_entry<Problem>)();
  const cpu limited = limit_scan_threads(exec, p.batch * p.time);
  const workspace<T> ends(p.sequences);
  inspect_all(function, limited, p, kernels, {}, ends.data());
  parallel_ranges(limited, p.sequences, [&](index_t begin, index_t end) {
    index_t longest = 0;
    for (index_t s = begin; s < end; ++s) longest = std::max(longest, p.last(s) - p.first(s));
    const workspace<T> scratch(3 * longest);
    for (index_t s = begin; s < end; ++s) kernels.run(p, s, scratch.data());
  });
}

}  // namespace detail

/// G_t = r_t + gamma G_{t+1}, where G_{t+1} = 0 behind a terminated step and final_values[t] behind a truncated one;
/// behind the window it is bootstrap[b], or final_values of the last step, or, where neither is given, 0: the rewards
/// to go of the window alone. in.values is not read and may be left out.
///
/// Layouts, masks, packed sequences, `done_begins{}`, types, errors and bits are gae's. A step reads a number and two
/// flags and writes a number.
template <class T = float, executor Executor, class Done = done_ends>
void discounted_returns(const Executor& exec, const rollout<std::type_identity_t<T>>& in,
                        const discount_options& options, const sequence_view<std::type_identity_t<T>>& returns,
                        Done = {}) {
  constexpr std::string_view function = "rl::discounted_returns";
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>, "rl: returns are float or double");
  using Problem = detail::scan_problem<detail::discount_rule<T>>;
  detail::check_unit_interval(function, "gamma", options.gamma);
  Problem p{.rule = {static_cast<T>(options.gamma)}};
  detail::scan_call<Problem> call(function, exec, p);
  call.steps("rewards", in.rewards, in.cu_seqlens, p.in[0]);
  call.template episodes<Done>(in);
  call.write("returns", returns, p.out[0]);
  run_scan(function, exec, p, detail::scan_needs{.end_values = false});
}

/// G_t = r_t + gamma ((1 - lambda) v' + lambda G_{t+1}), the lambda-return, with v' as gae has it: 0 behind a
/// terminated step, final_values[t] behind a truncated one, where G_{t+1} is v' too; behind the window both are
/// bootstrap[b] or final_values of the last step. It is gae's `returns`.
///
/// Layouts, masks, packed sequences, `done_begins{}`, types, errors and bits are gae's. A step reads two numbers and
/// two flags and writes a number. Sutton and Barto, Reinforcement Learning, 2nd edition, section 12.1.
template <class T = float, executor Executor, class Done = done_ends>
void td_lambda_returns(const Executor& exec, const rollout<std::type_identity_t<T>>& in,
                       const td_lambda_options& options, const sequence_view<std::type_identity_t<T>>& returns,
                       Done = {}) {
  constexpr std::string_view function = "rl::td_lambda_returns";
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>, "rl: returns are float or double");
  using Problem = detail::scan_problem<detail::td_lambda_rule<T>>;
  detail::check_unit_interval(function, "gamma", options.gamma);
  detail::check_unit_interval(function, "lambda", options.lambda);
  Problem p{.rule = {static_cast<T>(options.gamma), static_cast<T>(options.gamma * options.lambda),
                     static_cast<T>(options.gamma * (1 - options.lambda))}};
  detail::scan_call<Problem> call(function, exec, p);
  call.steps("rewards", in.rewards, in.cu_seqlens, p.in[0]);
  call.read("values", in.values, p.in[1]);
  call.template episodes<Done>(in);
  call.write("returns", returns, p.out[0]);
  run_scan(function, exec, p, detail::scan_needs{});
}

/// G_t = r_t + gamma r_{t+1} + ... + gamma^{n-1} r_{t+n-1} + gamma^n V_{t+n}; where the episode or the window ends
/// before, the sum ends there, with gamma^k v' for v' as gae has it. n = 1 gives the targets of TD(0); n of the
/// window's length or more gives discounted returns.
///
/// The maps of single steps are composed to those of 2, 4, ... and applied by the digits of n, without dividing
/// anything: O(T log n). Layouts, masks, packed sequences, `done_begins{}`, types and errors are gae's, and value_error
/// for steps < 1. The bits depend on a sequence's own steps alone. Sutton and Barto, section 7.1.
/// With a mlkit::cuda a thread goes over the n steps of a return: O(T n), for the n of a few tens that are usual.
template <class T = float, executor Executor, class Done = done_ends>
void n_step_returns(const Executor& exec, const rollout<std::type_identity_t<T>>& in, const n_step_options& options,
                    const sequence_view<std::type_identity_t<T>>& returns, Done = {}) {
  constexpr std::string_view function = "rl::n_step_returns";
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>, "rl: returns are float or double");
  using Problem = detail::scan_problem<detail::n_step_rule<T>>;
  detail::check_unit_interval(function, "gamma", options.gamma);
  if (options.steps < 1) detail::fail_value(function, ": steps = ", options.steps, " is not positive");
  Problem p{.rule = {{static_cast<T>(options.gamma), 0, 0}, options.steps}};
  detail::scan_call<Problem> call(function, exec, p);
  call.steps("rewards", in.rewards, in.cu_seqlens, p.in[0]);
  call.read("values", in.values, p.in[1]);
  call.template episodes<Done>(in);
  call.write("returns", returns, p.out[0]);
  run_n_step(function, exec, p);
}

}  // namespace MLKIT_NAMESPACE::rl
