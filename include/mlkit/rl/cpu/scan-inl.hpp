// Affine recurrences backward in time, with sequences, or parts of long ones, in the lanes of registers.
//
// A tile is scan_depth steps of as many sequences as a register has lanes. Where storage runs along time, tiles are
// transposed in registers; where it runs along the batch, they are read and written where they lie.
//
// A sequence is cut into parts of scan_part steps, counted from its start. What a part makes of the value behind it is
// composed to one map, and the value behind the part before is this map of it: so parts may be scanned one after
// another or all at once, and the bits are those of the sequence alone, wherever and beside whatever it lies.

// Twice the steps of a tile, in steps ahead of it: where rows are read along time, each from a page of its own.
inline constexpr index_t scan_ahead = 4 * scan_depth;

typedef std::uint8_t code_row __attribute__((vector_size(16)));

// The codes of a step's lanes as integers of the width of T.
template <class T>
MLKIT_ALWAYS_INLINE typename vec<T>::native_int widen_codes(const std::uint8_t* p) noexcept {
  typedef std::uint8_t few __attribute__((vector_size(vec<T>::width)));
  few c;
  __builtin_memcpy(&c, p, sizeof c);
  return __builtin_convertvector(c, typename vec<T>::native_int);
}

// What becomes of values where episodes are done; codes hold step_truncated only where step_terminated is not set.
template <class T>
struct some_dones {
  using V = vec<T>;
  using mask = typename V::native_int;
  mask terminated, truncated;

