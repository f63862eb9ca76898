// Caches of keys and values: what decode reads and append writes, contiguous or in pages, in floating point or int8.
#pragma once

#include <algorithm>
#include <cmath>
#include <ranges>
#include <vector>

#include "../core/arguments.hpp"

namespace MLKIT_NAMESPACE::attention {

/// A stretch of a cache in which entries lie evenly: key i of it is k + i * k_stride, its value v + i * v_stride; both
/// times their scales where T is std::int8_t.
template <class T>
struct cache_run {
  const T* k;
  const T* v;
  index_t k_stride, v_stride, count;
  const float* k_scales = nullptr;
  const float* v_scales = nullptr;
  index_t k_scale_stride = 0, v_scale_stride = 0;
};

/// Keys and values that decode reads: `length(b)` of them for sequence b, in runs that start where they are asked for.
/// A cache of the user's own (other layouts, other page tables) needs these members and elements that run along d. Sums
/// are cut where runs end, so that caches of the same entries in other runs may differ in the last bits.
template <class C>
concept key_value_cache = requires(const C& c, index_t i) {
  typename C::value_type;
  { c.batch() } -> std::convertible_to<index_t>;
  { c.heads() } -> std::convertible_to<index_t>;
  { c.d() } -> std::convertible_to<index_t>;
  { c.d_v() } -> std::convertible_to<index_t>;
  { c.length(i) } -> std::convertible_to<index_t>;
  { c.run(i, i, i) } -> std::same_as<cache_run<typename C::value_type>>;
};

namespace detail {

using namespace mlkit::detail;

// What a tensor holds for an entry, given by the first three of its indices.
template <class T, int Rank>
T* entry_of(const tensor_view<T, Rank>& x, const std::array<index_t, 3>& at) noexcept {
  return x.data + at[0] * x.strides[0] + at[1] * x.strides[1] + at[2] * x.strides[2];
}

template <class T>
inline constexpr bool is_int8 = std::is_same_v<std::remove_const_t<T>, std::int8_t>;

// The elements of what as_view makes of X, with their const.
template <class X>
using viewed_t = std::remove_pointer_t<decltype(as_view(std::declval<X&>()).data)>;
// Keys and values: const where either is.
template <class K, class V>
using cached_t = std::conditional_t<std::is_const_v<viewed_t<V>>, const viewed_t<K>, viewed_t<K>>;
template <class R>
using ranged_t = std::remove_pointer_t<decltype(std::ranges::data(std::declval<R&>()))>;

template <std::ranges::contiguous_range R>
auto range_view(R& r) noexcept {
  return vector_view<ranged_t<R>>(std::ranges::data(r), {static_cast<index_t>(std::ranges::size(r))});
}

/// What contiguous and paged caches share: tensors whose last dimension is an entry of one head, and where T is int8 a
/// scale for each of those entries.
template <class T, class I>
struct cache_tensors {
  using value_type = std::remove_const_t<T>;
  using scale_type = std::conditional_t<std::is_const_v<T>, const float, float>;
  tensor_view<T, 4> k, v;
  vector_view<I> lengths;
  tensor_view<scale_type, 3> k_scales = {}, v_scales = {};

  index_t d() const noexcept { return k.extents[3]; }
  index_t d_v() const noexcept { return v.extents[3]; }
  index_t length(index_t b) const noexcept { return static_cast<index_t>(lengths.data[b * lengths.strides[0]]); }

  template <class F>
  void each_view(F&& f) const {
    f("cache.k", k);
    f("cache.v", v);
    f("cache.lengths", lengths);
    if constexpr (is_int8<T>) {
      f("cache.k_scales", k_scales);
      f("cache.v_scales", v_scales);
    }
  }

 protected:
  // The run that starts at an entry, and goes on along dimension `along`.
  cache_run<value_type> run_from(const std::array<index_t, 3>& entry, int along, index_t count) const noexcept {
    const auto at = [&](const auto& x) { return entry_of(x, entry); };
    cache_run<value_type> r{at(k), at(v), k.strides[along], v.strides[along], count};
    if constexpr (is_int8<T>) {
      r.k_scales = at(k_scales);
      r.v_scales = at(v_scales);
      r.k_scale_stride = k_scales.strides[along];
      r.v_scale_stride = v_scales.strides[along];
    }
    return r;
  }

