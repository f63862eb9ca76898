// Attention forward on tiles: for a block of keys, S^T = K Q^T, an online softmax down its columns, O^T += V^T P^T.

// What a problem that asks for maps keeps of the probabilities (cpu/maps-inl.hpp); others ask for none, and keep
// nothing.
template <class Element, class Problem>
struct kept_map {
  static constexpr bool captures = false;
  template <class... Any>
  void lay_out(const Any&...) noexcept {}
};

// Forward for the queries [first, first + rows) of one head.
template <class Element, class Problem>
struct attend_forward : attend<Element> {
  using base = attend<Element>;
  using base::group;
  using base::infinity;
  using base::keys_at_once;
  using base::sliver;
  using base::stride;
  using base::width;
  using typename base::block_plan;
  using typename base::shelf;
  using typename base::sum;
  using typename base::V;
  using typename base::word;
  using shape_type = attention::detail::score_shape;

  struct parts {
    word* queries;        // right panels [slivers][words of d][lanes]
    shelf keys, values;   // left panels of a block, or of each: [depth blocks of d][keys][stride], [d_v][stride]
    sum* scores;          // [keys][lanes]
    word* probabilities;  // right panel [words of keys][lanes]; the scores' memory where the types agree
    sum* out;             // [slivers][d_v][lanes]
    sum *level, *total;   // of each query: the score that its exponents are relative to, and their sum so far
    sum* bias;            // of a sliver, [keys][lanes]
    Element* pack;
    sum scale_first, scale;  // what scores are multiplied by, and what they are yet to be
    kept_map<Element, Problem> map;
  };
  static constexpr bool own_probabilities = !std::is_same_v<Element, sum>;
  static_assert(keys_at_once % compute<Element>::elements_per_word == 0);
  static constexpr bool drops = attention::detail::any_dropout<typename Problem::scores_type>;
  static constexpr bool only_scaled = attention::detail::only_scaled<typename Problem::scores_type>;
  static constexpr bool has_bias = attention::detail::any_bias<typename Problem::scores_type>;
  static constexpr bool captures = kept_map<Element, Problem>::captures;

  static index_t query_words(const Problem& p) noexcept {
    return sliver * (words<Element>(p.d) + base::depth_blocks(p.d));
  }
  static index_t out_size(const Problem& p) noexcept { return sliver * round_up(p.d_v, index_t{group}); }

  // The head that is worked on; where all its keys are packed at once, a sliver of queries is worked on from these to
  // its outputs, and the next one has its memory. For few keys that stays in the nearest cache, and of maps of several
  // slivers it keeps the probabilities of one alone. Else each block of keys meets all slivers.
  struct head_place {
    index_t b, h;
    shape_type shape;
    index_t keys;
    bool packed_at_once;
    // Where the block of keys from j on is packed.
    index_t block(index_t j) const noexcept { return packed_at_once ? j / keys_at_once : 0; }
  };
  static bool packs_at_once(const Problem& p, index_t keys, index_t rows) noexcept {
    if constexpr (captures)
      if (p.map.every_key && rows > sliver) return true;
    return keys <= keys_at_once;
  }
  // A sliver: its first query, where that is in the task, and where what is kept of it is.
  struct sliver_place {
    index_t first, at, home, count, lanes;
  };

  static index_t lay_out(const Problem& p, index_t rows, std::byte* memory, parts& s) noexcept {
    typename base::pieces all(memory);
    const bool at_once = packs_at_once(p, p.k.extents[2], rows);
    const index_t all_slivers = ceil_div(rows, sliver), slivers = at_once ? 1 : all_slivers;
    const index_t blocks = at_once ? ceil_div(p.k.extents[2], keys_at_once) : 1;
    all.take(s.queries, slivers * query_words(p));
    s.keys.take(all, blocks, keys_at_once + group, words<Element>(p.d), base::depth_blocks(p.d));
    s.values.take(all, blocks, round_up(p.d_v + group, index_t{group}), words<Element>(keys_at_once), 1);
    all.take(s.scores, (keys_at_once + group) * sliver);
    if constexpr (own_probabilities)
      all.take(s.probabilities, (keys_at_once / 2 + 1) * sliver);
    else
      s.probabilities = reinterpret_cast<word*>(s.scores);
    all.take(s.out, slivers * out_size(p));
    all.take(s.level, slivers * sliver);
    all.take(s.total, slivers * sliver);
    all.take(s.bias, has_bias ? base::bias_size : 0);
    all.take(s.pack, pack_scratch<Element>);
    s.map.lay_out(p, slivers, all_slivers, all);
    return all.bytes();
  }
  static index_t scratch_bytes(const Problem& p, index_t rows) noexcept {
    parts unused;
    return lay_out(p, rows, nullptr, unused);
  }

