// Adapters added into a weight, taken out again, and several of them mixed.
#pragma once

#include <limits>
#include <span>

#include "dora.hpp"

namespace MLKIT_NAMESPACE::lora {

/// How strongly an adapter is merged.
struct merge_options {
  double weight = 1;
};

namespace detail {

template <class T>
inline constexpr double largest_finite = 0;
template <>
inline constexpr double largest_finite<double> = std::numeric_limits<double>::max();
template <>
inline constexpr double largest_finite<float> = std::numeric_limits<float>::max();
template <>
inline constexpr double largest_finite<bf16> = 0x1.fep127;
template <>
inline constexpr double largest_finite<f16> = 65504;

// The halves of several adapters side by side, so that one product adds them all: b [out, ranks], a [ranks, in].
template <class A>
struct stacked {
  workspace<A> memory;
  matrix_view<A> a, b;

  template <class T, class Weight>
  stacked(std::span<const adapter_view<T>> adapters, index_t out, index_t in, Weight&& weight)
      : memory((out + in) * ranks(adapters)),
        a(memory.data(), {ranks(adapters), in}),
        b(memory.data() + in * ranks(adapters), {out, ranks(adapters)}) {
    index_t at = 0;
    for (std::size_t n = 0; n < adapters.size(); ++n) {
      const adapter_view<T>& p = adapters[n];
      const A scale = static_cast<A>(p.scale * weight(n));
      for (index_t j = 0; j < p.rank(); ++j)
        for (index_t i = 0; i < in; ++i) a(at + j, i) = static_cast<A>(p.a(j, i));
      for (index_t o = 0; o < out; ++o)
        for (index_t j = 0; j < p.rank(); ++j) b(o, at + j) = scale * static_cast<A>(p.b(o, j));
      at += p.rank();
    }
  }
  template <class T>
  static index_t ranks(std::span<const adapter_view<T>> adapters) noexcept {
    index_t sum = 0;
    for (const auto& p : adapters) sum += p.rank();
    return sum;
  }
};

// c = (b a + w) * last, row by row.
template <class T, class A>
void add_product(const cpu& exec, const matrix_view<A>& b, const matrix_view<A>& a, const matrix_view<T>& w,
                 const A* last, const matrix_view<T>& c) {
  finish<A, A, T> stage;
  stage.adding(w).last = last;
  multiply<A>(exec, left_of(b), right_of(a), nothing<A>(b.extent(0)), nothing<A>(a.extent(1)), c, stage);
}

// Refuses a result that is not finite in T, before anything is written. A bound by rows settles nearly every case; what
// it cannot settle is computed.
template <class T, class A>
void check_finite(std::string_view function, const cpu& exec, const matrix_view<A>& b, const matrix_view<A>& a,
                  const matrix_view<T>& w, const A* last) {
  const index_t out = w.extent(0), in = w.extent(1), rank = a.extent(0);
  const workspace<double> memory(rank + out);
  double* largest = memory.data();
  double* bounds = largest + rank;
  const auto kernel_a = MLKIT_SELECT(largest_lines<dense_source<A>>);
  kernel_a(left_of(a), 0, rank, largest);
  const auto weight = left_of(w);
  const auto kernel_w = MLKIT_SELECT(largest_lines<dense_source<T>>);
  const cpu limited = limit_threads(exec, static_cast<double>(out) * static_cast<double>(in));
  parallel_ranges(limited, ceil_div(out, index_t{64}),
                  [&](index_t begin, index_t end) { kernel_w(weight, begin * 64, std::min(out, end * 64), bounds); });
  constexpr double limit = largest_finite<T> * (1 - 0x1p-7);  // room for every rounding on the way
  for (index_t first = 0; first < out; ++first) {
    double bound = bounds[first];
    for (index_t j = 0; j < rank; ++j) bound += std::abs(static_cast<double>(b(first, j))) * largest[j];
    if (last) bound *= std::abs(static_cast<double>(last[first]));
    if (bound <= limit) continue;
    matrix<T> row({1, in});
    add_product(exec, rows_of(b, first, 1), a, rows_of(w, first, 1), last ? last + first : nullptr, row.view());
    for (index_t i = 0; i < in; ++i)
      if (!std::isfinite(static_cast<double>(row(0, i))))
        fail_value(function, ": the result would not be finite at row ", first, ", column ", i);
  }
}

template <class T, class A>
void merge_product(std::string_view function, const cpu& exec, const matrix_view<A>& b, const matrix_view<A>& a,
                   const matrix_view<T>& w, const A* last) {
  if (w.empty()) return;
  check_finite(function, exec, b, a, w, last);
  add_product(exec, b, a, w, last, w);
}

template <class T, class P>
void check_merge(arguments& call, std::string_view function, const matrix_view<T>& w, const adapter_view<P>& p,
                 double weight, std::string_view name = "adapter") {
  check_types<T, P>();
  check_output(function, "w", w);
  check_adapter(function, p, name);
  if (p.inputs() != w.extent(1))
    fail_shape(function, ": ", name, ".a has ", p.inputs(), " columns, but w has ", w.extent(1));
  if (p.outputs() != w.extent(0))
    fail_shape(function, ": ", name, ".b has ", p.outputs(), " rows, but w has ", w.extent(0));
  if (!std::isfinite(weight)) fail_value(function, ": weight = ", weight, " is not finite");
  call.reads(message(name, ".a"), p.a);
  call.reads(message(name, ".b"), p.b);
}

// w += sum over i of weights[i] s_i B_i A_i.
template <class T, class P>
void add_adapters(std::string_view function, const cpu& exec, const matrix_view<T>& w,
                  std::span<const adapter_view<P>> adapters, std::span<const double> weights) {
  const stacked<accumulator_t<T>> s(adapters, w.extent(0), w.extent(1), [&](std::size_t i) { return weights[i]; });
  merge_product(function, exec, s.b, s.a, w, static_cast<const accumulator_t<T>*>(nullptr));
}

template <class T, class P, class M>
void merge_dora(std::string_view function, const cpu& exec, const matrix_view<T>& w, const dora<P, M>& d) {
  using A = accumulator_t<T>;
  const index_t out = w.extent(0);
  const workspace<A> memory(2 * out);
  A* factors = memory.data() + out;
  find_factors(d.magnitude, find_norms(exec, dense<T>{w}, d, memory.data()), factors);
  const stacked<A> s(std::span<const adapter_view<P>>(&d.adapter, 1), out, w.extent(1),
                     [](std::size_t) { return 1.0; });
  merge_product(function, exec, s.b, s.a, w, static_cast<const A*>(factors));
}

template <class T, class P, class M>
void unmerge_dora(std::string_view function, const cpu& exec, const matrix_view<T>& w, const dora<P, M>& d) {
  using A = accumulator_t<T>;
  const index_t out = w.extent(0);
  const workspace<A> memory(out);
  A* factors = memory.data();
  find_factors(d.magnitude, d.norms.data, factors);
  const stacked<A> s(std::span<const adapter_view<P>>(&d.adapter, 1), out, w.extent(1),
                     [](std::size_t) { return -1.0; });
  for (index_t o = 0; o < out; ++o) {
    if (factors[o] == 0) fail_value(function, ": row ", o, " was merged with the factor 0");
    for (index_t j = 0; j < s.b.extent(1); ++j) s.b(o, j) *= factors[o];
    factors[o] = 1 / factors[o];
  }
  merge_product(function, exec, s.b, s.a, w, static_cast<const A*>(factors));
}

// What lora.cuh brings for mlkit::cuda.
template <class T, class P>
void add_adapters(std::string_view function, const cuda& exec, const matrix_view<T>& w,
                  std::span<const adapter_view<P>> adapters, std::span<const double> weights);
template <class T, class P, class M>
void merge_dora(std::string_view function, const cuda& exec, const matrix_view<T>& w, const dora<P, M>& d);
template <class T, class P, class M>
void unmerge_dora(std::string_view function, const cuda& exec, const matrix_view<T>& w, const dora<P, M>& d);

template <class Executor, class T, class P>
void run_merge(std::string_view function, const Executor& exec, const matrix_view<T>& w, const adapter_view<P>& p,
               double weight) {
  arguments call(function, exec);
  check_merge(call, function, w, p, weight);
  call.writes("w", w);
  add_adapters(function, exec, w, std::span<const adapter_view<P>>(&p, 1), std::span<const double>(&weight, 1));
}

}  // namespace detail

/// W += weight * s B A: afterwards the base alone computes what base and adapter did. w [out, in] with any strides, so
/// that an embedding merges as transposed(w) and a convolution as [Cout, Cin kh kw]; f32, f64, bf16 or f16.
///
/// The update is summed in f32 (f64 for f64) and added to w before the one rounding to its type.
/// Throws shape_error where extents do not fit, and value_error for null data, a weight that is not finite or a result
/// that would not be, before w is touched. The same bits for any number of threads. 2 out in rank flops; w is read
/// twice and written once. A GPU does not look at what the result would be: elements out of range become infinite.
template <executor Executor, viewable<2> W, plain_adapter Adapter>
void merge(const Executor& exec, W&& w, const Adapter& adapter, const merge_options& options = {}) {
  detail::run_merge("lora::merge", exec, as_view(w), as_adapter(adapter), options.weight);
}

/// W -= weight * s B A: undoes merge, up to the rounding of w's type. Errors as for merge.
template <executor Executor, viewable<2> W, plain_adapter Adapter>
void unmerge(const Executor& exec, W&& w, const Adapter& adapter, const merge_options& options = {}) {
  detail::run_merge("lora::unmerge", exec, as_view(w), as_adapter(adapter), -options.weight);
}

/// W += sum over i of weights[i] * s_i B_i A_i: several adapters, of any ranks, added in f32 and rounded once.
/// `adapters` is a contiguous range of adapters or views, `weights` as many numbers. Errors as for merge.
template <executor Executor, viewable<2> W, std::ranges::contiguous_range Adapters,
          std::ranges::contiguous_range Weights>
  requires plain_adapter<std::ranges::range_value_t<Adapters>>
void merge(const Executor& exec, W&& w, const Adapters& adapters, const Weights& weights) {
  constexpr std::string_view function = "lora::merge";
  using P = typename std::ranges::range_value_t<Adapters>::value_type;
  const auto c = as_view(w);
  std::vector<adapter_view<P>> views;
  for (const auto& p : adapters) views.push_back(as_adapter(p));
  const std::span<const std::ranges::range_value_t<Weights>> factors(weights);
  detail::check_extent(function, "weights", "elements", static_cast<index_t>(factors.size()), "adapters",
                       static_cast<index_t>(views.size()));
  detail::arguments call(function, exec);
  call.writes("w", c);
  for (std::size_t i = 0; i < views.size(); ++i)
    detail::check_merge(call, function, c, views[i], static_cast<double>(factors[i]),
                        detail::message("adapters[", static_cast<index_t>(i), "]"));
  if (views.empty()) return;
  std::vector<double> strengths;
  for (const auto& f : factors) strengths.push_back(static_cast<double>(f));
  detail::add_adapters(function, exec, c, std::span<const adapter_view<P>>(views), std::span<const double>(strengths));
}

/// W = g * (W + s B A) with g = magnitude / ||W + s B A||, row by row. To be able to undo it, compute
/// `adapted_norms(exec, base, adapter)` before: once W has changed, the norms cannot be had from it.
/// Also throws value_error for a magnitude that is not finite. Otherwise as for a plain adapter.
template <executor Executor, viewable<2> W, class T, class M>
void merge(const Executor& exec, W&& w, const dora<T, M>& adapter) {
  constexpr std::string_view function = "lora::merge";
  const auto c = as_view(w);
  detail::arguments call(function, exec);
  detail::check_merge(call, function, c, adapter.adapter, 1);
  detail::check_dora(call, function, adapter, c.extent(0), c.extent(1));
  call.writes("w", c);
  detail::merge_dora(function, exec, c, adapter);
}

/// W = W / g - s B A: undoes merge of a DoRA adapter, given the norms that were computed before it
/// (`dora{adapter, magnitude, adapted_norms}`). Throws value_error without them, and where g is 0, since merge then
/// left nothing to divide.
template <executor Executor, viewable<2> W, class T, class M>
void unmerge(const Executor& exec, W&& w, const dora<T, M>& adapter) {
  constexpr std::string_view function = "lora::unmerge";
  const auto c = as_view(w);
  detail::arguments call(function, exec);
  detail::check_merge(call, function, c, adapter.adapter, 1);
  detail::check_dora(call, function, adapter, c.extent(0), c.extent(1));
  call.writes("w", c);
  if (!adapter.norms.data)
    detail::fail_value(function,
                       ": the norms from before the merge are needed: dora{adapter, magnitude, adapted_norms}");
  detail::unmerge_dora(function, exec, c, adapter);
}

}  // namespace MLKIT_NAMESPACE::lora
