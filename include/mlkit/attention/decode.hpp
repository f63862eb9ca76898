// Decoding: one query of each sequence against a cache of keys and values, and the merge of results over parts of keys.
#pragma once

#include "cache.hpp"
#include "problem.hpp"

namespace MLKIT_NAMESPACE::attention {

/// What decode may be told.
struct decode_options {
  double scale = 0;    ///< 0 means 1 / sqrt(d)
  double softcap = 0;  ///< scores become cap tanh(s / cap); 0 means none
};

namespace detail {

template <class Q, class Cache, class A>
struct decode_problem {
  using sum_type = A;
  using cache_element = typename Cache::value_type;
  tensor_view<const Q, 3> q;
  const Cache& cache;
  double scale, softcap;
  index_t d, d_v, group;
};

template <class Problem>
struct decode_kernels {
  index_t (*scratch_size)(const Problem&) noexcept;
  void (*run)(const Problem&, index_t b, index_t kv, index_t begin, index_t end, typename Problem::sum_type* state,
              typename Problem::sum_type* scratch) noexcept;
};

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::attention

#define MLKIT_FOREACH "../attention/cpu/decode-inl.hpp"
#include "../simd/foreach_isa.hpp"

namespace MLKIT_NAMESPACE::attention {

/// out[b, h] = attention of the one query q[b, h] over the cache of sequence b: what a model does for each token that
/// it generates. q [batch, heads, d], out [batch, heads, d_v], heads a multiple of the cache's; lse [batch, heads] if
/// it is given. A sequence without entries gives 0 and -inf.
///
/// The cache is read once, for all heads that share its keys; long sequences are spread over threads in parts that the
/// lengths alone decide, merged in order: the same bits for any number of threads. f32, f64, bf16 and f16; sums are f32
/// (f64 for f64). Throws shape_error where extents do not fit, value_error for lengths or pages out of range, before
/// out is touched. Reads (d + d_v) elements an entry. Elements of an int8 cache meet their scales in f32.
template <executor Executor, viewable<3> Q, key_value_cache Cache, viewable<3> Out>
void decode(const Executor& exec, const Q& query, const Cache& cache, Out&& output, const decode_options& o = {},
            const matrix_view<accumulator_t<element_t<const Q>>>& lse = {}) {
  constexpr std::string_view function = "attention::decode";
  using T = element_t<const Q>;
  using A = accumulator_t<T>;
  static_assert(std::is_same_v<T, double> == std::is_same_v<typename Cache::value_type, double>,
                "attention: f64 goes with f64 alone: q and the cache are both f64, or neither is");
  const tensor_view<const T, 3> q = as_view(query);
  const auto out = as_view(output);
  detail::arguments call(function, exec);
  detail::check_view(function, "q", q);
  if constexpr (requires { cache.check(function); }) cache.check(function);
  detail::check_extent(function, "q", "batches", q.extent(0), "cache", cache.batch());
  if (cache.heads() == 0 ? q.extent(1) != 0 : q.extent(1) % cache.heads() != 0)
    detail::fail_shape(function, ": q has ", q.extent(1), " heads, which is no multiple of the cache's ",
                       cache.heads());
  detail::check_extent(function, "q", "columns", q.extent(2), "cache.k", cache.d());
  detail::check_view(function, "out", out);
  detail::check_extent(function, "out", "batches", out.extent(0), "q", q.extent(0));
  detail::check_extent(function, "out", "heads", out.extent(1), "q", q.extent(1));
  detail::check_extent(function, "out", "columns", out.extent(2), "cache.v", cache.d_v());
  detail::check_scale_of<A>(function, o.scale);
  if (o.softcap != 0) detail::check_softcap_of<A>(function, o.softcap);  // 0 is none
  call.reads("q", q);
  if constexpr (requires { cache.each_view([](std::string_view, const auto&) {}); })
    cache.each_view([&](std::string_view name, const auto& v) { call.reads(name, v); });
  call.writes("out", out);
  if (lse.data || !lse.empty()) {
    detail::check_view(function, "lse", lse);
    detail::check_extent(function, "lse", "rows", lse.extent(0), "q", q.extent(0));
    detail::check_extent(function, "lse", "columns", lse.extent(1), "q", q.extent(1));
    call.writes("lse", lse);
  }
  const index_t heads = q.extent(1), kv_heads = cache.heads(), d_v = cache.d_v();
  if (q.extent(0) == 0 || heads == 0) return;
  using Problem = detail::decode_problem<T, Cache, A>;
  const double scale = o.scale != 0 ? o.scale : 1 / std::sqrt(static_cast<double>(std::max<index_t>(1, cache.d())));
  const Problem p{q, cache, scale, o.softcap, cache.d(), d_v, heads / kv_heads};

  // Parts of at least so many keys, and at most so many parts to a sequence.
  constexpr index_t keys_of_part = 512, most_parts = 64;
  struct part {
    index_t b, kv, begin, end;
  };
  std::vector<part> parts;
  double work = 0;
  for (index_t b = 0; b < q.extent(0); ++b) {
    const index_t n = cache.length(b), step = std::max(keys_of_part, detail::ceil_div(n, most_parts));
    work += static_cast<double>(n) * static_cast<double>(heads) * static_cast<double>(cache.d() + d_v);
    for (index_t kv = 0; kv < kv_heads; ++kv)
      for (index_t j = 0; j == 0 || j < n; j += step) parts.push_back({b, kv, j, std::min(n, j + step)});
  }
  const index_t state = p.group * (d_v + 2);
  const detail::workspace<A> states(static_cast<index_t>(parts.size()) * state);
  const auto kernels = MLKIT_SELECT_WITHOUT_BF16(decode_entry<Problem>)();
  const cpu limited = detail::limit_threads(exec, 4 * work);
  detail::parallel_ranges(limited, static_cast<index_t>(parts.size()), [&](index_t begin, index_t end) {
    const detail::workspace<A> scratch(kernels.scratch_size(p));
    for (index_t i = begin; i < end; ++i) {
      const part& s = parts[static_cast<std::size_t>(i)];
      kernels.run(p, s.b, s.kv, s.begin, s.end, states.data() + i * state, scratch.data());
    }
  });
  // Parts of a sequence's kv head lie beside each other.
  std::vector<index_t> firsts;
  for (index_t i = 0; i < static_cast<index_t>(parts.size()); ++i)
    if (parts[static_cast<std::size_t>(i)].begin == 0) firsts.push_back(i);
  firsts.push_back(static_cast<index_t>(parts.size()));
  const cpu merging = detail::limit_threads(exec, static_cast<double>(parts.size()) * static_cast<double>(state));
  parallel_for(merging, static_cast<index_t>(firsts.size()) - 1, [&](index_t at) {
    const index_t first = firsts[static_cast<std::size_t>(at)], last = firsts[static_cast<std::size_t>(at) + 1];
    const part& s = parts[static_cast<std::size_t>(first)];
    for (index_t r = 0; r < p.group; ++r) {
      const auto of = [&](index_t i) { return states.data() + i * state + r * (d_v + 2); };
      A top = -std::numeric_limits<A>::infinity(), total = 0;
      for (index_t i = first; i < last; ++i) top = std::max(top, of(i)[0]);
      A* const sum = of(first) + 2;
      for (index_t i = first; i < last; ++i) {
        const A* const from = of(i) + 2;
        const A factor = of(i)[1] == 0 ? A{} : std::exp(of(i)[0] - top);
        total += factor * of(i)[1];
        MLKIT_SIMD
        for (index_t c = 0; c < d_v; ++c) sum[c] = factor * from[c] + (i == first ? A{} : sum[c]);
      }
      const index_t h = s.kv * p.group + r;
      for (index_t c = 0; c < d_v; ++c)
        out(s.b, h, c) = static_cast<element_t<std::remove_reference_t<Out>>>(total == 0 ? A{} : sum[c] / total);
      if (lse.data) lse(s.b, h) = total == 0 ? -std::numeric_limits<A>::infinity() : top + std::log(total);
    }
  });
}

/// Merges attention over two sets of keys: out and lse become those over both. out and other [batch, heads, queries,
/// d_v], lse and other_lse [batch, heads, queries]:
///   lse' = log(e^lse + e^other_lse),   out' = e^(lse - lse') out + e^(other_lse - lse') other.
/// Associative up to rounding, and -inf is its neutral element: so results over parts of a cache, or over ranks that
/// hold parts of it, become one. Throws shape_error where extents differ or memory overlaps.
template <executor Executor, viewable<4> Out, viewable<3> Lse, viewable<4> Other, viewable<3> OtherLse>
void merge(const Executor& exec, Out&& out, Lse&& lse, const Other& other, const OtherLse& other_lse) {
  constexpr std::string_view function = "attention::merge";
  const auto a = as_view(out);
  const auto la = as_view(lse);
  const tensor_view<const element_t<const Other>, 4> b = as_view(other);
  const tensor_view<const element_t<const OtherLse>, 3> lb = as_view(other_lse);
  using A = element_t<std::remove_reference_t<Lse>>;
  using T = element_t<std::remove_reference_t<Out>>;
  detail::arguments call(function, exec);
  detail::check_view(function, "other", b);
  detail::check_view(function, "other_lse", lb);
  if (a.extents != b.extents)
    detail::fail_shape(function, ": other has shape ", detail::shape_text<4>(b.extents), ", but out has ",
                       detail::shape_text<4>(a.extents));
  const extents_t<3> rows{a.extent(0), a.extent(1), a.extent(2)};
  if (la.extents != rows || lb.extents != rows)
    detail::fail_shape(function, ": lse has shape ", detail::shape_text<3>(la.extents), " and other_lse ",
                       detail::shape_text<3>(lb.extents), ", but out has rows ", detail::shape_text<3>(rows));
  call.reads("other", b);
  call.reads("other_lse", lb);
  call.writes("out", a);
  call.writes("lse", la);
  parallel_for(exec, rows[0] * rows[1] * rows[2], [&](index_t at) {
    const index_t i = at % rows[2], h = at / rows[2] % rows[1], n = at / rows[2] / rows[1];
    A& l = la(n, h, i);
    const A m = static_cast<A>(lb(n, h, i));
    const A top = std::max(l, m);
    if (top == -std::numeric_limits<A>::infinity()) return;
    const A mine = std::exp(l - top), others = std::exp(m - top), total = mine + others;
    for (index_t c = 0; c < a.extent(3); ++c)
      a(n, h, i, c) =
          static_cast<T>((mine * static_cast<A>(a(n, h, i, c)) + others * static_cast<A>(b(n, h, i, c))) / total);
    l = top + std::log(total);
  });
}

}  // namespace MLKIT_NAMESPACE::attention
