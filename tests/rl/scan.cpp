// The affine scan under functors of the user's own, and the composition of maps.
#include "../fixtures.hpp"
#include "rollouts.hpp"

using namespace rollouts;

namespace {

// Forward in time: x_t = sum over k of b_{t+k} a_t ... a_{t+k-1}, and the seed behind all.
std::vector<double> naive(const window& w, const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> x(a.size());
  for (index_t s = 0; s < w.sequences(); ++s) {
    const index_t first = w.starts.empty() ? s * w.time : w.starts[at(s)],
                  last = w.starts.empty() ? first + w.time : w.starts[at(s + 1)];
    for (index_t t = first; t < last; ++t) {
      double sum = 0, weight = 1;
      for (index_t k = t; k < last && weight != 0; ++k) {
        if (!w.counts(k)) continue;
        sum += weight * b[at(k)];
        weight *= a[at(k)];
      }
      x[at(t)] = weight == 0 || w.boot.empty() ? sum : sum + weight * w.boot[at(s)];
    }
  }
  return x;
}

template <class T>
outputs<T> run(const mlkit::cpu& exec, arguments<T>& given) {
  stored<T> out = given.out();
  const auto map = [](T a, T b) { return rl::affine<T>{a > T(1.2) ? T(0) : T(0.5) * a, b * b}; };
  rl::scan_options<T> options;
  if (!given.boot.empty()) options.seed = given.boot;
  if (!given.w.mask.empty()) options.mask = given.mask.view();
  if (!given.w.starts.empty()) options.cu_seqlens = given.w.starts;
  rl::affine_scan<T>(exec, map, options, out.view(), given.r.view(), given.v.view());
  return {out.plain()};
}

template <class T>
void check_values() {
  each_window([&](const window& w) {
    std::vector<double> a, b;
    for (std::size_t i = 0; i < w.r.size(); ++i) {
      a.push_back(static_cast<T>(w.r[i]) > T(1.2) ? 0 : 0.5 * w.r[i]);
      b.push_back(w.v[i] * w.v[i]);
    }
    const std::vector<double> want = naive(w, a, b);
    for (const layout l : {layout::rows, layout::columns}) {
      arguments<T> given(w, l);
      INFO(text(w) << ", layout " << static_cast<int>(l));
      REQUIRE(error(run(mlkit::cpu{}, given)[0], want) < 2 * tolerance<T>);
    }
  });
}

}  // namespace

TEST_CASE("affine_scan sums products of maps", "[rl][scan]") {
  check_values<float>();
  check_values<double>();
}

TEST_CASE("affine_scan: layouts, threads, packing and neighbours change no bit", "[rl][scan]") {
  check_bits<double>([](const mlkit::cpu& exec, arguments<double>& given) { return run(exec, given); });
}

TEST_CASE("maps compose", "[rl][scan]") {
  const rl::affine<double> first{2, 3}, second{5, 7}, third{-1, 0.5};
  CHECK(compose(first, second)(11) == first(second(11)));
  CHECK(compose(first, rl::affine<double>{})(11) == first(11));
  CHECK(compose(rl::affine<double>{}, first)(11) == first(11));
  CHECK(compose(compose(first, second), third)(11) == compose(first, compose(second, third))(11));
}

TEST_CASE("affine_scan: a = 0 cuts off what is not finite; a mask passes over it", "[rl][scan]") {
  for (const index_t n : {40, 600}) {
    std::vector<float> a(at(n), 0.5f), b(at(n), 1.0f), out(at(n));
    a[20] = 0;
    b[30] = std::numeric_limits<float>::infinity();
    const auto map = [](float x, float y) { return rl::affine<float>{x, y}; };
    rl::affine_scan(mlkit::cpu{}, map, {}, out, a, b);
    for (index_t t = 0; t < n; ++t) {
      INFO(t);
      CHECK(std::isfinite(out[at(t)]) == (t <= 20 || t > 30));
    }
    std::vector<char> mask(at(n), 1);
    mask[30] = 0;
    b[30] = std::numeric_limits<float>::quiet_NaN();
    rl::affine_scan(mlkit::cpu{}, map, {.mask = mask}, out, a, b);
    for (const float x : out) CHECK(std::isfinite(x));
    CHECK(out[30] == out[31]);
  }
}

