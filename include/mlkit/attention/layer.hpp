// Attention layers, self and cross: projections, heads, attention and a projection of the result.
#pragma once

#include "backward.hpp"
#include "forward.hpp"
#include "rotary.hpp"

namespace MLKIT_NAMESPACE::attention {

namespace detail {

template <class P, class T>
concept projects = requires(const P& p, const cpu& exec, const matrix_view<const T>& x, const matrix_view<T>& y) {
  p(exec, x, y);
};
template <class P, class T, class G>
concept projects_back = requires(const P& p, const cpu& exec, const matrix_view<const T>& x, const G& grads,
                                 const matrix_view<T>& dx) {
  p.backward(exec, x, x, grads, dx);
};

}  // namespace detail

/// A map of tokens that a layer may be given: `p(exec, x, y)` writes y [tokens, p.outputs()] of x [tokens, p.inputs()],
/// each row of x alone deciding about its row of y. lora::projection is one, of any base and adapter.
///
/// For backward it also has `p.backward(exec, x, dy, grads, dx)`, which writes dx, unless that is an empty view, and
/// its own gradients into `grads`, of whatever type it takes. Optional: `p.check(call, function, tokens)` and
/// `p.check_gradients(call, function, grads)` are asked before a layer writes anything; they throw for what the calls
/// would refuse, and name the memory that these read and write by `call.reads(name, view)` and `call.writes(name,
/// view)`.
template <class P>
concept projection = requires(const P& p) {
  { p.inputs() } -> std::convertible_to<index_t>;
  { p.outputs() } -> std::convertible_to<index_t>;
  requires detail::projects<P, float> || detail::projects<P, double> || detail::projects<P, bf16> ||
      detail::projects<P, f16>;
};

/// Into how many heads a layer divides its projections.
struct layer_options {
  index_t heads = 1;
  index_t kv_heads = 0;  ///< heads of keys and values, a divisor of heads; 0 means as many
};

/// A layer without rotary embedding.
struct no_rotary {};
/// Rotary embedding of a layer's queries and keys: `rotary{table}`, `rotary{table, {.first = 17}}` for both alike,
/// `rotary{table, queries, keys}`. It owns nothing.
template <class A>
struct rotary {
  const rotary_table<A>* table;
  rotation queries, keys;

  explicit rotary(const rotary_table<A>& t, const rotation& both = {}) : rotary(t, both, both) {}
  rotary(const rotary_table<A>& t, const rotation& q, const rotation& k) : table(&t), queries(q), keys(k) {}
};

/// What a layer's forward keeps for backward: queries and keys as they met (rotated), values, what attention made of
/// them, [batch, tokens, heads, d], and its lse, [batch, heads, queries]. Forward makes room, where what is there has
/// another shape: a step of the same shapes as the one before allocates nothing.
template <storage T>
struct kept {
  tensor<T, 4> q, k, v, out;
  tensor<accumulator_t<T>, 3> lse;
};

/// Where a layer's backward writes what it trains: the gradients of each projection, of the types that these take
/// (lora::gradients, or lora::no_gradients), and, where it is given, of the bias in the pipeline.
template <class Q, class K, class V, class Out, class B = void>
struct layer_gradients {
  using bias_type = std::conditional_t<std::is_void_v<B>, float, B>;
  Q q;
  K k;
  V v;
  Out out;
  tensor_view<bias_type, 4> dbias = {};

