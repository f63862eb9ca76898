// Sinks, dropout, stages of the user's own, and scores that are hard to take.
#include "reference.hpp"

namespace attention = mlkit::attention;
using attention::align;
using namespace attention_reference;

namespace {

// Scores of a user's own, with and without their place.
struct halved {
  float operator()(float s) const { return 0.5f * s + 1; }
  float derivative(float) const { return 0.5f; }
};
struct tilted {
  double operator()(double s, const attention::position& at) const {
    return s * s * 0.1 + 0.01 * static_cast<double>(at.j - at.i) + static_cast<double>(at.h);
  }
  double derivative(double s, const attention::position&) const { return 0.2 * s; }
};
// Its member is called as that of one of attention's own stages.
struct sloped {
  double slopes;
  double operator()(double s, const attention::position& at) const { return s + slopes * static_cast<double>(at.j); }
  double derivative(double, const attention::position&) const { return 1; }
};

}  // namespace

TEST_CASE("sinks and their gradient, with causal rows and dropout", "[attention][stages]") {
  problem<double> p(2, 4, 2, 70, 130, 5, 7);
  mlkit::vector<double> logits({4});
  for (index_t h = 0; h < 4; ++h) logits(h) = h == 3 ? -inf : static_cast<double>(h) - 1;
  const attention::scores sunk{attention::scale{0.5},
                               attention::window{attention::window::unlimited, 0, align::top_left},
                               attention::sinks{logits}};
  meaning level = masked(0.5, [](index_t, index_t, index_t i, index_t j) { return j <= i; });
  level.sink = [&](index_t h) { return logits(h); };
  CHECK(p.error(sunk, level) < tight);

  const attention::dropout drop{.p = 0.3, .seed = 5, .stream = 6};
  const mlkit::random_stream random{5, 6};
  level.factor = [&](index_t b, index_t h, index_t i, index_t j) {
    const auto block = (static_cast<std::uint64_t>(b * 4 + h) << 40) + static_cast<std::uint64_t>(i * 33 + j / 4);
    return random.block(block)[static_cast<std::size_t>(j % 4)] < static_cast<std::uint32_t>(0.3 * 0x1p32) ? 0.0
                                                                                                           : 1 / 0.7;
  };
  CHECK(p.error(attention::scores{attention::scale{0.5}, attention::causal{align::top_left}, attention::sinks{logits},
                                  drop},
                level) < tight);
}

