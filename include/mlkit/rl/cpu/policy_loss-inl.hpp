// One block of tokens of a policy loss: the policy's part, the values' and the entropies' in turn, each a loop over
// registers whose operands stay in L1 for the next, so that each is read from memory once and each gradient written
// once. Terms are scalar functors in loops over the lanes of a register, which the compiler makes one of.

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
  using table = math_table<A>;
  const vec<A> n = round_to_integer(d * table::log2_e);
  const vec<A> r = fma(n, vec<A>(-table::ln2_low), fma(n, vec<A>(-table::ln2_high), d));
  const vec<A> bent = r * r * horner(r, table::exp), power = power_of_two(n);  // e^r - 1 - r
  const vec<A> ratio = fma(r + bent, power, power);
  return {ratio, vec<A>::select(n == vec<A>::zero(), bent, (ratio - A(1)) - d)};
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

  // Where tokens [begin, begin + n) of a gradient are written, null if nobody wants it, and what brings them to their
  // places.
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
      direct = !p.data || (p.col_stride == 1 && col + n <= s.cols);
      if (direct) buffer = p.data ? p.at(row, col) : nullptr;
    }
    void finish() const noexcept {
      if (direct) return;
      rl::detail::each_row_piece(*shape, begin, begin + n, [&](index_t r, index_t c, index_t count, index_t at) {
        T* to = plane->at(r, c);
        for (index_t i = 0; i < count; ++i) to[i * plane->col_stride] = buffer[at + i];
      });
    }
  };

  // Bytes that are 0 where a token does not count; without a mask all do.
  static const std::uint8_t* find_mask(const rl::detail::plane<const std::uint8_t>& mask,
                                       const rl::detail::plane_shape& shape, index_t begin, index_t n,
                                       scratch& s) noexcept {
    if (mask.data) return in_order(mask, shape, begin, n, s.mask);
    std::fill_n(s.mask, n, std::uint8_t{1});
    return s.mask;
  }
  // Lanes i to i + m - 1, which are not 0 where the token counts.
  static MLKIT_ALWAYS_INLINE typename V::native_int kept(const std::uint8_t* mask, index_t i, int m) noexcept {
    return m == V::width ? kept_lanes<V>(mask + i) : some_lanes<V>(mask + i, m).lanes();
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

  // What a term gives for a register of tokens.
  struct term_values {
    V loss, slope, clipped;
  };
  template <class Term>
  static MLKIT_ALWAYS_INLINE term_values terms_of(const Term& term, V x, V y, V z) noexcept {
    alignas(64) A a[V::width], b[V::width], c[V::width], loss[V::width], slope[V::width], clipped[V::width];
    x.store(a), y.store(b), z.store(c);
    MLKIT_SIMD
    for (int l = 0; l < V::width; ++l) {
      const auto token = term(a[l], b[l], c[l]);
      loss[l] = token.loss;
      slope[l] = token.slope;
      clipped[l] = token.clipped ? A(1) : A(0);
    }
    return {V::load(loss), V::load(slope), V::load(clipped)};
  }

  // The sum of weight * loss, how many are clipped, and the gradient factor * weight * slope if it is asked for.
  struct reduction {
    V loss, clipped, of_all;
    A factor, weight;
    const A* weights;
    T* to;

    MLKIT_ALWAYS_INLINE reduction(const operands& p, A f, const scratch& s, T* gradient) noexcept
        : loss(V::zero()),
          clipped(V::zero()),
          of_all(f * p.weight),
          factor(f),
          weight(p.weight),
          weights(p.weights_differ ? s.weight : nullptr),
          to(gradient) {}
    MLKIT_ALWAYS_INLINE void take(typename V::native_int keep, const term_values& x, index_t i, int m) noexcept {
      V term = x.loss, scaled = of_all;
      if (weights) {
        scaled = load_some<V>(weights + i, m);
        term *= scaled;
        scaled = scaled * factor;
      }
      loss = V::select(keep, loss + term, loss);
      clipped = V::select(keep, clipped + x.clipped, clipped);
      if (!to) return;
      store_some(V::select(keep, scaled * x.slope, V::zero()), to + i, m);
      prefetch_next(to + i);
    }
    MLKIT_ALWAYS_INLINE void finish(double& of_loss, double& of_clipped) const noexcept {
      of_loss = static_cast<double>(across(loss, sum_of_two{})) * static_cast<double>(weights ? A(1) : weight);
      of_clipped = static_cast<double>(across(clipped, sum_of_two{}));
    }
  };

  // Sums of a block's numbers, less its first that counts, of them squared, and in f64 both less another: no number
  // is further from the mean of n than sqrt(n) times their deviation, so that f32 does for those of a block.
  struct moments_about {
    V first, sum, square;

    MLKIT_ALWAYS_INLINE explicit moments_about(A x) noexcept : first(x), sum(V::zero()), square(V::zero()) {}
    MLKIT_ALWAYS_INLINE void take(typename V::native_int keep, V x) noexcept {
      const V d = V::select(keep, x - first, V::zero());
      sum += d;
      square = fma(d, d, square);
    }
    MLKIT_ALWAYS_INLINE void finish(A origin, double n, double& of_sum, double& of_square) const noexcept {
      const double by = static_cast<double>(first.v[0]) - static_cast<double>(origin);
      const double total = static_cast<double>(across(sum, sum_of_two{}));
      of_sum = total + n * by;
      of_square = static_cast<double>(across(square, sum_of_two{})) + by * (2 * total + n * by);
    }
  };

  static void run_value(const operands& p, const std::uint8_t* mask, index_t begin, index_t n,
                        rl::detail::loss_sums& sums, scratch& s) noexcept {
    const T* values = in_order(p.values, p.shape, begin, n, s.in[0]);
    const T* returns = in_order(p.returns, p.shape, begin, n, s.in[1]);
    const T* old = p.old_values.data ? in_order(p.old_values, p.shape, begin, n, s.in[2]) : values;
    index_t first = 0;
    while (first < n && mask[first] == 0) ++first;
    const A return_there = first < n ? static_cast<A>(returns[first]) : p.first_return;
    const A error_there = first < n ? return_there - static_cast<A>(values[first]) : p.first_error;
    moments_about target(return_there), error(error_there);
    const gradient to(p.dvalues, p.shape, begin, n, s.out);
    reduction total(p, p.value_coefficient, s, to.buffer);
    const auto term = p.value;  // its own copy, which no store can change
    each_vector<V>(n, [&](index_t i, int m) MLKIT_RL_LOOP_BODY {
      const auto keep = kept(mask, i, m);
      const V r = load_some<V>(returns + i, m), v = load_some<V>(values + i, m);
      prefetch_next(returns + i, values + i, old + i);
      error.take(keep, r - v);
      target.take(keep, r);
      total.take(keep, terms_of(term, v, load_some<V>(old + i, m), r), i, m);
    });
    to.finish();
    total.finish(sums.value, sums.value_clipped);
    const double tokens = static_cast<double>(count_kept(mask, n));
    error.finish(p.first_error, tokens, sums.error, sums.square_error);
    target.finish(p.first_return, tokens, sums.target, sums.square_target);
  }

  static void run_entropy(const operands& p, const std::uint8_t* mask, index_t begin, index_t n,
                          rl::detail::loss_sums& sums, scratch& s) noexcept {
    const T* entropies = in_order(p.entropies, p.shape, begin, n, s.in[0]);
    V sum = V::zero();
    each_vector<V>(n, [&](index_t i, int m) MLKIT_RL_LOOP_BODY {
      const auto keep = kept(mask, i, m);
      const V h = load_some<V>(entropies + i, m) * load_some<V>(s.weight + i, m);
      sum += V::select(keep, h, V::zero());
    });
    sums.entropy = static_cast<double>(across(sum, sum_of_two{}));
    if (!p.dentropies.data) return;
    const gradient to(p.dentropies, p.shape, begin, n, s.out);
    each_vector<V>(n, [&](index_t i, int m) MLKIT_RL_LOOP_BODY {
      const auto keep = kept(mask, i, m);
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
  using block::find_mask;
  using block::kept;
  using block::spread;
  using typename block::A;
  using typename block::scratch;
  using typename block::V;
  using Policy = typename Problem::policy_type;
  static constexpr bool has_policy = !std::is_same_v<Policy, rl::detail::no_policy>;

  static void run_policy(const Problem& p, const std::uint8_t* mask, index_t begin, index_t n,
                         rl::detail::loss_sums& sums, scratch& s) noexcept {
    if constexpr (rl::detail::is_dual_clip<Policy>)
      if (std::isinf(p.policy.bound)) return run_term(p, p.policy.term, mask, begin, n, sums, s);
    run_term(p, p.policy, mask, begin, n, sums, s);
  }
  template <class Term>
  static void run_term(const Problem& p, const Term& term, const std::uint8_t* mask, index_t begin, index_t n,
                       rl::detail::loss_sums& sums, scratch& s) noexcept {
    const T* log_probs = in_order(p.log_probs, p.shape, begin, n, s.in[0]);
    const T* advantages = in_order(p.advantages, p.shape, begin, n, s.in[1]);
    const T* old = p.old_log_probs.data ? in_order(p.old_log_probs, p.shape, begin, n, s.in[2]) : nullptr;
    constexpr bool of_sequence = rl::detail::of_sequence<Policy>;
    constexpr bool mean_slope = of_sequence && !rl::detail::constant_ratio<Policy>;
    if constexpr (of_sequence) spread(p.sequences, p.sequence_ratios, begin, n, s.ratio);
    if constexpr (mean_slope) spread(p.sequences, p.sequence_slopes, begin, n, s.slope);
    const typename block::gradient to(p.dlog_probs, p.shape, begin, n, s.out);
    typename block::reduction total(p, A(1), s, to.buffer);
    const Term policy = term;  // its own copy, which no store can change
    V k1 = V::zero(), k3 = V::zero(), low(math_table<A>::infinity), high(-math_table<A>::infinity);
    each_vector<V>(n, [&](index_t i, int m) MLKIT_RL_LOOP_BODY {
      const auto keep = kept(mask, i, m);
      const V log_prob = load_some<V>(log_probs + i, m), advantage = load_some<V>(advantages + i, m);
      prefetch_next(log_probs + i, advantages + i);
      V ratio(A(1));
      if (old) {
        prefetch_next(old + i);
        const V d = V::select(keep, clamped(log_prob - load_some<V>(old + i, m)), V::zero());
        const ratio_and_excess<A> of_token = exp_and_excess(d);
        ratio = of_token.ratio;
        k1 -= d;
        k3 += of_token.excess;
      }
      if constexpr (of_sequence) ratio = load_some<V>(s.ratio + i, m);
      low = V::select(keep, min(low, ratio), low);
      high = V::select(keep, max(high, ratio), high);
      auto values = block::terms_of(policy, ratio, advantage, log_prob);
      if constexpr (mean_slope) values.slope = load_some<V>(s.slope + i, m);
      total.take(keep, values, i, m);
    });
    to.finish();
    total.finish(sums.policy, sums.clipped);
    sums.k1 = static_cast<double>(across(k1, sum_of_two{}));
    sums.k3 = static_cast<double>(across(k3, sum_of_two{}));
    sums.ratio_min = -static_cast<double>(across(-low, larger_of_two{}));
    sums.ratio_max = static_cast<double>(across(high, larger_of_two{}));
  }

  // Tokens [begin, begin + n), at most a block.
  static void run(const Problem& p, index_t begin, index_t n, rl::detail::loss_sums& sums, scratch& s) noexcept {
    const std::uint8_t* mask = find_mask(p.mask, p.shape, begin, n, s);
    block::fill_weights(p, begin, n, s);
    if constexpr (has_policy) run_policy(p, mask, begin, n, sums, s);
    if (p.values.data) block::run_value(p, mask, begin, n, sums, s);
    if constexpr (has_policy)
      if (p.entropies.data) block::run_entropy(p, mask, begin, n, sums, s);
  }

  // The ratio of sequence b, and the gradient of each of its tokens before its weight: the mean of its slopes, since
  // the weight is that of the sequence.
  static void run_sequence(const Problem& p, index_t b, scratch& s) noexcept {
    const auto& q = p.by_sequence;
    const index_t first = p.sequences.begin(b), end = p.sequences.end(b);
    wide_sum<A> sum;
    double tokens_here = 0;
    for (index_t at = first; at < end; at += rl::detail::tokens_of_block) {
      const index_t n = std::min(end - at, rl::detail::tokens_of_block);
      const std::uint8_t* mask = find_mask(q.mask, q.shape, at, n, s);
      const T* log_probs = in_order(q.log_probs, q.shape, at, n, s.in[0]);
      const T* old = in_order(q.old_log_probs, q.shape, at, n, s.in[2]);
      each_vector<V>(n, [&](index_t i, int m) MLKIT_RL_LOOP_BODY {
        const V d = load_some<V>(log_probs + i, m) - load_some<V>(old + i, m);
        sum.add(V::select(kept(mask, i, m), d, V::zero()));
      });
      tokens_here += static_cast<double>(count_kept(mask, n));
    }
    p.sequence_ratios[b] = A(1);
    p.sequence_slopes[b] = A(0);
    if (tokens_here == 0) return;
    const V exponent(static_cast<A>(sum.total() / tokens_here));
    p.sequence_ratios[b] = exp(clamped(exponent)).v[0];
    if constexpr (!rl::detail::constant_ratio<Policy>) {
      wide_sum<A> slopes;
      const Policy policy = p.policy;
      const V ratio(p.sequence_ratios[b]);
      for (index_t at = first; at < end; at += rl::detail::tokens_of_block) {
        const index_t n = std::min(end - at, rl::detail::tokens_of_block);
        const std::uint8_t* mask = find_mask(q.mask, q.shape, at, n, s);
        const T* log_probs = in_order(q.log_probs, q.shape, at, n, s.in[0]);
        const T* advantages = in_order(q.advantages, q.shape, at, n, s.in[1]);
        each_vector<V>(n, [&](index_t i, int m) MLKIT_RL_LOOP_BODY {
          const V advantage = load_some<V>(advantages + i, m), log_prob = load_some<V>(log_probs + i, m);
          const V slope = block::terms_of(policy, ratio, advantage, log_prob).slope;
          slopes.add(V::select(kept(mask, i, m), slope, V::zero()));
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
