// Attention backward on tiles: for a block of queries, block by block of keys, S^T = K Q^T and dP^T = V dO^T, from them
// P^T and dS^T, and with these dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T.

template <class Element, class Problem>
struct attend_backward : attend<Element> {
  using base = attend<Element>;
  using base::group;
  using base::infinity;
  using base::padded;
  using base::sliver;
  using base::stride;
  using base::width;
  using typename base::block_plan;
  using typename base::shelf;
  using typename base::sum;
  using typename base::V;
  using typename base::word;
  using shape_type = attention::detail::score_shape;

  static constexpr bool has_bias = attention::detail::any_bias<typename Problem::scores_type>;
  static constexpr int groups_of_block = (has_bias ? 96 : 120) / group;  // whole cache lines of a bias
  static constexpr index_t block_keys = index_t{groups_of_block} * group;
  static constexpr index_t slivers_of_block = 256 / sliver;
  static constexpr index_t block_queries = slivers_of_block * sliver;  // which one left panel row holds
  static constexpr bool drops = attention::detail::any_dropout<typename Problem::scores_type>;
  static constexpr bool only_scaled = attention::detail::only_scaled<typename Problem::scores_type>;
  static constexpr bool paired = !std::is_same_v<Element, sum>;
  static_assert(block_queries <= compute<Element>::depth_block);

  struct parts {
    // Right panels over queries: [slivers][words of d or d_v][lanes].
    word *queries, *output_gradients;
    // Right panels whose depth is the queries: [slivers of d or d_v][words of queries][lanes].
    word *query_rows, *output_rows;
    // [depth blocks][keys][stride], and with the keys along k, [d][stride]; of all blocks, where these are kept.
    shelf keys, values, key_columns;
    index_t kept;             // blocks
    bool* packed;             // of each that is kept
    sum *scores, *gradients;  // [keys][stride]: S and P, dP and dS
    word *p_left, *ds_left;   // the same as left panels; the same memory where the types agree
    word* ds_right;           // right panel [words of keys][block_queries]
    sum* dq;                  // [slivers][d][lanes]
    sum *level, *delta;       // of each query: lse, and D = sum of dO * O, less dlse
    sum* turned;              // a sliver's dQ, or its gradient of the bias, transposed
    sum* bias;                // of a sliver, [keys][lanes], then its gradient
    Element* pack;
    sum scale;  // where it is all that happens to scores
  };

  static index_t right_words(index_t depth) noexcept {
    return sliver * (words<Element>(depth) + base::depth_blocks(depth));
  }
  static index_t line_slivers(index_t lines) noexcept { return ceil_div(lines, sliver); }
  static index_t rows_words(index_t lines) noexcept {
    return line_slivers(lines) * words<Element>(block_queries) * sliver;
  }
  // Sums of dK and dV: [keys][padded d] and [keys][padded d_v].
  static index_t sums_size(const Problem& p, index_t keys) noexcept {
    return round_up(keys + group, index_t{group}) * (padded(p.d) + padded(p.d_v));
  }

  static index_t dq_size(const Problem& p) noexcept { return sliver * round_up(p.d, index_t{group}); }

  static index_t lay_out(const Problem& p, std::byte* memory, parts& s) noexcept {
    typename base::pieces all(memory);
    const index_t panel = (block_keys + group) * stride;
    s.kept = blocks_kept(p);
    all.take(s.queries, slivers_of_block * right_words(p.d));
    all.take(s.output_gradients, slivers_of_block * right_words(p.d_v));
    all.take(s.query_rows, rows_words(p.d));
    all.take(s.output_rows, rows_words(p.d_v));
    s.keys.take(all, s.kept, block_keys + group, words<Element>(p.d), base::depth_blocks(p.d));
    s.values.take(all, s.kept, block_keys + group, words<Element>(p.d_v), base::depth_blocks(p.d_v));
    s.key_columns.take(all, s.kept, round_up(p.d + group, index_t{group}), words<Element>(block_keys), 1);
    all.take(s.packed, s.kept);
    all.take(s.scores, panel);
    all.take(s.gradients, panel);
    if constexpr (paired) {
      all.take(s.p_left, panel);
      all.take(s.ds_left, panel);
      all.take(s.ds_right, words<Element>(block_keys) * block_queries);
    } else {
      s.p_left = s.scores;
      s.ds_left = s.ds_right = s.gradients;
    }
    all.take(s.dq, slivers_of_block * dq_size(p));
    all.take(s.level, block_queries);
    all.take(s.delta, block_queries);
    all.take(s.turned, sliver * std::max(block_keys, base::keys_at_once));
    all.take(s.bias, has_bias ? base::bias_size : 0);
    all.take(s.pack, pack_scratch<Element>);
    return all.bytes();
  }
  // Blocks of keys that stay packed from one block of queries to the next: all that there are, where the second-level
  // cache has room for them, or none.
  static index_t blocks_kept(const Problem& p) noexcept {
    const index_t keys = p.forward.k.extents[2], bytes = keys * (2 * p.d + p.d_v) * index_t{sizeof(Element)};
    const bool keeps = bytes <= kept_bytes && base::depth_blocks(p.d) <= 1 && base::depth_blocks(p.d_v) <= 1;
    return keeps ? std::max<index_t>(1, ceil_div(keys, block_keys)) : 1;
  }
  static constexpr index_t kept_bytes = index_t{2} << 20;

