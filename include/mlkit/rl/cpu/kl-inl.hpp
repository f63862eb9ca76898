// Estimates of KL divergence, token by token.

// n elements that stand `step` apart, as those of an array: where they are, or in `buffer`, with 0 behind them.
template <class T, int Lanes>
MLKIT_ALWAYS_INLINE const T* lanes_from(const T* p, index_t step, int n, T (&buffer)[Lanes]) noexcept {
  if (step == 1 && n == Lanes) return p;
  for (int l = 0; l < Lanes; ++l) buffer[l] = T{};
  for (int l = 0; l < n; ++l) buffer[l] = p[l * step];
  return buffer;
}

// The sum of 16 bytes that are 0 or 1.
MLKIT_ALWAYS_INLINE index_t count_ones(const std::uint8_t (&bytes)[16]) noexcept {
  std::uint64_t words[2];
  __builtin_memcpy(words, bytes, sizeof words);
  return static_cast<index_t>(((words[0] + words[1]) * 0x0101010101010101u) >> 56);
}

// Tokens [begin, end) of all rows.
template <class T, class Estimator>
rl::detail::kl_part kl_tokens(const rl::detail::kl_problem<T, Estimator>& p, index_t begin, index_t end) noexcept {
  constexpr int lanes = rl::detail::kl_lanes;
  T sums[lanes] = {};
  std::uint8_t all[lanes];
  for (int l = 0; l < lanes; ++l) all[l] = 1;
  index_t kept = 0;
  const Estimator estimator = *p.estimator;
  // One of them, and not their sum: 0 times what is not wanted need not be 0.
  const bool of_values = p.value_factor != 0;
  const T factor = of_values ? p.value_factor : p.derivative_factor;
  rl::detail::each_row_piece(p.shape, begin, end, [&](index_t row, index_t col, index_t count, index_t) {
    for (index_t i = 0; i < count; i += lanes) {
      const int n = static_cast<int>(std::min<index_t>(lanes, count - i));
      std::uint8_t keep_buffer[lanes], keep[lanes];
      T log_probs_buffer[lanes], reference_buffer[lanes], result_buffer[lanes], value[lanes], derivative[lanes];
      const std::uint8_t* kept_here = all;
      if (p.mask.data)
        kept_here = lanes_from(p.mask.at(row, col + i), p.mask.col_stride, n, keep_buffer);
      else if (n < lanes)
        kept_here = lanes_from(all, 1, n, keep_buffer);
      const T* log_probs = lanes_from(p.log_probs.at(row, col + i), p.log_probs.col_stride, n, log_probs_buffer);
      const T* reference = lanes_from(p.reference.at(row, col + i), p.reference.col_stride, n, reference_buffer);
      MLKIT_SIMD
      for (int l = 0; l < lanes; ++l) keep[l] = kept_here[l] != 0;
      MLKIT_SIMD
      for (int l = 0; l < lanes; ++l) {
        const auto e = estimator(log_probs[l] - reference[l]);
        value[l] = e.value;
        derivative[l] = e.derivative;
      }
      T* out = p.out.data ? p.out.at(row, col + i) : nullptr;
      const bool direct = out && p.out.col_stride == 1 && n == lanes;
      T* result = direct ? out : result_buffer;
      MLKIT_SIMD
      for (int l = 0; l < lanes; ++l) {  // apart from the above, which GCC would put into a branch on the mask
        const T v = rl::detail::choose(kept_here[l] != 0, value[l], T{}),
                d = rl::detail::choose(kept_here[l] != 0, derivative[l], T{});
        sums[l] += v;
        result[l] = factor * rl::detail::choose(of_values, v, d);
      }
      kept += count_ones(keep);
      if (out && !direct)
        for (int l = 0; l < n; ++l) out[l * p.out.col_stride] = result[l];
    }
  });
  double total = 0;
  for (int l = 0; l < lanes; ++l) total += static_cast<double>(sums[l]);
  return {total, kept};
}
