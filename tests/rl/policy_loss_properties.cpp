// Policy losses: layouts, packing, threads, precision, extremes, and what is refused.
#include "policy_loss.hpp"

using namespace policy_tests;
using Catch::Matchers::Contains;

namespace {

const mlkit::cpu exec;
const rl::ppo_options options{.clip = 0.2f, .value_clip = 0.25f, .entropy = 0.01f};

template <class T>
struct result {
  rl::policy_stats stats;
  std::vector<T> dlogp, dvalues, dentropies;
  bool operator==(const result& o) const {
    const auto numbers = [](const rl::policy_stats& s) {
      return std::vector<double>{
          s.loss,      s.policy_loss,   s.value_loss,          s.entropy,           s.kl_k1, s.kl_k3, s.ratio_min,
          s.ratio_max, s.clip_fraction, s.value_clip_fraction, s.explained_variance};
    };
    return numbers(stats) == numbers(o.stats) && dlogp == o.dlogp && dvalues == o.dvalues && dentropies == o.dentropies;
  }
};

template <class T>
result<T> ppo(const mlkit::cpu& on, const sample& s) {
  storage_of<T> m(s);
  const auto stats = rl::ppo_loss(on, batch_of(m, s), options, gradients_of(m, s));
  return {stats, m.dlogp, m.dvalues, m.dentropies};
}
template <class T>
result<T> gspo(const mlkit::cpu& on, const sample& s) {
  storage_of<T> m(s);
  const auto stats = rl::policy_loss(on, batch_of(m, s), rl::gspo{.low = 0.05, .high = 0.06},
                                     rl::sequence_mean_of_means{}, {.entropy = 0.01}, gradients_of(m, s));
  return {stats, m.dlogp, m.dvalues, m.dentropies};
}

template <class T>
void check_near(const result<T>& a, const result<double>& b, double tolerance) {
  CHECK(a.stats.policy_loss == Approx(b.stats.policy_loss).margin(tolerance));
  CHECK(a.stats.value_loss == Approx(b.stats.value_loss).margin(tolerance));
  CHECK(a.stats.entropy == Approx(b.stats.entropy).margin(tolerance));
  CHECK(a.stats.loss == Approx(b.stats.loss).margin(tolerance));
  CHECK(a.stats.kl_k1 == Approx(b.stats.kl_k1).margin(tolerance));
  CHECK(a.stats.kl_k3 == Approx(b.stats.kl_k3).margin(tolerance));
  if (std::isfinite(b.stats.explained_variance))
    CHECK(a.stats.explained_variance == Approx(b.stats.explained_variance).margin(4 * tolerance));
  CHECK(a.stats.ratio_min == Approx(b.stats.ratio_min).margin(tolerance));
  CHECK(a.stats.ratio_max == Approx(b.stats.ratio_max).margin(4 * tolerance));
  double worst = 0, scale = 0;
  for (std::size_t i = 0; i < b.dlogp.size(); ++i) {
    worst = std::max({worst, std::fabs(static_cast<double>(a.dlogp[i]) - b.dlogp[i]),
                      std::fabs(static_cast<double>(a.dvalues[i]) - b.dvalues[i]),
                      std::fabs(static_cast<double>(a.dentropies[i]) - b.dentropies[i])});
    scale = std::max({scale, std::fabs(b.dlogp[i]), std::fabs(b.dvalues[i])});
  }
  CHECK(worst <= tolerance * scale);
}

// The sample rounded to what T holds, so that f64 sees the same numbers.
template <class T>
sample rounded(sample s) {
  for (auto* v : {&s.logp, &s.old_logp, &s.advantages, &s.entropies, &s.values, &s.old_values, &s.returns})
    for (double& x : *v) x = static_cast<double>(static_cast<T>(x));
  return s;
}

double naive_ppo(double r, double a) { return std::max(-a * r, -a * clip(r, 0.8, 1.2)); }

}  // namespace

