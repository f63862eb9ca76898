// What attention's kernels are given, and the checks that forward and backward share.
#pragma once

#include <algorithm>

#include "../core/arguments.hpp"
#include "../core/memory.hpp"
#include "../core/starts.hpp"
#include "../matmul/run.hpp"
#include "../simd/random.hpp"
#include "../simd/subnormals.hpp"
#include "scores.hpp"

namespace MLKIT_NAMESPACE::attention {

/// Where the sequences of a packed batch start: sequence b is rows queries[b] to queries[b + 1] - 1 of q, and keys[b]
/// to keys[b + 1] - 1 of k and v (what others call cu_seqlens); both [batch + 1], from 0 to the number of rows.
/// `sequences{starts}` where they are the same. It owns nothing.
struct sequences {
  vector_view<const std::int32_t> queries, keys;

  template <std::ranges::contiguous_range R>
  explicit sequences(const R& starts) : sequences(starts, starts) {}
  template <std::ranges::contiguous_range Q, std::ranges::contiguous_range K>
  sequences(const Q& query_starts, const K& key_starts)
      : queries(std::ranges::data(query_starts), {static_cast<index_t>(std::ranges::size(query_starts))}),
        keys(std::ranges::data(key_starts), {static_cast<index_t>(std::ranges::size(key_starts))}) {
    static_assert(std::is_same_v<std::ranges::range_value_t<Q>, std::int32_t> &&
                      std::is_same_v<std::ranges::range_value_t<K>, std::int32_t>,
                  "attention: starts of sequences are std::int32_t");
  }
};

}  // namespace MLKIT_NAMESPACE::attention

namespace MLKIT_NAMESPACE::attention::detail {

// One head of a tensor, [rows, cols]; null without columns.
template <class T>
struct head_rows {
  T* data;
  index_t rows, cols, row_stride, col_stride;
};

template <class T>
head_rows<T> head(const tensor_view<T, 4>& v, index_t b, index_t h) noexcept {
  return {v.data ? v.data + b * v.strides[0] + h * v.strides[1] : nullptr, v.extents[2], v.extents[3], v.strides[2],
          v.strides[3]};
}

/// What the kernels are given: q [batch, heads, queries, d], k [batch, kv heads, keys, d], v [batch, kv heads, keys,
/// d_v], out [batch, heads, queries, d_v], lse [batch, heads, queries] or null. With `starts`, tokens of all sequences
/// lie in one: q, k, v have a batch of 1, and sequence b is rows [starts[b], starts[b + 1]).
template <class T, class Out, class A, class Scores>
struct attention_problem {
  using value_type = T;
  using scores_type = Scores;
  tensor_view<const T, 4> q, k, v;
  tensor_view<Out, 4> out;
  tensor_view<A, 3> lse;
  const Scores* scores;
  const std::int32_t* query_starts = nullptr;
  const std::int32_t* key_starts = nullptr;
  index_t sequences = 0;
  index_t d = 0, d_v = 0, group = 1;

