// KL divergences, preference losses and group advantages, on the device and on the CPU, against loops of doubles.
#include <executor.hpp>
#include <mlkit/core/random.hpp>
#include <span>

#if defined(MLKIT_TEST_ON_CPU)
#include <mlkit/rl.hpp>
#else
#include <mlkit/rl.cuh>
#endif

namespace rl = mlkit::rl;
using mlkit::index_t;

namespace {

std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

template <class T>
std::vector<T> numbers(index_t n, double mean, double scale, std::uint64_t stream) {
  const mlkit::random_stream random{9, stream};
  std::vector<T> x;
  for (index_t i = 0; i < n; ++i)
    x.push_back(static_cast<T>(mean + scale * random.normal(static_cast<std::uint64_t>(i))));
  return x;
}

template <class T>
inline constexpr double unit = sizeof(T) == 8 ? 1e-12 : 4e-6;

template <class T>
bool fits(const mlkit::tensor<T, 1>& have, const std::vector<double>& want, double times = 1) {
  for (std::size_t i = 0; i < want.size(); ++i)
    if (!(std::fabs(static_cast<double>(have(static_cast<index_t>(i))) - want[i]) <=
          times * unit<T> * std::max(1.0, std::fabs(want[i]))))
      return false;
  return true;
}

double log_sigmoid(double x) { return x < 0 ? x - std::log1p(std::exp(x)) : -std::log1p(std::exp(-x)); }
double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// [batch, time] in rows, or packed by starts, with NaN behind the mask.
struct tokens {
  index_t batch, time;
  std::vector<float> logp, reference;
  std::vector<std::uint8_t> mask;
  std::vector<std::int32_t> starts;
  std::vector<std::pair<index_t, index_t>> sequences() const {
    std::vector<std::pair<index_t, index_t>> s;
    for (index_t b = 0; b < (starts.empty() ? batch : static_cast<index_t>(starts.size()) - 1); ++b)
      s.push_back(starts.empty() ? std::pair{b * time, (b + 1) * time}
                                 : std::pair<index_t, index_t>{starts[at(b)], starts[at(b + 1)]});
    return s;
  }
};
tokens make_tokens(index_t batch, index_t time, bool masked) {
  tokens t{batch, time, numbers<float>(batch * time, -2, 0.5, 1), {}, std::vector<std::uint8_t>(at(batch * time), 1),
           {}};
  const auto d = numbers<float>(batch * time, 0, 0.3, 2);
  for (index_t i = 0; i < batch * time; ++i) {
    t.reference.push_back(t.logp[at(i)] + d[at(i)]);
    if (masked && (i % 4 == 1 || i % time > 2 * time / 3 || (batch > 2 && i / time == 1)))
      t.mask[at(i)] = 0, t.logp[at(i)] = NAN, t.reference[at(i)] = NAN;
  }
  return t;
}

template <class Estimator, class Value, class Slope>
void check_kl(const tokens& t, const Estimator& estimator, Value&& value, Slope&& slope, bool turned) {
  const auto exec = test::exec();
  const index_t n = t.batch * t.time;
  // Columns of [time, batch] where turned.
  const auto place = [&](index_t i) { return turned ? i % t.time * t.batch + i / t.time : i; };
  const auto put = [&](const auto& x) {
    auto y = x;
    for (index_t i = 0; i < n; ++i) y[at(place(i))] = x[at(i)];
    return test::on_device(exec, y);
  };
  auto logp = put(t.logp), reference = put(t.reference), out = put(std::vector<float>(at(n), 7.0f));
  auto mask = put(t.mask);
  const auto view = [&](auto& x) {
    auto* data = x.view().data;
    return mlkit::tensor_view<std::remove_pointer_t<decltype(data)>, 2>(data, {t.batch, t.time},
                                                                        {turned ? 1 : t.time, turned ? t.batch : 1});
  };
  const bool masked = std::count(t.mask.begin(), t.mask.end(), 0) > 0;
  rl::kl_batch<float> in{.log_probs = view(logp), .reference = view(reference)};
  if (masked) in.mask = view(mask);
  double total = 0, count = 0;
  std::vector<double> values(at(n)), slopes(at(n));
  for (index_t i = 0; i < n; ++i) {
    if (!t.mask[at(i)]) continue;
    const double d = static_cast<double>(t.logp[at(i)]) - static_cast<double>(t.reference[at(i)]);
    values[at(place(i))] = value(d), slopes[at(place(i))] = slope(d);
    total += value(d), count += 1;
  }
  const rl::kl_stats stats = rl::kl(exec, in, estimator, view(out));
  CHECK(stats.total == Approx(total).epsilon(1e-5));
  CHECK(static_cast<double>(stats.tokens) == count);
  CHECK(fits(test::to_host(exec, out), values));
  if constexpr (!std::is_same_v<Estimator, rl::k1>)
    for (const double normaliser : {0.0, 50.0}) {
      const rl::kl_loss_stats loss =
          rl::kl_loss(exec, in, {.coefficient = 0.3, .normaliser = normaliser}, estimator, view(out));
      const double factor = 0.3 / (normaliser > 0 ? normaliser : count);
      CHECK(loss.loss == Approx(factor * total).epsilon(1e-5));
      std::vector<double> want = slopes;
      for (double& x : want) x *= factor;
      CHECK(fits(test::to_host(exec, out), want));
    }
}

template <class T, class Loss, class Term>
void check_pairs(const Loss& loss, index_t n, index_t step, Term&& term) {
  // term(c, r, c_ref, r_ref, margin): loss, derivatives by c and r, rewards.
  const auto exec = test::exec();
  const auto spread = [&](const std::vector<T>& x) {
    std::vector<T> y(x.size() * at(step), T(5));
    for (std::size_t i = 0; i < x.size(); ++i) y[i * at(step)] = x[i];
    return y;
  };
  std::vector<std::vector<T>> x;
  std::vector<test::operand<T, 1>> on;
  for (std::uint64_t k = 0; k < 5; ++k) {
    x.push_back(numbers<T>(n, -1.5, 0.4, 10 + k));
    for (T& v : x.back()) v = std::min(v, T(-0.05));
    on.push_back(test::on_device(exec, spread(x.back())));
  }
  std::vector<test::operand<T, 1>> out;
  for (int k = 0; k < 3; ++k) out.push_back(test::on_device(exec, spread(std::vector<T>(at(n), T(7)))));
  const auto view = [&](auto& v) { return mlkit::tensor_view<T, 1>(v.view().data, {n}, {step}); };
  typename Loss::template inputs<T> in{.chosen = view(on[0]), .rejected = view(on[1])};
  if constexpr (requires { in.reference_chosen; })
    in.reference_chosen = view(on[2]), in.reference_rejected = view(on[3]);
  if constexpr (requires { in.margins; }) in.margins = view(on[4]);
  const rl::preference_stats stats = rl::preference_loss<T>(
      exec, in, loss, {.chosen = view(out[0]), .rejected = view(out[1]), .losses = view(out[2])});
  double total = 0, right = 0, chosen = 0, rejected = 0;
  std::vector<std::vector<double>> want(3, std::vector<double>(at(n * step), 5));
  const double count = static_cast<double>(n);
  for (index_t i = 0; i < n; ++i) {
    const auto v = [&](std::size_t k) { return static_cast<double>(x[k][at(i)]); };
    const auto [l, dc, dr, rc, rr] = term(v(0), v(1), v(2), v(3), v(4));
    total += l, right += rc > rr, chosen += rc, rejected += rr;
    want[0][at(i * step)] = dc / count, want[1][at(i * step)] = dr / count, want[2][at(i * step)] = l;
  }
  CHECK(stats.loss == Approx(total / count).epsilon(20 * unit<T>));
  CHECK(stats.accuracy == Approx(right / count));
  CHECK(stats.chosen_reward == Approx(chosen / count).epsilon(20 * unit<T>));
  CHECK(stats.rejected_reward == Approx(rejected / count).epsilon(20 * unit<T>));
  CHECK(stats.pairs == n);
  for (std::size_t k = 0; k < 3; ++k) CHECK(fits(test::to_host(exec, out[k]), want[k], 8));
}

struct term {
  double loss, d_chosen, d_rejected, chosen, rejected;
};

}  // namespace

