// KL estimators, rewards, loss and controllers against their formulas in f64.
#include "numbers.hpp"

#include <functional>
#include <mlkit/rl/kl.hpp>

namespace rl = mlkit::rl;
using mlkit::cpu;
using namespace rl_test;

namespace {

double k3_of(double d) { return std::exp(std::clamp(-d, -20.0, 20.0)) - 1 + d; }

template <class T>
struct tokens {
  index_t batch, time;
  mlkit::tensor<T, 2> log_probs, reference;
  mlkit::tensor<T, 1> scores;
  std::vector<std::uint8_t> bits;
  mlkit::matrix_view<const std::uint8_t> mask;

  tokens(index_t rows, index_t cols, double kept)
      : batch(rows),
        time(cols),
        log_probs(normal_matrix<T>(rows, cols, 1, 1, -3)),
        reference(normal_matrix<T>(rows, cols, 2, 1, -3)),
        scores(normal_vector<T>(rows, 3)),
        bits(bytes(rows * cols, 4, kept)),
        mask(bits.data(), {rows, cols}) {
    for (index_t i = 0; i < rows * cols; ++i)
      if (!bits[static_cast<std::size_t>(i)])
        log_probs.data()[i] = static_cast<T>(no_number), reference.data()[i] = static_cast<T>(inf);
  }
};

}  // namespace

TEMPLATE_TEST_CASE("estimators are their formulas, small and far differences included", "[rl][kl]", float, double) {
  const double tight = std::is_same_v<TestType, double> ? 4e-16 : 3e-7;
  for (double size = 1e-8; size < 1e5; size *= 1.7)
    for (const double sign : {-1.0, 1.0}) {
      const TestType d = static_cast<TestType>(sign * size);
      const double x = static_cast<double>(d);
      CHECK(rl::k1{}(d).value == d);
      CHECK(rl::k1{}(d).derivative == 1);
      CHECK(static_cast<double>(rl::k2{}(d).value) == Approx(x * x / 2).epsilon(tight));
      CHECK(rl::k2{}(d).derivative == d);
      const auto e = rl::k3{}(d);
      // e^-d - 1 + d in f64 has no digits where d is small; the series does.
      const double want = size < 1e-2 ? x * x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5 * (1 - x / 6)))) : k3_of(x);
      INFO("d " << x);
      CHECK(std::fabs(static_cast<double>(e.value) - want) <=
            std::max(100 * tight * want, std::is_same_v<TestType, double> ? 4e-16 : 0.0));
      CHECK(e.value >= 0);
      CHECK(std::fabs(static_cast<double>(e.derivative) + std::expm1(std::clamp(-x, -20.0, 20.0))) <=
            8 * tight * std::fabs(std::expm1(std::clamp(-x, -20.0, 20.0))));
      CHECK(rl::with_kl_gradient<rl::k3>{}(d).value == e.value);
      CHECK(rl::with_kl_gradient<rl::k3>{}(d).derivative == d);
    }
  for (const TestType d : {TestType(1e4), TestType(-1e4)}) CHECK(std::isfinite(rl::k3{}(d).value));
  CHECK(rl::k3{}(TestType(-1e4)).derivative < 0);  // back to the reference
  CHECK(rl::k3{}(TestType(0)).value == 0);
}

