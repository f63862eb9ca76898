// Samplers, image to image and guidance: trajectories of diffusers' schedulers, and what must hold for any model.
#include <mlkit/nn.hpp>

#include <catch2/catch.hpp>

#include "fixtures.hpp"

namespace nn = mlkit::nn;
using Catch::Matchers::Contains;
using mlkit::index_t;

namespace {

const std::vector<double>& recorded(const std::string& name) { return fixture(name, "sampler_fixtures.txt"); }
mlkit::matrix_view<const double> recorded(const std::string& name, index_t rows) {
  const auto& values = recorded(name);
  return {values.data(), {rows, static_cast<index_t>(values.size()) / rows}};
}

// x W + t / 1000 b + context U, as tests/reference/make_sampler_fixtures.py has it.
struct linear_model {
  void operator()(mlkit::matrix_view<const double> x, index_t t, mlkit::matrix_view<double> out) const {
    const auto w = recorded("W", 5);
    for (index_t r = 0; r < x.extent(0); ++r)
      for (index_t c = 0; c < 5; ++c) {
        out(r, c) = static_cast<double>(t) / 1000 * recorded("b")[static_cast<std::size_t>(c)];
        for (index_t k = 0; k < 5; ++k) out(r, c) += x(r, k) * w(k, c);
      }
  }
  void operator()(mlkit::matrix_view<const double> x, index_t t, mlkit::matrix_view<const double> context,
                  mlkit::matrix_view<double> out) const {
    (*this)(x, t, out);
    const auto u = recorded("U", 3);
    for (index_t r = 0; r < x.extent(0); ++r)
      for (index_t c = 0; c < 5; ++c)
        for (index_t k = 0; k < 3; ++k) out(r, c) += context(r, k) * u(k, c);
  }
};

// The states that a model is asked about and the one that is returned, without the first, against the fixture of that
// name.
template <class Run>
void check_states(const std::string& name, double tolerance, const Run& run) {
  INFO(name);
  const auto& want = recorded(name);
  std::vector<double> states;
  mlkit::matrix<double> x({2, 5});
  run(x.view(), states);
  states.insert(states.end(), x.begin(), x.end());
  states.erase(states.begin(), states.begin() + 10);
  REQUIRE(states.size() == want.size());
  for (std::size_t i = 0; i < want.size(); ++i) {
    INFO("step " << i / 10 << ", element " << i % 10);
    CHECK(std::abs(states[i] - want[i]) < tolerance * std::max(1.0, std::abs(want[i])));
  }
}

template <class Model>
auto watched(Model& model, std::vector<double>& states) {
  return [&](mlkit::matrix_view<const double> x, index_t t, mlkit::matrix_view<double> out) {
    states.insert(states.end(), x.data, x.data + x.size());
    model(x, t, out);
  };
}

template <class Sampler, class Model = linear_model>
void check_sampler(const std::string& name, const Sampler& sampler, nn::sampling_options o, double tolerance = 1e-11,
                   const nn::noise_schedule& schedule = nn::noise_schedule::linear(1000), Model model = {}) {
  o.seed = 42;
  check_states(name, tolerance, [&](mlkit::matrix_view<double> x, std::vector<double>& states) {
    std::copy(recorded("start").begin(), recorded("start").end(), x.data);
    nn::sample<double>({}, watched(model, states), sampler, schedule, x, o);
  });
}

}  // namespace

