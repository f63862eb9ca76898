// Policy and value losses: against TRL, against naive loops, and their gradients against differences.
#include "policy_loss.hpp"

#include "fixtures.hpp"

using namespace policy_tests;
using Catch::Matchers::Contains;

namespace {

const mlkit::cpu exec;

const std::vector<double>& from_file(const std::string& name) { return fixture(name, "policy_loss_fixtures.txt"); }

// Of the fixtures: [5, 7].
sample fixture_sample() {
  sample s;
  s.batch = 5, s.time = 7;
  s.logp = from_file("logp"), s.old_logp = from_file("old"), s.advantages = from_file("advantages");
  s.values = from_file("values"), s.old_values = from_file("old_values"), s.returns = from_file("returns");
  s.entropies.assign(s.size(), 0);
  for (const double m : from_file("mask")) s.mask.push_back(m != 0);
  for (std::size_t i = 0; i < s.size(); ++i)  // what is masked is not read
    if (!s.mask[i])
      s.logp[i] = s.old_logp[i] = s.advantages[i] = s.values[i] = s.old_values[i] = s.returns[i] = not_a_number;
  return s;
}

template <class T, class Policy, class Aggregation>
void check_trl(const std::string& name, const Policy& policy, const Aggregation& aggregate, double clipped = -1) {
  INFO(name);
  const sample s = fixture_sample();
  storage_of<T> m(s);
  const auto stats = rl::policy_loss(exec, batch_of(m, s), policy, aggregate, {.value = 0}, gradients_of(m, s));
  const double tolerance = std::is_same_v<T, double> ? 1e-13 : 2e-6;
  CHECK(stats.policy_loss == Approx(from_file("trl." + name + ".loss")[0]).epsilon(tolerance));
  CHECK(stats.loss == stats.policy_loss);
  const auto& want = from_file("trl." + name + ".dlogp");
  for (std::size_t i = 0; i < s.size(); ++i) CHECK(std::fabs(static_cast<double>(m.dlogp[i]) - want[i]) < tolerance);
  if (clipped >= 0) CHECK(stats.clip_fraction == Approx(clipped).epsilon(1e-12));
  CHECK(stats.tokens == 22);
  CHECK(stats.sequences == 5);
}

struct named_term {
  std::string name;
  naive_term loss;
  bool of_sequence;
};

// Central differences of the naive loss against the gradients, in f64, and the losses themselves.
template <class Policy, class Aggregation>
void check_gradient(const named_term& term, const Policy& policy, const std::string& weight_name,
                    const naive_weight& weight, const Aggregation& aggregate) {
  INFO(term.name << ", " << weight_name);
  sample s = make_sample(4, 6);
  for (std::size_t i = 0; i < 6; ++i) {  // one sequence has no token
    s.mask[12 + i] = 0;
    s.logp[12 + i] = s.values[12 + i] = s.entropies[12 + i] = not_a_number;
  }
  storage_of<double> m(s);
  constexpr double value = 0.7, entropy = 0.3, value_clip = 0.25;
  const auto stats =
      rl::policy_loss(exec, batch_of(m, s), policy, aggregate,
                      {.value_clip = value_clip, .value = value, .entropy = entropy}, gradients_of(m, s));
  const std::vector<double> frozen = s.logp;
  const auto loss = [&] {
    const naive_loss l = naive(s, term.loss, term.of_sequence, weight, value_clip, frozen);
    return l.policy + value * l.value - entropy * l.entropy;
  };
  const naive_loss want = naive(s, term.loss, term.of_sequence, weight, value_clip, frozen);
  CHECK(stats.policy_loss == Approx(want.policy).epsilon(1e-12));
  CHECK(stats.value_loss == Approx(want.value).epsilon(1e-12));
  CHECK(stats.entropy == Approx(want.entropy).epsilon(1e-12));
  CHECK(stats.loss == Approx(loss()).epsilon(1e-12));
  const auto check = [&](std::vector<double>& x, const std::vector<double>& gradient) {
    for (std::size_t i = 0; i < s.size(); ++i) {
      if (!s.mask[i]) {
        CHECK(gradient[i] == 0);
        continue;
      }
      constexpr double h = 1e-6;
      const double at = x[i];
      x[i] = at + h;
      const double above = loss();
      x[i] = at - h;
      const double below = loss();
      x[i] = at;
      CHECK(std::fabs((above - below) / (2 * h) - gradient[i]) < 2e-9);
    }
  };
  check(s.logp, m.dlogp);
  check(s.values, m.dvalues);
  check(s.entropies, m.dentropies);
}

template <class Policy>
void check_gradients(const named_term& term, const Policy& policy) {
  const auto one = [&](const std::string& name, const naive_weight& w, const auto& g) {
    check_gradient(term, policy, name, w, g);
  };
  one(
      "token mean", [](double, double all, double) { return 1 / all; }, rl::token_mean{});
  one(
      "token mean of all ranks", [](double, double, double) { return 1 / 40.0; }, rl::token_mean{40});
  one(
      "sequence mean of sums", [](double, double, double n) { return 1 / n; }, rl::sequence_mean_of_sums{});
  one(
      "sequence mean of means", [](double n, double, double s) { return 1 / (n * s); }, rl::sequence_mean_of_means{});
  one(
      "of all sequences", [](double n, double, double) { return 1 / (n * 4); }, rl::sequence_mean_of_means{4});
  one(
      "sum over a constant", [](double, double, double) { return 1 / 24.0; }, rl::sum_over{24});
}

double naive_ppo(double r, double a, double low, double high) {
  return std::max(-a * r, -a * clip(r, 1 - low, 1 + high));
}

// A term and a weight of the user's own.
struct squared_ratio {
  template <std::floating_point A>
  rl::policy_token<A> operator()(A ratio, A advantage, A) const noexcept {
    return {-advantage * ratio * ratio / 2, -advantage * ratio * ratio, false};
  }
};
struct square_root_of_length {
  double weight(const rl::token_counts& n) const { return 1 / (n.sequences * std::sqrt(n.of_sequence)); }
};

}  // namespace

