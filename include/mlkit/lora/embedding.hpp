// Adapted embeddings: rows of a weight picked by token, plus the adapter's, forward and backward.
#pragma once

#include <algorithm>
#include <ranges>
#include <vector>

#include "dora.hpp"

namespace MLKIT_NAMESPACE::lora {
namespace detail {

// Of an embedding's weight [vocabulary, width]: an adapter has a [rank, vocabulary] and b [width, rank], as in PEFT.
template <class I, class W, class T>
void check_embedding(arguments& call, std::string_view function, const vector_view<const I>& ids,
                     const matrix_view<const W>& w, const adapter_view<T>& p) {
  check_view(function, "ids", ids);
  check_view(function, "w", w);
  check_adapter(function, p);
  if (p.inputs() != w.extent(0))
    fail_shape(function, ": adapter.a has ", p.inputs(), " columns, but w has ", w.extent(0), " rows");
  if (p.outputs() != w.extent(1))
    fail_shape(function, ": adapter.b has ", p.outputs(), " rows, but w has ", w.extent(1), " columns");
  for (index_t i = 0; i < ids.extent(0); ++i)
    if (std::cmp_less(ids(i), 0) || std::cmp_greater_equal(ids(i), w.extent(0)))
      fail_value(function, ": ids[", i, "] = ", ids(i), " is outside [0, ", w.extent(0), ")");
  call.reads("ids", ids);
  call.reads("w", w);
  name_adapter(call, p);
}

template <class Y>
void check_token_rows(std::string_view function, std::string_view name, const matrix_view<Y>& y, index_t tokens,
                      index_t width) {
  check_view(function, name, y);
  check_extent(function, name, "rows", y.extent(0), "ids", tokens);
  check_extent(function, name, "columns", y.extent(1), "w", width);
}

// h[t] = s A[:, ids[t]]: the way down picks columns.
template <class I, class T, class A>
void pick_columns(const cpu& exec, const I* ids, const adapter_view<T>& p, const matrix_view<A>& h) {
  const A scale = static_cast<A>(p.scale);
  const cpu limited = limit_threads(exec, 8 * static_cast<double>(h.size()));
  parallel_ranges(limited, h.extent(0), [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t)
      for (index_t j = 0; j < h.extent(1); ++j) h(t, j) = scale * static_cast<A>(p.a(j, static_cast<index_t>(ids[t])));
  });
}

// y = (W[ids] + h B^T) * factors.
template <class I, class W, class T, class Y, class A>
void token_rows(const cpu& exec, const I* ids, const matrix_view<const W>& w, const adapter_view<T>& p,
                const matrix_view<A>& h, const A* factors, const matrix_view<Y>& y) {
  multiply<product_type_t<A, T>>(exec, left_of(h), right_of(transposed(p.b)), nothing<A>(h.extent(0)),
                                 nothing<T>(p.outputs()), y, add_token_rows<W, I, A>{w, ids, factors});
}

template <class I, class W, class T, class Y, class A>
void run_embedding(const cpu& exec, const vector_view<const I>& ids, const matrix_view<const W>& w,
                   const adapter_view<T>& p, const A* factors, const matrix_view<Y>& y) {
  each_token_block(ids.extent(0), p.rank(), matrix_view<A>{},
                   [&](index_t first, index_t count, const matrix_view<A>& h) {
                     pick_columns(exec, ids.data + first, p, h);
                     token_rows(exec, ids.data + first, w, p, h, factors, rows_of(y, first, count));
                   });
}

// db += (dy * factors)^T h and da[:, column(t)] += s (dy[t] * factors) B, tokens in their order. `b` is B * factors.
template <class I, class T, class D, class A, class Column>
void add_embedding_gradients(const cpu& exec, const vector_view<const I>& ids, const adapter_view<T>& p,
                             const matrix_view<const A>& b, const A* factors, const matrix_view<const D>& dy,
                             const matrix_view<A>& da, const matrix_view<A>& db, const Column& column) {
  const index_t rank = p.rank();
  const workspace<A> memory(std::min(ids.extent(0), tokens_at_once) * rank);
  each_token_block(ids.extent(0), rank, matrix_view<A>{}, [&](index_t first, index_t count, const matrix_view<A>& h) {
    const auto dys = rows_of(dy, first, count);
    pick_columns(exec, ids.data + first, p, h);
    multiply<product_type_t<D, A>>(exec, left_of(transposed(dys)), right_of(h), nothing<A>(p.outputs()),
                                   nothing<A>(rank), db, finish<A, A, A>{.rows = factors}.adding(db));
    const matrix_view<A> g(memory.data(), {count, rank});
    multiply<product_type_t<D, A>>(exec, left_of(dys), right_of(b), nothing<A>(count), nothing<A>(rank), g,
                                   finish<A, A, A>{.value = static_cast<A>(p.scale)});
    const cpu limited = limit_threads(exec, 8 * static_cast<double>(g.size()));
    parallel_ranges(limited, rank, [&](index_t begin, index_t end) {
      for (index_t j = begin; j < end; ++j)
        for (index_t t = 0; t < count; ++t) da(j, column(first + t)) += g(t, j);
    });
  });
}

template <class I, class T, class D, class G, class A>
void run_embedding_backward(const cpu& exec, const vector_view<const I>& ids, const adapter_view<T>& p,
                            const matrix_view<const A>& b, const A* factors, const matrix_view<const D>& dy,
                            const gradients<G>& grads, bool accumulate) {
  if (!accumulate) {
    clear(grads.da);
    clear(grads.db);
  }
  summed_as<A>(grads.db, [&](const matrix_view<A>& db) {
    if constexpr (std::is_same_v<G, A>) {
      add_embedding_gradients(exec, ids, p, b, factors, dy, grads.da, db,
                              [&](index_t t) { return static_cast<index_t>(ids(t)); });
    } else {  // sums of the columns that occur
      std::vector<index_t> used(static_cast<std::size_t>(ids.extent(0)));
      for (index_t t = 0; t < ids.extent(0); ++t) used[static_cast<std::size_t>(t)] = static_cast<index_t>(ids(t));
      std::sort(used.begin(), used.end());
      used.erase(std::unique(used.begin(), used.end()), used.end());
      const auto place = [&](index_t t) {
        return static_cast<index_t>(std::lower_bound(used.begin(), used.end(), static_cast<index_t>(ids(t))) -
                                    used.begin());
      };
      const index_t columns = static_cast<index_t>(used.size());
      const workspace<A> memory(p.rank() * columns);
      const matrix_view<A> da(memory.data(), {p.rank(), columns});
      for (index_t j = 0; j < p.rank(); ++j)
        for (index_t i = 0; i < columns; ++i) da(j, i) = static_cast<A>(grads.da(j, used[static_cast<std::size_t>(i)]));
      add_embedding_gradients(exec, ids, p, b, factors, dy, da, db, place);
      for (index_t j = 0; j < p.rank(); ++j)
        for (index_t i = 0; i < columns; ++i) grads.da(j, used[static_cast<std::size_t>(i)]) = static_cast<G>(da(j, i));
    }
  });
}

template <class I, class D, class T, class G>
void check_embedding_backward(arguments& call, std::string_view function, const vector_view<const I>& ids,
                              const adapter_view<T>& p, const matrix_view<const D>& dy, const gradients<G>& g) {
  check_token_rows(function, "dy", dy, ids.extent(0), p.outputs());
  call.reads("dy", dy);
  check_gradients(call, function, p, g);
}

template <std::ranges::contiguous_range Ids>
auto ids_view(const Ids& ids) {
  using I = std::ranges::range_value_t<Ids>;
  static_assert(std::is_integral_v<I>, "lora: ids are integers");
  return vector_view<const I>(std::ranges::data(ids), {static_cast<index_t>(std::ranges::size(ids))});
}

}  // namespace detail

