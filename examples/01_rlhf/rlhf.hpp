// The stages of RLHF over a small language model: samples, a reward model from pairs of them, and PPO against it.
#pragma once

#include "common/progress.hpp"
#include "common/report.hpp"
#include "preference.hpp"
#include "verses.hpp"

#include <mlkit/nn/rl.hpp>
#include <mlkit/rl.hpp>

#include <memory>

namespace examples {

namespace rl = mlkit::rl;
using language_model = nn::language_model<float>;

/// A continuation of a prompt.
struct sample {
  const prompt* of = nullptr;
  token_list ids;                // the continuation, its end included where one was drawn
  std::vector<float> log_probs;  // of its tokens, at the temperature they were drawn with
  std::string text;
  double reward = 0;  // the true one
};

/// What all stages share: the text, and who judges.
struct study {
  verses text;
  judge person;
};

/// How all stages draw.
constexpr double temperature = 1;
constexpr index_t longest = 24;  // tokens of a continuation

inline std::vector<sample> draw(const mlkit::cpu& exec, const language_model& model, const study& of,
                                const std::vector<const prompt*>& prompts, std::uint64_t seed) {
  std::vector<token_list> ids;
  for (const prompt* p : prompts) ids.push_back(p->ids);
  const auto said = nn::generate<float>(
      exec, model, ids,
      {.most = longest, .end = nn::byte_pair_tokenizer::end, .choice = {.temperature = temperature}, .seed = seed});
  std::vector<sample> samples;
  for (std::size_t i = 0; i < said.size(); ++i) {
    sample s{prompts[i], said[i].ids, {said[i].log_probs.begin(), said[i].log_probs.end()}, {}, 0};
    s.text = of.text.words.decode(s.ids);
    s.reward = of.person.reward(s.text);
    samples.push_back(std::move(s));
  }
  return samples;
}

/// Some prompts of many, drawn.
inline std::vector<const prompt*> pick(const std::vector<prompt>& from, index_t count, std::uint64_t seed) {
  std::vector<const prompt*> picked;
  const mlkit::random_stream random{seed, 0x70726f6d};
  for (index_t i = 0; i < count; ++i)
    picked.push_back(&from[static_cast<std::size_t>(static_cast<double>(random.uniform(static_cast<std::uint64_t>(i))) *
                                                    static_cast<double>(from.size()))]);
  return picked;
}

/// Samples side by side, without padding: what a model reads at once. Prompts are read but not learnt from: all that
/// follows is of the tokens of continuations alone, [tokens] with `starts`.
struct packed_samples {
  token_list ids, documents;
  token_list tokens;     // of the continuations
  token_list before;     // for each, where in `ids` the token before it is, whose hidden state predicts it
  token_list starts{0};  // of each continuation in `tokens`, and their end
  token_list last;       // where in `ids` the last token of each sample is
  std::vector<float> log_probs;

  explicit packed_samples(std::span<const sample> samples) {
    std::int32_t document = 0;
    for (const sample& s : samples) {
      const auto append = [&](const token_list& more) { ids.insert(ids.end(), more.begin(), more.end()); };
      append(s.of->ids);
      for (std::size_t i = 0; i < s.ids.size(); ++i) before.push_back(static_cast<std::int32_t>(ids.size() + i - 1));
      append(s.ids);
      documents.resize(ids.size(), document++);
      tokens.insert(tokens.end(), s.ids.begin(), s.ids.end());
      log_probs.insert(log_probs.end(), s.log_probs.begin(), s.log_probs.end());
      starts.push_back(static_cast<std::int32_t>(tokens.size()));
      last.push_back(static_cast<std::int32_t>(ids.size() - 1));
    }
  }
  index_t count() const { return static_cast<index_t>(last.size()); }

