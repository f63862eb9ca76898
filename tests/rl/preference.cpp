// Losses of pairs against their formulas in f64, TRL's values, and differences of the loss.
#include "preference.hpp"

#include <functional>

namespace rl = mlkit::rl;
using mlkit::cpu;
using namespace rl_test;

namespace {

// The batch that a loss takes, of any it may be.
template <class T>
struct batch {
  mlkit::vector<T> chosen, rejected, chosen_ref, rejected_ref, margin;

  // Sums of log-probabilities, or, scaled down to below 0, means.
  explicit batch(index_t n, double size, bool means = false)
      : chosen(normal_vector<T>(n, 31, size)),
        rejected(normal_vector<T>(n, 32, size)),
        chosen_ref(normal_vector<T>(n, 33, size)),
        rejected_ref(normal_vector<T>(n, 34, size)),
        margin(normal_vector<T>(n, 35)) {
    if (means)
      for (mlkit::vector<T>* v : {&chosen, &rejected})
        for (T& x : *v) x = -std::fabs(x) - static_cast<T>(1e-3);
  }
  rl::reward_pairs<T> view(const rl::reward_pairs<T>*) const { return {chosen, rejected, margin}; }
  rl::policy_pairs<T> view(const rl::policy_pairs<T>*) const { return {chosen, rejected}; }
  rl::reference_pairs<T> view(const rl::reference_pairs<T>*) const {
    return {chosen, rejected, chosen_ref, rejected_ref};
  }
  template <class Loss>
  auto of(const Loss&) const {
    return view(static_cast<const typename Loss::template inputs<T>*>(nullptr));
  }
};

double log_odds(double x) { return x - std::log(-std::expm1(x)); }

// The formulas.
double formula(const rl::bradley_terry& l, double c, double r, double, double, double m) {
  return -log_sigmoid(c - r - m) + l.centering * (c + r) * (c + r);
}
double formula(const rl::dpo& l, double c, double r, double cr, double rr, double) {
  const double z = l.beta * ((c - cr) - (r - rr));
  return -(1 - l.label_smoothing) * log_sigmoid(z) - l.label_smoothing * log_sigmoid(-z);
}
double formula(const rl::ipo& l, double c, double r, double cr, double rr, double) {
  return std::pow((c - cr) - (r - rr) - 1 / (2 * l.beta), 2);
}
double formula(const rl::simpo& l, double c, double r, double, double, double) {
  const double z = l.beta * (c - r) - l.gamma;
  return -(1 - l.label_smoothing) * log_sigmoid(z) - l.label_smoothing * log_sigmoid(-z);
}
double formula(const rl::orpo& l, double c, double r, double, double, double) {
  return -l.nll * c - l.beta * log_sigmoid(log_odds(c) - log_odds(r));
}
double chosen_reward(const rl::bradley_terry&, double c, double) { return c; }
double chosen_reward(const rl::dpo& l, double c, double cr) { return l.beta * (c - cr); }
double chosen_reward(const rl::ipo& l, double c, double cr) { return l.beta * (c - cr); }
double chosen_reward(const rl::simpo& l, double c, double) { return l.beta * c; }
double chosen_reward(const rl::orpo& l, double c, double) { return l.beta * c; }

// Calls f(loss) for each kind, with options that are not the defaults.
template <class F>
void each_loss(F&& f) {
  f(rl::bradley_terry{.centering = 0.02}, false);
  f(rl::dpo{.beta = 0.3, .label_smoothing = 0.1}, false);
  f(rl::ipo{.beta = 0.7}, false);
  f(rl::simpo{.beta = 1.5, .gamma = 0.4, .label_smoothing = 0.05}, true);
  f(rl::orpo{.beta = 0.4, .nll = 0.8}, true);
}

// A loss that a user could write.
struct hinge {
  template <mlkit::storage T>
  using inputs = rl::policy_pairs<T>;
  void check(std::string_view) const {}
  template <std::floating_point T>
  rl::pair_term<T> operator()(const rl::pair_point<T>& x) const noexcept {
    const T d = 1 - (x.chosen - x.rejected);
    return {std::max(d, T(0)), d > 0 ? T(-1) : T(0), d > 0 ? T(1) : T(0), x.chosen, x.rejected};
  }
};

}  // namespace

