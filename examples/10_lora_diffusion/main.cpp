// LoRA for diffusion: a denoiser learns every kind of handwritten digit but one; a low-rank adapter then teaches it
// that one, beside DoRA and full fine-tuning at the same number of steps.
#include "common/app.hpp"
#include "common/classifier.hpp"
#include "common/denoiser.hpp"
#include "common/diffusion.hpp"
#include "common/digits.hpp"
#include "outcome.hpp"

#include <mlkit/nn/files.hpp>

#include <cstdlib>

using namespace examples;

struct settings {
  std::filesystem::path data = digits_file, sample_from, base;
  std::int32_t held_out = 8;
  index_t pretraining = 1500, steps = 200;
  int runs = 3;
  nn::adapter_options adapter{.rank = 4, .alpha = 8};
};

// What all methods share: the base, the images, and the judge.
struct laboratory {
  mlkit::cpu exec;
  settings chosen;
  denoiser_options shape;
  std::filesystem::path base_file;
  const classifier* probe = nullptr;
  image_set fresh_training;  // the new kind
  image_set prior;           // the old kinds, drawn by the base: nothing else of its training is needed
  image_set old_test;        // the old kinds, never trained on
  std::vector<std::int32_t> fresh_labels, old_labels;
  std::uint64_t seed = 0;
  nn::noise_schedule schedule = nn::noise_schedule::cosine(1000);

  std::uint64_t noise_seed(int run) const { return seed + 10 + static_cast<std::uint64_t>(run); }

  void judge(const denoiser<float>& model, int run, outcome& o) const {
    const sampling from{.seed = noise_seed(run)};
    o.fresh = sample(exec, model, schedule, fresh_labels, from);
    o.old = sample(exec, model, schedule, old_labels, from);
    o.recognised.push_back(probe->accuracy(exec, o.fresh));
    o.old_recognised.push_back(probe->accuracy(exec, o.old));
    o.old_loss.push_back(denoising_loss(exec, model, schedule, old_test));
  }
};

// Teaches the base one kind, in one way.
struct pupil {
  denoiser<float> model;
  nn::parameters<float> adapters;
  training_result result;

  pupil(const laboratory& lab, const method& how, std::uint64_t seed, progress& bar, index_t done)
      : model(lab.shape), adapters(seed) {
    nn::load(lab.base_file.string(), model.store());
    if (how.adapter) {
      model.store().freeze();  // no gradient is computed for the base from here on
      nn::adapter_options o = lab.chosen.adapter;
      o.dora = how.dora;
      nn::adapt(model, adapters, o);  // down random, up zero: the model is still the base
    }
    nn::adamw<float> optimizer(nn::trainable(model.store(), adapters), {.decay = 0});
    const training o{.steps = lab.chosen.steps, .rate = how.rate, .prior = how.prior, .seed = seed};
    result = train(lab.exec, model, lab.schedule, optimizer, lab.fresh_training, how.prior > 0 ? &lab.prior : nullptr,
                   o, bar, done);
  }
};

// `n` of every label but one.
std::vector<std::int32_t> labels_without(std::int32_t left_out, index_t classes, index_t n) {
  std::vector<std::int32_t> labels;
  for (index_t i = 0; i < classes * n; ++i)
    if (i % classes != left_out) labels.push_back(static_cast<std::int32_t>(i % classes));
  return labels;
}

// --sample-from: a process that is given two files and a seed, and nothing else.
int sample_only(const app& app, const laboratory& lab) {
  denoiser<float> model(lab.shape);
  nn::load(lab.chosen.base.string(), model.store());
  nn::parameters<float> adapters;
  nn::load_adapters(lab.chosen.sample_from.string(), model, adapters);
  const image_set images = sample(app.exec(), model, lab.schedule, lab.fresh_labels, {.seed = app.seed});
  mlkit::io::write_safetensors((app.out / "samples.safetensors").string(), {mlkit::io::named("images", images.pixels)});
  return 0;
}