  static void run(const Problem& p, index_t b, index_t h, index_t first, index_t rows, std::byte* memory) noexcept {
    parts s;
    lay_out(p, rows, memory, s);
    [[maybe_unused]] const matrix_registers<Element> registers;
    const index_t keys = attention::detail::key_limit(*p.scores, b, p.keys(b));
    const head_place head{b, h, p.shape(b), keys, packs_at_once(p, keys, rows)};
    // Where at most a positive scale happens to scores, it is left to the exponents.
    const sum scale = only_scaled ? base::scale_of(*p.scores) : sum{1};
    s.scale = scale > 0 ? scale : sum{1};
    s.scale_first = scale > 0 ? sum{1} : scale;
    const auto each_block = [&](auto&& f) {
      for (index_t j = 0; j < keys; j += keys_at_once) f(j, std::min(keys_at_once, keys - j));
    };
    const auto pack = [&](index_t j, index_t n) {
      const bool any = base::plan_block(p, head.shape, b, h, first, first + rows, j, j + n).any;
      if (any) pack_block(p, head, j, n, s);
      return any;
    };
    const auto each_sliver = [&](auto&& f) {
      for (index_t at = 0; at < rows; at += sliver) {
        const index_t count = std::min(sliver, rows - at);
        f(sliver_place{first + at, at, head.packed_at_once ? 0 : at, count, base::padded(count)});
      }
    };
    if (head.packed_at_once) {
      each_block(pack);
      each_sliver([&](const sliver_place& place) {
        start(p, head, place, s);
        each_block([&](index_t j, index_t n) { add_block(p, head, place, j, n, s); });
        finish(p, head, place, s);
      });
      return;
    }
    each_sliver([&](const sliver_place& place) { start(p, head, place, s); });
    each_block([&](index_t j, index_t n) {
      if (pack(j, n)) each_sliver([&](const sliver_place& place) { add_block(p, head, place, j, n, s); });
    });
    each_sliver([&](const sliver_place& place) { finish(p, head, place, s); });
  }

 private:
  // Packs the keys and values [j, j + n).
  static void pack_block(const Problem& p, const head_place& head, index_t j, index_t n, const parts& s) noexcept {
    const auto k = head_of(p.key_rows(head.b, head.h)), v = head_of(p.value_rows(head.b, head.h));
    const operand<std::remove_cvref_t<decltype(k)>> key_lines{k, true}, value_lines{v, false};
    word* panel = s.keys.at(head.block(j));
    each_depth_block(p.d, depth_step<Element>(p.d), [&](index_t c, index_t depth) {
      pack_left<Element>(key_lines, j, n, c, depth, reinterpret_cast<Element*>(panel), s.pack, 0);
      panel += (keys_at_once + group) * stride;
    });
    pack_left<Element>(value_lines, 0, p.d_v, j, n, reinterpret_cast<Element*>(s.values.at(head.block(j))), s.pack, 0);
  }

