// A chunk of logits with tokens along the lanes: [classes of the chunk][tokens]. What belongs to a token is a lane.

template <class A, class D>
struct logit_columns {
  using V = vec<A>;
  using row_block = rl::detail::row_block<A>;
  static constexpr index_t width = V::width;
  static constexpr int columns = 2;  // registers of tokens worked on together
  // Classes between two looks at the largest: what they take of a first-level cache is a quarter or less.
  static constexpr index_t run = 64;

  // Takes logits z[0, classes)[0, tokens), rows `stride` apart, into the states of up to block_rows tokens.
  static void scan(const A* z, index_t classes, index_t stride, index_t tokens, A scale, bool with_entropy,
                   row_block& block) noexcept {
    for (index_t i = 0; i < tokens; i += columns * width) {
      const index_t n = std::min(tokens - i, columns * width);
      if (with_entropy)
        scan_columns<true>(z + i, classes, stride, n, scale, block, i);
      else
        scan_columns<false>(z + i, classes, stride, n, scale, block, i);
    }
  }

  // dz of the same logits, to out[0, classes)[0, tokens): for the classes from `first` on, of `all`.
  static void differentiate(const A* z, index_t first, index_t classes, index_t all, index_t stride, index_t tokens,
                            A scale, A inverse_temperature, const row_block& block, const rl::token_gradient<A>* given,
                            const index_t* labels, D* out, index_t out_stride) noexcept {
    alignas(64) A top[rl::detail::block_rows], constant[rl::detail::block_rows], slope[rl::detail::block_rows],
        shift[rl::detail::block_rows], something[rl::detail::block_rows];
    for (index_t i = 0; i < round_up(tokens, width); ++i) {
      const gradient_curve<A> c =
          i < tokens ? gradient_curve<A>(block, i, given[i], inverse_temperature, all) : gradient_curve<A>();
      top[i] = c.top, constant[i] = c.constant, slope[i] = c.slope, shift[i] = c.shift;
      something[i] = c.nothing ? A{} : A{1};
    }
    for (index_t i = 0; i < tokens; i += width) {
      const int n = static_cast<int>(std::min(width, tokens - i));
      const V level = V::load(top + i), a = V::load(constant + i), b = V::load(slope + i), c = V::load(shift + i);
      const auto counts = V::load(something + i) > V::zero();
      const auto one = [&](const A* from, D* to, int lanes) {
        const V x = at_least((V::load(from, lanes) - level) * scale, least_exponent<A>);
        V::select(counts, fma(exp2_of_nonpositive(x), fma(x, b, a), c), V::zero()).store(to, lanes);
      };
      if (n == width)
        for (index_t j = 0; j < classes; ++j) one(z + j * stride + i, out + j * out_stride + i, width);
      else
        for (index_t j = 0; j < classes; ++j) one(z + j * stride + i, out + j * out_stride + i, n);
    }
    for (index_t i = 0; i < tokens; ++i)
      if (const index_t j = labels[i] - first; something[i] != 0 && j >= 0 && j < classes)
        out[j * out_stride + i] = static_cast<D>(token_slope(block, i, given[i], inverse_temperature, all));
  }

  static void finish(index_t tokens, A inverse_temperature, row_block& block) noexcept {
    finish_rows(tokens, inverse_temperature, block);
  }

 private:
  // n of the tokens from i on. States of lanes beyond them mean nothing.
  template <bool Entropy>
  static void scan_columns(const A* z, index_t classes, index_t stride, index_t n, A scale, row_block& block,
                           index_t i) noexcept {
    int lanes[columns];
    V top[columns], sum[columns], weighted[columns];
    MLKIT_UNROLL
    for (int u = 0; u < columns; ++u) {
      lanes[u] = static_cast<int>(std::clamp<index_t>(n - u * width, 0, width));
      top[u] = V::load(block.top + i + u * width);
      sum[u] = V::load(block.sum + i + u * width);
      weighted[u] = V::load(block.weighted + i + u * width);
    }
    const bool whole = n == columns * width;
    for (index_t j = 0; j < classes; j += run) {
      const index_t end = std::min(classes, j + run);
      V high[columns];
      MLKIT_UNROLL
      for (int u = 0; u < columns; ++u) high[u] = top[u];
      const auto each = [&](auto&& f) {
        if (whole) {
          for (index_t k = j; k < end; ++k) {
            MLKIT_UNROLL
            for (int u = 0; u < columns; ++u) f(V::load(z + k * stride + u * width), u);
          }
        } else {
          for (index_t k = j; k < end; ++k) {
            MLKIT_UNROLL
            for (int u = 0; u < columns; ++u) f(V::load(z + k * stride + u * width, lanes[u]), u);
          }
        }
      };
      each([&](V x, int u) { high[u] = max(high[u], x); });
      V level[columns];
      MLKIT_UNROLL
      for (int u = 0; u < columns; ++u) {
        level[u] = V::select(high[u] == V(-math_table<A>::infinity), V::zero(), high[u]);
        const V down = at_least((top[u] - level[u]) * scale, least_exponent<A>), factor = exp2_of_nonpositive(down);
        weighted[u] = factor * fma(down, sum[u], weighted[u]);
        sum[u] *= factor;
        top[u] = high[u];
      }
      each([&](V x, int u) {
        x = at_least((x - level[u]) * scale, least_exponent<A>);
        const V e = exp2_of_nonpositive(x);
        sum[u] += e;
        if constexpr (Entropy) weighted[u] = fma(e, x, weighted[u]);
      });
    }
    MLKIT_UNROLL
    for (int u = 0; u < columns; ++u) {
      top[u].store(block.top + i + u * width);
      sum[u].store(block.sum + i + u * width);
      weighted[u].store(block.weighted + i + u * width);
    }
  }
};

template <class A, class D>
rl::detail::column_kernels<A, D> columns_entry() noexcept {
  using columns = logit_columns<A, D>;
  return {&columns::scan, &columns::differentiate, &columns::finish};
}
