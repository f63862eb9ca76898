// Passes over the rows of operands, and dense operands whose columns are scaled as they are read.
#pragma once

#include "products.hpp"

namespace MLKIT_NAMESPACE::lora::detail {

/// A dense matrix whose columns are multiplied by factors; `along_rows`: it is stored transposed, so that the factors
/// go with the source's rows.
template <class T, class A>
struct scaled_source {
  using value_type = T;
  dense_source<T> source;
  const A* factors;
  bool along_rows;
  index_t rows() const noexcept { return source.rows(); }
  index_t cols() const noexcept { return source.cols(); }
};

}  // namespace MLKIT_NAMESPACE::lora::detail

namespace MLKIT_NAMESPACE::detail {
using lora::detail::scaled_source;
}  // namespace MLKIT_NAMESPACE::detail

#define MLKIT_FOREACH "../lora/cpu/rows-inl.hpp"
#include "../simd/foreach_isa.hpp"
