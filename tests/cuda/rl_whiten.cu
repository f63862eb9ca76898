// Moments and whitening, on the device and on the CPU, against loops of doubles.
#include <executor.hpp>
#include <mlkit/core/random.hpp>

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
inline constexpr double unit = sizeof(T) == 8                   ? 1e-13
                               : sizeof(T) == 4                 ? 2e-6
                               : std::is_same_v<T, mlkit::bf16> ? 0x1p-7
                                                                : 0x1p-10;

// batch rows of time elements, `gap` more between rows, `shift` elements behind where memory starts; turned: the view
// is the transposed one.
template <class T>
void check(index_t batch, index_t time, index_t gap, index_t shift, bool masked, bool turned, double mean = 3) {
  INFO("[" << batch << ", " << time << "] " << mlkit::dtype_name<T>() << ", gap " << gap << ", shift " << shift
           << ", masked " << masked << ", turned " << turned);
  const auto exec = test::exec();
  const mlkit::random_stream random{7, 3};
  const index_t step = time + gap;
  std::vector<T> x(at(shift + batch * step));
  std::vector<std::uint8_t> mask(x.size(), 1);
  for (index_t i = 0; i < static_cast<index_t>(x.size()); ++i) {
    x[at(i)] = static_cast<T>(mean + 2 * random.normal(static_cast<std::uint64_t>(i)));
    if (masked && i % 3 == 1) mask[at(i)] = 0, x[at(i)] = static_cast<T>(NAN);
  }
  std::vector<double> kept;
  for (index_t b = 0; b < batch; ++b)
    for (index_t t = 0; t < time; ++t)
      if (mask[at(shift + b * step + t)]) kept.push_back(static_cast<double>(x[at(shift + b * step + t)]));
  double sum = 0, squares = 0;
  for (const double v : kept) sum += v;
  const double n = static_cast<double>(kept.size()), middle = sum / n;
  for (const double v : kept) squares += (v - middle) * (v - middle);
  const double deviation = kept.size() > 1 ? std::sqrt(squares / (n - 1)) : 0;

  auto values = test::on_device(exec, x), out = test::on_device(exec, x);
  auto flags = test::on_device(exec, mask);
  const auto view = [&](auto* data) {
    using U = std::remove_pointer_t<decltype(data)>;
    const mlkit::tensor_view<U, 2> v(data + shift, {batch, time}, {step, 1});
    return turned ? mlkit::transposed(v) : v;
  };
  rl::mask_view<2> m;
  if (masked) m = view(const_cast<const std::uint8_t*>(flags.data()));
  const rl::moments found = rl::find_moments(exec, view(const_cast<const T*>(values.data())), m);
  CHECK(found.count == static_cast<index_t>(kept.size()));
  if (!kept.empty()) {
    CHECK(found.mean == Approx(middle).epsilon(1e-6).margin(1e-7));
    CHECK(found.m2 == Approx(squares).epsilon(2e-6).margin(1e-9));
  }
  const rl::moments used = rl::whiten(exec, view(values.data()), m, {.epsilon = 1e-5});
  CHECK(used.count == found.count);
  (void)rl::whiten(exec, view(const_cast<const T*>(out.data())), m, {.variance_epsilon = 1e-3, .shift_mean = false},
                   view(values.data()));
  (void)rl::whiten(exec, view(out.data()), m, {.epsilon = 1e-5});
  const auto y = test::to_host(exec, out), z = test::to_host(exec, values);
  bool good = true;
  for (index_t b = 0; b < batch; ++b)
    for (index_t t = 0; t < time; ++t) {
      const index_t i = shift + b * step + t;
      const double have = static_cast<double>(y(i)), second = static_cast<double>(z(i));
      if (!mask[at(i)]) {
        good = good && std::isnan(have);
        continue;
      }
      const double centered = static_cast<double>(x[at(i)]) - middle;
      const double want = deviation > 0 ? centered / (deviation + 1e-5) : 0;
      const double other = (deviation > 0 ? centered / (std::sqrt(deviation * deviation + 1e-3) + 1e-8) : 0) + middle;
      good = good && std::fabs(have - want) <= unit<T> * std::max(mean, std::fabs(want));
      good = good && std::fabs(second - other) <= unit<T> * std::max(mean, std::fabs(other));
    }
  CHECK(good);
  CHECK(std::memcmp(y.data(), x.data(), at(shift) * sizeof(T)) == 0);
}

}  // namespace

