// Many adapters in one batch: one for each row, or for each run of rows.
#pragma once

#include <ranges>
#include <span>
#include <vector>

#include "linear.hpp"

namespace MLKIT_NAMESPACE::lora {
namespace detail {

template <class P>
constexpr void check_many() {
  static_assert(plain_adapter<P>,
                "lora: per_row and segments take plain adapters (lora::adapter or lora::adapter_view); a DoRA adapter "
                "changes the base's own result, so give its rows a call of their own");
}

// What one row adds: b [out, rank] and where its elements are, or its transpose.
template <class T, class A>
struct row_adapter {
  const T* b = nullptr;
  index_t b_row = 0, b_column = 0, rank = 0;
  const A* turned = nullptr;  // [rank, out]
};

/// x + sum over j of h[row, j] B_row[col, j] + bias[col].
template <class A, class B, class T>
struct add_row_adapters {
  const row_adapter<T, A>* rows;
  const A* h;
  index_t h_stride;
  const B* bias;
  index_t outputs;
};

}  // namespace detail

/// One adapter for each row of x: row i takes adapters[ids[i]], or the base alone where ids[i] is -1. The adapters are
/// a contiguous range of lora::adapter or lora::adapter_view, of any ranks and scales; ids [tokens] are integers. (BGMV
/// of Chen et al.: "Punica: multi-tenant LoRA serving", 2023.) It owns nothing.
template <class P, std::integral I>
struct per_row {
  using value_type = typename P::value_type;
  std::span<const P> adapters;
  vector_view<const I> ids;

  template <std::ranges::contiguous_range Adapters, class Ids>
  per_row(const Adapters& a, const Ids& i)
      : adapters(std::ranges::data(a), std::ranges::size(a)),
        ids(std::ranges::data(i), {static_cast<index_t>(std::ranges::size(i))}) {}
  index_t tokens() const noexcept { return ids.extent(0); }
};
template <std::ranges::contiguous_range Adapters, std::ranges::contiguous_range Ids>
per_row(const Adapters&, const Ids&) -> per_row<std::ranges::range_value_t<Adapters>, std::ranges::range_value_t<Ids>>;

/// One adapter for each run of rows: rows [starts[i], starts[i + 1]) take adapters[i]; starts has one element more than
/// there are adapters, begins with 0 and ends with the number of tokens. (Punica's SGMV.) It owns nothing.
template <class P, std::integral I>
struct segments {
  using value_type = typename P::value_type;
  std::span<const P> adapters;
  vector_view<const I> starts;

  template <std::ranges::contiguous_range Adapters, class Starts>
  segments(const Adapters& a, const Starts& s)
      : adapters(std::ranges::data(a), std::ranges::size(a)),
        starts(std::ranges::data(s), {static_cast<index_t>(std::ranges::size(s))}) {}
  index_t tokens() const noexcept {
    return starts.extent(0) > 0 ? static_cast<index_t>(starts(starts.extent(0) - 1)) : 0;
  }
};
template <std::ranges::contiguous_range Adapters, std::ranges::contiguous_range Starts>
segments(const Adapters&, const Starts&)
    -> segments<std::ranges::range_value_t<Adapters>, std::ranges::range_value_t<Starts>>;

namespace detail {

// The adapters as views, each token's, and for a block of tokens its rows, sorted by their adapter.
template <class T>
struct row_plan {
  using A = accumulator_t<T>;
  std::vector<adapter_view<T>> adapters;
  std::vector<index_t> ids;     // of all tokens; -1 for none
  std::vector<index_t> order;   // rows with an adapter, those of one adapter beside each other
  std::vector<index_t> starts;  // where in `order` each adapter's rows start
  std::vector<row_adapter<T, A>> rows;
  index_t rank = 0;

