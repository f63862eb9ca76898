// Decoding against a cache, contiguous and in pages, and the merge of results, against loops in f64.
#include "reference.hpp"

namespace attention = mlkit::attention;
using namespace attention_reference;

namespace {

// The error of out and lse is at most twice that of loops in the same dtype, which see what lies before each length.
template <class T>
void check(index_t group, index_t d, index_t d_v, double softcap, bool pages) {
  using sum = mlkit::accumulator_t<T>;
  constexpr index_t batch = 4, kv_heads = 2, capacity = 1200, page = 48, table_width = capacity / page;
  const index_t heads = kv_heads * group;
  const std::vector<int> lengths{1200, 0, 1, 777};
  problem<T> p(batch, heads, kv_heads, 1, capacity, d, d_v);
  const auto length = [&](index_t b) { return lengths[static_cast<std::size_t>(b)]; };
  for (index_t b = 0; b < batch; ++b)  // what lies beyond a length is never read
    for (index_t h = 0; h < kv_heads; ++h)
      for (index_t j = length(b); j < capacity; ++j) {
        for (index_t c = 0; c < d; ++c) p.k(b, h, j, c) = static_cast<T>(std::nanf(""));
        for (index_t c = 0; c < d_v; ++c) p.v(b, h, j, c) = static_cast<T>(std::nanf(""));
      }
  std::fill(p.out.begin(), p.out.end(), static_cast<T>(std::nanf("")));
  std::fill(p.lse.begin(), p.lse.end(), std::nanf(""));
  const mlkit::tensor_view<const T, 3> q(p.q.data(), {batch, heads, d});
  const mlkit::tensor_view<T, 3> out(p.out.data(), {batch, heads, d_v});
  const mlkit::matrix_view<sum> lse(p.lse.data(), {batch, heads});
  if (pages) {
    mlkit::tensor<T, 4> kp({batch * table_width, page, kv_heads, d}), vp({batch * table_width, page, kv_heads, d_v});
    std::vector<std::int32_t> table(batch * table_width);
    for (index_t i = 0; i < batch * table_width; ++i)
      table[static_cast<std::size_t>(i)] = static_cast<std::int32_t>((i * 37 + 5) % (batch * table_width));
    for (index_t b = 0; b < batch; ++b)
      for (index_t j = 0; j < capacity; ++j)
        for (index_t h = 0; h < kv_heads; ++h) {
          const index_t in = table[static_cast<std::size_t>(b * table_width + j / page)];
          for (index_t c = 0; c < d; ++c) kp(in, j % page, h, c) = p.k(b, h, j, c);
          for (index_t c = 0; c < d_v; ++c) vp(in, j % page, h, c) = p.v(b, h, j, c);
        }
    const mlkit::matrix_view<const std::int32_t> view(table.data(), {batch, table_width});
    attention::decode(mlkit::cpu{}, q, attention::paged(kp, vp, view, lengths), out, {.softcap = softcap}, lse);
  } else {
    attention::decode(mlkit::cpu{}, q, attention::contiguous(p.k, p.v, lengths), out, {.softcap = softcap}, lse);
  }
  const double scale = 1 / std::sqrt(static_cast<double>(d));
  meaning m;
  m.score = [&](double x, index_t b, index_t, index_t, index_t j) {
    if (j >= length(b)) return -inf;
    return softcap > 0 ? softcap * std::tanh(scale * x / softcap) : scale * x;
  };
  m.derivative = [](double, index_t, index_t, index_t, index_t) { return 0.0; };
  const result want = p.template naive<double, double>(m);
  const errors loops(want, p.template naive<sum, T>(m)), ours(want, p.written());
  check_errors<T>(loops, ours, 1, 2);
}

// A cache of the user's own: a ring, in which the value of an entry follows its key.
template <class T>
struct own_cache {
  using value_type = T;
  mlkit::tensor<T, 4> entries;  // [batch, kv heads, slots, d + d_v]
  index_t width;
  std::vector<int> lengths, oldest;

