// Blocked products over packed panels. Right panels are packed first, by slivers that any thread may take; then each
// thread takes a range of left lines and slivers, packs its left panels, and multiplies.

template <class Element>
inline constexpr index_t sliver_lines = tile_vectors* vec<typename compute<Element>::word>::width;

// Points `ahead` at [line ..] x [k, k + depth) of a left operand, where that is memory to be read as it lies.
template <class Source>
MLKIT_ALWAYS_INLINE void fetch_left(const operand<Source>& op, index_t line, index_t k, index_t depth,
                                    fetch_ahead& ahead) noexcept {
  if constexpr (is_dense<Source>) {
    if (!op.depth_first || line >= op.lines()) return;
    constexpr index_t bytes = sizeof(typename Source::value_type);
    ahead.left = reinterpret_cast<const char*>(op.source.data + line * op.source.row_stride + k * op.source.col_stride);
    ahead.left_stride = op.source.row_stride * bytes;
    ahead.left_run = depth * bytes;
  }
}

// Elements of each of those runs that a tile can copy into the next panel: whole registers of what is stored as it is
// multiplied.
template <class Element, class Source>
MLKIT_ALWAYS_INLINE index_t copied_elements(const operand<Source>& op, index_t depth) noexcept {
  if constexpr (std::is_same_v<Source, dense_source<Element>>) {
    constexpr index_t elements = sizeof(vec<typename compute<Element>::word>) / sizeof(Element);
    if (op.depth_first && op.source.col_stride == 1) return depth / elements * elements;
  }
  return 0;
}

// Elements of k in a depth block: blocks are alike, each a whole number of cache lines but the last.
template <class Element>
constexpr index_t depth_step(index_t depth, index_t block_words = compute<Element>::depth_block) noexcept {
  const index_t blocks = std::max<index_t>(1, ceil_div(words<Element>(depth), block_words));
  return std::max<index_t>(1, round_up(ceil_div(depth, blocks), 64 / index_t{sizeof(Element)}));
}

