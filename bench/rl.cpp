// Advantages, log-probabilities, the language model's head, and losses with their gradients. PyTorch, TorchRL and NumPy
// run from peers/rl.py.
#include <algorithm>
#include <mlkit/core/random.hpp>
#include <mlkit/matmul.hpp>
#include <mlkit/rl.hpp>

#include "harness.hpp"

namespace {

namespace rl = mlkit::rl;
using bench::operand;
using mlkit::bf16;
using mlkit::index_t;
using call = std::function<void()>;

// Registers a case for every thread count; make(exec) returns the call to time.
template <class T, class Make>
void add(const std::string& name, const std::string& shape, const bench::work& work, Make make) {
  for (const int threads : bench::thread_counts())
    bench::add_mlkit({name, mlkit::dtype_name<T>(), shape, threads, "mlkit"}, work,
                     [=] { return call(make(mlkit::cpu{.threads = threads})); });
}

// Numbers in [0, below), the same in every run.
template <class I>
std::vector<I> draws(index_t n, index_t below, std::uint64_t stream) {
  std::vector<I> v(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < v.size(); ++i)
    v[i] = static_cast<I>(mlkit::random_stream{7, stream}.uniform(i) * static_cast<float>(below));
  return v;
}

// About so many of a thousand are set.
std::vector<std::uint8_t> flags(index_t n, index_t per_mille, std::uint64_t stream) {
  std::vector<std::uint8_t> v(static_cast<std::size_t>(n));
  const auto d = draws<index_t>(n, 1000, stream);
  std::transform(d.begin(), d.end(), v.begin(), [=](index_t x) { return x < per_mille; });
  return v;
}

mlkit::matrix_view<float> view(const std::string& name, index_t rows, index_t cols) {
  return operand<float>(name, rows, cols);
}

// Rewards, values and where episodes end: at about one step in a hundred, half of them by a limit. Time-major, the same
// views are transposed.
struct steps {
  index_t sequences, time;
  bool time_major = false;
  std::vector<std::uint8_t> terminated = flags(sequences * time, 5, 1), truncated = flags(sequences * time, 5, 2);

