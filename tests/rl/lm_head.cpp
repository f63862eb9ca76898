// The fused language-model head against loops of doubles: wherever logits wait, whatever is masked, packed or rounded.
#include "fixtures.hpp"
#include "head_reference.hpp"

using namespace head_reference;

namespace {

// What a call says when it refuses.
template <class Call>
std::string refusal(const Call& call) {
  try {
    call();
  } catch (const mlkit::error& e) {
    return e.what();
  }
  return "no error";
}

}  // namespace

TEST_CASE("a fused head, its logits kept in dweight, in a workspace or computed again", "[rl][lm_head]") {
  struct shape {
    index_t rows, depth, classes;
  };
  std::uint64_t seed = 0;
  for (const shape s : {shape{1, 1, 1},
                        {1, 3, 2},
                        {3, 5, 17},
                        {64, 64, 33},
                        {65, 70, 300},
                        {70, 96, 300},
                        {70, 8, 5000},
                        {5, 7, 9000},
                        {600, 5, 40},
                        {600, 700, 30},
                        {3100, 3, 12},
                        {130, 33, 1}}) {
    for (const bool accumulate : {false, true}) {
      problem<double> p(s.rows, s.depth, s.classes, seed += 10);
      p.accumulate = accumulate;
      p.temperature = accumulate ? 0.7 : 1;
      p.run(cpu{.threads = 1 + static_cast<int>(seed / 10 % 3)});
      p.require(1e-13, 1e-12);
    }
  }
}

TEST_CASE("rows that are masked are dropped, whatever they hold", "[rl][lm_head]") {
  for (const bool accumulate : {false, true})
    for (const index_t rows : {9, 140, 700}) {
      problem<double> p(rows, 160, 50, 7);
      p.accumulate = accumulate;
      for (index_t i = 0; i < rows; i += 3) {
        p.mask[static_cast<std::size_t>(i)] = 0;
        p.tokens[static_cast<std::size_t>(i)] = -5;
        p.dlogp[static_cast<std::size_t>(i)] = NAN;
      }
      // Naive loops skip them too; what they hold is poisoned for the call alone.
      for (index_t i = 0; i < rows; i += 3) std::fill_n(p.hidden.begin() + i * 160, 160, NAN);
      p.run(cpu{.threads = 2});
      p.require(1e-13, 1e-12);
    }
  problem<double> none(4, 3, 5, 7);
  none.mask.assign(4, 0);
  none.run(cpu{});
  none.require(0, 0);
}

TEST_CASE("a cross-entropy of torch behind its linear layer", "[rl][lm_head]") {
  const auto of = [](const std::string& what) { return fixture("head." + what, "rl_logits_fixtures.txt"); };
  const auto hidden = of("hidden"), weight = of("weight"), labels = of("labels");
  const std::vector<std::int64_t> tokens(labels.begin(), labels.end());
  for (const bool accumulate : {false, true}) {
    std::vector<double> dhidden(hidden.size(), 7), dweight(weight.size());
    const auto result =
        rl::cross_entropy(cpu{}, matrix_view<const double>{hidden.data(), {8, 4}},
                          matrix_view<const double>{weight.data(), {11, 4}}, tokens, {.temperature = 0.8},
                          {.dhidden = matrix_view<double>{dhidden.data(), {8, 4}},
                           .dweight = matrix_view<double>{dweight.data(), {11, 4}},
                           .accumulate_dweight = accumulate});
    CHECK(close(result.loss, of("loss")[0], 1e-14));
    double error = 0;
    for (std::size_t i = 0; i < dhidden.size(); ++i) error = std::max(error, std::fabs(dhidden[i] - of("dhidden")[i]));
    for (std::size_t i = 0; i < dweight.size(); ++i) error = std::max(error, std::fabs(dweight[i] - of("dweight")[i]));
    CHECK(error < 1e-15);
  }
}

TEST_CASE("either gradient alone", "[rl][lm_head]") {
  problem<double> p(70, 96, 300, 11), q(70, 96, 300, 11), both(70, 96, 300, 11);
  p.run(cpu{}, true, false);
  q.run(cpu{}, false, true);
  both.run(cpu{});
  CHECK(p.dhidden == both.dhidden);
  CHECK(p.dweight == std::vector<double>(p.weight.size(), 0.5));
  CHECK(q.dweight == both.dweight);
  CHECK(q.dhidden == std::vector<double>(q.hidden.size(), 7));
  CHECK(p.logp == both.logp);
}