  index_t batch() const { return entries.extent(0); }
  index_t heads() const { return entries.extent(1); }
  index_t d() const { return width; }
  index_t d_v() const { return entries.extent(3) - width; }
  index_t length(index_t b) const { return lengths[static_cast<std::size_t>(b)]; }
  index_t slot(index_t b, index_t j) const { return (oldest[static_cast<std::size_t>(b)] + j) % entries.extent(2); }
  attention::cache_run<T> run(index_t b, index_t h, index_t j) const {
    const index_t at = slot(b, j), step = entries.extent(3);
    const T* const key = &entries(b, h, at, 0);
    return {key, key + width, step, step, std::min(entries.extent(2) - at, length(b) - j)};
  }
};

}  // namespace

TEST_CASE("decode over a cache, contiguous and in pages", "[attention][decode]") {
  for (const bool pages : {false, true})
    for (const index_t group : {1, 2, 3, 7}) {
      INFO("pages " << pages << ", " << group << " heads to a kv head");
      check<double>(group, 24, 9, 0, pages);
      check<float>(group, 128, 80, 0, pages);
    }
  check<double>(4, 5, 130, 1.5, true);
  check<mlkit::bf16>(4, 64, 64, 0, true);
  check<mlkit::f16>(4, 64, 40, 0, false);
}

TEST_CASE("decode gives the same bits for any number of threads", "[attention][decode]") {
  mlkit::tensor<float, 3> q({2, 8, 64}), out({2, 8, 64}), again({2, 8, 64});
  mlkit::tensor<float, 4> k({2, 2, 3000, 64}), v({2, 2, 3000, 64});
  fill<float>(q, 1), fill<float>(k, 2), fill<float>(v, 3);
  const std::vector<std::int64_t> lengths{3000, 1999};
  const attention::contiguous cache(k, v, lengths);
  attention::decode(mlkit::cpu{.threads = 1}, q, cache, out);
  for (const int threads : {2, 5}) {
    attention::decode(mlkit::cpu{.threads = threads}, q, cache, again);
    CHECK(std::memcmp(out.data(), again.data(), static_cast<std::size_t>(out.size()) * sizeof(float)) == 0);
  }
}

TEMPLATE_TEST_CASE("decode over a cache of the user's own is decode over the same entries", "[attention][decode]",
                   float, mlkit::bf16) {
  using T = TestType;
  constexpr index_t batch = 4, kv_heads = 2, heads = 6, slots = 1200, d = 24, d_v = 9;
  own_cache<T> own{mlkit::tensor<T, 4>({batch, kv_heads, slots, d + d_v}), d, {1200, 0, 1, 777}, {}};
  static_assert(attention::key_value_cache<own_cache<T>>);
  mlkit::tensor<T, 3> q({batch, heads, d}), out({batch, heads, d_v}), want({batch, heads, d_v});
  mlkit::tensor<T, 4> k({batch, kv_heads, slots, d}), v({batch, kv_heads, slots, d_v});
  mlkit::matrix<float> lse({batch, heads}), want_lse({batch, heads});
  fill<T>(q, 1), fill<T>(k, 2), fill<T>(v, 3);
  attention::decode(mlkit::cpu{}, q, attention::contiguous(k, v, own.lengths), want, {.softcap = 5}, want_lse);
  const auto decode_own = [&](const std::vector<int>& oldest) {
    own.oldest = oldest;
    std::fill(own.entries.begin(), own.entries.end(), static_cast<T>(std::nanf("")));
    for (index_t b = 0; b < batch; ++b)
      for (index_t h = 0; h < kv_heads; ++h)
        for (index_t j = 0; j < own.length(b); ++j) {
          T* const entry = &own.entries(b, h, own.slot(b, j), 0);
          std::copy_n(&k(b, h, j, 0), d, entry);
          std::copy_n(&v(b, h, j, 0), d_v, entry + d);
        }
    attention::decode(mlkit::cpu{.threads = 3}, q, own, out, {.softcap = 5}, lse);
  };
  decode_own({560, 7, 1199, 1136});  // rings end after 640 and 64 entries, as blocks of keys do: sums are cut alike
  CHECK(std::memcmp(out.data(), want.data(), static_cast<std::size_t>(out.size()) * sizeof(T)) == 0);
  CHECK(std::equal(lse.begin(), lse.end(), want_lse.begin()));
  decode_own({11, 7, 1199, 1100});
  for (index_t i = 0; i < out.size(); ++i)
    CHECK(static_cast<double>(out.data()[i]) ==
          Approx(static_cast<double>(want.data()[i])).epsilon(0).margin(8 * rounding<T>));
}

