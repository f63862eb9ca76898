// Rows of logits: maxima and sums of exponentials by chunks, and the gradient of what they give.

// The least exponent of which powers are taken: 2^x is 0 there and 0 times the exponent too. Powers that are subnormal
// would take many times as long, and logits of -inf are common.
template <class A>
inline constexpr A least_exponent = sizeof(A) == 4 ? A(-126) : A(-1022);

// 2^x for x <= 0, within 3 units in the last place; NaN of NaN. Not Exact: a power that is not above the least may be
// anything that is lost in a sum with 1.
template <bool Exact = true, class V>
MLKIT_ALWAYS_INLINE V exp2_of_nonpositive(V x) noexcept {
  using A = typename V::value_type;
  if constexpr (sizeof(A) == 8) {
    return V::select(x <= V(least_exponent<A>), V::zero(), exp2(x));
  } else {
    // Minimax fits of (2^f - 1) / f, of the error relative to 2^f.
#if MLKIT_SET_AVX512
    // For 0 <= f <= 1, as the instruction that scales takes the floor of x itself.
    constexpr float fit[] = {0x1.62e4bap-1f, 0x1.ebdb6ap-3f, 0x1.c91c10p-5f, 0x1.277c1cp-7f, 0x1.e96912p-10f};
    const V f = typename V::native(_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    const V y = fma(horner(f, fit), f, V(1.0f));
    if constexpr (!Exact) return typename V::native(_mm512_scalef_ps(y.v, x.v));
    const __mmask16 some = _mm512_cmp_ps_mask(x.v, V(least_exponent<A>).v, _CMP_NLE_UQ);
    return typename V::native(_mm512_maskz_scalef_ps(some, y.v, x.v));
#else
    // For |f| <= 1/2.
    constexpr float fit[] = {0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f, 0x1.5bba16p-10f};
    x = at_least(x, least_exponent<A>);
    const V n = round_to_integer(x), f = x - n;
    return V::select(x <= V(least_exponent<A>), V::zero(), fma(horner(f, fit), f, V(1.0f)) * power_of_two(n));
#endif
  }
}

// What follows from the states of `count` rows, whose logp is the token's logit at first; lanes along rows.
template <class A>
void finish_rows(index_t count, A inverse_temperature, rl::detail::row_block<A>& block) noexcept {
  using V = vec<A>;
  constexpr A infinity = math_table<A>::infinity, ln2 = math_table<A>::ln2;
  const V nothing = V::zero();
  for (index_t i = 0; i < count; i += V::width) {  // the block is a multiple of a register long
    const V top = V::load(block.top + i), sum = V::load(block.sum + i), token = V::load(block.logp + i);
    const auto impossible = sum == nothing;
    const V log_sum = log(sum);
    const V logp = V::select(impossible, V(-infinity), (token - top) * inverse_temperature - log_sum);
    logp.store(block.logp + i);
    const exp_parts<A> e = split_exp(at_least(logp, math_table<A>::exp_min));
    const V power = power_of_two(at_least(e.n, static_cast<A>(1 - math_table<A>::bias)));
    fma(e.expm1(), power, power - A(1)).store(block.less_one + i);
    scale_by_power(e.mantissa(), e.n).store(block.probability + i);
    log_sum.store(block.log_sum + i);
    V::select(impossible, V(-infinity), fma(top, V(inverse_temperature), log_sum)).store(block.lse + i);
    const V entropy = log_sum - V::load(block.weighted + i) * ln2 / sum;
    V::select(impossible, nothing, entropy).store(block.entropy + i);
  }
}

// dz of a row that is at `i` in a block, for a class: 2^x (constant + slope x) + shift, x = (z - top) log2(e) / tau.
// With nothing, 0, whatever z is.
template <class A>
struct gradient_curve {
  A top = 0, constant = 0, slope = 0, shift = 0;
  bool nothing = true;

  gradient_curve() = default;
  gradient_curve(const rl::detail::row_block<A>& block, index_t i, const rl::token_gradient<A>& g,
                 A inverse_temperature, index_t classes) noexcept
      : nothing((g.dlogp == 0 && g.dentropy == 0 && g.dmean == 0) || block.sum[i] == 0) {
    if (nothing) return;
    const A factor = -inverse_temperature / block.sum[i];
    top = block.top[i];
    constant = factor * (g.dlogp + g.dmean + g.dentropy * (block.entropy[i] - block.log_sum[i]));
    slope = factor * g.dentropy * math_table<A>::ln2;
    shift = inverse_temperature * g.dmean / static_cast<A>(classes);
    for (A* x : {&constant, &slope, &shift})
      if (std::isnan(*x))
        *x = math_table<A>::nan;  // without the low bits with which rounding to bf16 could leave no NaN
  }
};

// dz of the token itself, without the cancellation of 1 - p.
template <class A>
A token_slope(const rl::detail::row_block<A>& block, index_t i, const rl::token_gradient<A>& g, A inverse_temperature,
              index_t classes) noexcept {
  const A probability = block.probability[i];
  A dz = g.dlogp * -block.less_one[i] + g.dmean * (1 / static_cast<A>(classes) - probability);
  if (g.dentropy != 0 && probability > 0) dz -= g.dentropy * probability * (block.logp[i] + block.entropy[i]);
  return inverse_temperature * dz;
}

// Two registers of logits that stand together, in the order that costs least: bf16 are the halves of words, first those
// of even places and then those of odd ones.
template <class T>
struct logit_pair {
  using V = vec<accumulator_t<T>>;
  static constexpr index_t size = 2 * V::width;
  static constexpr bool in_words = std::is_same_v<T, bf16>;
  using words = typename V::native_uint;

  V first, second;

  static MLKIT_ALWAYS_INLINE logit_pair load(const T* z) noexcept {
    if constexpr (in_words) {
      words w;
      __builtin_memcpy(&w, z, sizeof w);
      return of_words(w);
    } else {
      return {V::load(z), V::load(z + V::width)};
    }
  }
  MLKIT_ALWAYS_INLINE void store(T* out) const noexcept {
    if constexpr (in_words) {
      const words w = to_words();
      __builtin_memcpy(out, &w, sizeof w);
    } else {
      first.store(out);
      second.store(out + V::width);
    }
  }
  // The first n of them, 0 < n < size; the rest read as minus infinity and are not touched in memory.
  static MLKIT_ALWAYS_INLINE logit_pair load(const T* z, index_t n) noexcept {
#if MLKIT_SET_AVX512
    if constexpr (in_words)
      return of_words((words)_mm512_mask_loadu_epi16(_mm512_set1_epi16(static_cast<short>(0xff80)), lanes(n), z));
#endif
    if constexpr (in_words) {
      T all[size];
      for (T& x : all) x = static_cast<T>(-math_table<float>::infinity);
      __builtin_memcpy(all, z, static_cast<std::size_t>(n) * sizeof(T));
      return load(all);
    } else {
      const index_t n_first = std::min<index_t>(n, V::width);
      return {some(z, n_first), some(z + n_first, n - n_first)};
    }
  }
  MLKIT_ALWAYS_INLINE void store(T* out, index_t n) const noexcept {
#if MLKIT_SET_AVX512
    if constexpr (in_words) return _mm512_mask_storeu_epi16(out, lanes(n), (__m512i)to_words());
#endif
    if constexpr (in_words) {
      T all[size];
      store(all);
      __builtin_memcpy(out, all, static_cast<std::size_t>(n) * sizeof(T));
    } else {
      const index_t n_first = std::min<index_t>(n, V::width);
      first.store(out, static_cast<int>(n_first));
      second.store(out + n_first, static_cast<int>(n - n_first));
    }
  }

 private:
  static MLKIT_ALWAYS_INLINE V some(const T* z, index_t n) noexcept {
    typename V::native_int lane{};
    MLKIT_UNROLL
    for (int l = 0; l < V::width; ++l) lane[l] = static_cast<typename V::int_type>(l);
    const auto counts = lane < (typename V::native_int{} + static_cast<typename V::int_type>(n));
    return V::select(counts, V::load(z, static_cast<int>(n)), V(-math_table<typename V::value_type>::infinity));
  }
#if MLKIT_SET_AVX512
  static MLKIT_ALWAYS_INLINE __mmask32 lanes(index_t n) noexcept {
    return _bzhi_u32(0xffffffffu, static_cast<unsigned>(n));
  }
#endif
  static MLKIT_ALWAYS_INLINE logit_pair of_words(words w) noexcept {
    using native = typename V::native;
    return {V((native)(w << 16)), V((native)(w & 0xffff0000u))};
  }
  // Rounded to nearest even; of a NaN the upper half must be one.
  MLKIT_ALWAYS_INLINE words to_words() const noexcept {
    return (rounded(first) >> 16) | (rounded(second) & 0xffff0000u);
  }
  static MLKIT_ALWAYS_INLINE words rounded(V x) noexcept {
    const words u = (words)x.v, up = u + 0x7fffu;
#if MLKIT_SET_AVX512
    const __mmask16 odd = _mm512_test_epi32_mask((__m512i)u, _mm512_set1_epi32(0x10000));
    return (words)_mm512_mask_add_epi32((__m512i)up, odd, (__m512i)up, _mm512_set1_epi32(1));
#else
    return up + ((u >> 16) & 1u);
#endif
  }
};

template <class T>
struct logit_rows {
  using A = accumulator_t<T>;
  using V = vec<A>;
  using problem = rl::detail::logits_problem<T>;
  using chunk_state = rl::detail::chunk_state<A>;
  using row_block = rl::detail::row_block<A>;
  using pair = logit_pair<T>;
  static constexpr int width = V::width;
  static constexpr int unrolled = 4;  // registers whose sums do not wait for each other
  static constexpr index_t chunk = rl::detail::chunk_classes;
  static constexpr A infinity = math_table<A>::infinity;

  // The states of chunks [first, last) of a row.
  static void scan(const problem& p, index_t row, index_t first, index_t last, chunk_state* states) noexcept {
    for (index_t c = first; c < last; ++c) {
      alignas(64) T gathered[chunk];
      const stretch at = stretch_of(p, row, c, gathered);
      states[c - first] = sums(p, at, largest(at), nullptr);
    }
  }

  // The sum of a row's logits.
  static A total(const problem& p, index_t row) noexcept {
    const T* z = p.row(row);
    V sum[unrolled];
    MLKIT_UNROLL
    for (int u = 0; u < unrolled; ++u) sum[u] = V::zero();
    index_t j = 0;
    if (p.class_stride == 1)
      for (; j + unrolled * width <= p.classes; j += unrolled * width) {
        MLKIT_UNROLL
        for (int u = 0; u < unrolled; ++u) sum[u] += V::load(z + j + u * width);
      }
    A rest = 0;
    for (; j < p.classes; ++j) rest += static_cast<A>(z[j * p.class_stride]);
    return across((sum[0] + sum[1]) + (sum[2] + sum[3]), sum_of_two{}) + rest;
  }

  // The state of two stretches of a row, in the order of the row.
  static chunk_state merge(const problem& p, const chunk_state& a, const chunk_state& b) noexcept {
    if (b.sum == 0) return a;  // false of NaN
    if (a.sum == 0) return b;
    chunk_state r{a.top > b.top ? a.top : b.top, 0, 0};
    for (const chunk_state* s : {&a, &b}) {
      const A down = (s->top - r.top) * p.scale;
      const A exponent = down < least_exponent<A> ? least_exponent<A> : down;
      A lanes[V::width];
      exp2_of_nonpositive(V(exponent)).store(lanes);
      r.sum += lanes[0] * s->sum;
      r.weighted += lanes[0] * (s->weighted + exponent * s->sum);
    }
    return r;
  }

  // rows[0, count), whole: their states and what follows from them. Rows of one chunk leave the powers of their classes
  // in `kept`, if that is given. Rows that a first-level cache holds stand side by side in each step, so that none
  // waits for what is to be known of another.
  static void measure(const problem& p, const index_t* rows, index_t count, row_block& block, A* kept) noexcept {
    constexpr index_t cached = 1 << 13;
    const bool in_place = p.class_stride == 1;
    const index_t beside = std::clamp<index_t>(cached / std::max<index_t>(1, p.classes), 1, rl::detail::block_rows);
    alignas(64) T gathered[chunk];
    A top[rl::detail::block_rows];
    for (index_t first = 0; first < count; first += beside) {
      const index_t last = std::min(count, first + beside);
      chunk_state all[rl::detail::block_rows];
      for (index_t i = first; i < last; ++i) all[i] = {-infinity, 0, 0};
      for (index_t c = 0; c * chunk < p.classes; ++c) {
        // A chunk's largest is found while the sums before it are still on their way: they do not wait for it then.
        const bool more = (c + 1) * chunk < p.classes;
        if (in_place && c == 0)
          for (index_t i = first; i < last; ++i) top[i] = largest(stretch_of(p, rows[i], c, gathered));
        for (index_t i = first; i < last; ++i) {
          const stretch at = stretch_of(p, rows[i], c, gathered);
          const A level = in_place ? top[i] : largest(at);
          if (in_place && more) top[i] = largest(stretch_of(p, rows[i], c + 1, gathered));
          const chunk_state one = sums(p, at, level, kept ? kept + i * kept_stride(p.classes) : nullptr);
          all[i] = c == 0 ? one : merge(p, all[i], one);
        }
      }
      for (index_t i = first; i < last; ++i) block.set(i, all[i]);
    }
    finish(p, rows, count, block);
  }
  static index_t kept_stride(index_t classes) noexcept { return round_up(classes, pair::size) + pair::size; }

  // rows[0, count) from the states of their chunks, those of a row one after another.
  static void collect(const problem& p, const index_t* rows, index_t count, const chunk_state* states,
                      row_block& block) noexcept {
    const index_t chunks = ceil_div(p.classes, chunk);
    for (index_t i = 0; i < count; ++i) {
      chunk_state all = states[i * chunks];
      for (index_t c = 1; c < chunks; ++c) all = merge(p, all, states[i * chunks + c]);
      block.set(i, all);
    }
    finish(p, rows, count, block);
  }

  // Classes [begin, end) of dz_j = 1/tau [dlogp (1[j = y] - p_j) - dentropy p_j (log p_j + H) + dmean (1/V - p_j)] for
  // the row that is at `i` in the block. begin is a multiple of a chunk. kept: the row's powers, or null.
  static void differentiate(const problem& p, index_t row, index_t begin, index_t end, const row_block& block,
                            index_t i, const rl::token_gradient<A>& g, const A* kept) noexcept {
    T* out = p.gradient_row(row);
    const gradient_curve<A> c(block, i, g, p.inverse_temperature, p.classes);
    const T* in = c.nothing ? nullptr : p.row(row);
    for (index_t at = begin; at < end; at += chunk) {
      const index_t n = std::min(chunk, end - at);
      T* to = out + at * p.gradient_class_stride;
      if (c.nothing) {
        for (index_t j = 0; j < n; ++j) to[j * p.gradient_class_stride] = T{};
        continue;
      }
      const T* from = in + at * p.class_stride;
      if (p.class_stride == 1 && p.gradient_class_stride == 1) {
        differentiate_chunk(p, from, n, c, kept, to);
      } else {
        alignas(64) T gathered[chunk];
        for (index_t j = 0; j < n; ++j) gathered[j] = from[j * p.class_stride];
        differentiate_chunk(p, gathered, n, c, kept, gathered);
        for (index_t j = 0; j < n; ++j) to[j * p.gradient_class_stride] = gathered[j];
      }
    }
    if (p.streams_gradient) settle_stores();
    const index_t y = p.token(row);
    if (c.nothing || y < begin || y >= end) return;
    out[y * p.gradient_class_stride] = static_cast<T>(token_slope(block, i, g, p.inverse_temperature, p.classes));
  }

 private:
  // Classes that stand one after another.
  struct stretch {
    const T* z;
    index_t n;
  };
  // Chunk c of a row: where it is, or gathered.
  static stretch stretch_of(const problem& p, index_t row, index_t c, T* gathered) noexcept {
    const index_t begin = c * chunk, n = std::min(chunk, p.classes - begin);
    const T* at = p.row(row) + begin * p.class_stride;
    if (p.class_stride == 1) return {at, n};
    for (index_t i = 0; i < n; ++i) gathered[i] = at[i * p.class_stride];
    return {gathered, n};
  }

  // f(j, u, the two registers of classes from j on), with minus infinity beyond the last; u counts to and fro.
  template <int Pairs, class F>
  static MLKIT_ALWAYS_INLINE void each_pair(const stretch& s, F&& f) noexcept {
    index_t j = 0;
    for (; j + Pairs * pair::size <= s.n; j += Pairs * pair::size) {
      MLKIT_UNROLL
      for (int u = 0; u < Pairs; ++u) f(j + u * pair::size, u, pair::load(s.z + j + u * pair::size));
    }
    for (; j + pair::size <= s.n; j += pair::size) f(j, 0, pair::load(s.z + j));
    if (j < s.n) f(j, 1, pair::load(s.z + j, s.n - j));
  }

  static A largest(const stretch& s) noexcept {
    constexpr int pairs = 4;
    V first[pairs], second[pairs];
    MLKIT_UNROLL
    for (int u = 0; u < pairs; ++u) first[u] = second[u] = V(-infinity);
    each_pair<pairs>(s, [&](index_t, int u, const pair& x) {
      first[u] = max(first[u], x.first);
      second[u] = max(second[u], x.second);
    });
    MLKIT_UNROLL
    for (int u = 0; u < pairs; ++u) first[u] = max(first[u], second[u]);
    return across(max(max(first[0], first[1]), max(first[2], first[3])), larger_of_two{});
  }

  static chunk_state sums(const problem& p, const stretch& s, A highest, A* kept) noexcept {
    if (p.with_entropy) return sums_of<true, true>(p, s, highest, kept);
    return kept ? sums_of<false, true>(p, s, highest, kept) : sums_of<false, false>(p, s, highest, kept);
  }
  template <bool Entropy, bool Exact>
  static chunk_state sums_of(const problem& p, const stretch& s, A highest, A* kept) noexcept {
    const V level(highest == -infinity ? A{} : highest), scale(p.scale);
    V sum[unrolled], weighted[unrolled];
    MLKIT_UNROLL
    for (int u = 0; u < unrolled; ++u) sum[u] = weighted[u] = V::zero();
    each_pair<unrolled / 2>(s, [&](index_t j, int u, const pair& z) MLKIT_RL_LOOP_BODY {
      const char* ahead = reinterpret_cast<const char*>(s.z + 2 * chunk + j);
      MLKIT_UNROLL
      for (index_t line = 0; line < index_t{sizeof(T)} * pair::size; line += 64) __builtin_prefetch(ahead + line, 0, 3);
      const V x = (z.first - level) * scale, y = (z.second - level) * scale;
      const V e = exp2_of_nonpositive<Exact>(x), f = exp2_of_nonpositive<Exact>(y);
      sum[2 * u] += e;
      sum[2 * u + 1] += f;
      if constexpr (Entropy) {
        weighted[2 * u] = fma(e, at_least(x, least_exponent<A>), weighted[2 * u]);
        weighted[2 * u + 1] = fma(f, at_least(y, least_exponent<A>), weighted[2 * u + 1]);
      }
      if (!Exact || !kept) return;
      e.store(kept + j);
      f.store(kept + j + width);
    });
    const auto total = [](const V* x) { return across((x[0] + x[1]) + (x[2] + x[3]), sum_of_two{}); };
    return {highest, total(sum), Entropy ? total(weighted) : A{}};
  }

  // To memory that is aligned for it; only what is as wide as a register's elements goes past the caches.
  static MLKIT_ALWAYS_INLINE void store_past_caches(V x, T* out) noexcept {
    if constexpr (std::is_same_v<T, A>)
      x.store_past_caches(out);
    else
      x.store(out);
  }

  static void differentiate_chunk(const problem& p, const T* z, index_t n, const gradient_curve<A>& c, const A* kept,
                                  T* out) noexcept {
    if (c.slope != 0)
      return kept ? differentiate_as<true, true>(p, z, n, c, kept, out)
                  : differentiate_as<true, false>(p, z, n, c, kept, out);
    return kept ? differentiate_as<false, true>(p, z, n, c, kept, out)
                : differentiate_as<false, false>(p, z, n, c, kept, out);
  }
  template <bool Curved, bool Kept>
  static void differentiate_as(const problem& p, const T* z, index_t n, const gradient_curve<A>& c, const A* kept,
                               T* out) noexcept {
    const V level(c.top), scale(p.scale), constant(c.constant), slope(c.slope), shift(c.shift);
    const auto at = [&](V x, index_t j) {
      x = (x - level) * scale;
      const V power = Kept ? V::load(kept + j) : exp2_of_nonpositive(x);
      return fma(power, Curved ? fma(at_least(x, least_exponent<A>), slope, constant) : constant, shift);
    };
    const auto both = [&](const pair& x, index_t j) { return pair{at(x.first, j), at(x.second, j + width)}; };
    index_t j = 0;
    constexpr std::uintptr_t alignment = sizeof(V) / sizeof(A) * sizeof(T);
    if (const std::uintptr_t past = reinterpret_cast<std::uintptr_t>(out) % alignment;
        p.streams_gradient && past % sizeof(T) == 0) {
      const index_t head = std::min(n, static_cast<index_t>((alignment - past) % alignment / sizeof(T)));
      if (head > 0) both(pair::load(z, head), 0).store(out, head);
      for (j = head; j + pair::size <= n; j += pair::size) {
        const pair dz = both(pair::load(z + j), j);
        store_past_caches(dz.first, out + j);
        store_past_caches(dz.second, out + j + width);
      }
    } else {
      for (; j + pair::size <= n; j += pair::size) both(pair::load(z + j), j).store(out + j);
    }
    if (j < n) both(pair::load(z + j, n - j), j).store(out + j, n - j);
  }

  static void finish(const problem& p, const index_t* rows, index_t count, row_block& block) noexcept {
    for (index_t i = 0; i < count; ++i)
      block.logp[i] = static_cast<A>(p.row(rows[i])[p.token(rows[i]) * p.class_stride]);
    finish_rows(count, p.inverse_temperature, block);
  }
};

template <class T>
rl::detail::logits_kernels<T> logits_entry() noexcept {
  using rows = logit_rows<T>;
  return {&rows::scan, &rows::measure, &rows::collect, &rows::differentiate, &rows::total, &rows::kept_stride};
}
