// Products with few lines on one side, which read the other side once, where it stands, without packing it.

// Sums of four registers, as out[0..4). A fixed tree of additions, the same for each of the four.
MLKIT_ALWAYS_INLINE void sum4(const vec<float>* x, float* out) noexcept {
#if MLKIT_X86
#if MLKIT_SET_AVX512
  __m256 h[4];
  MLKIT_UNROLL
  for (int i = 0; i < 4; ++i) h[i] = _mm256_add_ps(_mm512_castps512_ps256(x[i].v), _mm512_extractf32x8_ps(x[i].v, 1));
#elif MLKIT_SET_AVX2
  const __m256 h[4] = {x[0].v, x[1].v, x[2].v, x[3].v};
#endif
  __m128 q[4];
  MLKIT_UNROLL
  for (int i = 0; i < 4; ++i)
#if MLKIT_SET_AVX2
    q[i] = _mm_add_ps(_mm256_castps256_ps128(h[i]), _mm256_extractf128_ps(h[i], 1));
#else
    q[i] = x[i].v;
#endif
  const __m128 a = _mm_add_ps(_mm_unpacklo_ps(q[0], q[1]), _mm_unpackhi_ps(q[0], q[1]));
  const __m128 b = _mm_add_ps(_mm_unpacklo_ps(q[2], q[3]), _mm_unpackhi_ps(q[2], q[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a)));
#else
  for (int i = 0; i < 4; ++i) out[i] = x[i].sum();
#endif
}
MLKIT_ALWAYS_INLINE void sum4(const vec<double>* x, double* out) noexcept {
  for (int i = 0; i < 4; ++i) out[i] = x[i].sum();
}

// A register of what compute<Element> multiplies, from the first n elements at p.
template <class Element, class T, class... N>
MLKIT_ALWAYS_INLINE auto load_words(const T* p, N... n) noexcept {
  if constexpr (compute<Element>::elements_per_word == 2)
    return compute<Element>::load(p, n...);
  else
    return vec<Element>::load(p, n...);
}

// Runs of memory that a dot tile brings closer while it multiplies.
inline constexpr int lines_ahead = 3;

// sums[i][j] += many[i][0..n) * few[j][0..n), as whole registers of partial sums; both run along k. Each step brings
// one line of each of the runs `ahead` closer.
template <int Many, int Few, class T, class Element, class V>
MLKIT_ALWAYS_INLINE void dot_tile(index_t n, const T* MLKIT_RESTRICT many, index_t many_stride,
                                  const Element* MLKIT_RESTRICT few, index_t few_stride, V* MLKIT_RESTRICT sums,
                                  index_t sums_stride, const std::type_identity_t<T>* const* ahead) noexcept {
  using C = compute<Element>;
  constexpr index_t lanes = V::width * C::elements_per_word;
  V sum[Many][Few];
  MLKIT_UNROLL
  for (int i = 0; i < Many; ++i) {
    MLKIT_UNROLL
    for (int j = 0; j < Few; ++j) sum[i][j] = sums[i * sums_stride + j];
  }
  index_t k = 0;
  const auto step = [&](index_t at) {
    V right[Few];
    MLKIT_UNROLL
    for (int j = 0; j < Few; ++j) right[j] = load_words<Element>(few + j * few_stride + at);
    MLKIT_UNROLL
    for (int i = 0; i < Many; ++i) {
      const V left = load_words<Element>(many + i * many_stride + at);
      MLKIT_UNROLL
      for (int j = 0; j < Few; ++j) sum[i][j] = C::multiply_add(left, right[j], sum[i][j]);
    }
  };
  if constexpr (Few == 1) {
    for (; k + 2 * lanes <= n; k += 2 * lanes) step(k), step(k + lanes);
  }
  for (; k + lanes <= n; k += lanes) {
    if constexpr (Few > 1) {
      MLKIT_UNROLL
      for (int p = 0; p < lines_ahead; ++p) __builtin_prefetch(ahead[p] + k, 0, 3);
    }
    step(k);
  }
  if (k < n) {
    const int rest = static_cast<int>(n - k);
    MLKIT_UNROLL
    for (int i = 0; i < Many; ++i) {
      const V left = load_words<Element>(many + i * many_stride + k, rest);
      MLKIT_UNROLL
      for (int j = 0; j < Few; ++j)
        sum[i][j] = C::multiply_add(left, load_words<Element>(few + j * few_stride + k, rest), sum[i][j]);
    }
  }
  MLKIT_UNROLL
  for (int i = 0; i < Many; ++i) {
    MLKIT_UNROLL
    for (int j = 0; j < Few; ++j) sums[i * sums_stride + j] = sum[i][j];
  }
}

