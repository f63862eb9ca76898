// Maps that forward writes, against those of loops.
#include "naive_maps.hpp"

namespace attention = mlkit::attention;
using namespace attention_reference;
using mlkit::cpu;
using mlkit::tensor;
using mlkit::tensor_view;

namespace {

constexpr float poison = 12345;

// Every kind of map of one problem, after calls into memory that holds NaN.
template <class T, class M = T>
struct all_maps {
  std::vector<std::int32_t> few;
  std::vector<std::int32_t> own;  // [batch, 2]
  tensor<M, 4> heads, few_heads;
  tensor<M, 3> mean, few_mean, own_mean, alone;

  template <class... Stages>
  all_maps(problem<T>& p, const attention::scores<Stages...>& pipeline, const cpu& exec = {})
      : few{static_cast<std::int32_t>(p.keys - 1), 0, static_cast<std::int32_t>(p.keys / 2)},
        heads({p.batch, p.heads, p.queries, p.keys}),
        few_heads({p.batch, p.heads, p.queries, 3}),
        mean({p.batch, p.queries, p.keys}),
        few_mean({p.batch, p.queries, 3}),
        own_mean({p.batch, p.queries, 2}),
        alone({p.batch, p.queries, p.keys}) {
    for (index_t b = 0; b < p.batch; ++b) {
      own.push_back(static_cast<std::int32_t>((b + 1) % p.keys));
      own.push_back(static_cast<std::int32_t>((7 * b + 3) % p.keys));
    }
    const mlkit::matrix_view<const std::int32_t> of_each(own.data(), {p.batch, 2});
    const auto spoil = [](auto&... t) { (std::fill(t.begin(), t.end(), static_cast<M>(std::nanf(""))), ...); };
    spoil(heads, few_heads, mean, few_mean, own_mean, alone);
    tensor<T, 4> plain(p.out.extents());
    attention::forward(exec, p.q, p.k, p.v, pipeline, plain);
    const auto out = [&](const auto& map) {
      std::fill(p.out.begin(), p.out.end(), static_cast<T>(std::nanf("")));
      attention::forward(exec, p.q, p.k, p.v, pipeline, p.out, map);
      // What attention gives is the same to the bit.
      REQUIRE(std::memcmp(p.out.data(), plain.data(), static_cast<std::size_t>(plain.size()) * sizeof(T)) == 0);
    };
    out(attention::head_maps{heads});
    out(attention::head_maps{few_heads, few});
    out(attention::averaged_map{mean});
    out(attention::averaged_map{few_mean, few});
    out(attention::averaged_map{own_mean, of_each});
    attention::maps(exec, p.q, p.k, pipeline, attention::averaged_map{alone});
  }

  // The largest difference to what it should be.
  double error(stored_maps want) const {
    double most = 0;
    const auto see = [&](double x, M have) {
      const double e = std::fabs(x - static_cast<double>(have));
      most = e <= most ? most : std::isnan(e) ? inf : e;
    };
    for (index_t b = 0; b < want.batch; ++b)
      for (index_t i = 0; i < want.queries; ++i) {
        for (index_t j = 0; j < want.keys; ++j) {
          for (index_t h = 0; h < want.heads; ++h) see(want(b, h, i, j), heads(b, h, i, j));
          see(want.mean(b, i, j), mean(b, i, j));
          see(want.mean(b, i, j), alone(b, i, j));
        }
        for (index_t c = 0; c < 3; ++c) {
          const index_t j = few[static_cast<std::size_t>(c)];
          for (index_t h = 0; h < want.heads; ++h) see(want(b, h, i, j), few_heads(b, h, i, c));
          see(want.mean(b, i, j), few_mean(b, i, c));
        }
        for (index_t c = 0; c < 2; ++c)
          see(want.mean(b, i, own[static_cast<std::size_t>(2 * b + c)]), own_mean(b, i, c));
      }
    return most;
  }
  bool same(const all_maps& other) const {
    const auto equal = [](const auto& x, const auto& y) {
      return std::memcmp(x.data(), y.data(), static_cast<std::size_t>(x.size()) * sizeof(M)) == 0;
    };
    return equal(heads, other.heads) && equal(few_heads, other.few_heads) && equal(mean, other.mean) &&
           equal(few_mean, other.few_mean) && equal(own_mean, other.own_mean) && equal(alone, other.alone);
  }
};

template <class... Stages>
double error(problem<double>& p, const attention::scores<Stages...>& pipeline, const meaning& m) {
  return all_maps<double>(p, pipeline).error(naive_maps<double, double>(p.q, p.k, m));
}

}  // namespace

