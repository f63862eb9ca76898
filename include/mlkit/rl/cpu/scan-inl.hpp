// Affine recurrences backward in time, with sequences, or parts of long ones, in the lanes of registers.
//
// A tile is scan_depth steps of as many sequences as a register has lanes. Where storage runs along time, tiles are
// transposed in registers; where it runs along the batch, they are read and written where they lie.
//
// A sequence is cut into parts of scan_part steps, counted from its start. What a part makes of the value behind it is
// composed to one map, and the value behind the part before is this map of it: so parts may be scanned one after
// another or all at once, and the bits are those of the sequence alone, wherever and beside whatever it lies. A map
// that is not finite says nothing, since the values may be (their factors' product is above the largest number): then
// it is the part's own first value, scanned step by step.

// How far ahead what is read is asked for, beyond the caches of a core, in lanes beside each other. Where storage runs
// along time, each step asks for a line of what is scanned next, row after row, as memory has it: what the steps
// themselves read next is in as many pages as there are lanes, too many for the processor to follow.
inline constexpr index_t lanes_ahead = 1024;
template <class T>
inline constexpr index_t line_elements = 64 / static_cast<index_t>(sizeof(T));

typedef std::uint8_t code_row __attribute__((vector_size(16)));
typedef std::uint8_t code_bytes __attribute__((vector_size(MLKIT_SET_BITS / 8)));

// The lanes in whose codes one of `bits` is set: a choice for each.
template <class T>
class lanes_with {
  using V = vec<T>;

 public:
#if MLKIT_SET_AVX512
  MLKIT_ALWAYS_INLINE lanes_with(code_row codes, int bits) noexcept
      : chosen_(_mm_test_epi8_mask((__m128i)codes, _mm_set1_epi8(static_cast<char>(bits)))) {}
  MLKIT_ALWAYS_INLINE V pick(V a, V b) const noexcept {
    if constexpr (sizeof(T) == 4)
      return V(_mm512_mask_blend_ps(chosen_, b.v, a.v));
    else
      return V(_mm512_mask_blend_pd(static_cast<__mmask8>(chosen_), b.v, a.v));
  }
  MLKIT_ALWAYS_INLINE bool any() const noexcept { return chosen_ != 0; }
  MLKIT_ALWAYS_INLINE std::uint16_t bits() const noexcept { return chosen_; }

 private:
  __mmask16 chosen_;
#else
  MLKIT_ALWAYS_INLINE lanes_with(code_row codes, int bits) noexcept : chosen_((widen(codes) & bits) != 0) {}
  MLKIT_ALWAYS_INLINE V pick(V a, V b) const noexcept { return V::select(chosen_, a, b); }
  MLKIT_ALWAYS_INLINE bool any() const noexcept {
#if MLKIT_SET_AVX2
    return _mm256_testz_si256((__m256i)chosen_, (__m256i)chosen_) == 0;
#else
    std::uint64_t halves[2];
    __builtin_memcpy(halves, &chosen_, sizeof halves);
    return (halves[0] | halves[1]) != 0;
#endif
  }

 private:
  using mask = typename V::native_int;
  static MLKIT_ALWAYS_INLINE mask widen(code_row c) noexcept {
#if MLKIT_SET_AVX2
    return (mask)(sizeof(T) == 4 ? _mm256_cvtepu8_epi32((__m128i)c) : _mm256_cvtepu8_epi64((__m128i)c));
#elif MLKIT_X86
    const __m128i zero = _mm_setzero_si128();
    const __m128i words = _mm_unpacklo_epi16(_mm_unpacklo_epi8((__m128i)c, zero), zero);
    return (mask)(sizeof(T) == 4 ? words : _mm_unpacklo_epi32(words, zero));
#else
    mask m;
    for (int i = 0; i < V::width; ++i) m[i] = c[i];
    return m;
#endif
  }
  mask chosen_;
#endif
};

// What becomes of values where episodes are done; codes hold step_truncated only where step_terminated is not set.
template <class T>
struct some_dones {
  using V = vec<T>;
  lanes_with<T> terminated, truncated, done;

  MLKIT_ALWAYS_INLINE explicit some_dones(code_row codes) noexcept
      : terminated(codes, step_terminated),
        truncated(codes, step_truncated),
        done(codes, step_terminated | step_truncated) {}
  // From flags, which are set where they are not 0.
  MLKIT_ALWAYS_INLINE some_dones(code_row ended, code_row cut_off) noexcept
      : terminated(ended, 0xff), truncated(cut_off, 0xff), done(ended | cut_off, 0xff) {}
  // The value of what follows the step: next, or that of the final observation, or 0 behind a terminal state.
  MLKIT_ALWAYS_INLINE V following(V next, V final_value) const noexcept {
    return terminated.pick(V::zero(), truncated.pick(final_value, next));
  }
  MLKIT_ALWAYS_INLINE V where_done(V a, V b) const noexcept { return done.pick(a, b); }
};
template <class T>
struct no_dones {
  using V = vec<T>;
  MLKIT_ALWAYS_INLINE V following(V next, V) const noexcept { return next; }
  MLKIT_ALWAYS_INLINE V where_done(V, V other) const noexcept { return other; }
};

// x_t = a x_{t+1} + b; a = 0 cuts: what x_{t+1} was, NaN or not, is not looked at.
template <class T>
MLKIT_ALWAYS_INLINE vec<T> apply_map(vec<T> a, vec<T> b, vec<T> x) noexcept {
  return fma(a, vec<T>::select(a == vec<T>::zero(), vec<T>::zero(), x), b);
}

// What a part makes of the value behind it: by its map, or where that is not finite `stepwise`.
template <class T>
MLKIT_ALWAYS_INLINE vec<T> front_of_part(vec<T> a, vec<T> b, vec<T> behind, vec<T> stepwise) noexcept {
  const vec<T> zero = vec<T>::zero(), zero_if_finite = fma(zero, a, zero * b);
  return vec<T>::select(zero_if_finite == zero, apply_map(a, b, behind), stepwise);
}

// Elements of 16 bytes: what shuffles within parts of registers move.
template <class T>
inline constexpr int block_width = 16 / static_cast<int>(sizeof(T));

// Alternating elements, or pairs of floats, of the lower and upper halves of each 16 bytes.
template <class T>
MLKIT_ALWAYS_INLINE void deal(vec<T> a, vec<T> b, vec<T>& low, vec<T>& high) noexcept {
#if MLKIT_SET_AVX512
  if constexpr (sizeof(T) == 4)
    low = vec<T>(_mm512_unpacklo_ps(a.v, b.v)), high = vec<T>(_mm512_unpackhi_ps(a.v, b.v));
  else
    low = vec<T>(_mm512_unpacklo_pd(a.v, b.v)), high = vec<T>(_mm512_unpackhi_pd(a.v, b.v));
#elif MLKIT_SET_AVX2
  if constexpr (sizeof(T) == 4)
    low = vec<T>(_mm256_unpacklo_ps(a.v, b.v)), high = vec<T>(_mm256_unpackhi_ps(a.v, b.v));
  else
    low = vec<T>(_mm256_unpacklo_pd(a.v, b.v)), high = vec<T>(_mm256_unpackhi_pd(a.v, b.v));
#else
  if constexpr (sizeof(T) == 4)
    low = __builtin_shufflevector(a.v, b.v, 0, 4, 1, 5), high = __builtin_shufflevector(a.v, b.v, 2, 6, 3, 7);
  else
    low = __builtin_shufflevector(a.v, b.v, 0, 2), high = __builtin_shufflevector(a.v, b.v, 1, 3);
#endif
}
MLKIT_ALWAYS_INLINE void deal_pairs(vec<float> a, vec<float> b, vec<float>& low, vec<float>& high) noexcept {
#if MLKIT_SET_AVX512
  const __m512d x = _mm512_castps_pd(a.v), y = _mm512_castps_pd(b.v);
  low = vec<float>(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)));
  high = vec<float>(_mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
#elif MLKIT_SET_AVX2
  const __m256d x = _mm256_castps_pd(a.v), y = _mm256_castps_pd(b.v);
  low = vec<float>(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)));
  high = vec<float>(_mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
#else
  low = __builtin_shufflevector(a.v, b.v, 0, 1, 4, 5);
  high = __builtin_shufflevector(a.v, b.v, 2, 3, 6, 7);
#endif
}

