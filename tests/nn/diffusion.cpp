// Schedules, the posterior and DDIM: against diffusers, and against the probability that they stand for.
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

TEST_CASE("DDIM steps agree with diffusers and, at eta = 1, with the posterior", "[nn]") {
  const auto s = nn::noise_schedule::linear(200);
  const std::vector<double>& eps = fixture("ddim.eps");
  const mlkit::matrix_view<const double> e(eps.data(), {2, 6});
  std::vector<double> x = fixture("ddim.x");
  nn::ddim_step<double>({}, s, 111, 101, e, {x.data(), {2, 6}}, {.clip = 0});
  for (std::size_t i = 0; i < x.size(); ++i) CHECK(x[i] == Approx(fixture("ddim.eta0")[i]).margin(1e-6));

  x = fixture("ddim.x");
  const std::vector<double> before = x;
  nn::ddim_step<double>({}, s, 90, 89, e, {x.data(), {2, 6}}, {.eta = 1, .clip = 0, .seed = 4});
  const auto [first, second] = s.posterior_mean(90);
  const double spread = std::sqrt(s.posterior_variance(90));
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double x0 = (before[i] - std::sqrt(1 - s.alpha_bar(90)) * eps[i]) / std::sqrt(s.alpha_bar(90));
    const double z = mlkit::random_stream{4, 90}.normal(i);
    CHECK(x[i] == Approx(first * x0 + second * before[i] + spread * z).epsilon(1e-9));
  }

  // diffusers adds a noise of its own choosing; with it taken out, what is left is ours with eta = 0.7.
  x = fixture("ddim.x");
  nn::ddim_step<double>({}, s, 111, 101, e, {x.data(), {2, 6}}, {.eta = 0.7, .clip = 0, .seed = 4});
  const double ratio = (1 - s.alpha_bar(101)) / (1 - s.alpha_bar(111)) * (1 - s.alpha_bar(111) / s.alpha_bar(101));
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double sigma = 0.7 * std::sqrt(ratio), z = mlkit::random_stream{4, 111}.normal(i);
    CHECK(x[i] - sigma * z == Approx(fixture("ddim.eta1")[i] - sigma * fixture("ddim.z")[i]).margin(1e-6));
  }
}

