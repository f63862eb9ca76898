// Attention maps: what attention pays attention to, on request.
#pragma once

#include "forward.hpp"

#define MLKIT_FOREACH "../attention/cpu/maps-inl.hpp"
#include "../simd/foreach_isa.hpp"

namespace MLKIT_NAMESPACE::attention {
namespace detail {

// The keys that a map has columns for; [batch, columns], or all there are.
struct map_keys {
  matrix_view<const std::int32_t> chosen{};
  bool every = true;

  map_keys() = default;
  template <class I>
    requires(std::is_same_v<std::remove_const_t<I>, std::int32_t>)
  map_keys(const matrix_view<I>& keys) : chosen(keys), every(false) {}
  // The same keys for every sequence.
  template <std::ranges::contiguous_range R>
    requires(std::is_same_v<std::ranges::range_value_t<R>, std::int32_t>)
  map_keys(const R& keys)
      : chosen(std::ranges::data(keys), {1, static_cast<index_t>(std::ranges::size(keys))}), every(false) {}
};

// A map as kernels see it.
template <class M>
struct kept_probabilities {
  tensor_view<M, 4> values;  // [batch, heads or 1, queries, columns]
  matrix_view<const std::int32_t> keys;
  bool every_key, averaged;

  // The rows of a mean, or of chosen keys, take some cache.
  task_shape tasks(index_t m, index_t most) const noexcept {
    constexpr index_t bytes = index_t{1} << 23;
    const index_t columns = std::max<index_t>(1, every_key ? m : values.extents[3]);
    return {averaged, averaged || !every_key ? std::min(most, bytes / (columns * index_t{sizeof(float)})) : most};
  }

  template <class Problem>
  void check(arguments& call, std::string_view function, const Problem& p) const {
    static_assert(std::is_same_v<M, double> == std::is_same_v<typename Problem::value_type, double>,
                  "attention: f64 goes with f64 alone: q, k, v, out and the map are all f64, or none is");
    check_view(function, "map", values);
    check_extent(function, "map", "batches", values.extent(0), "q", p.q.extent(0));
    check_extent(function, "map", "heads", values.extent(1), "q", averaged ? index_t{1} : p.q.extent(1));
    check_extent(function, "map", "queries", values.extent(2), "q", p.q.extent(2));
    const index_t m = p.k.extent(2);
    if (every_key) {
      check_extent(function, "map", "keys", values.extent(3), "k", m);
    } else {
      check_view(function, "map.keys", keys);
      if (keys.extent(0) != 1) check_extent(function, "map.keys", "rows", keys.extent(0), "q's batch", p.q.extent(0));
      check_extent(function, "map", "columns", values.extent(3), "map.keys", keys.extent(1));
      for (index_t b = 0; b < keys.extent(0); ++b)
        for (index_t c = 0; c < keys.extent(1); ++c)
          if (keys(b, c) < 0 || keys(b, c) >= m)
            fail_value(function, ": map.keys[", b, ", ", c, "] = ", keys(b, c), " is outside [0, ", m, ")");
      call.reads("map.keys", keys);
    }
    call.writes("map", values);
  }
  // The mean of no head.
  void clear() const noexcept {
    for (index_t b = 0; b < values.extent(0) && averaged; ++b)
      for (index_t i = 0; i < values.extent(2); ++i)
        for (index_t c = 0; c < values.extent(3); ++c) values(b, 0, i, c) = M{};
  }
};

// A problem, and the map that its probabilities go to.
template <class Problem, class Map>
struct with_map : Problem {
  Map map;
};

template <class Map>
struct run_with_map {
  std::string_view function;
  Map map;
  template <class Problem>
  void operator()(arguments& call, const cpu& exec, const Problem& p) const {
    map.check(call, function, p);
    if (p.q.extent(1) == 0) map.clear();
    run_forward(exec, with_map<Problem, Map>{p, map});
  }
};

template <class M>
kept_probabilities<M> kept_of(const tensor_view<M, 4>& values, const map_keys& keys, bool averaged) noexcept {
  kept_probabilities<M> kept{values, keys.chosen, keys.every, averaged};
  if (kept.keys.extents[0] == 1) kept.keys.strides[0] = 0;
  return kept;
}

template <class M>
inline constexpr bool is_map = false;

}  // namespace detail

/// A map of each head: values[b, h, i, j] = P[b, h, i, j], [batch, heads, queries, keys]; or of the keys that are
/// chosen alone, [batch, heads, queries, chosen], where `keys` are [chosen], or [batch, chosen] to choose others in
/// each sequence. Keys are std::int32_t.
template <class M>
struct head_maps {
  tensor_view<M, 4> values;
  detail::map_keys keys;

