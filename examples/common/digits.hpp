// The handwritten digits that come with the examples (data/digits/README.md), and files like theirs.
#pragma once

#include "images.hpp"

#include <filesystem>

namespace examples {

inline constexpr const char* digits_file = MLKIT_EXAMPLES_DATA "/digits/digits.txt";

/// Reads a line per image: its label, a space, and a character per pixel, grey levels 0-9 a-g. All images are squares
/// of one size. Throws mlkit::io_error, naming the line.
image_set read_digits(const std::filesystem::path& path);

}  // namespace examples
