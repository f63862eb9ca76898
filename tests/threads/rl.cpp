// Advantages, log-probabilities, and losses.
#include <mlkit/rl.hpp>

#include "calls.hpp"

namespace rl = mlkit::rl;

namespace {

std::vector<std::int32_t> ids(index_t n, index_t below) {
  std::vector<std::int32_t> v(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < v.size(); ++i)
    v[i] = static_cast<std::int32_t>(i * 7919 % static_cast<std::size_t>(below));
  return v;
}

// One in `period` elements is `value`, the others are not.
std::vector<std::uint8_t> every(index_t n, index_t period, bool value) {
  std::vector<std::uint8_t> v(static_cast<std::size_t>(n), !value);
  for (index_t i = period / 2; i < n; i += period) v[static_cast<std::size_t>(i)] = value;
  return v;
}

void append_stats(outputs& all, std::initializer_list<double> stats) {
  for (const double s : stats) all.push_back(static_cast<float>(s));
}

}  // namespace

TEST_CASE("advantages of many sequences and of a long one, in both layouts, masked and packed", "[threads]") {
  struct shape {
    index_t batch, time;
  };
  for (const shape& s : {shape{260, 301}, shape{1, 70001}}) {
    const matrix<float> r = noise(s.batch, s.time, 1), v = noise(s.batch, s.time, 2), last = noise(s.batch, s.time, 3);
    const auto terminated = every(r.size(), 97, true), truncated = every(r.size(), 131, true),
               mask = every(r.size(), 7, false);
    const auto bytes = [&](const std::vector<std::uint8_t>& f) {
      return mlkit::matrix_view<const std::uint8_t>(f.data(), {s.batch, s.time});
    };
    check([&](const cpu& exec) {
      outputs all;
      matrix<float> a({s.batch, s.time}), returns({s.batch, s.time}), turned({s.time, s.batch});
      const rl::rollout<float> in{.rewards = r,
                                  .values = v,
                                  .terminated = bytes(terminated),
                                  .truncated = bytes(truncated),
                                  .final_values = last,
                                  .mask = bytes(mask)};
      rl::gae(exec, in, {}, {.advantages = a, .returns = returns});
      rl::gae(exec, in, {}, {.advantages = mlkit::transposed(turned)});
      for (const auto* t : {&a, &returns, &turned}) append(all, *t);
      rl::n_step_returns(exec, in, {.steps = 5}, returns);
      append(all, returns);
      return all;
    });
  }
  const matrix<float> x = noise(1, 90000, 4);
  const std::vector<std::int32_t> starts{0, 40000, 40001, 90000};
  check([&](const cpu& exec) {
    matrix<float> a({1, 90000});
    rl::gae(exec, {.rewards = x, .values = x, .final_values = x, .cu_seqlens = starts}, {}, {.advantages = a});
    return outputs(a.begin(), a.end());
  });
}

TEST_CASE("log-probabilities, entropies and their gradient, of many rows and of few long ones", "[threads]") {
  struct shape {
    index_t rows, vocabulary;
  };
  for (const shape& s : {shape{300, 520}, shape{3, 70001}}) {
    const matrix<float> logits = noise(s.rows, s.vocabulary, 1), gradient = noise(1, s.rows, 2);
    const auto tokens = ids(s.rows, s.vocabulary);
    const auto mask = every(s.rows, 5, false);
    check([&](const cpu& exec) {
      outputs all;
      mlkit::vector<float> logp({s.rows}), entropy({s.rows}), lse({s.rows});
      matrix<float> dlogits({s.rows, s.vocabulary});
      rl::log_probs(exec, logits, tokens, {.temperature = 0.7, .mask = mask},
                    {.logp = logp, .entropy = entropy, .lse = lse});
      for (const auto* t : {&logp, &entropy, &lse}) append(all, *t);
      rl::log_probs_and_gradient(
          exec, logits, tokens, {.mask = mask},
          [&](index_t row, float, float h) {
            return rl::token_gradient<float>{gradient(0, row), h};
          },
          {.logp = logp, .entropy = entropy}, dlogits);
      for (const auto* t : {&logp, &entropy}) append(all, *t);
      append(all, dlogits);
      return all;
    });
  }
}

