// Attention backward: the gradients of q, k, v, and of what a pipeline's stages hold.
#pragma once

#include <numeric>

#include "cache.hpp"
#include "problem.hpp"

namespace MLKIT_NAMESPACE::attention {

/// Where backward writes: dq, dk and dv of the shapes of q, k and v, of rank 3 where sequences are packed, and, where
/// they are given, dbias of the shape of the pipeline's bias and dsinks [heads].
template <storage T, storage B = T>
struct gradients {
  tensor_view<T, 4> dq, dk, dv;
  tensor_view<B, 4> dbias = {};
  vector_view<B> dsinks = {};

  template <viewable<4> Q, viewable<4> K, viewable<4> V>
  gradients(Q&& q, K&& k, V&& v) : dq(as_view(q)), dk(as_view(k)), dv(as_view(v)) {}
  template <viewable<4> Q, viewable<4> K, viewable<4> V, class Bias>
    requires(viewable<Bias, 2> || viewable<Bias, 3> || viewable<Bias, 4>)
  gradients(Q&& q, K&& k, V&& v, Bias&& b)
      : dq(as_view(q)), dk(as_view(k)), dv(as_view(v)), dbias(detail::broadcast_scores(as_view(b))) {}
  template <viewable<3> Q, viewable<3> K, viewable<3> V>
  gradients(Q&& q, K&& k, V&& v)
      : dq(detail::packed_heads(as_view(q))),
        dk(detail::packed_heads(as_view(k))),
        dv(detail::packed_heads(as_view(v))) {}
};
template <viewable<4> Q, viewable<4> K, viewable<4> V>
gradients(Q&&, K&&, V&&) -> gradients<element_t<std::remove_reference_t<Q>>>;
template <viewable<3> Q, viewable<3> K, viewable<3> V>
gradients(Q&&, K&&, V&&) -> gradients<element_t<std::remove_reference_t<Q>>>;
template <viewable<4> Q, viewable<4> K, viewable<4> V, class Bias>
gradients(Q&&, K&&, V&&, Bias&&)
    -> gradients<element_t<std::remove_reference_t<Q>>, element_t<std::remove_reference_t<Bias>>>;

namespace detail {

/// What the kernels of backward are given: the forward problem, whose out and lse are read, and the gradients.
template <class Forward, class D, class G, class B, class A>
struct backward_problem {
  using value_type = typename Forward::value_type;
  using scores_type = typename Forward::scores_type;
  using bias_type = B;
  Forward forward;
  tensor_view<const D, 4> dout;
  tensor_view<const A, 3> dlse;
  tensor_view<G, 4> dq, dk, dv;
  tensor_view<B, 4> dbias;
  bool dbias_past_caches = false;  // so are its rows written
  index_t d = 0, d_v = 0;

