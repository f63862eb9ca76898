// One block of tokens of a policy loss: ratios, terms, values and entropies in turn, in buffers that stay in L1, so
// that each operand is read from memory once and each gradient written once. Terms are scalar functors in loops of
// their own, which the compiler vectorises; the rest is written with registers.

// A sum in f64, lane by lane.
template <class A>
struct wide_sum {
  vec<double> low, high;

  // Written out, since a constructor that the compiler makes is of no instruction set.
  MLKIT_ALWAYS_INLINE wide_sum() noexcept : low(vec<double>::zero()), high(vec<double>::zero()) {}

  static constexpr int parts = sizeof(A) == 4 ? 2 : 1;
  struct widened {
    vec<double> part[parts];
  };
  static MLKIT_ALWAYS_INLINE widened widen(vec<A> x) noexcept {
    if constexpr (sizeof(A) == 8) {
      return {{x}};
    } else {
#if MLKIT_SET_AVX512
      return {{typename vec<double>::native(_mm512_maskz_cvtps_pd(0xff, _mm512_castps512_ps256(x.v))),
               typename vec<double>::native(_mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, x.v, 1)))}};
#elif MLKIT_SET_AVX2
      return {{typename vec<double>::native(_mm256_cvtps_pd(_mm256_castps256_ps128(x.v))),
               typename vec<double>::native(_mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1)))}};
#else
      widened w;
      for (int i = 0; i < vec<double>::width; ++i) {
        w.part[0].v[i] = static_cast<double>(x.v[i]);
        w.part[1].v[i] = static_cast<double>(x.v[i + vec<double>::width]);
      }
      return w;
#endif
    }
  }
  MLKIT_ALWAYS_INLINE void add(vec<A> x) noexcept {
    const widened w = widen(x);
    low += w.part[0];
    if constexpr (parts == 2) high += w.part[1];
  }
  // Adds x and x^2, both of x in f64.
  static MLKIT_ALWAYS_INLINE void add_moments(vec<A> x, wide_sum& sum, wide_sum& squares) noexcept {
    const widened w = widen(x);
    sum.low += w.part[0];
    squares.low = fma(w.part[0], w.part[0], squares.low);
    if constexpr (parts == 2) {
      sum.high += w.part[1];
      squares.high = fma(w.part[1], w.part[1], squares.high);
    }
  }
  MLKIT_ALWAYS_INLINE double total() const noexcept { return across(low + high, sum_of_two{}); }
};

// Asks for what is in the place of these in the next block.
template <class... T>
MLKIT_ALWAYS_INLINE void prefetch_next(const T*... p) noexcept {
  (__builtin_prefetch(p + rl::detail::tokens_of_block), ...);
}

// f(i, count) for the registers of n elements: whole ones, and the rest.
template <class V, class F>
MLKIT_ALWAYS_INLINE void each_vector(index_t n, F&& f) noexcept {
  index_t i = 0;
  for (; i + V::width <= n; i += V::width) f(i, V::width);
  if (i < n) f(i, static_cast<int>(n - i));
}
template <class V, class T>
MLKIT_ALWAYS_INLINE V load_some(const T* p, int count) noexcept {
  return count == V::width ? V::load(p) : V::load(p, count);
}
template <class V, class T>
MLKIT_ALWAYS_INLINE void store_some(V x, T* p, int count) noexcept {
  if (count == V::width)
    x.store(p);
  else
    x.store(p, count);
}

// e^d and e^d - 1 - d of an exponent d that is bounded, the latter without cancellation near 0.
template <class A>
struct ratio_and_excess {
  vec<A> ratio, excess;
};
template <class A>
MLKIT_ALWAYS_INLINE ratio_and_excess<A> exp_and_excess(vec<A> d) noexcept {
  const exp_parts<A> e = split_exp(d);
  const vec<A> ratio = e.mantissa() * power_of_two(e.n);
  return {ratio, vec<A>::select(e.n == vec<A>::zero(), e.r * e.r * e.curve, (ratio - A(1)) - d)};
}

// What does not depend on the policy's term.
template <class T>
struct loss_block {
  using A = accumulator_t<T>;
  using V = vec<A>;
  using operands = rl::detail::loss_operands<T>;
  using scratch = rl::detail::policy_scratch<T>;

  static MLKIT_ALWAYS_INLINE V clamped(V d) noexcept {
    return at_most(at_least(d, static_cast<A>(-rl::most_log_ratio)), static_cast<A>(rl::most_log_ratio));
  }

  // Where tokens [begin, begin + n) of a gradient are written, and what brings them to their places.
  struct gradient {
    const rl::detail::plane<T>* plane;
    const rl::detail::plane_shape* shape;
    index_t begin, n;
    T* buffer;
    bool direct = false;

