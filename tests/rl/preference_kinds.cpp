// KTO, the K-wise loss, and log-probabilities of sequences: against their formulas in f64, and TRL's values.
#include "preference.hpp"

namespace rl = mlkit::rl;
using mlkit::cpu;
using namespace rl_test;

TEMPLATE_TEST_CASE("KTO is TRL's, with its reference point", "[rl][preference][kto]", float, double) {
  const double tight = std::is_same_v<TestType, double> ? 1e-13 : 2e-5;
  const auto x = stored_as<TestType>("chosen"), reference = stored_as<TestType>("chosen_ref");
  std::vector<std::uint8_t> desirable;
  for (const double b : stored("desirable")) desirable.push_back(b != 0);
  const double kl = rl::kto_reference_point<TestType>(cpu{}, x, reference);
  CHECK(std::fabs(kl - stored("kto.kl")[0]) < tight);
  CHECK(rl::kto_reference_point<TestType>(cpu{}, reference, x) == 0);  // of a negative mean
  mlkit::vector<TestType> d({37}), each({37});
  const rl::kto_stats s =
      rl::preference_loss<TestType>(cpu{}, {.log_probs = x, .reference = reference, .desirable = desirable},
                                    rl::kto{.beta = 0.3, .kl = kl, .desirable_weight = 1.3, .undesirable_weight = 0.8},
                                    {.log_probs = d, .losses = each});
  double total = 0, good = 0, bad = 0, count = 0;
  for (std::size_t i = 0; i < 37; ++i) {
    const double want = stored("kto.losses")[i];
    total += want / 37;
    CHECK(std::fabs(static_cast<double>(each(static_cast<index_t>(i))) - want) < tight);
    CHECK(std::fabs(static_cast<double>(d(static_cast<index_t>(i))) - stored("kto.d_chosen")[i]) < tight);
    (desirable[i] ? good : bad) += 0.3 * (stored("chosen")[i] - stored("chosen_ref")[i]);
    count += desirable[i];
  }
  CHECK(std::fabs(s.loss - total) < tight);
  CHECK(s.desirable == static_cast<index_t>(count));
  CHECK(s.undesirable == 37 - s.desirable);
  CHECK(std::fabs(s.desirable_reward - good / count) < tight);
  CHECK(std::fabs(s.undesirable_reward - bad / (37 - count)) < tight);
}

TEMPLATE_TEST_CASE("KTO is its formula, for any number and at extremes", "[rl][preference][kto]", float, double) {
  const double tight = std::is_same_v<TestType, double> ? 1e-14 : 1e-5;
  for (const index_t n : {1, 16, 33, 3000}) {
    const auto x = normal_vector<TestType>(n, 41, 5), reference = normal_vector<TestType>(n, 42, 5);
    const std::vector<std::uint8_t> desirable = bytes(n, 43, 0.5);
    const rl::kto loss{.beta = 0.4, .kl = 0.9, .desirable_weight = 0.7, .undesirable_weight = 1.2};
    mlkit::vector<TestType> d({n});
    const auto s =
        rl::preference_loss<TestType>(cpu{}, {.log_probs = x, .reference = reference, .desirable = desirable}, loss,
                                      {.normaliser = 7}, {.log_probs = d});
    double total = 0, worst = 0;
    for (index_t i = 0; i < n; ++i) {
      const bool good = desirable[static_cast<std::size_t>(i)];
      const double z = 0.4 * (static_cast<double>(x(i)) - static_cast<double>(reference(i)) - 0.9);
      total += good ? 0.7 * (1 - sigmoid(z)) : 1.2 * (1 - sigmoid(-z));
      const double want = (good ? -0.7 : 1.2) * 0.4 * sigmoid(z) * sigmoid(-z) / 7;
      worst = std::max(worst, std::fabs(static_cast<double>(d(i)) - want));
    }
    CHECK(worst < tight);
    CHECK(std::fabs(s.loss - total / 7) < tight * (1 + total));
  }
  mlkit::vector<TestType> far({2}), zero({2}), d({2});
  far(0) = 1e4, far(1) = -1e4;
  const auto s = rl::preference_loss<TestType>(
      cpu{}, {.log_probs = far, .reference = zero, .desirable = std::vector<std::uint8_t>{1, 1}}, rl::kto{.beta = 1},
      {.log_probs = d});
  CHECK(s.loss == 0.5);
  CHECK(d(0) == 0);
  CHECK(d(1) == 0);
  CHECK(s.undesirable == 0);
  CHECK(s.undesirable_reward == 0);
}

