// Appending to caches, contiguous and in pages, in floating point and in int8, and decoding what was appended.
#include "reference.hpp"

namespace attention = mlkit::attention;
using namespace attention_reference;

namespace {

constexpr index_t batch = 3, heads = 2, group = 2, capacity = 40, page = 8, d = 19, d_v = 6;

// softmax(q k^T / sqrt(d)) v for the first n of given entries, in loops whose sums are of type Sum.
template <class Sum, class Q, class K, class V>
std::vector<double> attended(const Q& q, const K& k, const V& v, const std::vector<index_t>& lengths) {
  std::vector<double> all;
  for (index_t b = 0; b < batch; ++b)
    for (index_t h = 0; h < heads * group; ++h) {
      std::vector<Sum> o(d_v);
      Sum total = 0;
      for (index_t j = 0; j < lengths[static_cast<std::size_t>(b)]; ++j) {
        Sum x = 0;
        for (index_t c = 0; c < d; ++c) x += static_cast<Sum>(q(b, h, c)) * static_cast<Sum>(k(b, h / group, j, c));
        const Sum p = std::exp(x / std::sqrt(static_cast<Sum>(d)));
        total += p;
        for (index_t c = 0; c < d_v; ++c) o[static_cast<std::size_t>(c)] += p * static_cast<Sum>(v(b, h / group, j, c));
      }
      for (const Sum x : o) all.push_back(total == 0 ? 0 : static_cast<double>(x / total));
    }
  return all;
}

// The error of decode in f32 over given entries is at most twice that of loops in f32.
template <class Cache, class K, class V>
void check_decode(const Cache& cache, const K& k, const V& v, const std::vector<index_t>& lengths) {
  mlkit::tensor<float, 3> q({batch, heads * group, d}), out({batch, heads * group, d_v});
  fill<float>(q, 9);
  attention::decode(mlkit::cpu{}, q, cache, out);
  const std::vector<double> want = attended<double>(q, k, v, lengths), loops = attended<float>(q, k, v, lengths);
  double ours = 0, theirs = 0, size = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    ours = std::max(ours, std::fabs(want[i] - static_cast<double>(out.data()[i])));
    theirs = std::max(theirs, std::fabs(want[i] - loops[i]));
    size = std::max(size, std::fabs(want[i]));
  }
  CHECK(ours <= 2 * theirs + 0x1p-24 * size);
}

// Appends 5, then 1, then 9 entries to sequences that begin with 0, 3 and 17; kept[b, h, j] is what they are. `stored`
// gives an element of the cache, as a number.
template <class Cache, class Stored>
void append_and_check(Cache&& cache, Stored&& stored, double tolerance) {
  std::vector<index_t> lengths;
  mlkit::tensor<double, 4> k({batch, heads, capacity, d}), v({batch, heads, capacity, d_v});
  for (index_t b = 0; b < batch; ++b) {
    lengths.push_back(cache.length(b));
    for (index_t h = 0; h < heads; ++h)
      for (index_t j = 0; j < cache.length(b); ++j) {
        for (index_t c = 0; c < d; ++c) k(b, h, j, c) = stored(true, b, h, j, c);
        for (index_t c = 0; c < d_v; ++c) v(b, h, j, c) = stored(false, b, h, j, c);
      }
  }
  for (const index_t n : {5, 1, 9}) {
    mlkit::tensor<float, 4> more_k({batch, heads, n, d}), more_v({batch, heads, n, d_v});
    fill<float>(more_k, static_cast<std::uint64_t>(n)), fill<float>(more_v, static_cast<std::uint64_t>(n + 100));
    attention::append(mlkit::cpu{}, more_k, more_v, cache);
    double worst = 0;
    for (index_t b = 0; b < batch; ++b)
      for (index_t h = 0; h < heads; ++h)
        for (index_t i = 0; i < n; ++i) {
          const index_t j = lengths[static_cast<std::size_t>(b)] + i;
          for (index_t c = 0; c < d; ++c) {
            k(b, h, j, c) = stored(true, b, h, j, c);
            worst = std::max(worst, std::fabs(k(b, h, j, c) - static_cast<double>(more_k(b, h, i, c))));
          }
          for (index_t c = 0; c < d_v; ++c) {
            v(b, h, j, c) = stored(false, b, h, j, c);
            worst = std::max(worst, std::fabs(v(b, h, j, c) - static_cast<double>(more_v(b, h, i, c))));
          }
        }
    CHECK(worst <= tolerance);
    for (index_t b = 0; b < batch; ++b) CHECK(cache.length(b) == (lengths[static_cast<std::size_t>(b)] += n));
  }
  check_decode(cache, k, v, lengths);
}

