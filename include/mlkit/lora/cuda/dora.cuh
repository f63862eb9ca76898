// DoRA on a GPU.
#pragma once

#include "../dora.hpp"
#include "linear.cuh"

namespace MLKIT_NAMESPACE::lora::detail {

// A warp takes the norms of `norm_rows` rows at once, so that it reads A once for all of them.
inline constexpr int norm_warps = 4, norm_rows = 4, norm_rank = 32;

/// norms[o] = ||W[o] + s B[o] A||, or its square; each row is formed on the way, 32 of its elements at a time, so that
/// nothing cancels. rank may be 0.
template <class A, class Source, class T>
__global__ __launch_bounds__(norm_warps * 32) void norm_kernel(const mlkit::detail::device_operand<Source> weight,
                                                               const adapter_view<T> p, index_t rank, bool square,
                                                               A* norms) {
  __shared__ A b[norm_warps][norm_rank][norm_rows];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const index_t first = (index_t{blockIdx.x} * norm_warps + warp) * norm_rows;
  const A scale = static_cast<A>(p.scale);
  A sums[norm_rows] = {};
  // Ranks beyond norm_rank are read from memory each time.
  for (int e = lane; e < norm_rank * norm_rows; e += 32) {
    const index_t row = first + e % norm_rows, j = e / norm_rows;
    b[warp][j][e % norm_rows] = j < rank && row < weight.lines ? scale * static_cast<A>(p.b(row, j)) : A{};
  }
  __syncwarp();
  for (index_t k = lane; k < weight.depth; k += 32) {
    A x[norm_rows];
#pragma unroll
    for (int i = 0; i < norm_rows; ++i) x[i] = first + i < weight.lines ? element<A>(weight.source, first + i, k) : A{};
    const int held = static_cast<int>(rank < norm_rank ? rank : norm_rank);
    for (int j = 0; j < held; ++j) {
      const A a = static_cast<A>(p.a(j, k));
#pragma unroll
      for (int i = 0; i < norm_rows; ++i) x[i] += b[warp][j][i] * a;
    }
    for (index_t j = norm_rank; j < rank; ++j) {
      const A a = scale * static_cast<A>(p.a(j, k));
#pragma unroll
      for (int i = 0; i < norm_rows; ++i)
        if (first + i < weight.lines) x[i] += static_cast<A>(p.b(first + i, j)) * a;
    }
#pragma unroll
    for (int i = 0; i < norm_rows; ++i) sums[i] += x[i] * x[i];
  }
#pragma unroll
  for (int i = 0; i < norm_rows; ++i) {
#pragma unroll
    for (int far = 16; far > 0; far /= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], far);
    if (lane == 0 && first + i < weight.lines) norms[first + i] = square ? sums[i] : sqrt(sums[i]);
  }
}

template <class Base, class T, class A>
void run_norms(std::string_view function, const cuda& exec, const Base& base, const adapter_view<T>& p, bool square,
               A* norms) {
  using Source = base_source_t<Base>;
  const auto weight = left_operand(base.weight());
  mlkit::detail::device_operand<Source> rows(weight);
  if constexpr (!is_decoded<Source>) {  // rows of W, however it lies in memory
    const auto w = base.weight();
    rows.source = {w.data, w.extent(0), w.extent(1), w.stride(0), w.stride(1)};
    rows.lines = w.extent(0);
    rows.depth = w.extent(1);
  }
  launch(function, exec, norm_kernel<A, Source, T>,
         {dim3(static_cast<unsigned>(ceil_div(base.outputs(), norm_warps * norm_rows))), dim3(norm_warps * 32)}, rows,
         p, p.rank(), square, norms);
}

template <class Base, class A>
void square_rows(const cuda& exec, const Base& base, A* squares) {
  run_norms("lora::base_norms", exec, base, adapter_view<A>{}, true, squares);
}
template <class Base, class T, class A>
void run_adapted_norms(const cuda& exec, const Base& base, const adapter_view<T>& p, A* norms) {
  run_norms("lora::adapted_norms", exec, base, p, false, norms);
}
template <class A>
struct executor_vector<A, cuda> {
  static device_tensor<A, 1> make(const cuda& exec, index_t n) { return {exec, {n}}; }
};

/// factors = magnitude / norms - less, where the norm is 0: -less.
template <class M, class A>
struct divide_magnitude {
  vector_view<const M> magnitude;
  const A* norms;
  A* factors;
  A less;
  __device__ void operator()(index_t, index_t o) const {
    factors[o] = (norms[o] == A{} ? A{} : static_cast<A>(magnitude(o)) / norms[o]) - less;
  }
};