TEST_CASE("cuda: KL divergences and their loss", "[cuda][rl]") {
  for (const bool turned : {false, true})
    for (const tokens& t : {make_tokens(3, 17, true), make_tokens(2, 2500, false), make_tokens(40, 130, true)}) {
      check_kl(
          t, rl::k1{}, [](double d) { return d; }, [](double) { return 1.0; }, turned);
      check_kl(
          t, rl::k2{}, [](double d) { return d * d / 2; }, [](double d) { return d; }, turned);
      check_kl(
          t, rl::k3{}, [](double d) { return std::expm1(-d) + d; }, [](double d) { return -std::expm1(-d); }, turned);
    }
}

TEST_CASE("cuda: a token that the reference excludes has an infinite estimate, and k3's gradient of the held exponent",
          "[cuda][rl]") {
  const auto exec = test::exec();
  std::vector<float> r(20, -1.5f);
  r[2] = r[18] = -INFINITY;
  auto logp = test::on_device(exec, std::vector<float>(20, -1.0f)), reference = test::on_device(exec, r),
       d = test::on_device(exec, r), v = test::on_device(exec, r);
  const rl::kl_batch<float> batch{.log_probs = logp.view(), .reference = reference.view()};
  const rl::kl_stats all = rl::kl(exec, batch, rl::k3{}, v.view());
  const rl::kl_loss_stats loss = rl::kl_loss(exec, batch, {.coefficient = 20}, rl::k3{}, d.view());
  CHECK((std::isinf(all.total) && std::isinf(loss.loss)));
  const auto gradient = test::to_host(exec, d), values = test::to_host(exec, v);
  for (index_t i = 0; i < 20; ++i) {
    const bool excluded = i == 2 || i == 18;
    CHECK(std::fabs(gradient(i) - (excluded ? 1 : 1 - std::exp(-0.5f))) < 1e-6f);
    CHECK(std::isinf(values(i)) == excluded);
  }
}