TEST_CASE("sequences of a batch, with strides", "[rl][lm_head]") {
  // hidden [3, 5, 7] and its gradient in a wider matrix, tokens by columns.
  const index_t batch = 3, time = 5, d = 7, v = 20;
  problem<double> p(batch * time, d, v, 19);
  p.run(cpu{});
  std::vector<double> wide(static_cast<std::size_t>(batch * (time + 1) * (d + 2)), NAN), gradient = wide;
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(batch * time));
  std::vector<double> weights(static_cast<std::size_t>(v * d)), dweights(weights.size());
  const mlkit::extents_t<3> shape{batch, time, d}, steps{(time + 1) * (d + 2), d + 2, 1};
  const tensor_view<double, 3> hidden(wide.data(), shape, steps), dhidden(gradient.data(), shape, steps);
  const matrix_view<double> by_columns(weights.data(), {v, d}, {1, v}), dby_columns(dweights.data(), {v, d}, {1, v});
  for (index_t j = 0; j < v; ++j)
    for (index_t k = 0; k < d; ++k) by_columns(j, k) = p.weight[static_cast<std::size_t>(j * d + k)];
  for (index_t b = 0; b < batch; ++b)
    for (index_t t = 0; t < time; ++t) {
      tokens[static_cast<std::size_t>(t * batch + b)] =
          static_cast<std::int32_t>(p.tokens[static_cast<std::size_t>(b * time + t)]);
      for (index_t k = 0; k < d; ++k) hidden(b, t, k) = p.hidden[static_cast<std::size_t>((b * time + t) * d + k)];
    }
  std::vector<double> logp(static_cast<std::size_t>(batch * time));
  const tensor_view<const double, 2> dlogp(p.dlogp.data(), {batch, time}), dentropy(p.dentropy.data(), {batch, time});
  const tensor_view<const std::int32_t, 2> y(tokens.data(), {batch, time}, {1, batch});
  rl::log_probs(cpu{}, hidden, by_columns, y, {}, tensor_view<double, 2>(logp.data(), {batch, time}));
  rl::log_probs_backward(cpu{}, hidden, by_columns, y, {}, {.dlogp = dlogp, .dentropy = dentropy},
                         {.dhidden = dhidden, .dweight = dby_columns});
  double error = 0;
  for (index_t i = 0; i < batch * time; ++i) {
    error = std::max(error, std::fabs(logp[static_cast<std::size_t>(i)] - p.logp[static_cast<std::size_t>(i)]));
    for (index_t k = 0; k < d; ++k)
      error =
          std::max(error, std::fabs(dhidden(i / time, i % time, k) - p.dhidden[static_cast<std::size_t>(i * d + k)]));
  }
  for (index_t j = 0; j < v; ++j)
    for (index_t k = 0; k < d; ++k)
      error = std::max(error, std::fabs(dby_columns(j, k) - p.dweight[static_cast<std::size_t>(j * d + k)]));
  CHECK(error < 1e-12);
  p.require(1e-13, 1e-12);
  index_t padding = 0;
  for (double x : gradient) padding += std::isnan(x) ? 1 : 0;
  CHECK(padding == static_cast<index_t>(gradient.size()) - batch * time * d);
}

TEST_CASE("cross-entropy of a fused head is that of its logits", "[rl][lm_head]") {
  problem<double> p(12, 14, 30, 23);
  const std::vector<std::int32_t> starts{0, 5, 5, 12};
  std::vector<std::int32_t> labels(p.tokens.begin(), p.tokens.end());
  labels[0] = labels[1] = labels[7] = -100;
  const auto result = rl::cross_entropy(cpu{}, p.matrix(p.hidden, 12), p.matrix(p.weight, 30), labels,
                                        {.shift = true, .cu_seqlens = starts, .temperature = 0.9},
                                        {.dhidden = p.matrix(p.dhidden, 12), .dweight = p.matrix(p.dweight, 30)});
  // Rows 0, 6 predict what is ignored; 4 and 11 end their sequences.
  const index_t predicts[] = {-1, 2, 3, 4, -1, 6, -1, 8, 9, 10, 11, -1};
  double loss = 0;
  index_t count = 0;
  p.temperature = 0.9;
  for (index_t i = 0; i < 12; ++i) {
    const auto at = static_cast<std::size_t>(i);
    p.mask[at] = predicts[i] >= 0;
    if (predicts[i] < 0) continue;
    p.tokens[at] = labels[static_cast<std::size_t>(predicts[i])];
    ++count;
  }
  REQUIRE(count == 8);
  p.dlogp.assign(12, -1.0 / 8);
  p.dentropy.assign(12, 0);
  problem<double> by_logp = p;
  rl::log_probs(cpu{}, p.matrix(p.hidden, 12), p.matrix(p.weight, 30), p.tokens, p.options(),
                {.logp = p.vector(p.logp), .entropy = p.vector(p.entropy), .lse = p.vector(p.lse)});
  p.require(1e-13, 1e-12);
  for (index_t i = 0; i < 12; ++i) loss -= p.logp[static_cast<std::size_t>(i)] / 8;
  CHECK(result.count == 8);
  CHECK(close(result.loss, loss, 1e-14));
}

