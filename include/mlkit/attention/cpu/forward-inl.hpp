// Attention forward on tiles: for a block of keys, S^T = K Q^T, an online softmax down its columns, O^T += V^T P^T.

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
  using typename base::sum;
  using typename base::V;
  using typename base::word;
  using shape_type = attention::detail::score_shape;

  struct parts {
    word* queries;        // right panels [slivers][words of d][lanes]
    word *keys, *values;  // left panels [depth blocks of d][keys][stride], [d_v][stride]
    sum* scores;          // [keys][lanes]
    word* probabilities;  // right panel [words of keys][lanes]; the scores' memory where the types agree
    sum* out;             // [slivers][d_v][lanes]
    sum *top, *total;     // of each query: maximum and sum so far
    sum* bias;            // of a sliver, [keys][lanes]
    Element* pack;
  };
  static constexpr bool own_probabilities = !std::is_same_v<Element, sum>;
  static constexpr bool drops = attention::detail::any_dropout<typename Problem::scores_type>;
  static constexpr bool has_bias = attention::detail::any_bias<typename Problem::scores_type>;

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
    all.take(s.bias, has_bias ? base::bias_size : 0);
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
            base::multiply(words<Element>(depth), left + from * stride, to - from, right, lanes, lanes,
                           s.scores + from * lanes, lanes, c > 0);
            left += (keys_at_once + group) * stride;
            right += words<Element>(depth) * lanes;
          });
        });
        const sum* bias = base::turn_bias(p, b, h, first + at, count, lanes, j, n, s.bias);
        const score_run place{b, h, first + at, j, 0, bias};
        sum* out = s.out + at / sliver * out_size(p);
        for (index_t l = 0; l < lanes; l += 4 * width) softmax(p, shape, place, at, l, count, lanes, n, plan, out, s);
        plan.each_run(n, [&](index_t from, index_t to) {
          constexpr index_t per_word = compute<Element>::elements_per_word;
          base::multiply(words<Element>(to - from), s.values + from / per_word, p.d_v,
                         s.probabilities + from / per_word * lanes, lanes, lanes, out, lanes, true);
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
          const score_run run{at.b,
                              at.h,
                              first_query + lane,
                              first_key + j,
                              static_cast<int>(std::min(width, count - l - lane)),
                              base::bias_at(at.bias, j * lanes + l + lane)};
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
      if (base::any_lane(now > before) && base::any_lane(before > minus_infinity<V>()))
        for (index_t i = 0; i < p.d_v; ++i) {
          sum* x = out + i * lanes + l + c * width;
          (V::load(x) * factor).store(x);
        }
    }
    sum factors[drops ? 4 * Vectors * width : 1];
    plan.each_run(n, [&](index_t from, index_t to) {
      for (index_t j = from; j < to; ++j) {
        sum* x = s.scores + j * lanes + l;
        const score_run key{at.b, at.h, first_query, first_key + j, 0};
        const sum* kept = next_factors(*p.scores, shape, key, Vectors * width, factors);
        MLKIT_UNROLL
        for (int c = 0; c < Vectors; ++c) {
          const V y = exp2_nonpositive((V::load(x + c * width) - level[c]) * base::log2_e);
          total[c] += y;
          const score_run run{at.b, at.h, first_query + c * width, first_key + j, 0, nullptr, kept + c * width};
          drop_any(*p.scores, y, run).store(x + c * width);
        }
      }
      if constexpr (own_probabilities)
        base::template pair_rows<Vectors>(s.scores + from * lanes + l, lanes, to - from,
                                          s.probabilities + from / 2 * lanes + l, lanes);
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