// Transposes 4 x 4 floats, or 2 x 2 doubles, in each 16 bytes of as many registers.
template <class T>
MLKIT_ALWAYS_INLINE void turn_blocks(vec<T>* r) noexcept {
  if constexpr (sizeof(T) == 4) {
    vec<T> s[4];
    deal(r[0], r[1], s[0], s[1]);
    deal(r[2], r[3], s[2], s[3]);
    deal_pairs(s[0], s[2], r[0], r[1]);
    deal_pairs(s[1], s[3], r[2], r[3]);
  } else {
    vec<T> low, high;
    deal(r[0], r[1], low, high);
    r[0] = low, r[1] = high;
  }
}

// Rows at equal distances.
template <class T>
struct spaced_rows {
  T* first;
  index_t step;
  MLKIT_ALWAYS_INLINE T* operator[](int i) const noexcept { return first + i * step; }
};

// 16 bytes from each of rows j, j + block_width, ...: loads into parts of a register cost no shuffles.
template <class T, class Rows>
MLKIT_ALWAYS_INLINE vec<T> load_blocks(const Rows& rows, int j, index_t offset) noexcept {
  constexpr int step = block_width<T>;
#if MLKIT_SET_AVX512
  if constexpr (sizeof(T) == 4) {
    __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(rows[j] + offset));
    x = _mm512_mask_broadcast_f32x4(x, 0x00f0, _mm_loadu_ps(rows[j + step] + offset));
    x = _mm512_mask_broadcast_f32x4(x, 0x0f00, _mm_loadu_ps(rows[j + 2 * step] + offset));
    return vec<T>(_mm512_mask_broadcast_f32x4(x, 0xf000, _mm_loadu_ps(rows[j + 3 * step] + offset)));
  } else {
    __m512d x = _mm512_castpd128_pd512(_mm_loadu_pd(rows[j] + offset));
    x = _mm512_mask_broadcast_f64x2(x, 0x0c, _mm_loadu_pd(rows[j + step] + offset));
    x = _mm512_mask_broadcast_f64x2(x, 0x30, _mm_loadu_pd(rows[j + 2 * step] + offset));
    return vec<T>(_mm512_mask_broadcast_f64x2(x, 0xc0, _mm_loadu_pd(rows[j + 3 * step] + offset)));
  }
#elif MLKIT_SET_AVX2
  if constexpr (sizeof(T) == 4)
    return vec<T>(_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[j] + offset)),
                                       _mm_loadu_ps(rows[j + step] + offset), 1));
  else
    return vec<T>(_mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(rows[j] + offset)),
                                       _mm_loadu_pd(rows[j + step] + offset), 1));
#else
  (void)step;
  return vec<T>::load(rows[j] + offset);
#endif
}

// store(k, x) for each k of a register's width, where x[i] = rows[i][offset + k].
template <class T, class Rows, class Store>
MLKIT_ALWAYS_INLINE void transpose_square(const Rows& rows, index_t offset, const Store& store) noexcept {
  constexpr int n = block_width<T>, blocks = vec<T>::width / n;
  vec<T> r[blocks][n];
  MLKIT_UNROLL
  for (int j = 0; j < n; ++j) {
    MLKIT_UNROLL
    for (int q = 0; q < blocks; ++q) r[q][j] = load_blocks<T>(rows, j, offset + q * n);
  }
  MLKIT_UNROLL
  for (int q = 0; q < blocks; ++q) {
    turn_blocks(r[q]);
    MLKIT_UNROLL
    for (int j = 0; j < n; ++j) store(q * n + j, r[q][j]);
  }
}

// Alternating bytes of the lower and upper halves of each 16 bytes.
#if MLKIT_X86
MLKIT_ALWAYS_INLINE void deal_bytes(code_bytes a, code_bytes b, code_bytes& low, code_bytes& high) noexcept {
#if MLKIT_SET_AVX512
  low = (code_bytes)_mm512_unpacklo_epi8((__m512i)a, (__m512i)b);
  high = (code_bytes)_mm512_unpackhi_epi8((__m512i)a, (__m512i)b);
#elif MLKIT_SET_AVX2
  low = (code_bytes)_mm256_unpacklo_epi8((__m256i)a, (__m256i)b);
  high = (code_bytes)_mm256_unpackhi_epi8((__m256i)a, (__m256i)b);
#else
  low = (code_bytes)_mm_unpacklo_epi8((__m128i)a, (__m128i)b);
  high = (code_bytes)_mm_unpackhi_epi8((__m128i)a, (__m128i)b);
#endif
}
#endif

// out[j][i] = rows[i][j], 16 rows of as many bytes as a register has.
MLKIT_ALWAYS_INLINE void transpose_bytes(const code_bytes* rows, std::uint8_t (*out)[16]) noexcept {
  constexpr int parts = static_cast<int>(sizeof(code_bytes)) / 16;
#if MLKIT_X86
  code_bytes r[16], s[16];
  MLKIT_UNROLL
  for (int i = 0; i < 16; ++i) r[i] = rows[i];
  MLKIT_UNROLL
  for (int round = 0; round < 4; ++round) {
    MLKIT_UNROLL
    for (int i = 0; i < 8; ++i) deal_bytes(r[i], r[i + 8], s[2 * i], s[2 * i + 1]);
    MLKIT_UNROLL
    for (int i = 0; i < 16; ++i) r[i] = s[i];
  }
  MLKIT_UNROLL
  for (int i = 0; i < 16; ++i) {  // times i, 16 + i, ...
    std::uint8_t lanes[parts][16];
    __builtin_memcpy(lanes, &r[i], sizeof lanes);
    MLKIT_UNROLL
    for (int j = 0; j < parts; ++j) __builtin_memcpy(out[16 * j + i], lanes[j], 16);
  }
#else
  for (int j = 0; j < 16 * parts; ++j)
    for (int i = 0; i < 16; ++i) out[j][i] = rows[i][j];
#endif
}

// map(rule, inputs, final value, dones, next): the map {a, b} of a step; next, what the step behind it carried, becomes
// what this one carries. emit(rule, inputs, final value, dones, next, x behind, x, outputs). seed(rule, end value): the
// x behind the last step; end(rule, end value, next): what is carried there.
template <class Rule>
struct recurrence;

template <class V>
struct step_map {
  V a, b;
};

template <class T, int Inputs, class F>
struct recurrence<rl::detail::affine_rule<T, Inputs, F>> {
  using V = vec<T>;
  using Rule = rl::detail::affine_rule<T, Inputs, F>;