TEST_CASE("the gradient of a fused head, by differences", "[rl][lm_head]") {
  problem<double> p(4, 3, 7, 29);
  const auto loss = [&] {
    rl::log_probs(cpu{}, p.matrix(p.hidden, 4), p.matrix(p.weight, 7), p.tokens, p.options(),
                  {.logp = p.vector(p.logp), .entropy = p.vector(p.entropy)});
    double sum = 0;
    for (std::size_t i = 0; i < 4; ++i) sum += p.dlogp[i] * p.logp[i] + p.dentropy[i] * p.entropy[i];
    return sum;
  };
  p.temperature = 0.8;
  p.run(cpu{});
  for (auto [values, slopes] : {std::pair{&p.hidden, &p.dhidden}, {&p.weight, &p.dweight}})
    for (std::size_t i = 0; i < values->size(); ++i) {
      const double before = (*values)[i], step = 1e-6;
      (*values)[i] = before + step;
      const double up = loss();
      (*values)[i] = before - step;
      const double down = loss();
      (*values)[i] = before;
      CHECK(std::fabs((up - down) / (2 * step) - (*slopes)[i]) < 1e-8);
    }
}

TEST_CASE("what a fused head refuses", "[rl][lm_head]") {
  problem<double> p(4, 3, 6, 37);
  const auto says = [&](const std::string& message) {
    CHECK(refusal([&] { p.run(cpu{}); }) == "mlkit::" + message);
    CHECK(p.logp == std::vector<double>(4, 7));
    CHECK(p.dhidden == std::vector<double>(12, 7));
    CHECK(p.dweight == std::vector<double>(18, 0.5));
    p = problem<double>(4, 3, 6, 37);
  };
  p.tokens[2] = 6;
  says("value_error: rl::log_probs_and_gradient: tokens[2] = 6 is outside [0, 6)");
  p.tokens[1] = -1;
  says("value_error: rl::log_probs_and_gradient: tokens[1] = -1 is outside [0, 6)");
  p.temperature = -1;
  says("value_error: rl::log_probs_and_gradient: temperature = -1 is not above 0 and finite");
  p.tokens.pop_back();
  says("shape_error: rl::log_probs_and_gradient: tokens has shape [3], but hidden's rows has [4]");
  p.mask.pop_back();
  says("shape_error: rl::log_probs_and_gradient: mask has shape [3], but hidden's rows has [4]");
  const auto with = [&](const rl::lm_head_gradients<double, double, 1>& to) {
    return refusal([&] { rl::cross_entropy(cpu{}, p.matrix(p.hidden, 4), p.matrix(p.weight, 6), p.tokens, {}, to); });
  };
  CHECK(with({.dhidden = p.matrix(p.dhidden, 3)}) ==
        "mlkit::shape_error: rl::cross_entropy: dhidden has shape [3, 3], but hidden has [4, 3]");
  CHECK(with({.dweight = p.matrix(p.dweight, 4)}) ==
        "mlkit::shape_error: rl::cross_entropy: dweight has shape [4, 3], but lm_head has [6, 3]");
  CHECK(with({.dweight = p.matrix(p.weight, 6)}) ==
        "mlkit::shape_error: rl::cross_entropy: dweight [6, 3] overlaps lm_head [6, 3]");
  CHECK(refusal([&] {
          rl::cross_entropy(cpu{}, p.matrix(p.hidden, 4), matrix_view<double>{p.weight.data(), {9, 2}}, p.tokens, {});
        }) == "mlkit::shape_error: rl::cross_entropy: lm_head has 2 columns, but hidden has 3");
  CHECK(refusal([&] {
          rl::cross_entropy(cpu{}, p.matrix(p.hidden, 4), p.matrix(p.weight, 6), p.tokens, {.label_smoothing = 0.1});
        }) ==
        "mlkit::value_error: rl::cross_entropy: label_smoothing = 0.1 needs the mean of all logits, which a fused head "
        "does not take; give logits");
}
