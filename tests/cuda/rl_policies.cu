// Categorical, multi-discrete and Gaussian policies, on the device and on the CPU, against loops of doubles.
#include <executor.hpp>
#include <mlkit/core/random.hpp>
#include <numeric>

#if defined(MLKIT_TEST_ON_CPU)
#include <mlkit/rl.hpp>
#else
#include <mlkit/rl.cuh>
#endif

namespace rl = mlkit::rl;
using mlkit::index_t;
using mlkit::matrix_view;
using mlkit::vector_view;

namespace {

std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

template <class T>
std::vector<T> numbers(index_t n, double scale, std::uint64_t stream) {
  const mlkit::random_stream random{21, stream};
  std::vector<T> x;
  for (index_t i = 0; i < n; ++i) x.push_back(static_cast<T>(scale * random.normal(static_cast<std::uint64_t>(i))));
  return x;
}

// Rounding of one number of T, and what sums of f32 (f64 for f64) come to.
template <class T>
inline constexpr double unit = sizeof(T) == 8                   ? 1e-15
                               : sizeof(T) == 4                 ? 6e-8
                               : std::is_same_v<T, mlkit::bf16> ? 0x1p-8
                                                                : 0x1p-11;
template <class T>
inline constexpr double sums_unit = sizeof(T) == 8 ? 1e-13 : 4e-6;

// A matrix of which the device has the elements `step` apart, and rows after a gap; or turned, columns after each
// other.
template <class T>
struct spread {
  index_t rows, cols, row, step;
  test::operand<T, 1> memory;

  spread(const test::executor& exec, const std::vector<T>& x, index_t n, index_t m, int layout)
      : rows(n),
        cols(m),
        row(layout == 2   ? 1
            : layout == 1 ? 2 * m + 3
                          : m),
        step(layout == 2   ? n
             : layout == 1 ? 2
                           : 1) {
    std::vector<T> y(at(layout == 1 ? n * row : n * m), T(9));
    for (index_t i = 0; i < n; ++i)
      for (index_t j = 0; j < m; ++j) y[at(i * row + j * step)] = x[at(i * m + j)];
    memory = test::on_device(exec, y);
  }
  matrix_view<T> view() { return {memory.data(), {rows, cols}, {row, step}}; }
  // Row by row; what lies between the elements must be as it was.
  std::vector<T> get(const test::executor& exec) {
    const auto y = test::to_host(exec, memory);
    std::vector<T> x, all(y.data(), y.data() + memory.size());
    for (index_t i = 0; i < rows; ++i)
      for (index_t j = 0; j < cols; ++j) {
        x.push_back(y.data()[i * row + j * step]);
        all[at(i * row + j * step)] = T(9);
      }
    CHECK(std::count(all.begin(), all.end(), T(9)) == static_cast<std::ptrdiff_t>(all.size()));
    return x;
  }
};

template <class T>
bool fits(const std::vector<T>& have, const std::vector<double>& want, double relative, double absolute) {
  for (std::size_t i = 0; i < want.size(); ++i)
    if (!(std::fabs(static_cast<double>(have[i]) - want[i]) <= relative * std::fabs(want[i]) + absolute)) return false;
  return have.size() == want.size();
}
template <class A>
std::vector<A> fetch(const test::executor& exec, const test::operand<A, 1>& x) {
  const auto y = test::to_host(exec, x);
  return {y.data(), y.data() + x.size()};
}
template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// Logits of choices side by side, some of them -inf, and possible actions.
template <class T>
struct discrete {
  index_t rows, cols;
  std::vector<index_t> sizes;
  std::vector<T> logits;
  std::vector<std::int32_t> actions;