// All few lines, in groups of four, two and one; which group a line falls into depends on the shape alone. The groups
// share a tile of many lines while it is in the first-level cache, and meanwhile bring in the next: the tile below, or
// after the last one the lines at `next`.
template <int Many4, int Many1, class T, class Element, class V>
void dot_rows(index_t rows, index_t n, const T* many, index_t many_stride, const Element* few, index_t few_stride,
              index_t few_lines, V* sums, index_t sums_stride, const T* next) noexcept {
  const auto group = [&](auto many_c, auto few_c, index_t i, index_t j, const T* below, index_t first_ahead) {
    constexpr int M = decltype(many_c)::value, F = decltype(few_c)::value;
    const T* ahead[lines_ahead];
    const index_t step = std::max<index_t>(1, ceil_div(few_lines, 4));
    for (int p = 0; p < lines_ahead; ++p) {
      const index_t line = first_ahead + p * step;
      ahead[p] = line < Many4 ? below + line * many_stride : many;
    }
    dot_tile<M, F>(n, many + i * many_stride, many_stride, few + j * few_stride, few_stride, sums + i * sums_stride + j,
                   sums_stride, ahead);
  };
  const auto all_groups = [&](auto many_c, index_t i, const T* below) {
    index_t j = 0, part = 0;
    for (; j + 4 <= few_lines; j += 4) group(many_c, std::integral_constant<int, 4>{}, i, j, below, part++);
    if (j + 2 <= few_lines) group(many_c, std::integral_constant<int, 2>{}, i, j, below, part++), j += 2;
    if (j < few_lines) group(many_c, std::integral_constant<int, 1>{}, i, j, below, part);
  };
  index_t i = 0;
  if (few_lines == 1) {
    for (; i + Many1 <= rows; i += Many1) all_groups(std::integral_constant<int, Many1>{}, i, many);
  } else {
    for (; i + Many4 <= rows; i += Many4)
      all_groups(std::integral_constant<int, Many4>{}, i, i + Many4 < rows ? many + (i + Many4) * many_stride : next);
  }
  for (; i < rows; ++i) all_groups(std::integral_constant<int, 1>{}, i, next);
}

template <class Element>
struct thin {
  using sum = typename compute<Element>::sum;
  using V = vec<sum>;
  static constexpr index_t lanes = V::width * compute<Element>::elements_per_word;  // elements in a register
  static constexpr index_t chunk = 1024;            // elements of k between visits of the same lines
  static constexpr index_t decoded_chunk = 256;     // as many of all rows, decoded, stay in the first-level cache
  static constexpr int many4 = tile_registers / 4;  // tiles of many4 x 4 and 8 x 1 sums
  static constexpr int rows_at_once = tile_registers == 24 ? 24 : 12;
  static constexpr int streams = 4;  // rows read at once against a single line

  // few[line][k] of all segments, decoded: as elements for dots, as sums for axpys.
  static index_t few_stride(const any_product& p) noexcept {
    index_t stride = lanes;
    for (const any_segment& s : p) stride += round_up(s.depth(), lanes);
    return stride;
  }
  static void decode_few(const any_product& p, bool dots, void* few) noexcept {
    const index_t bytes = dots ? sizeof(Element) : sizeof(sum);
    char* out = static_cast<char*>(few);
    for (const any_segment& s : p) {
      s.right.kernels->decode_few(s.right.op, p.right_lines, dots, out, few_stride(p));
      out += round_up(s.depth(), lanes) * bytes;
    }
  }

  // Scratch in elements of `sum`.
  static index_t scratch(const any_product& p) noexcept {
    return rows_at_once * p.right_lines * V::width + rows_at_once * (chunk + V::width) +
           rows_at_once * (p.right_lines + V::width) + (p.right_lines + V::width) * (rows_at_once + V::width);
  }

  // c for left lines [row, row + rows); left operands run along k.
  static void dot(const any_product& p, index_t row, index_t rows, const Element* few, sum* scratch) noexcept {
    // Against a single line the other operand streams from memory: rows far apart draw more bandwidth than neighbours.
    const index_t apart = p.right_lines == 1 && in_rows(p.segments[0].left) ? rows / streams : 0;
    constexpr index_t far = rows_at_once / streams;
    for (index_t r = 0; r < apart; r += far)
      dot_block(p, row + r, std::min(far, apart - r), streams, apart, few, scratch);
    for (index_t r = apart * streams; r < rows; r += rows_at_once)
      dot_block(p, row + r, std::min<index_t>(rows_at_once, rows - r), 1, 0, few, scratch);
  }

