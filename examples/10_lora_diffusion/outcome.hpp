// What the ways of teaching are, what comes of them, and how it is shown.
#pragma once

#include "common/curves.hpp"
#include "subjects.hpp"

enum class way { lora, dora, full, word };

struct method {
  std::string_view name, folder;
  way how;
  double prior;  // share of each batch that repeats the old kinds
};
inline constexpr method methods[] = {{"LoRA", "adapter", way::lora, 0.5},
                                     {"DoRA", "dora", way::dora, 0.5},
                                     {"full", "full", way::full, 0.5},
                                     {"textual inversion", "word", way::word, 0.5},
                                     {"LoRA, no prior", "adapter_no_prior", way::lora, 0}};

// One value a seed; samples, losses and sizes are those of the last.
struct outcome {
  explicit outcome(std::string given) : name(std::move(given)) {}

  std::string name;
  std::vector<double> recognised, composed, old_recognised, old_loss, speed, losses;
  mlkit::index_t trained = 0;
  std::uintmax_t bytes = 0;
  examples::image_set fresh, old;
};

std::string bytes_of(const std::filesystem::path& path);
bool same(const examples::image_set& a, const examples::image_set& b);
double largest_difference(const std::vector<float>& a, const std::vector<float>& b);

/// The model's predictions for images at times spread over the schedule.
template <examples::conditional_denoiser Model>
std::vector<float> predictions(const mlkit::cpu& exec, const Model& model, const examples::image_set& images) {
  mlkit::nn::tape<float> tape(exec, {.record = false});
  std::vector<std::int32_t> times;
  for (mlkit::index_t i = 0; i < images.count(); ++i)
    times.push_back(static_cast<std::int32_t>(1 + 999 * i / images.count()));
  const auto y = model(tape.constant(images.pixels), times, images.labels);
  return {y.data(), y.data() + y.size()};
}

/// The rank-4 file of Stable Diffusion 1.5: written, read back, merged into weights of its shapes, and timed; with
/// `gpu` its layers run there too.
void real_sizes(const mlkit::cpu& exec, const std::filesystem::path& out, bool gpu, examples::report& report);

/// Prints and writes the table of methods.
void tell(const std::filesystem::path& out, const std::vector<outcome>& outcomes);

/// Writes the sheets of samples, the strip of strengths and the curves.
template <class Subject>
void show(const std::filesystem::path& out, const Subject& subject, const std::vector<outcome>& outcomes,
          const std::vector<examples::sheet_row>& strip, const examples::curve& sweep,
          const std::vector<double>& pretraining) {
  using namespace examples;
  const std::string& kind = subject.kind;
  std::vector<sheet_row> fresh{{"real", subject.fresh_real.pixels}}, old;
  std::vector<curve> losses;
  for (const outcome& o : outcomes) {
    fresh.push_back({o.name, o.fresh.pixels});
    old.push_back({o.name, o.old.pixels});
    if (!o.losses.empty()) losses.push_back(smoothed(o.name, o.losses, 10));
  }
  subject.sheet(out / "new_kind.png", kind + ": real images, then each model's samples from the same noise", fresh,
                true);
  subject.sheet(out / "old_kinds.png", "the old kinds, before and after", old, false);
  subject.sheet(out / "scale_strip.png", kind + " at growing strength of the adapter", strip, true);
  write_curves(out / "losses", {"Teaching one kind: loss of each method on its own batches", "step", "loss"}, losses);
  if (!pretraining.empty())
    write_curves(out / "pretraining", {"Pretraining the base", "step", "loss"}, {smoothed("base", pretraining, 25)});
  write_curves(out / "scale_sweep", {"Recognised samples by adapter strength", "scale", "share recognised"}, {sweep});
}