TEST_CASE("samplers take the steps that diffusers takes", "[nn]") {
  constexpr double with_noise = 1e-6;  // the noise is rounded to f32
  for (const auto& [name, predicts] :
       {std::pair("epsilon", nn::prediction::epsilon), {"sample", nn::prediction::sample}, {"v", nn::prediction::v}}) {
    const std::string kind = name;
    check_sampler("ddim." + kind, nn::ddim{}, {.steps = 10, .predicts = predicts, .clip = 0});
    check_sampler("ddpm." + kind, nn::ddpm{}, {.steps = 10, .predicts = predicts, .clip = 0}, with_noise);
    check_sampler("dpm." + kind, nn::dpm_solver{}, {.steps = 20, .predicts = predicts, .clip = 0});
  }
  const auto linear = nn::noise_schedule::linear(1000), cosine = nn::noise_schedule::cosine(1000),
             scaled = nn::noise_schedule::scaled_linear(1000);
  check_sampler("ddim.clip", nn::ddim{}, {.steps = 10});
  check_sampler("ddim.leading", nn::ddim{}, {.times = linear.leading(20), .clip = 0});
  check_sampler("ddim.eta", nn::ddim{.eta = 0.7}, {.steps = 10, .clip = 0}, with_noise);
  check_sampler("ddim.cosine", nn::ddim{}, {.steps = 10, .predicts = nn::prediction::v, .clip = 0}, 1e-9, cosine);
  check_sampler("ddpm.clip", nn::ddpm{}, {.steps = 10}, with_noise);
  check_sampler("ddpm.large", nn::ddpm{.large_variance = true}, {.times = linear.leading(10), .clip = 0}, with_noise);
  check_sampler("dpm.short", nn::dpm_solver{}, {.steps = 5, .clip = 0});
  check_sampler("dpm.uneven", nn::dpm_solver{}, {.steps = 15, .clip = 0}, 1e-11, scaled);
  check_sampler("dpm.first_order", nn::dpm_solver{.order = 1}, {.steps = 10, .clip = 0});
  check_sampler("dpm.cosine", nn::dpm_solver{}, {.steps = 10, .predicts = nn::prediction::v, .clip = 0}, 1e-9, cosine);
  check_sampler("dpm.custom", nn::dpm_solver{}, {.times = {988, 655, 322, 101, 100, 8}, .clip = 0});
}

TEST_CASE("image to image starts where diffusers starts", "[nn]") {
  const auto schedule = nn::noise_schedule::linear(1000);
  linear_model model;
  const auto check = [&](const std::string& name, const auto& sampler, index_t steps, double strength) {
    check_states("img2img." + name, 1e-6, [&](mlkit::matrix_view<double> x, std::vector<double>& states) {
      nn::img2img<double>({}, watched(model, states), sampler, schedule, recorded("image", 2), strength, x,
                          {.steps = steps, .clip = 0, .seed = 42});
    });
  };
  check("ddim", nn::ddim{}, 10, 0.65);
  check("dpm", nn::dpm_solver{}, 20, 0.3);
}

TEST_CASE("image to image takes int(n strength) steps", "[nn]") {
  const auto schedule = nn::noise_schedule::cosine(100);
  const auto image = recorded("image", 2);
  mlkit::matrix<double> out({2, 5});
  for (const auto& [strength, steps] : {std::pair(0.0, 0), {0.09, 0}, {0.1, 1}, {0.58, 5}, {0.99, 9}, {1.0, 10}}) {
    INFO(strength);
    std::vector<index_t> times;
    const auto model = [&](auto, index_t t, auto eps) {
      times.push_back(t);
      for (index_t i = 0; i < 10; ++i) eps.data[i] = 0;
    };
    nn::img2img<double>({}, model, nn::ddim{}, schedule, image, strength, out, {.steps = 10});
    REQUIRE(static_cast<int>(times.size()) == steps);
    for (int i = 0; i < steps; ++i) CHECK(times[static_cast<std::size_t>(i)] == 10 * (steps - i));
    if (steps == 0) CHECK(std::equal(out.begin(), out.end(), image.data));
  }
}

