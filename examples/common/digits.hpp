// Small labelled images, and the handwritten digits that come with the examples (data/digits/README.md).
#pragma once

#include <mlkit/core/tensor.hpp>

#include <filesystem>
#include <functional>
#include <utility>
#include <vector>

namespace examples {

struct image_set {
  mlkit::matrix<float> pixels;  // [images, side * side], in [-1, 1]
  std::vector<std::int32_t> labels;

  mlkit::index_t count() const { return pixels.extent(0); }
  mlkit::index_t size() const { return pixels.extent(1); }
  /// The images at these places, in this order.
  image_set at(const std::vector<mlkit::index_t>& places) const;
  /// The images whose label is wanted.
  image_set where(const std::function<bool(std::int32_t)>& wanted) const;
  /// Rows [first, first + n).
  mlkit::matrix_view<const float> rows(mlkit::index_t first, mlkit::index_t n) const;
};

inline constexpr const char* digits_file = MLKIT_EXAMPLES_DATA "/digits/digits.txt";

/// Reads a line per image: its label, a space, and a character per pixel, grey levels 0-9 a-g. All images are squares
/// of one size. Throws mlkit::io_error, naming the line.
image_set read_digits(const std::filesystem::path& path);

/// Two parts without a common image, in an order drawn from the seed: the first has `first` images.
std::pair<image_set, image_set> split(const image_set& all, mlkit::index_t first, std::uint64_t seed);

}  // namespace examples
