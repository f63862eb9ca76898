// Attention forward on tiles, with queries along the lanes: for a block of keys, S^T = K Q^T, an online softmax down
// its columns, O^T += V^T P^T. Maxima and sums are registers, and only the last queries are padded.

// A view's matrix of one head.
template <class T>
MLKIT_ALWAYS_INLINE dense_source<std::remove_const_t<T>> head_of(const attention::detail::head_rows<T>& m) noexcept {
  return {m.data, m.rows, m.cols, m.row_stride, m.col_stride};
}

// What forward and backward share.
template <class Element>
struct attend {
  using word = typename compute<Element>::word;
  using sum = typename compute<Element>::sum;
  using V = vec<sum>;
  static constexpr index_t width = V::width;
  static constexpr index_t sliver = sliver_lines<Element>;  // queries worked on together
  static constexpr index_t stride = panel_stride<Element>;  // words between rows of left panels
  static constexpr int group = tile_registers;              // keys that are masked together; any tile's height divides it
  static constexpr int groups_at_once = 240 / group;
  static constexpr index_t keys_at_once = index_t{groups_at_once} * group;
  static constexpr sum log2_e = static_cast<sum>(1.44269504088896340736);
  static constexpr sum infinity = math_table<sum>::infinity;

  static constexpr index_t padded(index_t lines) noexcept { return round_up(lines, width); }

  // Hands out pieces of one block of memory; with none, only counts.
  class pieces {
   public:
    explicit pieces(std::byte* memory) noexcept : memory_(memory) {}
    template <class T>
    void take(T*& piece, index_t count) noexcept {
      piece = reinterpret_cast<T*>(memory_ + bytes_);
      bytes_ = round_up(bytes_ + count * index_t{sizeof(T)}, index_t{64});
    }
    index_t bytes() const noexcept { return bytes_; }

   private:
    std::byte* memory_;
    index_t bytes_ = 0;
  };

  static index_t depth_blocks(index_t d) noexcept { return ceil_div(d, depth_step<Element>(d)); }

  // c[rows][lanes] (+)= left[rows][depth] right[depth][lanes], all in words.
  static void multiply(index_t depth, const word* left, index_t rows, const word* right, index_t lanes, sum* c,
                       bool accumulate) noexcept {
    const int vectors = static_cast<int>(lanes / width), height = tile_rows(vectors);
    for (index_t i = 0; i < rows; i += height) {
      const char* next = reinterpret_cast<const char*>(left + (i + height) * stride);
      const fetch_ahead ahead{reinterpret_cast<const char*>(right), next, stride * index_t{sizeof(word)},
                              depth * index_t{sizeof(word)}};
      select_tile<Element>(vectors, static_cast<int>(std::min<index_t>(height, rows - i)))(
          depth, left + i * stride, right, lanes, c + i * lanes, lanes, accumulate, ahead);
    }
  }

  // What the groups of a block of keys are to some queries.
  struct block_plan {
    attention::block groups[groups_at_once];
    bool any = false;

    // Calls f(first, last) for the runs of keys whose groups are not empty.
    template <class F>
    void each_run(index_t keys, F&& f) const noexcept {
      for (index_t at = 0; at < keys;) {
        index_t end = at;
        while (end < keys && groups[end / group] != attention::block::empty) end += group;
        if (end > at) f(at, std::min(end, keys));
        at = std::max(end, at + group);
      }
    }
  };
  template <class Problem>
  static block_plan plan_block(const Problem& p, const attention::detail::score_shape& shape, index_t b, index_t h,
                               index_t i, index_t i_end, index_t j, index_t j_end) noexcept {
    block_plan plan;
    for (index_t g = 0; g < groups_at_once && j < j_end; ++g, j += group) {
      plan.groups[g] =
          attention::detail::classify(*p.scores, shape, b, h, i, i_end, j, std::min<index_t>(j_end, j + group));
      plan.any = plan.any || plan.groups[g] != attention::block::empty;
    }
    return plan;
  }
};

// Forward for the queries [first, first + rows) of one head.
template <class Element, class Problem>
struct attend_forward : attend<Element> {
  using base = attend<Element>;
  using typename base::block_plan;
  using typename base::sum;
  using typename base::V;
  using typename base::word;
  using base::group;
  using base::infinity;
  using base::keys_at_once;
  using base::sliver;
  using base::stride;
  using base::width;
  using shape_type = attention::detail::score_shape;