TEST_CASE("what is called after a step sees what the model is asked next, and may change it", "[nn]") {
  const mlkit::cpu exec;
  const auto schedule = nn::noise_schedule::cosine(100);
  const auto start = [](mlkit::matrix<double>& x) {
    for (index_t i = 0; i < x.size(); ++i) x.data()[i] = 0.3 * static_cast<double>(i % 7) - 0.8;
  };
  linear_model model;
  const auto run = [&](const auto& from, bool image) {
    std::vector<double> asked, seen;
    std::vector<index_t> steps;
    mlkit::matrix<double> x({2, 5}), original({2, 5});
    start(x), start(original);
    const auto after = [&](index_t i, mlkit::matrix_view<double> now) {
      steps.push_back(i);
      if (i == from) std::fill(now.data, now.data + now.size(), 0.25);
      seen.insert(seen.end(), now.data, now.data + now.size());
    };
    const nn::sampling_options o{.steps = 5, .clip = 0};
    if (image)
      nn::img2img<double>(exec, watched(model, asked), nn::ddim{}, schedule, original, 1, x.view(), o, after);
    else
      nn::sample<double>(exec, watched(model, asked), nn::ddim{}, schedule, x.view(), o, after);
    CHECK(steps == std::vector<index_t>{0, 1, 2, 3, 4});
    asked.erase(asked.begin(), asked.begin() + 10);
    asked.insert(asked.end(), x.begin(), x.end());
    CHECK(asked == seen);
    return asked;
  };
  const bool image = GENERATE(false, true);
  const std::vector<double> left = run(-1, image), changed = run(2, image);
  CHECK(std::equal(left.begin(), left.begin() + 20, changed.begin()));
  CHECK(changed[20] == 0.25);

  // DDIM forgets the past: what follows is a run of the last steps from what was put there.
  mlkit::matrix<double> x({2, 5});
  std::fill(x.begin(), x.end(), 0.25);
  const std::vector<index_t> times = schedule.trailing(5);
  nn::sample<double>(exec, model, nn::ddim{}, schedule, x.view(), {.times = {times[3], times[4]}, .clip = 0});
  CHECK(std::equal(x.begin(), x.end(), changed.end() - 10));

  // Copies of what it is given may be changed, or refer elsewhere.
  mlkit::matrix<double> elsewhere({2, 5}), y({2, 5});
  start(x), start(y);
  nn::sample<double>(exec, model, nn::ddim{}, schedule, x.view(), {.steps = 5});
  nn::sample<double>(exec, model, nn::ddim{}, schedule, y.view(), {.steps = 5},
                     [&](index_t, auto&& now) { now = elsewhere.view(); });
  CHECK(std::equal(x.begin(), x.end(), y.begin()));
}

TEST_CASE("x_0 is kept within bounds that the type of samples knows as zero", "[nn]") {
  mlkit::matrix<float> x({1, 3});
  std::fill(x.begin(), x.end(), 5.0f);
  nn::sample<float>({}, [](auto, index_t, mlkit::matrix_view<float> out) { std::fill(out.data, out.data + 3, 0.0f); },
                    nn::ddim{}, nn::noise_schedule::linear(1000), x, {.steps = 1, .clip = 1e-60});
  CHECK(std::all_of(x.begin(), x.end(), [](float v) { return std::abs(v) < 1e-30f; }));
}

TEST_CASE("guidance is diffusers', from one call of the model", "[nn]") {
  std::vector<index_t> rows;
  const auto model = [&](mlkit::matrix_view<const double> x, index_t t, mlkit::matrix_view<const double> context,
                         mlkit::matrix_view<double> out) {
    rows.push_back(x.extent(0));
    CHECK(context.extent(0) == x.extent(0));
    linear_model{}(x, t, context, out);
  };
  const auto prompt = recorded("prompt", 2), negative = recorded("negative", 1);
  check_sampler("guided.ddim", nn::ddim{}, {.steps = 10, .clip = 0}, 1e-11, nn::noise_schedule::linear(1000),
                nn::guided<double>({}, model, prompt, negative, 4.5));
  CHECK(rows == std::vector<index_t>(10, 4));
  check_sampler("guided.dpm", nn::dpm_solver{}, {.steps = 10, .predicts = nn::prediction::v, .clip = 0}, 1e-11,
                nn::noise_schedule::linear(1000), nn::guided<double>({}, model, prompt, negative, 4.5));

  // A negative prompt for each row; strengths at which one half is enough; views with strides.
  mlkit::matrix<double> negatives({2, 3}), wide({2, 10}), out({2, 5}), u({2, 5}), c({2, 5});
  for (index_t i = 0; i < 6; ++i) negatives.data()[i] = 0.1 * static_cast<double>(i);
  const mlkit::matrix_view<double> x(wide.data(), {2, 5}, {1, 2});
  for (index_t i = 0; i < 20; ++i) wide.data()[i] = 0.3 * static_cast<double>(i % 7) - 1;
  mlkit::matrix<double> dense({2, 5});
  for (index_t r = 0; r < 2; ++r)
    for (index_t k = 0; k < 5; ++k) dense(r, k) = x(r, k);
  linear_model{}(dense.view(), 30, mlkit::matrix_view<const double>(negatives.view()), u.view());
  linear_model{}(dense.view(), 30, prompt, c.view());
  for (const double g : {0.0, 1.0, -2.0, 7.5}) {
    rows.clear();
    auto guided = nn::guided<double>({}, model, prompt, negatives, g);
    guided(x, 30, out.view());
    CHECK(rows == std::vector<index_t>{g == 0 || g == 1 ? 2 : 4});
    for (index_t i = 0; i < 10; ++i) CHECK(out.data()[i] == Approx(u.data()[i] + g * (c.data()[i] - u.data()[i])));
  }
}

