// Register tiles. Panels of the left operand are rows of words along k with a fixed stride, read by broadcast; panels
// of the right operand are [k][vectors] of words. A word is what one lane multiplies: an element, or a pair of bf16
// whose two products one instruction adds.

template <class Element>
struct compute;

template <>
struct compute<float> {
  using word = float;
  using sum = float;
  static constexpr int elements_per_word = 1;
  static constexpr index_t words_at_once = 1;
  static constexpr index_t depth_block = 768;  // words of k per pass: a 6-row panel is 18 KiB, a 64-wide one 192 KiB
  static MLKIT_ALWAYS_INLINE vec<float> multiply_add(vec<float> a, vec<float> b, vec<float> c) noexcept {
    return fma(a, b, c);
  }
};

template <>
struct compute<double> {
  using word = double;
  using sum = double;
  static constexpr int elements_per_word = 1;
  static constexpr index_t words_at_once = 1;
  static constexpr index_t depth_block = 384;
  static MLKIT_ALWAYS_INLINE vec<double> multiply_add(vec<double> a, vec<double> b, vec<double> c) noexcept {
    return fma(a, b, c);
  }
};

#if MLKIT_SET_BF16
template <>
struct compute<bf16> {
  using word = float;  // two bf16, moved as one 32-bit lane
  using sum = float;
  static constexpr int elements_per_word = 2;
  static constexpr index_t words_at_once = MLKIT_SET_AMX ? 16 : 1;  // of k, which matrix registers multiply
  static constexpr index_t depth_block = MLKIT_SET_AMX ? 512 : 768;
  static MLKIT_ALWAYS_INLINE vec<float> multiply_add(vec<float> a, vec<float> b, vec<float> c) noexcept {
    return vec<float>::native(_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v));
  }
  // A register of words from the first n elements at p; the rest are zero and are not touched in memory.
  static MLKIT_ALWAYS_INLINE vec<float> load(const bf16* p) noexcept {
    return vec<float>::load(reinterpret_cast<const float*>(p));
  }
  static MLKIT_ALWAYS_INLINE vec<float> load(const bf16* p, int n) noexcept {
    return vec<float>::native(
        _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(_bzhi_u32(0xffffffffu, static_cast<unsigned>(n)), p)));
  }
};
#endif

#if MLKIT_SET_AVX512 || MLKIT_SET_NEON
inline constexpr int tile_vectors = 4;  // 32 registers: 24 sums, 4 vectors of the right panel, broadcasts
inline constexpr int tile_registers = 24;
#else
inline constexpr int tile_vectors = 2;  // 16 registers: 12 sums
inline constexpr int tile_registers = 12;
#endif

// Whether tiles are made of matrix registers: 32 or 16 rows, whatever their width.
template <class Element>
inline constexpr bool in_matrices = compute<Element>::words_at_once > 1;

// Rows of a tile that is `vectors` wide.
template <class Element>
constexpr int tile_rows(int vectors) noexcept {
  return in_matrices<Element> ? 32 : tile_registers / vectors;
}

// Rows of the highest tile.
template <class Element>
inline constexpr int highest_tile = in_matrices<Element> ? 32 : tile_registers;

// Words of a short segment that may follow the last depth block of the one before it in the same pass.
inline constexpr index_t joined_words = 64;

// Distance between rows of a left panel: an odd number of cache lines, so that rows do not fall into one cache set.
template <class Element>
inline constexpr index_t panel_stride = compute<Element>::depth_block + joined_words +
                                        64 / static_cast<int>(sizeof(typename compute<Element>::word));

// Tiles of short registers have none to spare for copies, those of matrices no time.
inline constexpr bool tiles_copy = MLKIT_SET_BITS >= 256 && !MLKIT_SET_AMX;

// Registers of the left operand that a tile of `rows` rows fetches in each step of k: as many as it consumes.
template <class Element>
constexpr int left_fetches(int rows) noexcept {
  constexpr int width = vec<typename compute<Element>::word>::width;
  return tiles_copy ? (rows + width - 1) / width : 1;
}