/// y[t] = W[ids[t]] + s B A[:, ids[t]]: an adapted embedding. ids [tokens], w [vocabulary, width], adapter a
/// [rank, vocabulary] and b [width, rank] (PEFT's lora_embedding_A and _B), y [tokens, width].
/// W is read only at the ids. Throws value_error naming the index for an id outside [0, vocabulary); otherwise types,
/// errors and determinism as for linear. 2 tokens rank width flops.
template <executor Executor, std::ranges::contiguous_range Ids, viewable<2> W, plain_adapter Adapter, viewable<2> Y>
void embedding(const Executor& exec, const Ids& ids, const W& w, const Adapter& adapter, Y&& y) {
  detail::check_on_cpu<Executor>();
  constexpr std::string_view function = "lora::embedding";
  using T = typename Adapter::value_type;
  using U = element_t<const W>;
  using A = accumulator_t<T>;
  const auto tokens = detail::ids_view(ids);
  const matrix_view<const U> weight = as_view(w);
  const adapter_view<T> p = as_adapter(adapter);
  const auto out = as_view(y);
  detail::check_types<U, T, element_t<std::remove_reference_t<Y>>>();
  detail::arguments call(function, exec);
  detail::check_embedding(call, function, tokens, weight, p);
  detail::check_output(function, "y", out);
  detail::check_token_rows(function, "y", out, tokens.extent(0), weight.extent(1));
  call.writes("y", out);
  detail::run_embedding(exec, tokens, weight, p, static_cast<const A*>(nullptr), out);
}

