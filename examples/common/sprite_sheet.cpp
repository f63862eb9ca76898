#include "sprite_sheet.hpp"

#include "picture.hpp"
#include "sprites.hpp"

#include <algorithm>
#include <sstream>

namespace examples {

namespace {

constexpr int margin = 16, gap = 6, line = 13;

std::vector<std::string> words_of(const std::string& caption) {
  std::istringstream stream(caption);
  std::vector<std::string> words;
  for (std::string word; stream >> word;) words.push_back(word);
  return words;
}

mlkit::vector_view<const float> one(const float* values) { return {values, {sprite_pixels}}; }

void centred(picture& p, int x, int y, int width, const std::string& text, colour c) {
  p.text(x + (width - picture::text_width(text)) / 2, y, text, c);
}

}  // namespace

void write_captioned(const std::filesystem::path& path, const std::string& title,
                     mlkit::matrix_view<const float> sprites, const std::vector<std::string>& captions, int columns) {
  constexpr int zoom = 6, side = zoom * static_cast<int>(sprite_side), width = side + 3 * gap,
                height = side + 2 * line + 2 * gap;
  const auto count = static_cast<int>(captions.size());
  columns = std::min(columns, std::max(1, count));
  const int top = margin + 36, rows = (count + columns - 1) / columns;
  picture p(std::max(columns * width - 3 * gap, picture::text_width(title, 2)) + 2 * margin,
            top + rows * height + margin - gap);
  p.text(margin, margin, title, ink, 2);
  for (int i = 0; i < count; ++i) {
    const int x = margin + i % columns * width, y = top + i / columns * height;
    p.rgb(x, y, one(&sprites(i, 0)), zoom);
    const auto words = words_of(captions[static_cast<std::size_t>(i)]);
    for (std::size_t first = 0, at = 0; first < words.size(); first += 2, ++at)
      centred(p, x, y + side + 3 + static_cast<int>(at) * line, side,
              words[first] + (first + 1 < words.size() ? " " + words[first + 1] : ""), muted);
  }
  p.write_png(path);
}

void sprite_rows::add(const std::string& label, mlkit::matrix_view<const float> sprites) {
  row r{label, {}};
  for (mlkit::index_t i = 0; i < static_cast<mlkit::index_t>(captions_.size()); ++i)
    r.values.insert(r.values.end(), &sprites(i, 0), &sprites(i, 0) + sprite_pixels);
  rows_.push_back(std::move(r));
}

void sprite_rows::write(const std::filesystem::path& path) const {
  constexpr int zoom = 4, side = zoom * static_cast<int>(sprite_side);
  int label = 0;
  std::size_t words = 0;
  for (const row& r : rows_) label = std::max(label, picture::text_width(r.label, 2));
  for (const std::string& caption : captions_) words = std::max(words, words_of(caption).size());
  const auto columns = static_cast<int>(captions_.size()), rows = static_cast<int>(rows_.size());
  const int left = margin + label + (label ? margin : 0), heading = margin + 36,
            top = heading + static_cast<int>(words) * line + gap;
  picture p(std::max(left + columns * (side + gap) - gap, margin + picture::text_width(title_, 2)) + margin,
            top + rows * (side + gap) - gap + margin);
  p.text(margin, margin, title_, ink, 2);
  for (int c = 0; c < columns; ++c) {
    const auto said = words_of(captions_[static_cast<std::size_t>(c)]);
    for (std::size_t w = 0; w < said.size(); ++w)
      centred(p, left + c * (side + gap), heading + static_cast<int>(words - said.size() + w) * line, side, said[w],
              muted);
  }
  for (int r = 0; r < rows; ++r) {
    const int y = top + r * (side + gap);
    p.text(margin, y + side / 2 - 10, rows_[static_cast<std::size_t>(r)].label, ink, 2);
    for (int c = 0; c < columns; ++c)
      p.rgb(left + c * (side + gap), y, one(rows_[static_cast<std::size_t>(r)].values.data() + c * sprite_pixels),
            zoom);
  }
  p.write_png(path);
}

}  // namespace examples
