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

/// Where the sums go.
template <class Out, class Epilogue>
struct output {
  Out* c;
  index_t row_stride, col_stride;
  const Epilogue* epilogue;
};

template <class Out, class Epilogue, class... Segments>
struct product {
  std::tuple<Segments...> segments;
  index_t left_lines, right_lines;
  detail::output<Out, Epilogue> output;
};

/// c = epilogue(sum over segments of left right), where left lines are rows of c.
template <class C, class Epilogue, class... Segments>
product<C, Epilogue, Segments...> make_product(const matrix_view<C>& c, const Epilogue& e,
                                               const Segments&... segments) {
  return {{segments...}, c.extent(0), c.extent(1), {c.data, c.stride(0), c.stride(1), &e}};
}

/// What an instruction set does with an operand: all that depends on how its elements are stored. The kernels reach it
/// through these functions, so that they are compiled once, not for each type of product. `op` is the operand; panels,
/// scratch, few lines and sums are of the types that the set multiplies in, as the bodies say.
struct operand_kernels {
  void (*pack_left)(const void* op, index_t line, index_t lines, index_t k, index_t depth, void* panel, void* scratch,
                    index_t done) noexcept;
  void (*pack_right)(const void* op, index_t line, index_t lines, index_t width, index_t k, index_t depth, void* panel,
                     void* scratch) noexcept;
  void (*decode_few)(const void* op, index_t lines, bool dots, void* few, index_t stride) noexcept;
  void (*add_dots)(const void* op, index_t row, index_t rows, index_t parts, index_t apart, const void* few,
                   index_t few_stride, index_t few_lines, void* sums, void* decoded) noexcept;
  void (*add_rows)(const void* op, index_t first, index_t lines, const void* few, index_t few_stride, index_t few_lines,
                   void* sums, void* decoded) noexcept;
};

/// An operand<Source>, its source's type forgotten.
struct any_operand {
  const void* op;
  const operand_kernels* kernels;
  index_t lines, depth;
  bool depth_first;
  const char* data;  // null where it is no dense memory
  index_t row_stride, col_stride, element_bytes;
  bool as_multiplied;  // its elements are stored as they are multiplied
  bool readable;       // registers can be loaded from its runs
};

struct any_segment {
  any_operand left, right;
  const void* packed_right;
  index_t depth() const noexcept { return left.depth; }
};

struct product_kernels;

/// A product whose types are forgotten. `flipped`: left lines are columns of c, and right lines its rows.
struct any_product {
  static constexpr int most_segments = 2;
  const product_kernels* kernels;
  any_segment segments[most_segments];
  int count;
  index_t left_lines, right_lines;
  bool flipped;
  char* c;
  index_t row_stride, col_stride, element_bytes;
  bool takes_sums;  // c has the type of the sums, and the epilogue changes nothing
  const void* output;
  void (*finish)(const void* output, index_t row, index_t rows, index_t col, index_t cols, const void* sums,
                 index_t sums_stride) noexcept;

  const any_segment* begin() const noexcept { return segments; }
  const any_segment* end() const noexcept { return segments + count; }
};

/// The same product with its operands exchanged: c transposed = right left.
inline any_product flip(any_product p) noexcept {
  for (int i = 0; i < p.count; ++i) {
    std::swap(p.segments[i].left, p.segments[i].right);
    p.segments[i].packed_right = nullptr;
  }
  std::swap(p.left_lines, p.right_lines);
  p.flipped = !p.flipped;
  return p;
}

/// One instruction set's functions for one type of elements. Lines and rows are left and right lines of the product;
/// panels and scratch are counted in bytes.
struct product_kernels {
  index_t sliver;      // right lines in a full packed sliver
  index_t width;       // lanes of a register
  index_t tile_rows;   // left lines of a full-width tile
  index_t most_lines;  // right lines whose depth blocks fit the second-level cache
  index_t word_bytes;  // bytes of a panel's word
  index_t pack_scratch;
  void (*pack)(const any_product&, index_t first, index_t last, index_t sliver, void* panels, void* scratch) noexcept;
  void (*multiply)(const any_product&, index_t row, index_t rows, index_t first, index_t last, index_t begin,
                   index_t end, const void* panels, void* scratch) noexcept;
  index_t (*multiply_scratch)(index_t lines) noexcept;
  index_t (*packed_depth)(const any_product&) noexcept;
  index_t (*few_bytes)(const any_product&) noexcept;
  void (*decode_few)(const any_product&, bool dots, void* few) noexcept;
  void (*dot)(const any_product&, index_t row, index_t rows, const void* few, void* scratch) noexcept;
  void (*axpy)(const any_product&, index_t row, index_t rows, const void* few, void* scratch) noexcept;
  index_t (*thin_scratch)(const any_product&) noexcept;
};

/// Where a packed matrix keeps its words: slivers of `sliver` lines, each [words of k][lines rounded up to `width`].
struct panel_layout {
  index_t sliver = 0;
  index_t width = 0;
  index_t word_bytes = 0;
  index_t elements_per_word = 1;
  index_t words_at_once = 1;  // words of k are a multiple of these
  friend bool operator==(const panel_layout&, const panel_layout&) = default;
};

}  // namespace MLKIT_NAMESPACE::detail
