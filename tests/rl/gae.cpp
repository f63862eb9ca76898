// Generalized advantage estimation against its definition, a sum of discounted errors, and against TorchRL.
#include <mlkit/rl/advantages.hpp>

#include "rollouts.hpp"

using namespace rollouts;

namespace {

// A_t = sum over k of (gamma lambda)^k (r_{t+k} + gamma v' - V_{t+k}) to the episode's or window's end.
outputs<double> naive(const window& w, double gamma, double lambda) {
  outputs<double> out(2, std::vector<double>(at(w.batch * w.time)));
  for (index_t s = 0; s < w.sequences(); ++s) {
    const std::vector<step> steps = w.resolve(s);
    for (std::size_t k = 0; k < steps.size(); ++k) {
      double sum = 0, weight = 1;
      for (std::size_t j = k; j < steps.size(); ++j) {
        const std::size_t i = at(steps[j].t);
        sum += weight * (w.r[i] + gamma * steps[j].following - w.v[i]);
        weight *= gamma * lambda;
        if (steps[j].kind != step::goes_on || std::fabs(weight) < 1e-40) break;
      }
      out[0][at(steps[k].t)] = sum;
      out[1][at(steps[k].t)] = sum + w.v[at(steps[k].t)];
    }
  }
  return out;
}

template <class T>
outputs<T> run(const mlkit::cpu& exec, arguments<T>& given, const rl::gae_options& options) {
  stored<T> a = given.out(), g = given.out();
  if (given.w.begins)
    rl::gae<T>(exec, given.rollout(), options, {.advantages = a.view(), .returns = g.view()}, rl::done_begins{});
  else
    rl::gae<T>(exec, given.rollout(), options, {.advantages = a.view(), .returns = g.view()});
  return {a.plain(), g.plain()};
}

template <class T>
void check_values() {
  for (const rl::gae_options o : {rl::gae_options{.gamma = 0.99, .lambda = 0.95},
                                  {.gamma = 1, .lambda = 1},
                                  {.gamma = 0, .lambda = 0.5},
                                  {.gamma = 0.9, .lambda = 0}})
    each_window([&](const window& w) {
      const outputs<double> want = naive(w, static_cast<double>(static_cast<T>(o.gamma)), o.lambda);
      for (const layout l : {layout::rows, layout::columns}) {
        arguments<T> given(w, l);
        const outputs<T> have = run(mlkit::cpu{}, given, o);
        INFO(text(w) << ", gamma " << o.gamma << ", lambda " << o.lambda << ", layout " << static_cast<int>(l));
        // Sums of up to 1100 numbers with gamma = lambda = 1.
        for (std::size_t i = 0; i < 2; ++i) REQUIRE(error(have[i], want[i]) < (o.gamma == 1 ? 10 : 1) * tolerance<T>);
      }
    });
}

}  // namespace

TEST_CASE("advantages are sums of discounted errors", "[rl][gae]") {
  check_values<float>();
  check_values<double>();
}

TEST_CASE("gae: layouts, threads, packing and neighbours change no bit", "[rl][gae]") {
  check_bits<float>([](const mlkit::cpu& exec, arguments<float>& given) {
    return run(exec, given, {.gamma = 0.999, .lambda = 0.97});
  });
}

TEST_CASE("gae: termination and truncation at every position", "[rl][gae]") {
  const std::vector<double> r{1, 2, 3, 4, 5}, v{10, 20, 30, 40, 50}, fv{100, 200, 300, 400, 500};
  const double gamma = 0.5, lambda = 0.5;
  for (const bool truncated : {false, true})
    for (index_t end = 0; end < 5; ++end) {
      std::vector<std::uint8_t> te(5), tr(5);
      (truncated ? tr : te)[at(end)] = 1;
      std::vector<double> a(5), g(5);
      rl::gae<double>(mlkit::cpu{}, {.rewards = r, .values = v, .terminated = te, .truncated = tr, .final_values = fv},
                      {.gamma = gamma, .lambda = lambda}, {.advantages = a, .returns = g});
      for (index_t t = 0; t < 5; ++t) {
        // Up to the episode's end, the advantage mixes n-step returns: (1 - lambda) sum of lambda^(n-1) G_n, the rest
        // of the weight on the longest.
        const index_t last = t <= end ? end : 4;
        double discounted = 0, weight = 1, mixed = 0, scale = 1;
        for (index_t k = t; k <= last; ++k) {
          discounted += scale * r[at(k)];
          scale *= gamma;
          const double behind = k == end && !truncated ? 0 : k == end || k == 4 ? fv[at(k)] : v[at(k + 1)];
          const double n_step = discounted + scale * behind;
          mixed += weight * (k == last ? 1 : 1 - lambda) * n_step;
          weight *= lambda;
        }
        INFO((truncated ? "truncated" : "terminated") << " at " << end << ", t " << t);
        CHECK(g[at(t)] == Approx(mixed).epsilon(1e-14));
        CHECK(a[at(t)] == Approx(mixed - v[at(t)]).epsilon(1e-14));
      }
    }
}

