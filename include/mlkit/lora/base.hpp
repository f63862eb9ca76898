// Bases: the frozen weights that adapters stand beside. lora::dense is a matrix in memory; quantised.hpp has others.
#pragma once

#include <type_traits>

#include "../matmul/operand.hpp"

namespace MLKIT_NAMESPACE::lora {

/// A frozen weight [outputs, inputs] with an optional bias [outputs].
///
/// `weight()` is a matrix_view<const T> of [outputs, inputs], or a matrix_source of that shape whose elements are
/// produced while they are packed (quantised weights). `bias` is a vector_view, empty (data == nullptr) where the base
/// has none. `value_type` is the type that the weight's elements count as in products.
template <class B>
concept linear_base = requires(const B& base) {
  typename B::value_type;
  { base.outputs() } -> std::convertible_to<index_t>;
  { base.inputs() } -> std::convertible_to<index_t>;
  base.weight();
  base.bias.data;
  requires detail::matmul_operand<std::remove_cvref_t<decltype(base.weight())>>;
  requires viewable < std::remove_cvref_t<decltype(base.bias)>,
  1 > ;
};

/// A base in memory: `dense{w}`, `dense{w, bias}`; w [out, in] with any strides, bias [out].
template <storage T, storage B = T>
struct dense {
  using value_type = T;
  matrix_view<const T> w;
  vector_view<const B> bias = {};

  template <viewable<2> W>
  explicit dense(W&& weight) : w(as_view(weight)) {}
  template <viewable<2> W, viewable<1> V>
  dense(W&& weight, V&& b) : w(as_view(weight)), bias(as_view(b)) {}

  index_t outputs() const noexcept { return w.extent(0); }
  index_t inputs() const noexcept { return w.extent(1); }
  matrix_view<const T> weight() const noexcept { return w; }
};
template <viewable<2> W>
dense(W&&) -> dense<element_t<std::remove_reference_t<W>>>;
template <viewable<2> W, viewable<1> V>
dense(W&&, V&&) -> dense<element_t<std::remove_reference_t<W>>, element_t<std::remove_reference_t<V>>>;

}  // namespace MLKIT_NAMESPACE::lora