// LambdaReturnsTest and DiscountedReturnsTest of google-deepmind/rlax, multistep_test.py: discounts of each step.
TEST_CASE("affine_scan: the product of a part's factors may be above the largest number where no value is",
          "[rl][scan]") {
  const index_t time = 900;
  std::vector<float> factors(at(time), 1.5f);                                   // 1.5^256 is above 1e45
  for (index_t t = 300; t < 340; ++t) factors[at(t)] = t < 320 ? 1e-5f : 1e5f;  // 1e100 and back
  for (index_t t = 600; t < time; ++t) factors[at(t)] = 1;
  for (const index_t batch : {1, 3, 40})  // by parts, and whole
    for (const layout l : {layout::rows, layout::columns})
      for (const int threads : {1, 2}) {
        INFO(batch << " sequences, layout " << static_cast<int>(l) << ", threads " << threads);
        std::vector<float> a, b(at(batch * time));
        for (index_t i = 0; i < batch; ++i) a.insert(a.end(), factors.begin(), factors.end());
        b[at((batch - 1) * time + 100)] = 1;
        stored<float> of_a(a, batch, time, l), of_b(b, batch, time, l), out(std::vector<float>(), batch, time, l);
        rl::affine_scan<float>(
            mlkit::cpu{.threads = threads},
            [](float x, float y) {
              return rl::affine<float>{x, y};
            },
            {}, out.view(), of_a.view(), of_b.view());
        double worst = 0;
        for (index_t i = 0; i < batch; ++i)
          for (index_t t = 0; t < time; ++t) {
            const double want = i == batch - 1 && t <= 100 ? std::pow(1.5, 100 - t) : 0,
                         difference = std::fabs(static_cast<double>(out(i, t)) - want);
            worst = std::isnan(difference) ? INFINITY : std::max(worst, difference / std::max(1.0, want));
          }
        CHECK(worst < 1e-5);
      }
}

TEST_CASE("affine_scan gives rlax's returns with discounts of each step", "[rl][scan][published]") {
  const mlkit::extents_t<2> shape{2, 5};
  const auto r = mlkit::matrix<double>(shape), out = mlkit::matrix<double>(shape);
  const double rewards[] = {1.0, 0.0, -1.0, 0.0, 1.0, 0.5, 0.8, -0.7, 0.0, 2.1};
  const double discounts[] = {0.5, 0.9, 1.0, 0.5, 0.8, 0.9, 0.5, 0.3, 0.8, 0.7};
  const double values[] = {3.0, 1.0, 5.0, -5.0, 3.0, -1.7, 1.2, 2.3, 2.2, 2.7};
  const double lambda_returns[] = {1.6460547, 0.72281253, 0.7375001, 0.6500001, 3.4,
                                   0.7866317, 0.9913063,  0.1101501, 2.834,     3.99};
  const double discounted_returns[] = {1.315,   0.63000005, 0.70000005, 1.7,   3.4,
                                       1.33592, 0.9288,     0.2576,     3.192, 3.9899998};
  using view = mlkit::tensor_view<const double, 2>;
  const std::vector<double> seed{3.0, 2.7};
  mlkit::matrix<double> x(shape);
  const double lambda = 0.75;
  rl::affine_scan<double>(
      mlkit::cpu{},
      [=](double reward, double g, double v) {
        return rl::affine<double>{g * lambda, reward + g * (1 - lambda) * v};
      },
      {.seed = seed}, x, view(rewards, shape), view(discounts, shape), view(values, shape));
  for (index_t i = 0; i < 10; ++i) CHECK(x.data()[i] == Approx(lambda_returns[i]).epsilon(1e-5));
  rl::affine_scan<double>(
      mlkit::cpu{},
      [](double reward, double g) {
        return rl::affine<double>{g, reward};
      },
      {.seed = seed}, x, view(rewards, shape), view(discounts, shape));
  for (index_t i = 0; i < 10; ++i) CHECK(x.data()[i] == Approx(discounted_returns[i]).epsilon(1e-5));
}

TEST_CASE("affine_scan refuses bad input before it writes", "[rl][scan][bad input]") {
  std::vector<float> a(20, 0.5f), b(20, 1.0f), out(20, 7.0f), seed(1), few(19);
  const auto map = [](float x, float y) { return rl::affine<float>{x, y}; };
  const auto refuses = [&](const std::string& message, const rl::scan_options<float>& o, const auto& to,
                           const auto& from) {
    CHECK_THROWS_WITH(rl::affine_scan(mlkit::cpu{}, map, o, to, a, from), "mlkit::" + message);
    CHECK(out == std::vector<float>(20, 7.0f));
  };
  rl::sequence_view<float> to(out), short_one(few), input(b);
  std::vector<bool> no_bytes;
  const std::vector<std::uint8_t> mask(20, 1), short_mask(19, 1);
  const std::vector<std::int32_t> starts{0, 20};
  refuses("shape_error: rl::affine_scan: input 1 has shape [1, 19], but input 0 has [1, 20]", {}, to, few);
  refuses("shape_error: rl::affine_scan: out has shape [1, 19], but input 0 has [1, 20]", {}, short_one, b);
  refuses("shape_error: rl::affine_scan: out [1, 20] overlaps input 1 [1, 20]", {}, input, b);
  refuses("shape_error: rl::affine_scan: mask has shape [1, 19], but input 0 has [1, 20]", {.mask = short_mask}, to, b);
  refuses("shape_error: rl::affine_scan: seed has 20 elements, but input 0 has 1", {.seed = b}, to, b);
  refuses("value_error: rl::affine_scan: mask and cu_seqlens are both given; packed tokens all count",
          {.mask = mask, .cu_seqlens = starts}, to, b);
}
