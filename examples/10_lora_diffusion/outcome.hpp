// What the ways of teaching are, what comes of them, and how it is shown.
#pragma once

#include "common/curves.hpp"
#include "common/denoiser.hpp"
#include "common/diffusion.hpp"
#include "common/picture.hpp"

struct method {
  std::string_view name, folder;
  bool adapter, dora;
  double prior;  // share of each batch that repeats the old kinds
  double rate;
};
inline constexpr method methods[] = {{"LoRA", "adapter", true, false, 0.5, 5e-3},
                                     {"DoRA", "dora", true, true, 0.5, 5e-3},
                                     {"full", "full", false, false, 0.5, 1e-3},
                                     {"LoRA, no prior", "adapter_no_prior", true, false, 0, 5e-3}};

// One value a seed; samples, losses and sizes are those of the last.
struct outcome {
  explicit outcome(std::string given) : name(std::move(given)) {}

  std::string name;
  std::vector<double> recognised, old_recognised, old_loss, speed, losses;
  mlkit::index_t trained = 0;
  std::uintmax_t bytes = 0;
  examples::image_set fresh, old;
};

std::string bytes_of(const std::filesystem::path& path);
bool same(const examples::image_set& a, const examples::image_set& b);

/// The model's noise for images at times spread over the schedule.
std::vector<float> predictions(const mlkit::cpu& exec, const examples::denoiser<float>& model,
                               const examples::image_set& images);
double largest_difference(const std::vector<float>& a, const std::vector<float>& b);

/// The rank-4 file of Stable Diffusion 1.5: written, read back, merged into weights of its shapes, and timed.
void real_sizes(const mlkit::cpu& exec, const std::filesystem::path& out, examples::report& report);

/// Prints and writes the table of methods, the contact sheets, the scale strip and the curves.
void show(const std::filesystem::path& out, const std::string& kind, const examples::image_set& real,
          const std::vector<outcome>& outcomes, const std::vector<examples::sheet_row>& strip,
          const examples::curve& sweep, const std::vector<double>& pretraining);
