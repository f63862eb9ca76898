// Advantages of completions among those of the same prompt, and the best of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "../core/starts.hpp"
#include "moments.hpp"
#include "options.hpp"

namespace MLKIT_NAMESPACE::rl {

/// Which completions belong to one prompt: `size` in a row to each, or those that `offsets` [prompts + 1] separate:
/// groups{8}, groups{starts}. It owns nothing.
struct groups {
  static constexpr index_t of_offsets = std::numeric_limits<index_t>::min();  ///< the size where there are offsets
  index_t size = of_offsets;
  vector_view<const std::int32_t> offsets = {};

  explicit groups(index_t of_each) noexcept : size(of_each) {}
  template <std::ranges::contiguous_range R>
    requires std::same_as<std::ranges::range_value_t<R>, std::int32_t>
  explicit groups(const R& starts) noexcept
      : offsets(std::ranges::data(starts), {static_cast<index_t>(std::ranges::size(starts))}) {}
  explicit groups(const vector_view<const std::int32_t>& starts) noexcept : offsets(starts) {}
};

/// (r - mean) / (deviation + epsilon), both of the group. A group of one, or of equal rewards, gets 0. Shao et al.:
/// "DeepSeekMath", 2024, section 4.1.2; TRL's epsilon and torch's deviation.
struct grpo {
  double epsilon = 1e-4;
  variance_of variance = variance_of::sample;
};

/// r - mean of the group: without the division, which weighs prompts by how hard they are. A group of one gets 0. Liu
/// et al.: "Understanding R1-Zero-like training", 2025, section 3.2.
struct dr_grpo {};

/// r - mean of the others of the group = (n r - sum) / (n - 1). A group of one, which has no others, gets 0. Ahmadian
/// et al.: "Back to basics: revisiting REINFORCE-style optimization", 2024, section 3.3; Kool, van Hoof, Welling, 2019.
struct rloo {};

/// (r - mean of the group) / (deviation + epsilon), the deviation that of what remains of the whole batch: one scale
/// for all prompts. With group_baseline = false the batch's mean takes the place of the group's, and groups play no
/// part. Hu: "REINFORCE++", 2025. Its penalty for each token is rl::kl_rewards' part.
struct reinforce_pp {
  double epsilon = 1e-8;
  variance_of variance = variance_of::sample;
  bool group_baseline = true;
  merge_over_ranks over_ranks = {};  ///< none: the batch of this rank alone
};

namespace detail {

struct group_places {
  index_t count, size;
  vector_view<const std::int32_t> offsets;

