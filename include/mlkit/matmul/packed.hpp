// packed_matrix: a right operand packed once, for weights that stay.
#pragma once

#include "run.hpp"

namespace MLKIT_NAMESPACE::detail {

// What packs one sliver of an operand by itself.
template <class Source>
struct pack_kernel {
  panel_layout layout;
  index_t scratch_bytes;
  void (*pack)(const operand<Source>&, index_t at, void* panels, void* scratch) noexcept;
};

}  // namespace MLKIT_NAMESPACE::detail

#define MLKIT_FOREACH "../matmul/cpu/packed-inl.hpp"
#include "../simd/foreach_isa.hpp"

namespace MLKIT_NAMESPACE {
namespace detail {

template <class E, class Source>
pack_kernel<Source> select_pack() {
  if constexpr (std::is_same_v<E, bf16>)
    return MLKIT_SELECT_PRODUCT(pack_entry<E, Source>)();
  else
    return MLKIT_SELECT_WITHOUT_BF16(pack_entry<E, Source>)();
}

template <class E>
panel_layout active_layout() {
  return MLKIT_SELECT_PRODUCT(packed_layout<E>)();
}

}  // namespace detail

/// The right operand of a product, [k, n], in the order in which kernels read it: made by pack(), taken by matmul in
/// place of b. E is the type it is multiplied in: float, double or bf16.
///
/// It has the layout of the instruction set that was active when it was packed. Sets of the same layout (avx512 and
/// avx512_bf16 for float and double) share it; a product under any other set throws value_error.
template <class E>
class packed_matrix {
 public:
  using packed_type = E;

  packed_matrix() = default;
  packed_matrix(packed_matrix&& other) noexcept { *this = std::move(other); }
  packed_matrix& operator=(packed_matrix&& other) noexcept {
    panels_ = std::move(other.panels_);
    rows_ = std::exchange(other.rows_, 0);
    cols_ = std::exchange(other.cols_, 0);
    bytes_ = std::exchange(other.bytes_, 0);
    layout_ = other.layout_;
    return *this;
  }

  index_t rows() const noexcept { return rows_; }  ///< k
  index_t cols() const noexcept { return cols_; }  ///< n

  /// Memory held: k n elements of E, with n rounded up to the lanes of a register. Where the instruction set has no
  /// products of bf16 they are held as f32; where it has, k is rounded up to even, under amx to a multiple of 32.
  index_t bytes() const noexcept { return bytes_; }

  /// The panels, for kernels.
  const std::byte* panels() const noexcept { return panels_.get(); }
  const detail::panel_layout& layout() const noexcept { return layout_; }

  /// Refuses to be read by another instruction set.
  void check(std::string_view function, std::string_view name) const {
    if (bytes_ > 0 && layout_ != detail::active_layout<E>())
      detail::fail_value(function, ": ", name, " was packed for another instruction set, in panels that ",
                         isa_name(active_isa()), " does not read; pack it again");
  }

  /// The packed form of an operand; see pack().
  template <class Source>
  static packed_matrix make(const cpu& exec, const detail::operand<Source>& op) {
    const auto kernel = detail::select_pack<E, Source>();
    const detail::panel_layout& layout = kernel.layout;
    packed_matrix packed;
    packed.rows_ = op.depth();
    packed.cols_ = op.lines();
    packed.layout_ = layout;
    packed.bytes_ = detail::round_up(op.lines(), layout.width) *
                    detail::round_up(detail::ceil_div(op.depth(), layout.elements_per_word), layout.words_at_once) *
                    layout.word_bytes;
    if (packed.bytes_ == 0) return packed;
    packed.panels_ = detail::make_aligned<std::byte>(packed.bytes_);
    const double elements = static_cast<double>(op.lines()) * static_cast<double>(op.depth());
    detail::parallel_ranges(detail::limit_threads(exec, elements), detail::ceil_div(op.lines(), layout.sliver),
                            [&](index_t begin, index_t end) {
                              detail::workspace<std::byte> scratch(kernel.scratch_bytes);
                              for (index_t at = begin; at < end; ++at)
                                kernel.pack(op, at, packed.panels_.get(), scratch.data());
                            });
    return packed;
  }

 private:
  detail::aligned_ptr<std::byte> panels_;
  index_t rows_ = 0, cols_ = 0, bytes_ = 0;
  detail::panel_layout layout_;
};

namespace detail {

template <class X>
inline constexpr bool is_packed = false;
template <class E>
inline constexpr bool is_packed<packed_matrix<E>> = true;

template <class E>
struct operand_value<const packed_matrix<E>> {
  using type = E;
};

// Its extents alone: kernels read the panels.
template <class E>
operand<dense_source<E>> right_operand(const packed_matrix<E>& b) noexcept {
  return {{nullptr, b.cols(), b.rows(), b.rows(), 1}, true};
}
template <class B>
const void* packed_panels(const B&) noexcept {
  return nullptr;
}
template <class E>
const void* packed_panels(const packed_matrix<E>& b) noexcept {
  return b.panels();
}

template <class A>
void check_operand(std::string_view function, std::string_view name, const A& a) {
  if constexpr (viewable<const A, 2>)
    check_view(function, name, as_view(a));
  else if constexpr (is_transposed<A>)
    check_operand(function, name, a.source);
  else if constexpr (requires { a.check(function, name); })
    a.check(function, name);
}

template <class X>
concept right_matmul_operand = matmul_operand<X> || is_packed<std::remove_cvref_t<X>>;

}  // namespace detail

/// Packs b, [k, n], as the right operand of many products: `auto packed = pack(exec, transposed(w))`.
///
/// b is a view or tensor with any strides, or a source. E is the type that products with it are multiplied in: by
/// default f64 and bf16 for themselves, else f32; name it to multiply other operands, as in `pack<float>(exec, w)` for
/// bf16 weights and f32 activations. Elements are rounded to bf16 where the instruction set multiplies bf16; the others
/// multiply such operands as f32, and keep what they were given.
///
/// Throws shape_error or value_error where b is no valid view. Reads b once, writes packed.bytes() once.
template <class E = void, executor Executor, detail::matmul_operand B>
auto pack(const Executor& exec, const B& b) {
  using T = typename detail::operand_value<const B>::type;
  using Packed = std::conditional_t<std::is_void_v<E>, detail::product_type_t<T, T>, E>;
  static_assert(std::is_same_v<Packed, float> || std::is_same_v<Packed, double> || std::is_same_v<Packed, bf16>,
                "pack: matrices are packed as float, double or bf16");
  static_assert(std::is_same_v<Packed, double> == std::is_same_v<T, double>,
                "pack: f64 is packed as f64, and nothing else is");
  detail::check_operand("pack", "b", b);
  return packed_matrix<Packed>::make(exec, detail::right_operand(b));
}

}  // namespace MLKIT_NAMESPACE
