// Quantised weights, decoded as panels are packed or as dots stream by. Every set decodes the same bits.

// Keeps a product from being contracted into a fused multiply-add with what is added to it.
MLKIT_ALWAYS_INLINE float rounded(float x) noexcept {
#if MLKIT_X86
  __asm__("" : "+x"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#endif
  return x;
}

MLKIT_ALWAYS_INLINE float nf4_scale(const lora::nf4_view& w, index_t block) noexcept {
  if (w.absmax) return w.absmax[block];
  return rounded(w.code_book[w.absmax_codes[block]] * w.nested_absmax[block >> w.nested_block_log2]) + w.offset;
}

// The 16 values of one block, in registers; bytes are looked up two values each, high nibble first.
struct nf4_values {
#if MLKIT_SET_AVX512
  __m512 values;
  explicit MLKIT_ALWAYS_INLINE nf4_values(float scale) noexcept
      : values(_mm512_loadu_ps(lora::nf4_levels) * _mm512_set1_ps(scale)) {}
  // 8 bytes are 16 values. Both words of 8 nibbles are broadcast over a half, and each lane shifts its nibble down;
  // the permutation ignores what stands above it.
  MLKIT_ALWAYS_INLINE vec<float> operator()(const std::uint8_t* bytes) const noexcept {
    const __m512i shifts = _mm512_set4_epi64(0x18'0000'001cLL, 0x10'0000'0014LL, 0x8'0000'000cLL, 0x4LL);
    std::int32_t low, high;
    __builtin_memcpy(&low, bytes, 4);
    __builtin_memcpy(&high, bytes + 4, 4);
    const __m512i words = _mm512_mask_blend_epi32(0xff00, _mm512_set1_epi32(low), _mm512_set1_epi32(high));
    return vec<float>((vec<float>::native)_mm512_permutexvar_ps(_mm512_srlv_epi32(words, shifts), values));
  }
#elif MLKIT_SET_AVX2
  __m256 low, high;
  explicit MLKIT_ALWAYS_INLINE nf4_values(float scale) noexcept
      : low(_mm256_loadu_ps(lora::nf4_levels) * _mm256_set1_ps(scale)),
        high(_mm256_loadu_ps(lora::nf4_levels + 8) * _mm256_set1_ps(scale)) {}
  // 4 bytes are 8 values: looked up in both halves of the table, chosen by the nibble's highest bit.
  MLKIT_ALWAYS_INLINE vec<float> operator()(const std::uint8_t* bytes) const noexcept {
    const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    std::int32_t word;
    __builtin_memcpy(&word, bytes, 4);
    const __m256i nibbles = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(nibbles, 28));
    return vec<float>((vec<float>::native)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, nibbles),
                                                           _mm256_permutevar8x32_ps(high, nibbles), upper));
  }
#else
  float values[16];
  explicit MLKIT_ALWAYS_INLINE nf4_values(float scale) noexcept {
    for (int i = 0; i < 16; ++i) values[i] = lora::nf4_levels[i] * scale;
  }
  MLKIT_ALWAYS_INLINE vec<float> operator()(const std::uint8_t* bytes) const noexcept {
    const float lanes[4] = {values[bytes[0] >> 4], values[bytes[0] & 15], values[bytes[1] >> 4], values[bytes[1] & 15]};
    return vec<float>::load(lanes);
  }
#endif
  // The first n of a register's values; no byte beyond theirs is read.
  MLKIT_ALWAYS_INLINE vec<float> operator()(const std::uint8_t* bytes, int n) const noexcept {
    std::uint8_t copy[8] = {};
    __builtin_memcpy(copy, bytes, static_cast<std::size_t>(n + 1) / 2);
    return (*this)(copy);
  }
};

inline void decode_nf4(const lora::nf4_view& w, index_t at, index_t count, float* MLKIT_RESTRICT out) noexcept {
  using V = vec<float>;
  const index_t end = at + count;
  while (at < end) {  // stretches that share a block
    const index_t block = at >> w.block_log2;
    index_t n = std::min(end, (block + 1) << w.block_log2) - at;
    const float scale = nf4_scale(w, block);
    if (at % 2 != 0) {  // the low nibble of a byte that belongs to the element before
      *out++ = lora::nf4_levels[w.packed[at / 2] & 15] * scale;
      ++at, --n;
    }
    const nf4_values values(scale);
    const std::uint8_t* bytes = w.packed + at / 2;
    at += n;
    for (; n >= 64; n -= 64, bytes += 32, out += 64) {
      MLKIT_UNROLL
      for (int j = 0; j < 64; j += V::width) values(bytes + j / 2).store(out + j);
    }
    for (; n >= V::width; n -= V::width, bytes += V::width / 2, out += V::width) values(bytes).store(out);
    if (n > 0) values(bytes, static_cast<int>(n)).store(out, static_cast<int>(n));
    out += n;
  }
}

