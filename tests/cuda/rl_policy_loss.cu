// Policy and value losses, on the device and on the CPU, against loops of doubles.
#include <executor.hpp>

#include "../rl/policy_loss.hpp"

#if defined(MLKIT_TEST_ON_CPU)
#include <mlkit/rl.hpp>
#else
#include <mlkit/rl.cuh>
#endif

using namespace policy_tests;

namespace {

std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

enum class layout { rows, columns, gaps };

// Operands in the executor's memory.
template <class T>
class placed_sample {
 public:
  placed_sample(const sample& s, layout how) : s_(s), how_(how) {
    for (const auto* x : {&s.logp, &s.old_logp, &s.advantages, &s.entropies, &s.values, &s.old_values, &s.returns})
      inputs_.push_back(test::on_device(exec, spread(*x, T(0))));
    for (int i = 0; i < 3; ++i)
      outputs_.push_back(test::on_device(exec, spread(std::vector<double>(s.size(), 77), T(77))));
    mask_ = test::on_device(exec, spread(s.mask, std::uint8_t{0}));
    if (!s.starts.empty()) starts_ = test::on_device(exec, s.starts);
  }
  rl::policy_batch<T> batch(bool masked) {
    rl::policy_batch<T> b{.log_probs = in(0),
                          .old_log_probs = in(1),
                          .advantages = in(2),
                          .entropies = in(3),
                          .values = in(4),
                          .old_values = in(5),
                          .returns = in(6)};
    if (masked) b.mask = view(mask_);
    if (!s_.starts.empty()) b.cu_seqlens = mlkit::tensor_view<const std::int32_t, 1>(starts_.view());
    return b;
  }
  rl::policy_gradients<T> gradients() {
    return {.log_probs = view(outputs_[0]), .values = view(outputs_[1]), .entropies = view(outputs_[2])};
  }
  std::vector<double> output(std::size_t k) {
    const auto all = test::to_host(exec, outputs_[k]);
    std::vector<double> x;
    for (std::size_t i = 0; i < s_.size(); ++i) x.push_back(static_cast<double>(all(static_cast<index_t>(place(i)))));
    return x;
  }
  const test::executor exec = test::exec();

 private:
  std::size_t place(std::size_t i) const {
    const auto time = at(s_.time), b = i / time, t = i % time;
    return how_ == layout::rows ? i : how_ == layout::columns ? t * at(s_.batch) + b : 3 + b * (2 * time + 1) + 2 * t;
  }
  template <class From, class To>
  std::vector<To> spread(const std::vector<From>& x, To fill) const {
    std::vector<To> y(how_ == layout::gaps ? 3 + at(s_.batch) * (2 * at(s_.time) + 1) : x.size(), fill);
    for (std::size_t i = 0; i < x.size(); ++i) y[place(i)] = static_cast<To>(x[i]);
    return y;
  }
  template <class U>
  mlkit::tensor_view<U, 2> view(test::operand<U, 1>& x) const {
    const index_t time = s_.time;
    U* const data = x.view().data + (how_ == layout::gaps ? 3 : 0);
    return {data,
            {s_.batch, time},
            {how_ == layout::rows      ? time
             : how_ == layout::columns ? 1
                                       : 2 * time + 1,
             how_ == layout::rows      ? 1
             : how_ == layout::columns ? s_.batch
                                       : 2}};
  }
  mlkit::tensor_view<const T, 2> in(std::size_t k) { return view(inputs_[k]); }

