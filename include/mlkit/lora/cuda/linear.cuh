// The adapted linear map on a GPU, forward and backward.
#pragma once

#include "../linear.hpp"
#include "products.cuh"
#include "quantised.cuh"

namespace MLKIT_NAMESPACE::lora::detail {

template <class Bias>
struct bias_tag {};

/// A half of an adapter as E, narrowed to its own columns again.
template <class T>
matrix_view<T> narrowed(matrix_view<T> v, index_t cols) noexcept {
  v.extents[1] = cols;
  return v;
}

/// x as A sees it: a copy whose elements are dropped and scaled, or x itself.
template <bool Masked, class X>
struct adapter_input {
  device_matrix<X> copy;
  matrix_view<const X> view;

  template <class A>
  adapter_input(std::string_view function, const cuda& exec, const matrix_view<const X>& x, const linear_options<A>& o)
      : view(x) {
    if constexpr (Masked) {
      copy = device_matrix<X>(exec, x.extent(0), x.extent(1));
      each_element(function, exec, x.extent(0), x.extent(1),
                   drop<X>{x, copy.view, dropout_mask::make(o.dropout, o.seed, o.stream, x.extent(1))});
      view = copy.view;
    }
  }
};

/// What forward and backward have of an adapter: its halves as E, and h = s D(x) A^T, with zeros behind its columns.
template <class E>
struct down_projection {
  reachable<E> a;
  device_matrix<E> h;