TEST_CASE("losses over many blocks are those of naive sums, for every length of a tail", "[rl][policy]") {
  for (const auto& [batch, time] : std::vector<std::pair<index_t, index_t>>{
           {1, 1}, {1, 3}, {3, 7}, {2, 16}, {1, 31}, {37, 1}, {5, 129}, {1, 512}, {3, 700}, {1, 1025}}) {
    INFO(batch << " x " << time);
    const sample s = rounded<float>(make_sample(batch, time));
    const auto have = ppo<double>(exec, s);
    const naive_loss want = naive(
        s, [](double r, double, double a, double) { return naive_ppo(r, a); }, false,
        [](double, double all, double) { return 1 / all; }, 0.25, s.logp);
    CHECK(have.stats.policy_loss == Approx(want.policy).epsilon(1e-7));  // the clip is a float's
    CHECK(have.stats.value_loss == Approx(want.value).epsilon(1e-7));
    CHECK(have.stats.entropy == Approx(want.entropy).epsilon(1e-12));
    check_near(ppo<float>(exec, s), have, 2e-6);
    check_near(gspo<float>(exec, s), gspo<double>(exec, s), 2e-6);
  }
}

TEST_CASE("statistics are those of the tokens that count", "[rl][policy]") {
  const sample s = make_sample(6, 200);
  const auto have = ppo<double>(exec, s).stats;
  double n = 0, k1 = 0, k3 = 0, low = 1e9, high = 0, clipped = 0, r_mean = 0, e_mean = 0;
  for (const auto& q : s.sequences())
    for (const std::size_t i : q) {
      const double d = s.logp[i] - s.old_logp[i], r = std::exp(d), a = s.advantages[i];
      n += 1, k1 -= d, k3 += r - 1 - d, low = std::min(low, r), high = std::max(high, r);
      clipped += (a > 0 && r > 1 + options.clip) || (a < 0 && r < 1 - options.clip);
      r_mean += s.returns[i], e_mean += s.returns[i] - s.values[i];
    }
  double r_var = 0, e_var = 0;
  for (const auto& q : s.sequences())
    for (const std::size_t i : q) {
      r_var += std::pow(s.returns[i] - r_mean / n, 2);
      e_var += std::pow(s.returns[i] - s.values[i] - e_mean / n, 2);
    }
  CHECK(static_cast<double>(have.tokens) == n);
  CHECK(have.sequences == 6);
  CHECK(have.kl_k1 == Approx(k1 / n).epsilon(1e-12));
  CHECK(have.kl_k3 == Approx(k3 / n).epsilon(1e-12));
  CHECK(have.ratio_min == Approx(low).epsilon(1e-12));
  CHECK(have.ratio_max == Approx(high).epsilon(1e-12));
  CHECK(have.clip_fraction == Approx(clipped / n).epsilon(1e-12));
  CHECK(have.explained_variance == Approx(1 - e_var / r_var).epsilon(1e-11));
}

TEST_CASE("k3 of nearly equal policies does not cancel, nor does the variance of returns far from 0", "[rl][policy]") {
  sample s = make_sample(4, 100, 1);
  double k3 = 0;
  for (std::size_t i = 0; i < s.size(); ++i) {
    s.old_logp[i] = static_cast<float>(s.logp[i]);
    s.logp[i] = s.old_logp[i] + 0x1p-12 * (1 + static_cast<double>(i % 3));
    const double d = s.logp[i] - s.old_logp[i];
    k3 += (std::expm1(d) - d) / static_cast<double>(s.size());
    s.returns[i] = 10000 + (i % 2 ? 0.5 : -0.5);
    s.values[i] = s.returns[i] + (i % 4 < 2 ? 0.25 : -0.25);
  }
  const auto have = ppo<float>(exec, s).stats;
  CHECK(have.kl_k3 == Approx(k3).epsilon(1e-3));  // of logp's own rounding
  CHECK(have.explained_variance == Approx(0.75).epsilon(1e-6));
  std::fill(s.returns.begin(), s.returns.end(), 0.1);
  CHECK(std::isnan(ppo<float>(exec, s).stats.explained_variance));
}