  struct parts {
    word* queries;        // right panels [slivers][words of d][lanes]
    word *keys, *values;  // left panels [depth blocks of d][keys][stride], [d_v][stride]
    sum* scores;          // [keys][lanes]
    word* probabilities;  // right panel [words of keys][lanes]; the scores' memory where the types agree
    sum* out;             // [slivers][d_v][lanes]
    sum *top, *total;     // of each query: maximum and sum so far
    Element* pack;
  };
  static constexpr bool own_probabilities = !std::is_same_v<Element, sum>;

  static index_t query_words(const Problem& p) noexcept {
    return sliver * (words<Element>(p.d) + base::depth_blocks(p.d));
  }
  static index_t out_size(const Problem& p) noexcept { return sliver * round_up(p.d_v, index_t{group}); }

  static index_t lay_out(const Problem& p, index_t rows, std::byte* memory, parts& s) noexcept {
    typename base::pieces all(memory);
    const index_t slivers = ceil_div(rows, sliver);
    all.take(s.queries, slivers * query_words(p));
    all.take(s.keys, base::depth_blocks(p.d) * (keys_at_once + group) * stride);
    all.take(s.values, round_up(p.d_v + group, index_t{group}) * stride);
    all.take(s.scores, (keys_at_once + group) * sliver);
    if constexpr (own_probabilities)
      all.take(s.probabilities, (keys_at_once / 2 + 1) * sliver);
    else
      s.probabilities = reinterpret_cast<word*>(s.scores);
    all.take(s.out, slivers * out_size(p));
    all.take(s.top, slivers * sliver);
    all.take(s.total, slivers * sliver);
    all.take(s.pack, pack_scratch<Element>);
    return all.bytes();
  }
  static index_t scratch_bytes(const Problem& p, index_t rows) noexcept {
    parts unused;
    return lay_out(p, rows, nullptr, unused);
  }

  static void run(const Problem& p, index_t b, index_t h, index_t first, index_t rows, std::byte* memory) noexcept {
    parts s;
    lay_out(p, rows, memory, s);
    const auto q = head_of(p.query_rows(b, h)), k = head_of(p.key_rows(b, h)), v = head_of(p.value_rows(b, h));
    const shape_type shape = p.shape(b);
    const index_t keys = attention::detail::key_limit(*p.scores, b, k.rows());
    const index_t d = p.d, step = depth_step<Element>(d);
    const operand<std::remove_cvref_t<decltype(q)>> query_lines{q, true}, key_lines{k, true}, value_lines{v, false};
    each_sliver(rows, [&](index_t at, index_t count, index_t lanes) {
      word* panel = s.queries + at / sliver * query_words(p);
      each_depth_block(d, step, [&](index_t c, index_t depth) {
        pack_right<Element>(query_lines, first + at, count, lanes, c, depth, panel, s.pack);
        panel += words<Element>(depth) * lanes;
      });
    });
    std::fill_n(s.out, ceil_div(rows, sliver) * out_size(p), sum{});
    start(p, h, rows, s);

    for (index_t j = 0; j < keys; j += keys_at_once) {
      const index_t n = std::min(keys_at_once, keys - j);
      if (!base::plan_block(p, shape, b, h, first, first + rows, j, j + n).any) continue;
      word* panel = s.keys;
      each_depth_block(d, step, [&](index_t c, index_t depth) {
        pack_left<Element>(key_lines, j, n, c, depth, reinterpret_cast<Element*>(panel), s.pack, 0);
        panel += (keys_at_once + group) * stride;
      });
      pack_left<Element>(value_lines, 0, p.d_v, j, n, reinterpret_cast<Element*>(s.values), s.pack, 0);
      each_sliver(rows, [&](index_t at, index_t count, index_t lanes) {
        const block_plan plan = base::plan_block(p, shape, b, h, first + at, first + at + count, j, j + n);
        if (!plan.any) return;
        const word* queries = s.queries + at / sliver * query_words(p);
        plan.each_run(n, [&](index_t from, index_t to) {
          const word *left = s.keys, *right = queries;
          if (d == 0) std::fill_n(s.scores + from * lanes, (to - from) * lanes, sum{});
          each_depth_block(d, step, [&](index_t c, index_t depth) {
            base::multiply(words<Element>(depth), left + from * stride, to - from, right, lanes,
                           s.scores + from * lanes, c > 0);
            left += (keys_at_once + group) * stride;
            right += words<Element>(depth) * lanes;
          });
        });
        const score_run place{b, h, first + at, j, 0};
        sum* out = s.out + at / sliver * out_size(p);
        for (index_t l = 0; l < lanes; l += 4 * width) softmax(p, shape, place, at, l, count, lanes, n, plan, out, s);
        plan.each_run(n, [&](index_t from, index_t to) {
          constexpr index_t per_word = compute<Element>::elements_per_word;
          base::multiply(words<Element>(to - from), s.values + from / per_word, p.d_v,
                         s.probabilities + from / per_word * lanes, lanes, out, true);
        });
      });
    }
    each_sliver(rows, [&](index_t at, index_t count, index_t lanes) {
      finish(p, b, h, first, at, count, lanes, s.out + at / sliver * out_size(p), s);
    });
  }