TEMPLATE_TEST_CASE("estimates of tokens, their sum and their loss", "[rl][kl]", float, double) {
  const double tight = std::is_same_v<TestType, double> ? 1e-14 : 1e-5;
  for (const auto& [rows, cols] : {std::pair{1, 1}, {3, 7}, {5, 16}, {37, 100}, {2, 5000}})
    for (const double kept : {1.0, 0.6, 0.0}) {
      tokens<TestType> in(rows, cols, kept);
      mlkit::tensor<TestType, 2> values({rows, cols}), of_k3({rows, cols}), of_kl({rows, cols});
      const rl::kl_batch<TestType> batch{.log_probs = in.log_probs, .reference = in.reference, .mask = in.mask};
      const rl::kl_stats sum = rl::kl(cpu{}, batch, rl::k3{}, values);
      const rl::kl_loss_stats loss = rl::kl_loss(cpu{}, batch, {.coefficient = 0.3}, rl::k3{}, of_k3);
      const rl::kl_loss_stats given = rl::kl_loss(cpu{}, batch, {.coefficient = 0.3, .normaliser = 50}, of_kl);
      double total = 0, count = 0;
      for (const std::uint8_t bit : in.bits) count += bit;
      for (index_t i = 0; i < rows * cols; ++i) {
        const bool kept_here = in.bits[static_cast<std::size_t>(i)];
        const double d =
            kept_here ? static_cast<double>(in.log_probs.data()[i]) - static_cast<double>(in.reference.data()[i]) : 0;
        const double value = kept_here ? k3_of(d) : 0, slope = kept_here ? 0.3 / count * (1 - std::exp(-d)) : 0;
        total += value;
        CHECK(std::fabs(static_cast<double>(values.data()[i]) - value) <= tight * (1 + value));
        CHECK(std::fabs(static_cast<double>(of_k3.data()[i]) - slope) <= tight * (1 + std::fabs(slope)));
        CHECK(std::fabs(static_cast<double>(of_kl.data()[i]) - 0.3 / 50 * d) <= tight);
      }
      INFO(rows << " " << cols << " kept " << kept);
      CHECK(sum.tokens == static_cast<index_t>(count));
      CHECK(std::fabs(sum.total - total) <= tight * (1 + total));
      CHECK(std::fabs(sum.mean() - (count > 0 ? total / count : 0)) <= tight * (1 + total));
      CHECK(std::fabs(loss.loss - (count > 0 ? 0.3 * total / count : 0)) <= tight * (1 + total));
      CHECK(std::fabs(given.loss - 0.3 * total / 50) <= tight * (1 + total));
      CHECK(loss.tokens == sum.tokens);
    }
}

TEST_CASE("a token that the reference excludes has an infinite estimate, and k3's gradient of the held exponent",
          "[rl][kl]") {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> log_probs(20, -1.0f);
  std::vector<float> reference(20, -1.5f), gradient(20), values(20);
  reference[2] = reference[18] = -infinity;
  const rl::kl_batch<float> batch{.log_probs = log_probs, .reference = reference};
  CHECK(rl::kl(cpu{}, batch, rl::k3{}, values).total == static_cast<double>(infinity));
  const rl::kl_loss_stats loss = rl::kl_loss(cpu{}, batch, {.coefficient = 20}, rl::k3{}, gradient);
  CHECK(loss.loss == static_cast<double>(infinity));
  for (std::size_t i = 0; i < 20; ++i) {
    const bool excluded = i == 2 || i == 18;
    CHECK(std::fabs(gradient[i] - (excluded ? 1 : 1 - std::exp(-0.5f))) < 1e-6f);
    CHECK((values[i] == infinity) == excluded);
  }
}

TEST_CASE("the gradient of a KL loss is that of its value; with_kl_gradient is KL's own", "[rl][kl]") {
  tokens<double> in(3, 11, 0.7);
  for (index_t i = 0; i < 33; ++i)
    if (in.bits[static_cast<std::size_t>(i)]) in.log_probs.data()[i] *= 1.3;  // far differences too
  const auto check = [&](const auto& estimator) {
    mlkit::tensor<double, 2> gradient({3, 11});
    const rl::kl_batch<double> batch{.log_probs = in.log_probs, .reference = in.reference, .mask = in.mask};
    rl::kl_loss(cpu{}, batch, {.coefficient = 2}, estimator, gradient);
    for (index_t i = 0; i < 33; ++i) {
      double& x = in.log_probs.data()[i];
      const double at = x, step = 1e-6;
      x = at + step;
      const double above = rl::kl_loss(cpu{}, batch, {.coefficient = 2}, estimator, {}).loss;
      x = at - step;
      const double below = rl::kl_loss(cpu{}, batch, {.coefficient = 2}, estimator, {}).loss;
      x = at;
      const double want = (above - below) / (2 * step);
      CHECK(std::fabs(gradient.data()[i] - (in.bits[static_cast<std::size_t>(i)] ? want : 0)) <
            1e-7 * (1 + std::fabs(want)));
    }
  };
  check(rl::k2{});
  check(rl::k3{});

  // A policy over three actions: sum over actions of p(a) (d log p(a)) derivative(a) is the gradient of KL by the
  // logits, for which the loop below has the formula.
  const double z[] = {0.3, -1.2, 0.8}, q[] = {0.2, 0.5, 0.3};
  double p[3], norm = 0, divergence = 0;
  for (int a = 0; a < 3; ++a) norm += std::exp(z[a]);
  for (int a = 0; a < 3; ++a) p[a] = std::exp(z[a]) / norm;
  for (int a = 0; a < 3; ++a) divergence += p[a] * std::log(p[a] / q[a]);
  for (int j = 0; j < 3; ++j) {
    double expected = 0, of_k3 = 0;
    for (int a = 0; a < 3; ++a) {
      const double d = std::log(p[a]) - std::log(q[a]), by_logit = (a == j ? 1 : 0) - p[j];
      expected += p[a] * by_logit * rl::with_kl_gradient<rl::k3>{}(d).derivative;
      of_k3 += p[a] * by_logit * rl::k3{}(d).derivative;
    }
    CHECK(std::fabs(expected - p[j] * (std::log(p[j] / q[j]) - divergence)) < 1e-14);
    CHECK(std::fabs(of_k3 - (p[j] - q[j])) < 1e-14);  // of KL(ref || pi)
  }
}