TEST_CASE("bad input of KTO is refused in words", "[rl][preference][errors]") {
  const std::string shape = "mlkit::shape_error: rl::preference_loss: ",
                    value = "mlkit::value_error: rl::preference_loss: ";
  mlkit::vector<float> x({3}), four({4}), out({3});
  for (index_t i = 0; i < 3; ++i) out(i) = 9;
  const std::vector<std::uint8_t> desirable{1, 0, 1};
  const auto kto = [&](const rl::labelled_completions<float>& in, const rl::kto& loss) {
    return said([&] { rl::preference_loss(cpu{}, in, loss, {.log_probs = out}); });
  };
  CHECK(kto({x, four, desirable}, {}) == shape + "reference has 4 elements, but log_probs has 3");
  CHECK(kto({x, x, {}}, {}) == shape + "desirable has 0 elements, but log_probs has 3");
  CHECK(kto({x, x, desirable}, {.beta = -1}) == value + "beta = -1 is not positive");
  CHECK(kto({x, x, desirable}, {.kl = -1}) == value + "kl = -1 is negative or not finite");
  CHECK(kto({x, x, desirable}, {.desirable_weight = inf}) ==
        value + "desirable_weight = inf is negative or not finite");
  CHECK(kto({x, x, desirable}, {.undesirable_weight = -2}) ==
        value + "undesirable_weight = -2 is negative or not finite");
  x(1) = static_cast<float>(inf);
  CHECK(kto({x, x, desirable}, {}) == value + "log_probs[1] = inf is not finite");
  CHECK(said([&] { rl::kto_reference_point(cpu{}, x, four); }) ==
        "mlkit::shape_error: rl::kto_reference_point: reference has 4 elements, but log_probs has 3");
  CHECK(said([&] { rl::kto_reference_point(cpu{}, x, out); }) ==
        "mlkit::value_error: rl::kto_reference_point: (log_probs - reference)[1] = inf is not finite");
  CHECK(rl::kto_reference_point(cpu{}, mlkit::vector<float>({0}), mlkit::vector<float>({0})) == 0);
  for (index_t i = 0; i < 3; ++i) CHECK(out(i) == 9);
}

