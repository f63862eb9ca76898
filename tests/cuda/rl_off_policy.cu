// TD(lambda) and n-step returns, V-trace, UPGO and Retrace, on the device and on the CPU, against loops of doubles.
#include "rl_scans.hpp"

#if defined(MLKIT_TEST_ON_CPU)
#include <mlkit/rl.hpp>
#else
#include <mlkit/rl.cuh>
#endif

using namespace scans;

namespace {

using numbers = std::vector<double>;

double weight(double log_ratio) { return std::exp(std::min(20.0, std::max(-20.0, log_ratio))); }

rl::rollout<float> on_policy(device_window<float>& given) {
  auto in = given.give<rl::rollout<float>>();
  in.values = given.v.view();
  return in;
}

}  // namespace

TEST_CASE("cuda: TD(lambda) returns", "[cuda][rl]") {
  const double gamma = 0.97, lambda = 0.8;
  check_against<float>(
      [&](device_window<float>& given) {
        auto g = given.out();
        with_convention(given.w, [&](auto done) {
          rl::td_lambda_returns(given.exec, on_policy(given), {.gamma = gamma, .lambda = lambda}, g.view(), done);
        });
        return outputs<float>{g.plain(given.exec)};
      },
      [&](const window& w) {
        return backwards(w, 1, [&](const auto& steps, std::size_t k, const numbers& behind) {
          const double v = steps[k].following;
          return numbers{w.r[at(steps[k].t)] +
                         gamma * (steps[k].kind == step::goes_on ? (1 - lambda) * v + lambda * behind[0] : v)};
        });
      },
      4);
}

TEST_CASE("cuda: n-step returns", "[cuda][rl]") {
  const double gamma = 0.97;
  for (const index_t n : {1, 5, 70})
    check_against<float>(
        [&](device_window<float>& given) {
          auto g = given.out();
          with_convention(given.w, [&](auto done) {
            rl::n_step_returns(given.exec, on_policy(given), {.gamma = gamma, .steps = n}, g.view(), done);
          });
          return outputs<float>{g.plain(given.exec)};
        },
        [&](const window& w) {
          outputs<double> out(1, numbers(at(w.batch * w.time)));
          for (index_t s = 0; s < w.sequences(); ++s) {
            const std::vector<step> steps = w.resolve(s);
            for (std::size_t k = 0; k < steps.size(); ++k) {
              double sum = 0, scale = 1;
              for (std::size_t j = k; j < steps.size() && j < k + at(n); ++j) {
                sum += scale * w.r[at(steps[j].t)];
                scale *= gamma;
                if (steps[j].kind == step::goes_on && j + 1 < k + at(n)) continue;
                sum += scale * steps[j].following;
                break;
              }
              out[0][at(steps[k].t)] = sum;
            }
          }
          return out;
        },
        4);
}

TEST_CASE("cuda: V-trace", "[cuda][rl]") {
  const rl::vtrace_options o{.gamma = 0.97, .lambda = 0.9, .rho_clip = 1.5, .c_clip = 1.1, .policy_rho_clip = 2};
  check_against<float>(
      [&](device_window<float>& given) {
        auto vs = given.out(), a = given.out();
        auto in = given.give<rl::off_policy_rollout<float>>();
        in.values = given.v.view(), in.log_ratios = given.log_ratio.view();
        with_convention(given.w, [&](auto done) {
          rl::vtrace(given.exec, in, o, {.vs = vs.view(), .advantages = a.view()}, done);
        });
        return outputs<float>{vs.plain(given.exec), a.plain(given.exec)};
      },
      [&](const window& w) {
        // behind: vs, advantage, vs - V
        auto all = backwards(w, 3, [&](const auto& steps, std::size_t k, const numbers& behind) {
          const std::size_t i = at(steps[k].t);
          const double v = steps[k].following, ratio = weight(w.log_ratio[i]);
          const bool on = steps[k].kind == step::goes_on;
          const double e = std::min(o.rho_clip, ratio) * (w.r[i] + o.gamma * v - w.v[i]) +
                           (on ? o.gamma * o.lambda * std::min(o.c_clip, ratio) * behind[2] : 0);
          const double q = on ? o.lambda * behind[0] + (1 - o.lambda) * v : v;
          return numbers{w.v[i] + e, std::min(o.policy_rho_clip, ratio) * (w.r[i] + o.gamma * q - w.v[i]), e};
        });
        all.pop_back();
        return all;
      },
      6);
}

