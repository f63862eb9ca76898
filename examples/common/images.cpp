#include "images.hpp"

#include <mlkit/core/random.hpp>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace examples {

using mlkit::index_t;

image_set image_set::at(const std::vector<index_t>& places) const {
  image_set s{mlkit::matrix<float>({static_cast<index_t>(places.size()), size()}), {}};
  for (std::size_t i = 0; i < places.size(); ++i) {
    std::copy_n(&pixels(places[i], 0), size(), &s.pixels(static_cast<index_t>(i), 0));
    s.labels.insert(s.labels.end(), labels_of(places[i]), labels_of(places[i]) + labels_each());
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

image_set copy_of(const image_set& images) {
  image_set copy{mlkit::matrix<float>(images.pixels.extents()), images.labels};
  std::copy(images.pixels.begin(), images.pixels.end(), copy.pixels.begin());
  return copy;
}

double distance(mlkit::matrix_view<const float> a, mlkit::matrix_view<const float> b) {
  double sum = 0;
  for (index_t r = 0; r < a.extent(0); ++r)
    for (index_t c = 0; c < a.extent(1); ++c) sum += std::pow(static_cast<double>(a(r, c) - b(r, c)), 2);
  return std::sqrt(sum / static_cast<double>(a.size()));
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