  layer_gradients(const Q& for_q, const K& for_k, const V& for_v, const Out& for_out)
      : q(for_q), k(for_k), v(for_v), out(for_out) {}
  template <class Bias>
    requires(viewable<Bias, 2> || viewable<Bias, 3> || viewable<Bias, 4>)
  layer_gradients(const Q& for_q, const K& for_k, const V& for_v, const Out& for_out, Bias&& b)
      : q(for_q), k(for_k), v(for_v), out(for_out), dbias(detail::broadcast_scores(as_view(b))) {}
};
template <class Q, class K, class V, class Out>
layer_gradients(const Q&, const K&, const V&, const Out&) -> layer_gradients<Q, K, V, Out>;
template <class Q, class K, class V, class Out, class Bias>
layer_gradients(const Q&, const K&, const V&, const Out&, Bias&&)
    -> layer_gradients<Q, K, V, Out, element_t<std::remove_reference_t<Bias>>>;

namespace detail {

template <class Rotary>
inline constexpr bool is_rotary = false;
template <class A>
inline constexpr bool is_rotary<rotary<A>> = true;

// The sizes of one call of a layer.
struct layer_sizes {
  index_t batch, queries, keys, heads, kv_heads, d, d_v;
  extents_t<4> q() const noexcept { return {batch, queries, heads, d}; }
  extents_t<4> k() const noexcept { return {batch, keys, kv_heads, d}; }
  extents_t<4> v() const noexcept { return {batch, keys, kv_heads, d_v}; }
  extents_t<4> out() const noexcept { return {batch, queries, heads, d_v}; }
  extents_t<3> lse() const noexcept { return {batch, heads, queries}; }
  score_shape scores() const noexcept { return {batch, heads, queries, keys}; }
};

// [batch, tokens, heads, d] as attention takes it: [batch, heads, tokens, d].
template <class T>
tensor_view<T, 4> by_head(const tensor_view<T, 4>& v) noexcept {
  return {v.data,
          {v.extents[0], v.extents[2], v.extents[1], v.extents[3]},
          {v.strides[0], v.strides[2], v.strides[1], v.strides[3]}};
}
// The same as projections take it: [batch tokens, heads d].
template <class T>
matrix_view<T> by_token(const tensor_view<T, 4>& v) noexcept {
  return {v.data, {v.extents[0] * v.extents[1], v.extents[2] * v.extents[3]}};
}

// [batch, tokens, columns] as one matrix of tokens.
template <class T>
matrix_view<T> all_tokens(std::string_view function, std::string_view name, const tensor_view<T, 3>& v) {
  const index_t batch = v.extent(0), tokens = v.extent(1);
  if (batch > 1 && tokens > 1 && v.stride(0) != tokens * v.stride(1))
    fail_shape(function, ": ", name, "'s tokens are ", v.stride(1), " elements apart, and its batches of ", tokens, " ",
               v.stride(0), "; projections take tokens at equal distances");
  return {v.data, {batch * tokens, v.extent(2)}, {tokens > 1 ? v.stride(1) : v.stride(0), v.stride(2)}};
}

template <class P, class T>
void check_projection(arguments& call, std::string_view function, std::string_view name, const P& p, index_t tokens,
                      std::string_view from, index_t columns) {
  static_assert(projects<P, T>, "attention: a projection is called as p(exec, x, y) with matrix_views of x's type");
  if (p.inputs() != columns)
    fail_shape(function, ": ", from, " has ", columns, " columns, but ", name, " has ", index_t{p.inputs()}, " inputs");
  part_arguments part(call, name);
  if constexpr (requires { p.check(part, function, tokens); }) p.check(part, message(function, ": ", name), tokens);
}
template <class P, class G>
void check_projection_gradients(arguments& call, std::string_view function, std::string_view name, const P& p,
                                const G& grads) {
  part_arguments part(call, name);
  if constexpr (requires { p.check_gradients(part, function, grads); })
    p.check_gradients(part, message(function, ": ", name), grads);
}

// What a layer's forward and backward read: everything is checked, and named to `call`.
template <class T, class Layer, class... Stages>
layer_sizes check_layer(arguments& call, std::string_view function, const Layer& layer,
                        const tensor_view<const T, 3>& x, const tensor_view<const T, 3>& context,
                        std::string_view context_name, const scores<Stages...>& given) {
  const index_t heads = layer.options.heads, kv_heads = layer.options.kv_heads == 0 ? heads : layer.options.kv_heads;
  if (heads < 1) fail_value(function, ": heads = ", heads, " is not positive");
  if (kv_heads < 0) fail_value(function, ": kv_heads = ", kv_heads, " is negative");
  if (heads % kv_heads != 0)
    fail_shape(function, ": there are ", heads, " heads, which is no multiple of kv_heads = ", kv_heads);
  const index_t q_columns = layer.q.outputs(), k_columns = layer.k.outputs(), v_columns = layer.v.outputs(),
                out_columns = layer.out.inputs();
  if (q_columns % heads != 0)
    fail_shape(function, ": q has ", q_columns, " outputs, which is no multiple of ", heads, " heads");
  if (v_columns % kv_heads != 0)
    fail_shape(function, ": v has ", v_columns, " outputs, which is no multiple of ", kv_heads, " heads");
  layer_sizes s{x.extent(0), x.extent(1), context.extent(1), heads, kv_heads, q_columns / heads, v_columns / kv_heads};
  if (k_columns != kv_heads * s.d)
    fail_shape(function, ": k has ", k_columns, " outputs, but ", kv_heads, " heads as wide as q's ", s.d, " need ",
               kv_heads * s.d);
  if (out_columns != heads * s.d_v)
    fail_shape(function, ": out has ", out_columns, " inputs, but ", heads, " heads as wide as v's ", s.d_v, " give ",
               heads * s.d_v);
  check_view(function, "x", x);
  check_view(function, context_name, context);
  check_extent(function, context_name, "batches", context.extent(0), "x", s.batch);
  call.reads("x", x);
  if (context_name != "x") call.reads(context_name, context);
  all_tokens(function, "x", x);
  all_tokens(function, context_name, context);
  const index_t tokens = s.batch * s.queries, context_tokens = s.batch * s.keys;
  check_projection<decltype(layer.q), T>(call, function, "q", layer.q, tokens, "x", x.extent(2));
  check_projection<decltype(layer.k), T>(call, function, "k", layer.k, context_tokens, context_name, context.extent(2));
  check_projection<decltype(layer.v), T>(call, function, "v", layer.v, context_tokens, context_name, context.extent(2));
  check_projection<decltype(layer.out), T>(call, function, "out", layer.out, tokens, "attention", out_columns);
  if constexpr (is_rotary<decltype(layer.rotary)>) {
    const auto check = [&](std::string_view name, const rotation& how, index_t count) {
      check_rotation(message(function, ": rotary"), name, *layer.rotary.table, how, s.batch, count, s.d);
      if (how.positions.data) call.reads(message("rotary positions of ", name), how.positions);
    };
    check("q", layer.rotary.queries, s.queries);
    check("k", layer.rotary.keys, s.keys);
  }
  check_scores<accumulator_t<T>>(function, given, s.scores());
  name_scores(call, given);
  return s;
}

template <class T>
void check_tokens(std::string_view function, std::string_view name, const tensor_view<T, 3>& v, std::string_view like,
                  const extents_t<3>& want) {
  check_view(function, name, v);
  check_extent(function, name, "batches", v.extent(0), like, want[0]);
  check_extent(function, name, "tokens", v.extent(1), like, want[1]);
  all_tokens(function, name, v);
}

template <class Layer, class T>
void rotate_heads(const cpu& exec, const Layer& layer, const tensor_view<T, 4>& q, const tensor_view<T, 4>& k,
                  bool back) {
  if constexpr (is_rotary<decltype(layer.rotary)>) {
    const auto turn = [&](const tensor_view<T, 4>& heads, rotation how) {
      how.back = how.back != back;
      rotate(exec, heads, *layer.rotary.table, heads, how);
    };
    turn(q, layer.rotary.queries);
    turn(k, layer.rotary.keys);
  }
}

template <class T, int Rank>
void make_room(tensor<T, Rank>& t, const std::type_identity_t<extents_t<Rank>>& extents) {
  if (t.extents() != extents) t = tensor<T, Rank>(extents, uninitialized);
}

// Several tensors in one piece of workspace, each from a cache line on.
template <class T>
class shared_workspace {
 public:
  explicit shared_workspace(std::initializer_list<extents_t<4>> all) : memory_(total(all)), at_(memory_.data()) {}
  tensor_view<T, 4> next(const extents_t<4>& extents) noexcept {
    T* const first = at_;
    at_ += room(extents);
    return {first, extents};
  }

