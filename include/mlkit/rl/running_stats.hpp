// Running mean and variance: of observations, each column its own, and of discounted returns, which rewards are
// divided by.
#pragma once

#include <span>
#include <vector>

#include "moments.hpp"
#include "options.hpp"

namespace MLKIT_NAMESPACE::rl {

/// How running_stats normalises.
struct normalize_options {
  double epsilon = 1e-8;  ///< added to the variance
  double clip = 10;       ///< results beyond +-clip become +-clip; infinity: none do
  bool center = true;     ///< false: the mean stays in
};

namespace detail {

template <class T>
struct columns_problem {
  tensor_view<const T, 2> x;  // [rows, columns], columns beside each other
  tensor_view<const std::uint8_t, 1> mask;
};

template <class T, class Out>
struct normalize_problem {
  tensor_view<const T, 2> x;
  tensor_view<Out, 2> out;
  // y = ((scale x - mean) - mean_rest) factor within +-clip; [columns] each; the mean, times scale, in two parts.
  const accumulator_t<T>*mean, *mean_rest, *factor;
  accumulator_t<T> scale, clip;  // the scale as in whiten_problem
};

inline constexpr index_t columns_together = 64, elements_together = 1 << 14, narrow_columns = 8;

template <class T>
void check_columns(std::string_view function, const tensor_view<const T, 2>& x, index_t columns) {
  check_view(function, "x", x);
  check_extent(function, "x", "columns", x.extent(1), "this", columns);
}
template <class T>
void check_rows_to_take_in(arguments& call, std::string_view function, const tensor_view<const T, 2>& x,
                           const mask_view<1>& mask, index_t columns) {
  check_columns(function, x, columns);
  check_mask(call, function, mask, "a column of x", {x.extent(0)});
  call.reads("x", x);
}
template <class T, class Out>
void check_normalized(arguments& call, std::string_view function, std::string_view name,
                      const tensor_view<const T, 2>& x, const normalize_options& o, const tensor_view<Out, 2>& out) {
  check_output(function, "out", out);
  check_same_shape<2>(function, "out", out.extents, name, x.extents);
  check_non_negative(function, "epsilon", o.epsilon);
  if (!(o.clip > 0)) fail_value(function, ": clip = ", o.clip, " is not positive");
  if (!same_elements(x, out)) call.reads(name, x);
  call.writes("out", out);
}
template <class T>
void check_rewards_to_take_in(arguments& call, std::string_view function, const tensor_view<const T, 2>& rewards,
                              const mask_view<2>& ended, index_t environments) {
  check_view(function, "rewards", rewards);
  check_extent(function, "rewards", "rows", rewards.extent(0), "environments", environments);
  check_same_shape<2>(function, "ended", ended.values.extents, "rewards", rewards.extents);
  check_view(function, "ended", ended.values);
  call.reads("rewards", rewards);
  call.reads("ended", ended.values);
}

// Rows whose moments are found together: they stay in the second cache for the second pass.
inline index_t chunk_rows(index_t columns) noexcept {
  return elements_together / std::min(columns_together, round_up(columns, 16));
}

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::rl

#define MLKIT_FOREACH "../rl/cpu/running_stats-inl.hpp"
#include "../simd/foreach_isa.hpp"

namespace MLKIT_NAMESPACE::rl {

/// Mean and variance of each of so many columns, over all rows that it was shown: of observations, or with one column
/// of rewards. Kept in f64, and merged as `merge` of moments has it, so that they do not drift with the count. Movable
/// and copyable. Its functions take a mlkit::cpu; device_running_stats (rl.cuh) is the same in a GPU's memory.
///
/// Before any row the mean is 0 and the variance 1. Welford: "Note on a method for calculating corrected sums of
/// squares and products", 1962; merged as in Chan, Golub, LeVeque, 1979.
class running_stats {
 public:
  explicit running_stats(index_t columns = 1) {
    if (columns < 1) detail::fail_value("rl::running_stats: columns = ", columns, " is less than 1");
    columns_.resize(static_cast<std::size_t>(columns));
  }

