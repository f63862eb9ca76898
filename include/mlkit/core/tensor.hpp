// tensor: owning, contiguous, row-major, aligned to 64 bytes.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "memory.hpp"
#include "view.hpp"

namespace MLKIT_NAMESPACE {

/// Tag: leave the elements of a new tensor unset.
struct uninitialized_t {};
inline constexpr uninitialized_t uninitialized{};

namespace detail {

/// How many elements a new tensor of this shape has. Throws shape_error.
template <class T, int Rank>
MLKIT_ALWAYS_INLINE index_t checked_count(std::string_view what, const extents_t<Rank>& extents) {
  index_t count = 1;
  for (int d = 0; d < Rank; ++d) {
    const index_t extent = extents[static_cast<std::size_t>(d)];
    if (extent < 0) fail_shape(what, ": extent ", extent, " in dimension ", d, " is negative");
    if (extent > 0 && count > INT64_MAX / index_t{sizeof(T)} / extent)
      fail_shape(what, ": shape ", shape_text<Rank>(extents), " is too large");
    count *= extent;
  }
  return count;
}

}  // namespace detail

/// An owning row-major tensor, aligned to 64 bytes. Elements start at zero. Movable; a copy is made by clone().
template <storage T, int Rank>
class tensor {
 public:
  using value_type = T;
  static constexpr int rank = Rank;

  tensor() = default;
  explicit tensor(const extents_t<Rank>& extents) : tensor(extents, uninitialized) {
    std::fill_n(data_.get(), size(), T{});
  }
  /// Throws shape_error if an extent is negative or their product does not fit; std::bad_alloc if memory is short.
  tensor(const extents_t<Rank>& extents, uninitialized_t) : extents_(extents) {
    data_ = detail::make_aligned<T>(detail::checked_count<T, Rank>("tensor", extents));
  }
  /// A matrix or vector from nested values, for short examples and tests: tensor<float, 1>({1, 2, 3}).
  static tensor of(const extents_t<Rank>& extents, std::initializer_list<float> values) {
    tensor t(extents);
    detail::check_extent("tensor::of", "values", "elements", static_cast<index_t>(values.size()), "the shape",
                         t.size());
    std::transform(values.begin(), values.end(), t.data(), [](float v) { return static_cast<T>(v); });
    return t;
  }
  tensor(tensor&& other) noexcept
      : data_(std::move(other.data_)), extents_(std::exchange(other.extents_, extents_t<Rank>{})) {}
  tensor& operator=(tensor&& other) noexcept {
    data_ = std::move(other.data_);
    extents_ = std::exchange(other.extents_, extents_t<Rank>{});
    return *this;
  }

  tensor clone() const {
    tensor t(extents_, uninitialized);
    std::copy_n(data_.get(), size(), t.data_.get());
    return t;
  }

  T* data() noexcept { return data_.get(); }
  const T* data() const noexcept { return data_.get(); }
  const extents_t<Rank>& extents() const noexcept { return extents_; }
  index_t extent(int d) const noexcept { return extents_[d]; }
  index_t size() const noexcept { return detail::element_count<Rank>(extents_); }
  T* begin() noexcept { return data(); }
  T* end() noexcept { return data() + size(); }
  const T* begin() const noexcept { return data(); }
  const T* end() const noexcept { return data() + size(); }

  tensor_view<T, Rank> view() noexcept { return {data_.get(), extents_}; }
  tensor_view<const T, Rank> view() const noexcept { return {data_.get(), extents_}; }
  operator tensor_view<T, Rank>() noexcept { return view(); }
  operator tensor_view<const T, Rank>() const noexcept { return view(); }

  template <std::convertible_to<index_t>... I>
    requires(sizeof...(I) == Rank)
  T& operator()(I... indices) noexcept { return view()(indices...); }
  template <std::convertible_to<index_t>... I>
    requires(sizeof...(I) == Rank)
  const T& operator()(I... indices) const noexcept { return view()(indices...); }

 private:
  detail::aligned_ptr<T> data_;
  extents_t<Rank> extents_{};
};

template <class T>
using matrix = tensor<T, 2>;
template <class T>
using vector = tensor<T, 1>;

}  // namespace MLKIT_NAMESPACE