  discrete(index_t n, std::vector<index_t> of) : rows(n), sizes(std::move(of)) {
    cols = std::accumulate(sizes.begin(), sizes.end(), index_t{0});
    logits = numbers<T>(rows * cols, 2, 1);
    for (index_t i = 0; i < rows * cols; i += 11)
      if (cols > 8) logits[at(i)] = static_cast<T>(-INFINITY);
    each([&](index_t r, std::size_t c, index_t begin) {
      if (sizes[c] == 1) logits[at(r * cols + begin)] = T(1);
      index_t a = (r * 5 + static_cast<index_t>(c)) % sizes[c];
      while (std::isinf(static_cast<double>(logits[at(r * cols + begin + a)]))) a = (a + 1) % sizes[c];
      actions.push_back(static_cast<std::int32_t>(a));
    });
  }
  // f(row, choice, the choice's first column).
  template <class F>
  void each(F&& f) const {
    for (index_t r = 0; r < rows; ++r)
      for (std::size_t c = 0, begin = 0; c < sizes.size(); begin += at(sizes[c++]))
        f(r, c, static_cast<index_t>(begin));
  }
  std::vector<double> probabilities(index_t r, std::size_t c, index_t begin) const {
    std::vector<double> p;
    double top = -INFINITY, sum = 0;
    for (index_t j = 0; j < sizes[c]; ++j) p.push_back(static_cast<double>(logits[at(r * cols + begin + j)]));
    for (const double z : p) top = std::max(top, z);
    for (double& z : p) sum += z = std::exp(z - top);
    for (double& z : p) z /= sum;
    return p;
  }
};

template <class T, class I>
void check_discrete(index_t rows, const std::vector<index_t>& sizes, int layout) {
  using A = mlkit::accumulator_t<T>;
  INFO(mlkit::dtype_name<T>() << " [" << rows << "], " << sizes.size() << " choices, layout " << layout);
  const auto exec = test::exec();
  const discrete<T> d(rows, sizes);
  const auto count = static_cast<index_t>(sizes.size());
  const auto dlogp = numbers<A>(rows, 1, 2), dentropy = numbers<A>(rows, 1, 3);
  std::vector<double> logp(at(rows)), entropy(at(rows)), dz(at(rows * d.cols));
  d.each([&](index_t r, std::size_t c, index_t begin) {
    const std::vector<double> p = d.probabilities(r, c, begin);
    const auto action = static_cast<std::size_t>(d.actions[at(r * count) + c]);
    double h = 0;
    for (const double x : p) h -= x > 0 ? x * std::log(x) : 0;
    logp[at(r)] += std::log(p[action]), entropy[at(r)] += h;
    for (std::size_t j = 0; j < p.size(); ++j)
      dz[at(r * d.cols + begin) + j] =
          static_cast<double>(dlogp[at(r)]) * ((j == action ? 1 : 0) - p[j]) -
          (p[j] > 0 ? static_cast<double>(dentropy[at(r)]) * p[j] * (std::log(p[j]) + h) : 0);
  });
  spread<T> logits(exec, d.logits, rows, d.cols, layout), in_place(exec, d.logits, rows, d.cols, layout),
      out(exec, d.logits, rows, d.cols, layout);
  spread<I> actions(exec, std::vector<I>(d.actions.begin(), d.actions.end()), rows, count, layout);
  auto l = test::on_device(exec, std::vector<A>(at(rows), 7)), h = test::on_device(exec, std::vector<A>(at(rows), 7));
  auto l_slope = test::on_device(exec, dlogp), h_slope = test::on_device(exec, dentropy);
  const rl::policy_derivatives<A> slopes{.dlogp = l_slope.view(), .dentropy = h_slope.view()};
  const rl::multi_discrete<T> policy{.logits = logits.view(), .sizes = sizes};
  rl::log_probs(exec, policy, actions.view(), {.logp = l.view(), .entropy = h.view()});
  CHECK(fits(fetch(exec, l), logp, sums_unit<T>, 4 * sums_unit<T>));
  CHECK(fits(fetch(exec, h), entropy, sums_unit<T>, 4 * sums_unit<T>));
  rl::backward(exec, policy, actions.view(), slopes, out.view());
  const std::vector<T> gradient = out.get(exec);
  CHECK(fits(gradient, dz, unit<T>, 16 * sums_unit<T>));
  rl::backward(exec, rl::multi_discrete<T>{.logits = in_place.view(), .sizes = sizes}, actions.view(), slopes,
               in_place.view());
  CHECK(same_bits(in_place.get(exec), gradient));
  if (count == 1) {
    rl::backward(exec, rl::categorical<T>{.logits = logits.view()}, actions.view(), {.dlogp = l_slope.view()},
                 out.view());
    rl::log_probs(exec, rl::categorical<T>{.logits = logits.view()}, actions.view(), {.logp = l.view()});
    CHECK(fits(fetch(exec, l), logp, sums_unit<T>, 4 * sums_unit<T>));
  }
}

template <class T, class I>
void check_samples(index_t rows, const std::vector<index_t>& sizes, int layout, index_t first) {
  INFO(mlkit::dtype_name<T>() << " [" << rows << "], " << sizes.size() << " choices of " << sizes[0]);
  const auto exec = test::exec();
  const discrete<T> d(rows, sizes);
  const auto count = static_cast<index_t>(sizes.size());
  const mlkit::random_stream random{.seed = 3, .stream = 8};
  spread<T> logits(exec, d.logits, rows, d.cols, layout);
  spread<I> actions(exec, std::vector<I>(at(rows * count), 5), rows, count, layout);
  rl::sample(exec, rl::multi_discrete<T>{.logits = logits.view(), .sizes = sizes}, random, actions.view(), first);
  const std::vector<I> drawn = actions.get(exec);
  bool good = true;
  d.each([&](index_t r, std::size_t c, index_t begin) {
    const std::vector<double> p = d.probabilities(r, c, begin);
    const I a = drawn[at(r * count) + c];
    good = good && a >= 0 && a < static_cast<I>(p.size()) && p[at(a)] > 0;
    if (!good) return;
    const double u = static_cast<double>(random.uniform(static_cast<std::uint64_t>((first + r) * count) + c)),
                 below = std::accumulate(p.begin(), p.begin() + static_cast<std::ptrdiff_t>(a), 0.0);
    good = below <= u + 1e-6 && u <= below + p[at(a)] + 1e-6;  // the first whose cumulated share is above u
  });
  CHECK(good);
  if (!test::emulated) return;  // a GPU's exponential has other last bits
  std::vector<I> of_cpu(drawn.size());
  rl::sample(mlkit::cpu{}, rl::multi_discrete<T>{matrix_view<const T>(d.logits.data(), {rows, d.cols}), sizes}, random,
             matrix_view<I>(of_cpu.data(), {rows, count}), first);
  CHECK(drawn == of_cpu);
}

template <class T>
void check_gaussian(index_t rows, index_t d, bool shared, int layout) {
  using A = mlkit::accumulator_t<T>;
  INFO(mlkit::dtype_name<T>() << " [" << rows << ", " << d << "], shared " << shared << ", layout " << layout);
  const auto exec = test::exec();
  const auto mean = numbers<T>(rows * d, 1, 4), action = numbers<T>(rows * d, 1.5, 5);
  const index_t of_std = shared ? 1 : rows;
  const auto log_std = numbers<T>(of_std * d, 0.5, 6);
  const auto dlogp = numbers<A>(rows, 1, 7), dentropy = numbers<A>(rows, 1, 8);
  std::vector<double> logp(at(rows)), entropy(at(rows)), size(at(rows)), dmean(at(rows * d)), dlog_std(at(of_std * d)),
      spread_of(at(of_std * d)), samples;
  const mlkit::random_stream random{.seed = 4, .stream = 2};
  const index_t first = 11;
  for (index_t r = 0; r < rows; ++r)
    for (index_t c = 0; c < d; ++c) {
      const auto i = at(r * d + c), k = shared ? at(c) : i;
      const double s = static_cast<double>(log_std[k]), sigma = std::exp(s),
                   z = (static_cast<double>(action[i]) - static_cast<double>(mean[i])) / sigma;
      const double dl = static_cast<double>(dlogp[at(r)]), dh = static_cast<double>(dentropy[at(r)]);
      logp[at(r)] -= z * z / 2 + s + std::log(2 * M_PI) / 2, entropy[at(r)] += s + std::log(2 * M_PI * M_E) / 2;
      size[at(r)] += z * z / 2 + std::fabs(s) + 1;
      dmean[i] = dl * z / sigma, dlog_std[k] += dl * (z * z - 1) + dh;
      spread_of[k] += std::fabs(dl) * (z * z + 1) + std::fabs(dh);
      samples.push_back(static_cast<double>(mean[i]) +
                        sigma * static_cast<double>(random.normal(static_cast<std::uint64_t>((first + r) * d + c))));
    }
  spread<T> m(exec, mean, rows, d, layout), a(exec, action, rows, d, layout), s(exec, log_std, of_std, d, layout),
      dm(exec, mean, rows, d, layout), ds(exec, log_std, of_std, d, layout), drawn(exec, mean, rows, d, layout);
  auto l = test::on_device(exec, std::vector<A>(at(rows), 7)), h = test::on_device(exec, std::vector<A>(at(rows), 7));
  auto l_slope = test::on_device(exec, dlogp), h_slope = test::on_device(exec, dentropy);
  const rl::gaussian<T> policy{.mean = m.view(), .log_std = s.view()};
  rl::log_probs(exec, policy, a.view(), {.logp = l.view(), .entropy = h.view()});
  const double largest = size.empty() ? 0 : *std::max_element(size.begin(), size.end());
  CHECK(fits(fetch(exec, l), logp, 0, sums_unit<T> * largest));
  CHECK(fits(fetch(exec, h), entropy, 0, sums_unit<T> * largest));
  std::vector<T> bits;
  for (const int run : {0, 1}) {
    rl::backward(exec, policy, a.view(), {.dlogp = l_slope.view(), .dentropy = h_slope.view()},
                 {.mean = dm.view(), .log_std = ds.view()});
    std::vector<T> all = dm.get(exec), of_log_std = ds.get(exec);
    CHECK(fits(all, dmean, unit<T> + 4 * sums_unit<T>, 1e-7));
    for (std::size_t k = 0; k < spread_of.size(); ++k)
      if (!(std::fabs(static_cast<double>(of_log_std[k]) - dlog_std[k]) <=
            unit<T> * std::fabs(dlog_std[k]) + 4 * sums_unit<T> * spread_of[k]))
        CHECK(static_cast<double>(of_log_std[k]) == dlog_std[k]);
    all.insert(all.end(), of_log_std.begin(), of_log_std.end());
    if (run == 0) bits = all;
    CHECK(same_bits(all, bits));
  }
  rl::sample(exec, policy, random, drawn.view(), first);
  CHECK(fits(drawn.get(exec), samples, unit<T>, 4 * sums_unit<T> * 8));
}

}  // namespace