TEMPLATE_TEST_CASE("rewards are -beta kl, with the score on the last token that counts", "[rl][kl]", float, double) {
  const double tight = std::is_same_v<TestType, double> ? 1e-14 : 1e-5;
  for (const double kept : {1.0, 0.5, 0.1}) {
    constexpr index_t batch = 19, time = 23;
    tokens<TestType> in(batch, time, kept);
    for (index_t t = 0; t < time; ++t) in.bits[static_cast<std::size_t>(4 * time + t)] = 0;  // nothing of row 4
    in.scores(4) = static_cast<TestType>(no_number);                                         // whose score nobody sees
    mlkit::tensor<TestType, 2> rewards({batch, time}), packed({1, batch * time});
    const rl::kl_reward_stats stats = rl::kl_rewards(
        cpu{}, rl::kl_reward_batch<TestType>{in.log_probs, in.reference, in.scores, in.mask}, {.beta = 0.3}, rewards);
    std::vector<std::int32_t> starts;
    for (index_t b = 0; b <= batch; ++b) starts.push_back(static_cast<std::int32_t>(b * time));
    const auto flat = [&](auto* data) {
      return mlkit::vector_view<std::remove_pointer_t<decltype(data)>>(data, {batch * time});
    };
    const rl::kl_reward_batch<TestType> of_packed{.log_probs = flat(in.log_probs.data()),
                                                  .reference = flat(in.reference.data()),
                                                  .scores = in.scores,
                                                  .mask = in.bits,
                                                  .cu_seqlens = starts};
    rl::kl_rewards(cpu{}, of_packed, {.beta = 0.3}, rl::k1{}, flat(packed.data()));
    double total = 0, sequences = 0;
    for (index_t b = 0; b < batch; ++b) {
      index_t last = -1;
      for (index_t t = 0; t < time; ++t)
        if (in.mask(b, t)) last = t;
      sequences += last >= 0;
      for (index_t t = 0; t < time; ++t) {
        double want = 0;
        if (in.mask(b, t)) {
          const double d = static_cast<double>(in.log_probs(b, t)) - static_cast<double>(in.reference(b, t));
          total += d;
          want = -0.3 * d + (t == last ? static_cast<double>(in.scores(b)) : 0);
        }
        CHECK(std::fabs(static_cast<double>(rewards(b, t)) - want) < tight);
        CHECK(packed(0, b * time + t) == rewards(b, t));
      }
    }
    CHECK(stats.sequences == static_cast<index_t>(sequences));
    CHECK(std::fabs(stats.per_sequence() - total / sequences) < 100 * tight);

    // Time-major storage.
    mlkit::tensor<TestType, 2> l({time, batch}), r({time, batch}), out({time, batch});
    std::vector<std::uint8_t> bits(in.bits.size());
    const mlkit::matrix_view<std::uint8_t> mask(bits.data(), {batch, time}, {1, batch});
    for (index_t b = 0; b < batch; ++b)
      for (index_t t = 0; t < time; ++t)
        l(t, b) = in.log_probs(b, t), r(t, b) = in.reference(b, t), mask(b, t) = in.mask(b, t);
    rl::kl_rewards(
        cpu{},
        rl::kl_reward_batch<TestType>{transposed(std::as_const(l)), transposed(std::as_const(r)), in.scores, mask},
        {.beta = 0.3}, transposed(out));
    bool same = true;
    for (index_t b = 0; b < batch; ++b)
      for (index_t t = 0; t < time; ++t) same = same && out(t, b) == rewards(b, t);
    CHECK(same);
  }
}