TEST_CASE("maps of heads, their means and chosen keys, over sizes of every kind", "[attention][maps]") {
  for (const auto& [batch, heads, kv, n, m, d] : std::vector<std::array<index_t, 6>>{{1, 1, 1, 1, 1, 1},
                                                                                     {2, 3, 3, 70, 77, 5},
                                                                                     {3, 4, 2, 17, 23, 40},
                                                                                     {1, 2, 1, 130, 241, 3},
                                                                                     {2, 1, 1, 65, 500, 7},
                                                                                     {1, 5, 1, 600, 24, 2},
                                                                                     {1, 2, 2, 9, 4500, 1}}) {
    problem<double> p(batch, heads, kv, n, m, d, 3);
    INFO(heads << " heads, " << n << " queries, " << m << " keys");
    CHECK(error(p, attention::scores<>{}, scaled(1 / std::sqrt(static_cast<double>(d)))) < tight);
  }
}

TEST_CASE("maps where masks hide blocks, rows and sequences", "[attention][maps]") {
  problem<double> p(3, 4, 2, 150, 700, 5, 7);
  const std::vector<int> lengths{700, 0, 333};
  for (index_t b = 0; b < 3; ++b)
    for (index_t j = lengths[static_cast<std::size_t>(b)]; j < 700; ++j)
      for (index_t h = 0; h < 2; ++h) std::fill_n(&p.k(b, h, j, 0), 5, std::nan(""));
  // Queries beyond the hundredth see nothing, others see one block of keys and a part of the next.
  const attention::window few{.left = 30, .right = 20, .alignment = attention::align::top_left};
  const attention::scores pipeline{attention::scale{2}, few, attention::key_lengths{lengths}};
  const auto sees = [&](index_t left, index_t right, index_t shift) {
    return masked(2, [=, &lengths](index_t b, index_t, index_t i, index_t j) {
      return j < lengths[static_cast<std::size_t>(b)] && j >= i + shift - left && j <= i + shift + right;
    });
  };
  CHECK(error(p, pipeline, sees(30, 20, 0)) < tight);
  // The first queries see keys that are not there.
  CHECK(error(p,
              attention::scores{attention::scale{2}, attention::window{10, 5, attention::align::bottom_right},
                                attention::key_lengths{lengths}},
              sees(10, 5, 550)) < tight);
}

TEST_CASE("maps behind every stage: sinks have their part, dropout is in them", "[attention][maps]") {
  problem<double> p(2, 4, 2, 70, 263, 5, 7);
  tensor<double, 4> bias({2, 1, 70, 263});
  mlkit::vector<double> slopes({4}), logits({4});
  fill<double>(bias, 11), fill<double>(logits, 12);
  for (index_t h = 0; h < 4; ++h) slopes(h) = 0.02 * static_cast<double>(h + 1);
  std::vector<std::uint8_t> bits(70 * 263);
  const mlkit::random_stream random{3, 4}, drops{5, 6};
  for (std::size_t i = 0; i < bits.size(); ++i) bits[i] = i / 263 != 9 && random.bits(i) % 3 != 0;
  const mlkit::matrix_view<const std::uint8_t> mask(bits.data(), {70, 263});
  meaning m;
  m.score = [&](double x, index_t b, index_t h, index_t i, index_t j) {
    const double s = 3 * std::tanh(0.7 * x / 3) - slopes(h) * std::fabs(static_cast<double>(i + 193 - j));
    return mask(i, j) ? s + bias(b, 0, i, j) : -inf;
  };
  m.sink = [&](index_t h) { return logits(h); };
  m.factor = [&](index_t b, index_t h, index_t i, index_t j) {
    const auto block = (static_cast<std::uint64_t>(b * 4 + h) << 40) + static_cast<std::uint64_t>(i * 66 + j / 4);
    return drops.block(block)[static_cast<std::size_t>(j % 4)] < static_cast<std::uint32_t>(0.3 * 0x1p32) ? 0.0
                                                                                                          : 1 / 0.7;
  };
  CHECK(error(p,
              attention::scores{attention::scale{0.7}, attention::softcap{3}, attention::alibi{slopes},
                                attention::bias{bias}, attention::boolean_mask{mask}, attention::sinks{logits},
                                attention::dropout{.p = 0.3, .seed = 5, .stream = 6}},
              m) < tight);
}

