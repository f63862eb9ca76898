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