// Visits the depth blocks of a segment as f(k, depth).
template <class Element, class F>
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
  template <class Product>
  static index_t packed_depth(const Product& p) noexcept {
    return std::apply(
        [](const auto&... s) { return ((s.packed_right ? index_t{0} : words<Element>(s.depth())) + ... + index_t{0}); },
        p.segments);
  }
  // Packs sliver `at` of right lines [first, last): panel[word of k][width of the sliver].
  template <class Product>
  static void pack_sliver(const Product& p, index_t first, index_t last, index_t at, word* panels,
                          Element* scratch) noexcept {
    const index_t line = first + at * sliver, lines = std::min(sliver, last - line);
    const index_t padded = round_up(lines, width);
    word* out = panels + at * sliver * packed_depth(p);
    const auto one = [&](const auto& s) {
      if (s.packed_right) return;
      each_depth_block<Element>(s.depth(), depth_step<Element>(s.depth()), [&](index_t k, index_t depth) {
        pack_right<Element>(s.right, line, lines, padded, k, depth, out, scratch);
        out += words<Element>(depth) * padded;
      });
    };
    std::apply([&](const auto&... s) { (one(s), ...); }, p.segments);
  }

  // Left lines worked on together: their sums, over `padded` right lines, stay in the second-level cache.
  static index_t row_block(index_t padded, index_t height) noexcept {
    return std::clamp<index_t>(sums_bytes / index_t{sizeof(sum)} / padded, 48, 480) / height * height;
  }

  // Scratch of multiply() for `lines` right lines, in bytes.
  static index_t multiply_scratch(index_t lines) noexcept {
    const index_t padded = round_up(lines, width);
    const index_t rows = row_block(padded, 1) + tile_registers;
    return 2 * tile_registers * stride * index_t{sizeof(word)} +
           (rows * padded + sliver * round_up(rows, V::width)) * index_t{sizeof(sum)} +
           pack_scratch<Element> * index_t{sizeof(Element)};
  }

  // c for left lines [row, row + rows) and the slivers [begin, end) of right lines [first, last). A left panel is
  // packed when it is needed, stays in the first-level cache, and meets the current depth block of all slivers, which
  // the second-level cache holds.
  template <class Product>
  static void multiply(const Product& p, index_t row, index_t rows, index_t first, index_t last, index_t begin,
                       index_t end, const word* panels, word* scratch) noexcept {
    const index_t lines = std::min(last - first, end * sliver) - begin * sliver, padded = round_up(lines, width);
    const index_t height = tile_rows(static_cast<int>(std::min<index_t>(padded / width, tile_vectors)));
    const index_t most = row_block(padded, height), blocks = ceil_div(rows, most);
    const index_t step = round_up(ceil_div(rows, blocks), height);
    scratch_parts parts;
    parts.left = scratch;
    parts.next_left = scratch + tile_registers * stride;
    parts.sums = reinterpret_cast<sum*>(scratch + 2 * tile_registers * stride);
    parts.sums_rows = step + tile_registers;
    parts.turned = parts.sums + parts.sums_rows * padded;
    parts.pack = reinterpret_cast<Element*>(parts.turned + sliver * round_up(parts.sums_rows, V::width));
    for (index_t r = 0; r < rows; r += step)
      multiply_rows(p, row + r, std::min(step, rows - r), height, first, last, begin, end, panels, parts);
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

  // Whether sums can go straight to the output: whole vectors and whole tiles of the accumulator type.
  template <class Out, class Epilogue, class... Segments>
  static bool direct(const product<Out, Epilogue, Segments...>& p, index_t lines, int tall) noexcept {
    if constexpr (std::is_same_v<Out, sum> && std::is_same_v<Epilogue, mlkit::epilogue<>>)
      return !p.flipped && p.col_stride == 1 && lines % width == 0 &&
             tile_height(static_cast<int>(lines / width), tall) == tall;
    return false;
  }

  template <class Out, class Epilogue, class... Segments>
  static void multiply_rows(const product<Out, Epilogue, Segments...>& p, index_t row, index_t rows, index_t height,
                            index_t first, index_t last, index_t begin, index_t end, const word* panels,
                            const scratch_parts& parts) noexcept {
    // A tile of one vector is 24 rows high: half the depth keeps its left panel in the first-level cache.
    const index_t block_words = compute<Element>::depth_block / (height > 12 ? 2 : 1);
    const auto blocks_of = [&](const auto& s) {
      return ceil_div(s.depth(), depth_step<Element>(s.depth(), block_words));
    };
    const index_t blocks = std::apply([&](const auto&... s) { return (blocks_of(s) + ... + index_t{0}); }, p.segments);
    index_t done = 0;
    index_t packed_words = 0;  // of the segments before this one, in each packed line
    const auto one_segment = [&](const auto& s) {
      const auto one_block = [&](index_t k, index_t depth) {
        const index_t n = words<Element>(depth), k_words = k / compute<Element>::elements_per_word;
        const index_t copied = copied_elements<Element>(s.left, depth);
        word *left = parts.left, *next_left = parts.next_left;
        for (index_t r = 0; r < rows; r += height, std::swap(left, next_left)) {
          const int tall = static_cast<int>(std::min(height, rows - r));
          pack_left<Element>(s.left, row + r, tall, k, depth, reinterpret_cast<Element*>(left), parts.pack,
                             r > 0 ? copied : 0);
          for (index_t at = begin; at < end; ++at) {
            const index_t line = first + at * sliver, lines = std::min(sliver, last - line);
            const index_t padded = round_up(lines, width);
            const word* right = s.packed_right
                                    ? static_cast<const word*>(s.packed_right) + line * words<Element>(s.depth())
                                    : panels + at * sliver * packed_depth(p) + packed_words * padded;
            right += k_words * padded;

            const char* hot = reinterpret_cast<const char*>(right);
            fetch_ahead ahead{hot, hot, 0, 64};
            const index_t fetched = r / height * n * 64;  // the first rows' tiles fetch the next depth block
            if (fetched < n * padded * index_t{sizeof(word)})
              ahead.right = reinterpret_cast<const char*>(right + n * padded) + fetched;
            if (at == begin) {
              index_t next = r + height;
              if (copied > 0 && next < rows) {
                fetch_left(s.left, row + next, k, depth, ahead);
                ahead.from = ahead.left;
                ahead.panel = reinterpret_cast<char*>(next_left);
                ahead.copies = std::min(height, rows - next) * copied / (index_t{sizeof(V)} / index_t{sizeof(Element)});
                next += height;
              }
              if (next < rows)
                fetch_left(s.left, row + next, k, depth, ahead);
              else if (k + depth < s.depth())
                fetch_left(s.left, row + next - rows, k + depth, depth, ahead);
              else
                fetch_left(s.left, row + next, 0, depth, ahead);
              if (copied > 0) ahead.left_run = copied * index_t{sizeof(Element)};
            }

            const bool straight = direct(p, lines, tall), finished = !p.flipped && !straight && done + 1 == blocks;
            sum* c = parts.sums;
            index_t c_stride = padded;
            if (p.flipped || blocks > 1) c += (at - begin) * sliver * parts.sums_rows + r * padded;
            if constexpr (std::is_same_v<Out, sum>) {
              if (straight) {
                c = p.c + (row + r) * p.row_stride + line;
                c_stride = p.row_stride;
                // The sums of the next tile: beside this one, or below the first of its rows.
                const sum* next =
                    at + 1 < end ? c + sliver : p.c + (row + r + height) * p.row_stride + first + begin * sliver;
                for (index_t i = 0; i < tall; ++i)
                  for (index_t j = 0; j < sliver; j += 64 / index_t{sizeof(sum)})
                    __builtin_prefetch(next + i * c_stride + j, 1, 3);
              }
            }
            if (finished) fetch_output(p, row + r, tall, line, lines);
            select_tile<Element>(static_cast<int>(padded / width), tall)(n, left, right, padded, c, c_stride, done > 0,
                                                                         ahead);
            if (finished) finish(p, row + r, tall, line, lines, c, padded, parts.turned);
          }
        }
        ++done;
      };
      each_depth_block<Element>(s.depth(), depth_step<Element>(s.depth(), block_words), one_block);
      if (!s.packed_right) packed_words += words<Element>(s.depth());
    };
    std::apply([&](const auto&... s) { (one_segment(s), ...); }, p.segments);

    if (blocks > 0 && !p.flipped) return;
    for (index_t at = begin; at < end; ++at) {
      const index_t line = first + at * sliver, lines = std::min(sliver, last - line), padded = round_up(lines, width);
      sum* sums = parts.sums + (at - begin) * sliver * parts.sums_rows;
      if (blocks == 0) std::fill_n(sums, rows * padded, sum{});  // k is zero: sums of nothing
      finish(p, row, rows, line, lines, sums, padded, parts.turned);
    }
  }

  // Brings the rows of c that a tile is about to finish closer.
  template <class Product>
  static MLKIT_ALWAYS_INLINE void fetch_output(const Product& p, index_t row, index_t rows, index_t line,
                                               index_t lines) noexcept {
    if (p.col_stride != 1) return;
    for (index_t i = 0; i < rows; ++i)
      for (index_t j = 0; j < lines; j += 64 / index_t{sizeof(*p.c)})
        __builtin_prefetch(p.c + (row + i) * p.row_stride + line + j, 1, 3);
  }

 public:
  // Sends sums[rows][lines] through the epilogue into c. `turned` is scratch for flipped products.
  template <class Out, class Epilogue, class... Segments>
  static void finish(const product<Out, Epilogue, Segments...>& p, index_t row, index_t rows, index_t line,
                     index_t lines, const sum* sums, index_t sums_stride, sum* turned) noexcept {
    if (p.flipped) {
      const index_t turned_stride = round_up(rows, V::width);
      transpose(sums, sums_stride, rows, lines, turned, turned_stride);
      std::swap(row, line);
      std::swap(rows, lines);
      sums = turned;
      sums_stride = turned_stride;
    }
    for (index_t i = 0; i < rows; ++i) finish_run(p, row + i, line, lines, sums + i * sums_stride);
  }

  // One run of c[row, col .. col + count). Reads sums in whole vectors, up to a vector past the last.
  template <class Out, class Epilogue, class... Segments>
  static void finish_run(const product<Out, Epilogue, Segments...>& p, index_t row, index_t col, index_t count,
                         const sum* sums) noexcept {
    Out* out = p.c + row * p.row_stride + col * p.col_stride;
    for (index_t j = 0; j < count; j += V::width) {
      const int n = static_cast<int>(std::min<index_t>(V::width, count - j));
      V x = n == V::width ? V::load(sums + j) : V::load(sums + j, n);
      const output_position at{row, col + j, n};
      const auto step = [&](const auto& stage) {
        if constexpr (std::is_same_v<std::remove_cvref_t<decltype(stage)>, accumulate>)
          x = x + load_run(out + j * p.col_stride, p.col_stride, n);
        else
          x = apply_stage(stage, x, at);
      };
      std::apply([&](const auto&... stage) { (step(stage), ...); }, p.epilogue->stages);
      if (p.col_stride == 1 && n == V::width) {
        x.store(out + j);
      } else if (p.col_stride == 1) {
        x.store(out + j, n);
      } else {
        sum lanes[V::width];
        x.store(lanes);
        for (int l = 0; l < n; ++l) out[(j + l) * p.col_stride] = static_cast<Out>(lanes[l]);
      }
    }
  }

 private:
  template <class Out>
  static MLKIT_ALWAYS_INLINE V load_run(const Out* p, index_t step, int n) noexcept {
    if (step == 1) return V::load(p, n);
    sum lanes[V::width] = {};
    for (int l = 0; l < n; ++l) lanes[l] = static_cast<sum>(p[l * step]);
    return V::load(lanes);
  }

  template <class Stage>
  static MLKIT_ALWAYS_INLINE V apply_stage(const Stage& stage, V x, const output_position& at) noexcept {
    if constexpr (requires { finish_stage(set_tag{}, stage, x, at); }) {
      return finish_stage(set_tag{}, stage, x, at);
    } else {
      sum lanes[V::width];
      x.store(lanes);
      for (int l = 0; l < at.count; ++l) {
        if constexpr (std::is_invocable_v<const Stage&, sum, index_t, index_t>)
          lanes[l] = static_cast<sum>(stage(lanes[l], at.row, at.col + l));
        else
          lanes[l] = static_cast<sum>(stage(lanes[l]));
      }
      return V::load(lanes);
    }
  }
};
