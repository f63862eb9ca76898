// Lanes that a mask of bytes keeps, and what all lanes have in common.

// All lanes by op(a, b) of two registers of one size, halves of x until one lane is left: vec::sum's order, without its
// way through memory, which rows of a few classes would feel.
template <class T, class Op>
MLKIT_ALWAYS_INLINE T across(vec<T> x, const Op& op) noexcept {
#if MLKIT_X86
  if constexpr (sizeof(T) == 4) {
#if MLKIT_SET_AVX512
    const __m256 h = (__m256)op(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
#elif MLKIT_SET_AVX2
    const __m256 h = x.v;
#endif
#if MLKIT_SET_AVX2
    __m128 q = (__m128)op(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
#else
    __m128 q = x.v;
#endif
    q = (__m128)op(q, _mm_movehl_ps(q, q));
    q = (__m128)op(q, _mm_shuffle_ps(q, q, 1));
    return _mm_cvtss_f32(q);
  } else {
#if MLKIT_SET_AVX512
    const __m256d h = (__m256d)op(_mm512_castpd512_pd256(x.v), _mm512_extractf64x4_pd(x.v, 1));
#elif MLKIT_SET_AVX2
    const __m256d h = x.v;
#endif
#if MLKIT_SET_AVX2
    __m128d q = (__m128d)op(_mm256_castpd256_pd128(h), _mm256_extractf128_pd(h, 1));
#else
    __m128d q = x.v;
#endif
    q = (__m128d)op(q, _mm_unpackhi_pd(q, q));
    return _mm_cvtsd_f64(q);
  }
#else
  T lanes[vec<T>::width];
  x.store(lanes);
  for (int half = vec<T>::width / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = op(lanes[i], lanes[i + half]);
  return lanes[0];
#endif
}
struct sum_of_two {
  template <class X>
  MLKIT_ALWAYS_INLINE X operator()(X a, X b) const noexcept {
    return a + b;
  }
};
struct larger_of_two {
  template <class X>
  MLKIT_ALWAYS_INLINE X operator()(X a, X b) const noexcept {
    return a > b ? a : b;
  }
};

template <class T>
struct mask_of_register;
template <>
struct mask_of_register<float> {
  typedef std::uint8_t type __attribute__((vector_size(MLKIT_SET_BITS / 32)));
};
template <>
struct mask_of_register<double> {
  typedef std::uint8_t type __attribute__((vector_size(MLKIT_SET_BITS / 64)));
};

// A register's lanes by as many bytes: 0 where the byte is.
template <class V>
MLKIT_ALWAYS_INLINE typename V::native_int kept_lanes(const std::uint8_t* mask) noexcept {
  typename mask_of_register<typename V::value_type>::type bytes;
  __builtin_memcpy(&bytes, mask, sizeof bytes);
#if MLKIT_SET_AVX512
  if constexpr (sizeof(bytes) == 16) return (typename V::native_int)_mm512_cvtepu8_epi32((__m128i)bytes);
#endif
  return __builtin_convertvector(bytes, typename V::native_int);
}

// The bytes of n lanes, and 0 for the others: n bytes of a mask, or ones without a mask.
template <class V>
struct some_lanes {
  std::uint8_t bytes[V::width] = {};

  MLKIT_ALWAYS_INLINE some_lanes(const std::uint8_t* mask, int n) noexcept {
    for (int l = 0; l < n; ++l) bytes[l] = mask ? mask[l] : 1;
  }
  MLKIT_ALWAYS_INLINE typename V::native_int lanes() const noexcept { return kept_lanes<V>(bytes); }
};

// x to the lanes of y that are kept; the others keep their bits.
template <class V, class T>
MLKIT_ALWAYS_INLINE void store_kept(V x, typename V::native_int keep, T* y) noexcept {
  if constexpr (sizeof(T) == sizeof(typename V::value_type)) {
    V::select(keep, x, V::load(y)).store(y);
  } else {
#if MLKIT_SET_AVX512
    const __mmask16 lanes = _mm512_test_epi32_mask((__m512i)keep, (__m512i)keep);
    T narrow[V::width];
    x.store(narrow);
    __m256i halves;
    __builtin_memcpy(&halves, narrow, sizeof halves);
    _mm256_mask_storeu_epi16(y, lanes, halves);
#else
    T narrow[V::width];
    x.store(narrow);
    for (int l = 0; l < V::width; ++l) y[l] = keep[l] != 0 ? narrow[l] : y[l];
#endif
  }
}

// Chunks of rows, one element after another: where they are, or in a buffer.
template <class T>
const T* in_order(const rl::detail::plane<const T>& p, const rl::detail::plane_shape& shape, index_t begin, index_t n,
                  T* buffer) noexcept {
  const index_t row = begin / shape.cols, col = begin - row * shape.cols;
  if (p.col_stride == 1 && col + n <= shape.cols) return p.at(row, col);
  rl::detail::each_row_piece(shape, begin, begin + n, [&](index_t r, index_t c, index_t count, index_t at) {
    const T* from = p.at(r, c);
    for (index_t i = 0; i < count; ++i) buffer[at + i] = from[i * p.col_stride];
  });
  return buffer;
}

// How many of n bytes are not 0.
inline index_t count_kept(const std::uint8_t* mask, index_t n) noexcept {
  index_t count = 0, i = 0;
#if MLKIT_SET_AVX512
  for (; i + 64 <= n; i += 64) {
    const __m512i bytes = _mm512_loadu_si512(mask + i);
    count += __builtin_popcountll(_mm512_test_epi8_mask(bytes, bytes));
  }
#elif MLKIT_SET_AVX2
  for (; i + 32 <= n; i += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask + i));
    const int zeros = _mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256()));
    count += 32 - __builtin_popcount(static_cast<unsigned>(zeros));
  }
#else
  constexpr index_t lanes = 16, most = 255;
  while (n - i >= lanes) {
    std::uint8_t counts[lanes] = {};
    const index_t rounds = std::min((n - i) / lanes, most);
    for (index_t r = 0; r < rounds; ++r, i += lanes) {
      MLKIT_SIMD
      for (index_t l = 0; l < lanes; ++l) counts[l] = static_cast<std::uint8_t>(counts[l] + (mask[i + l] != 0));
    }
    for (const std::uint8_t c : counts) count += c;
  }
#endif
  for (; i < n; ++i) count += mask[i] != 0;
  return count;
}
