#include "digits.hpp"

#include <mlkit/core/error.hpp>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>

namespace examples {

using mlkit::index_t;

image_set read_digits(const std::filesystem::path& path) {
  std::ifstream file(path);
  if (!file) throw mlkit::io_error(path.string() + ": cannot be opened");
  std::vector<float> values;
  image_set s;
  std::size_t width = 0;
  for (std::string line; std::getline(file, line);) {
    const auto fail = [&](const std::string& what) {
      throw mlkit::io_error(path.string() + ", line " + std::to_string(s.labels.size() + 1) + ": " + what);
    };
    std::istringstream words(line);
    std::int32_t label = 0;
    std::string levels;
    if (!(words >> label >> levels)) fail("is not a label and pixels");
    if (label < 0) fail("the label " + std::to_string(label) + " is negative");
    if (width == 0) {
      width = levels.size();
      const auto side = static_cast<std::size_t>(std::lround(std::sqrt(static_cast<double>(width))));
      if (side * side != width) fail(std::to_string(width) + " pixels are not a square");
    }
    if (levels.size() != width)
      fail("has " + std::to_string(levels.size()) + " pixels, but the first line has " + std::to_string(width));
    for (const char c : levels) {
      const int level = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'g' ? c - 'a' + 10 : -1;
      if (level < 0) fail(std::string("the pixel '") + c + "' is none of 0-9 a-g");
      values.push_back(static_cast<float>(level) / 8 - 1);
    }
    s.labels.push_back(label);
  }
  if (s.labels.empty()) throw mlkit::io_error(path.string() + ": holds no image");
  s.pixels = mlkit::matrix<float>({static_cast<index_t>(s.labels.size()), static_cast<index_t>(width)});
  std::copy(values.begin(), values.end(), s.pixels.begin());
  return s;
}

}  // namespace examples
