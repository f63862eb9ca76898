// Stages that change scores or mask them.
#include "reference.hpp"

namespace attention = mlkit::attention;
using attention::align;
using namespace attention_reference;

TEST_CASE("softcap, ALiBi, and their order", "[attention][stages]") {
  problem<double> p(2, 4, 2, 70, 130, 5, 7);
  mlkit::vector<double> slopes({4});
  for (index_t h = 0; h < 4; ++h) slopes(h) = 0.1 / static_cast<double>(h + 1);
  const double cap = 2;
  const auto distance = [&](index_t h, index_t i, index_t j) {
    return slopes(h) * std::fabs(static_cast<double>(i + 130 - 70 - j));
  };
  meaning m;
  m.score = [&](double x, index_t, index_t h, index_t i, index_t j) {
    return cap * std::tanh(0.7 * x / cap) - distance(h, i, j);
  };
  m.derivative = [&](double x, index_t, index_t, index_t, index_t) {
    const double t = std::tanh(0.7 * x / cap);
    return 0.7 * (1 - t * t);
  };
  CHECK(p.error(attention::scores{attention::scale{0.7}, attention::softcap{cap}, attention::alibi{slopes}}, m) <
        tight);
  m.score = [&](double x, index_t, index_t h, index_t i, index_t j) {
    return cap * std::tanh((0.7 * x - distance(h, i, j)) / cap);
  };
  m.derivative = [&](double x, index_t, index_t h, index_t i, index_t j) {
    const double t = std::tanh((0.7 * x - distance(h, i, j)) / cap);
    return 0.7 * (1 - t * t);
  };
  CHECK(p.error(attention::scores{attention::scale{0.7}, attention::alibi{slopes}, attention::softcap{cap}}, m) <
        tight);
}

TEST_CASE("masks, also where queries see nothing", "[attention][stages]") {
  const double s = 1 / std::sqrt(5.0);
  SECTION("causal") {
    problem<double> wide(1, 2, 1, 70, 300, 5, 7), tall(1, 2, 1, 300, 70, 5, 7), square(1, 2, 2, 130, 130, 5, 3);
    const auto top_left = masked(s, [](index_t, index_t, index_t i, index_t j) { return j <= i; });
    CHECK(wide.error(attention::scores{attention::causal{align::top_left}}, top_left) < tight);
    CHECK(tall.error(attention::scores{attention::causal{align::top_left}}, top_left) < tight);
    CHECK(square.error(attention::scores{attention::causal{}}, top_left) < tight);
    CHECK(wide.error(attention::scores{attention::causal{align::bottom_right}},
                     masked(s, [](index_t, index_t, index_t i, index_t j) { return j <= i + 230; })) < tight);
    CHECK(tall.error(attention::scores{attention::causal{align::bottom_right}},
                     masked(s, [](index_t, index_t, index_t i, index_t j) { return j <= i - 230; })) < tight);
  }
  SECTION("window") {
    problem<double> p(1, 2, 1, 300, 260, 5, 7);
    for (const auto& [left, right] :
         std::vector<std::array<index_t, 2>>{{0, 0}, {10, 3}, {100, 0}, {attention::window::unlimited, 5}})
      CHECK(p.error(attention::scores{attention::window{left, right, align::top_left}},
                    masked(s, [left = left, right = right](index_t, index_t, index_t i, index_t j) {
                      return j >= i - left && j <= i + right;
                    })) < tight);
    CHECK(p.error(attention::scores{attention::window{20, 7, align::bottom_right}},
                  masked(s, [](index_t, index_t, index_t i, index_t j) {
                    return j >= i - 40 - 20 && j <= i - 40 + 7;
                  })) < tight);
  }
  SECTION("key lengths, whose keys beyond are never read") {
    problem<double> p(3, 2, 1, 20, 130, 5, 7);
    const std::vector<int> lengths{130, 0, 25};
    for (index_t b = 0; b < 3; ++b)
      for (index_t j = lengths[static_cast<std::size_t>(b)]; j < 130; ++j) {
        for (index_t c = 0; c < 5; ++c) p.k(b, 0, j, c) = std::nan("");
        for (index_t c = 0; c < 7; ++c) p.v(b, 0, j, c) = std::nan("");
      }
    CHECK(p.error(attention::scores{attention::key_lengths{lengths}},
                  masked(s, [&](index_t b, index_t, index_t, index_t j) {
                    return j < lengths[static_cast<std::size_t>(b)];
                  })) < tight);
  }
  SECTION("boolean, one for all heads, and block by block") {
    problem<double> p(2, 2, 1, 70, 130, 5, 7);
    std::vector<std::uint8_t> bits(2 * 70 * 130);
    const mlkit::random_stream random{3, 4};
    for (std::size_t i = 0; i < bits.size(); ++i) bits[i] = i / 130 % 70 != 9 && random.bits(i) % 3 == 0;
    const mlkit::tensor_view<const std::uint8_t, 4> mask(bits.data(), {2, 1, 70, 130});
    CHECK(p.error(attention::scores{attention::boolean_mask{mask}},
                  masked(s, [&](index_t b, index_t, index_t i, index_t j) { return mask(b, 0, i, j) != 0; })) < tight);
    const mlkit::tensor_view<const std::uint8_t, 3> blocks(bits.data(), {2, 5, 4});
    CHECK(p.error(attention::scores{attention::block_sparse{blocks, 16, 40}},
                  masked(s, [&](index_t, index_t h, index_t i, index_t j) { return blocks(h, i / 16, j / 40) != 0; })) <
          tight);
  }
  SECTION("documents") {
    problem<double> p(1, 2, 1, 150, 150, 5, 7);
    std::vector<int> ids;
    for (int i = 0; i < 150; ++i) ids.push_back(i < 40 ? 1 : i < 41 ? 2 : 3);
    CHECK(p.error(attention::scores{attention::documents{ids}, attention::causal{}},
                  masked(s, [&](index_t, index_t, index_t i, index_t j) {
                    return j <= i && ids[static_cast<std::size_t>(i)] == ids[static_cast<std::size_t>(j)];
                  })) < tight);
  }
}