TEMPLATE_TEST_CASE("the K-wise loss is the mean over pairs of a prompt", "[rl][preference][k_wise]", float, double) {
  const double tight = std::is_same_v<TestType, double> ? 1e-13 : 1e-5;
  const auto r = stored_as<TestType>("k_wise.rewards");
  mlkit::vector<TestType> d({35});
  auto s = rl::preference_loss<TestType>(cpu{}, {.rewards = r, .of = rl::groups{5}}, rl::k_wise{}, {.rewards = d});
  CHECK(std::fabs(s.loss - stored("k_wise.loss")[0]) < tight);
  for (std::size_t i = 0; i < 35; ++i)
    CHECK(std::fabs(static_cast<double>(d(static_cast<index_t>(i))) - stored("k_wise.d")[i]) < tight);
  CHECK(s.pairs == 70);

  // Groups of all sizes, ranks in any order, some equal.
  const std::vector<std::int32_t> starts{0, 3, 3, 4, 6, 46, 48};
  const std::vector<TestType> rewards = normal<TestType>(48, 44, 3);
  std::vector<std::int32_t> ranks;
  for (int i = 0; i < 48; ++i) ranks.push_back((i * 5 + 2) % 7 - 3);
  ranks[46] = ranks[47];  // the last group has no pair
  mlkit::vector<TestType> out({48});
  const mlkit::vector_view<const TestType> view(rewards.data(), {48});
  s = rl::preference_loss<TestType>(cpu{}, {.rewards = view, .of = rl::groups{starts}, .ranks = {ranks.data(), {48}}},
                                    rl::k_wise{}, {.rewards = out});
  double loss = 0, prompts = 0, right = 0, pairs = 0, better = 0, worse = 0;
  std::vector<double> gradient(48);
  for (std::size_t g = 0; g + 1 < starts.size(); ++g) {
    double of_prompt = 0, count = 0;
    std::vector<double> part(48);
    for (std::size_t i = static_cast<std::size_t>(starts[g]); i < static_cast<std::size_t>(starts[g + 1]); ++i)
      for (std::size_t j = static_cast<std::size_t>(starts[g]); j < static_cast<std::size_t>(starts[g + 1]); ++j)
        if (ranks[i] < ranks[j]) {
          const double x = static_cast<double>(rewards[i]) - static_cast<double>(rewards[j]);
          of_prompt -= log_sigmoid(x);
          part[i] -= sigmoid(-x);
          part[j] += sigmoid(-x);
          right += x > 0;
          better += static_cast<double>(rewards[i]);
          worse += static_cast<double>(rewards[j]);
          ++count;
        }
    if (count == 0) continue;
    ++prompts;
    pairs += count;
    loss += of_prompt / count;
    for (std::size_t i = 0; i < 48; ++i) gradient[i] += part[i] / count;
  }
  CHECK(std::fabs(s.loss - loss / prompts) < 4 * tight);
  CHECK(s.pairs == static_cast<index_t>(pairs));
  CHECK(s.accuracy == Approx(right / pairs));
  CHECK(std::fabs(s.chosen_reward - better / pairs) < 4 * tight);
  CHECK(std::fabs(s.rejected_reward - worse / pairs) < 4 * tight);
  for (std::size_t i = 0; i < 48; ++i)
    CHECK(std::fabs(static_cast<double>(out(static_cast<index_t>(i))) - gradient[i] / prompts) < 4 * tight);
}

TEST_CASE("K-wise with two completions is Bradley-Terry; its gradient is a difference; threads",
          "[rl][preference][k_wise]") {
  const std::vector<double> rewards = normal<double>(60, 45, 2);
  const mlkit::vector_view<const double> view(rewards.data(), {60});
  const auto every_other = [&](index_t from) {
    return mlkit::vector_view<const double>(rewards.data() + from, {30}, {2});
  };
  CHECK(rl::preference_loss<double>(cpu{}, {.rewards = view, .of = rl::groups{2}}, rl::k_wise{}).loss ==
        Approx(rl::preference_loss<double>(cpu{}, {.chosen = every_other(0), .rejected = every_other(1)},
                                           rl::bradley_terry{})
                   .loss)
            .epsilon(1e-14));
  std::vector<double> moved = rewards;
  const mlkit::vector_view<const double> moved_view(moved.data(), {60});
  mlkit::vector<double> d({60});
  rl::preference_loss<double>(cpu{}, {.rewards = moved_view, .of = rl::groups{6}}, rl::k_wise{}, {.rewards = d});
  for (std::size_t i = 0; i < 60; ++i) {
    const auto at = [&](double x) {
      moved[i] = x;
      return rl::preference_loss<double>(cpu{}, {.rewards = moved_view, .of = rl::groups{6}}, rl::k_wise{}).loss;
    };
    const double want = (at(rewards[i] + 1e-6) - at(rewards[i] - 1e-6)) / 2e-6;
    moved[i] = rewards[i];
    CHECK(std::fabs(d(static_cast<index_t>(i)) - want) < 1e-8);
  }
  const mlkit::vector<float> many = normal_vector<float>(9000, 46);
  std::vector<float> want;
  double want_loss = 0;
  for (const int threads : {1, 2, 3, 8}) {
    mlkit::vector<float> out({9000});
    const auto s = rl::preference_loss(cpu{.threads = threads}, {.rewards = many, .of = rl::groups{9}}, rl::k_wise{},
                                       {.rewards = out});
    const std::vector<float> flat(out.begin(), out.end());
    if (threads == 1) want = flat, want_loss = s.loss;
    CHECK(same_bits(flat, want));
    CHECK(s.loss == want_loss);
  }
}

