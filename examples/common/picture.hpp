// Pictures: a canvas in RGB, text on it, sheets of small images, PNG files.
#pragma once

#include <mlkit/core/view.hpp>

#include <array>
#include <filesystem>
#include <string>
#include <vector>

namespace examples {

using colour = std::array<std::uint8_t, 3>;
inline constexpr colour white{255, 255, 255}, ink{32, 36, 44}, muted{120, 126, 138};

class picture {
 public:
  picture(int width, int height, colour background = white);

  int width() const { return width_; }
  int height() const { return height_; }
  void fill(int x, int y, int w, int h, colour c);
  /// ASCII text with its upper left corner at (x, y); a line is 12 * size pixels high.
  void text(int x, int y, const std::string& s, colour c = ink, int size = 1);
  static int text_width(const std::string& s, int size = 1);
  /// Grey values in [-1, 1] (clamped), each `zoom` pixels wide, blended linearly into its neighbours.
  void grey(int x, int y, mlkit::matrix_view<const float> image, int zoom);
  /// A square in RGB, `values` its rows one after another in [-1, 1] (clamped), each pixel a square of `zoom` pixels.
  void rgb(int x, int y, mlkit::vector_view<const float> values, int zoom);
  void write_png(const std::filesystem::path& path) const;

 private:
  int width_, height_;
  std::vector<std::uint8_t> pixels_;
};

/// One row of a contact sheet: a label and square images as rows of `images` [n, side * side], values in [-1, 1].
struct sheet_row {
  std::string label;
  mlkit::matrix_view<const float> images;
};

/// Rows of images under a title, every pixel enlarged `zoom` times.
picture contact_sheet(const std::string& title, const std::vector<sheet_row>& rows, int zoom = 6);

}  // namespace examples
