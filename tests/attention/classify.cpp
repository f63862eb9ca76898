// What blocks of scores are called, by what each mask says of each of their scores.
#include <algorithm>
#include <array>
#include <catch2/catch.hpp>
#include <functional>
#include <limits>
#include <mlkit/attention/scores.hpp>
#include <utility>
#include <vector>

namespace attention = mlkit::attention;
using attention::align;
using attention::block;
using mlkit::index_t;

namespace {

using sees = std::function<bool(index_t b, index_t h, index_t i, index_t j)>;
using score_shape = attention::detail::score_shape;
constexpr index_t batch = 2, heads = 2;

// `masks` are those of the pipeline. A block is empty where one of them hides all of it, and full where none hides any;
// keys that are none, by length, are in no block.
template <class... Stages>
void check_blocks(const attention::scores<Stages...>& s, index_t queries, index_t keys, const std::vector<sees>& masks,
                  const std::array<index_t, batch>& lengths) {
  const score_shape shape{batch, heads, queries, keys};
  INFO(queries << " queries, " << keys << " keys");
  attention::detail::check_scores<float>("test", s, shape);
  for (index_t b = 0; b < batch; ++b) {
    const index_t limit = attention::detail::key_limit(s, b, keys);
    REQUIRE(limit == lengths[static_cast<std::size_t>(b)]);
    for (index_t h = 0; h < heads; ++h)
      for (const auto& [rows, columns] : {std::pair<index_t, index_t>{1, 1}, {1, 8}, {3, 4}, {4, 3}, {7, 5}, {16, 24}})
        for (index_t i = 0; i < queries; ++i)
          for (index_t j = 0; j < limit; ++j) {
            const index_t i_end = std::min(i + rows, queries), j_end = std::min(j + columns, limit);
            block want = block::full;
            for (const sees& mask : masks) {
              index_t seen = 0;
              for (index_t r = i; r < i_end; ++r)
                for (index_t c = j; c < j_end; ++c) seen += mask(b, h, r, c) ? 1 : 0;
              if (seen == 0) want = block::empty;
              if (seen < (i_end - i) * (j_end - j) && want == block::full) want = block::partial;
            }
            const block have = attention::detail::classify(s, shape, b, h, i, i_end, j, j_end);
            if (have != want)
              FAIL("[" << b << ", " << h << ", " << i << " to " << i_end << ", " << j << " to " << j_end << "] is "
                       << static_cast<int>(have) << ", not " << static_cast<int>(want));
          }
  }
}
template <class... Stages>
void check_blocks(const attention::scores<Stages...>& s, index_t queries, index_t keys,
                  const std::vector<sees>& masks) {
  check_blocks(s, queries, keys, masks, {keys, keys});
}

const std::vector<std::array<index_t, 2>> sizes{{1, 1}, {13, 13}, {9, 21}, {21, 9}};

sees banded(index_t diagonal, index_t left, index_t right) {
  return [=](index_t, index_t, index_t i, index_t j) { return j - i - diagonal <= right && i + diagonal - j <= left; };
}
index_t diagonal_of(align a, index_t queries, index_t keys) { return a == align::bottom_right ? keys - queries : 0; }

std::vector<std::uint8_t> bits(index_t n, std::uint64_t stream, std::uint32_t one_of) {
  const mlkit::random_stream random{3, stream};
  std::vector<std::uint8_t> x(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = random.bits(i) % one_of == 0 ? 0 : 2;
  return x;
}

}  // namespace

TEST_CASE("blocks under causal masks and windows", "[attention][classify]") {
  constexpr index_t unlimited = attention::window::unlimited, most = std::numeric_limits<index_t>::max();
  for (const auto& [n, m] : sizes)
    for (const align a : {align::top_left, align::bottom_right}) {
      const index_t d = diagonal_of(a, n, m);
      check_blocks(attention::scores{attention::causal{a}}, n, m, {banded(d, most / 2, 0)});
      for (const auto& [left, right] : std::vector<std::array<index_t, 2>>{
               {0, 0}, {2, 0}, {0, 3}, {5, 2}, {unlimited, 4}, {4, unlimited}, {unlimited, unlimited}, {most, most}})
        check_blocks(attention::scores{attention::window{left, right, a}}, n, m, {banded(d, left, right)});
    }
}

TEST_CASE("blocks under lengths of keys", "[attention][classify]") {
  const std::vector<int> lengths{7, 0}, fewer{9, 5};
  check_blocks(attention::scores{attention::key_lengths{lengths}}, 5, 9, {}, {7, 0});
  check_blocks(attention::scores{attention::key_lengths{lengths}, attention::causal{align::top_left},
                                 attention::key_lengths{fewer}},
               5, 9, {banded(0, 9, 0)}, {7, 0});
}

TEST_CASE("blocks under boolean masks of every shape", "[attention][classify]") {
  const index_t n = 13, m = 21;
  for (const mlkit::extents_t<4>& e : std::vector<mlkit::extents_t<4>>{
           {batch, heads, n, m}, {1, heads, n, m}, {batch, 1, 1, m}, {1, 1, n, 1}, {batch, heads, 1, 1}, {1, 1, 1, 1}})
    for (const std::uint32_t one_of : {1, 2, 9, 1000000}) {
      const std::vector<std::uint8_t> x = bits(e[0] * e[1] * e[2] * e[3], 1, one_of);
      const mlkit::tensor_view<const std::uint8_t, 4> view(x.data(), e);
      check_blocks(attention::scores{attention::boolean_mask{view}}, n, m,
                   {[&](index_t b, index_t h, index_t i, index_t j) {
                     return view(b % e[0], h % e[1], i % e[2], j % e[3]) != 0;
                   }});
    }
}

TEST_CASE("blocks under documents and under sparse blocks", "[attention][classify]") {
  for (const std::vector<int>& ids : {std::vector<int>{5, 5, 5, 5, 2, 2, 7, 7, 7, 7, 7, 7, 5}, std::vector<int>(13, 1),
                                      std::vector<int>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}})
    check_blocks(attention::scores{attention::documents{ids}}, 13, 13, {[&](index_t, index_t, index_t i, index_t j) {
                   return ids[static_cast<std::size_t>(i)] == ids[static_cast<std::size_t>(j)];
                 }});
  for (const auto& [n, m] : sizes)
    for (const auto& [rows, columns] : std::vector<std::array<index_t, 2>>{{1, 1}, {4, 6}, {7, 3}, {30, 30}})
      for (const index_t masks : {index_t{1}, heads}) {
        const mlkit::extents_t<3> e{masks, (n + rows - 1) / rows, (m + columns - 1) / columns};
        const std::vector<std::uint8_t> x = bits(e[0] * e[1] * e[2], 2, 3);
        const mlkit::tensor_view<const std::uint8_t, 3> view(x.data(), e);
        check_blocks(attention::scores{attention::block_sparse{view, rows, columns}}, n, m,
                     {[&, r = rows, c = columns](index_t, index_t h, index_t i, index_t j) {
                       return view(h % e[0], i / r, j / c) != 0;
                     }});
      }
}

