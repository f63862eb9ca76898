// Blocked products over packed panels. Right panels are packed first, by slivers that any thread may take; then each
// thread takes a range of left lines and slivers, packs its left panels, and multiplies.

template <class Element>
inline constexpr index_t sliver_lines = tile_vectors* vec<typename compute<Element>::word>::width;

// Points `ahead` at [line ..] x [k, k + depth) of a left operand, where that is memory to be read as it lies.
inline void fetch_left(const any_operand& op, index_t line, index_t k, index_t depth, fetch_ahead& ahead) noexcept {
  if (!op.data || !op.depth_first || line >= op.lines) return;
  ahead.left = op.data + (line * op.row_stride + k * op.col_stride) * op.element_bytes;
  ahead.left_stride = op.row_stride * op.element_bytes;
  ahead.left_run = depth * op.element_bytes;
}

// Elements of each of those runs that a tile can copy into the next panel: whole registers of what is stored as it is
// multiplied.
template <class Element>
MLKIT_ALWAYS_INLINE index_t copied_elements(const any_operand& op, index_t depth) noexcept {
  constexpr index_t elements = sizeof(vec<typename compute<Element>::word>) / sizeof(Element);
  return tiles_copy && op.as_multiplied && op.depth_first && op.col_stride == 1 ? depth / elements * elements : 0;
}

// Elements of k in a depth block: blocks are alike, each a whole number of cache lines but the last.
template <class Element>
constexpr index_t depth_step(index_t depth, index_t block_words = compute<Element>::depth_block) noexcept {
  const index_t blocks = std::max<index_t>(1, ceil_div(words<Element>(depth), block_words));
  return std::max<index_t>(1, round_up(ceil_div(depth, blocks), 64 / index_t{sizeof(Element)}));
}

// Visits the depth blocks of a segment as f(k, depth).
template <class F>
MLKIT_ALWAYS_INLINE void each_depth_block(index_t depth, index_t step, F&& f) noexcept {
  for (index_t k = 0; k < depth; k += step) f(k, std::min(step, depth - k));
}

template <class Element>
struct gemm {
  using word = typename compute<Element>::word;
  using sum = typename compute<Element>::sum;
  using V = vec<sum>;
  static constexpr index_t width = vec<word>::width;
  static constexpr index_t sliver = sliver_lines<Element>;
  static constexpr index_t stride = panel_stride<Element>;

  // Words of one packed sliver over all of a product's segments that are not packed beforehand.
  static index_t packed_depth(const any_product& p) noexcept {
    index_t depth = 0;
    for (const any_segment& s : p) depth += s.packed_right ? 0 : words<Element>(s.depth());
    return depth;
  }
  // Packs sliver `at` of right lines [first, last): panel[word of k][width of the sliver].
  static void pack_sliver(const any_product& p, index_t first, index_t last, index_t at, word* panels,
                          Element* scratch) noexcept {
    const index_t line = first + at * sliver, lines = std::min(sliver, last - line);
    const index_t padded = round_up(lines, width);
    word* out = panels + at * sliver * packed_depth(p);
    for (const any_segment& s : p) {
      if (s.packed_right) continue;
      each_depth_block(s.depth(), depth_step<Element>(s.depth()), [&](index_t k, index_t depth) {
        s.right.kernels->pack_right(s.right.op, line, lines, padded, k, depth, out, scratch);
        out += words<Element>(depth) * padded;
      });
    }
  }

  // Left lines worked on together: their sums, over `padded` right lines, stay in the second-level cache.
  static index_t row_block(index_t padded, index_t height) noexcept {
    return std::clamp<index_t>(sums_bytes / index_t{sizeof(sum)} / padded, 48, 480) / height * height;
  }

  // Scratch of multiply() for `lines` right lines, in bytes.
  static index_t multiply_scratch(index_t lines) noexcept {
    const index_t padded = round_up(lines, width);
    const index_t rows = row_block(padded, 1) + highest_tile<Element>;
    return 2 * highest_tile<Element> * stride * index_t{sizeof(word)} +
           (rows * padded + sliver * round_up(rows, V::width)) * index_t{sizeof(sum)} +
           pack_scratch<Element> * index_t{sizeof(Element)};
  }