template <class Out>
void decode_run(set_tag, const lora::nf4_view& w, index_t row, index_t col, index_t count,
                Out* MLKIT_RESTRICT out) noexcept {
  index_t at = row * w.inputs + col;
  if constexpr (std::is_same_v<Out, float>) {
    decode_nf4(w, at, count, out);
  } else {
    constexpr index_t piece = 256;
    float buffer[piece];
    for (; count > 0; at += piece, out += piece, count -= piece) {
      const index_t n = std::min(piece, count);
      decode_nf4(w, at, n, buffer);
      decode_run(set_tag{}, dense_source<float>{buffer, 1, n, n, 1}, 0, 0, n, out);
    }
  }
}

template <class Out>
void decode_run(set_tag, const lora::int8_view& w, index_t row, index_t col, index_t count,
                Out* MLKIT_RESTRICT out) noexcept {
  const std::int8_t* codes = w.codes + row * w.inputs + col;
  const float scale = w.scales[row];
  if constexpr (std::is_same_v<Out, double>) {
    for (index_t i = 0; i < count; ++i) out[i] = static_cast<double>(static_cast<float>(codes[i]) * scale);
  } else {
    using V = vec<float>;
    const V factor(scale);
    index_t i = 0;
    for (; i + V::width <= count; i += V::width) (vec<float>::load(codes + i) * factor).store(out + i);
    for (; i < count; ++i) out[i] = static_cast<Out>(static_cast<float>(codes[i]) * scale);
  }
}

// Rows of a weight whose dots are taken together: their sums hide the latency of each other's additions.
inline constexpr int quantised_rows = MLKIT_SET_AVX512 ? 4 : 2;

// sums[r][j] += w[row + r][k, k + depth) . few[j][0, depth), decoded in registers. Rows are whole blocks of 64.
template <int Rows, int Few, class F>
void dot_blocks(const lora::nf4_view& w, index_t row, index_t k, index_t depth, const F* MLKIT_RESTRICT few,
                index_t few_stride, vec<float>* MLKIT_RESTRICT sums, index_t sums_stride) noexcept {
  using V = vec<float>;
  V sum[Rows][Few];
  MLKIT_UNROLL
  for (int r = 0; r < Rows; ++r) {
    MLKIT_UNROLL
    for (int j = 0; j < Few; ++j) sum[r][j] = sums[r * sums_stride + j];
  }
  const index_t first = row * w.inputs + k;
  const std::uint8_t* bytes = w.packed + first / 2;
  const index_t row_bytes = w.inputs / 2;
  for (index_t i = 0; i < depth; i += 64) {
    MLKIT_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const nf4_values values(nf4_scale(w, (first + r * w.inputs + i) >> w.block_log2));
      MLKIT_UNROLL
      for (int v = 0; v < 64; v += V::width) {
        const V x = values(bytes + r * row_bytes + (i + v) / 2);
        MLKIT_UNROLL
        for (int j = 0; j < Few; ++j) sum[r][j] = fma(x, V::load(few + j * few_stride + i + v), sum[r][j]);
      }
    }
  }
  MLKIT_UNROLL
  for (int r = 0; r < Rows; ++r) {
    MLKIT_UNROLL
    for (int j = 0; j < Few; ++j) sums[r * sums_stride + j] = sum[r][j];
  }
}

