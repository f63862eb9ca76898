// One query of each head against a cache of keys and values: dots along d, in registers, and sums of values. The heads
// that share keys are taken together, so that the cache is read once.

// Keys whose scores are held at once: so many that these keys, their values and those that follow stay in L1.
inline constexpr index_t decode_keys = 64, decode_bytes = 8192;

// Lane l: that of a and b, which are counted as one, which From::at says.
template <class From, class V, std::size_t... Lane>
MLKIT_ALWAYS_INLINE V shuffled(V a, V b, std::index_sequence<Lane...>) noexcept {
#if defined(__clang__)
  return V(__builtin_shufflevector(a.v, b.v, From::at(static_cast<int>(Lane))...));
#else
  typename V::native_int from{};  // the other builtin's list of lanes is too much for nvcc
  MLKIT_UNROLL
  for (int l = 0; l < V::width; ++l) from[l] = From::at(l);
  return V(__builtin_shuffle(a.v, b.v, from));
#endif
}
template <class From, class V>
MLKIT_ALWAYS_INLINE V shuffled(V a, V b) noexcept {
  return shuffled<From>(a, b, std::make_index_sequence<static_cast<std::size_t>(V::width)>{});
}
// l of a where l has no bit of Distance, else of b; the same of l ^ Distance.
template <int Width, int Distance>
struct near_lane {
  static constexpr int at(int l) noexcept { return l & Distance ? Width + l : l; }
};
template <int Width, int Distance>
struct far_lane {
  static constexpr int at(int l) noexcept { return (l & Distance ? Width : 0) + (l ^ Distance); }
};

// Lane l: the sum of x[l], whose halves are added until one lane is left.
template <class V, int Distance = V::width / 2>
MLKIT_ALWAYS_INLINE V sums_of(V* x) noexcept {
  MLKIT_UNROLL
  for (int i = 0; i < Distance; ++i)
    x[i] = shuffled<near_lane<V::width, Distance>>(x[i], x[i + Distance]) +
           shuffled<far_lane<V::width, Distance>>(x[i], x[i + Distance]);
  if constexpr (Distance > 1)
    return sums_of<V, Distance / 2>(x);
  else
    return x[0];
}
// Lane l: the largest of the `Lanes` lanes that l is among.
template <int Lanes, class V>
MLKIT_ALWAYS_INLINE V largest_of(V x) noexcept {
  if constexpr (Lanes == 1)
    return x;
  else
    return largest_of<Lanes / 2>(max(x, shuffled<far_lane<0, Lanes / 2>>(x, x)));
}

// A cache's elements as registers: `count` of them from one load of `size` elements. Words of two bf16 become their
// first halves and their second ones, without a shuffle.
template <class A, class C>
struct cache_registers {
  using V = vec<A>;
  static constexpr bool split = std::is_same_v<C, bf16>;
  static constexpr int count = split ? 2 : 1;
  static constexpr index_t size = count * V::width;
  V v[count];

  // The first n of them; the rest is zero.
  static MLKIT_ALWAYS_INLINE cache_registers load(const C* x, int n) noexcept {
    if constexpr (split) {
      typename V::native_uint words{};
      if (n == size)
        __builtin_memcpy(&words, x, sizeof words);
      else
#if MLKIT_SET_AVX512
        words = (typename V::native_uint)_mm512_maskz_loadu_epi16(_bzhi_u32(~0u, static_cast<unsigned>(n)), x);
#else
        __builtin_memcpy(&words, x, static_cast<std::size_t>(n) * sizeof(C));
#endif
      return {V::from_bits((typename V::native_int)(words << 16)),
              V::from_bits((typename V::native_int)(words & 0xffff0000u))};
    } else {
      return {n == size ? V::load(x) : V::load(x, n)};
    }
  }
  // Where element c lies in an array of such registers.
  static constexpr index_t place(index_t c) noexcept {
    return split ? c / size * size + c % 2 * V::width + c % size / 2 : c;
  }
};

// Rows that will be read soon, those of the next block of keys.
template <class C>
struct rows_ahead {
  const C* data;
  index_t stride;
  static constexpr index_t line = 64 / index_t{sizeof(C)};
  // Asks for the lines that start among the `Width` elements from col on, which is a multiple of Width.
  template <index_t Width>
  MLKIT_ALWAYS_INLINE void fetch(index_t row, index_t col) const noexcept {
    if (Width >= line || col % line == 0) __builtin_prefetch(data + row * stride + col, 0, 3);
  }
};

template <class Problem>
struct attend_decode {
  using A = typename Problem::sum_type;
  using C = typename Problem::cache_element;
  using V = vec<A>;
  using registers = cache_registers<A, C>;
  static constexpr index_t width = V::width;
  static constexpr int rows_at_once = width >= 4 ? 4 : 2;  // of a group
  static constexpr bool quantised = std::is_same_v<C, std::int8_t>;
  static constexpr A infinity = math_table<A>::infinity, log2_e = static_cast<A>(1.44269504088896340736);