TEST_CASE("the language model's head, with room for logits and without", "[threads]") {
  for (const index_t tokens : {40, 300}) {
    const index_t vocabulary = 5003, width = 64;
    const matrix<float> hidden = noise(tokens, width, 1), weight = noise(vocabulary, width, 2);
    auto labels = ids(tokens, vocabulary);
    labels[1] = -100;
    check([&](const cpu& exec) {
      matrix<float> dh({tokens, width}), dw({vocabulary, width});
      const auto result = rl::cross_entropy(exec, hidden, weight, labels, {},
                                            {.dhidden = mlkit::as_view(dh), .dweight = mlkit::as_view(dw)});
      outputs all;
      append_stats(all, {result.loss});
      append(all, dh), append(all, dw);
      return all;
    });
  }
}

TEST_CASE("cross-entropy of completions", "[threads]") {
  const matrix<float> logits = noise(300, 520, 1);
  auto labels = ids(300, 520);
  for (std::size_t i = 0; i < labels.size(); i += 4) labels[i] = -100;
  check([&](const cpu& exec) {
    matrix<float> gradient({300, 520});
    outputs all;
    append_stats(all,
                 {rl::cross_entropy(exec, logits, labels, {.shift = true, .label_smoothing = 0.1}, gradient).loss});
    append(all, gradient);
    return all;
  });
}

TEST_CASE("policy losses, by token and by sequence", "[threads]") {
  const index_t sequences = 130, time = 700;
  const matrix<float> logp = noise(sequences, time, 1), old = noise(sequences, time, 2), a = noise(sequences, time, 3),
                      v = noise(sequences, time, 4), v_old = noise(sequences, time, 5), r = noise(sequences, time, 6),
                      h = noise(sequences, time, 7);
  const auto kept = every(sequences * time, 7, false);
  check([&](const cpu& exec) {
    outputs all;
    matrix<float> dlogp({sequences, time}), dv({sequences, time}), dh({sequences, time});
    const rl::policy_batch<float> batch{.log_probs = logp,
                                        .old_log_probs = old,
                                        .advantages = a,
                                        .entropies = h,
                                        .values = v,
                                        .old_values = v_old,
                                        .returns = r,
                                        .mask = mlkit::matrix_view<const std::uint8_t>(kept.data(), {sequences, time})};
    const auto take = [&](const rl::policy_stats& s) {
      for (const auto* t : {&dlogp, &dv, &dh}) append(all, *t);
      append_stats(all, {s.loss, s.policy_loss, s.value_loss, s.entropy, s.kl_k1, s.kl_k3, s.clip_fraction,
                         s.explained_variance, s.ratio_min, s.ratio_max});
    };
    take(rl::ppo_loss(exec, batch, {.value_clip = 0.2, .entropy = 0.01}, {dlogp, dv, dh}));
    take(rl::policy_loss(exec, batch, rl::gspo{}, rl::sequence_mean_of_means{}, {}, {dlogp, dv, dh}));
    return all;
  });
}

TEST_CASE("a policy loss over logits, by token and by sequence", "[threads]") {
  const index_t sequences = 40, time = 25, classes = 300;
  const auto logits = noise(std::array{sequences, time, classes}, 1);
  const matrix<float> old = noise(sequences, time, 2), a = noise(sequences, time, 3);
  const auto chosen = ids(sequences * time, classes);
  const mlkit::matrix_view<const std::int32_t> tokens(chosen.data(), {sequences, time});
  check([&](const cpu& exec) {
    outputs all;
    mlkit::tensor<float, 3> gradient(logits.extents());
    const rl::policy_batch<float> batch{.old_log_probs = old, .advantages = a};
    const auto take = [&](const rl::policy_stats& s) {
      append(all, gradient);
      append_stats(all, {s.loss, s.entropy, s.kl_k3});
    };
    take(rl::ppo_loss(exec, logits, tokens, {}, batch, {.entropy = 0.01}, {.logits = gradient}));
    take(rl::policy_loss(exec, logits, tokens, {}, batch, rl::gspo{}, rl::sequence_mean_of_means{}, {},
                         {.logits = gradient}));
    return all;
  });
}

