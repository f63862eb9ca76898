// Dropout on the adapter's input: a mask that is drawn again wherever it is needed, and never stored.
#pragma once

#include "../matmul/run.hpp"
#include "../simd/random.hpp"

namespace MLKIT_NAMESPACE::lora::detail {

/// Which elements of a matrix are dropped: element [row, col] of a matrix with `cols` columns is kept where random
/// word (first_row + row) * cols + col of the stream is at least `threshold`, and then scaled by 1 / (1 - p).
struct dropout_mask {
  random_stream random;
  index_t cols = 0;
  index_t first_row = 0;
  std::uint32_t threshold = 0;
  double scale = 1;

  /// x * mask[row, col].
  template <std::floating_point A>
  MLKIT_HOST_DEVICE constexpr A operator()(A x, index_t row, index_t col) const noexcept {
    const auto index = static_cast<std::uint64_t>((first_row + row) * cols + col);
    return random.bits(index) >= threshold ? x * static_cast<A>(scale) : A{};
  }
  /// The mask of the rows from `row` on.
  MLKIT_HOST_DEVICE dropout_mask from(index_t row) const noexcept {
    dropout_mask m = *this;
    m.first_row += row;
    return m;
  }
  static dropout_mask make(double p, std::uint64_t seed, std::uint64_t stream, index_t cols) noexcept {
    return {{seed, stream}, cols, 0, static_cast<std::uint32_t>(p * 0x1p32), 1 / (1 - p)};
  }
};

/// A dense matrix under a mask.
template <class T>
struct dropped_source {
  using value_type = T;
  mlkit::detail::dense_source<T> source;
  dropout_mask mask;
  bool turned = false;  // the source holds the masked matrix transposed
  index_t rows() const noexcept { return source.rows(); }
  index_t cols() const noexcept { return source.cols(); }
};

/// x * mask: an epilogue stage.
struct mask_output {
  dropout_mask mask;
  template <std::floating_point A>
  MLKIT_HOST_DEVICE constexpr A operator()(A x, index_t row, index_t col) const noexcept {
    return mask(x, row, col);
  }
};

}  // namespace MLKIT_NAMESPACE::lora::detail

namespace MLKIT_NAMESPACE::detail {
using lora::detail::dropout_mask;
using lora::detail::dropped_source;
}  // namespace MLKIT_NAMESPACE::detail

#define MLKIT_FOREACH "../lora/cpu/dropout-inl.hpp"
#include "../simd/foreach_isa.hpp"
