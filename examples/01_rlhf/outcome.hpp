// What the stages came to: policies judged on prompts that nothing was trained on, curves and samples.
#pragma once

#include "common/curves.hpp"
#include "rlhf.hpp"

#include <fstream>
#include <iostream>

namespace examples {

/// Of a policy on prompts that nothing was trained on: means over a sample of each, and the samples.
struct outcome {
  double reward, score, kl, bleu = 0, rouge = 0;
  std::vector<sample> samples;
};

inline outcome judge_policy(const mlkit::cpu& exec, const study& of, const language_model& base,
                            const reward_model& reward, const language_model& model, std::uint64_t seed) {
  outcome o{};
  o.samples = draw(exec, model, of, pick(of.text.held_out_prompts, 256, seed), seed);
  const packed_samples pack(o.samples);
  const auto reference = log_probs(exec, base, pack), scores = reward(exec, o.samples);
  const double n = static_cast<double>(o.samples.size());
  for (std::size_t i = 0; i < reference.size(); ++i) o.kl += (pack.log_probs[i] - reference[i]) / n;
  for (std::size_t i = 0; i < o.samples.size(); ++i) {
    const sample& s = o.samples[i];
    o.reward += s.reward / n, o.score += scores[i] / n;
    const word_list said = words_of(s.text), written = words_of(s.of->rest);
    o.bleu += bleu(said, written) / n, o.rouge += rouge_l(said, written) / n;
  }
  return o;
}

/// Whether a measure of nearness to the verse as it was written says which of two continuations is preferred.
inline double accuracy_of(double (*measure)(const word_list&, const word_list&),
                          const std::vector<preference_pair>& pairs) {
  double right = 0;
  for (const preference_pair& p : pairs) {
    const word_list written = words_of(p.chosen.of->rest);
    const double a = measure(words_of(p.chosen.text), written), b = measure(words_of(p.rejected.text), written);
    right += (a > b ? 1 : a == b ? 0.5 : 0) / static_cast<double>(pairs.size());
  }
  return right;
}

/// Rewards, divergence and the weight of the penalty by iteration; all runs but the last are tied to the reference.
inline void draw_curves(const std::filesystem::path& out, const std::vector<std::unique_ptr<ppo>>& runs,
                        double target) {
  const auto mean = [&](const std::string& name, bool tied, double ppo_step::*what) {
    curve c{name, {}, {}};
    const std::size_t first = tied ? 0 : runs.size() - 1, last = tied ? runs.size() - 1 : runs.size();
    for (std::size_t step = 0; step < runs[0]->steps().size(); ++step) {
      c.x.push_back(static_cast<double>(step));
      c.y.push_back(0);
      for (std::size_t i = first; i < last; ++i)
        c.y.back() += runs[i]->steps()[step].*what / static_cast<double>(last - first);
    }
    return c;
  };
  const auto kl = mean("with the penalty", true, &ppo_step::kl), far = mean("beta = 0", false, &ppo_step::kl);
  const auto truth = mean("true reward", true, &ppo_step::reward),
             score = mean("reward model's score", true, &ppo_step::score),
             false_truth = mean("true reward, beta = 0", false, &ppo_step::reward),
             false_score = mean("score, beta = 0", false, &ppo_step::score);
  write_curves(out / "reward", {"PPO: reward of the policy's samples", "iteration", "reward"},
               {truth, score, false_truth, false_score});
  write_curves(out / "kl", {"PPO: divergence from the reference", "iteration", "nats of a continuation"},
               {kl, far, {"target", {kl.x.front(), kl.x.back()}, {target, target}}});
  write_curves(out / "beta", {"Weight of the penalty, steered to the target", "iteration", "beta"},
               {mean("beta", true, &ppo_step::beta)});
  write_curves(
      out / "overoptimisation",
      {.title = "What divergence buys: beta = 0", .x = "nats of a continuation", .y = "reward", .points = true},
      {{"true reward", far.y, false_truth.y}, {"reward model's score", far.y, false_score.y}});
}

/// Samples to a file, and some of them to the terminal.
inline void write_samples(const std::filesystem::path& path, const outcome& before, const outcome& after,
                          const outcome& hacked) {
  constexpr std::size_t shown = 12, printed = 4;
  std::ofstream file(path);
  std::ostringstream text;
  for (std::size_t i = 0; i < shown; ++i) {
    text << '"' << before.samples[i].of->text << " ...\"\n";
    for (const auto& [name, o] : {std::pair{"before  ", &before}, {"after   ", &after}, {"beta = 0", &hacked}})
      text << "  " << name << ' ' << (o->samples[i].reward < 0 ? "" : " ") << o->samples[i].reward << "  ..."
           << o->samples[i].text << '\n';
    if (i + 1 == printed) std::cout << '\n' << text.str();
  }
  file << "A prompt, and how each model goes on, with the true reward.\n\n" << text.str();
  if (!file) throw mlkit::io_error(path.string() + ": cannot be written");
}

}  // namespace examples
