// Transposes of blocks of 32-bit or 64-bit words; of f32 also from bf16 or f16 in memory.

// Marks calls with this instruction set, so that argument-dependent lookup finds what the set's bodies define later on.
struct set_tag {};

// One word, whatever the memory was written as.
template <class Source, class Word>
MLKIT_ALWAYS_INLINE void move_word(Word* dst, const Source* src) noexcept {
  if constexpr (std::is_same_v<Source, Word>)
    __builtin_memcpy(dst, src, sizeof(Word));
  else
    *dst = static_cast<Word>(*src);
}

// Whether transposes read this type where they write another.
template <class Source, class Word>
inline constexpr bool turns_into = std::is_same_v<Source, Word> ||
                                   (MLKIT_SET_AVX512 && std::is_same_v<Word, float> &&
                                    (std::is_same_v<Source, bf16> || std::is_same_v<Source, f16>));

#if MLKIT_SET_AVX512
// Registers i of r become columns i of what they were; store(j, column) is called for each.
template <class Store>
MLKIT_ALWAYS_INLINE void turn_registers(__m512* r, Store&& store) noexcept {
  __m512 s[16];
  MLKIT_UNROLL
  for (int i = 0; i < 8; ++i) {
    s[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    s[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  MLKIT_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(s[4 * i]), b = _mm512_castps_pd(s[4 * i + 1]);
    const __m512d c = _mm512_castps_pd(s[4 * i + 2]), d = _mm512_castps_pd(s[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  MLKIT_UNROLL
  for (int i = 0; i < 4; ++i) {
    s[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    s[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    s[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    s[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  MLKIT_UNROLL
  for (int i = 0; i < 4; ++i) {
    store(i, _mm512_shuffle_f32x4(s[i], s[i + 8], 0x88));
    store(i + 4, _mm512_shuffle_f32x4(s[i + 4], s[i + 12], 0x88));
    store(i + 8, _mm512_shuffle_f32x4(s[i], s[i + 8], 0xdd));
    store(i + 12, _mm512_shuffle_f32x4(s[i + 4], s[i + 12], 0xdd));
  }
}

// Words of the type that is written are moved as f32, whatever they are.
template <class Word, class Source>
MLKIT_ALWAYS_INLINE auto as_read(const Source* src) noexcept {
  if constexpr (std::is_same_v<Source, Word>)
    return reinterpret_cast<const float*>(src);
  else
    return src;
}

// dst[j][i] = src[i][j] for i < rows, j < cols, neither more than 16; nothing else is touched.
template <class Source>
void transpose_part(const Source* MLKIT_RESTRICT src, index_t src_stride, int rows, int cols, float* MLKIT_RESTRICT dst,
                    index_t dst_stride) noexcept {
  const auto along_col = static_cast<__mmask16>(_bzhi_u32(0xffffu, static_cast<unsigned>(rows)));
  __m512 r[16];
  MLKIT_UNROLL
  for (int i = 0; i < 16; ++i) r[i] = i < rows ? vec<float>::load(src + i * src_stride, cols).v : _mm512_setzero_ps();
  turn_registers(r, [&](int j, __m512 column) {
    if (j < cols) _mm512_mask_storeu_ps(dst + j * dst_stride, along_col, column);
  });
}
#endif

// dst[j][i] = src[i][j] for a width x width block; the shuffles stay in registers.
template <class Source, class Word>
MLKIT_ALWAYS_INLINE void transpose_square(const Source* MLKIT_RESTRICT src, index_t src_stride,
                                          Word* MLKIT_RESTRICT dst, index_t dst_stride) noexcept {
#if MLKIT_SET_AVX512
  if constexpr (sizeof(Word) == 4) {
    __m512 r[16];
    MLKIT_UNROLL
    for (int i = 0; i < 16; ++i) r[i] = vec<float>::load(as_read<Word>(src + i * src_stride)).v;
    turn_registers(
        r, [&](int j, __m512 column) { _mm512_storeu_ps(reinterpret_cast<float*>(dst + j * dst_stride), column); });
    return;
  }
#elif MLKIT_SET_AVX2
  if constexpr (sizeof(Word) == 4) {
    __m256 r[8], s[8];
    MLKIT_UNROLL
    for (int i = 0; i < 4; ++i) {  // each register holds row i in its lower half, row i + 4 in its upper
      const float* low = reinterpret_cast<const float*>(src + i * src_stride);
      const float* high = reinterpret_cast<const float*>(src + (i + 4) * src_stride);
      r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
      r[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low + 4)), _mm_loadu_ps(high + 4), 1);
    }
    MLKIT_UNROLL
    for (int h = 0; h < 8; h += 4) {
      s[h] = _mm256_unpacklo_ps(r[h], r[h + 1]);
      s[h + 1] = _mm256_unpackhi_ps(r[h], r[h + 1]);
      s[h + 2] = _mm256_unpacklo_ps(r[h + 2], r[h + 3]);
      s[h + 3] = _mm256_unpackhi_ps(r[h + 2], r[h + 3]);
      float* out = reinterpret_cast<float*>(dst) + h * dst_stride;
      _mm256_storeu_ps(out, _mm256_shuffle_ps(s[h], s[h + 2], 0x44));
      _mm256_storeu_ps(out + dst_stride, _mm256_shuffle_ps(s[h], s[h + 2], 0xee));
      _mm256_storeu_ps(out + 2 * dst_stride, _mm256_shuffle_ps(s[h + 1], s[h + 3], 0x44));
      _mm256_storeu_ps(out + 3 * dst_stride, _mm256_shuffle_ps(s[h + 1], s[h + 3], 0xee));
    }
    return;
  }
#elif MLKIT_X86
  if constexpr (sizeof(Word) == 4) {
    __m128 r[4];
    MLKIT_UNROLL
    for (int i = 0; i < 4; ++i) r[i] = _mm_loadu_ps(reinterpret_cast<const float*>(src + i * src_stride));
    _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
    MLKIT_UNROLL
    for (int i = 0; i < 4; ++i) _mm_storeu_ps(reinterpret_cast<float*>(dst + i * dst_stride), r[i]);
    return;
  }
#endif
  constexpr int width = vec<Word>::width;
  for (int j = 0; j < width; ++j)
    for (int i = 0; i < width; ++i) move_word(dst + j * dst_stride + i, src + i * src_stride + j);
}

// dst[j][i] = src[i][j] for i < rows, j < cols, of any size.
template <class Source, class Word>
void transpose(const Source* src, index_t src_stride, index_t rows, index_t cols, Word* dst,
               index_t dst_stride) noexcept {
  constexpr index_t width = vec<Word>::width;
  index_t i = 0;
  const auto part = [&](index_t row, index_t height, index_t col, index_t breadth) {
    const Source* from = src + row * src_stride + col;
    Word* to = dst + col * dst_stride + row;
#if MLKIT_SET_AVX512
    if constexpr (sizeof(Word) == 4) {
      // A few words are as quick one by one.
      if (height * breadth > 2 * width)
        return transpose_part(as_read<Word>(from), src_stride, static_cast<int>(height), static_cast<int>(breadth),
                              reinterpret_cast<float*>(to), dst_stride);
    }
#endif
    for (index_t c = 0; c < breadth; ++c)
      for (index_t r = 0; r < height; ++r) move_word(to + c * dst_stride + r, from + r * src_stride + c);
  };
  for (; i + width <= rows; i += width) {
    index_t j = 0;
    for (; j + width <= cols; j += width)
      transpose_square(src + i * src_stride + j, src_stride, dst + j * dst_stride + i, dst_stride);
    if (j < cols) part(i, width, j, cols - j);
  }
  if (i < rows)
    for (index_t j = 0; j < cols; j += width) part(i, rows - i, j, std::min(width, cols - j));
}
