// rl's calls captured into graphs: they neither wait nor allocate but in the stream's order, and a replay does again
// what the call does, with what its operands hold by then.
#include "captured.hpp"

#if !defined(MLKIT_TEST_ON_CPU)

#include <mlkit/core/random.hpp>
#include <mlkit/rl.cuh>

namespace rl = mlkit::rl;
using mlkit::index_t;
using mlkit::matrix_view;
using mlkit::vector_view;

namespace {

// Operands of every call: batch sequences of time tokens over a vocabulary, and as many rows of d numbers.
constexpr index_t batch = 6, steps_each = 10, rows = batch * steps_each, classes = 40, d = 7;

class operands {
 public:
  const test::executor exec = test::exec();
  test::operand<float, 1> x[6], small[4], weight, wide[2], out[4], one;
  test::operand<std::int32_t, 1> tokens, drawn;
  test::operand<std::uint8_t, 1> mask;

  operands() {
    std::uint64_t stream = 0;
    for (auto& v : x) v = numbers(rows, stream++);
    for (auto& v : small) v = numbers(batch, stream++);
    weight = numbers(classes * d, stream++);
    for (auto& v : wide) v = numbers(rows * classes, stream++);
    for (auto& v : out) v = numbers(rows * classes, stream++);
    one = numbers(d, stream++);
    std::vector<std::int32_t> y;
    std::vector<std::uint8_t> kept;
    for (index_t i = 0; i < rows; ++i) y.push_back(static_cast<std::int32_t>(i * 7 % 40)), kept.push_back(i % 5 != 3);
    tokens = test::on_device(exec, y), drawn = test::on_device(exec, y), mask = test::on_device(exec, kept);
  }
  test::operand<float, 1> numbers(index_t n, std::uint64_t stream) const {
    const mlkit::random_stream random{31, stream};
    std::vector<float> v;
    for (index_t i = 0; i < n; ++i) v.push_back(0.5f * random.normal(static_cast<std::uint64_t>(i)));
    return test::on_device(exec, v);
  }
  // Puts other numbers into what calls read.
  void change(std::uint64_t stream) {
    const auto put = [&](auto& to) {
      const auto v = test::to_host(exec, numbers(to.size(), stream++));
      test::copy_bytes(exec, to.data(), v.data(), static_cast<std::size_t>(v.size()) * sizeof(float));
    };
    for (auto& v : x) put(v);
    for (auto& v : small) put(v);
    for (auto& v : wide) put(v);
  }
  template <class T>
  static matrix_view<T> steps(const test::operand<T, 1>& v) {
    return {v.data(), {batch, steps_each}};
  }
  template <class T>
  static vector_view<T> vector(const test::operand<T, 1>& v, index_t n) {
    return {v.data(), {n}};
  }
  static matrix_view<float> matrix(const test::operand<float, 1>& v, index_t n, index_t m) {
    return {v.data(), {n, m}};
  }
  std::vector<float> made() const {
    std::vector<float> all;
    for (const auto& v : out) {
      const auto y = test::to_host(exec, v);
      all.insert(all.end(), y.data(), y.data() + v.size());
    }
    for (const std::int32_t a : test::to_host(exec, drawn)) all.push_back(static_cast<float>(a));
    return all;
  }
  void spoil() {
    for (auto& v : out) {
      const std::vector<float> nan(static_cast<std::size_t>(v.size()), NAN);
      test::copy_bytes(exec, v.data(), nan.data(), nan.size() * sizeof(float));
    }
    const std::vector<std::int32_t> none(static_cast<std::size_t>(rows), -7);
    test::copy_bytes(exec, drawn.data(), none.data(), none.size() * sizeof(std::int32_t));
  }
};

// call(exec, operands) reads what `change` changes, and makes out or drawn.
template <class Call>
void check_captured(const char* name, Call&& call) {
  INFO(name);
  operands o;
  const test::own_stream stream;
  const mlkit::cuda exec(stream);
  const auto made = [&] {
    exec.synchronize();
    return o.made();
  };
  const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
  };
  o.spoil();
  call(exec, o);
  const auto first = made();
  const test::captured graph(stream, [&] { call(exec, o); });
  o.spoil();
  graph.launch();
  CHECK(same(made(), first));
  o.change(100);
  graph.launch();
  const auto second = made();
  CHECK_FALSE(same(second, first));
  o.spoil();
  call(exec, o);
  CHECK(same(made(), second));
}

}  // namespace

TEST_CASE("cuda: scans, moments and groups of rl in a graph", "[cuda][rl]") {
  check_captured("gae, vtrace, n-step", [](const mlkit::cuda& exec, operands& o) {
    rl::gae<float>(exec, {.rewards = o.steps(o.x[0]), .values = o.steps(o.x[1])}, {},
                   {.advantages = o.steps(o.out[0])});
    rl::vtrace<float>(exec, {.rewards = o.steps(o.x[0]), .values = o.steps(o.x[1]), .log_ratios = o.steps(o.x[2])}, {},
                      {.vs = o.steps(o.out[1])});
    rl::n_step_returns<float>(exec, {.rewards = o.steps(o.x[0]), .values = o.steps(o.x[1])}, {.steps = 3},
                              o.steps(o.out[2]));
  });
  check_captured("whitening, running statistics, groups", [](const mlkit::cuda& exec, operands& o) {
    (void)rl::find_moments(exec, o.steps(o.x[0]));
    (void)rl::whiten(exec, o.steps(o.x[0]), {}, {}, o.steps(o.out[0]));
    rl::device_running_stats stats(exec, classes);
    stats.update(exec, o.matrix(o.wide[0], rows, classes));
    stats.normalize(exec, o.matrix(o.wide[0], rows, classes), {}, o.matrix(o.out[1], rows, classes));
    rl::device_reward_scaling scaling(exec, batch);
    scaling.update(exec, o.steps(o.x[0]), rl::mask_view<2>(o.steps(o.mask)));
    scaling.scale(exec, o.steps(o.x[0]), {}, o.steps(o.out[2]));
    rl::group_advantages(exec, o.vector(o.x[0], rows), rl::groups(10), rl::reinforce_pp{}, o.vector(o.out[3], rows));
    rl::best_of_n(exec, o.vector(o.x[0], rows), rl::groups(10), o.vector(o.drawn, batch));
  });
}

