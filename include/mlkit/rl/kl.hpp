// KL divergence between a policy and its reference from the log-probabilities of sampled tokens: estimators, rewards,
// a loss, and controllers of its weight.
#pragma once

#include "functions.hpp"
#include "options.hpp"
#include "steps.hpp"

namespace MLKIT_NAMESPACE::rl {

/// What an estimator gives for d = log pi - log ref of a token: the estimate, and its derivative by log pi.
template <std::floating_point T>
struct kl_estimate {
  T value, derivative;
};

/// d: unbiased, of large variance, and of either sign. Its derivative is 1, which as a loss averages to nothing: it is
/// for rewards. Schulman: "Approximating KL divergence", 2020.
struct k1 {
  template <std::floating_point T>
  MLKIT_RL_INLINE kl_estimate<T> operator()(T d) const noexcept {
    return {d, T(1)};
  }
};

/// d^2 / 2: biased and of small variance. Its derivative d is, over tokens that the policy itself sampled, the unbiased
/// gradient of KL(pi || ref).
struct k2 {
  template <std::floating_point T>
  MLKIT_RL_INLINE kl_estimate<T> operator()(T d) const noexcept {
    return {T(0.5) * d * d, d};
  }
};

/// e^-d - 1 + d: unbiased, of small variance, never negative for d above -4.8e8; GRPO's. The exponent is held within
/// +-20, in the value and in the derivative 1 - e^-d, which so stays bounded and points back to the reference however
/// far away it is.
struct k3 {
  template <std::floating_point T>
  MLKIT_RL_INLINE kl_estimate<T> operator()(T d) const noexcept {
    constexpr T bound = 20;
    const T e = detail::expm1_of(detail::bounded(-d, -bound, bound));
    // Where d is small, e + d is the difference of what is nearly equal; its series is not.
    const bool small = detail::choose(d < 0, -d, d) < T(sizeof(T) == 4 ? 0.02 : 1e-3);
    const T series = T(0.5) * d * d * (T(1) - d * (T(1) / 3) * (T(1) - d * T(0.25) * (T(1) - d * T(0.2))));
    return {detail::choose(small, series, e + d), -e};
  }
};

/// The estimate of another, with the derivative of k2: the value has k3's variance, and the gradient, over tokens that
/// the policy itself sampled, is that of KL(pi || ref), which the derivative of k3 (that of KL(ref || pi)) is not. Tang
/// and Munos: "On a few pitfalls in KL divergence gradient estimation for RL", 2025.
template <class Estimator = k3>
struct with_kl_gradient {
  Estimator estimator = {};
  template <std::floating_point T>
  MLKIT_RL_INLINE kl_estimate<T> operator()(T d) const noexcept {
    return {estimator(d).value, d};
  }
};

/// Gives a kl_estimate for d = log pi - log ref.
template <class F>
concept kl_estimator = requires(const F& f, float d) {
  { f(d) } -> std::same_as<kl_estimate<float>>;
};

/// Log-probabilities of tokens under the policy and its reference: [batch, time] or any [tokens].
template <storage T = float>
struct kl_batch {
  sequence_view<const T> log_probs = {};
  sequence_view<const T> reference = {};
  flag_view mask = {};  ///< tokens that count; without it all do
};

/// The sum of the estimates of all tokens that count, and how many these are.
struct kl_stats {
  double total = 0;
  index_t tokens = 0;
  /// A token's; 0 where there is none.
  double mean() const noexcept { return tokens == 0 ? 0 : total / static_cast<double>(tokens); }
};

/// What kl_loss may be told.
struct kl_loss_options {
  double coefficient = 1;
  double normaliser = 0;  ///< what the sum is divided by, such as the tokens of all ranks; 0: the tokens that count
};

/// What kl_loss returns.
struct kl_loss_stats : kl_stats {
  double loss = 0;
};

/// What kl_rewards returns.
struct kl_reward_stats : kl_stats {
  index_t sequences = 0;  ///< those with a token that counts
  /// A sequence's; 0 where there is none. What controllers are shown.
  double per_sequence() const noexcept { return sequences == 0 ? 0 : total / static_cast<double>(sequences); }
};

namespace detail {

inline constexpr index_t kl_chunk = 4096;  // tokens that are summed together, whatever the threads
inline constexpr int kl_lanes = 16;

// out = value_factor * value or, where that is 0, derivative_factor * derivative for tokens that count, else 0.
template <class T, class Estimator>
struct kl_problem {
  plane_shape shape;
  plane<const T> log_probs, reference;
  plane<const std::uint8_t> mask;
  plane<T> out;  // null where none is wanted
  T value_factor, derivative_factor;
  const Estimator* estimator;
};

struct kl_part {
  double total = 0;
  index_t tokens = 0;
};

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::rl

#define MLKIT_FOREACH "../rl/cpu/kl-inl.hpp"
#include "../simd/foreach_isa.hpp"

namespace MLKIT_NAMESPACE::rl {
namespace detail {

template <class T>
sequence_places check_kl_batch(step_arguments& steps, const kl_batch<T>& in, const sequence_starts& cu_seqlens = {}) {
  static_assert(std::is_floating_point_v<T>, "rl: log-probabilities of a KL divergence are f32 or f64");
  const sequence_places places = steps.first("log_probs", in.log_probs, cu_seqlens);
  steps.read("log_probs", in.log_probs);
  steps.read("reference", in.reference);
  steps.read_optional("mask", in.mask);
  return places;
}

template <class T, class Estimator>
kl_stats run_kl(by_executor, const cpu& exec, const kl_batch<T>& in, const Estimator& estimator, T value_factor,
                T derivative_factor, const sequence_view<T>& out) {
  if (in.log_probs.empty()) return {};
  kl_problem<T, Estimator> p{};
  p.shape = shape_of_planes(in.log_probs, in.reference, in.mask, out);
  p.log_probs = plane_of(in.log_probs, p.shape);
  p.reference = plane_of(in.reference, p.shape);
  p.mask = plane_of(in.mask, p.shape);
  p.out = plane_of(out, p.shape);
  p.value_factor = value_factor;
  p.derivative_factor = derivative_factor;
  p.estimator = &estimator;
  const index_t n = p.shape.rows * p.shape.cols, chunks = ceil_div(n, kl_chunk);
  const auto kernel = MLKIT_SELECT_WITHOUT_BF16(kl_tokens<T, Estimator>);
  const workspace<kl_part> parts(chunks);
  parallel_ranges(threads_for(exec, n), chunks, [&](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i) parts.data()[i] = kernel(p, i * kl_chunk, std::min(n, (i + 1) * kl_chunk));
  });
  kl_stats all;
  for (index_t i = 0; i < chunks; ++i) {
    all.total += parts.data()[i].total;
    all.tokens += parts.data()[i].tokens;
  }
  return all;
}

inline index_t count_kept(const flag_view& mask, const extents_t<2>& extents) noexcept {
  if (!mask.data) return element_count<2>(extents);
  const plane_shape s = shape_of_planes(mask);
  const plane<const std::uint8_t> m = plane_of(mask, s);
  index_t n = 0;
  for (index_t i = 0; i < s.rows; ++i)
    for (index_t j = 0; j < s.cols; ++j) n += *m.at(i, j) != 0;
  return n;
}

template <class T, class Estimator>
kl_loss_stats run_kl_loss(by_executor, const cpu& exec, const kl_batch<T>& in, const kl_loss_options& o,
                          const Estimator& estimator, const sequence_view<T>& gradient) {
  const double n = o.normaliser > 0 ? o.normaliser : static_cast<double>(count_kept(in.mask, in.log_probs.extents));
  const double factor = n > 0 ? o.coefficient / n : 0;
  kl_loss_stats all;
  static_cast<kl_stats&>(all) = run_kl(by_executor{}, exec, in, estimator, T(0), static_cast<T>(factor), gradient);
  all.loss = all.tokens == 0 ? 0 : factor * all.total;
  return all;
}

template <class T, class Estimator>
kl_reward_stats run_kl_rewards(by_executor, const cpu& exec, std::string_view function, const kl_batch<T>& in,
                               const sequence_places& places, const batch_view<const T>& scores, double beta,
                               const Estimator& estimator, const sequence_view<T>& rewards) {
  const bool scored = is_given(scores);
  const workspace<index_t> last(places.sequences);  // the token that has the score, or -1
  kl_reward_stats all;
  for (index_t b = 0; b < places.sequences; ++b) {
    const auto [row, begin, count] = places(b);
    index_t t = begin + count - 1;
    if (in.mask.data)
      while (t >= begin && !in.mask(row, t)) --t;
    last.data()[b] = t < begin ? -1 : t;
    all.sequences += t >= begin;
    if (scored && t >= begin && !std::isfinite(scores(b)))
      fail_value(function, ": scores[", b, "] = ", scores(b), " is not finite");
  }
  static_cast<kl_stats&>(all) = run_kl(by_executor{}, exec, in, estimator, static_cast<T>(-beta), T(0), rewards);
  if (scored)
    for (index_t b = 0; b < places.sequences; ++b)
      if (last.data()[b] >= 0) rewards(places(b).row, last.data()[b]) += scores(b);
  return all;
}

}  // namespace detail

/// out = the estimate of each token that counts, 0 for the others; returns their sum. out has log_probs' shape, or is
/// left out: `rl::kl(exec, batch, rl::k3{})`. f32 and f64; sums in parts of 4096 tokens in T, the parts in f64 in
/// order: the same bits for any number of threads. Throws shape_error where extents do not fit or out overlaps what is
/// read. Log-probabilities that are not finite give estimates that are not. Reads both once.
/// With a mlkit::cuda sums are a device_value, which waits where it is asked for; so are those of kl_loss and
/// kl_rewards, where a score that is not finite becomes part of its reward.
template <storage T = float, executor Executor, kl_estimator Estimator = k3>
detail::result_t<Executor, kl_stats> kl(const Executor& exec, const kl_batch<T>& in, const Estimator& estimator = {},
                                        const sequence_view<std::type_identity_t<T>>& out = {}) {
  constexpr std::string_view function = "rl::kl";
  detail::arguments call(function, exec);
  detail::step_arguments steps(call, function, detail::looks_at_data<Executor>);
  detail::check_kl_batch(steps, in);
  steps.write_optional("out", out);
  return run_kl(detail::by_executor{}, exec, in, estimator, T(1), T(0), out);
}

/// loss = coefficient / normaliser sum of the estimates of tokens that count, and its gradient by log_probs, 0 for
/// tokens that do not count. By what `estimator` names: k3 has the derivative of its own value, as GRPO has it;
/// with_kl_gradient<k3> (the default) the unbiased gradient of KL(pi || ref) for tokens that the policy itself sampled.
/// k1 is refused: its gradient averages to nothing. Without any token the loss is 0. As kl otherwise; also throws
/// value_error for options that are not finite and a normaliser that is negative. Shao et al.: "DeepSeekMath", 2024,
/// eq. 4 (k3).
template <storage T = float, executor Executor, kl_estimator Estimator = with_kl_gradient<k3>>
detail::result_t<Executor, kl_loss_stats> kl_loss(const Executor& exec, const kl_batch<T>& in, const kl_loss_options& o,
                                                  const Estimator& estimator,
                                                  const sequence_view<std::type_identity_t<T>>& gradient) {
  static_assert(!std::is_same_v<Estimator, k1>,
                "rl: the gradient of k1 as a loss averages to nothing; take with_kl_gradient<k1>, k2 or k3");
  constexpr std::string_view function = "rl::kl_loss";
  detail::arguments call(function, exec);
  detail::step_arguments steps(call, function, detail::looks_at_data<Executor>);
  detail::check_kl_batch(steps, in);
  detail::check_finite(function, "coefficient", o.coefficient);
  detail::check_non_negative(function, "normaliser", o.normaliser);
  steps.write_optional("gradient", gradient);
  return run_kl_loss(detail::by_executor{}, exec, in, o, estimator, gradient);
}
template <storage T = float, executor Executor>
detail::result_t<Executor, kl_loss_stats> kl_loss(const Executor& exec, const kl_batch<T>& in, const kl_loss_options& o,
                                                  const sequence_view<std::type_identity_t<T>>& gradient) {
  return kl_loss(exec, in, o, with_kl_gradient<k3>{}, gradient);
}

/// What kl_rewards are computed from: a kl_batch, a score of each sequence, and where the sequences of packed tokens
/// are.
template <storage T = float>
struct kl_reward_batch {
  sequence_view<const T> log_probs = {};
  sequence_view<const T> reference = {};
  batch_view<const T> scores = {};  ///< [batch]; without them the rewards are KL alone
  flag_view mask = {};              ///< tokens that count; without it all do
  sequence_starts cu_seqlens = {};  ///< [batch + 1] starts of packed sequences
};

/// What kl_rewards may be told.
struct kl_reward_options {
  double beta = 0.05;  ///< weight of the divergence
};

/// rewards[b, t] = -beta kl[b, t], and the score of sequence b added on its last token that counts: the mask, not the
/// last column, says which that is, so that a token behind the end of a sequence never has it. Tokens that do not count
/// get 0. A sequence without any gets no score.
///
/// log_probs, reference and rewards [batch, time], or the [tokens] of packed sequences with cu_seqlens, without which
/// they are one sequence; scores [batch]. f32 and f64. As kl otherwise; also throws value_error for a beta that is
/// not finite and for a score that is not finite and is wanted, named by its index, before rewards are touched. Ziegler
/// et al.: "Fine-tuning language models from human preferences", 2019, eq. 2; Ouyang et al.: "Training language models
/// to follow instructions with human feedback", 2022, eq. 2.
template <storage T = float, executor Executor, kl_estimator Estimator>
detail::result_t<Executor, kl_reward_stats> kl_rewards(const Executor& exec, const kl_reward_batch<T>& in,
                                                       const kl_reward_options& o, const Estimator& estimator,
                                                       const sequence_view<std::type_identity_t<T>>& rewards) {
  constexpr std::string_view function = "rl::kl_rewards";
  detail::arguments call(function, exec);
  detail::step_arguments steps(call, function, detail::looks_at_data<Executor>);
  const kl_batch<T> batch{in.log_probs, in.reference, in.mask};
  const detail::sequence_places places = detail::check_kl_batch(steps, batch, in.cu_seqlens);
  if (detail::is_given(in.scores)) steps.read_batch("scores", in.scores);
  detail::check_finite(function, "beta", o.beta);
  steps.write("rewards", rewards);
  return run_kl_rewards(detail::by_executor{}, exec, function, batch, places, in.scores, o.beta, estimator, rewards);
}
template <storage T = float, executor Executor>
detail::result_t<Executor, kl_reward_stats> kl_rewards(const Executor& exec, const kl_reward_batch<T>& in,
                                                       const kl_reward_options& o,
                                                       const sequence_view<std::type_identity_t<T>>& rewards) {
  return kl_rewards(exec, in, o, k1{}, rewards);
}

/// A weight of the divergence that stays as it is.
struct fixed_kl {
  double beta = 0.05;
  /// Nothing.
  void update(double, index_t) noexcept {}
};

/// A weight of the divergence that is steered to a target:
///   beta <- beta (1 + clip(kl / target - 1, +-0.2) n / horizon)
/// after n sequences with a divergence of `kl` each. Ziegler et al., 2019, section 2.2.
struct adaptive_kl {
  double beta = 0.2;       ///< the weight now
  double target = 6;       ///< the divergence of a sequence that is wanted
  double horizon = 10000;  ///< sequences; after so many the weight changes by at most a fifth, to first order
  double clip = 0.2;

