// Decoding against a cache, contiguous and in pages, and the merge of results, against loops in f64.
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <mlkit/attention.hpp>
#include <vector>

namespace attention = mlkit::attention;
using mlkit::index_t;

namespace {

template <class Tensor>
void fill(Tensor& t, std::uint64_t stream) {
  const mlkit::random_stream random{11, stream};
  using T = std::remove_cvref_t<decltype(*t.data())>;
  for (index_t i = 0; i < t.size(); ++i) t.data()[i] = static_cast<T>(random.normal(static_cast<std::uint64_t>(i)));
}

template <class T>
double worst_error(index_t group, index_t d, index_t d_v, double softcap, bool pages) {
  constexpr index_t batch = 4, kv_heads = 2, capacity = 1200, page = 48, table_width = capacity / page;
  const index_t heads = kv_heads * group;
  const std::vector<int> lengths{1200, 0, 1, 777};
  using A = mlkit::accumulator_t<T>;
  mlkit::tensor<T, 3> q({batch, heads, d}), out({batch, heads, d_v});
  mlkit::tensor<T, 4> k({batch, kv_heads, capacity, d}), v({batch, kv_heads, capacity, d_v});
  mlkit::matrix<A> lse({batch, heads});
  fill(q, 1), fill(k, 2), fill(v, 3);
  for (index_t b = 0; b < batch; ++b)  // what lies beyond a length is never read
    for (index_t h = 0; h < kv_heads; ++h)
      for (index_t j = lengths[static_cast<std::size_t>(b)]; j < capacity; ++j) {
        for (index_t c = 0; c < d; ++c) k(b, h, j, c) = static_cast<T>(std::nanf(""));
        for (index_t c = 0; c < d_v; ++c) v(b, h, j, c) = static_cast<T>(std::nanf(""));
      }
  if (pages) {
    mlkit::tensor<T, 4> kp({batch * table_width, page, kv_heads, d}), vp({batch * table_width, page, kv_heads, d_v});
    std::vector<std::int32_t> table(batch * table_width);
    for (index_t i = 0; i < batch * table_width; ++i)
      table[static_cast<std::size_t>(i)] = static_cast<std::int32_t>((i * 37 + 5) % (batch * table_width));
    for (index_t b = 0; b < batch; ++b)
      for (index_t j = 0; j < capacity; ++j)
        for (index_t h = 0; h < kv_heads; ++h) {
          const index_t in = table[static_cast<std::size_t>(b * table_width + j / page)];
          for (index_t c = 0; c < d; ++c) kp(in, j % page, h, c) = k(b, h, j, c);
          for (index_t c = 0; c < d_v; ++c) vp(in, j % page, h, c) = v(b, h, j, c);
        }
    const mlkit::matrix_view<const std::int32_t> view(table.data(), {batch, table_width});
    attention::decode(mlkit::cpu{}, q, attention::paged(kp, vp, view, lengths), out, {.softcap = softcap}, lse);
  } else {
    attention::decode(mlkit::cpu{}, q, attention::contiguous(k, v, lengths), out, {.softcap = softcap}, lse);
  }
  double worst = 0;
  for (index_t b = 0; b < batch; ++b)
    for (index_t h = 0; h < heads; ++h) {
      const index_t n = lengths[static_cast<std::size_t>(b)];
      std::vector<double> s(static_cast<std::size_t>(n)), o(static_cast<std::size_t>(d_v));
      double top = -INFINITY, total = 0;
      for (index_t j = 0; j < n; ++j) {
        double x = 0;
        for (index_t c = 0; c < d; ++c)
          x += static_cast<double>(q(b, h, c)) * static_cast<double>(k(b, h / group, j, c));
        x /= std::sqrt(static_cast<double>(d));
        if (softcap > 0) x = softcap * std::tanh(x / softcap);
        top = std::max(top, s[static_cast<std::size_t>(j)] = x);
      }
      for (index_t j = 0; j < n; ++j) {
        const double p = std::exp(s[static_cast<std::size_t>(j)] - top);
        total += p;
        for (index_t c = 0; c < d_v; ++c)
          o[static_cast<std::size_t>(c)] += p * static_cast<double>(v(b, h / group, j, c));
      }
      for (index_t c = 0; c < d_v; ++c) {
        const double want = n == 0 ? 0 : o[static_cast<std::size_t>(c)] / total,
                     have = static_cast<double>(out(b, h, c));
        worst = std::isfinite(have) ? std::max(worst, std::fabs(want - have)) : INFINITY;
      }
      if (n == 0) {
        CHECK(lse(b, h) == -INFINITY);
      } else {
        worst = std::max(worst, std::fabs(top + std::log(total) - static_cast<double>(lse(b, h))));
      }
    }
  return worst;
}

}  // namespace

TEST_CASE("decode over a cache, contiguous and in pages", "[attention][decode]") {
  for (const bool pages : {false, true})
    for (const index_t group : {1, 2, 3, 7}) {
      INFO("pages " << pages << ", " << group << " heads to a kv head");
      CHECK(worst_error<double>(group, 24, 9, 0, pages) < 1e-12);
      CHECK(worst_error<float>(group, 128, 80, 0, pages) < 3e-6);
    }
  CHECK(worst_error<double>(4, 5, 130, 1.5, true) < 1e-12);
  CHECK(worst_error<mlkit::bf16>(4, 64, 64, 0, true) < 2e-2);
  CHECK(worst_error<mlkit::f16>(4, 64, 40, 0, false) < 3e-3);
}

TEST_CASE("decode gives the same bits for any number of threads", "[attention][decode]") {
  mlkit::tensor<float, 3> q({2, 8, 64}), out({2, 8, 64}), again({2, 8, 64});
  mlkit::tensor<float, 4> k({2, 2, 3000, 64}), v({2, 2, 3000, 64});
  fill(q, 1), fill(k, 2), fill(v, 3);
  const std::vector<std::int64_t> lengths{3000, 1999};
  const attention::contiguous cache(k, v, lengths);
  attention::decode(mlkit::cpu{.threads = 1}, q, cache, out);
  for (const int threads : {2, 5}) {
    attention::decode(mlkit::cpu{.threads = threads}, q, cache, again);
    CHECK(std::memcmp(out.data(), again.data(), static_cast<std::size_t>(out.size()) * sizeof(float)) == 0);
  }
}

TEST_CASE("attention over parts of the keys merges to attention over all", "[attention][decode]") {
  mlkit::tensor<double, 4> q({1, 2, 9, 6}), k({1, 2, 50, 6}), v({1, 2, 50, 4}), all({1, 2, 9, 4}), out({1, 2, 9, 4}),
      part({1, 2, 9, 4});
  mlkit::tensor<double, 3> lse({1, 2, 9}), out_lse({1, 2, 9}), part_lse({1, 2, 9});
  fill(q, 1), fill(k, 2), fill(v, 3);
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