  static index_t scratch_bytes(const Problem& p) noexcept {
    parts unused;
    return lay_out(p, nullptr, unused);
  }

  // Adds to the sums of dK and dV of kv head `kv` of batch b what blocks [begin, end) of its queries give, and writes
  // those queries' dQ. Blocks count through the heads that share the kv head.
  static void run(const Problem& p, index_t b, index_t kv, index_t begin, index_t end, sum* sums,
                  std::byte* memory) noexcept {
    parts s;
    lay_out(p, memory, s);
    s.scale = base::scale_of(*p.forward.scores);
    [[maybe_unused]] const matrix_registers<Element> registers;
    const shape_type shape = p.forward.shape(b);
    const index_t blocks = ceil_div(shape.queries, block_queries);
    sum* dk = sums;
    sum* dv = sums + round_up(shape.keys + group, index_t{group}) * padded(p.d);
    std::fill_n(s.packed, s.kept, false);
    for (index_t at = begin; at < end; ++at) {
      const index_t first = at % blocks * block_queries;
      run_block<false>(p, shape, b, kv * p.forward.group + at / blocks, first,
                       std::min(block_queries, shape.queries - first), dk, dv, nullptr, s);
    }
  }

  // The gradient of a bias for those of its rows that serve the queries [first, last), summed in their order over the
  // batches and heads that share it; totals [queries, or 1 where they share it][keys, or 1].
  static void run_bias(const Problem& p, index_t b, index_t b_end, index_t h, index_t h_end, index_t first,
                       index_t last, sum* totals, std::byte* memory) noexcept {
    parts s;
    lay_out(p, memory, s);
    s.scale = base::scale_of(*p.forward.scores);
    const auto& step = p.dbias.strides;
    const index_t rows = step[2] == 0 ? 1 : last - first, columns = p.dbias.extents[3];
    std::fill_n(totals, rows * columns, sum{});
    [[maybe_unused]] const matrix_registers<Element> registers;
    for (index_t batch = b; batch < b_end; ++batch)
      for (index_t head = h; head < h_end; ++head) {
        std::fill_n(s.packed, s.kept, false);
        for (index_t i = first; i < last; i += block_queries)
          run_block<true>(p, p.forward.shape(batch), batch, head, i, std::min(block_queries, last - i), nullptr,
                          nullptr, totals + (step[2] == 0 ? 0 : (i - first) * columns), s);
      }
    for (index_t r = 0; r < rows; ++r) {
      auto* to = p.dbias.data + b * step[0] + h * step[1] + (first + r) * step[2];
      for (index_t c = 0; c < columns; ++c)
        to[c * step[3]] = static_cast<typename Problem::bias_type>(totals[r * columns + c]);
    }
  }

