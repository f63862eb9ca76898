// Moments and whitening against two passes in f64.
#include "numbers.hpp"

#include <mlkit/rl/whiten.hpp>

namespace rl = mlkit::rl;
using mlkit::cpu;
using namespace rl_test;

namespace {

// Padding that must not be read, or written.
template <class T>
void poison(std::vector<T>& x, const std::vector<std::uint8_t>& mask) {
  for (std::size_t i = 0; i < x.size(); ++i)
    if (!mask[i]) x[i] = static_cast<T>(static_cast<float>(no_number));
}

}  // namespace

TEMPLATE_TEST_CASE("moments are those of two passes in f64, of any length and mask", "[rl][whiten]", float, double,
                   mlkit::bf16, mlkit::f16) {
  const double tight = std::is_same_v<TestType, double> ? 1e-13 : 2e-6;
  for (const index_t n : {1, 2, 7, 16, 33, 257, 4096, 4097, 30011})
    for (const double kept : {1.0, 0.97, 0.5, 0.03}) {
      std::vector<TestType> x = normal<TestType>(n, 1, 3, 40);
      const std::vector<std::uint8_t> mask = bytes(n, 2, kept);
      const naive want(x, mask);
      poison(x, mask);
      const rl::moments m = rl::find_moments(cpu{}, x, mask);
      INFO("n " << n << " kept " << kept);
      CHECK(m.count == static_cast<index_t>(want.count));
      CHECK(std::fabs(m.mean - want.mean) <= tight * 40);
      CHECK(std::fabs(m.m2 - want.m2) <= 2 * tight * want.m2);
    }
}

TEST_CASE("moments of data far from zero, of equal elements and of the largest floats", "[rl][whiten]") {
  const std::vector<float> far = normal<float>(10000, 3, 0.5, 1e5);
  const naive want(far);
  const rl::moments m = rl::find_moments(cpu{}, far);
  CHECK(std::fabs(m.mean - want.mean) < 1e-6);
  CHECK(std::fabs(m.m2 / want.m2 - 1) < 1e-5);

  for (const float value : {0.1f, -3.3e30f, 1e-40f, 0.0f}) {
    const std::vector<float> equal(9001, value);
    const rl::moments e = rl::find_moments(cpu{}, equal);
    CHECK(e.mean == static_cast<double>(value));
    CHECK(e.m2 == 0);
  }
  const rl::moments large = rl::find_moments(cpu{}, std::vector<float>{3e38f, -3e38f, 1});
  CHECK(std::fabs(large.deviation(rl::variance_of::sample) / 3e38 - 1) < 1e-6);
}

TEST_CASE("merged moments are those of the whole, in any split; no element is neutral", "[rl][whiten]") {
  const std::vector<double> x = normal<double>(1000, 4, 2, -5);
  const naive want(x);
  for (const std::size_t cut : {std::size_t{0}, std::size_t{1}, std::size_t{400}, std::size_t{1000}}) {
    const auto part = [&](std::size_t from, std::size_t to) {
      return rl::find_moments(cpu{}, std::vector<double>(x.begin() + static_cast<std::ptrdiff_t>(from),
                                                         x.begin() + static_cast<std::ptrdiff_t>(to)));
    };
    for (const rl::moments& m : {merge(part(0, cut), part(cut, 1000)), merge(part(cut, 1000), part(0, cut))}) {
      CHECK(m.count == 1000);
      CHECK(std::fabs(m.mean - want.mean) < 1e-13);
      CHECK(std::fabs(m.m2 / want.m2 - 1) < 1e-13);
    }
  }
  const rl::moments none, one{1, 4.5, 0};
  CHECK(merge(none, one) == one);
  CHECK(merge(one, none) == one);
  CHECK(merge(none, none) == none);
  CHECK(none.variance() == 0);
  CHECK(none.variance(rl::variance_of::sample) == 0);
  CHECK(one.variance() == 0);
  CHECK(one.variance(rl::variance_of::sample) == 0);
  CHECK(rl::moments{4, 0, 12}.variance() == 3);
  CHECK(rl::moments{4, 0, 12}.variance(rl::variance_of::sample) == 4);
}