  template <class Dones>
  static MLKIT_ALWAYS_INLINE step_map<V> map(const Rule& p, const V* in, V, const Dones&, V*) noexcept {
    T x[Inputs > 0 ? Inputs : 1][V::width], a[V::width], b[V::width];
    MLKIT_UNROLL
    for (int i = 0; i < Inputs; ++i) in[i].store(x[i]);
    MLKIT_SIMD
    for (int l = 0; l < V::width; ++l) {
      const auto m = call(p.f, x, l, std::make_index_sequence<static_cast<std::size_t>(Inputs)>{});
      a[l] = m.a, b[l] = m.b;
    }
    return {V::load(a), V::load(b)};
  }
  template <std::size_t... I>
  static MLKIT_ALWAYS_INLINE auto call(const F& f, const T (*x)[V::width], int l, std::index_sequence<I...>) noexcept {
    return f(x[I][l]...);
  }
  template <class Dones>
  static MLKIT_ALWAYS_INLINE void emit(const Rule&, const V*, V, const Dones&, const V*, V, V x, V* out) noexcept {
    out[0] = x;
  }
  static V seed(const Rule&, V end) noexcept { return end; }
  static void end(const Rule&, V, V*) noexcept {}
};

// Whether a byte has one of `bits` set; f(i) for each byte i that has.
MLKIT_ALWAYS_INLINE bool any_byte_with(code_bytes c, int bits) noexcept {
#if MLKIT_SET_AVX512
  return _mm512_test_epi8_mask((__m512i)c, _mm512_set1_epi8(static_cast<char>(bits))) != 0;
#elif MLKIT_SET_AVX2
  return _mm256_testz_si256((__m256i)c, _mm256_set1_epi8(static_cast<char>(bits))) == 0;
#else
  std::uint64_t halves[2];
  __builtin_memcpy(halves, &c, sizeof halves);
  return ((halves[0] | halves[1]) & 0x0101010101010101u * static_cast<unsigned>(bits)) != 0;
#endif
}
template <class F>
MLKIT_ALWAYS_INLINE void each_byte_with(code_bytes c, int bits, const F& f) noexcept {
#if MLKIT_SET_AVX512
  for (std::uint64_t found = _mm512_test_epi8_mask((__m512i)c, _mm512_set1_epi8(static_cast<char>(bits))); found != 0;
       found &= found - 1)
    f(__builtin_ctzll(found));
#else
  for (int i = 0; i < static_cast<int>(sizeof c); ++i)
    if (c[i] & bits) f(i);
#endif
}

MLKIT_ALWAYS_INLINE code_row row_of(const std::uint8_t* p, int n) noexcept {
  code_row c{};
  __builtin_memcpy(&c, p, static_cast<std::size_t>(n));
  return c;
}
// n bytes, fewer than a register has lanes; row_of is for a number that the compiler knows.
MLKIT_ALWAYS_INLINE code_row some_of_row(const std::uint8_t* p, int n) noexcept {
#if MLKIT_SET_AVX512
  return (code_row)_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1), p);
#else
  code_row c{};
  std::uint64_t bytes = 0;
  for (int i = 0; i < n; ++i) bytes |= std::uint64_t{p[i]} << (8 * i);
  __builtin_memcpy(&c, &bytes, sizeof bytes);
  return c;
#endif
}
// n bytes, or all of a register.
MLKIT_ALWAYS_INLINE code_bytes bytes_of(const std::uint8_t* p, int n) noexcept {
#if MLKIT_SET_AVX512
  return (code_bytes)_mm512_maskz_loadu_epi8(_bzhi_u64(~std::uint64_t{0}, static_cast<unsigned>(n)), p);
#else
  code_bytes c{};
  if (n >= static_cast<int>(sizeof c)) {
    __builtin_memcpy(&c, p, sizeof c);
    return c;
  }
  __builtin_memcpy(&c, p, static_cast<std::size_t>(n));
  return c;
#endif
}
MLKIT_ALWAYS_INLINE int any_bits(code_row c) noexcept {
  std::uint64_t halves[2];
  __builtin_memcpy(halves, &c, sizeof halves);
  std::uint64_t any = halves[0] | halves[1];
  any |= any >> 32, any |= any >> 16, any |= any >> 8;
  return static_cast<int>(any & 0xff);
}

// What a pass over tiles makes: the composed map of each lane, or the outputs, or both.
enum class scan_pass { compose, emit, both };
// What codes a tile has: none, of dones alone, or any.
enum class tile_codes { none, dones, any };

template <class Problem>
struct scan_kernel {
  using T = typename Problem::value_type;
  using Rule = typename Problem::rule_type;
  using V = vec<T>;
  using recurrence_t = recurrence<Rule>;
  template <class U>
  using stream = rl::detail::stream<U>;
  using unit = rl::detail::scan_unit;
  static constexpr int width = V::width, depth = static_cast<int>(scan_depth);
  static constexpr int inputs = Rule::inputs, outputs = Rule::outputs;
  static constexpr bool whole_lines = width * sizeof(T) == 64;
  static constexpr int carried = Rule::carried > 0 ? Rule::carried : 1;

  // What goes from tile to tile.
  struct lanes_state {
    V x, a, b, next[carried];
    code_row code;  // dones that a later step says of the one before it
  };

  // Sequences, or parts of them, to the lanes of a register, and where their steps 0 are. Lanes beyond `count` repeat
  // the first.
  struct alignas(64) lanes {
    index_t row[width], begin[width], steps[width], sequence[width];
    const T *in[inputs > 0 ? inputs : 1][width], *final_values[width];
    const std::uint8_t *terminated[width], *truncated[width], *mask[width];
    T* out[outputs][width];
    int count;
    index_t shortest, longest;  // steps

    // What follows from rows, begins and steps.
    void place(const Problem& p) noexcept {
      shortest = longest = steps[0];
      for (int i = 1; i < width; ++i) {
        shortest = steps[i] < shortest ? steps[i] : shortest;
        longest = steps[i] > longest ? steps[i] : longest;
      }
      each_stream(p, [&](const auto& s, auto** at) {
        for (int i = 0; i < width; ++i) at[i] = s.at(row[i], begin[i]);
      });
    }
    // The same where each row follows the one before it, and all have `n` steps from `first` on. What was just written
    // by halves is not read as a whole.
    void place_even(const Problem& p, index_t first_row, index_t first, index_t n) noexcept {
      shortest = longest = n;
      each_stream(p, [&](const auto& s, auto** at) {
        auto* const from = s.at(first_row, first);
        const index_t step = s.batch;
        MLKIT_SIMD
        for (int i = 0; i < width; ++i) at[i] = from + i * step;
      });
    }

   private:
    template <class F>
    MLKIT_ALWAYS_INLINE void each_stream(const Problem& p, const F& f) noexcept {
      for (int i = 0; i < inputs; ++i) f(p.in[i], in[i]);
      for (int o = 0; o < outputs; ++o)
        if (p.out[o]) f(p.out[o], out[o]);
      if (p.final_values) f(p.final_values, final_values);
      if (p.terminated) f(p.terminated, terminated);
      if (p.truncated) f(p.truncated, truncated);
      if (p.mask) f(p.mask, mask);
    }
  };

  // Of a square, a register's width of steps; codes and final values of a tile.
  struct alignas(64) scratch {
    T in[inputs > 0 ? inputs : 1][width][width];
    T out[outputs][width][width];
    T rows[width][width];
    T final_values[scan_depth][width];                        // where steps were truncated
    std::uint8_t code[scan_depth][16], any_code[scan_depth];  // of each lane, of all
    code_bytes code_rows[16];
  };

  // Steps of a tile: of each lane, of the longest, and those that all have.
  struct tile_steps {
    int of[width], top, all;

    tile_steps(const lanes& g, index_t offset) noexcept
        : top(static_cast<int>(std::min<index_t>(depth, g.longest - offset))),
          all(static_cast<int>(std::clamp<index_t>(g.shortest - offset, 0, depth))) {
      if (top == all) {
        std::fill_n(of, width, top);
        return;
      }
      for (int i = 0; i < width; ++i) of[i] = static_cast<int>(std::clamp<index_t>(g.steps[i] - offset, 0, depth));
    }
  };

