// The adapted linear map: y = x W^T + bias + s (D(x) A^T) B^T, forward and backward.
#pragma once

#include "../core/arguments.hpp"
#include "dropout.hpp"
#include "products.hpp"

namespace MLKIT_NAMESPACE::lora {

/// What linear and linear_backward may be told; the two calls of a training step are given the same.
/// A is the type of sums: float, or double where all is f64.
template <class A>
struct linear_options {
  /// The probability, in [0, 1), that an element of x is dropped on its way into A (never on its way into W).
  double dropout = 0;
  std::uint64_t seed = 0;
  std::uint64_t stream = 0;  ///< one for each layer and step, so that masks differ
  bool training = true;      ///< false switches dropout off
  /// s D(x) A^T, [tokens, rank]: forward writes it if it is given, and backward then need not compute it again.
  matrix_view<A> h = {};
  /// DoRA alone: what its factors multiply, x W^T + s (x A^T) B^T with D(x) for x, [tokens, out], each row a run:
  /// forward writes it if it is given, and backward then need not compute it again.
  matrix_view<A> z = {};
  bool accumulate = false;  ///< backward: add to da, db and dmagnitude instead of overwriting them
};

/// Where linear_backward writes the gradients: da [rank, in], db [out, rank], and for DoRA dmagnitude [out].
template <storage T>
struct gradients {
  matrix_view<T> da;
  matrix_view<T> db;
  vector_view<T> dmagnitude = {};

