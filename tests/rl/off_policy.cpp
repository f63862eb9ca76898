// V-trace, UPGO and Retrace against the sums that define them, and V-trace against TorchRL.
#include <mlkit/rl/off_policy.hpp>

#include "../fixtures.hpp"
#include "rollouts.hpp"

using namespace rollouts;

namespace {

double weight_of(double log_ratio) { return std::exp(std::min(20.0, std::max(-20.0, log_ratio))); }

// Equation 1 of Espeholt et al.: vs = V + sum over k of gamma^k c_t ... c_{t+k-1} times the weighted error.
outputs<double> naive_vtrace(const window& w, const rl::vtrace_options& o) {
  outputs<double> out(2, std::vector<double>(at(w.batch * w.time)));
  for (index_t s = 0; s < w.sequences(); ++s) {
    const std::vector<step> steps = w.resolve(s);
    for (std::size_t k = 0; k < steps.size(); ++k) {
      double sum = 0, weight = 1;
      for (std::size_t j = k; j < steps.size() && weight > 1e-40; ++j) {
        const std::size_t i = at(steps[j].t);
        const double ratio = weight_of(w.log_ratio[i]);
        sum += weight * std::min(o.rho_clip, ratio) * (w.r[i] + o.gamma * steps[j].following - w.v[i]);
        weight *= o.gamma * o.lambda * std::min(o.c_clip, ratio);
        if (steps[j].kind != step::goes_on) break;
      }
      out[0][at(steps[k].t)] = w.v[at(steps[k].t)] + sum;
    }
    for (std::size_t k = 0; k < steps.size(); ++k) {
      const std::size_t i = at(steps[k].t);
      double q = steps[k].following;
      if (steps[k].kind == step::goes_on) q = o.lambda * out[0][at(steps[k + 1].t)] + (1 - o.lambda) * q;
      out[1][i] = std::min(o.policy_rho_clip, weight_of(w.log_ratio[i])) * (w.r[i] + o.gamma * q - w.v[i]);
    }
  }
  return out;
}

// The trajectory is followed while its next step does at least as well as the value there says.
outputs<double> naive_upgo(const window& w, double gamma) {
  outputs<double> out(2, std::vector<double>(at(w.batch * w.time)));
  for (index_t s = 0; s < w.sequences(); ++s) {
    const std::vector<step> steps = w.resolve(s);
    for (std::size_t k = 0; k < steps.size(); ++k) {
      double sum = 0, weight = 1;
      for (std::size_t j = k;; ++j) {
        sum += weight * w.r[at(steps[j].t)];
        weight *= gamma;
        const bool ends = steps[j].kind != step::goes_on;
        if (!ends) {
          const std::size_t next = at(steps[j + 1].t);
          if (w.r[next] + gamma * steps[j + 1].following >= w.v[next]) continue;
        }
        sum += weight * steps[j].following;
        break;
      }
      out[0][at(steps[k].t)] = sum;
      out[1][at(steps[k].t)] = sum - w.v[at(steps[k].t)];
    }
  }
  return out;
}

// Equation 4 of Munos et al.: Q + sum over k of gamma^k c_{t+1} ... c_{t+k} times the error of step t + k.
outputs<double> naive_retrace(window w, const rl::retrace_options& o) {
  w.v = w.expected;
  outputs<double> out(1, std::vector<double>(at(w.batch * w.time)));
  for (index_t s = 0; s < w.sequences(); ++s) {
    const std::vector<step> steps = w.resolve(s);
    for (std::size_t k = 0; k < steps.size(); ++k) {
      double sum = w.q[at(steps[k].t)], weight = 1;
      for (std::size_t j = k; j < steps.size() && weight > 1e-40; ++j) {
        const std::size_t i = at(steps[j].t);
        if (j > k) weight *= o.gamma * o.lambda * std::min(1.0, weight_of(w.log_ratio[i]));
        sum += weight * (w.r[i] + o.gamma * steps[j].following - w.q[i]);
        if (steps[j].kind != step::goes_on) break;
      }
      out[0][at(steps[k].t)] = sum;
    }
  }
  return out;
}

template <class T, class Rollout, class F>
void call(arguments<T>& given, Rollout& in, F&& f) {
  given.give(in);
  if (given.w.begins)
    f(in, rl::done_begins{});
  else
    f(in, rl::done_ends{});
}

template <class T>
outputs<T> vtrace(const mlkit::cpu& exec, arguments<T>& given, const rl::vtrace_options& o) {
  stored<T> vs = given.out(), a = given.out();
  rl::off_policy_rollout<T> in{.values = given.v.view(), .log_ratios = given.log_ratio.view()};
  call(given, in, [&](const auto& all, auto done) {
    rl::vtrace<T>(exec, all, o, {.vs = vs.view(), .advantages = a.view()}, done);
  });
  return {vs.plain(), a.plain()};
}
template <class T>
outputs<T> upgo(const mlkit::cpu& exec, arguments<T>& given, double gamma) {
  stored<T> g = given.out(), a = given.out();
  rl::rollout<T> in{.values = given.v.view()};
  call(given, in, [&](const auto& all, auto done) {
    rl::upgo<T>(exec, all, {.gamma = gamma}, {.returns = g.view(), .advantages = a.view()}, done);
  });
  return {g.plain(), a.plain()};
}
template <class T>
outputs<T> retrace(const mlkit::cpu& exec, arguments<T>& given, const rl::retrace_options& o) {
  stored<T> g = given.out();
  rl::action_value_rollout<T> in{
      .action_values = given.q.view(), .expected_values = given.expected.view(), .log_ratios = given.log_ratio.view()};
  call(given, in, [&](const auto& all, auto done) { rl::retrace<T>(exec, all, o, g.view(), done); });
  return {g.plain()};
}

template <class T>
void check_same(const outputs<T>& have, const outputs<double>& want) {
  for (std::size_t o = 0; o < want.size(); ++o) REQUIRE(error(have[o], want[o]) < 4 * tolerance<T>);
}

template <class T>
void check_values() {
  // Numbers that floats hold, so that both types are asked the same.
  const double inf = std::numeric_limits<double>::infinity();
  each_window([&](const window& w) {
    for (const layout l : {layout::rows, layout::columns}) {
      arguments<T> given(w, l);
      INFO(text(w) << ", layout " << static_cast<int>(l));
      for (const rl::vtrace_options o : {rl::vtrace_options{.gamma = 0.75, .lambda = 0.875, .rho_clip = 1.25},
                                         {.gamma = 1, .rho_clip = inf, .c_clip = 0.5, .policy_rho_clip = 3},
                                         {.gamma = 0}})
        check_same(vtrace(mlkit::cpu{}, given, o), naive_vtrace(w, o));
      for (const double gamma : {0.875, 1.0, 0.0}) check_same(upgo(mlkit::cpu{}, given, gamma), naive_upgo(w, gamma));
      for (const rl::retrace_options o :
           {rl::retrace_options{.gamma = 0.875, .lambda = 0.5}, {.gamma = 1}, {.gamma = 0}})
        check_same(retrace(mlkit::cpu{}, given, o), naive_retrace(w, o));
    }
  });
}

}  // namespace