 private:
  template <class F>
  static void each_sliver(index_t rows, F&& f) noexcept {
    for (index_t at = 0; at < rows; at += sliver) {
      const index_t count = std::min(sliver, rows - at);
      f(at, count, base::padded(count));
    }
  }

  // Maximum and sum of nothing, or of a sink.
  static void start(const Problem& p, index_t h, index_t rows, const parts& s) noexcept {
    sum top = -infinity;
    attention::detail::each_stage(*p.scores, [&](const auto& stage) {
      if constexpr (attention::detail::is_sinks<std::remove_cvref_t<decltype(stage)>>)
        top = static_cast<sum>(stage.logits.data[h * stage.logits.strides[0]]);
    });
    std::fill_n(s.top, round_up(rows, sliver), top);
    std::fill_n(s.total, round_up(rows, sliver), top == -infinity ? sum{} : sum{1});
  }

  // Columns [l, l + Vectors width) of S^T become those of P^T; the output so far is brought to their new maxima.
  template <int Vectors>
  static void softmax_columns(const Problem& p, const shape_type& shape, score_run at, index_t row, index_t l,
                              index_t count, index_t lanes, index_t n, const block_plan& plan, sum* out,
                              const parts& s) noexcept {
    V top[Vectors], level[Vectors], total[Vectors];
    MLKIT_UNROLL
    for (int c = 0; c < Vectors; ++c) top[c] = minus_infinity<V>();
    const index_t first_key = at.j, first_query = at.i + l;
    const auto scores = [&](auto masked, index_t from, index_t to) {
      for (index_t j = from; j < to; ++j) {
        sum* x = s.scores + j * lanes + l;
        MLKIT_UNROLL
        for (int c = 0; c < Vectors; ++c) {
          const index_t lane = c * width;
          const score_run run{at.b, at.h, first_query + lane, first_key + j,
                              static_cast<int>(std::min(width, count - l - lane))};
          const V y = all_scores<decltype(masked)::value>(*p.scores, V::load(x + lane), shape, run);
          y.store(x + lane);
          top[c] = max(top[c], y);
        }
      }
    };
    for (index_t g = 0; g * group < n; ++g) {
      const index_t from = g * group, to = std::min<index_t>(n, from + group);
      if (plan.groups[g] == attention::block::full)
        scores(std::false_type{}, from, to);
      else if (plan.groups[g] == attention::block::partial)
        scores(std::true_type{}, from, to);
    }
    MLKIT_UNROLL
    for (int c = 0; c < Vectors; ++c) {
      const index_t lane = row + l + c * width;
      const V before = V::load(s.top + lane), now = max(before, top[c]);
      level[c] = V::select(now == minus_infinity<V>(), V::zero(), now);
      const V factor = exp2_nonpositive((before - level[c]) * base::log2_e);
      now.store(s.top + lane);
      total[c] = V::load(s.total + lane) * factor;
      // Most blocks raise no maximum.
      if (any_lane(now > before) && any_lane(before > minus_infinity<V>()))
        for (index_t i = 0; i < p.d_v; ++i) {
          sum* x = out + i * lanes + l + c * width;
          (V::load(x) * factor).store(x);
        }
    }
    plan.each_run(n, [&](index_t from, index_t to) {
      for (index_t j = from; j < to; ++j) {
        sum* x = s.scores + j * lanes + l;
        MLKIT_UNROLL
        for (int c = 0; c < Vectors; ++c) {
          const V y = exp2_nonpositive((V::load(x + c * width) - level[c]) * base::log2_e);
          total[c] += y;
          const score_run run{at.b, at.h, first_query + c * width, first_key + j, 0};
          drop_any(*p.scores, y, shape, run).store(x + c * width);
        }
      }
      if constexpr (own_probabilities) pair_keys<Vectors>(from, to, l, lanes, s);
    });
    MLKIT_UNROLL
    for (int c = 0; c < Vectors; ++c) total[c].store(s.total + row + l + c * width);
  }
  static void softmax(const Problem& p, const shape_type& shape, const score_run& at, index_t row, index_t l,
                      index_t count, index_t lanes, index_t n, const block_plan& plan, sum* out,
                      const parts& s) noexcept {
    switch ((lanes - l) / width) {
      case 1: return softmax_columns<1>(p, shape, at, row, l, count, lanes, n, plan, out, s);
      case 2: return softmax_columns<2>(p, shape, at, row, l, count, lanes, n, plan, out, s);
      case 3: return softmax_columns<3>(p, shape, at, row, l, count, lanes, n, plan, out, s);
      default: return softmax_columns<4>(p, shape, at, row, l, count, lanes, n, plan, out, s);
    }
  }