  index_t columns() const noexcept { return static_cast<index_t>(columns_.size()); }
  index_t count() const noexcept { return columns_[0].count; }
  double mean(index_t column = 0) const noexcept { return columns_[static_cast<std::size_t>(column)].mean; }
  double variance(index_t column = 0) const noexcept {
    const moments& m = columns_[static_cast<std::size_t>(column)];
    return m.count == 0 ? 1 : m.variance();
  }
  /// What it is made of, for files and other ranks; all columns have the same count.
  std::span<const moments> state() const noexcept { return columns_; }
  /// Takes back what state() gave. Throws shape_error for another number of columns, value_error for what is none.
  void restore(std::span<const moments> state) {
    constexpr std::string_view function = "rl::running_stats::restore";
    check(function, state);
    columns_ = std::vector<moments>(state.begin(), state.end());  // `state` may be its own
  }
  /// As if the rows behind `state` had been shown too: those of another rank, or of another running_stats.
  void merge(std::span<const moments> state) {
    constexpr std::string_view function = "rl::running_stats::merge";
    check(function, state);
    take_in(function, std::vector<moments>(state.begin(), state.end()));
  }

  /// Takes in the rows of x [rows, columns] that the mask [rows] keeps. f32, f64, bf16 and f16; sums as find_moments
  /// has them, the same bits for any number of threads. Throws shape_error where extents do not fit, value_error for an
  /// element that counts and is not finite, named by its index, and for a variance above the largest f64; then nothing
  /// is taken in. Reads x once.
  template <executor Executor, viewable<2> X>
  void update(const Executor& exec, const X& x, const mask_view<1>& mask = {}) {
    constexpr std::string_view function = "rl::running_stats::update";
    detail::only_on_cpu<Executor>();
    using T = element_t<const X>;
    const tensor_view<const T, 2> v = as_view(x);
    detail::arguments call(function, exec);
    detail::check_rows_to_take_in(call, function, v, mask, columns());
    if (v.empty()) return;
    std::vector<moments> seen(columns_.size());
    find_columns(exec, v, mask, seen.data());
    for (std::size_t c = 0; c < seen.size(); ++c)
      if (!detail::all_finite(seen[c])) refuse(function, v, mask);
    take_in(function, std::move(seen));
  }

  /// out = clip((x - mean) / sqrt(variance + epsilon)), [rows, columns] each; out may be x. A column that has had one
  /// value only divides by sqrt(epsilon), and by 1 if that is 0 too. f32, f64, bf16 and f16. Throws shape_error where
  /// extents do not fit, value_error for options out of range. Reads x and writes out once.
  template <executor Executor, viewable<2> X, viewable<2> Out>
  void normalize(const Executor& exec, const X& x, const normalize_options& o, Out&& output) const {
    constexpr std::string_view function = "rl::running_stats::normalize";
    detail::only_on_cpu<Executor>();
    using T = element_t<const X>;
    using O = element_t<std::remove_reference_t<Out>>;
    using A = accumulator_t<T>;
    const tensor_view<const T, 2> v = as_view(x);
    const tensor_view<O, 2> out = as_view(output);
    detail::arguments call(function, exec);
    detail::check_columns(function, v, columns());
    detail::check_normalized(call, function, "x", v, o, out);
    if (v.empty()) return;
    const index_t n = columns();
    const detail::workspace<A> parts(3 * n);
    A *mean = parts.data(), *rest = mean + n, *factor = rest + n;
    constexpr double most = static_cast<double>(std::numeric_limits<A>::max());
    double scale = 1;
    for (index_t c = 0; c < n; ++c)
      if (std::sqrt(variance(c)) > most / 64) scale = 0x1p-4;  // so that x - mean may be above the largest f32
    for (index_t c = 0; c < n; ++c) {
      const double of_column = scale * (o.center ? this->mean(c) : 0), square = variance(c) + o.epsilon;
      mean[c] = static_cast<A>(of_column);
      rest[c] = static_cast<A>(of_column - static_cast<double>(mean[c]));
      factor[c] = static_cast<A>(std::min((square > 0 ? 1 / std::sqrt(square) : 1) / scale, most));
    }
    const detail::normalize_problem<T, O> p{v, out, mean, rest, factor, static_cast<A>(scale), static_cast<A>(o.clip)};
    const auto kernel = MLKIT_SELECT_WITHOUT_BF16(normalize_rows<T, O>);
    detail::parallel_ranges(detail::threads_for(exec, v.size()), v.extent(0),
                            [&](index_t begin, index_t end) { kernel(p, begin, end); });
  }

