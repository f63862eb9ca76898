// Discounted, TD(lambda) and n-step returns against sums over each step's future, and against TorchRL.
#include <mlkit/rl/advantages.hpp>
#include <mlkit/rl/returns.hpp>

#include "../fixtures.hpp"
#include "rollouts.hpp"

using namespace rollouts;

namespace {

// The n-step return of each step of a sequence: n rewards, or those to the episode's or window's end.
double n_step(const window& w, const std::vector<step>& steps, std::size_t k, std::size_t n, double gamma) {
  double sum = 0, weight = 1;
  for (std::size_t j = k; j < k + n; ++j) {
    sum += weight * w.r[at(steps[j].t)];
    weight *= gamma;
    if (steps[j].kind != step::goes_on || j + 1 == k + n) return sum + weight * steps[j].following;
  }
  return sum;
}

// The lambda-return: (1 - lambda) sum of lambda^(n-1) times n-step returns, what is left of the weight on the longest.
double lambda_return(const window& w, const std::vector<step>& steps, std::size_t k, double gamma, double lambda) {
  double sum = 0, weight = 1;
  for (std::size_t n = 1;; ++n) {
    const bool last = steps[k + n - 1].kind != step::goes_on;
    if (weight > 1e-30 || last) sum += weight * (last ? 1 : 1 - lambda) * n_step(w, steps, k, n, gamma);
    if (last || (weight < 1e-30 && lambda < 1)) return sum;
    weight *= lambda;
  }
}

template <class F>
std::vector<double> each_step(const window& w, F&& f) {
  std::vector<double> out(at(w.batch * w.time));
  for (index_t s = 0; s < w.sequences(); ++s) {
    const std::vector<step> steps = w.resolve(s);
    for (std::size_t k = 0; k < steps.size(); ++k) out[at(steps[k].t)] = f(steps, k);
  }
  return out;
}

template <class T, class F>
outputs<T> run(arguments<T>& given, F&& f) {
  stored<T> out = given.out();
  if (given.w.begins)
    f(given.rollout(), rl::sequence_view<T>(out.view()), rl::done_begins{});
  else
    f(given.rollout(), rl::sequence_view<T>(out.view()), rl::done_ends{});
  return {out.plain()};
}
template <class T>
outputs<T> discounted(const mlkit::cpu& exec, arguments<T>& given, double gamma) {
  return run<T>(given, [&](const auto& in, const auto& out, auto done) {
    rl::discounted_returns<T>(exec, in, {.gamma = gamma}, out, done);
  });
}
template <class T>
outputs<T> td_lambda(const mlkit::cpu& exec, arguments<T>& given, double gamma, double lambda) {
  return run<T>(given, [&](const auto& in, const auto& out, auto done) {
    rl::td_lambda_returns<T>(exec, in, {.gamma = gamma, .lambda = lambda}, out, done);
  });
}
template <class T>
outputs<T> n_step(const mlkit::cpu& exec, arguments<T>& given, double gamma, index_t n) {
  return run<T>(given, [&](const auto& in, const auto& out, auto done) {
    rl::n_step_returns<T>(exec, in, {.gamma = gamma, .steps = n}, out, done);
  });
}

template <class T>
void check_values() {
  for (const double gamma : {0.9, 1.0, 0.0})
    each_window([&](const window& w) {
      const double g = static_cast<double>(static_cast<T>(gamma));
      for (const layout l : {layout::rows, layout::columns}) {
        arguments<T> given(w, l);
        INFO(text(w) << ", gamma " << gamma << ", layout " << static_cast<int>(l));
        const double tol = (gamma == 1 ? 10 : 1) * tolerance<T>;
        REQUIRE(error(discounted(mlkit::cpu{}, given, gamma)[0], each_step(w, [&](const auto& steps, std::size_t k) {
                        return n_step(w, steps, k, 1 << 20, g);
                      })) < tol);
        if (w.time > 600) continue;  // the sum below is cubic
        for (const double lambda : {0.7, 0.0})
          REQUIRE(error(td_lambda(mlkit::cpu{}, given, gamma, lambda)[0],
                        each_step(w, [&](const auto& steps, std::size_t k) {
                          return lambda_return(w, steps, k, g, lambda);
                        })) < tol);
        for (const index_t n : {1, 2, 3, 7, 16, 100000})
          REQUIRE(error(n_step(mlkit::cpu{}, given, gamma, n)[0], each_step(w, [&](const auto& steps, std::size_t k) {
                          return n_step(w, steps, k, at(n), g);
                        })) < tol);
      }
    });
}

}  // namespace

