// GAE, returns and user's recurrences, on the device and on the CPU, against loops of doubles.
#include "rl_scans.hpp"

#if defined(MLKIT_TEST_ON_CPU)
#include <mlkit/rl.hpp>
#else
#include <mlkit/rl.cuh>
#endif

using namespace scans;

namespace {

template <class T>
outputs<T> gae(device_window<T>& given, const rl::gae_options& options) {
  auto a = given.out(), g = given.out();
  auto in = given.template give<rl::rollout<T>>();
  in.values = given.v.view();
  with_convention(given.w, [&](auto done) {
    rl::gae<T>(given.exec, in, options, {.advantages = a.view(), .returns = g.view()}, done);
  });
  return {a.plain(given.exec), g.plain(given.exec)};
}

outputs<double> naive_gae(const window& w, double gamma, double lambda) {
  return backwards(w, 2, [&](const auto& steps, std::size_t k, const std::vector<double>& behind) {
    const std::size_t i = at(steps[k].t);
    const double rest = steps[k].kind == step::goes_on ? gamma * lambda * behind[0] : 0;
    const double a = w.r[i] + gamma * steps[k].following - w.v[i] + rest;
    return std::vector<double>{a, a + w.v[i]};
  });
}

// x = (1 + r v) / 4 x' + r, whatever the flags are; what ends a sequence is the seed.
struct user_map {
  template <class T>
  MLKIT_HOST_DEVICE rl::affine<T> operator()(T r, T v) const {
    return {(1 + r * v) / 4, r};
  }
};

}  // namespace

TEST_CASE("cuda: gae", "[cuda][rl]") {
  for (const rl::gae_options o : {rl::gae_options{.gamma = 0.99, .lambda = 0.95}, {.gamma = 0, .lambda = 0.5}}) {
    const auto want = [&](const window& w) { return naive_gae(w, o.gamma, o.lambda); };
    check_against<float>([&](device_window<float>& given) { return gae(given, o); }, want);
    if (o.gamma > 0) check_against<double>([&](device_window<double>& given) { return gae(given, o); }, want);
  }
}

TEST_CASE("cuda: discounted returns", "[cuda][rl]") {
  const double gamma = 0.97;
  check_against<float>(
      [&](device_window<float>& given) {
        auto g = given.out();
        with_convention(given.w, [&](auto done) {
          rl::discounted_returns(given.exec, given.give<rl::rollout<float>>(), {.gamma = gamma}, g.view(), done);
        });
        return outputs<float>{g.plain(given.exec)};
      },
      [&](const window& w) {
        return backwards(w, 1, [&](const auto& steps, std::size_t k, const std::vector<double>& behind) {
          const double rest = steps[k].kind == step::goes_on ? behind[0] : steps[k].following;
          return std::vector<double>{w.r[at(steps[k].t)] + gamma * rest};
        });
      },
      4);
}

TEST_CASE("cuda: a user's recurrence, through masked steps", "[cuda][rl]") {
  for (const layout l : {layout::rows, layout::columns})
    for (const auto& [b, t] : wide_shapes)
      for (const bool masked : {false, true}) {
        const window w = make_window(b, t, {.masked = masked, .bootstrap = true});
        device_window<float> given(w, l);
        auto out = given.out();
        rl::scan_options<float> options{.seed = given.boot.view()};
        if (masked) options.mask = given.mask.view();
        const mlkit::tensor_view<const float, 2> r = given.r.view(), v = given.v.view();
        rl::affine_scan(given.exec, user_map{}, options, out.view(), r, v);
        std::vector<double> want(at(b * t));
        for (index_t s = 0; s < b; ++s) {
          double x = w.boot[at(s)];
          for (index_t i = (s + 1) * t - 1; i >= s * t; --i) {
            if (w.counts(i)) x = (1 + w.r[at(i)] * w.v[at(i)]) / 4 * x + w.r[at(i)];
            want[at(i)] = x;
          }
        }
        INFO(text(w, l, 0));
        CHECK(error(out.plain(given.exec), want) < 1e-5);
      }
}

TEST_CASE("cuda: gae gives the same bits again, and for each row or packed sequence alone", "[cuda][rl]") {
  const rl::gae_options o{.gamma = 0.999, .lambda = 0.97};
  for (const window& w :
       {make_window(1, packed_starts.back(), {.bootstrap = true, .starts = packed_starts, .done = 0.001}),
        make_window(5, 600, {.bootstrap = true, .done = 0.001}),
        make_window(2, 3000, {.bootstrap = true, .done = 0.001}),
        make_window(1, 6000, {.bootstrap = true, .starts = {0, 5000, 6000}, .done = 0.001})}) {
    device_window<float> given(w, layout::rows);
    const outputs<float> all = gae(given, o), again = gae(given, o);
    for (std::size_t k = 0; k < 2; ++k) CHECK(same_bits(all[k], again[k]));
    for (index_t s = 0; s < w.sequences(); ++s) {
      const index_t first = w.starts.empty() ? s * w.time : w.starts[at(s)],
                    last = w.starts.empty() ? first + w.time : w.starts[at(s + 1)];
      if (first == last) continue;
      const auto cut = [&](const auto& x) {
        return std::remove_cvref_t<decltype(x)>(x.begin() + first, x.begin() + last);
      };
      window one = w;
      one.batch = 1, one.time = last - first, one.starts.clear();
      for (auto* x : {&one.r, &one.v, &one.fv, &one.log_ratio, &one.expected, &one.q}) *x = cut(*x);
      one.te = cut(w.te), one.tr = cut(w.tr), one.boot = {w.boot[at(s)]};
      device_window<float> alone(one, layout::rows, s % 2);
      const outputs<float> have = gae(alone, o);
      INFO(rollouts::text(w) << ", sequence " << s);
      for (std::size_t k = 0; k < 2; ++k) CHECK(same_bits(have[k], cut(all[k])));
    }
  }
}

