// Group advantages and best-of-n against their formulas in f64.
#include <mlkit/rl/group.hpp>

#include "../fixtures.hpp"
#include "numbers.hpp"

namespace rl = mlkit::rl;
using mlkit::cpu;
using namespace rl_test;

namespace {

// Each formula over the rewards of one group.
std::vector<double> grpo(const std::vector<double>& r, double epsilon, bool sample) {
  double mean = 0, square = 0;
  const double n = static_cast<double>(r.size());
  for (const double x : r) mean += x / n;
  for (const double x : r) square += (x - mean) * (x - mean);
  const double deviation = n > 1 ? std::sqrt(square / (sample ? n - 1 : n)) : 0;
  std::vector<double> a;
  for (const double x : r) a.push_back(n > 1 ? (x - mean) / (deviation + epsilon) : 0);
  return a;
}
std::vector<double> rloo(const std::vector<double>& r) {
  std::vector<double> a;
  for (std::size_t i = 0; i < r.size(); ++i) {
    double others = 0;
    for (std::size_t j = 0; j < r.size(); ++j) others += j == i ? 0 : r[j] / static_cast<double>(r.size() - 1);
    a.push_back(r.size() > 1 ? r[i] - others : 0);
  }
  return a;
}
std::vector<double> centered(const std::vector<double>& r) {
  double mean = 0;
  for (const double x : r) mean += x / static_cast<double>(r.size());
  std::vector<double> a;
  for (const double x : r) a.push_back(x - mean);
  return a;
}

template <class T, class Method, class F>
double worst_error(const std::vector<std::int32_t>& starts, bool equal, const Method& method, const F& of_group) {
  const std::vector<T> r = normal<T>(starts.back(), 20, 2, 1);
  std::vector<T> out(r.size());
  if (equal)
    rl::group_advantages(cpu{}, r, rl::groups{starts[1]}, method, out);
  else
    rl::group_advantages(cpu{}, r, rl::groups{starts}, method, out);
  double worst = 0;
  for (std::size_t g = 0; g + 1 < starts.size(); ++g) {
    const std::vector<double> want = of_group(std::vector<double>(r.begin() + starts[g], r.begin() + starts[g + 1]));
    for (std::size_t i = 0; i < want.size(); ++i)
      worst = std::max(worst, std::fabs(static_cast<double>(out[static_cast<std::size_t>(starts[g]) + i]) - want[i]));
  }
  return worst;
}

}  // namespace

TEMPLATE_TEST_CASE("group advantages are their formulas, in equal groups and others", "[rl][group]", float, double) {
  const double tight = std::is_same_v<TestType, double> ? 1e-14 : 1e-6;
  const std::vector<std::int32_t> pairs{0, 2, 4, 6}, fours{0, 4, 8, 12, 16, 20}, ones{0, 1, 2, 3},
      uneven{0, 3, 3, 4, 9, 9, 11};
  for (const auto& [starts, equal] :
       {std::pair{pairs, true}, {fours, true}, {ones, true}, {pairs, false}, {uneven, false}}) {
    for (const bool sample : {true, false})
      CHECK(worst_error<TestType>(
                starts, equal,
                rl::grpo{.epsilon = 0.01, .variance = sample ? rl::variance_of::sample : rl::variance_of::population},
                [&](const auto& r) { return grpo(r, 0.01, sample); }) < tight);
    CHECK(worst_error<TestType>(starts, equal, rl::dr_grpo{}, centered) < tight);
    CHECK(worst_error<TestType>(starts, equal, rl::rloo{}, rloo) < tight);
    // REINFORCE++: what remains of each group over the deviation of all.
    const std::vector<TestType> r = normal<TestType>(starts.back(), 20, 2, 1);
    for (const bool baseline : {true, false}) {
      std::vector<double> rest;
      for (std::size_t g = 0; g + 1 < starts.size(); ++g) {
        const std::vector<double> group(r.begin() + starts[g], r.begin() + starts[g + 1]);
        const std::vector<double> part = baseline ? centered(group) : group;
        rest.insert(rest.end(), part.begin(), part.end());
      }
      const naive m(rest);
      const double deviation = std::sqrt(m.m2 / (m.count - 1));
      std::vector<TestType> out = r;  // in place
      rl::group_advantages(cpu{}, out, rl::groups{starts}, rl::reinforce_pp{.epsilon = 0.1, .group_baseline = baseline},
                           out);
      for (std::size_t i = 0; i < rest.size(); ++i) {
        const double want = deviation > 0 ? (rest[i] - m.mean) / (deviation + 0.1) : 0;
        CHECK(std::fabs(static_cast<double>(out[i]) - want) < tight);
      }
    }
  }
}