TEST_CASE("cuda: moments and whitening", "[cuda][rl]") {
  check<float>(1, 1, 0, 0, false, false);
  check<float>(1, 5000, 0, 0, false, false);
  check<float>(1, 9001, 0, 1, true, false);
  check<float>(3, 1700, 5, 2, true, true);
  check<float>(70, 61, 3, 0, true, false);
  check<float>(4, 400, 0, 0, false, true);
  check<double>(3, 1700, 5, 1, true, false, 1e6);
  check<mlkit::bf16>(2, 5000, 0, 3, true, false);
  check<mlkit::bf16>(9, 100, 4, 0, false, true);
  check<mlkit::f16>(2, 1001, 0, 0, true, false);
}

TEST_CASE("cuda: elements of one value, one element, none", "[cuda][rl]") {
  const auto exec = test::exec();
  for (const index_t n : {1, 5, 10000}) {
    auto x = test::on_device(exec, std::vector<double>(at(n), 0.1));
    const rl::moments m = rl::whiten(exec, x.view(), {}, {.epsilon = 0});
    CHECK(m.count == n);
    CHECK(m.mean == 0.1);
    CHECK(m.m2 == 0);
    const auto y = test::to_host(exec, x);
    CHECK(std::all_of(y.data(), y.data() + n, [](double v) { return v == 0; }));
  }
  const rl::moments none = rl::whiten(exec, mlkit::tensor_view<float, 1>(nullptr, {0}));
  CHECK(none == rl::moments{});
  auto x = test::on_device(exec, std::vector<float>{1, 2, 3, 4, 5});
  const rl::moments merged = rl::whiten(exec, x.view(), {}, {.over_ranks = [](const rl::moments& mine) {
                                          return rl::merge(mine, {5, 13, 10});
                                        }});
  CHECK(merged.count == 10);
  CHECK(merged.mean == Approx(8));
}

TEST_CASE("cuda: whitening gives the same bits again", "[cuda][rl]") {
  const auto exec = test::exec();
  const mlkit::random_stream random{7, 4};
  std::vector<float> x(20000);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = random.normal(i);
  auto one = test::on_device(exec, x), two = test::on_device(exec, x);
  (void)rl::whiten(exec, one.view()), (void)rl::whiten(exec, two.view());
  const auto a = test::to_host(exec, one), b = test::to_host(exec, two);
  CHECK(std::memcmp(a.data(), b.data(), x.size() * sizeof(float)) == 0);
}

