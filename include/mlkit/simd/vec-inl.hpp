// One SIMD register of float or double. Arithmetic is the compiler's vector extension; intrinsics where it has no word.

// Written out for each type: GCC drops a vector_size that depends on a template parameter.
template <class T>
struct native_vector;
template <>
struct native_vector<float> {
  typedef float type __attribute__((vector_size(MLKIT_SET_BITS / 8)));
  typedef std::int32_t int_type __attribute__((vector_size(MLKIT_SET_BITS / 8)));
  typedef std::uint32_t uint_type __attribute__((vector_size(MLKIT_SET_BITS / 8)));
};
template <>
struct native_vector<double> {
  typedef double type __attribute__((vector_size(MLKIT_SET_BITS / 8)));
  typedef std::int64_t int_type __attribute__((vector_size(MLKIT_SET_BITS / 8)));
  typedef std::uint64_t uint_type __attribute__((vector_size(MLKIT_SET_BITS / 8)));
};

template <class T>
struct vec {
  static constexpr int width = MLKIT_SET_BITS / 8 / static_cast<int>(sizeof(T));
  using value_type = T;
  using int_type = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  using native = typename native_vector<T>::type;
  using native_int = typename native_vector<T>::int_type;
  using native_uint = typename native_vector<T>::uint_type;

  native v;

  vec() = default;
  MLKIT_ALWAYS_INLINE vec(native x) noexcept : v(x) {}
  MLKIT_ALWAYS_INLINE explicit vec(T x) noexcept : v(x - native{}) {}  // broadcast; x - 0 is x, also for -0

  static MLKIT_ALWAYS_INLINE vec zero() noexcept { return native{}; }

  static MLKIT_ALWAYS_INLINE vec broadcast(const T* p) noexcept {
    T x;
    __builtin_memcpy(&x, p, sizeof x);
    return vec(x);
  }
  static MLKIT_ALWAYS_INLINE vec load(const T* p) noexcept {
    vec r;
    __builtin_memcpy(&r.v, p, sizeof(native));
    return r;
  }
  MLKIT_ALWAYS_INLINE void store(T* p) const noexcept { __builtin_memcpy(p, &v, sizeof(native)); }

  // To memory that is aligned for a register, past the caches where the machine can: other threads read it after
  // settle_stores().
  MLKIT_ALWAYS_INLINE void store_past_caches(T* p) const noexcept {
#if MLKIT_SET_AVX512
    if constexpr (sizeof(T) == 4)
      _mm512_stream_ps(p, v);
    else
      _mm512_stream_pd(p, v);
#elif MLKIT_SET_AVX2
    if constexpr (sizeof(T) == 4)
      _mm256_stream_ps(p, v);
    else
      _mm256_stream_pd(p, v);
#elif MLKIT_X86
    if constexpr (sizeof(T) == 4)
      _mm_stream_ps(p, v);
    else
      _mm_stream_pd(p, v);
#else
    store(p);
#endif
  }

  // The first n of `width` elements, 0 <= n <= width; the rest read as zero and are not touched in memory.
  static MLKIT_ALWAYS_INLINE vec load(const T* p, int n) noexcept {
#if MLKIT_SET_AVX512
    if constexpr (sizeof(T) == 4)
      return native(_mm512_maskz_loadu_ps(first_mask(n), p));
    else
      return native(_mm512_maskz_loadu_pd(static_cast<__mmask8>(first_mask(n)), p));
#elif MLKIT_SET_AVX2
    if constexpr (sizeof(T) == 4)
      return native(_mm256_maskload_ps(p, (__m256i)first_mask(n)));
    else
      return native(_mm256_maskload_pd(p, (__m256i)first_mask(n)));
#else
    vec r = zero();
    __builtin_memcpy(&r.v, p, static_cast<std::size_t>(n) * sizeof(T));
    return r;
#endif
  }
  MLKIT_ALWAYS_INLINE void store(T* p, int n) const noexcept {
#if MLKIT_SET_AVX512
    if constexpr (sizeof(T) == 4)
      _mm512_mask_storeu_ps(p, first_mask(n), v);
    else
      _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_mask(n)), v);
#elif MLKIT_SET_AVX2
    if constexpr (sizeof(T) == 4)
      _mm256_maskstore_ps(p, (__m256i)first_mask(n), v);
    else
      _mm256_maskstore_pd(p, (__m256i)first_mask(n), v);