  // dK and dV from their sums; keys that are not there have none, and the last tile has left anything in their place.
  static void finish(const Problem& p, index_t b, index_t kv, const sum* sums) noexcept {
    const index_t keys = p.forward.keys(b), there = attention::detail::key_limit(*p.forward.scores, b, keys);
    const auto write = [&](const auto& to, const sum* from, index_t lanes) {
      using Out = std::remove_cvref_t<decltype(*to.data)>;
      for (index_t j = 0; j < keys; ++j, from += lanes) {
        auto* y = to.data + j * to.row_stride;
        if (j < there && to.col_stride == 1)
          decode_run(set_tag{}, dense_source<sum>{from, 1, to.cols, to.cols, 1}, 0, 0, to.cols, y);
        else
          for (index_t c = 0; c < to.cols; ++c) y[c * to.col_stride] = static_cast<Out>(j < there ? from[c] : sum{});
      }
    };
    write(p.dk_rows(b, kv), sums, padded(p.d));
    write(p.dv_rows(b, kv), sums + round_up(keys + group, index_t{group}) * padded(p.d), padded(p.d_v));
  }

 private:
  template <class F>
  static void each_sliver(index_t count, F&& f) noexcept {
    for (index_t at = 0; at < count; at += sliver) {
      const index_t n = std::min(sliver, count - at);
      f(at, n, padded(n));
    }
  }

  // Packs the lines of a sliver, the block's lines [at, at + n), as a right panel for S^T or dP^T.
  template <class Source>
  static void pack_over_queries(const operand<Source>& op, index_t first, index_t at, index_t n, index_t depth,
                                word* panels, Element* pack) noexcept {
    word* panel = panels + at / sliver * right_words(depth);
    each_depth_block(depth, depth_step<Element>(depth), [&](index_t c, index_t deep) {
      pack_right<Element>(op, first + at, n, padded(n), c, deep, panel, pack);
      panel += words<Element>(deep) * padded(n);
    });
  }
  // Packs the same rows as parts of right panels whose depth is the queries.
  template <class Source>
  static void pack_rows(const operand<Source>& op, index_t first, index_t at, index_t n, index_t lines, word* panels,
                        Element* pack) noexcept {
    each_sliver(lines, [&](index_t line, index_t count, index_t lanes) {
      pack_right<Element>(op, line, count, lanes, first + at, n,
                          panels + line * words<Element>(block_queries) + words<Element>(at) * lanes, pack);
    });
  }