/// DoRA's embedding: y[t] = g * (W[ids[t]] + s B A[:, ids[t]]), g = magnitude / norm with one norm for each column of W
/// over the vocabulary, as in PEFT; magnitude [width]. Norms are prepared by adapted_norms(exec, dense{transposed(w)},
/// adapter); without them every call reads all of W.
template <executor Executor, std::ranges::contiguous_range Ids, viewable<2> W, class T, class M, viewable<2> Y>
void embedding(const Executor& exec, const Ids& ids, const W& w, const dora<T, M>& adapter, Y&& y) {
  detail::check_on_cpu<Executor>();
  constexpr std::string_view function = "lora::embedding";
  using U = element_t<const W>;
  using A = accumulator_t<T>;
  const auto tokens = detail::ids_view(ids);
  const matrix_view<const U> weight = as_view(w);
  const auto out = as_view(y);
  detail::check_types<U, T, element_t<std::remove_reference_t<Y>>>();
  detail::arguments call(function, exec);
  detail::check_embedding(call, function, tokens, weight, adapter.adapter);
  detail::check_dora(call, function, adapter, weight.extent(1), weight.extent(0));
  detail::check_output(function, "y", out);
  detail::check_token_rows(function, "y", out, tokens.extent(0), weight.extent(1));
  call.writes("y", out);
  const index_t width = weight.extent(1);
  const detail::workspace<A> memory(2 * width);
  A* factors = memory.data() + width;
  detail::find_factors(adapter.magnitude,
                       detail::find_norms(exec, dense<U>{transposed(weight)}, adapter, memory.data()), factors);
  detail::run_embedding(exec, tokens, weight, adapter.adapter, static_cast<const A*>(factors), out);
}

/// The gradients of embedding: db = dy^T h [width, rank] and da [rank, vocabulary], whose column i sums s dy[t] B over
/// the tokens t with id i, in their order. `accumulate` adds to both. W gets none.
template <executor Executor, std::ranges::contiguous_range Ids, viewable<2> W, plain_adapter Adapter, viewable<2> D,
          class G>