TEST_CASE("gae: what is not finite stays in its episode", "[rl][gae]") {
  window w = make_window(2, 40, {.done = 0});
  w.te[20] = 1;  // row 0, step 20
  w.v[30] = not_a_number;
  arguments<float> given(w, layout::rows);
  const outputs<float> have = run(mlkit::cpu{}, given, {.gamma = 0.99, .lambda = 0.95});
  for (std::size_t i = 0; i < 80; ++i) {
    INFO(i);
    CHECK(std::isnan(have[0][i]) == (i > 20 && i <= 30));
  }
}

TEST_CASE("gae: outputs that are left out, inputs that are not there", "[rl][gae]") {
  window w = make_window(6, 50, {.bootstrap = true, .done = 0});
  arguments<float> given(w, layout::rows);
  const outputs<float> both = run(mlkit::cpu{}, given, {});
  stored<float> a = given.out(), g = given.out();
  rl::gae(mlkit::cpu{}, {.rewards = given.r.view(), .values = given.v.view(), .bootstrap = given.boot}, {},
          {.advantages = a.view()});
  rl::gae(mlkit::cpu{}, {.rewards = given.r.view(), .values = given.v.view(), .bootstrap = given.boot}, {},
          {.returns = g.view()});
  CHECK(same_bits(a.plain(), both[0]));
  CHECK(same_bits(g.plain(), both[1]));
  std::vector<float> none;
  rl::gae(mlkit::cpu{}, {.rewards = none, .values = none}, {}, {.advantages = none});
  mlkit::matrix<float> empty({0, 7}), no_steps({3, 0});
  rl::gae(mlkit::cpu{}, {.rewards = empty, .values = empty}, {}, {.advantages = empty});
  rl::gae(mlkit::cpu{}, {.rewards = no_steps, .values = no_steps}, {}, {.advantages = no_steps});
}

TEST_CASE("gae: rows of a batch beyond the caches are those of each alone", "[rl][gae]") {
  const index_t batch = 530, time = 512;
  const window w = make_window(batch, time, {.bootstrap = true, .done = 0.002});
  for (const bool columns : {false, true}) {
    const mlkit::extents_t<2> shape = columns ? mlkit::extents_t<2>{time, 544} : mlkit::extents_t<2>{batch, time};
    mlkit::matrix<float> r(shape), v(shape), fv(shape), a(shape), g(shape);  // aligned, unlike a vector's
    std::vector<std::uint8_t> te(at(r.size())), tr(at(r.size()));
    const auto view = [&](auto* data) {
      using U = std::remove_pointer_t<decltype(data)>;
      return mlkit::tensor_view<U, 2>(data, {batch, time}, {columns ? 1 : time, columns ? 544 : 1});
    };
    for (index_t b = 0; b < batch; ++b)
      for (index_t t = 0; t < time; ++t) {
        const std::size_t i = at(b * time + t);
        view(r.data())(b, t) = static_cast<float>(w.r[i]), view(v.data())(b, t) = static_cast<float>(w.v[i]);
        view(fv.data())(b, t) = static_cast<float>(w.fv[i]);
        view(te.data())(b, t) = w.te[i], view(tr.data())(b, t) = w.tr[i];
      }
    std::vector<float> boot(w.boot.begin(), w.boot.end());
    rl::gae(mlkit::cpu{.threads = 3},
            {.rewards = view(r.data()),
             .values = view(v.data()),
             .terminated = view(te.data()),
             .truncated = view(tr.data()),
             .final_values = view(fv.data()),
             .bootstrap = boot},
            {}, {.advantages = view(a.data()), .returns = view(g.data())});
    arguments<float> all(w, layout::rows);
    for (index_t b = 0; b < batch; ++b) {
      const auto row = [&](const auto& x) {
        return std::vector(x.data.begin() + b * time, x.data.begin() + (b + 1) * time);
      };
      std::vector<float> alone(at(time)), returns(at(time)), there, there_returns;
      rl::gae(mlkit::cpu{},
              {.rewards = row(all.r),
               .values = row(all.v),
               .terminated = row(all.te),
               .truncated = row(all.tr),
               .final_values = row(all.fv),
               .bootstrap = std::vector<float>{boot[at(b)]}},
              {}, {.advantages = alone, .returns = returns});
      for (index_t t = 0; t < time; ++t) {
        there.push_back(view(a.data())(b, t));
        there_returns.push_back(view(g.data())(b, t));
      }
      INFO((columns ? "columns, " : "rows, ") << b);
      REQUIRE(same_bits(there, alone));
      REQUIRE(same_bits(there_returns, returns));
    }
  }
}

