// Whitening of elements by given moments.

template <class V, class T, class Out>
MLKIT_ALWAYS_INLINE V whitened(const rl::detail::whiten_problem<T, Out>& p, V x) noexcept {
  return fma(fma(x, V(p.scale), V(-p.mean)) - V(p.mean_rest), V(p.factor), V(p.shift));
}

// Elements [begin, end) of all rows.
template <class T, class Out>
void whiten_elements(const rl::detail::whiten_problem<T, Out>& p, index_t begin, index_t end) noexcept {
  using A = accumulator_t<T>;
  using V = vec<A>;
  constexpr index_t width = V::width;
  rl::detail::each_row_piece(p.shape, begin, end, [&](index_t row, index_t col, index_t count, index_t) {
    const T* x = p.x.at(row, col);
    Out* y = p.out.at(row, col);
    const std::uint8_t* mask = p.mask.data ? p.mask.at(row, col) : nullptr;
    const index_t x_step = p.x.col_stride, y_step = p.out.col_stride, mask_step = p.mask.col_stride;
    index_t i = 0;
    if (x_step == 1 && y_step == 1 && !mask) {
      for (; i + width <= count; i += width) whitened(p, V::load(x + i)).store(y + i);
    } else if (x_step == 1 && y_step == 1 && mask_step == 1) {
      for (; i + width <= count; i += width) store_kept(whitened(p, V::load(x + i)), kept_lanes<V>(mask + i), y + i);
    }
    for (; i < count; ++i)
      if (!mask || mask[i * mask_step])
        y[i * y_step] = static_cast<Out>(whitened(p, V(static_cast<A>(x[i * x_step]))).v[0]);
  });
}