TEST_CASE("policy losses and gradients are those of TRL", "[rl][policy]") {
  const auto clipped = [](const std::string& name) { return from_file("trl." + name + ".clip_fraction")[0]; };
  check_trl<double>("grpo", rl::ppo_clip{}, rl::sequence_mean_of_means{}, clipped("grpo"));
  check_trl<double>("bnpo", rl::ppo_clip{.high = 0.28}, rl::token_mean{}, clipped("bnpo"));
  check_trl<double>("dr_grpo", rl::ppo_clip{}, rl::sum_over{35}, clipped("dr_grpo"));
  check_trl<double>("two_sided", rl::dual_clip<>{.bound = 1.3}, rl::token_mean{});
  check_trl<double>("gspo", rl::gspo{.low = 0.03, .high = 0.04}, rl::sequence_mean_of_means{});
  check_trl<double>("cispo", rl::cispo{.high = 0.25}, rl::token_mean{});
  check_trl<float>("grpo", rl::ppo_clip{}, rl::sequence_mean_of_means{}, clipped("grpo"));
  check_trl<float>("gspo", rl::gspo{.low = 0.03, .high = 0.04}, rl::sequence_mean_of_means{});
}

TEST_CASE("the value loss, its gradient and statistics are those of PyTorch's formulas", "[rl][policy]") {
  const sample s = fixture_sample();
  storage_of<double> m(s);
  const auto b = batch_of(m, s);
  const auto stats = rl::ppo_loss(exec, b, {.value_clip = 0.25, .value = 1}, gradients_of(m, s));
  CHECK(stats.value_loss == Approx(from_file("ppo.value_loss")[0]).epsilon(1e-13));
  CHECK(stats.explained_variance == Approx(from_file("ppo.explained_variance")[0]).epsilon(1e-12));
  const auto& kl = from_file("ppo.kl");
  CHECK(stats.kl_k1 == Approx(kl[0]).epsilon(1e-12));
  CHECK(stats.kl_k3 == Approx(kl[1]).epsilon(1e-12));
  CHECK(stats.ratio_min == Approx(kl[2]).epsilon(1e-12));
  CHECK(stats.ratio_max == Approx(kl[3]).epsilon(1e-12));
  const auto& want = from_file("ppo.dvalues");
  for (std::size_t i = 0; i < s.size(); ++i) CHECK(std::fabs(m.dvalues[i] - want[i]) < 1e-13);

  std::vector<double> alone(s.size(), 5);
  const auto critic = rl::value_loss(
      exec,
      rl::value_batch<double>{.values = b.values, .old_values = b.old_values, .returns = b.returns, .mask = b.mask},
      {.clip = 0.25}, mlkit::matrix_view<double>(alone.data(), {s.batch, s.time}));
  CHECK(critic.loss == stats.value_loss);
  CHECK(critic.explained_variance == stats.explained_variance);
  CHECK(critic.clip_fraction == stats.value_clip_fraction);
  CHECK(critic.tokens == 22);
  CHECK(alone == m.dvalues);
}