  // The square of a matrix from step c of the tile at `offset` on, whose lanes' first steps are at `from`.
  static void read_square(const stream<const T>& s, const T* const* from, index_t offset, int c, const tile_steps& n,
                          T (*to)[width], scratch& w) noexcept {
    const index_t first = offset + c;
    if (s.time != 1) {
      for (int i = 0; i < width; ++i) {
        const T* at = from[i] + first * s.time;
        const int count = std::min(width, n.top - c);
        for (int k = 0; k < count; ++k, at += s.time) to[k][i] = c + k < n.of[i] ? *at : T{};
      }
      return;
    }
    if (c + width <= n.all) {
      transpose_square<T>(from, first, [&](int k, V x) { x.store(to[k]); });
      return;
    }
    for (int i = 0; i < width; ++i) {
      if (c + width <= n.of[i])
        V::load(from[i] + first).store(w.rows[i]);
      else if (c < n.of[i])
        V::load(from[i] + first, n.of[i] - c).store(w.rows[i]);
    }
    transpose_square<T>(spaced_rows<const T>{w.rows[0], width}, 0, [&](int k, V x) { x.store(to[k]); });
  }

  static void write_square(const stream<T>& s, T* const* to, index_t offset, int c, const tile_steps& n, int count,
                           bool past_caches, const T (*from)[width], scratch& w) noexcept {
    const index_t first = offset + c;
    if (s.time != 1) {
      for (int i = 0; i < count; ++i) {
        T* at = to[i] + first * s.time;
        const int some = std::min(width, n.of[i] - c);
        for (int k = 0; k < some; ++k, at += s.time) *at = from[k][i];
      }
      return;
    }
    if (c + width <= n.all && count == width) {
      if (past_caches)
        write_rows<true>(from, to, first);
      else
        write_rows<false>(from, to, first);
      return;
    }
    T* rows[width];
    for (int i = 0; i < width; ++i) rows[i] = w.rows[i];
    write_rows<false>(from, rows, 0);
    for (int i = 0; i < count; ++i) {
      if (c + width <= n.of[i])
        V::load(w.rows[i]).store(to[i] + first);
      else if (c < n.of[i])
        V::load(w.rows[i]).store(to[i] + first, n.of[i] - c);
    }
  }
  // A function of its own: what two of them load alike would be loaded before it is known which is called, and spilled.
  template <bool PastCaches>
  __attribute__((noinline)) static void write_rows(const T (*from)[width], T* const* to, index_t first) noexcept {
    transpose_square<T>(spaced_rows<const T>{from[0], width}, 0, [&](int i, V x) {
      if constexpr (PastCaches)
        x.store_past_caches(to[i] + first);
      else
        x.store(to[i] + first);
    });
  }

  // The codes of steps from their flags.
  template <class Bytes>
  static MLKIT_ALWAYS_INLINE Bytes codes_of(bool masks, Bytes terminated, Bytes truncated, Bytes mask) noexcept {
    const Bytes zero{};
    const Bytes ended = (Bytes)(terminated != zero);
    Bytes c = (ended & step_terminated) | (~ended & (Bytes)(truncated != zero) & step_truncated);
    if (masks) {
      const Bytes skipped = (Bytes)(mask == zero);
      c = (skipped & step_skipped) | (~skipped & c);
    }
    return c;
  }

  // The codes of `count` steps of a lane, the first at `offset`, or of as many as fit.
  static code_bytes codes_anywhere(const Problem& p, index_t row, index_t first, int count) noexcept {
    code_bytes c{};
    for (int k = 0; k < std::min(count, static_cast<int>(sizeof c)); ++k) {
      const index_t t = first + k;
      c[k] = static_cast<std::uint8_t>(p.counts(row, t) ? p.code(row, t) : step_skipped);
    }
    return c;
  }

  // The codes of a tile's steps, and the final values of those truncated.
  static void read_codes(const Problem& p, const lanes& g, index_t offset, const tile_steps& n, scratch& w) noexcept {
    constexpr int bytes = static_cast<int>(sizeof(code_bytes));
    for (int c = 0; c < n.top; c += bytes) {
      code_bytes some{};
      unsigned truncated_in = 0;  // lanes, taken one after another: a branch for each of them would often be missed
      if (p.flags_along_time && n.all == n.top) {
        const int count = n.top - c;
        const bool ends = static_cast<bool>(p.terminated), cuts = static_cast<bool>(p.truncated),
                   masks = static_cast<bool>(p.mask);
        const index_t at = offset + c;
        for (int i = 0; i < width; ++i) {
          const code_bytes codes = codes_of(masks, ends ? bytes_of(g.terminated[i] + at, count) : code_bytes{},
                                            cuts ? bytes_of(g.truncated[i] + at, count) : code_bytes{},
                                            masks ? bytes_of(g.mask[i] + at, count) : code_bytes{});
          w.code_rows[i] = codes;
          some |= codes;
          truncated_in |= static_cast<unsigned>(any_byte_with(codes, step_truncated)) << i;
        }
      } else {
        for (int i = 0; i < width; ++i) {
          const int count = n.of[i] - c;
          const index_t at = offset + c;
          code_bytes codes{};
          if (count > 0 && p.flags_along_time)
            codes =
                codes_of(static_cast<bool>(p.mask), p.terminated ? bytes_of(g.terminated[i] + at, count) : code_bytes{},
                         p.truncated ? bytes_of(g.truncated[i] + at, count) : code_bytes{},
                         p.mask ? bytes_of(g.mask[i] + at, count) : code_bytes{});
          else if (count > 0)
            codes = codes_anywhere(p, g.row[i], g.begin[i] + at, count);
          w.code_rows[i] = codes;
          some |= codes;
          truncated_in |= static_cast<unsigned>(any_byte_with(codes, step_truncated)) << i;
        }
      }
      __builtin_memcpy(w.any_code + c, &some, sizeof some);
      if (!any_byte_with(some, 0xff)) {
        __builtin_memset(w.code[c], 0, sizeof(code_bytes) * 16);
        continue;
      }
      transpose_bytes(w.code_rows, w.code + c);
      for (; p.final_values && !p.begins && truncated_in != 0; truncated_in &= truncated_in - 1) {
        const int i = __builtin_ctz(truncated_in);
        const T* final_values = g.final_values[i] + (offset + c) * p.final_values.time;
        each_byte_with(w.code_rows[i], step_truncated,
                       [&](int k) { w.final_values[c + k][i] = final_values[k * p.final_values.time]; });
      }
    }
    for (int i = 0; i < width && n.top > n.all; ++i)
      for (int k = n.of[i]; k < n.top; ++k) w.code[k][i] = step_skipped, w.any_code[k] |= step_skipped;
  }

  // What a step leaves where it is skipped, and elsewhere.
  struct keep_fresh {
    MLKIT_ALWAYS_INLINE V operator()(V fresh, V) const noexcept { return fresh; }
  };
  struct keep_unless {
    lanes_with<T> skipped;
    MLKIT_ALWAYS_INLINE V operator()(V fresh, V old) const noexcept { return skipped.pick(old, fresh); }
  };