// The same samples from this program, started again on one thread.
bool fresh_process_agrees(const app& app, const laboratory& lab, const std::filesystem::path& adapter,
                          const image_set& expected) {
  const auto quoted = [](const std::filesystem::path& p) { return " '" + p.string() + "'"; };
  const std::filesystem::path out = app.out / "fresh_process";
  const std::string command = quoted(std::filesystem::read_symlink("/proc/self/exe")) + " --sample-from" +
                              quoted(adapter) + " --base" + quoted(lab.base_file) + " --data" +
                              quoted(lab.chosen.data) + " --held-out " + std::to_string(lab.chosen.held_out) +
                              " --seed " + std::to_string(lab.noise_seed(lab.chosen.runs - 1)) + " --threads 1 --out" +
                              quoted(out);
  if (std::system(command.c_str()) != 0) return false;
  const auto file = mlkit::io::safetensors::open((out / "samples.safetensors").string());
  const auto images = file.view<float, 2>("images");
  return std::equal(expected.pixels.begin(), expected.pixels.end(), images.data, images.data + images.size());
}

int demonstrate(const app& app, laboratory lab, const image_set& training_images, const image_set& test_images) {
  const settings& s = lab.chosen;
  const mlkit::cpu exec = app.exec();
  const auto is_old = [&](std::int32_t label) { return label != s.held_out; };
  const std::string kind = "digit " + std::to_string(s.held_out);
  report report;

  // The probe sees every kind and never a sample; the base sees every kind but one.
  classifier probe(lab.shape.pixels, {lab.shape.classes}, app.seed + 1);
  probe.train(exec, training_images, 500);
  lab.probe = &probe;
  report.at_least("the probe, a classifier: accuracy on images it has not seen", probe.accuracy(exec, test_images),
                  0.95);

  denoiser<float> base(lab.shape);
  training_result pretraining;
  {
    progress bar("base: every kind but " + kind, s.pretraining);
    nn::adamw<float> optimizer(nn::trainable(base.store()), {.decay = 0});
    pretraining = train(exec, base, lab.schedule, optimizer, training_images.where(is_old), nullptr,
                        {.steps = s.pretraining, .seed = app.seed}, bar);
  }
  lab.base_file = app.out / "base.safetensors";
  nn::save(lab.base_file.string(), base.store());
  const std::string base_bytes = bytes_of(lab.base_file);

  lab.fresh_training = training_images.where([&](std::int32_t label) { return label == s.held_out; });
  lab.old_test = test_images.where(is_old);
  lab.prior = sample(exec, base, lab.schedule, labels_without(s.held_out, lab.shape.classes, 30),
                     {.guidance = 1, .seed = app.seed + 2});
  outcome untouched("base");
  for (int run = 0; run < s.runs; ++run) lab.judge(base, run, untouched);
  untouched.bytes = base_bytes.size();

  // Every way of teaching, from the same base, with the same batches, on several seeds.
  std::vector<outcome> outcomes;
  std::vector<sheet_row> strip;
  std::deque<image_set> strip_images;
  curve sweep{"LoRA", {}, {}};
  bool zero_is_base = false, process_agrees = false;
  double merge_difference = 0;
  for (const method& how : methods) {
    outcome o{std::string(how.name)};
    progress bar(o.name + ": teaching " + kind, s.runs * s.steps);
    for (int run = 0; run < s.runs; ++run) {
      pupil p(lab, how, app.seed + 100 + static_cast<std::uint64_t>(run), bar, run * s.steps);
      lab.judge(p.model, run, o);
      o.speed.push_back(p.result.steps_per_second());
      o.losses = p.result.losses;
      if (run + 1 < s.runs) continue;

      for (const auto* parameter : nn::trainable(p.model.store(), p.adapters)) o.trained += parameter->size();
      const std::filesystem::path folder = app.out / how.folder;
      if (!how.adapter) {
        nn::save(folder.string() + ".safetensors", p.model.store());
        o.bytes = std::filesystem::file_size(folder.string() + ".safetensors");
        continue;
      }
      nn::save_adapters<float>(folder.string(), p.model);
      o.bytes = std::filesystem::file_size(folder / "adapter_model.safetensors");
      if (&how != &methods[0]) continue;

      // Stronger and weaker, from the same noise; at strength 0 every bit is the base's.
      for (const double strength : {0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5}) {
        p.model.each_linear([&](auto& layer) { layer.set_strength(strength); });
        const image_set& images = strip_images.emplace_back(
            sample(exec, p.model, lab.schedule, lab.fresh_labels, {.seed = lab.noise_seed(run)}));
        if (strength == 0) zero_is_base = same(images, untouched.fresh);
        strip.push_back({"scale " + number(strength, 3), images.rows(0, 16)});
        sweep.x.push_back(strength);
        sweep.y.push_back(probe.accuracy(exec, images));
      }
      p.model.each_linear([&](auto& layer) { layer.set_strength(1); });
      process_agrees = fresh_process_agrees(app, lab, folder, o.fresh);
      const auto apart = predictions(exec, p.model, test_images);
      p.model.each_linear([&](auto& layer) { layer.merge(exec); });
      merge_difference = largest_difference(apart, predictions(exec, p.model, test_images));
    }
    outcomes.push_back(std::move(o));
  }

  const outcome &lora = outcomes[0], &alone = outcomes.back();
  const double before = over(untouched.recognised).mean;
  const double drift = over(lora.old_loss).mean / untouched.old_loss[0];
  report.at_least("concept probe: samples of " + kind + " recognised, LoRA", over(lora.recognised).mean, 0.8);
  report.at_least("    more than without the adapter by", over(lora.recognised).mean - before, 0.5);
  report.at_least("    of the old kinds recognised, LoRA", over(lora.old_recognised).mean, 0.85);
  report.at_most("drift: denoising loss on unseen old images, LoRA / base", drift, 1.15);
  report.measured("    the same without prior images", over(alone.old_loss).mean / untouched.old_loss[0]);
  report.holds("the base's file is what it was, to the byte", bytes_of(lab.base_file) == base_bytes);
  report.holds("scale 0 gives the base's samples, to the bit", zero_is_base);
  report.holds("a fresh process on one thread gives the same samples, to the bit", process_agrees);
  report.at_most("merged and unmerged predictions differ by", merge_difference, 1e-3);
  report.at_least("base file / adapter file", static_cast<double>(untouched.bytes) / static_cast<double>(lora.bytes),
                  8);
  real_sizes(exec, app.out, report);
  outcomes.insert(outcomes.begin(), std::move(untouched));
  show(app.out, kind, lab.fresh_training, outcomes, strip, sweep, pretraining.losses);
  return report.finish(app.out);
}