/// What a call has of DoRA's numbers: norms and, made of them, factors [out].
template <class A>
struct device_norms {
  device_matrix<A> memory;
  const A* norms;
  A *factors, *sums;

  template <class Base, class T, class M>
  device_norms(std::string_view function, const cuda& exec, const Base& base, const dora<T, M>& d, A less)
      : memory(exec, 3, base.outputs()), norms(d.norms.data), factors(memory.memory.data()) {
    const index_t out = base.outputs();
    sums = factors + 2 * out;
    if (!norms) {
      run_norms(function, exec, base, d.adapter, false, factors + out);
      norms = factors + out;
    }
    each_element(function, exec, 1, out, divide_magnitude<M, A>{d.magnitude, norms, factors, less});
  }
};

template <bool Masked, class X, class Base, class T, class M, class Y, class A>
void run_dora(const cuda& exec, const matrix_view<const X>& x, const Base& base, const dora<T, M>& d,
              const matrix_view<Y>& y, const linear_options<A>& o) {
  constexpr std::string_view function = "lora::linear";
  if (y.empty()) return;
  const device_norms<A> g(function, exec, base, d, Masked ? A{1} : A{});
  if constexpr (!Masked) {
    run_linear<false>(exec, x, base, d.adapter, y, o, static_cast<const A*>(g.factors));
  } else {
    // x W^T + bias + h B^T, and to it (g - 1) z with z = D(x) W^T + h B^T.
    using Bias = bias_t<Base>;
    using E = device_type_t<X, base_source_t<Base>>;
    const adapter_view<T>& p = d.adapter;
    const adapter_input<true, X> seen(function, exec, x, o);
    const reachable<E> b(function, exec, p.b);
    const down_projection<E> down(bias_tag<Bias>{}, function, exec, seen.view, p, o.h, false);
    const auto right = right_operand(transposed(base.weight()));
    const auto h = left_of(narrowed(down.h.view, b.view.extent(1))), b_lines = left_of(b.view);
    multiply_on<E>(function, exec, left_of(x), right, h, b_lines, y, finish<A, Bias, Y>{.bias = base.bias.data});
    finish<A, Bias, Y> stage{.columns = g.factors};
    if (o.z.data) stage.keeping(o.z);
    multiply_on<E>(function, exec, left_of(seen.view), right, h, b_lines, y, stage.adding(y));
  }
}

/// to = from * factors, column by column.
template <class From, class To, class A>
struct scale_into {
  matrix_view<const From> from;
  matrix_view<To> to;
  const A* factors;
  __device__ void operator()(index_t i, index_t j) const {
    to(i, j) = static_cast<To>(static_cast<A>(from(i, j)) * factors[j]);
  }
};

inline constexpr int column_lines = 8;

/// sums[col] = (sums[col] or 0) + sum over rows of a[row, col] b[row, col]: each of eight lines of threads sums its
/// turn of the rows, and the lines are added in order.
template <class D, class A>
__global__ __launch_bounds__(32 * column_lines) void column_products_kernel(const matrix_view<const D> a,
                                                                            const matrix_view<const A> b, bool add,
                                                                            A* sums) {
  __shared__ A parts[column_lines][32];
  const int lane = static_cast<int>(threadIdx.x) % 32, line = static_cast<int>(threadIdx.x) / 32;
  const index_t col = index_t{blockIdx.x} * 32 + lane;
  A sum{};
  if (col < a.extent(1))
    for (index_t row = line; row < a.extent(0); row += column_lines) sum += static_cast<A>(a(row, col)) * b(row, col);
  parts[line][lane] = sum;
  __syncthreads();
  if (line > 0 || col >= a.extent(1)) return;
  A total = add ? sums[col] : A{};
  for (int i = 0; i < column_lines; ++i) total += parts[i][lane];
  sums[col] = total;
}

/// dmagnitude (+)= sums / norms, 0 where the norm is 0.
template <class G, class A>
struct divide_sums {
  vector_view<G> to;
  const A *sums, *norms;
  bool sums_are_0, accumulate;
  __device__ void operator()(index_t, index_t o) const {
    const A before = accumulate ? static_cast<A>(to(o)) : A{};
    to(o) = static_cast<G>(!sums_are_0 && norms[o] != A{} ? before + sums[o] / norms[o] : before);
  }
};

