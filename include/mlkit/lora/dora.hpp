// DoRA: an adapter whose result is given a trained length, row by row of the weight.
#pragma once

#include "linear.hpp"
#include "rows.hpp"

namespace MLKIT_NAMESPACE::lora {

/// ||W||^2 of each row of a base, [out]: what DoRA's norms need of the frozen weight, computed once by base_norms.
/// They are where the executor that computed them keeps its data.
template <class A, class Memory = vector<A>>
struct base_squares {
  Memory squares;
};

/// ||W + s B A|| of each row, [out]: all that DoRA needs while neither weight nor adapter changes, computed by
/// adapted_norms.
template <class A, class Memory = vector<A>>
struct frozen_norms {
  Memory norms;
};

namespace detail {

template <class P>
struct dora_element {
  static_assert(plain_adapter<P>,
                "lora: dora takes a plain adapter (lora::adapter or lora::adapter_view); DoRA of DoRA or of several "
                "adapters has no meaning");
  using type = typename std::remove_cvref_t<P>::value_type;
};

}  // namespace detail

/// DoRA: y = g * (x W^T + s (x A^T) B^T) + bias with g = magnitude / ||W + s B A||, one factor for each output.
/// Liu et al.: "DoRA: weight-decomposed low-rank adaptation", 2024. It owns nothing.
///
/// `dora{adapter, magnitude}` computes the norms in every call; `dora{adapter, magnitude, base_norms(exec, base)}` has
/// the weight's part of them; `dora{adapter, magnitude, adapted_norms(exec, base, adapter)}` has all, for inference.
/// magnitude [out] starts at the norms of the weight's rows.
template <storage T, storage M = T>
struct dora {
  static_assert(std::is_same_v<T, double> == std::is_same_v<M, double>,
                "lora: f64 goes with f64 alone: adapter and magnitude are both f64, or neither is");
  using value_type = T;
  using sums_type = accumulator_t<T>;
  adapter_view<T> adapter;
  vector_view<const M> magnitude;
  vector_view<const sums_type> squares = {};
  vector_view<const sums_type> norms = {};