// Brings rows of `bytes` bytes closer, `stride` bytes apart, to be written, or to be read from the second-level cache.
template <bool Written>
MLKIT_ALWAYS_INLINE void fetch_rows(const void* data, index_t stride, index_t rows, index_t bytes) noexcept {
  asm volatile("");  // or compilers leave out calls of what only fetches
  const char* row = static_cast<const char*>(data);
  for (index_t i = 0; i < rows; ++i, row += stride)
    for (index_t j = 0; j < bytes; j += 64) __builtin_prefetch(row + j, Written ? 1 : 0, Written ? 3 : 2);
}

// What a tile does for those to come while it multiplies. Each step of k brings one cache line of `right` closer, and
// `left_fetches` registers of the left operand, whose rows are runs of `left_run` bytes, `left_stride` bytes apart:
// those at `left` are brought closer, and as long as there are `copies` to make, those at `from` are copied into the
// next left panel.
struct fetch_ahead {
  const char* right;
  const char* left;
  index_t left_stride;
  index_t left_run;
  const char* from = nullptr;
  char* panel = nullptr;
  index_t copies = 0;
};

// c[Rows][Vectors * width] (+)= a[Rows][depth] b[depth][Vectors * width], all in words. `b_stride` and `c_stride` in
// words. Where `largest` is not null it becomes, of each column, the largest of what it is and of c.
template <class Element, int Rows, int Vectors>
void tile(index_t depth, const typename compute<Element>::word* MLKIT_RESTRICT a,
          const typename compute<Element>::word* MLKIT_RESTRICT b, index_t b_stride,
          typename compute<Element>::sum* MLKIT_RESTRICT c, index_t c_stride, bool accumulate, const fetch_ahead& ahead,
          typename compute<Element>::sum* largest) noexcept {
  using word = typename compute<Element>::word;
  using V = vec<word>;
  V sum[Rows][Vectors];
  MLKIT_UNROLL
  for (int i = 0; i < Rows; ++i) {
    MLKIT_UNROLL
    for (int j = 0; j < Vectors; ++j) sum[i][j] = V::zero();
  }
  if (accumulate) {
    MLKIT_UNROLL
    for (int i = 0; i < Rows; ++i) {
      MLKIT_UNROLL
      for (int j = 0; j < Vectors; ++j) sum[i][j] = V::load(c + i * c_stride + j * V::width);
    }
  }
  const char* next_right = ahead.right;
  const char* next_left = ahead.left;
  const char* from = ahead.from;
  char* panel = ahead.panel;
  const index_t left_stride = ahead.left_stride, left_run = ahead.left_run;
  index_t run = 0, copies = ahead.copies;
  for (index_t k = 0; k < depth; ++k) {
    V right[Vectors];
    MLKIT_UNROLL
    for (int j = 0; j < Vectors; ++j) right[j] = V::load(b + j * V::width);
    MLKIT_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const V left = V::broadcast(a + i * panel_stride<Element>);
      MLKIT_UNROLL
      for (int j = 0; j < Vectors; ++j) sum[i][j] = compute<Element>::multiply_add(left, right[j], sum[i][j]);
    }
    __builtin_prefetch(next_right, 0, 2);
    next_right += 64;
    for (int f = 0; f < left_fetches<Element>(Rows); ++f) {
      __builtin_prefetch(next_left + run, 0, 2);
      if constexpr (tiles_copy) {
        if (copies > 0) {
          V::load(reinterpret_cast<const word*>(from + run)).store(reinterpret_cast<word*>(panel + run));
          --copies;
        }
      }
      run += tiles_copy ? index_t{sizeof(V)} : 64;
      if (run >= left_run) {
        next_left += left_stride;
        if (copies > 0) {
          from += left_stride;
          panel += panel_stride<Element> * index_t{sizeof(word)};
        }
        run = 0;
      }
    }
    ++a;
    b += b_stride;
  }
  MLKIT_UNROLL
  for (int i = 0; i < Rows; ++i) {
    MLKIT_UNROLL
    for (int j = 0; j < Vectors; ++j) sum[i][j].store(c + i * c_stride + j * V::width);
  }
  if (!largest) return;
  MLKIT_UNROLL
  for (int j = 0; j < Vectors; ++j) {
    V most = V::load(largest + j * V::width);
    MLKIT_UNROLL
    for (int i = 0; i < Rows; ++i) most = max(most, sum[i][j]);
    most.store(largest + j * V::width);
  }
}