TEST_CASE("cuda: UPGO", "[cuda][rl]") {
  const double gamma = 0.97;
  check_against<float>(
      [&](device_window<float>& given) {
        auto g = given.out(), a = given.out();
        auto in = on_policy(given);
        with_convention(given.w, [&](auto done) {
          rl::upgo(given.exec, in, {.gamma = gamma}, {.returns = g.view(), .advantages = a.view()}, done);
        });
        return outputs<float>{g.plain(given.exec), a.plain(given.exec)};
      },
      [&](const window& w) {
        return backwards(w, 2, [&](const auto& steps, std::size_t k, const numbers& behind) {
          const std::size_t i = at(steps[k].t);
          double rest = steps[k].following;
          if (steps[k].kind == step::goes_on) {
            const auto& next = steps[k + 1];
            if (w.r[at(next.t)] + gamma * next.following >= w.v[at(next.t)]) rest = behind[0];
          }
          const double g = w.r[i] + gamma * rest;
          return numbers{g, g - w.v[i]};
        });
      },
      6);
}

TEST_CASE("cuda: Retrace", "[cuda][rl]") {
  const rl::retrace_options o{.gamma = 0.97, .lambda = 0.9};
  check_against<float>(
      [&](device_window<float>& given) {
        auto g = given.out();
        auto in = given.give<rl::action_value_rollout<float>>();
        in.action_values = given.q.view(), in.expected_values = given.v.view();
        in.log_ratios = given.log_ratio.view();
        with_convention(given.w, [&](auto done) { rl::retrace(given.exec, in, o, g.view(), done); });
        return outputs<float>{g.plain(given.exec)};
      },
      [&](const window& w) {
        return backwards(w, 1, [&](const auto& steps, std::size_t k, const numbers& behind) {
          double rest = steps[k].following;
          if (steps[k].kind == step::goes_on) {
            const std::size_t next = at(steps[k + 1].t);
            rest = w.v[next] + o.lambda * std::min(1.0, weight(w.log_ratio[next])) * (behind[0] - w.q[next]);
          }
          return numbers{w.r[at(steps[k].t)] + o.gamma * rest};
        });
      },
      6);
}

TEST_CASE("cuda: off-policy recurrences refuse what does not fit, write nothing, and take nothing", "[cuda][rl]") {
  device_window<float> given(make_window(3, 20, {.bootstrap = true}), layout::rows),
      other(make_window(3, 21, {.bootstrap = true}), layout::rows);
  auto a = given.out();
  const auto rewards = given.r.view(), values = given.v.view(), ratios = given.log_ratio.view();
  const std::string shape = "mlkit::shape_error: rl::", value = "mlkit::value_error: rl::";
  CHECK_THROWS_WITH(rl::vtrace(given.exec, {.rewards = rewards, .values = values, .log_ratios = other.log_ratio.view()},
                               {}, {.vs = a.view()}),
                    shape + "vtrace: log_ratios has shape [3, 21], but rewards has [3, 20]");
  CHECK_THROWS_WITH(rl::vtrace(given.exec, {.rewards = rewards, .values = values, .log_ratios = ratios},
                               {.rho_clip = -1}, {.vs = a.view()}),
                    value + "vtrace: rho_clip = -1 is negative or NaN");
  CHECK_THROWS_WITH(rl::upgo(given.exec, {.rewards = rewards, .values = other.v.view()}, {}, {.returns = a.view()}),
                    shape + "upgo: values has shape [3, 21], but rewards has [3, 20]");
  CHECK_THROWS_WITH(rl::td_lambda_returns(given.exec, {.rewards = rewards, .values = values}, {.lambda = 2}, a.view()),
                    value + "td_lambda_returns: lambda = 2 is outside [0, 1]");
  CHECK_THROWS_WITH(rl::n_step_returns(given.exec, {.rewards = rewards, .values = values}, {.steps = 0}, a.view()),
                    value + "n_step_returns: steps = 0 is not positive");
  CHECK_THROWS_WITH(
      rl::retrace(
          given.exec,
          {.rewards = rewards, .action_values = given.q.view(), .expected_values = values, .log_ratios = ratios}, {},
          rewards),
      shape + "retrace: returns [3, 20] overlaps rewards [3, 20]");
  const std::vector<float> have = a.plain(given.exec);
  CHECK(std::count(have.begin(), have.end(), 7.0f) == 60);
  const mlkit::tensor_view<float, 2> empty(nullptr, {0, 7});
  rl::vtrace(given.exec, {.rewards = empty, .values = empty, .log_ratios = empty}, {}, {.vs = empty});
  rl::upgo(given.exec, {.rewards = empty, .values = empty}, {}, {.returns = empty});
  rl::n_step_returns(given.exec, {.rewards = empty, .values = empty}, {.steps = 3}, empty);
}