TEST_CASE("V-trace, UPGO and Retrace are the sums that define them, f32", "[rl][off policy]") { check_values<float>(); }
TEST_CASE("V-trace, UPGO and Retrace are the sums that define them, f64", "[rl][off policy]") {
  check_values<double>();
}

TEST_CASE("V-trace, UPGO, Retrace: layouts, threads, packing and neighbours change no bit", "[rl][off policy]") {
  check_bits<float>([](const mlkit::cpu& exec, arguments<float>& given) {
    outputs<float> all = vtrace(exec, given, {});
    for (const outputs<float>& more : {upgo(exec, given, 0.99), retrace(exec, given, {})})
      all.insert(all.end(), more.begin(), more.end());
    return all;
  });
}

TEST_CASE("TorchRL's V-trace", "[rl][vtrace][torchrl]") {
  const auto values = [](const std::string& name) -> const std::vector<double>& {
    return fixture(name, "scan_fixtures.txt");
  };
  const auto flags = [&](const std::string& name) {
    return std::vector<std::uint8_t>(values(name).begin(), values(name).end());
  };
  window w = make_window(3, 11, {});
  w.r = values("reward"), w.v = values("value"), w.fv = values("final");
  w.te = flags("terminated"), w.tr = flags("truncated");
  for (std::size_t i = 0; i < 33; ++i) w.log_ratio[i] = values("log_pi")[i] - values("log_mu")[i];
  const std::vector<double> o = values("options");
  for (const layout l : {layout::rows, layout::columns}) {
    arguments<double> given(w, l);
    const outputs<double> have = vtrace(
        mlkit::cpu{}, given, {.gamma = o[0], .lambda = 1, .rho_clip = o[2], .c_clip = o[3], .policy_rho_clip = o[2]});
    CHECK(error(have[0], values("vtrace.vs")) < 1e-14);
    CHECK(error(have[1], values("vtrace.advantages")) < 1e-14);
  }
}

