// Whitening of elements by given moments.

template <class A, class T, class Out>
MLKIT_ALWAYS_INLINE void whiten_some(const rl::detail::whiten_problem<T, Out>& p, const T* x, Out* y, int n) noexcept {
  using V = vec<A>;
  const V d = (V::load(x, n) - V(p.mean)) - V(p.mean_rest);
  fma(d, V(p.factor), V(p.shift)).store(y, n);
}

template <class A, class T, class Out>
MLKIT_ALWAYS_INLINE Out whitened(const rl::detail::whiten_problem<T, Out>& p, T x) noexcept {
  return static_cast<Out>(((static_cast<A>(x) - p.mean) - p.mean_rest) * p.factor + p.shift);
}

// Elements [begin, end) of all rows. Masks are runs of the same byte most of the time, which take whole registers.
template <class T, class Out>
void whiten_elements(const rl::detail::whiten_problem<T, Out>& p, index_t begin, index_t end) noexcept {
  using A = accumulator_t<T>;
  constexpr index_t width = vec<A>::width, group = 8;  // bytes of a mask looked at together
  constexpr std::uint64_t all_ones = 0x0101010101010101u;
  rl::detail::each_row_piece(p.shape, begin, end, [&](index_t row, index_t col, index_t count, index_t) {
    const T* x = p.x.at(row, col);
    Out* y = p.out.at(row, col);
    const std::uint8_t* mask = p.mask.data ? p.mask.at(row, col) : nullptr;
    const index_t x_step = p.x.col_stride, y_step = p.out.col_stride, mask_step = p.mask.col_stride;
    const bool whole = x_step == 1 && y_step == 1;
    const auto run = [&](index_t from, index_t n) {
      for (index_t i = from; i < from + n; i += width)
        whiten_some<A>(p, x + i, y + i, static_cast<int>(std::min(width, from + n - i)));
    };
    if (!mask && whole) return run(0, count);
    for (index_t i = 0; i < count;) {
      if (mask && mask_step == 1 && i + group <= count) {
        std::uint64_t bytes;
        __builtin_memcpy(&bytes, mask + i, group);
        if (bytes == 0) {
          i += group;
          continue;
        }
        if (bytes == all_ones && whole) {
          index_t n = group;
          for (; i + n + group <= count; n += group) {
            __builtin_memcpy(&bytes, mask + i + n, group);
            if (bytes != all_ones) break;
          }
          run(i, n);
          i += n;
          continue;
        }
        if (whole) {
          for (int l = 0; l < group; ++l) y[i + l] = mask[i + l] ? whitened<A>(p, x[i + l]) : y[i + l];
          i += group;
          continue;
        }
      }
      for (const index_t last = std::min(count, i + group); i < last; ++i)
        if (!mask || mask[i * mask_step]) y[i * y_step] = whitened<A>(p, x[i * x_step]);
    }
  });
}
