// What attention's kernels are given, and the checks that forward and backward share.
#pragma once

#include <algorithm>

#include "../core/arguments.hpp"
#include "../core/memory.hpp"
#include "../matmul/run.hpp"
#include "scores.hpp"

namespace MLKIT_NAMESPACE::attention::detail {

// One head of a tensor, [rows, cols].
template <class T>
struct head_rows {
  T* data;
  index_t rows, cols, row_stride, col_stride;
};

template <class T>
head_rows<T> head(const tensor_view<T, 4>& v, index_t b, index_t h) noexcept {
  return {v.data + b * v.strides[0] + h * v.strides[1], v.extents[2], v.extents[3], v.strides[2], v.strides[3]};
}

/// What the kernels are given: q [batch, heads, queries, d], k [batch, kv heads, keys, d], v [batch, kv heads, keys,
/// d_v], out [batch, heads, queries, d_v], lse [batch, heads, queries] or null. With `starts`, tokens of all sequences
/// lie in one: q, k, v have a batch of 1, and sequence b is rows [starts[b], starts[b + 1]).
template <class T, class Out, class A, class Scores>
struct attention_problem {
  using value_type = T;
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
  A& lse_at(index_t b, index_t h, index_t i) const noexcept {
    return lse(query_starts ? 0 : b, h, first(query_starts, b) + i);
  }
  score_shape shape(index_t b) const noexcept { return {sequences, q.extents[1], queries(b), keys(b)}; }
};

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
void check_lse(std::string_view function, const tensor_view<A, 3>& lse, const tensor_view<Q, 4>& q) {
  check_view(function, "lse", lse);
  check_extent(function, "lse", "batches", lse.extent(0), "q", q.extent(0));
  check_extent(function, "lse", "heads", lse.extent(1), "q", q.extent(1));
  check_extent(function, "lse", "queries", lse.extent(2), "q", q.extent(2));
}

template <class... Stages>
void name_scores(arguments& call, const scores<Stages...>& s) {
  each_stage(s, [&](const auto& stage) {
    if constexpr (requires { stage.each_view([](std::string_view, const auto&) {}); })
      stage.each_view([&](std::string_view name, const auto& v) { call.reads(name, v); });
  });
}

}  // namespace MLKIT_NAMESPACE::attention::detail

#define MLKIT_FOREACH "../attention/cpu/scores-inl.hpp"
#include "../simd/foreach_isa.hpp"
#define MLKIT_FOREACH "../attention/cpu/attend-inl.hpp"
#include "../simd/foreach_isa.hpp"