TEST_CASE("cuda: KL as a reward, with the score on the last token that counts", "[cuda][rl]") {
  const auto exec = test::exec();
  for (const bool packed : {false, true})
    for (const bool masked : {false, true}) {
      tokens t = packed ? make_tokens(1, 90, masked) : make_tokens(5, 70, masked);
      if (packed) t.starts = {0, 20, 20, 21, 90};
      const auto sequences = t.sequences();
      const index_t n = t.batch * t.time;
      const auto score = numbers<float>(static_cast<index_t>(sequences.size()), 0, 1, 5);
      auto logp = test::on_device(exec, t.logp), reference = test::on_device(exec, t.reference);
      auto out = test::on_device(exec, std::vector<float>(at(n), 7.0f)), scores = test::on_device(exec, score);
      auto mask = test::on_device(exec, t.mask);
      auto starts = test::on_device(exec, t.starts);
      const auto view = [&](auto& x) {
        auto* data = x.view().data;
        return mlkit::tensor_view<std::remove_pointer_t<decltype(data)>, 2>(data, {t.batch, t.time});
      };
      rl::kl_reward_batch<float> in{.log_probs = view(logp), .reference = view(reference), .scores = scores.view()};
      if (masked) in.mask = view(mask);
      if (packed) in.cu_seqlens = mlkit::tensor_view<const std::int32_t, 1>(starts.view());
      const rl::kl_reward_stats stats = rl::kl_rewards(exec, in, {.beta = 0.2}, view(out));
      std::vector<double> want(at(n));
      double total = 0;
      index_t with_tokens = 0;
      for (std::size_t b = 0; b < sequences.size(); ++b) {
        index_t last = -1;
        for (index_t i = sequences[b].first; i < sequences[b].second; ++i) {
          if (!t.mask[at(i)]) continue;
          const double d = static_cast<double>(t.logp[at(i)]) - static_cast<double>(t.reference[at(i)]);
          want[at(i)] = -0.2 * d, total += d, last = i;
        }
        if (last >= 0) want[at(last)] += static_cast<double>(score[b]), ++with_tokens;
      }
      CHECK(fits(test::to_host(exec, out), want));
      CHECK(stats.total == Approx(total).epsilon(1e-4).margin(1e-4));
      CHECK(stats.sequences == with_tokens);
    }
}