// The same for int8, where the scale waits until the sums of codes are there.
template <int Rows, int Few, class F>
void dot_blocks(const lora::int8_view& w, index_t row, index_t k, index_t depth, const F* MLKIT_RESTRICT few,
                index_t few_stride, vec<float>* MLKIT_RESTRICT sums, index_t sums_stride) noexcept {
  using V = vec<float>;
  V sum[Rows][Few];
  MLKIT_UNROLL
  for (int r = 0; r < Rows; ++r) {
    MLKIT_UNROLL
    for (int j = 0; j < Few; ++j) sum[r][j] = V::zero();
  }
  const std::int8_t* codes = w.codes + row * w.inputs + k;
  for (index_t i = 0; i < depth; i += V::width) {
    MLKIT_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const V x = vec<float>::load(codes + r * w.inputs + i);
      MLKIT_UNROLL
      for (int j = 0; j < Few; ++j) sum[r][j] = fma(x, V::load(few + j * few_stride + i), sum[r][j]);
    }
  }
  MLKIT_UNROLL
  for (int r = 0; r < Rows; ++r) {
    const V scale(w.scales[row + r]);
    MLKIT_UNROLL
    for (int j = 0; j < Few; ++j) sums[r * sums_stride + j] = fma(sum[r][j], scale, sums[r * sums_stride + j]);
  }
}

MLKIT_ALWAYS_INLINE bool whole_blocks(const lora::nf4_view& w) noexcept {
  return w.inputs % 64 == 0 && w.block_log2 >= 6;
}
MLKIT_ALWAYS_INLINE bool whole_blocks(const lora::int8_view& w) noexcept { return w.inputs % 64 == 0; }

// What thin products ask for: the dots of whole rows with few lines, without a decoded copy. False where the shape is
// none that this can do.
template <class View, class T, class F>
bool dot_decoded(set_tag, const quantised_source<View, T>& s, index_t row, index_t rows, index_t k, index_t depth,
                 const F* few, index_t few_stride, index_t lines, vec<float>* sums) noexcept {
  if (lines > 4 || !whole_blocks(s.view)) return false;
  const auto all_rows = [&](auto few_lines) {
    constexpr int Few = decltype(few_lines)::value;
    index_t r = 0;
    for (; r + quantised_rows <= rows; r += quantised_rows)
      dot_blocks<quantised_rows, Few>(s.view, row + r, k, depth, few, few_stride, sums + r * lines, lines);
    for (; r < rows; ++r) dot_blocks<1, Few>(s.view, row + r, k, depth, few, few_stride, sums + r * lines, lines);
  };
  switch (lines) {
    case 1: all_rows(std::integral_constant<int, 1>{}); break;
    case 2: all_rows(std::integral_constant<int, 2>{}); break;
    case 3: all_rows(std::integral_constant<int, 3>{}); break;
    default: all_rows(std::integral_constant<int, 4>{}); break;
  }
  return true;
}
template <quantised_view View, class F>
bool dot_decoded(set_tag, const View& w, index_t row, index_t rows, index_t k, index_t depth, const F* few,
                 index_t few_stride, index_t lines, vec<float>* sums) noexcept {
  return dot_decoded(set_tag{}, quantised_source<View, float>{w}, row, rows, k, depth, few, few_stride, lines, sums);
}

template <class View, class T, class Out>
MLKIT_ALWAYS_INLINE void decode_run(set_tag, const quantised_source<View, T>& s, index_t row, index_t col,
                                    index_t count, Out* MLKIT_RESTRICT out) noexcept {
  decode_run(set_tag{}, s.view, row, col, count, out);
}

template <class View, class T>
void dequantise_rows(const View& w, const matrix_view<T>& out, index_t begin, index_t end) noexcept {
  for (index_t r = begin; r < end; ++r) {
    T* to = out.data + r * out.strides[0];
    if (out.strides[1] == 1) {
      decode_run(set_tag{}, w, r, 0, w.inputs, to);
      continue;
    }
    constexpr index_t piece = 256;
    T buffer[piece];
    for (index_t c = 0; c < w.inputs; c += piece) {
      const index_t n = std::min(piece, w.inputs - c);
      decode_run(set_tag{}, w, r, c, n, buffer);
      for (index_t i = 0; i < n; ++i) to[(c + i) * out.strides[1]] = buffer[i];
    }
  }
}

