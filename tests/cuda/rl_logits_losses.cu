// Cross-entropy and policy losses over logits, on the device and on the CPU, against loops of doubles.
#include <executor.hpp>

#include "../rl/logits_reference.hpp"

#if defined(MLKIT_TEST_ON_CPU)
#include <mlkit/rl.hpp>
#else
#include <mlkit/rl.cuh>
#endif

namespace rl = mlkit::rl;
using namespace logits_reference;

namespace {

std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

template <class T>
std::vector<T> logits_of(index_t n) {
  const numbers number(21);
  std::vector<T> z;
  for (index_t i = 0; i < n; ++i) z.push_back(static_cast<T>(2 * number(i)));
  return z;
}
template <class T>
logits_reference::row row_of(const std::vector<T>& z, index_t row, index_t classes, index_t token, double temperature) {
  std::vector<double> x;
  for (index_t j = 0; j < classes; ++j) x.push_back(static_cast<double>(z[at(row * classes + j)]));
  return {x, token, temperature};
}
template <class T>
inline constexpr double unit = sizeof(T) == 8   ? 1e-12
                               : sizeof(T) == 4 ? 4e-6
                                                : 0x1p-7;

template <class T>
void check_cross_entropy(index_t batch, index_t time, index_t classes, rl::cross_entropy_options o,
                         std::vector<std::int32_t> starts = {}) {
  INFO("[" << batch << ", " << time << ", " << classes << "] " << mlkit::dtype_name<T>() << ", shift " << o.shift
           << ", smoothing " << o.label_smoothing);
  const auto exec = test::exec();
  const numbers number(3);
  const index_t rows = batch * time;
  const auto z = logits_of<T>(rows * classes);
  std::vector<std::int64_t> labels;
  for (index_t i = 0; i < rows; ++i) labels.push_back(i % 5 == 2 ? -100 : number.below(i, classes));
  // What each row predicts, -1 for nothing.
  std::vector<index_t> target(at(rows), -1);
  for (index_t i = 0; i < rows; ++i) {
    const index_t next = i + (o.shift ? 1 : 0);
    if (o.shift && (next % time == 0 || std::count(starts.begin(), starts.end(), next) > 0)) continue;
    if (labels[at(next)] != -100) target[at(i)] = labels[at(next)];
  }
  double count = 0, sum = 0;
  for (const index_t y : target) count += y >= 0;
  const double n = o.normaliser > 0 ? o.normaliser : std::max(1.0, count), e = o.label_smoothing;
  std::vector<double> want(z.size());
  for (index_t i = 0; i < rows; ++i) {
    if (target[at(i)] < 0) continue;
    const auto r = row_of(z, i, classes, target[at(i)], o.temperature);
    double mean = 0;
    for (const double l : r.log_p) mean += l / static_cast<double>(classes);
    sum += -(1 - e) * r.logp - e * mean;
    for (index_t j = 0; j < classes; ++j)
      want[at(i * classes + j)] =
          (r.p[at(j)] - (1 - e) * (j == target[at(i)]) - e / static_cast<double>(classes)) / (n * o.temperature);
  }
  auto logits = test::on_device(exec, z), gradient = test::on_device(exec, z);
  auto y = test::on_device(exec, labels);
  auto offsets = test::on_device(exec, starts);
  if (!starts.empty()) o.cu_seqlens = mlkit::tensor_view<const std::int32_t, 1>(offsets.view());
  const auto check = [&](const auto& zv, const auto& yv, const auto& dv) {
    const rl::cross_entropy_result alone = rl::cross_entropy(exec, zv, yv, o),
                                   both = rl::cross_entropy(exec, zv, yv, o, dv);
    for (const auto& r : {alone, both}) {
      CHECK(r.loss == Approx(sum / n).epsilon(1e-5));
      CHECK(static_cast<double>(r.count) == count);
    }
  };
  if (batch == 1)
    check(mlkit::tensor_view<const T, 2>(logits.view().data, {rows, classes}),
          mlkit::tensor_view<const std::int64_t, 1>(y.view().data, {rows}),
          mlkit::tensor_view<T, 2>(gradient.view().data, {rows, classes}));
  else
    check(mlkit::tensor_view<const T, 3>(logits.view().data, {batch, time, classes}),
          mlkit::tensor_view<const std::int64_t, 2>(y.view().data, {batch, time}),
          mlkit::tensor_view<T, 3>(gradient.view().data, {batch, time, classes}));
  const auto have = test::to_host(exec, gradient);
  bool good = true;
  for (std::size_t i = 0; i < want.size(); ++i)
    good = good && std::fabs(static_cast<double>(have(static_cast<index_t>(i))) - want[i]) <=
                       unit<T> * (std::fabs(want[i]) + 1e-2 / n);
  CHECK(good);
}

template <class T, class Policy, class Aggregation>
void check_policy(const Policy& policy, bool of_sequence, const Aggregation& aggregate, bool by_means, double low,
                  double high) {
  using A = mlkit::accumulator_t<T>;
  const auto exec = test::exec();
  const index_t batch = 4, time = 6, classes = 70, rows = batch * time;
  const numbers number(4);
  const auto z = logits_of<T>(rows * classes);
  std::vector<std::int32_t> tokens;
  std::vector<A> old, advantages;
  std::vector<std::uint8_t> mask;
  const double temperature = 0.8, entropy = 0.05;
  std::vector<logits_reference::row> row;
  for (index_t i = 0; i < rows; ++i) {
    tokens.push_back(static_cast<std::int32_t>(number.below(i, classes)));
    row.push_back(row_of(z, i, classes, tokens.back(), temperature));
    mask.push_back(i % 7 != 3 && i / time != 2);
    old.push_back(mask.back() ? static_cast<A>(row.back().logp + 0.3 * number(1000 + i)) : A(NAN));
    advantages.push_back(mask.back() ? static_cast<A>(number(2000 + i)) : A(NAN));
  }
  double all = 0, used = 0;
  std::vector<double> of(at(batch)), mean(at(batch));
  for (index_t i = 0; i < rows; ++i)
    if (mask[at(i)]) of[at(i / time)] += 1, all += 1;
  for (const double n : of) used += n > 0;
  for (index_t i = 0; i < rows; ++i)
    if (mask[at(i)]) mean[at(i / time)] += (row[at(i)].logp - static_cast<double>(old[at(i)])) / of[at(i / time)];
  double policy_loss = 0, bonus = 0;
  std::vector<double> slope(at(rows)), weight(at(rows)), of_slopes(at(batch));
  for (index_t i = 0; i < rows; ++i) {
    if (!mask[at(i)]) continue;
    const double w = by_means ? 1 / (of[at(i / time)] * used) : 1 / all, a = static_cast<double>(advantages[at(i)]);
    const double r = std::exp(of_sequence ? mean[at(i / time)] : row[at(i)].logp - static_cast<double>(old[at(i)]));
    const double free = -a * r, held = -a * std::min(std::max(r, 1 - low), 1 + high);
    policy_loss += w * std::max(free, held), bonus += w * row[at(i)].entropy;
    weight[at(i)] = w, slope[at(i)] = held > free ? 0 : -a * r;
    of_slopes[at(i / time)] += slope[at(i)] / of[at(i / time)];
  }
  auto logits = test::on_device(exec, z), gradient = test::on_device(exec, z);
  auto y = test::on_device(exec, tokens);
  auto o = test::on_device(exec, old), a = test::on_device(exec, advantages), l = test::on_device(exec, old),
       h = test::on_device(exec, old);
  auto m = test::on_device(exec, mask);
  const auto rows_of = [&](auto& x) {
    auto* data = x.view().data;
    return mlkit::tensor_view<std::remove_pointer_t<decltype(data)>, 2>(data, {batch, time});
  };
  const rl::policy_stats stats = rl::policy_loss(
      exec, mlkit::tensor_view<const T, 3>(logits.view().data, {batch, time, classes}),
      mlkit::tensor_view<const std::int32_t, 2>(y.view().data, {batch, time}), {.temperature = temperature},
      {.old_log_probs = rows_of(o), .advantages = rows_of(a), .mask = rows_of(m)}, policy, aggregate,
      {.entropy = entropy},
      {.logits = mlkit::tensor_view<T, 3>(gradient.view().data, {batch, time, classes}),
       .log_probs = rows_of(l),
       .entropies = rows_of(h)});
  CHECK(stats.policy_loss == Approx(policy_loss).epsilon(1e-4));
  CHECK(stats.entropy == Approx(bonus).epsilon(1e-4));
  CHECK(stats.loss == Approx(policy_loss - entropy * bonus).epsilon(1e-4));
  CHECK(static_cast<double>(stats.tokens) == all);
  const auto d = test::to_host(exec, gradient);
  const auto logp = test::to_host(exec, l), entropies = test::to_host(exec, h);
  bool good = true;
  for (index_t i = 0; i < rows; ++i) {
    const auto& r = row[at(i)];
    if (mask[at(i)])
      good = good && close(static_cast<double>(logp(i)), r.logp, 1e-5) &&
             close(static_cast<double>(entropies(i)), r.entropy, 1e-5);
    else
      good = good && logp(i) == 0 && entropies(i) == 0;
    const double g = weight[at(i)] * (of_sequence ? of_slopes[at(i / time)] : slope[at(i)]);
    for (index_t j = 0; j < classes; ++j) {
      const double want = mask[at(i)] ? r.gradient(j, tokens[at(i)], temperature, g, -entropy * weight[at(i)]) : 0;
      good =
          good && std::fabs(static_cast<double>(d(i * classes + j)) - want) <= 4 * unit<T> * (std::fabs(want) + 1e-2);
    }
  }
  CHECK(good);
}

}  // namespace

