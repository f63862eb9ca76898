// What examples 05 and 10 share: a denoiser of captioned sprites with its words, and the probe that judges samples.
#pragma once

#include "classifier.hpp"
#include "diffusion.hpp"
#include "sprites.hpp"
#include "text_denoiser.hpp"

#include <filesystem>

namespace examples {

/// A text-conditioned diffusion model of sprites. Its vocabulary is that of their captions, and rare_word, which no
/// caption has.
class game_art {
 public:
  static constexpr const char* rare_word = "sks";
  explicit game_art(std::uint64_t seed);

  const nn::word_tokenizer words;
  text_denoiser<float> model;
  const nn::noise_schedule schedule = nn::noise_schedule::cosine(1000);

  /// Captions as the model takes them.
  std::vector<std::int32_t> ids(const std::vector<std::string>& texts) const;
  std::vector<std::int32_t> ids(const std::vector<sprite>& wanted) const;
  /// Drawings with their captions, of which some leave some attributes open.
  image_set captioned(const sprite_set& drawings, std::uint64_t seed) const;

  /// Trains the model on the combinations that are not held out.
  training_result train(const mlkit::cpu& exec, index_t steps, std::uint64_t seed);
};

/// A classifier of the four attributes, of all shapes in all combinations, trained on drawings.
classifier train_probe(const mlkit::cpu& exec, std::uint64_t seed);

/// For each attribute the share of images that show what is wanted, and last the share that show all of it. What is
/// left open is not counted.
std::vector<double> recognised(const mlkit::cpu& exec, const classifier& probe, const image_set& images,
                               const std::vector<sprite>& wanted);

}  // namespace examples
