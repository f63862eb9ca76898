// The shapes that every combination of types goes through.
#pragma once

#include "reference.hpp"

namespace reference {

// Every extent from 1 to 70 in every dimension: all tails of all tiles, in changing layouts.
template <class A, class B, class C>
void check_small_shapes(int rounds) {
  for (int i = 0; i < rounds * 70; ++i)
    check_product<A, B, C>({1 + i % 70, 1 + (i * 37 + i / 70) % 70, 1 + (i * 53 + 2 * (i / 70)) % 70},
                           static_cast<std::uint64_t>(i));
}

// Few lines on either side, at lengths around registers, blocks of the thin kernels and panels.
template <class A, class B, class C>
void check_thin_shapes(int step) {
  constexpr index_t lengths[] = {1, 31, 64, 100, 257};
  constexpr index_t depths[] = {1, 7, 16, 63, 65, 129, 511, 1025};
  int counter = 0;
  for (index_t thin = 1; thin <= 17; ++thin)
    for (index_t length : lengths)
      for (index_t depth : depths) {
        if (++counter % step != 0) continue;
        check_product<A, B, C>({thin, length, depth}, static_cast<std::uint64_t>(counter));
        check_product<A, B, C>({length, thin, depth}, static_cast<std::uint64_t>(counter + 7));
      }
}

// Depths around the blocks of k.
template <class A, class B, class C>
void check_deep_shapes() {
  constexpr index_t depths[] = {255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 1030, 2049};
  constexpr shape shapes[] = {{1, 1, 0}, {7, 65, 0}, {25, 66, 0}, {64, 64, 0}, {49, 33, 0}};
  std::uint64_t seed = 0;
  for (index_t depth : depths)
    for (shape s : shapes) {
      s.k = depth;
      check_product<A, B, C>(s, ++seed);
    }
}

// Sides beyond one block of left lines and one of right lines.
template <class A, class B, class C>
void check_large_shapes() {
  check_product<A, B, C>({400, 210, 70}, 1);
  check_product<A, B, C>({40, 1100, 2050}, 2);
  check_product<A, B, C>({3000, 20, 30}, 3);
  check_product<A, B, C>({18, 2500, 40}, 4);
  // Few lines on one side, sums along the other in more than one block.
  check_product<A, B, C>({3, 2500, 40}, layout::rows, layout::rows, layout::rows);
  check_product<A, B, C>({2500, 3, 40}, layout::columns, layout::rows, layout::padded_rows);
}

// Right lines of which the last part that is worked on together is one sliver of 64, and so works on more rows at once
// than those before it: of 13 slivers where four are worked on together, of 31 where six are.
template <class A, class B, class C>
void check_narrow_last_part(index_t slivers) {
  check_product<A, B, C>({480, slivers * 64, 520}, layout::columns, layout::rows, layout::rows, 1, 1);
}

// Every layout of every operand.
template <class A, class B, class C>
void check_layouts(const shape& s) {
  for (int a = 0; a < layouts; ++a)
    for (int b = 0; b < layouts; ++b)
      for (int c = 0; c < layouts; ++c)
        check_product<A, B, C>(s, static_cast<layout>(a), static_cast<layout>(b), static_cast<layout>(c));
}

template <class A, class B, class C>
void check_empty_shapes() {
  for (int bits = 1; bits < 8; ++bits)
    check_product<A, B, C>({bits & 1 ? 0 : 5, bits & 2 ? 0 : 40, bits & 4 ? 0 : 9}, static_cast<std::uint64_t>(bits));
  check_product<A, B, C>({40, 30, 0}, 8);
  check_product<A, B, C>({30, 40, 0}, 9);
}

}  // namespace reference
