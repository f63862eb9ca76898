// Philox on a register of counters at once.

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

// Philox blocks that are made at once.
inline constexpr index_t philox_lanes = vec<double>::width;

// The four words of the blocks that `counter` numbers, each in the lower half of a lane.
struct philox_registers {
  typename vec<double>::native_uint words[4];
};
MLKIT_ALWAYS_INLINE philox_registers philox_blocks(const random_stream& random,
                                                   typename vec<double>::native_uint counter) noexcept {
  using U = typename vec<double>::native_uint;
  constexpr std::uint64_t low = 0xffffffffu;
  U c0 = counter, c1 = counter >> 32, c2 = U{} + (random.stream & low), c3 = U{} + (random.stream >> 32);
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
  return {{c0, c1, c2, c3}};
}

// words[0 .. 4 * philox_lanes) = the words of blocks [block, block + philox_lanes) of the stream.
MLKIT_ALWAYS_INLINE void philox_words(const random_stream& random, std::uint64_t block, std::uint32_t* words) noexcept {
  using U = typename vec<double>::native_uint;
  constexpr std::uint64_t low = 0xffffffffu;
  U lane{};
  for (int i = 0; i < philox_lanes; ++i) lane[i] = static_cast<std::uint64_t>(i);
  const philox_registers c = philox_blocks(random, lane + block);
  const U first = (c.words[0] & low) | (c.words[1] << 32), second = (c.words[2] & low) | (c.words[3] << 32);
  std::uint64_t pairs[2 * philox_lanes];
  for (int i = 0; i < philox_lanes; ++i) {
    pairs[2 * i] = first[i];
    pairs[2 * i + 1] = second[i];
  }
  __builtin_memcpy(words, pairs, sizeof pairs);
}
