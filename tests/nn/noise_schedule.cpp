// Schedules, targets and times: against diffusers, and against the probability that they stand for.
#include <mlkit/nn.hpp>

#include <catch2/catch.hpp>

#include "fixtures.hpp"

namespace nn = mlkit::nn;
using Catch::Matchers::Contains;
using mlkit::index_t;

TEST_CASE("schedules agree with diffusers", "[nn]") {
  // diffusers computes them in f32 and counts t from 0.
  for (const std::string name : {"linear", "cosine"}) {
    const auto s = name == "linear" ? nn::noise_schedule::linear(200) : nn::noise_schedule::cosine(200);
    INFO(name);
    for (index_t t = 1; t <= 200; ++t) {
      const double want = fixture(name + ".alpha_bar")[static_cast<std::size_t>(t - 1)];
      CHECK(s.alpha_bar(t) == Approx(want).epsilon(5e-4).margin(1e-6));
    }
    for (index_t t = 2; t <= 200; ++t)
      CHECK(s.posterior_variance(t) ==
            Approx(fixture(name + ".posterior_variance")[static_cast<std::size_t>(t - 2)]).epsilon(2e-3));
  }
  const auto scaled = nn::noise_schedule::scaled_linear(1000);
  const auto& want = fixture("scaled_linear.alpha_bar", "sampler_fixtures.txt");  // every 50th, in f64
  for (std::size_t i = 0; i < want.size(); ++i)
    CHECK(scaled.alpha_bar(static_cast<index_t>(50 * i + 1)) == Approx(want[i]).epsilon(1e-12));
  CHECK(nn::noise_schedule::linear(1000).alpha_bar(1000) == Approx(4.0358e-5).epsilon(1e-4));  // Ho et al. 2020
}

TEST_CASE("the posterior is Bayes' rule", "[nn]") {
  // q(x_{t-1} | x_0) = N(sqrt(abar_{t-1}) x_0, 1 - abar_{t-1}) and q(x_t | x_{t-1}) = N(sqrt(1 - beta) x_{t-1}, beta):
  // the product of two normal densities adds their precisions.
  const auto s = nn::noise_schedule::cosine(50);
  const double x0 = 0.3, xt = -0.8;
  for (index_t t = 2; t <= 50; ++t) {
    const double prior = 1 / (1 - s.alpha_bar(t - 1)), likelihood = (1 - s.beta(t)) / s.beta(t);
    const double variance = 1 / (prior + likelihood);
    const double mean =
        variance * (prior * std::sqrt(s.alpha_bar(t - 1)) * x0 + std::sqrt(1 - s.beta(t)) / s.beta(t) * xt);
    CHECK(s.posterior_variance(t) == Approx(variance).epsilon(1e-10));
    const auto [first, second] = s.posterior_mean(t);
    CHECK(first * x0 + second * xt == Approx(mean).epsilon(1e-10));
  }
  CHECK(s.posterior_variance(1) == 0);
  CHECK(s.posterior_mean(1).first == Approx(1));
}

TEST_CASE("noise has the variance that the schedule says", "[nn]") {
  const auto s = nn::noise_schedule::linear(100);
  const index_t n = 200, d = 50;
  mlkit::matrix<float> x0({n, d}), eps({n, d}), out({n, d});
  for (index_t i = 0; i < n * d; ++i) {
    x0.data()[i] = 0.5f;
    eps.data()[i] = mlkit::random_stream{1, 1}.normal(static_cast<std::uint64_t>(i));
  }
  const std::vector<std::int32_t> t(static_cast<std::size_t>(n), 60);
  s.add_noise<float>({}, x0, t, eps, out);
  double mean = 0, square = 0;
  for (const float v : out) mean += v / static_cast<double>(n * d);
  for (const float v : out) square += (v - mean) * (v - mean) / static_cast<double>(n * d);
  CHECK(mean == Approx(0.5 * std::sqrt(s.alpha_bar(60))).margin(0.03));
  CHECK(square == Approx(1 - s.alpha_bar(60)).epsilon(0.05));
}

TEST_CASE("what a model is to predict is eps, x_0 or diffusers' velocity", "[nn]") {
  const auto s = nn::noise_schedule::linear(1000);
  const std::vector<double>&x0 = fixture("image", "sampler_fixtures.txt"),
        &eps = fixture("start", "sampler_fixtures.txt");
  const std::vector<std::int32_t> t{100, 701};
  mlkit::matrix<double> x({2, 5}), out({2, 5});
  const mlkit::matrix_view<const double> image(x0.data(), {2, 5}), noise(eps.data(), {2, 5});
  s.add_noise<double>({}, image, t, noise, x);
  const auto check = [&](nn::prediction predicts, const std::vector<double>& want) {
    s.target<double>({}, predicts, image, t, noise, out);
    for (index_t r = 0; r < 2; ++r) {
      const auto [of_x, of_prediction] = predicts.recovered(s.level(t[static_cast<std::size_t>(r)]));
      for (index_t c = 0; c < 5; ++c) {
        CHECK(out(r, c) == Approx(want[static_cast<std::size_t>(5 * r + c)]).epsilon(1e-12));
        CHECK(of_x * x(r, c) + of_prediction * out(r, c) == Approx(image(r, c)).epsilon(1e-10));
      }
    }
  };
  check(nn::prediction::epsilon, eps);
  check(nn::prediction::sample, x0);
  check(nn::prediction::v, fixture("velocity", "sampler_fixtures.txt"));
  // One of the user's own: x_0 - eps, as in flow matching.
  std::vector<double> apart;
  for (std::size_t i = 0; i < 10; ++i) apart.push_back(x0[i] - eps[i]);
  check({[](nn::noise_level) { return std::pair(1.0, -1.0); }}, apart);
}

