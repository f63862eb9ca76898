#include "digits.hpp"

#include <mlkit/core/error.hpp>
#include <mlkit/core/random.hpp>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <numeric>
#include <sstream>

namespace examples {

using mlkit::index_t;

image_set image_set::at(const std::vector<index_t>& places) const {
  image_set s{mlkit::matrix<float>({static_cast<index_t>(places.size()), size()}), {}};
  for (std::size_t i = 0; i < places.size(); ++i) {
    std::copy_n(&pixels(places[i], 0), size(), &s.pixels(static_cast<index_t>(i), 0));
    s.labels.push_back(labels[static_cast<std::size_t>(places[i])]);
  }
  return s;
}

image_set image_set::where(const std::function<bool(std::int32_t)>& wanted) const {
  std::vector<index_t> places;
  for (std::size_t i = 0; i < labels.size(); ++i)
    if (wanted(labels[i])) places.push_back(static_cast<index_t>(i));
  return at(places);
}

mlkit::matrix_view<const float> image_set::rows(index_t first, index_t n) const {
  return {pixels.data() + first * size(), {std::min(n, count() - first), size()}};
}

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

std::pair<image_set, image_set> split(const image_set& all, index_t first, std::uint64_t seed) {
  std::vector<index_t> order(static_cast<std::size_t>(all.count()));
  std::iota(order.begin(), order.end(), 0);
  const mlkit::random_stream random{seed, 0x73706c6974};
  for (std::size_t i = order.size(); i > 1; --i)  // Fisher and Yates
    std::swap(order[i - 1], order[static_cast<std::size_t>(random.uniform(i) * static_cast<float>(i))]);
  const auto middle = order.begin() + std::min(first, all.count());
  return {all.at({order.begin(), middle}), all.at({middle, order.end()})};
}

}  // namespace examples
