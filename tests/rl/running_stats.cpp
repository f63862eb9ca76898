// Running statistics against two passes over all rows in f64.
#include "numbers.hpp"

#include <mlkit/rl/running_stats.hpp>

namespace rl = mlkit::rl;
using mlkit::cpu;
using namespace rl_test;

TEMPLATE_TEST_CASE("running statistics are those of all rows so far", "[rl][running_stats]", float, double) {
  const double tight = std::is_same_v<TestType, double> ? 1e-12 : 1e-5;
  for (const index_t columns : {1, 3, 8, 17, 70}) {
    const mlkit::tensor<TestType, 2> x = normal_matrix<TestType>(700, columns, 13, 2, 5);
    const std::vector<std::uint8_t> mask = bytes(700, 14, 0.6);
    rl::running_stats stats(columns);
    CHECK(stats.count() == 0);
    CHECK(stats.mean(columns - 1) == 0);
    CHECK(stats.variance(columns - 1) == 1);
    rl::running_stats other(columns);
    for (const auto& [from, to] : {std::pair{0, 300}, {300, 301}, {301, 301}, {301, 700}}) {
      // Rows as they lie, and columns that do not lie beside each other.
      mlkit::tensor<TestType, 2> turned({columns, to - from});
      mlkit::matrix_view<const TestType> part(x.data() + from * columns, {to - from, columns});
      if (from == 301)
        for (index_t i = 0; i < to - from; ++i)
          for (index_t c = 0; c < columns; ++c) turned(c, i) = part(i, c);
      const std::vector<std::uint8_t> kept(mask.begin() + from, mask.begin() + to);
      (from == 301 ? other : stats).update(cpu{}, from == 301 ? transposed(std::as_const(turned).view()) : part, kept);
    }
    stats.merge(other.state());
    rl::running_stats copy(columns);
    copy.restore(stats.state());
    copy.restore(copy.state());
    mlkit::tensor<TestType, 2> out({700, columns}), kept_mean({700, columns});
    copy.normalize(cpu{}, x, {.epsilon = 0.5, .clip = 1.5}, out);
    copy.normalize(cpu{}, x, {.epsilon = 0, .clip = inf, .center = false}, kept_mean);
    double worst = 0;
    for (index_t c = 0; c < columns; ++c) {
      std::vector<TestType> column;
      for (index_t i = 0; i < 700; ++i) column.push_back(x(i, c));
      const naive want(column, mask);
      CHECK(stats.count() == static_cast<index_t>(want.count));
      CHECK(std::fabs(stats.mean(c) - want.mean) < tight);
      CHECK(std::fabs(stats.variance(c) - want.m2 / want.count) < 4 * tight);
      for (index_t i = 0; i < 700; ++i) {
        const double v = static_cast<double>(x(i, c));
        const double z = std::clamp((v - want.mean) / std::sqrt(want.m2 / want.count + 0.5), -1.5, 1.5);
        worst = std::max(worst, std::fabs(static_cast<double>(out(i, c)) - z));
        worst = std::max(worst, std::fabs(static_cast<double>(kept_mean(i, c)) - v / std::sqrt(want.m2 / want.count)));
      }
    }
    CHECK(worst < 4 * tight);
  }
}

TEST_CASE("columns of the largest floats, and of one value with the least epsilons", "[rl][running_stats]") {
  for (const index_t columns : {1, 3, 19}) {
    mlkit::tensor<float, 2> x({4, columns}), out({4, columns});
    for (index_t i = 0; i < 4; ++i)
      for (index_t c = 0; c < columns; ++c) x(i, c) = i == 3 ? 3e38f : -3e38f;
    rl::running_stats stats(columns);
    stats.update(cpu{}, x);
    stats.normalize(cpu{}, x, {}, out);
    for (index_t i = 0; i < 4; ++i)
      for (index_t c = 0; c < columns; ++c) {
        const double want = i == 3 ? std::sqrt(3.0) : -1 / std::sqrt(3.0);
        CHECK(std::fabs(static_cast<double>(out(i, c)) - want) < 1e-6);
      }

    for (const double epsilon : {0.0, 1e-80, 1e-300}) {
      rl::running_stats equal(columns);
      std::fill_n(x.data(), x.size(), 2.5f);
      equal.update(cpu{}, x);
      equal.normalize(cpu{}, x, {.epsilon = epsilon}, out);
      INFO("epsilon " << epsilon);
      for (index_t i = 0; i < 4 * columns; ++i) CHECK(out.data()[i] == 0);
    }
  }
}