TEST_CASE("returns are sums over each step's future", "[rl][returns]") {
  check_values<float>();
  check_values<double>();
}

TEST_CASE("returns: layouts, threads, packing and neighbours change no bit", "[rl][returns]") {
  check_bits<float>([](const mlkit::cpu& exec, arguments<float>& given) {
    return outputs<float>{discounted(exec, given, 0.99)[0], td_lambda(exec, given, 0.99, 0.9)[0],
                          n_step(exec, given, 0.99, 5)[0]};
  });
}

TEST_CASE("TD(lambda) is gae's returns; lambda = 1 and many steps are discounted returns", "[rl][returns]") {
  const window w = make_window(9, 60, {.masked = true});
  arguments<double> given(w, layout::rows);
  stored<double> a = given.out(), g = given.out();
  rl::gae<double>(mlkit::cpu{}, given.rollout(), {.gamma = 0.9, .lambda = 0.6}, {a.view(), g.view()});
  const auto wide = [](const std::vector<double>& x) { return x; };
  CHECK(error(td_lambda(mlkit::cpu{}, given, 0.9, 0.6)[0], wide(g.plain())) < 1e-14);
  const std::vector<double> all = discounted(mlkit::cpu{}, given, 0.9)[0];
  CHECK(error(td_lambda(mlkit::cpu{}, given, 0.9, 1)[0], all) < 1e-14);
  CHECK(error(n_step(mlkit::cpu{}, given, 0.9, 60)[0], all) < 1e-14);
}

TEST_CASE("discounted returns without values: the rewards to go", "[rl][returns]") {
  const std::vector<float> r{1, 2, 3, 4};
  std::vector<float> out(4);
  rl::discounted_returns(mlkit::cpu{}, {.rewards = r}, {.gamma = 0.5}, out);
  CHECK(out == std::vector<float>{3.25f, 4.5f, 5, 4});
  const std::vector<bool> unused;
  const std::vector<std::uint8_t> te{0, 1, 0, 0};
  rl::discounted_returns(mlkit::cpu{}, {.rewards = r, .terminated = te}, {.gamma = 0.5}, out);
  CHECK(out == std::vector<float>{2, 2, 5, 4});
}

TEST_CASE("TorchRL's advantages and returns", "[rl][gae][returns][torchrl]") {
  const auto values = [](const std::string& name) -> const std::vector<double>& {
    return fixture(name, "scan_fixtures.txt");
  };
  const auto flags = [&](const std::string& name) {
    return std::vector<std::uint8_t>(values(name).begin(), values(name).end());
  };
  const double gamma = values("options")[0], lambda = values("options")[1];
  window w = make_window(3, 11, {});
  w.r = values("reward"), w.v = values("value"), w.fv = values("final");
  w.te = flags("terminated"), w.tr = flags("truncated");
  for (const layout l : {layout::rows, layout::columns}) {
    arguments<double> given(w, l);
    stored<double> a = given.out(), g = given.out();
    rl::gae<double>(mlkit::cpu{}, given.rollout(), {.gamma = gamma, .lambda = lambda}, {a.view(), g.view()});
    CHECK(error(a.plain(), values("gae.advantages")) < 1e-14);
    CHECK(error(g.plain(), values("gae.returns")) < 1e-14);
    CHECK(error(td_lambda(mlkit::cpu{}, given, gamma, lambda)[0], values("td_lambda")) < 1e-14);
    CHECK(error(discounted(mlkit::cpu{}, given, gamma)[0], values("td1")) < 1e-14);
    CHECK(error(n_step(mlkit::cpu{}, given, gamma, 1)[0], values("td0")) < 1e-14);
  }
}

