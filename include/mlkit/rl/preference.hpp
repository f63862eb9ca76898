// Losses of reward models and of policies trained on preferences, with their gradients.
#pragma once

#include "functions.hpp"
#include "group.hpp"
#include "moments.hpp"
#include "options.hpp"
#include "steps.hpp"

namespace MLKIT_NAMESPACE::rl {

/// What a paired loss is given of one pair; what a loss has not asked for is 0.
template <std::floating_point T>
struct pair_point {
  T chosen, rejected, reference_chosen, reference_rejected, margin;
};

/// What a paired loss gives: its value, its derivatives by chosen and rejected, and the rewards that these imply, for
/// statistics.
template <std::floating_point T>
struct pair_term {
  T loss, d_chosen, d_rejected, chosen_reward, rejected_reward;
};

/// Rewards [n] of the chosen and the rejected completion of each prompt; margins [n] by how much they should differ, if
/// given.
template <storage T>
struct reward_pairs {
  batch_view<const T> chosen = {}, rejected = {}, margins = {};
  template <class F>
  void each_operand(F&& f) const {
    f(0, "chosen", chosen, true), f(1, "rejected", rejected, true), f(4, "margins", margins, false);
  }
};

/// Log-probabilities [n] of the chosen and the rejected completion under the policy: of a sequence, as
/// sequence_log_probs makes them of its tokens.
template <storage T>
struct policy_pairs {
  batch_view<const T> chosen = {}, rejected = {};
  template <class F>
  void each_operand(F&& f) const {
    f(0, "chosen", chosen, true), f(1, "rejected", rejected, true);
  }
};

/// The same, and under the reference.
template <storage T>
struct reference_pairs {
  batch_view<const T> chosen = {}, rejected = {}, reference_chosen = {}, reference_rejected = {};
  template <class F>
  void each_operand(F&& f) const {
    f(0, "chosen", chosen, true), f(1, "rejected", rejected, true);
    f(2, "reference_chosen", reference_chosen, true), f(3, "reference_rejected", reference_rejected, true);
  }
};

/// Where the gradients of the loss by chosen and rejected go, and the loss of each pair; [n] each, and what is left out
/// is not written.
template <storage T>
struct pair_gradients {
  batch_view<T> chosen = {}, rejected = {}, losses = {};
};

/// Means over the batch.
struct preference_stats {
  double loss = 0;           ///< the sum of losses over the normaliser
  double accuracy = 0;       ///< the part of pairs whose chosen reward is the larger; equal ones do not count as right
  double chosen_reward = 0;  ///< what the loss takes as the reward of what was chosen
  double rejected_reward = 0;  ///< ... and of what was rejected
  index_t pairs = 0;
  double margin() const noexcept { return chosen_reward - rejected_reward; }
};

/// What every preference_loss may be told.
struct preference_options {
  double normaliser = 0;  ///< what the sum is divided by, such as the pairs of all ranks; 0: those of this call
};

/// -log sigmoid(c - r - margin) + centering (c + r)^2, of rewards c and r. The second term keeps rewards about 0, which
/// the first leaves open. Ouyang et al.: "Training language models to follow instructions with human feedback", 2022,
/// eq. 1; margins: Touvron et al.: "Llama 2", 2023, eq. 2; centering: Eisenstein et al.: "Helping or herding?", 2023.
struct bradley_terry {
  double centering = 0;  ///< 0.01 is usual