TEST_CASE("group advantages are TRL's", "[rl][group]") {
  const std::string file = "preference_fixtures.txt";
  const std::vector<double>& r = fixture("group.rewards", file);
  const auto check = [&](const std::string& name, const auto& method) {
    std::vector<double> out(r.size());
    rl::group_advantages(cpu{}, r, rl::groups{4}, method, out);
    for (std::size_t i = 0; i < r.size(); ++i) CHECK(std::fabs(out[i] - fixture("group." + name, file)[i]) < 1e-14);
  };
  check("grpo", rl::grpo{});
  check("dr_grpo", rl::dr_grpo{});
  check("rloo", rl::rloo{});
}

TEST_CASE("groups of one, of equal rewards, empty groups and an empty batch", "[rl][group]") {
  const auto zero = [](const auto& method, const std::vector<float>& r, const rl::groups& of) {
    std::vector<float> out(r.size(), 5);
    rl::group_advantages(cpu{}, r, of, method, out);
    return out == std::vector<float>(r.size(), 0);
  };
  const std::vector<float> equal(6, 0.1f), one{-3.5f};
  const std::vector<std::int32_t> starts{0, 0, 6, 6}, none{0}, empty{0, 0};
  for (const rl::groups& of : {rl::groups{3}, rl::groups{1}, rl::groups{starts}}) {
    CHECK(zero(rl::grpo{.epsilon = 0}, equal, of));
    CHECK(zero(rl::dr_grpo{}, equal, of));
    CHECK(zero(rl::rloo{}, equal, of));
    CHECK(zero(rl::reinforce_pp{.epsilon = 0}, equal, of));
  }
  CHECK(zero(rl::grpo{}, one, rl::groups{1}));
  CHECK(zero(rl::rloo{}, one, rl::groups{1}));
  CHECK(zero(rl::reinforce_pp{.group_baseline = false}, one, rl::groups{1}));
  for (const rl::groups& of : {rl::groups{3}, rl::groups{none}, rl::groups{empty}}) {
    CHECK(zero(rl::grpo{}, {}, of));
    CHECK(zero(rl::reinforce_pp{}, {}, of));
  }
}

TEST_CASE("RLOO is n / (n - 1) of Dr. GRPO; advantages do not change with a shift of rewards", "[rl][group]") {
  const std::vector<double> r = normal<double>(24, 21, 3);
  std::vector<double> a(24), b(24), shifted = r, c(24), d(24);
  for (double& x : shifted) x += 17;
  rl::group_advantages(cpu{}, r, rl::groups{6}, rl::dr_grpo{}, a);
  rl::group_advantages(cpu{}, r, rl::groups{6}, rl::rloo{}, b);
  rl::group_advantages(cpu{}, r, rl::groups{6}, rl::grpo{}, c);
  rl::group_advantages(cpu{}, shifted, rl::groups{6}, rl::grpo{}, d);
  for (std::size_t i = 0; i < 24; ++i) {
    CHECK(std::fabs(b[i] - 1.2 * a[i]) < 1e-14);
    CHECK(std::fabs(c[i] - d[i]) < 1e-13);
  }
}

