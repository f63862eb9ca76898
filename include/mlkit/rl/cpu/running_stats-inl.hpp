// Moments of columns, with lanes across columns, and the normalisation of rows by them.

// to[c] = moments of column c over the rows of [begin, end) that the mask keeps. As moments_of, which see.
template <class T>
void column_moments(const rl::detail::columns_problem<T>& p, index_t begin, index_t end, rl::moments* to) noexcept {
  using A = accumulator_t<T>;
  using V = vec<A>;
  constexpr index_t width = V::width;
  const T* kept[rl::detail::elements_together / 16];
  index_t n = 0;
  for (index_t i = begin; i < end; ++i)
    if (!p.mask.data || p.mask(i)) kept[n++] = p.x.data + i * p.x.strides[0];
  const index_t columns = p.x.extents[1];
  if (n == 0) {
    std::fill_n(to, columns, rl::moments{});
    return;
  }
  const double count = static_cast<double>(n);
  for (index_t c = 0; c < columns; c += width) {
    const int some = static_cast<int>(std::min(width, columns - c));
    const V first = V::load(kept[0] + c, some);
    V sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    for (index_t i = 0; i < n; ++i) sum[i % 4] += V::load(kept[i] + c, some) - first;
    const V mean = first + ((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<A>(n);
    V deviation = V::zero(), square[2] = {V::zero(), V::zero()};
    for (index_t i = 0; i < n; ++i) {
      const V d = V::load(kept[i] + c, some) - mean;
      deviation += d;
      square[i % 2] = fma(d, d, square[i % 2]);
    }
    A means[width], rests[width], squares[width];
    mean.store(means);
    deviation.store(rests);
    (square[0] + square[1]).store(squares);
    for (int l = 0; l < some; ++l) {
      const double rest = static_cast<double>(rests[l]);
      const double m2 = static_cast<double>(squares[l]) - rest * (rest / count);
      if (std::isfinite(m2)) {
        to[c + l] = {n, static_cast<double>(means[l]) + rest / count, std::max(m2, 0.0)};
        continue;
      }
      double total = 0, wide = 0;
      for (index_t i = 0; i < n; ++i) total += static_cast<double>(kept[i][c + l]) / count;
      for (index_t i = 0; i < n; ++i) {
        const double d = static_cast<double>(kept[i][c + l]) - total;
        wide += d * d;
      }
      to[c + l] = {n, total, wide};
    }
  }
}

template <class T, class Out>
void normalize_rows(const rl::detail::normalize_problem<T, Out>& p, index_t begin, index_t end) noexcept {
  using A = accumulator_t<T>;
  using V = vec<A>;
  constexpr index_t width = V::width;
  const index_t columns = p.x.extents[1];
  const bool whole = columns > 1 && p.x.strides[1] == 1 && p.out.strides[1] == 1;
  for (index_t i = begin; i < end; ++i) {
    const T* x = p.x.data + i * p.x.strides[0];
    Out* y = p.out.data + i * p.out.strides[0];
    if (whole) {
      for (index_t c = 0; c < columns; c += width) {
        const int n = static_cast<int>(std::min(width, columns - c));
        const V d = fma(V::load(x + c, n), V(p.scale), -V::load(p.mean + c, n)) - V::load(p.mean_rest + c, n);
        min(V(p.clip), max(V(-p.clip), d * V::load(p.factor + c, n))).store(y + c, n);  // NaN stays
      }
    } else {
      for (index_t c = 0; c < columns; ++c) {
        const A d = (static_cast<A>(x[c * p.x.strides[1]]) * p.scale - p.mean[c]) - p.mean_rest[c], z = d * p.factor[c];
        y[c * p.out.strides[1]] = static_cast<Out>(z < -p.clip ? -p.clip : z > p.clip ? p.clip : z);
      }
    }
  }
}