TEST_CASE("attention over parts of the keys merges to attention over all", "[attention][decode]") {
  mlkit::tensor<double, 4> q({1, 2, 9, 6}), k({1, 2, 50, 6}), v({1, 2, 50, 4}), all({1, 2, 9, 4}), out({1, 2, 9, 4}),
      part({1, 2, 9, 4});
  mlkit::tensor<double, 3> lse({1, 2, 9}), out_lse({1, 2, 9}), part_lse({1, 2, 9});
  fill<double>(q, 1), fill<double>(k, 2), fill<double>(v, 3);
  const mlkit::cpu exec;
  attention::forward(exec, q, k, v, attention::scores<>{}, all, lse);
  std::fill(out_lse.begin(), out_lse.end(), -INFINITY);
  const auto keys = [](const auto& t, index_t first, index_t count) {
    return mlkit::tensor_view<const double, 4>(&t(0, 0, first, 0), {1, 2, count, t.extent(3)}, t.view().strides);
  };
  for (const auto& [first, count] : std::vector<std::pair<index_t, index_t>>{{0, 20}, {20, 0}, {20, 1}, {21, 29}}) {
    if (count == 0) {
      std::fill(part_lse.begin(), part_lse.end(), -INFINITY);
    } else {
      attention::forward(exec, q, keys(k, first, count), keys(v, first, count), attention::scores<>{}, part, part_lse);
    }
    attention::merge(exec, out, out_lse, part, part_lse);
  }
  for (index_t i = 0; i < all.size(); ++i) CHECK(out.data()[i] == Approx(all.data()[i]).margin(1e-13));
  for (index_t i = 0; i < lse.size(); ++i) CHECK(out_lse.data()[i] == Approx(lse.data()[i]).epsilon(1e-13));
}

TEST_CASE("decode refuses lengths and pages that are not there", "[attention][decode][bad input]") {
  mlkit::tensor<float, 3> q({2, 4, 8}), out({2, 4, 8});
  mlkit::tensor<float, 4> k({2, 2, 10, 8}), v({2, 2, 10, 8}), pages({6, 5, 2, 8});
  const mlkit::cpu exec;
  using Catch::Matchers::Contains;
  const auto lengths = [&](std::vector<int> l) { attention::decode(exec, q, attention::contiguous(k, v, l), out); };
  CHECK_THROWS_WITH(lengths({10, 11}),
                    "mlkit::value_error: attention::decode: cache.lengths[1] = 11 is outside [0, 10]");
  CHECK_THROWS_WITH(lengths({-1, 3}), Contains("cache.lengths[0] = -1 is outside [0, 10]"));
  CHECK_THROWS_WITH(lengths({1}), Contains("cache.lengths has 1 elements, but cache.k has 2"));
  const auto table = [&](std::vector<std::int32_t> t, std::vector<int> l) {
    attention::decode(exec, q,
                      attention::paged(pages, pages, mlkit::matrix_view<const std::int32_t>(t.data(), {2, 2}), l), out);
  };
  CHECK_THROWS_WITH(table({0, 1, 6, 0}, {10, 3}), Contains("cache.table[1, 0] = 6 is outside [0, 6)"));
  CHECK_THROWS_WITH(table({0, -2, 1, 0}, {6, 3}), Contains("cache.table[0, 1] = -2 is outside [0, 6)"));
  CHECK_NOTHROW(table({0, -2, 1, 9}, {5, 3}));  // a page that no entry needs is not looked at
  CHECK_THROWS_WITH(table({0, 1, 2, 3}, {11, 3}), Contains("cache.lengths[0] = 11 is outside [0, 10]"));
  mlkit::tensor<float, 3> q3({2, 3, 8}), out3({2, 3, 8});
  const std::vector<int> five{5, 5};
  CHECK_THROWS_WITH(attention::decode(exec, q3, attention::contiguous(k, v, five), out3),
                    Contains("q has 3 heads, which is no multiple of the cache's 2"));
  CHECK_THROWS_WITH(attention::decode(exec, q, attention::contiguous(k, v, five), q),
                    Contains("out [2, 4, 8] overlaps q [2, 4, 8]"));
  CHECK_THROWS_WITH(attention::decode(exec, q, attention::contiguous(k, v, five), out, {.scale = std::nan("")}),
                    Contains("scale = nan is not finite"));
}
