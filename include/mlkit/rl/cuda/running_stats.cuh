// Running mean and variance whose state stays on a GPU, so that neither taking in nor normalising waits for the host.
#pragma once

#include "../running_stats.hpp"
#include "columns.cuh"
#include "whiten.cuh"

namespace MLKIT_NAMESPACE::rl {
namespace detail {

// moments without what shared memory cannot have: initial values.
struct plain_moments {
  index_t count;
  double mean, m2;
};
__device__ __forceinline__ plain_moments together(const plain_moments& a, const plain_moments& b) {
  return merge_moments(a, b);
}

// A thread's rows about their own mean, in f64; then those of a column's threads.
template <class T>
__global__ void __launch_bounds__(sum_threads)
    column_moments_kernel(const matrix_view<const T> x, const vector_view<const std::uint8_t> mask,
                          const column_tiles of, plain_moments* parts) {
  using A = accumulator_t<T>;
  const index_t c = of.column();
  A own[column_rounds];
  unsigned kept = 0;
#pragma unroll
  for (int k = 0; k < column_rounds; ++k) {
    const index_t r = of.row(k);
    own[k] = A{};
    if (r >= of.rows || c >= of.columns || (mask.data && mask(r) == 0)) continue;
    own[k] = widen_one(x(r, c));
    kept |= 1u << k;
  }
  plain_moments m{__popc(kept), 0, 0};
  if (kept != 0) {
    const double n = static_cast<double>(m.count);
    double first = 0, sum = 0;  // from the first, so that equal elements deviate by nothing
#pragma unroll
    for (int k = column_rounds - 1; k >= 0; --k)
      if (kept >> k & 1) first = static_cast<double>(own[k]);
#pragma unroll
    for (int k = 0; k < column_rounds; ++k)
      if (kept >> k & 1) sum += static_cast<double>(own[k]) - first;
    m.mean = first + sum / n;
#pragma unroll
    for (int k = 0; k < column_rounds; ++k)
      if (kept >> k & 1) {
        const double d = static_cast<double>(own[k]) - m.mean;
        m.m2 = fused(d, d, m.m2);
      }
  }
  m = over_column(m, of.wide);
  if (of.leads()) parts[of.part() * of.columns + c] = m;
}

struct take_in_column {
  moments* state;
  __device__ __forceinline__ void operator()(index_t column, const plain_moments& seen) const {
    const plain_moments m = merge_moments({state[column].count, state[column].mean, state[column].m2}, seen);
    state[column].count = m.count, state[column].mean = m.mean, state[column].m2 = m.m2;
  }
};

// By the moments of each column, or, with a step of 0, by those of one.
template <class T, class Out>
__global__ void __launch_bounds__(sum_threads)
    normalize_kernel(const matrix_view<const T> x, const matrix_view<Out> out, const column_tiles of,
                     const moments* state, index_t step, double epsilon, accumulator_t<T> clip, bool center) {
  using A = accumulator_t<T>;
  const index_t c = of.column();
  if (c >= of.columns) return;
  const moments& m = state[c * step];
  // Of such a deviation x - mean may be above the largest A.
  constexpr double most = largest<A>;
  const double variance = m.count == 0 ? 1 : m.m2 / static_cast<double>(m.count), square = variance + epsilon,
               scale = ::sqrt(variance) > most / 64 ? 0x1p-4 : 1, of_column = center ? scale * m.mean : 0,
               inverse = (square == 0 ? 1 : 1 / ::sqrt(square)) / scale;
  const A mean = static_cast<A>(of_column), rest = static_cast<A>(of_column - static_cast<double>(mean)),
          factor = static_cast<A>(inverse > most ? most : inverse), by = static_cast<A>(scale);
#pragma unroll 4
  for (int k = 0; k < column_rounds; ++k) {
    const index_t r = of.row(k);
    if (r >= of.rows) break;
    const A z = (fused(widen_one(x(r, c)), by, -mean) - rest) * factor;
    out(r, c) = narrow_one<Out>(static_cast<accumulator_t<Out>>(z < -clip ? -clip : z > clip ? clip : z));
  }
}

// R of each environment, and all of them on the way, [time, environments].
template <class T>
__global__ void __launch_bounds__(sum_threads)
    discount_kernel(const matrix_view<const T> rewards, const matrix_view<const std::uint8_t> ended, double gamma,
                    double* returns, double* all) {
  const index_t environments = rewards.extent(0), time = rewards.extent(1),
                b = index_t{blockIdx.x} * sum_threads + threadIdx.x;
  if (b >= environments) return;
  double at = returns[b];
  for (index_t t = 0; t < time; ++t) {
    at = gamma * at + static_cast<double>(widen_one(rewards(b, t)));
    all[t * environments + b] = at;
    if (ended(b, t)) at = 0;
  }
  returns[b] = at;
}

template <class T>
__global__ void __launch_bounds__(sum_threads) fill_kernel(T* to, index_t count, const T value) {
  const index_t i = index_t{blockIdx.x} * sum_threads + threadIdx.x;
  if (i < count) to[i] = value;
}
template <class T>
device_memory<T> filled_memory(std::string_view function, const cuda& exec, index_t count, const T& value) {
  device_memory<T> memory(exec, count);
  launch(function, exec, fill_kernel<T>,
         {checked_blocks(function, ceil_div(count, sum_threads), count, "elements"), sum_threads}, memory.data(), count,
         value);
  return memory;
}
// Waits, so that the host's memory may go.
template <class T>
void copy_and_wait(std::string_view function, const cuda& exec, T* to, const T* from, index_t count) {
  const mlkit::detail::current_device here(exec.device());
  mlkit::detail::check_cuda(function, cudaMemcpyAsync(to, from, static_cast<std::size_t>(count) * sizeof(T),
                                                      cudaMemcpyDefault, exec.stream()));
  exec.synchronize();
}

}  // namespace detail

/// running_stats on a GPU: what the columns have had lies in device memory, taken and freed in the order of the
/// executor's stream. The same calls; update and normalize return at once, and can be captured into a graph. Movable.
///
/// An element that counts and is not finite is not refused: its column is NaN from then on. Sums are f64; the same bits
/// from run to run.
class device_running_stats {
 public:
  /// Before any row. Throws value_error for no column.
  explicit device_running_stats(const cuda& exec, index_t columns = 1)
      : columns_(running_stats(columns).columns()),
        state_(detail::filled_memory("rl::device_running_stats", exec, columns, moments{})) {}
  /// What another had; waits until it is there.
  device_running_stats(const cuda& exec, const running_stats& from) : columns_(from.columns()), state_(exec, columns_) {
    detail::copy_and_wait("rl::device_running_stats", exec, state_.data(), from.state().data(), columns_);
  }