TEST_CASE("cuda: gae without flags, with one output, of nothing", "[cuda][rl]") {
  window w = make_window(6, 50, {.bootstrap = true, .done = 0});
  device_window<float> given(w, layout::rows);
  const outputs<float> both = gae(given, {});
  auto a = given.out(), g = given.out();
  rl::gae(given.exec, {.rewards = given.r.view(), .values = given.v.view(), .bootstrap = given.boot.view()}, {},
          {.advantages = a.view()});
  rl::gae(given.exec, {.rewards = given.r.view(), .values = given.v.view(), .bootstrap = given.boot.view()}, {},
          {.returns = g.view()});
  CHECK(same_bits(a.plain(given.exec), both[0]));
  CHECK(same_bits(g.plain(given.exec), both[1]));
  const mlkit::tensor_view<float, 2> empty(nullptr, {0, 7}), no_steps(nullptr, {3, 0});
  rl::gae(given.exec, {.rewards = empty, .values = empty}, {}, {.advantages = empty});
  rl::gae(given.exec, {.rewards = no_steps, .values = no_steps}, {}, {.advantages = no_steps});
}

TEST_CASE("cuda: gae refuses what does not fit before it writes", "[cuda][rl]") {
  device_window<float> given(make_window(3, 20, {.bootstrap = true}), layout::rows),
      other(make_window(3, 21, {.bootstrap = true}), layout::rows);
  auto a = given.out();
  const auto message = [&](auto&& call) {
    try {
      call();
    } catch (const mlkit::error& e) {
      return std::string(e.what());
    }
    return std::string("nothing");
  };
  CHECK(message([&] {
          rl::gae(given.exec, {.rewards = given.r.view(), .values = other.v.view()}, {}, {.advantages = a.view()});
        }) == "mlkit::shape_error: rl::gae: values has shape [3, 21], but rewards has [3, 20]");
  CHECK(message([&] {
          rl::gae(given.exec, {.rewards = given.r.view(), .values = given.v.view()}, {.gamma = 1.5},
                  {.advantages = a.view()});
        }) == "mlkit::value_error: rl::gae: gamma = 1.5 is outside [0, 1]");
  CHECK(message([&] {
          rl::gae(given.exec, {.rewards = given.r.view(), .values = given.v.view()}, {},
                  {.advantages = given.r.view()});
        }) == "mlkit::shape_error: rl::gae: advantages [3, 20] overlaps rewards [3, 20]");
  const std::vector<float> have = a.plain(given.exec);
  CHECK(std::count(have.begin(), have.end(), 7.0f) == 60);
}

#if !defined(MLKIT_TEST_ON_CPU)

TEST_CASE("cuda: what the CPU would refuse is NaN, and starts that make no sense read nothing", "[cuda][rl]") {
  window w = make_window(2, 40, {.done = 0});
  w.tr[10] = 1, w.tr[50] = 1;
  device_window<float> given(w, layout::rows);
  auto a = given.out();
  rl::gae(given.exec, {.rewards = given.r.view(), .values = given.v.view(), .truncated = given.tr.view()}, {},
          {.advantages = a.view()});
  for (const float x : a.plain(given.exec)) CHECK(std::isnan(x));

  window packed = make_window(1, 100, {.bootstrap = true, .starts = {0, 50, 100}});
  packed.starts = {0, 1000, 20};
  device_window<float> senseless(packed, layout::rows);
  auto out = senseless.out();
  auto in = senseless.give<rl::rollout<float>>();
  in.values = senseless.v.view();
  rl::gae(senseless.exec, in, {}, {.advantages = out.view()});
  senseless.exec.synchronize();
}

TEST_CASE("cuda: memory of the host is refused", "[cuda][rl]") {
  device_window<float> given(make_window(3, 20, {.bootstrap = true}), layout::rows);
  if (given.exec.properties().reaches_host_memory) return;
  auto a = given.out();
  std::vector<float> host(60);
  CHECK_THROWS_AS(rl::gae(given.exec,
                          {.rewards = given.r.view(),
                           .values = mlkit::tensor_view<const float, 2>(host.data(), {3, 20}),
                           .bootstrap = given.boot.view()},
                          {}, {.advantages = a.view()}),
                  mlkit::device_error);
}

#endif
