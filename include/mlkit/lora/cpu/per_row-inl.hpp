// Adapters that differ from row to row: the way down as dots, the way up in the epilogue of the base's product.

// h[row][first + j] = scale * x[row] . a[first + j] for the given rows (at most 4) and j < ranks (at most 4). Each sum
// is the same whatever it is computed beside.
template <int Rows, class X, class T, class A>
void project_rows_of(const dense_source<X>& x, const index_t* rows, const dense_source<T>& a, index_t first,
                     index_t ranks, A scale, A* h, index_t h_stride) noexcept {
  using V = vec<A>;
  constexpr index_t run = 512;
  constexpr int few = 4;
  A packed_x[Rows][run], packed_a[few][run];
  V sums[Rows][few];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < few; ++j) sums[i][j] = V::zero();
  const index_t depth = a.cols();
  for (index_t k = 0; k < depth; k += run) {
    const index_t n = std::min(run, depth - k);
    const A* px[Rows];
    const A* pa[few];
    const auto place = [&](const auto& source, index_t line, A* space) -> const A* {
      if constexpr (std::is_same_v<std::remove_cvref_t<decltype(source)>, dense_source<A>>)
        if (source.col_stride == 1) return source.data + line * source.row_stride + k;
      decode_run(set_tag{}, source, line, k, n, space);
      return space;
    };
    for (int i = 0; i < Rows; ++i) px[i] = place(x, rows[i], packed_x[i]);
    for (int j = 0; j < few; ++j) pa[j] = place(a, first + std::min<index_t>(j, ranks - 1), packed_a[j]);
    for (index_t l = 0; l < n; l += V::width) {
      const int count = static_cast<int>(std::min<index_t>(V::width, n - l));
      V right[few];
      MLKIT_UNROLL
      for (int j = 0; j < few; ++j) right[j] = V::load(pa[j] + l, count);
      MLKIT_UNROLL
      for (int i = 0; i < Rows; ++i) {
        const V left = V::load(px[i] + l, count);
        MLKIT_UNROLL
        for (int j = 0; j < few; ++j) sums[i][j] = fma(left, right[j], sums[i][j]);
      }
    }
  }
  for (int i = 0; i < Rows; ++i) {
    A out[few];
    sum4(sums[i], out);
    for (index_t j = 0; j < ranks; ++j) h[rows[i] * h_stride + first + j] = scale * out[j];
  }
}

template <class X, class T, class A>
void project_rows(const dense_source<X>& x, const index_t* rows, index_t count, const dense_source<T>& a, index_t first,
                  index_t ranks, A scale, A* h, index_t h_stride) noexcept {
  if (count == 4) return project_rows_of<4>(x, rows, a, first, ranks, scale, h, h_stride);
  if (count >= 2) project_rows_of<2>(x, rows, a, first, ranks, scale, h, h_stride);
  if (count % 2 == 1) project_rows_of<1>(x, rows + count - 1, a, first, ranks, scale, h, h_stride);
}

// to [rank, out] = b [out, rank] transposed.
template <class T, class A>
void turn_adapter(const dense_source<T>& b, A* to) noexcept {
  constexpr index_t rows = 64, columns = 64, width = vec<A>::width;
  A block[rows * columns] = {}, turned[columns * rows];
  for (index_t o = 0; o < b.rows(); o += rows)
    for (index_t j = 0; j < b.cols(); j += columns) {
      const index_t m = std::min(rows, b.rows() - o), n = std::min(columns, b.cols() - j);
      for (index_t i = 0; i < m; ++i) decode_run(set_tag{}, b, o + i, j, n, block + i * columns);
      transpose(block, columns, round_up(m, width), round_up(n, width), turned, rows);
      for (index_t l = 0; l < n; ++l) std::copy_n(turned + l * rows, m, to + (j + l) * b.rows() + o);
    }
}

// x + sum over j of h[j] b[col ..][j]: b lies by rows of a few elements, which are turned in registers.
template <class V, class A, class T>
MLKIT_ALWAYS_INLINE V add_up(V x, const lora::detail::row_adapter<T, A>& row, const A* h, index_t col, int count,
                             index_t outputs) noexcept {
  if (row.turned) {
    const A* b = row.turned + col;
    for (index_t j = 0; j < row.rank; ++j, b += outputs) x = fma(V(h[j]), V::load(b, count), x);
    return x;
  }
  if (row.b_row == 1) {
    for (index_t j = 0; j < row.rank; ++j) x = fma(V(h[j]), V::load(row.b + j * row.b_column + col, count), x);
    return x;
  }
  constexpr int width = V::width;
  A block[width * width], turned[width * width];
  for (index_t j = 0; j < row.rank; j += width) {
    const index_t n = std::min<index_t>(width, row.rank - j);
    const T* b = row.b + col * row.b_row + j * row.b_column;
    const A* source = block;
    index_t stride = width;
    if constexpr (std::is_same_v<T, A>)
      if (n == width && col + width <= outputs && row.b_column == 1) {
        source = b;
        stride = row.b_row;
      }
    if (source == block)
      for (int i = 0; i < width; ++i) {
        if (i >= count) {
          V::zero().store(block + i * width);
        } else if (row.b_column == 1) {
          V::load(b + i * row.b_row, static_cast<int>(n)).store(block + i * width);
        } else {
          for (int l = 0; l < width; ++l)
            block[i * width + l] = l < n ? static_cast<A>(b[i * row.b_row + l * row.b_column]) : A{};
        }
      }
    transpose_square(source, stride, turned, width);
    for (index_t l = 0; l < n; ++l) x = fma(V(h[j + l]), V::load(turned + l * width), x);
  }
  return x;
}

template <class V, class A, class B, class T>
MLKIT_ALWAYS_INLINE V finish_stage(set_tag, const lora::detail::add_row_adapters<A, B, T>& stage, V x,
                                   const output_position& at) noexcept {
  const lora::detail::row_adapter<T, A>& row = stage.rows[at.row];
  if (row.rank > 0) {
    // Each row brings its own B from memory: ask for what the next tile will need, which is multiplied meanwhile.
    if (!row.turned) {
      const index_t ahead = at.count < V::width ? at.count : 4 * V::width;
      const char* p = reinterpret_cast<const char*>(row.b + (at.col + ahead) * row.b_row);
      for (index_t i = 0; i < at.count * row.rank * index_t{sizeof(T)}; i += 64) __builtin_prefetch(p + i);
    }
    x = add_up(x, row, stage.h + at.row * stage.h_stride, at.col, at.count, stage.outputs);
  }
  return stage.bias ? x + V::load(stage.bias + at.col, at.count) : x;
}