  gradients() = default;
  template <viewable<2> A, viewable<2> B>
  gradients(A&& a, B&& b) : da(as_view(a)), db(as_view(b)) {}
  template <viewable<2> A, viewable<2> B, viewable<1> M>
  gradients(A&& a, B&& b, M&& m) : da(as_view(a)), db(as_view(b)), dmagnitude(as_view(m)) {}
};
template <viewable<2> A, viewable<2> B, class... M>
gradients(A&&, B&&, M&&...) -> gradients<element_t<std::remove_reference_t<A>>>;

namespace detail {

template <class A>
bool drops(const linear_options<A>& o) noexcept {
  return o.training && o.dropout != 0;
}

template <class A>
void check_dropout(std::string_view function, const linear_options<A>& o) {
  if (!(o.dropout >= 0 && o.dropout < 1)) fail_value(function, ": dropout = ", o.dropout, " is outside [0, 1)");
}

// The base itself, and x against it.
template <class Base>
void check_base(std::string_view function, const Base& base) {
  if constexpr (requires { base.check(function); }) base.check(function);
  if constexpr (viewable<decltype(base.weight()), 2>) check_view(function, "base", base.weight());
  if (base.bias.data || !base.bias.empty()) check_row(function, "bias", base.bias, base.outputs());
}

template <class X>
void check_input(std::string_view function, const matrix_view<const X>& x, index_t inputs) {
  check_view(function, "x", x);
  if (x.extent(1) != inputs)
    fail_shape(function, ": x has ", x.extent(1), " columns, but base has ", inputs, " inputs");
}

template <class Y>
void check_result(std::string_view function, std::string_view name, const matrix_view<Y>& y, index_t tokens,
                  index_t outputs) {
  check_output(function, name, y);
  check_extent(function, name, "rows", y.extent(0), "x", tokens);
  if (y.extent(1) != outputs)
    fail_shape(function, ": ", name, " has ", y.extent(1), " columns, but base has ", outputs, " outputs");
}

template <class Call, class Base>
void name_base(Call& call, const Base& base) {
  if constexpr (viewable<decltype(base.weight()), 2>)
    call.reads("base", base.weight());
  else if constexpr (requires { base.weight().each_view([](std::string_view, const auto&) {}); })
    base.weight().each_view([&](std::string_view part, const auto& v) { call.reads(message("base's ", part), v); });
  call.reads("bias", base.bias);
}
template <class Call, class T>
void name_adapter(Call& call, const adapter_view<T>& p) {
  call.reads("adapter.a", p.a);
  call.reads("adapter.b", p.b);
}

// The saved h, where it is given.
template <class A>
void check_saved(std::string_view function, const matrix_view<A>& h, index_t tokens, index_t rank) {
  if (!h.data && h.empty()) return;
  check_output(function, "h", h);
  check_extent(function, "h", "rows", h.extent(0), "x", tokens);
  check_extent(function, "h", "columns", h.extent(1), "adapter.a", rank);
}

// DoRA's saved z, where it is given.
template <class A>
void check_kept(std::string_view function, const linear_options<A>& o, index_t tokens, index_t outputs) {
  if (!o.z.data && o.z.empty()) return;
  check_output(function, "z", o.z);
  check_extent(function, "z", "rows", o.z.extent(0), "x", tokens);
  check_extent(function, "z", "columns", o.z.extent(1), "base", outputs);
  if (o.z.extent(1) > 1 && o.z.stride(1) != 1)
    fail_shape(function, ": z has elements ", o.z.stride(1), " apart in a row; a row of it is a run");
}
template <class A>
void check_nothing_kept(std::string_view function, const linear_options<A>& o) {
  if (o.z.data || !o.z.empty()) fail_value(function, ": z is given, but only DoRA has one");
}

template <class X, class Base, class Y>
void check_linear(std::string_view function, const matrix_view<const X>& x, const Base& base, const matrix_view<Y>& y) {
  check_base(function, base);
  check_input(function, x, base.inputs());
  check_result(function, "y", y, x.extent(0), base.outputs());
}

// What forward reads and writes, of an adapter that was checked.
template <class X, class Base, class T, class Y, class A>
void check_linear(arguments& call, std::string_view function, const matrix_view<const X>& x, const Base& base,
                  const adapter_view<T>& p, const matrix_view<Y>& y, const linear_options<A>& o) {
  check_linear(function, x, base, y);
  check_adapter(function, p, base.outputs(), base.inputs());
  check_dropout(function, o);
  check_saved(function, o.h, x.extent(0), p.rank());
  check_kept(function, o, x.extent(0), base.outputs());
  call.reads("x", x);
  name_base(call, base);
  name_adapter(call, p);
  call.writes("y", y);
  call.writes("h", o.h);
  call.writes("z", o.z);
}

// x as an operand, under its mask.
template <class X>
operand<dropped_source<X>> masked_operand(const matrix_view<const X>& x, int line_dim, const dropout_mask& mask) {
  const auto plain = dense_operand<X>(x, line_dim);
  const bool rows_are_tokens = plain.depth_first == (line_dim == 0);
  return {{plain.source, mask, !rows_are_tokens}, plain.depth_first};
}

// h = s x A^T, with x seen through the operand `left`.
template <class Bias, class Left, class T, class A>
void project_down(const cpu& exec, const operand<Left>& left, const adapter_view<T>& p, const matrix_view<A>& h) {
  multiply<product_type_t<typename Left::value_type, T>>(exec, left, right_of(transposed(p.a)), nothing<A>(h.extent(0)),
                                                         nothing<T>(p.rank()), h,
                                                         finish<A, Bias, A>{.value = static_cast<A>(p.scale)});
}

// y = stage(x W^T + h B^T), with x seen through the operand `left`. h and B may be empty.
template <class Left, class Base, class A, class T, class Y, class Stage>
void project_up(const cpu& exec, const operand<Left>& left, const Base& base, const matrix_view<A>& h,
                const matrix_view<const T>& b, const matrix_view<Y>& y, const Stage& stage) {
  using E = product_type_t<typename Left::value_type, typename Base::value_type>;
  multiply<E>(exec, left, right_operand(transposed(base.weight())), left_of(h), right_of(transposed(b)), y, stage);
}

// Calls f(first, count, h) for blocks of tokens, with room for the h of each, or the rows of the saved one.
template <class A, class F>
void each_token_block(index_t tokens, index_t rank, const matrix_view<A>& saved, F&& f) {
  const workspace<A> memory(saved.data ? 0 : std::min(tokens, tokens_at_once) * rank);
  for (index_t first = 0; first < tokens; first += tokens_at_once) {
    const index_t count = std::min(tokens_at_once, tokens - first);
    f(first, count, saved.data ? rows_of(saved, first, count) : matrix_view<A>(memory.data(), {count, rank}));
  }
}

// The adapter's columns that count: none where its scale is 0.
template <class T>
adapter_view<T> effective(adapter_view<T> p) noexcept {
  if (p.scale == 0) p.a.extents[0] = p.b.extents[1] = 0;
  return p;
}

template <bool Masked, class X, class Base, class T, class Y, class A>
void run_linear(const cpu& exec, const matrix_view<const X>& x, const Base& base, adapter_view<T> p,
                const matrix_view<Y>& y, const linear_options<A>& o, const A* factors = nullptr) {
  if (!o.h.data) p = effective(p);
  const dropout_mask mask = dropout_mask::make(o.dropout, o.seed, o.stream, x.extent(1));
  each_token_block(x.extent(0), p.rank(), o.h, [&](index_t first, index_t count, const matrix_view<A>& h) {
    const auto rows = rows_of(x, first, count);
    if constexpr (Masked)
      project_down<bias_t<Base>>(exec, masked_operand(rows, 0, mask.from(first)), p, h);
    else if (p.rank() > 0)
      project_down<bias_t<Base>>(exec, left_of(rows), p, h);
    const adapter_view<T> added = effective(p);
    finish<A, bias_t<Base>, Y> stage{.columns = factors, .bias = base.bias.data};
    if (o.z.data) stage.keeping(rows_of(o.z, first, count));
    project_up(exec, left_of(rows), base, matrix_view<A>(h.data, {count, added.rank()}, h.strides), added.b,
               rows_of(y, first, count), stage);
  });
}

// The gradients that every adapter gets.
template <class Call, class T, class G>
void check_gradients(Call& call, std::string_view function, const adapter_view<T>& p, const gradients<G>& g) {
  const auto output = [&](std::string_view name, const auto& c, const auto& like, std::string_view like_name) {
    check_output(function, name, c);
    check_extent(function, name, "rows", c.extent(0), like_name, like.extent(0));
    check_extent(function, name, "columns", c.extent(1), like_name, like.extent(1));
    call.writes(name, c);
  };
  output("da", g.da, p.a, "adapter.a");
  output("db", g.db, p.b, "adapter.b");
}
template <class G>
void check_no_magnitude(std::string_view function, const gradients<G>& g) {
  if (g.dmagnitude.data) fail_value(function, ": dmagnitude is given, but adapter has none");
}

// What backward reads and writes.
template <class X, class Base, class T, class D, class G, class Dx, class A>
void check_backward(arguments& call, std::string_view function, const matrix_view<const X>& x, const Base& base,
                    const adapter_view<T>& p, const matrix_view<const D>& dy, const gradients<G>& g,
                    const matrix_view<Dx>& dx, const linear_options<A>& o) {
  check_base(function, base);
  check_input(function, x, base.inputs());
  check_adapter(function, p, base.outputs(), base.inputs());
  check_view(function, "dy", dy);
  check_extent(function, "dy", "rows", dy.extent(0), "x", x.extent(0));
  if (dy.extent(1) != base.outputs())
    fail_shape(function, ": dy has ", dy.extent(1), " columns, but base has ", base.outputs(), " outputs");
  check_dropout(function, o);
  check_saved(function, o.h, x.extent(0), p.rank());
  check_kept(function, o, x.extent(0), base.outputs());
  call.reads("x", x);
  call.reads("dy", dy);
  name_base(call, base);
  name_adapter(call, p);
  call.reads("h", o.h);
  call.reads("z", o.z);
  check_gradients(call, function, p, g);
  if (!dx.data && dx.empty()) return;
  check_output(function, "dx", dx);
  check_extent(function, "dx", "rows", dx.extent(0), "x", x.extent(0));
  check_extent(function, "dx", "columns", dx.extent(1), "x", x.extent(1));
  call.writes("dx", dx);
}

template <class T>
void clear(const matrix_view<T>& c) noexcept {
  for (index_t i = 0; i < c.extent(0); ++i)
    for (index_t j = 0; j < c.extent(1); ++j) c(i, j) = static_cast<T>(0.0f);
}

// Calls f with da and db as A, cleared first unless they are added to: what f adds in several steps is rounded once.
template <class A, class G, class F>
void summed_as(const gradients<G>& g, bool accumulate, F&& f) {
  if (!accumulate) {
    clear(g.da);
    clear(g.db);
  }
  summed_as<A>(g.da, [&](const matrix_view<A>& da) {
    summed_as<A>(g.db, [&](const matrix_view<A>& db) { f(gradients<A>(da, db)); });
  });
}

// db += (dy * factors)^T h and da += g^T D(x), with g = s (dy * factors) B.
template <class Bias, class Right, class T, class D, class A>
void add_gradients(const cpu& exec, const matrix_view<const D>& dy, const matrix_view<A>& h, const matrix_view<A>& g,
                   const operand<Right>& x, const adapter_view<T>& p, const A* factors, const gradients<A>& out) {
  multiply<product_type_t<D, A>>(exec, left_of(transposed(dy)), right_of(h), nothing<A>(p.outputs()),
                                 nothing<T>(p.rank()), out.db, finish<A, Bias, A>{.rows = factors}.adding(out.db));
  multiply<product_type_t<A, typename Right::value_type>>(exec, left_of(transposed(g)), x, nothing<A>(p.rank()),
                                                          nothing<T>(p.inputs()), out.da,
                                                          finish<A, Bias, A>{}.adding(out.da));
}

template <bool Masked, class X, class Base, class T, class D, class Dx, class A>
void run_backward(const cpu& exec, const matrix_view<const X>& x, const Base& base, const adapter_view<T>& p,
                  const matrix_view<const D>& dy, const gradients<A>& grads, const matrix_view<Dx>& dx,
                  const linear_options<A>& o) {
  using Bias = bias_t<Base>;
  const dropout_mask whole = dropout_mask::make(o.dropout, o.seed, o.stream, x.extent(1));
  const workspace<A> memory(std::min(x.extent(0), tokens_at_once) * p.rank());
  each_token_block(x.extent(0), p.rank(), o.h, [&](index_t first, index_t count, const matrix_view<A>& h) {
    const auto xs = rows_of(x, first, count);
    const auto dys = rows_of(dy, first, count);
    const dropout_mask mask = whole.from(first);
    const matrix_view<A> g(memory.data(), {count, p.rank()});
    if (!o.h.data) {
      if constexpr (Masked)
        project_down<Bias>(exec, masked_operand(xs, 0, mask), p, h);
      else
        project_down<Bias>(exec, left_of(xs), p, h);
    }
    multiply<product_type_t<D, T>>(exec, left_of(dys), right_of(p.b), nothing<A>(count), nothing<T>(p.rank()), g,
                                   finish<A, Bias, A>{.value = static_cast<A>(p.scale)});
    const auto x_right = [&] {
      if constexpr (Masked)
        return masked_operand(xs, 1, mask);
      else
        return right_of(xs);
    }();
    add_gradients<Bias>(exec, dys, h, g, x_right, p, static_cast<const A*>(nullptr), grads);
    if (!dx.data) return;
    const auto dxs = rows_of(dx, first, count);
    using E = product_type_t<D, typename Base::value_type>;
    if constexpr (Masked) {
      multiply<product_type_t<A, T>>(exec, left_of(g), right_of(p.a), nothing<A>(count), nothing<T>(p.inputs()), dxs,
                                     mask_output{mask});
      multiply<E>(exec, left_of(dys), right_operand(base.weight()), nothing<A>(count), nothing<T>(p.inputs()), dxs,
                  finish<A, Bias, Dx>{}.adding(dxs));
    } else {
      multiply<E>(exec, left_of(dys), right_operand(base.weight()), left_of(g), right_of(p.a), dxs,
                  finish<A, Bias, Dx>{});
    }
  });
}

template <class X, class Base, class Y>
void run_base(const cpu& exec, const matrix_view<const X>& x, const Base& base, const matrix_view<Y>& y) {
  using A = sums_t<X>;
  using W = typename Base::value_type;
  project_up(exec, left_of(x), base, matrix_view<const A>(&no_elements<A>, {x.extent(0), 0}),
             matrix_view<const W>(&no_elements<W>, {base.outputs(), 0}), y,
             finish<A, bias_t<Base>, Y>{.bias = base.bias.data});
}

template <class Base, class D, class Dx>
void run_base_backward(const cpu& exec, const Base& base, const matrix_view<const D>& dy, const matrix_view<Dx>& dx) {
  using A = sums_t<D>;
  using W = typename Base::value_type;
  multiply<product_type_t<D, W>>(exec, left_of(dy), right_operand(base.weight()), nothing<A>(dy.extent(0)),
                                 nothing<W>(base.inputs()), dx, finish<A, bias_t<Base>, Dx>{});
}

template <class X, class Base, class T, class D, class G, class Dx, class A>
void run_gradients(const cpu& exec, const matrix_view<const X>& x, const Base& base, const adapter_view<T>& p,
                   const matrix_view<const D>& dy, const gradients<G>& grads, const matrix_view<Dx>& dx,
                   const linear_options<A>& o) {
  summed_as<sums_t<X>>(grads, o.accumulate, [&](const auto& sums) {
    if (drops(o))
      run_backward<true>(exec, x, base, p, dy, sums, dx, o);
    else
      run_backward<false>(exec, x, base, p, dy, sums, dx, o);
  });
}

// What lora.cuh brings for mlkit::cuda.
template <bool Masked, class X, class Base, class T, class Y, class A>
void run_linear(const cuda& exec, const matrix_view<const X>& x, const Base& base, adapter_view<T> p,
                const matrix_view<Y>& y, const linear_options<A>& o, const A* factors = nullptr);
template <class X, class Base, class Y>
void run_base(const cuda& exec, const matrix_view<const X>& x, const Base& base, const matrix_view<Y>& y);
template <class Base, class D, class Dx>
void run_base_backward(const cuda& exec, const Base& base, const matrix_view<const D>& dy, const matrix_view<Dx>& dx);
template <class X, class Base, class T, class D, class G, class Dx, class A>
void run_gradients(const cuda& exec, const matrix_view<const X>& x, const Base& base, const adapter_view<T>& p,
                   const matrix_view<const D>& dy, const gradients<G>& grads, const matrix_view<Dx>& dx,
                   const linear_options<A>& o);

}  // namespace detail

/// y = x W^T + bias: the base alone. x [tokens, in], y [tokens, out].
///
/// f32, f64, bf16 and f16, mixed as you like except that f64 goes with f64; sums are f32 (f64 for f64), rounded once.
/// tokens = 0 does nothing. Throws shape_error where extents do not fit or y overlaps what is read, value_error for
/// null data, before y is touched. The same bits for any number of threads; 2 tokens in out flops.
template <executor Executor, viewable<2> X, linear_base Base, viewable<2> Y>
void linear(const Executor& exec, const X& x, const Base& base, Y&& y) {
  using T = element_t<const X>;
  const matrix_view<const T> in = as_view(x);
  const auto out = as_view(y);
  detail::check_types<T, typename Base::value_type, element_t<std::remove_reference_t<Y>>>();
  detail::arguments call("lora::linear", exec);
  detail::check_linear("lora::linear", in, base, out);
  call.reads("x", in);
  detail::name_base(call, base);
  call.writes("y", out);
  detail::run_base(exec, in, base, out);
}

/// y = x W^T + bias + s (x A^T) B^T, with s the adapter's scale: one product of depth in + rank over [x | s x A^T] and
/// [W | B], so that x and y are passed over once. x [tokens, in], y [tokens, out], W [out, in], A [rank, in],
/// B [out, rank]. Hu et al.: "LoRA: low-rank adaptation of large language models", 2021.
///
/// The base is any lora::linear_base, the adapter any of any type (f64 with f64 alone). A scale of 0 gives the bits of
/// the base alone. Nothing is kept between calls: another adapter may be passed at any time.
/// Throws shape_error where extents do not fit, the rank is 0 or y overlaps what is read, and value_error for null data
/// or a scale that is not finite, before y is touched. The same bits for any number of threads.
/// 2 tokens (in out + rank (in + out)) flops; scratch memory does not grow with tokens.
///
/// On a GPU x and W of one 16-bit type are multiplied on tensor cores, h and an adapter of another type rounded to
/// theirs. Where a library computes x W^T, the update is added to y after that was rounded. Scratch memory is tokens x
/// rank elements, and with dropout a copy of x.
template <executor Executor, viewable<2> X, linear_base Base, plain_adapter Adapter, viewable<2> Y>
void linear(const Executor& exec, const X& x, const Base& base, const Adapter& adapter, Y&& y) {
  using T = element_t<const X>;
  using P = typename Adapter::value_type;
  const matrix_view<const T> in = as_view(x);
  const adapter_view<P> p = as_adapter(adapter);
  const auto out = as_view(y);
  const linear_options<detail::sums_t<T>> options;
  detail::check_types<T, typename Base::value_type, P, element_t<std::remove_reference_t<Y>>>();
  detail::arguments call("lora::linear", exec);
  detail::check_linear(call, "lora::linear", in, base, p, out, options);
  detail::run_linear<false>(exec, in, base, p, out, options);
}

/// The same with options: dropout, and h saved for backward.
///
/// y = x W^T + bias + s (D(x) A^T) B^T, where D drops elements of x with probability p and scales the others by
/// 1 / (1 - p). The mask is a function of (seed, stream, row, column): any number of threads, forward and backward see
/// the same one, and it is never stored. Also throws value_error for a dropout outside [0, 1).
template <executor Executor, viewable<2> X, linear_base Base, plain_adapter Adapter, viewable<2> Y>
void linear(const Executor& exec, const X& x, const Base& base, const Adapter& adapter, Y&& y,
            const linear_options<detail::sums_t<element_t<const X>>>& options) {
  using T = element_t<const X>;
  using P = typename Adapter::value_type;
  const matrix_view<const T> in = as_view(x);
  const adapter_view<P> p = as_adapter(adapter);
  const auto out = as_view(y);
  detail::check_types<T, typename Base::value_type, P, element_t<std::remove_reference_t<Y>>>();
  detail::check_nothing_kept("lora::linear", options);
  detail::arguments call("lora::linear", exec);
  detail::check_linear(call, "lora::linear", in, base, p, out, options);
  if (detail::drops(options))
    detail::run_linear<true>(exec, in, base, p, out, options);
  else
    detail::run_linear<false>(exec, in, base, p, out, options);
}

/// The gradient of the base alone, which is frozen: dx = dy W [tokens, in], of dy [tokens, out]. dx may be an empty
/// view; nothing is done then. Errors, types and determinism as for linear. 2 tokens in out flops.
template <executor Executor, linear_base Base, viewable<2> D, viewable<2> Dx>
void linear_backward(const Executor& exec, const Base& base, const D& dy, Dx&& dx) {
  constexpr std::string_view function = "lora::linear_backward";
  using U = element_t<const D>;
  const matrix_view<const U> dout = as_view(dy);
  const auto din = as_view(dx);
  detail::check_types<typename Base::value_type, U, element_t<std::remove_reference_t<Dx>>>();
  detail::arguments call(function, exec);
  detail::check_base(function, base);
  detail::check_view(function, "dy", dout);
  if (dout.extent(1) != base.outputs())
    detail::fail_shape(function, ": dy has ", dout.extent(1), " columns, but base has ", base.outputs(), " outputs");
  call.reads("dy", dout);
  detail::name_base(call, base);
  if (!din.data && din.empty()) return;
  detail::check_output(function, "dx", din);
  detail::check_extent(function, "dx", "rows", din.extent(0), "dy", dout.extent(0));
  if (din.extent(1) != base.inputs())
    detail::fail_shape(function, ": dx has ", din.extent(1), " columns, but base has ", base.inputs(), " inputs");
  call.writes("dx", din);
  detail::run_base_backward(exec, base, dout, din);
}

/// The gradients of linear: with dy [tokens, out], h = s D(x) A^T and G = s dy B,
///   db = dy^T h [out, rank],   da = G^T D(x) [rank, in],   dx = dy W + D^T(G A) [tokens, in].
/// W and the bias, which are frozen, never get one. dx may be an empty view and is then not computed; without dropout
/// it is one product over [dy | G] and [W ; A].
///
/// `options` are those of the forward call: the same seed and stream draw the same mask again; `h`, if forward saved
/// it, spares a product. accumulate adds to da and db. With tokens = 0 da and db become 0. Errors, types and
/// determinism as for linear. 2 tokens (in out + rank (3 in + 2 out)) flops.
template <executor Executor, viewable<2> X, linear_base Base, plain_adapter Adapter, viewable<2> D, class G,
          viewable<2> Dx>
void linear_backward(const Executor& exec, const X& x, const Base& base, const Adapter& adapter, const D& dy,
                     const gradients<G>& grads, Dx&& dx,
                     const linear_options<detail::sums_t<element_t<const X>>>& options) {
  using T = element_t<const X>;
  using P = typename Adapter::value_type;
  using U = element_t<const D>;
  const matrix_view<const T> in = as_view(x);
  const matrix_view<const U> dout = as_view(dy);
  const adapter_view<P> p = as_adapter(adapter);
  const auto din = as_view(dx);
  detail::check_types<T, typename Base::value_type, P, U, G, element_t<std::remove_reference_t<Dx>>>();
  detail::check_nothing_kept("lora::linear_backward", options);
  detail::check_no_magnitude("lora::linear_backward", grads);
  detail::arguments call("lora::linear_backward", exec);
  detail::check_backward(call, "lora::linear_backward", in, base, p, dout, grads, din, options);
  detail::run_gradients(exec, in, base, p, dout, grads, din, options);
}

/// The same without options: no dropout, h computed again, da and db overwritten.
template <executor Executor, viewable<2> X, linear_base Base, plain_adapter Adapter, viewable<2> D, class G,
          viewable<2> Dx>
void linear_backward(const Executor& exec, const X& x, const Base& base, const Adapter& adapter, const D& dy,
                     const gradients<G>& grads, Dx&& dx) {
  using T = element_t<const X>;
  using P = typename Adapter::value_type;
  using U = element_t<const D>;
  const matrix_view<const T> in = as_view(x);
  const matrix_view<const U> dout = as_view(dy);
  const adapter_view<P> p = as_adapter(adapter);
  const auto din = as_view(dx);
  const linear_options<detail::sums_t<T>> options;
  detail::check_types<T, typename Base::value_type, P, U, G, element_t<std::remove_reference_t<Dx>>>();
  detail::check_no_magnitude("lora::linear_backward", grads);
  detail::arguments call("lora::linear_backward", exec);
  detail::check_backward(call, "lora::linear_backward", in, base, p, dout, grads, din, options);
  detail::run_gradients(exec, in, base, p, dout, grads, din, options);
}

}  // namespace MLKIT_NAMESPACE::lora
