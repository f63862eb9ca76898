// shape: extents whose number is known at run time.
#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>
#include <string>

#include "../core/error.hpp"
#include "../core/view.hpp"

namespace MLKIT_NAMESPACE::nn {

/// Up to four extents. Values on a tape carry one; kernels see matrices [rows, columns] or views of a fixed rank.
/// Rank 0 is a single number.
class shape {
 public:
  static constexpr int max_rank = 4;

  shape() = default;
  /// Throws shape_error for more than four extents, a negative one, or more elements than any memory holds.
  shape(std::initializer_list<index_t> extents) : shape(extents.begin(), static_cast<int>(extents.size())) {}
  shape(const index_t* extents, int rank) : rank_(rank) {
    if (rank > max_rank) detail::fail_shape("nn::shape: rank ", rank, " is more than ", max_rank);
    std::copy_n(extents, rank, extents_.begin());
    index_t spanned = 1;
    for (int d = 0; d < rank; ++d) {
      if (extents_[d] < 0) detail::fail_shape("nn::shape: extent ", extents_[d], " in dimension ", d, " is negative");
      if (extents_[d] > detail::most_elements / spanned) detail::fail_shape("nn::shape: ", text(), " is too large");
      spanned *= std::max<index_t>(extents_[d], 1);
    }
  }

  int rank() const noexcept { return rank_; }
  index_t operator[](int d) const noexcept { return extents_[d]; }
  index_t size() const noexcept {
    index_t n = 1;
    for (int d = 0; d < rank_; ++d) n *= extents_[d];
    return n;
  }
  /// The last extent (1 for a single number): features.
  index_t columns() const noexcept { return rank_ == 0 ? 1 : extents_[rank_ - 1]; }
  /// The product of all extents but the last: samples, tokens, nodes.
  index_t rows() const noexcept {
    index_t n = 1;
    for (int d = 0; d + 1 < rank_; ++d) n *= extents_[d];
    return n;
  }
  /// The same leading extents with another last one.
  shape with_columns(index_t columns) const {
    shape s = *this;
    if (s.rank_ == 0) s.rank_ = 1;
    s.extents_[s.rank_ - 1] = columns;
    return s;
  }

  /// The same extents with another one in dimension d.
  shape with(int d, index_t extent) const {
    std::array<index_t, max_rank> e = extents_;
    e[static_cast<std::size_t>(d)] = extent;
    return {e.data(), rank_};
  }
  /// One extent more, behind these. Throws shape_error if there are four already.
  shape followed_by(index_t columns) const {
    std::array<index_t, max_rank + 1> e{};
    std::copy_n(extents_.begin(), rank_, e.begin());
    e[static_cast<std::size_t>(rank_)] = columns;
    return {e.data(), rank_ + 1};
  }

  friend bool operator==(const shape& a, const shape& b) noexcept {
    return a.rank_ == b.rank_ && std::equal(a.extents_.begin(), a.extents_.begin() + a.rank_, b.extents_.begin());
  }

  std::string text() const {
    std::string s = "[";
    for (int d = 0; d < rank_; ++d) s += (d ? ", " : "") + std::to_string(extents_[d]);
    return s + "]";
  }

 private:
  std::array<index_t, max_rank> extents_{};
  int rank_ = 0;
};

}  // namespace MLKIT_NAMESPACE::nn