  template <bool BiasOnly>
  static void run_block(const Problem& p, const shape_type& shape, index_t b, index_t h, index_t first, index_t count,
                        sum* dk, sum* dv, sum* totals, const parts& s) noexcept {
    const auto q = head_of(p.forward.query_rows(b, h)), k = head_of(p.forward.key_rows(b, h)),
               v = head_of(p.forward.value_rows(b, h));
    const auto dout = head_of(p.dout_rows(b, h));
    using Source = std::remove_cvref_t<decltype(q)>;
    using Gradient = std::remove_cvref_t<decltype(dout)>;
    const index_t d = p.d, d_v = p.d_v, keys = attention::detail::key_limit(*p.forward.scores, b, shape.keys);
    // Sliver by sliver, so that what is read twice or thrice is near.
    each_sliver(count, [&](index_t at, index_t n, index_t) {
      pack_over_queries(operand<Source>{q, true}, first, at, n, d, s.queries, s.pack);
      if constexpr (!BiasOnly) pack_rows(operand<Source>{q, false}, first, at, n, d, s.query_rows, s.pack);
      pack_over_queries(operand<Gradient>{dout, true}, first, at, n, d_v, s.output_gradients, s.pack);
      if constexpr (!BiasOnly) pack_rows(operand<Gradient>{dout, false}, first, at, n, d_v, s.output_rows, s.pack);
      find_deltas(p, b, h, first, at, n, s);
    });
    if constexpr (!BiasOnly) std::fill_n(s.dq, slivers_of_block * dq_size(p), sum{});

    for (index_t j = 0; j < keys; j += block_keys) {
      const index_t n = std::min(block_keys, keys - j);
      block_plan plans[slivers_of_block];
      bool any = false;
      each_sliver(count, [&](index_t at, index_t m, index_t) {
        block_plan& plan = plans[at / sliver];
        plan = base::plan_block(p.forward, shape, b, h, first + at, first + at + m, j, j + n);
        any = any || plan.any;
      });
      if (!any) continue;
      const index_t block = s.kept > 1 ? j / block_keys : 0;
      word *const keys_left = s.keys.at(block), *const values_left = s.values.at(block),
                  *const columns_left = s.key_columns.at(block);
      if (s.kept == 1 || !s.packed[block]) {
        pack_keys(operand<Source>{k, true}, j, n, d, keys_left, s.pack);
        pack_keys(operand<Source>{v, true}, j, n, d_v, values_left, s.pack);
        pack_left<Element>(operand<Source>{k, false}, 0, d, j, n, reinterpret_cast<Element*>(columns_left), s.pack, 0);
        s.packed[block] = true;
      }
      each_sliver(count, [&](index_t at, index_t m, index_t lanes) {
        const block_plan& plan = plans[at / sliver];
        clear_empty(plan, n, at, lanes, s);
        if (!plan.any) return;
        plan.each_run(n, [&](index_t from, index_t to) {
          multiply_over_depth(d, keys_left, from, to, s.queries + at / sliver * right_words(d), lanes, s.scores + at,
                              [&](index_t row, index_t row_end, index_t of) {
                                with_bias_rows(*p.forward.scores, [&](const auto& bias) {
                                  base::fetch_bias(bias, b, h, first + at, m, j, n, row, row_end, of);
                                });
                              });
          multiply_over_depth(d_v, values_left, from, to, s.output_gradients + at / sliver * right_words(d_v), lanes,
                              s.gradients + at);
        });
        const sum* bias = base::turn_bias(p.forward, b, h, first + at, m, lanes, j, n, s.bias);
        find_gradients(p, shape, {b, h, first + at, j, 0, bias}, at, m, lanes, n, plan, s);
        if constexpr (paired) base::pad_keys(n, s.ds_right + at, right_stride, lanes);
        if constexpr (has_bias)
          if (p.dbias.data) turn_bias_gradient(plan, lanes, n, s);
        if constexpr (BiasOnly) add_bias_rows(p, at, m, j, n, totals, s);
        if constexpr (!BiasOnly) {
          // Rows of the bias's gradient leave a few at a time, so that no tile waits for memory to take all of them.
          index_t written = 0;
          const auto write_bias_until = [&](index_t end) {
            if constexpr (has_bias)
              if (p.dbias.data)
                for (; written < end; ++written) write_bias_row(p, b, h, first + at, written, j, n, s);
          };
          plan.each_run(n, [&](index_t from, index_t to) {
            const word* right = s.ds_right + at + from / compute<Element>::elements_per_word * right_stride;
            base::multiply(words<Element>(to - from), columns_left + from / compute<Element>::elements_per_word, d,
                           right, right_stride, lanes, s.dq + at / sliver * dq_size(p), lanes, true,
                           [&](index_t i, index_t i_end, index_t of) {
                             if (j + n == keys) base::fetch_share(p.dq_rows(b, h), first + at, m, i, i_end, of);
                             write_bias_until(m * i_end / of);
                           });
          });
          write_bias_until(m);
        }
      });
      if constexpr (!BiasOnly) {
        add_key_gradients(plans, n, count, d, s.ds_left, s.query_rows, dk + j * padded(d));
        add_key_gradients(plans, n, count, d_v, s.p_left, s.output_rows, dv + j * padded(d_v));
      }
    }
    if constexpr (!BiasOnly) write_dq(p, b, h, first, count, s);
    if (p.dbias_past_caches) settle_stores();
  }

  static constexpr index_t right_stride = paired ? block_queries : stride;

  template <class Source>
  static void pack_keys(const operand<Source>& op, index_t j, index_t n, index_t depth, word* panel,
                        Element* pack) noexcept {
    each_depth_block(depth, depth_step<Element>(depth), [&](index_t c, index_t deep) {
      pack_left<Element>(op, j, n, c, deep, reinterpret_cast<Element*>(panel), pack, 0);
      panel += (block_keys + group) * stride;
    });
  }

  // c[keys from, to)[lanes] = left right over all of a depth.
  static void multiply_over_depth(index_t depth, const word* left, index_t from, index_t to, const word* right,
                                  index_t lanes, sum* c, const auto&... meanwhile) noexcept {
    c += from * stride;
    if (depth == 0)
      for (index_t j = from; j < to; ++j, c += stride) std::fill_n(c, lanes, sum{});
    each_depth_block(depth, depth_step<Element>(depth), [&](index_t at, index_t deep) {
      base::multiply(words<Element>(deep), left + from * stride, to - from, right, lanes, lanes, c, stride, at > 0,
                     meanwhile...);
      left += (block_keys + group) * stride;
      right += words<Element>(deep) * lanes;
    });
  }