template <class Element>
using tile_function = void (*)(index_t, const typename compute<Element>::word*, const typename compute<Element>::word*,
                               index_t, typename compute<Element>::sum*, index_t, bool, const fetch_ahead&,
                               typename compute<Element>::sum*) noexcept;

// Heights of the tiles that exist for a width. Rows that a tile has beyond those asked for are computed on whatever the
// panel holds and never stored to the output. Of 6 rows there are thirds: 64 and 40 are multiples of 6, and 4.
template <int Vectors>
struct tile_heights {
  static constexpr int full = tile_registers / Vectors;
  static constexpr int half = full == 8 ? 6 : full == 6 ? 4 : full / 2;
  static constexpr int low = full == 24 ? 6 : full == 6 ? 2 : full / 4;
};

template <class Element>
constexpr int tile_height(int vectors, int rows) noexcept {
  if (in_matrices<Element>) return rows > 16 ? 32 : 16;
  const auto fit = [&](auto heights) {
    using H = decltype(heights);
    return rows > H::half ? H::full : rows > H::low ? H::half : H::low;
  };
  switch (vectors) {
    case 1: return fit(tile_heights<1>{});
    case 2: return fit(tile_heights<2>{});
    case 3: return fit(tile_heights<3>{});
    default: return fit(tile_heights<4>{});
  }
}