template <class T>
struct memory {
  std::vector<T> k, v;
  std::vector<float> k_scales, v_scales;
  std::vector<std::int32_t> lengths{0, 3, 17}, table;
  explicit memory(index_t entries)
      : k(static_cast<std::size_t>(entries * d)),
        v(static_cast<std::size_t>(entries * d_v)),
        k_scales(static_cast<std::size_t>(entries), 0.01f),
        v_scales(static_cast<std::size_t>(entries), 0.02f) {
    for (std::size_t i = 0; i < k.size(); ++i) k[i] = static_cast<T>(static_cast<float>(i % 7));
    for (std::size_t i = 0; i < v.size(); ++i) v[i] = static_cast<T>(static_cast<float>(i % 5));
    for (int i = 0; i < batch * capacity / page; ++i)
      table.push_back((i * 4 + 3) % static_cast<int>(batch * capacity / page));
  }
  auto tensor(std::vector<T>& x, const mlkit::extents_t<3>& shape, index_t columns) {
    return mlkit::tensor_view<T, 4>(x.data(), {shape[0], shape[1], shape[2], columns});
  }
};

template <class T>
void check_dtype(double tolerance) {
  constexpr bool int8 = std::is_same_v<T, std::int8_t>;
  INFO("bytes " << sizeof(T));
  {
    memory<T> m(batch * heads * capacity);
    const mlkit::extents_t<3> shape{batch, heads, capacity};
    const auto k = m.tensor(m.k, shape, d), v = m.tensor(m.v, shape, d_v);
    const mlkit::tensor_view<float, 3> ks(m.k_scales.data(), shape), vs(m.v_scales.data(), shape);
    const auto stored = [&](bool key, index_t b, index_t h, index_t j, index_t c) {
      const double scale = int8 ? static_cast<double>((key ? ks : vs)(b, h, j)) : 1.0;
      return scale * static_cast<double>((key ? k : v)(b, h, j, c));
    };
    if constexpr (int8)
      append_and_check(attention::contiguous(k, v, m.lengths, ks, vs), stored, tolerance);
    else
      append_and_check(attention::contiguous(k, v, m.lengths), stored, tolerance);
  }
  {
    memory<T> m(batch * heads * capacity);
    const mlkit::extents_t<3> shape{batch * capacity / page, page, heads};
    const auto k = m.tensor(m.k, shape, d), v = m.tensor(m.v, shape, d_v);
    const mlkit::tensor_view<float, 3> ks(m.k_scales.data(), shape), vs(m.v_scales.data(), shape);
    const mlkit::matrix_view<const std::int32_t> table(m.table.data(), {batch, capacity / page});
    const auto stored = [&](bool key, index_t b, index_t h, index_t j, index_t c) {
      const index_t in = table(b, j / page), at = j % page;
      const double scale = int8 ? static_cast<double>((key ? ks : vs)(in, at, h)) : 1.0;
      return scale * static_cast<double>((key ? k : v)(in, at, h, c));
    };
    if constexpr (int8)
      append_and_check(attention::paged(k, v, table, m.lengths, ks, vs), stored, tolerance);
    else
      append_and_check(attention::paged(k, v, table, m.lengths), stored, tolerance);
  }
}

}  // namespace

TEST_CASE("append converts, and decode sees what was appended", "[attention][cache]") {
  check_dtype<float>(0);
  check_dtype<mlkit::bf16>(4.5 / 256);
  check_dtype<mlkit::f16>(4.5 / 2048);
  check_dtype<std::int8_t>(4.5 / 127 / 2);
}

TEST_CASE("an entry that is zero, or not finite, or next to zero, in int8", "[attention][cache]") {
  mlkit::tensor<float, 4> k({1, 1, 4, d}), v({1, 1, 4, d_v});
  fill<float>(v, 1);
  k(0, 0, 1, 4) = INFINITY;
  k(0, 0, 2, 0) = -254;
  k(0, 0, 3, 0) = 1e-38f;  // 127 / 1e-38 is no float
  memory<std::int8_t> m(capacity);
  m.lengths = {0};
  const mlkit::extents_t<3> shape{1, 1, capacity};
  const mlkit::tensor_view<float, 3> ks(m.k_scales.data(), shape), vs(m.v_scales.data(), shape);
  attention::append(mlkit::cpu{}, k, v,
                    attention::contiguous(m.tensor(m.k, shape, d), m.tensor(m.v, shape, d_v), m.lengths, ks, vs));
  CHECK(ks(0, 0, 0) == 0);
  CHECK(std::isnan(ks(0, 0, 1) * static_cast<float>(m.k[d])));
  CHECK(ks(0, 0, 2) == 2);
  CHECK(m.k[2 * d] == -127);
  CHECK(ks(0, 0, 3) == 0);
}