namespace {

// Running statistics in the executor's memory, and what the host sees of them.
#if defined(MLKIT_TEST_ON_CPU)
rl::running_stats make_stats(const test::executor&, index_t columns) { return rl::running_stats(columns); }
rl::reward_scaling make_scaling(const test::executor&, index_t n, double gamma) { return rl::reward_scaling(n, gamma); }
template <class X>
X look(const test::executor&, const X& x) {
  return x;
}
#else
rl::device_running_stats make_stats(const test::executor& exec, index_t columns) {
  return rl::device_running_stats(exec, columns);
}
rl::device_reward_scaling make_scaling(const test::executor& exec, index_t n, double gamma) {
  return rl::device_reward_scaling(exec, n, gamma);
}
template <class X>
auto look(const test::executor& exec, const X& x) {
  return x.get(exec);
}
#endif

// Rows in three updates, the last of them of the transposed view.
template <class T>
void check_running(index_t rows, index_t columns, bool masked) {
  using A = mlkit::accumulator_t<T>;
  INFO("[" << rows << ", " << columns << "] " << mlkit::dtype_name<T>() << ", masked " << masked);
  const auto exec = test::exec();
  const mlkit::random_stream random{7, 5};
  std::vector<T> x(at(rows * columns)), turned(x.size());
  std::vector<std::uint8_t> mask(at(rows), 1);
  for (index_t r = 0; r < rows; ++r) {
    if (masked && r % 3 == 1) mask[at(r)] = 0;
    for (index_t c = 0; c < columns; ++c)
      x[at(r * columns + c)] = turned[at(c * rows + r)] =
          mask[at(r)] ? static_cast<T>(5 + 2 * random.normal(static_cast<std::uint64_t>(r * columns + c))) : T(NAN);
  }
  auto on = test::on_device(exec, x), turned_on = test::on_device(exec, turned), out = test::on_device(exec, x);
  auto flags = test::on_device(exec, mask);
  auto stats = make_stats(exec, columns), again = make_stats(exec, columns);
  const index_t first = rows / 3, second = rows / 3 + 1;
  for (auto* s : {&stats, &again})
    for (const auto& [from, to, turn] : {std::tuple{index_t{0}, first, false},
                                         {first, second, false},
                                         {second, second, false},
                                         {second, rows, true}}) {
      const mlkit::matrix_view<const T> part =
          turn
              ? mlkit::transposed(mlkit::matrix_view<const T>(turned_on.data() + from, {columns, to - from}, {rows, 1}))
              : mlkit::matrix_view<const T>(on.data() + from * columns, {to - from, columns});
      rl::mask_view<1> kept;
      if (masked) kept = mlkit::vector_view<const std::uint8_t>(flags.data() + from, {to - from});
      s->update(exec, part, kept);
    }
  const rl::running_stats have = look(exec, stats);
  const std::vector<rl::moments> state(have.state().begin(), have.state().end());
  const rl::running_stats second_have = look(exec, again);
  CHECK(std::equal(state.begin(), state.end(), second_have.state().begin()));
  const mlkit::matrix_view<T> in_place(out.data(), {rows, columns});
  stats.normalize(exec, mlkit::matrix_view<const T>(in_place), {.epsilon = 0.5, .clip = 1.5}, in_place);
  auto wide = test::on_device(exec, std::vector<A>(x.size()));
  stats.normalize(exec, mlkit::matrix_view<const T>(on.data(), {rows, columns}),
                  {.epsilon = 0, .clip = INFINITY, .center = false},
                  mlkit::matrix_view<A>(wide.data(), {rows, columns}));
  const auto y = test::to_host(exec, out);
  const auto z = test::to_host(exec, wide);
  bool good = true;
  for (index_t c = 0; c < columns; ++c) {
    double n = 0, mean = 0, squares = 0;
    for (index_t r = 0; r < rows; ++r)
      if (mask[at(r)]) mean += static_cast<double>(x[at(r * columns + c)]), n += 1;
    mean /= n;
    for (index_t r = 0; r < rows; ++r)
      if (mask[at(r)]) squares += std::pow(static_cast<double>(x[at(r * columns + c)]) - mean, 2);
    good = good && static_cast<double>(have.count()) == n && std::fabs(have.mean(c) - mean) < 1e-5 &&
           std::fabs(have.variance(c) - squares / n) < 4e-5;
    for (index_t r = 0; r < rows; ++r) {
      const double v = static_cast<double>(x[at(r * columns + c)]),
                   want = std::clamp((v - mean) / std::sqrt(squares / n + 0.5), -1.5, 1.5),
                   other = v / std::sqrt(squares / n), close = static_cast<double>(y(r * columns + c));
      if (!mask[at(r)])
        good = good && std::isnan(close);
      else
        good = good && std::fabs(close - want) <= 3 * unit<T> &&
               std::fabs(static_cast<double>(z(r * columns + c)) - other) <= 2e-5;
    }
  }
  CHECK(good);
}

}  // namespace

TEST_CASE("cuda: running statistics are those of all rows so far", "[cuda][rl]") {
  check_running<float>(700, 1, false);
  check_running<float>(9000, 1, true);
  check_running<float>(700, 17, true);
  check_running<double>(300, 3, true);
  check_running<float>(290, 70, false);
  check_running<mlkit::bf16>(150, 40, false);
  const auto exec = test::exec();
  auto x = test::on_device(exec, std::vector<float>(5000, 0.1f));
  auto stats = make_stats(exec, 1);
  stats.update(exec, mlkit::matrix_view<const float>(x.data(), {5000, 1}));
  stats.update(exec, mlkit::matrix_view<const float>(nullptr, {0, 1}));
  const rl::running_stats have = look(exec, stats);
  CHECK((have.count() == 5000 && have.mean() == static_cast<double>(0.1f) && have.variance() == 0));
}