    gradient(const rl::detail::plane<T>& p, const rl::detail::plane_shape& s, index_t first, index_t count,
             T* b) noexcept
        : plane(&p), shape(&s), begin(first), n(count), buffer(b) {
      const index_t row = begin / s.cols, col = begin - row * s.cols;
      direct = p.col_stride == 1 && col + n <= s.cols;
      if (direct) buffer = p.at(row, col);
    }
    void finish() const noexcept {
      if (direct) return;
      rl::detail::each_row_piece(*shape, begin, begin + n, [&](index_t r, index_t c, index_t count, index_t at) {
        T* to = plane->at(r, c);
        for (index_t i = 0; i < count; ++i) to[i * plane->col_stride] = buffer[at + i];
      });
    }
  };

  // keep[i] = 1 where the token counts, else 0; mask null: all do.
  static void fill_keep(const std::uint8_t* MLKIT_RESTRICT mask, index_t n, A* MLKIT_RESTRICT keep) noexcept {
    if (!mask) {
      std::fill_n(keep, n, A(1));
      return;
    }
    MLKIT_SIMD
    for (index_t i = 0; i < n; ++i) keep[i] = mask[i] ? A(1) : A(0);
  }

  // to[i] = values[the sequence of token begin + i].
  static void spread(const rl::detail::token_sequences& of, const A* values, index_t begin, index_t n, A* to) noexcept {
    if (of.turned) {
      for (index_t i = 0, b = begin % of.sequences; i < n;) {
        const index_t count = std::min(n - i, of.sequences - b);
        std::copy_n(values + b, count, to + i);
        i += count;
        b = 0;
      }
      return;
    }
    for (index_t i = 0, b = of.at(begin); i < n; ++b) {
      const index_t count = std::max<index_t>(0, std::min(n - i, of.end(b) - (begin + i)));
      std::fill_n(to + i, count, values[b]);
      i += count;
    }
  }

  static void fill_weights(const operands& p, index_t begin, index_t n, scratch& s) noexcept {
    if (p.weights_differ)
      spread(p.sequences, p.weights, begin, n, s.weight);
    else if (p.entropies.data)
      std::fill_n(s.weight, n, p.weight);
  }

  // Losses, slopes and whether they are clipped of n tokens.
  template <class Term, class X, class Y, class Z>
  static MLKIT_ALWAYS_INLINE void terms(const Term& term, index_t n, const X* MLKIT_RESTRICT x,
                                        const Y* MLKIT_RESTRICT y, const Z* MLKIT_RESTRICT z, A* MLKIT_RESTRICT loss,
                                        A* MLKIT_RESTRICT slope, A* MLKIT_RESTRICT clipped) noexcept {
    MLKIT_SIMD
    for (index_t i = 0; i < n; ++i) {
      const auto token = term(static_cast<A>(x[i]), static_cast<A>(y[i]), static_cast<A>(z[i]));
      loss[i] = token.loss;
      slope[i] = token.slope;
      clipped[i] = token.clipped ? A(1) : A(0);
    }
  }

  // The sum of weight * loss, how many are clipped, and the gradient factor * weight * slope if it is asked for.
  static void reduce(const operands& p, const rl::detail::plane<T>& slopes, A factor, index_t begin, index_t n,
                     double& loss, double& clipped, scratch& s) noexcept {
    if (slopes.data) {
      const gradient to(slopes, p.shape, begin, n, s.out);
      if (p.weights_differ)
        reduce_block<true, true>(p, s, n, factor, to.buffer, loss, clipped);
      else
        reduce_block<true, false>(p, s, n, factor, to.buffer, loss, clipped);
      to.finish();
    } else if (p.weights_differ) {
      reduce_block<false, true>(p, s, n, factor, static_cast<T*>(nullptr), loss, clipped);
    } else {
      reduce_block<false, false>(p, s, n, factor, static_cast<T*>(nullptr), loss, clipped);
    }
  }
  template <bool Gradient, bool Weighted>
  static MLKIT_ALWAYS_INLINE void reduce_block(const operands& p, const scratch& s, index_t n, A factor, T* to,
                                               double& loss, double& clipped) noexcept {
    V sum = V::zero(), count = V::zero();
    const V of_all(factor * p.weight);
    each_vector<V>(n, [&](index_t i, int m) MLKIT_RL_LOOP_BODY {
      const auto keep = load_some<V>(s.keep + i, m) != V::zero();
      V term = load_some<V>(s.loss + i, m), weight = of_all;
      if constexpr (Weighted) {
        weight = load_some<V>(s.weight + i, m);
        term *= weight;
        weight = weight * factor;
      }
      sum += V::select(keep, term, V::zero());
      count += V::select(keep, load_some<V>(s.clipped + i, m), V::zero());
      if constexpr (Gradient) {
        store_some(V::select(keep, weight * load_some<V>(s.slope + i, m), V::zero()), to + i, m);
        prefetch_next(to + i);
      }
    });
    loss = static_cast<double>(across(sum, sum_of_two{})) * static_cast<double>(Weighted ? A(1) : p.weight);
    clipped = static_cast<double>(across(count, sum_of_two{}));
  }