  void check_tensors(std::string_view function, std::array<std::string_view, 3> of) const {
    check_view(function, "cache.k", k);
    check_view(function, "cache.v", v);
    check_view(function, "cache.lengths", lengths);
    for (int i = 0; i < 3; ++i) {
      const auto same = [&](std::string_view name, const auto& x) {
        check_extent(function, name, of[static_cast<std::size_t>(i)], x.extents[i], "cache.k", k.extents[i]);
      };
      same("cache.v", v);
      if constexpr (is_int8<T>) {
        same("cache.k_scales", k_scales);
        same("cache.v_scales", v_scales);
      }
    }
    if constexpr (is_int8<T>) {
      check_view(function, "cache.k_scales", k_scales);
      check_view(function, "cache.v_scales", v_scales);
    }
    if ((d() > 1 && k.strides[3] != 1) || (d_v() > 1 && v.strides[3] != 1))
      fail_shape(function, ": cache: the elements of a key or value must lie beside each other");
  }

  void check_lengths(std::string_view function, index_t batch, std::string_view of, index_t most) const {
    check_extent(function, "cache.lengths", "elements", lengths.extent(0), of, batch);
    for (index_t b = 0; b < batch; ++b)
      if (std::cmp_less(lengths(b), 0) || std::cmp_greater(lengths(b), most))
        fail_value(function, ": cache.lengths[", b, "] = ", lengths(b), " is outside [0, ", most, "]");
  }
};

}  // namespace detail

/// A cache [batch, kv heads, capacity, d] and [batch, kv heads, capacity, d_v], of which sequence b has lengths[b]
/// entries; where elements are std::int8_t, each entry times its k_scales and v_scales [batch, kv heads, capacity]. It
/// owns nothing; over memory that may be written it can be appended to.
template <class T, class I>
struct contiguous : detail::cache_tensors<T, I> {
  using base = detail::cache_tensors<T, I>;
  template <viewable<4> K, viewable<4> V, std::ranges::contiguous_range L>
  contiguous(K&& keys, V&& values, L&& l) : base{as_view(keys), as_view(values), detail::range_view(l)} {
    static_assert(!detail::is_int8<T>, "attention: a cache of int8 needs the scales of its keys and values");
  }
  template <viewable<4> K, viewable<4> V, std::ranges::contiguous_range L, viewable<3> KS, viewable<3> VS>
  contiguous(K&& keys, V&& values, L&& l, KS&& key_scales, VS&& value_scales)
      : base{as_view(keys), as_view(values), detail::range_view(l), as_view(key_scales), as_view(value_scales)} {
    static_assert(detail::is_int8<T>, "attention: a cache that is not int8 has no scales");
  }
  index_t batch() const noexcept { return this->k.extents[0]; }
  index_t heads() const noexcept { return this->k.extents[1]; }
  index_t capacity(index_t) const noexcept { return this->k.extents[2]; }
  std::array<index_t, 3> entry(index_t b, index_t h, index_t j) const noexcept { return {b, h, j}; }
  auto run(index_t b, index_t h, index_t j) const noexcept {
    return this->run_from(entry(b, h, j), 2, this->length(b) - j);
  }
  void check(std::string_view function) const {
    this->check_tensors(function, {"batches", "heads", "entries"});
    this->check_lengths(function, batch(), "cache.k", this->k.extents[2]);
  }
  void check_entries(std::string_view, index_t, index_t, index_t) const noexcept {}
};
template <viewable<4> K, viewable<4> V, std::ranges::contiguous_range L, class... Scales>
contiguous(K&&, V&&, L&&, Scales&&...) -> contiguous<detail::cached_t<K, V>, detail::ranged_t<L>>;

/// A cache in pages [pages, page size, kv heads, d] and [pages, page size, kv heads, d_v]: entry j of sequence b is in
/// page table(b, j / page size); table [batch, pages of a sequence]. Scales of int8 are [pages, page size, kv heads].
/// Kwon et al.: "Efficient memory management for large language model serving with PagedAttention", 2023. It owns
/// nothing; over memory that may be written it can be appended to.
template <class T, class I>
struct paged : detail::cache_tensors<T, I> {
  using base = detail::cache_tensors<T, I>;
  matrix_view<const std::int32_t> table;