  template <viewable<4> Map>
  explicit head_maps(Map&& map, const detail::map_keys& of = {}) : values(as_view(map)), keys(of) {}

  auto kept() const noexcept { return detail::kept_of(values, keys, false); }
};
template <class Map, class... Keys>
head_maps(Map&&, const Keys&...) -> head_maps<element_t<std::remove_reference_t<Map>>>;

/// The mean of the heads' maps: values[b, i, j] = 1 / heads sum over h of P[b, h, i, j], [batch, queries, keys]; or of
/// the keys that are chosen alone, [batch, queries, chosen], as for head_maps.
template <class M>
struct averaged_map {
  tensor_view<M, 3> values;
  detail::map_keys keys;

  template <viewable<3> Map>
  explicit averaged_map(Map&& map, const detail::map_keys& of = {}) : values(as_view(map)), keys(of) {}

  auto kept() const noexcept {
    const auto &e = values.extents, &s = values.strides;
    return detail::kept_of(tensor_view<M, 4>(values.data, {e[0], 1, e[1], e[2]}, {s[0], 0, s[1], s[2]}), keys, true);
  }
};
template <class Map, class... Keys>
averaged_map(Map&&, const Keys&...) -> averaged_map<element_t<std::remove_reference_t<Map>>>;

namespace detail {
template <class M>
inline constexpr bool is_map<head_maps<M>> = true;
template <class M>
inline constexpr bool is_map<averaged_map<M>> = true;
}  // namespace detail

/// forward, and a map of its probabilities in the same pass: head_maps or an averaged_map. P is what multiplies v, so
/// that out = P v in each head: what a mask hides is 0, a row without keys is 0, sinks have taken their part, and
/// dropout's factors are in it. out has the same bits as without a map. Maps are of any type that out may have.
///
/// Of queries x keys there is no more than the map itself and, in each thread, some rows of it: of a mean as many as
/// 8 MiB have room for, and at least as many as are worked on together (64 of f32 under AVX-512); and keys and values
/// of a head. The same bits for any number of threads. Throws as forward does, and value_error for chosen keys that are
/// not there.
template <executor Executor, viewable<4> Q, viewable<4> K, viewable<4> V, class... Stages, viewable<4> Out, class Map>
  requires(detail::is_map<Map>)
void forward(const Executor& exec, const Q& q, const K& k, const V& v, const scores<Stages...>& s, Out&& out,
             const Map& map) {
  using T = element_t<const Q>;
  detail::check_one_type<T, K, V>();
  detail::forward("attention::forward", exec, tensor_view<const T, 4>(as_view(q)), tensor_view<const T, 4>(as_view(k)),
                  tensor_view<const T, 4>(as_view(v)), s, as_view(out), tensor_view<accumulator_t<T>, 3>{}, nullptr,
                  detail::run_with_map<decltype(map.kept())>{"attention::forward", map.kept()});
}

/// The map alone: no v, no out.
template <executor Executor, viewable<4> Q, viewable<4> K, class... Stages, class Map>
  requires(detail::is_map<Map>)
void maps(const Executor& exec, const Q& q, const K& k, const scores<Stages...>& s, const Map& map) {
  using T = element_t<const Q>;
  detail::check_one_type<T, K>();
  // Attention to values without columns.
  tensor_view<const T, 4> keys(as_view(k)), values = keys;
  values.extents[3] = 0;
  const tensor_view<const T, 4> queries(as_view(q));
  tensor_view<T, 4> out(nullptr, queries.extents);
  out.extents[3] = 0;
  detail::forward("attention::maps", exec, queries, keys, values, s, out, tensor_view<accumulator_t<T>, 3>{}, nullptr,
                  detail::run_with_map<decltype(map.kept())>{"attention::maps", map.kept()});
}

}  // namespace MLKIT_NAMESPACE::attention