  template <class P>
  void take(std::string_view function, std::span<const P> given, index_t outputs, index_t inputs) {
    for (std::size_t i = 0; i < given.size(); ++i) {
      adapters.push_back(as_adapter(given[i]));
      check_adapter(function, adapters.back(), outputs, inputs, message("adapters[", static_cast<index_t>(i), "]"));
      rank = std::max(rank, adapters.back().rank());
    }
  }
  void sort(index_t first, index_t count) {
    const auto id_of = [&](index_t row) {
      const index_t id = ids[static_cast<std::size_t>(first + row)];
      return id < 0 || adapters[static_cast<std::size_t>(id)].scale == 0 ? -1 : id;
    };
    starts.assign(adapters.size() + 1, 0);
    rows.assign(static_cast<std::size_t>(count), {});
    for (index_t i = 0; i < count; ++i) {
      const index_t id = id_of(i);
      if (id < 0) continue;
      const adapter_view<T>& p = adapters[static_cast<std::size_t>(id)];
      rows[static_cast<std::size_t>(i)] = {p.b.data, p.b.stride(0), p.b.stride(1), p.rank()};
      ++starts[static_cast<std::size_t>(id) + 1];
    }
    for (std::size_t i = 1; i < starts.size(); ++i) starts[i] += starts[i - 1];
    order.resize(static_cast<std::size_t>(starts.back()));
    std::vector<index_t> next(starts.begin(), starts.end() - 1);
    for (index_t i = 0; i < count; ++i)
      if (const index_t id = id_of(i); id >= 0)
        order[static_cast<std::size_t>(next[static_cast<std::size_t>(id)]++)] = i;
  }
  index_t rows_of(std::size_t adapter) const noexcept { return starts[adapter + 1] - starts[adapter]; }
};

template <class T, class P, class I>
row_plan<T> make_plan(std::string_view function, const per_row<P, I>& many, index_t tokens, index_t outputs,
                      index_t inputs) {
  row_plan<T> plan;
  plan.take(function, many.adapters, outputs, inputs);
  check_view(function, "ids", many.ids);
  check_extent(function, "ids", "elements", many.ids.extent(0), "x", tokens);
  const auto count = static_cast<index_t>(many.adapters.size());
  for (index_t i = 0; i < tokens; ++i) {
    const I id = many.ids(i);
    if (std::cmp_less(id, -1) || std::cmp_greater_equal(id, count))
      fail_value(function, ": ids[", i, "] = ", id, " is outside [-1, ", count, ")");
    plan.ids.push_back(static_cast<index_t>(id));
  }
  return plan;
}

template <class T, class P, class I>
row_plan<T> make_plan(std::string_view function, const segments<P, I>& many, index_t tokens, index_t outputs,
                      index_t inputs) {
  row_plan<T> plan;
  plan.take(function, many.adapters, outputs, inputs);
  const auto count = static_cast<index_t>(many.adapters.size());
  if (many.starts.extent(0) != count + 1)
    fail_shape(function, ": starts has ", many.starts.extent(0), " elements, but ", count, " adapters need ",
               count + 1);
  if (std::cmp_not_equal(many.starts(0), 0)) fail_value(function, ": starts[0] = ", many.starts(0), " is not 0");
  for (index_t i = 0; i < count; ++i)
    if (many.starts(i + 1) < many.starts(i))
      fail_value(function, ": starts[", i + 1, "] = ", many.starts(i + 1), " is less than starts[", i,
                 "] = ", many.starts(i));
  if (std::cmp_not_equal(many.starts(count), tokens))
    fail_value(function, ": starts ends with ", many.starts(count), ", but x has ", tokens, " rows");
  for (index_t i = 0; i < count; ++i) plan.ids.resize(static_cast<std::size_t>(many.starts(i + 1)), i);
  return plan;
}

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::lora

#define MLKIT_FOREACH "../lora/cpu/per_row-inl.hpp"
#include "../simd/foreach_isa.hpp"

namespace MLKIT_NAMESPACE::lora {
namespace detail {

// Turns the B of adapters that several rows share, once for all of them, as long as `memory` has room.
template <class T, class A>
void turn_shared(const cpu& exec, row_plan<T>& plan, index_t outputs, A* memory, index_t room) {
  struct item {
    const adapter_view<T>* p;
    A* to;
  };
  std::vector<item> items;
  for (std::size_t n = 0; n < plan.adapters.size(); ++n) {
    const adapter_view<T>& p = plan.adapters[n];
    if (plan.rows_of(n) < 2 || p.b.stride(0) == 1 || p.rank() * outputs > room) continue;
    items.push_back({&p, memory});
    for (index_t i = plan.starts[n]; i < plan.starts[n + 1]; ++i)
      plan.rows[static_cast<std::size_t>(plan.order[static_cast<std::size_t>(i)])].turned = memory;
    memory += p.rank() * outputs;
    room -= p.rank() * outputs;
  }
  const auto kernel = MLKIT_SELECT(turn_adapter<T, A>);
  const cpu limited =
      limit_threads(exec, 4 * static_cast<double>(items.size()) * static_cast<double>(plan.rank * outputs));
  parallel_ranges(limited, static_cast<index_t>(items.size()), [&](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i) {
      const matrix_view<const T>& b = items[static_cast<std::size_t>(i)].p->b;
      kernel({b.data, b.extent(0), b.extent(1), b.stride(0), b.stride(1)}, items[static_cast<std::size_t>(i)].to);
    }
  });
}

// Elements of turned adapters at once: what the last-level cache holds.
inline constexpr index_t turned_at_once = index_t{1} << 21;

template <class X, class Base, class T, class Y>
void run_rows(const cpu& exec, const matrix_view<const X>& x, const Base& base, row_plan<T>& plan,
              const matrix_view<Y>& y) {
  using A = sums_t<X>;
  using Bias = bias_t<Base>;
  const index_t tokens = x.extent(0), inputs = x.extent(1);
  if (tokens == 0) return;
  const workspace<A> h(tokens * plan.rank);
  index_t shared = 0;
  for (std::size_t n = 0; n < plan.adapters.size(); ++n)
    if (plan.rows_of(n) > 1) shared += plan.adapters[n].rank() * base.outputs();
  const index_t room = std::min(shared, turned_at_once);
  const workspace<A> turned(room);
  turn_shared(exec, plan, base.outputs(), turned.data(), room);

  // Up to four rows and four lines of their A at a time.
  struct item {
    std::size_t adapter;
    index_t row, rows, rank, ranks;
  };
  std::vector<item> items;
  for (std::size_t n = 0; n < plan.adapters.size(); ++n)
    for (index_t j = 0; j < plan.adapters[n].rank(); j += 4)
      for (index_t i = plan.starts[n]; i < plan.starts[n + 1]; i += 4)
        items.push_back(
            {n, i, std::min<index_t>(4, plan.starts[n + 1] - i), j, std::min<index_t>(4, plan.adapters[n].rank() - j)});
  const auto kernel = MLKIT_SELECT(project_rows<X, T, A>);
  const dense_source<X> source{x.data, tokens, inputs, x.stride(0), x.stride(1)};
  const cpu limited = limit_threads(exec, 16 * static_cast<double>(items.size()) * static_cast<double>(inputs));
  parallel_ranges(limited, static_cast<index_t>(items.size()), [&](index_t begin, index_t end) {
    for (index_t at = begin; at < end; ++at) {
      const item& i = items[static_cast<std::size_t>(at)];
      const adapter_view<T>& p = plan.adapters[i.adapter];
      const dense_source<T> a{p.a.data, p.rank(), inputs, p.a.stride(0), p.a.stride(1)};
      kernel(source, plan.order.data() + i.row, i.rows, a, i.rank, i.ranks, static_cast<A>(p.scale), h.data(),
             plan.rank);
    }
  });

  using E = product_type_t<X, typename Base::value_type>;
  const auto left = left_of(x);
  const auto right = right_operand(transposed(base.weight()));
  using Stage = add_row_adapters<A, Bias, T>;
  using Segment = segment<typename decltype(left)::source_type, typename decltype(right)::source_type>;
  const epilogue<Stage> e{Stage{plan.rows.data(), h.data(), plan.rank, base.bias.data, y.extent(1)}};
  run_product<E>(exec, make_product(y, e, Segment{left, right}));
}

template <class X, class Base, class Many, class Y>
void linear_rows(const cpu& exec, const matrix_view<const X>& x, const Base& base, const Many& many,
                 const matrix_view<Y>& y) {
  using T = typename Many::value_type;
  check_types<X, typename Base::value_type, T, Y>();
  constexpr std::string_view function = "lora::linear";
  arguments call(function, exec);
  check_linear(function, x, base, y);
  row_plan<T> plan = make_plan<T>(function, many, x.extent(0), base.outputs(), base.inputs());
  call.reads("x", x);
  name_base(call, base);
  for (const adapter_view<T>& p : plan.adapters) name_adapter(call, p);
  call.writes("y", y);
  for (index_t first = 0; first < x.extent(0); first += tokens_at_once) {
    const index_t count = std::min(tokens_at_once, x.extent(0) - first);
    plan.sort(first, count);
    run_rows(exec, rows_of(x, first, count), base, plan, rows_of(y, first, count));
  }
}

// What lora.cuh brings for mlkit::cuda.
template <class X, class Base, class Many, class Y>
void linear_rows(const cuda& exec, const matrix_view<const X>& x, const Base& base, const Many& many,
                 const matrix_view<Y>& y);

}  // namespace detail

/// y[i] = W x[i] + bias + s B (A x[i]) with each row's own adapter: one product with W for all rows, and each A and B
/// read once for all its rows. Rows without an adapter get the bits of the base alone, and a row's bits do not depend
/// on the adapters of the others.
/// Throws value_error naming the index for an id out of range; otherwise as linear with one adapter. A GPU does not
/// look at ids beforehand: rows whose id is out of range get the base alone. It adds the update to the rounded base;
/// adapters of x's 16-bit type, their rows at multiples of 16 bytes, are multiplied on tensor cores, 16 rows of x at a
/// time, with s A x[i] rounded to that type.
template <executor Executor, viewable<2> X, linear_base Base, class P, class I, viewable<2> Y>
void linear(const Executor& exec, const X& x, const Base& base, const per_row<P, I>& adapters, Y&& y) {
  detail::check_many<P>();
  detail::linear_rows(exec, matrix_view<const element_t<const X>>(as_view(x)), base, adapters, as_view(y));
}

/// The same for runs of rows.
template <executor Executor, viewable<2> X, linear_base Base, class P, class I, viewable<2> Y>
void linear(const Executor& exec, const X& x, const Base& base, const segments<P, I>& adapters, Y&& y) {
  detail::check_many<P>();
  detail::linear_rows(exec, matrix_view<const element_t<const X>>(as_view(x)), base, adapters, as_view(y));
}

}  // namespace MLKIT_NAMESPACE::lora