// TruncatedGeneralizedAdvantageEstimationTest of google-deepmind/rlax, multistep_test.py; a discount of 0 terminates.
TEST_CASE("rlax's advantages", "[rl][gae][published]") {
  const std::vector<float> r0{0, 0, 1, 0, -0.5f}, v0{1, 4, -3, -2, -1}, r1{0, 0, 0, 0, 1}, v1{-3, -2, -1, 0, 5};
  const std::vector<float> behind{-1};
  const std::vector<std::uint8_t> ends{0, 0, 0, 1, 0};
  const struct {
    double lambda;
    std::vector<double> first, second;
  } expected[] = {{1, {-1.45118, -4.4557, 2.5396, 0.5249, -0.49}, {3, 2, 1, 0, -4.9}},
                  {0.7, {-0.676979, -5.248167, 2.4846, 0.6704, -0.49}, {2.2899, 1.73, 1, 0, -4.9}},
                  {0.4, {0.56731, -6.042, 2.3431, 0.815, -0.49}, {1.725, 1.46, 1, 0, -4.9}}};
  for (const auto& e : expected) {
    std::vector<float> a(5);
    rl::gae(mlkit::cpu{}, {.rewards = r0, .values = v0, .bootstrap = behind}, {.gamma = 0.99, .lambda = e.lambda},
            {.advantages = a});
    CHECK(error(a, e.first) < 1e-3);
    rl::gae(mlkit::cpu{}, {.rewards = r1, .values = v1, .terminated = ends, .bootstrap = behind},
            {.gamma = 0.9, .lambda = e.lambda}, {.advantages = a});
    CHECK(error(a, e.second) < 1e-3);
  }
}

TEST_CASE("returns refuse bad input before they write", "[rl][returns][bad input]") {
  std::vector<float> r(6, 1.0f), v(6, 1.0f), out(6, 7.0f);
  const std::vector<std::uint8_t> ends{0, 0, 0, 0, 0, 1}, cut{0, 0, 1, 0, 0, 0};
  const rl::rollout<float> in{.rewards = r, .values = v, .terminated = ends};
  const mlkit::cpu exec;
  CHECK_THROWS_WITH(rl::discounted_returns(exec, in, {.gamma = -1}, out),
                    "mlkit::value_error: rl::discounted_returns: gamma = -1 is outside [0, 1]");
  CHECK_THROWS_WITH(rl::td_lambda_returns(exec, in, {.lambda = 2}, out),
                    "mlkit::value_error: rl::td_lambda_returns: lambda = 2 is outside [0, 1]");
  CHECK_THROWS_WITH(rl::n_step_returns(exec, in, {.steps = 0}, out),
                    "mlkit::value_error: rl::n_step_returns: steps = 0 is not positive");
  rl::rollout<float> open = in, truncated = in;
  open.terminated = {};
  truncated.truncated = cut;
  CHECK_THROWS_WITH(
      rl::n_step_returns(exec, open, {}, out),
      "mlkit::value_error: rl::n_step_returns: the window ends with step [0, 5], which is not terminated, "
      "and there is neither a bootstrap nor final_values");
  CHECK_THROWS_WITH(
      rl::discounted_returns(exec, truncated, {}, out),
      "mlkit::value_error: rl::discounted_returns: step [0, 2] was truncated, but there are no final_values");
  r[4] = NAN;
  CHECK_THROWS_WITH(rl::td_lambda_returns(exec, in, {}, out),
                    "mlkit::value_error: rl::td_lambda_returns: rewards[0, 4] = nan is not finite");
  CHECK(out == std::vector<float>(6, 7.0f));
}
