// RLHF from end to end: a language model is pretrained on verses, a reward model learns from noisy comparisons what is
// preferred, and PPO turns the language model to it without leaving what it was; once without that tie, to see it fail.
#include "common/app.hpp"
#include "outcome.hpp"

#include <mlkit/nn/files.hpp>

#include <iostream>
#include <mutex>

using namespace examples;

struct settings {
  std::filesystem::path data = MLKIT_EXAMPLES_DATA "/psalms/psalms.txt";
  std::vector<std::string> liked, disliked, prompts;
  double noise = 0.5, target = 6;
  index_t pretraining = 270, iterations = 36, rank = 8, seeds = 3;
  std::size_t pairs = 2048;
  std::string policy = "lora";
};

void pretrain(const app& app, const settings& s, const study& of, language_model& base, report& report) {
  const auto over = nn::trainable(base.store());
  nn::adamw<float> optimizer(over, {.beta2 = 0.98, .decay = 0.1});
  progress bar("1 pretraining on " + std::to_string(of.text.training.size()) + " verses", s.pretraining);
  const auto losses =
      nn::train_language_model<float>(app.exec(), base, over, optimizer, of.text.training,
                                      {.steps = s.pretraining, .tokens = 1024, .rate = 5e-3, .seed = app.seed},
                                      [&](index_t step, double loss) { bar.at(step + 1, "loss " + number(loss)); });
  write_curves(app.out / "pretraining", {"Pretraining: cross-entropy of a token", "step", "loss"},
               {smoothed("loss", losses, 10)});
  report.at_most("language model: held-out loss, of a uniform guess's",
                 nn::language_loss<float>(app.exec(), base, of.text.held_out) /
                     std::log(static_cast<double>(of.text.words.size())),
                 0.6);
  base.store().freeze();  // the reference from here on
}

void learn_preferences(const app& app, const settings& s, const study& of, const language_model& base,
                       reward_model& reward, report& report) {
  const mlkit::cpu exec = app.exec();
  std::vector<preference_pair> pairs, unseen;
  {
    constexpr std::size_t held_out = 384;
    progress bar("2 pairs, compared", static_cast<index_t>(s.pairs + held_out));
    pairs = compare(exec, base, of, of.text.training_prompts, s.pairs, app.seed + 1, bar);
    unseen = compare(exec, base, of, of.text.held_out_prompts, held_out, app.seed + 2, bar, s.pairs);
  }
  std::vector<double> losses;
  {
    constexpr int rounds = 2;
    progress bar("3 reward model", rounds * static_cast<index_t>(s.pairs / reward_model::batch));
    reward.train(exec, pairs, rounds, app.seed, [&](double loss) {
      losses.push_back(loss);
      bar.at(static_cast<index_t>(losses.size()), "loss " + number(loss));
    });
  }
  write_curves(app.out / "reward_model", {"Reward model: Bradley-Terry loss", "step", "loss"},
               {smoothed("loss", losses, 4)});
  std::vector<sample> samples;
  double right = 0;
  for (const preference_pair& p : pairs) samples.push_back(p.chosen), samples.push_back(p.rejected);
  for (const preference_pair& p : unseen)
    right += (p.chosen.reward > p.rejected.reward) / static_cast<double>(unseen.size());
  reward.normalise(exec, samples);

  const double accuracy = reward.accuracy(exec, unseen), by_bleu = accuracy_of(bleu, unseen),
               by_rouge = accuracy_of(rouge_l, unseen);
  report.at_least("reward model: held-out pairs as they were labelled", accuracy, 0.65);
  report.measured("    labels that are not the noise's: the best there is", right);
  report.measured("    by BLEU against the verse as it was written", by_bleu);
  report.measured("    by ROUGE-L", by_rouge);
  report.at_least("    the reward model, more than either by", accuracy - std::max(by_bleu, by_rouge), 0.1);
}