  template <viewable<4> K, viewable<4> V, std::ranges::contiguous_range L>
  paged(K&& keys, V&& values, const matrix_view<const std::int32_t>& block_table, L&& l)
      : base{as_view(keys), as_view(values), detail::range_view(l)}, table(block_table) {
    static_assert(!detail::is_int8<T>, "attention: a cache of int8 needs the scales of its keys and values");
  }
  template <viewable<4> K, viewable<4> V, std::ranges::contiguous_range L, viewable<3> KS, viewable<3> VS>
  paged(K&& keys, V&& values, const matrix_view<const std::int32_t>& block_table, L&& l, KS&& key_scales,
        VS&& value_scales)
      : base{as_view(keys), as_view(values), detail::range_view(l), as_view(key_scales), as_view(value_scales)},
        table(block_table) {
    static_assert(detail::is_int8<T>, "attention: a cache that is not int8 has no scales");
  }
  index_t batch() const noexcept { return table.extents[0]; }
  index_t heads() const noexcept { return this->k.extents[2]; }
  index_t page() const noexcept { return this->k.extents[1]; }
  index_t capacity(index_t) const noexcept { return table.extents[1] * page(); }
  std::array<index_t, 3> entry(index_t b, index_t h, index_t j) const noexcept {
    return {table(b, j / page()), j % page(), h};
  }
  auto run(index_t b, index_t h, index_t j) const noexcept {
    return this->run_from(entry(b, h, j), 1, std::min(page() - j % page(), this->length(b) - j));
  }
  void check(std::string_view function) const {
    this->check_tensors(function, {"pages", "entries to a page", "heads"});
    detail::check_view(function, "cache.table", table);
    if (page() < 1) detail::fail_shape(function, ": cache.k has pages of ", page(), " entries");
    this->check_lengths(function, batch(), "cache.table", capacity(0));
    for (index_t b = 0; b < batch(); ++b) check_entries(function, b, 0, this->length(b));
  }
  // Pages that hold entries [begin, end) of sequence b are pages that there are.
  void check_entries(std::string_view function, index_t b, index_t begin, index_t end) const {
    for (index_t i = begin / page(); i < detail::ceil_div(end, page()); ++i)
      if (table(b, i) < 0 || table(b, i) >= this->k.extents[0])
        detail::fail_value(function, ": cache.table[", b, ", ", i, "] = ", table(b, i), " is outside [0, ",
                           this->k.extents[0], ")");
  }
  template <class F>
  void each_view(F&& f) const {
    base::each_view(f);
    f("cache.table", table);
  }
};
template <viewable<4> K, viewable<4> V, class Table, std::ranges::contiguous_range L, class... Scales>
paged(K&&, V&&, const Table&, L&&, Scales&&...) -> paged<detail::cached_t<K, V>, detail::ranged_t<L>>;

namespace detail {

// x[0, n) in int8 and the scale that gives it back: the largest element becomes 127. What is not finite becomes NaN;
// entries whose largest element is below 2^-120 become 0, as 127 / max |x| need not be a number.
template <class T>
float quantise_entry(const T* x, index_t step, index_t n, std::int8_t* codes) noexcept {
  float largest = 0, finite = 0;
  for (index_t c = 0; c < n; ++c) {
    const float size = std::fabs(static_cast<float>(x[c * step]));
    largest = std::max(largest, size);
    finite += size * 0;
  }
  if (largest < 0x1p-120f) largest = 0;
  const float inverse = largest > 0 && finite == 0 ? 127 / largest : 0.0f;
  for (index_t c = 0; c < n; ++c)
    codes[c] = inverse == 0 ? std::int8_t{1}
                            : static_cast<std::int8_t>(std::nearbyint(static_cast<float>(x[c * step]) * inverse));
  return finite == 0 ? largest / 127 : finite;
}

template <class X>
void check_appended(std::string_view function, std::string_view name, const X& x, index_t batch, index_t heads,
                    index_t columns) {
  check_view(function, name, x);
  check_extent(function, name, "batches", x.extent(0), "cache", batch);
  check_extent(function, name, "heads", x.extent(1), "cache", heads);
  check_extent(function, name, "columns", x.extent(3), "cache", columns);
}

}  // namespace detail

/// Appends k [batch, kv heads, n, d] and v [batch, kv heads, n, d_v] to each sequence of a cache, and n to its lengths.
/// Elements are converted to those of the cache; in int8 each entry of a head has the scale max |x| / 127. Throws
/// shape_error where extents do not fit or memory overlaps, value_error where a sequence has no room for n entries more
/// or a page is not there, before anything is written. Sequences that share a page must not both write to it.
template <executor Executor, viewable<4> K, viewable<4> V, class Cache>
void append(const Executor& exec, const K& keys, const V& values, Cache&& cache) {
  constexpr std::string_view function = "attention::append";
  using C = typename std::remove_cvref_t<Cache>::value_type;
  static_assert(!std::is_const_v<std::remove_pointer_t<decltype(cache.k.data)>> &&
                    !std::is_const_v<std::remove_pointer_t<decltype(cache.lengths.data)>>,
                "attention: a cache that is appended to needs keys, values and lengths that may be written");
  const tensor_view<const element_t<const K>, 4> k = as_view(keys);
  const tensor_view<const element_t<const V>, 4> v = as_view(values);
  detail::arguments call(function, exec);
  cache.check(function);
  detail::check_appended(function, "k", k, cache.batch(), cache.heads(), cache.d());
  detail::check_appended(function, "v", v, cache.batch(), cache.heads(), cache.d_v());
  const index_t n = k.extent(2), heads = cache.heads();
  detail::check_extent(function, "v", "entries", v.extent(2), "k", n);
  for (index_t b = 0; b < cache.batch(); ++b) {
    const index_t length = cache.length(b), room = cache.capacity(b) - length;
    if (n > room)
      detail::fail_value(function, ": k has ", n, " entries, but sequence ", b, " has room for ", room, " more after ",
                         length);
    using count = std::remove_cvref_t<decltype(cache.lengths(b))>;
    if (!std::in_range<count>(length + n))
      detail::fail_value(function, ": sequence ", b, " would have ", length + n,
                         " entries, which the type of cache.lengths does not hold");
    cache.check_entries(function, b, length, length + n);
  }
  call.reads("k", k);
  call.reads("v", v);
  call.writes("cache.k", cache.k);
  call.writes("cache.v", cache.v);
  call.writes("cache.lengths", cache.lengths);
  if constexpr (detail::is_int8<C>) {
    call.writes("cache.k_scales", cache.k_scales);
    call.writes("cache.v_scales", cache.v_scales);
  }
  parallel_for(exec, cache.batch() * heads * n, [&](index_t at) {
    const index_t i = at % n, h = at / n % heads, b = at / n / heads;
    const auto entry = cache.entry(b, h, cache.length(b) + i);
    const auto write = [&](const auto& x, C* to, [[maybe_unused]] const auto& scales) {
      const auto* from = x.data + b * x.strides[0] + h * x.strides[1] + i * x.strides[2];
      if constexpr (detail::is_int8<C>)
        *detail::entry_of(scales, entry) = detail::quantise_entry(from, x.strides[3], x.extents[3], to);
      else
        for (index_t c = 0; c < x.extents[3]; ++c) to[c] = static_cast<C>(from[c * x.strides[3]]);
    };
    write(k, detail::entry_of(cache.k, entry), cache.k_scales);
    write(v, detail::entry_of(cache.v, entry), cache.v_scales);
  });
  for (index_t b = 0; b < cache.batch(); ++b) {
    auto& length = cache.lengths(b);
    length = static_cast<std::remove_reference_t<decltype(length)>>(length + n);
  }
}

}  // namespace MLKIT_NAMESPACE::attention