TEMPLATE_TEST_CASE("losses of pairs, gradients and statistics are their formulas", "[rl][preference]", float, double) {
  const double tight = std::is_same_v<TestType, double> ? 1e-13 : 2e-6;
  each_loss([&](const auto& loss, bool means) {
    for (const index_t n : {1, 2, 15, 16, 17, 64, 1000, 2100}) {
      const batch<TestType> b(n, means ? 0.7 : 4, means);
      mlkit::vector<TestType> dc({n}), dr({n}), each({n});
      const rl::preference_stats s = rl::preference_loss<TestType>(cpu{}, b.of(loss), loss, {.normaliser = 50},
                                                                   {.chosen = dc, .rejected = dr, .losses = each});
      double total = 0, right = 0, of_chosen = 0, of_rejected = 0, worst = 0;
      for (index_t i = 0; i < n; ++i) {
        const auto at = [&](const mlkit::vector<TestType>& v) { return static_cast<double>(v(i)); };
        const double c = at(b.chosen), r = at(b.rejected), cr = at(b.chosen_ref), rr = at(b.rejected_ref),
                     m = at(b.margin);
        const auto value = [&](double x, double y) { return formula(loss, x, y, cr, rr, m); };
        const double step = 1e-6 * std::max(1e-3, std::fabs(c)), step_r = 1e-6 * std::max(1e-3, std::fabs(r));
        const double by_c = (value(c + step, r) - value(c - step, r)) / (2 * step);
        const double by_r = (value(c, r + step_r) - value(c, r - step_r)) / (2 * step_r);
        const double want = value(c, r), size = 1 + std::fabs(want);
        total += want;
        worst = std::max(worst, std::fabs(at(each) - want) / size);
        CHECK(std::fabs(50 * at(dc) - by_c) < 4 * tight * size + 3e-7 * (1 + std::fabs(by_c)));
        CHECK(std::fabs(50 * at(dr) - by_r) < 4 * tight * size + 3e-7 * (1 + std::fabs(by_r)));
        of_chosen += chosen_reward(loss, c, cr);
        of_rejected += chosen_reward(loss, r, rr);
        right += chosen_reward(loss, c, cr) > chosen_reward(loss, r, rr);
      }
      INFO("n " << n);
      const double count = static_cast<double>(n);
      CHECK(worst < 4 * tight);
      CHECK(std::fabs(s.loss - total / 50) < 4 * tight * (1 + std::fabs(total)));
      CHECK(s.accuracy == Approx(right / count));
      CHECK(std::fabs(s.chosen_reward - of_chosen / count) < 10 * tight);
      CHECK(std::fabs(s.rejected_reward - of_rejected / count) < 10 * tight);
      CHECK(std::fabs(s.margin() - (of_chosen - of_rejected) / count) < 20 * tight);
      CHECK(s.pairs == n);
    }
  });
}

TEST_CASE("gradients are differences of the loss itself, in f64", "[rl][preference]") {
  each_loss([](const auto& loss, bool means) {
    batch<double> b(19, means ? 1.5 : 6, means);
    mlkit::vector<double> dc({19}), dr({19});
    rl::preference_loss<double>(cpu{}, b.of(loss), loss, {.chosen = dc, .rejected = dr});
    for (index_t i = 0; i < 19; ++i)
      for (const bool of_chosen : {true, false}) {
        double& x = of_chosen ? b.chosen(i) : b.rejected(i);
        const double at = x, step = 1e-6 * std::max(0.01, std::fabs(at));
        x = at + step;
        const double above = rl::preference_loss<double>(cpu{}, b.of(loss), loss).loss;
        x = at - step;
        const double below = rl::preference_loss<double>(cpu{}, b.of(loss), loss).loss;
        x = at;
        const double want = (above - below) / (2 * step), have = of_chosen ? dc(i) : dr(i);
        CHECK(std::fabs(have - want) < 1e-7 * (1 + std::fabs(want)));
      }
  });
}