TEST_CASE("cuda: losses of pairs", "[cuda][rl]") {
  const auto dpo = [](double c, double r, double cr, double rr, double) {
    const double b = 0.1, s = 0.2, z = b * ((c - cr) - (r - rr));
    const double d = b * (-(1 - s) * sigmoid(-z) + s * sigmoid(z));
    return term{-(1 - s) * log_sigmoid(z) - s * log_sigmoid(-z), d, -d, b * (c - cr), b * (r - rr)};
  };
  const rl::dpo of_dpo{.beta = 0.1, .label_smoothing = 0.2};
  check_pairs<float>(of_dpo, 1, 1, dpo);
  check_pairs<float>(of_dpo, 5003, 1, dpo);
  check_pairs<double>(of_dpo, 300, 2, dpo);
  check_pairs<double>(rl::bradley_terry{.centering = 0.01}, 70, 1, [](double c, double r, double, double, double m) {
    const double z = c - r - m, s = c + r;
    return term{0.01 * s * s - log_sigmoid(z), 0.02 * s - sigmoid(-z), 0.02 * s + sigmoid(-z), c, r};
  });
  check_pairs<double>(rl::ipo{.beta = 0.1}, 70, 1, [](double c, double r, double cr, double rr, double) {
    const double h = (c - cr) - (r - rr) - 5;
    return term{h * h, 2 * h, -2 * h, 0.1 * (c - cr), 0.1 * (r - rr)};
  });
  check_pairs<double>(rl::simpo{}, 70, 1, [](double c, double r, double, double, double) {
    const double z = 2 * (c - r) - 1;
    return term{-log_sigmoid(z), -2 * sigmoid(-z), 2 * sigmoid(-z), 2 * c, 2 * r};
  });
  check_pairs<double>(rl::orpo{}, 70, 1, [](double c, double r, double, double, double) {
    const double z = (c - std::log1p(-std::exp(c))) - (r - std::log1p(-std::exp(r))), s = 0.1 * sigmoid(-z);
    return term{-c - 0.1 * log_sigmoid(z), -1 - s / (1 - std::exp(c)), s / (1 - std::exp(r)), 0.1 * c, 0.1 * r};
  });
}

TEST_CASE("cuda: KTO", "[cuda][rl]") {
  const auto exec = test::exec();
  for (const index_t n : {1, 333}) {
    const auto l = numbers<double>(n, -2, 0.5, 30), r = numbers<double>(n, -2, 0.5, 31);
    std::vector<std::uint8_t> good(at(n));
    for (index_t i = 0; i < n; ++i) good[at(i)] = i % 3 != 1;
    auto logp = test::on_device(exec, l), reference = test::on_device(exec, r), d = test::on_device(exec, l);
    auto desirable = test::on_device(exec, good);
    const rl::kto loss{.beta = 0.3, .kl = 0.1, .desirable_weight = 1.2, .undesirable_weight = 0.9};
    const rl::kto_stats stats = rl::preference_loss<double>(
        exec, {.log_probs = logp.view(), .reference = reference.view(), .desirable = desirable.view()}, loss,
        {.log_probs = d.view()});
    double total = 0, up = 0, down = 0, many = 0;
    std::vector<double> want;
    for (index_t i = 0; i < n; ++i) {
      const double reward = 0.3 * (l[at(i)] - r[at(i)]), z = reward - 0.03, sign = good[at(i)] ? 1 : -1;
      const double weight = good[at(i)] ? 1.2 : 0.9, s = sigmoid(sign * z);
      total += weight * (1 - s);
      want.push_back(-sign * weight * 0.3 * s * (1 - s) / static_cast<double>(n));
      (good[at(i)] ? up : down) += reward, many += good[at(i)];
    }
    CHECK(stats.loss == Approx(total / static_cast<double>(n)));
    CHECK(static_cast<double>(stats.desirable) == many);
    CHECK(stats.desirable_reward == Approx(up / many));
    if (n > 1) CHECK(stats.undesirable_reward == Approx(down / (static_cast<double>(n) - many)));
    CHECK(fits(test::to_host(exec, d), want));
  }
}

