// Rotary embedding against its formula in f64, and the property that it exists for.
#include "reference.hpp"

namespace attention = mlkit::attention;
using attention::pairing;
using namespace attention_reference;

namespace {

template <class T>
double worst_error(index_t d, index_t turned, pairing pairs, index_t first, bool own_positions, bool turn_back) {
  using A = mlkit::accumulator_t<T>;
  constexpr index_t batch = 2, heads = 3, n = 5;
  const attention::rotary_table<A> table({.positions = 40, .d = turned, .base = 500, .position_scale = 0.5});
  mlkit::tensor<T, 4> x({batch, n, heads, d}), out({batch, heads, n, d});
  fill<T>(x, 1);
  // Heads in the middle, as projections leave them.
  const mlkit::tensor_view<T, 4> by_head(x.data(), {batch, heads, n, d}, {n * heads * d, d, heads * d, 1});
  std::vector<std::int32_t> at;
  for (int i = 0; i < batch * n; ++i) at.push_back((i * 7 + 3) % 40);
  attention::rotation how{.pairs = pairs, .first = first, .back = turn_back};
  if (own_positions) how.positions = mlkit::matrix_view<const std::int32_t>(at.data(), {batch, n});
  attention::rotate(mlkit::cpu{}, by_head, table, out, how);
  double worst = 0;
  for (index_t b = 0; b < batch; ++b)
    for (index_t h = 0; h < heads; ++h)
      for (index_t i = 0; i < n; ++i)
        for (index_t c = 0; c < d; ++c) {
          double want = static_cast<double>(by_head(b, h, i, c));
          if (c < turned) {
            const bool halves = pairs == pairing::halves;
            const index_t pair = halves ? c % (turned / 2) : c / 2;
            const bool second = halves ? c >= turned / 2 : c % 2 == 1;
            const index_t other = halves ? (second ? c - turned / 2 : c + turned / 2) : c ^ 1;
            const double t = static_cast<double>(own_positions ? at[static_cast<std::size_t>(b * n + i)] : first + i);
            const double angle = (turn_back ? -0.5 : 0.5) * t *
                                 std::pow(500.0, -2.0 * static_cast<double>(pair) / static_cast<double>(turned));
            want = want * std::cos(angle) +
                   (second ? 1 : -1) * static_cast<double>(by_head(b, h, i, other)) * std::sin(angle);
          }
          worst = std::max(worst, std::fabs(want - static_cast<double>(out(b, h, i, c))));
        }
  return worst;
}

}  // namespace

TEST_CASE("rotary embedding is its formula, for every pairing, width and position", "[attention][rotary]") {
  for (const pairing pairs : {pairing::halves, pairing::adjacent})
    for (const auto& [d, turned] : std::vector<std::array<index_t, 2>>{{2, 2}, {10, 6}, {64, 64}, {80, 42}, {7, 0}})
      for (const bool own : {false, true})
        for (const bool back : {false, true}) {
          INFO("d " << d << " turned " << turned << " adjacent " << (pairs == pairing::adjacent) << " own " << own);
          CHECK(worst_error<double>(d, turned, pairs, 31, own, back) < 1e-14);
          CHECK(worst_error<float>(d, turned, pairs, 0, own, back) < 1e-6);
          CHECK(worst_error<mlkit::bf16>(d, turned, pairs, 9, own, back) < 4.5 / 256);
          CHECK(worst_error<mlkit::f16>(d, turned, pairs, 9, own, back) < 4.5 / 2048);
        }
}

TEST_CASE("scores of rotated queries and keys depend on distances alone", "[attention][rotary]") {
  constexpr index_t d = 32;
  const attention::rotary_table<double> table({.positions = 100, .d = d});
  mlkit::tensor<double, 4> q({1, 1, 1, d}), k({1, 1, 1, d});
  fill<double>(q, 1), fill<double>(k, 2);
  for (const pairing pairs : {pairing::halves, pairing::adjacent}) {
    const auto score = [&](index_t i, index_t j) {
      mlkit::tensor<double, 4> a = q.clone(), b = k.clone();
      attention::rotate(mlkit::cpu{}, a, table, a, {.pairs = pairs, .first = i});  // in place
      attention::rotate(mlkit::cpu{}, b, table, b, {.pairs = pairs, .first = j});
      double s = 0;
      for (index_t c = 0; c < d; ++c) s += a.data()[c] * b.data()[c];
      return s;
    };
    CHECK(std::fabs(score(50, 47) - score(3, 0)) < 1e-12);
    CHECK(std::fabs(score(50, 47) - score(47, 50)) > 1e-3);
    mlkit::tensor<double, 4> there = q.clone();
    attention::rotate(mlkit::cpu{}, there, table, there, {.pairs = pairs, .first = 70});
    attention::rotate(mlkit::cpu{}, there, table, there, {.pairs = pairs, .first = 70, .back = true});
    for (index_t c = 0; c < d; ++c) CHECK(std::fabs(there.data()[c] - q.data()[c]) < 1e-14);
  }
}

