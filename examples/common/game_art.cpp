#include "game_art.hpp"

namespace examples {

namespace {

nn::word_tokenizer vocabulary() {
  std::vector<std::string> words = nn::word_tokenizer::from_texts(captions(combinations(false))).words();
  words.emplace_back(game_art::rare_word);
  return nn::word_tokenizer(std::move(words));
}

constexpr index_t caption_length = 6;  // four words between begin and end

}  // namespace

game_art::game_art(std::uint64_t seed)
    : words(vocabulary()), model({.words = words.size(), .length = caption_length, .seed = seed}) {}

std::vector<std::int32_t> game_art::ids(const std::vector<std::string>& texts) const {
  return words.encode(texts, caption_length);
}
std::vector<std::int32_t> game_art::ids(const std::vector<sprite>& wanted) const { return ids(captions(wanted)); }

image_set game_art::captioned(const sprite_set& drawings, std::uint64_t seed) const {
  image_set images{mlkit::matrix<float>(drawings.pixels.extents()), {}};
  std::copy(drawings.pixels.begin(), drawings.pixels.end(), images.pixels.begin());
  std::vector<sprite> said = drawings.shows;
  const mlkit::random_stream random{seed, 0x6361707469};
  constexpr std::uint64_t draws = 1 + sprite::attributes;
  for (std::size_t i = 0; i < said.size(); ++i) {
    if (random.uniform(i * draws) < 0.5f) continue;
    int* const attributes[] = {&said[i].shape, &said[i].colour, &said[i].pattern, &said[i].size};
    for (std::uint64_t a = 0; a < sprite::attributes; ++a)
      if (random.uniform(i * draws + 1 + a) < 0.5f) *attributes[a] = -1;
  }
  images.labels = ids(said);
  return images;
}

training_result game_art::train(const mlkit::cpu& exec, index_t steps, std::uint64_t seed) {
  const image_set images = captioned(draw(combinations(false), 24, seed), seed);
  progress bar("base: captioned sprites", steps);
  nn::adamw<float> optimizer(nn::trainable(model.store()), {.beta2 = 0.99, .decay = 0});
  return examples::train(exec, model, schedule, optimizer, images, nullptr,
                         {.steps = steps, .batch = 32, .rate = 5e-3, .snr_cap = 3, .seed = seed}, bar);
}

classifier train_probe(const mlkit::cpu& exec, std::uint64_t seed) {
  std::vector<sprite> all;
  for (int shape = 0; shape < values_of(0); ++shape)
    for (int colour = 0; colour < values_of(1); ++colour)
      for (int pattern = 0; pattern < values_of(2); ++pattern)
        for (int size = 0; size < values_of(3); ++size) all.push_back({shape, colour, pattern, size});
  classifier probe(sprite_pixels, {values_of(0), values_of(1), values_of(2), values_of(3)}, seed);
  probe.train(exec, draw(all, 12, seed).with_attributes(), 300);
  return probe;
}

std::vector<double> recognised(const mlkit::cpu& exec, const classifier& probe, const image_set& images,
                               const std::vector<sprite>& wanted) {
  const auto found = probe.answers(exec, images);
  constexpr std::size_t attributes = sprite::attributes;
  std::vector<double> right(attributes + 1), asked(attributes + 1);
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    bool all = true;
    for (std::size_t a = 0; a < attributes; ++a) {
      const int want = wanted[i][static_cast<int>(a)];
      if (want < 0) continue;
      asked[a] += 1;
      right[a] += found[i * attributes + a] == want;
      all = all && found[i * attributes + a] == want;
    }
    asked[attributes] += 1;
    right[attributes] += all;
  }
  for (std::size_t a = 0; a <= attributes; ++a) right[a] = asked[a] > 0 ? right[a] / asked[a] : 0;
  return right;
}

}  // namespace examples