TEST_CASE("packed sequences with sinks, dropout and a gradient of lse", "[attention][packed]") {
  constexpr index_t heads = 4, kv = 2, d = 5, d_v = 7;
  const std::vector<std::int32_t> queries{0, 70, 71, 71, 140, 143}, keys{0, 130, 130, 135, 190, 193};
  mlkit::tensor<double, 3> q({143, heads, d}), k({193, kv, d}), v({193, kv, d_v}), out({143, heads, d_v}),
      dout({143, heads, d_v}), dq(q.extents()), dk(k.extents()), dv(v.extents());
  mlkit::matrix<double> lse({heads, 143}), dlse({heads, 143});
  mlkit::vector<double> logits({heads}), dsinks({heads});
  fill<double>(q, 1), fill<double>(k, 2), fill<double>(v, 3), fill<double>(dout, 4), fill<double>(dlse, 5);
  for (index_t h = 0; h < heads; ++h) {
    logits(h) = h == 3 ? -inf : static_cast<double>(h) - 1;
    if (h == 3) dlse(h, 70) = std::nan("");  // of a query that sees nothing
  }
  const attention::scores pipeline{attention::scale{0.5}, attention::causal{align::top_left}, attention::sinks{logits},
                                   attention::dropout{.p = 0.3, .seed = 5, .stream = 6}};
  const attention::sequences packed(queries, keys);
  attention::forward(mlkit::cpu{}, q, k, v, packed, pipeline, out, lse);
  attention::gradients g{dq, dk, dv};
  g.dsinks = dsinks.view();
  attention::backward(mlkit::cpu{}, q, k, v, packed, pipeline, out, lse, dout, g, dlse.view());

  result want, have;
  const mlkit::random_stream random{5, 6};
  std::vector<double> sinks(heads);
  for (std::size_t b = 0; b + 1 < queries.size(); ++b) {
    const index_t first = queries[b], n = queries[b + 1] - first, from = keys[b], m = keys[b + 1] - from;
    problem<double> one(1, heads, kv, n, m, d, d_v);
    for (index_t h = 0; h < heads; ++h)
      for (index_t i = 0; i < n; ++i) {
        for (index_t c = 0; c < d; ++c) one.q(0, h, i, c) = q(first + i, h, c);
        for (index_t c = 0; c < d_v; ++c) one.dout(0, h, i, c) = dout(first + i, h, c);
        one.dlse(0, h, i) = dlse(h, first + i);
      }
    for (index_t h = 0; h < kv; ++h)
      for (index_t j = 0; j < m; ++j) {
        for (index_t c = 0; c < d; ++c) one.k(0, h, j, c) = k(from + j, h, c);
        for (index_t c = 0; c < d_v; ++c) one.v(0, h, j, c) = v(from + j, h, c);
      }
    meaning of = masked(0.5, [](index_t, index_t, index_t i, index_t j) { return j <= i; });
    of.sink = [&](index_t h) { return logits(h); };
    of.factor = [&](index_t, index_t h, index_t i, index_t j) {
      const auto block = (static_cast<std::uint64_t>(static_cast<index_t>(b) * heads + h) << 40) +
                         static_cast<std::uint64_t>(i * ((m + 3) / 4) + j / 4);
      return random.block(block)[static_cast<std::size_t>(j % 4)] < static_cast<std::uint32_t>(0.3 * 0x1p32) ? 0.0
                                                                                                             : 1 / 0.7;
    };
    const result r = one.naive<double, double>(of, true);
    for (const std::size_t part : {0, 1, 2, 3, 4}) {
      const auto& x = r.of[part];
      want.of[part].insert(want.of[part].end(), x.begin(), x.end());
    }
    for (std::size_t h = 0; h < heads; ++h) sinks[h] += r.of[5][h];
    for (index_t h = 0; h < heads; ++h)
      for (index_t i = 0; i < n; ++i) {
        for (index_t c = 0; c < d_v; ++c) have.of[0].push_back(out(first + i, h, c));
        have.of[1].push_back(lse(h, first + i));
        for (index_t c = 0; c < d; ++c) have.of[2].push_back(dq(first + i, h, c));
      }
    for (index_t h = 0; h < kv; ++h)
      for (index_t j = 0; j < m; ++j) {
        for (index_t c = 0; c < d; ++c) have.of[3].push_back(dk(from + j, h, c));
        for (index_t c = 0; c < d_v; ++c) have.of[4].push_back(dv(from + j, h, c));
      }
  }
  want.of[5] = sinks;
  have.of[5].assign(dsinks.begin(), dsinks.end());
  const errors e(want, have);
  for (std::size_t r = 0; r < e.error.size(); ++r) {
    INFO(result::names[r]);
    CHECK(e.relative(r) < tight);
  }
}

TEST_CASE("stages of the user's own", "[attention][stages]") {
  problem<double> p(2, 4, 2, 70, 130, 5, 7);
  meaning m;
  m.score = [](double x, index_t, index_t, index_t, index_t) { return 0.5 * (0.3 * x) + 1; };
  m.derivative = [](double, index_t, index_t, index_t, index_t) { return 0.15; };
  CHECK(p.error(attention::scores{attention::scale{0.3}, halved{}}, m) < 1e-6);  // it computes in float
  m.score = [](double x, index_t, index_t h, index_t i, index_t j) {
    return 0.1 * x * x + 0.01 * static_cast<double>(j - i) + static_cast<double>(h);
  };
  m.derivative = [](double x, index_t, index_t, index_t, index_t) { return 0.2 * x; };
  CHECK(p.error(attention::scores{attention::scale{1}, tilted{}}, m) < tight);
  m.score = [](double x, index_t, index_t, index_t, index_t j) { return 0.3 * x + 0.02 * static_cast<double>(j); };
  m.derivative = [](double, index_t, index_t, index_t, index_t) { return 0.3; };
  CHECK(p.error(attention::scores{attention::scale{0.3}, sloped{0.02}}, m) < tight);
}