  // c for left lines [row, row + rows), for left operands whose runs go along lines: sums stay in cache while source
  // rows stream by, eight at a time.
  static void axpy(const any_product& p, index_t row, index_t rows, const sum* few, sum* scratch) noexcept {
    const index_t lines = p.right_lines, stride = few_stride(p);
    sum* sums = scratch;
    sum* decoded = sums + lines * axpy_block;
    sum* turned = decoded + 8 * axpy_block;
    for (index_t r = 0; r < rows; r += axpy_block) {
      const index_t n = std::min(axpy_block, rows - r);
      for (index_t j = 0; j < lines; ++j)
        for (index_t i = 0; i < round_up(n, V::width); ++i) sums[j * axpy_block + i] = 0;
      const sum* right = few;
      for (const any_segment& s : p) {
        s.left.kernels->add_rows(s.left.op, row + r, n, right, stride, lines, sums, decoded);
        right += round_up(s.depth(), lanes);
      }
      if (p.flipped) {  // right lines are rows of c: the sums already lie along its columns
        p.finish(p.output, 0, lines, row + r, n, sums, axpy_block);
      } else {
        transpose(sums, axpy_block, lines, n, turned, round_up(lines, V::width));
        p.finish(p.output, row + r, n, 0, lines, turned, round_up(lines, V::width));
      }
    }
  }
  static constexpr index_t axpy_block = 1024;
  static index_t axpy_scratch(const any_product& p) noexcept {
    return (p.right_lines + 8 + round_up(p.right_lines, V::width)) * axpy_block;
  }

  // What the kernels above ask of an operand.

  template <class Source, class T>
  static void decode_few(const operand<Source>& op, index_t lines, T* few, index_t stride) noexcept {
    for (index_t l = 0; l < lines; ++l) {
      if (op.depth_first)
        decode_run(set_tag{}, op.source, l, 0, op.depth(), few + l * stride);
      else
        for (index_t k = 0; k < op.depth(); ++k) decode_run(set_tag{}, op.source, k, l, 1, few + l * stride + k);
    }
  }

  // partial[part][row][line] += dots of the operand's lines row + [0, n) + part * apart with the few, for each part.
  template <class Source>
  static void add_dots(const operand<Source>& op, index_t row, index_t n, index_t parts, index_t apart,
                       const Element* few, index_t stride, index_t lines, V* partial, Element* decoded) noexcept {
    for (index_t k = 0; k < op.depth();) {
      index_t depth = std::min(chunk, op.depth() - k);
      if constexpr (readable<Source, Element>) {
        if (op.source.col_stride == 1) {
          if (lines <= 2) depth = op.depth() - k;  // nothing is visited twice: one long run
          const index_t pitch = op.source.row_stride;
          const auto* run = op.source.data + row * pitch + k;
          if (parts == streams)
            for (index_t i = 0; i < n; ++i)
              dot_tile<streams, 1>(depth, run + i * pitch, apart * pitch, few + k, stride, partial + i, n, nullptr);
          else
            dot_rows<many4, 8>(n, depth, run, pitch, few + k, stride, lines, partial, lines,
                               k + depth < op.depth() ? run + depth : run - k + n * pitch);
          k += depth;
          continue;
        }
      }
      if (!decoded_dots(op.source, row, n, parts, apart, k, depth, few, stride, lines, partial)) {
        depth = std::min(decoded_chunk, depth);
        for (index_t part = 0; part < parts; ++part) {
          for (index_t i = 0; i < n; ++i)
            decode_run(set_tag{}, op.source, row + part * apart + i, k, depth, decoded + i * (chunk + V::width));
          dot_rows<many4, 8>(n, depth, static_cast<const Element*>(decoded), chunk + V::width, few + k, stride, lines,
                             partial + part * n * lines, lines, static_cast<const Element*>(decoded));
        }
      }
      k += depth;
    }
  }

  // sums[line][0, n) += the operand's lines first + [0, n) times the few.
  template <class Source>
  static void add_rows(const operand<Source>& op, index_t first, index_t n, const sum* few, index_t stride,
                       index_t lines, sum* sums, sum* decoded) noexcept {
    for (index_t k = 0; k < op.depth(); k += 8) {
      const index_t depth = std::min<index_t>(8, op.depth() - k);
      if constexpr (readable<Source, sum>) {
        if (op.source.col_stride == 1) {
          add_rows(depth, n, op.source.data + k * op.source.row_stride + first, op.source.row_stride, few + k, stride,
                   lines, sums);
          continue;
        }
      }
      for (index_t i = 0; i < depth; ++i) decode_run(set_tag{}, op.source, k + i, first, n, decoded + i * axpy_block);
      add_rows(depth, n, static_cast<const sum*>(decoded), axpy_block, few + k, stride, lines, sums);
    }
  }