TEST_CASE("what cannot be appended is refused, and nothing is written", "[attention][cache][bad input]") {
  using Catch::Matchers::Contains;
  memory<float> m(batch * heads * capacity);
  const mlkit::extents_t<3> shape{batch * capacity / page, page, heads};
  const auto k = m.tensor(m.k, shape, d), v = m.tensor(m.v, shape, d_v);
  const mlkit::matrix_view<const std::int32_t> table(m.table.data(), {batch, capacity / page});
  const attention::paged cache(k, v, table, m.lengths);
  const std::vector<float> before = m.k;
  const auto call = [&](index_t b, index_t h, index_t n, index_t columns) {
    mlkit::tensor<float, 4> x({b, h, n, columns}), y({b, h, n, d_v});
    attention::append(mlkit::cpu{}, x, y, cache);
  };
  CHECK_THROWS_WITH(call(batch, heads, 24, d),
                    "mlkit::value_error: attention::append: k has 24 entries, but sequence "
                    "2 has room for 23 more after 17");
  CHECK_THROWS_WITH(call(2, heads, 1, d), Contains("k has 2 batches, but cache has 3"));
  CHECK_THROWS_WITH(call(batch, 4, 1, d), Contains("k has 4 heads, but cache has 2"));
  CHECK_THROWS_WITH(call(batch, heads, 1, 5), Contains("k has 5 columns, but cache has 19"));
  CHECK(m.k == before);
  CHECK(m.lengths[0] == 0);
  m.table[2 * capacity / page + 3] = 99;
  CHECK_NOTHROW(call(batch, heads, 7, d));
  CHECK_THROWS_WITH(call(batch, heads, 1, d), Contains("cache.table[2, 3] = 99 is outside [0, 15)"));
  m.lengths[1] = -1;
  CHECK_THROWS_WITH(call(batch, heads, 1, d), Contains("cache.lengths[1] = -1 is outside [0, 40]"));
  m.lengths[1] = 3;
  m.table[2 * capacity / page + 3] = 1;
  mlkit::tensor<float, 4> y({batch, heads, 1, d_v});
  CHECK_THROWS_WITH(
      attention::append(mlkit::cpu{}, mlkit::tensor_view<float, 4>(m.k.data(), {batch, heads, 1, d}), y, cache),
      Contains("overlaps"));
  CHECK(m.lengths[0] == 7);

  // More than the lengths' type counts to.
  mlkit::tensor<float, 4> many_k({1, 1, 300, 2}), many_v({1, 1, 300, 2}), more({1, 1, 10, 2});
  std::vector<std::uint8_t> narrow{250};
  CHECK_THROWS_WITH(attention::append(mlkit::cpu{}, more, more, attention::contiguous(many_k, many_v, narrow)),
                    "mlkit::value_error: attention::append: sequence 0 would have 260 entries, which the type of "
                    "cache.lengths does not hold");
  CHECK(narrow[0] == 250);
}

