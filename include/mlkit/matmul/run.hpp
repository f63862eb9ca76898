// Runs a product: decides its orientation and strategy, cuts it up over threads, calls the kernels.
#pragma once

#include <algorithm>

#include "../core/cpu.hpp"
#include "../core/memory.hpp"
#include "../simd/vec.hpp"
#include "product.hpp"

#define MLKIT_FOREACH "../matmul/cpu/tile-inl.hpp"
#include "../simd/foreach_isa.hpp"
#define MLKIT_FOREACH "../matmul/cpu/transpose-inl.hpp"
#include "../simd/foreach_isa.hpp"
#define MLKIT_FOREACH "../matmul/cpu/epilogue-inl.hpp"
#include "../simd/foreach_isa.hpp"
#define MLKIT_FOREACH "../matmul/cpu/pack-inl.hpp"
#include "../simd/foreach_isa.hpp"
#define MLKIT_FOREACH "../matmul/cpu/gemm-inl.hpp"
#include "../simd/foreach_isa.hpp"
#define MLKIT_FOREACH "../matmul/cpu/thin-inl.hpp"
#include "../simd/foreach_isa.hpp"
#define MLKIT_FOREACH "../matmul/cpu/small-inl.hpp"
#include "../simd/foreach_isa.hpp"
#define MLKIT_FOREACH "../matmul/cpu/entry-inl.hpp"
#include "../simd/foreach_isa.hpp"

