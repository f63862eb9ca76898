// Dropout masks: elements decoded under a mask.

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