  // c for left lines [row, row + rows) and the slivers [begin, end) of right lines [first, last). A left panel is
  // packed when it is needed, stays in the first-level cache, and meets the current depth block of all slivers, which
  // the second-level cache holds.
  static void multiply(const any_product& p, index_t row, index_t rows, index_t first, index_t last, index_t begin,
                       index_t end, const word* panels, word* scratch) noexcept {
    const index_t lines = std::min(last - first, end * sliver) - begin * sliver, padded = round_up(lines, width);
    const index_t height = tile_rows<Element>(static_cast<int>(std::min<index_t>(padded / width, tile_vectors)));
    const index_t most = row_block(padded, height), blocks = ceil_div(rows, most);
    const index_t step = round_up(ceil_div(rows, blocks), height);
    scratch_parts parts;
    parts.left = scratch;
    parts.next_left = scratch + highest_tile<Element> * stride;
    parts.sums = reinterpret_cast<sum*>(scratch + 2 * highest_tile<Element> * stride);
    parts.sums_rows = step + highest_tile<Element>;
    parts.turned = parts.sums + parts.sums_rows * padded;
    parts.pack = reinterpret_cast<Element*>(parts.turned + sliver * round_up(parts.sums_rows, V::width));
    index_t depth = 0;
    for (const any_segment& s : p) depth += s.depth();
    [[maybe_unused]] const matrix_registers<Element> registers;
    for (index_t r = 0; r < rows; r += step)
      multiply_rows(p, {row + r, std::min(step, rows - r), height, first, last, begin, end, panels, parts, depth});
  }

 private:
  static constexpr index_t sums_bytes = 128 << 10;

  struct scratch_parts {
    word* left;  // one panel, and while it is multiplied the next one
    word* next_left;
    sum* sums;  // [sliver][sums_rows][lines of the sliver, padded]
    index_t sums_rows;
    sum* turned;  // one sliver's sums, transposed
    Element* pack;
  };

  // Whether sums can go straight to the output: whole vectors and whole tiles of what it stores.
  static bool direct(const any_product& p, index_t lines, int tall) noexcept {
    return p.takes_sums && !p.flipped && p.col_stride == 1 && lines % width == 0 &&
           tile_height<Element>(static_cast<int>(lines / width), tall) == tall;
  }

  // What multiply_rows is doing: left lines [row, row + rows) in tiles of `height`, slivers [begin, end) of right lines
  // [first, last).
  struct progress {
    index_t row, rows, height, first, last, begin, end;
    const word* panels;
    const scratch_parts& parts;
    index_t left_depth;        // elements of k still to come
    bool started = false;      // there are sums
    index_t packed_words = 0;  // of the segments before this one, in each packed line
  };

  static void multiply_rows(const any_product& p, progress at) noexcept {
    multiply_segments(p, at);
    if (at.started && !p.flipped) return;
    for (index_t i = at.begin; i < at.end; ++i) {
      const index_t line = at.first + i * sliver, lines = std::min(sliver, at.last - line);
      const index_t padded = round_up(lines, width);
      sum* sums = at.parts.sums + (i - at.begin) * sliver * at.parts.sums_rows;
      if (!at.started) std::fill_n(sums, at.rows * padded, sum{});  // k is zero: sums of nothing
      finish(p, at.row, at.rows, line, lines, sums, padded, at.parts.turned);
    }
  }

  // A short segment shares the pass of the last depth block before it.
  static void multiply_segments(const any_product& p, progress& at) noexcept {
    // A tile of one vector is 24 rows high: half the depth keeps its left panel in the first-level cache.
    const index_t block_words = compute<Element>::depth_block / (at.height > 12 ? 2 : 1);
    for (const any_segment* s = p.begin(); s < p.end(); ++s) {
      const index_t step = depth_step<Element>(s->depth(), block_words);
      const index_t rest = s->depth() - (ceil_div(s->depth(), step) - 1) * step;  // the last block
      const any_segment* next = s + 1 < p.end() ? s + 1 : nullptr;
      if (next && (s->depth() == 0 || next->depth() == 0 || s->packed_right || next->packed_right ||
                   words<Element>(rest) + words<Element>(next->depth()) > block_words + joined_words))
        next = nullptr;
      each_depth_block(s->depth(), step, [&](index_t k, index_t depth) {
        multiply_block(p, *s, k, depth, k + depth == s->depth() ? next : nullptr, at);
      });
      if (!s->packed_right) at.packed_words += words<Element>(s->depth());
      if (next) {
        at.packed_words += words<Element>(next->depth());
        ++s;
      }
    }
  }