  template <class Bias, class X, class T, class A>
  down_projection(bias_tag<Bias>, std::string_view function, const cuda& exec, const matrix_view<const X>& x,
                  const adapter_view<T>& p, const matrix_view<A>& saved, bool saved_is_there, int most_blocks = 0)
      : a(function, exec, p.a), h(exec, x.extent(0), round_up(p.rank(), index_t{16 / sizeof(E)})) {
    const index_t tokens = x.extent(0);
    if (saved.data && saved_is_there) {
      each_element(function, exec, tokens, h.view.extent(1), convert<A, E>{as_const(saved), h.view});
      return;
    }
    project_down_on<Bias>(function, exec, x, narrowed(a.view, x.extent(1)), p.scale, h.view, most_blocks);
    if (saved.data) each_element(function, exec, tokens, p.rank(), convert<E, A>{as_const(h.view), saved});
  }
};

/// Few tokens against a weight that is read once, where the thin kernels can read it all. False where they cannot.
template <class E, class Base, class T, class Y, class A>
bool decode_linear(std::string_view function, const cuda& exec, const matrix_view<const E>& x, const Base& base,
                   const adapter_view<T>& p, const matrix_view<Y>& y, const linear_options<A>& o, const A* factors) {
  using Bias = bias_t<Base>;
  const auto weight = right_operand(transposed(base.weight()));
  if (x.extent(0) > thin::most_lines || !reached_by_vectors(left_of(x)) || !thin::reads_wide<E>(weight)) return false;
  auto problem = thin_problem(weight, x, y, false, finish<A, Bias, Y>{.columns = factors, .bias = base.bias.data});
  if (p.rank() == 0) {
    thin::run(function, exec, problem);
    return true;
  }
  const reachable<E> b(function, exec, p.b);
  problem.b = b.view.data;
  problem.b_row = b.view.stride(0);
  problem.b_column = b.view.stride(1);
  problem.rank = static_cast<int>(p.rank());
  if (!o.h.data) {
    const reachable<E> a(function, exec, p.a);
    if (thin::run_fused(function, exec, problem, left_of(a.view), p.scale)) return true;
  }
  const down_projection<E> down(bias_tag<Bias>{}, function, exec, x, p, o.h, false);
  problem.h = down.h.view.data;
  problem.h_row = down.h.view.stride(0);
  problem.h_column = 1;
  problem.early = !o.h.data;
  thin::run(function, exec, problem);
  return true;
}

/// y = (x W^T + h B^T) * factors + bias in one pass, by Hopper's warpgroups, where they can. While the first tiles are
/// made, the multiprocessors that have one tile less to make than others compute h.
template <class E, class Base, class T, class Y, class A>
bool warpgroup_linear(std::string_view function, const cuda& exec, const matrix_view<const E>& x, const Base& base,
                      const adapter_view<T>& p, const matrix_view<Y>& y, const linear_options<A>& o, const A* factors) {
  if constexpr (std::is_same_v<base_source_t<Base>, dense_source<E>> && std::is_same_v<Y, E>) {
    using Bias = bias_t<Base>;
    constexpr int fewest = 8;
    const auto left = left_of(x), right = right_operand(transposed(base.weight()));
    if (!warpgroup::fits(exec, left, right, y)) return false;
    if (p.rank() == 0)
      return warpgroup::run(function, exec, left, right, nothing<E>(0), nothing<E>(0), y, factors, base.bias.data,
                            false);
    const int spare = warpgroup::spare_blocks(exec, y.extent(0), y.extent(1));
    const reachable<E> b(function, exec, p.b);
    const down_projection<E> down(bias_tag<Bias>{}, function, exec, x, p, o.h, false, spare < fewest ? 0 : spare);
    const auto h = left_of(as_const(narrowed(down.h.view, b.view.extent(1)))), b_lines = left_of(b.view);
    const bool early = !o.h.data && p.rank() <= thin::most_many;
    if (warpgroup::run(function, exec, left, right, h, b_lines, y, factors, base.bias.data, early)) return true;
    multiply_on<E>(function, exec, left, right, h, b_lines, y,
                   finish<A, Bias, Y>{.columns = factors, .bias = base.bias.data});
    return true;
  } else {
    return false;
  }
}

template <bool Masked, class X, class Base, class T, class Y, class A>
void run_linear(const cuda& exec, const matrix_view<const X>& x, const Base& base, adapter_view<T> p,
                const matrix_view<Y>& y, const linear_options<A>& o, const A* factors) {
  constexpr std::string_view function = "lora::linear";
  using Bias = bias_t<Base>;
  using E = device_type_t<X, base_source_t<Base>>;
  if (y.empty()) return;
  if (p.scale == 0 && p.rank() > 0) {  // the bits of the base alone, which is made as if there were no adapter
    if (o.h.data) {
      const adapter_input<Masked, X> seen(function, exec, x, o);
      const down_projection<E> down(bias_tag<Bias>{}, function, exec, seen.view, p, o.h, false);
    }
    linear_options<A> rest = o;
    rest.h = {};
    return run_linear<false>(exec, x, base, effective(p), y, rest, factors);
  }
  finish<A, Bias, Y> stage{.columns = factors, .bias = base.bias.data};
  if (o.z.data) stage.keeping(o.z);
  if constexpr (!Masked && std::is_same_v<X, E> && thin::has_reader<E, base_source_t<Base>>)
    if (!o.z.data && decode_linear<E>(function, exec, x, base, p, y, o, factors)) return;
  if constexpr (!Masked && is_half<E>)
    if (!o.z.data && warpgroup_linear<E>(function, exec, x, base, p, y, o, factors)) return;
  const auto left = left_of(x);
  const auto right = right_operand(transposed(base.weight()));
  if (p.rank() == 0) return multiply_on<E>(function, exec, left, right, y, stage);
  const adapter_input<Masked, X> seen(function, exec, x, o);
  const reachable<E> b(function, exec, p.b);
  const down_projection<E> down(bias_tag<Bias>{}, function, exec, seen.view, p, o.h, false);
  multiply_on<E>(function, exec, left, right, left_of(narrowed(down.h.view, b.view.extent(1))), left_of(b.view), y,
                 stage);
}

template <class X, class Base, class Y>
void run_base(const cuda& exec, const matrix_view<const X>& x, const Base& base, const matrix_view<Y>& y) {
  using A = sums_t<X>;
  run_linear<false>(exec, x, base, adapter_view<typename Base::value_type>{}, y, linear_options<A>{},
                    static_cast<const A*>(nullptr));
}

/// dx = stage(dy W + g A).
template <class E, class D, class Base, class Dx, class Stage>
void propagate_on(std::string_view function, const cuda& exec, const matrix_view<const D>& dy, const Base& base,
                  const matrix_view<const E>& g, const matrix_view<const E>& a, const matrix_view<Dx>& dx,
                  const Stage& stage) {
  multiply_on<E>(function, exec, left_of(dy), right_operand(base.weight()), left_of(g), right_of(a), dx, stage);
}

template <class Base, class D, class Dx>
void run_base_backward(const cuda& exec, const Base& base, const matrix_view<const D>& dy, const matrix_view<Dx>& dx) {
  using E = device_type_t<D, base_source_t<Base>>;
  using A = sums_t<D>;
  multiply_on<E>("lora::linear_backward", exec, left_of(dy), right_operand(base.weight()), dx,
                 finish<A, bias_t<Base>, Dx>{});
}

/// out = left right, or added to it. Sums are rounded to out's type once.
template <class E, class Left, class Right, class G>
void gradient_on(std::string_view function, const cuda& exec, const operand<Left>& left, const operand<Right>& right,
                 const matrix_view<G>& out, bool accumulate) {
  using A = accumulator_t<E>;
  finish<A, G, G> stage;
  if (accumulate) stage.adding(out);
  multiply_on<E>(function, exec, left, right, out, stage);
}

/// da and db from u = dy * factors, x under its mask, h and g.
template <class E, class X, class D, class G>
void add_gradients_on(std::string_view function, const cuda& exec, const matrix_view<const D>& u,
                      const matrix_view<const X>& x, const matrix_view<E>& h, const matrix_view<E>& g,
                      const gradients<G>& grads, bool accumulate) {
  const index_t rank = grads.da.extent(0);
  gradient_on<E>(function, exec, left_of(transposed(u)), right_of(narrowed(h, rank)), grads.db, accumulate);
  gradient_on<E>(function, exec, left_of(transposed(narrowed(g, rank))), right_of(x), grads.da, accumulate);
}

/// g = s u B [tokens, rank], with zeros behind its columns.
template <class E, class D>
void project_back_on(std::string_view function, const cuda& exec, const matrix_view<const D>& u,
                     const matrix_view<const E>& b, index_t rank, double scale, const matrix_view<E>& g) {
  using A = accumulator_t<E>;
  if (rank < g.extent(1)) each_element(function, exec, g.extent(0), g.extent(1), convert<E, E>{{}, g});
  multiply_on<E>(function, exec, left_of(u), right_of(narrowed(b, rank)), narrowed(g, rank),
                 finish<A, A, E>{.value = static_cast<A>(scale)});
}

/// c = mask(c).
template <class T>
void drop_in_place(std::string_view function, const cuda& exec, const matrix_view<T>& c, const dropout_mask& mask) {
  each_element(function, exec, c.extent(0), c.extent(1), drop<T>{as_const(c), c, mask});
}

/// Backward for u = dy * factors: W and the adapter see u, and the masked path of DoRA is not for here.
template <bool Masked, class X, class Base, class T, class D, class G, class Dx, class A>
void run_backward_of(const cuda& exec, const matrix_view<const X>& x, const Base& base, const adapter_view<T>& p,
                     const matrix_view<const D>& dy, const gradients<G>& grads, const matrix_view<Dx>& dx,
                     const linear_options<A>& o) {
  constexpr std::string_view function = "lora::linear_backward";
  using E = device_type_t<D, base_source_t<Base>>;
  const index_t tokens = x.extent(0), rank = p.rank();
  if (tokens == 0) {
    if (!o.accumulate) {
      each_element(function, exec, grads.da.extent(0), grads.da.extent(1), convert<G, G>{{}, grads.da});
      each_element(function, exec, grads.db.extent(0), grads.db.extent(1), convert<G, G>{{}, grads.db});
    }
    return;
  }
  const adapter_input<Masked, X> seen(function, exec, x, o);
  const down_projection<E> down(bias_tag<bias_t<Base>>{}, function, exec, seen.view, p, o.h, true);
  const reachable<E> b(function, exec, p.b);
  const device_matrix<E> g(exec, tokens, down.h.view.extent(1));
  project_back_on<E>(function, exec, dy, b.view, rank, p.scale, g.view);
  add_gradients_on<E>(function, exec, dy, seen.view, down.h.view, g.view, grads, o.accumulate);
  if (dx.empty()) return;
  using Stage = finish<A, bias_t<Base>, Dx>;
  const auto a = narrowed(down.a.view, x.extent(1));
  const auto gs = as_const(narrowed(g.view, rank));
  if constexpr (Masked) {
    multiply_on<E>(function, exec, left_of(gs), right_of(a), dx, Stage{});
    drop_in_place(function, exec, dx, dropout_mask::make(o.dropout, o.seed, o.stream, x.extent(1)));
    multiply_on<E>(function, exec, left_of(dy), right_operand(base.weight()), dx, Stage{}.adding(dx));
  } else {
    propagate_on<E>(function, exec, dy, base, gs, a, dx, Stage{});
  }
}

template <class X, class Base, class T, class D, class G, class Dx, class A>
void run_gradients(const cuda& exec, const matrix_view<const X>& x, const Base& base, const adapter_view<T>& p,
                   const matrix_view<const D>& dy, const gradients<G>& grads, const matrix_view<Dx>& dx,
                   const linear_options<A>& o) {
  if (drops(o))
    run_backward_of<true>(exec, x, base, p, dy, grads, dx, o);
  else
    run_backward_of<false>(exec, x, base, p, dy, grads, dx, o);
}

}  // namespace MLKIT_NAMESPACE::lora::detail
