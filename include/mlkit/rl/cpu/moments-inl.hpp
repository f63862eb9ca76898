// Moments of a chunk of elements.

// The first of n bytes that is not 0; n if there is none.
inline index_t first_kept(const std::uint8_t* mask, index_t n) noexcept {
  index_t i = 0;
  for (std::uint64_t group = 0; i + index_t{sizeof group} <= n; i += sizeof group) {
    __builtin_memcpy(&group, mask + i, sizeof group);
    if (group != 0) break;
  }
  while (i < n && mask[i] == 0) ++i;
  return i;
}

// Those of x[0, n) that the mask keeps. Deviations are from the mean of a first pass, whose own rounding the second
// corrects; that pass counts from the first element, so that equal elements deviate by nothing.
template <bool Masked, class T>
rl::moments moments_of(const T* x, const std::uint8_t* mask, index_t n) noexcept {
  using A = accumulator_t<T>;
  using V = vec<A>;
  constexpr index_t width = V::width;
  constexpr int chains = 4;  // sums that do not wait for each other
  const index_t start = Masked ? first_kept(mask, n) : 0;
  if (start == n) return {};
  // f(u, deviations from `from`, lanes) for all registers; deviations are 0 in lanes that are not kept.
  const auto each = [&](A from, auto&& f) MLKIT_RL_LOOP_BODY {
    const auto one = [&](int u, index_t i) {
      const V d = V::load(x + i) - V(from);
      if constexpr (Masked) {
        const auto keep = kept_lanes<V>(mask + i);
        f(u, V::select(keep, d, V::zero()), keep);
      } else {
        f(u, d, typename V::native_int{});
      }
    };
    index_t i = 0;
    for (; i + chains * width <= n; i += chains * width) {
      MLKIT_UNROLL
      for (int u = 0; u < chains; ++u) one(u, i + u * width);
    }
    for (; i + width <= n; i += width) one(0, i);
    if (i == n) return;
    const int some = static_cast<int>(n - i);
    const auto keep = some_lanes<V>(Masked ? mask + i : nullptr, some).lanes();
    f(1, V::select(keep, V::load(x + i, some) - V(from), V::zero()), keep);
  };
  const auto total = [](const V* sums) { return ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum(); };

  V sum[chains], square[chains];
  MLKIT_UNROLL
  for (int u = 0; u < chains; ++u) sum[u] = square[u] = V::zero();
  typename V::native_int counts{};
  const A first = static_cast<A>(x[start]);
  each(first, [&](int u, V d, typename V::native_int keep) MLKIT_RL_LOOP_BODY {
    sum[u] += d;
    if constexpr (Masked) counts -= keep != 0;
  });
  index_t kept = n;
  if constexpr (Masked) {
    kept = 0;
    for (int l = 0; l < V::width; ++l) kept += static_cast<index_t>(counts[l]);
  }
  const A mean = first + total(sum) / static_cast<A>(kept);
  MLKIT_UNROLL
  for (int u = 0; u < chains; ++u) sum[u] = V::zero();
  each(mean, [&](int u, V d, typename V::native_int) MLKIT_RL_LOOP_BODY {
    sum[u] += d;
    square[u] = fma(d, d, square[u]);
  });
  const double count = static_cast<double>(kept);
  const double rest = static_cast<double>(total(sum));
  const double m2 = static_cast<double>(total(square)) - rest * (rest / count);
  if (std::isfinite(m2)) return {kept, static_cast<double>(mean) + rest / count, std::max(m2, 0.0)};
  // Squares above the largest f32, or elements that are not finite.
  double exact = 0, squares = 0;
  for (index_t i = 0; i < n; ++i)
    if (!Masked || mask[i]) exact += static_cast<double>(x[i]) / count;
  for (index_t i = 0; i < n; ++i)
    if (!Masked || mask[i]) {
      const double d = static_cast<double>(x[i]) - exact;
      squares += d * d;
    }
  return {kept, exact, squares};
}

template <class T>
rl::moments chunk_moments(const rl::detail::moments_problem<T>& p, index_t begin, index_t end) noexcept {
  T buffer[rl::detail::chunk_elements];
  std::uint8_t bytes[rl::detail::chunk_elements];
  const index_t n = end - begin;
  if (n == 0) return {};
  const T* x = in_order(p.x, p.shape, begin, n, buffer);
  if (!p.mask.data) return moments_of<false>(x, nullptr, n);
  return moments_of<true>(x, in_order(p.mask, p.shape, begin, n, bytes), n);
}
