// Policy losses over logits: against differences of naive sums, and against the loss of the log-probabilities that they
// give.
#include <mlkit/rl/logits_policy_loss.hpp>

#include "policy_loss.hpp"

using namespace policy_tests;
using Catch::Matchers::Contains;

namespace {

const mlkit::cpu exec;

// A sample whose log-probabilities and entropies come from logits [batch, time, classes].
struct from_logits {
  sample s;
  index_t classes;
  double temperature;
  std::vector<double> logits;
  std::vector<std::int32_t> tokens;

  from_logits(index_t batch, index_t time, index_t n, double tau)
      : s(make_sample(batch, time)), classes(n), temperature(tau) {
    const mlkit::random_stream random{5, 5};
    for (std::size_t i = 0; i < s.size(); ++i) {
      for (index_t j = 0; j < n; ++j)
        logits.push_back(s.mask[i] ? static_cast<double>(random.normal(i * 100 + static_cast<std::uint64_t>(j)))
                                   : not_a_number);
      tokens.push_back(s.mask[i] ? static_cast<std::int32_t>(random.bits(i) % static_cast<std::uint32_t>(n)) : -7);
    }
    update();
    for (std::size_t i = 0; i < s.size(); ++i)
      if (s.mask[i]) s.old_logp[i] = s.logp[i] + 0.3 * static_cast<double>(random.normal(900'000 + i));
  }
  void update() {
    for (std::size_t i = 0; i < s.size(); ++i) {
      if (!s.mask[i]) continue;
      const double* z = &logits[i * static_cast<std::size_t>(classes)];
      double sum = 0, h = 0;
      for (index_t j = 0; j < classes; ++j) sum += std::exp(z[j] / temperature);
      for (index_t j = 0; j < classes; ++j) {
        const double l = z[j] / temperature - std::log(sum);
        h -= std::exp(l) * l;
      }
      s.logp[i] = z[tokens[i]] / temperature - std::log(sum);
      s.entropies[i] = h;
    }
  }
  template <class T>
  mlkit::tensor<T, 3> tensor() const {
    mlkit::tensor<T, 3> t({s.batch, s.time, classes});
    for (std::size_t i = 0; i < logits.size(); ++i) t.data()[i] = static_cast<T>(logits[i]);
    return t;
  }
};

// The batch without what logits say.
template <class A>
rl::policy_batch<A> rest_of(storage_of<A>& m, const sample& s) {
  auto b = batch_of(m, s);
  b.log_probs = {};
  b.entropies = {};
  return b;
}

template <class Policy>
void check_differences(const Policy& policy, const naive_term& term, bool of_sequence) {
  from_logits f(3, 4, 5, 0.7);
  storage_of<double> m(f.s);
  auto z = f.tensor<double>();
  mlkit::tensor<double, 3> dz({3, 4, 5});
  const auto stats = rl::policy_loss(exec, z, mlkit::matrix_view<const std::int32_t>(f.tokens.data(), {3, 4}),
                                     {.temperature = 0.7}, rest_of(m, f.s), policy, rl::sequence_mean_of_means{},
                                     {.entropy = 0.4}, {.logits = dz, .values = gradients_of(m, f.s).values});
  const std::vector<double> frozen = f.s.logp;
  const auto loss = [&] {
    f.update();
    const naive_loss l = naive(
        f.s, term, of_sequence, [](double n, double, double s) { return 1 / (n * s); }, 0, frozen);
    return l.policy + 0.5 * l.value - 0.4 * l.entropy;
  };
  CHECK(stats.loss == Approx(loss()).epsilon(1e-12));
  for (std::size_t i = 0; i < f.logits.size(); ++i) {
    if (!f.s.mask[i / 5]) {
      CHECK(dz.data()[i] == 0);
      continue;
    }
    constexpr double h = 1e-6;
    const double at = f.logits[i];
    f.logits[i] = at + h;
    const double above = loss();
    f.logits[i] = at - h;
    const double below = loss();
    f.logits[i] = at;
    CHECK(std::fabs((above - below) / (2 * h) - dz.data()[i]) < 2e-9);
  }
}

double naive_ppo(double r, double a, double e) { return std::max(-a * r, -a * clip(r, 1 - e, 1 + e)); }

// ppo_loss over logits against log_probs, ppo_loss and log_probs_backward, one after another.
template <class T>
void check_parts(index_t batch, index_t time, index_t classes, double tolerance) {
  INFO(batch << " x " << time << " x " << classes);
  using A = mlkit::accumulator_t<T>;
  const from_logits f(batch, time, classes, 1);
  const rl::ppo_options o{.clip = 0.2, .value_clip = 0.3, .entropy = 0.02};
  const auto z = f.tensor<T>();
  mlkit::tensor<T, 3> dz({batch, time, classes}), want({batch, time, classes});
  const mlkit::matrix_view<const std::int32_t> tokens(f.tokens.data(), {batch, time});
  storage_of<A> m(f.s), parts(f.s);
  auto b = batch_of(parts, f.s);
  const rl::log_prob_options<2> masked{.mask = mlkit::matrix_view<const std::uint8_t>(b.mask)};
  const auto g = gradients_of(parts, f.s);
  rl::log_probs(exec, z, tokens, masked,
                {.logp = mlkit::matrix_view<A>(parts.logp.data(), {batch, time}),
                 .entropy = mlkit::matrix_view<A>(parts.entropies.data(), {batch, time})});
  const auto expected = rl::ppo_loss(exec, b, o, g);
  rl::log_probs_backward(exec, z, tokens, masked, {.dlogp = g.log_probs, .dentropy = g.entropies}, want);

  const auto out = gradients_of(m, f.s);
  for (const int threads : {1, 3}) {
    mlkit::tensor<T, 3> again({batch, time, classes});
    const auto stats =
        rl::ppo_loss(mlkit::cpu{.threads = threads}, z, tokens, {}, rest_of(m, f.s), o,
                     {.logits = again, .values = out.values, .log_probs = out.log_probs, .entropies = out.entropies});
    CHECK(stats.loss == expected.loss);  // statistics come from the same kernel
    CHECK(stats.kl_k3 == expected.kl_k3);
    CHECK(m.dlogp == parts.logp);
    CHECK(m.dentropies == parts.entropies);
    CHECK(m.dvalues == parts.dvalues);
    if (threads == 1)
      dz = std::move(again);
    else
      CHECK(std::equal(dz.begin(), dz.end(), again.begin(),
                       [](T x, T y) { return static_cast<double>(x) == static_cast<double>(y); }));
  }
  double worst = 0, scale = 0;
  for (index_t i = 0; i < dz.size(); ++i) {
    worst = std::max(worst, std::fabs(static_cast<double>(dz.data()[i]) - static_cast<double>(want.data()[i])));
    scale = std::max(scale, std::fabs(static_cast<double>(want.data()[i])));
  }
  CHECK(worst <= tolerance * scale);
}

}  // namespace

TEST_CASE("gradients of logits are the differences of the loss", "[rl][policy]") {
  check_differences(
      rl::ppo_clip{}, [](double r, double, double a, double) { return naive_ppo(r, a, 0.2); }, false);
  check_differences(
      rl::gspo{.low = 0.05, .high = 0.05}, [](double r, double, double a, double) { return naive_ppo(r, a, 0.05); },
      true);
}

TEST_CASE("the loss over logits is that of its parts", "[rl][policy]") {
  check_parts<float>(3, 7, 2, 2e-6);
  check_parts<float>(5, 33, 100, 2e-6);
  check_parts<mlkit::bf16>(2, 9, 37, 0x1p-7);
}

TEST_CASE("the loss over logits takes rows, packed sequences, and its own memory for the gradient", "[rl][policy]") {
  from_logits f(1, 12, 4, 1);
  f.s.starts = {0, 5, 5, 12};
  storage_of<double> m(f.s);
  auto z = f.tensor<double>();
  mlkit::matrix_view<double> rows(z.data(), {12, 4});
  mlkit::matrix<double> dz({12, 4});
  const auto loss = [&](const mlkit::matrix_view<double>& to) {
    return rl::policy_loss(exec, rows, f.tokens, {}, rest_of(m, f.s), rl::ppo_clip{}, rl::sequence_mean_of_means{},
                           {.entropy = 0.1}, {.logits = to});
  };
  const auto stats = loss(dz);
  const naive_loss want = naive(
      f.s, [](double r, double, double a, double) { return naive_ppo(r, a, 0.2); }, false,
      [](double n, double, double s) { return 1 / (n * s); }, 0, f.s.logp);
  CHECK(stats.policy_loss == Approx(want.policy).epsilon(1e-12));
  CHECK(stats.entropy == Approx(want.entropy).epsilon(1e-12));
  CHECK(stats.sequences == 2);
  CHECK(loss(rows).loss == stats.loss);
  CHECK(std::equal(dz.begin(), dz.end(), z.begin()));
}

TEST_CASE("the loss over logits refuses what does not fit, and writes nothing", "[rl][policy][bad input]") {
  mlkit::matrix<float> z({3, 4}), dz({3, 4}), narrow({3, 3});
  mlkit::vector<float> old({3}), adv({3}), two({2});
  std::fill(dz.begin(), dz.end(), 7.0f);
  const std::vector<std::int32_t> good{0, 1, 3}, out_of_range{0, 4, 1}, few{0, 1};
  const auto refuses = [&](const std::vector<std::int32_t>& tokens, const rl::logits_options& of,
                           const rl::policy_batch<float>& b, const rl::ppo_options& o,
                           const rl::logits_gradients<float, 2>& out, const std::string& text) {
    CHECK_THROWS_WITH(rl::ppo_loss(exec, z, tokens, of, b, o, out), Contains("rl::ppo_loss: " + text));
  };
  const rl::policy_batch<float> b{.old_log_probs = old, .advantages = adv};
  refuses(out_of_range, {}, b, {}, {.logits = dz}, "tokens[1] = 4 is outside [0, 4)");
  refuses(few, {}, b, {}, {.logits = dz}, "tokens has shape [2], but logits' rows has [3]");
  refuses(good, {.temperature = 0}, b, {}, {.logits = dz}, "temperature = 0 is not above 0 and finite");
  refuses(good, {}, b, {}, {.logits = narrow}, "dlogits has shape [3, 3], but logits has [3, 4]");
  refuses(good, {}, b, {.clip = 2}, {.logits = dz}, "clip = 2 is outside [0, 1]");
  refuses(good, {}, b, {.entropy = INFINITY}, {.logits = dz}, "entropy = inf is not finite");
  refuses(good, {}, {.advantages = adv}, {}, {.logits = dz}, "old_log_probs is not given");
  refuses(good, {}, {.old_log_probs = two, .advantages = adv}, {}, {.logits = dz},
          "old_log_probs has shape [1, 2], but logits' rows has [1, 3]");
  refuses(good, {}, {.log_probs = old, .old_log_probs = old, .advantages = adv}, {}, {.logits = dz},
          "log_probs is given, but logits say what it is");
  refuses(good, {}, b, {}, {.logits = dz, .log_probs = adv}, "log_probs [1, 3] overlaps advantages [1, 3]");
  refuses(good, {}, b, {}, {.logits = dz, .values = two}, "values is not given, but its gradient is asked for");
  CHECK(std::all_of(dz.begin(), dz.end(), [](float x) { return x == 7; }));
}