 private:
  static index_t room(const extents_t<4>& e) noexcept {
    return round_up(element_count<4>(e), static_cast<index_t>(cache_line / sizeof(T)));
  }
  static index_t total(std::initializer_list<extents_t<4>> all) noexcept {
    index_t n = 0;
    for (const auto& e : all) n += room(e);
    return n;
  }
  workspace<T> memory_;
  T* at_;
};

template <class Layer, class T, class Y, class... Stages>
void run_layer(std::string_view function, const cpu& exec, const Layer& layer, const tensor_view<const T, 3>& x,
               const tensor_view<const T, 3>& context, std::string_view context_name, const scores<Stages...>& given,
               const tensor_view<Y, 3>& y, kept<T>* keep) {
  arguments call(function, exec);
  const layer_sizes s = check_layer(call, function, layer, x, context, context_name, given);
  check_tokens(function, "y", y, "x", x.extents);
  if (y.extent(2) != layer.out.outputs())
    fail_shape(function, ": y has ", y.extent(2), " columns, but out has ", index_t{layer.out.outputs()}, " outputs");
  call.writes("y", y);

  const auto run = [&](const tensor_view<T, 4>& q, const tensor_view<T, 4>& k, const tensor_view<T, 4>& v,
                       const tensor_view<T, 4>& out, const tensor_view<accumulator_t<T>, 3>& lse) {
    const matrix_view<const T> from = all_tokens(function, "x", x);
    const matrix_view<const T> from_context = all_tokens(function, context_name, context);
    layer.q(exec, from, by_token(q));
    layer.k(exec, from_context, by_token(k));
    layer.v(exec, from_context, by_token(v));
    rotate_heads(exec, layer, by_head(q), by_head(k), false);
    forward(function, exec, tensor_view<const T, 4>(by_head(q)), tensor_view<const T, 4>(by_head(k)),
            tensor_view<const T, 4>(by_head(v)), given, by_head(out), lse, nullptr);
    layer.out(exec, matrix_view<const T>(by_token(out)), all_tokens(function, "y", y));
  };
  if (keep) {
    call.writes("kept.q", keep->q.view());
    call.writes("kept.k", keep->k.view());
    call.writes("kept.v", keep->v.view());
    call.writes("kept.out", keep->out.view());
    call.writes("kept.lse", keep->lse.view());
    make_room(keep->q, s.q());
    make_room(keep->k, s.k());
    make_room(keep->v, s.v());
    make_room(keep->out, s.out());
    make_room(keep->lse, s.lse());
    run(keep->q.view(), keep->k.view(), keep->v.view(), keep->out.view(), keep->lse.view());
  } else {
    shared_workspace<T> memory{s.q(), s.k(), s.v(), s.out()};
    const auto q = memory.next(s.q()), k = memory.next(s.k()), v = memory.next(s.v()), out = memory.next(s.out());
    run(q, k, v, out, {});
  }
}

// A projection, what arrives at its result, and where its own gradients go.
template <class P, class T, class G>
struct way_back {
  const P& p;
  matrix_view<const T> dy;
  const G& grads;