  /// The hidden states [tokens, width] that predict the continuations' tokens, or those of last tokens.
  nn::var<float> states(nn::tape<float>& tape, const language_model& model, const token_list& places) const {
    const nn::var<float> h = model.hidden(tape, ids, 1, documents);
    return nn::embedding<float>(nn::reshape(h, {h.rows(), h.columns()}), places);
  }
};

/// log p of the continuations' tokens at the sampling temperature.
inline std::vector<float> log_probs(const mlkit::cpu& exec, const language_model& model, const packed_samples& pack) {
  nn::tape<float> tape(exec, {.record = false});
  const auto h = pack.states(tape, model, pack.before);
  const auto p = nn::token_log_probs<float>(model.logits(h), pack.tokens, temperature).log_probs;
  return {p.data(), p.data() + p.size()};
}

/// Two continuations of one prompt, and which was said to be better.
struct preference_pair {
  sample chosen, rejected;
};

/// So many pairs drawn from a model, labelled by the noisy judge. Pairs that are equally good to the judge are left
/// out: who is asked says so.
inline std::vector<preference_pair> compare(const mlkit::cpu& exec, const language_model& model, const study& of,
                                            const std::vector<prompt>& prompts, std::size_t count, std::uint64_t seed,
                                            progress& bar, std::size_t done = 0) {
  std::vector<preference_pair> pairs;
  constexpr index_t at_once = 256;
  const mlkit::random_stream random{seed, 0x6c6162656c};
  for (std::uint64_t round = 0; pairs.size() < count; ++round) {
    constexpr std::uint64_t patience = 10;
    if (round == patience && pairs.size() < count / 8)
      throw mlkit::value_error("the judge finds hardly a difference: its words are too rare in this text");
    std::vector<const prompt*> twice;
    for (const prompt* p : pick(prompts, at_once, 1000 * seed + round)) twice.insert(twice.end(), 2, p);
    std::vector<sample> both = draw(exec, model, of, twice, 1000 * seed + round);
    for (std::size_t i = 0; i < both.size() && pairs.size() < count; i += 2) {
      if (both[i].reward == both[i + 1].reward) continue;
      const bool better =
          of.person.prefers(both[i].reward, both[i + 1].reward, static_cast<double>(random.uniform(pairs.size())));
      pairs.push_back({std::move(both[better ? i : i + 1]), std::move(both[better ? i + 1 : i])});
    }
    bar.at(static_cast<index_t>(done + pairs.size()));
  }
  return pairs;
}

/// The language model with a number for a text in place of its logits: from the hidden state of the text's last token,
/// its end where it has one. Scores are shifted and scaled to mean 0 and deviation 1 over samples of the model that PPO
/// starts from (`normalise`), so that a weight of the KL penalty means the same for every reward model.
class reward_model {
 public:
  static constexpr std::size_t batch = 32;  // pairs of a step

  explicit reward_model(const language_model& base)
      : model_(base.options()), heads_(1), head_(nn::scope<float>(heads_) / "score", base.options().width, 1) {
    model_.store().copy_values(base.store());
    std::fill(head_.weight->value.begin(), head_.weight->value.end(), 0.0f);
  }

  /// Minimises -log sigmoid(score(chosen) - score(rejected)), each pair `rounds` times; on_step(loss) after each step.
  template <class F>
  void train(const mlkit::cpu& exec, std::span<const preference_pair> pairs, int rounds, std::uint64_t seed,
             F&& on_step);

  /// The scores of samples.
  std::vector<float> operator()(const mlkit::cpu& exec, std::span<const sample> samples) const {
    std::vector<float> scores;
    constexpr std::size_t at_once = 64;
    for (std::size_t first = 0; first < samples.size(); first += at_once) {
      const packed_samples pack(samples.subspan(first, std::min(at_once, samples.size() - first)));
      nn::tape<float> tape(exec, {.record = false});
      const auto s = head_(pack.states(tape, model_, pack.last));
      for (index_t i = 0; i < s.size(); ++i) scores.push_back((s.data()[i] - shift_) * scale_);
    }
    return scores;
  }

  /// The share of pairs whose better one has the higher score.
  double accuracy(const mlkit::cpu& exec, std::span<const preference_pair> pairs) const;

  void normalise(const mlkit::cpu& exec, std::span<const sample> samples) {
    const std::vector<float> scores = (*this)(exec, samples);
    const statistics s = over({scores.begin(), scores.end()});
    shift_ = static_cast<float>(s.mean);
    scale_ = static_cast<float>(1 / std::max(s.deviation, 1e-6));
  }