TEST_CASE("cuda: elements farther from their mean than the largest float, and one value with the least epsilons",
          "[cuda][rl]") {
  const auto exec = test::exec();
  std::vector<float> x(12, -3e38f);
  for (std::size_t i = 9; i < 12; ++i) x[i] = 3e38f;
  auto on = test::on_device(exec, x), out = test::on_device(exec, x);
  const mlkit::matrix_view<const float> v(on.data(), {4, 3});
  const mlkit::matrix_view<float> to(out.data(), {4, 3});
  const auto good = [&] {
    const auto y = test::to_host(exec, out);
    bool all = true;
    for (index_t i = 0; i < 12; ++i)
      all = all && std::fabs(static_cast<double>(y(i)) - (i >= 9 ? std::sqrt(3.0) : -1 / std::sqrt(3.0))) < 1e-6;
    return all;
  };
  (void)rl::whiten(exec, v, {}, {.variance = rl::variance_of::population}, to);
  CHECK(good());
  auto stats = make_stats(exec, 3);
  stats.update(exec, v);
  stats.normalize(exec, v, {}, to);
  CHECK(good());
  on = test::on_device(exec, std::vector<float>(12, 2.5f));
  const mlkit::matrix_view<const float> one(on.data(), {4, 3});
  for (const double epsilon : {0.0, 1e-80, 1e-300}) {
    auto equal = make_stats(exec, 3);
    equal.update(exec, one);
    equal.normalize(exec, one, {.epsilon = epsilon}, to);
    const auto y = test::to_host(exec, out);
    CHECK(std::count(y.data(), y.data() + 12, 0.0f) == 12);
  }
}

TEST_CASE("cuda: rewards are divided by the deviation of discounted returns", "[cuda][rl]") {
  const auto exec = test::exec();
  const index_t environments = 300, time = 20;
  const mlkit::random_stream random{7, 6};
  std::vector<float> r(at(environments * time));
  std::vector<std::uint8_t> ended(r.size());
  for (std::size_t i = 0; i < r.size(); ++i) r[i] = 1 + random.normal(i), ended[i] = i % 11 == 3;
  auto rewards = test::on_device(exec, r), out = test::on_device(exec, r);
  auto done = test::on_device(exec, ended);
  auto scaling = make_scaling(exec, environments, 0.9);
  for (const auto& [from, to] : {std::pair<index_t, index_t>{0, 13}, {13, 20}})
    scaling.update(exec, mlkit::matrix_view<const float>(rewards.data() + from, {environments, to - from}, {time, 1}),
                   mlkit::matrix_view<const std::uint8_t>(done.data() + from, {environments, to - from}, {time, 1}));
  double sum = 0, squares = 0;
  std::vector<double> last;
  for (index_t b = 0; b < environments; ++b) {
    double now = 0;
    for (index_t t = 0; t < time; ++t) {
      now = 0.9 * now + static_cast<double>(r[at(b * time + t)]);
      sum += now, squares += now * now;
      if (ended[at(b * time + t)]) now = 0;
    }
    last.push_back(now);
  }
  const double n = static_cast<double>(r.size()), variance = squares / n - sum / n * (sum / n);
  const rl::reward_scaling have = look(exec, scaling);
  CHECK(have.stats().variance() == Approx(variance).epsilon(1e-9));
  for (std::size_t b = 0; b < last.size(); ++b) CHECK(have.returns()[b] == Approx(last[b]).epsilon(1e-12));
  const mlkit::matrix_view<const float> all(rewards.data(), {environments, time});
  scaling.scale(exec, all, {.clip = 0.7}, mlkit::matrix_view<float>(out.data(), {environments, time}));
  const auto y = test::to_host(exec, out);
  bool good = true;
  for (std::size_t i = 0; i < r.size(); ++i) {
    const double want = std::clamp(static_cast<double>(r[i]) / std::sqrt(variance + 1e-8), -0.7, 0.7);
    good = good && std::fabs(static_cast<double>(y(static_cast<index_t>(i))) - want) < 1e-6;
  }
  CHECK(good);
}