TEMPLATE_TEST_CASE("whitening is its formula, in place and elsewhere, and leaves padding alone", "[rl][whiten]", float,
                   double, mlkit::bf16, mlkit::f16) {
  for (const index_t n : {2, 5, 16, 100, 4099, 20001})
    for (const double kept : {1.0, 0.9, 0.4})
      for (const bool shift : {true, false})
        for (const auto kind : {rl::variance_of::population, rl::variance_of::sample}) {
          std::vector<TestType> x = normal<TestType>(n, 5, 2, 3);
          const std::vector<std::uint8_t> mask = bytes(n, 6, kept);
          const naive m(x, mask);
          if (m.count < 2) continue;
          poison(x, mask);
          const rl::whiten_options o{.epsilon = 0.25, .variance_epsilon = 0.5, .variance = kind, .shift_mean = shift};
          const double variance = m.m2 / (kind == rl::variance_of::sample ? m.count - 1 : m.count);
          std::vector<TestType> out(x.size(), static_cast<TestType>(7.0f));
          const rl::moments used = rl::whiten(cpu{}, x, mask, o, out);
          CHECK(used.count == static_cast<index_t>(m.count));
          std::vector<TestType> in_place = x;
          rl::whiten(cpu{}, in_place, mask, o);
          double worst = 0;
          bool padding = true;
          for (std::size_t i = 0; i < x.size(); ++i) {
            if (!mask[i]) {
              padding = padding && static_cast<float>(out[i]) == 7 && std::isnan(static_cast<float>(in_place[i]));
              continue;
            }
            const double want =
                (static_cast<double>(x[i]) - m.mean) / (std::sqrt(variance + 0.5) + 0.25) + (shift ? 0 : m.mean);
            worst = std::max(worst, std::fabs(static_cast<double>(out[i]) - want) / std::max(1.0, std::fabs(want)));
            worst =
                std::max(worst, std::fabs(static_cast<double>(in_place[i]) - want) / std::max(1.0, std::fabs(want)));
          }
          INFO("n " << n << " kept " << kept << " shift " << shift);
          CHECK(padding);
          CHECK(worst < (std::is_same_v<TestType, double> ? 1e-14 : 4 * epsilon_of<TestType>));
        }
}

TEST_CASE("whitening of nothing, of one element, and without deviation is 0 or nothing", "[rl][whiten]") {
  for (const double epsilon : {1e-8, 0.0, 1e-320})
    for (const auto kind : {rl::variance_of::population, rl::variance_of::sample}) {
      const rl::whiten_options o{.epsilon = epsilon, .variance = kind};
      std::vector<float> none, one{0.1f}, equal(5000, 0.1f), masked{1, static_cast<float>(no_number), 5};
      CHECK(rl::whiten(cpu{}, none, {}, o) == rl::moments{});
      rl::whiten(cpu{}, one, {}, o);
      CHECK(one[0] == 0);
      rl::whiten(cpu{}, equal, {}, o);
      CHECK(equal == std::vector<float>(5000, 0.0f));
      CHECK(rl::whiten(cpu{}, masked, std::vector<std::uint8_t>{0, 0, 0}, o) == rl::moments{});
      CHECK(masked[0] == 1);
      rl::whiten(cpu{}, masked, std::vector<std::uint8_t>{0, 0, 1}, o);
      CHECK(masked[2] == 0);
    }
}

TEMPLATE_TEST_CASE("whitening of elements farther from their mean than the largest float", "[rl][whiten]", float,
                   mlkit::bf16) {
  // 21 of them, so that registers and what is behind them see some.
  std::vector<TestType> x(84, static_cast<TestType>(-3e38f));
  for (std::size_t i = 3; i < x.size(); i += 4) x[i] = static_cast<TestType>(3e38f);
  std::vector<float> out(x.size());
  rl::whiten(cpu{}, x, {}, {.variance = rl::variance_of::population}, out);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double want = i % 4 == 3 ? std::sqrt(3.0) : -1 / std::sqrt(3.0);
    INFO(i << ": " << out[i]);
    CHECK(std::fabs(static_cast<double>(out[i]) - want) < 1e-6);
  }
}

TEST_CASE("whitening takes time-major batches, other strides, and masks of bool and char", "[rl][whiten]") {
  constexpr index_t batch = 37, time = 129;
  const std::vector<double> x = normal<double>(batch * time, 7, 2, 1);
  const std::vector<std::uint8_t> bits = bytes(batch * time, 8, 0.8);
  const naive m(x, bits);
  const double factor = 1 / (std::sqrt(m.m2 / (m.count - 1)) + 1e-8);
  // Element (b, t) of storage with the given steps, between elements that nothing may touch.
  struct layout {
    index_t row, col;
  };
  for (const layout at :
       {layout{time, 1}, layout{1, batch}, layout{2 * time, 2}, layout{3, 3 * batch}, layout{time + 5, 1}})
    for (const layout mask_at : {layout{time, 1}, layout{1, batch}}) {
      std::vector<double> stored(static_cast<std::size_t>(3 * batch * time + 5 * batch), 99);
      const auto mask = std::make_unique<bool[]>(static_cast<std::size_t>(batch * time));
      const mlkit::matrix_view<double> v(stored.data(), {batch, time}, {at.row, at.col});
      const mlkit::matrix_view<bool> kept(mask.get(), {batch, time}, {mask_at.row, mask_at.col});
      for (index_t b = 0; b < batch; ++b)
        for (index_t t = 0; t < time; ++t) {
          const auto i = static_cast<std::size_t>(b * time + t);
          kept(b, t) = bits[i];
          v(b, t) = bits[i] ? x[i] : no_number;
        }
      rl::whiten(cpu{.threads = 2}, v, kept);
      double worst = 0;
      for (index_t b = 0; b < batch; ++b)
        for (index_t t = 0; t < time; ++t) {
          const auto i = static_cast<std::size_t>(b * time + t);
          if (bits[i])
            worst = std::max(worst, std::fabs(v(b, t) - (x[i] - m.mean) * factor));
          else
            worst = std::isnan(v(b, t)) ? worst : inf;
          v(b, t) = 99;
        }
      INFO(at.row << " " << at.col << " mask " << mask_at.row);
      CHECK(worst < 1e-13);
      CHECK(stored == std::vector<double>(stored.size(), 99));
    }
}

