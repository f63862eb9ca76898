// Losses of reinforcement learning on a tape: values against naive loops, gradients against central differences.
#include <mlkit/nn/ops.hpp>
#include <mlkit/nn/rl.hpp>

#include <catch2/catch.hpp>
#include <functional>

namespace nn = mlkit::nn;
namespace rl = mlkit::rl;
using Catch::Matchers::Contains;
using mlkit::index_t;
using var = nn::var<double>;
using tape = nn::tape<double>;
using function = std::function<var(tape&, std::vector<var>&)>;

namespace {

std::vector<double> normals(std::size_t n, std::uint64_t stream) {
  std::vector<double> x(n);
  for (std::size_t i = 0; i < n; ++i) x[i] = mlkit::random_stream{8, stream}.normal(i);
  return x;
}

// The largest |analytic - numeric| / max(1, |numeric|) over all elements of all inputs, for one number f(inputs).
double worst(const std::vector<nn::shape>& shapes, const function& f) {
  nn::parameters<double> store(7);
  std::vector<nn::parameter<double>*> inputs;
  for (std::size_t i = 0; i < shapes.size(); ++i)
    inputs.push_back(&store.add("input" + std::to_string(i), shapes[i], nn::normal{0.7}));
  const auto value = [&](bool backward) {
    tape t;
    std::vector<var> x;
    for (auto* p : inputs) x.push_back(t.use(*p));
    const var y = f(t, x);
    if (backward) t.backward(y);
    return y.item();
  };
  value(true);
  double high = 0;
  for (auto* p : inputs)
    for (index_t i = 0; i < p->size(); ++i) {
      const double x = p->value(i), step = 1e-5;
      p->value(i) = x + step;
      const double above = value(false);
      p->value(i) = x - step;
      const double below = value(false);
      p->value(i) = x;
      const double numeric = (above - below) / (2 * step);
      high = std::max(high, std::abs(p->grad(i) - numeric) / std::max(1.0, std::abs(numeric)));
    }
  return high;
}

constexpr double tolerance = 2e-8;

}  // namespace

TEST_CASE("log-probabilities and entropies of tokens, at a temperature", "[nn]") {
  const std::vector<std::int32_t> ids{3, 0, 4, 4};
  const std::vector<double> z = normals(20, 1), w = normals(8, 2);
  for (const double temperature : {1.0, 0.6}) {
    tape t;
    const auto out = nn::token_log_probs<double>(nn::reshape(t.constant(z), {4, 5}), ids, temperature);
    for (std::size_t r = 0; r < 4; ++r) {
      double sum = 0, entropy = 0;
      for (std::size_t c = 0; c < 5; ++c) sum += std::exp(z[r * 5 + c] / temperature);
      for (std::size_t c = 0; c < 5; ++c) {
        const double p = std::exp(z[r * 5 + c] / temperature) / sum;
        entropy -= p * std::log(p);
      }
      const double logp = z[r * 5 + static_cast<std::size_t>(ids[r])] / temperature - std::log(sum);
      CHECK(out.log_probs.data()[r] == Approx(logp).epsilon(1e-13));
      CHECK(out.entropies.data()[r] == Approx(entropy).epsilon(1e-13));
    }
    CHECK(worst({{4, 5}}, [&](tape& on, auto& v) {
            const auto o = nn::token_log_probs<double>(v[0], ids, temperature);
            const auto weighted = [&](const var& x, std::size_t from) {
              return nn::sum(x * on.constant(std::vector<double>(w.begin() + static_cast<std::ptrdiff_t>(from),
                                                                 w.begin() + static_cast<std::ptrdiff_t>(from) + 4)));
            };
            // The logits are used once more, so that their gradient meets another.
            return weighted(o.log_probs, 0) + weighted(o.entropies, 4) + nn::sum(v[0] * v[0]);
          }) < tolerance);
    CHECK(worst({{4, 5}}, [&](tape&, auto& v) {  // one of both alone
            return nn::sum(nn::token_log_probs<double>(v[0], ids, temperature).log_probs);
          }) < tolerance);
  }
  tape t;
  CHECK_THROWS_WITH(nn::token_log_probs<double>(nn::reshape(t.constant(z), {4, 5}), {ids.data(), 3}),
                    Contains("tokens") && Contains("4"));
}