TEST_CASE("cuda: running statistics refuse what does not fit, and take nothing in", "[cuda][rl]") {
  const auto exec = test::exec();
  auto stats = make_stats(exec, 9);
  auto x = test::on_device(exec, std::vector<float>(36, 1)), out = test::on_device(exec, std::vector<float>(36, 7));
  const mlkit::matrix_view<const float> v(x.data(), {4, 9}), narrow(x.data(), {4, 8});
  const mlkit::matrix_view<float> to(out.data(), {4, 8});
  auto flags = test::on_device(exec, std::vector<std::uint8_t>(3, 1));
  const std::string update = "rl::running_stats::update: ", normalize = "rl::running_stats::normalize: ";
  CHECK_THROWS_WITH(stats.update(exec, narrow), "mlkit::shape_error: " + update + "x has 8 columns, but this has 9");
  CHECK_THROWS_WITH(stats.update(exec, v, mlkit::vector_view<const std::uint8_t>(flags.view())),
                    "mlkit::shape_error: " + update + "mask has shape [3], but a column of x has [4]");
  CHECK_THROWS_WITH(stats.normalize(exec, v, {}, to),
                    "mlkit::shape_error: " + normalize + "out has shape [4, 8], but x has [4, 9]");
  CHECK_THROWS_WITH(stats.normalize(exec, v, {.clip = 0}, mlkit::matrix_view<float>(out.data(), {4, 9})),
                    "mlkit::value_error: " + normalize + "clip = 0 is not positive");
  auto scaling = make_scaling(exec, 4, 0.9);
  CHECK_THROWS_WITH(scaling.update(exec, v, {}),
                    "mlkit::shape_error: rl::reward_scaling::update: ended has shape [0, 0], but rewards has [4, 9]");
  CHECK_THROWS_WITH(make_stats(exec, 0), "mlkit::value_error: rl::running_stats: columns = 0 is less than 1");
  CHECK_THROWS_WITH(make_scaling(exec, 4, 1.5),
                    "mlkit::value_error: rl::reward_scaling: gamma = 1.5 is outside [0, 1]");
  CHECK(look(exec, stats).count() == 0);
  const auto have = test::to_host(exec, out);
  CHECK(std::count(have.data(), have.data() + 36, 7.0f) == 36);
}

#if !defined(MLKIT_TEST_ON_CPU)

TEST_CASE("cuda: running statistics go on from those of the host, and NaN stays in its column", "[cuda][rl]") {
  const auto exec = test::exec();
  rl::running_stats host(2);
  const mlkit::matrix<double> seen({3, 2});
  host.update(mlkit::cpu{}, seen);
  rl::device_running_stats stats(exec, host);
  auto x = test::on_device(exec, std::vector<double>{3, 1});
  stats.update(exec, mlkit::matrix_view<const double>(x.data(), {1, 2}));
  const rl::running_stats have = stats.get(exec);
  CHECK((have.count() == 4 && have.mean(0) == 0.75 && have.variance(1) == 0.1875));
  rl::reward_scaling scaling(3, 0.5);
  const mlkit::matrix<float> rewards({3, 1});
  scaling.update(mlkit::cpu{}, rewards,
                 mlkit::matrix_view<const std::uint8_t>(std::array<std::uint8_t, 3>{}.data(), {3, 1}));
  const rl::reward_scaling same = rl::device_reward_scaling(exec, scaling).get(exec);
  CHECK((same.gamma() == 0.5 && same.stats().count() == 3 && same.returns().size() == 3));

  auto bad = test::on_device(exec, std::vector<double>{NAN, 2});
  stats.update(exec, mlkit::matrix_view<const double>(bad.data(), {1, 2}));
  auto out = test::on_device(exec, std::vector<double>(2));
  stats.normalize(exec, mlkit::matrix_view<const double>(x.data(), {1, 2}), {},
                  mlkit::matrix_view<double>(out.data(), {1, 2}));
  const auto y = test::to_host(exec, out);
  CHECK((std::isnan(y(0)) && y(1) == Approx(0.4 / std::sqrt(0.64 + 1e-8))));
  CHECK_THROWS_WITH(stats.get(exec),
                    "mlkit::value_error: rl::running_stats::restore: state[0] has count 5, mean nan, m2 nan");
}

#endif
