// What forward and backward share: scores stand transposed, with queries along the lanes, so that what belongs to a
// query is a lane of a register, and only the last queries are padded.

// A view's matrix of one head.
template <class T>
MLKIT_ALWAYS_INLINE dense_source<std::remove_const_t<T>> head_of(const attention::detail::head_rows<T>& m) noexcept {
  return {m.data, m.rows, m.cols, m.row_stride, m.col_stride};
}

// Calls f(n, at) for runs of n from `at` on: n is Most as often as that fits into `count`, then half of it, down to
// one. So do few functions serve all counts.
template <int Most, class F>
MLKIT_ALWAYS_INLINE void by_halves(index_t count, F&& f, index_t at = 0) noexcept {
  for (; at + Most <= count; at += Most) f(std::integral_constant<int, Most>{}, at);
  if constexpr (Most > 1) by_halves<Most / 2>(count, f, at);
}

template <class Element>
struct attend {
  using word = typename compute<Element>::word;
  using sum = typename compute<Element>::sum;
  using V = vec<sum>;
  static constexpr index_t width = V::width;
  static constexpr index_t sliver = sliver_lines<Element>;  // queries worked on together
  static constexpr index_t stride = panel_stride<Element>;  // words between rows of left panels
  // Keys that are masked together: any tile's height divides them, and they are whole steps of k.
  static constexpr int group = in_matrices<Element> ? 32 : tile_registers;
  // Matrix registers pay more for sums that they load and store than for keys that are not in the nearest cache.
  static constexpr int groups_at_once = (in_matrices<Element> ? 512 : 144) / group;
  static constexpr index_t keys_at_once = index_t{groups_at_once} * group;
  static constexpr sum log2_e = static_cast<sum>(1.44269504088896340736);
  static constexpr sum infinity = math_table<sum>::infinity;

  // Lines of a sliver, and what makes them whole registers; where lines are depth later, whole steps of it.
  static constexpr index_t padded(index_t lines) noexcept {
    return round_up(lines,
                    std::max(width, index_t{compute<Element>::words_at_once * compute<Element>::elements_per_word}));
  }

  // Hands out pieces of one block of memory; with none, only counts.
  class pieces {
   public:
    explicit pieces(std::byte* memory) noexcept : memory_(memory) {}
    template <class T>
    void take(T*& piece, index_t count) noexcept {
      piece = memory_ ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
      bytes_ = round_up(bytes_ + count * index_t{sizeof(T)}, index_t{64});
    }
    index_t bytes() const noexcept { return bytes_; }

   private:
    std::byte* memory_;
    index_t bytes_ = 0;
  };

  // Left panels of blocks of keys, each [depth blocks][rows][stride]. With one depth block, several stand side by side,
  // as rows are longer than what one has in them.
  struct shelf {
    word* data;
    index_t rows, width, depth_blocks;

    void take(pieces& all, index_t blocks, index_t panel_rows, index_t columns, index_t depths) noexcept {
      rows = panel_rows;
      depth_blocks = std::max<index_t>(1, depths);
      width = depth_blocks > 1 ? stride : std::min(stride, round_up(std::max<index_t>(1, columns), line));
      all.take(data, ceil_div(blocks, stride / width) * depth_blocks * rows * stride);
    }
    word* at(index_t block) const noexcept {
      const index_t beside = stride / width;
      return data + block / beside * depth_blocks * rows * stride + block % beside * width;
    }

   private:
    static constexpr index_t line = 64 / index_t{sizeof(word)};
  };

  static index_t depth_blocks(index_t d) noexcept { return ceil_div(d, depth_step<Element>(d)); }