  template <plain_adapter P, viewable<1> V>
  dora(const P& p, V&& m) : adapter(as_adapter(p)), magnitude(as_view(m)) {}
  template <plain_adapter P, viewable<1> V, class Memory>
  dora(const P& p, V&& m, const base_squares<sums_type, Memory>& b)
      : adapter(as_adapter(p)), magnitude(as_view(m)), squares(b.squares.view()) {}
  template <plain_adapter P, viewable<1> V, class Memory>
  dora(const P& p, V&& m, const frozen_norms<sums_type, Memory>& n)
      : adapter(as_adapter(p)), magnitude(as_view(m)), norms(n.norms.view()) {}
};
template <class P, viewable<1> V, class... Norms>
dora(const P&, V&&, const Norms&...)
    -> dora<typename detail::dora_element<P>::type, element_t<std::remove_reference_t<V>>>;

namespace detail {

template <class Call, class T, class M>
void check_dora(Call& call, std::string_view function, const dora<T, M>& d, index_t outputs, index_t inputs) {
  check_adapter(function, d.adapter, outputs, inputs);
  check_row(function, "magnitude", d.magnitude, outputs);
  if (!d.magnitude.data && outputs > 0) fail_value(function, ": magnitude is null");
  if (d.squares.data) check_row(function, "the base's norms", d.squares, outputs);
  if (d.norms.data) check_row(function, "the adapted norms", d.norms, outputs);
  call.reads("magnitude", d.magnitude);
  call.reads("the base's norms", d.squares);
  call.reads("the adapted norms", d.norms);
}

template <class Call, class G>
void check_magnitude(Call& call, std::string_view function, const gradients<G>& g, index_t outputs) {
  check_output(function, "dmagnitude", g.dmagnitude);
  if (g.dmagnitude.extent(0) != outputs)
    fail_shape(function, ": dmagnitude has ", g.dmagnitude.extent(0), " elements, but base has ", outputs, " outputs");
  call.writes("dmagnitude", g.dmagnitude);
}

// dmagnitude (+)= sums / norms, 0 where the norm is 0.
template <class G, class A>
void finish_magnitude(const vector_view<G>& dmagnitude, bool accumulate, const A* sums, const A* norms) noexcept {
  for (index_t i = 0; i < dmagnitude.extent(0); ++i) {
    const A before = accumulate ? static_cast<A>(dmagnitude(i)) : A{};
    dmagnitude(i) = static_cast<G>(norms[i] != 0 ? before + sums[i] / norms[i] : before);
  }
}

// squares[o] = ||W[o]||^2.
template <class Base, class A>
void square_rows(const cpu& exec, const Base& base, A* squares) {
  const auto weight = left_operand(base.weight());
  const auto kernel = MLKIT_SELECT(square_lines<typename decltype(weight)::source_type, A>);
  const cpu limited = limit_threads(exec, static_cast<double>(base.outputs()) * static_cast<double>(base.inputs()));
  constexpr index_t lines = 16;  // whole cache lines of the result
  parallel_ranges(limited, ceil_div(base.outputs(), lines), [&](index_t begin, index_t end) {
    kernel(weight, begin * lines, std::min(base.outputs(), end * lines), squares);
  });
}

// norms[o] = ||W[o] + s B[o] A||, from the squares of W's rows:
// ||W||^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B = ||W||^2 + s [2 (W A^T + B (s/2 A A^T))] . B, where the bracket is one
// product. Section 4.3 of DoRA proposes to hold the norm constant; the expansion avoids forming W + s B A. Rows of
// which the adapter leaves little cancel in the expansion: those are formed.
template <class Base, class T, class A>
void adapted_rows(const cpu& exec, const Base& base, const adapter_view<T>& p, const A* squares, A* norms) {
  using Bias = bias_t<Base>;
  const index_t rank = p.rank(), out = base.outputs();
  const workspace<A> memory(rank * (rank + out));
  const matrix_view<A> gram(memory.data(), {rank, rank}), cross(memory.data() + rank * rank, {out, rank});
  multiply<product_type_t<T, T>>(exec, left_of(p.a), right_of(transposed(p.a)), nothing<A>(rank), nothing<T>(rank),
                                 gram, finish<A, Bias, A>{.value = static_cast<A>(p.scale / 2)});
  multiply<sums_t<T>>(exec, left_operand(base.weight()), right_of(transposed(p.a)), left_of(p.b), right_of(gram), cross,
                      finish<A, Bias, A>{.value = 2});
  const auto weight = left_operand(base.weight());
  const auto decode = MLKIT_SELECT(decode_line<typename decltype(weight)::source_type, A>);
  const cpu limited = limit_threads(exec, static_cast<double>(out) * static_cast<double>(rank));
  parallel_ranges(limited, out, [&](index_t begin, index_t end) {
    for (index_t o = begin; o < end; ++o) {
      double dot = 0;
      for (index_t j = 0; j < rank; ++j) dot += static_cast<double>(cross(o, j)) * static_cast<double>(p.b(o, j));
      double square = static_cast<double>(squares[o]) + p.scale * dot;
      if (square < static_cast<double>(squares[o]) / 64) {
        const workspace<A> line(p.inputs());
        const workspace<double> sums(p.inputs());
        decode(weight, o, line.data());
        for (index_t k = 0; k < p.inputs(); ++k) sums.data()[k] = static_cast<double>(line.data()[k]);
        for (index_t j = 0; j < rank; ++j)
          for (index_t k = 0; k < p.inputs(); ++k)
            sums.data()[k] += p.scale * static_cast<double>(p.b(o, j)) * static_cast<double>(p.a(j, k));
        square = 0;
        for (index_t k = 0; k < p.inputs(); ++k) square += sums.data()[k] * sums.data()[k];
      }
      norms[o] = static_cast<A>(std::sqrt(square));
    }
  });
}

// The norms that d brings, or those computed into norms [out].
template <class Base, class T, class M, class A>
const A* find_norms(const cpu& exec, const Base& base, const dora<T, M>& d, A* norms) {
  if (d.norms.data) return d.norms.data;
  if (d.squares.data) {
    adapted_rows(exec, base, d.adapter, d.squares.data, norms);
  } else {
    const workspace<A> squares(base.outputs());
    square_rows(exec, base, squares.data());
    adapted_rows(exec, base, d.adapter, static_cast<const A*>(squares.data()), norms);
  }
  return norms;
}

// g = magnitude / norm; 0 where the adapted row is zero, and its output with it.
template <class M, class A>
void find_factors(const vector_view<const M>& magnitude, const A* norms, A* factors) noexcept {
  for (index_t o = 0; o < magnitude.extent(0); ++o)
    factors[o] = norms[o] == 0 ? A{} : static_cast<A>(magnitude(o)) / norms[o];
}

// scaled = factors * b, row by row.
template <class T, class A>
void scale_rows_of(const matrix_view<const T>& b, const A* factors, const matrix_view<A>& scaled) noexcept {
  for (index_t o = 0; o < b.extent(0); ++o)
    for (index_t j = 0; j < b.extent(1); ++j) scaled(o, j) = factors[o] * static_cast<A>(b(o, j));
}

template <class T, class A>
operand<scaled_source<T, A>> scaled_operand(const matrix_view<const T>& v, const A* factors) {
  const auto plain = dense_operand<T>(v, 0);
  return {{plain.source, factors, !plain.depth_first}, plain.depth_first};
}

template <bool Masked, class X, class Base, class T, class M, class Y, class A>
void run_dora(const cpu& exec, const matrix_view<const X>& x, const Base& base, const dora<T, M>& d,
              const matrix_view<Y>& y, const linear_options<A>& o) {
  if (x.extent(0) == 0) return;
  const index_t out = base.outputs(), rank = d.adapter.rank();
  const workspace<A> memory(out * 2);
  A* factors = memory.data() + out;
  find_factors(d.magnitude, find_norms(exec, base, d, memory.data()), factors);
  if constexpr (!Masked) {
    run_linear<false>(exec, x, base, d.adapter, y, o, factors);
  } else {
    // x W^T + bias + h B^T, and to it (g - 1) z with z = D(x) W^T + h B^T.
    for (index_t i = 0; i < out; ++i) factors[i] -= 1;
    const dropout_mask whole = dropout_mask::make(o.dropout, o.seed, o.stream, x.extent(1));
    each_token_block(x.extent(0), rank, o.h, [&](index_t first, index_t count, const matrix_view<A>& h) {
      const auto masked = masked_operand(rows_of(x, first, count), 0, whole.from(first));
      const auto ys = rows_of(y, first, count);
      project_down<bias_t<Base>>(exec, masked, d.adapter, h);
      project_up(exec, left_of(rows_of(x, first, count)), base, h, d.adapter.b, ys,
                 finish<A, bias_t<Base>, Y>{.bias = base.bias.data});
      finish<A, bias_t<Base>, Y> stage{.columns = factors};
      if (o.z.data) stage.keeping(rows_of(o.z, first, count));
      project_up(exec, masked, base, h, d.adapter.b, ys, stage.adding(ys));
    });
  }
}

// Columns that one thread takes together: whole cache lines of sums.
inline constexpr index_t row_columns = 64;
// Tokens whose unscaled outputs are held at once for the gradient of the magnitude.
inline constexpr index_t dora_tokens = 256;

template <bool Masked, class X, class Base, class T, class M, class D, class G, class Dx, class A>
void run_dora_backward(const cpu& exec, const matrix_view<const X>& x, const Base& base, const dora<T, M>& d,
                       const matrix_view<const D>& dy, const gradients<A>& grads, const vector_view<G>& dmagnitude,
                       const matrix_view<Dx>& dx, const linear_options<A>& o) {
  using Bias = bias_t<Base>;
  using E = product_type_t<D, typename Base::value_type>;
  const adapter_view<T>& p = d.adapter;
  const index_t tokens = x.extent(0), out = base.outputs(), rank = p.rank();
  const workspace<A> memory(out * (4 + rank) + std::min(tokens, tokens_at_once) * rank +
                            (o.z.data ? 0 : std::min(tokens, dora_tokens) * out));
  A* factors = memory.data() + out;
  A* sums = factors + out;
  A* less_one = sums + out;
  const A* norms = find_norms(exec, base, d, memory.data());
  find_factors(d.magnitude, norms, factors);
  const matrix_view<A> scaled(less_one + out, {out, rank});
  scale_rows_of(p.b, factors, scaled);
  std::fill_n(sums, out, A{});
  for (index_t i = 0; i < out; ++i) less_one[i] = factors[i] - 1;
  A* g_memory = less_one + out * (1 + rank);
  A* z_memory = g_memory + std::min(tokens, tokens_at_once) * rank;

  const dropout_mask whole = dropout_mask::make(o.dropout, o.seed, o.stream, x.extent(1));
  each_token_block(tokens, rank, o.h, [&](index_t first, index_t count, const matrix_view<A>& h) {
    const auto dys = rows_of(dy, first, count);
    const auto x_operand = [&](int line_dim, index_t row, index_t rows) {
      const auto xs = rows_of(x, first + row, rows);
      if constexpr (Masked)
        return masked_operand(xs, line_dim, whole.from(first + row));
      else
        return dense_operand<X>(xs, line_dim);
    };
    if (!o.h.data) project_down<Bias>(exec, x_operand(0, 0, count), p, h);

    // The magnitude's: dy times z, which is computed again where forward did not keep it.
    for (index_t row = 0; row < count; row += dora_tokens) {
      const index_t rows = std::min(dora_tokens, count - row);
      const matrix_view<A> z = o.z.data ? rows_of(o.z, first + row, rows) : matrix_view<A>(z_memory, {rows, out});
      if (!o.z.data)
        project_up(exec, x_operand(0, row, rows), base, rows_of(h, row, rows), p.b, z, finish<A, Bias, A>{});
      const dense_source<D> dy_rows{&dys(row, 0), rows, out, dys.stride(0), dys.stride(1)};
      const dense_source<A> z_rows{z.data, rows, out, z.stride(0), 1};
      const auto kernel = MLKIT_SELECT(add_column_products<D, A>);
      const cpu limited = limit_threads(exec, static_cast<double>(rows) * static_cast<double>(out));
      parallel_ranges(limited, ceil_div(out, row_columns), [&](index_t begin, index_t end) {
        kernel(dy_rows, z_rows, begin * row_columns, std::min(out, end * row_columns), sums);
      });
    }

    const matrix_view<A> g(g_memory, {count, rank});
    multiply<product_type_t<D, A>>(exec, left_of(dys), right_of(scaled), nothing<A>(count), nothing<T>(rank), g,
                                   finish<A, Bias, A>{.value = static_cast<A>(p.scale)});
    add_gradients<Bias>(exec, dys, h, g, x_operand(1, 0, count), p, static_cast<const A*>(factors), grads);
    if (!dx.data) return;
    const auto dxs = rows_of(dx, first, count);
    if constexpr (Masked) {
      multiply<E>(exec, scaled_operand(dys, less_one), right_operand(base.weight()), left_of(g), right_of(p.a), dxs,
                  mask_output{whole.from(first)});
      multiply<E>(exec, left_of(dys), right_operand(base.weight()), nothing<A>(count), nothing<T>(p.inputs()), dxs,
                  finish<A, Bias, Dx>{}.adding(dxs));
    } else {
      multiply<E>(exec, scaled_operand(dys, factors), right_operand(base.weight()), left_of(g), right_of(p.a), dxs,
                  finish<A, Bias, Dx>{});
    }
  });
  finish_magnitude(dmagnitude, o.accumulate, sums, norms);
}

template <class X, class Base, class T, class M, class D, class G, class Dx, class A>
void run_dora_gradients(const cpu& exec, const matrix_view<const X>& x, const Base& base, const dora<T, M>& d,
                        const matrix_view<const D>& dy, const gradients<G>& grads, const matrix_view<Dx>& dx,
                        const linear_options<A>& o) {
  summed_as<A>(grads, o.accumulate, [&](const auto& sums) {
    if (drops(o))
      run_dora_backward<true>(exec, x, base, d, dy, sums, grads.dmagnitude, dx, o);
    else
      run_dora_backward<false>(exec, x, base, d, dy, sums, grads.dmagnitude, dx, o);
  });
}

// norms[o] = ||W[o] + s B[o] A||, from the weight.
template <class Base, class T, class A>
void run_adapted_norms(const cpu& exec, const Base& base, const adapter_view<T>& p, A* norms) {
  const workspace<A> squares(base.outputs());
  square_rows(exec, base, squares.data());
  adapted_rows(exec, base, p, static_cast<const A*>(squares.data()), norms);
}

// A vector where the executor keeps its data.
template <class A, class Executor>
struct executor_vector {
  static vector<A> make(const Executor&, index_t n) { return vector<A>({n}); }
};

// What lora.cuh brings for mlkit::cuda.
template <bool Masked, class X, class Base, class T, class M, class Y, class A>
void run_dora(const cuda& exec, const matrix_view<const X>& x, const Base& base, const dora<T, M>& d,
              const matrix_view<Y>& y, const linear_options<A>& o);
template <class X, class Base, class T, class M, class D, class G, class Dx, class A>
void run_dora_gradients(const cuda& exec, const matrix_view<const X>& x, const Base& base, const dora<T, M>& d,
                        const matrix_view<const D>& dy, const gradients<G>& grads, const matrix_view<Dx>& dx,
                        const linear_options<A>& o);
template <class Base, class A>
void square_rows(const cuda& exec, const Base& base, A* squares);
template <class Base, class T, class A>
void run_adapted_norms(const cuda& exec, const Base& base, const adapter_view<T>& p, A* norms);

}  // namespace detail

/// ||W||^2 of each row of a base, for dora{adapter, magnitude, norms}: once for each frozen weight.
/// Reads W once; 2 in out flops. Throws shape_error or value_error for a base that cannot be read.
template <executor Executor, linear_base Base>
auto base_norms(const Executor& exec, const Base& base) {
  using A = accumulator_t<typename Base::value_type>;
  detail::check_base("lora::base_norms", base);
  auto squares = detail::executor_vector<A, Executor>::make(exec, base.outputs());
  detail::square_rows(exec, base, squares.data());
  return base_squares<A, decltype(squares)>{std::move(squares)};
}

/// ||W + s B A|| of each row, without forming W + s B A. Also where a magnitude starts:
/// `adapted_norms(exec, base, adapter).norms`. 2 in out (1 + rank) flops.
/// Throws as linear does for base and adapter.
template <executor Executor, linear_base Base, plain_adapter Adapter>
auto adapted_norms(const Executor& exec, const Base& base, const Adapter& adapter) {
  using P = typename Adapter::value_type;
  using A = accumulator_t<P>;
  detail::check_types<typename Base::value_type, P>();
  const adapter_view<P> p = as_adapter(adapter);
  detail::check_base("lora::adapted_norms", base);
  detail::check_adapter("lora::adapted_norms", p, base.outputs(), base.inputs());
  auto norms = detail::executor_vector<A, Executor>::make(exec, base.outputs());
  detail::run_adapted_norms(exec, base, p, norms.data());
  return frozen_norms<A, decltype(norms)>{std::move(norms)};
}

/// DoRA: y = g * (x W^T + s (x A^T) B^T) + bias, g = magnitude / ||W + s B A|| (0 where the norm is 0).
/// One product, as for a plain adapter, with the factors in its epilogue. The norms cost 2 in out (1 + rank) flops and
/// two readings of W, one with base_norms, nothing with adapted_norms.
/// Types, errors and determinism as for a plain adapter.
template <executor Executor, viewable<2> X, linear_base Base, class T, class M, viewable<2> Y>
void linear(const Executor& exec, const X& x, const Base& base, const dora<T, M>& adapter, Y&& y) {
  using U = element_t<const X>;
  const matrix_view<const U> in = as_view(x);
  const auto out = as_view(y);
  detail::check_types<U, typename Base::value_type, T, element_t<std::remove_reference_t<Y>>>();
  const linear_options<accumulator_t<T>> options;
  detail::arguments call("lora::linear", exec);
  detail::check_linear(call, "lora::linear", in, base, adapter.adapter, out, options);
  detail::check_dora(call, "lora::linear", adapter, base.outputs(), base.inputs());
  detail::run_dora<false>(exec, in, base, adapter, out, options);
}

/// The same with options. With dropout D, y = x W^T + bias + (g - 1) D(x) W^T + g s (D(x) A^T) B^T: two products.
template <executor Executor, viewable<2> X, linear_base Base, class T, class M, viewable<2> Y>
void linear(const Executor& exec, const X& x, const Base& base, const dora<T, M>& adapter, Y&& y,
            const linear_options<accumulator_t<T>>& options) {
  using U = element_t<const X>;
  const matrix_view<const U> in = as_view(x);
  const auto out = as_view(y);
  detail::check_types<U, typename Base::value_type, T, element_t<std::remove_reference_t<Y>>>();
  detail::arguments call("lora::linear", exec);
  detail::check_linear(call, "lora::linear", in, base, adapter.adapter, out, options);
  detail::check_dora(call, "lora::linear", adapter, base.outputs(), base.inputs());
  if (detail::drops(options))
    detail::run_dora<true>(exec, in, base, adapter, out, options);
  else
    detail::run_dora<false>(exec, in, base, adapter, out, options);
}

/// DoRA's gradients, with the norm held constant (section 4.3 of the paper): with u = g * dy and z = W D(x) + s B A
/// D(x),
///   dmagnitude = sum over tokens of dy * z / norm [out],   db = u^T h,   da = (s u B)^T D(x),
///   dx = u W + s u B A, and with dropout dy W + D^T((g - 1) dy W + s u B A).
/// z is computed again, 256 tokens at a time, where forward was not given `options.z` to keep it in. Otherwise as for a
/// plain adapter.
template <executor Executor, viewable<2> X, linear_base Base, class T, class M, viewable<2> D, class G, viewable<2> Dx>
void linear_backward(const Executor& exec, const X& x, const Base& base, const dora<T, M>& adapter, const D& dy,
                     const gradients<G>& grads, Dx&& dx, const linear_options<accumulator_t<T>>& options = {}) {
  constexpr std::string_view function = "lora::linear_backward";
  using U = element_t<const X>;
  using V = element_t<const D>;
  const matrix_view<const U> in = as_view(x);
  const matrix_view<const V> dout = as_view(dy);
  const auto din = as_view(dx);
  detail::check_types<U, typename Base::value_type, T, V, G, element_t<std::remove_reference_t<Dx>>>();
  detail::arguments call(function, exec);
  detail::check_backward(call, function, in, base, adapter.adapter, dout, grads, din, options);
  detail::check_dora(call, function, adapter, base.outputs(), base.inputs());
  detail::check_magnitude(call, function, grads, base.outputs());
  detail::run_dora_gradients(exec, in, base, adapter, dout, grads, din, options);
}

}  // namespace MLKIT_NAMESPACE::lora