  sample s_;
  layout how_;
  std::vector<test::operand<T, 1>> inputs_, outputs_;
  test::operand<std::uint8_t, 1> mask_;
  test::operand<std::int32_t, 1> starts_;
};

struct statistics {
  double n = 0, k1 = 0, k3 = 0, low = INFINITY, high = 0, error = 0, square_error = 0, target = 0, square_target = 0;
};

template <class T>
sample rounded(sample s) {
  for (auto* x : {&s.logp, &s.old_logp, &s.advantages, &s.entropies, &s.values, &s.old_values, &s.returns})
    for (double& v : *x) v = static_cast<double>(static_cast<T>(v));
  return s;
}

template <class T, class Policy, class Aggregation>
void check(const sample& given, layout how, const Policy& policy, const naive_term& term, bool of_sequence,
           const Aggregation& aggregate, const naive_weight& weight) {
  INFO("[" << given.batch << ", " << given.time << "] " << mlkit::dtype_name<T>() << ", layout "
           << static_cast<int>(how) << (given.starts.empty() ? "" : ", packed"));
  const sample s = rounded<T>(given);
  const bool masked = std::count(s.mask.begin(), s.mask.end(), 1) != static_cast<std::ptrdiff_t>(s.size());
  placed_sample<T> placed(s, how);
  constexpr double value = 0.7, entropy = 0.3, value_clip = 0.25;
  const rl::policy_stats stats =
      rl::policy_loss<T>(placed.exec, placed.batch(masked), policy, aggregate,
                         {.value_clip = value_clip, .value = value, .entropy = entropy}, placed.gradients());
  const naive_loss want = naive(s, term, of_sequence, weight, value_clip, s.logp);
  const double close = sizeof(T) == 8 ? 1e-11 : 1e-5;
  CHECK(stats.policy_loss == Approx(want.policy).epsilon(close).margin(close));
  CHECK(stats.value_loss == Approx(want.value).epsilon(close));
  CHECK(stats.entropy == Approx(want.entropy).epsilon(close));
  CHECK(stats.loss == Approx(want.policy + value * want.value - entropy * want.entropy).epsilon(close).margin(close));
  statistics x;
  index_t sequences = 0;
  for (const auto& q : s.sequences()) {
    sequences += !q.empty();
    double mean = 0;
    for (const std::size_t i : q) mean += (s.logp[i] - s.old_logp[i]) / static_cast<double>(q.size());
    for (const std::size_t i : q) {
      const double d = s.logp[i] - s.old_logp[i], ratio = std::exp(of_sequence ? mean : d),
                   e = s.returns[i] - s.values[i];
      x.n += 1, x.k1 -= d, x.k3 += std::expm1(d) - d, x.low = std::min(x.low, ratio), x.high = std::max(x.high, ratio);
      x.error += e, x.square_error += e * e, x.target += s.returns[i], x.square_target += s.returns[i] * s.returns[i];
    }
  }
  CHECK(static_cast<double>(stats.tokens) == x.n);
  CHECK(stats.sequences == sequences);
  CHECK(stats.kl_k1 == Approx(x.k1 / x.n).epsilon(close).margin(close));
  CHECK(stats.kl_k3 == Approx(x.k3 / x.n).epsilon(close));
  CHECK(stats.ratio_min == Approx(x.low).epsilon(close));
  CHECK(stats.ratio_max == Approx(x.high).epsilon(close));
  const double residual = x.square_error - x.error * x.error / x.n,
               spread = x.square_target - x.target * x.target / x.n;
  CHECK(stats.explained_variance == Approx(1 - residual / spread).epsilon(10 * close).margin(10 * close));

  // The loss is a sum over tokens but where ratios are of sequences: those are few.
  const std::vector<double> dlogp = placed.output(0), dvalues = placed.output(1), dentropies = placed.output(2);
  const double unit = sizeof(T) == 8 ? 1e-8 : sizeof(T) == 4 ? 2e-5 : 0x1p-7;
  double all = 0, used = 0;
  for (const auto& q : s.sequences()) all += static_cast<double>(q.size()), used += !q.empty();
  bool good = true;
  for (std::size_t i = 0; i < s.size(); ++i)
    if (!s.mask[i]) good = good && dlogp[i] == 0 && dvalues[i] == 0 && dentropies[i] == 0;
  for (const auto& q : s.sequences())
    for (const std::size_t i : q) {
      const double w = weight(static_cast<double>(q.size()), all, used), h = 1e-6;
      const auto policy_at = [&](double logp) {
        if (of_sequence) {
          sample moved = s;
          moved.logp[i] = logp;
          return naive(moved, term, true, weight, value_clip, s.logp).policy;
        }
        return w * term(std::exp(logp - s.old_logp[i]), std::exp(s.logp[i] - s.old_logp[i]), s.advantages[i], logp);
      };
      const auto value_at = [&](double v) {
        const double r = s.returns[i], held = s.old_values[i] + clip(v - s.old_values[i], -value_clip, value_clip);
        return w * value * 0.5 * std::max((v - r) * (v - r), (held - r) * (held - r));
      };
      const double slope = (policy_at(s.logp[i] + h) - policy_at(s.logp[i] - h)) / (2 * h),
                   value_slope = (value_at(s.values[i] + h) - value_at(s.values[i] - h)) / (2 * h);
      // At a corner either side is right.
      const auto at_corner = [](const auto& f, double x) {
        const double left = (f(x) - f(x - 1e-4)) / 1e-4, right = (f(x + 1e-4) - f(x)) / 1e-4;
        return std::fabs(left - right) > 1e-2 * (std::fabs(left) + std::fabs(right));
      };
      const bool corner = at_corner(policy_at, s.logp[i]);
      const bool fits = std::fabs(dlogp[i] - slope) <= unit * std::max(std::fabs(slope), w);
      const bool value_fits = std::fabs(dvalues[i] - value_slope) <= unit * std::max(std::fabs(value_slope), w) ||
                              at_corner(value_at, s.values[i]);
      if (!(fits || corner)) CHECK(dlogp[i] == Approx(slope));
      if (!value_fits) CHECK(dvalues[i] == Approx(value_slope));
      good = good && (fits || corner) && value_fits;
      good = good && std::fabs(dentropies[i] + entropy * w) <= unit * w;
    }
  CHECK(good);
}

double clipped_loss(double r, double a, double low, double high) { return std::max(-a * r, -a * clip(r, low, high)); }

const naive_term of_ppo = [](double r, double, double a, double) { return clipped_loss(r, a, 0.8, 1.2); };
const naive_term of_dual = [](double r, double, double a, double) {
  const double l = clipped_loss(r, a, 0.8, 1.3);
  return a < 0 ? std::min(l, -1.1 * a) : l;
};
const naive_term of_gspo = [](double r, double, double a, double) { return clipped_loss(r, a, 0.9, 1.1); };
const naive_term of_cispo = [](double, double constant, double a, double logp) {
  return -a * clip(constant, 0, 1.2) * logp;
};
const naive_term of_gradient = [](double, double, double a, double logp) { return -a * logp; };
const naive_weight by_tokens = [](double, double all, double) { return 1 / all; };
const naive_weight by_means = [](double n, double, double sequences) { return 1 / (n * sequences); };
const naive_weight by_sums = [](double, double, double sequences) { return 1 / sequences; };

sample packed() {
  sample s = make_sample(1, 60, 0.7);
  s.starts = {0, 7, 7, 30, 31, 60};
  return s;
}
sample with_an_empty_sequence() {
  sample s = make_sample(5, 33);
  for (std::size_t i = 0; i < 33; ++i) {
    s.mask[i] = 0;
    s.logp[i] = s.advantages[i] = s.values[i] = s.entropies[i] = s.returns[i] = not_a_number;
  }
  return s;
}

}  // namespace

