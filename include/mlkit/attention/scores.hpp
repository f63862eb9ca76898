// The score pipeline: what happens to each q . k on its way into the softmax, as types in declared order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <ranges>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../core/random.hpp"
#include "../core/view.hpp"

namespace MLKIT_NAMESPACE::attention {

/// Which score a stage sees: of query i and key j, in head h of batch b.
struct position {
  index_t b = 0, h = 0, i = 0, j = 0;
};

/// Where the diagonal of a mask starts when there are not as many queries as keys. PyTorch's is_causal is top_left;
/// FlashAttention since 2.1 is bottom_right, which is what queries at the end of a cache of keys mean.
enum class align {
  unstated,      ///< only for as many queries as keys
  top_left,      ///< query 0 is level with key 0
  bottom_right,  ///< the last query is level with the last key
};

/// What a block of scores needs of a mask.
enum class block { empty, partial, full };

namespace detail {

using namespace mlkit::detail;

// The sizes that stages are checked against and classify by.
struct score_shape {
  index_t batch = 0, heads = 0, queries = 0, keys = 0;
};

// Key - query on the diagonal.
constexpr index_t diagonal(align a, index_t queries, index_t keys) noexcept {
  return a == align::bottom_right ? keys - queries : 0;
}

inline void check_alignment(std::string_view function, std::string_view name, align a, const score_shape& s) {
  if (a == align::unstated && s.queries != s.keys)
    fail_value(function, ": ", name, " needs an alignment, top_left or bottom_right, for ", s.queries, " queries and ",
               s.keys, " keys");
}

// A view of rank 2 to 4 as [batch, heads, queries, keys]; where it has one of a dimension, all share it.
template <class T, int Rank>
tensor_view<T, 4> broadcast_scores(const tensor_view<T, Rank>& v) noexcept {
  static_assert(Rank >= 2 && Rank <= 4, "attention: scores have rank 2, 3 or 4: [[[batch,] heads,] queries, keys]");
  tensor_view<T, 4> w;
  w.data = v.data;
  for (int d = 0; d < 4; ++d) {
    const int from = d - (4 - Rank);
    w.extents[d] = from < 0 ? 1 : v.extents[from];
    w.strides[d] = w.extents[d] == 1 ? 0 : v.strides[from];
  }
  return w;
}

template <class T>
void check_broadcast(std::string_view function, std::string_view name, const tensor_view<T, 4>& v,
                     const score_shape& s) {
  check_view(function, name, v);
  const index_t want[] = {s.batch, s.heads, s.queries, s.keys};
  constexpr std::string_view of[] = {"batches", "heads", "queries", "keys"};
  for (int d = 0; d < 4; ++d)
    if (v.extents[d] != 1 && v.extents[d] != want[d])
      fail_shape(function, ": ", name, " has ", v.extents[d], " ", of[d], ", but the scores have ", want[d],
                 " (1 would serve all)");
}

}  // namespace detail

/// value * s. Where a pipeline has no scale, scores start as q . k / sqrt(d); scale{1} is none.
struct scale {
  double value = 1;
};

/// cap tanh(s / cap): scores stay in (-cap, cap). cap and 1 / cap are normal numbers of the type that scores are
/// computed in. Gemma 2 (2024).
struct softcap {
  double cap = 30;
};

/// s - slopes[h] |i + keys - queries - j|: the farther the key, the lower its score; slopes [heads]. Press et al.:
/// "Train short, test long", 2022. The last query is level with the last key, as in FlashAttention.
template <class T>
struct alibi {
  vector_view<const T> slopes;
  template <viewable<1> S>
  explicit alibi(S&& s) : slopes(as_view(s)) {}
  void check(std::string_view function, const detail::score_shape& s) const {
    detail::check_view(function, "alibi's slopes", slopes);
    detail::check_extent(function, "alibi's slopes", "elements", slopes.extent(0), "q's heads", s.heads);
  }
  template <class F>
  void each_view(F&& f) const {
    f("alibi's slopes", slopes);
  }
};
template <viewable<1> S>
alibi(S&&) -> alibi<element_t<std::remove_reference_t<S>>>;

/// s + b[b, h, i, j]; b is [queries, keys], [heads, queries, keys] or [batch, heads, queries, keys], and an extent of 1
/// serves all of its dimension. f32, f64, bf16 or f16; -inf masks where no softcap follows.
template <class T>
struct bias {
  tensor_view<const T, 4> values;
  template <class B>
    requires(viewable<B, 2> || viewable<B, 3> || viewable<B, 4>)
  explicit bias(B&& b) : values(detail::broadcast_scores(as_view(b))) {}
  void check(std::string_view function, const detail::score_shape& s) const {
    detail::check_broadcast(function, "bias", values, s);
  }
  template <class F>
  void each_view(F&& f) const {
    f("bias", values);
  }
};
template <class B>
bias(B&&) -> bias<element_t<std::remove_reference_t<B>>>;

/// Keys j <= i + diagonal alone.
struct causal {
  align alignment = align::unstated;
  void check(std::string_view function, const detail::score_shape& s) const {
    detail::check_alignment(function, "causal", alignment, s);
  }
  block classify(const detail::score_shape& s, index_t, index_t, index_t i, index_t i_end, index_t j,
                 index_t j_end) const noexcept {
    const index_t d = detail::diagonal(alignment, s.queries, s.keys);
    return j > i_end - 1 + d ? block::empty : j_end - 1 <= i + d ? block::full : block::partial;
  }
  // The queries [first, last) that see key j.
  std::pair<index_t, index_t> queries(const detail::score_shape& s, index_t j) const noexcept {
    return {j - detail::diagonal(alignment, s.queries, s.keys), s.queries};
  }
};

/// Keys i + diagonal - left <= j <= i + diagonal + right alone: a sliding window.
struct window {
  static constexpr index_t unlimited = std::numeric_limits<index_t>::max() / 4;
  index_t left = unlimited, right = 0;
  align alignment = align::unstated;
  void check(std::string_view function, const detail::score_shape& s) const {
    if (left < 0) detail::fail_value(function, ": window.left = ", left, " is negative");
    if (right < 0) detail::fail_value(function, ": window.right = ", right, " is negative");
    detail::check_alignment(function, "window", alignment, s);
  }
  // The queries [first, last) that see key j.
  std::pair<index_t, index_t> queries(const detail::score_shape& s, index_t j) const noexcept {
    const index_t level = j - detail::diagonal(alignment, s.queries, s.keys);
    return {level - std::min(right, unlimited), level + std::min(left, unlimited) + 1};
  }
  block classify(const detail::score_shape& s, index_t, index_t, index_t i, index_t i_end, index_t j,
                 index_t j_end) const noexcept {
    const auto first = queries(s, j), last = queries(s, j_end - 1);
    if (i >= last.second || i_end <= first.first) return block::empty;
    return i >= last.first && i_end <= first.second ? block::full : block::partial;
  }
};

/// Keys j < lengths[b] alone; lengths [batch] are integers. Keys and values beyond are never read.
template <std::integral I>
struct key_lengths {
  vector_view<const I> lengths;
  template <std::ranges::contiguous_range R>
  explicit key_lengths(const R& r) : lengths(std::ranges::data(r), {static_cast<index_t>(std::ranges::size(r))}) {}
  void check(std::string_view function, const detail::score_shape& s) const {
    detail::check_view(function, "key_lengths", lengths);
    detail::check_extent(function, "key_lengths", "elements", lengths.extent(0), "the batch", s.batch);
    for (index_t b = 0; b < s.batch; ++b)
      if (std::cmp_less(lengths(b), 0) || std::cmp_greater(lengths(b), s.keys))
        detail::fail_value(function, ": key_lengths[", b, "] = ", lengths(b), " is outside [0, ", s.keys, "]");
  }
  index_t limit(index_t b) const noexcept { return static_cast<index_t>(lengths(b)); }
  template <class F>
  void each_view(F&& f) const {
    f("key_lengths", lengths);
  }
};
template <std::ranges::contiguous_range R>
key_lengths(const R&) -> key_lengths<std::ranges::range_value_t<R>>;

/// Keys where the mask is true alone; a view of bool or integers of 8 bits, broadcast as bias is.
template <class T>
struct boolean_mask {
  static_assert(sizeof(T) == 1, "attention: a boolean_mask is a view of bool, std::uint8_t or char");
  tensor_view<const T, 4> values;
  template <class U, int Rank>
  explicit boolean_mask(const tensor_view<U, Rank>& v)
      : values(detail::broadcast_scores(tensor_view<const T, Rank>(v))) {}
  void check(std::string_view function, const detail::score_shape& s) const {
    detail::check_broadcast(function, "boolean_mask", values, s);
  }
  block classify(const detail::score_shape&, index_t b, index_t h, index_t i, index_t i_end, index_t j,
                 index_t j_end) const noexcept {
    if (values.strides[2] == 0) i_end = i + 1;
    if (values.strides[3] == 0) j_end = j + 1;
    const bool first = at(b, h, i, j);
    for (; i < i_end; ++i)
      if (!all_are(first, b, h, i, j, j_end)) return block::partial;
    return first ? block::full : block::empty;
  }
  bool at(index_t b, index_t h, index_t i, index_t j) const noexcept {
    const auto& s = values.strides;
    return static_cast<bool>(values.data[b * s[0] + h * s[1] + i * s[2] + j * s[3]]);
  }
  template <class F>
  void each_view(F&& f) const {
    f("boolean_mask", values);
  }