TEST_CASE("maps of scores that rise and fall from block to block", "[attention][maps]") {
  problem<double> p(1, 3, 3, 70, 1300, 4, 3);
  for (index_t j = 0; j < 1300; ++j)
    for (index_t h = 0; h < 3; ++h)
      for (index_t c = 0; c < 4; ++c) p.k(0, h, j, c) *= 40 * std::sin(static_cast<double>(j) / 200);
  for (const double scale : {1.0, -1.0, 0.0})
    CHECK(error(p, attention::scores{attention::scale{scale}}, scaled(scale)) < tight);
}

TEMPLATE_TEST_CASE("the error of a map is at most twice that of loops in the same dtype", "[attention][maps]", float,
                   mlkit::bf16, mlkit::f16) {
  using T = TestType;
  // Over all shapes: errors of single probabilities are those of their scores' sums, which are a matter of luck.
  double ours = 0, wide = 0, loops = 0, size = 0;
  for (const auto& [n, m, d] : std::vector<std::array<index_t, 3>>{{70, 77, 40}, {129, 241, 64}, {33, 700, 80}}) {
    problem<T> p(2, 4, 2, n, m, d, 5);
    const double scale = 1 / std::sqrt(static_cast<double>(d));
    const index_t shift = m - n;
    const auto meant = masked(scale, [=](index_t, index_t, index_t i, index_t j) { return j <= i + shift; });
    const attention::scores pipeline{attention::scale{scale}, attention::causal{attention::align::bottom_right}};
    const stored_maps want = naive_maps<double, double>(p.q, p.k, meant);
    const stored_maps same_dtype = naive_maps<float, T>(p.q, p.k, meant);
    for (std::size_t i = 0; i < want.of.size(); ++i) {
      loops = std::max(loops, std::fabs(want.of[i] - same_dtype.of[i]));
      size = std::max(size, want.of[i]);
    }
    ours = std::max(ours, all_maps<T>(p, pipeline).error(want));
    wide = std::max(wide, all_maps<T, float>(p, pipeline).error(want));
  }
  CHECK(ours <= 2 * loops + rounding<T> * size);
  // Maps may be wider than what they are of; then they are not rounded.
  CHECK(wide <= 2 * loops);
  if (!std::is_same_v<T, float>) CHECK(wide < 0.01 * loops);
}

TEST_CASE("maps have the same bits for any number of threads, and alone or in a batch", "[attention][maps]") {
  problem<float> p(3, 4, 2, 700, 310, 16, 8);
  const attention::scores pipeline{attention::scale{0.25}, attention::causal{attention::align::top_left}};
  const all_maps<float> one(p, pipeline, cpu{.threads = 1});
  for (const int threads : {2, 3, 8}) CHECK(all_maps<float>(p, pipeline, cpu{.threads = threads}).same(one));
  // The second sequence by itself.
  const auto part = [](const auto& t) {
    return tensor_view<const float, 4>(&t(1, 0, 0, 0), {1, t.extent(1), t.extent(2), t.extent(3)});
  };
  tensor<float, 3> alone({1, 700, 310});
  attention::maps(cpu{}, part(p.q), part(p.k), pipeline, attention::averaged_map{alone});
  CHECK(std::memcmp(alone.data(), &one.mean(1, 0, 0), 700 * 310 * sizeof(float)) == 0);
}

