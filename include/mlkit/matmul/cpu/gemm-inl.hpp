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
  if constexpr (tiles_copy && std::is_same_v<Source, dense_source<Element>>) {
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
      each_depth_block(s.depth(), depth_step<Element>(s.depth()), [&](index_t k, index_t depth) {
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
    const index_t depth = std::apply([](const auto&... s) { return (s.depth() + ... + index_t{0}); }, p.segments);
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

  // Stages may know, when they run, that they change nothing.
  template <class... Stages>
  static bool changes_nothing(const mlkit::epilogue<Stages...>& e) noexcept {
    const auto one = [](const auto& stage) {
      if constexpr (requires { stage.changes_nothing(); })
        return stage.changes_nothing();
      else
        return false;
    };
    return e.stages.apply([&](const auto&... stage) { return (one(stage) && ...); });
  }

  // Whether sums can go straight to the output: whole vectors and whole tiles of the accumulator type.
  template <class Out, class Epilogue, class... Segments>
  static bool direct(const product<Out, Epilogue, Segments...>& p, index_t lines, int tall) noexcept {
    if constexpr (std::is_same_v<Out, sum>)
      return changes_nothing(*p.epilogue) && !p.flipped && p.col_stride == 1 && lines % width == 0 &&
             tile_height(static_cast<int>(lines / width), tall) == tall;
    return false;
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

  template <class Product>
  static void multiply_rows(const Product& p, progress at) noexcept {
    multiply_segments<0>(p, at);
    if (at.started && !p.flipped) return;
    for (index_t i = at.begin; i < at.end; ++i) {
      const index_t line = at.first + i * sliver, lines = std::min(sliver, at.last - line);
      const index_t padded = round_up(lines, width);
      sum* sums = at.parts.sums + (i - at.begin) * sliver * at.parts.sums_rows;
      if (!at.started) std::fill_n(sums, at.rows * padded, sum{});  // k is zero: sums of nothing
      finish(p, at.row, at.rows, line, lines, sums, padded, at.parts.turned);
    }
  }

  // Segment I and those after it. A short segment shares the pass of the last depth block before it.
  template <std::size_t I, class Product>
  static void multiply_segments(const Product& p, progress& at) noexcept {
    constexpr std::size_t count = std::tuple_size_v<decltype(p.segments)>;
    if constexpr (I < count) {
      const auto& s = std::get<I>(p.segments);
      // A tile of one vector is 24 rows high: half the depth keeps its left panel in the first-level cache.
      const index_t block_words = compute<Element>::depth_block / (at.height > 12 ? 2 : 1);
      const index_t step = depth_step<Element>(s.depth(), block_words);
      const index_t rest = s.depth() - (ceil_div(s.depth(), step) - 1) * step;  // the last block
      joined_segment<Product> joined;
      if constexpr (I + 1 < count) {
        const auto& next = std::get<I + 1>(p.segments);
        if (s.depth() > 0 && !s.packed_right && !next.packed_right &&
            words<Element>(rest) + words<Element>(next.depth()) <= block_words + joined_words)
          joined = {next.depth(), &append_left<I + 1, Product>};
      }
      each_depth_block(s.depth(), step, [&](index_t k, index_t depth) {
        multiply_block(p, s, k, depth, k + depth == s.depth() ? joined : joined_segment<Product>{}, at);
      });
      if (!s.packed_right) at.packed_words += words<Element>(s.depth());
      if (joined.append) {
        at.packed_words += words<Element>(joined.depth);
        multiply_segments<I + 2>(p, at);
      } else {
        multiply_segments<I + 1>(p, at);
      }
    }
  }

  template <class Product>
  struct joined_segment {
    index_t depth = 0;
    void (*append)(const Product&, index_t line, index_t lines, Element* panel, Element* scratch) noexcept = nullptr;
  };
  template <std::size_t I, class Product>
  static void append_left(const Product& p, index_t line, index_t lines, Element* panel, Element* scratch) noexcept {
    const auto& s = std::get<I>(p.segments);
    pack_left<Element>(s.left, line, lines, 0, s.depth(), panel, scratch, 0);
  }

  // One pass: elements [k, k + depth) of segment s, and the segment joined to it, for all tiles.
  template <class Product, class Segment>
  static void multiply_block(const Product& p, const Segment& s, index_t k, index_t depth,
                             const joined_segment<Product>& joined, progress& at) noexcept {
    using Out = std::remove_reference_t<decltype(*p.c)>;
    const scratch_parts& parts = at.parts;
    const index_t own = words<Element>(depth), n = own + words<Element>(joined.depth);
    const index_t k_words = k / compute<Element>::elements_per_word;
    const index_t copied = copied_elements<Element>(s.left, depth);
    at.left_depth -= depth + joined.depth;
    const bool final = at.left_depth == 0, only = final && !at.started && !p.flipped;
    word *left = parts.left, *next_left = parts.next_left;
    for (index_t r = 0; r < at.rows; r += at.height, std::swap(left, next_left)) {
      const int tall = static_cast<int>(std::min(at.height, at.rows - r));
      pack_left<Element>(s.left, at.row + r, tall, k, depth, reinterpret_cast<Element*>(left), parts.pack,
                         r > 0 ? copied : 0);
      if (joined.depth > 0) joined.append(p, at.row + r, tall, reinterpret_cast<Element*>(left + own), parts.pack);
      for (index_t i = at.begin; i < at.end; ++i) {
        const index_t line = at.first + i * sliver, lines = std::min(sliver, at.last - line);
        const index_t padded = round_up(lines, width);
        const word* right = s.packed_right ? static_cast<const word*>(s.packed_right) + line * words<Element>(s.depth())
                                           : at.panels + i * sliver * packed_depth(p) + at.packed_words * padded;
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
        if constexpr (std::is_same_v<Out, sum>) {
          if (straight) {
            c = p.c + (at.row + r) * p.row_stride + line;
            c_stride = p.row_stride;
            // The sums of the next tile: beside this one, or below the first of its rows.
            const sum* next = i + 1 < at.end
                                  ? c + sliver
                                  : p.c + (at.row + r + at.height) * p.row_stride + at.first + at.begin * sliver;
            for (index_t j = 0; j < tall; ++j)
              for (index_t l = 0; l < sliver; l += 64 / index_t{sizeof(sum)})
                __builtin_prefetch(next + j * c_stride + l, 1, 3);
          }
        }
        if (finished) fetch_output(p, at.row + r, tall, line, lines);
        select_tile<Element>(static_cast<int>(padded / width), tall)(n, left, right, padded, c, c_stride, at.started,
                                                                     ahead);
        if (finished) finish(p, at.row + r, tall, line, lines, c, padded, parts.turned);
      }
    }
    at.started = true;
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
      p.epilogue->stages.apply([&](const auto&... stage) { (step(stage), ...); });
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