TEST_CASE("whitening: the same bits for any number of threads", "[rl][whiten]") {
  const std::vector<std::uint8_t> mask = bytes(300007, 9, 0.7);
  const std::vector<float> x = normal<float>(300007, 10);
  std::vector<float> want;
  for (const int threads : {1, 2, 3, 8}) {
    std::vector<float> y = x;
    rl::whiten(cpu{.threads = threads}, y, mask);
    if (threads == 1) want = y;
    CHECK(same_bits(y, want));
  }
}

TEST_CASE("whitening over ranks is that of all elements in one", "[rl][whiten]") {
  std::vector<double> all = normal<double>(900, 12, 4, 2);
  std::vector<std::vector<double>> ranks;
  std::vector<rl::moments> sent;
  for (const auto& [from, to] : {std::pair{0, 0}, {0, 123}, {123, 124}, {124, 900}}) {
    ranks.emplace_back(all.begin() + from, all.begin() + to);
    sent.push_back(rl::find_moments(cpu{}, ranks.back()));
  }
  rl::whiten(cpu{}, all);
  double worst = 0;
  std::size_t at = 0;
  for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
    int calls = 0;
    const rl::whiten_options o{.over_ranks = [&](const rl::moments& mine) {
      ++calls;
      CHECK(mine == sent[rank]);
      rl::moments merged;
      for (const rl::moments& m : sent) merged = merge(merged, m);
      return merged;
    }};
    CHECK(rl::whiten(cpu{}, ranks[rank], {}, o).count == 900);
    CHECK(calls == 1);
    for (const double y : ranks[rank]) worst = std::max(worst, std::fabs(y - all[at++]));
  }
  CHECK(worst < 1e-13);
}

TEST_CASE("bad input of whitening is refused in words, and nothing is written", "[rl][whiten][errors]") {
  const std::string value = "mlkit::value_error: rl::whiten: ", shape = "mlkit::shape_error: rl::whiten: ";
  std::vector<float> x{1, 2, 3, 4};
  const std::vector<float> before = x;
  CHECK(said([&] { rl::whiten(cpu{}, x, std::vector<std::uint8_t>(3, 1)); }) ==
        shape + "mask has shape [3], but values has [4]");
  CHECK(said([&] { rl::whiten(cpu{}, x, {}, {.epsilon = -1}); }) == value + "epsilon = -1 is negative or not finite");
  CHECK(said([&] { rl::whiten(cpu{}, x, {}, {.variance_epsilon = no_number}); }) ==
        value + "variance_epsilon = nan is negative or not finite");
  std::vector<float> longer(5);
  CHECK(said([&] { rl::whiten(cpu{}, x, {}, {}, longer); }) == shape + "out has shape [5], but values has [4]");
  mlkit::vector_view<float> shifted(x.data() + 1, {3});
  CHECK(said([&] { rl::whiten(cpu{}, mlkit::vector_view<float>(x.data(), {3}), {}, {}, shifted); }) ==
        shape + "out [3] overlaps values [3]");
  CHECK(x == before);
  mlkit::tensor<double, 2> m({2, 3});
  m(1, 2) = inf;
  CHECK(said([&] { rl::whiten(cpu{}, m); }) == value + "values[1, 2] = inf is not finite");
  m(0, 1) = no_number;
  CHECK(said([&] { rl::whiten(cpu{}, m); }) == value + "values[0, 1] = nan is not finite");
  CHECK(m(0, 0) == 0);
  m(0, 1) = 1e200, m(1, 2) = -1e200;
  CHECK(said([&] { rl::whiten(cpu{}, m); }) == value + "squares of values are above the largest f64");
  // Ranks that merge are all called before one leaves, and get to know.
  int calls = 0;
  x[1] = static_cast<float>(no_number);
  CHECK(said([&] {
          rl::whiten(cpu{}, x, {}, {.over_ranks = [&](const rl::moments& mine) {
                       ++calls;
                       CHECK(std::isnan(mine.mean));
                       return mine;
                     }});
        }) == value + "values[1] = nan is not finite");
  CHECK(calls == 1);
  x[1] = 2;
  CHECK(said([&] {
          rl::whiten(cpu{}, x, {}, {.over_ranks = [](const rl::moments&) { return rl::moments{5, no_number, 1}; }});
        }) == value + "over_ranks gave count 5, mean nan, m2 1 for 4 elements of this rank");
  CHECK(x == before);
  CHECK(said([&] { rl::whiten(cpu{.threads = -1}, x); }) == "mlkit::value_error: cpu: threads = -1 is negative");
  CHECK(said([&] { rl::find_moments(cpu{}, x, std::vector<std::uint8_t>(9)); }) ==
        "mlkit::shape_error: rl::find_moments: mask has shape [9], but x has [4]");
}