  // Dense sources whose elements a register can be loaded from, to be multiplied as T.
  template <class Source, class T>
  static constexpr bool readable = [] {
    if constexpr (!is_dense<Source>)
      return false;
    else if constexpr (std::is_same_v<T, float>)
      return !std::is_same_v<typename Source::value_type, double>;
    else
      return std::is_same_v<typename Source::value_type, T>;
  }();

 private:
  static bool in_rows(const any_operand& op) noexcept { return op.readable && op.col_stride == 1; }

  // Rows at row + [0, n) + part * apart, for each of the parts.
  static void dot_block(const any_product& p, index_t row, index_t n, index_t parts, index_t apart, const Element* few,
                        sum* scratch) noexcept {
    const index_t lines = p.right_lines, stride = few_stride(p);
    const index_t sums_stride = round_up(lines, V::width);
    V* partial = reinterpret_cast<V*>(scratch);  // [parts, n, lines]
    Element* decoded = reinterpret_cast<Element*>(scratch + rows_at_once * lines * V::width);
    sum* sums = scratch + rows_at_once * (lines * V::width + chunk + V::width);
    sum* turned = sums + rows_at_once * sums_stride;
    for (index_t i = 0; i < parts * n * lines; ++i) partial[i] = V::zero();
    for (const any_segment& s : p) {
      s.left.kernels->add_dots(s.left.op, row, n, parts, apart, few, stride, lines, partial, decoded);
      few += round_up(s.depth(), lanes);
    }
    for (index_t i = 0; i < parts * n; ++i) {
      index_t j = 0;
      for (; j + 4 <= lines; j += 4) sum4(partial + i * lines + j, sums + i * sums_stride + j);
      for (; j < lines; ++j) sums[i * sums_stride + j] = partial[i * lines + j].sum();
    }
    for (index_t part = 0; part < parts; ++part)
      gemm<Element>::finish(p, row + part * apart, n, 0, lines, sums + part * n * sums_stride, sums_stride, turned);
  }

  // Sources that can take dots themselves do, where no decoded element would be used often; false if this one does not.
  template <class Source>
  static bool decoded_dots(const Source& s, index_t row, index_t n, index_t parts, index_t apart, index_t k,
                           index_t depth, const Element* few, index_t few_stride, index_t lines, V* partial) noexcept {
    if constexpr (requires { dot_decoded(set_tag{}, s, row, n, k, depth, few, few_stride, lines, partial); }) {
      for (index_t part = 0; part < parts; ++part)
        if (!dot_decoded(set_tag{}, s, row + part * apart, n, k, depth, few + k, few_stride, lines,
                         partial + part * n * lines))
          return false;
      return true;
    }
    return false;
  }

  template <class T>
  static void add_rows(index_t depth, index_t n, const T* rows, index_t stride, const sum* few, index_t few_stride,
                       index_t lines, sum* MLKIT_RESTRICT sums) noexcept {
    if (depth == 8)
      add_rows_of<8>(n, rows, stride, few, few_stride, lines, sums);
    else
      for (index_t i = 0; i < depth; ++i)
        add_rows_of<1>(n, rows + i * stride, stride, few + i, few_stride, lines, sums);
  }
  template <int Depth, class T>
  static void add_rows_of(index_t n, const T* rows, index_t stride, const sum* few, index_t few_stride, index_t lines,
                          sum* MLKIT_RESTRICT sums) noexcept {
    for (index_t i = 0; i < n; i += V::width) {
      const int count = static_cast<int>(std::min<index_t>(V::width, n - i));
      V x[Depth];
      MLKIT_UNROLL
      for (int d = 0; d < Depth; ++d)
        x[d] = count == V::width ? V::load(rows + d * stride + i) : V::load(rows + d * stride + i, count);
      for (index_t j = 0; j < lines; ++j) {
        V s = V::load(sums + j * axpy_block + i);
        MLKIT_UNROLL
        for (int d = 0; d < Depth; ++d) s = fma(x[d], V::broadcast(few + j * few_stride + d), s);
        s.store(sums + j * axpy_block + i);
      }
    }
  }
};