  auto view(auto* data) const {
    using element = std::remove_pointer_t<decltype(data)>;
    return time_major ? mlkit::transposed(mlkit::matrix_view<element>(data, {time, sequences}))
                      : mlkit::matrix_view<element>(data, {sequences, time});
  }
  auto of(const std::string& name) const { return view(operand<float>("steps " + name, sequences, time).data()); }
  auto bootstrap() const {
    return mlkit::vector_view<const float>(operand<float>("bootstrap", 1, sequences).data(), {sequences});
  }
  rl::rollout<float> rollout() const {
    return {.rewards = of("r"),
            .values = of("v"),
            .terminated = view(terminated.data()),
            .truncated = view(truncated.data()),
            .final_values = of("final"),
            .bootstrap = bootstrap()};
  }
  double count() const { return static_cast<double>(sequences * time); }
  // Rewards, values and flags, and so many numbers written.
  bench::work work(int outputs, int more_inputs = 0) const {
    return {.bytes = count() * (2 * 4 + 2 + 4 * more_inputs + 4 * outputs), .written = count() * 4 * outputs};
  }
  std::string shape() const { return bench::shape(sequences, time); }
};

void add_gae(index_t sequences, index_t time, bool time_major) {
  const steps s{sequences, time, time_major};
  add<float>(time_major ? "gae_time_major" : "gae", s.shape(), s.work(2), [=](mlkit::cpu exec) {
    return [=, a = s.of("a"), returns = s.of("returns")] {
      rl::gae(exec, s.rollout(), {.gamma = 0.99, .lambda = 0.95}, {.advantages = a, .returns = returns});
    };
  });
}

void add_td_lambda(index_t sequences, index_t time) {
  const steps s{sequences, time};
  add<float>("td_lambda", s.shape(), s.work(1), [=](mlkit::cpu exec) {
    return [=, returns = s.of("returns")] {
      rl::td_lambda_returns(exec, s.rollout(), {.gamma = 0.99, .lambda = 0.95}, returns);
    };
  });
}

void add_vtrace(index_t sequences, index_t time) {
  const steps s{sequences, time};
  add<float>("vtrace", s.shape(), s.work(2, 1), [=](mlkit::cpu exec) {
    return [=, a = s.of("a"), vs = s.of("returns")] {
      rl::vtrace(exec,
                 {.rewards = s.of("r"),
                  .values = s.of("v"),
                  .log_ratios = s.of("ratio"),
                  .terminated = s.view(s.terminated.data()),
                  .truncated = s.view(s.truncated.data()),
                  .final_values = s.of("final"),
                  .bootstrap = s.bootstrap()},
                 {}, {.vs = vs, .advantages = a});
    };
  });
}

template <class T>
void add_log_prob(index_t rows, index_t vocabulary) {
  const std::string shape = bench::shape(rows, vocabulary);
  const double bytes = static_cast<double>(rows * vocabulary) * sizeof(T);
  const auto logits = [=]() -> auto& { return operand<T>("logits", rows, vocabulary); };
  const auto tokens = [=] { return draws<std::int32_t>(rows, vocabulary, 1); };
  const auto of_rows = [=](const std::string& name) {
    return mlkit::vector_view<float>(operand<float>(name, 1, rows).data(), {rows});
  };
  add<T>("log_prob", shape, {.bytes = bytes}, [=](mlkit::cpu exec) {
    return [=, &z = logits(), ids = tokens(), logp = of_rows("logp")] { rl::log_probs(exec, z, ids, {}, logp); };
  });
  add<T>("log_prob_entropy", shape, {.bytes = bytes}, [=](mlkit::cpu exec) {
    return [=, &z = logits(), ids = tokens(), logp = of_rows("logp"), entropy = of_rows("entropy")] {
      rl::log_probs(exec, z, ids, {}, {.logp = logp, .entropy = entropy});
    };
  });
  add<T>("log_prob_training", shape, {.bytes = 2 * bytes, .written = bytes}, [=](mlkit::cpu exec) {
    return [=, &z = logits(), &dz = operand<T>("dlogits", rows, vocabulary), ids = tokens(), logp = of_rows("logp"),
            dlogp = of_rows("dlogp")] {
      rl::log_probs_and_gradient(
          exec, z, ids, {}, [&](index_t row, float) { return dlogp(row); }, {.logp = logp}, dz);
    };
  });
}

// The language model's head with the cross-entropy of its tokens, and the bare products of the same shapes: [tokens,
// vocabulary] from hidden states and weights, and, with gradients, two more from it.
template <class T>
void add_head(index_t tokens, index_t vocabulary, index_t width) {
  const std::string shape = bench::shape(tokens, vocabulary, width);
  const double product = 2.0 * static_cast<double>(tokens * vocabulary * width);
  const auto hidden = [=]() -> auto& { return operand<T>("hidden", tokens, width); };
  const auto weight = [=]() -> auto& { return operand<T>("head", vocabulary, width); };
  const auto logits = [=]() -> auto& { return operand<T>("head logits", tokens, vocabulary); };
  const auto dhidden = [=]() -> auto& { return operand<T>("dhidden", tokens, width); };
  const auto dweight = [=]() -> auto& { return operand<T>("dhead", vocabulary, width); };
  const auto labels = [=] { return draws<std::int32_t>(tokens, vocabulary, 1); };
  add<T>("lm_head_gemm", shape, {.flop = product}, [=](mlkit::cpu exec) {
    return [=, &h = hidden(), &w = weight(), &z = logits()] { mlkit::matmul(exec, h, mlkit::transposed(w), z); };
  });
  add<T>("lm_head", shape, {.flop = product}, [=](mlkit::cpu exec) {
    return [=, &h = hidden(), &w = weight(), ids = labels()] { rl::cross_entropy(exec, h, w, ids, {}); };
  });
  add<T>("lm_head_training_gemm", shape, {.flop = 3 * product}, [=](mlkit::cpu exec) {
    return [=, &h = hidden(), &w = weight(), &z = logits(), &dh = dhidden(), &dw = dweight()] {
      mlkit::matmul(exec, h, mlkit::transposed(w), z);
      mlkit::matmul(exec, z, w, dh);
      mlkit::matmul(exec, mlkit::transposed(z), h, dw);
    };
  });
  add<T>("lm_head_training", shape, {.flop = 3 * product}, [=](mlkit::cpu exec) {
    return [=, &h = hidden(), &w = weight(), ids = labels(), &dh = dhidden(), &dw = dweight()] {
      rl::cross_entropy(exec, h, w, ids, {}, {.dhidden = mlkit::as_view(dh), .dweight = mlkit::as_view(dw)});
    };
  });
}

void add_ppo_loss(index_t sequences, index_t time) {
  const double tokens = static_cast<double>(sequences * time);
  const auto of = [=](const std::string& name) { return view("ppo " + name, sequences, time); };
  add<float>("ppo_loss", bench::shape(sequences, time), {.bytes = tokens * (8 * 4 + 1), .written = tokens * 2 * 4},
             [=](mlkit::cpu exec) {
               return [=, mask = flags(sequences * time, 900, 3), logp = of("logp"), old = of("old"), a = of("a"),
                       v = of("v"), v_old = of("v_old"), r = of("r"), dlogp = of("dlogp"), dv = of("dv")] {
                 rl::ppo_loss(exec,
                              rl::policy_batch<float>{
                                  .log_probs = logp,
                                  .old_log_probs = old,
                                  .advantages = a,
                                  .values = v,
                                  .old_values = v_old,
                                  .returns = r,
                                  .mask = mlkit::matrix_view<const std::uint8_t>(mask.data(), {sequences, time})},
                              {.clip = 0.2, .value_clip = 0.2, .value = 0.1}, {.log_probs = dlogp, .values = dv});
               };
             });
}

void add_whiten(index_t sequences, index_t time) {
  const double tokens = static_cast<double>(sequences * time);
  add<float>("whiten", bench::shape(sequences, time), {.bytes = tokens * (2 * 4 + 1), .written = tokens * 4},
             [=](mlkit::cpu exec) {
               return [=, mask = flags(sequences * time, 900, 3), x = view("white", sequences, time)] {
                 rl::whiten(exec, x, mlkit::matrix_view<const std::uint8_t>(mask.data(), {sequences, time}));
               };
             });
}

mlkit::vector_view<float> numbers(const std::string& name, index_t n) {
  return {operand<float>("preference " + name, 1, n).data(), {n}};
}

// One call over so many pairs, in whose time that of calling counts.
template <class Loss>
void add_pairs(const std::string& name, const Loss& loss, index_t pairs) {
  add<float>(name, std::to_string(pairs), {}, [=](mlkit::cpu exec) {
    return [=, in = typename Loss::template inputs<float>{numbers("chosen", pairs), numbers("rejected", pairs)},
            dc = numbers("dchosen", pairs), dr = numbers("drejected", pairs),
            ref_c = numbers("reference chosen", pairs), ref_r = numbers("reference rejected", pairs)]() mutable {
      if constexpr (requires { in.reference_chosen; }) {
        in.reference_chosen = ref_c;
        in.reference_rejected = ref_r;
      }
      rl::preference_loss(exec, in, loss, {.chosen = dc, .rejected = dr});
    };
  });
}
void add_kto(index_t n) {
  add<float>("kto", std::to_string(n), {}, [=](mlkit::cpu exec) {
    return [=, p = numbers("chosen", n), ref = numbers("rejected", n), d = numbers("dchosen", n),
            desirable = flags(n, 500, 4)] {
      rl::preference_loss(exec, {.log_probs = p, .reference = ref, .desirable = desirable}, rl::kto{.kl = 0.1},
                          {.log_probs = d});
    };
  });
}
void add_k_wise(index_t prompts, index_t completions) {
  const index_t n = prompts * completions;
  add<float>("k_wise", std::to_string(n), {}, [=](mlkit::cpu exec) {
    return [=, r = numbers("chosen", n), d = numbers("dchosen", n)] {
      rl::preference_loss(exec, {.rewards = r, .of = rl::groups(completions)}, rl::k_wise{}, {.rewards = d});
    };
  });
}

}  // namespace