  // One pass: elements [k, k + depth) of segment s, and the segment joined to it, for all tiles.
  static void multiply_block(const any_product& p, const any_segment& s, index_t k, index_t depth,
                             const any_segment* joined, progress& at) noexcept {
    const scratch_parts& parts = at.parts;
    const index_t own = words<Element>(depth), n = own + (joined ? words<Element>(joined->depth()) : 0);
    const index_t k_words = k / compute<Element>::elements_per_word, line_words = packed_depth(p);
    const index_t copied = copied_elements<Element>(s.left, depth);
    at.left_depth -= depth + (joined ? joined->depth() : 0);
    const bool final = at.left_depth == 0, only = final && !at.started && !p.flipped;
    word *left = parts.left, *next_left = parts.next_left;
    for (index_t r = 0; r < at.rows; r += at.height, std::swap(left, next_left)) {
      const int tall = static_cast<int>(std::min(at.height, at.rows - r));
      s.left.kernels->pack_left(s.left.op, at.row + r, tall, k, depth, left, parts.pack, r > 0 ? copied : 0);
      if (joined)
        joined->left.kernels->pack_left(joined->left.op, at.row + r, tall, 0, joined->depth(), left + own, parts.pack,
                                        0);
      for (index_t i = at.begin; i < at.end; ++i) {
        const index_t line = at.first + i * sliver, lines = std::min(sliver, at.last - line);
        const index_t padded = round_up(lines, width);
        const word* right = s.packed_right ? static_cast<const word*>(s.packed_right) + line * words<Element>(s.depth())
                                           : at.panels + i * sliver * line_words + at.packed_words * padded;
        right += k_words * padded;

        const char* hot = reinterpret_cast<const char*>(right);
        fetch_ahead ahead{hot, hot, 0, 64};
        const index_t fetched = r / at.height * n * 64;  // the first rows' tiles fetch the next depth block
        if (fetched < n * padded * index_t{sizeof(word)})
          ahead.right = reinterpret_cast<const char*>(right + n * padded) + fetched;
        if (i == at.begin) {
          index_t next = r + at.height;
          if (copied > 0 && next < at.rows) {
            fetch_left(s.left, at.row + next, k, depth, ahead);
            ahead.from = ahead.left;
            ahead.panel = reinterpret_cast<char*>(next_left);
            ahead.copies = std::min(at.height, at.rows - next) * copied * index_t{sizeof(Element)} / index_t{sizeof(V)};
            next += at.height;
          }
          if (next < at.rows)
            fetch_left(s.left, at.row + next, k, depth, ahead);
          else if (k + depth < s.depth())
            fetch_left(s.left, at.row + next - at.rows, k + depth, depth, ahead);
          else
            fetch_left(s.left, at.row + next, 0, depth, ahead);
          if (copied > 0) ahead.left_run = copied * index_t{sizeof(Element)};
        }

        const bool straight = direct(p, lines, tall), finished = final && !p.flipped && !straight;
        sum* c = parts.sums;
        index_t c_stride = padded;
        if (!only) c += (i - at.begin) * sliver * parts.sums_rows + r * padded;
        if (straight) {
          sum* const all = reinterpret_cast<sum*>(p.c);
          c = all + (at.row + r) * p.row_stride + line;
          c_stride = p.row_stride;
          // The sums of the next tile: beside this one, or below the first of its rows.
          const sum* next = i + 1 < at.end
                                ? c + sliver
                                : all + (at.row + r + at.height) * p.row_stride + at.first + at.begin * sliver;
          fetch_rows<true>(next, c_stride * index_t{sizeof(sum)}, tall, sliver * index_t{sizeof(sum)});
        }
        if (finished && p.col_stride == 1)
          fetch_rows<true>(p.c + ((at.row + r) * p.row_stride + line) * p.element_bytes, p.row_stride * p.element_bytes,
                           tall, lines * p.element_bytes);
        select_tile<Element>(static_cast<int>(padded / width), tall)(n, left, right, padded, c, c_stride, at.started,
                                                                     ahead, nullptr);
        if (finished) finish(p, at.row + r, tall, line, lines, c, padded, parts.turned);
      }
    }
    at.started = true;
  }

 public:
  // Sends sums[rows][lines] through the epilogue into c. `turned` is scratch for flipped products.
  static void finish(const any_product& p, index_t row, index_t rows, index_t line, index_t lines, const sum* sums,
                     index_t sums_stride, sum* turned) noexcept {
    if (!p.flipped) return p.finish(p.output, row, rows, line, lines, sums, sums_stride);
    const index_t turned_stride = round_up(rows, V::width);
    transpose(sums, sums_stride, rows, lines, turned, turned_stride);
    p.finish(p.output, line, lines, row, rows, turned, turned_stride);
  }
};