#if MLKIT_SET_AMX
// The matrix registers of a thread, each 16 rows of 64 bytes, while this lives.
template <class Element>
struct matrix_registers {
  struct alignas(64) configuration {
    std::uint8_t palette, start, unused[14];
    std::uint16_t row_bytes[16];
    std::uint8_t rows[16];
  };
  static constexpr configuration whole{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
  configuration before;  // of whoever calls: another of these, or nobody

  matrix_registers() noexcept {
    if constexpr (in_matrices<Element>)
      asm volatile("sttilecfg %0\n\tldtilecfg %1" : "=m"(before) : "m"(whole) : "memory");
  }
  ~matrix_registers() {
    if constexpr (in_matrices<Element>) asm volatile("ldtilecfg %0" ::"m"(before) : "memory");
  }
  matrix_registers(const matrix_registers&) = delete;
  matrix_registers& operator=(const matrix_registers&) = delete;
};

// The same as tile() in matrix registers, of which each holds 16 rows of 16 sums, or of words of an operand.
#define MLKIT_MATRIX_ZERO(m) asm volatile("tilezero %%tmm" #m ::)
#define MLKIT_MATRIX_LOAD(m, from, row_bytes) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #m ::"r"(from), "r"(row_bytes) : "memory")
#define MLKIT_MATRIX_STORE(m, to, row_bytes) \
  asm volatile("tilestored %%tmm" #m ", (%0,%1,1)" ::"r"(to), "r"(row_bytes) : "memory")
#define MLKIT_MATRIX_MULTIPLY(sums, left, right) \
  asm volatile("tdpbf16ps %%tmm" #right ", %%tmm" #left ", %%tmm" #sums ::)

// Of 16 or 32 rows, and one or two vectors: sums in registers 0 to 3, the left operand in 4 and 5, the right in 6
// and 7.
template <int Rows, int Vectors>
MLKIT_ALWAYS_INLINE void matrix_part(index_t depth, const float* a, const float* b, index_t b_stride, float* c,
                                     index_t c_stride, bool accumulate) noexcept {
  constexpr bool tall = Rows == 32, wide = Vectors == 2;
  constexpr index_t side = 16, word_bytes = sizeof(float), a_stride = panel_stride<bf16>;
  const index_t a_bytes = a_stride * word_bytes, b_bytes = b_stride * word_bytes, c_bytes = c_stride * word_bytes;
  float* const below = c + side * c_stride;
  if (accumulate) {
    MLKIT_MATRIX_LOAD(0, c, c_bytes);
    if constexpr (wide) MLKIT_MATRIX_LOAD(1, c + side, c_bytes);
    if constexpr (tall) MLKIT_MATRIX_LOAD(2, below, c_bytes);
    if constexpr (tall && wide) MLKIT_MATRIX_LOAD(3, below + side, c_bytes);
  } else {
    MLKIT_MATRIX_ZERO(0);
    if constexpr (wide) MLKIT_MATRIX_ZERO(1);
    if constexpr (tall) MLKIT_MATRIX_ZERO(2);
    if constexpr (tall && wide) MLKIT_MATRIX_ZERO(3);
  }
  constexpr index_t step = compute<bf16>::words_at_once;
  for (index_t k = 0; k < depth; k += step, a += step, b += step * b_stride) {
    MLKIT_MATRIX_LOAD(6, b, b_bytes);
    MLKIT_MATRIX_LOAD(4, a, a_bytes);
    MLKIT_MATRIX_MULTIPLY(0, 4, 6);
    if constexpr (tall) {
      MLKIT_MATRIX_LOAD(5, a + side * a_stride, a_bytes);
      MLKIT_MATRIX_MULTIPLY(2, 5, 6);
    }
    if constexpr (wide) {
      MLKIT_MATRIX_LOAD(7, b + side, b_bytes);
      MLKIT_MATRIX_MULTIPLY(1, 4, 7);
      if constexpr (tall) MLKIT_MATRIX_MULTIPLY(3, 5, 7);
    }
  }
  MLKIT_MATRIX_STORE(0, c, c_bytes);
  if constexpr (wide) MLKIT_MATRIX_STORE(1, c + side, c_bytes);
  if constexpr (tall) MLKIT_MATRIX_STORE(2, below, c_bytes);
  if constexpr (tall && wide) MLKIT_MATRIX_STORE(3, below + side, c_bytes);
}

template <int Rows, int Vectors>
void matrix_tile(index_t depth, const float* a, const float* b, index_t b_stride, float* c, index_t c_stride,
                 bool accumulate, const fetch_ahead&, float* largest) noexcept {
  using V = vec<float>;
  if constexpr (Vectors > 1) matrix_part<Rows, 2>(depth, a, b, b_stride, c, c_stride, accumulate);
  if constexpr (Vectors == 4)
    matrix_part<Rows, 2>(depth, a, b + 2 * V::width, b_stride, c + 2 * V::width, c_stride, accumulate);
  constexpr index_t last = (Vectors - 1) * V::width;
  if constexpr (Vectors % 2 == 1) matrix_part<Rows, 1>(depth, a, b + last, b_stride, c + last, c_stride, accumulate);
  if (!largest) return;
  V most[Vectors];
  MLKIT_UNROLL
  for (int j = 0; j < Vectors; ++j) most[j] = V::load(largest + j * V::width);
  for (int i = 0; i < Rows; ++i) {
    MLKIT_UNROLL
    for (int j = 0; j < Vectors; ++j) most[j] = max(most[j], V::load(c + i * c_stride + j * V::width));
  }
  MLKIT_UNROLL
  for (int j = 0; j < Vectors; ++j) most[j].store(largest + j * V::width);
}
#undef MLKIT_MATRIX_ZERO
#undef MLKIT_MATRIX_LOAD
#undef MLKIT_MATRIX_STORE
#undef MLKIT_MATRIX_MULTIPLY
#else
template <class Element>
struct matrix_registers {};
#endif

template <class Element, int Vectors>
tile_function<Element> select_tile(int rows) noexcept {
#if MLKIT_SET_AMX
  if constexpr (in_matrices<Element>) return rows > 16 ? matrix_tile<32, Vectors> : matrix_tile<16, Vectors>;
#endif
  using H = tile_heights<Vectors>;
  if (rows > H::half) return tile<Element, H::full, Vectors>;
  if (rows > H::low) return tile<Element, H::half, Vectors>;
  return tile<Element, H::low, Vectors>;
}

template <class Element>
tile_function<Element> select_tile(int vectors, int rows) noexcept {
  switch (vectors) {
    case 1: return select_tile<Element, 1>(rows);
#if MLKIT_SET_AVX512 || MLKIT_SET_NEON
    case 2: return select_tile<Element, 2>(rows);
    case 3: return select_tile<Element, 3>(rows);
    default: return select_tile<Element, 4>(rows);
#else
    default: return select_tile<Element, 2>(rows);
#endif
  }
}