TEST_CASE("braces, empty batches, and sequences without tokens", "[rl][kl]") {
  mlkit::matrix<float> l({2, 3}), r({2, 3}), out({2, 3}), none({0, 3});
  mlkit::vector<float> scores({2});
  scores(0) = 1, scores(1) = 2;
  rl::kl_rewards(cpu{}, {.log_probs = l, .reference = r, .scores = scores}, {.beta = 0.1}, out);
  CHECK(out(0, 2) == 1);
  CHECK(out(1, 2) == 2);
  CHECK(out(1, 1) == 0);
  CHECK(rl::kl(cpu{}, {.log_probs = l, .reference = r}).tokens == 6);
  CHECK(rl::kl(cpu{}, {.log_probs = none, .reference = none}, rl::k1{}).tokens == 0);
  CHECK(rl::kl_loss(cpu{}, {.log_probs = none, .reference = none}, {}, none).loss == 0);
  CHECK(rl::kl_rewards(cpu{}, {.log_probs = none, .reference = none}, {}, none).sequences == 0);
  const std::vector<std::int32_t> starts{0, 0, 3, 3};
  mlkit::vector<float> tokens({3}), three({3});
  three(0) = 5, three(1) = 6, three(2) = 7;
  mlkit::vector<float> rewards({3});
  const rl::kl_reward_batch<float> packed{
      .log_probs = tokens, .reference = tokens, .scores = three, .cu_seqlens = starts};
  CHECK(rl::kl_rewards(cpu{}, packed, {}, rewards).sequences == 1);
  CHECK(rewards(2) == 6);
  CHECK(rewards(0) == 0);
  const std::vector<float> x{-1, -2, -3}, y{-2, -2, -2}, score{4};
  std::vector<float> one(3);
  CHECK(rl::kl_rewards(cpu{}, {.log_probs = x, .reference = y, .scores = score}, {.beta = 1}, one).sequences == 1);
  CHECK(one == std::vector<float>{-1, 0, 5});
}

TEST_CASE("KL of tokens: the same bits for any number of threads", "[rl][kl]") {
  tokens<float> in(300, 517, 0.8);
  std::vector<float> want;
  double want_total = 0;
  for (const int threads : {1, 2, 3, 8}) {
    mlkit::tensor<float, 2> out({300, 517});
    const rl::kl_batch<float> batch{.log_probs = in.log_probs, .reference = in.reference, .mask = in.mask};
    const rl::kl_stats s = rl::kl(cpu{.threads = threads}, batch, rl::k3{}, out);
    const std::vector<float> flat(out.begin(), out.end());
    if (threads == 1) want = flat, want_total = s.total;
    CHECK(same_bits(flat, want));
    CHECK(s.total == want_total);
  }
}

TEST_CASE("the adaptive controller is its formula", "[rl][kl]") {
  rl::adaptive_kl c{.beta = 0.2, .target = 6, .horizon = 10000};
  c.update(6, 256);
  CHECK(c.beta == 0.2);
  c.update(100, 256);  // clipped at +0.2
  CHECK(std::fabs(c.beta - 0.2 * (1 + 0.2 * 0.0256)) < 1e-15);
  c.beta = 0.2;
  c.update(-3, 256);
  CHECK(std::fabs(c.beta - 0.2 * (1 - 0.2 * 0.0256)) < 1e-15);
  c.beta = 0.2;
  c.update(6.6, 256);
  CHECK(std::fabs(c.beta - 0.2 * (1 + 0.1 * 0.0256)) < 1e-15);
  rl::fixed_kl f{.beta = 0.1};
  f.update(100, 256);
  CHECK(f.beta == 0.1);
  const std::string value = "mlkit::value_error: rl::adaptive_kl::update: ";
  const double before = c.beta;
  CHECK(said([&] { c.update(no_number, 1); }) == value + "kl = nan is not finite");
  CHECK(said([&] { c.update(1, -1); }) ==
        value + "n = -1 is outside [0, horizon / clip) with horizon = 10000, clip = 0.2");
  CHECK(said([&] { c.update(1, 50000); }) ==
        value + "n = 50000 is outside [0, horizon / clip) with horizon = 10000, clip = 0.2");
  CHECK(c.beta == before);
  CHECK(said([] { rl::adaptive_kl{.target = 0}.update(1, 1); }) == value + "target = 0 is not positive");
  CHECK(said([] { rl::adaptive_kl{.horizon = -1}.update(1, 1); }) == value + "horizon = -1 is not positive");
  CHECK(said([] { rl::adaptive_kl{.clip = 2}.update(1, 1); }) == value + "clip = 2 is outside [0, 1]");
  CHECK(said([] { rl::adaptive_kl{.beta = -1}.update(1, 1); }) == value + "beta = -1 is negative or not finite");
}