TEST_CASE("gae refuses bad input before it writes", "[rl][gae][bad input]") {
  const window w = make_window(3, 20, {.bootstrap = true, .done = 0});
  arguments<float> given(w, layout::rows);
  stored<float> a = given.out(), g = given.out();
  std::fill(a.data.begin(), a.data.end(), 7.0f);
  std::fill(g.data.begin(), g.data.end(), 7.0f);
  const auto refuses = [&](const std::string& message, auto&& change, rl::gae_options o = {}) {
    rl::rollout<float> in = given.rollout();
    in.truncated = {}, in.final_values = {};
    rl::advantages<float> out{a.view(), g.view()};
    change(in, out);
    CHECK_THROWS_WITH(rl::gae(mlkit::cpu{}, in, o, out), message);
    CHECK(std::count(a.data.begin(), a.data.end(), 7.0f) == static_cast<std::ptrdiff_t>(a.data.size()));
    CHECK(std::count(g.data.begin(), g.data.end(), 7.0f) == static_cast<std::ptrdiff_t>(g.data.size()));
  };
  const auto nothing = [](auto&, auto&) {};
  refuses("mlkit::value_error: rl::gae: gamma = 1.5 is outside [0, 1]", nothing, {.gamma = 1.5});
  refuses("mlkit::value_error: rl::gae: gamma = nan is outside [0, 1]", nothing, {.gamma = not_a_number});
  refuses("mlkit::value_error: rl::gae: lambda = -0.1 is outside [0, 1]", nothing, {.lambda = -0.1});
  refuses("mlkit::shape_error: rl::gae: values has shape [2, 20], but rewards has [3, 20]",
          [&](auto& in, auto&) { in.values.extents[0] = 2; });
  refuses("mlkit::shape_error: rl::gae: terminated has shape [3, 19], but rewards has [3, 20]",
          [&](auto& in, auto&) { in.terminated.extents[1] = 19; });
  refuses("mlkit::shape_error: rl::gae: values has shape [0, 0], but rewards has [3, 20]",
          [&](auto& in, auto&) { in.values = {}; });
  refuses("mlkit::value_error: rl::gae: values is null, but has shape [3, 20]",
          [&](auto& in, auto&) { in.values.data = nullptr; });
  refuses("mlkit::shape_error: rl::gae: bootstrap has 2 elements, but rewards has 3",
          [&](auto& in, auto&) { in.bootstrap.extents[0] = 2; });
  refuses("mlkit::shape_error: rl::gae: returns has shape [3, 5], but rewards has [3, 20]",
          [&](auto&, auto& out) { out.returns.extents[1] = 5; });
  refuses("mlkit::shape_error: rl::gae: returns [3, 20] overlaps advantages [3, 20]",
          [&](auto&, auto& out) { out.returns = out.advantages; });
  refuses("mlkit::shape_error: rl::gae: advantages [3, 20] overlaps rewards [3, 20]",
          [&](auto&, auto& out) { out.advantages = given.r.view(); });
  for (const double bad : {not_a_number, static_cast<double>(INFINITY), -static_cast<double>(INFINITY)}) {
    given.r.data[33] = static_cast<float>(bad);
    given.r.data[50] = static_cast<float>(bad);
    refuses(mlkit::detail::message("mlkit::value_error: rl::gae: rewards[1, 13] = ", bad, " is not finite"), nothing);
  }
  given.r.data[33] = given.r.data[50] = 0;
  std::vector<std::uint8_t> flags(60);
  const mlkit::tensor_view<std::uint8_t, 2> view(flags.data(), {3, 20});
  flags[47] = 1;
  refuses("mlkit::value_error: rl::gae: step [2, 7] was truncated, but there are no final_values",
          [&](auto& in, auto&) { in.truncated = view; });
  flags[47] = 0;
  flags[19] = flags[59] = 1;
  refuses(
      "mlkit::value_error: rl::gae: the window ends with step [1, 19], which is not terminated, and there is neither a "
      "bootstrap nor final_values",
      [&](auto& in, auto&) { in.bootstrap = {}, in.terminated = view; });
  refuses("mlkit::value_error: rl::gae: last_terminated and last_truncated go with done_begins",
          [&](auto& in, auto&) { in.last_terminated = w.lte; });
  rl::rollout<float> whole = given.rollout();
  whole.truncated = {}, whole.final_values = {};
  CHECK_THROWS_WITH(rl::gae(mlkit::cpu{.threads = -1}, whole, {}, {.advantages = a.view()}),
                    "mlkit::value_error: cpu: threads = -1 is negative");

  // Packed.
  const auto packed = [&](const std::string& message, std::vector<std::int32_t> starts, bool mask = false) {
    const std::vector<float> x(20, 1.0f), boot(starts.empty() ? 0 : starts.size() - 1, 1.0f);
    std::vector<float> out(20, 7.0f);
    rl::rollout<float> in{.rewards = x, .values = x, .bootstrap = boot, .cu_seqlens = starts};
    if (starts.empty()) in.cu_seqlens.data = starts.data(), in.bootstrap = {};
    if (mask) in.mask = flags, in.mask.extents = {1, 20};
    CHECK_THROWS_WITH(rl::gae(mlkit::cpu{}, in, {}, {.advantages = out}), message);
    CHECK(out == std::vector<float>(20, 7.0f));
  };
  packed("mlkit::value_error: rl::gae: mask and cu_seqlens are both given; packed tokens all count", {0, 20}, true);
  packed("mlkit::value_error: rl::gae: cu_seqlens[0] = 1 is not 0", {1, 20});
  packed("mlkit::value_error: rl::gae: cu_seqlens[2] = 4 is less than cu_seqlens[1] = 5", {0, 5, 4, 20});
  packed("mlkit::value_error: rl::gae: cu_seqlens ends with 21, but there are 20 tokens", {0, 21});
  refuses("mlkit::shape_error: rl::gae: rewards has shape [3, 20], but cu_seqlens packs sequences of [tokens] alone",
          [&](auto& in, auto&) {
            in.cu_seqlens = std::vector<std::int32_t>{0, 60};
          });
  const std::vector<float> x(20, 1.0f), boot(3, 1.0f);
  std::vector<float> out(20);
  CHECK_THROWS_WITH(
      rl::gae(mlkit::cpu{},
              {.rewards = x, .values = x, .bootstrap = boot, .cu_seqlens = std::vector<std::int32_t>{0, 5, 20}}, {},
              {.advantages = out}),
      "mlkit::shape_error: rl::gae: bootstrap has 3 elements, but the number of sequences has 2");
  const std::vector<std::int32_t> apart{0, 99, 5, 99, 20};
  rl::rollout<float> in{
      .rewards = x, .values = x, .cu_seqlens = mlkit::vector_view<const std::int32_t>(apart.data(), {3}, {2})};
  CHECK_THROWS_WITH(rl::gae(mlkit::cpu{}, in, {}, {.advantages = out}),
                    "mlkit::shape_error: rl::gae: cu_seqlens has a stride of 2, not 1");
}