TEST_CASE("times are spaced as diffusers spaces them", "[nn]") {
  for (const auto& [steps, count] :
       {std::pair(1000, 10), {1000, 7}, {1000, 15}, {1000, 30}, {50, 20}, {50, 50}, {1000, 1}}) {
    const auto s = nn::noise_schedule::linear(steps);
    const auto check = [&, steps = steps, count = count](const std::string& spacing,
                                                         const std::vector<index_t>& times) {
      INFO(spacing << ", " << count << " of " << steps);
      const auto& want = fixture("times." + spacing + "." + std::to_string(steps) + "." + std::to_string(count),
                                 "sampler_fixtures.txt");
      CHECK(std::vector<double>(times.begin(), times.end()) == want);
    };
    check("trailing", s.trailing(count));
    check("leading", s.leading(count));
    check("linspace", s.linspace(count));
  }
}

TEST_CASE("time features follow their formula", "[nn]") {
  const std::vector<std::int32_t> t{0, 7};
  mlkit::matrix<double> f({2, 6});
  nn::time_features<double>(t, f, 1000);
  CHECK(f(0, 0) == 0);
  CHECK(f(0, 3) == 1);
  CHECK(f(1, 2) == Approx(std::sin(7 * std::pow(1000.0, -2.0 / 3))));
  CHECK(f(1, 4) == Approx(std::cos(7 * std::pow(1000.0, -1.0 / 3))));
}

TEST_CASE("schedules refuse what has no meaning", "[nn]") {
  const auto s = nn::noise_schedule::linear(10);
  mlkit::matrix<float> x({2, 3}), narrow({2, 2});
  const std::vector<std::int32_t> t{1, 11};
  CHECK_THROWS_WITH(s.alpha_bar(11), Contains("t = 11") && Contains("[0, 10]"));
  CHECK_THROWS_WITH(s.level(-1), Contains("t = -1") && Contains("[0, 10]"));
  CHECK_THROWS_WITH(s.beta(0), Contains("t = 0"));
  CHECK_THROWS_WITH(nn::noise_schedule::linear(0), Contains("steps = 0"));
  CHECK_THROWS_WITH(nn::noise_schedule::linear(2, 0.1, 2), Contains("beta = 2"));
  CHECK_THROWS_WITH(nn::noise_schedule::scaled_linear(2, -1), Contains("nan is outside (0, 1)"));
  CHECK_THROWS_WITH(nn::noise_schedule::from_betas({}), Contains("from_betas: steps = 0"));
  CHECK_THROWS_WITH(nn::noise_schedule::from_betas(std::vector<double>{0.1, 0}), Contains("beta = 0"));
  CHECK_THROWS_WITH(nn::noise_schedule::from_betas(std::vector<double>{1e-17}), Contains("1e-17 is nothing beside 1"));
  CHECK_THROWS_WITH(s.add_noise<float>({}, x, t, x, narrow), Contains("out has 2 columns"));
  CHECK_THROWS_WITH(s.add_noise<float>({}, x, t, x, x), Contains("t = 11"));
  CHECK_THROWS_WITH(s.target<float>({}, nn::prediction::v, x, t, x, x), Contains("schedule::target: t = 11"));
  for (const index_t count : {-1, 0, 11}) {
    const std::string text = ": " + std::to_string(count) + " times are asked for, outside [1, 10]";
    CHECK_THROWS_WITH(s.trailing(count), Contains("trailing" + text));
    CHECK_THROWS_WITH(s.leading(count), Contains("leading" + text));
    CHECK_THROWS_WITH(s.linspace(count), Contains("linspace" + text));
  }
}

TEST_CASE("views that a schedule cannot read or write are refused, and nothing is written", "[nn]") {
  const auto s = nn::noise_schedule::linear(10);
  const auto poison = [](auto& t) { std::fill(t.begin(), t.end(), 7.0f); };
  mlkit::matrix<float> x({2, 3}), eps({2, 3}), out({2, 3});
  poison(x), poison(out);
  const std::vector<std::int32_t> t{1, 10};
  const mlkit::matrix_view<float> none(nullptr, {2, 3}), crossed(out.data(), {2, 3}, {1, 1});
  const std::string add = "nn::noise_schedule::add_noise: ";
  CHECK_THROWS_WITH(s.add_noise<float>({}, none, t, eps, out), Contains(add + "x0 is null, but has shape [2, 3]"));
  CHECK_THROWS_WITH(s.add_noise<float>({}, x, t, none, out), Contains(add + "eps is null"));
  CHECK_THROWS_WITH(s.add_noise<float>({}, x, t, eps, none), Contains(add + "out is null"));
  CHECK_THROWS_WITH(s.add_noise<float>({}, x, t, eps, crossed), Contains(add + "out of shape [2, 3] has overlapping"));
  CHECK_THROWS_WITH(s.add_noise<float>({}, x, t, eps, x), Contains(add + "out [2, 3] overlaps x0 [2, 3]"));
  CHECK_THROWS_WITH(s.add_noise<float>({}, eps, t, x, x), Contains(add + "out [2, 3] overlaps eps [2, 3]"));

  mlkit::matrix<float> odd({2, 3}), even({2, 4});
  CHECK_THROWS_WITH(nn::time_features<float>(t, odd), Contains("out has 3 columns, an odd number"));
  CHECK_THROWS_WITH(nn::time_features<float>(t, even, 0), Contains("period = 0 is outside (0, inf)"));
  CHECK_THROWS_WITH(nn::time_features<float>(t, mlkit::matrix_view<float>(nullptr, {2, 4})), Contains("out is null"));
  for (const auto* m : {&x, &out}) CHECK(std::all_of(m->begin(), m->end(), [](float v) { return v == 7; }));
}