TEST_CASE("bad input of KL is refused in words, and nothing is written", "[rl][kl][errors]") {
  mlkit::matrix<float> l({2, 3}), r({2, 3}), wide({2, 4}), out({2, 3});
  mlkit::vector<float> scores({2}), three({3});
  for (index_t i = 0; i < 6; ++i) out.data()[i] = 9;
  const std::string shape = "mlkit::shape_error: rl::kl", value = "mlkit::value_error: rl::kl";
  const cpu exec;
  CHECK(said([&] { rl::kl(exec, {.log_probs = l, .reference = wide}, rl::k3{}, out); }) ==
        shape + ": reference has shape [2, 4], but log_probs has [2, 3]");
  const std::vector<std::uint8_t> bits(8, 1);
  CHECK(said([&] {
          rl::kl(exec,
                 {.log_probs = l, .reference = r, .mask = mlkit::matrix_view<const std::uint8_t>(bits.data(), {2, 4})},
                 rl::k3{}, out);
        }) == shape + ": mask has shape [2, 4], but log_probs has [2, 3]");
  CHECK(said([&] { rl::kl(exec, {.log_probs = l, .reference = r}, rl::k3{}, wide); }) ==
        shape + ": out has shape [2, 4], but log_probs has [2, 3]");
  CHECK(said([&] { rl::kl(exec, {.log_probs = l, .reference = r}, rl::k3{}, r); }) ==
        shape + ": out [2, 3] overlaps reference [2, 3]");
  CHECK(said([&] { rl::kl_loss(exec, {.log_probs = l, .reference = r}, {.coefficient = inf}, out); }) ==
        value + "_loss: coefficient = inf is not finite");
  CHECK(said([&] { rl::kl_loss(exec, {.log_probs = l, .reference = r}, {.normaliser = -2}, out); }) ==
        value + "_loss: normaliser = -2 is negative or not finite");
  CHECK(said([&] { rl::kl_rewards(exec, {.log_probs = l, .reference = r, .scores = three}, {}, out); }) ==
        shape + "_rewards: scores has 3 elements, but the number of sequences has 2");
  CHECK(said([&] { rl::kl_rewards(exec, {.log_probs = l, .reference = r}, {.beta = no_number}, out); }) ==
        value + "_rewards: beta = nan is not finite");
  CHECK(said([&] { rl::kl_rewards(exec, {.log_probs = l, .reference = r}, {}, wide); }) ==
        shape + "_rewards: rewards has shape [2, 4], but log_probs has [2, 3]");
  scores(1) = static_cast<float>(-inf);
  CHECK(said([&] { rl::kl_rewards(exec, {.log_probs = l, .reference = r, .scores = scores}, {}, out); }) ==
        value + "_rewards: scores[1] = -inf is not finite");
  const std::vector<std::int32_t> starts{0, 2, 1, 3};
  CHECK(said([&] { rl::kl_rewards(exec, {.log_probs = l, .reference = r, .cu_seqlens = starts}, {}, out); }) ==
        shape + "_rewards: log_probs has shape [2, 3], but cu_seqlens packs sequences of [tokens] alone");
  const auto packed = [&](std::vector<std::int32_t> s) {
    mlkit::vector<float> tokens({3}), rewards({3});
    s.reserve(1);  // none are still given
    return said(
        [&] { rl::kl_rewards(exec, {.log_probs = tokens, .reference = tokens, .cu_seqlens = s}, {}, rewards); });
  };
  CHECK(packed({}) == shape + "_rewards: cu_seqlens is empty; it has one element more than there are sequences");
  CHECK(packed({1, 3}) == value + "_rewards: cu_seqlens[0] = 1 is not 0");
  CHECK(packed({0, 2, 1, 3}) == value + "_rewards: cu_seqlens[2] = 1 is less than cu_seqlens[1] = 2");
  CHECK(packed({0, 2}) == value + "_rewards: cu_seqlens ends with 2, but there are 3 tokens");
  const mlkit::vector_view<const std::int32_t> every_other(starts.data(), {2}, {3});
  mlkit::vector<float> tokens({3});
  CHECK(said([&] {
          rl::kl_rewards(exec, {.log_probs = tokens, .reference = tokens, .cu_seqlens = every_other}, {}, tokens);
        }) == shape + "_rewards: cu_seqlens has a stride of 3, not 1");
  for (index_t i = 0; i < 6; ++i) CHECK(out.data()[i] == 9);
}
