#include "subjects.hpp"

#include "common/sprite_sheet.hpp"

#include <algorithm>

using namespace examples;

std::vector<std::string> rare_captions(std::vector<sprite> wanted) {
  std::vector<std::string> texts;
  for (sprite& s : wanted) {
    s.shape = -1;
    texts.push_back(caption(s) + " " + game_art::rare_word);
  }
  return texts;
}

namespace {

constexpr int shown_colours = 3;  // of the new shape's training images

std::vector<sprite> of_new_shape(int colours) {
  std::vector<sprite> all;
  for (int colour = 0; colour < colours; ++colour)
    for (int pattern = 0; pattern < values_of(2); ++pattern)
      for (int size = 0; size < values_of(3); ++size) all.push_back({new_shape, colour, pattern, size});
  return all;
}

// Every fifth of 36, around and around: some of each kind, for pictures.
constexpr int columns = 12;
std::size_t place(int i) { return static_cast<std::size_t>(i) * 5 % 36; }

// `n` of every label but one.
std::vector<std::int32_t> labels_without(std::int32_t left_out, index_t classes, index_t n) {
  std::vector<std::int32_t> labels;
  for (index_t i = 0; i < classes * n; ++i)
    if (i % classes != left_out) labels.push_back(static_cast<std::int32_t>(i % classes));
  return labels;
}

}  // namespace

crowns::crowns(const settings& s, std::uint64_t seed)
    : art(seed), shape(art.model.options()), fresh_(of_new_shape(values_of(1))), old_(combinations(true)), seed_(seed) {
  kind = "crown";
  base_training.steps = s.pretraining ? s.pretraining : 700;
  method_training = {.steps = s.steps ? s.steps : 150, .batch = 16, .rate = 1e-2, .beta2 = 0.99, .snr_cap = 3};
  full_rate = 2e-3;
  sampling = {.steps = 12, .guidance = 2.5};
  targets = attention_targets;
  most_drift = 1.3;

  const sprite_set drawings = draw(of_new_shape(shown_colours), 2, seed + 3), real = draw(fresh_, 1, seed + 4),
                   old_drawings = draw(old_, 3, seed + 5);
  fresh_training = drawings.with_attributes();
  fresh_training.labels = art.ids(rare_captions(drawings.shows));
  fresh_real = real.with_attributes();
  old_test = old_drawings.with_attributes();
  old_test.labels = art.ids(old_drawings.shows);
  fresh_labels = art.ids(rare_captions(fresh_));
  old_labels = art.ids(old_);
  prior_labels = art.ids(combinations(false));
}

training_result crowns::train_base(const mlkit::cpu& exec) { return art.train(exec, base_training.steps, seed_); }

void crowns::train_probe(const mlkit::cpu& exec, report& report) {
  probe_ = examples::train_probe(exec, seed_ + 1);
  report.at_least("the probe, a classifier: shapes of new drawings", probe_->accuracy(exec, fresh_real), 0.95);
}

double crowns::fresh(const mlkit::cpu& exec, const image_set& images) const {
  return recognised(exec, *probe_, images, fresh_)[0];
}
double crowns::composed(const mlkit::cpu& exec, const image_set& images) const {
  std::vector<index_t> places;
  std::vector<sprite> wanted;
  for (std::size_t i = 0; i < fresh_.size(); ++i)
    if (fresh_[i].colour >= shown_colours) places.push_back(static_cast<index_t>(i)), wanted.push_back(fresh_[i]);
  return recognised(exec, *probe_, images.at(places), wanted).back();
}
double crowns::old(const mlkit::cpu& exec, const image_set& images) const {
  return recognised(exec, *probe_, images, old_)[0];
}

void write_some(const std::filesystem::path& path, const std::string& title, const std::vector<std::string>& captions,
                const std::vector<sheet_row>& rows) {
  std::vector<std::string> texts;
  for (int i = 0; i < columns; ++i) texts.push_back(captions[place(i)]);
  sprite_rows sheet(title, texts);
  for (const sheet_row& row : rows) {
    mlkit::matrix<float> some({columns, sprite_pixels});
    for (int i = 0; i < columns; ++i)
      std::copy_n(&row.images(static_cast<index_t>(place(i)), 0), sprite_pixels, &some(i, 0));
    sheet.add(row.label, some);
  }
  sheet.write(path);
}
void crowns::sheet(const std::filesystem::path& path, const std::string& title, const std::vector<sheet_row>& rows,
                   bool of_fresh) const {
  write_some(path, title, of_fresh ? rare_captions(fresh_) : captions(old_), rows);
}

digit::digit(const settings& s, std::uint64_t seed)
    : digit(s, seed, [&] {
        const image_set images = read_digits(s.data);
        return split(images, images.count() * 7 / 10, seed);
      }()) {}

digit::digit(const settings& s, std::uint64_t seed, std::pair<image_set, image_set> images)
    : shape({.pixels = images.first.size(),
             .classes = 1 + *std::max_element(images.first.labels.begin(), images.first.labels.end()),
             .seed = seed}),
      training_(std::move(images.first)),
      test_(std::move(images.second)),
      base_(shape),
      probe_(shape.pixels, {shape.classes}, seed + 1),
      data_(s.data),
      held_out_(s.held_out) {
  if (held_out_ < 0 || held_out_ >= shape.classes) throw mlkit::value_error("--held-out is no label of the data");
  const auto is_old = [&](std::int32_t label) { return label != held_out_; };
  kind = "digit " + std::to_string(held_out_);
  base_training = {.steps = s.pretraining ? s.pretraining : 1500, .seed = seed};
  method_training = {.steps = s.steps ? s.steps : 200, .rate = 5e-3};
  fresh_training = training_.where([&](std::int32_t label) { return label == held_out_; });
  fresh_real = fresh_training.at([&] {
    std::vector<index_t> first(64);
    for (index_t i = 0; i < 64; ++i) first[static_cast<std::size_t>(i)] = i % fresh_training.count();
    return first;
  }());
  old_test = test_.where(is_old);
  fresh_labels.assign(64, held_out_);
  old_labels = labels_without(held_out_, shape.classes, 20);
  prior_labels = labels_without(held_out_, shape.classes, 30);
}

training_result digit::train_base(const mlkit::cpu& exec) {
  progress bar("base: every kind but " + kind, base_training.steps);
  nn::adamw<float> optimizer(nn::trainable(base_.store()), {.decay = 0});
  return train(exec, base_, schedule_, optimizer,
               training_.where([&](std::int32_t label) { return label != held_out_; }), nullptr, base_training, bar);
}

void digit::train_probe(const mlkit::cpu& exec, report& report) {
  probe_.train(exec, training_, 500);
  report.at_least("the probe, a classifier: accuracy on images it has not seen", probe_.accuracy(exec, test_), 0.95);
}
double digit::fresh(const mlkit::cpu& exec, const image_set& images) const { return probe_.accuracy(exec, images); }
double digit::old(const mlkit::cpu& exec, const image_set& images) const { return probe_.accuracy(exec, images); }

void digit::sheet(const std::filesystem::path& path, const std::string& title, const std::vector<sheet_row>& rows,
                  bool of_fresh) const {
  std::vector<sheet_row> some = rows;
  for (sheet_row& row : some)
    row.images.extents[0] = std::min<index_t>(row.images.extents[0], of_fresh ? 16 : 2 * (shape.classes - 1));
  contact_sheet(title, some).write_png(path);
}

std::string digit::arguments() const {
  return " --data '" + data_.string() + "' --held-out " + std::to_string(held_out_);
}