TEST_CASE("blocks under several masks", "[attention][classify]") {
  const index_t n = 13;
  const std::vector<std::uint8_t> x = bits(batch * n * n, 4, 5), y = bits(heads * 4 * 3, 5, 2);
  const mlkit::tensor_view<const std::uint8_t, 4> view(x.data(), {batch, 1, n, n});
  const mlkit::tensor_view<const std::uint8_t, 3> sparse_view(y.data(), {heads, 4, 3});
  const std::vector<int> ids{5, 5, 5, 5, 2, 2, 7, 7, 7, 7, 7, 7, 5}, lengths{13, 6};
  const attention::causal causal;
  const attention::window window{3, 1, align::bottom_right};
  const attention::boolean_mask boolean{view};
  const attention::documents documents{ids};
  const attention::block_sparse sparse{sparse_view, 4, 5};
  const sees under = banded(0, n, 0), near = banded(0, 3, 1);
  const sees chosen = [&](index_t b, index_t, index_t i, index_t j) { return view(b, 0, i, j) != 0; };
  const sees together = [&](index_t, index_t, index_t i, index_t j) {
    return ids[static_cast<std::size_t>(i)] == ids[static_cast<std::size_t>(j)];
  };
  const sees kept = [&](index_t, index_t h, index_t i, index_t j) { return sparse_view(h, i / 4, j / 5) != 0; };
  check_blocks(attention::scores{causal, window}, n, n, {under, near});
  check_blocks(attention::scores{documents, attention::scale{2}, causal}, n, n, {together, under});
  check_blocks(attention::scores{boolean, sparse}, n, n, {chosen, kept});
  check_blocks(attention::scores{sparse, attention::softcap{3}, window, documents}, n, n, {kept, near, together});
  check_blocks(attention::scores{attention::key_lengths{lengths}, boolean, causal, attention::dropout{0.5}}, n, n,
               {chosen, under}, {13, 6});
}