 private:
  language_model model_;
  nn::parameters<float> heads_;
  nn::linear_layer<float> head_;
  float shift_ = 0, scale_ = 1;
};

template <class F>
void reward_model::train(const mlkit::cpu& exec, std::span<const preference_pair> pairs, int rounds, std::uint64_t seed,
                         F&& on_step) {
  constexpr double rate = 2e-3;
  const auto over = nn::trainable(model_.store(), heads_);
  nn::adamw<float> optimizer(over, {.beta2 = 0.98, .decay = 0.1});
  nn::tape<float> tape(exec);
  const std::size_t steps = static_cast<std::size_t>(rounds) * (pairs.size() / batch);
  nn::shuffled next(pairs.size(), seed);
  for (std::size_t step = 0; step < steps; ++step) {
    std::vector<sample> samples(2 * batch);
    for (std::size_t i = 0; i < batch; ++i) {
      const preference_pair& p = pairs[next()];
      samples[i] = p.chosen, samples[batch + i] = p.rejected;
    }
    const packed_samples pack(samples);
    optimizer.set_rate(rate * std::min(1.0, static_cast<double>(step + 1) / 10) *
                       (1 - static_cast<double>(step) / static_cast<double>(steps)));
    tape.clear();
    const auto scores = head_(pack.states(tape, model_, pack.last));
    const auto part = [&](std::size_t first) { return nn::slice(scores, static_cast<index_t>(first), batch, 0); };
    const auto loss = nn::preference_loss(part(0), part(batch));
    tape.backward(loss);
    nn::clip_gradients<float>(exec, over, 1);
    optimizer.step(exec);
    on_step(static_cast<double>(loss.item()));
  }
}

inline double reward_model::accuracy(const mlkit::cpu& exec, std::span<const preference_pair> pairs) const {
  std::vector<sample> chosen, rejected;
  for (const preference_pair& p : pairs) chosen.push_back(p.chosen), rejected.push_back(p.rejected);
  const auto a = (*this)(exec, chosen), b = (*this)(exec, rejected);
  double right = 0;
  for (std::size_t i = 0; i < a.size(); ++i) right += a[i] > b[i] ? 1 : a[i] == b[i] ? 0.5 : 0;
  return right / static_cast<double>(pairs.size());
}

/// All values of a store, one after the other.
inline std::vector<float> values_of(const nn::parameters<float>& store) {
  std::vector<float> all;
  for (const nn::parameter<float>& p : store) all.insert(all.end(), p.value.begin(), p.value.end());
  return all;
}

struct ppo_settings {
  index_t iterations = 36, batch = 48;
  int epochs = 2, minibatches = 2;
  double rate = 6e-3;
  double beta = 0.1;  // the first weight of the KL penalty
  double target = 6;  // the divergence of a continuation that beta is steered to; 0: beta stays
  bool lora = true;   // a policy that is the frozen base and adapters, else all of a copy of the base
  index_t rank = 8;
  std::uint64_t seed = 0;
};

/// What one iteration of PPO saw, means over its samples.
struct ppo_step {
  double score, reward, kl, k3, beta, clip_fraction, explained, length;
};

/// A policy that learns by PPO from a reward model's scores, less beta times its divergence from the base.
class ppo {
 public:
  ppo(const language_model& base, const ppo_settings& o)
      : o_(o),
        base_(&base),
        model_(base.options()),
        adapters_(o.seed),
        heads_(o.seed),
        value_(nn::scope<float>(heads_) / "value", base.options().width, 1),
        control_{.beta = o.beta, .target = o.target > 0 ? o.target : 1, .horizon = 5 * static_cast<double>(o.batch)} {
    model_.store().copy_values(base.store());
    std::fill(value_.weight->value.begin(), value_.weight->value.end(), 0.0f);
    if (o.lora) {
      model_.store().freeze();
      nn::adapt(model_, adapters_, {.rank = o.rank, .alpha = 2 * static_cast<double>(o.rank)});
    }
    over_ = nn::trainable(model_.store(), adapters_, heads_);
    optimizer_.emplace(over_, nn::adamw_options{.beta2 = 0.98, .decay = 0});
  }

  language_model& policy() { return model_; }
  const nn::parameters<float>& adapters() const { return adapters_; }
  double largest_first_ratio() const { return first_ratio_; }
  double smallest_k3() const { return smallest_k3_; }
  const std::vector<ppo_step>& steps() const { return steps_; }

  void iterate(const mlkit::cpu& exec, const study& of, const reward_model& reward);

