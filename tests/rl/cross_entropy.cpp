// Cross-entropy with labels that are ignored, shifted and packed, against loops of doubles.
#include <mlkit/rl/cross_entropy.hpp>

#include "fixtures.hpp"
#include "logits_reference.hpp"

namespace rl = mlkit::rl;
using namespace logits_reference;
using mlkit::cpu;
using mlkit::matrix_view;
using mlkit::tensor_view;

namespace {

// Logits [batch, time, classes] and tokens, of which some are ignored; those that are never to be read are NaN.
struct problem {
  index_t batch, time, classes;
  std::vector<double> logits, gradient;
  std::vector<std::int32_t> labels;
  rl::cross_entropy_options options;
  std::vector<std::int32_t> starts;

  problem(index_t b, index_t t, index_t v, std::uint64_t seed) : batch(b), time(t), classes(v) {
    const numbers z(seed), y(seed + 1);
    for (index_t i = 0; i < b * t * v; ++i) logits.push_back(2 * z(i));
    for (index_t i = 0; i < b * t; ++i) labels.push_back(static_cast<std::int32_t>(y.below(i, v)));
    gradient.assign(logits.size(), 7);
  }
  // The label that row i predicts, or -1.
  index_t target(index_t i) const {
    if (options.shift) {
      for (std::int32_t s : starts)
        if (s == i + 1) return -1;
      if (i % time == time - 1) return -1;
      ++i;
    }
    const std::int32_t y = labels[static_cast<std::size_t>(i)];
    return y == options.ignore ? -1 : y;
  }
  std::vector<double> row_of(index_t i) const {
    return {logits.begin() + i * classes, logits.begin() + (i + 1) * classes};
  }
  double naive(std::vector<double>* slopes) const {
    double loss = 0, count = 0;
    for (index_t i = 0; i < batch * time; ++i) count += target(i) >= 0 ? 1 : 0;
    const double n = options.normaliser > 0 ? options.normaliser : std::max(1.0, count);
    const double e = options.label_smoothing, v = static_cast<double>(classes);
    for (index_t i = 0; i < batch * time; ++i) {
      const index_t y = target(i);
      if (y < 0) {
        if (slopes) slopes->insert(slopes->end(), static_cast<std::size_t>(classes), 0.0);
        continue;
      }
      const row r(row_of(i), y, options.temperature);
      double spread = 0;
      for (double l : r.log_p) spread -= l / v;
      loss += (1 - e) * -r.logp + (e > 0 ? e * spread : 0);
      for (index_t j = 0; slopes && j < classes; ++j)
        slopes->push_back((r.p[static_cast<std::size_t>(j)] - (j == y ? 1 - e : 0) - e / v) / n / options.temperature);
    }
    return loss / n;
  }
  void poison() {
    for (index_t i = 0; i < batch * time; ++i)
      if (target(i) < 0) std::fill_n(logits.begin() + i * classes, classes, NAN);
  }
  rl::cross_entropy_result run(const cpu& exec) {
    if (batch == 1)
      return rl::cross_entropy(exec, matrix_view<double>{logits.data(), {time, classes}}, labels, options,
                               matrix_view<double>{gradient.data(), {time, classes}});
    return rl::cross_entropy(exec, tensor_view<double, 3>{logits.data(), {batch, time, classes}},
                             tensor_view<const std::int32_t, 2>{labels.data(), {batch, time}}, options,
                             tensor_view<double, 3>{gradient.data(), {batch, time, classes}});
  }
  void check() {
    poison();
    std::vector<double> slopes;
    const double want = naive(&slopes);
    const auto have = run(cpu{.threads = 2});
    index_t count = 0;
    for (index_t i = 0; i < batch * time; ++i) count += target(i) >= 0 ? 1 : 0;
    CHECK(have.count == count);
    CHECK(close(have.loss, want, 1e-13));
    double error = 0;
    for (std::size_t i = 0; i < slopes.size(); ++i) {
      const double e = std::fabs(gradient[i] - slopes[i]);
      error = std::isfinite(e) ? std::max(error, e) : inf;
    }
    CHECK(error < 1e-14);
  }
};

// What a call says when it refuses, and nothing is written.
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

TEST_CASE("the mean over rows that count", "[rl][cross_entropy]") {
  problem p(3, 7, 11, 1);
  p.check();
  p.labels[3] = p.labels[4] = p.labels[20] = -100;
  p.check();
  problem other(3, 7, 11, 1);
  other.options.ignore = 5;
  other.options.temperature = 0.7;
  other.options.normaliser = 64;
  other.check();
}

TEST_CASE("labels shifted within sequences", "[rl][cross_entropy]") {
  problem p(3, 7, 5, 20);
  p.options.shift = true;
  p.labels[0] = p.labels[1] = p.labels[9] = -100;
  p.check();
  problem one(1, 9, 5, 30);
  one.options.shift = true;
  one.check();
  problem single(4, 1, 5, 40);  // nothing to predict
  single.options.shift = true;
  single.check();
}

TEST_CASE("labels of packed sequences do not cross", "[rl][cross_entropy]") {
  problem p(1, 12, 5, 50);
  p.starts = {0, 3, 3, 4, 9, 12};  // with an empty sequence, and one of a single token
  p.options.cu_seqlens = p.starts;
  p.options.shift = true;
  p.labels[5] = -100;
  p.check();
  // The same loss as the sequences on their own.
  double sum = 0;
  index_t count = 0;
  for (std::size_t s = 0; s + 1 < p.starts.size(); ++s) {
    const index_t first = p.starts[s], n = p.starts[s + 1] - first;
    const std::vector<std::int32_t> labels(p.labels.begin() + first, p.labels.begin() + first + n);
    const auto r = rl::cross_entropy(cpu{}, matrix_view<double>{p.logits.data() + first * 5, {n, 5}}, labels,
                                     {.shift = true, .normaliser = 1});
    sum += r.loss;
    count += r.count;
  }
  const auto whole = p.run(cpu{});
  CHECK(whole.count == count);
  CHECK(close(whole.loss, sum / static_cast<double>(count), 1e-14));
  problem unshifted(1, 12, 5, 50);
  unshifted.options.cu_seqlens = p.starts;
  unshifted.check();
}

TEST_CASE("label smoothing", "[rl][cross_entropy]") {
  problem p(2, 5, 130, 60);
  p.options.label_smoothing = 0.1;
  p.options.temperature = 1.5;
  p.options.shift = true;
  p.check();
  problem one(2, 5, 1, 60);
  one.options.label_smoothing = 0.1;
  one.check();
}

TEST_CASE("the gradient is that of the loss, by differences", "[rl][cross_entropy]") {
  problem p(2, 3, 6, 70);
  p.options.label_smoothing = 0.2;
  p.options.temperature = 0.8;
  p.labels[2] = -100;
  p.run(cpu{});
  const std::vector<double> gradient = p.gradient;
  for (std::size_t i = 0; i < p.logits.size(); ++i) {
    const double before = p.logits[i], step = 1e-6;
    p.logits[i] = before + step;
    const double up = p.run(cpu{}).loss;
    p.logits[i] = before - step;
    const double down = p.run(cpu{}).loss;
    p.logits[i] = before;
    CHECK(std::fabs((up - down) / (2 * step) - gradient[i]) < 1e-8);
  }
}

TEST_CASE("cross-entropies of torch", "[rl][cross_entropy]") {
  for (const std::string name : {"ignored", "shifted", "smoothed"}) {
    const auto of = [&](const std::string& what) { return fixture(name + "." + what, "rl_logits_fixtures.txt"); };
    problem p(2, 5, 7, 1);
    p.logits = of("logits");
    const auto labels = of("labels"), slopes = of("dlogits");
    p.labels.assign(labels.begin(), labels.end());
    p.options.shift = name == "shifted";
    p.options.label_smoothing = name == "smoothed" ? 0.1 : 0;
    CHECK(close(p.run(cpu{}).loss, of("loss")[0], 1e-14));
    double error = 0;
    for (std::size_t i = 0; i < slopes.size(); ++i) error = std::max(error, std::fabs(p.gradient[i] - slopes[i]));
    CHECK(error < 1e-15);
  }
}

TEST_CASE("no row counts", "[rl][cross_entropy]") {
  problem p(2, 3, 6, 80);
  p.labels.assign(6, -100);
  p.check();
  CHECK(p.run(cpu{}).loss == 0);
  const std::vector<std::int32_t> none;
  CHECK(rl::cross_entropy(cpu{}, matrix_view<const double>{nullptr, {0, 5}}, none).count == 0);
}

TEST_CASE("a gradient in the place of the logits", "[rl][cross_entropy]") {
  problem p(1, 40, 70, 90);
  p.labels[7] = -100;
  p.run(cpu{});
  const std::vector<double> apart = p.gradient;
  const matrix_view<double> z{p.logits.data(), {40, 70}};
  rl::cross_entropy(cpu{}, z, p.labels, p.options, z);
  CHECK(p.logits == apart);
}

TEST_CASE("what cross_entropy refuses", "[rl][cross_entropy]") {
  problem p(2, 3, 6, 100);
  const auto says = [&](const std::string& message) {
    CHECK(refusal([&] { p.run(cpu{}); }) == "mlkit::" + message);
    CHECK(p.gradient == std::vector<double>(p.logits.size(), 7));
    p = problem(2, 3, 6, 100);
  };
  p.labels[4] = 6;
  says("value_error: rl::cross_entropy: labels[1, 1] = 6 is outside [0, 6) and not -100, which is ignored");
  p.labels[2] = -1;
  says("value_error: rl::cross_entropy: labels[0, 2] = -1 is outside [0, 6) and not -100, which is ignored");
  p.options.temperature = 0;
  says("value_error: rl::cross_entropy: temperature = 0 is not above 0 and finite");
  p.options.label_smoothing = 1;
  says("value_error: rl::cross_entropy: label_smoothing = 1 is outside [0, 1)");
  p.options.normaliser = -2;
  says("value_error: rl::cross_entropy: normaliser = -2 is negative or not finite");
  const std::vector<std::int32_t> starts{0, 2, 6}, wrong{0, 2, 5}, down{0, 4, 3, 6};
  p.options.cu_seqlens = starts;
  says("shape_error: rl::cross_entropy: labels has shape [2, 3], but cu_seqlens packs sequences of [tokens] alone");
  const auto packed = [&](const std::vector<std::int32_t>& s) {
    problem q(1, 6, 4, 7);
    q.options.cu_seqlens = s;
    return refusal([&] { q.run(cpu{}); });
  };
  CHECK(packed(starts) == "no error");
  CHECK(packed(wrong) == "mlkit::value_error: rl::cross_entropy: cu_seqlens ends with 5, but there are 6 tokens");
  CHECK(packed(down) == "mlkit::value_error: rl::cross_entropy: cu_seqlens[2] = 3 is less than cu_seqlens[1] = 4");
  const std::vector<std::int32_t> five(5);
  CHECK(refusal([&] {
          rl::cross_entropy(cpu{}, matrix_view<double>{p.logits.data(), {6, 6}}, five);
        }) == "mlkit::shape_error: rl::cross_entropy: labels has shape [5], but logits' rows has [6]");
  CHECK(refusal([&] {
          rl::cross_entropy(cpu{}, matrix_view<double>{p.logits.data(), {5, 6}}, five, {},
                            matrix_view<double>{p.logits.data() + 6, {5, 6}});
        }) == "mlkit::shape_error: rl::cross_entropy: dlogits [5, 6] overlaps logits [5, 6]");
}
