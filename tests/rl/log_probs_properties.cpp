// Logits that are hard to take, threads, places of the gradient, rounding, and what log_probs refuses.
#include "rows_reference.hpp"

using namespace rows_reference;
using mlkit::tensor_view;

namespace {

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

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

TEMPLATE_TEST_CASE("logits of +-10,000 and minus infinity", "[rl][log_probs]", float, double) {
  for (const index_t classes : {5, 40, 3000}) {
    problem<TestType> p(6, classes, 3);
    const auto z = p.logits();
    for (index_t j = 0; j < classes; ++j) {
      z(0, j) = static_cast<TestType>(j % 2 ? 1e4 : -1e4);
      z(1, j) += static_cast<TestType>(1e4);
      z(2, j) -= static_cast<TestType>(1e4);
      if (j % 3) z(3, j) = static_cast<TestType>(-inf);
      z(4, j) = static_cast<TestType>(j == 2 ? 1 : -inf);  // one class is possible
    }
    z(5, 1) = static_cast<TestType>(-inf);
    p.tokens = {1, 0, 1, 0, 2, 1};  // the last is impossible
    p.dentropy[4] = 0;
    for (const bool known : {false, true}) {
      p.run(cpu{}, known);
      p.check(sizeof(TestType) == 4 ? 4e-6 : 1e-14);
      CHECK(p.logp[5] == static_cast<TestType>(-inf));
      CHECK(p.logp[4] == 0);
      CHECK(p.entropy[4] == 0);
      for (index_t j = 0; j < classes; ++j) {
        if (j % 3) CHECK(p.gradient()(3, j) == 0);
        CHECK(p.gradient()(4, j) == 0);
      }
      CHECK(p.gradient()(5, 1) == p.dlogp[5]);
    }
  }
}

TEST_CASE("rows without a possible class, and rows that are no numbers", "[rl][log_probs]") {
  problem<float> p(5, 70, 5);
  for (index_t j = 0; j < 70; ++j) p.logits()(1, j) = -INFINITY;
  p.logits()(2, 69) = NAN;
  p.logits()(3, 0) = INFINITY;
  p.run(cpu{}, false);
  CHECK(p.logp[1] == -INFINITY);
  CHECK(p.lse[1] == -INFINITY);
  CHECK(p.entropy[1] == 0);
  for (index_t j = 0; j < 70; ++j) {
    CHECK(p.gradient()(1, j) == 0);
    CHECK(std::isnan(p.gradient()(2, j)));
    CHECK(std::isnan(p.gradient()(3, j)));
    CHECK(std::isfinite(p.gradient()(4, j)));
  }
  CHECK(std::isnan(p.logp[2]));
  CHECK(std::isnan(p.entropy[2]));
  CHECK(std::isnan(p.logp[3]));
  // Derivatives of 0 leave 0 behind, whatever the row is.
  p.dlogp[2] = p.dentropy[2] = 0;
  p.run(cpu{}, true);
  for (index_t j = 0; j < 70; ++j) CHECK(p.gradient()(2, j) == 0);
}

TEST_CASE("masked rows are not read", "[rl][log_probs]") {
  for (const index_t rows : {1, 2, 90})
    for (const bool known : {false, true}) {
      problem<float> p(rows, 4500, 7);
      for (index_t i = 0; i < rows; i += 2) {
        const auto at = static_cast<std::size_t>(i);
        p.mask[at] = 0;
        p.tokens[at] = -1000;
        p.dlogp[at] = p.dentropy[at] = NAN;
        for (index_t j = 0; j < 4500; ++j) p.logits()(i, j) = NAN;
      }
      p.run(cpu{.threads = 2}, known);
      p.check(3e-6);
    }
}

TEST_CASE("log-probabilities have the same bits for any number of threads", "[rl][log_probs]") {
  for (const index_t rows : {1, 3, 5, 100}) {
    problem<float> one(rows, 9001, 11), p = one;
    one.run(cpu{.threads = 1}, false);
    one.check(3e-6);
    for (const int threads : {2, 3, 8}) {
      p.run(cpu{.threads = threads}, threads == 3);
      CHECK(same_bits(p.logp, one.logp));
      CHECK(same_bits(p.entropy, one.entropy));
      CHECK(same_bits(p.lse, one.lse));
      CHECK(same_bits(p.gradient_memory, one.gradient_memory));
    }
  }
}

TEST_CASE("a gradient so large that it goes past the caches", "[rl][log_probs]") {
  problem<float> p(2, 2500007, 13), q(2, 2500007, 13);
  p.run(cpu{.threads = 2}, false);
  q.run(cpu{.threads = 2}, false, true);  // in the place of the logits, where it does not
  CHECK(same_bits(p.gradient_memory, q.gradient_memory));
}

TEST_CASE("a gradient in the place of the logits, of any strides", "[rl][log_probs]") {
  for (const bool columns : {false, true}) {
    problem<double> p(20, 33, 17, 3, columns, 2);
    p.run(cpu{.threads = 2}, false, true);
    p.check(2e-14);
  }
}

TEST_CASE("sequences of a batch", "[rl][log_probs]") {
  const index_t batch = 3, time = 4, classes = 9;
  problem<double> p(batch * time, classes, 19);
  p.run(cpu{}, false);
  // The same steps stored time-major: a view with its first two dimensions exchanged.
  std::vector<double> logits(p.memory.size()), gradient(logits.size()), logp(12), entropy(12);
  std::vector<std::int32_t> tokens(12);
  std::vector<char> mask(12, 1);
  const mlkit::extents_t<3> shape{batch, time, classes}, steps{classes, batch * classes, 1};
  const tensor_view<double, 3> z(logits.data(), shape, steps), dz(gradient.data(), shape, steps);
  for (index_t b = 0; b < batch; ++b)
    for (index_t t = 0; t < time; ++t) {
      tokens[static_cast<std::size_t>(t * batch + b)] =
          static_cast<std::int32_t>(p.tokens[static_cast<std::size_t>(b * time + t)]);
      for (index_t j = 0; j < classes; ++j) z(b, t, j) = p.logits()(b * time + t, j);
    }
  const auto of_steps = [&](auto* data) {
    return mlkit::transposed(tensor_view<std::remove_pointer_t<decltype(data)>, 2>(data, {time, batch}));
  };
  std::vector<index_t> seen(12);
  rl::log_probs_and_gradient(
      cpu{.threads = 3}, z, of_steps(tokens.data()), {.mask = of_steps(mask.data())},
      [&](index_t row, double l, double h) {
        const auto at = static_cast<std::size_t>(row);
        ++seen[at];
        return l == p.logp[at] && h == p.entropy[at] ? rl::token_gradient<double>{p.dlogp[at], p.dentropy[at]}
                                                     : rl::token_gradient<double>{};
      },
      {.logp = of_steps(logp.data()), .entropy = of_steps(entropy.data())}, dz);
  CHECK(seen == std::vector<index_t>(12, 1));
  for (index_t i = 0; i < batch * time; ++i) {
    const index_t b = i / time, t = i % time;
    CHECK(logp[static_cast<std::size_t>(t * batch + b)] == p.logp[static_cast<std::size_t>(i)]);
    for (index_t j = 0; j < classes; ++j) CHECK(dz(b, t, j) == p.gradient()(i, j));
  }
}

TEST_CASE("a loss of log-probabilities alone, and the mean of all of them", "[rl][log_probs]") {
  problem<double> p(8, 21, 23), q = p;
  p.dentropy.assign(8, 0);
  p.run(cpu{}, true);
  rl::log_probs_and_gradient(
      cpu{}, q.logits(), q.tokens, {}, [&](index_t i, double) { return p.dlogp[static_cast<std::size_t>(i)]; }, {},
      q.gradient());
  CHECK(same_bits(p.gradient_memory, q.gradient_memory));
  rl::log_probs_and_gradient(
      cpu{}, q.logits(), q.tokens, {}, [](index_t, double) { return rl::token_gradient<double>{.dmean = 2}; }, {},
      q.gradient());
  for (index_t i = 0; i < 8; ++i) {
    const row r = q.naive(i);
    for (index_t j = 0; j < 21; ++j)
      CHECK(std::fabs(q.gradient()(i, j) - 2 * (1.0 / 21 - r.p[static_cast<std::size_t>(j)])) < 1e-15);
  }
}

TEST_CASE("the gradient, by differences", "[rl][log_probs]") {
  problem<double> p(3, 6, 29);
  p.temperature = 0.6;
  const auto loss = [&] {
    rl::log_probs(cpu{}, p.logits(), p.tokens, p.options(), {.logp = p.of(p.logp), .entropy = p.of(p.entropy)});
    double sum = 0;
    for (std::size_t i = 0; i < 3; ++i) sum += p.dlogp[i] * p.logp[i] + p.dentropy[i] * p.entropy[i];
    return sum;
  };
  p.run(cpu{}, false);
  for (std::size_t i = 0; i < p.memory.size(); ++i) {
    const double before = p.memory[i], step = 1e-6;
    p.memory[i] = before + step;
    const double up = loss();
    p.memory[i] = before - step;
    const double down = loss();
    p.memory[i] = before;
    CHECK(std::fabs((up - down) / (2 * step) - p.gradient_memory[i]) < 1e-8);
  }
}

TEST_CASE("errors are at most twice those of loops in f32", "[rl][log_probs]") {
  for (const double size : {0.1, 3.0, 30.0, 3000.0}) {
    problem<float> p(40, 1000, 31, size);
    p.run(cpu{}, false);
    double error = 0, naive_error = 0, slope_error = 0, naive_slope_error = 0;
    for (index_t i = 0; i < 40; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const row want = p.naive(i);
      float top = -INFINITY, sum = 0;
      for (index_t j = 0; j < 1000; ++j) top = std::max(top, p.logits()(i, j));
      for (index_t j = 0; j < 1000; ++j) sum += std::exp(p.logits()(i, j) - top);
      const float logp = p.logits()(i, p.tokens[at]) - top - std::log(sum);
      const auto relative = [](double x, double y) { return std::fabs(x - y) / std::max(1.0, std::fabs(y)); };
      error = std::max(error, relative(p.logp[at], want.logp));
      naive_error = std::max(naive_error, relative(logp, want.logp));
      float entropy = 0;
      for (index_t j = 0; j < 1000; ++j) {
        const float l = p.logits()(i, j) - top - std::log(sum);
        entropy -= std::exp(l) > 0 ? std::exp(l) * l : 0;
      }
      for (index_t j = 0; j < 1000; ++j) {
        const float l = p.logits()(i, j) - top - std::log(sum), q = std::exp(l);
        const float slope =
            p.dlogp[at] * ((j == p.tokens[at] ? 1.0f : 0.0f) - q) - (q > 0 ? p.dentropy[at] * q * (l + entropy) : 0);
        const double exact = want.gradient(j, p.tokens[at], 1, p.dlogp[at], p.dentropy[at]);
        slope_error = std::max(slope_error, std::fabs(p.gradient()(i, j) - exact));
        naive_slope_error = std::max(naive_slope_error, std::fabs(slope - exact));
      }
    }
    INFO("logits of size " << size);
    CHECK(error <= 2 * naive_error + 1e-7);
    CHECK(slope_error <= 2 * naive_slope_error + 1e-7);
  }
}

TEST_CASE("no rows, and no outputs", "[rl][log_probs]") {
  const std::vector<std::int32_t> none;
  rl::log_probs(cpu{}, matrix_view<const float>{nullptr, {0, 5}}, none, {}, vector_view<float>{nullptr, {0}});
  problem<float> p(3, 4, 37);
  rl::log_probs(cpu{}, p.logits(), p.tokens, {}, rl::log_prob_outputs<float, 1>{});
  // Rows of no classes have no token to ask for.
  const std::vector<std::uint8_t> nothing{0, 0};
  std::vector<float> logp(2, 7);
  rl::log_probs(cpu{}, matrix_view<const float>{nullptr, {2, 0}}, std::vector<std::int32_t>{0, 0}, {.mask = nothing},
                logp);
  CHECK(logp == std::vector<float>{0, 0});
}

TEST_CASE("what log_probs refuses", "[rl][log_probs]") {
  problem<float> p(4, 6, 41);
  const auto says = [&](const std::string& message) {
    CHECK(refusal([&] { p.run(cpu{}, false); }) == "mlkit::" + message);
    CHECK(p.logp == std::vector<float>(4, 7));
    CHECK(p.gradient_memory == std::vector<float>(24, 7));
    p = problem<float>(4, 6, 41);
  };
  p.tokens[3] = 6;
  says("value_error: rl::log_probs: tokens[3] = 6 is outside [0, 6)");
  p.tokens[0] = -2;
  says("value_error: rl::log_probs: tokens[0] = -2 is outside [0, 6)");
  p.temperature = 0;
  says("value_error: rl::log_probs: temperature = 0 is not above 0 and finite");
  p.temperature = INFINITY;
  says("value_error: rl::log_probs: temperature = inf is not above 0 and finite");
  p.temperature = 1e-45;  // whose inverse is no float
  says("value_error: rl::log_probs: temperature = 1e-45 is outside [1e-30, 1e30]");
  p.temperature = 1e300;
  says("value_error: rl::log_probs: temperature = 1e+300 is outside [1e-30, 1e30]");
  p.tokens.push_back(1);
  says("shape_error: rl::log_probs: tokens has shape [5], but logits' rows has [4]");
  p.mask.pop_back();
  says("shape_error: rl::log_probs: mask has shape [3], but logits' rows has [4]");
  p = problem<float>(4, 6, 41);
  const auto with = [&](const rl::log_prob_outputs<float, 1>& out) {
    return refusal([&] { rl::log_probs(cpu{}, p.logits(), p.tokens, {}, out); });
  };
  CHECK(with({.logp = {p.logp.data(), {3}}}) ==
        "mlkit::shape_error: rl::log_probs: logp has shape [3], but logits' rows has [4]");
  CHECK(with({.lse = {nullptr, {4}}}) == "mlkit::value_error: rl::log_probs: lse is null, but has shape [4]");
  CHECK(with({.entropy = {p.memory.data() + 2, {4}}}) ==
        "mlkit::shape_error: rl::log_probs: entropy [4] overlaps logits [4, 6]");
  CHECK(with({.logp = p.of(p.logp), .entropy = p.of(p.logp)}) ==
        "mlkit::shape_error: rl::log_probs: entropy [4] overlaps logp [4]");
  const auto backward = [&](const vector_view<const float>& dlogp, const matrix_view<float>& dz) {
    return refusal([&] { rl::log_probs_backward(cpu{}, p.logits(), p.tokens, {}, {.dlogp = dlogp}, dz); });
  };
  CHECK(backward({p.dlogp.data(), {3}}, p.gradient()) ==
        "mlkit::shape_error: rl::log_probs_backward: dlogp has shape [3], but logits' rows has [4]");
  CHECK(backward({p.dlogp.data(), {4}}, {p.gradient_memory.data(), {4, 5}}) ==
        "mlkit::shape_error: rl::log_probs_backward: dlogits has shape [4, 5], but logits has [4, 6]");
  std::vector<float> longer(30);
  const matrix_view<const float> z(longer.data(), {4, 6});
  CHECK(refusal([&] {
          rl::log_probs_backward(cpu{}, z, p.tokens, {}, {}, matrix_view<float>(longer.data() + 6, {4, 6}));
        }) == "mlkit::shape_error: rl::log_probs_backward: dlogits [4, 6] overlaps logits [4, 6]");
  CHECK(p.gradient_memory == std::vector<float>(24, 7));
}
