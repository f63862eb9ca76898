// LoRA for diffusion: a base that draws many things is taught one that it never saw, by a low-rank adapter on its
// attention's projections, beside DoRA, full fine-tuning and textual inversion at the same number of steps.
#include "common/app.hpp"
#include "gpu_layers.hpp"
#include "laboratory.hpp"

#include <cstdlib>

using namespace examples;

// --sample-from: a process that is given two files and a seed, and nothing else.
template <class Subject>
int sample_only(const app& app, const laboratory<Subject>& lab) {
  const taught<Subject> loaded(lab, lab.chosen.base, lab.chosen.sample_from);
  const image_set images = lab.draw(loaded.model, lab.subject.fresh_labels, app.seed);
  mlkit::io::write_safetensors((app.out / "samples.safetensors").string(), {mlkit::io::named("images", images.pixels)});
  return 0;
}

// The same samples from this program, started again on one thread.
template <class Subject>
bool fresh_process_agrees(const app& app, const laboratory<Subject>& lab, const std::filesystem::path& adapter,
                          const image_set& expected) {
  const auto quoted = [](const std::filesystem::path& p) { return " '" + p.string() + "'"; };
  const std::filesystem::path out = app.out / "fresh_process";
  const std::string command = quoted(std::filesystem::read_symlink("/proc/self/exe")) + " --sample-from" +
                              quoted(adapter) + " --base" + quoted(lab.base_file) + lab.subject.arguments() +
                              " --seed " + std::to_string(lab.noise_seed(lab.chosen.runs - 1)) + " --threads 1 --out" +
                              quoted(out);
  if (std::system(command.c_str()) != 0) return false;
  const auto file = mlkit::io::safetensors::open((out / "samples.safetensors").string());
  const auto images = file.view<float, 2>("images");
  return std::equal(expected.pixels.begin(), expected.pixels.end(), images.data, images.data + images.size());
}

template <class Subject>
int demonstrate(const app& app, laboratory<Subject>& lab) {
  const mlkit::cpu exec = app.exec();
  const settings& s = lab.chosen;
  Subject& subject = lab.subject;
  report report;
  subject.train_probe(exec, report);

  // The base sees every kind but one.
  training_result pretraining;
  lab.base_file = s.base;
  if (s.base.empty()) {
    pretraining = subject.train_base(exec);
    lab.base_file = app.out / "base.safetensors";
    nn::save(lab.base_file.string(), subject.base().store());
  } else {
    nn::load(s.base.string(), subject.base().store());
  }
  const std::string base_bytes = bytes_of(lab.base_file);
  lab.prior = [&] {
    sampling o = subject.sampling;
    o.guidance = 1;  // as varied as the base knows them
    o.seed = app.seed + 2;
    return sample(exec, subject.base(), subject.schedule(), subject.prior_labels, o, typename Subject::sampler{});
  }();
  outcome untouched("base");
  for (int run = 0; run < s.runs; ++run) lab.judge(subject.base(), subject.fresh_labels, run, untouched);
  untouched.bytes = base_bytes.size();

  // Every way of teaching, from the same base, with the same batches, on several seeds.
  std::vector<outcome> outcomes;
  std::vector<sheet_row> strip;
  std::deque<image_set> strip_images;
  curve sweep{"LoRA", {}, {}};
  bool zero_is_base = false, process_agrees = false;
  double merge_difference = 0;
  for (const method& how : methods) {
    if (how.how == way::word && !lab.has_words) continue;
    outcome o{std::string(how.name)};
    const index_t steps = subject.method_training.steps;
    progress bar(o.name + ": teaching " + subject.kind, s.runs * steps);
    for (int run = 0; run < s.runs; ++run) {
      pupil<Subject> p(lab, how, app.seed + 100 + static_cast<std::uint64_t>(run), bar, run * steps);
      lab.judge(p.model, p.labels, run, o);
      o.speed.push_back(p.result.steps_per_second());
      o.losses = p.result.losses;
      if (run + 1 < s.runs) continue;

      for (const auto* parameter : nn::trainable(p.model.store(), p.added)) o.trained += parameter->size();
      const std::filesystem::path folder = app.out / how.folder, file = folder.string() + ".safetensors";
      if (how.how == way::full || how.how == way::word) {
        nn::save(file.string(), how.how == way::full ? p.model.store() : p.added);
        o.bytes = std::filesystem::file_size(file);
        continue;
      }
      nn::save_adapters<float>(folder.string(), p.model);
      o.bytes = std::filesystem::file_size(folder / "adapter_model.safetensors");
      if (&how != &methods[0]) continue;

      // Stronger and weaker, from the same noise; at strength 0 every bit is the base's.
      for (const double strength : {0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5}) {
        p.model.each_linear([&](auto& layer) { layer.set_strength(strength); });
        const image_set& images = strip_images.emplace_back(lab.draw(p.model, p.labels, lab.noise_seed(run)));
        if (strength == 0) zero_is_base = same(images, untouched.fresh);
        strip.push_back({"scale " + number(strength, 3), images.pixels});
        sweep.x.push_back(strength);
        sweep.y.push_back(subject.fresh(exec, images));
      }
      p.model.each_linear([&](auto& layer) { layer.set_strength(1); });
      process_agrees = fresh_process_agrees(app, lab, folder, o.fresh);
      const auto apart = predictions(exec, p.model, subject.old_test);
      p.model.each_linear([&](auto& layer) { layer.merge(exec); });
      merge_difference = largest_difference(apart, predictions(exec, p.model, subject.old_test));
    }
    outcomes.push_back(std::move(o));
  }

  const outcome &lora = outcomes[0], &full = outcomes[2], &alone = outcomes.back();
  const auto drift = [&](const outcome& o) { return ratios(o.old_loss, untouched.old_loss); };
  report.at_least("concept probe: samples of a " + subject.kind + " recognised, LoRA", over(lora.recognised), 0.7);
  report.at_least("    more than without the adapter by", over(differences(lora.recognised, untouched.recognised)),
                  0.5);
  report.measured("    of full fine-tuning", over(full.recognised));
  if constexpr (laboratory<Subject>::has_words) {
    const outcome& word = outcomes[3];
    report.at_least("    more than textual inversion's by", over(differences(lora.recognised, word.recognised)), 0.5);
    report.at_least("    in colours that its pictures did not have: all as asked", over(lora.composed), 0.4);
    report.measured("    the base", over(untouched.composed));
    report.measured("    of full fine-tuning", over(full.composed));
    report.measured("    of textual inversion", over(word.composed));
  }
  report.at_least("old kinds recognised, LoRA", over(lora.old_recognised), 0.85);
  report.measured("    the base", over(untouched.old_recognised));
  report.measured("    of full fine-tuning", over(full.old_recognised));
  report.at_most("drift: denoising loss on unseen old images, LoRA / base", over(drift(lora)), subject.most_drift);
  report.measured("    of full fine-tuning", over(drift(full)));
  report.at_least("    without prior images, over that with them", over(ratios(alone.old_loss, lora.old_loss)), 1);
  report.holds("the base's file is what it was, to the byte", bytes_of(lab.base_file) == base_bytes);
  report.holds("scale 0 gives the base's samples, to the bit", zero_is_base);
  report.holds("a fresh process on one thread gives the same samples, to the bit", process_agrees);
  report.at_most("merged and unmerged predictions differ by", merge_difference, 1e-3);
  report.at_least("parameters that full fine-tuning trains / LoRA",
                  static_cast<double>(full.trained) / static_cast<double>(lora.trained), 8);
  report.at_least("base file / adapter file", static_cast<double>(untouched.bytes) / static_cast<double>(lora.bytes),
                  8);
  if constexpr (laboratory<Subject>::has_words)
    subject.edit_prompts(exec, taught(lab, lab.base_file, app.out / methods[0].folder).model, lab.noise_seed(0), s.runs,
                         report, app.out);
  real_sizes(exec, app.out, app.device == "cuda", report);
  outcomes.insert(outcomes.begin(), std::move(untouched));
  tell(app.out, outcomes);
  show(app.out, subject, outcomes, strip, sweep, pretraining.losses);
  return report.finish(app.out);
}

