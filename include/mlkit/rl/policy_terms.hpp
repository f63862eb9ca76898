// What a policy loss is made of, as types: the term of one token (PPO, dual clip, GSPO, CISPO, plain policy gradient),
// the term of one value, and how tokens are added up.
#pragma once

#include <cmath>
#include <concepts>
#include <limits>
#include <string_view>

#include "../core/config.hpp"
#include "options.hpp"

namespace MLKIT_NAMESPACE::rl {

/// The exponent of a ratio of probabilities stays in [-20, 20].
inline constexpr double most_log_ratio = 20;

/// One token's part of a policy loss: its loss, the derivative of that with respect to the token's log-probability, and
/// whether a clip holds it.
template <class A>
struct policy_token {
  A loss, slope;
  bool clipped;
};

/// A term of a policy loss: called with the ratio of new to old probability, the advantage and the new log-probability
/// of a token, it gives a policy_token. One functor for float and double, on the host and in CUDA device code; without
/// branches it is computed for a register of tokens at once. What members say of it, all optional:
///
///     static constexpr bool uses_ratio = false;         // old log-probabilities are not needed
///     static constexpr bool of_sequence = true;         // its ratio is that of the sequence, not of the token
///     static constexpr bool constant_ratio = true;      // slope is that of log_prob alone, with the ratio a constant
///     void check(std::string_view function) const;      // refuses members out of range
template <class P>
concept policy_term = requires(const P& term, float f, double d) {
  { term(f, f, f) } -> std::same_as<policy_token<float>>;
  { term(d, d, d) } -> std::same_as<policy_token<double>>;
};

namespace detail {

using namespace mlkit::detail;

template <class P>
inline constexpr bool uses_ratio = true;
template <class P>
  requires requires { P::uses_ratio; }
inline constexpr bool uses_ratio<P> = P::uses_ratio;

template <class P>
inline constexpr bool of_sequence = false;
template <class P>
  requires requires { P::of_sequence; }
inline constexpr bool of_sequence<P> = P::of_sequence;

template <class P>
inline constexpr bool constant_ratio = false;
template <class P>
  requires requires { P::constant_ratio; }
inline constexpr bool constant_ratio<P> = P::constant_ratio;

template <class P>
void check_term(std::string_view function, const P& term) {
  if constexpr (requires { term.check(function); }) term.check(function);
}

// Terms have no branch, and no arithmetic on one side of a choice: so loops over them are vectorised.
template <class A>
MLKIT_HOST_DEVICE constexpr A clamp(A x, A low, A high) noexcept {
  x = x < low ? low : x;
  return x > high ? high : x;
}

}  // namespace detail

/// -A logp: the plain policy gradient, REINFORCE and A2C. Williams: "Simple statistical gradient-following algorithms",
/// 1992.
struct policy_gradient {
  static constexpr bool uses_ratio = false, constant_ratio = true;

  template <std::floating_point A>
  MLKIT_HOST_DEVICE constexpr policy_token<A> operator()(A, A advantage, A log_prob) const noexcept {
    return {-advantage * log_prob, -advantage, false};
  }
};

/// max(-A r, -A clip(r, 1 - low, 1 + high)). The slope is -A r, and 0 where the clipped side is the larger; at the
/// corners, r = 1 - low and r = 1 + high, it is still -A r, as in PyTorch. Schulman et al.: "Proximal policy
/// optimization algorithms", 2017, equation 7; with another `high`, clip-higher of Yu et al.: "DAPO", 2025.
struct ppo_clip {
  double low = 0.2;   ///< in [0, 1]
  double high = 0.2;  ///< not negative