TEST_CASE("REINFORCE++ over ranks is that of the whole batch", "[rl][group]") {
  const std::vector<double> r = normal<double>(40, 22, 2);
  std::vector<double> want(40), have(40);
  rl::group_advantages(cpu{}, r, rl::groups{4}, rl::reinforce_pp{}, want);
  const auto half = [&](std::size_t rank) {
    return std::vector<double>(r.begin() + static_cast<std::ptrdiff_t>(20 * rank),
                               r.begin() + static_cast<std::ptrdiff_t>(20 * rank + 20));
  };
  std::vector<rl::moments> of_rank;
  const auto run = [&](std::size_t rank, const rl::merge_over_ranks& over) {
    std::vector<double> out(20);
    rl::group_advantages(cpu{}, half(rank), rl::groups{4}, rl::reinforce_pp{.over_ranks = over}, out);
    return out;
  };
  for (const std::size_t rank : {0, 1}) run(rank, [&](const rl::moments& m) { return of_rank.push_back(m), m; });
  for (const std::size_t rank : {0, 1}) {
    const std::vector<double> out = run(rank, [&](const rl::moments&) { return merge(of_rank[0], of_rank[1]); });
    for (std::size_t i = 0; i < 20; ++i) CHECK(std::fabs(out[i] - want[20 * rank + i]) < 1e-14);
  }
}

TEST_CASE("group advantages: the same bits for any number of threads, and strides", "[rl][group]") {
  const std::vector<float> r = normal<float>(120000, 23);
  std::vector<float> want;
  for (const int threads : {1, 2, 3, 8}) {
    std::vector<float> out(r.size());
    rl::group_advantages(cpu{.threads = threads}, r, rl::groups{8}, rl::grpo{}, out);
    if (threads == 1) want = out;
    CHECK(same_bits(out, want));
  }
  std::vector<float> apart(240000), out_apart(360000, 3);
  for (std::size_t i = 0; i < r.size(); ++i) apart[2 * i] = r[i];
  rl::group_advantages(cpu{}, mlkit::vector_view<const float>(apart.data(), {120000}, {2}), rl::groups{8}, rl::grpo{},
                       mlkit::vector_view<float>(out_apart.data(), {120000}, {3}));
  bool same = true;
  for (std::size_t i = 0; i < r.size(); ++i)
    same = same && out_apart[3 * i] == want[i] && out_apart[3 * i + 1] == 3 && out_apart[3 * i + 2] == 3;
  CHECK(same);
}

TEST_CASE("the best of n is the first of the largest, of each group", "[rl][group]") {
  const std::vector<double> r{1, 3, 2, 5, 5, -1, -2, -3, -2};
  std::vector<int> best(3);
  rl::best_of_n(cpu{}, r, rl::groups{3}, best);
  CHECK(best == std::vector<int>{1, 3, 6});
  const std::vector<std::int32_t> starts{0, 1, 9};
  std::vector<index_t> two(2);
  rl::best_of_n(cpu{}, r, rl::groups{starts}, two);
  CHECK(two == std::vector<index_t>{0, 3});
  CHECK(rl::best_of_n_kl(1) == 0);
  CHECK(std::fabs(rl::best_of_n_kl(4) - (std::log(4.0) - 0.75)) < 1e-15);
  // Over a policy of many equally likely completions, the best of 4 has density 4 u^3 in the rank u.
  double divergence = 0;
  for (int i = 0; i < 200000; ++i) {
    const double u = (i + 0.5) / 200000, density = 4 * u * u * u;
    divergence += density * std::log(density) / 200000;
  }
  CHECK(std::fabs(divergence - rl::best_of_n_kl(4)) < 1e-8);
}