TEST_CASE("cuda: group advantages", "[cuda][rl]") {
  const auto exec = test::exec();
  const std::vector<std::int32_t> starts{0, 1, 5, 5, 70, 120};
  auto r = numbers<float>(120, 3, 2, 40);
  for (index_t i = 1; i < 5; ++i) r[at(i)] = 0.1f;  // a group of equal rewards
  auto rewards = test::on_device(exec, r), out = test::on_device(exec, r);
  auto offsets = test::on_device(exec, starts);
  for (const bool even : {true, false}) {
    std::vector<std::pair<index_t, index_t>> places;
    if (even)
      for (index_t g = 0; g < 30; ++g) places.push_back({4 * g, 4 * g + 4});
    else
      for (std::size_t g = 0; g + 1 < starts.size(); ++g) places.push_back({starts[g], starts[g + 1]});
    const rl::groups of = even ? rl::groups{4} : rl::groups{mlkit::vector_view<const std::int32_t>(offsets.view())};
    std::vector<double> grpo(120), dr(120), rloo(120), centered(120);
    for (const auto& [begin, end] : places) {
      const double n = static_cast<double>(end - begin);
      double mean = 0, squares = 0;
      for (index_t i = begin; i < end; ++i) mean += static_cast<double>(r[at(i)]) / n;
      for (index_t i = begin; i < end; ++i) squares += std::pow(static_cast<double>(r[at(i)]) - mean, 2);
      const double deviation = n > 1 ? std::sqrt(squares / (n - 1)) : 0;
      for (index_t i = begin; i < end; ++i) {
        const double d = static_cast<double>(r[at(i)]) - mean;
        dr[at(i)] = centered[at(i)] = d, grpo[at(i)] = deviation > 1e-9 ? d / (deviation + 1e-4) : 0;
        rloo[at(i)] = n > 1 ? n / (n - 1) * d : 0;
      }
    }
    double squares = 0;
    for (const double d : centered) squares += d * d;
    std::vector<double> plus = centered;
    for (double& x : plus) x /= std::sqrt(squares / 119) + 1e-8;
    const auto check = [&](const auto& method, const std::vector<double>& want) {
      rl::group_advantages(exec, mlkit::vector_view<const float>(rewards.view()), of, method, out.view());
      CHECK(fits(test::to_host(exec, out), want));
    };
    check(rl::grpo{}, grpo);
    check(rl::dr_grpo{}, dr);
    check(rl::rloo{}, rloo);
    check(rl::reinforce_pp{}, plus);
  }
  rl::group_advantages(exec, mlkit::vector_view<const float>(rewards.view()), rl::groups{8}, rl::rloo{}, out.view());
  auto in_place = test::on_device(exec, r);
  rl::group_advantages(exec, mlkit::vector_view<const float>(in_place.view()), rl::groups{8}, rl::rloo{},
                       in_place.view());
  const auto a = test::to_host(exec, out), b = test::to_host(exec, in_place);
  CHECK(std::memcmp(a.data(), b.data(), 120 * sizeof(float)) == 0);
}

TEST_CASE("cuda: log-probabilities of sequences", "[cuda][rl]") {
  const auto exec = test::exec();
  for (const bool packed : {false, true})
    for (const auto how : {rl::sequence_reduction::sum, rl::sequence_reduction::mean}) {
      tokens t = packed ? make_tokens(1, 90, true) : make_tokens(5, 70, true);
      if (packed) t.starts = {0, 20, 20, 21, 90};
      const auto sequences = t.sequences();
      const auto count = static_cast<index_t>(sequences.size());
      const auto slope = numbers<float>(count, 0, 1, 50);
      auto logp = test::on_device(exec, t.logp), d = test::on_device(exec, t.logp),
           slopes = test::on_device(exec, slope), out = test::on_device(exec, slope);
      auto mask = test::on_device(exec, t.mask);
      auto starts = test::on_device(exec, t.starts);
      const auto view = [&](auto& x) {
        auto* data = x.view().data;
        return mlkit::tensor_view<std::remove_pointer_t<decltype(data)>, 2>(data, {t.batch, t.time});
      };
      rl::token_batch<float> in{.log_probs = view(logp), .mask = view(mask)};
      if (packed) in.cu_seqlens = mlkit::tensor_view<const std::int32_t, 1>(starts.view());
      rl::sequence_log_probs(exec, in, how, out.view());
      rl::sequence_log_probs_backward(exec, in, how, slopes.view(), view(d));
      std::vector<double> want, want_d(at(t.batch * t.time));
      for (std::size_t b = 0; b < sequences.size(); ++b) {
        double sum = 0, n = 0;
        for (index_t i = sequences[b].first; i < sequences[b].second; ++i)
          if (t.mask[at(i)]) sum += static_cast<double>(t.logp[at(i)]), n += 1;
        const bool mean = how == rl::sequence_reduction::mean;
        want.push_back(mean && n > 0 ? sum / n : sum);
        for (index_t i = sequences[b].first; i < sequences[b].second; ++i)
          if (t.mask[at(i)]) want_d[at(i)] = static_cast<double>(slope[b]) / (mean ? n : 1);
      }
      CHECK(fits(test::to_host(exec, out), want));
      CHECK(fits(test::to_host(exec, d), want_d));
    }
}