  static index_t padded(index_t n) noexcept { return round_up(n, registers::size); }
  static index_t scratch_size(const Problem& p) noexcept { return p.group * (padded(p.d) + padded(p.d_v) + 2 * width); }

  // state[row of the group] = {maximum, sum, out [d_v]} over keys [begin, end) of a kv head.
  static void run(const Problem& p, index_t b, index_t kv, index_t begin, index_t end, A* state, A* scratch) noexcept {
    rows_state s{scratch, scratch + p.group * padded(p.d), nullptr, nullptr};
    s.level = s.out + p.group * padded(p.d_v);
    s.total = s.level + p.group * width;
    std::fill_n(s.q, p.group * (padded(p.d) + padded(p.d_v)), A{});
    std::fill_n(s.level, p.group * width, -infinity);
    std::fill_n(s.total, p.group * width, A{});
    for (index_t r = 0; r < p.group; ++r) {
      const auto* from = p.q.data + b * p.q.strides[0] + (kv * p.group + r) * p.q.strides[1];
      for (index_t c = 0; c < p.d; ++c)
        s.q[r * padded(p.d) + registers::place(c)] = static_cast<A>(from[c * p.q.strides[2]]) * static_cast<A>(p.scale);
    }
    const index_t row_bytes = std::max({p.d, p.d_v, index_t{1}}) * index_t{sizeof(C)};
    const index_t most = std::clamp<index_t>(round_up(decode_bytes / row_bytes, 16), 16, decode_keys);
    for (index_t j = begin; j < end;) {
      const auto keys = p.cache.run(b, kv, j);
      const index_t n = std::min(std::min(keys.count, end - j), most);
      auto next = keys;
      if (j + n < p.cache.length(b)) next = p.cache.run(b, kv, j + n);
      if (next.count < n) next = keys;  // rows beyond the end of a run are not asked for
      by_halves<rows_at_once>(p.group, [&](auto rows, index_t r) { block<rows>(p, keys, next, n, r, s); });
      j += n;
    }
    by_halves<rows_at_once>(p.group, [&](auto rows, index_t first) {
      for (index_t r = first; r < first + rows; ++r, state += p.d_v + 2) {
        const index_t lane = first * width + (r - first) * (width / rows);
        state[0] = s.level[lane];
        state[1] = 0;
        for (index_t l = 0; l < width / rows; ++l) state[1] += s.total[lane + l];
        for (index_t c = 0; c < p.d_v; ++c) state[2 + c] = s.out[r * padded(p.d_v) + registers::place(c)];
      }
    });
  }

 private:
  // Of each row of the group: its query, times the scale, and what it has summed. Rows that are taken together, from
  // row r on, keep their maxima and sums in the register at r * width, as their scores are.
  struct rows_state {
    A *q, *out, *level, *total;
  };

  // A register holds the scores of some rows against width / Rows keys: [rows][keys].
  template <int Rows, class Run>
  static void block(const Problem& p, const Run& keys, const Run& next, index_t n, index_t row,
                    const rows_state& s) noexcept {
    constexpr int of_register = static_cast<int>(width) / Rows, at_once = std::min(of_register, 4);
    static_assert(decode_keys % of_register == 0);
    alignas(64) A scores[Rows * decode_keys];
    const A* const q = s.q + row * padded(p.d);
    A* const out = s.out + row * padded(p.d_v);
    const rows_ahead<C> next_keys{next.k, next.k_stride}, next_values{next.v, next.v_stride};
    const index_t count = ceil_div(n, index_t{of_register});
    // Of each key, in every row; lanes beyond the last key see its.
    const auto spread = [&](const float* scales, index_t stride, index_t j) {
      A x[width];
      for (int l = 0; l < width; ++l) x[l] = static_cast<A>(scales[std::min(j + l % of_register, n - 1) * stride]);
      return V::load(x);
    };

    V top(-infinity);
    for (index_t g = 0; g < count; ++g) {
      const index_t j = g * of_register;
      V sums[width];
      MLKIT_UNROLL
      for (int i = 0; i < of_register; i += at_once)
        dots<Rows, at_once>(q, padded(p.d), keys.k, keys.k_stride, p.d, j + i, n, sums + i, next_keys);
      V x = sums_of(sums);
      if constexpr (quantised) x = x * spread(keys.k_scales, keys.k_scale_stride, j);
      if (p.softcap > 0) x = static_cast<A>(p.softcap) * tanh(x * static_cast<A>(1 / p.softcap));
      if (j + of_register > n) {
        typename V::native_int key{};
        MLKIT_UNROLL
        for (int l = 0; l < width; ++l) key[l] = l % of_register;
        x = V::select(key < (typename V::native_int{} + static_cast<typename V::int_type>(n - j)), x, V(-infinity));
      }
      x.store(scores + g * width);
      top = max(top, x);
    }

    const V before = V::load(s.level + row * width), now = max(before, largest_of<of_register>(top));
    const V level = V::select(now == V(-infinity), V::zero(), now);
    const V factor = exp2_bounded<false>((before - level) * log2_e);
    V total = V::load(s.total + row * width) * factor;
    for (index_t g = 0; g < count; ++g) {
      V x = exp2_bounded<false>((V::load(scores + g * width) - level) * log2_e);
      total += x;
      if constexpr (quantised) x = x * spread(keys.v_scales, keys.v_scale_stride, g * of_register);
      x.store(scores + g * width);
    }
    now.store(s.level + row * width);
    total.store(s.total + row * width);
    A factors[width];
    factor.store(factors);
    for (int r = 0; r < Rows; ++r)
      if (const A f = factors[r * of_register]; f != 1)  // most blocks raise no maximum
        for (index_t c = 0; c < padded(p.d_v); c += width) {
          A* x = out + r * padded(p.d_v) + c;
          (V::load(x) * f).store(x);
        }

    constexpr int most = 4;
    index_t c = 0;
    for (; c + most * width <= p.d_v; c += most * width)
      add_values<Rows, most / registers::count>(scores, keys.v, keys.v_stride, n, c, registers::size, out,
                                                padded(p.d_v), next_values);
    for (; c < p.d_v; c += registers::size)
      add_values<Rows, 1>(scores, keys.v, keys.v_stride, n, c, std::min(registers::size, p.d_v - c), out, padded(p.d_v),
                          next_values);
  }