  struct nothing {
    void operator()(index_t, index_t, index_t) const noexcept {}
  };
  // c[rows][lanes] (+)= left[rows][depth] right[depth][lanes], at most a sliver of lanes; all in words, with rows of
  // right and c so many words apart. meanwhile(i, i_end, rows) is called before the rows [i, i_end) are made. What it
  // returns, if not null, is where the largest of their columns go, unless they are fewer than a tile's.
  template <class Meanwhile = nothing>
  static void multiply(index_t depth, const word* left, index_t rows, const word* right, index_t right_stride,
                       index_t lanes, sum* c, index_t c_stride, bool accumulate,
                       const Meanwhile& meanwhile = {}) noexcept {
    const int vectors = static_cast<int>(lanes / width), height = tile_rows<Element>(vectors);
    for (index_t i = 0; i < rows; i += height) {
      sum* largest = nullptr;
      if constexpr (std::is_void_v<decltype(meanwhile(i, i, rows))>)
        meanwhile(i, std::min(rows, i + height), rows);
      else
        largest = meanwhile(i, std::min(rows, i + height), rows);
      const char* next = reinterpret_cast<const char*>(left + (i + height) * stride);
      const fetch_ahead ahead{reinterpret_cast<const char*>(right), next, stride * index_t{sizeof(word)},
                              depth * index_t{sizeof(word)}};
      select_tile<Element>(vectors, static_cast<int>(std::min<index_t>(height, rows - i)))(
          depth, left + i * stride, right, right_stride, c + i * c_stride, c_stride, accumulate, ahead,
          i + height <= rows ? largest : nullptr);
    }
  }

  // While a product of `of` rows is about to make rows [i, i_end), brings as large a share closer of the rows [first,
  // first + count) that are soon read or written: all at once they would wait for each other.
  template <class Out>
  static MLKIT_ALWAYS_INLINE void fetch_share(const attention::detail::head_rows<Out>& to, index_t first, index_t count,
                                              index_t i, index_t i_end, index_t of) noexcept {
    if (to.col_stride != 1) return;
    const index_t begin = count * i / of, end = count * i_end / of, bytes = sizeof(Out);
    fetch_rows<false>(to.data + (first + begin) * to.row_stride, to.row_stride * bytes, end - begin, to.cols * bytes);
  }

  // The same for what `count` queries from i on have of a bias [batch, heads, queries, keys], for n keys from j on.
  template <class T>
  static MLKIT_ALWAYS_INLINE void fetch_bias(const tensor_view<T, 4>& bias, index_t b, index_t h, index_t i,
                                             index_t count, index_t j, index_t n, index_t row, index_t row_end,
                                             index_t of) noexcept {
    const auto& step = bias.strides;
    T* const data = bias.data + b * step[0] + h * step[1] + j * step[3];
    fetch_share(attention::detail::head_rows<T>{data, i + count, n, step[2], step[3]}, i, count, row, row_end, of);
  }

  // What the groups of a block of keys are to some queries.
  struct block_plan {
    attention::block groups[groups_at_once];
    bool any = false;

    // Calls f(first, last) for the runs of keys whose groups are not empty.
    template <class F>
    MLKIT_ALWAYS_INLINE void each_run(index_t keys, F&& f) const noexcept {
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
    // Most blocks are all full or all empty.
    const attention::block all = attention::detail::classify(*p.scores, shape, b, h, i, i_end, j, j_end);
    if (all != attention::block::partial) {
      std::fill_n(plan.groups, groups_at_once, all);
      plan.any = all == attention::block::full;
      return plan;
    }
    for (index_t g = 0; g < groups_at_once && j < j_end; ++g, j += group) {
      plan.groups[g] =
          attention::detail::classify(*p.scores, shape, b, h, i, i_end, j, std::min<index_t>(j_end, j + group));
      plan.any = plan.any || plan.groups[g] != attention::block::empty;
    }
    return plan;
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

  // Makes the words of a right panel [words of keys][lanes] zero that fill up the last step of n keys.
  static MLKIT_ALWAYS_INLINE void pad_keys(index_t n, word* panel, index_t panel_stride, index_t lanes) noexcept {
    if constexpr (in_matrices<Element>)
      for (index_t j = ceil_div(n, index_t{2}); j < words<Element>(n); ++j)
        std::fill_n(panel + j * panel_stride, lanes, word{});
  }

#if MLKIT_SET_BF16
  // Words of two bf16 from two registers of f32.
  static MLKIT_ALWAYS_INLINE void pair(V low, V high, float* out) noexcept {
    alignas(64) static constexpr std::uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                            21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                            11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_load_si512(order), both));
  }
  // Rounded to bf16; what is denormal becomes zero.
  static MLKIT_ALWAYS_INLINE void store_rounded(V x, bf16* out) noexcept {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(x.v));
  }