  MLKIT_ALWAYS_INLINE explicit some_dones(mask code) noexcept
      : terminated((code & step_terminated) != 0), truncated((code & step_truncated) != 0) {}
  // The value of what follows the step: next, or that of the final observation, or 0 behind a terminal state.
  MLKIT_ALWAYS_INLINE V following(V next, V final_value) const noexcept {
    return V::select(terminated, V::zero(), V::select(truncated, final_value, next));
  }
  MLKIT_ALWAYS_INLINE V where_done(V done, V other) const noexcept {
    return V::select(terminated | truncated, done, other);
  }
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

template <class T>
MLKIT_ALWAYS_INLINE void interleave(vec<T> a, vec<T> b, vec<T>& low, vec<T>& high) noexcept {
  constexpr int w = vec<T>::width;
  if constexpr (w == 2) {
    low = __builtin_shufflevector(a.v, b.v, 0, 2);
    high = __builtin_shufflevector(a.v, b.v, 1, 3);
  } else if constexpr (w == 4) {
    low = __builtin_shufflevector(a.v, b.v, 0, 4, 1, 5);
    high = __builtin_shufflevector(a.v, b.v, 2, 6, 3, 7);
  } else if constexpr (w == 8) {
    low = __builtin_shufflevector(a.v, b.v, 0, 8, 1, 9, 2, 10, 3, 11);
    high = __builtin_shufflevector(a.v, b.v, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    low = __builtin_shufflevector(a.v, b.v, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    high = __builtin_shufflevector(a.v, b.v, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
}

// Lane j of register i becomes lane i of register j: each round deals the registers like two halves of a pack of cards.
template <class T>
MLKIT_ALWAYS_INLINE void transpose_registers(vec<T>* r) noexcept {
  constexpr int w = vec<T>::width;
  MLKIT_UNROLL
  for (int round = 1; round < w; round *= 2) {
    vec<T> s[w];
    MLKIT_UNROLL
    for (int i = 0; i < w / 2; ++i) interleave(r[i], r[i + w / 2], s[2 * i], s[2 * i + 1]);
    MLKIT_UNROLL
    for (int i = 0; i < w; ++i) r[i] = s[i];
  }
}

// out[j][i] = rows[i][j], 16 x 16 bytes.
MLKIT_ALWAYS_INLINE void transpose_bytes(const std::uint8_t (*rows)[16], std::uint8_t (*out)[16]) noexcept {
#if MLKIT_X86
  __m128i r[16], s[16];
  MLKIT_UNROLL
  for (int i = 0; i < 16; ++i) r[i] = _mm_load_si128(reinterpret_cast<const __m128i*>(rows[i]));
  MLKIT_UNROLL
  for (int round = 0; round < 4; ++round) {
    MLKIT_UNROLL
    for (int i = 0; i < 8; ++i) {
      s[2 * i] = _mm_unpacklo_epi8(r[i], r[i + 8]);
      s[2 * i + 1] = _mm_unpackhi_epi8(r[i], r[i + 8]);
    }
    MLKIT_UNROLL
    for (int i = 0; i < 16; ++i) r[i] = s[i];
  }
  MLKIT_UNROLL
  for (int i = 0; i < 16; ++i) _mm_store_si128(reinterpret_cast<__m128i*>(out[i]), r[i]);
#else
  for (int j = 0; j < 16; ++j)
    for (int i = 0; i < 16; ++i) out[j][i] = rows[i][j];
#endif
}

// A store past the caches, of a register that lies on its own size.
template <class T>
MLKIT_ALWAYS_INLINE void stream_register(T* p, vec<T> x) noexcept {
#if MLKIT_SET_AVX512
  if constexpr (sizeof(T) == 4)
    _mm512_stream_ps(p, x.v);
  else
    _mm512_stream_pd(p, x.v);
#elif MLKIT_SET_AVX2
  if constexpr (sizeof(T) == 4)
    _mm256_stream_ps(p, x.v);
  else
    _mm256_stream_pd(p, x.v);
#elif MLKIT_X86
  if constexpr (sizeof(T) == 4)
    _mm_stream_ps(p, x.v);
  else
    _mm_stream_pd(p, x.v);
#else
  x.store(p);
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

// What a pass over tiles makes: the composed map of each lane, or the outputs, or both.
enum class scan_pass { compose, emit, both };

template <class Problem>
struct scan_kernel {
  using T = typename Problem::value_type;
  using Rule = typename Problem::rule_type;
  using V = vec<T>;
  using code_t = typename V::native_int;
  using recurrence_t = recurrence<Rule>;
  template <class U>
  using stream = rl::detail::stream<U>;
  using unit = rl::detail::scan_unit;
  static constexpr int width = V::width, depth = static_cast<int>(scan_depth);
  static constexpr int inputs = Rule::inputs, outputs = Rule::outputs;
  static constexpr int carried = Rule::carried > 0 ? Rule::carried : 1;

  // What goes from tile to tile.
  struct lanes_state {
    V x, a, b, next[carried];
    code_t code;  // dones that a later step says of the one before it
  };

  // Sequences, or parts of them, to the lanes of a register. Lanes beyond `count` repeat the first.
  struct lanes {
    int count;
    bool beside;  // consecutive rows of a matrix, with the same steps
    unit of[width];
  };

  struct alignas(64) scratch {
    T in[inputs > 0 ? inputs : 1][scan_depth][width];
    T final_values[scan_depth][width];
    T out[outputs][scan_depth][width];
    std::uint8_t code[scan_depth][16], flags[scan_depth][16], rows[16][16];
  };

  // Where the tile of a stream is found: step k at data + k * step.
  template <class U>
  struct tile_of {
    U* data;
    index_t step;
  };

  // The tile of a matrix from step `offset` of each lane, n[i] steps in lane i, `top` at most.
  static tile_of<const T> read_tile(const stream<const T>& s, const lanes& g, index_t offset, const int* n, int top,
                                    bool whole, T (*to)[width]) noexcept {
    if (g.beside && s.batch == 1) {
      const T* from = s.at(g.of[0].row, g.of[0].begin + offset);
      if (g.count == width) return {from, s.time};
      for (int k = 0; k < top; ++k) V::load(from + k * s.time, g.count).store(to[k]);
      return {to[0], width};
    }
    if (s.time != 1) {
      for (int i = 0; i < width; ++i) {
        const T* from = s.at(g.of[i].row, g.of[i].begin + offset);
        for (int k = 0; k < n[i]; ++k) to[k][i] = from[k * s.time];
        for (int k = n[i]; k < top; ++k) to[k][i] = T{};
      }
      return {to[0], width};
    }
    const T* from[width];
    for (int i = 0; i < width; ++i) from[i] = s.at(g.of[i].row, g.of[i].begin + offset);
    for (int c = 0; c < top; c += width) {
      V r[width];
      if (whole) {
        MLKIT_UNROLL
        for (int i = 0; i < width; ++i) r[i] = V::load(from[i] + c);
      } else {
        for (int i = 0; i < width; ++i) {
          const int some = n[i] - c;
          r[i] = some <= 0 ? V::zero() : V::load(from[i] + c, some < width ? some : width);
        }
      }
      transpose_registers(r);
      MLKIT_UNROLL
      for (int j = 0; j < width; ++j) r[j].store(to[c + j]);
    }
    return {to[0], width};
  }

  // Asks for what the tile `scan_ahead` steps earlier will read.
  template <class U>
  static void fetch_tile(const stream<U>& s, const lanes& g, index_t offset) noexcept {
    if (s.time != 1 || offset < scan_ahead) return;
    constexpr index_t line = 64 / index_t{sizeof(U)};
    if (line > scan_depth && offset % line != 0) return;
    MLKIT_UNROLL
    for (int i = 0; i < width; ++i) {
      const U* at = s.at(g.of[i].row, g.of[i].begin + offset - scan_ahead);
      for (index_t c = 0; c < scan_depth; c += line) __builtin_prefetch(at + c, 0, 3);
    }
  }

  // The same for flags, lane by lane in rows of 16 bytes. Lanes beyond the last are 0.
  static void read_flags(const stream<const std::uint8_t>& s, const lanes& g, index_t offset, const int* n, int top,
                         scratch& w) noexcept {
    if (g.beside && s.batch == 1) {
      const std::uint8_t* from = s.at(g.of[0].row, g.of[0].begin + offset);
      for (int k = 0; k < top; ++k) {
        if (g.count == width)
          __builtin_memcpy(w.flags[k], from + k * s.time, width);
        else
          for (int i = 0; i < g.count; ++i) w.flags[k][i] = from[k * s.time + i];
      }
      return;
    }
    if (s.time != 1) {
      for (int i = 0; i < g.count; ++i) {
        const std::uint8_t* from = s.at(g.of[i].row, g.of[i].begin + offset);
        for (int k = 0; k < n[i]; ++k) w.flags[k][i] = from[k * s.time];
      }
      return;
    }
    for (int i = 0; i < g.count; ++i) {
      const std::uint8_t* from = s.at(g.of[i].row, g.of[i].begin + offset);
      if (n[i] == depth)
        __builtin_memcpy(w.rows[i], from, 16);
      else
        for (int k = 0; k < n[i]; ++k) w.rows[i][k] = from[k];
    }
    transpose_bytes(w.rows, w.flags);
  }

  static MLKIT_ALWAYS_INLINE code_row row_of(const std::uint8_t* p) noexcept {
    code_row c;
    __builtin_memcpy(&c, p, sizeof c);
    return c;
  }

  // The codes of a tile's steps; all of them in one.
  static int read_codes(const Problem& p, const lanes& g, index_t offset, const int* n, int top, bool even,
                        scratch& w) noexcept {
    const code_row zero{};
    code_row all{};
    bool first = true;
    const auto add = [&](const stream<const std::uint8_t>& s, bool set, int bit) {
      if (!s) return;
      read_flags(s, g, offset, n, top, w);
      for (int k = 0; k < top; ++k) {
        const code_row flags = row_of(w.flags[k]);
        const code_row chosen = (code_row)(set ? flags != zero : flags == zero);
        code_row c = chosen & (zero + static_cast<std::uint8_t>(bit));
        if (!first) c |= row_of(w.code[k]);
        __builtin_memcpy(w.code[k], &c, sizeof c);
      }
      first = false;
    };
    add(p.terminated, true, step_terminated);
    add(p.truncated, true, step_truncated);
    add(p.mask, false, step_skipped);
    for (int k = 0; k < top; ++k) {
      code_row c = first ? zero : row_of(w.code[k]);
      const code_row ended = (code_row)((c & step_terminated) != zero);
      c &= ~(ended & step_truncated);  // what is terminated needs no final value
      if (p.mask) {
        const code_row skipped = (code_row)((c & step_skipped) != zero);
        c = (skipped & step_skipped) | (~skipped & c);
      }
      if (!even)
        for (int i = 0; i < width; ++i) c[i] = k < n[i] ? c[i] : static_cast<std::uint8_t>(step_skipped);
      __builtin_memcpy(w.code[k], &c, sizeof c);
      if (width < 16)
        for (int i = width; i < 16; ++i) c[i] = 0;
      all |= c;
    }
    std::uint64_t halves[2];
    __builtin_memcpy(halves, &all, sizeof halves);
    std::uint64_t any = halves[0] | halves[1];
    any |= any >> 32, any |= any >> 16, any |= any >> 8;
    return static_cast<int>(any & 0xff);
  }

  // What a step leaves where it is skipped, and elsewhere.
  struct keep_fresh {
    MLKIT_ALWAYS_INLINE V operator()(V fresh, V) const noexcept { return fresh; }
  };
  struct keep_unless {
    code_t skipped;
    MLKIT_ALWAYS_INLINE V operator()(V fresh, V old) const noexcept { return V::select(skipped, old, fresh); }
  };

  template <scan_pass Pass, class Dones, class Keep>
  static MLKIT_ALWAYS_INLINE void run_step(const Problem& p, int k, const V* now, V final_value, const Dones& dones,
                                           const Keep& keep, const V* before, V* then, V* next, const tile_of<T>* out,
                                           V& x, V& a, V& b) noexcept {
    const auto map = recurrence_t::map(p.rule, now, final_value, dones, then);
    if constexpr (Pass != scan_pass::emit) {
      b = keep(apply_map(map.a, map.b, b), b);
      a = keep(map.a * V::select(map.a == V::zero(), V::zero(), a), a);
    }
    if constexpr (Pass != scan_pass::compose) {
      const V after = x;
      x = keep(apply_map(map.a, map.b, after), after);
      V result[outputs];
      recurrence_t::emit(p.rule, now, final_value, dones, before, after, x, result);
      MLKIT_UNROLL
      for (int o = 0; o < outputs; ++o)
        if (out[o].data)
          (Rule::carries_through_mask ? result[o] : keep(result[o], V::zero())).store(out[o].data + k * out[o].step);
    }
    MLKIT_UNROLL
    for (int i = 0; i < Rule::carried; ++i) next[i] = keep(then[i], next[i]);
  }

  // Steps top - 1 to 0 of a tile.
  template <scan_pass Pass, bool Plain>
  static void run_steps(const Problem& p, int top, const tile_of<const T>* in, tile_of<const T> finals,
                        const std::uint8_t (*codes)[16], const tile_of<T>* out, lanes_state& state) noexcept {
    V x = state.x, a = state.a, b = state.b, next[carried];
    code_t later = state.code;
    for (int i = 0; i < carried; ++i) next[i] = state.next[i];
    for (int k = top - 1; k >= 0; --k) {
      V now[inputs > 0 ? inputs : 1], then[carried], before[carried];
      MLKIT_UNROLL
      for (int i = 0; i < inputs; ++i) now[i] = V::load(in[i].data + k * in[i].step);
      MLKIT_UNROLL
      for (int i = 0; i < carried; ++i) then[i] = before[i] = next[i];
      if constexpr (Plain) {
        run_step<Pass>(p, k, now, V::zero(), no_dones<T>{}, keep_fresh{}, before, then, next, out, x, a, b);
      } else {
        const code_t own = widen_codes<T>(codes[k]);
        const code_t skipped = (own & step_skipped) != 0;
        code_t code = own;
        if (p.begins) {
          code = later;
          later = skipped ? later : own;
        }
        run_step<Pass>(p, k, now, V::load(finals.data + k * finals.step), some_dones<T>(code), keep_unless{skipped},
                       before, then, next, out, x, a, b);
      }
    }
    state.x = x, state.a = a, state.b = b, state.code = later;
    for (int i = 0; i < carried; ++i) state.next[i] = next[i];
  }

  static void write_tile(const stream<T>& s, const lanes& g, index_t offset, const int* n, int top, bool whole,
                         bool past_caches, const T (*from)[width]) noexcept {
    if (g.beside && s.batch == 1) {
      T* to = s.at(g.of[0].row, g.of[0].begin + offset);
      for (int k = 0; k < top; ++k) V::load(from[k]).store(to + k * s.time, g.count);
      return;
    }
    if (s.time != 1) {
      for (int i = 0; i < g.count; ++i) {
        T* to = s.at(g.of[i].row, g.of[i].begin + offset);
        for (int k = 0; k < n[i]; ++k) to[k * s.time] = from[k][i];
      }
      return;
    }
    for (int c = 0; c < top; c += width) {
      V r[width];
      MLKIT_UNROLL
      for (int j = 0; j < width; ++j) r[j] = V::load(from[c + j]);
      transpose_registers(r);
      if (whole && g.count == width) {
        if (past_caches) {
          MLKIT_UNROLL
          for (int i = 0; i < width; ++i) stream_register(s.at(g.of[i].row, g.of[i].begin + offset + c), r[i]);
        } else {
          MLKIT_UNROLL
          for (int i = 0; i < width; ++i) r[i].store(s.at(g.of[i].row, g.of[i].begin + offset + c));
        }
      } else {
        for (int i = 0; i < g.count; ++i) {
          const int some = n[i] - c;
          if (some > 0) r[i].store(s.at(g.of[i].row, g.of[i].begin + offset + c), some < width ? some : width);
        }
      }
    }
  }

  // Steps [offset, offset + depth) of each lane, as far as it has them.
  template <scan_pass Pass>
  static void run_tile(const Problem& p, const lanes& g, index_t offset, lanes_state& state, scratch& w) noexcept {
    int n[width], top = 0, low = depth;
    for (int i = 0; i < width; ++i) {
      const index_t left = g.of[i].end - g.of[i].begin - offset;
      n[i] = left <= 0 ? 0 : left < depth ? static_cast<int>(left) : depth;
      top = n[i] > top ? n[i] : top;
      low = n[i] < low ? n[i] : low;
    }
    if (top == 0) return;
    const bool even = low == top, whole = low == depth;
    int codes = even ? 0 : step_skipped;
    if (!even || p.terminated || p.truncated || p.mask) codes = read_codes(p, g, offset, n, top, even, w);
    if (p.begins) {
      std::int64_t lanes_of_code[width * sizeof(T) / 8];
      __builtin_memcpy(lanes_of_code, &state.code, sizeof state.code);
      std::int64_t any = 0;
      for (const std::int64_t c : lanes_of_code) any |= c;
      codes |= static_cast<int>(any | (any >> 32));
    }
    tile_of<const T> in[inputs > 0 ? inputs : 1], finals{w.final_values[0], width};
    for (int i = 0; i < inputs; ++i) {
      in[i] = read_tile(p.in[i], g, offset, n, top, whole, w.in[i]);
      if (p.far_reads) fetch_tile(p.in[i], g, offset);
    }
    if (p.far_reads) {
      if (p.terminated) fetch_tile(p.terminated, g, offset);
      if (p.truncated) fetch_tile(p.truncated, g, offset);
    }
    if ((codes & step_truncated) && p.final_values)
      finals = read_tile(p.final_values, g, offset, n, top, whole, w.final_values);
    tile_of<T> out[outputs];
    bool in_place[outputs];
    for (int o = 0; o < outputs; ++o) {
      const stream<T>& s = p.out[o];
      in_place[o] = g.beside && g.count == width && s.batch == 1;
      out[o] = {!s            ? nullptr
                : in_place[o] ? s.at(g.of[0].row, g.of[0].begin + offset)
                              : w.out[o][0],
                in_place[o] ? s.time : width};
    }
    if (codes == 0)
      run_steps<Pass, true>(p, top, in, finals, w.code, out, state);
    else
      run_steps<Pass, false>(p, top, in, finals, w.code, out, state);
    if constexpr (Pass != scan_pass::compose)
      for (int o = 0; o < outputs; ++o)
        if (out[o].data && !in_place[o]) write_tile(p.out[o], g, offset, n, top, whole, p.past_caches, w.out[o]);
  }

  // The value that the scan has behind the sequence's end, and what it carries there.
  static void start_at_end(const Problem& p, const lanes& g, lanes_state& state) noexcept {
    T ends[width];
    std::int64_t dones[width];
    for (int i = 0; i < width; ++i) {
      ends[i] = p.ends ? p.ends[g.of[i].sequence] : T{};
      dones[i] = p.begins ? p.last_code(g.of[i].sequence) : 0;
    }
    for (int i = 0; i < width; ++i) state.code[i] = static_cast<typename V::int_type>(dones[i]);
    const V end = V::load(ends);
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
      const unit& u = g.of[i];
      const index_t last = p.last(u.sequence);
      index_t t = u.end;
      for (int j = 0; j < looked_at; ++j) {
        while (t < last && !p.counts(u.row, t)) ++t;
        at[j][i] = t < last ? t++ : -1;
      }
    }
    // The nearest token is the tile's step 0.
    for (int j = 0; j < looked_at; ++j)
      for (int i = 0; i < width; ++i) {
        const index_t t = at[j][i], b = g.of[i].row;
        for (int s = 0; s < inputs; ++s) w.in[s][j][i] = t < 0 ? T{} : *p.in[s].at(b, t);
        const int code = t < 0 ? step_skipped : p.code(b, t);
        w.code[j][i] = static_cast<std::uint8_t>(code);
        w.final_values[j][i] = T{};
        // In the other convention a step is truncated by what the one behind it says, or the end.
        if (t >= 0 && p.final_values && (p.begins || (code & step_truncated)))
          w.final_values[j][i] = *p.final_values.at(b, t);
      }
    tile_of<const T> in[inputs > 0 ? inputs : 1];
    for (int s = 0; s < inputs; ++s) in[s] = {w.in[s][0], width};
    const V x = state.x;
    run_steps<scan_pass::compose, false>(p, looked_at, in, {w.final_values[0], width}, w.code, nullptr, state);
    state.x = x, state.a = V(T(1)), state.b = V::zero();
  }

  static void clear(scratch& w) noexcept {
    __builtin_memset(&w, 0, sizeof w);  // lanes and steps that nothing writes are read, and not used
  }

  static void fill(lanes& g, const unit* units, index_t count) noexcept {
    g.count = static_cast<int>(count < width ? count : width);
    g.beside = false;
    for (int i = 0; i < width; ++i) g.of[i] = units[i < g.count ? i : 0];
  }

  // Part `part` of sequences [first, first + count).
  static void fill_part(const Problem& p, lanes& g, index_t first, index_t count, index_t part) noexcept {
    g.count = static_cast<int>(count < width ? count : width);
    g.beside = !p.starts;
    for (int i = 0; i < width; ++i) {
      const index_t s = first + (i < g.count ? i : 0), begin = p.first(s) + part * scan_part, last = p.last(s);
      g.of[i] = {p.row(s), begin, begin + scan_part < last ? begin + scan_part : last, s};
    }
  }

  // Sequences [first, end), a strip of registers at a time; the parts of each one after another.
  static void scan_sequences(const Problem& p, index_t first, index_t end) noexcept {
    constexpr index_t most_groups = 64;
    scratch w;
    clear(w);
    lanes g[most_groups];
    lanes_state state[most_groups];
    V behind[most_groups];
    const index_t strip = p.along_batch ? most_groups : 1;
    for (index_t s = first; s < end; s += strip * width) {
      const index_t groups = ceil_div(std::min(strip * width, end - s), width);
      index_t parts = 1;
      for (index_t i = s; i < std::min(end, s + groups * width) && p.longest > scan_part; ++i)
        parts = std::max(parts, ceil_div(p.last(i) - p.first(i), scan_part));
      for (index_t part = parts - 1; part >= 0; --part) {
        index_t steps = 0;
        for (index_t j = 0; j < groups; ++j) {
          fill_part(p, g[j], s + j * width, end - s - j * width, part);
          if (part == parts - 1) start_at_end(p, g[j], state[j]);
          behind[j] = state[j].x;
          state[j].a = V(T(1)), state[j].b = V::zero();
          for (int i = 0; i < g[j].count; ++i) steps = std::max(steps, g[j].of[i].end - g[j].of[i].begin);
        }
        for (index_t offset = (ceil_div(steps, scan_depth) - 1) * scan_depth; offset >= 0; offset -= scan_depth)
          for (index_t j = 0; j < groups; ++j) {
            if (part > 0)
              run_tile<scan_pass::both>(p, g[j], offset, state[j], w);
            else
              run_tile<scan_pass::emit>(p, g[j], offset, state[j], w);
          }
        if (part > 0)
          for (index_t j = 0; j < groups; ++j) state[j].x = apply_map(state[j].a, state[j].b, behind[j]);
      }
    }
    finish_stores(p);
  }

  // The map of each of units [first, end), to a and b.
  static void compose_units(const Problem& p, const unit* units, index_t first, index_t end, T* a, T* b) noexcept {
    scratch w;
    clear(w);
    for (index_t u = first; u < end; u += width) {
      lanes g;
      lanes_state state;
      const int count = run_units<scan_pass::compose>(p, units + u, end - u, nullptr, g, state, w);
      state.a.store(a + u, count);
      state.b.store(b + u, count);
    }
  }

  // The outputs of units [first, end), behind which the scan has the values x.
  static void emit_units(const Problem& p, const unit* units, index_t first, index_t end, const T* x) noexcept {
    scratch w;
    clear(w);
    for (index_t u = first; u < end; u += width) {
      lanes g;
      lanes_state state;
      run_units<scan_pass::emit>(p, units + u, end - u, x + u, g, state, w);
    }
    finish_stores(p);
  }

  template <scan_pass Pass>
  static int run_units(const Problem& p, const unit* units, index_t count, const T* x, lanes& g, lanes_state& state,
                       scratch& w) noexcept {
    fill(g, units, count);
    start_at_end(p, g, state);
    start_within(p, g, state, w);
    if (x) state.x = V::load(x, g.count);
    index_t steps = 0;
    for (int i = 0; i < g.count; ++i) steps = std::max(steps, g.of[i].end - g.of[i].begin);
    for (index_t offset = (ceil_div(steps, scan_depth) - 1) * scan_depth; offset >= 0; offset -= scan_depth)
      run_tile<Pass>(p, g, offset, state, w);
    return g.count;
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
        apply_map(V(a[maps]), V(b[maps]), V(x[u + 1])).store(x + u, 1);
      }
    }
  }

  static void finish_stores(const Problem& p) noexcept {
#if MLKIT_X86
    if (p.past_caches) _mm_sfence();
#else
    (void)p;
#endif
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