TEST_CASE("low precision errs no more than its rounding", "[rl][policy]") {
  const sample b = rounded<mlkit::bf16>(make_sample(5, 130)), h = rounded<mlkit::f16>(make_sample(5, 130));
  const auto near = [](const auto& low, const result<double>& want, double eps) {
    CHECK(low.stats.policy_loss == Approx(want.stats.policy_loss).margin(2e-6));
    CHECK(low.stats.value_loss == Approx(want.stats.value_loss).margin(2e-6));
    for (std::size_t i = 0; i < want.dlogp.size(); ++i) {
      CHECK(std::fabs(static_cast<double>(low.dlogp[i]) - want.dlogp[i]) <= eps * std::fabs(want.dlogp[i]) + 1e-7);
      CHECK(std::fabs(static_cast<double>(low.dvalues[i]) - want.dvalues[i]) <=
            eps * std::fabs(want.dvalues[i]) + 1e-7);
    }
  };
  near(ppo<mlkit::bf16>(exec, b), ppo<double>(exec, b), 0x1p-8);
  near(ppo<mlkit::f16>(exec, h), ppo<double>(exec, h), 0x1p-10);
}

TEST_CASE("policy losses have the same bits for any number of threads", "[rl][policy]") {
  const sample s = make_sample(70, 1000);
  const auto one = ppo<float>({.threads = 1}, s), of_sequences = gspo<float>({.threads = 1}, s);
  for (const int threads : {2, 3, 8}) {
    CHECK(ppo<float>({.threads = threads}, s) == one);
    CHECK(gspo<float>({.threads = threads}, s) == of_sequences);
  }
}

TEST_CASE("layouts and packings give the same", "[rl][policy]") {
  const sample s = make_sample(9, 75);
  for (const bool of_sequence : {false, true}) {
    const auto run = [&](const sample& x) { return of_sequence ? gspo<double>(exec, x) : ppo<double>(exec, x); };
    const auto want = run(s);
    const auto loss = [&](const rl::policy_batch<double>& b, const rl::policy_gradients<double>& g) {
      return of_sequence ? rl::policy_loss(exec, b, rl::gspo{.low = 0.05, .high = 0.06}, rl::sequence_mean_of_means{},
                                           {.entropy = 0.01}, g)
                         : rl::ppo_loss(exec, b, options, g);
    };
    // Time-major, and every operand in every second element of a wider storage.
    for (const bool spread : {false, true}) {
      const index_t step = spread ? 2 : 1;
      const auto turned = [&](const auto& from) {
        std::remove_cvref_t<decltype(from)> to(from.size() * static_cast<std::size_t>(step));
        for (index_t b = 0; b < s.batch; ++b)
          for (index_t t = 0; t < s.time; ++t)
            to[static_cast<std::size_t>(step * (t * s.batch + b))] = from[static_cast<std::size_t>(b * s.time + t)];
        return to;
      };
      storage_of<double> m(s);
      for (auto* v : {&m.logp, &m.old_logp, &m.advantages, &m.entropies, &m.values, &m.old_values, &m.returns, &m.dlogp,
                      &m.dvalues, &m.dentropies})
        *v = turned(*v);
      m.mask = turned(m.mask);
      const auto view = [&](auto& v) {
        return mlkit::matrix_view<std::remove_reference_t<decltype(v[0])>>(v.data(), {s.batch, s.time},
                                                                           {step, step * s.batch});
      };
      const rl::policy_batch<double> b{.log_probs = view(m.logp),
                                       .old_log_probs = view(m.old_logp),
                                       .advantages = view(m.advantages),
                                       .entropies = view(m.entropies),
                                       .values = view(m.values),
                                       .old_values = view(m.old_values),
                                       .returns = view(m.returns),
                                       .mask = view(m.mask)};
      const auto stats =
          loss(b, {.log_probs = view(m.dlogp), .values = view(m.dvalues), .entropies = view(m.dentropies)});
      CHECK(stats.loss == Approx(want.stats.loss).epsilon(1e-13));
      CHECK(stats.explained_variance == Approx(want.stats.explained_variance).epsilon(1e-12));
      for (index_t i = 0; i < s.batch; ++i)
        for (index_t t = 0; t < s.time; ++t) {
          const auto at = static_cast<std::size_t>(i * s.time + t);
          CHECK(view(m.dlogp)(i, t) == Approx(want.dlogp[at]).epsilon(1e-13));
          CHECK(view(m.dvalues)(i, t) == Approx(want.dvalues[at]).epsilon(1e-13));
        }
    }
    // Packed: with the mask, and without what it leaves out; empty sequences change nothing.
    sample packed = s;
    packed.batch = 1, packed.time = s.batch * s.time;
    for (index_t b = 0; b <= s.batch; ++b) packed.starts.push_back(static_cast<std::int32_t>(b * s.time));
    packed.starts.insert(packed.starts.begin() + 3, packed.starts[3]);
    const auto with_mask = run(packed);
    CHECK(with_mask.stats.loss == want.stats.loss);
    CHECK(with_mask.dlogp == want.dlogp);
    sample dense;
    dense.batch = 1, dense.starts = {0};
    for (const auto& q : s.sequences()) {
      for (const std::size_t i : q) {
        dense.logp.push_back(s.logp[i]), dense.old_logp.push_back(s.old_logp[i]);
        dense.advantages.push_back(s.advantages[i]), dense.entropies.push_back(s.entropies[i]);
        dense.values.push_back(s.values[i]), dense.old_values.push_back(s.old_values[i]);
        dense.returns.push_back(s.returns[i]), dense.mask.push_back(1);
      }
      dense.starts.push_back(static_cast<std::int32_t>(dense.logp.size()));
    }
    dense.time = static_cast<index_t>(dense.logp.size());
    const auto without = run(dense);
    CHECK(without.stats.loss == Approx(want.stats.loss).epsilon(1e-13));
    std::size_t at = 0;
    for (const auto& q : s.sequences())
      for (const std::size_t i : q) CHECK(without.dlogp[at++] == Approx(want.dlogp[i]).epsilon(1e-13));
  }
}

