// Attention forward: out = softmax(scores(q k^T)) v.
#pragma once

#include "problem.hpp"

namespace MLKIT_NAMESPACE::attention::detail {

template <class Problem>
struct forward_kernels {
  index_t sliver;  // queries that are worked on together
  index_t (*scratch_bytes)(const Problem&, index_t rows) noexcept;
  void (*run)(const Problem&, index_t b, index_t h, index_t first, index_t rows, std::byte* scratch) noexcept;
};

}  // namespace MLKIT_NAMESPACE::attention::detail

#define MLKIT_FOREACH "../attention/cpu/forward-inl.hpp"
#include "../simd/foreach_isa.hpp"

namespace MLKIT_NAMESPACE::attention {
namespace detail {

template <class T, class Problem>
forward_kernels<Problem> select_forward() {
  if constexpr (std::is_same_v<T, bf16>)
    return MLKIT_SELECT_PRODUCT(forward_entry<T, Problem>)();
  else
    return MLKIT_SELECT_WITHOUT_BF16(forward_entry<T, Problem>)();
}

// Queries that share the packed keys and values, at most.
inline constexpr index_t queries_at_once = 512;

// Rows of a task: alike, whole groups, no more than `most`, and as few tasks as threads can share evenly; where masks
// make tasks unequal, several for each thread.
template <class Scores>
index_t rows_of_task(index_t queries, index_t most, index_t heads, index_t sliver, index_t threads) noexcept {
  constexpr index_t tasks_of_thread = 4;
  const index_t slivers = ceil_div(queries, sliver);
  const auto shared = [&](index_t tasks) {
    return tasks >= threads * tasks_of_thread || (tasks % threads == 0 && (threads == 1 || !any_mask<Scores>));
  };
  index_t parts = ceil_div(queries, most);
  while (parts < slivers && !shared(parts * std::max<index_t>(1, heads))) ++parts;
  const index_t rows = round_up(ceil_div(queries, std::max<index_t>(1, parts)), sliver);
  return std::max(sliver, std::min(rows, most / sliver * sliver));
}

// A task has one head, or all of them where a map is their mean; twice the queries where a query needs little memory,
// and no more than a map's memory allows.
struct task_shape {
  bool all_heads = false;
  index_t most_queries = queries_at_once;
};
template <class Problem>
task_shape shape_of_tasks(const Problem& p) noexcept {
  const index_t most =
      any_bias<typename Problem::scores_type> || p.d + p.d_v > 128 ? queries_at_once : 2 * queries_at_once;
  if constexpr (requires { p.map; })
    return p.map.tasks(p.k.extents[2], most);
  else
    return {false, most};
}

template <class Problem>
void run_forward(const cpu& exec, const Problem& p) {
  const auto kernels = select_forward<typename Problem::value_type, Problem>();
  const index_t heads = p.q.extents[1];
  double work = 0;
  index_t most = 0;
  for (index_t b = 0; b < p.sequences; ++b) {
    most = std::max(most, p.queries(b));
    work += static_cast<double>(p.queries(b)) * static_cast<double>(p.keys(b) + 1);
  }
  if (most == 0 || heads == 0) return;
  const cpu limited = limit_threads(exec, work * static_cast<double>(heads) * static_cast<double>(p.d + p.d_v + 16));
  const task_shape wanted = shape_of_tasks(p);
  const index_t heads_of_task = wanted.all_heads ? heads : 1, task_heads = heads / heads_of_task;
  const index_t rows = rows_of_task<typename Problem::scores_type>(
      most, std::max<index_t>(1, wanted.most_queries), task_heads * p.sequences, kernels.sliver, concurrency(limited));
  const index_t parts = ceil_div(most, rows), tasks = parts * task_heads * p.sequences;
  parallel_ranges(limited, tasks, [&](index_t begin, index_t end) {
    const subnormals_flushed flushed;
    const workspace<std::byte> scratch(kernels.scratch_bytes(p, rows));
    for (index_t at = begin; at < end; ++at) {
      // Later queries see more keys under a causal mask: each thread gets them from both ends.
      const index_t task = at % 2 == 0 ? at / 2 : tasks - 1 - at / 2;
      const index_t head = task / parts, first = task % parts * rows, b = head / task_heads;
      const index_t count = std::min(rows, p.queries(b) - first);
      for (index_t h = 0; count > 0 && h < heads_of_task; ++h)
        kernels.run(p, b, head % task_heads + h, first, count, scratch.data());
    }
  });
}

struct run_plain {
  template <class Problem>
  void operator()(arguments&, const cpu& exec, const Problem& p) const {
    run_forward(exec, p);
  }
};

// Checks what forward is given, and runs it: run(call, exec, problem) may check more, and ask for more.
template <class T, class Out, class A, class... Stages, class Run = run_plain>
void forward(std::string_view function, const cpu& exec, const tensor_view<const T, 4>& q,
             const tensor_view<const T, 4>& k, const tensor_view<const T, 4>& v, const scores<Stages...>& given,
             const tensor_view<Out, 4>& out, const tensor_view<A, 3>& lse, const sequences* packed,
             const Run& run = {}) {
  static_assert(std::is_same_v<T, double> == std::is_same_v<Out, double>,
                "attention: f64 goes with f64 alone: q, k, v and out are all f64, or none is");
  static_assert(std::is_same_v<A, accumulator_t<T>>,
                "attention: lse is of the type of sums: f64 for f64, f32 for all others");
  arguments call(function, exec);
  check_tensors(function, q, k, v, out);
  const bool with_lse = lse.data || !lse.empty();
  if (with_lse) check_lse(function, "lse", lse, q);
  const auto pipeline = with_scale(given, q.extent(3));
  const auto p = make_problem<T>(function, q, k, v, out, lse, pipeline, packed);
  call.reads("q", q);
  call.reads("k", k);
  call.reads("v", v);
  name_scores(call, pipeline, packed);
  call.writes("out", out);
  if (with_lse) call.writes("lse", lse);
  run(call, exec, p);
}

}  // namespace detail

/// out[b, h, i] = sum over j of P[b, h, i, j] v[b, h / g, j], P = softmax over j of S, S = scores(q[b, h, i] . k[b, h /
/// g, j]): attention, self or cross, with g = q's heads over k's (grouped queries). q [batch, heads, queries, d], k
/// [batch, kv heads, keys, d], v [batch, kv heads, keys, d_v], out [batch, heads, queries, d_v], any strides, so that
/// [batch, tokens, heads, d] is a view with its middle dimensions exchanged. A query that sees no key gets 0.
///
/// `scores` are stages in declared order; without a scale among them S starts as q . k / sqrt(d). Blocks of keys that
/// masks leave empty are skipped. Beyond key_lengths nothing is read; what other masks hide must be finite numbers.
/// f32, f64, bf16 and f16; sums are f32 (f64 for f64), and bf16 probabilities are rounded to bf16 before they meet v,
/// where the instruction set multiplies bf16. What would be subnormal may become 0, be it a scale, a product or a
/// result, and what stages of the user's own make of such numbers. Nothing of queries x keys is ever stored: scratch
/// memory depends on d and d_v alone. The same bits for any number of threads.
///
/// Throws shape_error where extents do not fit or out overlaps what is read, and value_error for null data or a stage's
/// options out of range, before out is touched. 2 queries keys (d + d_v) flops a head. Dao: "FlashAttention-2", 2023;
/// Milakov, Gimelshein: "Online normalizer calculation for softmax", 2018.
template <executor Executor, viewable<4> Q, viewable<4> K, viewable<4> V, class... Stages, viewable<4> Out>
void forward(const Executor& exec, const Q& q, const K& k, const V& v, const scores<Stages...>& s, Out&& out) {
  using T = element_t<const Q>;
  detail::check_one_type<T, K, V>();
  detail::forward("attention::forward", exec, tensor_view<const T, 4>(as_view(q)), tensor_view<const T, 4>(as_view(k)),
                  tensor_view<const T, 4>(as_view(v)), s, as_view(out), tensor_view<accumulator_t<T>, 3>{}, nullptr);
}

/// The same, and lse[b, h, i] = log of the sum of exp(S), [batch, heads, queries], -inf where a query sees no key: what
/// backward needs, and what merges results over parts of the keys.
template <executor Executor, viewable<4> Q, viewable<4> K, viewable<4> V, class... Stages, viewable<4> Out,
          viewable<3> Lse>
void forward(const Executor& exec, const Q& q, const K& k, const V& v, const scores<Stages...>& s, Out&& out,
             Lse&& lse) {
  using T = element_t<const Q>;
  detail::check_one_type<T, K, V>();
  detail::forward("attention::forward", exec, tensor_view<const T, 4>(as_view(q)), tensor_view<const T, 4>(as_view(k)),
                  tensor_view<const T, 4>(as_view(v)), s, as_view(out), as_view(lse), nullptr);
}

/// The same for sequences of different lengths, packed without padding: q and out [tokens, heads, d and d_v], k and v
/// [tokens, kv heads, ...], lse [heads, tokens]. Each sequence sees its own keys alone, and stages count queries and
/// keys from its start. Stages that bring elements for every score (bias, boolean_mask, documents, block_sparse) do not
/// compile. Throws value_error for starts that decrease, or do not run from 0 to the number of rows.
template <executor Executor, viewable<3> Q, viewable<3> K, viewable<3> V, class... Stages, viewable<3> Out,
          viewable<2> Lse>
void forward(const Executor& exec, const Q& q, const K& k, const V& v, const sequences& packed,
             const scores<Stages...>& s, Out&& out, Lse&& lse) {
  detail::check_packable<Stages...>();
  using T = element_t<const Q>;
  detail::check_one_type<T, K, V>();
  using View = tensor_view<const T, 3>;
  detail::forward("attention::forward", exec, detail::packed_heads(View(as_view(q))),
                  detail::packed_heads(View(as_view(k))), detail::packed_heads(View(as_view(v))), s,
                  detail::packed_heads(as_view(out)), detail::packed_lse(as_view(lse)), &packed);
}

/// softmax(q k^T / sqrt(d)) v.
template <executor Executor, viewable<4> Q, viewable<4> K, viewable<4> V, viewable<4> Out>
void forward(const Executor& exec, const Q& q, const K& k, const V& v, Out&& out) {
  forward(exec, q, k, v, scores<>{}, out);
}

}  // namespace MLKIT_NAMESPACE::attention