TEST_CASE("labels guide as well as embeddings do", "[nn]") {
  const std::vector<std::int32_t> labels{3, 4, 5}, none{9};
  const mlkit::matrix_view<const std::int32_t> prompt(labels.data(), {3, 1}), negative(none.data(), {1, 1});
  const auto model = [](auto x, index_t, mlkit::matrix_view<const std::int32_t> context, auto out) {
    for (index_t r = 0; r < x.extent(0); ++r) out(r, 0) = static_cast<float>(context(r, 0));
  };
  auto guided = nn::guided<float>({}, model, prompt, negative, 2.0);
  mlkit::matrix<float> x({3, 1}), out({3, 1});
  guided(x, 1, out.view());
  for (index_t r = 0; r < 3; ++r) CHECK(out(r, 0) == 9 + 2 * (static_cast<float>(r) + 3 - 9));
}

TEST_CASE("every sampler finds an image whose noise is known", "[nn]") {
  // With x_0 known, the noise in x_t is (x_t - signal x_0) / noise: any number of steps of any sampler ends at x_0.
  const auto s = nn::noise_schedule::cosine(100);
  const mlkit::matrix<double> image = mlkit::matrix<double>::of({1, 4}, {0.5f, -0.25f, 1, -1});
  const auto check = [&](const auto& sampler) {
    for (const index_t steps : {1, 7, 100}) {
      mlkit::matrix<double> x({1, 4});
      for (index_t i = 0; i < 4; ++i) x(0, i) = mlkit::random_stream{1, 2}.normal(static_cast<std::uint64_t>(i));
      index_t calls = 0, last = 101;
      const auto predict = [&](auto now, index_t t, auto eps) {
        CHECK(t < last);
        last = t;
        ++calls;
        const auto level = s.level(t);
        for (index_t i = 0; i < 4; ++i) eps(0, i) = (now(0, i) - level.signal * image(0, i)) / level.noise;
      };
      nn::sample<double>({}, predict, sampler, s, x, {.steps = steps});
      CHECK(calls == steps);
      for (index_t i = 0; i < 4; ++i) CHECK(x(0, i) == Approx(image(0, i)).margin(1e-9));
    }
  };
  check(nn::ddim{});
  check(nn::ddim{.eta = 1});
  check(nn::ddpm{});
  check(nn::ddpm{.large_variance = true});
  check(nn::dpm_solver{});
}

TEST_CASE("DDPM is DDIM with the posterior's variance", "[nn]") {
  const auto s = nn::noise_schedule::linear(1000);
  for (const index_t t : {2, 90, 1000}) {
    const nn::sampling_step step{s.level(t), s.level(t - 1), nullptr};
    const auto a = nn::ddpm{}.weights(step), b = nn::ddim{.eta = 1}.weights(step);
    CHECK(a.x == Approx(b.x).epsilon(1e-10));
    CHECK(a.x0 == Approx(b.x0).epsilon(1e-10));
    CHECK(a.noise == Approx(b.noise).epsilon(1e-10));
    CHECK(a.noise * a.noise == Approx(s.posterior_variance(t)).epsilon(1e-10));
    CHECK(a.x0 == Approx(s.posterior_mean(t).first).epsilon(1e-10));
    CHECK(a.x == Approx(s.posterior_mean(t).second).epsilon(1e-10));
  }
}