TEST_CASE("extreme ratios are held, and no token's NaN reaches another's gradient", "[rl][policy]") {
  sample s = make_sample(2, 40, 1);
  s.logp[0] = 1e4, s.old_logp[0] = 0, s.advantages[0] = 1;
  s.logp[1] = 1e4, s.old_logp[1] = 0, s.advantages[1] = -1;
  s.logp[2] = -1e4, s.old_logp[2] = 0, s.advantages[2] = 1;
  s.logp[3] = -1e4, s.old_logp[3] = 0, s.advantages[3] = -1;
  s.logp[4] = -std::numeric_limits<double>::infinity(), s.advantages[4] = -1;
  const auto have = ppo<float>(exec, s);
  const double n = 80;
  CHECK(have.stats.ratio_max == Approx(std::exp(20.0)).epsilon(1e-6));
  CHECK(have.stats.ratio_min == Approx(std::exp(-20.0)).epsilon(1e-6));
  CHECK(have.dlogp[0] == 0);
  CHECK(have.dlogp[1] == Approx(std::exp(20.0) / n).epsilon(1e-6));
  CHECK(have.dlogp[2] == Approx(-std::exp(-20.0) / n).epsilon(1e-6));
  CHECK(have.dlogp[3] == 0);
  CHECK(have.dlogp[4] == 0);
  CHECK(std::isfinite(have.stats.loss));
  s.advantages[20] = not_a_number;
  const auto poisoned = ppo<float>(exec, s);
  CHECK(std::isnan(poisoned.stats.loss));
  CHECK(std::isfinite(poisoned.stats.value_loss));
  for (std::size_t i = 0; i < s.size(); ++i) CHECK((i == 20 || poisoned.dlogp[i] == have.dlogp[i]));
}