TEST_CASE("cuda: categorical and multi-discrete policies", "[cuda][rl]") {
  check_discrete<float, std::int32_t>(37, {3, 2, 4}, 0);
  check_discrete<float, std::int64_t>(37, {3, 1, 40}, 1);
  check_discrete<double, std::int64_t>(9, {5, 300}, 2);
  check_discrete<float, std::int32_t>(3, {1500}, 0);
  check_discrete<mlkit::bf16, std::int32_t>(20, {6, 18}, 1);
  check_discrete<mlkit::f16, std::int32_t>(20, {18}, 0);
  check_discrete<float, std::int32_t>(0, {3, 2}, 0);
}

TEST_CASE("cuda: actions are drawn as the random stream says", "[cuda][rl]") {
  check_samples<float, std::int32_t>(300, {3, 2, 4}, 0, 0);
  check_samples<float, std::int64_t>(101, {40, 1}, 1, 1000);
  check_samples<double, std::int32_t>(50, {130}, 2, 5);
  check_samples<mlkit::bf16, std::int32_t>(3, {3000}, 0, 2);
  check_samples<float, std::int32_t>(2, {40003}, 1, 0);
  check_samples<mlkit::f16, std::int32_t>(64, {18}, 0, 0);
}

TEST_CASE("cuda: Gaussian policies", "[cuda][rl]") {
  for (const bool shared : {true, false}) {
    check_gaussian<float>(1, 1, shared, 0);
    check_gaussian<float>(700, 6, shared, 0);
    check_gaussian<float>(67, 33, shared, 1);
    check_gaussian<double>(41, 70, shared, 2);
    check_gaussian<mlkit::bf16>(60, 17, shared, 0);
    check_gaussian<mlkit::f16>(9, 3, shared, 1);
  }
  check_gaussian<float>(0, 3, true, 0);
}