TEST_CASE("maps of any strides, and nothing around them is touched", "[attention][maps]") {
  problem<float> p(2, 3, 3, 70, 250, 8, 4);
  const all_maps<float> want(p, attention::scores<>{});
  // Keys before queries, in every other element, and rows that are farther apart than they are long.
  std::vector<float> turned(2 * 250 * 70 * 2, poison), spread(2 * 70 * 260, poison), halves(2 * 3 * 70 * 3 * 2, poison);
  const tensor_view<float, 3> by_key(turned.data(), {2, 70, 250}, {250 * 140, 2, 140});
  const tensor_view<float, 3> by_query(spread.data(), {2, 70, 250}, {70 * 260, 260, 1});
  attention::maps(cpu{}, p.q, p.k, attention::scores<>{}, attention::averaged_map{by_key});
  attention::maps(cpu{}, p.q, p.k, attention::scores<>{}, attention::averaged_map{by_query});
  const tensor_view<float, 4> of_heads(halves.data(), {2, 3, 70, 3}, {3 * 70 * 6, 70 * 6, 6, 2});
  attention::maps(cpu{}, p.q, p.k, attention::scores<>{}, attention::head_maps{of_heads, want.few});
  bool same = true;
  for (index_t b = 0; b < 2; ++b)
    for (index_t i = 0; i < 70; ++i) {
      for (index_t j = 0; j < 250; ++j)
        same = same && by_key(b, i, j) == want.mean(b, i, j) && by_query(b, i, j) == want.mean(b, i, j);
      for (index_t h = 0; h < 3; ++h)
        for (index_t c = 0; c < 3; ++c) same = same && of_heads(b, h, i, c) == want.few_heads(b, h, i, c);
    }
  CHECK(same);
  const auto touched = [](const std::vector<float>& x) {
    return std::count_if(x.begin(), x.end(), [](float e) { return e != poison; });
  };
  CHECK(touched(turned) == 2 * 250 * 70);
  CHECK(touched(spread) == 2 * 70 * 250);
  CHECK(touched(halves) == 2 * 3 * 70 * 3);
}

TEST_CASE("maps of nothing", "[attention][maps]") {
  const auto call = [](index_t batch, index_t heads, index_t queries, index_t keys, index_t d) {
    problem<float> p(batch, heads, heads, queries, keys, d, 2);
    tensor<float, 3> mean({batch, queries, keys}), none({batch, queries, 0});
    std::fill(mean.begin(), mean.end(), poison);
    attention::forward(cpu{}, p.q, p.k, p.v, attention::scores<>{}, p.out, attention::averaged_map{mean});
    attention::maps(cpu{}, p.q, p.k, attention::scores<>{}, attention::averaged_map{none, std::vector<std::int32_t>{}});
    return mean;
  };
  for (const float x : call(2, 0, 3, 4, 5)) CHECK(x == 0);  // the mean of no head
  for (const float x : call(2, 3, 5, 4, 0)) CHECK(x == Approx(0.25));
  CHECK(call(0, 3, 5, 4, 2).size() == 0);
  CHECK(call(2, 3, 0, 4, 2).size() == 0);
  CHECK(call(2, 3, 5, 0, 2).size() == 0);
}

TEST_CASE("a thread keeps some rows of a map, not all of it", "[attention][maps]") {
  const auto peak = [](index_t queries, bool chosen) {
    tensor<float, 4> q({1, 4, queries, 8}), k({1, 4, 2000, 8});
    tensor<float, 3> map({1, queries, 2000}), words({1, queries, 2});
    const std::vector<std::int32_t> keys{0, 1999};
    mlkit::reset_workspace_peak();
    if (chosen)
      attention::maps(cpu{.threads = 1}, q, k, attention::scores<>{}, attention::averaged_map{words, keys});
    else
      attention::maps(cpu{.threads = 1}, q, k, attention::scores<>{}, attention::averaged_map{map});
    return mlkit::workspace_peak_bytes();
  };
  CHECK(peak(1024, false) == peak(8192, false));
  CHECK(peak(1024, true) == peak(8192, true));
  CHECK(peak(8192, true) < 3 << 19);
}

TEST_CASE("a map of every key needs no more besides than a head's keys and values, and a few rows",
          "[attention][maps]") {
  constexpr index_t keys = 16384, d = 64, rows_at_once = 64;
  tensor<float, 4> q({1, 1, 128, d}), k({1, 1, keys, d}), v({1, 1, keys, d}), out({1, 1, 128, d}),
      map({1, 1, 128, keys});
  mlkit::reset_workspace_peak();
  attention::forward(cpu{.threads = 1}, q, k, v, attention::scores<>{}, out, attention::head_maps{map});
  constexpr index_t floats = 2 * keys * (d + d) + keys * rows_at_once;
  CHECK(mlkit::workspace_peak_bytes() < floats * index_t{sizeof(float)} + (4 << 20));
}