template <class Subject>
int teach(const app& app, const settings& s) {
  laboratory<Subject> lab{app.exec(), s, Subject(s, app.seed), app.seed, {}, {}};
  return s.sample_from.empty() ? demonstrate(app, lab) : sample_only(app, lab);
}

int main(int argc, char** argv) {
  app app("10_lora_diffusion", "LoRA for diffusion: teaches a model of game art a shape that it never saw.",
          with_cuda ? std::vector<std::string>{"cpu", "cuda"} : std::vector<std::string>{"cpu"});
  settings s;
  auto& cli = app.options();
  const CLI::Range positive(1, 1 << 20);
  cli.add_option_function<std::string>(
      "--data", [&](const std::string& data) { s.data = data == "digits" ? digits_file : data; },
      "\"digits\", or a file of images, a line each: a label and pixels; else sprites that the program draws");
  cli.add_option("--held-out", s.held_out, "the label of --data that the base never sees")->capture_default_str();
  cli.add_option("--base", s.base, "a base that is trained already, of example 05 or of this one")
      ->check(CLI::ExistingFile);
  cli.add_option("--rank", s.adapter.rank, "of the adapters")->check(positive)->capture_default_str();
  cli.add_option("--alpha", s.adapter.alpha, "the update is scaled by alpha / rank")->capture_default_str();
  cli.add_option("--pretraining", s.pretraining, "steps of the base, where the data's number does not do");
  cli.add_option("--steps", s.steps, "steps of each method, likewise");
  cli.add_option("--runs", s.runs, "seeds of each method")->check(positive)->capture_default_str();
  cli.add_option("--sample-from", s.sample_from, "only sample, with this adapter of --base")
      ->check(CLI::ExistingPath)
      ->needs("--base");
  return app.run(argc, argv, [&] {
    if constexpr (with_cuda)
      if (app.device == "cuda") find_gpu();
    return s.data.empty() ? teach<crowns>(app, s) : teach<digit>(app, s);
  });
}