TEST_CASE("cuda: PPO's loss", "[cuda][rl]") {
  const rl::ppo_clip ppo;
  for (const layout l : {layout::rows, layout::columns, layout::gaps}) {
    check<float>(make_sample(37, 129), l, ppo, of_ppo, false, rl::token_mean{}, by_tokens);
    check<float>(make_sample(4, 6, 1), l, ppo, of_ppo, false, rl::sequence_mean_of_sums{}, by_sums);
    check<float>(with_an_empty_sequence(), l, ppo, of_ppo, false, rl::sequence_mean_of_means{}, by_means);
  }
  check<float>(packed(), layout::rows, ppo, of_ppo, false, rl::sequence_mean_of_means{}, by_means);
  check<double>(make_sample(7, 40), layout::rows, ppo, of_ppo, false, rl::token_mean{}, by_tokens);
  check<mlkit::bf16>(make_sample(9, 70, 1), layout::rows, ppo, of_ppo, false, rl::token_mean{}, by_tokens);
  check<mlkit::f16>(make_sample(9, 70), layout::columns, ppo, of_ppo, false, rl::token_mean{}, by_tokens);
}

TEST_CASE("cuda: other terms of a policy loss", "[cuda][rl]") {
  const rl::dual_clip<rl::ppo_clip> dual{.bound = 1.1, .term = {.low = 0.2, .high = 0.3}};
  check<double>(make_sample(5, 30), layout::rows, dual, of_dual, false, rl::token_mean{}, by_tokens);
  check<double>(make_sample(5, 30), layout::rows, rl::cispo{}, of_cispo, false, rl::sum_over{40},
                [](double, double, double) { return 1 / 40.0; });
  check<double>(make_sample(5, 30), layout::rows, rl::policy_gradient{}, of_gradient, false, rl::token_mean{},
                by_tokens);
  const rl::gspo gspo{.low = 0.1, .high = 0.1};
  check<double>(make_sample(6, 20), layout::columns, gspo, of_gspo, true, rl::sequence_mean_of_means{}, by_means);
  check<double>(packed(), layout::rows, gspo, of_gspo, true, rl::token_mean{}, by_tokens);
}