  template <scan_pass Pass, class Dones, class Keep>
  static MLKIT_ALWAYS_INLINE void run_step(const Rule& rule, const V* now, V final_value, const Dones& dones,
                                           const Keep& keep, const V* before, V* then, V* next, V& x, V& a, V& b,
                                           V* result) noexcept {
    const auto map = recurrence_t::map(rule, now, final_value, dones, then);
    if constexpr (Pass != scan_pass::emit) {
      b = keep(apply_map(map.a, map.b, b), b);
      a = keep(map.a * V::select(map.a == V::zero(), V::zero(), a), a);
    }
    if constexpr (Pass != scan_pass::compose) {
      const V after = x;
      x = keep(apply_map(map.a, map.b, after), after);
      recurrence_t::emit(rule, now, final_value, dones, before, after, x, result);
      MLKIT_UNROLL
      for (int o = 0; o < outputs; ++o)
        if constexpr (!Rule::carries_through_mask) result[o] = keep(result[o], V::zero());
    }
    MLKIT_UNROLL
    for (int i = 0; i < Rule::carried; ++i) next[i] = keep(then[i], next[i]);
  }

  // Lines that steps ask for, one for each input and step.
  struct lines_ahead {
    const T* of[inputs > 0 ? inputs : 1];
    index_t step;
  };

  // Steps top - 1 to 0 of a square, with their codes and final values.
  template <scan_pass Pass, tile_codes Codes>
  static void run_steps(const Problem& p, int top, const std::uint8_t (*codes)[16], const T (*final_values)[width],
                        const lines_ahead& ahead, lanes_state& state, scratch& w) noexcept {
    const Rule rule = p.rule;  // its own copy, which no store can change
    const bool begins = p.begins;
    V x = state.x, a = state.a, b = state.b, next[carried];
    code_row later = state.code;
    MLKIT_UNROLL
    for (int i = 0; i < carried; ++i) next[i] = state.next[i];
    for (int k = top - 1; k >= 0; --k) {
      V now[inputs > 0 ? inputs : 1], then[carried], before[carried], result[outputs];
      MLKIT_UNROLL
      for (int i = 0; i < inputs; ++i) {
        now[i] = V::load(w.in[i][k]);
        __builtin_prefetch(ahead.of[i] + k * ahead.step, 0, 2);
      }
      MLKIT_UNROLL
      for (int i = 0; i < carried; ++i) then[i] = before[i] = next[i];
      const code_row own = row_of(codes[k], width);
      const V final_value = V::load(final_values[k]);
      if constexpr (Codes == tile_codes::none) {
        run_step<Pass>(rule, now, V::zero(), no_dones<T>{}, keep_fresh{}, before, then, next, x, a, b, result);
      } else if constexpr (Codes == tile_codes::dones) {
        run_step<Pass>(rule, now, final_value, some_dones<T>(own), keep_fresh{}, before, then, next, x, a, b, result);
      } else {
        const code_row code = begins ? said_later(own, later) : own;
        run_step<Pass>(rule, now, final_value, some_dones<T>(code), keep_unless{{own, step_skipped}}, before, then,
                       next, x, a, b, result);
      }
      if constexpr (Pass != scan_pass::compose) {
        MLKIT_UNROLL
        for (int o = 0; o < outputs; ++o) result[o].store(w.out[o][k]);
      }
    }
    state.x = x, state.a = a, state.b = b, state.code = later;
    MLKIT_UNROLL
    for (int i = 0; i < carried; ++i) state.next[i] = next[i];
  }

  // The codes of steps of which later ones have said so; of those before them, which are not skipped, these say theirs.
  static MLKIT_ALWAYS_INLINE code_row said_later(code_row own, code_row& later) noexcept {
    const code_row zero{}, bit = zero + static_cast<std::uint8_t>(step_skipped);  // of their type, for nvcc's sake
    const code_row code = later, skipped = (code_row)((own & bit) != zero);
    later = (skipped & later) | (~skipped & own);
    return code;
  }

  // What the steps of a square ask for, the first of which is step `step` of its part: the lines of what is scanned
  // next, a line a step and lane after lane.
  static lines_ahead look_ahead(const Problem& p, const lanes& next, index_t step, const scratch& w) noexcept {
    lines_ahead ahead{{}, 0};
    for (int i = 0; i < inputs; ++i) ahead.of[i] = w.in[i][0];
    const index_t lines = ceil_div(next.longest, line_elements<T>), lane = lines > 0 ? step / lines : width;
    if (lane >= width) return ahead;
    const index_t line = step - lane * lines;
    for (int i = 0; i < inputs; ++i) ahead.of[i] = next.in[i][lane] + line * line_elements<T>;
    ahead.step = line_elements<T>;
    if (line >= width) return ahead;
    const auto flags = [&](const stream<const std::uint8_t>& s, const std::uint8_t* at) {
      for (index_t k = 0; s && k < next.longest; k += line_elements<std::uint8_t>) __builtin_prefetch(at + k, 0, 2);
    };
    flags(p.terminated, next.terminated[lane]);
    flags(p.truncated, next.truncated[lane]);
    flags(p.mask, next.mask[lane]);
    return ahead;
  }

#if MLKIT_SET_AVX512
  // A rule whose maps have one constant factor, or 0 where an episode is done, and that carries an input, goes by rows:
  // constants of maps are found and outputs made along time, where dones are bytes side by side and what is carried is
  // a shift away; what is transposed is the constants and the x, and bits say where factors are 0.
  static constexpr bool goes_by_rows = sizeof(T) == 4 && requires { recurrence_t::carried_input; };

  // So many steps of a lane are written at once: memory takes lines beside each other faster than those of many pages.
  static constexpr index_t late_steps = 64;

  struct alignas(64) row_squares {
    T constants[2][width][width];             // by lanes: of this square and of the one before it in time
    T turned[width][width], x[width][width];  // by steps
    T behind[width];                          // the carried input of the steps behind
    std::uint16_t done[2][width];
    T late[width][late_steps + width];  // x by lanes, not yet written; a line more than a power of two from each other
  };

  // Lane i of a square's constants, from step `first` on.
  static MLKIT_ALWAYS_INLINE void constants_of_row(const Rule& rule, const lanes& g, int i, index_t first, bool ends,
                                                   bool cuts, bool finals, int buffer, row_squares& r) noexcept {
    V now[inputs], then[carried];
    MLKIT_UNROLL
    for (int j = 0; j < inputs; ++j) now[j] = V::load(g.in[j][i] + first);
    const V carry = now[recurrence_t::carried_input];
    then[0] = V((typename V::native)_mm512_alignr_epi32((__m512i)V::broadcast(r.behind + i).v, (__m512i)carry.v, 1));
    _mm_store_ss(r.behind + i, _mm512_castps512_ps128(carry.v));
    const some_dones<T> dones(ends ? row_of(g.terminated[i] + first, width) : code_row{},
                              cuts ? row_of(g.truncated[i] + first, width) : code_row{});
    V final_value = V::zero();
    // Where a step is terminated too, there need not be any.
    if (finals && dones.truncated.any()) final_value = V::load(g.final_values[i] + first);
    recurrence_t::map(rule, now, final_value, dones, then).b.store(r.constants[buffer][i]);
    r.done[buffer][i] = dones.done.bits();
  }

  // Steps [first, first + n) of all lanes.
  static void write_late(const Problem& p, const Rule& rule, const lanes& g, index_t first, index_t n,
                         const row_squares& r) noexcept {
    const bool past_caches = p.past_caches;
    bool written[outputs];
    for (int o = 0; o < outputs; ++o) written[o] = static_cast<bool>(p.out[o]);
    for (int i = 0; i < width; ++i)
      for (index_t k = 0; k < n; k += width) {
        V of_step[inputs], result[outputs];
        of_step[recurrence_t::carried_input] = V::load(g.in[recurrence_t::carried_input][i] + first + k);
        recurrence_t::emit(rule, of_step, V::zero(), no_dones<T>{}, nullptr, V::zero(), V::load(r.late[i] + k), result);
        MLKIT_UNROLL
        for (int o = 0; o < outputs; ++o) {
          if (!written[o]) continue;
          if (past_caches)
            result[o].store_past_caches(g.out[o][i] + first + k);
          else
            result[o].store(g.out[o][i] + first + k);
        }
      }
  }