TEST_CASE("gradients of every term and aggregation are the differences of their losses", "[rl][policy]") {
  check_gradients({"policy gradient", [](double, double, double a, double l) { return -a * l; }, false},
                  rl::policy_gradient{});
  check_gradients({"ppo", [](double r, double, double a, double) { return naive_ppo(r, a, 0.1, 0.3); }, false},
                  rl::ppo_clip{.low = 0.1, .high = 0.3});
  check_gradients({"dual clip",
                   [](double r, double, double a, double) {
                     const double l = naive_ppo(r, a, 0.2, 0.2);
                     return a < 0 ? std::min(l, -1.1 * a) : l;
                   },
                   false},
                  rl::dual_clip<>{.bound = 1.1});
  check_gradients({"gspo", [](double r, double, double a, double) { return naive_ppo(r, a, 0.05, 0.06); }, true},
                  rl::gspo{.low = 0.05, .high = 0.06});
  check_gradients({"cispo", [](double, double c, double a, double l) { return -clip(c, 0.9, 1.2) * a * l; }, false},
                  rl::cispo{.low = 0.1, .high = 0.2});
}

TEST_CASE("terms compose, and a user's own joins them", "[rl][policy]") {
  const auto mean = [](double, double all, double) { return 1 / all; };
  check_gradient({"own", [](double r, double, double a, double) { return -a * r * r / 2; }, false}, squared_ratio{},
                 "token mean", mean, rl::token_mean{});
  check_gradient(
      {"own", [](double r, double, double a, double) { return -a * r * r / 2; }, true},
      rl::sequence_ratio<squared_ratio>{}, "own", [](double n, double, double s) { return 1 / (s * std::sqrt(n)); },
      square_root_of_length{});
  check_gradient(
      {"cispo of sequences", [](double, double c, double a, double l) { return -clip(c, 0.9, 1.05) * a * l; }, true},
      rl::sequence_ratio<rl::cispo>{.term = {.low = 0.1, .high = 0.05}}, "token mean", mean, rl::token_mean{});
  check_gradient({"dual clip of gspo",
                  [](double r, double, double a, double) {
                    const double l = naive_ppo(r, a, 0.2, 0.2);
                    return a < 0 ? std::min(l, -1.02 * a) : l;
                  },
                  true},
                 rl::dual_clip<rl::gspo>{.bound = 1.02, .term = {.low = 0.2, .high = 0.2}}, "token mean", mean,
                 rl::token_mean{});
}

TEST_CASE("at a corner of the clip the gradient is that of the side that is not clipped", "[rl][policy]") {
  const rl::ppo_clip term{.low = 0.25, .high = 0.5};
  CHECK(term(1.5, 2.0, 0.0).slope == -3);
  CHECK(term(0.75, -2.0, 0.0).slope == 1.5);
  CHECK(term(std::nextafter(1.5, 2), 2.0, 0.0).slope == 0);
  CHECK(term(std::nextafter(0.75, 0), -2.0, 0.0).slope == 0);
  CHECK(term(7.0, -2.0, 0.0).slope == 14);  // the clip never helps a bad token
  CHECK(term(9.0, 0.0, 0.0).loss == 0);
  CHECK(rl::dual_clip<>{.bound = 2}(2.0, -1.0, 0.0).slope == 2);
  CHECK(rl::clipped_value{0.5}(1.5, 1.0, 9.0).slope == -7.5);
  CHECK(rl::clipped_value{0.5}(1.75, 1.0, 9.0).slope == 0);  // the held value is the farther one
  CHECK(rl::clipped_value{0.5}(1.75, 1.0, -9.0).slope == 10.75);
}
