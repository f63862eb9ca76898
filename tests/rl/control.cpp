// PPO with these kernels solves CartPole: a sign that is wrong anywhere between the environment and the logits passes
// many tests, but not this one.
#include <array>
#include <catch2/catch.hpp>
#include <cmath>
#include <mlkit/matmul/matmul.hpp>
#include <mlkit/nn/adamw.hpp>
#include <mlkit/nn/ops.hpp>
#include <mlkit/rl/advantages.hpp>
#include <mlkit/rl/categorical.hpp>
#include <mlkit/rl/logits_policy_loss.hpp>
#include <mlkit/rl/whiten.hpp>
#include <numeric>
#include <vector>

namespace {

namespace nn = mlkit::nn;
namespace rl = mlkit::rl;
using mlkit::index_t;

// CartPole-v1 of Gymnasium (gymnasium/envs/classic_control/cartpole.py), after Barto, Sutton and Anderson, "Neuronlike
// adaptive elements that can solve difficult learning control problems", 1983: explicit Euler steps of 0.02 s; an
// episode is terminated where the cart or the pole leaves its bounds, and truncated after 500 steps; each step is
// rewarded by 1.
class cart_pole {
 public:
  using observation = std::array<float, 4>;

  explicit cart_pole(mlkit::random_stream random) : random_(random) { reset(); }

  observation reset() {
    for (double& s : state_) s = 0.1 * static_cast<double>(random_.uniform(drawn_++)) - 0.05;
    steps_ = 0;
    return observe();
  }
  observation observe() const {
    observation o;
    for (std::size_t i = 0; i < 4; ++i) o[i] = static_cast<float>(state_[i]);
    return o;
  }
  struct outcome {
    bool terminated, truncated;
  };
  outcome step(int action) {
    constexpr double gravity = 9.8, mass_of_pole = 0.1, mass = 1.1, half_length = 0.5, force = 10, tau = 0.02;
    constexpr double pi = 3.14159265358979323846, most_angle = 12 * 2 * pi / 360, most_x = 2.4;
    auto& [x, speed, angle, turn] = state_;
    const double c = std::cos(angle), s = std::sin(angle);
    const double push = ((action == 1 ? force : -force) + mass_of_pole * half_length * turn * turn * s) / mass;
    const double turning = (gravity * s - c * push) / (half_length * (4.0 / 3.0 - mass_of_pole * c * c / mass));
    const double acceleration = push - mass_of_pole * half_length * turning * c / mass;
    x += tau * speed;
    speed += tau * acceleration;
    angle += tau * turn;
    turn += tau * turning;
    ++steps_;
    const bool out = std::fabs(x) > most_x || std::fabs(angle) > most_angle;
    return {out, steps_ >= 500};
  }
  int steps() const { return steps_; }

 private:
  std::array<double, 4> state_{};
  int steps_ = 0;
  mlkit::random_stream random_;
  std::uint64_t drawn_ = 0;
};

// y = x W^T + b.
struct layer {
  nn::parameter<float>*weight, *bias;

  layer(const nn::scope<float>& in, index_t inputs, index_t outputs, double gain = 1)
      : weight(&in.add("weight", {outputs, inputs}, nn::uniform{gain / std::sqrt(static_cast<double>(inputs))})),
        bias(&in.add("bias", {outputs}, nn::zeros{})) {}
  nn::var<float> operator()(nn::var<float> x) const {
    nn::tape<float>& tape = x.on();
    const nn::var<float> w = tape.use(*weight), b = tape.use(*bias);
    const nn::var<float> y = tape.make(nn::shape{x.rows(), w.rows()}, {x, w, b});
    const index_t rows = y.rows(), outputs = y.columns();
    mlkit::matmul(tape.exec(), x.matrix(), mlkit::transposed(w.matrix()), y.matrix());
    const auto out = y.matrix();
    for (index_t r = 0; r < rows; ++r)
      for (index_t c = 0; c < outputs; ++c) out(r, c) += b.data()[c];
    tape.on_backward(y, [=, &tape] {
      const auto add = [&](const nn::var<float>& to, const auto& left, const auto& right) {
        const mlkit::matrix_view<float> product(tape.scratch(to.size()), {to.rows(), to.columns()});
        mlkit::matmul(tape.exec(), left, right, product);
        float* sum = to.grad_data();
        for (index_t i = 0; i < to.size(); ++i) sum[i] += product.data[i];
      };
      add(w, mlkit::transposed(y.grad()), x.matrix());
      if (x.needs_grad()) add(x, y.grad(), w.matrix());
      const auto dy = y.grad();
      float* db = b.grad_data();
      for (index_t r = 0; r < rows; ++r)
        for (index_t c = 0; c < outputs; ++c) db[c] += dy(r, c);
    });
    return y;
  }
};

// A policy and a critic of two hidden layers each; the policy has no preference to begin with.
struct networks {
  static constexpr index_t width = 32;
  nn::parameters<float> store;
  layer actor1, actor2, actor3, critic1, critic2, critic3;

