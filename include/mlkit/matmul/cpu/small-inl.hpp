// Products so small that packing and choosing cost more than multiplying: one thread, the left operand read where it
// lies, the right one too where its rows are whole registers.

template <class Element>
struct small {
  using V = vec<Element>;
  static constexpr index_t width = V::width;
  static constexpr index_t panel_elements = 4096;  // of the right operand, copied: half of a first-level cache in f32
  static constexpr index_t most_multiplications = 1 << 15;  // from 32 cubed on, packing pays

  template <class Product>
  static bool takes(const Product& p) noexcept {
    const auto& [left, right, packed] = std::get<0>(p.segments);
    const index_t depth = left.depth();
    if (packed || p.left_lines < 2 || p.right_lines < 2) return false;
    if (p.left_lines > most_multiplications || p.right_lines > panel_elements || depth > panel_elements) return false;
    const index_t padded = round_up(p.right_lines, width) * depth;
    const bool dots_are_cheaper = right.depth_first && p.right_lines < width && depth > 2 * width;
    return padded <= panel_elements && p.left_lines * padded <= most_multiplications && !dots_are_cheaper;
  }

  // All of c, or false if the product is not small.
  template <class Product>
  static bool run(const Product& p) noexcept {
    if (!takes(p)) return false;
    const auto& left = std::get<0>(p.segments).left;
    const auto& right = std::get<0>(p.segments).right;
    const index_t depth = left.depth(), lines = p.right_lines;
    alignas(64) Element panel[panel_elements];
    const Element* b = right.source.data;
    index_t b_stride = right.source.row_stride;
    if (right.depth_first || right.source.col_stride != 1 || lines % width != 0) {
      b_stride = round_up(lines, width);
      copy(right, depth, panel, b_stride);
      b = panel;
    }
    const index_t a_line = left.depth_first ? left.source.row_stride : left.source.col_stride;
    const index_t a_depth = left.depth_first ? left.source.col_stride : left.source.row_stride;
    const auto& out = p.output;
    constexpr bool plain = std::is_same_v<std::remove_cvref_t<decltype(out)>, output<Element, epilogue<>>>;
    alignas(64) Element sums[8 * width];
    for (index_t line = 0; line < lines;) {
      const bool two = lines - line > width;
      const index_t height = two ? 4 : 8, columns = two ? 2 * width : width;
      const bool direct = plain && out.col_stride == 1 && lines - line >= columns;
      for (index_t row = 0; row < p.left_lines; row += height) {
        const index_t rows = std::min(height, p.left_lines - row);
        Element* c = sums;
        if constexpr (plain) {
          if (direct) c = out.c + row * out.row_stride + line;
        }
        (two ? tile<4, 2> : tile<8, 1>)(depth, left.source.data + row * a_line, a_line, a_depth, rows, b + line,
                                        b_stride, c, direct ? out.row_stride : columns);
        for (index_t i = 0; i < rows && !direct; ++i)
          finish_run(out, row + i, line, std::min(columns, lines - line), sums + i * columns);
      }
      line += columns;
    }
    return true;
  }

 private:
  // panel[k][line] of the right operand, lines padded with zeros.
  static void copy(const operand<dense_source<Element>>& right, index_t depth, Element* panel,
                   index_t stride) noexcept {
    const auto& s = right.source;
    const index_t lines = right.lines();
    if (!right.depth_first && s.col_stride == 1) {
      for (index_t k = 0; k < depth; ++k)
        for (index_t l = 0; l < stride; l += width)
          V::load(s.data + k * s.row_stride + l, static_cast<int>(std::min(width, lines - l)))
              .store(panel + k * stride + l);
      return;
    }
    if (right.depth_first && s.col_stride == 1) {
      transpose(s.data, s.row_stride, lines, depth, panel, stride);
    } else {
      const index_t line_step = right.depth_first ? s.row_stride : s.col_stride;
      const index_t depth_step = right.depth_first ? s.col_stride : s.row_stride;
      for (index_t k = 0; k < depth; ++k)
        for (index_t l = 0; l < lines; ++l) panel[k * stride + l] = s.data[k * depth_step + l * line_step];
    }
    for (index_t k = 0; k < depth; ++k)
      for (index_t l = lines; l < stride; ++l) panel[k * stride + l] = 0;
  }

  // c[rows][Vectors * width] = a b. Rows past the last repeat it and are not stored.
  template <int Rows, int Vectors>
  static void tile(index_t depth, const Element* a, index_t a_line, index_t a_depth, index_t rows, const Element* b,
                   index_t b_stride, Element* c, index_t c_stride) noexcept {
    const Element* left[Rows];
    V sum[Rows][Vectors];
    MLKIT_UNROLL
    for (int i = 0; i < Rows; ++i) {
      left[i] = a + std::min<index_t>(i, rows - 1) * a_line;
      MLKIT_UNROLL
      for (int j = 0; j < Vectors; ++j) sum[i][j] = V::zero();
    }
    for (index_t k = 0, at = 0; k < depth; ++k, at += a_depth) {
      V right[Vectors];
      MLKIT_UNROLL
      for (int j = 0; j < Vectors; ++j) right[j] = V::load(b + j * width);
      MLKIT_UNROLL
      for (int i = 0; i < Rows; ++i) {
        const V x = V::broadcast(left[i] + at);
        MLKIT_UNROLL
        for (int j = 0; j < Vectors; ++j) sum[i][j] = fma(x, right[j], sum[i][j]);
      }
      b += b_stride;
    }
    MLKIT_UNROLL
    for (int i = 0; i < Rows; ++i) {
      MLKIT_UNROLL
      for (int j = 0; j < Vectors; ++j)
        if (i < rows) sum[i][j].store(c + i * c_stride + j * width);
    }
  }
};
