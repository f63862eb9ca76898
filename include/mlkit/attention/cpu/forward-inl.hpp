// Attention forward on tiles: for a block of queries, block by block of keys, S = Q K^T, an online softmax, O += P V.

// Keys whose scores are held at once.
inline constexpr index_t keys_at_once = 256;

// The row of S and P panels is that of the tiles' left panels, so that P is one as it lies.
static_assert(keys_at_once <= compute<float>::depth_block && keys_at_once <= compute<double>::depth_block);

// A view's matrix of one head.
template <class T>
MLKIT_ALWAYS_INLINE dense_source<T> head_of(const attention::detail::head_rows<T>& m) noexcept {
  return {m.data, m.rows, m.cols, m.row_stride, m.col_stride};
}

template <class Element>
struct attend {
  using word = typename compute<Element>::word;
  using sum = typename compute<Element>::sum;
  using V = vec<sum>;
  static constexpr index_t width = V::width;
  static constexpr index_t sliver = sliver_lines<Element>;
  static constexpr index_t stride = panel_stride<Element>;  // words between rows of left panels
  static constexpr int group = tile_registers;              // rows that any tile's height divides
  static constexpr index_t slivers_at_once = keys_at_once / sliver;
  static constexpr sum log2_e = static_cast<sum>(1.44269504088896340736), ln_2 = static_cast<sum>(0.69314718055994530942);
  static_assert(keys_at_once % sliver == 0);

  static constexpr index_t padded(index_t lines) noexcept { return round_up(lines, width); }

  // Words of a right operand [lines] of `depth` elements, in slivers, each a panel of its own.
  static index_t panel_words(index_t lines, index_t depth) noexcept { return padded(lines) * words<Element>(depth); }

  // Packs all lines of a right operand over k in [k, k + depth).
  template <class Source>
  static void pack_lines(const operand<Source>& op, index_t line, index_t lines, index_t k, index_t depth, word* panel,
                         Element* scratch) noexcept {
    for (index_t l = 0; l < lines; l += sliver) {
      const index_t n = std::min(sliver, lines - l);
      pack_right<Element>(op, line + l, n, padded(n), k, depth, panel + l * words<Element>(depth), scratch);
    }
  }

  // c[rows][lines of a sliver] (+)= panel rows x sliver, for `rows` rows of a group.
  static void multiply(index_t depth_words, const word* left, index_t rows, const word* right, index_t lines, sum* c,
                       index_t c_stride, bool accumulate, const word* next) noexcept {
    const int vectors = static_cast<int>(padded(lines) / width);
    const int height = tile_rows(vectors);
    for (index_t i = 0; i < rows; i += height) {
      const fetch_ahead ahead{reinterpret_cast<const char*>(i + height < rows ? right : next),
                              reinterpret_cast<const char*>(left), 0, 64};
      select_tile<Element>(vectors, static_cast<int>(std::min<index_t>(height, rows - i)))(
          depth_words, left + i * stride, right, padded(lines), c + i * c_stride, c_stride, accumulate, ahead);
    }
  }

  // What the keys of a block are to a group of queries.
  struct block_plan {
    attention::block slivers[slivers_at_once];
    bool any = false;
  };
  template <class Problem>
  static block_plan plan_block(const Problem& p, const attention::detail::score_shape& shape, index_t b, index_t h,
                               index_t i, index_t i_end, index_t j, index_t j_end) noexcept {
    block_plan plan;
    for (index_t s = 0; s < slivers_at_once; ++s) {
      const index_t first = j + s * sliver;
      plan.slivers[s] = first >= j_end ? attention::block::empty
                                       : attention::detail::classify(*p.scores, shape, b, h, i, i_end, first,
                                                                     std::min(j_end, first + sliver));
      plan.any = plan.any || plan.slivers[s] != attention::block::empty;
    }
    return plan;
  }

  // Scores of one row against one sliver, through the pipeline and stored again; raises `top` to their maximum.
  template <bool Masked, class Problem>
  static void finish_scores(const Problem& p, const attention::detail::score_shape& shape, score_run at, index_t keys,
                            sum* s, V& top) noexcept {
    for (index_t l = 0; l < keys; l += width) {
      at.count = static_cast<int>(std::min(width, keys - l));
      V x = all_scores<Masked>(*p.scores, V::load(s + l), shape, at);
      if (at.count < width) x = V::select(first_lanes<V>(at.count), x, minus_infinity<V>());
      x.store(s + l);
      top = max(top, x);
      at.j += width;
    }
  }
};

// Forward for the queries [first, first + rows) of one head.
template <class Element, class Problem>
struct attend_forward : attend<Element> {
  using base = attend<Element>;
  using typename base::sum;
  using typename base::V;
  using typename base::word;
  using base::group;
  using base::sliver;
  using base::stride;
  using base::width;

  struct parts {
    word *keys, *values;   // packed: [slivers][words of d][sliver], [slivers of d_v][words of keys][sliver]
    word *queries, *probabilities;  // left panels of a group; P shares S's memory where their types agree
    sum* scores;
    sum* out;              // [rows][padded d_v]
    sum *top, *total;      // running maximum and sum
    Element* pack;
  };
  static constexpr bool own_probabilities = !std::is_same_v<Element, sum>;