TEST_CASE("stages of the user's own without a derivative, forward alone", "[attention][stages]") {
  problem<double> p(2, 4, 2, 70, 130, 5, 7);
  const auto bend = [](double s) { return s - 0.2 * s * s; };
  const auto shift = [](double s, const attention::position& at) {
    return s * (1 + 0.3 * static_cast<double>(at.b)) + 0.1 * static_cast<double>(at.h) * std::sin(at.i + 2 * at.j);
  };
  const attention::scores pipeline{attention::scale{0.3}, bend, attention::causal{align::bottom_right}, shift};
  meaning m = scaled(0);
  m.score = [&](double x, index_t b, index_t h, index_t i, index_t j) {
    return j <= i + 60 ? shift(bend(0.3 * x), {b, h, i, j}) : -inf;
  };
  attention::forward(mlkit::cpu{}, p.q, p.k, p.v, pipeline, p.out, p.lse);
  const errors e(p.naive<double, double>(m), p.written());
  for (const std::size_t r : {0, 1}) {
    INFO(result::names[r]);
    CHECK(e.relative(r) < tight);
  }
}

TEST_CASE("scores of +-10,000, minus infinity and NaN", "[attention][stages]") {
  problem<double> p(1, 1, 1, 20, 50, 4, 3);
  for (index_t i = 0; i < p.q.size(); ++i) p.q.data()[i] *= 100;
  for (index_t i = 0; i < p.k.size(); ++i) p.k.data()[i] *= 100;
  CHECK(p.error(attention::scores{attention::scale{1}}, scaled(1)) < 1e-10);
  mlkit::matrix<double> bias({20, 50});
  for (index_t i = 0; i < 20; ++i)
    for (index_t j = 0; j < 50; ++j) bias(i, j) = i == 4 || j % 3 == 0 ? -inf : 0;
  CHECK(p.error(attention::scores{attention::scale{1e-4}, attention::bias{bias}},
                masked(1e-4, [](index_t, index_t, index_t i, index_t j) { return i != 4 && j % 3 != 0; })) < tight);
  p.q(0, 0, 7, 1) = std::nan("");
  attention::forward(mlkit::cpu{}, p.q, p.k, p.v, attention::scores<>{}, p.out, p.lse);
  for (index_t i = 0; i < 20; ++i) CHECK(std::isnan(p.out(0, 0, i, 0)) == (i == 7));
}

TEST_CASE("a scale that is negative, zero or large, alone and under masks", "[attention][stages]") {
  problem<double> p(1, 2, 1, 70, 300, 5, 7);
  problem<float> f(1, 2, 1, 70, 300, 5, 7);
  for (const double value : {-0.7, 0.0, 1e-30, 3.0}) {
    INFO(value);
    CHECK(p.error(attention::scores{attention::scale{value}}, scaled(value)) < tight);
    const auto sees = [](index_t, index_t, index_t i, index_t j) { return j <= i + 230 && j >= i + 100; };
    CHECK(p.error(attention::scores{attention::scale{value}, attention::window{130, 0, align::bottom_right}},
                  masked(value, sees)) < tight);
    CHECK(f.error(attention::scores{attention::scale{value}}, scaled(value)) < 2e-5);
  }
}

TEST_CASE("scores that grow from key to key", "[attention][stages]") {
  // The largest so far rises by little and by much from one block of keys to the next, and differently for each query.
  problem<double> p(1, 1, 1, 70, 1100, 2, 3);
  problem<float> f(1, 1, 1, 70, 1100, 2, 3);
  for (const double rise : {0.004, 0.03, 0.3, -0.03}) {
    INFO(rise);
    const auto grow = [&](auto& x) {
      using T = std::remove_cvref_t<decltype(x.q(0, 0, 0, 0))>;
      for (index_t j = 0; j < x.keys; ++j) x.k(0, 0, j, 1) = static_cast<T>(rise * static_cast<double>(j));
    };
    grow(p), grow(f);
    CHECK(p.error(attention::scores{attention::scale{1}}, scaled(1)) < 1e-11);
    CHECK(f.error(attention::scores{attention::scale{1}}, scaled(1)) < 2e-4);
  }
}
