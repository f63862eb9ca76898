// Whitening: mean 0 and deviation 1 over what a mask keeps, on one rank or over all.
#pragma once

#include "moments.hpp"
#include "options.hpp"

namespace MLKIT_NAMESPACE::rl {

/// How whiten divides.
struct whiten_options {
  double epsilon = 1e-8;                       ///< added to the standard deviation
  double variance_epsilon = 0;                 ///< added to the variance, as TRL's masked_whiten has it (1e-8)
  variance_of variance = variance_of::sample;  ///< as torch.std and TRL have it; population is NumPy's default
  bool shift_mean = true;                      ///< false: the mean is added again, and only the deviation becomes 1
  merge_over_ranks over_ranks = {};            ///< none: the elements of this rank alone
};

namespace detail {

template <class T, class Out>
struct whiten_problem {
  plane_shape shape;
  plane<const T> x;
  plane<Out> out;
  plane<const std::uint8_t> mask;  // null where all count
  // y = ((scale x - mean) - mean_rest) factor + shift; the mean, times scale, in two parts, so that f32 does not round
  // it. The scale is a power of two: 1, or less where deviations may be above the largest f32.
  accumulator_t<T> scale, mean, mean_rest, factor, shift;
};

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::rl

#define MLKIT_FOREACH "../rl/cpu/whiten-inl.hpp"
#include "../simd/foreach_isa.hpp"

namespace MLKIT_NAMESPACE::rl {
namespace detail {

template <class T, class Out, int Rank>
moments run_whiten(by_executor, std::string_view function, const cpu& exec, const tensor_view<const T, Rank>& x,
                   const mask_view<Rank>& mask, const whiten_options& o, const tensor_view<Out, Rank>& out) {
  using A = accumulator_t<T>;
  const moments m = checked_moments(exec, function, "values", x, mask, o.over_ranks);
  if (x.empty()) return m;
  const double variance = m.variance(o.variance);
  const double factor = variance > 0 ? 1 / (std::sqrt(variance + o.variance_epsilon) + o.epsilon) : 0;
  whiten_problem<T, Out> p{};
  p.shape = shape_of_planes(x, out, mask.values);
  p.x = plane_of(x, p.shape);
  p.out = plane_of(out, p.shape);
  p.mask = plane_of(mask.values, p.shape);
  constexpr double most = static_cast<double>(std::numeric_limits<A>::max());
  const double scale = std::sqrt(m.m2) > most / 2 ? 0x1p-4 : 1;  // no deviation is above the root
  p.scale = static_cast<A>(scale);
  p.mean = static_cast<A>(scale * m.mean);
  p.mean_rest = static_cast<A>(scale * m.mean - static_cast<double>(p.mean));
  p.factor = static_cast<A>(std::min(factor / scale, most));
  p.shift = o.shift_mean ? A{} : static_cast<A>(m.mean);
  const auto kernel = MLKIT_SELECT_WITHOUT_BF16(whiten_elements<T, Out>);
  const index_t n = p.shape.rows * p.shape.cols, chunks = ceil_div(n, chunk_elements);
  parallel_ranges(threads_for(exec, n), chunks, [&](index_t begin, index_t end) {
    kernel(p, begin * chunk_elements, std::min(n, end * chunk_elements));
  });
  return m;
}

template <class T, class Out, int Rank, executor Executor>
result_t<Executor, moments> whiten(const Executor& exec, const tensor_view<const T, Rank>& x,
                                   const mask_view<Rank>& mask, const whiten_options& o,
                                   const tensor_view<Out, Rank>& out) {
  constexpr std::string_view function = "rl::whiten";
  arguments call(function, exec);
  check_view(function, "values", x);
  check_output(function, "out", out);
  check_same_shape<Rank>(function, "out", out.extents, "values", x.extents);
  check_mask(call, function, mask, "values", x.extents);
  check_non_negative(function, "epsilon", o.epsilon);
  check_non_negative(function, "variance_epsilon", o.variance_epsilon);
  if (!same_elements(x, out)) call.reads("values", x);
  call.writes("out", out);
  return run_whiten(by_executor{}, function, exec, x, mask, o, out);
}

}  // namespace detail

/// values = (values - mean) / (deviation + epsilon), over the elements of [n] or [batch, time] that the mask keeps; the
/// others are left as they are. Returns the moments that it used.
///
/// What is stored time-major is given by its transposed view; elements are visited in the order of memory.
/// No element, and nothing happens. Where the deviation is 0 (elements of one value; one element, whose sample variance
/// is taken as 0), the result is 0, also with an epsilon of 0. With `over_ranks` mean and deviation are those of all
/// ranks. f32, f64, bf16 and f16; the moments as find_moments has them; the same bits for any number of threads. Throws
/// shape_error where the mask has another shape, value_error for an epsilon that is negative and for an element that
/// counts and is not finite, named by its index, before anything is written; on every rank, if one has such an element.
/// Reads values twice and writes them once. Of advantages in PPO: Andrychowicz et al.: "What matters in on-policy
/// reinforcement learning?", 2020, C67; of rewards and advantages in RLHF: TRL's masked_whiten.
///
/// With a mlkit::cuda the moments are a device_value, which waits where it is asked for; elements that count and are
/// not finite make all of them NaN; over_ranks, which the host calls, waits for the stream.
template <executor Executor, batch_viewable X>
detail::result_t<Executor, moments> whiten(const Executor& exec, X&& values,
                                           const mask_view<detail::rank_of<X>>& mask = {},
                                           const whiten_options& o = {}) {
  using T = element_t<std::remove_reference_t<X>>;
  const tensor_view<T, detail::rank_of<X>> v = as_view(values);
  return detail::whiten<T, T, detail::rank_of<X>>(exec, tensor_view<const T, detail::rank_of<X>>(v), mask, o, v);
}

/// The same into `out`, whose elements that do not count are left as they are.
template <executor Executor, batch_viewable X, batch_viewable Out>
detail::result_t<Executor, moments> whiten(const Executor& exec, const X& values,
                                           const mask_view<detail::rank_of<const X>>& mask, const whiten_options& o,
                                           Out&& out) {
  static_assert(detail::rank_of<const X> == detail::rank_of<Out>, "rl: values and out of whiten have the same rank");
  using T = element_t<const X>;
  using O = element_t<std::remove_reference_t<Out>>;
  return detail::whiten<T, O, detail::rank_of<const X>>(exec, as_view(values), mask, o, as_view(out));
}

}  // namespace MLKIT_NAMESPACE::rl