  static void run_value(const operands& p, index_t begin, index_t n, rl::detail::loss_sums& sums, scratch& s) noexcept {
    const T* values = in_order(p.values, p.shape, begin, n, s.in[0]);
    const T* returns = in_order(p.returns, p.shape, begin, n, s.in[1]);
    const T* old = p.old_values.data ? in_order(p.old_values, p.shape, begin, n, s.in[2]) : values;
    terms(p.value, n, values, old, returns, s.loss, s.slope, s.clipped);
    wide_sum<A> error, square_error, target, square_target;
    const V first_error(p.first_error), first_return(p.first_return);
    each_vector<V>(n, [&](index_t i, int m) MLKIT_RL_LOOP_BODY {
      const auto keep = load_some<V>(s.keep + i, m) != V::zero();
      const V r = load_some<V>(returns + i, m), v = load_some<V>(values + i, m);
      prefetch_next(returns + i, values + i, old + i);
      wide_sum<A>::add_moments(V::select(keep, (r - v) - first_error, V::zero()), error, square_error);
      wide_sum<A>::add_moments(V::select(keep, r - first_return, V::zero()), target, square_target);
    });
    sums.error = error.total();
    sums.square_error = square_error.total();
    sums.target = target.total();
    sums.square_target = square_target.total();
    reduce(p, p.dvalues, p.value_coefficient, begin, n, sums.value, sums.value_clipped, s);
  }

  static void run_entropy(const operands& p, index_t begin, index_t n, rl::detail::loss_sums& sums,
                          scratch& s) noexcept {
    const T* entropies = in_order(p.entropies, p.shape, begin, n, s.in[0]);
    V sum = V::zero();
    each_vector<V>(n, [&](index_t i, int m) MLKIT_RL_LOOP_BODY {
      const auto keep = load_some<V>(s.keep + i, m) != V::zero();
      const V h = load_some<V>(entropies + i, m) * load_some<V>(s.weight + i, m);
      sum += V::select(keep, h, V::zero());
    });
    sums.entropy = static_cast<double>(across(sum, sum_of_two{}));
    if (!p.dentropies.data) return;
    const gradient to(p.dentropies, p.shape, begin, n, s.out);
    each_vector<V>(n, [&](index_t i, int m) MLKIT_RL_LOOP_BODY {
      const auto keep = load_some<V>(s.keep + i, m) != V::zero();
      const V g = load_some<V>(s.weight + i, m) * -p.entropy_coefficient;
      store_some(V::select(keep, g, V::zero()), to.buffer + i, m);
    });
    to.finish();
  }
};

template <class Problem>
struct policy_loss_kernel : loss_block<typename Problem::value_type> {
  using T = typename Problem::value_type;
  using block = loss_block<T>;
  using block::clamped;
  using block::fill_keep;
  using block::spread;
  using block::terms;
  using typename block::A;
  using typename block::scratch;
  using typename block::V;
  using Policy = typename Problem::policy_type;
  static constexpr bool has_policy = !std::is_same_v<Policy, rl::detail::no_policy>;

  static void run_policy(const Problem& p, index_t begin, index_t n, rl::detail::loss_sums& sums, scratch& s) noexcept {
    const T* log_probs = in_order(p.log_probs, p.shape, begin, n, s.in[0]);
    const T* advantages = in_order(p.advantages, p.shape, begin, n, s.in[1]);
    if (p.old_log_probs.data) {
      const T* old = in_order(p.old_log_probs, p.shape, begin, n, s.in[2]);
      V k1 = V::zero(), k3 = V::zero(), low(math_table<A>::infinity), high(-math_table<A>::infinity);
      each_vector<V>(n, [&](index_t i, int m) MLKIT_RL_LOOP_BODY {
        const auto keep = load_some<V>(s.keep + i, m) != V::zero();
        const V d = V::select(keep, clamped(load_some<V>(log_probs + i, m) - load_some<V>(old + i, m)), V::zero());
        const auto [ratio, excess] = exp_and_excess(d);
        store_some(ratio, s.ratio + i, m);
        prefetch_next(log_probs + i, old + i, advantages + i);
        k1 -= d;
        k3 += excess;
        low = V::select(keep, min(low, ratio), low);
        high = V::select(keep, max(high, ratio), high);
      });
      sums.k1 = static_cast<double>(across(k1, sum_of_two{}));
      sums.k3 = static_cast<double>(across(k3, sum_of_two{}));
      if constexpr (rl::detail::of_sequence<Policy>) {
        spread(p.sequences, p.sequence_ratios, begin, n, s.ratio);
        low = V(math_table<A>::infinity), high = -low;
        each_vector<V>(n, [&](index_t i, int m) MLKIT_RL_LOOP_BODY {
          const auto keep = load_some<V>(s.keep + i, m) != V::zero();
          const V ratio = load_some<V>(s.ratio + i, m);
          low = V::select(keep, min(low, ratio), low);
          high = V::select(keep, max(high, ratio), high);
        });
      }
      sums.ratio_min = -static_cast<double>(across(-low, larger_of_two{}));
      sums.ratio_max = static_cast<double>(across(high, larger_of_two{}));
    } else {
      std::fill_n(s.ratio, n, A(1));
      sums.ratio_min = sums.ratio_max = 1;
    }
    terms(p.policy, n, s.ratio, advantages, log_probs, s.loss, s.slope, s.clipped);
    if constexpr (rl::detail::of_sequence<Policy> && !rl::detail::constant_ratio<Policy>)
      spread(p.sequences, p.sequence_slopes, begin, n, s.slope);
    block::reduce(p, p.dlog_probs, A(1), begin, n, sums.policy, sums.clipped, s);
  }