 private:
  ppo_settings o_;
  const language_model* base_;
  language_model model_;
  nn::parameters<float> adapters_, heads_;
  nn::linear_layer<float> value_;
  std::vector<nn::parameter<float>*> over_;
  std::optional<nn::adamw<float>> optimizer_;
  rl::adaptive_kl control_;
  std::vector<ppo_step> steps_;
  double first_ratio_ = 0, smallest_k3_ = 0;
};

inline void ppo::iterate(const mlkit::cpu& exec, const study& of, const reward_model& reward) {
  const std::uint64_t round = o_.seed * 1000 + steps_.size();
  const std::vector<sample> samples = draw(exec, model_, of, pick(of.text.training_prompts, o_.batch, round), round);
  const packed_samples all(samples);
  const std::size_t tokens = all.tokens.size();

  // What was drawn, as the policy, its values, the frozen reference and the reward model see it.
  const std::vector<float> reference = examples::log_probs(exec, *base_, all), score = reward(exec, samples);
  std::vector<float> values(tokens), rewards(tokens), advantages(tokens), returns(tokens);
  {
    nn::tape<float> tape(exec, {.record = false});
    const auto v = value_(all.states(tape, model_, all.before));
    std::copy_n(v.data(), tokens, values.begin());
  }

  // Rewards: -beta times the divergence of each token, and the score on the last one. An end of a continuation is its
  // last token, so there is nothing behind it to bootstrap from.
  const rl::kl_reward_stats kl = rl::kl_rewards(
      exec, {.log_probs = all.log_probs, .reference = reference, .scores = score, .cu_seqlens = all.starts},
      {.beta = control_.beta}, rl::k1{}, rewards);
  const rl::kl_stats k3 = rl::kl(exec, {.log_probs = all.log_probs, .reference = reference}, rl::k3{});
  std::vector<std::uint8_t> ended(tokens);
  for (std::size_t b = 1; b < all.starts.size(); ++b) ended[static_cast<std::size_t>(all.starts[b] - 1)] = 1;
  rl::gae(exec, {.rewards = rewards, .values = values, .terminated = ended, .cu_seqlens = all.starts},
          {.gamma = 1, .lambda = 0.95}, {.advantages = advantages, .returns = returns});
  rl::whiten(exec, advantages);

  // Several steps on the same samples, in minibatches of whole continuations.
  nn::tape<float> tape(exec);
  rl::policy_stats stats;
  double clipped = 0;
  const auto each = static_cast<std::size_t>(o_.batch / o_.minibatches);
  constexpr double last = 0.3;  // of the first rate
  optimizer_->set_rate(o_.rate *
                       (1 - (1 - last) * static_cast<double>(steps_.size()) / static_cast<double>(o_.iterations)));
  for (int epoch = 0; epoch < o_.epochs; ++epoch)
    for (std::size_t first = 0; first + each <= samples.size(); first += each) {
      const packed_samples pack(std::span<const sample>(samples).subspan(first, each));
      const auto from = static_cast<std::size_t>(all.starts[first]);
      const auto part = [&](const std::vector<float>& x) {
        return mlkit::vector_view<const float>(x.data() + from, {static_cast<index_t>(pack.tokens.size())});
      };
      tape.clear();
      const auto h = pack.states(tape, model_, pack.before);
      const auto now = nn::token_log_probs<float>(model_.logits(h), pack.tokens, temperature);
      const auto v = nn::reshape(value_(h), now.log_probs.shape());
      const auto loss = nn::ppo_loss<float>({.log_probs = now.log_probs, .values = v},
                                            {.old_log_probs = part(all.log_probs),
                                             .advantages = part(advantages),
                                             .old_values = part(values),
                                             .returns = part(returns),
                                             .cu_seqlens = pack.starts},
                                            {.clip = 0.2, .value_clip = 0.2, .value = 0.1}, &stats);
      if (epoch == 0 && first == 0)  // nothing was learnt since: the ratio is 1 within rounding
        first_ratio_ = std::max({first_ratio_, stats.ratio_max - 1, 1 - stats.ratio_min});
      tape.backward(loss);
      nn::clip_gradients<float>(exec, over_, 1);
      optimizer_->step(exec);
      clipped += stats.clip_fraction / (o_.epochs * o_.minibatches);
    }

  std::vector<double> scored(score.begin(), score.end()), truly;
  for (const sample& s : samples) truly.push_back(s.reward);
  steps_.push_back({over(scored).mean, over(truly).mean, kl.per_sequence(), k3.mean(), control_.beta, clipped,
                    stats.explained_variance, static_cast<double>(tokens) / static_cast<double>(samples.size())});
  smallest_k3_ = steps_.size() == 1 ? k3.mean() : std::min(smallest_k3_, k3.mean());
  if (o_.target > 0) control_.update(kl.per_sequence(), o_.batch);
}

}  // namespace examples