  // Steps [0, count) of all lanes, of which there are as many as a register has; count is a multiple of them. A
  // square's constants are found beside the steps of the one behind it, which wait for each other.
  template <scan_pass Pass>
  static void run_rows(const Problem& p, const lanes& g, index_t count, const lanes* next, lanes_state& state,
                       scratch& w) noexcept {
    const Rule rule = p.rule;
    const bool ends = static_cast<bool>(p.terminated), cuts = static_cast<bool>(p.truncated),
               finals = static_cast<bool>(p.final_values);
    const __mmask16 passing = rule.decay == 0 ? 0 : 0xffff;
    const V decay(rule.decay);
    V x = state.x, a = state.a, b = state.b;
    row_squares r;
    state.next[0].store(r.behind);
    for (int i = 0; i < width; ++i) constants_of_row(rule, g, i, count - width, ends, cuts, finals, 0, r);
    int now = 0;
    for (index_t first = count - width; first >= 0; first -= width, now = 1 - now) {
      lines_ahead ahead{{}, 0};
      for (int i = 0; i < inputs; ++i) ahead.of[i] = w.in[i][0];
      if (next) ahead = look_ahead(p, *next, first, w);
      transpose_square<T>(spaced_rows<const T>{r.constants[now][0], width}, 0,
                          [&](int k, V y) { y.store(r.turned[k]); });
      __m256i dones = _mm256_load_si256(reinterpret_cast<const __m256i*>(r.done[now]));
      for (int i = 0; i < width; ++i) {
        MLKIT_UNROLL
        for (int j = 0; j < inputs; ++j) __builtin_prefetch(ahead.of[j] + i * ahead.step, 0, 2);
        if (first > 0) constants_of_row(rule, g, i, first - width, ends, cuts, finals, 1 - now, r);
        const int k = width - 1 - i;
        const __mmask16 passes = static_cast<__mmask16>(passing & ~_mm256_movepi16_mask(dones));
        dones = _mm256_add_epi16(dones, dones);
        const V constant = V::load(r.turned[k]);
        const auto passed = [&](V y) { return V(_mm512_maskz_mov_ps(passes, y.v)); };
        if constexpr (Pass != scan_pass::emit) {
          b = fma(decay, passed(b), constant);
          a = passed(decay * a);
        }
        if constexpr (Pass != scan_pass::compose) {
          x = fma(decay, passed(x), constant);
          x.store(r.x[k]);
        }
      }
      if constexpr (Pass != scan_pass::compose) {
        const index_t at = first % late_steps;
        transpose_square<T>(spaced_rows<const T>{r.x[0], width}, 0, [&](int i, V y) { y.store(r.late[i] + at); });
        if (at == 0) write_late(p, rule, g, first, std::min(late_steps, count - first), r);
      }
    }
    state.x = x, state.a = a, state.b = b;
    state.next[0] = V::load(r.behind);
  }
#endif

  // Steps [offset, offset + depth) of each lane, as far as it has them. next: what is scanned next, where it is asked
  // for beforehand.
  template <scan_pass Pass>
  static void run_tile(const Problem& p, const lanes& g, index_t offset, const lanes* next, lanes_state& state,
                       scratch& w) noexcept {
    if (g.longest <= offset) return;
    const tile_steps n(g, offset);
    if (n.all < n.top || p.terminated || p.truncated || p.mask)
      read_codes(p, g, offset, n, w);
    else
      __builtin_memset(w.code, 0, sizeof w.code), __builtin_memset(w.any_code, 0, sizeof w.any_code);
    for (int c = (n.top - 1) / width * width; c >= 0; c -= width) {
      const int top = std::min(width, n.top - c);
      lines_ahead ahead{{}, 0};
      for (int i = 0; i < inputs; ++i) ahead.of[i] = w.in[i][0];
      if (next) ahead = look_ahead(p, *next, offset + c, w);
      for (int i = 0; i < inputs; ++i) read_square(p.in[i], g.in[i], offset, c, n, w.in[i], w);
      int codes = any_bits(row_of(w.any_code + c, width));
      if (p.begins) {
        codes |= any_bits(state.code);
        if ((codes & step_truncated) && p.final_values)
          read_square(p.final_values, g.final_values, offset, c, n, w.final_values + c, w);
      }
      constexpr auto without = Pass == scan_pass::emit ? tile_codes::none : tile_codes::dones;
      if (codes == 0)
        run_steps<Pass, without>(p, top, w.code + c, w.final_values + c, ahead, state, w);
      else if (!p.begins && !(codes & step_skipped))
        run_steps<Pass, tile_codes::dones>(p, top, w.code + c, w.final_values + c, ahead, state, w);
      else
        run_steps<Pass, tile_codes::any>(p, top, w.code + c, w.final_values + c, ahead, state, w);
      if constexpr (Pass != scan_pass::compose)
        for (int o = 0; o < outputs; ++o)
          if (p.out[o]) write_square(p.out[o], g.out[o], offset, c, n, g.count, p.past_caches, w.out[o], w);
    }
  }

  // All steps of the lanes.
  template <scan_pass Pass>
  static void run_lanes(const Problem& p, const lanes& g, const lanes* next, lanes_state& state, scratch& w) noexcept {
    for (index_t offset = (ceil_div(g.longest, scan_depth) - 1) * scan_depth; offset >= 0; offset -= scan_depth) {
#if MLKIT_SET_AVX512
      if constexpr (goes_by_rows)
        if (const index_t rest = std::min(g.longest, offset + scan_depth);
            p.plain_rows && g.count == width && g.shortest >= rest && rest % width == 0) {
          run_rows<Pass>(p, g, rest, next, state, w);
          return;
        }
#endif
      run_tile<Pass>(p, g, offset, next, state, w);
    }
  }

  // The value that the scan has behind the sequence's end, and what it carries there.
  static void start_at_end(const Problem& p, const index_t* sequences, V end, lanes_state& state) noexcept {
    state.code = code_row{};
    for (int i = 0; i < width && p.begins; ++i) state.code[i] = static_cast<std::uint8_t>(p.last_code(sequences[i]));
    state.x = recurrence_t::seed(p.rule, end);
    recurrence_t::end(p.rule, end, state.next);
    state.a = V(T(1)), state.b = V::zero();
  }

  // What parts carry that end within their sequences: steps of up to two tokens behind each are taken, from the right.
  static void start_within(const Problem& p, const lanes& g, lanes_state& state, scratch& w) noexcept {
    const int looked_at = Rule::lookahead > (p.begins ? 1 : 0) ? Rule::lookahead : (p.begins ? 1 : 0);
    if (looked_at == 0) return;
    index_t at[2][width];
    for (int i = 0; i < width; ++i) {
      const index_t last = p.last(g.sequence[i]);
      index_t t = g.begin[i] + g.steps[i];
      for (int j = 0; j < looked_at; ++j) {
        while (t < last && !p.counts(g.row[i], t)) ++t;
        at[j][i] = t < last ? t++ : -1;
      }
    }
    // The nearest token is the tile's step 0.
    for (int j = 0; j < looked_at; ++j)
      for (int i = 0; i < width; ++i) {
        const index_t t = at[j][i], b = g.row[i];
        for (int s = 0; s < inputs; ++s) w.in[s][j][i] = t < 0 ? T{} : *p.in[s].at(b, t);
        const int code = t < 0 ? step_skipped : p.code(b, t);
        w.code[j][i] = static_cast<std::uint8_t>(code);
        w.final_values[j][i] = T{};
        // In the other convention a step is truncated by what the one behind it says, or the end.
        if (t >= 0 && p.final_values && (p.begins || (code & step_truncated)))
          w.final_values[j][i] = *p.final_values.at(b, t);
      }
    const V x = state.x;
    lines_ahead ahead{{}, 0};
    for (int s = 0; s < inputs; ++s) ahead.of[s] = w.in[s][0];
    run_steps<scan_pass::compose, tile_codes::any>(p, looked_at, w.code, w.final_values, ahead, state, w);
    state.x = x, state.a = V(T(1)), state.b = V::zero();
  }