  // sums[r * width / Rows + i] = q[r] . k[j + i] for Keys keys, the last one in the place of those beyond it; as
  // registers that are yet to be summed.
  template <int Rows, int Keys>
  static MLKIT_ALWAYS_INLINE void dots(const A* q, index_t q_stride, const C* k, index_t k_stride, index_t d, index_t j,
                                       index_t n, V* sums, const rows_ahead<C>& next) noexcept {
    const C* key[Keys];
    V x[Rows][Keys];
    MLKIT_UNROLL
    for (int i = 0; i < Keys; ++i) {
      key[i] = k + std::min(j + i, n - 1) * k_stride;
      MLKIT_UNROLL
      for (int r = 0; r < Rows; ++r) x[r][i] = V::zero();
    }
    const auto step = [&](index_t c, int some) {
      registers keys[Keys];
      MLKIT_UNROLL
      for (int i = 0; i < Keys; ++i) {
        keys[i] = registers::load(key[i] + c, some);
        next.template fetch<registers::size>(std::min(j + i, n - 1), c);
      }
      MLKIT_UNROLL
      for (int r = 0; r < Rows; ++r) {
        MLKIT_UNROLL
        for (int half = 0; half < registers::count; ++half) {
          const V left = V::load(q + r * q_stride + c + half * width);
          MLKIT_UNROLL
          for (int i = 0; i < Keys; ++i) x[r][i] = fma(left, keys[i].v[half], x[r][i]);
        }
      }
    };
    index_t c = 0;
    for (; c + registers::size <= d; c += registers::size) step(c, registers::size);
    if (c < d) step(c, static_cast<int>(d - c));
    MLKIT_UNROLL
    for (int r = 0; r < Rows; ++r) {
      MLKIT_UNROLL
      for (int i = 0; i < Keys; ++i) sums[r * (static_cast<int>(width) / Rows) + i] = x[r][i];
    }
  }

  // out[r][c...] += sum over keys of p[r][key] v[key][c...], for what `Loads` loads hold, the last one `last` elements.
  template <int Rows, int Loads>
  static MLKIT_ALWAYS_INLINE void add_values(const A* p, const C* v, index_t v_stride, index_t n, index_t c,
                                             index_t last, A* out, index_t out_stride,
                                             const rows_ahead<C>& next) noexcept {
    constexpr int of_register = static_cast<int>(width) / Rows, count = Loads * registers::count;
    V sums[Rows][count];
    out += c;
    MLKIT_UNROLL
    for (int r = 0; r < Rows; ++r) {
      MLKIT_UNROLL
      for (int i = 0; i < count; ++i) sums[r][i] = V::load(out + r * out_stride + i * width);
    }
    for (index_t j = 0; j < n; ++j) {
      registers values[Loads];
      MLKIT_UNROLL
      for (int i = 0; i < Loads; ++i) {
        const index_t at = c + i * registers::size;
        values[i] = registers::load(v + j * v_stride + at, static_cast<int>(i + 1 < Loads ? registers::size : last));
        next.template fetch<registers::size>(j, at);
      }
      const A* const weights = p + j / of_register * width + j % of_register;
      MLKIT_UNROLL
      for (int r = 0; r < Rows; ++r) {
        const V weight(weights[r * of_register]);
        MLKIT_UNROLL
        for (int i = 0; i < count; ++i)
          sums[r][i] = fma(weight, values[i / registers::count].v[i % registers::count], sums[r][i]);
      }
    }
    MLKIT_UNROLL
    for (int r = 0; r < Rows; ++r) {
      MLKIT_UNROLL
      for (int i = 0; i < count; ++i) sums[r][i].store(out + r * out_stride + i * width);
    }
  }
};

template <class Problem>
attention::detail::decode_kernels<Problem> decode_entry() noexcept {
  using kernel = attend_decode<Problem>;
  return {&kernel::scratch_size, &kernel::run};
}