  void check(std::string_view function) const {
    detail::check_unit_interval(function, "ppo_clip.low", low);
    detail::check_non_negative(function, "ppo_clip.high", high);
  }
  template <std::floating_point A>
  MLKIT_HOST_DEVICE constexpr policy_token<A> operator()(A ratio, A advantage, A) const noexcept {
    const A free = -advantage * ratio;
    const A bound = -advantage * detail::clamp(ratio, static_cast<A>(1 - low), static_cast<A>(1 + high));
    const bool clipped = bound > free;
    return {clipped ? bound : free, clipped ? A(0) : free, clipped};
  }
};

/// Where A < 0, min(L, -bound A) of another term's loss L: the ratio of a bad token cannot make its loss ever larger.
/// The slope is 0 where -bound A is the smaller. Ye et al.: "Mastering complex control in MOBA games with deep
/// reinforcement learning", 2020, equation 5.
template <policy_term Term = ppo_clip>
struct dual_clip {
  static constexpr bool uses_ratio = detail::uses_ratio<Term>, of_sequence = detail::of_sequence<Term>,
                        constant_ratio = detail::constant_ratio<Term>;
  double bound = 3;  ///< above 1; infinity is none
  Term term = {};

  void check(std::string_view function) const {
    if (!(bound > 1)) detail::fail_value(function, ": dual_clip.bound = ", bound, " is not above 1");
    detail::check_term(function, term);
  }
  template <std::floating_point A>
  MLKIT_HOST_DEVICE constexpr policy_token<A> operator()(A ratio, A advantage, A log_prob) const noexcept {
    const policy_token<A> of_term = term(ratio, advantage, log_prob);
    const A most = -advantage * static_cast<A>(bound);
    const bool over = (advantage < 0) & (of_term.loss > most);
    return {over ? most : of_term.loss, over ? A(0) : of_term.slope, static_cast<bool>(over | of_term.clipped)};
  }
};

namespace detail {

// With an infinite bound it is its term, which costs less.
template <class P>
inline constexpr bool is_dual_clip = false;
template <class Term>
inline constexpr bool is_dual_clip<dual_clip<Term>> = true;

}  // namespace detail

/// Another term with the ratio of the sequence, s = exp(mean over the sequence's tokens of logp - logp_old), in place
/// of each token's. The gradient is that of the whole: each token's is the sum of the sequence's weighted slopes over
/// its number of tokens.
template <policy_term Term>
struct sequence_ratio {
  static constexpr bool uses_ratio = true, of_sequence = true, constant_ratio = detail::constant_ratio<Term>;
  Term term = {};

  void check(std::string_view function) const { detail::check_term(function, term); }
  template <std::floating_point A>
  MLKIT_HOST_DEVICE constexpr policy_token<A> operator()(A ratio, A advantage, A log_prob) const noexcept {
    return term(ratio, advantage, log_prob);
  }
};

/// GSPO: PPO's clip with the ratio of the sequence, whose range is much narrower. Zheng et al.: "Group sequence policy
/// optimization", 2025, equations 5 to 7; the bounds are those of their section 5.1.
struct gspo {
  static constexpr bool of_sequence = true;
  double low = 3e-4;   ///< in [0, 1]
  double high = 4e-4;  ///< not negative

  void check(std::string_view function) const {
    detail::check_unit_interval(function, "gspo.low", low);
    detail::check_non_negative(function, "gspo.high", high);
  }
  template <std::floating_point A>
  MLKIT_HOST_DEVICE constexpr policy_token<A> operator()(A ratio, A advantage, A log_prob) const noexcept {
    return ppo_clip{low, high}(ratio, advantage, log_prob);
  }
};

/// CISPO: -clip(r, 1 - low, 1 + high) A logp, with the clipped ratio a constant: the slope is -clip(r, ...) A, so that
/// no token's gradient is lost. MiniMax: "MiniMax-M1", 2025, equations 4 and 5.
struct cispo {
  static constexpr bool constant_ratio = true;
  double low = 1;     ///< in [0, 1]; 1 is no lower bound
  double high = 0.2;  ///< not negative