  // Queries whose gradients are taken as depth run over slivers: those without keys in a group give zeros.
  static void clear_empty(const block_plan& plan, index_t n, index_t at, index_t lanes, const parts& s) noexcept {
    for (index_t j = 0; j < n; ++j) {
      if (plan.groups[j / group] != attention::block::empty) continue;
      const auto clear = [&](word* panel) {
        Element* x = reinterpret_cast<Element*>(panel + j * stride) + at;
        __builtin_memset(static_cast<void*>(x), 0, static_cast<std::size_t>(lanes) * sizeof(Element));
      };
      clear(s.p_left);
      clear(s.ds_left);
    }
  }

  // D = sum over d_v of dO * O, less dlse, and the lse that probabilities are taken against.
  static void find_deltas(const Problem& p, index_t b, index_t h, index_t first, index_t at, index_t count,
                          const parts& s) noexcept {
    const auto out = p.forward.out_rows(b, h);
    const auto dout = p.dout_rows(b, h);
    const bool runs = out.col_stride == 1 && dout.col_stride == 1;
    constexpr index_t at_once = 4;
    for (index_t i = 0; i < count; i += at_once) {
      sum sums[at_once] = {};
      const index_t some = std::min(at_once, count - i);
      const auto* x = out.data + (first + at + i) * out.row_stride;
      const auto* y = dout.data + (first + at + i) * dout.row_stride;
      if (runs && some == at_once) {
        V partial[at_once];
        MLKIT_UNROLL
        for (int r = 0; r < at_once; ++r) partial[r] = V::zero();
        index_t c = 0;
        for (; c + width <= p.d_v; c += width) {
          MLKIT_UNROLL
          for (int r = 0; r < at_once; ++r)
            partial[r] = fma(V::load(x + r * out.row_stride + c), V::load(y + r * dout.row_stride + c), partial[r]);
        }
        if (const int rest = static_cast<int>(p.d_v - c); rest > 0) {
          MLKIT_UNROLL
          for (int r = 0; r < at_once; ++r)
            partial[r] =
                fma(V::load(x + r * out.row_stride + c, rest), V::load(y + r * dout.row_stride + c, rest), partial[r]);
        }
        sum4(partial, sums);
      } else {
        for (index_t r = 0; r < some; ++r)
          for (index_t c = 0; c < p.d_v; ++c)
            sums[r] += static_cast<sum>(x[r * out.row_stride + c * out.col_stride]) *
                       static_cast<sum>(y[r * dout.row_stride + c * dout.col_stride]);
      }
      for (index_t r = 0; r < some; ++r) {
        const index_t query = first + at + i + r;
        const sum lse = p.forward.lse_at(b, h, query);
        const bool sees = lse != -infinity;  // else it has no gradient, whatever dlse (0 / 0 in merges of nothing)
        s.delta[at + i + r] = sees ? sums[r] - (p.dlse.data ? p.dlse_at(b, h, query) : sum{}) : sum{};
        s.level[at + i + r] = sees ? lse : infinity;
      }
    }
    for (index_t i = count; i < padded(count); ++i) {  // lanes that are no queries
      s.level[at + i] = infinity;
      s.delta[at + i] = 0;
    }
  }

  // P, as it meets V, and dS of a register of scores. The gradient of a bias goes to dbias.
  template <bool Masked, class Scores>
  static MLKIT_ALWAYS_INLINE void gradients_at(const Scores& pipeline, V score, V dp, V level, V delta, V scale,
                                               const shape_type& shape, const score_run& run, const sum* factors,
                                               sum* dbias, V& kept, V& ds) noexcept {
    const auto through_softmax = [&](V probability) {
      kept = drop_any(pipeline, probability, factors);
      return probability * (drop_any(pipeline, dp, factors) - delta);
    };
    if constexpr (only_scaled) {
      const V exponent = Masked ? masked_score(pipeline, score * scale, shape, run) - level : fma(score, scale, -level);
      ds = through_softmax(exp2_bounded(exponent * base::log2_e)) * scale;
    } else {
      ds = all_gradients<Masked>(
          pipeline, score, shape, run,
          [&](V last) { return through_softmax(exp2_bounded((last - level) * base::log2_e)); },
          [&](const auto& stage, V g) {
            if constexpr (attention::detail::is_bias<std::remove_cvref_t<decltype(stage)>>) g.store(dbias);
          });
    }
  }