void embedding_backward(const Executor& exec, const Ids& ids, const W& w, const Adapter& adapter, const D& dy,
                        const gradients<G>& grads, bool accumulate = false) {
  detail::check_on_cpu<Executor>();
  constexpr std::string_view function = "lora::embedding_backward";
  using T = typename Adapter::value_type;
  using U = element_t<const D>;
  using A = accumulator_t<T>;
  const auto tokens = detail::ids_view(ids);
  const matrix_view<const element_t<const W>> weight = as_view(w);
  const matrix_view<const U> dout = as_view(dy);
  const adapter_view<T> p = as_adapter(adapter);
  detail::check_types<T, element_t<const W>, U, G>();
  detail::check_no_magnitude(function, grads);
  detail::arguments call(function, exec);
  detail::check_embedding(call, function, tokens, weight, p);
  detail::check_embedding_backward(call, function, tokens, p, dout, grads);
  const detail::workspace<A> memory(p.b.size());
  const matrix_view<A> b(memory.data(), p.b.extents);
  for (index_t o = 0; o < b.extent(0); ++o)
    for (index_t j = 0; j < b.extent(1); ++j) b(o, j) = static_cast<A>(p.b(o, j));
  detail::run_embedding_backward(exec, tokens, p, detail::as_const(b), static_cast<const A*>(nullptr), dout, grads,
                                 accumulate);
}

/// DoRA's embedding, backward: also dmagnitude [width], with the norm held constant.
template <executor Executor, std::ranges::contiguous_range Ids, viewable<2> W, class T, class M, viewable<2> D, class G>
void embedding_backward(const Executor& exec, const Ids& ids, const W& w, const dora<T, M>& adapter, const D& dy,
                        const gradients<G>& grads, bool accumulate = false) {
  detail::check_on_cpu<Executor>();
  constexpr std::string_view function = "lora::embedding_backward";
  using U = element_t<const D>;
  using V = element_t<const W>;
  using A = accumulator_t<T>;
  const auto tokens = detail::ids_view(ids);
  const matrix_view<const V> weight = as_view(w);
  const matrix_view<const U> dout = as_view(dy);
  const adapter_view<T>& p = adapter.adapter;
  const index_t width = weight.extent(1);
  detail::check_types<T, V, U, G>();
  detail::arguments call(function, exec);
  detail::check_embedding(call, function, tokens, weight, p);
  detail::check_dora(call, function, adapter, width, weight.extent(0));
  detail::check_embedding_backward(call, function, tokens, p, dout, grads);
  detail::check_magnitude(call, function, grads, width);
  const detail::workspace<A> memory(3 * width + p.b.size() + detail::dora_tokens * (p.rank() + width));
  A* factors = memory.data() + width;
  A* sums = factors + width;
  const A* norms = detail::find_norms(exec, dense<V>{transposed(weight)}, adapter, memory.data());
  detail::find_factors(adapter.magnitude, norms, factors);
  const matrix_view<A> b(sums + width, p.b.extents);
  detail::scale_rows_of(p.b, static_cast<const A*>(factors), b);
  std::fill_n(sums, width, A{});
  for (index_t first = 0; first < tokens.extent(0); first += detail::dora_tokens) {
    const index_t count = std::min(detail::dora_tokens, tokens.extent(0) - first);
    const matrix_view<A> h(b.data + b.size(), {count, p.rank()}), z(h.data + h.size(), {count, width});
    detail::pick_columns(exec, tokens.data + first, p, h);
    detail::token_rows(exec, tokens.data + first, weight, p, h, static_cast<const A*>(nullptr), z);
    const detail::dense_source<U> dy_rows{&dout(first, 0), count, width, dout.stride(0), dout.stride(1)};
    const detail::dense_source<A> z_rows{z.data, count, width, width, 1};
    MLKIT_SELECT(add_column_products<U, A>)(dy_rows, z_rows, 0, width, sums);
  }
  detail::finish_magnitude(grads.dmagnitude, accumulate, static_cast<const A*>(sums), norms);
  detail::run_embedding_backward(exec, tokens, p, detail::as_const(b), static_cast<const A*>(factors), dout, grads,
                                 accumulate);
}

}  // namespace MLKIT_NAMESPACE::lora