  static MLKIT_ALWAYS_INLINE bool any_lane(typename V::native_int mask) noexcept {
#if MLKIT_SET_AVX512
    if constexpr (sizeof(sum) == 4)
      return _mm512_movepi32_mask((__m512i)mask) != 0;
    else
      return _mm512_movepi64_mask((__m512i)mask) != 0;
#else
    typename V::int_type lanes[width], any = 0;
    __builtin_memcpy(lanes, &mask, sizeof lanes);
    for (int l = 0; l < width; ++l) any |= lanes[l];
    return any != 0;
#endif
  }

#if MLKIT_SET_BF16
  // Rows of probabilities in f32, by pairs, become words of two bf16.
  template <int Vectors>
  static void pair_keys(index_t from, index_t to, index_t l, index_t lanes, const parts& s) noexcept {
    alignas(64) static constexpr std::uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i interleaved = _mm512_load_si512(order);
    for (index_t j = from; j < to; j += 2) {
      const float* even = s.scores + j * lanes + l;
      float* out = s.probabilities + j / 2 * lanes + l;
      MLKIT_UNROLL
      for (int c = 0; c < Vectors; ++c) {
        const V low = V::load(even + c * width), high = j + 1 < to ? V::load(even + lanes + c * width) : V::zero();
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
        _mm512_storeu_si512(out + c * width, _mm512_permutexvar_epi16(interleaved, both));
      }
    }
  }
#endif

  // O = O^T transposed, over the sums.
  static void finish(const Problem& p, index_t b, index_t h, index_t first, index_t at, index_t count, index_t lanes,
                     sum* out, const parts& s) noexcept {
    const auto to = p.out_rows(b, h);
    for (index_t l = 0; l < lanes; l += width) {
      const V total = V::load(s.total + at + l);
      const V inverse = V::select(total == V::zero(), V::zero(), V(sum{1}) / total);
      for (index_t c = 0; c < p.d_v; ++c) {
        sum* x = out + c * lanes + l;
        (V::load(x) * inverse).store(x);
      }
    }
    constexpr index_t columns = keys_at_once / width * width;  // of a query that are turned at once, into the scores
    for (index_t c = 0; c < p.d_v; c += columns) {
      const index_t n = std::min(columns, p.d_v - c);
      transpose(out + c * lanes, lanes, n, lanes, s.scores, n);
      for (index_t i = 0; i < count; ++i) {
        auto* y = to.data + (first + at + i) * to.row_stride + c * to.col_stride;
        using Out = std::remove_cvref_t<decltype(*y)>;
        if (to.col_stride == 1)
          decode_run(set_tag{}, dense_source<sum>{s.scores + i * n, 1, n, n, 1}, 0, 0, n, y);
        else
          for (index_t l = 0; l < n; ++l) y[l * to.col_stride] = static_cast<Out>(s.scores[i * n + l]);
      }
    }
    if (!p.lse.data) return;
    for (index_t i = 0; i < count; ++i) {
      const sum total = s.total[at + i];
      p.lse_at(b, h, first + at + i) = total == 0 ? -infinity : s.top[at + i] + std::log(total);
    }
  }
};

// One instruction set's functions.
template <class E, class Problem>
attention::detail::forward_kernels<Problem> forward_entry() noexcept {
  using kernel = attend_forward<panel_element<E>, Problem>;
  return {kernel::sliver, &kernel::scratch_bytes, &kernel::run};
}