  // The same of the keys [from, to) in lanes [l, l + Vectors width) of a sliver.
  template <bool Masked, int Vectors, class Scores>
  static MLKIT_ALWAYS_INLINE void gradient_rows(const Scores& pipeline, const shape_type& shape, const score_run& at,
                                                index_t from_lane, index_t l, index_t count, index_t lanes,
                                                index_t from, index_t to, const V* level, const V* delta,
                                                const parts& s) noexcept {
    const V scale(s.scale);
    sum* x = s.scores + from * stride + from_lane + l;
    sum* y = s.gradients + from * stride + from_lane + l;
    sum factors[drops ? 4 * Vectors * width : 1];
    constexpr int at_once = compute<Element>::elements_per_word;
    for (index_t j = from; j < to; j += at_once, x += at_once * stride, y += at_once * stride) {
      const int some = j + 1 < to ? at_once : 1;
      const sum* factor[2];
      for (int r = 0; r < some; ++r)
        factor[r] =
            next_factors(pipeline, shape, score_run{at.b, at.h, at.i + l, at.j + j + r, 0}, Vectors * width, factors);
      MLKIT_UNROLL
      for (int c = 0; c < Vectors; ++c) {
        const index_t lane = c * width;
        V kept[2] = {V::zero(), V::zero()}, ds[2] = {V::zero(), V::zero()};
        MLKIT_UNROLL
        for (int r = 0; r < at_once; ++r) {
          if (r >= some) continue;
          const index_t in_sliver = (j + r) * lanes + l + lane;
          const score_run run{at.b,
                              at.h,
                              at.i + l + lane,
                              at.j + j + r,
                              static_cast<int>(std::min(width, count - l - lane)),
                              base::bias_at(at.bias, in_sliver)};
          gradients_at<Masked>(pipeline, V::load(x + r * stride + lane), V::load(y + r * stride + lane), level[c],
                               delta[c], scale, shape, run, factor[r] + lane, s.bias + in_sliver, kept[r], ds[r]);
        }
        if constexpr (paired) {
          for (int r = 0; r < some; ++r) {
            const auto round = [&](word* panel, V v) {
              base::store_rounded(v, reinterpret_cast<Element*>(panel + (j + r) * stride) + from_lane + l + lane);
            };
            round(s.p_left, kept[r]), round(s.ds_left, ds[r]);
          }
          base::pair(ds[0], ds[1], s.ds_right + j / 2 * right_stride + from_lane + l + lane);
        } else {
          kept[0].store(x + lane);
          ds[0].store(y + lane);
        }
      }
    }
  }