TEST_CASE("K-wise of nothing and bad input", "[rl][preference][errors]") {
  mlkit::vector<float> none({0}), r({4}), five({5}), out({4});
  CHECK(rl::preference_loss(cpu{}, {.rewards = none, .of = rl::groups{4}}, rl::k_wise{}).loss == 0);
  const auto ones = rl::preference_loss(cpu{}, {.rewards = r, .of = rl::groups{1}}, rl::k_wise{}, {.rewards = out});
  CHECK(ones.loss == 0);
  CHECK(ones.pairs == 0);
  const std::string shape = "mlkit::shape_error: rl::preference_loss: ",
                    value = "mlkit::value_error: rl::preference_loss: ";
  const std::vector<std::int32_t> ranks(3);
  CHECK(said([&] { rl::preference_loss(cpu{}, {.rewards = r, .of = rl::groups{3}}, rl::k_wise{}); }) ==
        shape + "rewards has 4 elements, which is no multiple of groups of 3");
  CHECK(said([&] {
          rl::preference_loss(cpu{}, {.rewards = r, .of = rl::groups{4}, .ranks = {ranks.data(), {3}}}, rl::k_wise{});
        }) == shape + "ranks has 3 elements, but rewards has 4");
  CHECK(said([&] {
          rl::preference_loss(cpu{}, {.rewards = r, .of = rl::groups{4}}, rl::k_wise{}, {.rewards = five});
        }) == shape + "gradients.rewards has 5 elements, but rewards has 4");
  r(3) = static_cast<float>(no_number);
  CHECK(said([&] {
          rl::preference_loss(cpu{}, {.rewards = r, .of = rl::groups{4}}, rl::k_wise{}, {.rewards = out});
        }) == value + "rewards[3] = nan is not finite");
}