TEST_CASE("nothing that counts gives 0, and so do advantages of 0", "[rl][policy]") {
  sample s = make_sample(3, 20, 0);
  for (const auto& none : {ppo<float>(exec, s), gspo<float>(exec, s)}) {
    CHECK(none.stats.loss == 0);
    CHECK(none.stats.kl_k3 == 0);
    CHECK(none.stats.ratio_min == 1);
    CHECK(none.stats.ratio_max == 1);
    CHECK(none.stats.tokens == 0);
    CHECK(std::isnan(none.stats.explained_variance));
    for (std::size_t i = 0; i < s.size(); ++i)
      CHECK((none.dlogp[i] == 0 && none.dvalues[i] == 0 && none.dentropies[i] == 0));
  }
  CHECK(rl::ppo_loss(exec, rl::policy_batch<float>{}, {}, {}).tokens == 0);

  s = make_sample(3, 20, 1);
  std::fill(s.advantages.begin(), s.advantages.end(), 0.0);
  const auto zero = ppo<float>(exec, s);
  CHECK(zero.stats.policy_loss == 0);
  CHECK(zero.stats.clip_fraction == 0);
  CHECK(std::all_of(zero.dlogp.begin(), zero.dlogp.end(), [](float g) { return g == 0; }));
}

TEST_CASE("braces, vectors and bools are arguments, and what is left out is not written", "[rl][policy]") {
  mlkit::vector<float> logp({3}), old({3}), dlogp({3});
  const std::vector<float> advantages{1, -2, 3};
  const bool mask[] = {true, false, true};
  const auto stats = rl::ppo_loss(exec,
                                  {.log_probs = logp,
                                   .old_log_probs = old,
                                   .advantages = advantages,
                                   .mask = mlkit::tensor_view<const bool, 1>(mask, {3})},
                                  {.clip = 0.2f}, {.log_probs = dlogp});
  CHECK(stats.policy_loss == -2);
  CHECK(dlogp(0) == -0.5f);
  CHECK(dlogp(1) == 0);
  CHECK(dlogp(2) == -1.5f);
  mlkit::matrix<double> d({1, 3}), a({1, 3});
  CHECK(rl::ppo_loss<double>(exec, {.log_probs = d, .old_log_probs = d, .advantages = a}, {}, {}).tokens == 3);
  const auto plain = rl::policy_loss(exec, {.log_probs = logp, .advantages = advantages}, rl::policy_gradient{},
                                     rl::token_mean{}, {}, {.log_probs = dlogp});  // needs no old log-probabilities
  CHECK(plain.ratio_max == 1);
  CHECK(dlogp(1) == Approx(2 / 3.0));
}