// PPO, once for each seed, and once without a penalty. All at the same time, a thread each.
std::vector<std::unique_ptr<ppo>> optimise(const app& app, const settings& s, const study& of,
                                           const language_model& base, const reward_model& reward) {
  std::vector<std::unique_ptr<ppo>> runs;
  for (index_t i = 0; i <= s.seeds; ++i) {
    ppo_settings o{.iterations = s.iterations, .target = s.target, .lora = s.policy == "lora", .rank = s.rank};
    o.seed = app.seed + static_cast<std::uint64_t>(i % s.seeds);
    if (i == s.seeds) o.beta = o.target = 0;
    if (!o.lora) o.rate /= 6;  // all weights move further at the same rate
    runs.push_back(std::make_unique<ppo>(base, o));
  }
  progress bar("4 PPO, " + std::to_string(runs.size()) + " runs", static_cast<index_t>(runs.size()) * s.iterations);
  std::mutex one;
  index_t done = 0;
  mlkit::parallel_for(app.exec(), static_cast<index_t>(runs.size()), [&](index_t i) {
    ppo& run = *runs[static_cast<std::size_t>(i)];
    for (index_t step = 0; step < s.iterations; ++step) {
      run.iterate(app.exec(), of, reward);
      const std::lock_guard lock(one);
      bar.at(++done, "true reward " + number(run.steps().back().reward));
    }
  });
  return runs;
}

int demonstrate(const app& app, const settings& s) {
  const mlkit::cpu exec = app.exec();
  report report;
  study of{verses(s.data), {.noise = s.noise}};
  if (!s.liked.empty()) of.person.liked = {s.liked.begin(), s.liked.end()};
  if (!s.disliked.empty()) of.person.disliked = {s.disliked.begin(), s.disliked.end()};

  language_model base(of.text.model_options(app.seed));
  pretrain(app, s, of, base, report);
  nn::save((app.out / "base.safetensors").string(), base.store());
  of.text.words.save((app.out / "merges.txt").string());
  const std::vector<float> reference = values_of(base.store());
  reward_model reward(base);
  learn_preferences(app, s, of, base, reward, report);
  const auto runs = optimise(app, s, of, base, reward);

  const std::uint64_t seed = app.seed + 77;
  const outcome before = judge_policy(exec, of, base, reward, base, seed);
  std::vector<double> rewards, scores, kls, bleus, rouges;
  double ratio = 0, least_k3 = 0;
  std::vector<outcome> after;
  for (const auto& run : runs) {
    const outcome& o = after.emplace_back(judge_policy(exec, of, base, reward, run->policy(), seed));
    ratio = std::max(ratio, run->largest_first_ratio());
    least_k3 = std::min(least_k3, run->smallest_k3());
    if (&run == &runs.back()) continue;
    rewards.push_back(o.reward), scores.push_back(o.score), kls.push_back(o.kl);
    bleus.push_back(o.bleu), rouges.push_back(o.rouge);
  }
  const outcome& hacked = after.back();
  const auto least = [](const std::vector<double>& v) { return *std::min_element(v.begin(), v.end()); };
  const auto most = [](const std::vector<double>& v) { return *std::max_element(v.begin(), v.end()); };
  report.measured("true reward of held-out prompts: before", before.reward);
  report.measured("    after PPO, " + std::to_string(s.seeds) + " seeds", over(rewards));
  report.at_least("    the least rise of any seed", least(rewards) - before.reward, 0.3);
  report.measured("score of the reward model: before", before.score);
  report.measured("    after PPO", over(scores));
  report.measured("divergence from the reference, target " + number(s.target), over(kls), "nats");
  report.at_least("    the least of any seed, of the target", least(kls) / s.target, 0.5);
  report.at_most("    the most of any seed, of the target", most(kls) / s.target, 1.5);
  report.at_least("beta = 0 hacks the reward model: its score, above the others'", hacked.score - over(scores).mean, 0);
  report.at_most("    but the true reward, below theirs", hacked.reward - over(rewards).mean, -0.5);
  report.at_least("    its divergence, of the target", hacked.kl / s.target, 2);
  report.measured("BLEU against the verses: before", before.bleu);
  report.measured("    after PPO", over(bleus));
  report.measured("ROUGE-L: before", before.rouge);
  report.measured("    after PPO", over(rouges));
  report.at_most("old log-probabilities are those of the first step: ratio - 1", ratio, 1e-3);
  report.holds("k3 is never negative", least_k3 >= 0);
  report.holds("the reference is what it was, to the bit", values_of(base.store()) == reference);

  draw_curves(app.out, runs, s.target);
  write_samples(app.out / "samples.txt", before, after[0], hacked);
  if (s.policy == "lora")
    nn::save_adapters<float>((app.out / "policy").string(), runs[0]->policy());
  else
    nn::save((app.out / "policy.safetensors").string(), runs[0]->policy().store());
  return report.finish(app.out);
}