TEST_CASE("DDIM with the true noise of one image finds it", "[nn]") {
  // With x_0 known, the noise in x_t is (x_t - sqrt(abar) x_0) / sqrt(1 - abar): every number of steps ends at x_0.
  const auto s = nn::noise_schedule::cosine(100);
  const mlkit::matrix<double> image = mlkit::matrix<double>::of({1, 4}, {0.5f, -0.25f, 1, -1});
  for (const index_t steps : {1, 7, 100}) {
    mlkit::matrix<double> x({1, 4});
    for (index_t i = 0; i < 4; ++i) x(0, i) = mlkit::random_stream{1, 2}.normal(static_cast<std::uint64_t>(i));
    index_t calls = 0, last = 101;
    const auto predict = [&](auto now, index_t t, auto eps) {
      CHECK(t < last);
      last = t;
      ++calls;
      for (index_t i = 0; i < 4; ++i)
        eps(0, i) = (now(0, i) - std::sqrt(s.alpha_bar(t)) * image(0, i)) / std::sqrt(1 - s.alpha_bar(t));
    };
    nn::ddim_sample<double>({}, s, predict, x, {.steps = steps});
    CHECK(calls == steps);
    for (index_t i = 0; i < 4; ++i) CHECK(x(0, i) == Approx(image(0, i)).margin(1e-9));
  }
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

TEST_CASE("guidance and time features follow their formulas", "[nn]") {
  const std::vector<float> u{1, 2};
  std::vector<float> c{3, 1};
  nn::guide<float>({}, 1.5, mlkit::as_view(u), mlkit::as_view(c));
  CHECK(c[0] == 4.0f);
  CHECK(c[1] == 0.5f);
  const std::vector<std::int32_t> t{0, 7};
  mlkit::matrix<double> f({2, 6});
  nn::time_features<double>(t, f, 1000);
  CHECK(f(0, 0) == 0);
  CHECK(f(0, 3) == 1);
  CHECK(f(1, 2) == Approx(std::sin(7 * std::pow(1000.0, -2.0 / 3))));
  CHECK(f(1, 4) == Approx(std::cos(7 * std::pow(1000.0, -1.0 / 3))));
}

TEST_CASE("diffusion refuses what has no meaning", "[nn]") {
  const auto s = nn::noise_schedule::linear(10);
  mlkit::matrix<float> x({2, 3}), narrow({2, 2});
  const std::vector<std::int32_t> t{1, 11};
  CHECK_THROWS_WITH(s.alpha_bar(11), Contains("t = 11") && Contains("[0, 10]"));
  CHECK_THROWS_WITH(s.beta(0), Contains("t = 0"));
  CHECK_THROWS_WITH(nn::noise_schedule::linear(0), Contains("steps = 0"));
  CHECK_THROWS_WITH(nn::noise_schedule::linear(2, 0.1, 2), Contains("beta = 2"));
  CHECK_THROWS_WITH(s.add_noise<float>({}, x, t, x, narrow), Contains("out has 2 columns"));
  CHECK_THROWS_WITH(s.add_noise<float>({}, x, t, x, x), Contains("t = 11"));
  CHECK_THROWS_WITH(nn::ddim_step<float>({}, s, 3, 3, x, narrow), Contains("s = 3"));
  CHECK_THROWS_WITH(nn::ddim_step<float>({}, s, 3, 1, x, narrow), Contains("eps has 3 columns"));
  const auto predict = [](auto, index_t, auto) {};
  CHECK_THROWS_WITH(nn::ddim_sample<float>({}, s, predict, x, {.steps = 11}), Contains("steps = 11"));
}

TEST_CASE("views that a step cannot read or write are refused, and nothing is written", "[nn]") {
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

  CHECK_THROWS_WITH(nn::ddim_step<float>({}, s, 3, 1, none, x), Contains("nn::ddim_step: eps is null"));
  CHECK_THROWS_WITH(nn::ddim_step<float>({}, s, 3, 1, eps, none), Contains("nn::ddim_step: x is null"));
  CHECK_THROWS_WITH(nn::ddim_step<float>({}, s, 3, 1, x, x), Contains("x [2, 3] overlaps eps [2, 3]"));
  for (const double bad : {-1.0, std::nan(""), double{INFINITY}}) {
    CHECK_THROWS_WITH(nn::ddim_step<float>({}, s, 3, 1, eps, x, {.eta = bad}), Contains("eta = "));
    CHECK_THROWS_WITH(nn::ddim_step<float>({}, s, 3, 1, eps, x, {.clip = bad}), Contains("clip = "));
  }
  bool asked = false;
  const auto predict = [&](auto, index_t, auto) { asked = true; };
  CHECK_THROWS_WITH(nn::ddim_sample<float>({}, s, predict, none, {.steps = 5}), Contains("ddim_sample: x is null"));
  CHECK_THROWS_WITH(nn::ddim_sample<float>({}, s, predict, x, {.steps = 5, .eta = -1}), Contains("eta = -1"));
  CHECK_FALSE(asked);

  const mlkit::vector_view<float> every_other(out.data(), {3}, {2}), run(x.data(), {3});
  CHECK_THROWS_WITH(nn::guide<float>({}, 2, run, every_other),
                    Contains("nn::guide: conditional has stride 2, but its elements must follow each other"));
  CHECK_THROWS_WITH(nn::guide<float>({}, 2, every_other, run), Contains("unconditional has stride 2"));
  CHECK_THROWS_WITH(nn::guide<float>({}, 2, run, run), Contains("conditional [3] overlaps unconditional [3]"));
  CHECK_THROWS_WITH(nn::guide<float>({}, std::nan(""), run, mlkit::vector_view<float>(out.data(), {3})),
                    Contains("strength = nan is not finite"));
  mlkit::matrix<float> odd({2, 3}), even({2, 4});
  CHECK_THROWS_WITH(nn::time_features<float>(t, odd), Contains("out has 3 columns, an odd number"));
  CHECK_THROWS_WITH(nn::time_features<float>(t, even, 0), Contains("period = 0 is outside (0, inf)"));
  CHECK_THROWS_WITH(nn::time_features<float>(t, mlkit::matrix_view<float>(nullptr, {2, 4})), Contains("out is null"));
  for (const auto* m : {&x, &out}) CHECK(std::all_of(m->begin(), m->end(), [](float v) { return v == 7; }));
}
