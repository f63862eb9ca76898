// Adapters added into a weight, and taken out again, on a GPU.
#pragma once

#include "../merge.hpp"
#include "dora.cuh"

namespace MLKIT_NAMESPACE::lora::detail {

/// to = scale * from.
template <class From, class A>
struct scaled_copy {
  matrix_view<const From> from;
  matrix_view<A> to;
  A scale;
  __device__ void operator()(index_t i, index_t j) const { to(i, j) = scale * static_cast<A>(from(i, j)); }
};

template <class T, class P>
void add_adapters(std::string_view function, const cuda& exec, const matrix_view<T>& w,
                  std::span<const adapter_view<P>> adapters, std::span<const double> weights) {
  using A = accumulator_t<T>;
  if (w.empty()) return;
  if (adapters.size() == 1) {
    const adapter_view<P>& p = adapters[0];
    using E = std::conditional_t<std::is_same_v<A, double>, double, P>;
    finish<A, T, T> stage{.value = static_cast<A>(p.scale * weights[0])};
    return multiply_on<E>(function, exec, left_of(p.b), right_of(p.a), w, stage.adding(w));
  }
  // The halves of all beside each other, so that w is rounded once.
  index_t rank = 0;
  for (const adapter_view<P>& p : adapters) rank += p.rank();
  const device_matrix<A> a(exec, rank, w.extent(1)), b(exec, w.extent(0), rank);
  index_t at = 0;
  for (std::size_t i = 0; i < adapters.size(); ++i) {
    const adapter_view<P>& p = adapters[i];
    each_element(function, exec, p.rank(), p.inputs(), scaled_copy<P, A>{p.a, rows_of(a.view, at, p.rank()), A{1}});
    const matrix_view<A> columns(b.view.data + at, {p.outputs(), p.rank()}, b.view.strides);
    each_element(function, exec, p.outputs(), p.rank(),
                 scaled_copy<P, A>{p.b, columns, static_cast<A>(p.scale * weights[i])});
    at += p.rank();
  }
  multiply_on<A>(function, exec, left_of(b.view), right_of(a.view), w, finish<A, T, T>{}.adding(w));
}

template <class T, class P, class M>
void merge_dora(std::string_view function, const cuda& exec, const matrix_view<T>& w, const dora<P, M>& d) {
  using A = accumulator_t<T>;
  if (w.empty()) return;
  const device_norms<A> g(function, exec, dense<T>{w}, d, A{});
  finish<A, T, T> stage{.value = static_cast<A>(d.adapter.scale), .last = g.factors};
  multiply_on<P>(function, exec, left_of(d.adapter.b), right_of(d.adapter.a), w, stage.adding(w));
}

/// to = 1 / from; where that is 0, infinity.
template <class A>
struct invert {
  const A* from;
  A* to;
  __device__ void operator()(index_t, index_t i) const { to[i] = A{1} / from[i]; }
};

template <class T, class P, class M>
void unmerge_dora(std::string_view function, const cuda& exec, const matrix_view<T>& w, const dora<P, M>& d) {
  using A = accumulator_t<T>;
  if (w.empty()) return;
  const device_norms<A> g(function, exec, dense<T>{w}, d, A{});
  each_element(function, exec, 1, w.extent(0), invert<A>{g.factors, g.sums});
  finish<A, T, T> stage{.value = static_cast<A>(-d.adapter.scale), .rows = g.factors, .last = g.sums};
  multiply_on<P>(function, exec, left_of(d.adapter.b), right_of(d.adapter.a), w, stage.adding(w));
}

}  // namespace MLKIT_NAMESPACE::lora::detail