// Tokens whose unscaled outputs are held at once for the gradient of the magnitude.
inline constexpr index_t device_dora_tokens = 2048;

template <bool Masked, class X, class Base, class T, class M, class D, class G, class Dx, class A>
void run_dora_backward_of(const cuda& exec, const matrix_view<const X>& x, const Base& base, const dora<T, M>& d,
                          const matrix_view<const D>& dy, const gradients<G>& grads, const matrix_view<Dx>& dx,
                          const linear_options<A>& o) {
  constexpr std::string_view function = "lora::linear_backward";
  using Bias = bias_t<Base>;
  using E = device_type_t<X, base_source_t<Base>>;
  const adapter_view<T>& p = d.adapter;
  const index_t tokens = x.extent(0), out = base.outputs(), rank = p.rank();
  const device_norms<A> g(function, exec, base, d, A{});
  const adapter_input<Masked, X> input(function, exec, x, o);
  const matrix_view<const X>& seen = input.view;

  if (tokens > 0) {
    const reachable<E> b(function, exec, p.b);
    const down_projection<E> down(bias_tag<Bias>{}, function, exec, seen, p, o.h, true);
    const device_matrix<A> memory(exec, o.z.data ? 0 : std::min(tokens, device_dora_tokens), out);
    for (index_t first = 0; first < tokens; first += device_dora_tokens) {
      const index_t count = std::min(device_dora_tokens, tokens - first);
      const auto z = rows_of(o.z.data ? o.z : memory.view, o.z.data ? first : 0, count);
      if (!o.z.data)
        multiply_on<E>(function, exec, left_of(rows_of(seen, first, count)), right_operand(transposed(base.weight())),
                       left_of(rows_of(as_const(narrowed(down.h.view, b.view.extent(1))), first, count)),
                       left_of(b.view), z, finish<A, Bias, A>{});
      launch(function, exec, column_products_kernel<D, A>,
             {dim3(static_cast<unsigned>(ceil_div(out, 32))), dim3(32 * column_lines)}, rows_of(dy, first, count),
             as_const(z), first > 0, g.sums);
    }
  }
  each_element(function, exec, 1, out, divide_sums<G, A>{grads.dmagnitude, g.sums, g.norms, tokens == 0, o.accumulate});

  const device_matrix<D> u(exec, tokens, out);
  if (tokens > 0) each_element(function, exec, tokens, out, scale_into<D, D, A>{dy, u.view, g.factors});
  const matrix_view<const D> us = u.view;
  if constexpr (!Masked) {
    run_backward_of<false>(exec, x, base, p, us, grads, dx, o);
  } else {
    run_backward_of<false>(exec, seen, base, p, us, grads, matrix_view<Dx>(), o);
    if (dx.empty()) return;
    // dy W + D^T((g - 1) dy W + s u B A)
    const device_matrix<A> less(exec, 1, out);
    each_element(function, exec, 1, out, divide_magnitude<M, A>{d.magnitude, g.norms, less.view.data, A{1}});
    const reachable<E> b(function, exec, p.b), a(function, exec, p.a);
    const device_matrix<E> gs(exec, tokens, round_up(rank, index_t{16 / sizeof(E)}));
    project_back_on<E>(function, exec, us, b.view, rank, p.scale, gs.view);
    each_element(function, exec, tokens, out, scale_into<D, D, A>{dy, u.view, less.view.data});
    using Stage = finish<A, Bias, Dx>;
    propagate_on<E>(function, exec, us, base, as_const(narrowed(gs.view, rank)), narrowed(a.view, x.extent(1)), dx,
                    Stage{});
    drop_in_place(function, exec, dx, dropout_mask::make(o.dropout, o.seed, o.stream, x.extent(1)));
    multiply_on<E>(function, exec, left_of(dy), right_operand(base.weight()), dx, Stage{}.adding(dx));
  }
}

template <class X, class Base, class T, class M, class D, class G, class Dx, class A>
void run_dora_gradients(const cuda& exec, const matrix_view<const X>& x, const Base& base, const dora<T, M>& d,
                        const matrix_view<const D>& dy, const gradients<G>& grads, const matrix_view<Dx>& dx,
                        const linear_options<A>& o) {
  if (drops(o))
    run_dora_backward_of<true>(exec, x, base, d, dy, grads, dx, o);
  else
    run_dora_backward_of<false>(exec, x, base, d, dy, grads, dx, o);
}

}  // namespace MLKIT_NAMESPACE::lora::detail