TEMPLATE_TEST_CASE("losses and gradients are TRL's", "[rl][preference]", float, double) {
  const double tight = std::is_same_v<TestType, double> ? 1e-13 : 2e-5;
  const auto v = stored_as<TestType>;
  const auto check = [&](const std::string& name, const auto& loss, const auto& in) {
    const index_t n = in.chosen.extent(0);
    mlkit::vector<TestType> dc({n}), dr({n}), each({n});
    const auto s = rl::preference_loss<TestType>(cpu{}, in, loss, {.chosen = dc, .rejected = dr, .losses = each});
    double total = 0;
    for (index_t i = 0; i < n; ++i) {
      const auto k = static_cast<std::size_t>(i);
      const double want = stored(name + ".losses")[k];
      total += want / static_cast<double>(n);
      INFO(name << " " << i);
      CHECK(std::fabs(static_cast<double>(each(i)) - want) < tight * (1 + want));
      CHECK(std::fabs(static_cast<double>(dc(i)) - stored(name + ".d_chosen")[k]) < tight);
      CHECK(std::fabs(static_cast<double>(dr(i)) - stored(name + ".d_rejected")[k]) < tight);
    }
    CHECK(std::fabs(s.loss - total) < tight * (1 + total));
  };
  const auto c = v("chosen"), r = v("rejected"), cr = v("chosen_ref"), rr = v("rejected_ref"), cm = v("chosen_mean"),
             rm = v("rejected_mean"), rc = v("rewards_c"), rj = v("rewards_r"), m = v("margin");
  check("bradley_terry", rl::bradley_terry{}, rl::reward_pairs<TestType>{rc, rj});
  check("bradley_terry.margin", rl::bradley_terry{.centering = 0.02}, rl::reward_pairs<TestType>{rc, rj, m});
  const rl::reference_pairs<TestType> with_reference{c, r, cr, rr};
  check("dpo", rl::dpo{.beta = 0.3}, with_reference);
  check("dpo.smoothed", rl::dpo{.beta = 0.3, .label_smoothing = 0.15}, with_reference);
  check("ipo", rl::ipo{.beta = 0.3}, with_reference);
  const rl::policy_pairs<TestType> of_means{cm, rm};
  check("simpo", rl::simpo{.beta = 2, .gamma = 0.7}, of_means);
  check("simpo.smoothed", rl::simpo{.beta = 2, .gamma = 0.7, .label_smoothing = 0.1}, of_means);
  check("orpo", rl::orpo{.beta = 0.25}, of_means);
}

TEMPLATE_TEST_CASE("extreme differences, equal rewards and certain completions stay finite", "[rl][preference]", float,
                   double) {
  using T = TestType;
  mlkit::vector<T> c({4}), r({4}), zero({4}), dc({4}), dr({4}), each({4});
  c(0) = 1e4, r(0) = -1e4, c(1) = -1e4, r(1) = 1e4;
  const rl::pair_gradients<T> out{.chosen = dc, .rejected = dr, .losses = each};
  rl::preference_stats s = rl::preference_loss<T>(cpu{}, {.chosen = c, .rejected = r}, rl::bradley_terry{}, out);
  CHECK(each(0) == 0);
  CHECK(each(1) == T(2e4));
  CHECK(std::fabs(each(2) - T(0.6931471805599453)) < T(1e-7));
  CHECK(dc(0) == 0);
  CHECK(dc(1) == T(-0.25));
  CHECK(dr(1) == T(0.25));
  CHECK(dc(2) == T(-0.125));
  CHECK(s.accuracy == 0.25);                     // equal rewards are not right
  const T most = std::numeric_limits<T>::max();  // the sum of two is above it
  c(3) = r(3) = most;
  rl::preference_loss<T>(cpu{}, {.chosen = c, .rejected = r}, rl::bradley_terry{}, out);
  CHECK(std::fabs(each(3) - T(0.6931471805599453)) < T(1e-7));
  CHECK(dc(3) == T(-0.125));
  CHECK(dr(3) == T(0.125));
  c(3) = r(3) = 0;
  s = rl::preference_loss<T>(cpu{}, {.chosen = c, .rejected = r, .reference_chosen = zero, .reference_rejected = zero},
                             rl::dpo{.beta = 1, .label_smoothing = 0.1}, out);
  CHECK(std::fabs(each(0) - T(2e3)) < T(1e-3));
  CHECK(std::fabs(each(1) - T(1.8e4)) < T(1e-2));
  CHECK(std::fabs(dc(0) - T(0.1) / 4) < T(1e-7));
  CHECK(std::fabs(dc(1) + T(0.9) / 4) < T(1e-7));

  // ORPO: certainty (0, and what rounding leaves above it), and log-probabilities far below.
  c(0) = 0, r(0) = -1, c(1) = -1, r(1) = 0, c(2) = T(1e-9), r(2) = 0, c(3) = -1e4, r(3) = T(-1e-9);
  s = rl::preference_loss<T>(cpu{}, {.chosen = c, .rejected = r}, rl::orpo{.beta = 1}, out);
  for (index_t i = 0; i < 4; ++i) {
    INFO(i << ": " << each(i) << " " << dc(i) << " " << dr(i));
    CHECK(std::isfinite(each(i)));
    CHECK(std::isfinite(dc(i)));
    CHECK(std::isfinite(dr(i)));
    CHECK(dc(i) < 0);
    CHECK(dr(i) >= 0);
  }
  CHECK(std::isfinite(s.loss));
  // As c -> 0 the derivative of the odds' part goes to -odds(r): that of e^-1 is 0.582.
  CHECK(std::fabs(4 * dc(0) + 1 + T(0.5819767068693265)) < T(1e-5));
}