  // Adds the attention of a sliver to the keys [j, j + n).
  static void add_block(const Problem& p, const head_place& head, const sliver_place& place, index_t j, index_t n,
                        parts& s) noexcept {
    const index_t b = head.b, h = head.h, count = place.count, lanes = place.lanes, d = p.d;
    const block_plan plan = base::plan_block(p, head.shape, b, h, place.first, place.first + count, j, j + n);
    if (!plan.any) return;
    const word *keys = s.keys.at(head.block(j)), *values = s.values.at(head.block(j));
    sum* const block_scores = s.scores;
    if constexpr (captures) {
      s.scores = s.map.scores(place.home, j, lanes, block_scores);
      if constexpr (!own_probabilities) s.probabilities = reinterpret_cast<word*>(s.scores);
    }
    // Of scores that nothing happens to but a positive scale, tiles find the maxima.
    const bool bare = only_scaled && s.scale_first == sum{1} && d > 0;
    alignas(64) sum top[sliver];
    std::fill_n(top, sliver, -infinity);
    plan.each_run(n, [&](index_t from, index_t to) {
      const word *left = keys, *right = s.queries + place.home / sliver * query_words(p);
      if (d == 0) std::fill_n(s.scores + from * lanes, (to - from) * lanes, sum{});
      each_depth_block(d, depth_step<Element>(d), [&](index_t c, index_t depth) {
        base::multiply(words<Element>(depth), left + from * stride, to - from, right, lanes, lanes,
                       s.scores + from * lanes, lanes, c > 0, [&](index_t i, index_t, index_t) {
                         const bool full = plan.groups[(from + i) / group] == attention::block::full;
                         return bare && full && c + depth == d ? top : nullptr;
                       });
        left += (keys_at_once + group) * stride;
        right += words<Element>(depth) * lanes;
      });
    });
    if (s.scale_first != sum{1})
      for (index_t i = 0; i < n * lanes; ++i) s.scores[i] *= s.scale_first;
    const sum* bias = base::turn_bias(p, b, h, place.first, count, lanes, j, n, s.bias);
    const score_run run{b, h, place.first, j, 0, bias};
    sum* out = s.out + place.home / sliver * out_size(p);
    const index_t height = tile_rows<Element>(static_cast<int>(lanes / width)),
                  found_before = bare ? n / height * height : 0;
    by_halves<tile_vectors>(lanes / width, [&](auto vectors, index_t column) {
      const index_t l = column * width;
      softmax_columns<vectors>(p, head.shape, run, place.home, l, count, lanes, n, plan, top + l, found_before, out, s);
    });
    if constexpr (own_probabilities) base::pad_keys(n, s.probabilities, lanes, lanes);
    if constexpr (captures) s.map.keep(p, b, place.home, j, n, lanes, plan, s.scores, s.level + place.home);
    const bool last = head.packed_at_once && j + n == head.keys;
    const auto fetch_out = [&](index_t i, index_t i_end, index_t of) {
      if (!last) return;
      p.each_out(b, h, place.first, place.at, [&](const auto& to, index_t row, const sum*, index_t) {
        base::fetch_share(to, row, count, i, i_end, of);
      });
    };
    const auto add_values = [&](index_t from, index_t to) {
      constexpr index_t per_word = compute<Element>::elements_per_word;
      base::multiply(words<Element>(to - from), values + from / per_word, p.d_v,
                     s.probabilities + from / per_word * lanes, lanes, lanes, out, lanes, true, fetch_out);
    };
    plan.each_run(n, [&](index_t from, index_t to) {
      if constexpr (requires { p.each_valued(from, to, add_values); } && !in_matrices<Element>)
        p.each_valued(j + from, j + to, [&](index_t begin, index_t end) { add_values(begin - j, end - j); });
      else
        add_values(from, to);
    });
    s.scores = block_scores;
  }

  // Packs the queries of a sliver; there is nothing of its output, and level and sum are those of nothing or of a sink.
  static void start(const Problem& p, const head_place& head, const sliver_place& place, parts& s) noexcept {
    const auto q = head_of(p.query_rows(head.b, head.h));
    const operand<std::remove_cvref_t<decltype(q)>> query_lines{q, true};
    word* panel = s.queries + place.home / sliver * query_words(p);
    each_depth_block(p.d, depth_step<Element>(p.d), [&](index_t c, index_t depth) {
      pack_right<Element>(query_lines, place.first, place.count, place.lanes, c, depth, panel, s.pack);
      panel += words<Element>(depth) * place.lanes;
    });
    std::fill_n(s.out + place.home / sliver * out_size(p), out_size(p), sum{});
    sum level = -infinity;
    attention::detail::each_stage(*p.scores, [&](const auto& stage) {
      if constexpr (attention::detail::is_sinks<std::remove_cvref_t<decltype(stage)>>)
        level = static_cast<sum>(stage.logits.data[head.h * stage.logits.strides[0]]);
    });
    std::fill_n(s.level + place.home, sliver, level);
    std::fill_n(s.total + place.home, sliver, level == -infinity ? sum{} : sum{1});
    if constexpr (captures) s.map.start(place.home);
  }