TEST_CASE("cuda: cross-entropy", "[cuda][rl]") {
  for (const bool shift : {false, true})
    for (const double smoothing : {0.0, 0.1}) {
      check_cross_entropy<float>(1, 30, 70, {.shift = shift, .label_smoothing = smoothing});
      check_cross_entropy<float>(4, 7, 2100,
                                 {.shift = shift, .normaliser = 50, .label_smoothing = smoothing, .temperature = 0.7});
    }
  check_cross_entropy<float>(1, 30, 33, {.shift = true}, {0, 4, 4, 19, 30});
  check_cross_entropy<double>(2, 7, 70, {.label_smoothing = 0.2});
  check_cross_entropy<mlkit::bf16>(2, 7, 70, {.label_smoothing = 0.2});
  check_cross_entropy<float>(1, 300, 5, {.shift = true});
}

TEST_CASE("cuda: cross-entropy where no label counts, and of no row", "[cuda][rl]") {
  const auto exec = test::exec();
  auto z = test::on_device(exec, std::vector<float>(12, 1.0f)), d = test::on_device(exec, std::vector<float>(12, 7.0f));
  auto y = test::on_device(exec, std::vector<std::int64_t>(4, -100));
  const rl::cross_entropy_result r = rl::cross_entropy(exec, mlkit::tensor_view<const float, 2>(z.view().data, {4, 3}),
                                                       mlkit::tensor_view<const std::int64_t, 1>(y.view()), {},
                                                       mlkit::tensor_view<float, 2>(d.view().data, {4, 3}));
  CHECK(r.loss == 0);
  CHECK(r.count == 0);
  const auto have = test::to_host(exec, d);
  CHECK(std::count(have.data(), have.data() + 12, 0.0f) == 12);
  const rl::cross_entropy_result none = rl::cross_entropy(exec, mlkit::tensor_view<const float, 2>(nullptr, {0, 3}),
                                                          mlkit::tensor_view<const std::int64_t, 1>(nullptr, {0}));
  CHECK(none.count == 0);
}