TEST_CASE("frequencies of one's own take the place of the base's", "[attention][rotary]") {
  const std::vector<double> frequencies{0.25, 2};
  const attention::rotary_table<double> table({.positions = 4, .d = 4, .frequencies = frequencies});
  CHECK(table.row(3)[0] == std::cos(0.75));
  CHECK(table.row(3)[3] == std::sin(6.0));
}

TEST_CASE("rotary embedding refuses what does not fit", "[attention][rotary][bad input]") {
  using attention::rotary_table;
  using Catch::Matchers::Contains;
  CHECK_THROWS_WITH(rotary_table<>({.positions = 4, .d = 3}), Contains("d = 3 is not an even number"));
  CHECK_THROWS_WITH(rotary_table<>({.positions = -1, .d = 4}), Contains("positions = -1 is negative"));
  CHECK_THROWS_WITH(rotary_table<>({.positions = 4, .d = 4, .base = 0}), Contains("base = 0 is not positive"));
  const std::vector<double> three{1, 2, 3};
  CHECK_THROWS_WITH(rotary_table<>({.positions = 4, .d = 4, .frequencies = three}),
                    Contains("frequencies has 3 elements, but half of d has 2"));
  const std::vector<double> no_number{1, std::nan("")};
  CHECK_THROWS_WITH(rotary_table<>({.positions = 4, .d = 4, .frequencies = no_number}),
                    Contains("pair 1 would be turned by nan at position 0"));
  CHECK(rotary_table<>({.positions = mlkit::index_t{1} << 50, .d = 0}).d() == 0);
  const rotary_table<> table({.positions = 8, .d = 6});
  mlkit::tensor<float, 4> x({1, 2, 3, 6}), out({1, 2, 3, 6}), narrow({1, 2, 3, 4}), wide({1, 2, 4, 6});
  CHECK_THROWS_WITH(attention::rotate(mlkit::cpu{}, x, table, out, {.first = 6}),
                    "mlkit::value_error: attention::rotate: positions 6 to 8 are wanted, but table has 8");
  CHECK_THROWS_WITH(attention::rotate(mlkit::cpu{}, x, table, out, {.first = -1}), Contains("positions -1 to 1"));
  CHECK_THROWS_WITH(attention::rotate(mlkit::cpu{}, narrow, table, narrow),
                    Contains("table turns 6 elements, but x has 4"));
  CHECK_THROWS_WITH(attention::rotate(mlkit::cpu{}, x, table, wide), Contains("out has shape [1, 2, 4, 6], but x has"));
  const std::vector<std::int32_t> at{0, 8, 1};
  CHECK_THROWS_WITH(attention::rotate(mlkit::cpu{}, x, table, out, {.positions = {at.data(), {1, 3}}}),
                    Contains("positions[0, 1] = 8 is outside [0, 8)"));
  CHECK_THROWS_WITH(attention::rotate(mlkit::cpu{}, x, table, out, {.positions = {at.data(), {1, 2}}}),
                    Contains("positions has 2 columns, but x has 3"));
  CHECK_THROWS_WITH(attention::rotate(mlkit::cpu{}, x, table, out, {.positions = {nullptr, {1, 3}}}),
                    Contains("positions is null, but has shape [1, 3]"));
  mlkit::tensor_view<float, 4> shifted(x.data(), {1, 1, 3, 6}, {36, 18, 6, 1}),
      on(x.data() + 6, {1, 1, 3, 6}, {36, 18, 6, 1});
  CHECK_THROWS_WITH(attention::rotate(mlkit::cpu{}, shifted, table, on), Contains("overlaps"));
  CHECK(std::all_of(out.begin(), out.end(), [](float v) { return v == 0; }));
}