TEST_CASE("cuda: a loss of no token that counts, and of none", "[cuda][rl]") {
  sample s = make_sample(3, 5, 0);
  placed_sample<float> placed(s, layout::rows);
  const rl::policy_stats stats = rl::ppo_loss<float>(placed.exec, placed.batch(true), {}, placed.gradients());
  CHECK(stats.loss == 0);
  CHECK(stats.tokens == 0);
  CHECK(stats.ratio_min == 1);
  CHECK(std::isnan(stats.explained_variance));
  CHECK(placed.output(0) == std::vector<double>(15, 0.0));
  const rl::policy_stats none = rl::ppo_loss<float>(placed.exec, rl::policy_batch<float>{}, {}, {});
  CHECK(none.tokens == 0);
}

TEST_CASE("cuda: the loss of values alone", "[cuda][rl]") {
  const sample s = rounded<float>(make_sample(37, 129));
  placed_sample<float> placed(s, layout::columns);
  const auto batch = placed.batch(true);
  const rl::value_batch<float> values{
      .values = batch.values, .old_values = batch.old_values, .returns = batch.returns, .mask = batch.mask};
  const rl::value_stats stats = rl::value_loss<float>(placed.exec, values, {.clip = 0.25}, placed.gradients().values);
  const naive_loss want = naive(s, of_ppo, false, by_tokens, 0.25, s.logp);
  CHECK(stats.loss == Approx(want.value).epsilon(1e-5));
  CHECK(stats.sequences == 37);
  CHECK(stats.clip_fraction > 0);
  CHECK(stats.explained_variance < 1);
}

TEST_CASE("cuda: policy losses give the same bits again, and refuse what does not fit before they write",
          "[cuda][rl]") {
  const sample s = make_sample(37, 129);
  placed_sample<float> one(s, layout::rows), two(s, layout::rows);
  const rl::policy_stats a = rl::ppo_loss<float>(one.exec, one.batch(true), {}, one.gradients());
  const rl::policy_stats b = rl::ppo_loss<float>(two.exec, two.batch(true), {}, two.gradients());
  CHECK((a.loss == b.loss && a.kl_k3 == b.kl_k3 && a.explained_variance == b.explained_variance));
  CHECK(one.output(0) == two.output(0));
  CHECK(one.output(1) == two.output(1));

  placed_sample<float> placed(make_sample(3, 5), layout::rows), other(make_sample(3, 6), layout::rows);
  const auto with = [&](auto&& change) {
    auto batch = placed.batch(false);
    change(batch);
    return batch;
  };
  const std::string shape = "mlkit::shape_error: rl::ppo_loss: ";
  CHECK_THROWS_WITH(
      rl::ppo_loss<float>(placed.exec, with([&](auto& x) { x.advantages = other.batch(false).advantages; }), {},
                          placed.gradients()),
      shape + "advantages has shape [3, 6], but log_probs has [3, 5]");
  CHECK_THROWS_WITH(rl::ppo_loss<float>(placed.exec, placed.batch(false), {}, other.gradients()),
                    shape + "the gradient of log_probs has shape [3, 6], but log_probs has [3, 5]");
  CHECK_THROWS_WITH(rl::ppo_loss<float>(placed.exec, placed.batch(false), {.clip = -0.1}, placed.gradients()),
                    "mlkit::value_error: rl::ppo_loss: clip = -0.1 is outside [0, 1]");
  CHECK(placed.output(0) == std::vector<double>(15, 77.0));
}
