// The fastest loops that do nothing useful: what a kernel of each kind can at best reach.

// Enough independent chains to hide the latency of the FMA on both ports, within the registers of the set.
inline constexpr int fma_chains = MLKIT_SET_AVX512 ? 24 : 12;

// x = x * m + c in every chain; bf16 is pairs of products summed in f32, or products of matrices, where the set has
// them, else what f32 is.
template <class T>
double peak_loop(index_t rounds) noexcept {
  using A = accumulator_t<T>;
#if MLKIT_SET_AMX
  if constexpr (std::is_same_v<T, bf16>) {
    const matrix_registers<bf16> registers;
    asm volatile("tilezero %tmm4\n\ttilezero %tmm5\n\ttilezero %tmm6\n\ttilezero %tmm7");
    asm volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2\n\ttilezero %tmm3");
    for (index_t r = 0; r < rounds; ++r)
      asm volatile(
          "tdpbf16ps %tmm6, %tmm4, %tmm0\n\ttdpbf16ps %tmm7, %tmm4, %tmm1\n\t"
          "tdpbf16ps %tmm6, %tmm5, %tmm2\n\ttdpbf16ps %tmm7, %tmm5, %tmm3");
    return 0;
  }
#endif
  vec<A> x[fma_chains];
  MLKIT_UNROLL
  for (int i = 0; i < fma_chains; ++i) x[i] = vec<A>(static_cast<A>(i));
#if MLKIT_SET_BF16
  if constexpr (std::is_same_v<T, bf16>) {
    const __m512bh half = (__m512bh)_mm512_set1_epi16(0x3f00);
    for (index_t r = 0; r < rounds; ++r) {
      MLKIT_UNROLL
      for (int i = 0; i < fma_chains; ++i) x[i].v = _mm512_dpbf16_ps(x[i].v, half, half);
    }
  } else
#endif
  {
    const vec<A> m(static_cast<A>(0.5)), c(static_cast<A>(1));
    for (index_t r = 0; r < rounds; ++r) {
      MLKIT_UNROLL
      for (int i = 0; i < fma_chains; ++i) x[i] = fma(x[i], m, c);
    }
  }
  MLKIT_UNROLL
  for (int i = 1; i < fma_chains; ++i) x[0] += x[i];
  return x[0].sum();
}
template <class T>
double peak_flop(index_t rounds) noexcept {
  if (MLKIT_SET_AMX && std::is_same_v<T, bf16>) return 4 * 2.0 * 16 * 16 * 32 * static_cast<double>(rounds);
  constexpr int pairs = MLKIT_SET_BF16 && std::is_same_v<T, bf16> ? 2 : 1;
  return 2.0 * pairs * fma_chains * vec<accumulator_t<T>>::width * static_cast<double>(rounds);
}

// Four streams of a contiguous range, far enough apart for the prefetchers to follow each; n is a multiple of 64.
template <class T>
T read_loop(const T* p, index_t n) noexcept {
  constexpr int streams = 4;
  constexpr index_t w = vec<T>::width;
  vec<T> sum[streams * 2];
  MLKIT_UNROLL
  for (int i = 0; i < streams * 2; ++i) sum[i] = vec<T>::zero();
  const index_t part = n / streams / (2 * w) * (2 * w);
  for (index_t j = 0; j < part; j += 2 * w) {
    MLKIT_UNROLL
    for (int s = 0; s < streams; ++s) {
      sum[2 * s] += vec<T>::load(p + s * part + j);
      sum[2 * s + 1] += vec<T>::load(p + s * part + j + w);
    }
  }
  MLKIT_UNROLL
  for (int i = 1; i < streams * 2; ++i) sum[0] += sum[i];
  return sum[0].sum();
}

// a = b + s c
template <class T>
void triad_loop(T* MLKIT_RESTRICT a, const T* MLKIT_RESTRICT b, const T* MLKIT_RESTRICT c, T s, index_t n) noexcept {
  const vec<T> scale(s);
  for (index_t j = 0; j + vec<T>::width <= n; j += vec<T>::width)
    fma(scale, vec<T>::load(c + j), vec<T>::load(b + j)).store(a + j);
}

// The traffic of Adam: parameter and two moments read and written, the gradient read.
template <class T>
void adam_shaped_loop(T* MLKIT_RESTRICT p, T* MLKIT_RESTRICT m, T* MLKIT_RESTRICT v, const T* MLKIT_RESTRICT g,
                      index_t n) noexcept {
  const vec<T> scale(static_cast<T>(0.5));
  for (index_t j = 0; j + vec<T>::width <= n; j += vec<T>::width) {
    const vec<T> x = vec<T>::load(g + j);
    fma(scale, vec<T>::load(p + j), x).store(p + j);
    fma(scale, vec<T>::load(m + j), x).store(m + j);
    fma(scale, vec<T>::load(v + j), x).store(v + j);
  }
}
