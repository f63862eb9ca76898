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