  // By how many powers of two a score may exceed the level of its query before the level, and with it what is there of
  // the output, is brought up to it. Dao et al. do so in FlashAttention-4.
  static constexpr sum headroom = 8;

  // Scores of the keys [from, to), and their maxima.
  template <bool Masked, int Vectors, class Scores>
  static MLKIT_ALWAYS_INLINE void score_rows(const Scores& pipeline, const shape_type& shape, const score_run& at,
                                             index_t l, index_t count, index_t lanes, index_t from, index_t to, V* top,
                                             const parts& s) noexcept {
    sum* x = s.scores + from * lanes + l;
    for (index_t j = from; j < to; ++j, x += lanes) {
      MLKIT_UNROLL
      for (int c = 0; c < Vectors; ++c) {
        const index_t lane = c * width;
        const score_run run{at.b,
                            at.h,
                            at.i + l + lane,
                            at.j + j,
                            static_cast<int>(std::min(width, count - l - lane)),
                            base::bias_at(at.bias, j * lanes + l + lane)};
        V y = V::load(x + lane);
        if constexpr (!only_scaled)
          y = all_scores<Masked>(pipeline, y, shape, run);
        else if constexpr (Masked)
          y = masked_score(pipeline, y, shape, run);
        if constexpr (!only_scaled || Masked) y.store(x + lane);
        top[c] = max(top[c], y);
      }
    }
  }

  // Columns [l, l + Vectors width) of S^T become those of P^T; the output so far is brought to their new maxima.
  // `found` are those of the keys before `found_before` in groups without a mask.
  template <int Vectors>
  static void softmax_columns(const Problem& p, const shape_type& shape, score_run at, index_t row, index_t l,
                              index_t count, index_t lanes, index_t n, const block_plan& plan, const sum* found,
                              index_t found_before, sum* out, const parts& s) noexcept {
    const typename base::template local<typename Problem::scores_type> pipeline = *p.scores;
    const V unit(s.scale * base::log2_e);
    V top[Vectors], level[Vectors], total[Vectors];
    MLKIT_UNROLL
    for (int c = 0; c < Vectors; ++c) top[c] = V::load(found + c * width);
    const index_t first_key = at.j, first_query = at.i + l;
    for (index_t g = 0; g * group < n; ++g) {
      const index_t from = g * group, to = std::min<index_t>(n, from + group);
      if (plan.groups[g] == attention::block::full)
        score_rows<false, Vectors>(pipeline, shape, at, l, count, lanes, std::max(from, found_before), to, top, s);
      else if (plan.groups[g] == attention::block::partial)
        score_rows<true, Vectors>(pipeline, shape, at, l, count, lanes, from, to, top, s);
    }
    MLKIT_UNROLL
    for (int c = 0; c < Vectors; ++c) {
      const index_t lane = row + l + c * width;
      const V before = V::load(s.level + lane), now = max(before, top[c]);
      const V kept = V::select((now - before) * unit > V(headroom), now, before);
      kept.store(s.level + lane);
      level[c] = V::select(kept == minus_infinity<V>(), V::zero(), kept);
      const V factor = exp2_bounded((before - level[c]) * unit);
      total[c] = V::load(s.total + lane) * factor;
      // Most blocks raise no level.
      if (base::any_lane(kept > before) && base::any_lane(before > minus_infinity<V>()))
        for (index_t i = 0; i < p.d_v; ++i) {
          sum* x = out + i * lanes + l + c * width;
          (V::load(x) * factor).store(x);
        }
    }
    sum factors[drops ? 4 * Vectors * width : 1];
    plan.each_run(n, [&](index_t from, index_t to) {
      V sums[Vectors];
      MLKIT_UNROLL
      for (int c = 0; c < Vectors; ++c) sums[c] = total[c];
      sum* x = s.scores + from * lanes + l;
      // Exponentials of a key's scores, dropped.
      const auto row = [&](index_t j, const sum* y, V* dropped) {
        const score_run key{at.b, at.h, first_query, first_key + j, 0};
        const sum* kept = next_factors(pipeline, shape, key, Vectors * width, factors);
        MLKIT_UNROLL
        for (int c = 0; c < Vectors; ++c) {
          const V z = exp2_bounded((V::load(y + c * width) - level[c]) * unit);
          sums[c] += z;
          dropped[c] = drop_any(pipeline, z, kept + c * width);
        }
      };
      if constexpr (own_probabilities) {
        word* y = s.probabilities + from / 2 * lanes + l;
        for (index_t j = from; j < to; j += 2, x += 2 * lanes, y += lanes) {
          V low[Vectors], high[Vectors];
          row(j, x, low);
          MLKIT_UNROLL
          for (int c = 0; c < Vectors; ++c) high[c] = V::zero();
          if (j + 1 < to) row(j + 1, x + lanes, high);
          if constexpr (captures) {
            MLKIT_UNROLL
            for (int c = 0; c < Vectors; ++c) {
              low[c].store(x + c * width);
              if (j + 1 < to) high[c].store(x + lanes + c * width);
            }
          }
          MLKIT_UNROLL
          for (int c = 0; c < Vectors; ++c) base::pair(low[c], high[c], y + c * width);
        }
      } else {
        for (index_t j = from; j < to; ++j, x += lanes) {
          V dropped[Vectors];
          row(j, x, dropped);
          MLKIT_UNROLL
          for (int c = 0; c < Vectors; ++c) dropped[c].store(x + c * width);
        }
      }
      MLKIT_UNROLL
      for (int c = 0; c < Vectors; ++c) total[c] = sums[c];
    });
    MLKIT_UNROLL
    for (int c = 0; c < Vectors; ++c) total[c].store(s.total + row + l + c * width);
  }