  template <storage T>
  using inputs = reward_pairs<T>;
  void check(std::string_view function) const { detail::check_non_negative(function, "centering", centering); }
  template <std::floating_point T>
  MLKIT_RL_INLINE pair_term<T> operator()(const pair_point<T>& x) const noexcept {
    const detail::log_sigmoid<T> s(x.chosen - x.rejected - x.margin);
    const T weight = static_cast<T>(centering);
    const T sum = detail::choose(weight == 0, T(0), x.chosen + x.rejected);  // which may be above the largest T
    const T pull = T(2) * weight * sum;
    return {weight * sum * sum - s.value, pull - s.derivative, pull + s.derivative, x.chosen, x.rejected};
  }
};

namespace detail {

inline void check_smoothing(std::string_view function, double value) {
  if (!(value >= 0 && value < 0.5)) fail_value(function, ": label_smoothing = ", value, " is outside [0, 0.5)");
}

// -(1 - smoothing) log sigmoid(z) - smoothing log sigmoid(-z), and its derivative.
template <std::floating_point T>
struct smoothed_logistic {
  T value, derivative;
  MLKIT_RL_INLINE smoothed_logistic(T z, T smoothing) noexcept {
    const log_sigmoid<T> s(z);  // log sigmoid(-z) = log sigmoid(z) - z
    value = smoothing * z - s.value;
    derivative = smoothing - s.derivative;
  }
};

}  // namespace detail

/// With d = (c - c_ref) - (r - r_ref) of sequence log-probabilities:
///   -(1 - label_smoothing) log sigmoid(beta d) - label_smoothing log sigmoid(-beta d).
/// Rewards are beta (c - c_ref) and beta (r - r_ref). Rafailov et al.: "Direct preference optimization", 2023, eq. 7;
/// label smoothing, for labels wrong that often: Mitchell: "A note on DPO with noisy preferences", 2023.
struct dpo {
  double beta = 0.1;
  double label_smoothing = 0;

  template <storage T>
  using inputs = reference_pairs<T>;
  void check(std::string_view function) const {
    detail::check_positive(function, "beta", beta);
    detail::check_smoothing(function, label_smoothing);
  }
  template <std::floating_point T>
  MLKIT_RL_INLINE pair_term<T> operator()(const pair_point<T>& x) const noexcept {
    const T b = static_cast<T>(beta), c = x.chosen - x.reference_chosen, r = x.rejected - x.reference_rejected;
    const detail::smoothed_logistic<T> s(b * (c - r), static_cast<T>(label_smoothing));
    return {s.value, b * s.derivative, -b * s.derivative, b * c, b * r};
  }
};

/// (d - 1 / (2 beta))^2, d as DPO has it: a margin to reach rather than one to widen for ever. Of the mean over tokens
/// of log-probabilities, as its authors and TRL have it. Azar et al.: "A general theoretical paradigm to understand
/// learning from human preferences", 2023, eq. 17.
struct ipo {
  double beta = 0.1;

  template <storage T>
  using inputs = reference_pairs<T>;
  void check(std::string_view function) const { detail::check_positive(function, "beta", beta); }
  template <std::floating_point T>
  MLKIT_RL_INLINE pair_term<T> operator()(const pair_point<T>& x) const noexcept {
    const T b = static_cast<T>(beta), c = x.chosen - x.reference_chosen, r = x.rejected - x.reference_rejected;
    const T h = (c - r) - T(1) / (T(2) * b);
    return {h * h, T(2) * h, T(-2) * h, b * c, b * r};
  }
};

/// -log sigmoid(beta (c - r) - gamma) of the mean over tokens of log-probabilities, without a reference; smoothed as
/// DPO is. Rewards are beta c and beta r. Meng, Xia, Chen: "SimPO", 2024, eq. 6.
struct simpo {
  double beta = 2;
  double gamma = 1;  ///< the margin of rewards; half of beta is where to begin
  double label_smoothing = 0;

  template <storage T>
  using inputs = policy_pairs<T>;
  void check(std::string_view function) const {
    detail::check_positive(function, "beta", beta);
    detail::check_finite(function, "gamma", gamma);
    detail::check_smoothing(function, label_smoothing);
  }
  template <std::floating_point T>
  MLKIT_RL_INLINE pair_term<T> operator()(const pair_point<T>& x) const noexcept {
    const T b = static_cast<T>(beta);
    const detail::smoothed_logistic<T> s(b * (x.chosen - x.rejected) - static_cast<T>(gamma),
                                         static_cast<T>(label_smoothing));
    return {s.value, b * s.derivative, -b * s.derivative, b * x.chosen, b * x.rejected};
  }
};

/// -nll c - beta log sigmoid(log odds(c) - log odds(r)) of the mean over tokens of log-probabilities, where
/// log odds(x) = x - log(1 - e^x): supervised learning of what was chosen, and the odds of the two, without a
/// reference. Rewards are beta c and beta r. Log-probabilities above -epsilon of T (those of certainty, 0, among them)
/// are taken as -epsilon, where the odds are still finite. Hong, Lee, Thorne: "ORPO", 2024, eq. 6 and 7 (beta is its
/// lambda).
struct orpo {
  double beta = 0.1;
  double nll = 1;  ///< weight of the supervised part; 0 where that is computed elsewhere