int main(int argc, char** argv) {
  app app("10_lora_diffusion",
          "LoRA for diffusion: teaches a denoiser of handwritten digits a kind that it never saw.");
  settings s;
  auto& cli = app.options();
  cli.add_option("--data", s.data, "images, a line each: label and pixels")->capture_default_str();
  cli.add_option("--held-out", s.held_out, "the label that the base never sees")->capture_default_str();
  cli.add_option("--rank", s.adapter.rank, "of the adapters")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  cli.add_option("--alpha", s.adapter.alpha, "the update is scaled by alpha / rank")->capture_default_str();
  cli.add_option("--pretraining", s.pretraining, "steps of the base")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  cli.add_option("--steps", s.steps, "steps of each method")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  cli.add_option("--runs", s.runs, "seeds of each method")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  auto* from =
      cli.add_option("--sample-from", s.sample_from, "only sample, with this adapter")->check(CLI::ExistingPath);
  cli.add_option("--base", s.base, "the base of --sample-from")->check(CLI::ExistingFile)->needs(from);
  return app.run(argc, argv, [&] {
    const image_set images = read_digits(s.data);
    const auto [training_images, test_images] = split(images, images.count() * 7 / 10, app.seed);
    const std::int32_t classes = 1 + *std::max_element(images.labels.begin(), images.labels.end());
    if (s.held_out < 0 || s.held_out >= classes) throw mlkit::value_error("--held-out is no label of the data");
    laboratory lab;
    lab.exec = app.exec();
    lab.chosen = s;
    lab.shape = {.pixels = images.size(), .classes = classes, .seed = app.seed};
    lab.seed = app.seed;
    lab.fresh_labels.assign(64, s.held_out);
    lab.old_labels = labels_without(s.held_out, classes, 20);
    return s.sample_from.empty() ? demonstrate(app, std::move(lab), training_images, test_images)
                                 : sample_only(app, lab);
  });
}