namespace {

// The K-wise loss of rewards, `step` elements apart, of groups of four or of offsets, by their order or by ranks.
template <class T>
void check_k_wise(bool even, bool ranked, index_t step, double normaliser) {
  INFO("even " << even << ", ranked " << ranked << ", step " << step << ", normaliser " << normaliser);
  const auto exec = test::exec();
  const index_t n = 120;
  const std::vector<std::int32_t> starts{0, 1, 5, 5, 70, 120};
  std::vector<std::pair<index_t, index_t>> places;
  if (even)
    for (index_t g = 0; g < n / 4; ++g) places.push_back({4 * g, 4 * g + 4});
  else
    for (std::size_t g = 0; g + 1 < starts.size(); ++g) places.push_back({starts[g], starts[g + 1]});
  const auto r = numbers<T>(n, 0, 1.5, 60);
  std::vector<std::int32_t> ranks;
  for (index_t i = 0; i < n; ++i)
    ranks.push_back(i < 8 ? 3 : static_cast<std::int32_t>((i * 7) % 5) - 2);  // the first have none that differ
  std::vector<T> spread(at(n * step), T(5));
  for (index_t i = 0; i < n; ++i) spread[at(i * step)] = r[at(i)];
  auto on = test::on_device(exec, spread), out = test::on_device(exec, std::vector<T>(at(n * step), T(7)));
  auto rank_on = test::on_device(exec, ranks), offsets = test::on_device(exec, starts);
  rl::ranked_completions<T> in{
      .rewards = mlkit::tensor_view<const T, 1>(on.data(), {n}, {step}),
      .of = even ? rl::groups{4} : rl::groups{mlkit::vector_view<const std::int32_t>(offsets.view())}};
  if (ranked) in.ranks = rank_on.view();
  const rl::preference_stats stats =
      rl::preference_loss<T>(exec, in, rl::k_wise{}, {.normaliser = normaliser},
                             {.rewards = mlkit::tensor_view<T, 1>(out.data(), {n}, {step})});
  double loss = 0, right = 0, chosen = 0, rejected = 0, all = 0, prompts = 0;
  std::vector<double> want(at(n * step), 7), slopes(at(n));
  for (const auto& [begin, end] : places) {
    double of_group = 0, pairs = 0;
    std::vector<double> slope(at(end - begin));
    for (index_t i = begin; i < end; ++i)
      for (index_t j = begin; j < end; ++j) {
        if (ranked ? ranks[at(i)] >= ranks[at(j)] : i >= j) continue;  // i is the better one
        const double better = static_cast<double>(r[at(i)]), worse = static_cast<double>(r[at(j)]), d = better - worse;
        of_group -= log_sigmoid(d), pairs += 1, right += d > 0, chosen += better, rejected += worse;
        slope[at(i - begin)] -= sigmoid(-d), slope[at(j - begin)] += sigmoid(-d);
      }
    if (pairs > 0) loss += of_group / pairs, prompts += 1;
    all += pairs;
    for (index_t i = begin; i < end; ++i) slopes[at(i)] = pairs > 0 ? slope[at(i - begin)] / pairs : 0;
  }
  const double divisor = normaliser > 0 ? normaliser : prompts;
  for (index_t i = 0; i < n; ++i) want[at(i * step)] = slopes[at(i)] / divisor;
  CHECK(stats.loss == Approx(loss / divisor).epsilon(4 * unit<T>));
  CHECK(stats.accuracy == Approx(right / all));
  CHECK(stats.chosen_reward == Approx(chosen / all).epsilon(4 * unit<T>).margin(4 * unit<T>));
  CHECK(stats.rejected_reward == Approx(rejected / all).epsilon(4 * unit<T>).margin(4 * unit<T>));
  CHECK(static_cast<double>(stats.pairs) == all);
  CHECK(fits(test::to_host(exec, out), want));
}

}  // namespace

TEST_CASE("cuda: the K-wise loss", "[cuda][rl]") {
  for (const bool even : {true, false})
    for (const bool ranked : {true, false}) {
      check_k_wise<float>(even, ranked, 1, 0);
      check_k_wise<double>(even, ranked, 2, 7);
    }
  const auto exec = test::exec();
  const rl::preference_stats none =
      rl::preference_loss<float>(exec, {.rewards = {}, .of = rl::groups{4}}, rl::k_wise{});
  CHECK((none.loss == 0 && none.pairs == 0));
}