  static void clear(scratch& w) noexcept {
    __builtin_memset(&w, 0, sizeof w);  // lanes and steps that nothing writes are read, and not used
  }

  static void fill(const Problem& p, lanes& g, const unit* units, index_t count) noexcept {
    g.count = static_cast<int>(count < width ? count : width);
    for (int i = 0; i < width; ++i) {
      const unit& u = units[i < g.count ? i : 0];
      g.row[i] = u.row, g.begin[i] = u.begin, g.steps[i] = u.end - u.begin, g.sequence[i] = u.sequence;
    }
    g.place(p);
  }

  // Part `part` of as many of `count` sequences as there are lanes.
  static void fill_part(const Problem& p, lanes& g, index_t first, index_t count, index_t part) noexcept {
    g.count = static_cast<int>(count < width ? count : width);
    if (!p.starts && g.count == width) {
      const index_t from = part * scan_part, steps = std::min(scan_part, p.time - from);
      MLKIT_SIMD
      for (int i = 0; i < width; ++i)
        g.row[i] = first + i, g.sequence[i] = first + i, g.begin[i] = from, g.steps[i] = steps;
      g.place_even(p, first, from, steps);
      return;
    }
    for (int i = 0; i < width; ++i) {
      const index_t s = first + (i < g.count ? i : 0), begin = p.first(s) + part * scan_part;
      g.row[i] = p.row(s), g.begin[i] = begin, g.sequence[i] = s;
      g.steps[i] = std::min(scan_part, p.last(s) - begin);
    }
    g.place(p);
  }

  // Sequences [first, end), a register of them at a time; the parts of each one after another.
  static void scan_sequences(const Problem& p, index_t first, index_t end) noexcept {
    if (p.beside) {
      scan_beside(p, first, end);
      return;
    }
    scratch w;
    clear(w);
    const auto last_part = [&](index_t s) {
      index_t parts = 1;
      for (index_t i = s; i < std::min(end, s + width) && p.longest > scan_part; ++i)
        parts = std::max(parts, ceil_div(p.last(i) - p.first(i), scan_part));
      return parts - 1;
    };
    lanes of[2];  // what is scanned, and what is next
    index_t part = last_part(first);
    fill_part(p, of[0], first, end - first, part);
    lanes_state state;
    int now = 0;
    bool at_end = true;
    for (index_t s = first; s < end; now = 1 - now) {
      const lanes& g = of[now];
      if (at_end) start_at_end(p, g.sequence, p.ends ? V::load(p.ends + s, g.count) : V::zero(), state);
      const index_t next = part > 0 ? s : s + width,
                    part_of_next = part > 0 || next >= end ? part - 1 : last_part(next);
      if (next < end) fill_part(p, of[1 - now], next, end - next, part_of_next);
      const lanes* ahead = p.far_reads && next < end ? &of[1 - now] : nullptr;
      const V behind = state.x;
      state.a = V(T(1)), state.b = V::zero();
      if (part > 0)
        run_lanes<scan_pass::both>(p, g, ahead, state, w);
      else
        run_lanes<scan_pass::emit>(p, g, ahead, state, w);
      if (part > 0) state.x = front_of_part(state.a, state.b, behind, state.x);
      at_end = part == 0;
      s = next, part = part_of_next;
    }
    finish_stores(p);
  }

  // What goes from step to step of sequences beside each other, in memory: as many as leave room for a row of each
  // matrix beside it in the first cache.
  static constexpr index_t strip_groups = 64 * 4 / (width * static_cast<index_t>(sizeof(T)) / 16);
  struct alignas(64) strip_state {
    lanes_state of[strip_groups];
    V behind[strip_groups];
    T none[strip_groups * width];  // zeros, for a row of a matrix that is not there
  };
  // The rows of a step's matrices; outputs may be null.
  struct step_rows {
    const T* in[inputs > 0 ? inputs : 1];
    const T* final_values;
    const std::uint8_t *terminated, *truncated, *mask;
    T* out[outputs];
  };

  // A step of a register of sequences beside each other, from `lane` on: of as many as there are lanes, or of `some`.
  template <scan_pass Pass, tile_codes Codes, bool Whole>
  static MLKIT_ALWAYS_INLINE void step_beside(const Problem& p, const Rule& rule, const step_rows& row, index_t lane,
                                              int some, bool past_caches, lanes_state& state) noexcept {
    const auto values = [&](const T* from) { return Whole ? V::load(from + lane) : V::load(from + lane, some); };
    const auto flags = [&](const std::uint8_t* from) {
      return Whole ? row_of(from + lane, width) : some_of_row(from + lane, some);
    };
    V now[inputs > 0 ? inputs : 1], then[carried], before[carried], next[carried], result[outputs];
    V x = state.x, a = state.a, b = state.b, final_value = V::zero();
    MLKIT_UNROLL
    for (int i = 0; i < inputs; ++i) now[i] = values(row.in[i]);
    MLKIT_UNROLL
    for (int i = 0; i < carried; ++i) next[i] = then[i] = before[i] = state.next[i];
    const code_row terminated = flags(row.terminated), truncated = flags(row.truncated);
    if constexpr (Codes == tile_codes::dones) {
      const some_dones<T> dones(terminated, truncated);
      if (dones.truncated.any()) final_value = values(row.final_values);
      run_step<Pass>(rule, now, final_value, dones, keep_fresh{}, before, then, next, x, a, b, result);
    } else {
      const code_row own = codes_of(static_cast<bool>(p.mask), terminated, truncated, flags(row.mask));
      const some_dones<T> dones(p.begins ? said_later(own, state.code) : own);
      if (dones.truncated.any()) final_value = values(row.final_values);
      run_step<Pass>(rule, now, final_value, dones, keep_unless{{own, step_skipped}}, before, then, next, x, a, b,
                     result);
    }
    MLKIT_UNROLL
    for (int o = 0; o < outputs; ++o) {
      if (!row.out[o]) continue;
      if (!Whole)
        result[o].store(row.out[o] + lane, some);
      else if (past_caches)
        result[o].store_past_caches(row.out[o] + lane);
      else
        result[o].store(row.out[o] + lane);
    }
    state.x = x;
    if constexpr (Pass == scan_pass::both) state.a = a, state.b = b;
    MLKIT_UNROLL
    for (int i = 0; i < Rule::carried; ++i) state.next[i] = next[i];
  }