  /// Throws value_error for a divergence that is not finite, members out of range, and an n so large that beta could
  /// become negative (n clip >= horizon); then beta stays.
  void update(double kl, index_t n) {
    constexpr std::string_view function = "rl::adaptive_kl::update";
    using namespace mlkit::detail;
    if (!(std::isfinite(beta) && beta >= 0)) fail_value(function, ": beta = ", beta, " is negative or not finite");
    if (!(std::isfinite(target) && target > 0)) fail_value(function, ": target = ", target, " is not positive");
    if (!(std::isfinite(horizon) && horizon > 0)) fail_value(function, ": horizon = ", horizon, " is not positive");
    if (!(clip >= 0 && clip <= 1)) fail_value(function, ": clip = ", clip, " is outside [0, 1]");
    if (!std::isfinite(kl)) fail_value(function, ": kl = ", kl, " is not finite");
    if (n < 0 || clip * static_cast<double>(n) >= horizon)
      fail_value(function, ": n = ", n, " is outside [0, horizon / clip) with horizon = ", horizon, ", clip = ", clip);
    const double off = kl / target - 1, held = off < -clip ? -clip : off > clip ? clip : off;
    beta *= 1 + held * static_cast<double>(n) / horizon;
  }
};

}  // namespace MLKIT_NAMESPACE::rl