 private:
  bool all_are(bool wanted, index_t b, index_t h, index_t i, index_t j, index_t j_end) const noexcept {
    if (values.strides[3] == 1) {
      const auto& s = values.strides;
      const T* const row = values.data + b * s[0] + h * s[1] + i * s[2] + j;
      const auto n = static_cast<std::size_t>(j_end - j);
      if (wanted) return !std::memchr(row, 0, n);
      return !row[0] && std::memcmp(row, row + 1, n - 1) == 0;
    }
    while (j < j_end && at(b, h, i, j) == wanted) ++j;
    return j == j_end;
  }
};
template <class U, int Rank>
boolean_mask(const tensor_view<U, Rank>&) -> boolean_mask<std::remove_const_t<U>>;

/// Queries and keys of the same document alone: for sequences packed into one; ids [queries] of integers, where there
/// are as many keys as queries.
template <std::integral I>
struct documents {
  vector_view<const I> ids;
  template <std::ranges::contiguous_range R>
  explicit documents(const R& r) : ids(std::ranges::data(r), {static_cast<index_t>(std::ranges::size(r))}) {}
  void check(std::string_view function, const detail::score_shape& s) const {
    detail::check_view(function, "documents", ids);
    detail::check_extent(function, "documents", "elements", ids.extent(0), "q's queries", s.queries);
    detail::check_extent(function, "documents", "elements", ids.extent(0), "k's keys", s.keys);
  }
  bool at(index_t, index_t, index_t i, index_t j) const noexcept { return ids.data[i] == ids.data[j]; }
  block classify(const detail::score_shape&, index_t, index_t, index_t i, index_t i_end, index_t j,
                 index_t j_end) const noexcept {
    const auto [least_i, most_i] = std::minmax_element(ids.data + i, ids.data + i_end);
    const auto [least_j, most_j] = std::minmax_element(ids.data + j, ids.data + j_end);
    if (*most_i < *least_j || *most_j < *least_i) return block::empty;
    if (*least_i == *most_i && *least_j == *most_j) return block::full;
    const bool some =
        std::find_first_of(ids.data + i, ids.data + i_end, ids.data + j, ids.data + j_end) != ids.data + i_end;
    return some ? block::partial : block::empty;
  }
  template <class F>
  void each_view(F&& f) const {
    f("documents", ids);
  }
};
template <std::ranges::contiguous_range R>
documents(const R&) -> documents<std::ranges::range_value_t<R>>;

/// Blocks of queries and keys: those where the mask [heads or 1, blocks of queries, blocks of keys] is true alone.
template <class T>
struct block_sparse {
  static_assert(sizeof(T) == 1, "attention: a block_sparse mask is a view of bool, std::uint8_t or char");
  tensor_view<const T, 3> blocks;
  index_t query_block, key_block;
  template <class U>
  block_sparse(const tensor_view<U, 3>& v, index_t queries_of_block, index_t keys_of_block)
      : blocks(tensor_view<const T, 3>(v)), query_block(queries_of_block), key_block(keys_of_block) {}
  void check(std::string_view function, const detail::score_shape& s) const {
    detail::check_view(function, "block_sparse", blocks);
    if (query_block < 1) detail::fail_value(function, ": block_sparse.query_block = ", query_block, " is not positive");
    if (key_block < 1) detail::fail_value(function, ": block_sparse.key_block = ", key_block, " is not positive");
    if (blocks.extent(0) != 1) detail::check_extent(function, "block_sparse", "heads", blocks.extent(0), "q", s.heads);
    const auto count = [](index_t n, index_t size) { return n / size + (n % size > 0); };  // of any size
    detail::check_extent(function, "block_sparse", "rows", blocks.extent(1), "q in blocks",
                         count(s.queries, query_block));
    detail::check_extent(function, "block_sparse", "columns", blocks.extent(2), "k in blocks",
                         count(s.keys, key_block));
  }
  bool at(index_t, index_t h, index_t i, index_t j) const noexcept {
    return static_cast<bool>(blocks(blocks.extents[0] == 1 ? 0 : h, i / query_block, j / key_block));
  }
  block classify(const detail::score_shape&, index_t b, index_t h, index_t i, index_t i_end, index_t j,
                 index_t j_end) const noexcept {
    bool some = false, all = true;
    for (index_t r = i; r < i_end; r = (r / query_block + 1) * query_block)
      for (index_t c = j; c < j_end; c = (c / key_block + 1) * key_block)
        if (at(b, h, r, c))
          some = true;
        else
          all = false;
    return all ? block::full : some ? block::partial : block::empty;
  }
  template <class F>
  void each_view(F&& f) const {
    f("block_sparse", blocks);
  }
};
template <class U>
block_sparse(const tensor_view<U, 3>&, index_t, index_t) -> block_sparse<std::remove_const_t<U>>;

/// A score of logits[h] that every query also sees, and that has no value: it joins the denominator alone; logits
/// [heads]. Stands after all other stages. Xiao et al.: "Efficient streaming language models with attention sinks",
/// 2024.
template <class T>
struct sinks {
  vector_view<const T> logits;
  template <viewable<1> S>
  explicit sinks(S&& s) : logits(as_view(s)) {}
  void check(std::string_view function, const detail::score_shape& s) const {
    detail::check_view(function, "sinks", logits);
    detail::check_extent(function, "sinks", "elements", logits.extent(0), "q's heads", s.heads);
  }
  template <class F>
  void each_view(F&& f) const {
    f("sinks", logits);
  }
};
template <viewable<1> S>
sinks(S&&) -> sinks<element_t<std::remove_reference_t<S>>>;

/// Drops each probability with probability p and scales the others by 1 / (1 - p). The mask is a function of (seed,
/// stream, b, h, i, j): forward, backward and any number of threads see the same one, and it is never stored. Dropped
/// is where word j mod 4 of `block` of the random_stream is below p 2^32. Stands last.
struct dropout {
  double p = 0;
  std::uint64_t seed = 0, stream = 0;
  void check(std::string_view function, const detail::score_shape&) const {
    if (!(p >= 0 && p < 1)) detail::fail_value(function, ": dropout = ", p, " is outside [0, 1)");
  }
  /// Four keys share a block of random words.
  static constexpr index_t blocks_of_row(index_t keys) noexcept { return detail::ceil_div(keys, index_t{4}); }
  static constexpr std::uint64_t block(index_t heads, index_t keys, index_t b, index_t h, index_t i,
                                       index_t j) noexcept {
    return (static_cast<std::uint64_t>(b * heads + h) << 40) +
           static_cast<std::uint64_t>(i * blocks_of_row(keys) + j / 4);
  }
};

namespace detail {

template <class S>
inline constexpr bool is_scale = std::is_same_v<S, attention::scale>;
template <class S>
inline constexpr bool is_dropout = std::is_same_v<S, attention::dropout>;
template <class S>
inline constexpr bool is_sinks = false;
template <class T>
inline constexpr bool is_sinks<attention::sinks<T>> = true;
template <class S>
inline constexpr bool is_bias = false;
template <class T>
inline constexpr bool is_bias<attention::bias<T>> = true;
template <class S>
inline constexpr bool is_alibi = false;
template <class T>
inline constexpr bool is_alibi<attention::alibi<T>> = true;
template <class S>
inline constexpr bool is_key_lengths = false;
template <class I>
inline constexpr bool is_key_lengths<attention::key_lengths<I>> = true;

// Masks say which scores count; stages that are neither masks nor of the softmax change them.
template <class S>
concept mask_stage = requires(const S& s, const score_shape& shape) {
  { s.classify(shape, index_t{}, index_t{}, index_t{}, index_t{}, index_t{}, index_t{}) } -> std::same_as<block>;
};
template <class S>
inline constexpr bool is_of_softmax = is_dropout<S> || is_sinks<S> || is_key_lengths<S>;
template <class S>
inline constexpr bool is_own =
    is_scale<S> || is_of_softmax<S> || is_bias<S> || is_alibi<S> || mask_stage<S> || std::is_same_v<S, softcap>;
template <class S>
concept user_stage = !is_own<S> && (std::is_invocable_r_v<float, const S&, float> ||
                                    std::is_invocable_r_v<float, const S&, float, const position&>);

template <class S, class... Arguments>
concept derivable = requires(const S& s, const Arguments&... a) {
  s.derivative(a...);
};
// What backward can go through.
template <class S>
inline constexpr bool has_gradient = !user_stage<S> || derivable<S, float> || derivable<S, float, position>;

constexpr int count_of(std::initializer_list<bool> is) noexcept {
  int n = 0;
  for (const bool b : is) n += b;
  return n;
}

template <class... Stages>
constexpr bool softmax_stages_last() noexcept {
  bool seen_sinks = false, seen_dropout = false, good = true;
  [[maybe_unused]] const auto one = [&](bool sink, bool drop, bool other) {
    if (other && (seen_sinks || seen_dropout)) good = false;
    if (sink && seen_dropout) good = false;
    seen_sinks = seen_sinks || sink;
    seen_dropout = seen_dropout || drop;
  };
  (one(is_sinks<Stages>, is_dropout<Stages>, !is_sinks<Stages> && !is_dropout<Stages>), ...);
  return good;
}

}  // namespace detail

/// A pipeline: stages in the order in which they meet each score. `scores{scale{s}, softcap{30}, causal{}}` caps the
/// scaled score; the order is the meaning, and is never changed. Masks hide scores wherever they stand. Stages are
/// those of this header and the user's own: `float(float score)` or `float(float score, const attention::position&)`,
/// with a member `derivative` of the same arguments where backward is called. Called through const from several threads
/// at once, for scores that a mask hides too; must not throw.
template <class... Stages>
struct scores {
  static_assert(((detail::is_own<Stages> || detail::user_stage<Stages>)&&...),
                "attention: a stage is one of attention's own, or callable as float(float) or float(float, const "
                "attention::position&)");
  static_assert(detail::count_of({detail::is_dropout<Stages>...}) <= 1, "attention: dropout stands once");
  static_assert(detail::count_of({detail::is_sinks<Stages>...}) <= 1, "attention: sinks stand once");
  static_assert(detail::count_of({detail::is_bias<Stages>...}) <= 1,
                "attention: a pipeline has one bias; add them up beforehand");
  static_assert(
      detail::softmax_stages_last<Stages...>(),
      "attention: sinks and dropout are of the softmax, not of a score: they stand last, dropout after sinks");
  std::tuple<Stages...> stages;