// The largest magnitude of x[0, n), or a negative number if one of them is not finite.
MLKIT_ALWAYS_INLINE float largest_magnitude(const float* x, index_t n) noexcept {
  using V = vec<float>;
  constexpr float most = std::numeric_limits<float>::max();
  V largest = V::zero();
  typename V::native_int finite = V::zero() <= V(most);
  for (index_t i = 0; i < n; i += V::width) {
    const V a = abs(n - i >= V::width ? V::load(x + i) : V::load(x + i, static_cast<int>(n - i)));
    finite = finite & (a <= V(most));
    largest = max(largest, a);
  }
  float lanes[V::width];
  V::select(finite, largest, V(-1.0f)).store(lanes);
  for (int l = 0; l < V::width; ++l) {
    if (lanes[l] < 0) return -1;
    lanes[0] = std::max(lanes[0], lanes[l]);
  }
  return lanes[0];
}

// The first element of x[0, n) that is not finite, where there is one.
inline index_t first_not_finite(const float* x, index_t n) noexcept {
  for (index_t i = 0; i < n; ++i)
    if (!(std::fabs(x[i]) <= std::numeric_limits<float>::max())) return i;
  return -1;
}

// Codes and factors of blocks [begin, end); the index of a weight that is not finite, or -1. scratch: two blocks.
template <class T>
index_t quantise_nf4_blocks(const matrix_view<const T>& w, int block_log2, index_t begin, index_t end,
                            std::uint8_t* packed, float* absmax, float* scratch) noexcept {
  using V = vec<float>;
  const dense_source<T> source{w.data, w.extents[0], w.extents[1], w.strides[0], w.strides[1]};
  const index_t size = w.size(), block = index_t{1} << block_log2;
  std::int32_t* codes = reinterpret_cast<std::int32_t*>(scratch + block);
  for (index_t b = begin; b < end; ++b) {
    const index_t first = b << block_log2, n = std::min(block, size - first);
    for (index_t i = 0; i < n;) {  // blocks run on from row to row
      const index_t row = (first + i) / w.extents[1], col = (first + i) % w.extents[1];
      const index_t run = std::min(n - i, w.extents[1] - col);
      decode_run(set_tag{}, source, row, col, run, scratch + i);
      i += run;
    }
    for (index_t i = n; i < block; ++i) scratch[i] = 0;
    float largest = largest_magnitude(scratch, n);
    if (largest < 0) return first + first_not_finite(scratch, n);
    // The last block, where it is not full, is the one whose factor is never zero, and which is divided by it.
    constexpr float least = 1e-38f;
    const bool full = n == block;
    const float divisor = std::max(largest, least);
    absmax[b] = full ? largest : divisor;
    const V inverse(1.0f / divisor);
    for (index_t i = 0; i < block; i += V::width) {
      V x = V::load(scratch + i);
      x = full ? x * inverse : x / V(divisor);
      x = max(min(x, V(1.0f)), V(-1.0f));
      typename V::native_int level{};
      for (float bound : nf4_bounds.values) level -= x > V(bound);
      __builtin_memcpy(codes + i, &level, sizeof level);
    }
    std::uint8_t* out = packed + first / 2;
    for (index_t i = 0; i < n; i += 2) out[i / 2] = static_cast<std::uint8_t>(codes[i] << 4 | codes[i + 1]);
  }
  return -1;
}

// Codes and scales of rows [begin, end); the index of a weight that is not finite, or -1. scratch: one row.
template <class T>
index_t quantise_int8_rows(const matrix_view<const T>& w, index_t begin, index_t end, std::int8_t* codes, float* scales,
                           float* scratch) noexcept {
  using V = vec<float>;
  const index_t n = w.extents[1];
  const dense_source<T> source{w.data, w.extents[0], n, w.strides[0], w.strides[1]};
  for (index_t r = begin; r < end; ++r) {
    decode_run(set_tag{}, source, r, 0, n, scratch);
    const float largest = largest_magnitude(scratch, n);
    if (largest < 0) return r * n + first_not_finite(scratch, n);
    scales[r] = largest / 127.0f;
    const V factor(largest > 0 ? std::min(127.0f / largest, std::numeric_limits<float>::max()) : 0.0f);
    std::int8_t* out = codes + r * n;
    for (index_t i = 0; i < n; i += V::width) {
      const int count = static_cast<int>(std::min<index_t>(V::width, n - i));
      const V x = round_to_integer((count == V::width ? V::load(scratch + i) : V::load(scratch + i, count)) * factor);
      float lanes[V::width];
      max(min(x, V(127.0f)), V(-127.0f)).store(lanes);
      for (int l = 0; l < count; ++l) out[i + l] = static_cast<std::int8_t>(lanes[l]);
    }
  }
  return -1;
}