  // Step t of sequences [first, first + count).
  template <scan_pass Pass, tile_codes Codes>
  static void row_beside(const Problem& p, index_t first, index_t count, index_t t, strip_state& strip) noexcept {
    const Rule rule = p.rule;
    const bool past_caches = whole_lines && p.past_caches;
    const index_t ahead = p.far_lanes ? std::min(t, ceil_div(lanes_ahead, count)) : 0;
    const auto values = [&](const stream<const T>& s) { return s ? s.at(first, t) : strip.none; };
    const auto flags = [&](const stream<const std::uint8_t>& s) {
      return s ? s.at(first, t) : reinterpret_cast<const std::uint8_t*>(strip.none);
    };
    step_rows row;
    MLKIT_UNROLL
    for (int i = 0; i < inputs; ++i) row.in[i] = values(p.in[i]);
    MLKIT_UNROLL
    for (int o = 0; o < outputs; ++o) row.out[o] = p.out[o] ? p.out[o].at(first, t) : nullptr;
    row.final_values = values(p.final_values);
    row.terminated = flags(p.terminated), row.truncated = flags(p.truncated), row.mask = flags(p.mask);
    index_t lane = 0;
    for (; lane + width <= count; lane += width) {
      if (ahead > 0) {
        MLKIT_UNROLL
        for (int i = 0; i < inputs; ++i) __builtin_prefetch(row.in[i] + lane - ahead * p.in[i].time, 0, 2);
        if (lane % 64 == 0) {
          __builtin_prefetch(row.terminated + lane - ahead * p.terminated.time, 0, 2);
          __builtin_prefetch(row.truncated + lane - ahead * p.truncated.time, 0, 2);
        }
      }
      step_beside<Pass, Codes, true>(p, rule, row, lane, width, past_caches, strip.of[lane / width]);
    }
    if (lane < count)
      step_beside<Pass, Codes, false>(p, rule, row, lane, static_cast<int>(count - lane), false,
                                      strip.of[lane / width]);
  }

  // Sequences [first, end) that lie beside each other in all matrices: a step of a strip of them at a time, as it lies.
  static void scan_beside(const Problem& p, index_t first, index_t end) noexcept {
    strip_state strip;
    __builtin_memset(strip.none, 0, sizeof strip.none);
    const bool any = p.begins || p.mask;
    for (index_t s = first; s < end; s += strip_groups * width) {
      const index_t count = std::min(strip_groups * width, end - s), groups = ceil_div(count, width);
      for (index_t j = 0; j < groups; ++j) {
        const index_t at = s + j * width, some = std::min<index_t>(width, end - at);
        index_t sequences[width];
        for (int i = 0; i < width; ++i) sequences[i] = at + (i < some ? i : 0);
        start_at_end(p, sequences, p.ends ? V::load(p.ends + at, static_cast<int>(some)) : V::zero(), strip.of[j]);
      }
      for (index_t part = ceil_div(p.time, scan_part) - 1; part >= 0; --part) {
        for (index_t j = 0; j < groups; ++j) {
          lanes_state& state = strip.of[j];
          strip.behind[j] = state.x;
          state.a = V(T(1)), state.b = V::zero();
        }
        for (index_t t = std::min((part + 1) * scan_part, p.time) - 1; t >= part * scan_part; --t) {
          if (part > 0 && any)
            row_beside<scan_pass::both, tile_codes::any>(p, s, count, t, strip);
          else if (part > 0)
            row_beside<scan_pass::both, tile_codes::dones>(p, s, count, t, strip);
          else if (any)
            row_beside<scan_pass::emit, tile_codes::any>(p, s, count, t, strip);
          else
            row_beside<scan_pass::emit, tile_codes::dones>(p, s, count, t, strip);
        }
        for (index_t j = 0; j < groups && part > 0; ++j) {
          lanes_state& state = strip.of[j];
          state.x = front_of_part(state.a, state.b, strip.behind[j], state.x);
        }
      }
    }
    finish_stores(p);
  }

  // The map of each of units [first, end), to a and b.
  static void compose_units(const Problem& p, const unit* units, index_t first, index_t end, T* a, T* b) noexcept {
    run_units<scan_pass::compose>(p, units, first, end, nullptr, a, b, nullptr);
  }

  // The outputs of units [first, end), behind which the scan has the values x.
  static void emit_units(const Problem& p, const unit* units, index_t first, index_t end, const T* x) noexcept {
    run_units<scan_pass::emit>(p, units, first, end, x, nullptr, nullptr, nullptr);
    finish_stores(p);
  }

  template <scan_pass Pass>
  static void run_units(const Problem& p, const unit* units, index_t first, index_t end, const T* x, T* a, T* b,
                        T* front) noexcept {
    scratch w;
    clear(w);
    lanes of[2];  // what is scanned, and what is next
    fill(p, of[0], units + first, end - first);
    int now = 0;
    for (index_t u = first; u < end; u += width, now = 1 - now) {
      const lanes& g = of[now];
      lanes_state state;
      V ends = V::zero();
      if (p.ends) {
        T of_lanes[width];
        for (int i = 0; i < width; ++i) of_lanes[i] = p.ends[g.sequence[i]];
        ends = V::load(of_lanes);
      }
      start_at_end(p, g.sequence, ends, state);
      start_within(p, g, state, w);
      if (x) state.x = V::load(x + u, g.count);
      const bool more = u + width < end;
      if (more) fill(p, of[1 - now], units + u + width, end - u - width);
      const lanes* next = p.far_reads && more ? &of[1 - now] : nullptr;
      run_lanes<Pass>(p, g, next, state, w);
      if constexpr (Pass == scan_pass::compose) {
        state.a.store(a + u, g.count);
        state.b.store(b + u, g.count);
      }
      if (front) state.x.store(front + (u - first), g.count);
    }
  }

  // The values behind each unit: those behind the next one of the sequence through its map. The parts of a sequence
  // stand in order; maps are those of all but the first of each.
  static void carry(const Problem& p, const unit* units, index_t count, index_t maps, const T* a, const T* b,
                    T* x) noexcept {
    for (index_t u = count - 1; u >= 0; --u) {
      if (u + 1 == count || units[u + 1].sequence != units[u].sequence) {
        recurrence_t::seed(p.rule, V(p.ends ? p.ends[units[u].sequence] : T{})).store(x + u, 1);
      } else {
        --maps;
        if (__builtin_isfinite(a[maps]) && __builtin_isfinite(b[maps]))
          apply_map(V(a[maps]), V(b[maps]), V(x[u + 1])).store(x + u, 1);
        else
          run_units<scan_pass::emit>(p, units, u + 1, u + 2, x, nullptr, nullptr, x + u);
      }
    }
  }

  static void finish_stores(const Problem& p) noexcept {
    if (p.past_caches) settle_stores();
  }
};

// Whether n numbers are all finite.
template <class T>
bool all_finite(const T* p, index_t n) noexcept {
  using V = vec<T>;
  using bits = typename V::native_int;
  const bits exponent = V(std::numeric_limits<T>::infinity()).bits();
  bits bad{};
  index_t i = 0;
  for (; i + 4 * V::width <= n; i += 4 * V::width) {
    MLKIT_UNROLL
    for (int j = 0; j < 4; ++j) bad |= (bits)((V::load(p + i + j * V::width).bits() & exponent) == exponent);
  }
  for (; i < n; i += V::width) {
    const int some = static_cast<int>(n - i < V::width ? n - i : V::width);
    bad |= (bits)((V::load(p + i, some).bits() & exponent) == exponent);
  }
  typename V::int_type found = 0;
  for (int j = 0; j < V::width; ++j) found |= bad[j];
  return found == 0;
}

inline bool any_byte(const std::uint8_t* p, index_t n) noexcept {
  std::uint8_t any = 0;
  MLKIT_SIMD
  for (index_t i = 0; i < n; ++i) any |= p[i];
  return any != 0;
}

template <class Problem>
rl::detail::scan_kernels<Problem> scan_entry() noexcept {
  using kernel = scan_kernel<Problem>;
  return {&kernel::scan_sequences,
          &kernel::compose_units,
          &kernel::emit_units,
          &kernel::carry,
          &all_finite<typename Problem::value_type>,
          &any_byte,
          kernel::width};
}
