// Categorical, multi-discrete and Gaussian policies against torch.distributions, and their samples against their
// probabilities.
#include <catch2/catch.hpp>
#include <cmath>
#include <mlkit/rl/gaussian.hpp>
#include <numeric>
#include <vector>

#include "fixtures.hpp"

namespace {

namespace rl = mlkit::rl;
using Catch::Matchers::Contains;
using mlkit::index_t;

const mlkit::cpu exec;

const std::vector<double>& from_file(const std::string& name) { return fixture(name, "policy_loss_fixtures.txt"); }

template <class T>
std::vector<T> as(const std::string& name) {
  std::vector<T> v;
  for (const double x : from_file(name)) v.push_back(static_cast<T>(x));
  return v;
}
template <class T>
mlkit::matrix_view<T> rows(std::vector<T>& v, index_t n = 6) {
  return {v.data(), {n, static_cast<index_t>(v.size()) / n}};
}
template <class T>
void check_near(const std::vector<T>& have, const std::string& name) {
  INFO(name);
  const auto& want = from_file(name);
  REQUIRE(have.size() == want.size());
  const double tolerance = std::is_same_v<T, double> ? 1e-13 : 2e-6;
  for (std::size_t i = 0; i < want.size(); ++i)
    CHECK(static_cast<double>(have[i]) == Approx(want[i]).epsilon(tolerance).margin(tolerance));
}

template <class T>
void check_multi_discrete() {
  auto logits = as<T>("categorical.logits"), c = as<T>("policy.c"), d = as<T>("policy.d");
  auto actions = as<std::int32_t>("categorical.actions");
  const std::vector<index_t> sizes{3, 2, 4};
  const rl::multi_discrete<T> policy{.logits = rows(logits), .sizes = sizes};
  std::vector<T> logp(6), entropy(6), dlogits(54);
  rl::log_probs(exec, policy, rows(actions), {.logp = mlkit::as_view(logp), .entropy = mlkit::as_view(entropy)});
  check_near(logp, "categorical.logp");
  check_near(entropy, "categorical.entropy");
  rl::backward(exec, policy, rows(actions), {.dlogp = mlkit::as_view(c), .dentropy = mlkit::as_view(d)}, rows(dlogits));
  check_near(dlogits, "categorical.dlogits");
  // In place, and with the actions and logits in other layouts.
  std::vector<std::int64_t> turned(18);
  for (std::size_t r = 0; r < 6; ++r)
    for (std::size_t i = 0; i < 3; ++i) turned[i * 6 + r] = actions[r * 3 + i];
  rl::backward(exec, policy, mlkit::transposed(mlkit::matrix_view<const std::int64_t>(turned.data(), {3, 6})),
               {.dlogp = mlkit::as_view(c), .dentropy = mlkit::as_view(d)}, rows(logits));
  check_near(logits, "categorical.dlogits");
}

template <class T>
void check_gaussian(const std::string& name, index_t rows_of_log_std) {
  INFO(name);
  auto mean = as<T>("gaussian.mean"), log_std = as<T>("gaussian.log_std"), action = as<T>("gaussian.action");
  auto c = as<T>("policy.c"), d = as<T>("policy.d");
  log_std.resize(static_cast<std::size_t>(rows_of_log_std) * 3);
  const rl::gaussian<T> policy{.mean = rows(mean), .log_std = rows(log_std, rows_of_log_std)};
  std::vector<T> logp(6), entropy(6), dmean(18), dlog_std(log_std.size());
  rl::log_probs(exec, policy, rows(action), {.logp = mlkit::as_view(logp), .entropy = mlkit::as_view(entropy)});
  check_near(logp, "gaussian." + name + ".logp");
  check_near(entropy, "gaussian." + name + ".entropy");
  rl::backward(exec, policy, rows(action), {.dlogp = mlkit::as_view(c), .dentropy = mlkit::as_view(d)},
               {.mean = rows(dmean), .log_std = rows(dlog_std, rows_of_log_std)});
  check_near(dmean, "gaussian." + name + ".dmean");
  check_near(dlog_std, "gaussian." + name + ".dlog_std");
}

}  // namespace

TEST_CASE("multi-discrete policies are torch's Categoricals side by side", "[rl][policies]") {
  check_multi_discrete<double>();
  check_multi_discrete<float>();
}

TEST_CASE("Gaussian policies are torch's Normal, with a log_std of each row's own or one for all", "[rl][policies]") {
  check_gaussian<double>("own", 6);
  check_gaussian<double>("shared", 1);
  check_gaussian<float>("own", 6);
  check_gaussian<float>("shared", 1);
}