TEST_CASE("DPM-Solver++ needs fewer steps than DDIM", "[nn]") {
  // Data that are normal with deviation 0.5: the best prediction of x_0 is linear in x_t, and the exact solution scales
  // x_t by the deviations of the marginals. With five times the steps, the error of a method of order p falls by 5^p.
  const auto s = nn::noise_schedule::linear(1000);
  const auto error = [&](const auto& sampler, index_t steps) {
    mlkit::matrix<double> x({1, 1});
    const auto marginal = [&](index_t t) {
      const auto l = s.level(t);
      return std::sqrt(0.25 * l.signal * l.signal + l.noise * l.noise);
    };
    const auto predict = [&](auto now, index_t t, auto out) {
      out(0, 0) = 0.25 * s.level(t).signal / (marginal(t) * marginal(t)) * now(0, 0);
    };
    x(0, 0) = 1.3;
    nn::sample<double>({}, predict, sampler, s, x, {.steps = steps, .predicts = nn::prediction::sample, .clip = 0});
    return std::abs(x(0, 0) - 1.3 * 0.5 / marginal(1000));
  };
  CHECK(error(nn::dpm_solver{}, 40) < error(nn::ddim{}, 200));
  CHECK(error(nn::dpm_solver{}, 100) > 20 * error(nn::dpm_solver{}, 500));
  CHECK(error(nn::ddim{}, 100) < 6 * error(nn::ddim{}, 500));
}

TEST_CASE("samples do not depend on threads, and follow the seed and the place", "[nn]") {
  const auto s = nn::noise_schedule::linear(50);
  const auto run = [&](int threads, std::uint64_t seed, index_t rows) {
    mlkit::matrix<float> x({rows, 700});
    for (index_t i = 0; i < x.size(); ++i)
      x.data()[i] = mlkit::random_stream{1, 2}.normal(static_cast<std::uint64_t>(i));
    const auto predict = [](auto now, index_t, auto out) {
      for (index_t i = 0; i < now.size(); ++i) out.data[i] = 0.5f * now.data[i];
    };
    nn::sample<float>({.threads = threads}, predict, nn::ddpm{}, s, x, {.steps = 7, .seed = seed});
    return std::vector<float>(x.begin(), x.end());
  };
  const auto one = run(1, 3, 20);
  CHECK(run(2, 3, 20) == one);
  CHECK(run(5, 3, 20) == one);
  CHECK(run(1, 4, 20) != one);
  const auto few = run(1, 3, 2);
  CHECK(std::equal(few.begin(), few.end(), one.begin()));
}