 private:
  // All columns or, where one would not be finite any more, none.
  void take_in(std::string_view function, std::vector<moments> seen) {
    for (std::size_t c = 0; c < seen.size(); ++c) {
      seen[c] = rl::merge(columns_[c], seen[c]);
      if (!detail::all_finite(seen[c]))
        detail::fail_value(function, ": the sum of squares of column ", c, " is above the largest f64");
    }
    columns_ = std::move(seen);
  }
  void check(std::string_view function, std::span<const moments> state) const {
    detail::check_extent(function, "state", "columns", static_cast<index_t>(state.size()), "this", columns());
    for (std::size_t c = 0; c < state.size(); ++c) {
      if (state[c].count != state[0].count)
        detail::fail_value(function, ": state[", c, "] has count ", state[c].count, ", but state[0] has ",
                           state[0].count);
      if (state[c].count < 0 || !detail::all_finite(state[c]) || state[c].m2 < 0)
        detail::fail_value(function, ": state[", c, "] has count ", state[c].count, ", mean ", state[c].mean, ", m2 ",
                           state[c].m2);
    }
  }

  // The moments of each column, of chunks of rows that the shape alone decides.
  template <class T>
  static void find_columns(const cpu& exec, const tensor_view<const T, 2>& x, const mask_view<1>& mask, moments* to) {
    const index_t n = x.extent(1);
    if (n < detail::narrow_columns || x.strides[1] != 1) {
      for (index_t c = 0; c < n; ++c) {
        const vector_view<const T> column(x.data + c * x.strides[1], {x.extent(0)}, {x.strides[0]});
        to[c] = detail::run_moments(exec, detail::plan_moments(column, mask));
      }
      return;
    }
    const detail::columns_problem<T> p{x, mask.values};
    const index_t rows = detail::chunk_rows(n), chunks = detail::ceil_div(x.extent(0), rows);
    const detail::workspace<moments> parts(chunks * n);
    const auto kernel = MLKIT_SELECT_WITHOUT_BF16(column_moments<T>);
    detail::parallel_ranges(detail::threads_for(exec, x.size()), chunks, [&](index_t begin, index_t end) {
      for (index_t i = begin; i < end; ++i)
        kernel(p, i * rows, std::min(x.extent(0), (i + 1) * rows), parts.data() + i * n);
    });
    for (index_t i = 0; i < chunks; ++i)
      for (index_t c = 0; c < n; ++c) to[c] = rl::merge(to[c], parts.data()[i * n + c]);
  }

  template <class T>
  [[noreturn]] static void refuse(std::string_view function, const tensor_view<const T, 2>& x,
                                  const mask_view<1>& mask) {
    mask_view<2> of_rows;
    if (mask) of_rows.values = {mask.values.data, x.extents, {mask.values.strides[0], 0}};
    detail::name_non_finite(function, "x", x, of_rows);
    detail::fail_value(function, ": squares of x are above the largest f64");
  }

  std::vector<moments> columns_;
};

/// Rewards divided by the running deviation of their discounted return, so that values have a size near 1 whatever the
/// unit of rewards: keeps of each of `environments` the return so far,
///   R = gamma R + r,  which becomes 0 after a step that ends an episode,
/// and the moments of all R. The mean stays in rewards. Engstrom et al.: "Implementation matters in deep policy
/// gradients", 2020, section 3; OpenAI Baselines' VecNormalize.
/// On a GPU: device_reward_scaling (rl.cuh).
class reward_scaling {
 public:
  /// Throws value_error for gamma outside [0, 1], or no environment.
  explicit reward_scaling(index_t environments, double gamma = 0.99) : gamma_(gamma) {
    if (environments < 1) detail::fail_value("rl::reward_scaling: environments = ", environments, " is less than 1");
    detail::check_unit_interval("rl::reward_scaling", "gamma", gamma);
    returns_.resize(static_cast<std::size_t>(environments));
  }