namespace MLKIT_NAMESPACE::detail {

// Below this many multiplications a thread costs more to wake than it saves.
inline constexpr double work_per_thread = 1 << 19;

inline cpu limit_threads(const cpu& exec, double multiplications) {
  cpu limited = exec;
  const double useful = multiplications / work_per_thread;
  const int threads = concurrency(exec);
  limited.threads = useful < threads ? std::max(1, static_cast<int>(useful)) : threads;
  return limited;
}

// Lines on the narrow side up to which a product is computed as dots or axpys, without packing.
inline constexpr index_t thin_lines = 16;

/// Dot products (both operands run along k) or axpys (the wide operand runs along lines), few <= thin_lines.
inline void run_thin(const cpu& exec, const any_product& p, bool dots) {
  const product_kernels& kernels = *p.kernels;
  workspace<std::byte> few(kernels.few_bytes(p));
  kernels.decode_few(p, dots, few.data());
  const index_t grain = dots ? 24 : 64;  // ranges start at whole tiles and whole cache lines
  parallel_ranges(exec, ceil_div(p.left_lines, grain), [&](index_t begin, index_t end) {
    workspace<std::byte> scratch(kernels.thin_scratch(p));
    const index_t row = begin * grain, rows = std::min(p.left_lines, end * grain) - row;
    (dots ? kernels.dot : kernels.axpy)(p, row, rows, few.data(), scratch.data());
  });
}

// Bytes of packed right panels held at once: within the last-level cache.
inline constexpr index_t packed_bytes = index_t{4} << 20;

/// A blocked product over packed panels.
inline void run_blocked(const cpu& exec, const any_product& p) {
  const product_kernels& kernels = *p.kernels;
  const index_t to_pack = kernels.packed_depth(p) * kernels.word_bytes;
  const index_t threads = concurrency(exec);
  const index_t columns =
      std::max(kernels.sliver, packed_bytes / std::max<index_t>(1, to_pack) / kernels.sliver * kernels.sliver);
  // Column blocks of equal size.
  const index_t blocks = ceil_div(p.right_lines, columns);
  const index_t block = round_up(ceil_div(p.right_lines, blocks), kernels.sliver);

  workspace<std::byte> panels(to_pack * std::min(block, round_up(p.right_lines, kernels.width)));
  for (index_t first = 0; first < p.right_lines; first += block) {
    const index_t last = std::min(p.right_lines, first + block);
    const index_t slivers = ceil_div(last - first, kernels.sliver);

    // A grid of threads over (left tiles, slivers): the one whose largest part is smallest. Where every thread has
    // slivers of its own it packs them itself, and none waits for another or reads what another core has written.
    const index_t tiles = ceil_div(p.left_lines, kernels.tile_rows);
    index_t grid_rows = 1, grid_cols = 1;
    double best = 0;
    for (index_t cols = std::min(threads, slivers); cols >= 1; --cols) {
      constexpr double shared_panels = 1.02, left_packing = 0.1;
      const index_t rows = std::min(tiles, threads / cols);
      const double width = cols == 1 ? static_cast<double>(last - first) / static_cast<double>(kernels.sliver)
                                     : static_cast<double>(ceil_div(slivers, cols));
      const double cost =
          static_cast<double>(ceil_div(tiles, rows)) * (width + left_packing) * (rows > 1 ? shared_panels : 1);
      if (grid_rows * grid_cols == 1 || cost < best) best = cost, grid_rows = rows, grid_cols = cols;
    }

    const auto pack = [&](index_t begin, index_t end) {
      if (to_pack == 0) return;
      workspace<std::byte> scratch(kernels.pack_scratch);
      for (index_t at = begin; at < end; ++at) kernels.pack(p, first, last, at, panels.data(), scratch.data());
    };
    const auto multiply = [&](index_t r, index_t c) {
      const index_t row = tiles * r / grid_rows * kernels.tile_rows;
      const index_t row_end = std::min(p.left_lines, tiles * (r + 1) / grid_rows * kernels.tile_rows);
      index_t sliver = slivers * c / grid_cols;
      const index_t sliver_end = slivers * (c + 1) / grid_cols;
      if (row >= row_end || sliver >= sliver_end) return;
      if (grid_rows == 1) pack(sliver, sliver_end);
      // As many slivers at once as the second-level cache holds.
      const index_t parts = ceil_div((sliver_end - sliver) * kernels.sliver, kernels.most_lines);
      const index_t step = ceil_div(sliver_end - sliver, parts);
      const auto lines = [&](index_t at) {
        return std::min(last - first, std::min(sliver_end, at + step) * kernels.sliver) - at * kernels.sliver;
      };
      // Of fewer lines more rows are worked on together: a narrow last part may need the most.
      index_t bytes = 0;
      for (index_t at = sliver; at < sliver_end; at += step)
        bytes = std::max(bytes, kernels.multiply_scratch(lines(at)));
      workspace<std::byte> scratch(bytes);
      for (; sliver < sliver_end; sliver += step)
        kernels.multiply(p, row, row_end - row, first, last, sliver, std::min(sliver_end, sliver + step), panels.data(),
                         scratch.data());
    };
    if (grid_rows > 1) parallel_ranges(exec, slivers, pack);
    parallel_ranges(exec, grid_rows * grid_cols, [&](index_t begin, index_t end) {
      for (index_t at = begin; at < end; ++at) multiply(at / grid_cols, at % grid_cols);
    });
  }
}

/// Cycles, roughly, that it takes to pack the operands of a product and to multiply the lanes that are padding.
inline double orientation_cost(const any_product& p) noexcept {
  constexpr double copy = 0.12, transpose = 0.35;
  constexpr index_t width = 16;
  const double left = static_cast<double>(p.left_lines), right = static_cast<double>(p.right_lines);
  double cost = p.flipped ? 0.5 * left * right : 0;
  for (const any_segment& s : p) {
    const double k = static_cast<double>(s.depth());
    cost += k * left * (s.left.depth_first ? copy : transpose) + k * right * (s.right.depth_first ? transpose : copy);
    cost += k * left * static_cast<double>(round_up(p.right_lines, width)) / (2.0 * width);
  }
  return cost;
}

inline void run_oriented(const cpu& exec, const any_product& p, bool in_bf16) {
  const auto all_left = [&](bool depth_first) {
    return std::all_of(p.begin(), p.end(),
                       [&](const any_segment& s) { return s.left.depth_first == depth_first || s.depth() == 0; });
  };
  const bool thin = p.right_lines <= thin_lines && p.right_lines <= p.left_lines &&
                    std::none_of(p.begin(), p.end(), [](const any_segment& s) { return s.packed_right != nullptr; });
  // Tiles fetch further ahead than dots do: that decides where the wide operand comes from memory.
  constexpr index_t most_dots = 9, cached_elements = index_t{4} << 20;
  const bool streamed = !in_bf16 && p.right_lines > most_dots && p.left_lines * p.segments[0].depth() > cached_elements;
  if (thin && all_left(true) && !streamed && (p.right_lines % p.kernels->width != 0 || p.right_lines < 16))
    return run_thin(exec, p, true);
  if (thin && all_left(false) && p.right_lines <= 8) return run_thin(exec, p, false);
  run_blocked(exec, p);
}

// Products of dense operands in the type that they are multiplied in have a kernel for small sizes.
template <class E, class Product>
inline constexpr bool may_be_small = false;
template <class E, class Out, class Epilogue>
inline constexpr bool may_be_small<E, product<Out, Epilogue, segment<dense_source<E>, dense_source<E>>>> =
    !std::is_same_v<E, bf16>;

/// Computes a small product whole, and returns whether it did. Its bits may differ from run_product's, so it is not for
/// products that must agree with others of more segments.
template <class E, class Product>
bool run_small(const cpu& exec, const Product& p) {
  check_executor(exec);
  if constexpr (may_be_small<E, Product>)
    return MLKIT_SELECT_WITHOUT_BF16(small<E>::template run<Product>)(p);
  else
    return false;
}

template <class E, class Product>
any_product forget_types(const Product& p) {
  if constexpr (std::is_same_v<E, bf16>)
    return MLKIT_SELECT_PRODUCT(forget_product<E, Product>)(p);
  else
    return MLKIT_SELECT_WITHOUT_BF16(forget_product<E, Product>)(p);
}

/// c = epilogue(sum of left right over the segments). E: the type that operands are multiplied in, before the
/// instruction set has its say. Nothing is checked here.
template <class E, class Product>
void run_product(const cpu& exec, const Product& typed) {
  if (typed.left_lines == 0 || typed.right_lines == 0) return;
  const any_product p = forget_types<E>(typed), other = flip(p);
  double depth = 0;
  bool packed = false;
  for (const any_segment& s : p) {
    depth += static_cast<double>(s.depth());
    packed = packed || s.packed_right;
  }
  const cpu limited =
      limit_threads(exec, depth * static_cast<double>(p.left_lines) * static_cast<double>(p.right_lines));
  // Few lines belong on the right, where the thin kernels want them; else the cheaper way round.
  const index_t few = std::min(p.left_lines, p.right_lines);
  const bool turn =
      !packed && (few <= thin_lines ? p.left_lines < p.right_lines : orientation_cost(other) < orientation_cost(p));
  run_oriented(limited, turn ? other : p, std::is_same_v<E, bf16>);
}

}  // namespace MLKIT_NAMESPACE::detail