  template <class Dx>
  void run(const cpu& exec, const matrix_view<const T>& x, const matrix_view<Dx>& dx) const {
    p.backward(exec, x, dy, grads, dx);
  }
};

// dx = the sum of what the projections send back to their common x; rounded once. Without a dx they train alone.
template <class T, class Dx, class First, class... Others>
void send_back(const cpu& exec, const matrix_view<const T>& x, const matrix_view<Dx>& dx, const First& first,
               const Others&... others) {
  using A = accumulator_t<T>;
  if (!dx.data && dx.empty()) {
    first.run(exec, x, dx);
    (others.run(exec, x, dx), ...);
  } else if constexpr (sizeof...(Others) == 0) {
    first.run(exec, x, dx);
  } else {
    constexpr bool in_place = std::is_same_v<A, Dx>;
    const index_t rows = dx.extent(0), columns = dx.extent(1);
    const workspace<A> sum_memory(in_place ? 0 : rows * columns), memory(rows * columns);
    const matrix_view<A> part(memory.data(), {rows, columns});
    const auto sum = [&] {
      if constexpr (in_place)
        return dx;
      else
        return matrix_view<A>(sum_memory.data(), {rows, columns});
    }();
    const auto add = [&](const auto& to) {
      const cpu limited = limit_threads(exec, static_cast<double>(rows) * static_cast<double>(columns));
      parallel_ranges(limited, rows, [&](index_t begin, index_t end) {
        for (index_t i = begin; i < end; ++i) {
          const A* const a = &sum(i, 0);
          const A* const b = &part(i, 0);
          const index_t step = sum.stride(1);
          for (index_t j = 0; j < columns; ++j)
            to(i, j) = static_cast<std::remove_cvref_t<decltype(to(0, 0))>>(a[j * step] + b[j]);
        }
      });
    };
    first.run(exec, x, sum);
    index_t left = sizeof...(Others);
    const auto one = [&](const auto& way) {
      way.run(exec, x, part);
      if (--left == 0)
        add(dx);
      else
        add(sum);
    };
    (one(others), ...);
  }
}

template <class P, class T, class G>
constexpr void check_way_back() {
  static_assert(projects_back<P, T, G>,
                "attention: backward needs a member `backward` of each of the layer's projections, which takes the "
                "gradients given for it; projections with adapters of many rows have none");
}

template <class Layer, class T, class D, class Grads, class Dx, class Dc, class... Stages>
void run_layer_backward(std::string_view function, const cpu& exec, const Layer& layer,
                        const tensor_view<const T, 3>& x, const tensor_view<const T, 3>& context,
                        std::string_view context_name, const scores<Stages...>& given, const kept<T>& keep,
                        const tensor_view<const D, 3>& dy, const Grads& grads, const tensor_view<Dx, 3>& dx,
                        const tensor_view<Dc, 3>& dcontext) {
  check_way_back<decltype(layer.q), T, decltype(grads.q)>();
  check_way_back<decltype(layer.k), T, decltype(grads.k)>();
  check_way_back<decltype(layer.v), T, decltype(grads.v)>();
  check_way_back<decltype(layer.out), T, decltype(grads.out)>();
  const bool crossed = context_name != "x", wants_dx = dx.data || !dx.empty(),
             wants_dcontext = crossed && (dcontext.data || !dcontext.empty());
  arguments call(function, exec);
  const layer_sizes s = check_layer(call, function, layer, x, context, context_name, given);
  const auto check_kept = [&](std::string_view name, const auto& t, const auto& want) {
    constexpr int rank = std::remove_cvref_t<decltype(t)>::rank;
    if (t.extents() != want)
      fail_shape(function, ": ", name, " has shape ", shape_text<rank>(t.extents()), ", but this call's is ",
                 shape_text<rank>(want), "; forward of the same shapes keeps it");
    call.reads(name, t.view());
  };
  check_kept("kept.q", keep.q, s.q());
  check_kept("kept.k", keep.k, s.k());
  check_kept("kept.v", keep.v, s.v());
  check_kept("kept.out", keep.out, s.out());
  check_kept("kept.lse", keep.lse, s.lse());
  check_tokens(function, "dy", dy, "x", x.extents);
  if (dy.extent(2) != layer.out.outputs())
    fail_shape(function, ": dy has ", dy.extent(2), " columns, but out has ", index_t{layer.out.outputs()}, " outputs");
  call.reads("dy", dy);
  check_projection_gradients(call, function, "q", layer.q, grads.q);
  check_projection_gradients(call, function, "k", layer.k, grads.k);
  check_projection_gradients(call, function, "v", layer.v, grads.v);
  check_projection_gradients(call, function, "out", layer.out, grads.out);
  const auto check_input_gradient = [&](std::string_view name, const auto& g, std::string_view of, const auto& like) {
    check_tokens(function, name, g, of, like.extents);
    check_extent(function, name, "columns", g.extent(2), of, like.extent(2));
    call.writes(name, g);
  };
  if (wants_dx) check_input_gradient("dx", dx, "x", x);
  if (wants_dcontext) check_input_gradient("dcontext", dcontext, context_name, context);
  bool has_bias = false;
  each_stage(given, [&](const auto& stage) {
    if constexpr (is_bias<std::remove_cvref_t<decltype(stage)>>) {
      has_bias = true;
      if (grads.dbias.data) check_same(function, "dbias", grads.dbias, "bias", stage.values.extents);
    }
  });
  if (grads.dbias.data && !has_bias) fail_value(function, ": dbias is given, but scores have no bias");
  if (grads.dbias.data) call.writes("dbias", grads.dbias);

  const matrix_view<const T> from = all_tokens(function, "x", x);
  const matrix_view<const T> from_context = all_tokens(function, context_name, context);
  const matrix_view<const D> arriving = all_tokens(function, "dy", dy);
  shared_workspace<T> memory{s.q(), s.k(), s.v(), s.out()};
  const auto dq = memory.next(s.q()), dk = memory.next(s.k()), dv = memory.next(s.v()), dout = memory.next(s.out());
  layer.out.backward(exec, matrix_view<const T>(by_token(keep.out.view())), arriving, grads.out, by_token(dout));
  using B = std::conditional_t<std::is_same_v<T, double> == std::is_same_v<typename Grads::bias_type, double>,
                               typename Grads::bias_type, T>;
  gradients<T, B> inner(by_head(dq), by_head(dk), by_head(dv));
  if constexpr (std::is_same_v<B, typename Grads::bias_type>) inner.dbias = grads.dbias;
  backward(exec, by_head(keep.q.view()), by_head(keep.k.view()), by_head(keep.v.view()), given,
           by_head(keep.out.view()), tensor_view<const accumulator_t<T>, 3>(keep.lse.view()),
           tensor_view<const T, 4>(by_head(dout)), inner, tensor_view<const accumulator_t<T>, 3>{}, nullptr);
  rotate_heads(exec, layer, by_head(dq), by_head(dk), true);
  const auto way = [&]<class P, class G>(const P& p, const tensor_view<T, 4>& d, const G& g) {
    return way_back<P, T, G>{p, by_token(d), g};
  };
  const auto to_q = way(layer.q, dq, grads.q);
  const auto to_k = way(layer.k, dk, grads.k);
  const auto to_v = way(layer.v, dv, grads.v);
  const auto into = [&](std::string_view name, const auto& g) {
    return g.data || !g.empty() ? all_tokens(function, name, g) : matrix_view<element_t<decltype(g)>>{};
  };
  if (crossed) {
    send_back(exec, from, into("dx", dx), to_q);
    send_back(exec, from_context, into("dcontext", dcontext), to_k, to_v);
  } else {
    send_back(exec, from, into("dx", dx), to_q, to_k, to_v);
  }
}

}  // namespace detail

/// What self and cross consist of: the four projections, the division into heads, and how queries and keys are rotated.
template <class Q, class K = Q, class V = Q, class Out = Q, class Rotary = no_rotary>
struct layer_parts {
  static_assert(projection<Q> && projection<K> && projection<V> && projection<Out>,
                "attention: a layer's q, k, v and out are each an attention::projection, such as "
                "lora::projection{lora::dense{w}}");
  static_assert(std::is_same_v<Rotary, no_rotary> || detail::is_rotary<Rotary>,
                "attention: a layer is rotated by attention::rotary{table}");
  Q q;
  K k;
  V v;
  Out out;
  layer_options options;
  [[no_unique_address]] Rotary rotary;