TEST_CASE("cuda: log-probabilities, heads and policies of rl in a graph", "[cuda][rl]") {
  check_captured("log-probabilities and cross-entropy", [](const mlkit::cuda& exec, operands& o) {
    rl::log_probs(exec, o.matrix(o.wide[0], rows, classes), o.vector(o.tokens, rows), {}, o.vector(o.out[0], rows));
    (void)rl::cross_entropy(exec, o.matrix(o.wide[0], rows, classes), o.vector(o.tokens, rows), {},
                            o.matrix(o.out[1], rows, classes));
  });
  check_captured("head", [](const mlkit::cuda& exec, operands& o) {
    (void)rl::cross_entropy(exec, o.matrix(o.wide[0], rows, d), o.matrix(o.weight, classes, d),
                            o.vector(o.tokens, rows), {.shift = true},
                            {.dhidden = o.matrix(o.out[0], rows, d), .dweight = o.matrix(o.out[1], classes, d)});
  });
  check_captured("policies", [](const mlkit::cuda& exec, operands& o) {
    const matrix_view<std::int32_t> actions(o.drawn.data(), {rows, 1});
    const rl::categorical<float> one{o.matrix(o.wide[0], rows, classes)};
    rl::sample(exec, one, {.seed = 5}, actions);
    rl::log_probs(exec, one, actions, {.logp = o.vector(o.out[0], rows)});
    rl::backward(exec, one, actions, {.dlogp = o.vector(o.x[0], rows)}, o.matrix(o.out[1], rows, classes));
    const rl::gaussian<float> normal{o.matrix(o.wide[1], rows, d), o.matrix(o.one, 1, d)};
    rl::sample(exec, normal, {.seed = 6}, o.matrix(o.out[2], rows, d));
    rl::backward(exec, normal, o.matrix(o.wide[0], rows, d), {.dlogp = o.vector(o.x[0], rows)},
                 {.mean = o.matrix(o.out[3], rows, d)});
  });
}

TEST_CASE("cuda: losses of rl in a graph", "[cuda][rl]") {
  check_captured("policy losses", [](const mlkit::cuda& exec, operands& o) {
    (void)rl::ppo_loss<float>(exec,
                              {.log_probs = o.steps(o.x[0]),
                               .old_log_probs = o.steps(o.x[1]),
                               .advantages = o.steps(o.x[2]),
                               .mask = o.steps(o.mask)},
                              {}, {.log_probs = o.steps(o.out[0])});
    (void)rl::value_loss<float>(exec, {.values = o.steps(o.x[3]), .returns = o.steps(o.x[4])}, {}, o.steps(o.out[1]));
    (void)rl::ppo_loss(exec, mlkit::tensor_view<const float, 3>(o.wide[0].data(), {batch, steps_each, classes}),
                       mlkit::tensor_view<const std::int32_t, 2>(o.steps(o.tokens)), {},
                       {.old_log_probs = o.steps(o.x[1]), .advantages = o.steps(o.x[2])}, {},
                       {.logits = mlkit::tensor_view<float, 3>(o.out[2].data(), {batch, steps_each, classes})});
  });
  check_captured("divergences and preferences", [](const mlkit::cuda& exec, operands& o) {
    (void)rl::kl_loss<float>(exec, {.log_probs = o.steps(o.x[0]), .reference = o.steps(o.x[1])}, {}, o.steps(o.out[0]));
    (void)rl::kl_rewards<float>(
        exec, {.log_probs = o.steps(o.x[0]), .reference = o.steps(o.x[1]), .scores = o.vector(o.small[0], batch)}, {},
        o.steps(o.out[1]));
    rl::sequence_log_probs<float>(exec, {.log_probs = o.steps(o.x[0])}, rl::sequence_reduction::sum,
                                  o.vector(o.out[2], batch));
    (void)rl::preference_loss<float>(exec,
                                     {.chosen = o.vector(o.small[0], batch),
                                      .rejected = o.vector(o.small[1], batch),
                                      .reference_chosen = o.vector(o.small[2], batch),
                                      .reference_rejected = o.vector(o.small[3], batch)},
                                     rl::dpo{}, {.chosen = o.vector(o.out[3], batch)});
  });
  check_captured("ranks and labels", [](const mlkit::cuda& exec, operands& o) {
    (void)rl::preference_loss<float>(
        exec,
        {.log_probs = o.vector(o.x[0], rows), .reference = o.vector(o.x[1], rows), .desirable = o.vector(o.mask, rows)},
        rl::kto{}, {.log_probs = o.vector(o.out[0], rows)});
    (void)rl::kto_reference_point<float>(exec, o.vector(o.x[0], rows), o.vector(o.x[1], rows));
    (void)rl::preference_loss<float>(exec, {.rewards = o.vector(o.x[0], rows), .of = rl::groups(10)}, rl::k_wise{},
                                     {.rewards = o.vector(o.out[1], rows)});
  });
}

#endif