TEST_CASE("cuda: KTO's reference point", "[cuda][rl]") {
  const auto exec = test::exec();
  for (const index_t n : {0, 1, 5000})
    for (const double shift : {0.3, -0.3}) {
      const auto l = numbers<float>(n, -2 + shift, 0.1, 70), r = numbers<float>(n, -2, 0.1, 71);
      auto logp = test::on_device(exec, l), reference = test::on_device(exec, r);
      double sum = 0;
      for (index_t i = 0; i < n; ++i) sum += static_cast<double>(l[at(i)]) - static_cast<double>(r[at(i)]);
      const double point = rl::kto_reference_point<float>(exec, logp.view(), reference.view());
      CHECK(point == Approx(n > 0 ? std::max(0.0, sum / static_cast<double>(n)) : 0.0));
      const double merged =
          rl::kto_reference_point<float>(exec, logp.view(), reference.view(), [&](const rl::moments& mine) {
            return rl::merge(mine, {5000, 0.5, 0});
          });
      CHECK(merged == Approx((sum + 2500) / static_cast<double>(n + 5000)));
    }
}

TEST_CASE("cuda: the best of each group", "[cuda][rl]") {
  const auto exec = test::exec();
  std::vector<float> r(200, 1);
  for (index_t i = 0; i < 200; ++i) r[at(i)] = static_cast<float>((i * 37) % 50) - 60;
  auto rewards = test::on_device(exec, r);
  auto best = test::on_device(exec, std::vector<std::int64_t>(2));
  rl::best_of_n(exec, rewards.view(), rl::groups{100}, best.view());
  const auto have = test::to_host(exec, best);
  for (index_t g = 0; g < 2; ++g)
    CHECK(have[at(g)] == std::max_element(r.begin() + 100 * g, r.begin() + 100 * (g + 1)) - r.begin());
  const std::vector<std::int32_t> starts{0, 1, 3, 200};
  auto offsets = test::on_device(exec, starts);
  auto three = test::on_device(exec, std::vector<std::int32_t>(3));
  rl::best_of_n(exec, rewards.view(), rl::groups{mlkit::vector_view<const std::int32_t>(offsets.view())},
                std::span(three.data(), 3));
  const auto of = test::to_host(exec, three);
  CHECK(of[0] == 0);
  CHECK(of[1] == 1);
  CHECK(of[2] == std::max_element(r.begin() + 3, r.end()) - r.begin());
}

TEST_CASE("cuda: divergences and preferences give the same bits again, and take nothing", "[cuda][rl]") {
  const auto exec = test::exec();
  const index_t n = 2001;
  std::vector<test::operand<float, 1>> x;
  for (std::uint64_t k = 0; k < 4; ++k) x.push_back(test::on_device(exec, numbers<float>(n, -2, 0.4, 80 + k)));
  std::vector<std::vector<float>> made;
  std::vector<double> losses;
  for (int run = 0; run < 2; ++run) {
    auto d = test::on_device(exec, std::vector<float>(at(n))), e = test::on_device(exec, std::vector<float>(at(n)));
    const rl::kl_loss_stats kl =
        rl::kl_loss<float>(exec, {.log_probs = x[0].view(), .reference = x[1].view()}, {}, d.view());
    const rl::preference_stats pairs = rl::preference_loss<float>(exec,
                                                                  {.chosen = x[0].view(),
                                                                   .rejected = x[1].view(),
                                                                   .reference_chosen = x[2].view(),
                                                                   .reference_rejected = x[3].view()},
                                                                  rl::dpo{}, {.rejected = e.view()});
    const rl::preference_stats ranks =
        rl::preference_loss<float>(exec, {.rewards = x[2].view(), .of = rl::groups(n)}, rl::k_wise{});
    for (const auto* v : {&d, &e}) {
      const auto y = test::to_host(exec, *v);
      made.emplace_back(y.data(), y.data() + n);
    }
    for (const double l : {kl.loss, pairs.loss, ranks.loss}) losses.push_back(l);
  }
  CHECK((made[0] == made[2] && made[1] == made[3]));
  CHECK(std::equal(losses.begin(), losses.begin() + 3, losses.begin() + 3));
  const mlkit::vector_view<const float> nothing(nullptr, {0});
  const rl::kl_loss_stats kl = rl::kl_loss<float>(exec, {.log_probs = nothing, .reference = nothing}, {}, {});
  const rl::preference_stats pairs =
      rl::preference_loss<float>(exec, {.chosen = nothing, .rejected = nothing}, rl::bradley_terry{});
  CHECK((kl.loss == 0 && kl.tokens == 0 && pairs.loss == 0 && pairs.pairs == 0));
}