  layer_parts(Q for_q, K for_k, V for_v, Out for_out, const layer_options& o = {},
              const Rotary& r = {}) requires(std::is_same_v<Rotary, no_rotary>)
      : q(std::move(for_q)), k(std::move(for_k)), v(std::move(for_v)), out(std::move(for_out)), options(o), rotary(r) {}
  layer_parts(Q for_q, K for_k, V for_v, Out for_out, const layer_options& o,
              const Rotary& r) requires(!std::is_same_v<Rotary, no_rotary>)
      : q(std::move(for_q)), k(std::move(for_k)), v(std::move(for_v)), out(std::move(for_out)), options(o), rotary(r) {}
};

/// A cross-attention layer, of four types that are each an attention::projection:
///   y = out(attention(q(x), k(context), v(context))), x [batch, queries, .], context [batch, keys, .], y [batch,
///   queries, .],
/// where q's result is cut into `heads` heads side by side, k's and v's into `kv_heads` (grouped queries), and
/// attention is attention::forward of them. `cross layer{q, k, v, out, {.heads = 8}}`, and with rotary embedding
/// `cross layer{q, k, v, out, {.heads = 8}, rotary{table}}`. A value that holds its projections, and of these what they
/// hold: views, where they are lora::projections. Nothing is kept between calls, so that adapters may be exchanged, and
/// one layer serves several threads. Vaswani et al.: "Attention is all you need", 2017, section 3.2.2.
template <class Q, class K = Q, class V = Q, class Out = Q, class Rotary = no_rotary>
struct cross : layer_parts<Q, K, V, Out, Rotary> {
  using layer_parts<Q, K, V, Out, Rotary>::layer_parts;

