// One query against a cache of keys and values: dots along d, in registers, and sums of values. The heads that share
// keys are taken together, so that the cache is read once.

// Keys whose scores are held at once.
inline constexpr index_t decode_keys = 64;

// x through the loads of a register: whole ones, and the rest of d.
template <class V, class F>
MLKIT_ALWAYS_INLINE void each_register(index_t n, F&& f) noexcept {
  index_t c = 0;
  for (; c + V::width <= n; c += V::width) f(c, V::width);
  if (c < n) f(c, static_cast<int>(n - c));
}

// Rows that will be read soon, those of the next block of keys.
template <class C>
struct rows_ahead {
  const C* data;
  index_t stride;
  static constexpr index_t line = 64 / index_t{sizeof(C)};
  MLKIT_ALWAYS_INLINE rows_ahead from(index_t row, index_t col) const noexcept {
    return {data + row * stride + col, stride};
  }
  // Asks for the line that starts at `col`, if one does.
  template <int Width>
  MLKIT_ALWAYS_INLINE void fetch(index_t row, index_t col) const noexcept {
    if (Width >= line || col % line == 0) __builtin_prefetch(data + row * stride + col, 0, 3);
  }
};

// scores[r][j] = q[r] . k[j] for Keys keys.
template <int Rows, int Keys, class A, class C>
MLKIT_ALWAYS_INLINE void decode_dots(const A* q, index_t q_stride, const C* k, index_t k_stride, index_t d, A* scores,
                                     const rows_ahead<C>& next) noexcept {
  using V = vec<A>;
  V sums[Rows][Keys];
  MLKIT_UNROLL
  for (int r = 0; r < Rows; ++r) {
    MLKIT_UNROLL
    for (int j = 0; j < Keys; ++j) sums[r][j] = V::zero();
  }
  each_register<V>(d, [&](index_t c, int n) {
    V keys[Keys];
    MLKIT_UNROLL
    for (int j = 0; j < Keys; ++j) {
      keys[j] = n == V::width ? V::load(k + j * k_stride + c) : V::load(k + j * k_stride + c, n);
      next.template fetch<V::width>(j, c);
    }
    MLKIT_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const V left = V::load(q + r * q_stride + c);
      MLKIT_UNROLL
      for (int j = 0; j < Keys; ++j) sums[r][j] = fma(left, keys[j], sums[r][j]);
    }
  });
  MLKIT_UNROLL
  for (int r = 0; r < Rows; ++r) {
    if constexpr (Keys == 4) {
      sum4(sums[r], scores + r * decode_keys);
    } else {
      for (int j = 0; j < Keys; ++j) scores[r * decode_keys + j] = sums[r][j].sum();
    }
  }
}

// out[r][0, n) += sum over keys of p[r][key] v[key][0, n), for Vectors registers.
template <int Rows, int Vectors, class A, class C>
MLKIT_ALWAYS_INLINE void decode_values(const A* p, const C* v, index_t v_stride, index_t keys, int last, A* out,
                                       index_t out_stride, const rows_ahead<C>& next) noexcept {
  using V = vec<A>;
  V sums[Rows][Vectors];
  MLKIT_UNROLL
  for (int r = 0; r < Rows; ++r) {
    MLKIT_UNROLL
    for (int i = 0; i < Vectors; ++i) sums[r][i] = V::load(out + r * out_stride + i * V::width);
  }
  for (index_t j = 0; j < keys; ++j, v += v_stride) {
    V values[Vectors];
    MLKIT_UNROLL
    for (int i = 0; i < Vectors; ++i) {
      values[i] = i + 1 < Vectors || last == V::width ? V::load(v + i * V::width) : V::load(v + i * V::width, last);
      next.template fetch<V::width>(j, i * V::width);
    }
    MLKIT_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const V weight(p[r * decode_keys + j]);
      MLKIT_UNROLL
      for (int i = 0; i < Vectors; ++i) sums[r][i] = fma(weight, values[i], sums[r][i]);
    }
  }
  MLKIT_UNROLL
  for (int r = 0; r < Rows; ++r) {
    MLKIT_UNROLL
    for (int i = 0; i < Vectors; ++i) sums[r][i].store(out + r * out_stride + i * V::width);
  }
}

template <class Problem>
struct attend_decode {
  using A = typename Problem::sum_type;
  using V = vec<A>;
  static constexpr index_t width = V::width;
  static constexpr bool quantised = std::is_same_v<typename Problem::cache_element, std::int8_t>;
  static constexpr A infinity = math_table<A>::infinity, log2_e = static_cast<A>(1.44269504088896340736);

  static index_t padded(index_t n) noexcept { return round_up(n, width); }
  static index_t scratch_size(const Problem& p) noexcept { return p.group * (padded(p.d) + padded(p.d_v)); }