  index_t columns() const noexcept { return columns_; }
  /// [columns] in device memory, for kernels of one's own in the same stream.
  moments* data() const noexcept { return state_.data(); }
  /// Waits for the stream. Throws value_error for a column that has had what is not finite.
  running_stats get(const cuda& exec) const {
    std::vector<moments> state(static_cast<std::size_t>(columns_));
    detail::copy_and_wait("rl::device_running_stats::get", exec, state.data(), state_.data(), columns_);
    running_stats stats(columns_);
    stats.restore(state);
    return stats;
  }

  /// As running_stats::update. Reads x once.
  template <viewable<2> X>
  void update(const cuda& exec, const X& x, const mask_view<1>& mask = {}) {
    constexpr std::string_view function = "rl::running_stats::update";
    using T = element_t<const X>;
    const tensor_view<const T, 2> v = as_view(x);
    detail::arguments call(function, exec);
    detail::check_rows_to_take_in(call, function, v, mask, columns_);
    if (v.empty()) return;
    const detail::column_tiles of(function, v.extent(0), columns_);
    const detail::device_memory<detail::plain_moments> parts(exec, of.down * columns_);
    detail::launch(function, exec, detail::column_moments_kernel<T>, {of.count(), detail::sum_threads}, v, mask.values,
                   of, parts.data());
    detail::finish_columns(function, exec, of, static_cast<const detail::plain_moments*>(parts.data()),
                           detail::take_in_column{state_.data()});
  }

  /// As running_stats::normalize; of a column that is NaN, all becomes NaN.
  template <viewable<2> X, viewable<2> Out>
  void normalize(const cuda& exec, const X& x, const normalize_options& o, Out&& output) const {
    constexpr std::string_view function = "rl::running_stats::normalize";
    using T = element_t<const X>;
    using O = element_t<std::remove_reference_t<Out>>;
    const tensor_view<const T, 2> v = as_view(x);
    const tensor_view<O, 2> out = as_view(output);
    detail::arguments call(function, exec);
    detail::check_columns(function, v, columns_);
    detail::check_normalized(call, function, "x", v, o, out);
    run_normalize(function, exec, v, o, out, 1);
  }