TEST_CASE("PPO's loss from logits and values", "[nn]") {
  const std::vector<std::int32_t> ids{3, 0, 4, 4, 1, 2};
  std::vector<double> old = normals(6, 3), advantages = normals(6, 4), old_values = normals(6, 5),
                      returns = normals(6, 6);
  for (double& l : old) l = -1.6 + 0.3 * l;
  const std::vector<std::int32_t> starts{0, 2, 6};
  const rl::ppo_options options{.clip = 0.3, .value_clip = 0.4, .value = 0.7, .entropy = 0.1};
  rl::policy_stats stats;
  const function loss = [&](tape&, std::vector<var>& v) {
    const auto o = nn::token_log_probs<double>(v[0], ids);
    return nn::ppo_loss<double>({o.log_probs, v[1], o.entropies},
                                {.old_log_probs = old,
                                 .advantages = advantages,
                                 .old_values = old_values,
                                 .returns = returns,
                                 .cu_seqlens = starts},
                                options, &stats);
  };
  CHECK(worst({{6, 5}, {6}}, loss) < tolerance);
  CHECK(stats.tokens == 6);
  CHECK(stats.sequences == 2);

  // The formula, token by token.
  tape t;
  std::vector<var> v{nn::reshape(t.constant(normals(30, 7)), {6, 5}), t.constant(normals(6, 8))};
  const auto o = nn::token_log_probs<double>(v[0], ids);
  double expected = 0;
  for (std::size_t i = 0; i < 6; ++i) {
    const double r = std::exp(o.log_probs.data()[i] - old[i]), a = advantages[i];
    const double value = v[1].data()[i], held = old_values[i] + std::clamp(value - old_values[i], -0.4, 0.4);
    const double off = std::max(std::pow(value - returns[i], 2), std::pow(held - returns[i], 2)) / 2;
    expected += (std::max(-a * r, -a * std::clamp(r, 0.7, 1.3)) + 0.7 * off - 0.1 * o.entropies.data()[i]) / 6;
  }
  CHECK(loss(t, v).item() == Approx(expected).epsilon(1e-13));

  // A policy alone, without values and entropies, with a mask over [batch, time].
  std::vector<std::uint8_t> mask{1, 1, 0, 1, 0, 1};
  const auto grid = [](const std::vector<double>& x) { return mlkit::matrix_view<const double>(x.data(), {2, 3}); };
  const mlkit::matrix_view<const std::uint8_t> kept(mask.data(), {2, 3});
  CHECK(worst({{2, 3}}, [&](tape&, auto& x) {
          return nn::ppo_loss<double>({.log_probs = x[0]},
                                      {.old_log_probs = grid(old), .advantages = grid(advantages), .mask = kept}, {});
        }) < tolerance);
  CHECK_THROWS_WITH(nn::ppo_loss<double>({.log_probs = v[1], .values = nn::slice(v[1], 0, 5)}, {}, {}),
                    Contains("values has shape [5], but log_probs has [6]"));
}

TEST_CASE("preferences on a tape", "[nn]") {
  const std::vector<double> margins{0.1, 0, -0.3, 0.5, 2}, chosen = normals(5, 9), rejected = normals(5, 12);
  CHECK(worst({{5, 1}, {5, 1}}, [](tape&, auto& v) { return nn::preference_loss(v[0], v[1]); }) < tolerance);
  CHECK(worst({{5}, {5}}, [&](tape&, auto& v) {
          return nn::preference_loss(v[0], v[1], rl::bradley_terry{.centering = 0.1}, {.margins = margins});
        }) < tolerance);
  rl::preference_stats stats;
  CHECK(worst({{5}, {5}}, [&](tape&, auto& v) {
          return nn::preference_loss(v[0], v[1], rl::dpo{.beta = 0.4},
                                     {.reference_chosen = chosen, .reference_rejected = rejected}, &stats);
        }) < tolerance);
  CHECK(stats.pairs == 5);
  tape t;
  const std::vector<double> c = normals(3, 10), r = normals(3, 11);
  double expected = 0;
  for (std::size_t i = 0; i < 3; ++i) expected += std::log1p(std::exp(r[i] - c[i])) / 3;
  CHECK(nn::preference_loss(t.constant(c), t.constant(r)).item() == Approx(expected).epsilon(1e-13));
  CHECK_THROWS_WITH(nn::preference_loss(t.constant(c), t.constant(chosen)), Contains("rejected has 5 elements"));
}
