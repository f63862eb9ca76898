// Rows of logits: maxima and sums of exponentials by chunks, and the gradient of what they give.

// The least exponent of which powers are taken: 2^x is 0 there and 0 times the exponent too. Powers that are subnormal
// would take many times as long, and logits of -inf are common.
template <class A>
inline constexpr A least_exponent = sizeof(A) == 4 ? A(-126) : A(-1022);

// 2^x for least_exponent <= x <= 0, within 1.5 units in the last place; NaN of NaN.
template <class V>
MLKIT_ALWAYS_INLINE V exp2_of_nonpositive(V x) noexcept {
  using A = typename V::value_type;
  V y;
  if constexpr (sizeof(A) == 8) {
    y = exp2(x);
  } else {
    // Minimax fit of (2^f - 1) / f for |f| <= 1/2, of the error relative to 2^f.
    constexpr float fit[] = {0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f, 0x1.5bba16p-10f};
#if MLKIT_SET_AVX512
    const V n = typename V::native(_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    const V f = x - n;
    y = typename V::native(_mm512_scalef_ps(fma(horner(f, fit), f, V(1.0f)).v, n.v));
#else
    const V n = round_to_integer(x), f = x - n;
    y = fma(horner(f, fit), f, V(1.0f)) * power_of_two(n);
#endif
  }
  return V::select(x <= V(least_exponent<A>), V::zero(), y);
}

// All lanes by op(a, b) of two registers of one size, halves of x until one lane is left: vec::sum's order, without its
// way through memory, which rows of a few classes would feel.
template <class T, class Op>
MLKIT_ALWAYS_INLINE T across(vec<T> x, const Op& op) noexcept {
#if MLKIT_X86
  if constexpr (sizeof(T) == 4) {
#if MLKIT_SET_AVX512
    const __m256 h = (__m256)op(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
#elif MLKIT_SET_AVX2
    const __m256 h = x.v;
#endif
#if MLKIT_SET_AVX2
    __m128 q = (__m128)op(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
#else
    __m128 q = x.v;
#endif
    q = (__m128)op(q, _mm_movehl_ps(q, q));
    q = (__m128)op(q, _mm_shuffle_ps(q, q, 1));
    return _mm_cvtss_f32(q);
  } else {
#if MLKIT_SET_AVX512
    const __m256d h = (__m256d)op(_mm512_castpd512_pd256(x.v), _mm512_extractf64x4_pd(x.v, 1));
#elif MLKIT_SET_AVX2
    const __m256d h = x.v;
#endif
#if MLKIT_SET_AVX2
    __m128d q = (__m128d)op(_mm256_castpd256_pd128(h), _mm256_extractf128_pd(h, 1));
#else
    __m128d q = x.v;
#endif
    q = (__m128d)op(q, _mm_unpackhi_pd(q, q));
    return _mm_cvtsd_f64(q);
  }
#else
  T lanes[vec<T>::width];
  x.store(lanes);
  for (int half = vec<T>::width / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = op(lanes[i], lanes[i + half]);
  return lanes[0];
#endif
}
struct sum_of_two {
  template <class X>
  MLKIT_ALWAYS_INLINE X operator()(X a, X b) const noexcept {
    return a + b;
  }
};
struct larger_of_two {
  template <class X>
  MLKIT_ALWAYS_INLINE X operator()(X a, X b) const noexcept {
    return a > b ? a : b;
  }
};

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
    V::select(impossible, V(-infinity), (token - top) * inverse_temperature - log_sum).store(block.logp + i);
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
  }
};

// dz of the token itself, without the cancellation of 1 - p.
template <class A>
A token_slope(const rl::detail::row_block<A>& block, index_t i, const rl::token_gradient<A>& g, A inverse_temperature,
              index_t classes) noexcept {
  const A logp = block.logp[i], probability = std::exp(logp);
  A dz = g.dlogp * -std::expm1(logp) + g.dmean * (1 / static_cast<A>(classes) - probability);
  if (g.dentropy != 0 && probability > 0) dz -= g.dentropy * probability * (logp + block.entropy[i]);
  return inverse_temperature * dz;
}

template <class T>
struct logit_rows {
  using A = accumulator_t<T>;
  using V = vec<A>;
  using problem = rl::detail::logits_problem<T>;
  using chunk_state = rl::detail::chunk_state<A>;
  using row_block = rl::detail::row_block<A>;
  static constexpr int width = V::width;
  static constexpr int unrolled = 4;  // registers whose sums do not wait for each other
  static constexpr index_t chunk = rl::detail::chunk_classes;
  static constexpr A infinity = math_table<A>::infinity;

  // The states of chunks [first, last) of a row.
  static void scan(const problem& p, index_t row, index_t first, index_t last, chunk_state* states) noexcept {
    const T* logits = p.row(row);
    for (index_t c = first; c < last; ++c) {
      const index_t begin = c * chunk, n = std::min(chunk, p.classes - begin);
      const T* at = logits + begin * p.class_stride;
      if (p.class_stride == 1) {
        states[c - first] = p.with_entropy ? scan_chunk<true>(p, at, n) : scan_chunk<false>(p, at, n);
      } else {
        alignas(64) T gathered[chunk];
        for (index_t i = 0; i < n; ++i) gathered[i] = at[i * p.class_stride];
        states[c - first] = p.with_entropy ? scan_chunk<true>(p, gathered, n) : scan_chunk<false>(p, gathered, n);
      }
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

  // rows[0, count), whole: their states and what follows from them.
  static void measure(const problem& p, const index_t* rows, index_t count, row_block& block) noexcept {
    for (index_t i = 0; i < count; ++i) {
      chunk_state all{-infinity, 0, 0};
      for (index_t c = 0; c * chunk < p.classes; ++c) {
        chunk_state one;
        scan(p, rows[i], c, c + 1, &one);
        all = c == 0 ? one : merge(p, all, one);
      }
      block.set(i, all);
    }
    finish(p, rows, count, block);
  }

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
  // the row that is at `i` in the block. begin is a multiple of a chunk.
  static void differentiate(const problem& p, index_t row, index_t begin, index_t end, const row_block& block,
                            index_t i, const rl::token_gradient<A>& g) noexcept {
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
        differentiate_chunk(p, from, n, c, to);
      } else {
        alignas(64) T gathered[chunk];
        for (index_t j = 0; j < n; ++j) gathered[j] = from[j * p.class_stride];
        differentiate_chunk(p, gathered, n, c, gathered);
        for (index_t j = 0; j < n; ++j) to[j * p.gradient_class_stride] = gathered[j];
      }
    }
#if MLKIT_X86
    if (p.streams_gradient) _mm_sfence();  // what other threads read after this call has been written
#endif
    const index_t y = p.token(row);
    if (c.nothing || y < begin || y >= end) return;
    out[y * p.gradient_class_stride] = static_cast<T>(token_slope(block, i, g, p.inverse_temperature, p.classes));
  }

 private:
  // The first n lanes of x, and `rest` in the others.
  static MLKIT_ALWAYS_INLINE V first_lanes(V x, int n, A rest) noexcept {
    typename V::native_int lane{};
    MLKIT_UNROLL
    for (int l = 0; l < width; ++l) lane[l] = static_cast<typename V::int_type>(l);
    return V::select(lane < (typename V::native_int{} + static_cast<typename V::int_type>(n)), x, V(rest));
  }

  template <bool Entropy>
  static chunk_state scan_chunk(const problem& p, const T* z, index_t n) noexcept {
    constexpr index_t step = unrolled * width;
    V top[unrolled];
    MLKIT_UNROLL
    for (int u = 0; u < unrolled; ++u) top[u] = V(-infinity);
    index_t j = 0;
    for (; j + step <= n; j += step) {
      MLKIT_UNROLL
      for (int u = 0; u < unrolled; ++u) top[u] = max(top[u], V::load(z + j + u * width));
    }
    const index_t whole = j;
    for (; j < n; j += width) {
      const int some = static_cast<int>(std::min<index_t>(width, n - j));
      top[0] = max(top[0], first_lanes(V::load(z + j, some), some, -infinity));
    }
    const A highest = across(max(max(top[0], top[1]), max(top[2], top[3])), larger_of_two{});
    const V level(highest == -infinity ? A{} : highest), scale(p.scale);
    V sum[unrolled], weighted[unrolled];
    MLKIT_UNROLL
    for (int u = 0; u < unrolled; ++u) sum[u] = weighted[u] = V::zero();
    const auto add = [&](V x, int u) {
      x = at_least((x - level) * scale, least_exponent<A>);
      const V e = exp2_of_nonpositive(x);
      sum[u] += e;
      if constexpr (Entropy) weighted[u] = fma(e, x, weighted[u]);
    };
    for (j = 0; j < whole; j += step) {
      MLKIT_UNROLL
      for (int u = 0; u < unrolled; ++u) {
        __builtin_prefetch(z + chunk + j + u * width, 0, 3);
        add(V::load(z + j + u * width), u);
      }
    }
    for (; j < n; j += width) {
      const int some = static_cast<int>(std::min<index_t>(width, n - j));
      add(first_lanes(V::load(z + j, some), some, -infinity), 0);
    }
    const auto total = [](const V* x) { return across((x[0] + x[1]) + (x[2] + x[3]), sum_of_two{}); };
    return {highest, total(sum), Entropy ? total(weighted) : A{}};
  }

  // A register to memory that is aligned for it, past the caches where the machine can.
  static MLKIT_ALWAYS_INLINE void store_past_caches(V x, T* out) noexcept {
#if MLKIT_X86
    if constexpr (sizeof(T) == 4) {
#if MLKIT_SET_AVX512
      _mm512_stream_ps(out, x.v);
#elif MLKIT_SET_AVX2
      _mm256_stream_ps(out, x.v);
#else
      _mm_stream_ps(out, x.v);
#endif
    } else if constexpr (sizeof(T) == 8) {
#if MLKIT_SET_AVX512
      _mm512_stream_pd(out, x.v);
#elif MLKIT_SET_AVX2
      _mm256_stream_pd(out, x.v);
#else
      _mm_stream_pd(out, x.v);
#endif
    } else {
      x.store(out);
    }
#else
    x.store(out);
#endif
  }

  static void differentiate_chunk(const problem& p, const T* z, index_t n, const gradient_curve<A>& c,
                                  T* out) noexcept {
    const V level(c.top), scale(p.scale), constant(c.constant), slope(c.slope), shift(c.shift);
    const auto at = [&](V x) {
      x = at_least((x - level) * scale, least_exponent<A>);
      return fma(exp2_of_nonpositive(x), fma(x, slope, constant), shift);
    };
    const auto step = [&](index_t j, auto streamed) {
      V dz[unrolled];
      MLKIT_UNROLL
      for (int u = 0; u < unrolled; ++u) dz[u] = at(V::load(z + j + u * width));
      MLKIT_UNROLL
      for (int u = 0; u < unrolled; ++u) {
        if constexpr (streamed)
          store_past_caches(dz[u], out + j + u * width);
        else
          dz[u].store(out + j + u * width);
      }
    };
    index_t j = 0;
    constexpr index_t step_classes = unrolled * width;
    constexpr std::uintptr_t alignment = sizeof(V) / sizeof(A) * sizeof(T);
    if (const std::uintptr_t past = reinterpret_cast<std::uintptr_t>(out) % alignment;
        p.streams_gradient && past % sizeof(T) == 0) {
      const index_t head = std::min(n, static_cast<index_t>((alignment - past) % alignment / sizeof(T)));
      if (head > 0) at(V::load(z, static_cast<int>(head))).store(out, static_cast<int>(head));
      for (j = head; j + step_classes <= n; j += step_classes) step(j, std::true_type{});
    } else {
      for (; j + step_classes <= n; j += step_classes) step(j, std::false_type{});
    }
    for (; j < n; j += width) {
      const int some = static_cast<int>(std::min<index_t>(width, n - j));
      at(V::load(z + j, some)).store(out + j, some);
    }
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
  return {&rows::scan, &rows::measure, &rows::collect, &rows::differentiate, &rows::total};
}
