// Moments of a chunk of elements, and what is made of elements by them.

// to[0 .. n) = those of `count` elements that the mask keeps, in order; n.
template <class A, class T>
index_t collect_kept(const T* x, index_t step, const std::uint8_t* mask, index_t mask_step, index_t count,
                     A* to) noexcept {
  using V = vec<A>;
  constexpr index_t group = 8;
  constexpr std::uint64_t all_ones = 0x0101010101010101u;
  const auto copy = [&](index_t from, index_t n, A* at) {
    if (step == 1)
      for (index_t i = 0; i < n; i += V::width) {
        const int some = static_cast<int>(std::min<index_t>(V::width, n - i));
        V::load(x + from + i, some).store(at + i, some);
      }
    else
      for (index_t i = 0; i < n; ++i) at[i] = static_cast<A>(x[(from + i) * step]);
  };
  if (!mask) {
    copy(0, count, to);
    return count;
  }
  A* at = to;
  for (index_t i = 0; i < count;) {
    if (mask_step == 1 && i + group <= count) {
      std::uint64_t bytes;
      __builtin_memcpy(&bytes, mask + i, group);
      if (bytes == 0) {
        i += group;
        continue;
      }
      if (bytes == all_ones) {
        index_t n = group;
        for (; i + n + group <= count; n += group) {
          __builtin_memcpy(&bytes, mask + i + n, group);
          if (bytes != all_ones) break;
        }
        copy(i, n, at);
        at += n;
        i += n;
        continue;
      }
    }
    for (const index_t end = std::min(count, i + group); i < end; ++i) {
      *at = static_cast<A>(x[i * step]);
      at += mask[i * mask_step] != 0;
    }
  }
  return at - to;
}

// Those of x [0, n), n >= 1; x is padded to whole registers. Deviations are from the mean of a first pass, whose own
// rounding the second corrects; that pass counts from x[0], so that equal elements deviate by nothing.
template <class A>
rl::moments moments_of(A* x, index_t n) noexcept {
  using V = vec<A>;
  const index_t padded = round_up(n, V::width);
  const auto pad = [&](A value) {
    for (index_t i = n; i < padded; ++i) x[i] = value;
  };
  const A first = x[0];
  pad(first);
  V sum = V::zero();
  for (index_t i = 0; i < padded; i += V::width) sum += V::load(x + i) - V(first);
  const A mean = first + sum.sum() / static_cast<A>(n);
  pad(mean);
  V deviation = V::zero(), square = V::zero();
  for (index_t i = 0; i < padded; i += V::width) {
    const V d = V::load(x + i) - V(mean);
    deviation += d;
    square = fma(d, d, square);
  }
  const double count = static_cast<double>(n);
  const double rest = static_cast<double>(deviation.sum());
  const double m2 = static_cast<double>(square.sum()) - rest * (rest / count);
  if (std::isfinite(m2)) return {n, static_cast<double>(mean) + rest / count, std::max(m2, 0.0)};
  // Squares above the largest f32, or elements that are not finite.
  double total = 0, squares = 0;
  for (index_t i = 0; i < n; ++i) total += static_cast<double>(x[i]) / count;
  for (index_t i = 0; i < n; ++i) {
    const double d = static_cast<double>(x[i]) - total;
    squares += d * d;
  }
  return {n, total, squares};
}

template <class T>
rl::moments chunk_moments(const rl::detail::moments_problem<T>& p, index_t begin, index_t end) noexcept {
  using A = accumulator_t<T>;
  alignas(64) A kept[rl::detail::chunk_elements + vec<A>::width];
  index_t n = 0;
  rl::detail::each_row_piece(p.shape, begin, end, [&](index_t row, index_t col, index_t count, index_t) {
    n += collect_kept<A>(p.x.at(row, col), p.x.col_stride, p.mask.data ? p.mask.at(row, col) : nullptr,
                         p.mask.col_stride, count, kept + n);
  });
  if (n == 0) return {};
  return moments_of(kept, n);
}