TEST_CASE("bad input of groups is refused in words, and nothing is written", "[rl][group][errors]") {
  const std::string shape = "mlkit::shape_error: rl::group_advantages: ",
                    value = "mlkit::value_error: rl::group_advantages: ";
  std::vector<float> r{1, 2, 3, 4, 5, 6}, out(6, 9), short_out(5, 9);
  const auto with = [&](const rl::groups& of, auto method, std::vector<float>& to) {
    return said([&] { rl::group_advantages(cpu{}, r, of, method, to); });
  };
  CHECK(with(rl::groups{4}, rl::grpo{}, out) == shape + "rewards has 6 elements, which is no multiple of groups of 4");
  CHECK(with(rl::groups{0}, rl::grpo{}, out) == value + "groups of 0 elements");
  CHECK(with(rl::groups{3}, rl::grpo{}, short_out) == shape + "advantages has 5 elements, but rewards has 6");
  CHECK(with(rl::groups{3}, rl::grpo{.epsilon = -1}, out) == value + "epsilon = -1 is negative or not finite");
  CHECK(with(rl::groups{3}, rl::reinforce_pp{.epsilon = no_number}, out) ==
        value + "epsilon = nan is negative or not finite");
  const std::vector<std::int32_t> late{1, 6}, back{0, 4, 3, 6}, early{0, 3}, none;
  CHECK(with(rl::groups{late}, rl::rloo{}, out) == value + "offsets[0] = 1 is not 0");
  CHECK(with(rl::groups{back}, rl::rloo{}, out) == value + "offsets[2] = 3 is less than offsets[1] = 4");
  CHECK(with(rl::groups{early}, rl::rloo{}, out) == value + "offsets ends with 3, but rewards has 6 elements");
  CHECK(with(rl::groups{none}, rl::rloo{}, out) ==
        shape + "offsets is empty; it has one element more than there are sequences");
  CHECK(with(rl::groups{-1}, rl::rloo{}, out) == value + "groups of -1 elements");
  CHECK(with(rl::groups{-2}, rl::rloo{}, out) == value + "groups of -2 elements");
  r[4] = static_cast<float>(no_number);
  CHECK(with(rl::groups{3}, rl::dr_grpo{}, out) == value + "rewards[4] = nan is not finite");
  CHECK(with(rl::groups{3}, rl::reinforce_pp{}, out) == value + "rewards[4] = nan is not finite");
  r[1] = static_cast<float>(-inf);
  CHECK(with(rl::groups{3}, rl::grpo{}, out) == value + "rewards[1] = -inf is not finite");
  CHECK(said([&] {
          rl::group_advantages(cpu{}, mlkit::vector_view<const float>(r.data(), {4}), rl::groups{2}, rl::rloo{},
                               mlkit::vector_view<float>(r.data() + 2, {4}));
        }) == shape + "advantages [4] overlaps rewards [4]");
  CHECK(out == std::vector<float>(6, 9));

  const std::string best = "rl::best_of_n: ";
  std::vector<int> two(2, 9), three(3, 9);
  CHECK(said([&] { rl::best_of_n(cpu{}, r, rl::groups{3}, three); }) ==
        "mlkit::shape_error: " + best + "best has 3 elements, but the number of groups has 2");
  CHECK(said([&] { rl::best_of_n(cpu{}, r, rl::groups{3}, two); }) ==
        "mlkit::value_error: " + best + "rewards[1] = -inf is not finite");
  const std::vector<std::int32_t> empty{0, 6, 6};
  CHECK(said([&] { rl::best_of_n(cpu{}, r, rl::groups{empty}, two); }) ==
        "mlkit::value_error: " + best + "group 1 is empty");
  std::vector<std::int8_t> narrow(1, 9);
  const std::vector<float> many(200);
  CHECK(said([&] { rl::best_of_n(cpu{}, many, rl::groups{200}, narrow); }) ==
        "mlkit::value_error: " + best + "best cannot hold an index of 200 rewards");
  CHECK(said([] { rl::best_of_n_kl(0); }) == "mlkit::value_error: rl::best_of_n_kl: n = 0 is less than 1");
  CHECK(two == std::vector<int>(2, 9));
}