TEST_CASE("cuda: a policy without choices gives sums of nothing", "[cuda][rl]") {
  const auto exec = test::exec();
  auto l = test::on_device(exec, std::vector<float>(300, 7)), h = test::on_device(exec, std::vector<float>(300, 7));
  rl::log_probs(exec, rl::multi_discrete<float>{.logits = {nullptr, {300, 0}}},
                matrix_view<const std::int32_t>(nullptr, {300, 0}), {.logp = l.view(), .entropy = h.view()});
  CHECK((fetch(exec, l) == std::vector<float>(300) && fetch(exec, h) == std::vector<float>(300)));
}

TEST_CASE("cuda: policies refuse what does not fit, and write nothing", "[cuda][rl]") {
  const auto exec = test::exec();
  auto z = test::on_device(exec, std::vector<float>(10)), out = test::on_device(exec, std::vector<float>(10, 7));
  auto y = test::on_device(exec, std::vector<std::int32_t>(4, 1));
  const std::vector<index_t> sizes{3, 2}, few{3}, none{5, 0};
  const matrix_view<const float> logits(z.data(), {2, 5});
  const matrix_view<std::int32_t> actions(y.data(), {2, 2});
  const auto policy = [&](const std::vector<index_t>& s) { return rl::multi_discrete<float>{logits, s}; };
  const vector_view<float> logp(out.data(), {2}), three(out.data(), {3});
  const std::string shape = "mlkit::shape_error: rl::";
  CHECK_THROWS_WITH(rl::log_probs(exec, policy(few), actions, {.logp = logp}),
                    shape + "log_probs: logits has 5 columns, but sizes add up to 3");
  CHECK_THROWS_WITH(rl::log_probs(exec, policy(none), actions, {.logp = logp}),
                    "mlkit::value_error: rl::log_probs: sizes[1] = 0 is not positive");
  CHECK_THROWS_WITH(rl::log_probs(exec, policy(sizes), actions, {.logp = three}),
                    shape + "log_probs: logp has 3 elements, but logits' rows has 2");
  CHECK_THROWS_WITH(rl::backward(exec, policy(sizes), actions, {.dlogp = logp}, matrix_view<float>(out.data(), {2, 4})),
                    shape + "backward: dlogits has shape [2, 4], but logits has [2, 5]");
  CHECK_THROWS_WITH(rl::sample(exec, policy(sizes), {}, actions, -1),
                    "mlkit::value_error: rl::sample: first = -1 is negative");
  const rl::gaussian<float> normal{.mean = {z.data(), {2, 3}}, .log_std = {z.data() + 6, {1, 3}}};
  const matrix_view<float> a(out.data(), {2, 3}), tall(out.data(), {3, 3});
  CHECK_THROWS_WITH(rl::log_probs(exec, normal, tall, {.logp = logp}),
                    shape + "log_probs: actions has shape [3, 3], but mean has [2, 3]");
  CHECK_THROWS_WITH(rl::log_probs(exec, rl::gaussian<float>{normal.mean, {z.data() + 6, {1, 2}}}, a, {}),
                    shape + "log_probs: log_std has 2 columns, but mean has 3");
  CHECK_THROWS_WITH(rl::backward(exec, normal, a, {}, {.mean = {z.data(), {2, 3}}}),
                    shape + "backward: the gradient of mean [2, 3] overlaps mean [2, 3]");
  CHECK_THROWS_WITH(rl::sample(exec, normal, {}, a, -2), "mlkit::value_error: rl::sample: first = -2 is negative");
  CHECK(fetch(exec, out) == std::vector<float>(10, 7));
  CHECK(test::to_host(exec, y) == std::vector<std::int32_t>(4, 1));
}