TEST_CASE("rewards are divided by the deviation of discounted returns, which end with episodes",
          "[rl][running_stats]") {
  constexpr index_t environments = 5, time = 40;
  const mlkit::tensor<double, 2> r = normal_matrix<double>(environments, time, 15, 3, 1);
  const std::vector<std::uint8_t> ended = bytes(environments * time, 16, 0.1);
  const mlkit::matrix_view<const std::uint8_t> done(ended.data(), {environments, time});
  rl::reward_scaling scaling(environments, 0.9), steps(environments, 0.9);
  scaling.update(cpu{}, r, done);
  std::vector<double> all, last;
  for (index_t b = 0; b < environments; ++b) {
    double now = 0;
    for (index_t t = 0; t < time; ++t) {
      now = 0.9 * now + r(b, t);
      all.push_back(now);
      if (done(b, t)) now = 0;
    }
    last.push_back(now);
  }
  const naive want(all);
  CHECK(std::fabs(scaling.stats().variance() - want.m2 / want.count) < 1e-12);
  for (index_t b = 0; b < environments; ++b)
    CHECK(std::fabs(scaling.returns()[static_cast<std::size_t>(b)] - last[static_cast<std::size_t>(b)]) < 1e-13);
  for (index_t t = 0; t < time; ++t)  // step by step, as a loop over environments has it
    steps.update(cpu{}, mlkit::matrix_view<const double>(r.data() + t, {environments, 1}, {time, 1}),
                 mlkit::matrix_view<const std::uint8_t>(ended.data() + t, {environments, 1}, {time, 1}));
  CHECK(std::fabs(steps.stats().variance() / scaling.stats().variance() - 1) < 1e-12);
  mlkit::tensor<double, 2> out({environments, time}), turned({time, environments});
  scaling.scale(cpu{}, r, {.clip = 2}, out);
  scaling.scale(cpu{}, r, {.clip = 2}, transposed(turned));
  double worst = 0;
  for (index_t b = 0; b < environments; ++b)
    for (index_t t = 0; t < time; ++t) {
      const double y = std::clamp(r(b, t) / std::sqrt(want.m2 / want.count + 1e-8), -2.0, 2.0);
      worst = std::max({worst, std::fabs(out(b, t) - y), std::fabs(turned(t, b) - y)});
    }
  CHECK(worst < 1e-12);
  rl::reward_scaling again(environments, 0.9);
  again.restore(scaling.stats().state(), scaling.returns());
  CHECK(again.stats().variance() == scaling.stats().variance());
}