  static index_t first(const std::int32_t* starts, index_t b) noexcept { return starts ? starts[b] : 0; }
  static index_t count(const std::int32_t* starts, index_t b, index_t rows) noexcept {
    return starts ? starts[b + 1] - starts[b] : rows;
  }
  template <class U>
  static head_rows<U> sequence(const tensor_view<U, 4>& x, const std::int32_t* starts, index_t b, index_t h) noexcept {
    head_rows<U> m = head(x, starts ? 0 : b, h);
    m.rows = count(starts, b, m.rows);
    m.data += first(starts, b) * m.row_stride;
    return m;
  }
  index_t queries(index_t b) const noexcept { return count(query_starts, b, q.extents[2]); }
  index_t keys(index_t b) const noexcept { return count(key_starts, b, k.extents[2]); }
  head_rows<const T> query_rows(index_t b, index_t h) const noexcept { return sequence(q, query_starts, b, h); }
  head_rows<const T> key_rows(index_t b, index_t h) const noexcept { return sequence(k, key_starts, b, h / group); }
  head_rows<const T> value_rows(index_t b, index_t h) const noexcept { return sequence(v, key_starts, b, h / group); }
  head_rows<Out> out_rows(index_t b, index_t h) const noexcept { return sequence(out, query_starts, b, h); }
  // Calls f(to, row, more, stride) with the rows that columns of the result go to, in order, and which of them query i
  // has, the task's query `at`; and with what is added before, rows of columns `stride` apart, or null.
  template <class F>
  void each_out(index_t b, index_t h, index_t i, index_t, F&& f) const noexcept {
    f(out_rows(b, h), i, static_cast<const A*>(nullptr), index_t{0});
  }
  A& lse_at(index_t b, index_t h, index_t i) const noexcept {
    return lse(query_starts ? 0 : b, h, first(query_starts, b) + i);
  }
  score_shape shape(index_t b) const noexcept { return {sequences, q.extents[1], queries(b), keys(b)}; }
};

template <class T, class... Views>
constexpr void check_one_type() {
  static_assert((std::is_same_v<T, element_t<const Views>> && ...), "attention: q, k and v have one type of elements");
}

template <class Q, class K, class V, class Out>
void check_tensors(std::string_view function, const tensor_view<Q, 4>& q, const tensor_view<K, 4>& k,
                   const tensor_view<V, 4>& v, const tensor_view<Out, 4>& out) {
  check_view(function, "q", q);
  check_view(function, "k", k);
  check_view(function, "v", v);
  check_view(function, "out", out);
  check_extent(function, "k", "batches", k.extent(0), "q", q.extent(0));
  check_extent(function, "v", "batches", v.extent(0), "q", q.extent(0));
  check_extent(function, "v", "heads", v.extent(1), "k", k.extent(1));
  if (k.extent(1) == 0 ? q.extent(1) != 0 : q.extent(1) % k.extent(1) != 0)
    fail_shape(function, ": q has ", q.extent(1), " heads, which is no multiple of k's ", k.extent(1));
  check_extent(function, "k", "columns", k.extent(3), "q", q.extent(3));
  check_extent(function, "v", "keys", v.extent(2), "k", k.extent(2));
  check_extent(function, "out", "batches", out.extent(0), "q", q.extent(0));
  check_extent(function, "out", "heads", out.extent(1), "q", q.extent(1));
  check_extent(function, "out", "queries", out.extent(2), "q", q.extent(2));
  check_extent(function, "out", "columns", out.extent(3), "v", v.extent(3));
}

template <class A, class Q>
void check_lse(std::string_view function, std::string_view name, const tensor_view<A, 3>& lse,
               const tensor_view<Q, 4>& q) {
  check_view(function, name, lse);
  check_extent(function, name, "batches", lse.extent(0), "q", q.extent(0));
  check_extent(function, name, "heads", lse.extent(1), "q", q.extent(1));
  check_extent(function, name, "queries", lse.extent(2), "q", q.extent(2));
}

// Packed tokens [tokens, heads, d] as [1, heads, tokens, d].
template <class T>
tensor_view<T, 4> packed_heads(const tensor_view<T, 3>& v) noexcept {
  return {v.data, {1, v.extents[1], v.extents[0], v.extents[2]}, {0, v.strides[1], v.strides[0], v.strides[2]}};
}
template <class T>
tensor_view<T, 3> packed_lse(const matrix_view<T>& v) noexcept {
  return {v.data, {1, v.extents[0], v.extents[1]}, {0, v.strides[0], v.strides[1]}};
}

template <class... Stages>
constexpr void check_packable() {
  static_assert(
      ((!is_of_one_shape<Stages> && !is_key_lengths<Stages>)&&...),
      "attention: a bias, boolean_mask, documents, block_sparse or key_lengths is made for one shape of scores, "
      "which the sequences of a packed batch do not share");
}

template <class... Stages>
void name_scores(arguments& call, const scores<Stages...>& s, const sequences* packed = nullptr) {
  if (packed) {
    call.reads("sequences.queries", packed->queries);
    call.reads("sequences.keys", packed->keys);
  }
  each_stage(s, [&](const auto& stage) {
    if constexpr (requires { stage.each_view([](std::string_view, const auto&) {}); })
      stage.each_view([&](std::string_view name, const auto& v) { call.reads(name, v); });
  });
}

template <class T, class Out, class A, class... Stages>
auto make_problem(std::string_view function, const tensor_view<const T, 4>& q, const tensor_view<const T, 4>& k,
                  const tensor_view<const T, 4>& v, const tensor_view<Out, 4>& out, const tensor_view<A, 3>& lse,
                  const scores<Stages...>& pipeline, const sequences* packed) {
  attention_problem<T, Out, A, scores<Stages...>> p{q, k, v, out, lse, &pipeline};
  p.sequences = q.extent(0);
  p.d = q.extent(3);
  p.d_v = v.extent(3);
  p.group = k.extent(1) == 0 ? 1 : q.extent(1) / k.extent(1);
  if (packed) {
    check_starts(function, "sequences.queries", packed->queries, "q has", q.extent(2), "rows");
    check_starts(function, "sequences.keys", packed->keys, "k has", k.extent(2), "rows");
    check_extent(function, "sequences.keys", "elements", packed->keys.extent(0), "sequences.queries",
                 packed->queries.extent(0));
    p.sequences = packed->queries.extent(0) - 1;
    p.query_starts = packed->queries.data;
    p.key_starts = packed->keys.data;
    for (index_t b = 0; b < p.sequences; ++b) check_scores<std::remove_const_t<A>>(function, pipeline, p.shape(b));
  } else {
    check_scores<std::remove_const_t<A>>(function, pipeline, p.shape(0));
  }
  return p;
}

}  // namespace MLKIT_NAMESPACE::attention::detail

#define MLKIT_FOREACH "../attention/cpu/scores-inl.hpp"
#include "../simd/foreach_isa.hpp"
#define MLKIT_FOREACH "../attention/cpu/attend-inl.hpp"
#include "../simd/foreach_isa.hpp"