TEST_CASE("sampling refuses what has no meaning, before the model is asked", "[nn]") {
  const auto s = nn::noise_schedule::linear(10);
  mlkit::matrix<float> x({2, 3}), image({2, 3}), narrow({2, 2});
  for (auto* m : {&x, &image, &narrow}) std::fill(m->begin(), m->end(), 7.0f);
  const mlkit::matrix_view<float> none(nullptr, {2, 3}), crossed(x.data(), {2, 3}, {1, 1});
  const auto model = [](auto, index_t, auto) { FAIL("the model was asked"); };
  const auto sample = [&](const auto& sampler, const nn::sampling_options& o) {
    nn::sample<float>({}, model, sampler, s, x, o);
  };
  using options = nn::sampling_options;
  CHECK_THROWS_WITH(sample(nn::ddim{}, options{.steps = 11}), Contains("nn::sample: steps = 11 is outside [1, 10]"));
  CHECK_THROWS_WITH(sample(nn::ddim{}, options{.steps = 0}), Contains("steps = 0"));
  CHECK_THROWS_WITH(sample(nn::ddim{}, options{.times = {11, 3}}), Contains("times[0] = 11 is outside [1, 10]"));
  CHECK_THROWS_WITH(sample(nn::ddim{}, options{.times = {4, 0}}), Contains("times[1] = 0 is outside"));
  CHECK_THROWS_WITH(sample(nn::ddim{}, options{.times = {4, 4}}), Contains("times[1] = 4 is not before times[0] = 4"));
  for (const double bad : {-1.0, std::nan(""), double{INFINITY}}) {
    CHECK_THROWS_WITH(sample(nn::ddim{.eta = bad}, options{.steps = 5}), Contains("nn::ddim: eta = "));
    CHECK_THROWS_WITH(sample(nn::ddim{}, options{.steps = 5, .clip = bad}), Contains("clip = "));
  }
  CHECK_THROWS_WITH(sample(nn::dpm_solver{.order = 3}, options{.steps = 5}), Contains("order = 3 is neither 1 nor 2"));
  // x_0 does not follow from a prediction of x_t itself.
  const nn::prediction useless{[](nn::noise_level l) { return std::pair(l.signal, l.noise); }};
  CHECK_THROWS_WITH(sample(nn::ddim{}, options{.steps = 5, .predicts = useless}),
                    Contains("at time 10 x_0 does not follow"));
  // Numbers that f64 has and f32 has not.
  const auto steep = nn::noise_schedule::linear(1000, 1e-4, 0.5);
  CHECK_THROWS_WITH(nn::sample<float>({}, model, nn::ddim{}, steep, x, {.steps = 10}), Contains("x_0 does not follow"));
  struct endless {
    nn::step_weights weights(const nn::sampling_step&) const { return {.x = 1e39}; }
  };
  CHECK_THROWS_WITH(sample(endless{}, options{.steps = 10}),
                    Contains("at time 10 the sampler's weights are not finite"));
  CHECK_THROWS_WITH(nn::sample<float>({}, model, nn::ddim{}, s, none, {.steps = 5}), Contains("nn::sample: x is null"));
  CHECK_THROWS_WITH(nn::sample<float>({}, model, nn::ddim{}, s, crossed, {.steps = 5}), Contains("overlapping"));

  const auto redraw = [&](mlkit::matrix_view<const float> from, double strength, mlkit::matrix_view<float> out) {
    nn::img2img<float>({}, model, nn::ddim{}, s, from, strength, out, {.steps = 5});
  };
  for (const double bad : {-0.1, 1.1, std::nan("")})
    CHECK_THROWS_WITH(redraw(image, bad, x), Contains("nn::img2img: strength = "));
  CHECK_THROWS_WITH(redraw(image, 0.5, narrow), Contains("out has 2 columns, but image has 3"));
  CHECK_THROWS_WITH(redraw(none, 0.5, x), Contains("image is null"));
  CHECK_THROWS_WITH(redraw(image, 0.5, none), Contains("out is null"));
  CHECK_THROWS_WITH(redraw(x, 0.5, x), Contains("out [2, 3] overlaps image [2, 3]"));

  const auto conditional = [](auto, index_t, mlkit::matrix_view<const float>, auto) { FAIL("the model was asked"); };
  const auto guide = [&](const auto& prompt, const auto& negative, double strength) {
    return nn::guided<float>({}, conditional, prompt, negative, strength);
  };
  mlkit::matrix<float> long_x({3, 3});
  CHECK_THROWS_WITH(guide(image, image, std::nan("")), Contains("nn::guided: strength = nan is not finite"));
  CHECK_THROWS_WITH(guide(image, narrow, 2), Contains("negative has 2 columns, but prompt has 3"));
  CHECK_THROWS_WITH(guide(image, long_x, 2), Contains("negative has 3 rows, but prompt has 2"));
  CHECK_THROWS_WITH(guide(none, image, 2), Contains("prompt is null"));
  auto guided = guide(image, image, 2);
  CHECK_THROWS_WITH(guided(long_x.view(), 1, long_x.view()), Contains("x has 3 rows, but prompt has 2"));
  CHECK_THROWS_WITH(guided(x.view(), 1, narrow.view()), Contains("out has 2 columns, but x has 3"));
  for (const auto* m : {&x, &image, &narrow}) CHECK(std::all_of(m->begin(), m->end(), [](float v) { return v == 7; }));
}