TEST_CASE("cuda: policy losses over logits", "[cuda][rl]") {
  check_policy<float>(rl::ppo_clip{}, false, rl::token_mean{}, false, 0.2, 0.2);
  check_policy<float>(rl::ppo_clip{}, false, rl::sequence_mean_of_means{}, true, 0.2, 0.2);
  check_policy<double>(rl::gspo{.low = 0.05, .high = 0.05}, true, rl::token_mean{}, false, 0.05, 0.05);
  check_policy<mlkit::bf16>(rl::ppo_clip{}, false, rl::token_mean{}, false, 0.2, 0.2);
}

TEST_CASE("cuda: cross-entropy of logits that lie apart, in place, and the same bits again", "[cuda][rl]") {
  const auto exec = test::exec();
  const index_t rows = 9, classes = 37, row = 2 * classes + 3;
  const auto z = logits_of<float>(rows * row);
  std::vector<std::int64_t> labels;
  for (index_t i = 0; i < rows; ++i) labels.push_back(i == 4 ? -100 : i * 3);
  auto y = test::on_device(exec, labels);
  auto apart = test::on_device(exec, z), again = test::on_device(exec, z);
  std::vector<float> beside;
  for (index_t i = 0; i < rows; ++i)
    for (index_t j = 0; j < classes; ++j) beside.push_back(z[at(i * row + 2 * j)]);
  auto logits = test::on_device(exec, beside), gradient = test::on_device(exec, beside);
  const mlkit::tensor_view<const std::int64_t, 1> of(y.view());
  const auto in_place = [&](auto& x) {
    const mlkit::tensor_view<float, 2> v(x.data(), {rows, classes}, {row, 2});
    return rl::cross_entropy_result(rl::cross_entropy(exec, mlkit::tensor_view<const float, 2>(v), of, {}, v));
  };
  const auto a = in_place(apart), b = in_place(again);
  const rl::cross_entropy_result c =
      rl::cross_entropy(exec, mlkit::tensor_view<const float, 2>(logits.data(), {rows, classes}), of, {},
                        mlkit::tensor_view<float, 2>(gradient.data(), {rows, classes}));
  double loss = 0;
  bool good = true;
  const auto have = test::to_host(exec, apart), second = test::to_host(exec, again),
             plain = test::to_host(exec, gradient);
  for (index_t i = 0; i < rows; ++i) {
    const index_t token = labels[at(i)];
    if (token >= 0) loss -= row_of(beside, i, classes, token, 1).logp / 8;
    for (index_t j = 0; j < row; ++j) {
      const bool is_class = j % 2 == 0 && j < 2 * classes;
      const double want = !is_class   ? static_cast<double>(z[at(i * row + j)])
                          : token < 0 ? 0
                                      : row_of(beside, i, classes, token, 1).gradient(j / 2, token, 1, -1.0 / 8, 0);
      good = good && std::fabs(static_cast<double>(have(i * row + j)) - want) <= 1e-6;
      if (is_class) good = good && std::fabs(static_cast<double>(plain(i * classes + j / 2)) - want) <= 1e-6;
    }
  }
  CHECK(good);
  CHECK(a.loss == Approx(loss).epsilon(1e-5));
  CHECK(c.loss == Approx(loss).epsilon(1e-5));
  CHECK((a.loss == b.loss && a.count == 8));
  CHECK(std::memcmp(have.data(), second.data(), z.size() * sizeof(float)) == 0);
}