  // Tokens [begin, begin + n), at most a block.
  static void run(const Problem& p, index_t begin, index_t n, rl::detail::loss_sums& sums, scratch& s) noexcept {
    fill_keep(p.mask.data ? in_order(p.mask, p.shape, begin, n, s.mask) : nullptr, n, s.keep);
    block::fill_weights(p, begin, n, s);
    if constexpr (has_policy) run_policy(p, begin, n, sums, s);
    if (p.values.data) block::run_value(p, begin, n, sums, s);
    if constexpr (has_policy)
      if (p.entropies.data) block::run_entropy(p, begin, n, sums, s);
  }

  // The ratio of sequence b, and the gradient of each of its tokens before its weight: the mean of its slopes, since
  // the weight is that of the sequence.
  static void run_sequence(const Problem& p, index_t b, scratch& s) noexcept {
    const auto& q = p.by_sequence;
    const index_t first = p.sequences.begin(b), end = p.sequences.end(b);
    wide_sum<A> sum, count;
    for (index_t at = first; at < end; at += rl::detail::tokens_of_block) {
      const index_t n = std::min(end - at, rl::detail::tokens_of_block);
      fill_keep(q.mask.data ? in_order(q.mask, q.shape, at, n, s.mask) : nullptr, n, s.keep);
      const T* log_probs = in_order(q.log_probs, q.shape, at, n, s.in[0]);
      const T* old = in_order(q.old_log_probs, q.shape, at, n, s.in[2]);
      each_vector<V>(n, [&](index_t i, int m) MLKIT_RL_LOOP_BODY {
        const V keep = load_some<V>(s.keep + i, m);
        const V d = load_some<V>(log_probs + i, m) - load_some<V>(old + i, m);
        sum.add(V::select(keep != V::zero(), d, V::zero()));
        count.add(keep);
      });
    }
    const double tokens_here = count.total();
    p.sequence_ratios[b] = A(1);
    p.sequence_slopes[b] = A(0);
    if (tokens_here == 0) return;
    const V exponent(static_cast<A>(sum.total() / tokens_here));
    p.sequence_ratios[b] = exp(clamped(exponent)).v[0];
    if constexpr (!rl::detail::constant_ratio<Policy>) {
      wide_sum<A> slopes;
      std::fill_n(s.ratio, std::min(end - first, rl::detail::tokens_of_block), p.sequence_ratios[b]);
      for (index_t at = first; at < end; at += rl::detail::tokens_of_block) {
        const index_t n = std::min(end - at, rl::detail::tokens_of_block);
        fill_keep(q.mask.data ? in_order(q.mask, q.shape, at, n, s.mask) : nullptr, n, s.keep);
        const T* log_probs = in_order(q.log_probs, q.shape, at, n, s.in[0]);
        const T* advantages = in_order(q.advantages, q.shape, at, n, s.in[1]);
        terms(p.policy, n, s.ratio, advantages, log_probs, s.loss, s.slope, s.clipped);
        each_vector<V>(n, [&](index_t i, int m) MLKIT_RL_LOOP_BODY {
          const auto keep = load_some<V>(s.keep + i, m) != V::zero();
          slopes.add(V::select(keep, load_some<V>(s.slope + i, m), V::zero()));
        });
      }
      p.sequence_slopes[b] = static_cast<A>(slopes.total() / tokens_here);
    }
  }
};

template <class Problem>
rl::detail::policy_loss_kernels<Problem> policy_loss_entry() noexcept {
  using kernel = policy_loss_kernel<Problem>;
  if constexpr (rl::detail::of_sequence<typename Problem::policy_type>)
    return {kernel::run, kernel::run_sequence};
  else
    return {kernel::run, nullptr};
}