  // From S and dP of a sliver: P and dS.
  template <int Vectors>
  static void gradient_columns(const Problem& p, const shape_type& shape, const score_run& at, index_t from_lane,
                               index_t l, index_t count, index_t lanes, index_t n, const block_plan& plan,
                               const parts& s) noexcept {
    const typename base::template local<typename Problem::scores_type> pipeline = *p.forward.scores;
    V level[Vectors], delta[Vectors];
    MLKIT_UNROLL
    for (int c = 0; c < Vectors; ++c) {
      level[c] = V::load(s.level + from_lane + l + c * width);
      delta[c] = V::load(s.delta + from_lane + l + c * width);
    }
    for (index_t g = 0; g * group < n; ++g) {
      const index_t from = g * group, to = std::min<index_t>(n, from + group);
      if (plan.groups[g] == attention::block::full)
        gradient_rows<false, Vectors>(pipeline, shape, at, from_lane, l, count, lanes, from, to, level, delta, s);
      else if (plan.groups[g] == attention::block::partial)
        gradient_rows<true, Vectors>(pipeline, shape, at, from_lane, l, count, lanes, from, to, level, delta, s);
    }
  }
  static void find_gradients(const Problem& p, const shape_type& shape, const score_run& at, index_t from_lane,
                             index_t count, index_t lanes, index_t n, const block_plan& plan, const parts& s) noexcept {
    by_halves<tile_vectors>(lanes / width, [&](auto vectors, index_t column) {
      gradient_columns<vectors>(p, shape, at, from_lane, column * width, count, lanes, n, plan, s);
    });
  }
  // turned[queries][n] = a sliver's gradients of the bias, which are zero where groups of keys are empty.
  static void turn_bias_gradient(const block_plan& plan, index_t lanes, index_t n, const parts& s) noexcept {
    for (index_t key = 0; key < n; ++key)
      if (plan.groups[key / group] == attention::block::empty) std::fill_n(s.bias + key * lanes, lanes, sum{});
    transpose(s.bias, lanes, n, lanes, s.turned, n);
  }
  // Row r of these to where query i + r has its gradients of the keys from j on.
  static void write_bias_row(const Problem& p, index_t b, index_t h, index_t i, index_t r, index_t j, index_t n,
                             const parts& s) noexcept {
    using Out = typename Problem::bias_type;
    const auto& step = p.dbias.strides;
    const sum* from = s.turned + r * n;
    Out* to = p.dbias.data + b * step[0] + h * step[1] + (i + r) * step[2] + j * step[3];
    if (step[3] != 1) {
      for (index_t c = 0; c < n; ++c) to[c * step[3]] = static_cast<Out>(from[c]);
      return;
    }
    const dense_source<sum> row{from, 1, n, n, 1};
    if (!p.dbias_past_caches) return decode_run(set_tag{}, row, 0, 0, n, to);
    if constexpr (std::is_same_v<Out, sum>) {
      copy_past_caches(from, n * index_t{sizeof(Out)}, to);
    } else {
      Out rounded[block_keys];
      decode_run(set_tag{}, row, 0, 0, n, rounded);
      copy_past_caches(rounded, n * index_t{sizeof(Out)}, to);
    }
  }
  // The same rows, of the block's queries from `row` on, added to totals.
  static void add_bias_rows(const Problem& p, index_t row, index_t count, index_t j, index_t n, sum* totals,
                            const parts& s) noexcept {
    const auto& step = p.dbias.strides;
    for (index_t r = 0; r < count; ++r) {
      const sum* from = s.turned + r * n;
      sum* to = totals + (step[2] == 0 ? 0 : (row + r) * p.dbias.extents[3]) + (step[3] == 0 ? 0 : j);
      for (index_t c = 0; c < n; ++c) to[step[3] == 0 ? 0 : c] += from[c];
    }
  }

  // sums[keys][lines] += left[keys][queries] rows[queries][lines], over the slivers of queries that have keys there.
  static void add_key_gradients(const block_plan* plans, index_t n, index_t count, index_t lines, const word* left,
                                const word* rows, sum* sums) noexcept {
    constexpr index_t per_word = compute<Element>::elements_per_word;
    const index_t slivers = ceil_div(count, sliver);
    for (index_t j = 0; j < n; j += group) {
      index_t begin = slivers, end = 0;
      for (index_t at = 0; at < slivers; ++at)
        if (plans[at].groups[j / group] != attention::block::empty) {
          begin = std::min(begin, at);
          end = at + 1;
        }
      if (begin >= end) continue;
      const index_t from = begin * sliver, deep = words<Element>(std::min(count, end * sliver) - from);
      each_sliver(lines, [&](index_t line, index_t, index_t lanes) {
        base::multiply(deep, left + j * stride + from / per_word, std::min<index_t>(group, n - j),
                       rows + line * words<Element>(block_queries) + from / per_word * lanes, lanes, lanes,
                       sums + j * padded(lines) + line, padded(lines), true);
      });
    }
  }

  static void write_dq(const Problem& p, index_t b, index_t h, index_t first, index_t count, const parts& s) noexcept {
    const auto to = p.dq_rows(b, h);
    each_sliver(count, [&](index_t at, index_t m, index_t lanes) {
      base::write_turned(s.dq + at / sliver * dq_size(p), lanes, m, to, first + at, s.turned);
    });
  }
};

template <class E, class Problem>
attention::detail::backward_kernels<Problem> backward_entry() noexcept {
  using kernel = attend_backward<panel_element<E>, Problem>;
  if constexpr (kernel::has_bias)
    return {kernel::block_queries, &kernel::scratch_bytes, &kernel::sums_size,
            &kernel::run,          &kernel::finish,        &kernel::run_bias};
  else
    return {kernel::block_queries, &kernel::scratch_bytes, &kernel::sums_size, &kernel::run, &kernel::finish, nullptr};
}