  // O = O^T transposed, over the sums; and the map's part.
  static void finish(const Problem& p, const head_place& head, const sliver_place& place, const parts& s) noexcept {
    const index_t b = head.b, h = head.h, home = place.home, lanes = place.lanes;
    if constexpr (captures) s.map.finish(p, b, h, place, head.keys, s.scale, s.level + home, s.total + home, s.scores);
    sum* out = s.out + home / sliver * out_size(p);
    for (index_t l = 0; l < lanes; l += width) {
      const V total = V::load(s.total + home + l);
      const V inverse = V::select(total == V::zero(), V::zero(), V(sum{1}) / total);
      for (index_t c = 0; c < p.d_v; ++c) {
        sum* x = out + c * lanes + l;
        (V::load(x) * inverse).store(x);
      }
    }
    p.each_out(b, h, place.first, place.at, [&](const auto& to, index_t row, const sum* more, index_t more_stride) {
      for (index_t c = 0; more && c < to.cols; ++c)
        for (index_t l = 0; l < lanes; l += width)
          (V::load(out + c * lanes + l) + V::load(more + c * more_stride + l)).store(out + c * lanes + l);
      base::write_turned(out, lanes, place.count, to, row, s.scores);
      out += to.cols * lanes;
    });
    if (!p.lse.data) return;
    // In f64, as exponents of backward are relative to what this rounds to. log(0) = -inf.
    using wide = vec<double>;
    double level[sliver], total[sliver];
    std::copy_n(s.level + home, lanes, level), std::copy_n(s.total + home, lanes, total);
    for (index_t l = 0; l < place.count; l += wide::width)
      fma(wide::load(level + l), wide(static_cast<double>(s.scale)), log(wide::load(total + l))).store(total + l);
    for (index_t i = 0; i < place.count; ++i) p.lse_at(b, h, place.first + i) = static_cast<sum>(total[i]);
  }
};

// One instruction set's functions.
template <class E, class Problem>
attention::detail::forward_kernels<Problem> forward_entry() noexcept {
  using kernel = attend_forward<panel_element<E>, Problem>;
  return {kernel::sliver, &kernel::scratch_bytes, &kernel::run};
}