#else
    __builtin_memcpy(p, &v, static_cast<std::size_t>(n) * sizeof(T));
#endif
  }

  // bf16 and f16 in memory, float in the register.
  static MLKIT_ALWAYS_INLINE vec load(const bf16* p) noexcept requires(sizeof(T) == 4) {
    return widen(half_load(p, width));
  }
  static MLKIT_ALWAYS_INLINE vec load(const bf16* p, int n) noexcept requires(sizeof(T) == 4) {
    return widen(half_load(p, n));
  }
  MLKIT_ALWAYS_INLINE void store(bf16* p) const noexcept requires(sizeof(T) == 4) { half_store(narrow(), p, width); }
  MLKIT_ALWAYS_INLINE void store(bf16* p, int n) const noexcept requires(sizeof(T) == 4) { half_store(narrow(), p, n); }
  static MLKIT_ALWAYS_INLINE vec load(const f16* p) noexcept requires(sizeof(T) == 4) { return load(p, width); }
  static MLKIT_ALWAYS_INLINE vec load(const f16* p, int n) noexcept requires(sizeof(T) == 4) {
#if MLKIT_SET_AVX512
    return native(_mm512_maskz_cvtph_ps(0xffff, (__m256i)half_load(p, n)));
#elif MLKIT_SET_AVX2
    return native(_mm256_cvtph_ps((__m128i)half_load(p, n)));
#elif MLKIT_SET_NEON
    const half_bits h = half_load(p, n);
    float16x4_t f;
    __builtin_memcpy(&f, &h, sizeof f);
    return native(vcvt_f32_f16(f));
#else
    vec r = zero();
    for (int i = 0; i < n; ++i) r.v[i] = static_cast<float>(p[i]);
    return r;
#endif
  }
  MLKIT_ALWAYS_INLINE void store(f16* p) const noexcept requires(sizeof(T) == 4) { store(p, width); }
  MLKIT_ALWAYS_INLINE void store(f16* p, int n) const noexcept requires(sizeof(T) == 4) {
#if MLKIT_SET_AVX512
    half_store((half_bits)_mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), p, n);
#elif MLKIT_SET_AVX2
    half_store((half_bits)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), p, n);
#elif MLKIT_SET_NEON
    const float16x4_t f = vcvt_f16_f32(v);
    half_bits h;
    __builtin_memcpy(&h, &f, sizeof h);
    half_store(h, p, n);
#else
    for (int i = 0; i < n; ++i) p[i] = f16(v[i]);