  double gamma() const noexcept { return gamma_; }
  const running_stats& stats() const noexcept { return stats_; }
  /// R of each environment.
  std::span<const double> returns() const noexcept { return returns_; }
  /// Takes back what stats().state() and returns() gave.
  void restore(std::span<const moments> state, std::span<const double> returns) {
    constexpr std::string_view function = "rl::reward_scaling::restore";
    detail::check_extent(function, "returns", "elements", static_cast<index_t>(returns.size()), "this",
                         static_cast<index_t>(returns_.size()));
    detail::name_non_finite(function, "returns",
                            vector_view<const double>(returns.data(), {static_cast<index_t>(returns.size())}), {});
    stats_.restore(state);
    returns_ = std::vector<double>(returns.begin(), returns.end());
  }

  /// Takes in rewards [environments, time]; `ended` [environments, time] is set at steps that were the last of their
  /// episode, terminated or truncated. Throws shape_error where extents do not fit, value_error for a reward that is
  /// not finite, named by its index; then nothing is taken in.
  template <executor Executor, viewable<2> R>
  void update(const Executor& exec, const R& rewards, const mask_view<2>& ended) {
    constexpr std::string_view function = "rl::reward_scaling::update";
    detail::only_on_cpu<Executor>();
    using T = element_t<const R>;
    const tensor_view<const T, 2> r = as_view(rewards);
    detail::arguments call(function, exec);
    detail::check_rewards_to_take_in(call, function, r, ended, static_cast<index_t>(returns_.size()));
    detail::name_non_finite(function, "rewards", r, {});
    if (r.empty()) return;
    const index_t environments = r.extent(0), time = r.extent(1);
    std::vector<double> now = returns_;
    const detail::workspace<double> all(r.size());
    detail::parallel_ranges(detail::threads_for(exec, r.size()), environments, [&](index_t begin, index_t end) {
      for (index_t b = begin; b < end; ++b) {
        double& at = now[static_cast<std::size_t>(b)];
        for (index_t t = 0; t < time; ++t) {
          at = gamma_ * at + static_cast<double>(r(b, t));
          all.data()[b * time + t] = at;
          if (ended.values(b, t)) at = 0;
        }
      }
    });
    stats_.update(exec, matrix_view<const double>(all.data(), {r.size(), 1}));
    returns_ = std::move(now);
  }

  /// out = clip(rewards / sqrt(variance of R + epsilon)); out may be rewards.
  template <executor Executor, viewable<2> R, viewable<2> Out>
  void scale(const Executor& exec, const R& rewards, const normalize_options& o, Out&& output) const {
    constexpr std::string_view function = "rl::reward_scaling::scale";
    detail::only_on_cpu<Executor>();
    using T = element_t<const R>;
    using O = element_t<std::remove_reference_t<Out>>;
    const tensor_view<const T, 2> r = as_view(rewards);
    const tensor_view<O, 2> out = as_view(output);
    detail::arguments call(function, exec);
    detail::check_view(function, "rewards", r);
    detail::check_normalized(call, function, "rewards", r, o, out);
    normalize_options uncentered = o;
    uncentered.center = false;
    const auto column = [](auto* data, index_t n, index_t step) {
      return matrix_view<std::remove_pointer_t<decltype(data)>>(data, {n, 1}, {step, 1});
    };
    if (r.contiguous() && out.contiguous()) {
      stats_.normalize(exec, column(r.data, r.size(), 1), uncentered, column(out.data, r.size(), 1));
      return;
    }
    for (index_t b = 0; b < r.extent(0); ++b)
      stats_.normalize(exec, column(r.data + b * r.strides[0], r.extent(1), r.strides[1]), uncentered,
                       column(out.data + b * out.strides[0], r.extent(1), out.strides[1]));
  }

 private:
  double gamma_;
  running_stats stats_{1};
  std::vector<double> returns_;
};

}  // namespace MLKIT_NAMESPACE::rl