  void check(std::string_view function) const {
    detail::check_unit_interval(function, "cispo.low", low);
    detail::check_non_negative(function, "cispo.high", high);
  }
  template <std::floating_point A>
  MLKIT_HOST_DEVICE constexpr policy_token<A> operator()(A ratio, A advantage, A log_prob) const noexcept {
    const A weight = detail::clamp(ratio, static_cast<A>(1 - low), static_cast<A>(1 + high));
    const A slope = -advantage * weight;
    return {slope * log_prob, slope, weight != ratio};
  }
};

/// One value's part of a value loss, 1/2 max((v - R)^2, (v_old + clip(v - v_old, -clip, clip) - R)^2), and its
/// derivative with respect to v: v - R, and 0 where the clipped side is the larger. OpenAI baselines' PPO2; an infinite
/// clip is none.
struct clipped_value {
  double clip = std::numeric_limits<double>::infinity();

  template <std::floating_point A>
  MLKIT_HOST_DEVICE constexpr policy_token<A> operator()(A value, A old_value, A target) const noexcept {
    const A e = static_cast<A>(clip), step = value - old_value, beyond = step - detail::clamp(step, -e, e);
    const A error = value - target, bound = error - beyond;
    const A free = A(0.5) * error * error, held = A(0.5) * bound * bound;
    const bool clipped = held > free;
    return {clipped ? held : free, clipped ? A(0) : error, clipped};
  }
};

/// What an aggregation knows when it weighs a token: tokens that count, in its sequence and in all, and sequences that
/// have any.
struct token_counts {
  double of_sequence = 0, tokens = 0, sequences = 0;
};

/// How the losses of tokens become one: a type whose weight(token_counts) is what a token of such a sequence is
/// multiplied by.
template <class G>
concept aggregation = requires(const G& g, const token_counts& n) {
  { g.weight(n) } -> std::convertible_to<double>;
};

/// The sum over tokens / their number: every token counts alike.
struct token_mean {
  double tokens =
      0;  ///< the number, such as that of all ranks and gradient accumulation steps; 0: those that count here

  void check(std::string_view function) const { detail::check_non_negative(function, "token_mean.tokens", tokens); }
  MLKIT_HOST_DEVICE constexpr double weight(const token_counts& n) const noexcept {
    return 1 / (tokens > 0 ? tokens : n.tokens);
  }
};

/// The mean over sequences of the sum over their tokens. Sequences without a token that counts are no part of the mean.
struct sequence_mean_of_sums {
  double sequences = 0;  ///< the number of sequences; 0: those that have tokens here

  void check(std::string_view function) const {
    detail::check_non_negative(function, "sequence_mean_of_sums.sequences", sequences);
  }
  MLKIT_HOST_DEVICE constexpr double weight(const token_counts& n) const noexcept {
    return 1 / (sequences > 0 ? sequences : n.sequences);
  }
};

/// The mean over sequences of the mean over their tokens: every sequence counts alike, as in GRPO. Sequences without a
/// token that counts are no part of the mean; TRL divides by all, which `sequences` can say.
struct sequence_mean_of_means {
  double sequences = 0;  ///< the number of sequences; 0: those that have tokens here

  void check(std::string_view function) const {
    detail::check_non_negative(function, "sequence_mean_of_means.sequences", sequences);
  }
  MLKIT_HOST_DEVICE constexpr double weight(const token_counts& n) const noexcept {
    return 1 / ((sequences > 0 ? sequences : n.sequences) * n.of_sequence);
  }
};

/// The sum over tokens / a constant, which does not depend on how long answers are: Dr.GRPO. Liu et al.: "Understanding
/// R1-Zero-like training", 2025.
struct sum_over {
  double constant = 1;  ///< such as sequences times the most tokens that one may have

  void check(std::string_view function) const {
    if (!(std::isfinite(constant) && constant > 0))
      detail::fail_value(function, ": sum_over.constant = ", constant, " is not positive");
  }
  MLKIT_HOST_DEVICE constexpr double weight(const token_counts&) const noexcept { return 1 / constant; }
};

}  // namespace MLKIT_NAMESPACE::rl
