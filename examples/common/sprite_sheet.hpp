// Sheets of sprites: one with a caption under each, and rows of sprites that share a column's caption.
#pragma once

#include "images.hpp"

#include <filesystem>
#include <string>
#include <vector>

namespace examples {

/// Each sprite with its caption under it, `columns` beside each other.
void write_captioned(const std::filesystem::path& path, const std::string& title,
                     mlkit::matrix_view<const float> sprites, const std::vector<std::string>& captions, int columns);

/// Rows of sprites, each with a label; what stands in one column goes with one caption.
class sprite_rows {
 public:
  /// A column for each caption.
  sprite_rows(std::string title, std::vector<std::string> captions)
      : title_(std::move(title)), captions_(std::move(captions)) {}

  /// The first of these, as many as there are columns.
  void add(const std::string& label, mlkit::matrix_view<const float> sprites);
  void write(const std::filesystem::path& path) const;

 private:
  struct row {
    std::string label;
    std::vector<float> values;
  };
  std::string title_;
  std::vector<std::string> captions_;
  std::vector<row> rows_;
};

}  // namespace examples