TEST_CASE("policy losses refuse what does not fit, and write nothing", "[rl][policy][bad input]") {
  const sample s = make_sample(2, 3, 1);
  storage_of<float> m(s);
  const auto good = batch_of(m, s);
  const auto grads = gradients_of(m, s);
  const auto refuses = [&](const rl::policy_batch<float>& b, const rl::ppo_options& o,
                           const rl::policy_gradients<float>& g, const std::string& text) {
    CHECK_THROWS_WITH(rl::ppo_loss(exec, b, o, g), Contains("rl::ppo_loss: " + text));
  };
  mlkit::matrix<float> narrow({2, 2});
  auto b = good;
  b.old_log_probs = narrow;
  refuses(b, {}, grads, "old_log_probs has shape [2, 2], but log_probs has [2, 3]");
  b = good, b.returns = narrow;
  refuses(b, {}, grads, "returns has shape [2, 2], but log_probs has [2, 3]");
  b = good, b.advantages = {};
  refuses(b, {}, grads, "advantages is not given");
  b = good, b.old_log_probs = {};
  refuses(b, {}, grads, "old_log_probs is not given");
  b = good, b.entropies = {};
  refuses(b, {.entropy = 0.5}, {}, "entropies is not given, but entropy = 0.5");
  refuses(b, {}, grads, "entropies is not given, but its gradient is asked for");
  b = good, b.returns = {};
  refuses(b, {}, grads, "returns is not given, but values is");
  b = good, b.old_values = {};
  refuses(b, {.value_clip = 0.5}, grads, "old_values is not given, but value_clip = 0.5");
  b = good, b.values = {};
  refuses(b, {}, grads, "values is not given, but its gradient is asked for");
  refuses(good, {.clip = -0.5}, grads, "clip = -0.5 is outside [0, 1]");
  refuses(good, {.clip = not_a_number}, grads, "clip = nan is outside [0, 1]");
  refuses(good, {.clip_high = INFINITY}, grads, "clip_high = inf is not finite");
  refuses(good, {.dual_clip = 1}, grads, "dual_clip = 1 is neither 0 nor above 1");
  refuses(good, {.value_clip = -1}, grads, "value_clip = -1 is negative or not finite");
  refuses(good, {.value = -1}, grads, "value = -1 is negative or not finite");
  refuses(good, {.entropy = INFINITY}, grads, "entropy = inf is not finite");
  refuses(good, {.tokens = -3}, grads, "tokens = -3 is negative or not finite");
  const std::vector<std::int32_t> starts{0, 4, 3, 6}, early{0, 5}, late{1, 6};
  b = good, b.cu_seqlens = starts;
  refuses(b, {}, grads, "log_probs has shape [2, 3], but cu_seqlens packs sequences of [tokens] alone");
  const auto packed = [&](const std::vector<std::int32_t>& at, const std::string& text) {
    refuses({.log_probs = m.logp, .old_log_probs = m.old_logp, .advantages = m.advantages, .cu_seqlens = at}, {},
            {.log_probs = m.dlogp}, text);
  };
  packed(starts, "cu_seqlens[2] = 3 is less than cu_seqlens[1] = 4");
  packed(early, "cu_seqlens ends with 5, but there are 6 tokens");
  packed(late, "cu_seqlens[0] = 1 is not 0");
  auto g = grads;
  g.log_probs = narrow;
  refuses(good, {}, g, "the gradient of log_probs has shape [2, 2], but log_probs has [2, 3]");
  g = grads, g.values = m.values;
  refuses(good, {}, g, "the gradient of values has shape [1, 6]");
  g = grads, g.values = mlkit::matrix_view<float>(m.values.data(), {2, 3});
  refuses(good, {}, g, "the gradient of values [2, 3] overlaps values [2, 3]");
  g = grads, g.values = grads.log_probs;
  refuses(good, {}, g, "the gradient of values [2, 3] overlaps the gradient of log_probs [2, 3]");

  const auto term = [&](const auto& policy, const auto& aggregate, const std::string& text) {
    CHECK_THROWS_WITH(rl::policy_loss(exec, good, policy, aggregate, {}, grads),
                      "mlkit::value_error: rl::policy_loss: " + text);
  };
  term(rl::gspo{.low = 2}, rl::sequence_mean_of_means{}, "gspo.low = 2 is outside [0, 1]");
  term(rl::gspo{.high = -1}, rl::sequence_mean_of_means{}, "gspo.high = -1 is negative or not finite");
  term(rl::gspo{}, rl::sequence_mean_of_means{-1}, "sequence_mean_of_means.sequences = -1 is negative or not finite");
  CHECK_THROWS_WITH(rl::value_loss(exec, {.values = m.values}, {}, {}),
                    Contains("returns has shape [0, 0], but values has [1, 6]"));
  CHECK_THROWS_WITH(rl::value_loss(exec, {.values = m.values, .returns = m.returns}, {.clip = 1}, {}),
                    Contains("old_values is not given, but clip = 1"));
  for (const auto* v : {&m.dlogp, &m.dvalues, &m.dentropies})
    CHECK(std::all_of(v->begin(), v->end(), [](float x) { return x == 77; }));
  CHECK(std::all_of(narrow.begin(), narrow.end(), [](float x) { return x == 0; }));

  CHECK_THROWS_WITH(rl::dual_clip<>{.bound = 1}.check("f"), Contains("dual_clip.bound = 1 is not above 1"));
  CHECK_THROWS_WITH(rl::dual_clip<>{.term = {.low = -1}}.check("f"), Contains("ppo_clip.low = -1 is outside"));
  CHECK_THROWS_WITH(rl::sequence_ratio<rl::cispo>{.term = {.high = -1}}.check("f"), Contains("cispo.high = -1"));
  CHECK_THROWS_WITH(rl::sum_over{0}.check("f"), Contains("sum_over.constant = 0 is not positive"));
  CHECK_THROWS_WITH(rl::token_mean{-1}.check("f"), Contains("token_mean.tokens = -1 is negative"));
  CHECK_THROWS_WITH(rl::sequence_mean_of_sums{-1}.check("f"), Contains("sequence_mean_of_sums.sequences = -1"));
}