TEST_CASE("discrete and Gaussian policies, their gradients and samples", "[threads]") {
  const index_t rows = 5000, d = 9;
  const matrix<float> logits = noise(rows, d, 1), mean = noise(rows, d, 2), log_std = noise(1, d, 3),
                      weights = noise(1, rows, 4);
  const std::array<index_t, 2> sizes{4, 5};
  const mlkit::vector_view<const float> w(weights.data(), {rows});
  check([&](const cpu& exec) {
    outputs all;
    const rl::multi_discrete<float> discrete{logits, sizes};
    std::vector<std::int32_t> drawn(static_cast<std::size_t>(2 * rows));
    const mlkit::matrix_view<std::int32_t> actions(drawn.data(), {rows, 2});
    mlkit::vector<float> logp({rows}), entropy({rows});
    matrix<float> dlogits({rows, d}), values({rows, d}), dmean({rows, d}), dlog_std({1, d});
    rl::sample(exec, discrete, {.seed = 7}, actions);
    rl::log_probs(exec, discrete, actions, {.logp = logp, .entropy = entropy});
    rl::backward(exec, discrete, actions, {.dlogp = w, .dentropy = w}, dlogits);
    append(all, drawn), append(all, logp), append(all, entropy), append(all, dlogits);
    const rl::gaussian<float> normal{mean, log_std};
    rl::sample(exec, normal, {.seed = 8}, values);
    rl::log_probs(exec, normal, values, {.logp = logp, .entropy = entropy});
    rl::backward(exec, normal, values, {.dlogp = w, .dentropy = w}, {.mean = dmean, .log_std = dlog_std});
    append(all, logp), append(all, entropy);
    for (const auto* t : {&values, &dmean, &dlog_std}) append(all, *t);
    return all;
  });
}

TEST_CASE("divergences, preferences and log-probabilities of sequences", "[threads]") {
  const index_t sequences = 300, time = 256, pairs = sequences * time;
  const matrix<float> logp = noise(sequences, time, 1), reference = noise(sequences, time, 2);
  const auto bytes = every(pairs, 7, false);
  const mlkit::matrix_view<const std::uint8_t> mask(bytes.data(), {sequences, time});
  const auto row = [&](const matrix<float>& m) { return mlkit::vector_view<const float>(m.data(), {pairs}); };
  check([&](const cpu& exec) {
    outputs all;
    matrix<float> gradient({sequences, time}), other({sequences, time});
    const mlkit::vector_view<float> d(gradient.data(), {pairs}), e(other.data(), {pairs});
    const auto take = [&](double loss) {
      append_stats(all, {loss});
      append(all, gradient), append(all, other);
    };
    take(rl::kl_loss(exec, {.log_probs = logp, .reference = reference, .mask = mask}, {}, gradient).loss);
    take(rl::preference_loss(exec, {.chosen = row(logp), .rejected = row(reference)}, rl::bradley_terry{},
                             {.chosen = d, .rejected = e})
             .loss);
    take(rl::preference_loss(exec, {.log_probs = row(logp), .reference = row(reference), .desirable = bytes}, rl::kto{},
                             {.log_probs = d})
             .loss);
    take(rl::preference_loss(exec, {.rewards = row(logp), .of = rl::groups(8)}, rl::k_wise{}, {.rewards = d}).loss);
    mlkit::vector<float> sums({sequences});
    rl::sequence_log_probs(exec, {.log_probs = logp, .mask = mask}, rl::sequence_reduction::mean, sums);
    rl::sequence_log_probs_backward(exec, {.log_probs = logp, .mask = mask}, rl::sequence_reduction::mean, sums,
                                    gradient);
    append(all, sums), append(all, gradient);
    return all;
  });
}

TEST_CASE("whitening and running statistics", "[threads]") {
  const matrix<float> x = noise(400, 333, 1);
  const auto mask = every(x.size(), 7, false);
  check([&](const cpu& exec) {
    matrix<float> white({400, 333});
    rl::whiten(exec, x, mlkit::matrix_view<const std::uint8_t>(mask.data(), {400, 333}), {}, white);
    rl::running_stats stats(333);
    stats.update(exec, x);
    matrix<float> normal({400, 333});
    stats.normalize(exec, x, {}, normal);
    outputs all;
    append(all, white), append(all, normal);
    return all;
  });
}