  /// x, context and y have any strides that leave tokens at equal distances; heads are views of the projections'
  /// results. f32, f64, bf16 and f16, x and context of one type, in which also q, k, v and attention's result are
  /// stored; y of that or, unless either is f64, another.
  ///
  /// Throws shape_error where extents do not fit each other, the projections or the heads, or y overlaps what is read,
  /// and value_error for what projections, stages and rotary embedding refuse, before y is touched. The same bits for
  /// any number of threads. Costs what the projections and attention do; workspace of q, k, v and attention's result,
  /// [tokens, heads d] each, which is reused by later calls.
  template <executor Executor, viewable<3> X, viewable<3> C, class... Stages, viewable<3> Y>
  void forward(const Executor& exec, const X& x, const C& context, const scores<Stages...>& s, Y&& y) const {
    run(exec, x, context, s, y, nullptr);
  }
  /// softmax(q k^T / sqrt(d)) v of each head.
  template <executor Executor, viewable<3> X, viewable<3> C, viewable<3> Y>
  void forward(const Executor& exec, const X& x, const C& context, Y&& y) const {
    run(exec, x, context, scores<>{}, y, nullptr);
  }
  /// The same, which keeps for backward what it needs.
  template <executor Executor, viewable<3> X, viewable<3> C, class... Stages, viewable<3> Y>
  void forward(const Executor& exec, const X& x, const C& context, const scores<Stages...>& s, Y&& y,
               kept<element_t<const X>>& keep) const {
    run(exec, x, context, s, y, &keep);
  }