#if !defined(MLKIT_TEST_ON_CPU)

TEST_CASE("cuda: actions out of range and logits that cannot be drawn from are safe", "[cuda][rl]") {
  const auto exec = test::exec();
  const float inf = INFINITY;
  auto z = test::on_device(exec, std::vector<float>{0, 1, 2, 0, NAN, 2, 0, inf, 2, -inf, -inf, -inf}),
       d = test::on_device(exec, std::vector<float>(12)), l = test::on_device(exec, std::vector<float>(4));
  auto y = test::on_device(exec, std::vector<std::int32_t>(4, 7));
  rl::sample(exec, rl::categorical<float>{matrix_view<const float>(z.data(), {4, 3})}, {},
             matrix_view<std::int32_t>(y.data(), {4, 1}));
  auto drawn = test::to_host(exec, y);
  CHECK((drawn[0] >= 0 && drawn[0] < 3));
  drawn[0] = -1;
  CHECK(drawn == std::vector<std::int32_t>(4, -1));
  auto bad = test::on_device(exec, std::vector<std::int32_t>{0, -1, 3, 1 << 30});
  const std::vector<float> ones(12, 1);
  z = test::on_device(exec, ones);
  const rl::categorical<float> policy{matrix_view<const float>(z.data(), {4, 3})};
  rl::log_probs(exec, policy, matrix_view<const std::int32_t>(bad.data(), {4, 1}), {.logp = l.view()});
  auto slope = test::on_device(exec, std::vector<float>(4, 1));
  rl::backward(exec, policy, matrix_view<const std::int32_t>(bad.data(), {4, 1}), {.dlogp = slope.view()},
               matrix_view<float>(d.data(), {4, 3}));
  const auto logp = fetch(exec, l), gradient = fetch(exec, d);
  for (std::size_t i = 0; i < 12; ++i) CHECK(std::isnan(gradient[i]) == (i >= 3));
  for (std::size_t i = 0; i < 4; ++i) CHECK(std::isnan(logp[i]) == (i >= 1));
}

#endif