 private:
  friend class device_reward_scaling;

  template <class T, class O>
  void run_normalize(std::string_view function, const cuda& exec, const matrix_view<const T>& x,
                     const normalize_options& o, const matrix_view<O>& out, index_t step) const {
    const detail::column_tiles of(function, x.extent(0), x.extent(1));
    detail::launch(function, exec, detail::normalize_kernel<T, O>, {of.count(), detail::sum_threads}, x, out, of,
                   static_cast<const moments*>(state_.data()), step, o.epsilon, static_cast<accumulator_t<T>>(o.clip),
                   o.center);
  }

  index_t columns_;
  detail::device_memory<moments> state_;
};

/// reward_scaling on a GPU, as device_running_stats is running_stats. After a reward that is not finite the scale is
/// NaN.
class device_reward_scaling {
 public:
  /// Throws as reward_scaling.
  explicit device_reward_scaling(const cuda& exec, index_t environments, double gamma = 0.99)
      : gamma_(reward_scaling(environments, gamma).gamma()),
        environments_(environments),
        stats_(exec),
        returns_(detail::filled_memory("rl::device_reward_scaling", exec, environments, 0.0)) {}
  /// What another had; waits until it is there.
  device_reward_scaling(const cuda& exec, const reward_scaling& from)
      : gamma_(from.gamma()),
        environments_(static_cast<index_t>(from.returns().size())),
        stats_(exec, from.stats()),
        returns_(exec, environments_) {
    detail::copy_and_wait("rl::device_reward_scaling", exec, returns_.data(), from.returns().data(), environments_);
  }

  const device_running_stats& stats() const noexcept { return stats_; }
  /// R of each environment, in device memory.
  double* returns() const noexcept { return returns_.data(); }
  /// Waits for the stream. Throws value_error where a reward was not finite.
  reward_scaling get(const cuda& exec) const {
    std::vector<double> returns(static_cast<std::size_t>(environments_));
    detail::copy_and_wait("rl::device_reward_scaling::get", exec, returns.data(), returns_.data(), environments_);
    reward_scaling scaling(environments_, gamma_);
    scaling.restore(stats_.get(exec).state(), returns);
    return scaling;
  }

  /// As reward_scaling::update. A thread follows an environment; takes eight bytes of workspace for each reward.
  template <viewable<2> R>
  void update(const cuda& exec, const R& rewards, const mask_view<2>& ended) {
    constexpr std::string_view function = "rl::reward_scaling::update";
    using T = element_t<const R>;
    const tensor_view<const T, 2> r = as_view(rewards);
    detail::arguments call(function, exec);
    detail::check_rewards_to_take_in(call, function, r, ended, environments_);
    if (r.empty()) return;
    const detail::device_memory<double> all(exec, r.size());
    detail::launch(function, exec, detail::discount_kernel<T>,
                   {detail::checked_blocks(function, detail::ceil_div(environments_, detail::sum_threads),
                                           environments_, "environments"),
                    detail::sum_threads},
                   r, ended.values, gamma_, returns_.data(), all.data());
    stats_.update(exec, matrix_view<const double>(all.data(), {r.size(), 1}));
  }

  /// As reward_scaling::scale.
  template <viewable<2> R, viewable<2> Out>
  void scale(const cuda& exec, const R& rewards, const normalize_options& o, Out&& output) const {
    constexpr std::string_view function = "rl::reward_scaling::scale";
    using T = element_t<const R>;
    using O = element_t<std::remove_reference_t<Out>>;
    const tensor_view<const T, 2> r = as_view(rewards);
    const tensor_view<O, 2> out = as_view(output);
    detail::arguments call(function, exec);
    detail::check_view(function, "rewards", r);
    detail::check_normalized(call, function, "rewards", r, o, out);
    normalize_options uncentered = o;
    uncentered.center = false;
    stats_.run_normalize(function, exec, r, uncentered, out, 0);
  }

 private:
  double gamma_;
  index_t environments_;
  device_running_stats stats_;
  detail::device_memory<double> returns_;
};

}  // namespace MLKIT_NAMESPACE::rl