  index_t begin(index_t g) const noexcept { return offsets.data ? offsets(g) : g * size; }
  index_t end(index_t g) const noexcept { return begin(g + 1); }
};

inline group_places check_groups(arguments& call, std::string_view function, const groups& g, std::string_view of,
                                 index_t n, bool on_host = true) {
  if (g.size == groups::of_offsets) {
    if (on_host) {
      mlkit::detail::check_starts(function, "offsets", g.offsets, message(of, " has"), n, "elements");
    } else {
      check_view(function, "offsets", g.offsets);
      if (g.offsets.extent(0) == 0)
        fail_shape(function, ": offsets is empty; it has one element more than there are groups");
    }
    call.reads("offsets", g.offsets);
    return {g.offsets.extent(0) - 1, 0, g.offsets};
  }
  if (g.size < 1) fail_value(function, ": groups of ", g.size, " elements");
  if (n % g.size != 0)
    fail_shape(function, ": ", of, " has ", n, " elements, which is no multiple of groups of ", g.size);
  return {n / g.size, g.size, {}};
}

template <class T>
moments moments_of_group(const vector_view<const T>& r, index_t begin, index_t end) noexcept {
  const index_t n = end - begin;
  if (n == 0) return {};
  const double first = static_cast<double>(r(begin));  // so that equal rewards deviate by nothing
  double sum = 0, m2 = 0;
  for (index_t i = begin; i < end; ++i) sum += static_cast<double>(r(i)) - first;
  const double mean = first + sum / static_cast<double>(n);
  for (index_t i = begin; i < end; ++i) {
    const double d = static_cast<double>(r(i)) - mean;
    m2 += d * d;
  }
  return {n, mean, m2};
}

template <class T>
void write_advantages(const cpu& exec, const vector_view<const T>& r, const group_places& places, const auto& of_group,
                      const vector_view<T>& out) {
  parallel_ranges(threads_for(exec, r.extent(0)), places.count, [&](index_t begin, index_t end) {
    for (index_t g = begin; g < end; ++g) {
      const index_t first = places.begin(g), last = places.end(g);
      const auto advantage = of_group(moments_of_group(r, first, last));
      for (index_t i = first; i < last; ++i) out(i) = static_cast<T>(advantage(static_cast<double>(r(i))));
    }
  });
}

template <class T, class I>
void find_best(std::string_view function, const cpu&, const vector_view<const T>& r, const group_places& places,
               const vector_view<I>& best) {
  for (index_t g = 0; g < places.count; ++g)
    if (places.begin(g) == places.end(g)) fail_value(function, ": group ", g, " is empty");
  name_non_finite(function, "rewards", r, {});
  for (index_t g = 0; g < places.count; ++g) {
    index_t at = places.begin(g);
    for (index_t i = at; i < places.end(g); ++i)
      if (static_cast<double>(r(i)) > static_cast<double>(r(at))) at = i;
    best(g) = static_cast<I>(at);
  }
}

// 1 / (deviation + epsilon), or 0 where nothing deviates.
inline double inverse_deviation(const moments& m, variance_of kind, double epsilon) noexcept {
  const double variance = m.variance(kind);
  return variance > 0 ? 1 / (std::sqrt(variance) + epsilon) : 0;
}

template <class T>
void advantages_of(const cpu& exec, std::string_view function, const vector_view<const T>& r,
                   const group_places& places, const grpo& o, const vector_view<T>& out) {
  check_non_negative(function, "epsilon", o.epsilon);
  write_advantages(
      exec, r, places,
      [&](const moments& m) {
        return [mean = m.mean, factor = inverse_deviation(m, o.variance, o.epsilon)](double x) {
          return (x - mean) * factor;
        };
      },
      out);
}
template <class T>
void advantages_of(const cpu& exec, std::string_view, const vector_view<const T>& r, const group_places& places,
                   const dr_grpo&, const vector_view<T>& out) {
  write_advantages(
      exec, r, places, [](const moments& m) { return [mean = m.mean](double x) { return x - mean; }; }, out);
}
template <class T>
void advantages_of(const cpu& exec, std::string_view, const vector_view<const T>& r, const group_places& places,
                   const rloo&, const vector_view<T>& out) {
  write_advantages(
      exec, r, places,
      [](const moments& m) {
        const double n = static_cast<double>(m.count);
        return [mean = m.mean, factor = n > 1 ? n / (n - 1) : 0](double x) { return (x - mean) * factor; };
      },
      out);
}
template <class T>
void advantages_of(const cpu& exec, std::string_view function, const vector_view<const T>& r,
                   const group_places& places, const reinforce_pp& o, const vector_view<T>& out) {
  check_non_negative(function, "epsilon", o.epsilon);
  const index_t n = r.extent(0);
  const workspace<double> centered(n);
  double* x = centered.data();
  for (index_t g = 0; g < places.count; ++g) {
    const index_t first = places.begin(g), last = places.end(g);
    const double mean = o.group_baseline ? moments_of_group(r, first, last).mean : 0;
    for (index_t i = first; i < last; ++i) x[i] = static_cast<double>(r(i)) - mean;
  }
  const moments m =
      checked_moments(exec, function, "rewards", vector_view<const double>(x, {n}), mask_view<1>{}, o.over_ranks);
  const double factor = inverse_deviation(m, o.variance, o.epsilon);
  for (index_t i = 0; i < n; ++i) out(i) = static_cast<T>((x[i] - m.mean) * factor);
}

}  // namespace detail

/// advantages[i] of completion i from rewards [n] of one completion each, among those of its group, by `method`: grpo,
/// dr_grpo, rloo or reinforce_pp. What all tokens of a completion share: a view with stride 0 along time gives it to
/// each of them. advantages may be rewards.
///
/// An empty group has no advantages. Computed in f64; the same bits for any number of threads. f32 and f64. Throws
/// shape_error where rewards are no multiple of the groups' size, value_error for offsets that are none, a size below
/// 1, an epsilon that is negative, and rewards that are not finite, named by their index, before advantages are
/// touched.
/// With a mlkit::cuda rewards that are not finite make the advantages of their group so (of the batch, for
/// reinforce_pp); offsets are held within the rewards; over_ranks waits for the stream.
template <executor Executor, viewable<1> R, class Method, viewable<1> Out>
void group_advantages(const Executor& exec, const R& rewards, const groups& of, const Method& method,
                      Out&& advantages) {
  constexpr std::string_view function = "rl::group_advantages";
  using T = element_t<const R>;
  static_assert(std::is_floating_point_v<T> && std::is_same_v<T, element_t<std::remove_reference_t<Out>>>,
                "rl: rewards and advantages are both f32, or both f64");
  const vector_view<const T> r = as_view(rewards);
  const vector_view<T> out = as_view(advantages);
  detail::arguments call(function, exec);
  detail::check_view(function, "rewards", r);
  const detail::group_places places =
      detail::check_groups(call, function, of, "rewards", r.extent(0), detail::looks_at_data<Executor>);
  detail::check_view(function, "advantages", out);
  detail::check_extent(function, "advantages", "elements", out.extent(0), "rewards", r.extent(0));
  if (!detail::same_elements(r, out)) call.reads("rewards", r);
  call.writes("advantages", out);
  if constexpr (detail::looks_at_data<Executor>) detail::name_non_finite(function, "rewards", r, {});
  advantages_of(exec, function, r, places, method, out);
}

/// best[g] = the index in rewards [n] of the largest reward of group g, the first of equal ones. best is a view of
/// integers, or a contiguous container or span of them, one for each group. Throws as group_advantages, and value_error
/// for an empty group, which has no best, before best is touched. How far sampling the best of n moves from the policy:
/// log n - (n - 1) / n at most (best_of_n_kl).
/// With a mlkit::cuda NaN is passed over, and a group that has nothing else gets -1.
template <executor Executor, viewable<1> R, std::integral I>
void best_of_n(const Executor& exec, const R& rewards, const groups& of, const vector_view<I>& best) {
  constexpr std::string_view function = "rl::best_of_n";
  using T = element_t<const R>;
  const vector_view<const T> r = as_view(rewards);
  detail::arguments call(function, exec);
  detail::check_view(function, "rewards", r);
  const detail::group_places places =
      detail::check_groups(call, function, of, "rewards", r.extent(0), detail::looks_at_data<Executor>);
  detail::check_view(function, "best", best);
  detail::check_extent(function, "best", "elements", best.extent(0), "the number of groups", places.count);
  call.reads("rewards", r);
  call.writes("best", best);
  if (static_cast<std::uint64_t>(r.extent(0)) > static_cast<std::uint64_t>(std::numeric_limits<I>::max()))
    detail::fail_value(function, ": best cannot hold an index of ", r.extent(0), " rewards");
  find_best(function, exec, r, places, best);
}
template <executor Executor, viewable<1> R, std::ranges::contiguous_range Best>
  requires std::integral<std::ranges::range_value_t<Best>>
void best_of_n(const Executor& exec, const R& rewards, const groups& of, Best&& best) {
  best_of_n(exec, rewards, of,
            vector_view<std::ranges::range_value_t<Best>>(std::ranges::data(best),
                                                          {static_cast<index_t>(std::ranges::size(best))}));
}

/// log n - (n - 1) / n: the divergence from the policy of the best of n samples, an upper bound that is tight where no
/// completion is likely. Stiennon et al.: "Learning to summarize from human feedback", 2020, appendix G.3; Beirami et
/// al., 2024. n is 1 or more.
inline double best_of_n_kl(index_t n) {
  if (n < 1) detail::fail_value("rl::best_of_n_kl: n = ", n, " is less than 1");
  return std::log(static_cast<double>(n)) - static_cast<double>(n - 1) / static_cast<double>(n);
}

}  // namespace MLKIT_NAMESPACE::rl