TEST_CASE("scales of int8 that do not fit are refused, and nothing is written", "[attention][cache][bad input]") {
  memory<std::int8_t> m(batch * heads * capacity);
  const std::vector<std::int8_t> k_before = m.k, v_before = m.v;
  const std::vector<std::int32_t> lengths_before = m.lengths;
  const mlkit::matrix_view<const std::int32_t> table(m.table.data(), {batch, capacity / page});
  mlkit::tensor<float, 3> q({batch, heads * group, d}), out({batch, heads * group, d_v});
  mlkit::tensor<float, 4> x({batch, heads, 1, d}), y({batch, heads, 1, d_v});
  std::fill(out.begin(), out.end(), 12345.0f);
  using extents = mlkit::extents_t<3>;
  using scales = mlkit::tensor_view<float, 3>;
  const auto contiguous = [&](const scales& ks, const scales& vs) {
    const extents of{batch, heads, capacity};
    return attention::contiguous(m.tensor(m.k, of, d), m.tensor(m.v, of, d_v), m.lengths, ks, vs);
  };
  const auto paged = [&](const scales& ks, const scales& vs) {
    const extents of{batch * capacity / page, page, heads};
    return attention::paged(m.tensor(m.k, of, d), m.tensor(m.v, of, d_v), table, m.lengths, ks, vs);
  };
  const auto decode_says = [&](const auto& cache, const std::string& words) {
    CHECK_THROWS_WITH(attention::decode(mlkit::cpu{}, q, cache, out), "mlkit::" + words);
  };
  const auto append_says = [&](const auto& cache, const std::string& words) {
    CHECK_THROWS_WITH(attention::append(mlkit::cpu{}, x, y, cache), "mlkit::" + words);
  };
  const auto both_say = [&](const auto& cache, const std::string& kind, const std::string& words) {
    decode_says(cache, kind + "_error: attention::decode: " + words);
    append_says(cache, kind + "_error: attention::append: " + words);
  };
  const auto of_k = [&](const extents& e) { return scales(m.k_scales.data(), e); };
  const auto of_v = [&](const extents& e) { return scales(m.v_scales.data(), e); };

  const extents fit{batch, heads, capacity};
  const auto k_refused = [&](const extents& e, const std::string& words) {
    both_say(contiguous(of_k(e), of_v(fit)), "shape", "cache.k_scales has " + words);
  };
  k_refused({2, heads, capacity}, "2 batches, but cache.k has 3");
  k_refused({batch, 1, capacity}, "1 heads, but cache.k has 2");
  k_refused({batch, heads, 39}, "39 entries, but cache.k has 40");
  k_refused({0, 0, 0}, "0 batches, but cache.k has 3");
  const auto v_refused = [&](const extents& e, const std::string& words) {
    both_say(contiguous(of_k(fit), of_v(e)), "shape", "cache.v_scales has " + words);
  };
  v_refused({2, heads, capacity}, "2 batches, but cache.k has 3");
  v_refused({batch, 1, capacity}, "1 heads, but cache.k has 2");
  v_refused({batch, heads, 39}, "39 entries, but cache.k has 40");
  both_say(contiguous(scales(nullptr, fit), of_v(fit)), "value", "cache.k_scales is null, but has shape [3, 2, 40]");
  both_say(contiguous(of_k(fit), scales(nullptr, fit)), "value", "cache.v_scales is null, but has shape [3, 2, 40]");

  const extents pages{batch * capacity / page, page, heads};
  const auto pages_refused = [&](const extents& e, const std::string& words) {
    both_say(paged(of_k(e), of_v(pages)), "shape", "cache.k_scales has " + words);
    both_say(paged(of_k(pages), of_v(e)), "shape", "cache.v_scales has " + words);
  };
  pages_refused({14, page, heads}, "14 pages, but cache.k has 15");
  pages_refused({15, 7, heads}, "7 entries to a page, but cache.k has 8");
  pages_refused({15, page, 1}, "1 heads, but cache.k has 2");

  const scales on_out(out.data() + 8, {batch, heads, capacity}, {0, 0, 1});
  decode_says(contiguous(on_out, of_v(fit)),
              "shape_error: attention::decode: out [3, 4, 6] overlaps cache.k_scales [3, 2, 40]");
  decode_says(contiguous(of_k(fit), on_out),
              "shape_error: attention::decode: out [3, 4, 6] overlaps cache.v_scales [3, 2, 40]");
  append_says(contiguous(of_k(fit), of_k(fit)),
              "shape_error: attention::append: cache.v_scales [3, 2, 40] overlaps cache.k_scales [3, 2, 40]");
  append_says(contiguous(scales(x.data(), fit, {38, 19, 0}), of_v(fit)),
              "shape_error: attention::append: cache.k_scales of shape [3, 2, 40] has overlapping strides [38, 19, 0]");
  append_says(contiguous(of_k(fit), scales(m.v_scales.data(), fit, {80, 0, 1})),
              "shape_error: attention::append: cache.v_scales of shape [3, 2, 40] has overlapping strides [80, 0, 1]");
  CHECK((m.k == k_before && m.v == v_before && m.lengths == lengths_before));
  CHECK(std::count(m.k_scales.begin(), m.k_scales.end(), 0.01f) == batch * heads * capacity);
  CHECK(std::count(m.v_scales.begin(), m.v_scales.end(), 0.02f) == batch * heads * capacity);
  CHECK(std::count(out.begin(), out.end(), 12345.0f) == out.size());
}