  template <storage T>
  using inputs = policy_pairs<T>;
  void check(std::string_view function) const {
    detail::check_positive(function, "beta", beta);
    detail::check_non_negative(function, "nll", nll);
  }
  template <std::floating_point T>
  MLKIT_RL_INLINE pair_term<T> operator()(const pair_point<T>& x) const noexcept {
    constexpr T certain = sizeof(T) == 4 ? T(-0x1p-23) : T(-0x1p-52);
    const T b = static_cast<T>(beta), weight = static_cast<T>(nll);
    const T c = detail::choose(x.chosen > certain, certain, x.chosen);
    const T r = detail::choose(x.rejected > certain, certain, x.rejected);
    const detail::log1mexp<T> not_c(c), not_r(r);
    const detail::log_sigmoid<T> s((c - r) - (not_c.value - not_r.value));
    // d log odds(x) / dx = 1 / (1 - e^x)
    return {-weight * x.chosen - b * s.value, -weight - b * s.derivative / not_c.complement,
            b * s.derivative / not_r.complement, b * x.chosen, b * x.rejected};
  }
};

/// A loss of pairs: a type with `inputs<T>` (reward_pairs, policy_pairs or reference_pairs), check(function), and
/// operator()(pair_point<T>) -> pair_term<T> for float and double. A user's own is used like those above; where it is
/// inlined and has no branches (detail::choose, detail::log_sigmoid), it is vectorised as they are.
template <class L>
concept pair_loss = requires(const L& loss, const pair_point<float>& x) {
  { loss(x) } -> std::same_as<pair_term<float>>;
  typename L::template inputs<float>;
  loss.check(std::string_view{});
};

/// What KTO is given: log-probabilities [n] of completions under policy and reference, and which of them are desirable.
template <storage T>
struct labelled_completions {
  batch_view<const T> log_probs = {}, reference = {};
  batch_flags desirable = {};
};
/// Where gradients by log_probs go, and each completion's loss; what is left out is not written. All [n].
template <storage T>
struct completion_gradients {
  batch_view<T> log_probs = {}, losses = {};
};

/// Of single completions, each desirable or not. With d = log pi - log ref and the reference point z (`kl`):
///   desirable:    desirable_weight (1 - sigmoid(beta (d - z))),
///   undesirable:  undesirable_weight (1 - sigmoid(beta (z - d))).
/// z, from kto_reference_point, is a constant: no gradient goes through it. Ethayarajh et al.: "KTO: Model alignment as
/// prospect theoretic optimization", 2024, eq. 8.
struct kto {
  double beta = 0.1;
  double kl = 0;
  double desirable_weight = 1;  ///< weight times number should be 1 to 4/3 of the undesirable ones'
  double undesirable_weight = 1;

  void check(std::string_view function) const {
    detail::check_positive(function, "beta", beta);
    detail::check_non_negative(function, "kl", kl);
    detail::check_non_negative(function, "desirable_weight", desirable_weight);
    detail::check_non_negative(function, "undesirable_weight", undesirable_weight);
  }
  /// One completion's loss, its derivative, and beta d.
  template <std::floating_point T>
  struct term {
    T loss, d_log_prob, reward;
  };
  template <std::floating_point T>
  MLKIT_RL_INLINE term<T> operator()(T log_prob, T reference, bool desirable) const noexcept {
    const T b = static_cast<T>(beta), d = log_prob - reference;
    const T up = b * (d - static_cast<T>(kl)), z = detail::choose(desirable, up, -up);
    const T weight = detail::choose(desirable, static_cast<T>(desirable_weight), static_cast<T>(undesirable_weight));
    const bool negative = z < 0;
    const T e = detail::exp_of(detail::choose(negative, z, -z)), inverse = T(1) / (T(1) + e);
    const T slope = weight * b * (e * inverse) * inverse;  // of sigmoid(z)
    return {weight * detail::choose(negative, inverse, e * inverse), detail::choose(desirable, -slope, slope), b * d};
  }
};

/// What preference_loss returns for KTO; means are 0 where there is none.
struct kto_stats {
  double loss = 0;
  double desirable_reward = 0, undesirable_reward = 0;  ///< means of beta (log pi - log ref)
  index_t desirable = 0, undesirable = 0;
  double margin() const noexcept { return desirable_reward - undesirable_reward; }
};

/// What the K-wise loss is given: rewards [n] of the completions of prompts, from the best to the worst of each; or in
/// any order, with ranks [n], of which the lowest is the best. Equal ranks are not compared.
template <storage T>
struct ranked_completions {
  batch_view<const T> rewards = {};
  groups of = groups(1);
  vector_view<const std::int32_t> ranks = {};
};
/// Where the gradient by rewards goes; not written if it is left out. [n].
template <storage T>
struct ranked_gradients {
  batch_view<T> rewards = {};
};

/// The mean over prompts of -log sigmoid(better - worse) over all pairs of its K completions / C(K, 2), or the number
/// of pairs where some are not compared. A prompt without a pair is left out. Ouyang et al., 2022, eq. 1.
struct k_wise {};

namespace detail {

inline constexpr int preference_lanes = 16;
inline constexpr index_t preference_chunk = 1024;  // pairs that are summed together, whatever the threads

template <class T>
struct strided {
  T* data = nullptr;
  index_t step = 0;

