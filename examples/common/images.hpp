// Small images with labels.
#pragma once

#include <mlkit/core/tensor.hpp>

#include <functional>
#include <utility>
#include <vector>

namespace examples {

struct image_set {
  mlkit::matrix<float> pixels;       // [images, values], in [-1, 1]
  std::vector<std::int32_t> labels;  // one for each image, or as many for each: attributes, or the words of a caption

  mlkit::index_t count() const { return pixels.extent(0); }
  mlkit::index_t size() const { return pixels.extent(1); }
  /// How many labels an image has, and where those of one start.
  std::size_t labels_each() const { return labels.size() / static_cast<std::size_t>(count()); }
  const std::int32_t* labels_of(mlkit::index_t image) const {
    return labels.data() + static_cast<std::size_t>(image) * labels_each();
  }
  /// The images at these places, in this order.
  image_set at(const std::vector<mlkit::index_t>& places) const;
  /// The images whose label, one for each, is wanted.
  image_set where(const std::function<bool(std::int32_t)>& wanted) const;
  /// Rows [first, first + n).
  mlkit::matrix_view<const float> rows(mlkit::index_t first, mlkit::index_t n) const;
};

/// The same images with labels that can be changed.
image_set copy_of(const image_set& images);

/// The root of the mean square of the difference between two sets' values.
double distance(mlkit::matrix_view<const float> a, mlkit::matrix_view<const float> b);

/// Two parts without a common image, in an order drawn from the seed: the first has `first` images.
std::pair<image_set, image_set> split(const image_set& all, mlkit::index_t first, std::uint64_t seed);

}  // namespace examples