TEST_CASE("a shared log_std gets the same bits for any number of threads", "[rl][policies]") {
  constexpr index_t n = 40000, d = 5;
  const mlkit::random_stream random{3, 1};
  mlkit::matrix<float> mean({n, d}), log_std({1, d}), actions({n, d}), dmean({n, d}), one({1, d}), many({1, d});
  mlkit::vector<float> dlogp({n});
  for (index_t i = 0; i < n; ++i) dlogp(i) = random.normal(static_cast<std::uint64_t>(i));
  const rl::gaussian<float> policy{.mean = mean, .log_std = log_std};
  rl::sample(exec, policy, random, actions);
  const auto gradient = [&](int threads, mlkit::matrix<float>& to) {
    rl::backward(mlkit::cpu{.threads = threads}, policy, actions, {.dlogp = dlogp}, {.mean = dmean, .log_std = to});
  };
  gradient(1, one);
  for (const int threads : {2, 3, 8}) {
    gradient(threads, many);
    CHECK(std::equal(one.begin(), one.end(), many.begin()));
  }
  double want = 0;
  for (index_t i = 0; i < n; ++i)
    want += static_cast<double>(dlogp(i)) * (std::pow(static_cast<double>(actions(i, 2)), 2) - 1);
  CHECK(one(0, 2) == Approx(want).epsilon(1e-5));
}

TEST_CASE("samples have the probabilities of their policy", "[rl][policies]") {
  constexpr index_t n = 100000;
  const mlkit::random_stream random{11, 4};
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> row{0.5f, -1, -infinity, 2, 100, 100.5f};  // of 4 and of 2 classes
  const std::vector<index_t> sizes{4, 2};
  mlkit::matrix<float> logits({n, 6});
  for (index_t r = 0; r < n; ++r) std::copy(row.begin(), row.end(), &logits(r, 0));
  std::vector<std::int32_t> drawn(2 * n), again(2 * n);
  const rl::multi_discrete<float> policy{.logits = logits, .sizes = sizes};
  rl::sample(exec, policy, random, rows(drawn, n));
  double counts[4] = {}, second = 0, both = 0;
  for (index_t r = 0; r < n; ++r) {
    const auto at = static_cast<std::size_t>(2 * r);
    counts[drawn[at]] += 1.0 / n;
    second += drawn[at + 1] / static_cast<double>(n);
    both += (drawn[at] == 3) * drawn[at + 1] / static_cast<double>(n);
  }
  const double total = std::exp(0.5) + std::exp(-1.0) + std::exp(2.0), p = 1 / (1 + std::exp(-0.5));
  CHECK(counts[0] == Approx(std::exp(0.5) / total).margin(0.006));  // four standard deviations
  CHECK(counts[1] == Approx(std::exp(-1.0) / total).margin(0.006));
  CHECK(counts[2] == 0);
  CHECK(second == Approx(p).margin(0.006));
  CHECK(both == Approx(p * std::exp(2.0) / total).margin(0.006));  // choices are independent
  // A row's draw is its own, whatever stands around it.
  const rl::multi_discrete<float> tail{.logits = {&logits(500, 0), {100, 6}}, .sizes = sizes};
  rl::sample(mlkit::cpu{.threads = 3}, tail, random, mlkit::matrix_view<std::int32_t>(again.data(), {100, 2}), 500);
  CHECK(std::equal(again.begin(), again.begin() + 200, drawn.begin() + 1000));

  mlkit::matrix<double> mean({n, 2}), log_std({1, 2}), x({n, 2});
  for (index_t r = 0; r < n; ++r) mean(r, 0) = 3;
  log_std(0, 1) = std::log(2.0);
  rl::sample(exec, rl::gaussian<double>{.mean = mean, .log_std = log_std}, random, x);
  double m[2] = {}, v[2] = {};
  for (index_t r = 0; r < n; ++r)
    for (index_t c = 0; c < 2; ++c) m[c] += x(r, c) / n;
  for (index_t r = 0; r < n; ++r)
    for (index_t c = 0; c < 2; ++c) v[c] += std::pow(x(r, c) - m[c], 2) / n;
  CHECK(m[0] == Approx(3).margin(0.013));
  CHECK(m[1] == Approx(0).margin(0.026));
  CHECK(v[0] == Approx(1).margin(0.02));
  CHECK(v[1] == Approx(4).margin(0.08));
}

