// What is taught, and to which base: a shape of game art under a rare word, or a kind of handwritten digit.
#pragma once

#include "common/denoiser.hpp"
#include "common/digits.hpp"
#include "common/game_art.hpp"
#include "common/picture.hpp"

#include <optional>

struct settings {
  std::filesystem::path data;  // empty: sprites; else a file of images as examples::digits_file is
  std::filesystem::path base, sample_from;
  std::int32_t held_out = 8;
  mlkit::index_t pretraining = 0, steps = 0;  // 0: as many as the subject wants
  int runs = 2;
  mlkit::nn::adapter_options adapter{.rank = 4, .alpha = 8};
};

// The images and labels that every subject has.
struct teaching {
  std::string kind;
  examples::image_set fresh_training;  // few images of the new kind
  examples::image_set fresh_real;      // real images of it, to look at beside samples
  examples::image_set old_test;        // old kinds, never trained on
  std::vector<std::int32_t> fresh_labels, old_labels, prior_labels;
  examples::training base_training, method_training;
  examples::sampling sampling;
  double full_rate = 1e-3;           // adapters learn at method_training's rate
  std::vector<std::string> targets;  // of adapters; empty: every linear layer
  double most_drift = 1.15;
};

/// Captions in which the rare word stands for the shape.
std::vector<std::string> rare_captions(std::vector<examples::sprite> wanted);
/// Twelve of 36 sprites in each row, some of each kind, each column with its caption.
void write_some(const std::filesystem::path& path, const std::string& title, const std::vector<std::string>& captions,
                const std::vector<examples::sheet_row>& rows);

/// Crowns. The base draws six other shapes; crowns in three colours are shown to it as "... sks" and asked for in six.
class crowns : public teaching {
 public:
  using model = examples::text_denoiser<float>;
  using sampler = mlkit::nn::dpm_solver;
  crowns(const settings& s, std::uint64_t seed);

  examples::game_art art;
  const examples::text_denoiser_options shape;
  model& base() { return art.model; }
  const mlkit::nn::noise_schedule& schedule() const { return art.schedule; }
  examples::training_result train_base(const mlkit::cpu& exec);
  void train_probe(const mlkit::cpu& exec, examples::report& report);

  /// The share of samples for fresh_labels that are crowns; and, of those in new colours, that are all that was asked.
  double fresh(const mlkit::cpu& exec, const examples::image_set& images) const;
  double composed(const mlkit::cpu& exec, const examples::image_set& images) const;
  /// The share of samples for old_labels that show the right shape.
  double old(const mlkit::cpu& exec, const examples::image_set& images) const;
  void sheet(const std::filesystem::path& path, const std::string& title, const std::vector<examples::sheet_row>& rows,
             bool of_fresh) const;
  /// Edits the prompts of crowns, as the model that was taught draws them, by Prompt-to-Prompt (editing.cpp), from the
  /// noise of `runs` seeds.
  void edit_prompts(const mlkit::cpu& exec, const model& taught, std::uint64_t seed, int runs, examples::report& report,
                    const std::filesystem::path& out) const;
  /// What this subject adds to the command line of a process of its own.
  std::string arguments() const { return {}; }

 private:
  std::optional<examples::classifier> probe_;
  std::vector<examples::sprite> fresh_, old_;
  std::uint64_t seed_;
};

/// One kind of handwritten digit, which the base was not trained on, under the label that was kept for it.
class digit : public teaching {
 public:
  using model = examples::denoiser<float>;
  using sampler = mlkit::nn::ddim;
  digit(const settings& s, std::uint64_t seed);

  const examples::denoiser_options shape;
  model& base() { return base_; }
  const mlkit::nn::noise_schedule& schedule() const { return schedule_; }
  examples::training_result train_base(const mlkit::cpu& exec);
  void train_probe(const mlkit::cpu& exec, examples::report& report);
  double fresh(const mlkit::cpu& exec, const examples::image_set& images) const;
  double old(const mlkit::cpu& exec, const examples::image_set& images) const;
  void sheet(const std::filesystem::path& path, const std::string& title, const std::vector<examples::sheet_row>& rows,
             bool of_fresh) const;
  std::string arguments() const;

 private:
  digit(const settings& s, std::uint64_t seed, std::pair<examples::image_set, examples::image_set> images);

  examples::image_set training_, test_;
  model base_;
  examples::classifier probe_;
  mlkit::nn::noise_schedule schedule_ = mlkit::nn::noise_schedule::cosine(1000);
  std::filesystem::path data_;
  std::int32_t held_out_;
};