TEST_CASE("what losses are made of takes the limits at infinities", "[rl][preference]") {
  using rl::detail::log_sigmoid;
  CHECK(log_sigmoid<double>(inf).value == 0);
  CHECK(log_sigmoid<double>(inf).derivative == 0);
  CHECK(log_sigmoid<float>(static_cast<float>(-inf)).value == static_cast<float>(-inf));
  CHECK(log_sigmoid<double>(-inf).derivative == 1);
  CHECK(std::isnan(log_sigmoid<double>(no_number).value));
  CHECK(rl::detail::log1mexp<double>(-inf).value == 0);
  CHECK(rl::detail::exp_of(-inf) == 0);
  CHECK(rl::detail::exp_of(inf) == inf);
  CHECK(std::isnan(rl::detail::exp_of(no_number)));
  const auto orpo = rl::orpo{.beta = 1}(rl::pair_point<double>{-1, -inf, 0, 0, 0});
  CHECK(orpo.loss == 1);
  CHECK(orpo.d_rejected == 0);
}

TEST_CASE("pairs: braces, nothing, strides, and a loss of the user's own", "[rl][preference]") {
  mlkit::vector<float> none({0}), c = normal_vector<float>(40, 36), r = normal_vector<float>(40, 37), dc({40}),
                                  dr({40});
  const rl::preference_stats empty = rl::preference_loss(cpu{}, {.chosen = none, .rejected = none}, rl::simpo{});
  CHECK(empty.loss == 0);
  CHECK(empty.accuracy == 0);
  CHECK(empty.pairs == 0);
  rl::preference_loss(cpu{}, {.chosen = c, .rejected = r}, rl::simpo{}, {.chosen = dc, .rejected = dr});

  std::vector<float> ones(3, 1), twos(3, 2), d(3);  // containers too
  CHECK(rl::preference_loss(cpu{}, {.chosen = twos, .rejected = ones}, rl::bradley_terry{}, {.chosen = d}).accuracy ==
        1);
  CHECK(d[2] < 0);

  // Columns of one matrix, [n, 2].
  mlkit::matrix<float> both({40, 2}), gradients({40, 2});
  for (index_t i = 0; i < 40; ++i) both(i, 0) = c(i), both(i, 1) = r(i);
  const auto column = [](auto* data) {
    return mlkit::vector_view<std::remove_pointer_t<decltype(data)>>(data, {40}, {2});
  };
  const rl::preference_stats s =
      rl::preference_loss(cpu{}, {.chosen = column(both.data()), .rejected = column(both.data() + 1)}, rl::simpo{},
                          {.chosen = column(gradients.data()), .rejected = column(gradients.data() + 1)});
  bool same = s.pairs == 40;
  for (index_t i = 0; i < 40; ++i) same = same && gradients(i, 0) == dc(i) && gradients(i, 1) == dr(i);
  CHECK(same);

  const rl::preference_stats h = rl::preference_loss(cpu{}, {.chosen = c, .rejected = r}, hinge{}, {.chosen = dc});
  double total = 0;
  for (index_t i = 0; i < 40; ++i) {
    const double d = 1 - (static_cast<double>(c(i)) - static_cast<double>(r(i)));
    total += std::max(d, 0.0) / 40;
    CHECK(dc(i) == (d > 0 ? -1 / 40.0f : 0.0f));
  }
  CHECK(std::fabs(h.loss - total) < 1e-6);
}

