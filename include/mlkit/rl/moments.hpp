// Count, mean and variance of what a mask keeps, and their merge over parts of the data or over ranks.
#pragma once

#include <cmath>
#include <functional>

#include "lanes.hpp"

namespace MLKIT_NAMESPACE::rl {

/// What a variance is divided by: the number of elements, or (Bessel) one less.
enum class variance_of { population, sample };

/// The number of elements, their mean, and the sum of their squared deviations from it. A value of 24 bytes that can be
/// sent to other ranks as it is.
struct moments {
  index_t count = 0;
  double mean = 0;
  double m2 = 0;

  /// m2 / count, or m2 / (count - 1); 0 where that is 0 / 0: of no element, and of the sample of one.
  double variance(variance_of kind = variance_of::population) const noexcept {
    const index_t n = kind == variance_of::population ? count : count - 1;
    return n > 0 ? m2 / static_cast<double>(n) : 0;
  }
  double deviation(variance_of kind = variance_of::population) const noexcept { return std::sqrt(variance(kind)); }

  friend bool operator==(const moments&, const moments&) = default;
};

/// The moments of the elements of a and b together; those of no element are neutral. Associative and commutative up to
/// rounding: merge in one fixed order to get the same bits everywhere. Chan, Golub, LeVeque: "Updating formulae and a
/// pairwise algorithm for computing sample variances", 1979.
constexpr moments merge(const moments& a, const moments& b) noexcept {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const double na = static_cast<double>(a.count), nb = static_cast<double>(b.count), n = na + nb;
  const double d = b.mean - a.mean;
  return {a.count + b.count, a.mean + d * (nb / n), a.m2 + b.m2 + d * d * (na * nb / n)};
}

/// Merges the moments that this rank has with those of all others, and gives the same result to each: what a
/// distributed program puts in, such as an all-gather of the 24 bytes followed by `merge` in the order of ranks. Every
/// rank calls it once a call, also a rank that has no elements.
using merge_over_ranks = std::function<moments(const moments&)>;

namespace detail {

inline constexpr index_t chunk_elements = 4096;  // whose moments are computed together, whatever the threads

template <class T>
struct moments_problem {
  using value_type = T;
  plane_shape shape;
  plane<const T> x;
  plane<const std::uint8_t> mask;  // null where all count
};

template <class T>
moments_problem<T> plan_moments(const tensor_view<const T, 1>& x, const mask_view<1>& mask) noexcept {
  const plane_shape s = shape_of_planes(x, mask.values);
  return {s, plane_of(x, s), plane_of(mask.values, s)};
}
template <class T>
moments_problem<T> plan_moments(const tensor_view<const T, 2>& x, const mask_view<2>& mask) noexcept {
  const plane_shape s = shape_of_planes(x, mask.values);
  return {s, plane_of(x, s), plane_of(mask.values, s)};
}

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::rl

#define MLKIT_FOREACH "../rl/cpu/moments-inl.hpp"
#include "../simd/foreach_isa.hpp"

namespace MLKIT_NAMESPACE::rl {
namespace detail {

template <class T>
moments run_moments(const cpu& exec, const moments_problem<T>& p) {
  const auto kernel = MLKIT_SELECT_WITHOUT_BF16(chunk_moments<T>);
  const index_t n = p.shape.rows * p.shape.cols, chunks = ceil_div(n, chunk_elements);
  if (n == 0) return {};
  if (chunks == 1) return kernel(p, 0, n);
  const workspace<moments> parts(chunks);
  parallel_ranges(threads_for(exec, n), chunks, [&](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i)
      parts.data()[i] = kernel(p, i * chunk_elements, std::min(n, (i + 1) * chunk_elements));
  });
  moments all;
  for (index_t i = 0; i < chunks; ++i) all = merge(all, parts.data()[i]);
  return all;
}

inline bool all_finite(const moments& m) noexcept { return std::isfinite(m.mean) && std::isfinite(m.m2); }

// The index, as a message has it, of an element.
inline std::string index_text(index_t i) { return message("[", i, "]"); }
inline std::string index_text(index_t i, index_t j) { return message("[", i, ", ", j, "]"); }

// Names the first element that counts and is not finite, in the order of indices.
template <class T>
void name_non_finite(std::string_view function, std::string_view name, const tensor_view<const T, 1>& x,
                     const mask_view<1>& mask) {
  for (index_t i = 0; i < x.extent(0); ++i)
    if ((!mask || mask.values(i)) && !std::isfinite(static_cast<double>(x(i))))
      fail_value(function, ": ", name, index_text(i), " = ", static_cast<double>(x(i)), " is not finite");
}
template <class T>
void name_non_finite(std::string_view function, std::string_view name, const tensor_view<const T, 2>& x,
                     const mask_view<2>& mask) {
  for (index_t i = 0; i < x.extent(0); ++i)
    for (index_t j = 0; j < x.extent(1); ++j)
      if ((!mask || mask.values(i, j)) && !std::isfinite(static_cast<double>(x(i, j))))
        fail_value(function, ": ", name, index_text(i, j), " = ", static_cast<double>(x(i, j)), " is not finite");
}

// The moments of x, over all ranks where `over_ranks` says so; refuses what is not finite. The other ranks get to know
// of it before this one throws, as none of them must wait for one that has left.
template <class T, int Rank>
moments checked_moments(const cpu& exec, std::string_view function, std::string_view name,
                        const tensor_view<const T, Rank>& x, const mask_view<Rank>& mask,
                        const merge_over_ranks& over_ranks) {
  const moments mine = run_moments(exec, plan_moments(x, mask));
  const moments all = over_ranks ? over_ranks(mine) : mine;
  if (!all_finite(mine)) {
    name_non_finite(function, name, x, mask);
    fail_value(function, ": squares of ", name, " are above the largest f64");
  }
  if (!all_finite(all) || all.count < mine.count || all.m2 < 0)
    fail_value(function, ": over_ranks gave count ", all.count, ", mean ", all.mean, ", m2 ", all.m2, " for ",
               mine.count, " elements of this rank");
  return all;
}

}  // namespace detail

/// The moments of the elements of x, [n] or [batch, time], that the mask keeps. f32, f64, bf16 and f16, summed in parts
/// of 4096 elements in f32 (f64 for f64) about the mean of the part, the parts in f64 in order: the same bits for any
/// number of threads. Elements of one value have m2 = 0 exactly. Throws shape_error where the mask has another shape;
/// what is not finite gives moments that are not. Reads x once.
/// With a mlkit::cuda they are a device_value, which waits where it is asked for, and sums within parts are f64.
template <executor Executor, batch_viewable X>
detail::result_t<Executor, moments> find_moments(const Executor& exec, const X& x,
                                                 const mask_view<detail::rank_of<const X>>& mask = {}) {
  constexpr std::string_view function = "rl::find_moments";
  using T = element_t<const X>;
  const tensor_view<const T, detail::rank_of<const X>> v = as_view(x);
  detail::arguments call(function, exec);
  detail::check_view(function, "x", v);
  detail::check_mask(call, function, mask, "x", v.extents);
  return run_moments(exec, detail::plan_moments(v, mask));
}

}  // namespace MLKIT_NAMESPACE::rl