#endif

  // A pipeline that is read in a loop: a copy, which no store can change, where that costs nothing.
  template <class Scores>
  using local =
      std::conditional_t<std::is_trivially_copy_constructible_v<Scores> && std::is_trivially_destructible_v<Scores>,
                         Scores, const Scores&>;

  // What its scale multiplies by.
  template <class Scores>
  static sum scale_of(const Scores& scores) noexcept {
    sum value = 1;
    attention::detail::each_stage(scores, [&](const auto& stage) {
      if constexpr (attention::detail::is_scale<std::remove_cvref_t<decltype(stage)>>)
        value = static_cast<sum>(stage.value);
    });
    return value;
  }

  static MLKIT_ALWAYS_INLINE const void* bias_at(const void* bias, index_t at) noexcept {
    return bias ? static_cast<const sum*>(bias) + at : nullptr;
  }
  static constexpr index_t bias_size = keys_at_once * sliver + sliver * keys_at_once;

  // turned[n][lanes] = the bias of `count` queries from i on against n keys from j on; null where the pipeline has none
  // that differs from query to query. `memory` holds bias_size elements.
  template <class Problem>
  static const sum* turn_bias(const Problem& p, index_t b, index_t h, index_t i, index_t count, index_t lanes,
                              index_t j, index_t n, sum* memory) noexcept {
    const sum* result = nullptr;
    with_bias_rows(*p.scores, [&](const auto& v) {
      using T = typename std::remove_cvref_t<decltype(v)>::value_type;
      sum *turned = memory, *rows = memory + keys_at_once * sliver;
      const auto& step = v.strides;
      result = turned;
      if constexpr (turns_into<T, sum>)
        if (count == lanes && step[3] == 1)
          return transpose(v.data + b * step[0] + h * step[1] + i * step[2] + j, step[2], count, n, turned, lanes);
      const dense_source<T> source{v.data + b * step[0] + h * step[1] + i * step[2] + j * step[3], count, n, step[2],
                                   step[3]};
      for (index_t r = 0; r < count; ++r) decode_run(set_tag{}, source, r, 0, n, rows + r * n);
      for (index_t r = count; r < lanes; ++r) std::fill_n(rows + r * n, n, sum{});
      transpose(rows, n, lanes, n, turned, lanes);
    });
    return result;
  }

  // Rows [first, first + count) of to = turned^T, where turned is [to.cols][lanes]; `memory` holds as many elements as
  // scores [keys_at_once][lanes].
  template <class Out>
  static void write_turned(const sum* turned, index_t lanes, index_t count, const attention::detail::head_rows<Out>& to,
                           index_t first, sum* memory) noexcept {
    if constexpr (std::is_same_v<Out, sum>)
      if (to.row_stride == 1) {
        for (index_t c = 0; c < to.cols; ++c)
          copy_run(turned + c * lanes, count * index_t{sizeof(sum)}, to.data + first + c * to.col_stride);
        return;
      }
    for (index_t c = 0; c < to.cols; c += keys_at_once) {
      const index_t n = std::min(keys_at_once, to.cols - c);
      if constexpr (std::is_same_v<Out, sum>)
        if (to.col_stride == 1) {
          transpose(turned + c * lanes, lanes, n, count, to.data + first * to.row_stride + c, to.row_stride);
          continue;
        }
      transpose(turned + c * lanes, lanes, n, lanes, memory, n);
      for (index_t i = 0; i < count; ++i) {
        Out* y = to.data + (first + i) * to.row_stride + c * to.col_stride;
        if (to.col_stride == 1)
          decode_run(set_tag{}, dense_source<sum>{memory + i * n, 1, n, n, 1}, 0, 0, n, y);
        else
          for (index_t l = 0; l < n; ++l) y[l * to.col_stride] = static_cast<Out>(memory[i * n + l]);
      }
    }
  }
};