TEST_CASE("on the policy, V-trace is gae's returns", "[rl][vtrace]") {
  window w = make_window(5, 40, {.masked = true});
  for (std::size_t i = 0; i < w.log_ratio.size(); ++i) w.log_ratio[i] = 0;
  const outputs<double> want = naive_vtrace(w, {.gamma = 0.9, .lambda = 0.8});
  arguments<double> given(w, layout::rows);
  CHECK(error(vtrace(mlkit::cpu{}, given, {.gamma = 0.9, .lambda = 0.8})[0], want[0]) < 1e-14);
  // Extreme ratios stay finite.
  for (std::size_t i = 0; i < w.log_ratio.size(); ++i) w.log_ratio[i] = i % 2 ? 1e4 : -1e4;
  arguments<double> extreme(w, layout::rows);
  const double inf = std::numeric_limits<double>::infinity();
  const outputs<double> have = vtrace(mlkit::cpu{}, extreme, {.gamma = 0.9, .rho_clip = inf});
  CHECK(error(have[0], naive_vtrace(w, {.gamma = 0.9, .rho_clip = inf})[0]) < 1e-13);
}

TEST_CASE("V-trace, UPGO and Retrace refuse bad input before they write", "[rl][off policy][bad input]") {
  std::vector<float> x(6, 1.0f), bad(6, 1.0f), out(6, 7.0f), few(5);
  bad[2] = std::numeric_limits<float>::infinity();
  const std::vector<std::uint8_t> ends{0, 0, 0, 0, 0, 1};
  const mlkit::cpu exec;
  const rl::off_policy_rollout<float> in{.rewards = x, .values = x, .log_ratios = x, .terminated = ends};
  const auto refuses = [&](const std::string& message, auto&& call) {
    CHECK_THROWS_WITH(call(), "mlkit::" + message);
    CHECK(out == std::vector<float>(6, 7.0f));
  };
  const auto vtrace = [&](const rl::off_policy_rollout<float>& from, const rl::vtrace_options& o) {
    return [&out, &exec, from, o] { rl::vtrace(exec, from, o, {.vs = out}); };
  };
  refuses("value_error: rl::vtrace: gamma = 2 is outside [0, 1]", vtrace(in, {.gamma = 2}));
  refuses("value_error: rl::vtrace: lambda = -1 is outside [0, 1]", vtrace(in, {.lambda = -1}));
  refuses("value_error: rl::vtrace: rho_clip = -1 is negative or NaN", vtrace(in, {.rho_clip = -1}));
  refuses("value_error: rl::vtrace: c_clip = nan is negative or NaN", vtrace(in, {.c_clip = not_a_number}));
  refuses("value_error: rl::vtrace: policy_rho_clip = -2 is negative or NaN", vtrace(in, {.policy_rho_clip = -2}));
  auto changed = in;
  changed.log_ratios = few;
  refuses("shape_error: rl::vtrace: log_ratios has shape [1, 5], but rewards has [1, 6]", vtrace(changed, {}));
  changed = in, changed.rewards = bad;
  refuses("value_error: rl::vtrace: rewards[0, 2] = inf is not finite", vtrace(changed, {}));
  changed = in, changed.terminated = {};
  refuses(
      "value_error: rl::vtrace: the window ends with step [0, 5], which is not terminated, and there is neither a "
      "bootstrap nor final_values",
      vtrace(changed, {}));
  refuses("value_error: rl::upgo: gamma = 2 is outside [0, 1]",
          [&] { rl::upgo(exec, {.rewards = x, .values = x, .terminated = ends}, {.gamma = 2}, {.returns = out}); });
  const rl::action_value_rollout<float> actions{
      .rewards = x, .action_values = x, .expected_values = x, .log_ratios = x, .terminated = ends};
  refuses("value_error: rl::retrace: lambda = 2 is outside [0, 1]",
          [&] { rl::retrace(exec, actions, {.lambda = 2}, out); });
  auto lacking = actions;
  lacking.expected_values = {};
  refuses("shape_error: rl::retrace: expected_values has shape [0, 0], but rewards has [1, 6]",
          [&] { rl::retrace(exec, lacking, {}, out); });
}