TEMPLATE_TEST_CASE("cuda: gradients of 16-bit logits are as exact as loops in their type", "[cuda][rl]", mlkit::bf16,
                   mlkit::f16) {
  const auto exec = test::exec();
  const index_t rows = 40, classes = 130;
  const auto z = logits_of<TestType>(rows * classes);
  std::vector<std::int32_t> labels;
  for (index_t i = 0; i < rows; ++i) labels.push_back(static_cast<std::int32_t>(i * 3));
  auto logits = test::on_device(exec, z), gradient = test::on_device(exec, z);
  auto y = test::on_device(exec, labels);
  (void)rl::cross_entropy(exec, mlkit::tensor_view<const TestType, 2>(logits.data(), {rows, classes}),
                          mlkit::tensor_view<const std::int32_t, 1>(y.view()), {.normaliser = 1},
                          mlkit::tensor_view<TestType, 2>(gradient.data(), {rows, classes}));
  const auto have = test::to_host(exec, gradient);
  double error = 0, naive = 0;
  for (index_t i = 0; i < rows; ++i) {
    const auto want = row_of(z, i, classes, labels[at(i)], 1);
    float sum = 0;
    for (index_t j = 0; j < classes; ++j) sum += std::exp(static_cast<float>(z[at(i * classes + j)]));
    for (index_t j = 0; j < classes; ++j) {
      const double right = want.gradient(j, labels[at(i)], 1, -1, 0);
      const float p = std::exp(static_cast<float>(z[at(i * classes + j)])) / sum;
      const auto rounded = static_cast<TestType>(p - (j == labels[at(i)] ? 1.0f : 0.0f));
      error = std::max(error, std::fabs(static_cast<double>(have(i * classes + j)) - right));
      naive = std::max(naive, std::fabs(static_cast<double>(rounded) - right));
    }
  }
  CHECK(error <= 2 * naive);
}

TEST_CASE("cuda: losses over logits refuse what does not fit, and write nothing", "[cuda][rl]") {
  const auto exec = test::exec();
  auto z = test::on_device(exec, std::vector<float>(60)), d = test::on_device(exec, std::vector<float>(60, 7));
  auto y = test::on_device(exec, std::vector<std::int32_t>(6));
  auto row = test::on_device(exec, std::vector<float>(6));
  const mlkit::tensor_view<const float, 2> logits(z.data(), {6, 10});
  const mlkit::tensor_view<float, 2> gradient(d.data(), {6, 10}), narrow(d.data(), {6, 9});
  const mlkit::tensor_view<const std::int32_t, 1> labels(y.view()), few(y.data(), {5});
  const std::string shape = "mlkit::shape_error: rl::", value = "mlkit::value_error: rl::cross_entropy: ";
  CHECK_THROWS_WITH(rl::cross_entropy(exec, logits, few, {}, gradient),
                    shape + "cross_entropy: labels has shape [5], but logits' rows has [6]");
  CHECK_THROWS_WITH(rl::cross_entropy(exec, logits, labels, {}, narrow),
                    shape + "cross_entropy: dlogits has shape [6, 9], but logits has [6, 10]");
  CHECK_THROWS_WITH(rl::cross_entropy(exec, logits, labels, {.label_smoothing = 1}, gradient),
                    value + "label_smoothing = 1 is outside [0, 1)");
  CHECK_THROWS_WITH(rl::cross_entropy(exec, logits, labels, {.temperature = -2}, gradient),
                    value + "temperature = -2 is not above 0 and finite");
  CHECK_THROWS_WITH(
      rl::ppo_loss(exec, logits, labels, {},
                   {.old_log_probs = mlkit::tensor_view<const float, 1>(row.data(), {5}), .advantages = row.view()}, {},
                   {.logits = gradient}),
      Catch::Contains("old_log_probs has shape [1, 5]"));
  const auto have = test::to_host(exec, d);
  CHECK(std::count(have.data(), have.data() + 60, 7.0f) == 60);
}