TEST_CASE("pairs: the same bits for any number of threads", "[rl][preference]") {
  const batch<float> b(200003, 3);
  const rl::dpo loss{};
  std::vector<float> want;
  double want_loss = 0;
  for (const int threads : {1, 2, 3, 8}) {
    mlkit::vector<float> dc({200003});
    const auto s = rl::preference_loss(cpu{.threads = threads}, b.of(loss), loss, {.chosen = dc});
    const std::vector<float> flat(dc.begin(), dc.end());
    if (threads == 1) want = flat, want_loss = s.loss;
    CHECK(same_bits(flat, want));
    CHECK(s.loss == want_loss);
  }
}

TEST_CASE("bad input of pairs is refused in words, and nothing is written", "[rl][preference][errors]") {
  const std::string shape = "mlkit::shape_error: rl::preference_loss: ",
                    value = "mlkit::value_error: rl::preference_loss: ";
  mlkit::vector<float> c({3}), r({3}), four({4}), out({3}), d({3});
  for (index_t i = 0; i < 3; ++i) out(i) = 9, c(i) = r(i) = -1;
  const cpu exec;
  const auto dpo = [&](const rl::reference_pairs<float>& in, const rl::dpo& loss) {
    return said([&] { rl::preference_loss(exec, in, loss, {.chosen = out}); });
  };
  CHECK(dpo({c, four, c, r}, {}) == shape + "rejected has 4 elements, but chosen has 3");
  CHECK(dpo({.chosen = c, .rejected = r, .reference_rejected = r}, {}) ==
        shape + "reference_chosen has 0 elements, but chosen has 3");
  CHECK(dpo({c, r, c, r}, {.beta = 0}) == value + "beta = 0 is not positive");
  CHECK(dpo({c, r, c, r}, {.beta = inf}) == value + "beta = inf is not positive");
  CHECK(dpo({c, r, c, r}, {.label_smoothing = 0.5}) == value + "label_smoothing = 0.5 is outside [0, 0.5)");
  CHECK(said([&] {
          rl::preference_loss(exec, {c, r}, rl::bradley_terry{.centering = -1}, {.chosen = out});
        }) == value + "centering = -1 is negative or not finite");
  CHECK(said([&] {
          rl::preference_loss(exec, {c, r, four}, rl::bradley_terry{}, {.chosen = out});
        }) == shape + "margins has 4 elements, but chosen has 3");
  CHECK(said([&] {
          rl::preference_loss(exec, {c, r}, rl::simpo{.gamma = inf}, {.chosen = out});
        }) == value + "gamma = inf is not finite");
  CHECK(said([&] {
          rl::preference_loss(exec, {c, r}, rl::orpo{.nll = -1}, {.chosen = out});
        }) == value + "nll = -1 is negative or not finite");
  CHECK(said([&] {
          rl::preference_loss(exec, {c, r}, rl::simpo{}, {.normaliser = -1}, {.chosen = out});
        }) == value + "normaliser = -1 is negative or not finite");
  CHECK(said([&] {
          rl::preference_loss(exec, {c, r}, rl::simpo{}, {.chosen = four});
        }) == shape + "gradients.chosen has 4 elements, but chosen has 3");
  CHECK(said([&] {
          rl::preference_loss(exec, {c, r}, rl::simpo{}, {.chosen = out, .rejected = out});
        }) == shape + "gradients.rejected [3] overlaps gradients.chosen [3]");
  CHECK(said([&] {
          rl::preference_loss(exec, {c, r}, rl::simpo{}, {.losses = r});
        }) == shape + "losses [3] overlaps rejected [3]");
  r(2) = static_cast<float>(-inf);
  CHECK(said([&] {
          rl::preference_loss(exec, {c, r}, rl::simpo{}, {.chosen = out});
        }) == value + "rejected[2] = -inf is not finite");
  CHECK(dpo({c, c, c, r}, {}) == value + "reference_rejected[2] = -inf is not finite");
  c(0) = static_cast<float>(no_number);
  CHECK(dpo({c, r, c, r}, {}) == value + "chosen[0] = nan is not finite");
  for (index_t i = 0; i < 3; ++i) CHECK(out(i) == 9);
}