  scores() = default;
  constexpr explicit scores(Stages... s) requires(sizeof...(Stages) > 0) : stages(std::move(s)...) {}
};
template <class... Stages>
scores(Stages...) -> scores<Stages...>;

namespace detail {

template <class... Stages>
inline constexpr bool has_scale = (is_scale<Stages> || ...);

// Stages that bring elements for the scores of one shape.
template <class S>
inline constexpr bool is_of_one_shape = is_bias<S> || requires(const S& s) {
  s.at(index_t{}, index_t{}, index_t{}, index_t{});
};

// Whether at most one scale is all that happens to scores before masks and softmax.
template <class Scores>
inline constexpr bool only_scaled = false;
template <class... Stages>
inline constexpr bool only_scaled<scores<Stages...>> = count_of({is_scale<Stages>...}) <= 1 &&
                                                       ((is_scale<Stages> || is_dropout<Stages> ||
                                                         is_key_lengths<Stages> || mask_stage<Stages>)&&...);

// Whether some scores may be masked.
template <class Scores>
inline constexpr bool any_mask = false;
template <class... Stages>
inline constexpr bool any_mask<scores<Stages...>> = ((is_key_lengths<Stages> || mask_stage<Stages>) || ...);

template <class Scores>
inline constexpr bool any_bias = false;
template <class... Stages>
inline constexpr bool any_bias<scores<Stages...>> = (is_bias<Stages> || ...);

template <class Scores>
inline constexpr bool any_dropout = false;
template <class... Stages>
inline constexpr bool any_dropout<scores<Stages...>> = (is_dropout<Stages> || ...);

// The pipeline with the scale that it has where it names none.
template <class... Stages>
auto with_scale(const scores<Stages...>& s, index_t d) {
  if constexpr (has_scale<Stages...>)
    return s;
  else
    return std::apply(
        [&](const auto&... stage) {
          return scores<scale, Stages...>(scale{1 / std::sqrt(static_cast<double>(std::max<index_t>(1, d)))}, stage...);
        },
        s.stages);
}

template <class F, class... Stages>
void each_stage(const scores<Stages...>& s, F&& f) {
  std::apply([&](const auto&... stage) { (f(stage), ...); }, s.stages);
}

// Keys of batch b that are there at all.
template <class... Stages>
index_t key_limit(const scores<Stages...>& s, index_t b, index_t keys) noexcept {
  each_stage(s, [&](const auto& stage) {
    if constexpr (is_key_lengths<std::remove_cvref_t<decltype(stage)>>) keys = std::min(keys, stage.limit(b));
  });
  return keys;
}

template <class... Stages>
block classify(const scores<Stages...>& s, const score_shape& shape, index_t b, index_t h, index_t i, index_t i_end,
               index_t j, index_t j_end) noexcept {
  block all = block::full;
  each_stage(s, [&](const auto& stage) {
    if constexpr (mask_stage<std::remove_cvref_t<decltype(stage)>>) {
      if (all == block::empty) return;
      const block one = stage.classify(shape, b, h, i, i_end, j, j_end);
      if (one != block::full) all = one;
    }
  });
  return all;
}

// Scales and caps are given as f64, and met by scores of A.
template <class A>
void check_scale_of(std::string_view function, double scale) {
  if (!std::isfinite(scale)) fail_value(function, ": scale = ", scale, " is not finite");
  if (std::fabs(scale) > std::numeric_limits<A>::max())
    fail_value(function, ": scale = ", scale, " is infinite in ", dtype_name<A>());
}
template <class A>
void check_softcap_of(std::string_view function, double cap) {
  if (!(std::isfinite(cap) && cap > 0)) fail_value(function, ": softcap = ", cap, " is not positive");
  constexpr double least = std::numeric_limits<A>::min(), most = 1 / least;
  if (!(cap >= least && cap <= most))
    fail_value(function, ": softcap = ", cap, " is outside [", least, ", ", most, "], which ", dtype_name<A>(),
               " holds with its inverse");
}

template <class A, class... Stages>
void check_scores(std::string_view function, const scores<Stages...>& s, const score_shape& shape) {
  each_stage(s, [&](const auto& stage) {
    using S = std::remove_cvref_t<decltype(stage)>;
    if constexpr (is_scale<S>) check_scale_of<A>(function, stage.value);
    if constexpr (std::is_same_v<S, softcap>) check_softcap_of<A>(function, stage.cap);
  });
  each_stage(s, [&](const auto& stage) {
    if constexpr (requires { stage.check(function, shape); }) stage.check(function, shape);
  });
}

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::attention
