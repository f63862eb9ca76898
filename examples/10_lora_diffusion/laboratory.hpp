// Where a base is taught a new kind, in any of the ways, and the samples of what comes of it are judged.
#pragma once

#include "outcome.hpp"

#include <mlkit/nn/files.hpp>

#include <algorithm>

namespace examples {

// What all methods share: the subject with its images and its judge, the base's file, and seeds.
template <class Subject>
struct laboratory {
  mlkit::cpu exec;
  settings chosen;
  Subject subject;
  std::uint64_t seed;
  std::filesystem::path base_file;
  image_set prior;  // the old kinds, drawn by the base: nothing else of its training is needed

  using model = typename Subject::model;
  static constexpr bool has_words = requires(model & m, nn::parameters<float>& store) { m.add_word(store, 0); };

  std::uint64_t noise_seed(int run) const { return seed + 10 + static_cast<std::uint64_t>(run); }
  image_set draw(const model& m, const std::vector<std::int32_t>& labels, std::uint64_t noise) const {
    sampling o = subject.sampling;
    o.seed = noise;
    return sample(exec, m, subject.schedule(), labels, o, typename Subject::sampler{});
  }
  void judge(const model& m, const std::vector<std::int32_t>& labels, int run, outcome& o) const {
    o.fresh = draw(m, labels, noise_seed(run));
    o.old = draw(m, subject.old_labels, noise_seed(run));
    o.recognised.push_back(subject.fresh(exec, o.fresh));
    if constexpr (requires { subject.composed(exec, o.fresh); }) o.composed.push_back(subject.composed(exec, o.fresh));
    o.old_recognised.push_back(subject.old(exec, o.old));
    o.old_loss.push_back(denoising_loss(exec, m, subject.schedule(), subject.old_test));
  }
};

// Teaches the base one kind, in one way.
template <class Subject>
struct pupil {
  typename Subject::model model;
  nn::parameters<float> added;  // adapters, or a word
  std::vector<std::int32_t> labels;
  training_result result;

  pupil(const laboratory<Subject>& lab, const method& m, std::uint64_t seed, progress& bar, index_t done)
      : model(lab.subject.shape), added(seed), labels(lab.subject.fresh_labels) {
    nn::load(lab.base_file.string(), model.store());
    image_set images = copy_of(lab.subject.fresh_training);
    if (m.how != way::full) model.store().freeze();  // no gradient is computed for the base from here on
    if (m.how == way::lora || m.how == way::dora) {
      nn::adapter_options o = lab.chosen.adapter;
      o.dora = m.how == way::dora;
      nn::adapt(model, added, o, lab.subject.targets);  // down random, up zero: the model is still the base
    }
    if constexpr (laboratory<Subject>::has_words)
      if (m.how == way::word) {  // its embedding is all that is trained
        const auto& words = lab.subject.art.words;
        const std::int32_t word = model.add_word(added, words.id("shield"));
        for (auto* ids : {&images.labels, &labels})
          std::replace(ids->begin(), ids->end(), words.id(game_art::rare_word), word);
      }
    training o = lab.subject.method_training;
    o.prior = m.prior;
    o.seed = seed;
    if (m.how == way::full) o.rate = lab.subject.full_rate;
    if (m.how == way::word) o.rate *= 3;
    nn::adamw<float> optimizer(nn::trainable(model.store(), added), {.beta2 = o.beta2, .decay = 0});
    result = train(lab.exec, model, lab.subject.schedule(), optimizer, images, m.prior > 0 ? &lab.prior : nullptr, o,
                   bar, done);
  }
};

// A base and an adapter from their files.
template <class Subject>
struct taught {
  typename Subject::model model;
  nn::parameters<float> adapters;

  taught(const laboratory<Subject>& lab, const std::filesystem::path& base, const std::filesystem::path& adapter)
      : model(lab.subject.shape) {
    nn::load(base.string(), model.store());
    nn::load_adapters(adapter.string(), model, adapters);
  }
};

}  // namespace examples