TEST_CASE("cuda: preferences refuse what does not fit, and write nothing", "[cuda][rl]") {
  const auto exec = test::exec();
  auto r = test::on_device(exec, std::vector<float>(6)), out = test::on_device(exec, std::vector<float>(6, 7.0f));
  auto best = test::on_device(exec, std::vector<std::int32_t>(3, 7));
  const mlkit::vector_view<const float> rewards(r.view()), few(r.data(), {5});
  const mlkit::vector_view<float> d(out.view()), short_d(out.data(), {4});
  const std::string loss = "rl::preference_loss: ";
  CHECK_THROWS_WITH(
      rl::preference_loss<float>(exec, {.chosen = rewards, .rejected = few}, rl::bradley_terry{}, {.chosen = d}),
      "mlkit::shape_error: " + loss + "rejected has 5 elements, but chosen has 6");
  CHECK_THROWS_WITH(rl::preference_loss<float>(exec, {.chosen = rewards, .rejected = rewards}, rl::bradley_terry{},
                                               {.chosen = short_d}),
                    "mlkit::shape_error: " + loss + "gradients.chosen has 4 elements, but chosen has 6");
  CHECK_THROWS_WITH(
      rl::preference_loss<float>(exec, {.rewards = rewards, .of = rl::groups{4}}, rl::k_wise{}, {.rewards = d}),
      "mlkit::shape_error: " + loss + "rewards has 6 elements, which is no multiple of groups of 4");
  CHECK_THROWS_WITH(rl::preference_loss<float>(exec, {.rewards = rewards, .of = rl::groups{3}}, rl::k_wise{},
                                               {.normaliser = -1}, {.rewards = d}),
                    "mlkit::value_error: " + loss + "normaliser = -1 is negative or not finite");
  CHECK_THROWS_WITH(rl::best_of_n(exec, rewards, rl::groups{3}, best.view()),
                    "mlkit::shape_error: rl::best_of_n: best has 3 elements, but the number of groups has 2");
  CHECK_THROWS_WITH(rl::group_advantages(exec, rewards, rl::groups{3}, rl::rloo{}, short_d),
                    "mlkit::shape_error: rl::group_advantages: advantages has 4 elements, but rewards has 6");
  CHECK_THROWS_WITH(rl::kl_loss<float>(exec, {.log_probs = rewards, .reference = few}, {}, d),
                    "mlkit::shape_error: rl::kl_loss: reference has shape [1, 5], but log_probs has [1, 6]");
  CHECK_THROWS_WITH(rl::kl_loss<float>(exec, {.log_probs = rewards, .reference = rewards}, {.normaliser = -1}, d),
                    "mlkit::value_error: rl::kl_loss: normaliser = -1 is negative or not finite");
  CHECK_THROWS_WITH(rl::kto_reference_point<float>(exec, rewards, few),
                    "mlkit::shape_error: rl::kto_reference_point: reference has 5 elements, but log_probs has 6");
  const auto have = test::to_host(exec, out);
  CHECK(std::count(have.data(), have.data() + 6, 7.0f) == 6);
  CHECK(test::to_host(exec, best) == std::vector<std::int32_t>(3, 7));
}

#if !defined(MLKIT_TEST_ON_CPU)

TEST_CASE("cuda: offsets and rewards that make no sense are safe", "[cuda][rl]") {
  const auto exec = test::exec();
  auto r = test::on_device(exec, std::vector<float>{NAN, NAN, NAN, 2, -INFINITY, 1}),
       d = test::on_device(exec, std::vector<float>(6));
  auto offsets = test::on_device(exec, std::vector<std::int32_t>{-5, 2, 2, 4, 900});
  const rl::groups of{mlkit::vector_view<const std::int32_t>(offsets.view())};
  auto best = test::on_device(exec, std::vector<std::int32_t>(4, 7));
  rl::best_of_n(exec, r.view(), of, best.view());
  CHECK(test::to_host(exec, best) == std::vector<std::int32_t>{-1, -1, 3, 5});
  const rl::preference_stats stats =
      rl::preference_loss<float>(exec, {.rewards = r.view(), .of = of}, rl::k_wise{}, {.rewards = d.view()});
  CHECK(std::isnan(stats.loss));
  CHECK(stats.pairs == 3);
  auto nan = test::on_device(exec, std::vector<float>{NAN});
  CHECK(std::isnan(rl::kto_reference_point<float>(exec, nan.view(), nan.view()).get()));
}

#endif