TEST_CASE("bad input of running statistics is refused in words, and nothing is taken in",
          "[rl][running_stats][errors]") {
  const std::string update = "rl::running_stats::update: ", normalize = "rl::running_stats::normalize: ";
  CHECK(said([] { rl::running_stats{0}; }) == "mlkit::value_error: rl::running_stats: columns = 0 is less than 1");
  rl::running_stats stats(9);
  mlkit::tensor<float, 2> x({4, 9}), narrow({4, 8});
  stats.update(cpu{}, x);
  CHECK(said([&] { stats.update(cpu{}, narrow); }) ==
        "mlkit::shape_error: " + update + "x has 8 columns, but this has 9");
  CHECK(said([&] { stats.update(cpu{}, x, std::vector<std::uint8_t>(3)); }) ==
        "mlkit::shape_error: " + update + "mask has shape [3], but a column of x has [4]");
  x(2, 5) = static_cast<float>(no_number);
  CHECK(said([&] { stats.update(cpu{}, x); }) == "mlkit::value_error: " + update + "x[2, 5] = nan is not finite");
  CHECK(stats.count() == 4);
  stats.update(cpu{}, x, std::vector<std::uint8_t>{1, 1, 0, 1});
  CHECK(stats.count() == 7);
  CHECK(said([&] { stats.normalize(cpu{}, x, {.epsilon = -1}, x); }) ==
        "mlkit::value_error: " + normalize + "epsilon = -1 is negative or not finite");
  CHECK(said([&] { stats.normalize(cpu{}, x, {.clip = 0}, x); }) ==
        "mlkit::value_error: " + normalize + "clip = 0 is not positive");
  CHECK(said([&] { stats.normalize(cpu{}, x, {}, narrow); }) ==
        "mlkit::shape_error: " + normalize + "out has shape [4, 8], but x has [4, 9]");
  std::vector<rl::moments> state(stats.state().begin(), stats.state().end());
  state[3].count = 1;
  CHECK(said([&] { stats.restore(state); }) ==
        "mlkit::value_error: rl::running_stats::restore: state[3] has count 1, but state[0] has 7");
  state[3] = {7, 0, -1};
  CHECK(said([&] { stats.merge(state); }) ==
        "mlkit::value_error: rl::running_stats::merge: state[3] has count 7, mean 0, m2 -1");
  state.pop_back();
  CHECK(said([&] { stats.merge(state); }) ==
        "mlkit::shape_error: rl::running_stats::merge: state has 8 columns, but this has 9");
  const std::string scaling = "rl::reward_scaling";
  CHECK(said([] {
          rl::reward_scaling{2, 1.5};
        }) == "mlkit::value_error: " + scaling + ": gamma = 1.5 is outside [0, 1]");
  CHECK(said([] { rl::reward_scaling{0}; }) == "mlkit::value_error: " + scaling + ": environments = 0 is less than 1");
  rl::reward_scaling of(4);
  const std::vector<std::uint8_t> ended(36);
  CHECK(said([&] {
          of.update(cpu{}, x, mlkit::matrix_view<const std::uint8_t>(ended.data(), {4, 9}));
        }) == "mlkit::value_error: " + scaling + "::update: rewards[2, 5] = nan is not finite");
  CHECK(said([&] { of.update(cpu{}, x, {}); }) ==
        "mlkit::shape_error: " + scaling + "::update: ended has shape [0, 0], but rewards has [4, 9]");
  CHECK(of.stats().count() == 0);

  // Squares of differences from what was seen before, which f64 does not hold.
  rl::running_stats far, near;
  const std::vector<double> large{1e200}, small{0.0};
  far.update(cpu{}, mlkit::matrix_view<const double>(large.data(), {1, 1}));
  near.update(cpu{}, mlkit::matrix_view<const double>(small.data(), {1, 1}));
  const std::string above = ": the sum of squares of column 0 is above the largest f64";
  CHECK(said([&] {
          far.update(cpu{}, mlkit::matrix_view<const double>(small.data(), {1, 1}));
        }) == "mlkit::value_error: rl::running_stats::update" + above);
  CHECK(said([&] { far.merge(near.state()); }) == "mlkit::value_error: rl::running_stats::merge" + above);
  CHECK((far.count() == 1 && far.mean() == 1e200 && far.variance() == 0));
}

TEST_CASE("running statistics: the same bits for any number of threads", "[rl][running_stats]") {
  const mlkit::tensor<float, 2> rows = normal_matrix<float>(20011, 19, 11);
  const std::vector<std::uint8_t> mask = bytes(20011, 9, 0.7);
  std::vector<float> want;
  std::vector<rl::moments> want_state;
  for (const int threads : {1, 2, 3, 8}) {
    const cpu exec{.threads = threads};
    rl::running_stats stats(19);
    stats.update(exec, rows, mask);
    mlkit::tensor<float, 2> normalized({20011, 19});
    stats.normalize(exec, rows, {}, normalized);
    const std::vector<rl::moments> state(stats.state().begin(), stats.state().end());
    const std::vector<float> flat(normalized.begin(), normalized.end());
    if (threads == 1) want = flat, want_state = state;
    CHECK(same_bits(flat, want));
    CHECK(state == want_state);
  }
}