// --prompt: how the base and the policy of an earlier run continue texts of one's own.
int continue_only(const app& app, const settings& s) {
  verses text(nn::byte_pair_tokenizer::load((app.out / "merges.txt").string()));
  language_model model(text.model_options(app.seed));
  nn::load((app.out / "base.safetensors").string(), model.store());
  nn::parameters<float> adapters;
  std::deque<prompt> prompts;
  std::vector<const prompt*> all;
  for (const std::string& words : s.prompts) {
    prompt& p = prompts.emplace_back(prompt{{nn::byte_pair_tokenizer::end}, words, {}});
    const token_list ids = text.words.encode(words);
    p.ids.insert(p.ids.end(), ids.begin(), ids.end());
    all.push_back(&p);
  }
  const study of{std::move(text), {}};
  for (const bool tuned : {false, true}) {
    if (tuned && s.policy == "lora") nn::load_adapters((app.out / "policy").string(), model, adapters);
    if (tuned && s.policy != "lora") nn::load((app.out / "policy.safetensors").string(), model.store());
    for (const sample& said : draw(app.exec(), model, of, all, app.seed))
      std::cout << (tuned ? "after:  " : "before: ") << said.of->text << said.text << '\n';
  }
  return 0;
}

int main(int argc, char** argv) {
  app app("01_rlhf", "RLHF: a language model, a reward model from noisy comparisons, and PPO, in one run.");
  settings s;
  auto& cli = app.options();
  const CLI::Range positive(1, 1 << 20);
  cli.add_option("--data", s.data, "a text, a sentence or verse to a line")->check(CLI::ExistingFile);
  cli.add_option("--liked", s.liked, "words that the judge likes")->delimiter(',');
  cli.add_option("--disliked", s.disliked, "and dislikes")->delimiter(',');
  cli.add_option("--noise", s.noise, "of the judge")->check(CLI::PositiveNumber)->capture_default_str();
  cli.add_option("--pretraining", s.pretraining, "steps")->check(positive)->capture_default_str();
  cli.add_option("--pairs", s.pairs, "that are compared")->check(CLI::Range(32, 1 << 20))->capture_default_str();
  cli.add_option("--policy", s.policy, "what PPO trains")
      ->check(CLI::IsMember({"lora", "full"}))
      ->capture_default_str();
  cli.add_option("--rank", s.rank, "of the adapters")->check(positive)->capture_default_str();
  cli.add_option("--target", s.target, "nats of divergence")->check(CLI::PositiveNumber)->capture_default_str();
  cli.add_option("--iterations", s.iterations, "of PPO")->check(positive)->capture_default_str();
  cli.add_option("--seeds", s.seeds, "of PPO")->check(CLI::Range(1, 64))->capture_default_str();
  cli.add_option("--prompt", s.prompts, "only continue these, by the models that are in --out");
  return app.run(argc, argv, [&] { return s.prompts.empty() ? demonstrate(app, s) : continue_only(app, s); });
}