  static index_t depth_words(index_t d) noexcept { return words<Element>(depth_step<Element>(d)); }

  static index_t lay_out(const Problem& p, index_t rows, std::byte* memory, parts* out) noexcept {
    index_t at = 0;
    const auto take = [&](auto*& pointer, index_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + at);
      at = round_up(at + count * index_t{sizeof(*pointer)}, index_t{64});
    };
    parts unused;
    parts& s = out ? *out : unused;
    const index_t d = p.d, dv = p.d_v;
    take(s.keys, base::panel_words(keys_at_once, d + 1) + 2 * sliver);
    take(s.values, base::panel_words(dv, keys_at_once));
    take(s.queries, group * stride);
    take(s.scores, group * stride);
    if constexpr (own_probabilities)
      take(s.probabilities, group * stride);
    else
      s.probabilities = reinterpret_cast<word*>(s.scores);
    take(s.out, round_up(rows, index_t{group}) * base::padded(dv));
    take(s.top, round_up(rows, index_t{group}));
    take(s.total, round_up(rows, index_t{group}));
    take(s.pack, pack_scratch<Element>);
    return at;
  }
  static index_t scratch_bytes(const Problem& p, index_t rows) noexcept { return lay_out(p, rows, nullptr, nullptr); }

  static void run(const Problem& p, index_t b, index_t h, index_t first, index_t rows, std::byte* memory) noexcept {
    parts s;
    lay_out(p, rows, memory, &s);
    const auto q = head_of(p.query_rows(b, h));
    const auto k = head_of(p.key_rows(b, h)), v = head_of(p.value_rows(b, h));
    const attention::detail::score_shape shape = p.shape(b);
    const index_t d = p.d, dv = p.d_v, lines = base::padded(dv), keys = attention::detail::key_limit(*p.scores, b, k.rows());
    for (index_t i = 0; i < rows * lines; ++i) s.out[i] = sum{};
    start(p, h, rows, s);
    for (index_t i = 0; i < group * stride; ++i) s.queries[i] = word{};

    for (index_t j = 0; j < keys; j += keys_at_once) {
      const index_t n = std::min(keys_at_once, keys - j);
      if (!base::plan_block(p, shape, b, h, first, first + rows, j, j + n).any) continue;
      // Keys as right panels, a depth block after the other; values as right panels whose depth is the keys.
      word* panel = s.keys;
      each_depth_block(d, depth_step<Element>(d), [&](index_t at, index_t depth) {
        base::pack_lines(operand<std::remove_cvref_t<decltype(k)>>{k, true}, j, n, at, depth, panel, s.pack);
        panel += base::panel_words(n, depth);
      });
      base::pack_lines(operand<std::remove_cvref_t<decltype(v)>>{v, false}, 0, dv, j, n, s.values, s.pack);
      for (index_t g = 0; g < rows; g += group) {
        const index_t count = std::min<index_t>(group, rows - g);
        const auto plan = base::plan_block(p, shape, b, h, first + g, first + g + count, j, j + n);
        if (!plan.any) continue;
        find_scores(q, first + g, count, d, n, plan, s);
        for (index_t i = 0; i < count; ++i)
          softmax_row(p, shape, {b, h, first + g + i, j, 0}, n, plan, i, g + i, lines, s);
        add_values(count, n, dv, lines, plan, g, s);
      }
    }
    finish(p, b, h, first, rows, lines, s);
  }

 private:
  // Running maximum and sum of nothing, or of a sink.
  static void start(const Problem& p, index_t h, index_t rows, const parts& s) noexcept {
    sum top = -math_table<sum>::infinity, total = 0;
    attention::detail::each_stage(*p.scores, [&](const auto& stage) {
      if constexpr (attention::detail::is_sinks<std::remove_cvref_t<decltype(stage)>>) {
        top = static_cast<sum>(stage.logits.data[h * stage.logits.strides[0]]);
        total = top == -math_table<sum>::infinity ? 0 : 1;
      }
    });
    for (index_t i = 0; i < rows; ++i) {
      s.top[i] = top;
      s.total[i] = total;
    }
  }
  template <class Q, class Plan>
  static void find_scores(const dense_source<Q>& q, index_t first, index_t count, index_t d, index_t n, const Plan& plan,
                          const parts& s) noexcept {
    const word* panel = s.keys;
    each_depth_block(d, depth_step<Element>(d), [&](index_t at, index_t depth) {
      pack_left<Element>(operand<dense_source<Q>>{q, true}, first, count, at, depth,
                         reinterpret_cast<Element*>(s.queries), s.pack, 0);
      const index_t deep = words<Element>(depth);
      for (index_t l = 0; l < n; l += sliver) {
        if (plan.slivers[l / sliver] == attention::block::empty) continue;
        const word* right = panel + l * deep;
        base::multiply(deep, s.queries, count, right, std::min(sliver, n - l), s.scores + l, stride, at > 0,
                       right + sliver * deep);
      }
      panel += base::panel_words(n, depth);
    });
    if (d == 0)
      for (index_t i = 0; i < count; ++i)
        for (index_t l = 0; l < base::padded(n); ++l) s.scores[i * stride + l] = sum{};
  }

  // One row of S becomes one of P; what O and the sum hold of it is brought to the new maximum.
  template <class Plan>
  static void softmax_row(const Problem& p, const attention::detail::score_shape& shape, score_run at, index_t n,
                          const Plan& plan, index_t i, index_t row, index_t lines, const parts& s) noexcept {
    sum* scores = s.scores + i * stride;
    V top = minus_infinity<V>();
    for (index_t l = 0; l < n; l += sliver) {
      const index_t keys = std::min(sliver, n - l);
      score_run run = at;
      run.j += l;
      switch (plan.slivers[l / sliver]) {
        case attention::block::empty: break;
        case attention::block::full: base::template finish_scores<false>(p, shape, run, keys, scores + l, top); break;
        default: base::template finish_scores<true>(p, shape, run, keys, scores + l, top);
      }
    }
    const sum before = s.top[row], found = largest_lane(top), now = before > found ? before : found;
    const V level(now == -math_table<sum>::infinity ? sum{} : now);
    V total = V::zero();
    Element* probabilities = reinterpret_cast<Element*>(s.probabilities + i * stride);
    for (index_t l = 0; l < n; l += sliver) {
      if (plan.slivers[l / sliver] == attention::block::empty) continue;
      const index_t keys = std::min(sliver, n - l);
      for (index_t c = l; c < l + keys; c += width) {
        V x = exp2_nonpositive((V::load(scores + c) - level) * base::log2_e);
        total += x;
        x = drop_any(*p.scores, x, shape, {at.b, at.h, at.i, at.j + c, 0});
        x.store(probabilities + c);
      }
    }
    if (now > before) {
      const sum factor =
          before == -math_table<sum>::infinity ? sum{} : lane_exp2((before - now) * base::log2_e);
      s.total[row] *= factor;
      s.top[row] = now;
      sum* out = s.out + row * lines;
      for (index_t c = 0; c < lines; c += width) (V::load(out + c) * factor).store(out + c);
    }
    s.total[row] += total.sum();
  }
  static sum lane_exp2(sum x) noexcept {
    sum lanes[V::width];
    exp2_nonpositive(V(x)).store(lanes);
    return lanes[0];
  }
  // O += P V over the keys of slivers that are not empty.
  template <class Plan>
  static void add_values(index_t count, index_t n, index_t dv, index_t lines, const Plan& plan, index_t g,
                         const parts& s) noexcept {
    const index_t all = base::panel_words(1, 0) + words<Element>(n);
    for (index_t l = 0; l < n;) {
      if (plan.slivers[l / sliver] == attention::block::empty) {
        l += sliver;
        continue;
      }
      index_t end = l;
      while (end < n && plan.slivers[end / sliver] != attention::block::empty) end += sliver;
      end = std::min(end, n);
      const index_t from = l / compute<Element>::elements_per_word, deep = words<Element>(end - l);
      for (index_t c = 0; c < dv; c += sliver) {
        const index_t some = std::min(sliver, dv - c);
        const word* right = s.values + c * all + from * base::padded(some);
        base::multiply(deep, s.probabilities + from, count, right, some, s.out + g * lines + c, lines, true, right);
      }
      l = end;
    }
  }

  static void finish(const Problem& p, index_t b, index_t h, index_t first, index_t rows, index_t lines,
                     const parts& s) noexcept {
    const auto out = p.out_rows(b, h);
    for (index_t i = 0; i < rows; ++i) {
      const sum total = s.total[i], scale = total == 0 ? sum{} : 1 / total;
      const sum* from = s.out + i * lines;
      auto* to = out.data + (first + i) * out.row_stride;
      if (out.col_stride == 1 && !std::is_same_v<std::remove_cvref_t<decltype(*to)>, double>) {
        for (index_t c = 0; c < out.cols; c += width) {
          const V x = V::load(from + c) * scale;
          const int some = static_cast<int>(std::min(width, out.cols - c));
          if (some == width)
            x.store(to + c);
          else
            x.store(to + c, some);
        }
      } else {
        for (index_t c = 0; c < out.cols; ++c)
          to[c * out.col_stride] = static_cast<std::remove_cvref_t<decltype(*to)>>(from[c] * scale);
      }
      if (p.lse.data) p.lse_at(b, h, first + i) = total == 0 ? -math_table<sum>::infinity
                                                             : static_cast<sum>(s.top[i] + std::log(total));
    }
  }
};

// One instruction set's functions.
template <class E, class Problem>
attention::detail::forward_kernels<Problem> forward_entry() noexcept {
  using kernel = attend_forward<panel_element<E>, Problem>;
  return {kernel::group, &kernel::scratch_bytes, &kernel::run};
}