  strided() = default;
  strided(const vector_view<T>& v) noexcept : data(v.data), step(v.strides[0]) {}
  MLKIT_HOST_DEVICE T* at(index_t i) const noexcept { return data + i * step; }
};

template <class T, class Loss>
struct pair_problem {
  index_t n;
  strided<const T> operands[5];  // those of pair_point in order; null ones are 0
  strided<T> d_chosen, d_rejected, losses;
  T factor;  // of gradients
  const Loss* loss;
};
struct pair_sums {
  double loss = 0, right = 0, chosen = 0, rejected = 0;
};

template <class T>
struct kto_problem {
  index_t n;
  strided<const T> log_probs, reference;
  strided<const std::uint8_t> desirable;
  strided<T> d_log_probs, losses;
  T factor;
  kto loss;
};
struct kto_sums {
  double loss = 0, desirable_reward = 0, undesirable_reward = 0;
  index_t desirable = 0;
};

template <class T>
struct k_wise_problem {
  group_places places;
  strided<const T> rewards;
  strided<const std::int32_t> ranks;  // null: the order
  strided<T> d_rewards;
  double factor;
};
struct k_wise_sums {
  double loss = 0, right = 0, chosen = 0, rejected = 0, pairs = 0;
};

template <class T>
struct sequence_sum_problem {
  sequence_places places;
  stream<const T> log_probs;
  stream<const std::uint8_t> mask;
  bool mean;
};

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::rl

#define MLKIT_FOREACH "../rl/cpu/preference-inl.hpp"
#include "../simd/foreach_isa.hpp"

namespace MLKIT_NAMESPACE::rl {
namespace detail {

template <class T>
constexpr void check_preference_type() {
  static_assert(std::is_floating_point_v<T>, "rl: rewards and log-probabilities of preferences are f32 or f64");
}

// Names an element that is not finite, where there is one.
template <class T>
void check_all_finite(std::string_view function, std::string_view name, const vector_view<const T>& v) {
  const auto kernel = MLKIT_SELECT_WITHOUT_BF16(finite_elements<T>);
  if (!kernel(v.data, v.strides[0], v.extents[0])) name_non_finite(function, name, v, {});
}

template <class T>
void check_read(arguments& call, std::string_view function, std::string_view name, const vector_view<T>& v,
                std::string_view other, index_t n) {
  check_view(function, name, v);
  check_extent(function, name, "elements", v.extents[0], other, n);
  call.reads(name, v);
}
template <class T>
void check_written(arguments& call, std::string_view function, std::string_view name, const vector_view<T>& v,
                   std::string_view other, index_t n) {
  if (!v.data && v.extents[0] == 0) return;
  check_view(function, name, v);
  check_extent(function, name, "elements", v.extents[0], other, n);
  call.writes(name, v);
}

inline double checked_normaliser(std::string_view function, const preference_options& o, index_t n) {
  check_non_negative(function, "normaliser", o.normaliser);
  return o.normaliser > 0 ? o.normaliser : static_cast<double>(std::max<index_t>(n, 1));
}

// f(begin, end) for chunks of [0, n), whose results are added in order.
template <class Sums, class F, class Add>
Sums sum_chunks(const cpu& exec, index_t n, index_t chunk, index_t work, F&& f, Add&& add) {
  const index_t chunks = ceil_div(n, chunk);
  if (chunks <= 1) return f(0, n);
  const workspace<Sums> parts(chunks);
  parallel_ranges(threads_for(exec, work), chunks, [&](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i) parts.data()[i] = f(i * chunk, std::min(n, (i + 1) * chunk));
  });
  Sums all{};
  for (index_t i = 0; i < chunks; ++i) add(all, parts.data()[i]);
  return all;
}

template <class T, class Loss>
preference_stats run_pairs(const cpu& exec, const pair_problem<T, Loss>& p, double normaliser) {
  if (p.n == 0) return {};
  const auto kernel = MLKIT_SELECT_WITHOUT_BF16(pair_losses<T, Loss>);
  const pair_sums s = sum_chunks<pair_sums>(
      exec, p.n, preference_chunk, 4 * p.n, [&](index_t begin, index_t end) { return kernel(p, begin, end); },
      [](pair_sums& a, const pair_sums& b) {
        a.loss += b.loss, a.right += b.right, a.chosen += b.chosen, a.rejected += b.rejected;
      });
  const double count = static_cast<double>(p.n);
  return {s.loss / normaliser, s.right / count, s.chosen / count, s.rejected / count, p.n};
}

template <class T>
kto_stats run_kto(const cpu& exec, const kto_problem<T>& p, double normaliser) {
  if (p.n == 0) return {};
  const auto kernel = MLKIT_SELECT_WITHOUT_BF16(kto_losses<T>);
  const kto_sums s = sum_chunks<kto_sums>(
      exec, p.n, preference_chunk, 4 * p.n, [&](index_t begin, index_t end) { return kernel(p, begin, end); },
      [](kto_sums& a, const kto_sums& b) {
        a.loss += b.loss, a.desirable_reward += b.desirable_reward, a.undesirable_reward += b.undesirable_reward;
        a.desirable += b.desirable;
      });
  const auto mean = [](double sum, index_t count) { return count == 0 ? 0 : sum / static_cast<double>(count); };
  return {s.loss / normaliser, mean(s.desirable_reward, s.desirable), mean(s.undesirable_reward, p.n - s.desirable),
          s.desirable, p.n - s.desirable};
}

template <class T>
void run_sequence_sums(const cpu& exec, const sequence_sum_problem<T>& p, index_t tokens, const batch_view<T>& out) {
  const auto kernel = MLKIT_SELECT_WITHOUT_BF16(sequence_sum<T>);
  parallel_ranges(threads_for(exec, tokens), p.places.sequences, [&](index_t begin, index_t end) {
    for (index_t b = begin; b < end; ++b) out(b) = kernel(p, b);
  });
}
// p has no log_probs.
template <class T>
void run_sequence_slopes(const cpu& exec, const sequence_sum_problem<T>& p, index_t tokens,
                         const batch_view<const T>& d_out, const sequence_view<T>& d_log_probs) {
  const auto counts = [&](index_t row, index_t t) { return !p.mask || *p.mask.at(row, t) != 0; };
  parallel_ranges(threads_for(exec, tokens), p.places.sequences, [&](index_t begin, index_t end) {
    for (index_t b = begin; b < end; ++b) {
      const auto [row, first, count] = p.places(b);
      index_t kept = 0;
      for (index_t t = first; t < first + count; ++t) kept += counts(row, t);
      const T d = p.mean && kept > 0 ? d_out(b) / static_cast<T>(kept) : d_out(b);
      for (index_t t = first; t < first + count; ++t) d_log_probs(row, t) = counts(row, t) ? d : T{};
    }
  });
}

template <class T>
double run_reference_point(by_executor, const cpu& exec, std::string_view function,
                           const vector_view<const T>& log_probs, const vector_view<const T>& reference,
                           const merge_over_ranks& over_ranks) {
  const index_t n = log_probs.extent(0);
  const workspace<double> differences(n);
  for (index_t i = 0; i < n; ++i)
    differences.data()[i] = static_cast<double>(log_probs(i)) - static_cast<double>(reference(i));
  const moments m = checked_moments(exec, function, "(log_probs - reference)",
                                    vector_view<const double>(differences.data(), {n}), mask_view<1>{}, over_ranks);
  return std::max(0.0, m.mean);
}

// normaliser: 0 for the number of prompts that have a pair.
template <class T>
preference_stats run_k_wise(std::string_view function, const cpu& exec, k_wise_problem<T>& p, index_t n,
                            double normaliser) {
  check_all_finite(function, "rewards", vector_view<const T>(p.rewards.data, {n}, {p.rewards.step}));
  const group_places& places = p.places;
  index_t largest = 0, prompts = 0, work = 0;
  for (index_t g = 0; g < places.count; ++g) {
    const index_t begin = places.begin(g), end = places.end(g);
    bool pair = end - begin > 1;
    if (pair && p.ranks.data) {
      pair = false;
      for (index_t i = begin + 1; i < end; ++i) pair = pair || *p.ranks.at(i) != *p.ranks.at(begin);
    }
    prompts += pair;
    largest = std::max(largest, end - begin);
    work += (end - begin) * (end - begin);
  }
  if (normaliser == 0) normaliser = static_cast<double>(std::max<index_t>(prompts, 1));
  p.factor = 1 / normaliser;
  const auto kernel = MLKIT_SELECT_WITHOUT_BF16(k_wise_losses<T>);
  const k_wise_sums s = sum_chunks<k_wise_sums>(
      exec, places.count, std::max<index_t>(1, preference_chunk / std::max<index_t>(1, largest)), work,
      [&](index_t begin, index_t end) {
        const workspace<T> scratch(begin < end ? 2 * (places.end(end - 1) - places.begin(begin)) : 0);
        return begin < end ? kernel(p, begin, end, scratch.data()) : k_wise_sums{};
      },
      [](k_wise_sums& a, const k_wise_sums& b) {
        a.loss += b.loss, a.right += b.right, a.chosen += b.chosen, a.rejected += b.rejected, a.pairs += b.pairs;
      });
  const double pairs = std::max(s.pairs, 1.0);
  return {s.loss / normaliser, s.right / pairs, s.chosen / pairs, s.rejected / pairs, static_cast<index_t>(s.pairs)};
}

}  // namespace detail

/// The mean over pairs of `loss`: bradley_terry of a reward model, dpo, ipo, orpo or simpo of a policy, or a user's own
/// pair_loss; its gradients by what the policy or the model gave, and statistics:
///   rl::preference_loss(exec, {.chosen = c, .rejected = r, .reference_chosen = cr, .reference_rejected = rr},
///                       rl::dpo{.beta = 0.1}, {.chosen = dc, .rejected = dr});
/// What a loss does not take does not compile. No pair: everything is 0.
///
/// f32 and f64, computed in that type, within a few units in the last place of its formula at any size of arguments;
/// the same bits for any number of threads. Throws shape_error where extents do not fit or outputs overlap what is
/// read, value_error for options out of range and for an element that is not finite, named by its index, before
/// anything is written. 64 pairs take less than a microsecond; many are bound by memory.
/// With a mlkit::cuda statistics are a device_value, which waits where it is asked for, and elements that are not
/// finite are not refused.
template <storage T = float, executor Executor, pair_loss Loss>
detail::result_t<Executor, preference_stats> preference_loss(
    const Executor& exec, const typename Loss::template inputs<std::type_identity_t<T>>& in, const Loss& loss,
    const preference_options& o, const pair_gradients<std::type_identity_t<T>>& out) {
  constexpr std::string_view function = "rl::preference_loss";
  detail::check_preference_type<T>();
  detail::arguments call(function, exec);
  loss.check(function);
  const index_t n = in.chosen.extent(0);
  detail::pair_problem<T, Loss> p{};
  in.each_operand([&](int at, std::string_view name, const vector_view<const T>& v, bool needed) {
    if (!needed && !v.data && v.extents[0] == 0) return;
    detail::check_read(call, function, name, v, "chosen", n);
    p.operands[at] = v;
  });
  detail::check_written(call, function, "gradients.chosen", out.chosen, "chosen", n);
  detail::check_written(call, function, "gradients.rejected", out.rejected, "chosen", n);
  detail::check_written(call, function, "losses", out.losses, "chosen", n);
  const double normaliser = detail::checked_normaliser(function, o, n);
  if constexpr (detail::looks_at_data<Executor>)
    in.each_operand([&](int, std::string_view name, const vector_view<const T>& v, bool) {
      detail::check_all_finite(function, name, v);
    });
  p.n = n;
  p.d_chosen = out.chosen, p.d_rejected = out.rejected, p.losses = out.losses;
  p.factor = static_cast<T>(1 / normaliser);
  p.loss = &loss;
  return run_pairs(exec, p, normaliser);
}
template <storage T = float, executor Executor, pair_loss Loss>
detail::result_t<Executor, preference_stats> preference_loss(
    const Executor& exec, const typename Loss::template inputs<std::type_identity_t<T>>& in, const Loss& loss,
    const pair_gradients<std::type_identity_t<T>>& out = {}) {
  return preference_loss<T>(exec, in, loss, preference_options{}, out);
}

/// The mean over completions of KTO's loss, its gradient by log_probs, and statistics; as the above otherwise.
template <storage T = float, executor Executor>
detail::result_t<Executor, kto_stats> preference_loss(const Executor& exec,
                                                      const labelled_completions<std::type_identity_t<T>>& in,
                                                      const kto& loss, const preference_options& o,
                                                      const completion_gradients<std::type_identity_t<T>>& out) {
  constexpr std::string_view function = "rl::preference_loss";
  detail::check_preference_type<T>();
  detail::arguments call(function, exec);
  loss.check(function);
  const index_t n = in.log_probs.extent(0);
  detail::check_read(call, function, "log_probs", in.log_probs, "log_probs", n);
  detail::check_read(call, function, "reference", in.reference, "log_probs", n);
  detail::check_read(call, function, "desirable", in.desirable, "log_probs", n);
  detail::check_written(call, function, "gradients.log_probs", out.log_probs, "log_probs", n);
  detail::check_written(call, function, "losses", out.losses, "log_probs", n);
  const double normaliser = detail::checked_normaliser(function, o, n);
  if constexpr (detail::looks_at_data<Executor>) {
    detail::check_all_finite(function, "log_probs", in.log_probs);
    detail::check_all_finite(function, "reference", in.reference);
  }
  const detail::kto_problem<T> p{
      n, in.log_probs, in.reference, in.desirable, out.log_probs, out.losses, static_cast<T>(1 / normaliser), loss};
  return run_kto(exec, p, normaliser);
}
template <storage T = float, executor Executor>
detail::result_t<Executor, kto_stats> preference_loss(const Executor& exec,
                                                      const labelled_completions<std::type_identity_t<T>>& in,
                                                      const kto& loss,
                                                      const completion_gradients<std::type_identity_t<T>>& out = {}) {
  return preference_loss<T>(exec, in, loss, preference_options{}, out);
}

/// KTO's reference point: the mean of log pi - log ref over completions [n] that belong to other prompts, not below 0;
/// over those of all ranks with over_ranks (as whiten has it). 0 where there is none. Throws as preference_loss.
/// With a mlkit::cuda it is a device_value, which waits where it is asked for, and NaN where an element is not finite;
/// over_ranks waits for the stream.
template <storage T = float, executor Executor>
detail::result_t<Executor, double> kto_reference_point(const Executor& exec,
                                                       const batch_view<const std::type_identity_t<T>>& log_probs,
                                                       const batch_view<const std::type_identity_t<T>>& reference,
                                                       const merge_over_ranks& over_ranks = {}) {
  constexpr std::string_view function = "rl::kto_reference_point";
  detail::check_preference_type<T>();
  detail::arguments call(function, exec);
  const index_t n = log_probs.extent(0);
  detail::check_read(call, function, "log_probs", log_probs, "log_probs", n);
  detail::check_read(call, function, "reference", reference, "log_probs", n);
  return run_reference_point(detail::by_executor{}, exec, function, vector_view<const T>(log_probs),
                             vector_view<const T>(reference), over_ranks);
}

/// The K-wise loss of ranked completions, its gradient by rewards, and statistics over pairs; as the above otherwise.
/// K (K - 1) / 2 logarithms a prompt. normaliser stands for the number of prompts. Also throws as group_advantages does
/// for groups.
/// With a mlkit::cuda each pair takes two logarithms, and offsets are held within the rewards.
template <storage T = float, executor Executor>
detail::result_t<Executor, preference_stats> preference_loss(const Executor& exec,
                                                             const ranked_completions<std::type_identity_t<T>>& in,
                                                             const k_wise&, const preference_options& o,
                                                             const ranked_gradients<std::type_identity_t<T>>& out) {
  constexpr std::string_view function = "rl::preference_loss";
  detail::check_preference_type<T>();
  detail::arguments call(function, exec);
  const index_t n = in.rewards.extent(0);
  detail::check_read(call, function, "rewards", in.rewards, "rewards", n);
  const detail::group_places places =
      detail::check_groups(call, function, in.of, "rewards", n, detail::looks_at_data<Executor>);
  if (in.ranks.data || in.ranks.extent(0) != 0) detail::check_read(call, function, "ranks", in.ranks, "rewards", n);
  detail::check_written(call, function, "gradients.rewards", out.rewards, "rewards", n);
  detail::check_non_negative(function, "normaliser", o.normaliser);
  detail::k_wise_problem<T> p{places, in.rewards, in.ranks, out.rewards, 0};
  return run_k_wise(function, exec, p, n, o.normaliser);
}
template <storage T = float, executor Executor>
detail::result_t<Executor, preference_stats> preference_loss(
    const Executor& exec, const ranked_completions<std::type_identity_t<T>>& in, const k_wise& loss,
    const ranked_gradients<std::type_identity_t<T>>& out = {}) {
  return preference_loss<T>(exec, in, loss, preference_options{}, out);
}

/// What becomes of the log-probabilities of a sequence's tokens: their sum for dpo and kto, their mean for ipo, orpo
/// and simpo.
enum class sequence_reduction { sum, mean };

/// Log-probabilities of tokens, [batch, time], or the [tokens] of packed sequences with cu_seqlens, without which they
/// are one sequence.
template <storage T = float>
struct token_batch {
  sequence_view<const T> log_probs = {};
  flag_view mask = {};              ///< tokens that count, those of the completion; without it all do
  sequence_starts cu_seqlens = {};  ///< [batch + 1] starts of packed sequences
};

/// out[b] = the sum or the mean of log_probs[b, t] over the tokens that count; 0 where there is none. out [batch].
/// f32 and f64; sums in T, in an order that the shape decides. Throws shape_error where extents do not fit, value_error
/// for cu_seqlens that are none. Reads log_probs once.
template <storage T = float, executor Executor>
void sequence_log_probs(const Executor& exec, const token_batch<T>& in, sequence_reduction reduction,
                        const batch_view<std::type_identity_t<T>>& out) {
  constexpr std::string_view function = "rl::sequence_log_probs";
  detail::check_preference_type<T>();
  detail::arguments call(function, exec);
  detail::step_arguments steps(call, function, detail::looks_at_data<Executor>);
  const detail::sequence_places places = steps.first("log_probs", in.log_probs, in.cu_seqlens);
  steps.read("log_probs", in.log_probs);
  steps.read_optional("mask", in.mask);
  steps.write_batch("out", out);
  const detail::sequence_sum_problem<T> p{places, in.log_probs, in.mask, reduction == sequence_reduction::mean};
  run_sequence_sums(exec, p, in.log_probs.size(), out);
}

/// d_log_probs[b, t] = d_out[b], over the number of tokens for the mean, for tokens that count, 0 for others: what the
/// gradient of a preference loss by chosen or rejected becomes for tokens. in.log_probs is not read and may be left
/// out.
template <storage T = float, executor Executor>
void sequence_log_probs_backward(const Executor& exec, const token_batch<T>& in, sequence_reduction reduction,
                                 const batch_view<const std::type_identity_t<T>>& d_out,
                                 const sequence_view<std::type_identity_t<T>>& d_log_probs) {
  constexpr std::string_view function = "rl::sequence_log_probs_backward";
  detail::check_preference_type<T>();
  detail::arguments call(function, exec);
  detail::step_arguments steps(call, function, detail::looks_at_data<Executor>);
  const detail::sequence_places places = steps.first("d_log_probs", d_log_probs, in.cu_seqlens);
  steps.read_optional("mask", in.mask);
  steps.read_batch("d_out", d_out);
  steps.write("d_log_probs", d_log_probs);
  const detail::sequence_sum_problem<T> p{places, {}, in.mask, reduction == sequence_reduction::mean};
  run_sequence_slopes(exec, p, d_log_probs.size(), d_out, d_log_probs);
}

}  // namespace MLKIT_NAMESPACE::rl