  // state[row of the group] = {maximum, sum, out [d_v]} over keys [begin, end) of a kv head.
  static void run(const Problem& p, index_t b, index_t kv, index_t begin, index_t end, A* state, A* scratch) noexcept {
    A* q = scratch;
    A* out = q + p.group * padded(p.d);
    for (index_t r = 0; r < p.group; ++r) {
      const auto* from = p.q.data + b * p.q.strides[0] + (kv * p.group + r) * p.q.strides[1];
      for (index_t c = 0; c < padded(p.d); ++c)
        q[r * padded(p.d) + c] = c < p.d ? static_cast<A>(from[c * p.q.strides[2]]) * static_cast<A>(p.scale) : A{};
      std::fill_n(out + r * padded(p.d_v), padded(p.d_v), A{});
      state[r * (p.d_v + 2)] = -infinity;
      state[r * (p.d_v + 2) + 1] = 0;
    }
    for (index_t j = begin; j < end;) {
      const auto keys = p.cache.run(b, kv, j);
      const index_t n = std::min(std::min(keys.count, end - j), decode_keys);
      auto next = keys;
      if (j + n < p.cache.length(b)) next = p.cache.run(b, kv, j + n);
      if (next.count < n) next = keys;  // rows beyond the end of a run are not asked for
      index_t r = 0;
      for (; r + 4 <= p.group; r += 4) block<4>(p, keys, next, n, r, q, out, state);
      for (; r + 2 <= p.group; r += 2) block<2>(p, keys, next, n, r, q, out, state);
      for (; r < p.group; ++r) block<1>(p, keys, next, n, r, q, out, state);
      j += n;
    }
    for (index_t r = 0; r < p.group; ++r) std::copy_n(out + r * padded(p.d_v), p.d_v, state + r * (p.d_v + 2) + 2);
  }

 private:
  template <int Rows, class Run>
  static void block(const Problem& p, const Run& keys, const Run& next, index_t n, index_t row, const A* q, A* out,
                    A* state) noexcept {
    static_assert(decode_keys % width == 0);
    alignas(64) A scores[Rows * decode_keys];
    const index_t q_stride = padded(p.d), out_stride = padded(p.d_v);
    q += row * q_stride;
    out += row * out_stride;
    using C = typename Problem::cache_element;
    const rows_ahead<C> next_keys{next.k, next.k_stride}, next_values{next.v, next.v_stride};
    index_t j = 0;
    for (; j + 4 <= n; j += 4)
      decode_dots<Rows, 4>(q, q_stride, keys.k + j * keys.k_stride, keys.k_stride, p.d, scores + j,
                           next_keys.from(j, 0));
    for (; j < n; ++j)
      decode_dots<Rows, 1>(q, q_stride, keys.k + j * keys.k_stride, keys.k_stride, p.d, scores + j,
                           next_keys.from(j, 0));
    for (int r = 0; r < Rows; ++r) {
      A* s = scores + r * decode_keys;
      A* before = state + (row + r) * (p.d_v + 2);
      A now = before[0];
      if constexpr (quantised)
        for (index_t l = 0; l < n; ++l) s[l] *= keys.k_scales[l * keys.k_scale_stride];
      if (p.softcap > 0)
        for (index_t l = 0; l < n; l += width) {
          const int some = static_cast<int>(std::min(width, n - l));
          (static_cast<A>(p.softcap) * tanh(V::load(s + l, some) * static_cast<A>(1 / p.softcap))).store(s + l, some);
        }
      for (index_t l = n; l < padded(n); ++l) s[l] = -infinity;
      V top(now), sums = V::zero();
      for (index_t l = 0; l < n; l += width) top = max(top, V::load(s + l));
      now = top.largest();
      const A level = now == -infinity ? A{} : now;
      for (index_t l = 0; l < n; l += width) {
        const V x = exp2_bounded((V::load(s + l) - V(level)) * log2_e);
        x.store(s + l);
        sums += x;
      }
      const A total = sums.sum();
      if constexpr (quantised)
        for (index_t l = 0; l < n; ++l) s[l] *= keys.v_scales[l * keys.v_scale_stride];
      if (now > before[0]) {
        A lanes[V::width];
        exp2_bounded(V((before[0] - level) * log2_e)).store(lanes);
        before[1] *= lanes[0];
        for (index_t c = 0; c < out_stride; c += width)
          (V::load(out + r * out_stride + c) * lanes[0]).store(out + r * out_stride + c);
        before[0] = now;
      }
      before[1] += total;
    }
    index_t c = 0;
    for (; c + 4 * width <= p.d_v; c += 4 * width)
      decode_values<Rows, 4>(scores, keys.v + c, keys.v_stride, n, V::width, out + c, out_stride,
                             next_values.from(0, c));
    for (; c < p.d_v; c += width)
      decode_values<Rows, 1>(scores, keys.v + c, keys.v_stride, n, static_cast<int>(std::min(width, p.d_v - c)),
                             out + c, out_stride, next_values.from(0, c));
  }
};

template <class Problem>
attention::detail::decode_kernels<Problem> decode_entry() noexcept {
  using kernel = attend_decode<Problem>;
  return {&kernel::scratch_size, &kernel::run};
}