TEMPLATE_TEST_CASE("log-probabilities of sequences: sums and means of what counts, packed and time-major",
                   "[rl][preference][sequences]", float, double) {
  using T = TestType;
  const double tight = std::is_same_v<T, double> ? 1e-13 : 1e-4;
  for (const auto& [batch, time] : {std::pair{1, 1}, {3, 7}, {5, 16}, {4, 300}})
    for (const double kept : {1.0, 0.5, 0.0})
      for (const auto reduction : {rl::sequence_reduction::sum, rl::sequence_reduction::mean}) {
        mlkit::tensor<T, 2> x = normal_matrix<T>(batch, time, 51, 1, -2), turned({time, batch}), d({batch, time}),
                            d_packed({batch, time}), d_turned({time, batch});
        const std::vector<std::uint8_t> bits = bytes(batch * time, 52, kept);
        const mlkit::matrix_view<const std::uint8_t> mask(bits.data(), {batch, time});
        std::vector<std::uint8_t> turned_bits(bits.size());
        const mlkit::matrix_view<std::uint8_t> turned_mask(turned_bits.data(), {batch, time}, {1, batch});
        const mlkit::vector<T> dy = normal_vector<T>(batch, 53);
        std::vector<std::int32_t> starts;
        for (index_t b = 0; b <= batch; ++b) starts.push_back(static_cast<std::int32_t>(b * time));
        std::vector<double> want(static_cast<std::size_t>(batch)), count(want);
        for (index_t b = 0; b < batch; ++b)
          for (index_t t = 0; t < time; ++t) {
            if (mask(b, t))
              want[static_cast<std::size_t>(b)] += static_cast<double>(x(b, t)), ++count[static_cast<std::size_t>(b)];
            else
              x(b, t) = static_cast<T>(no_number);
            turned(t, b) = x(b, t), turned_mask(b, t) = mask(b, t);
          }
        const index_t n = batch * time;
        const rl::token_batch<T> rows{.log_probs = x, .mask = mask};
        const rl::token_batch<T> columns{.log_probs = transposed(std::as_const(turned)), .mask = turned_mask};
        const rl::token_batch<T> packed{
            .log_probs = mlkit::vector_view<const T>(x.data(), {n}), .mask = bits, .cu_seqlens = starts};
        mlkit::vector<T> y({batch}), y_columns({batch}), y_packed({batch});
        rl::sequence_log_probs(cpu{}, rows, reduction, y);
        rl::sequence_log_probs(cpu{}, columns, reduction, y_columns);
        rl::sequence_log_probs(cpu{}, packed, reduction, y_packed);
        rl::sequence_log_probs_backward(cpu{}, rows, reduction, dy, d);
        rl::sequence_log_probs_backward(cpu{}, columns, reduction, dy, transposed(d_turned));
        rl::sequence_log_probs_backward(cpu{}, packed, reduction, dy, mlkit::vector_view<T>(d_packed.data(), {n}));
        const bool mean = reduction == rl::sequence_reduction::mean;
        for (index_t b = 0; b < batch; ++b) {
          const auto k = static_cast<std::size_t>(b);
          const double over = mean && count[k] > 0 ? count[k] : 1;
          CHECK(std::fabs(static_cast<double>(y(b)) - want[k] / over) < tight);
          CHECK(y_columns(b) == y(b));
          CHECK(y_packed(b) == y(b));
          bool right = true;
          for (index_t t = 0; t < time; ++t) {
            const double w = mask(b, t) ? static_cast<double>(dy(b)) / over : 0;
            right = right && std::fabs(static_cast<double>(d(b, t)) - w) < tight && d_turned(t, b) == d(b, t) &&
                    d_packed(b, t) == d(b, t);
          }
          CHECK(right);
        }
      }
}

TEST_CASE("bad input of sequences is refused in words", "[rl][preference][errors]") {
  const std::string shape = "mlkit::shape_error: rl::sequence_log_probs",
                    value = "mlkit::value_error: rl::sequence_log_probs";
  mlkit::matrix<float> x({2, 3}), d({2, 3});
  mlkit::vector<float> y({2}), three({3});
  const auto sum = rl::sequence_reduction::sum;
  const std::vector<std::uint8_t> bits(4, 1);
  CHECK(said([&] { rl::sequence_log_probs(cpu{}, {.log_probs = x}, sum, three); }) ==
        shape + ": out has 3 elements, but the number of sequences has 2");
  CHECK(said([&] {
          rl::sequence_log_probs(
              cpu{}, {.log_probs = x, .mask = mlkit::matrix_view<const std::uint8_t>(bits.data(), {2, 2})}, sum, y);
        }) == shape + ": mask has shape [2, 2], but log_probs has [2, 3]");
  CHECK(said([&] { rl::sequence_log_probs_backward(cpu{}, rl::token_batch<float>{}, sum, three, d); }) ==
        shape + "_backward: d_out has 3 elements, but the number of sequences has 2");
  const std::vector<std::int32_t> starts{0, 2};
  CHECK(said([&] { rl::sequence_log_probs(cpu{}, {.log_probs = three, .cu_seqlens = starts}, sum, y); }) ==
        value + ": cu_seqlens ends with 2, but there are 3 tokens");
  CHECK(said([&] { rl::sequence_log_probs(cpu{}, {.log_probs = x, .cu_seqlens = starts}, sum, y); }) ==
        shape + ": log_probs has shape [2, 3], but cu_seqlens packs sequences of [tokens] alone");
  CHECK(said([&] { rl::sequence_log_probs_backward(cpu{}, {.cu_seqlens = starts}, sum, y, d); }) ==
        shape + "_backward: d_log_probs has shape [2, 3], but cu_seqlens packs sequences of [tokens] alone");
}