TEST_CASE("masks hide scores whatever changes scores after them", "[attention][stages]") {
  problem<double> p(1, 2, 1, 70, 130, 5, 7);
  meaning m;
  m.score = [](double x, index_t, index_t, index_t i, index_t j) {
    return j <= i ? 2 * std::tanh(-0.7 * x / 2) : -inf;
  };
  m.derivative = [](double x, index_t, index_t, index_t, index_t) {
    const double t = std::tanh(-0.7 * x / 2);
    return -0.7 * (1 - t * t);
  };
  const attention::causal mask{align::top_left};
  CHECK(p.error(attention::scores{mask, attention::scale{-0.7}, attention::softcap{2}}, m) < tight);
  CHECK(p.error(attention::scores{attention::scale{-0.7}, mask, attention::softcap{2}}, m) < tight);
}

namespace {

// |s + row[i]|^1.5, of which the derivative is infinite nowhere but is looked up by query.
struct rooted {
  const std::vector<double>* row;
  double at(const attention::position& p) const { return row->at(static_cast<std::size_t>(p.i)); }
  double operator()(double s, const attention::position& p) const { return std::pow(std::fabs(s + at(p)), 1.5); }
  double derivative(double s, const attention::position& p) const {
    return 1.5 * std::sqrt(std::fabs(s + at(p))) * (s + at(p) < 0 ? -1 : 1);
  }
};

// The sign of a score, which zero has none of.
struct sign {
  double operator()(double s) const { return s / std::fabs(s); }
  double derivative(double s) const { return s == 0 ? std::nan("") : 0; }
};

// log(1 + s) for s > -1, which no masked score needs to be.
struct logarithm {
  double operator()(double s) const { return std::log1p(s); }
  double derivative(double s) const { return s > -1 ? 1 / (1 + s) : std::nan(""); }
};

}  // namespace

TEST_CASE("stages of the user's own, and where they are asked", "[attention][stages]") {
  SECTION("are asked about queries that there are") {
    problem<double> p(1, 2, 1, 67, 130, 5, 7);
    std::vector<double> row;
    for (int i = 0; i < 67; ++i) row.push_back(0.1 * (i % 7));
    const rooted stage{&row};
    meaning m;
    m.score = [&](double x, index_t, index_t, index_t i, index_t) { return stage(0.5 * x, {0, 0, i, 0}); };
    m.derivative = [&](double x, index_t, index_t, index_t i, index_t) {
      return 0.5 * stage.derivative(0.5 * x, {0, 0, i, 0});
    };
    CHECK(p.error(attention::scores{attention::scale{0.5}, stage}, m) < tight);
  }
  SECTION("are asked about none beyond them, and make nothing of what is there, whatever the number and the type") {
    const auto check = [](auto type, double bound) {
      for (index_t queries : {1, 8, 15, 16, 17, 32, 33, 40, 63, 65, 70}) {
        INFO(queries << " queries");
        problem<decltype(type)> p(1, 1, 1, queries, 20, 16, 16);
        const std::vector<double> row(static_cast<std::size_t>(queries), 0.25);
        meaning m;
        m.score = [](double x, index_t, index_t, index_t, index_t) {
          return std::pow(std::fabs(sign{}(x) + 0.25), 1.5);
        };
        m.derivative = [](double, index_t, index_t, index_t, index_t) { return 0.0; };
        CHECK(p.error(attention::scores{sign{}, rooted{&row}}, m) < bound);
      }
    };
    check(double{}, tight), check(float{}, 1e-5), check(mlkit::bf16{}, 2e-2);
  }
  SECTION("may have no derivative where a mask hides the score") {
    problem<double> p(1, 1, 1, 40, 40, 5, 7);
    std::vector<std::uint8_t> bits(40 * 40);
    for (index_t i = 0; i < 40; ++i)
      for (index_t j = 0; j < 40; ++j) {
        double x = 0;
        for (index_t c = 0; c < 5; ++c) x += p.q(0, 0, i, c) * p.k(0, 0, j, c);
        bits[static_cast<std::size_t>(i * 40 + j)] = x > -0.9;
      }
    const mlkit::tensor_view<const std::uint8_t, 2> mask(bits.data(), {40, 40});
    const auto seen = [&](index_t i, index_t j) { return mask(i, j) != 0; };
    meaning m;
    m.score = [&](double x, index_t, index_t, index_t i, index_t j) { return seen(i, j) ? std::log1p(x) : -inf; };
    m.derivative = [&](double x, index_t, index_t, index_t, index_t) { return 1 / (1 + x); };
    CHECK(p.error(attention::scores{attention::scale{1}, logarithm{}, attention::boolean_mask{mask}}, m) < tight);
  }
}
