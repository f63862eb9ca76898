// Packing an operand by itself, for products to come.

// Sliver `at` of an operand packed by itself.
template <class E, class Source>
void pack_alone(const operand<Source>& op, index_t at, void* panels, void* scratch) noexcept {
  using element = panel_element<E>;
  using word = typename compute<element>::word;
  constexpr index_t sliver = sliver_lines<element>, width = vec<word>::width;
  const index_t line = at * sliver, lines = std::min(sliver, op.lines() - line), padded = round_up(lines, width);
  word* out = static_cast<word*>(panels) + line * words<element>(op.depth());
  each_depth_block(op.depth(), depth_step<element>(op.depth()), [&](index_t k, index_t depth) {
    pack_right<element>(op, line, lines, padded, k, depth, out, static_cast<element*>(scratch));
    out += words<element>(depth) * padded;
  });
}

template <class E, class Source>
pack_kernel<Source> pack_entry() noexcept {
  using element = panel_element<E>;
  return {packed_layout<E>(), pack_scratch<element> * index_t{sizeof(typename compute<element>::word)},
          &pack_alone<E, Source>};
}