int main(int argc, char** argv) {
  constexpr double kib = 1 << 10, mib = 1 << 20;
  bench::add_ceilings({26 * mib, 64 * mib}, {576 * kib, 2304 * kib, 4.125 * mib, 18 * mib, 102 * mib});
  struct rows_of {
    index_t rows, cols;
  };
  for (const auto& [sequences, time] :
       {rows_of{1024, 1024}, {8, 2048}, {256, 128}, {4096, 32}, {1, 32768}, {37, 1000}, {3, 7}})
    for (const bool time_major : {false, true}) add_gae(sequences, time, time_major);
  for (const auto& [sequences, time] : {rows_of{1024, 1024}, {256, 128}}) {
    add_td_lambda(sequences, time);
    add_vtrace(sequences, time);
  }
  for (const auto& [rows, vocabulary] : {rows_of{256, 50257}, {2048, 8192}, {37, 1000}, {3, 7}}) {
    add_log_prob<float>(rows, vocabulary);
    add_log_prob<bf16>(rows, vocabulary);
  }
  for (const auto& [sequences, time] : {rows_of{256, 512}, {37, 1000}, {3, 7}}) {
    add_ppo_loss(sequences, time);
    add_whiten(sequences, time);
  }
  add_head<float>(512, 50257, 768);
  add_head<bf16>(512, 50257, 768);
  add_head<float>(37, 1000, 100);
  add_head<bf16>(37, 1000, 100);
  constexpr index_t pairs = 64;
  add_pairs("bradley_terry", rl::bradley_terry{}, pairs);
  add_pairs("dpo", rl::dpo{}, pairs);
  add_pairs("ipo", rl::ipo{}, pairs);
  add_pairs("orpo", rl::orpo{}, pairs);
  add_pairs("simpo", rl::simpo{}, pairs);
  add_kto(pairs);
  add_k_wise(pairs / 4, 4);
  return bench::run(argc, argv);
}
