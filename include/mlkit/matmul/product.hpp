// What the kernels are given: one product, its operands in segments along k, its output and its epilogue.
#pragma once

#include <tuple>

#include "epilogue.hpp"
#include "operand.hpp"

namespace MLKIT_NAMESPACE::detail {

/// A stretch of k with operands of its own: c = epilogue(sum over segments of left right). Segments are how columns are
/// appended: [x | h] [W | B]^T is the product of (x, W) and (h, B), in one pass over c.
template <class Left, class Right>
struct segment {
  operand<Left> left;
  operand<Right> right;
  const void* packed_right = nullptr;  // panels packed beforehand, or null
  index_t depth() const noexcept { return left.depth(); }
};

/// `flipped`: left lines are columns of c, and right lines its rows.
template <class Out, class Epilogue, class... Segments>
struct product {
  std::tuple<Segments...> segments;
  index_t left_lines, right_lines;
  bool flipped;
  Out* c;
  index_t row_stride, col_stride;
  const Epilogue* epilogue;
};

/// c = epilogue(sum over segments of left right), where left lines are rows of c.
template <class C, class Epilogue, class... Segments>
product<C, Epilogue, Segments...> make_product(const matrix_view<C>& c, const Epilogue& e,
                                               const Segments&... segments) {
  return {{segments...}, c.extent(0), c.extent(1), false, c.data, c.stride(0), c.stride(1), &e};
}

/// One instruction set's functions for one type of product. Lines and rows are left and right lines of the product;
/// panels and scratch are counted in bytes.
template <class Product>
struct product_kernels {
  index_t sliver;      // right lines in a full packed sliver
  index_t width;       // lanes of a register
  index_t tile_rows;   // left lines of a full-width tile
  index_t most_lines;  // right lines whose depth blocks fit the second-level cache
  index_t word_bytes;  // bytes of a panel's word
  index_t pack_scratch;
  void (*pack)(const Product&, index_t first, index_t last, index_t sliver, void* panels, void* scratch) noexcept;
  void (*multiply)(const Product&, index_t row, index_t rows, index_t first, index_t last, index_t begin, index_t end,
                   const void* panels, void* scratch) noexcept;
  index_t (*multiply_scratch)(index_t lines) noexcept;
  index_t (*packed_depth)(const Product&) noexcept;
  index_t (*few_bytes)(const Product&) noexcept;
  void (*decode_few)(const Product&, bool dots, void* few) noexcept;
  void (*dot)(const Product&, index_t row, index_t rows, const void* few, void* scratch) noexcept;
  void (*axpy)(const Product&, index_t row, index_t rows, const void* few, void* scratch) noexcept;
  index_t (*thin_scratch)(const Product&) noexcept;
};

/// Where a packed matrix keeps its words: slivers of `sliver` lines, each [words of k][lines rounded up to `width`].
struct panel_layout {
  index_t sliver = 0;
  index_t width = 0;
  index_t word_bytes = 0;
  index_t elements_per_word = 1;
  friend bool operator==(const panel_layout&, const panel_layout&) = default;
};

}  // namespace MLKIT_NAMESPACE::detail