  head_rows<const D> dout_rows(index_t b, index_t h) const noexcept {
    return Forward::sequence(dout, forward.query_starts, b, h);
  }
  head_rows<G> dq_rows(index_t b, index_t h) const noexcept {
    return Forward::sequence(dq, forward.query_starts, b, h);
  }
  head_rows<G> dk_rows(index_t b, index_t kv) const noexcept {
    return Forward::sequence(dk, forward.key_starts, b, kv);
  }
  head_rows<G> dv_rows(index_t b, index_t kv) const noexcept {
    return Forward::sequence(dv, forward.key_starts, b, kv);
  }
  A dlse_at(index_t b, index_t h, index_t i) const noexcept {
    return dlse(forward.query_starts ? 0 : b, h, Forward::first(forward.query_starts, b) + i);
  }
};

template <class Problem, class A>
struct backward_functions {
  index_t block_queries;
  index_t (*scratch_bytes)(const Problem&) noexcept;
  index_t (*sums_size)(const Problem&, index_t keys) noexcept;
  void (*run)(const Problem&, index_t b, index_t kv, index_t begin, index_t end, A* sums, std::byte* scratch) noexcept;
  void (*finish)(const Problem&, index_t b, index_t kv, const A* sums) noexcept;
  void (*run_bias)(const Problem&, index_t b, index_t b_end, index_t h, index_t h_end, index_t first, index_t last,
                   A* totals, std::byte* scratch) noexcept;
};
template <class Problem>
using backward_kernels = backward_functions<Problem, accumulator_t<typename Problem::value_type>>;

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::attention

#define MLKIT_FOREACH "../attention/cpu/backward-inl.hpp"
#include "../simd/foreach_isa.hpp"

namespace MLKIT_NAMESPACE::attention {
namespace detail {

template <class T, class Problem>
backward_kernels<Problem> select_backward() {
  if constexpr (std::is_same_v<T, bf16>)
    return MLKIT_SELECT_PRODUCT(backward_entry<T, Problem>)();
  else
    return MLKIT_SELECT_WITHOUT_BF16(backward_entry<T, Problem>)();
}

// What a core's own caches hold of a bias's gradient; a larger one would only push out what is worked on.
inline constexpr index_t cached_bytes = index_t{4} << 20;

// Parts into which the blocks of queries of one kv head are cut, each with sums of its own, which are added in their
// order: the shape alone decides, so that any number of threads gives the same bits.
inline index_t parts_of_head(index_t blocks) noexcept {
  constexpr index_t blocks_of_part = 4, most_parts = 8;
  return std::clamp<index_t>(blocks / blocks_of_part, 1, most_parts);
}

template <class Problem>
void run_backward(const cpu& exec, const Problem& p) {
  using A = accumulator_t<typename Problem::value_type>;
  const auto kernels = select_backward<typename Problem::value_type, Problem>();
  const index_t heads = p.forward.k.extents[1];
  double work = 0;
  for (index_t b = 0; b < p.forward.sequences; ++b)
    work += static_cast<double>(p.forward.queries(b)) * static_cast<double>(p.forward.keys(b) + 1);
  const cpu limited = limit_threads(
      exec, 2.5 * work * static_cast<double>(p.forward.q.extents[1]) * static_cast<double>(p.d + p.d_v + 16));
  const index_t units = heads * p.forward.sequences, threads = concurrency(limited);

  struct span {
    index_t b, kv, keys, blocks, parts, size;
    index_t begin(index_t part) const noexcept { return blocks * part / parts; }
  };
  const auto span_of = [&](index_t unit) {
    span s;
    s.b = unit / heads;
    s.kv = unit % heads;
    s.keys = p.forward.keys(s.b);
    s.blocks = p.forward.group * ceil_div(p.forward.queries(s.b), kernels.block_queries);
    s.parts = parts_of_head(s.blocks);
    s.size = kernels.sums_size(p, s.keys);
    return s;
  };
  const auto run_part = [&](const span& s, index_t part, A* sums, std::byte* scratch) {
    std::fill_n(sums, s.size, A{});
    kernels.run(p, s.b, s.kv, s.begin(part), s.begin(part + 1), sums, scratch);
  };
  const auto add = [](const A* from, index_t size, A* to) {
    MLKIT_SIMD
    for (index_t i = 0; i < size; ++i) to[i] += from[i];
  };

  // Whole heads, as many to each thread; then those that are left, by parts.
  const index_t whole = units / threads * threads;
  parallel_ranges(limited, whole, [&](index_t begin, index_t end) {
    const subnormals_flushed flushed;
    const workspace<std::byte> scratch(kernels.scratch_bytes(p));
    for (index_t unit = begin; unit < end; ++unit) {
      const span s = span_of(unit);
      const workspace<A> sums(s.size), more(s.parts > 1 ? s.size : 0);
      for (index_t part = 0; part < s.parts; ++part) {
        run_part(s, part, part == 0 ? sums.data() : more.data(), scratch.data());
        if (part > 0) add(more.data(), s.size, sums.data());
      }
      kernels.finish(p, s.b, s.kv, sums.data());
    }
  });
  struct task {
    span s;
    index_t part, at;
  };
  std::vector<task> tasks;
  index_t size = 0;
  for (index_t unit = whole; unit < units; ++unit) {
    const span s = span_of(unit);
    for (index_t part = 0; part < s.parts; ++part, size += s.size) tasks.push_back({s, part, size});
  }
  if (tasks.empty()) return;
  const workspace<A> sums(size);
  const index_t count = static_cast<index_t>(tasks.size());
  parallel_ranges(limited, count, [&](index_t begin, index_t end) {
    const subnormals_flushed flushed;
    const workspace<std::byte> scratch(kernels.scratch_bytes(p));
    for (index_t i = begin; i < end; ++i) {
      const task& t = tasks[static_cast<std::size_t>(i % 2 == 0 ? i / 2 : count - 1 - i / 2)];
      run_part(t.s, t.part, sums.data() + t.at, scratch.data());
    }
  });
  parallel_ranges(limited, units - whole, [&](index_t begin, index_t end) {
    const subnormals_flushed flushed;
    for (const task& t : tasks) {
      const index_t unit = t.s.b * heads + t.s.kv - whole;
      if (unit < begin || unit >= end) continue;
      if (t.part > 0) add(sums.data() + t.at, t.s.size, sums.data() + t.at - t.part * t.s.size);
      if (t.part == t.s.parts - 1) kernels.finish(p, t.s.b, t.s.kv, sums.data() + t.at - t.part * t.s.size);
    }
  });
}

// Whether every score has an element of the bias of its own, so that no gradient is a sum.
template <class Problem>
bool bias_is_whole(const Problem& p) noexcept {
  const index_t of[] = {p.forward.sequences, p.forward.q.extents[1], p.forward.q.extents[2], p.forward.k.extents[2]};
  for (int d = 0; d < 4; ++d)
    if (p.dbias.extents[d] != of[d]) return false;
  return true;
}

// The gradient of a bias whose elements serve several scores: scores once more, in an order that the shape decides.
template <class Problem>
void run_shared_bias(const cpu& exec, const Problem& p) {
  using A = accumulator_t<typename Problem::value_type>;
  const auto kernels = select_backward<typename Problem::value_type, Problem>();
  const auto& have = p.dbias.extents;
  const index_t heads = p.forward.q.extents[1], queries = p.forward.q.extents[2];
  const index_t rows = have[2] == 1 ? std::max<index_t>(queries, 1) : kernels.block_queries;
  const index_t blocks = have[2] == 1 ? 1 : ceil_div(queries, rows);
  parallel_ranges(exec, have[0] * have[1] * blocks, [&](index_t begin, index_t end) {
    const subnormals_flushed flushed;
    const workspace<std::byte> scratch(kernels.scratch_bytes(p));
    const workspace<A> totals((have[2] == 1 ? 1 : rows) * have[3]);
    for (index_t at = begin; at < end; ++at) {
      const index_t b = at / blocks / have[1], h = at / blocks % have[1], first = at % blocks * rows;
      kernels.run_bias(p, b, have[0] == 1 ? p.forward.sequences : b + 1, h, have[1] == 1 ? heads : h + 1, first,
                       std::min(queries, first + rows), totals.data(), scratch.data());
    }
  });
}

// dsinks[h] = -sum over b and i of exp(sink - lse) D: each sequence's part on its own, then these in their order.
template <class Problem, class Sinks, class B>
void find_sink_gradients(const cpu& exec, const Problem& p, const Sinks& sinks, const vector_view<B>& dsinks) {
  const index_t heads = dsinks.extent(0), sequences = p.forward.sequences;
  const workspace<double> sums(heads * sequences);
  parallel_for(limit_threads(exec, static_cast<double>(p.forward.out.size())), heads * sequences, [&](index_t at) {
    const index_t h = at / sequences, b = at % sequences;
    const double sink = static_cast<double>(sinks.logits(h));
    const auto out = p.forward.out_rows(b, h);
    const auto dout = p.dout_rows(b, h);
    const bool there = sink != -std::numeric_limits<double>::infinity();
    double sum = 0;
    for (index_t i = 0; there && i < p.forward.queries(b); ++i) {
      double delta = p.dlse.data ? -static_cast<double>(p.dlse_at(b, h, i)) : 0.0;
      for (index_t c = 0; c < p.d_v; ++c)
        delta += static_cast<double>(out.data[i * out.row_stride + c * out.col_stride]) *
                 static_cast<double>(dout.data[i * dout.row_stride + c * dout.col_stride]);
      sum -= std::exp(sink - static_cast<double>(p.forward.lse_at(b, h, i))) * delta;
    }
    sums.data()[at] = sum;
  });
  for (index_t h = 0; h < heads; ++h)
    dsinks(h) = static_cast<B>(std::accumulate(sums.data() + h * sequences, sums.data() + (h + 1) * sequences, 0.0));
}

template <class T, int Rank>
void check_same(std::string_view function, std::string_view name, const tensor_view<T, Rank>& v,
                std::string_view like_name, const std::type_identity_t<extents_t<Rank>>& like) {
  check_output(function, name, v);
  if (v.extents != like)
    fail_shape(function, ": ", name, " has shape ", shape_text<Rank>(v.extents), ", but ", like_name, " has ",
               shape_text<Rank>(like));
}

template <class T, class Out, class A, class D, class G, class B, class... Stages>
void backward(const cpu& exec, const tensor_view<const T, 4>& q, const tensor_view<const T, 4>& k,
              const tensor_view<const T, 4>& v, const scores<Stages...>& given, const tensor_view<const Out, 4>& out,
              const tensor_view<const A, 3>& lse, const tensor_view<const D, 4>& dout, const gradients<G, B>& g,
              const tensor_view<const A, 3>& dlse, const sequences* packed) {
  constexpr bool f64 = std::is_same_v<T, double>;
  static_assert(f64 == std::is_same_v<Out, double>,
                "attention: f64 goes with f64 alone: q, k, v and out are all f64, or none is");
  static_assert(
      f64 == std::is_same_v<D, double> && f64 == std::is_same_v<G, double> && f64 == std::is_same_v<B, double>,
      "attention: f64 goes with f64 alone: dout and the gradients are f64 where q is, and only there");
  static_assert((has_gradient<Stages> && ...),
                "attention: backward needs a member `derivative` of each stage of the user's own");
  constexpr std::string_view function = "attention::backward";
  arguments call(function, exec);
  check_tensors(function, q, k, v, out);
  check_lse(function, "lse", lse, q);
  check_view(function, "dout", dout);
  if (dout.extents != out.extents)
    fail_shape(function, ": dout has shape ", shape_text<4>(dout.extents), ", but out has ",
               shape_text<4>(out.extents));
  const bool with_dlse = dlse.data || !dlse.empty();
  if (with_dlse) check_lse(function, "dlse", dlse, q);
  const auto pipeline = with_scale(given, q.extent(3));
  const auto f = make_problem<T>(function, q, k, v, out, lse, pipeline, packed);
  check_same(function, "dq", g.dq, "q", q.extents);
  check_same(function, "dk", g.dk, "k", k.extents);
  check_same(function, "dv", g.dv, "v", v.extents);
  call.reads("q", q);
  call.reads("k", k);
  call.reads("v", v);
  call.reads("out", out);
  call.reads("lse", lse);
  call.reads("dout", dout);
  if (with_dlse) call.reads("dlse", dlse);
  name_scores(call, pipeline, packed);
  call.writes("dq", g.dq);
  call.writes("dk", g.dk);
  call.writes("dv", g.dv);
  const bool with_dbias = g.dbias.data || !g.dbias.empty(), with_dsinks = g.dsinks.data || !g.dsinks.empty();
  bool has_bias = false, has_sinks = false;
  each_stage(pipeline, [&](const auto& stage) {
    using S = std::remove_cvref_t<decltype(stage)>;
    if constexpr (is_bias<S>) {
      has_bias = true;
      if (with_dbias) check_same(function, "dbias", g.dbias, "bias", stage.values.extents);
    }
    if constexpr (is_sinks<S>) {
      has_sinks = true;
      if (with_dsinks) check_same(function, "dsinks", g.dsinks, "sinks", stage.logits.extents);
    }
  });
  if (with_dbias && !has_bias) fail_value(function, ": dbias is given, but scores have no bias");
  if (with_dsinks && !has_sinks) fail_value(function, ": dsinks is given, but scores have no sinks");
  if (g.dbias.data) call.writes("dbias", g.dbias);
  if (g.dsinks.data) call.writes("dsinks", g.dsinks);

  using Scores = std::remove_cvref_t<decltype(pipeline)>;
  using Forward = std::remove_const_t<decltype(f)>;
  backward_problem<Forward, D, G, B, A> p{f, dout, dlse, g.dq, g.dk, g.dv, broadcast_scores(g.dbias)};
  p.d = f.d;
  p.d_v = f.d_v;
  if constexpr (any_bias<Scores>) {
    if (p.dbias.data) {
      if constexpr (any_mask<Scores>) {  // blocks that are skipped have gradients of zero
        const auto& extents = g.dbias.extents;
        parallel_for(exec, extents[0] * extents[1] * extents[2], [&](index_t at) {
          const index_t i = at % extents[2], h = at / extents[2] % extents[1], b = at / extents[2] / extents[1];
          const auto& step = p.dbias.strides;
          B* row = p.dbias.data + b * step[0] + h * step[1] + i * step[2];
          for (index_t j = 0; j < extents[3]; ++j) row[j * step[3]] = static_cast<B>(0.0f);
        });
      }
      if (bias_is_whole(p)) {
        p.dbias_past_caches = p.dbias.size() * index_t{sizeof(B)} > cached_bytes;
      } else {
        run_shared_bias(exec, p);
        p.dbias.data = nullptr;
      }
    }
  }
  run_backward(exec, p);
  each_stage(pipeline, [&](const auto& stage) {
    if constexpr (is_sinks<std::remove_cvref_t<decltype(stage)>>)
      if (g.dsinks.data) find_sink_gradients(exec, p, stage, g.dsinks);
  });
}

}  // namespace detail

/// The gradients of forward: with P as there, dP = dout v^T and D = sum of dout * out (less dlse, where the lse is used
/// downstream),
///   dv = P^T dout,  dS = P (dP - D) through each stage's own derivative,  dq = dS k,  dk = dS^T q,
/// and the bias's gradient is what of dS arrives at it. `s` is the pipeline of the forward call, and out and lse its
/// results; probabilities are computed again, as exp(S - lse). Queries that saw no key have gradients of 0. Where a
/// row's scores are all so large that lse cannot hold the logarithm of a sum beside them (1e7 in f32; a row hidden as a
/// whole by a bias of -1e30 rather than -inf), so large are the errors of its gradients.
///
/// Types, errors, subnormal numbers and determinism as for forward. Five products where forward has two: 2 queries keys
/// (3 d + 2 d_v) flops a head. Scratch memory grows with keys (d + d_v), never with queries x keys.
template <executor Executor, viewable<4> Q, viewable<4> K, viewable<4> V, class... Stages, viewable<4> Out,
          viewable<3> Lse, viewable<4> D, class G, class B>
void backward(const Executor& exec, const Q& q, const K& k, const V& v, const scores<Stages...>& s, const Out& out,
              const Lse& lse, const D& dout, const gradients<G, B>& g,
              const tensor_view<const accumulator_t<element_t<const Q>>, 3>& dlse = {}) {
  using T = element_t<const Q>;
  using A = accumulator_t<T>;
  detail::check_one_type<T, K, V>();
  detail::backward(exec, tensor_view<const T, 4>(as_view(q)), tensor_view<const T, 4>(as_view(k)),
                   tensor_view<const T, 4>(as_view(v)), s, tensor_view<const element_t<const Out>, 4>(as_view(out)),
                   tensor_view<const A, 3>(as_view(lse)), tensor_view<const element_t<const D>, 4>(as_view(dout)), g,
                   dlse, nullptr);
}

/// The same for packed sequences: q, out and dout [tokens, heads, ...], k and v [tokens, kv heads, ...], lse and dlse
/// [heads, tokens], gradients of the shapes of q, k and v.
template <executor Executor, viewable<3> Q, viewable<3> K, viewable<3> V, class... Stages, viewable<3> Out,
          viewable<2> Lse, viewable<3> D, class G, class B>
void backward(const Executor& exec, const Q& q, const K& k, const V& v, const sequences& packed,
              const scores<Stages...>& s, const Out& out, const Lse& lse, const D& dout, const gradients<G, B>& g,
              const matrix_view<const accumulator_t<element_t<const Q>>>& dlse = {}) {
  detail::check_packable<Stages...>();
  using T = element_t<const Q>;
  using A = accumulator_t<T>;
  detail::check_one_type<T, K, V>();
  using View = tensor_view<const T, 3>;
  const bool with_dlse = dlse.data || !dlse.empty();
  detail::backward(exec, detail::packed_heads(View(as_view(q))), detail::packed_heads(View(as_view(k))),
                   detail::packed_heads(View(as_view(v))), s,
                   detail::packed_heads(tensor_view<const element_t<const Out>, 3>(as_view(out))),
                   detail::packed_lse(matrix_view<const A>(as_view(lse))),
                   detail::packed_heads(tensor_view<const element_t<const D>, 3>(as_view(dout))), g,
                   with_dlse ? detail::packed_lse(dlse) : tensor_view<const A, 3>{}, &packed);
}

template <executor Executor, viewable<3> Q, viewable<3> K, viewable<3> V, class... Stages, viewable<3> Out,
          viewable<2> Lse, viewable<3> D, viewable<3> Dq, viewable<3> Dk, viewable<3> Dv>
void backward(const Executor& exec, const Q& q, const K& k, const V& v, const sequences& packed,
              const scores<Stages...>& s, const Out& out, const Lse& lse, const D& dout, Dq&& dq, Dk&& dk, Dv&& dv) {
  backward(exec, q, k, v, packed, s, out, lse, dout, gradients{dq, dk, dv});
}

/// Caches are for decode.
template <executor Executor, viewable<4> Q, key_value_cache Cache, class... More>
void backward(const Executor&, const Q&, const Cache&, const More&...) {
  static_assert(!key_value_cache<Cache>,
                "attention: a cache has no backward; copy its keys and values into contiguous tensors");
}

}  // namespace MLKIT_NAMESPACE::attention
