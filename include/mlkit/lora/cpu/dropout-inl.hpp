// Dropout masks: Philox on a register of counters at once, and elements decoded under a mask.

// The products of the lower halves of 64-bit lanes with a 32-bit constant.
MLKIT_ALWAYS_INLINE typename vec<double>::native_uint multiply_low(typename vec<double>::native_uint a,
                                                                   std::uint64_t m) noexcept {
  using U = typename vec<double>::native_uint;
  const U b = U{} + m;
#if MLKIT_SET_AVX512
  return (U)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif MLKIT_SET_AVX2
  return (U)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif MLKIT_X86
  return (U)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * b;
#endif
}

// Philox blocks of words that one call of philox_words makes.
inline constexpr index_t philox_lanes = vec<double>::width;

// words[0 .. 4 * philox_lanes) = the words of blocks [block, block + philox_lanes) of the stream.
MLKIT_ALWAYS_INLINE void philox_words(const random_stream& random, std::uint64_t block, std::uint32_t* words) noexcept {
  using U = typename vec<double>::native_uint;
  constexpr std::uint64_t low = 0xffffffffu;
  U lane{};
  for (int i = 0; i < philox_lanes; ++i) lane[i] = static_cast<std::uint64_t>(i);
  const U counter = lane + block;
  U c0 = counter & low, c1 = counter >> 32, c2 = U{} + (random.stream & low), c3 = U{} + (random.stream >> 32);
  auto k0 = static_cast<std::uint32_t>(random.seed), k1 = static_cast<std::uint32_t>(random.seed >> 32);
  MLKIT_UNROLL
  for (int r = 0; r < philox4x32::rounds; ++r) {  // only the lower half of a lane counts
    const U p0 = multiply_low(c0, philox4x32::multiplier0), p1 = multiply_low(c2, philox4x32::multiplier1);
    c0 = (p1 >> 32) ^ c1 ^ (U{} + std::uint64_t{k0});
    c2 = (p0 >> 32) ^ c3 ^ (U{} + std::uint64_t{k1});
    c1 = p1;
    c3 = p0;
    k0 += philox4x32::weyl0;
    k1 += philox4x32::weyl1;
  }
  const U first = (c0 & low) | (c1 << 32), second = (c2 & low) | (c3 << 32);
  std::uint64_t pairs[2 * philox_lanes];
  for (int i = 0; i < philox_lanes; ++i) {
    pairs[2 * i] = first[i];
    pairs[2 * i + 1] = second[i];
  }
  __builtin_memcpy(words, pairs, sizeof pairs);
}

// x[0, count) under the mask, elements [row, col .. col + count) of the masked matrix; count <= mask_run.
inline constexpr index_t mask_run = 128;
template <class A>
void mask_elements(const dropout_mask& mask, index_t row, index_t col, index_t count, A* MLKIT_RESTRICT x) noexcept {
  std::uint32_t words[mask_run + 8 * philox_lanes];
  const auto index = static_cast<std::uint64_t>((mask.first_row + row) * mask.cols + col);
  const auto skip = static_cast<index_t>(index % 4);
  for (index_t i = 0; i < count + skip; i += 4 * philox_lanes)
    philox_words(mask.random, index / 4 + static_cast<std::uint64_t>(i / 4), words + i);
  const A scale = static_cast<A>(mask.scale);
  for (index_t i = 0; i < count; ++i) x[i] = words[skip + i] >= mask.threshold ? x[i] * scale : A{};
}

template <class T, class Out>
void decode_run(set_tag, const dropped_source<T>& s, index_t row, index_t col, index_t count,
                Out* MLKIT_RESTRICT out) noexcept {
  using A = accumulator_t<T>;
  A run[mask_run];
  for (index_t i = 0; i < count; i += mask_run) {
    const index_t n = std::min(mask_run, count - i);
    decode_run(set_tag{}, s.source, row, col + i, n, run);
    if (s.turned)
      for (index_t j = 0; j < n; ++j) mask_elements(s.mask, col + i + j, row, 1, run + j);
    else
      mask_elements(s.mask, row, col + i, n, run);
    const dense_source<A> masked{run, 1, n, n, 1};
    decode_run(set_tag{}, masked, 0, 0, n, out + i);
  }
}

template <class V>
MLKIT_ALWAYS_INLINE V finish_stage(set_tag, const lora::detail::mask_output& stage, V x,
                                   const output_position& at) noexcept {
  typename V::value_type run[V::width];
  x.store(run);
  mask_elements(stage.mask, at.row, at.col, at.count, run);
  return V::load(run);
}