TEST_CASE("a policy without choices gives sums of nothing", "[rl][policies]") {
  const mlkit::matrix<float> logits({3, 0});
  const mlkit::matrix_view<const std::int32_t> actions(nullptr, {3, 0});
  std::vector<float> logp(3, 7), entropy(3, 7);
  rl::log_probs(exec, rl::multi_discrete<float>{.logits = logits}, actions,
                {.logp = mlkit::as_view(logp), .entropy = mlkit::as_view(entropy)});
  CHECK((logp == std::vector<float>(3) && entropy == std::vector<float>(3)));
}

TEST_CASE("policies refuse what does not fit, and write nothing", "[rl][policies][bad input]") {
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  mlkit::matrix<float> logits({2, 5}), dlogits({2, 4});
  std::vector<std::int32_t> actions{0, 1, 2, 3};
  mlkit::vector<float> logp({2}), three({3});
  const std::vector<index_t> sizes{3, 2}, few{3}, none{5, 0};
  const auto discrete = [&](const std::vector<index_t>& s) {
    return rl::multi_discrete<float>{.logits = logits, .sizes = s};
  };
  const auto choices = rows(actions, 2);
  CHECK_THROWS_WITH(rl::log_probs(exec, discrete(sizes), choices, {.logp = logp}),
                    "mlkit::value_error: rl::log_probs: actions[1, 1] = 3 is outside [0, 2)");
  actions[3] = 1;
  CHECK_THROWS_WITH(rl::log_probs(exec, discrete(few), choices, {.logp = logp}),
                    Contains("logits has 5 columns, but sizes add up to 3"));
  CHECK_THROWS_WITH(rl::log_probs(exec, discrete(none), choices, {.logp = logp}),
                    Contains("sizes[1] = 0 is not positive"));
  CHECK_THROWS_WITH(rl::log_probs(exec, discrete(sizes), choices, {.logp = three}),
                    Contains("logp has 3 elements, but logits' rows has 2"));
  CHECK_THROWS_WITH(rl::log_probs(exec, rl::categorical<float>{.logits = logits}, choices, {.logp = logp}),
                    Contains("actions has 2 columns, but the policy has 1"));
  CHECK_THROWS_WITH(rl::backward(exec, discrete(sizes), choices, {.dlogp = logp}, dlogits),
                    Contains("dlogits has shape [2, 4], but logits has [2, 5]"));
  CHECK_THROWS_WITH(rl::backward(exec, discrete(sizes), choices, {.dlogp = three}, logits),
                    Contains("dlogp has 3 elements"));
  const mlkit::random_stream random{1, 1};
  logits(1, 4) = nan;
  CHECK_THROWS_WITH(rl::sample(exec, discrete(sizes), random, choices), Contains("logits[1, 4] = nan is no logit"));
  logits(1, 4) = logits(1, 3) = -infinity;
  CHECK_THROWS_WITH(rl::sample(exec, discrete(sizes), random, choices),
                    Contains("choice 1 of row 1 has no class that is possible"));
  logits(1, 4) = 0;
  CHECK_THROWS_WITH(rl::sample(exec, discrete(sizes), random, choices, -1), Contains("first = -1 is negative"));
  CHECK(actions == std::vector<std::int32_t>{0, 1, 2, 1});

  mlkit::matrix<float> mean({2, 3}), log_std({1, 3}), two({1, 2}), tall({3, 3}), a({2, 3});
  const rl::gaussian<float> policy{.mean = mean, .log_std = log_std};
  CHECK_THROWS_WITH(rl::log_probs(exec, rl::gaussian<float>{.mean = mean, .log_std = two}, a, {.logp = logp}),
                    Contains("log_std has 2 columns, but mean has 3"));
  CHECK_THROWS_WITH(rl::log_probs(exec, rl::gaussian<float>{.mean = mean, .log_std = tall}, a, {.logp = logp}),
                    Contains("log_std has 3 rows, but mean has 2"));
  CHECK_THROWS_WITH(rl::log_probs(exec, policy, tall, {.logp = logp}),
                    Contains("actions has shape [3, 3], but mean has [2, 3]"));
  CHECK_THROWS_WITH(rl::backward(exec, policy, a, {.dlogp = logp}, {.mean = mean}), Contains("overlaps mean [2, 3]"));
  CHECK_THROWS_WITH(rl::backward(exec, policy, a, {.dlogp = logp}, {.log_std = tall}),
                    Contains("the gradient of log_std has shape [3, 3], but log_std has [1, 3]"));
  CHECK_THROWS_WITH(rl::sample(exec, policy, random, a, -2), Contains("first = -2 is negative"));
  CHECK((logp(0) == 0 && logp(1) == 0 && a(0, 0) == 0));
}