  explicit networks(std::uint64_t seed)
      : store(seed),
        actor1({store, "actor1"}, 4, width),
        actor2({store, "actor2"}, width, width),
        actor3({store, "actor3"}, width, 2, 0.01),
        critic1({store, "critic1"}, 4, width),
        critic2({store, "critic2"}, width, width),
        critic3({store, "critic3"}, width, 1) {}
  nn::var<float> logits(nn::var<float> x) const {
    return actor3(nn::activate(actor2(nn::activate(actor1(x), mlkit::tanh{})), mlkit::tanh{}));
  }
  nn::var<float> values(nn::var<float> x) const {
    return critic3(nn::activate(critic2(nn::activate(critic1(x), mlkit::tanh{})), mlkit::tanh{}));
  }
};

using numbers = mlkit::vector_view<const float>;

// A minibatch: [steps] of observations [steps, 4] and what was recorded beside them.
struct minibatch {
  std::vector<float> observations, log_probs, advantages, returns;
  std::vector<std::int32_t> actions;
};

// PPO's loss as an operation of the tape, whose gradients the kernel has computed already.
nn::var<float> ppo(nn::var<float> logits, nn::var<float> values, const minibatch& batch, const rl::ppo_options& o) {
  nn::tape<float>& tape = logits.on();
  const nn::var<float> loss = tape.make(nn::shape{}, {logits, values});
  const index_t n = logits.rows();
  float* dlogits = tape.scratch(2 * n);
  float* dvalues = tape.scratch(n);
  const auto stats = rl::ppo_loss(
      tape.exec(), logits.matrix(), batch.actions, {},
      {.old_log_probs = batch.log_probs,
       .advantages = batch.advantages,
       .values = numbers(values.data(), {n}),
       .returns = batch.returns},
      o, {.logits = mlkit::matrix_view<float>(dlogits, {n, 2}), .values = mlkit::vector_view<float>(dvalues, {n})});
  *loss.data() = static_cast<float>(stats.loss);
  tape.on_backward(loss, [=] {
    const float factor = *loss.grad_data();
    float *to_logits = logits.grad_data(), *to_values = values.grad_data();
    for (index_t i = 0; i < 2 * n; ++i) to_logits[i] += factor * dlogits[i];
    for (index_t i = 0; i < n; ++i) to_values[i] += factor * dvalues[i];
  });
  return loss;
}

// Scales gradients to a norm of at most `most`.
void clip_gradients(const std::vector<nn::parameter<float>*>& parameters, double most) {
  double square = 0;
  for (const auto* p : parameters)
    for (const float g : p->grad) square += static_cast<double>(g) * static_cast<double>(g);
  const double norm = std::sqrt(square);
  if (norm > most)
    for (auto* p : parameters)
      for (float& g : p->grad) g *= static_cast<float>(most / norm);
}

// The mean return over 20 episodes of the likelier action.
double evaluate(const networks& net, std::uint64_t seed) {
  constexpr index_t episodes = 20;
  const mlkit::cpu exec{.threads = 1};
  nn::tape<float> tape(exec, {.record = false});
  std::vector<cart_pole> poles;
  for (index_t i = 0; i < episodes; ++i)
    poles.emplace_back(mlkit::random_stream{seed, 1000 + static_cast<std::uint64_t>(i)});
  std::vector<bool> done(episodes, false);
  mlkit::matrix<float> x({episodes, 4});
  double total = 0;
  for (bool any = true; any;) {
    any = false;
    for (index_t i = 0; i < episodes; ++i) {
      const auto o = poles[static_cast<std::size_t>(i)].observe();
      std::copy(o.begin(), o.end(), &x(i, 0));
    }
    tape.clear();
    const auto logits = net.logits(tape.constant(x)).matrix();
    for (index_t i = 0; i < episodes; ++i) {
      const auto at = static_cast<std::size_t>(i);
      if (done[at]) continue;
      const auto now = poles[at].step(logits(i, 1) > logits(i, 0) ? 1 : 0);
      done[at] = now.terminated || now.truncated;
      if (done[at]) total += poles[at].steps();
      any = any || !done[at];
    }
  }
  return total / episodes;
}

struct training {
  double sign = 1;  // of the advantages
  index_t most_updates = 300;
  double good = 475;  // the mean return at which training ends
};

// Trains by PPO and returns the mean return that the policy has in the end.
double train(std::uint64_t seed, const training& how) {
  constexpr index_t poles = 16, steps = 64, batch = 256, epochs = 8, all = poles * steps;
  const mlkit::cpu exec{.threads = 1};
  networks net(seed);
  const auto parameters = nn::trainable(net.store);
  nn::adamw<float> adam(parameters, {.rate = 2e-3, .epsilon = 1e-5, .decay = 0});
  nn::tape<float> tape(exec), forward(exec, {.record = false});
  std::vector<cart_pole> envs;
  for (index_t i = 0; i < poles; ++i) envs.emplace_back(mlkit::random_stream{seed, static_cast<std::uint64_t>(i)});
  const mlkit::random_stream random{seed, 500}, shuffling{seed, 501};
  std::uint64_t shuffled = 0;

  // Time-major: row t * poles + i is step t of pole i.
  mlkit::matrix<float> seen({all, 4}), behind({all, 4});
  mlkit::matrix<float> rewards({steps, poles}), values({steps, poles}), final_values({steps, poles}),
      advantages({steps, poles}), returns({steps, poles}), log_probs({steps, poles});
  std::vector<std::uint8_t> terminated(all), truncated(all);
  std::vector<std::int32_t> actions(all);
  std::vector<index_t> order(all);
  std::iota(order.begin(), order.end(), index_t{0});
  double recent = 0;  // a running mean of episodes' returns

  for (index_t update = 0; update < how.most_updates; ++update) {
    for (index_t t = 0; t < steps; ++t) {
      for (index_t i = 0; i < poles; ++i) {
        const auto o = envs[static_cast<std::size_t>(i)].observe();
        std::copy(o.begin(), o.end(), &seen(t * poles + i, 0));
      }
      forward.clear();
      const auto logits = net.logits(forward.constant(mlkit::matrix_view<float>(&seen(t * poles, 0), {poles, 4})));
      const rl::categorical<float> policy{.logits = logits.matrix()};
      const mlkit::matrix_view<std::int32_t> chosen(actions.data() + t * poles, {poles, 1});
      rl::sample(exec, policy, random, chosen, (update * steps + t) * poles);
      rl::log_probs(exec, policy, chosen, {.logp = {&log_probs(t, 0), {poles}}});
      for (index_t i = 0; i < poles; ++i) {
        cart_pole& env = envs[static_cast<std::size_t>(i)];
        const auto now = env.step(chosen(i, 0));
        const auto o = env.observe();
        std::copy(o.begin(), o.end(), &behind(t * poles + i, 0));
        const auto at = static_cast<std::size_t>(t * poles + i);
        rewards(t, i) = 1;
        terminated[at] = now.terminated;
        truncated[at] = now.truncated;
        if (now.terminated || now.truncated) {
          recent += 0.05 * (env.steps() - recent);
          env.reset();
        }
      }
    }
    forward.clear();
    std::copy_n(net.values(forward.constant(seen)).data(), all, values.data());
    std::copy_n(net.values(forward.constant(behind)).data(), all, final_values.data());
    const auto flags = [](const std::vector<std::uint8_t>& f) {
      return mlkit::transposed(mlkit::matrix_view<const std::uint8_t>(f.data(), {steps, poles}));
    };
    rl::gae(exec,
            {.rewards = mlkit::transposed(rewards),
             .values = mlkit::transposed(values),
             .terminated = flags(terminated),
             .truncated = flags(truncated),
             .final_values = mlkit::transposed(final_values)},
            {.gamma = 0.98, .lambda = 0.9},
            {.advantages = mlkit::transposed(advantages), .returns = mlkit::transposed(returns)});

    const double left = 1 - static_cast<double>(update) / static_cast<double>(how.most_updates);
    adam.set_rate(2e-3 * left);
    for (index_t epoch = 0; epoch < epochs; ++epoch) {
      for (index_t i = all - 1; i > 0; --i)
        std::swap(order[static_cast<std::size_t>(i)],
                  order[static_cast<std::size_t>(shuffling.bits(shuffled++) % static_cast<std::uint32_t>(i + 1))]);
      for (index_t first = 0; first < all; first += batch) {
        minibatch m;
        for (index_t k = first; k < first + batch; ++k) {
          const index_t at = order[static_cast<std::size_t>(k)];
          m.observations.insert(m.observations.end(), &seen(at, 0), &seen(at, 0) + 4);
          m.log_probs.push_back(log_probs.data()[at]);
          m.advantages.push_back(static_cast<float>(how.sign) * advantages.data()[at]);
          m.returns.push_back(returns.data()[at]);
          m.actions.push_back(actions[static_cast<std::size_t>(at)]);
        }
        rl::whiten(exec, m.advantages);
        tape.clear();
        const auto x = tape.constant(mlkit::matrix_view<float>(m.observations.data(), {batch, 4}));
        tape.backward(ppo(net.logits(x), net.values(x), m, {.clip = 0.2, .value = 0.5, .entropy = 0.001}));
        clip_gradients(parameters, 0.5);
        adam.step(exec);
      }
    }
    if (recent >= how.good && evaluate(net, seed + 77) >= how.good) break;
  }
  return evaluate(net, seed + 999);
}

}  // namespace

TEST_CASE("PPO solves CartPole", "[rl][control]") {
  for (const std::uint64_t seed : {1, 2, 3}) {
    INFO("seed " << seed);
    CHECK(train(seed, {}) >= 475);
  }
}

TEST_CASE("PPO whose advantages have the wrong sign does not", "[rl][control]") {
  CHECK(train(1, {.sign = -1, .most_updates = 20}) < 100);
}