  /// The gradients of forward: of x and context, and of what each projection trains. The pipeline, x and context are
  /// those of the forward call that filled `keep`, whose rotations are turned back. dy is the gradient of y; dx and
  /// dcontext are written where they are given, and spare their products where they are empty views (dcontext also
  /// where it is left out). Gradients that meet, those of k and v in dcontext, are added in f32 (f64 for f64).
  ///
  /// Does not compile for a projection without a backward, such as lora::per_row. Errors, types and determinism as for
  /// forward.
  template <executor Executor, viewable<3> X, viewable<3> C, class... Stages, viewable<3> D, class... G, viewable<3> Dx,
            viewable<3> Dc = tensor_view<element_t<const X>, 3>>
  void backward(const Executor& exec, const X& x, const C& context, const scores<Stages...>& s,
                const kept<element_t<const X>>& keep, const D& dy, const layer_gradients<G...>& grads, Dx&& dx,
                Dc&& dcontext = Dc{}) const {
    using T = element_t<const X>;
    check_type<X, C>();
    detail::run_layer_backward("attention::cross::backward", exec, *this, tensor_view<const T, 3>(as_view(x)),
                               tensor_view<const T, 3>(as_view(context)), "context", s, keep,
                               tensor_view<const element_t<const D>, 3>(as_view(dy)), grads, as_view(dx),
                               as_view(dcontext));
  }