TEST_CASE("maps that do not fit are refused, and nothing is written", "[attention][maps][bad input]") {
  const std::vector<float> numbers(4096, 0.5f);
  std::vector<float> written(8192, poison);
  const auto in = [&](const mlkit::extents_t<4>& e) { return tensor_view<const float, 4>(numbers.data(), e); };
  const mlkit::extents_t<4> q{2, 4, 6, 5}, k{2, 2, 7, 5}, v{2, 2, 7, 3};
  const tensor_view<float, 4> out(written.data(), {2, 4, 6, 3});
  const auto said = [&](const auto& map) {
    std::string text = "no error";
    try {
      attention::forward(cpu{}, in(q), in(k), in(v), attention::scores<>{}, out, map);
    } catch (const mlkit::error& e) {
      text = e.what();
    }
    try {
      attention::maps(cpu{}, in(q), in(k), attention::scores<>{}, map);
    } catch (const mlkit::error& e) {
      // The same words.
      const std::string also = e.what(), forward = "attention::forward", maps = "attention::maps";
      CHECK(std::string(text).replace(text.find(forward), forward.size(), maps) == also);
    }
    CHECK(std::all_of(written.begin(), written.end(), [](float x) { return x == poison; }));
    return text;
  };
  const auto mean = [&](const mlkit::extents_t<3>& e, const attention::detail::map_keys& keys = {}) {
    return said(attention::averaged_map{tensor_view<float, 3>(written.data() + 1024, e), keys});
  };
  const auto heads = [&](const mlkit::extents_t<4>& e, const attention::detail::map_keys& keys = {}) {
    return said(attention::head_maps{tensor_view<float, 4>(written.data() + 1024, e), keys});
  };
  const std::string shape = "mlkit::shape_error: attention::forward: ",
                    value = "mlkit::value_error: attention::forward: ";
  CHECK(mean({1, 6, 7}) == shape + "map has 1 batches, but q has 2");
  CHECK(mean({2, 5, 7}) == shape + "map has 5 queries, but q has 6");
  CHECK(mean({2, 6, 6}) == shape + "map has 6 keys, but k has 7");
  CHECK(mean({2, 6, -7}) == shape + "map has the negative extent -7 in dimension 3");
  CHECK(heads({2, 2, 6, 7}) == shape + "map has 2 heads, but q has 4");
  CHECK(heads({2, 4, 6, 8}) == shape + "map has 8 keys, but k has 7");
  const std::vector<std::int32_t> two{0, 6}, low{3, -1}, high{7, 0};
  CHECK(mean({2, 6, 3}, two) == shape + "map has 3 columns, but map.keys has 2");
  CHECK(mean({2, 6, 2}, low) == value + "map.keys[0, 1] = -1 is outside [0, 7)");
  CHECK(heads({2, 4, 6, 2}, high) == value + "map.keys[0, 0] = 7 is outside [0, 7)");
  const std::vector<std::int32_t> three(6);
  CHECK(mean({2, 6, 2}, mlkit::matrix_view<const std::int32_t>(three.data(), {3, 2})) ==
        shape + "map.keys has 3 rows, but q's batch has 2");
  CHECK(mean({2, 6, 2}, mlkit::matrix_view<const std::int32_t>(nullptr, {2, 2})) ==
        value + "map.keys is null, but has shape [2, 2]");
  CHECK(said(attention::averaged_map{tensor_view<float, 3>(nullptr, {2, 6, 7})}) ==
        value + "map is null, but has shape [2, 1, 6, 7]");
  CHECK(said(attention::averaged_map{tensor_view<float, 3>(written.data() + 1024, {2, 6, 7}, {42, 0, 1})})
            .rfind(shape + "map", 0) == 0);

  std::string text;
  try {
    attention::forward(cpu{}, in(q), in(k), in(v), attention::scores<>{}, out,
                       attention::averaged_map{tensor_view<float, 3>(written.data() + 100, {2, 6, 7})});
  } catch (const mlkit::shape_error& e) {
    text = e.what();
  }
  CHECK(text == shape + "map [2, 1, 6, 7] overlaps out [2, 4, 6, 3]");
}