#endif
  }

  // int8 in memory.
  static MLKIT_ALWAYS_INLINE vec load(const std::int8_t* p) noexcept requires(sizeof(T) == 4) {
#if MLKIT_SET_AVX512
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return native(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
#elif MLKIT_SET_AVX2
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return native(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
#elif MLKIT_X86
    std::int32_t word;
    __builtin_memcpy(&word, p, 4);
    const __m128i bytes = _mm_unpacklo_epi8(_mm_setzero_si128(), _mm_cvtsi32_si128(word));
    const __m128i upper = _mm_unpacklo_epi16(_mm_setzero_si128(), bytes);  // each in the highest byte of its lane
    return native(_mm_cvtepi32_ps(_mm_srai_epi32(upper, 24)));
#else
    vec r;
    for (int i = 0; i < width; ++i) r.v[i] = static_cast<float>(p[i]);
    return r;
#endif
  }
  static MLKIT_ALWAYS_INLINE vec load(const std::int8_t* p, int n) noexcept requires(sizeof(T) == 4) {
    std::int8_t bytes[width] = {};
    __builtin_memcpy(bytes, p, static_cast<std::size_t>(n));
    return load(static_cast<const std::int8_t*>(bytes));
  }

  friend MLKIT_ALWAYS_INLINE vec operator+(vec a, vec b) noexcept { return a.v + b.v; }
  friend MLKIT_ALWAYS_INLINE vec operator-(vec a, vec b) noexcept { return a.v - b.v; }
  friend MLKIT_ALWAYS_INLINE vec operator*(vec a, vec b) noexcept { return a.v * b.v; }
  friend MLKIT_ALWAYS_INLINE vec operator/(vec a, vec b) noexcept { return a.v / b.v; }
  friend MLKIT_ALWAYS_INLINE vec operator+(vec a, T b) noexcept { return a.v + b; }
  friend MLKIT_ALWAYS_INLINE vec operator-(vec a, T b) noexcept { return a.v - b; }
  friend MLKIT_ALWAYS_INLINE vec operator*(vec a, T b) noexcept { return a.v * b; }
  friend MLKIT_ALWAYS_INLINE vec operator/(vec a, T b) noexcept { return a.v / b; }
  friend MLKIT_ALWAYS_INLINE vec operator+(T a, vec b) noexcept { return a + b.v; }
  friend MLKIT_ALWAYS_INLINE vec operator-(T a, vec b) noexcept { return a - b.v; }
  friend MLKIT_ALWAYS_INLINE vec operator*(T a, vec b) noexcept { return a * b.v; }
  friend MLKIT_ALWAYS_INLINE vec operator/(T a, vec b) noexcept { return a / b.v; }
  MLKIT_ALWAYS_INLINE vec operator-() const noexcept { return -v; }
  MLKIT_ALWAYS_INLINE vec& operator+=(vec b) noexcept { return v += b.v, *this; }
  MLKIT_ALWAYS_INLINE vec& operator-=(vec b) noexcept { return v -= b.v, *this; }
  MLKIT_ALWAYS_INLINE vec& operator*=(vec b) noexcept { return v *= b.v, *this; }
  MLKIT_ALWAYS_INLINE vec& operator/=(vec b) noexcept { return v /= b.v, *this; }

  // a * b + c, fused where the set can.
  friend MLKIT_ALWAYS_INLINE vec fma(vec a, vec b, vec c) noexcept {
#if MLKIT_SET_AVX512
    if constexpr (sizeof(T) == 4)
      return native(_mm512_fmadd_ps(a.v, b.v, c.v));
    else
      return native(_mm512_fmadd_pd(a.v, b.v, c.v));
#elif MLKIT_SET_AVX2
    if constexpr (sizeof(T) == 4)
      return native(_mm256_fmadd_ps(a.v, b.v, c.v));
    else
      return native(_mm256_fmadd_pd(a.v, b.v, c.v));
#elif MLKIT_SET_NEON
    if constexpr (sizeof(T) == 4)
      return native(vfmaq_f32(c.v, a.v, b.v));
    else
      return native(vfmaq_f64(c.v, a.v, b.v));
#else
    return a.v * b.v + c.v;
#endif
  }

  // Comparisons give all ones or all zeros per lane; select picks a where the mask is set.
  friend MLKIT_ALWAYS_INLINE native_int operator<(vec a, vec b) noexcept { return a.v < b.v; }
  friend MLKIT_ALWAYS_INLINE native_int operator>(vec a, vec b) noexcept { return a.v > b.v; }
  friend MLKIT_ALWAYS_INLINE native_int operator<=(vec a, vec b) noexcept { return a.v <= b.v; }
  friend MLKIT_ALWAYS_INLINE native_int operator>=(vec a, vec b) noexcept { return a.v >= b.v; }
  friend MLKIT_ALWAYS_INLINE native_int operator==(vec a, vec b) noexcept { return a.v == b.v; }
  friend MLKIT_ALWAYS_INLINE native_int operator!=(vec a, vec b) noexcept { return a.v != b.v; }
  static MLKIT_ALWAYS_INLINE vec select(native_int mask, vec a, vec b) noexcept { return native(mask ? a.v : b.v); }
  // b if either is NaN. One instruction each, which compilers do not always find in a comparison and a choice.
#if MLKIT_SET_AVX512
  friend MLKIT_ALWAYS_INLINE vec max(vec a, vec b) noexcept {
    if constexpr (sizeof(T) == 4)
      return native(_mm512_max_ps(a.v, b.v));
    else
      return native(_mm512_max_pd(a.v, b.v));
  }
  friend MLKIT_ALWAYS_INLINE vec min(vec a, vec b) noexcept {
    if constexpr (sizeof(T) == 4)
      return native(_mm512_min_ps(a.v, b.v));
    else
      return native(_mm512_min_pd(a.v, b.v));
  }
#elif MLKIT_SET_AVX2
  friend MLKIT_ALWAYS_INLINE vec max(vec a, vec b) noexcept {
    if constexpr (sizeof(T) == 4)
      return native(_mm256_max_ps(a.v, b.v));
    else
      return native(_mm256_max_pd(a.v, b.v));
  }
  friend MLKIT_ALWAYS_INLINE vec min(vec a, vec b) noexcept {
    if constexpr (sizeof(T) == 4)
      return native(_mm256_min_ps(a.v, b.v));
    else
      return native(_mm256_min_pd(a.v, b.v));
  }
#else
  friend MLKIT_ALWAYS_INLINE vec max(vec a, vec b) noexcept { return native(a.v > b.v ? a.v : b.v); }
  friend MLKIT_ALWAYS_INLINE vec min(vec a, vec b) noexcept { return native(a.v < b.v ? a.v : b.v); }
#endif
  friend MLKIT_ALWAYS_INLINE vec abs(vec a) noexcept { return from_bits(a.bits() & ~sign_bit()); }

  MLKIT_ALWAYS_INLINE native_int bits() const noexcept { return (native_int)v; }
  static MLKIT_ALWAYS_INLINE vec from_bits(native_int b) noexcept { return (native)b; }
  static MLKIT_ALWAYS_INLINE native_int sign_bit() noexcept { return (native_int)(-native{}); }

  // Sum over lanes, in a fixed order: halves are added until one lane is left.
  MLKIT_ALWAYS_INLINE T sum() const noexcept {
    T lanes[width];
    store(lanes);
    MLKIT_UNROLL
    for (int half = width / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
  }
  // The largest lane, none of which may be NaN.
  MLKIT_ALWAYS_INLINE T largest() const noexcept {
    T lanes[width];
    store(lanes);
    MLKIT_UNROLL
    for (int half = width / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
  }

 private:
  typedef std::uint16_t half_bits __attribute__((vector_size(MLKIT_SET_BITS / 16)));
  typedef std::uint32_t word_bits __attribute__((vector_size(MLKIT_SET_BITS / 8)));

#if MLKIT_SET_AVX512
  static MLKIT_ALWAYS_INLINE __mmask16 first_mask(int n) noexcept {
    return static_cast<__mmask16>(_bzhi_u32(0xffffu, static_cast<unsigned>(n)));
  }
#elif MLKIT_SET_AVX2
  static MLKIT_ALWAYS_INLINE native_int first_mask(int n) noexcept {
    native_int lane{};
    MLKIT_UNROLL
    for (int i = 0; i < width; ++i) lane[i] = i;
    return lane < (native_int{} + static_cast<int_type>(n));
  }
#endif

  template <class Half>
  static MLKIT_ALWAYS_INLINE half_bits half_load(const Half* p, int n) noexcept {
    half_bits h{};
    if (n == width) {
      __builtin_memcpy(&h, p, sizeof h);
      return h;
    }
#if MLKIT_SET_AVX512
    return (half_bits)_mm256_maskz_loadu_epi16(first_mask(n), p);
#else
    __builtin_memcpy(&h, p, static_cast<std::size_t>(n) * 2);
    return h;
#endif
  }
  template <class Half>
  static MLKIT_ALWAYS_INLINE void half_store(half_bits h, Half* p, int n) noexcept {
    if (n == width) {
      __builtin_memcpy(p, &h, sizeof h);
      return;
    }
#if MLKIT_SET_AVX512
    _mm256_mask_storeu_epi16(p, first_mask(n), (__m256i)h);
#else
    __builtin_memcpy(p, &h, static_cast<std::size_t>(n) * 2);
#endif
  }
  static MLKIT_ALWAYS_INLINE vec widen(half_bits h) noexcept {
#if MLKIT_SET_AVX512
    return vec((native)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16));
#elif MLKIT_SET_AVX2
    return vec((native)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16));
#else
    return vec((native)(__builtin_convertvector(h, word_bits) << 16));
#endif
  }
  // Round to nearest even, NaN kept quiet: bf16's own rule, lane by lane.
  MLKIT_ALWAYS_INLINE half_bits narrow() const noexcept {
#if MLKIT_SET_BF16
    constexpr int denormal = 0x20;  // which the instruction takes for zero
    if (__builtin_expect(_mm512_fpclass_ps_mask(v, denormal) == 0, 1)) return (half_bits)_mm512_cvtneps_pbh(v);
#endif
    const word_bits u = (word_bits)v;
    const word_bits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const word_bits quiet = (u >> 16) | 0x40u;
    const word_bits nan = (word_bits)((u & 0x7fffffffu) > 0x7f800000u);
    return __builtin_convertvector((nan & quiet) | (~nan & rounded), half_bits);
  }
};

// Orders what was stored past the caches before what follows.
MLKIT_ALWAYS_INLINE void settle_stores() noexcept {
#if MLKIT_X86
  _mm_sfence();
#endif
}