 private:
  template <class X, class C>
  static constexpr void check_type() {
    static_assert(std::is_same_v<element_t<const X>, element_t<const C>>,
                  "attention: x and context have one type of elements");
  }
  template <class X, class C, class S, class Y>
  void run(const cpu& exec, const X& x, const C& context, const S& s, Y& y, kept<element_t<const X>>* keep) const {
    using T = element_t<const X>;
    check_type<X, C>();
    detail::run_layer("attention::cross::forward", exec, *this, tensor_view<const T, 3>(as_view(x)),
                      tensor_view<const T, 3>(as_view(context)), "context", s, as_view(y), keep);
  }
};

/// A self-attention layer: cross with x for context, so that keys are as many as queries. Everything else is as there.
template <class Q, class K = Q, class V = Q, class Out = Q, class Rotary = no_rotary>
struct self : layer_parts<Q, K, V, Out, Rotary> {
  using layer_parts<Q, K, V, Out, Rotary>::layer_parts;

  template <executor Executor, viewable<3> X, class... Stages, viewable<3> Y>
  void forward(const Executor& exec, const X& x, const scores<Stages...>& s, Y&& y) const {
    run(exec, x, s, y, nullptr);
  }
  template <executor Executor, viewable<3> X, viewable<3> Y>
  void forward(const Executor& exec, const X& x, Y&& y) const {
    run(exec, x, scores<>{}, y, nullptr);
  }
  template <executor Executor, viewable<3> X, class... Stages, viewable<3> Y>
  void forward(const Executor& exec, const X& x, const scores<Stages...>& s, Y&& y,
               kept<element_t<const X>>& keep) const {
    run(exec, x, s, y, &keep);
  }

  /// As cross::backward; dx is the sum of what comes back through q, k and v.
  template <executor Executor, viewable<3> X, class... Stages, viewable<3> D, class... G, viewable<3> Dx>
  void backward(const Executor& exec, const X& x, const scores<Stages...>& s, const kept<element_t<const X>>& keep,
                const D& dy, const layer_gradients<G...>& grads, Dx&& dx) const {
    using T = element_t<const X>;
    const tensor_view<const T, 3> in = as_view(x);
    detail::run_layer_backward("attention::self::backward", exec, *this, in, in, "x", s, keep,
                               tensor_view<const element_t<const D>, 3>(as_view(dy)), grads, as_view(dx),
                               tensor_view<T, 3>{});
  }

 private:
  template <class X, class S, class Y>
  void run(const cpu& exec, const X& x, const S& s, Y& y, kept<element_t<const X>>* keep) const {
    using T = element_t<const X>;
    const tensor_view<const T, 3> in = as_view(x);
    detail::run_layer("attention::self::forward", exec, *this, in, in, "x", s, as_view(y), keep);
  }
};

template <class Q, class K, class V, class Out>
cross(Q, K, V, Out) -> cross<Q, K, V, Out>;
template <class Q, class K, class V, class Out>
cross(Q, K, V, Out, layer_options) -> cross<Q, K, V, Out>;
template <class Q, class K, class V, class Out, class A>
cross(Q, K, V, Out, layer_options, rotary<A>) -> cross<Q, K, V, Out, rotary<A>>;
template <class Q, class K, class V, class Out>
self(Q, K, V, Out) -> self<Q, K, V, Out>;
template <class Q, class K, class V, class Out>
self(Q, K, V, Out, layer_options) -> self<Q, K, V, Out>;
template <class Q, class K, class V, class Out, class A>
self(Q, K, V, Out, layer_options, rotary<A>) -> self<Q, K, V, Out, rotary<A>>;

}  // namespace MLKIT_NAMESPACE::attention
