// The steps of discounted and TD(lambda) returns, and n-step returns from composed maps.

template <class T>
struct recurrence<rl::detail::discount_rule<T>> {
  using V = vec<T>;
  using Rule = rl::detail::discount_rule<T>;

  // in: reward.
  template <class Dones>
  static MLKIT_ALWAYS_INLINE step_map<V> map(const Rule& p, const V* in, V final_value, const Dones& dones,
                                             V*) noexcept {
    const V gamma(p.gamma);
    return {dones.where_done(V::zero(), gamma), fma(gamma, dones.following(V::zero(), final_value), in[0])};
  }
  template <class Dones>
  static MLKIT_ALWAYS_INLINE void emit(const Rule&, const V*, V, const Dones&, const V*, V, V x, V* out) noexcept {
    out[0] = x;
  }
  static V seed(const Rule&, V end) noexcept { return end; }
  static void end(const Rule&, V, V*) noexcept {}
};

template <class T>
struct recurrence<rl::detail::td_lambda_rule<T>> {
  using V = vec<T>;
  using Rule = rl::detail::td_lambda_rule<T>;

  // in: reward, value. next: the value behind the step.
  template <class Dones>
  static MLKIT_ALWAYS_INLINE step_map<V> map(const Rule& p, const V* in, V final_value, const Dones& dones,
                                             V* next) noexcept {
    const V following = dones.following(next[0], final_value);
    next[0] = in[1];
    return {dones.where_done(V::zero(), V(p.decay)), fma(dones.where_done(V(p.gamma), V(p.rest)), following, in[0])};
  }
  template <class Dones>
  static MLKIT_ALWAYS_INLINE void emit(const Rule&, const V*, V, const Dones&, const V*, V, V x, V* out) noexcept {
    out[0] = x;
  }
  static V seed(const Rule&, V end) noexcept { return end; }
  static void end(const Rule&, V end, V* next) noexcept { next[0] = end; }
};

// n-step returns of one sequence. The steps that count are copied together; for step i, {a[i], b[i]} is the map of the
// steps [i, i + length), as far as there are any, and x[i] the value that has been found for n's lower digits.
template <class Problem>
void n_step_run(const Problem& p, index_t sequence, typename Problem::value_type* scratch) noexcept {
  using T = typename Problem::value_type;
  using V = vec<T>;
  const index_t row = p.row(sequence), first = p.first(sequence), last = p.last(sequence);
  const index_t room = last - first;
  T *a = scratch, *b = a + room, *x = b + room;
  index_t n = 0;
  for (index_t t = first; t < last; ++t)
    if (p.counts(row, t)) x[n++] = *p.in[1].at(row, t);
  int later = p.begins ? p.last_code(sequence) : 0;
  index_t i = n;
  for (index_t t = last - 1; t >= first; --t) {
    if (!p.counts(row, t)) continue;
    --i;
    const int own = p.code(row, t), code = p.begins ? later : own;
    later = own;
    const T reward = *p.in[0].at(row, t);
    a[i] = code == 0 ? p.rule.gamma : T{};
    b[i] = code == step_truncated ? p.rule.gamma * *p.final_values.at(row, t) + reward : reward;
  }
  const T end = p.ends[sequence];

  // x[i] = map of i at x[i + length], or the value behind the sequence.
  const auto apply = [&](index_t length) {
    const index_t within = n > length ? n - length : 0;
    const auto some = [&](index_t at, V behind, int count) {
      apply_map(V::load(a + at, count), V::load(b + at, count), behind).store(x + at, count);
    };
    index_t at = 0;
    for (; at < within; at += V::width) {
      const int count = static_cast<int>(within - at < V::width ? within - at : V::width);
      some(at, V::load(x + at + length, count), count);
    }
    for (at = within; at < n; at += V::width) some(at, V(end), static_cast<int>(n - at < V::width ? n - at : V::width));
  };
  const index_t steps = p.rule.steps < n ? p.rule.steps : n;
  for (index_t length = 1; length <= steps; length *= 2) {
    if (steps & length) apply(length);
    if (2 * length > steps) break;
    for (index_t at = 0; at < n - length; at += V::width) {
      const int count = static_cast<int>(n - length - at < V::width ? n - length - at : V::width);
      const V near_a = V::load(a + at, count), near_b = V::load(b + at, count);
      const V far_a = V::load(a + at + length, count), far_b = V::load(b + at + length, count);
      apply_map(near_a, near_b, far_b).store(b + at, count);
      apply_map(near_a, V::zero(), far_a).store(a + at, count);
    }
  }
  i = 0;
  for (index_t t = first; t < last; ++t) *p.out[0].at(row, t) = p.counts(row, t) ? x[i++] : T{};
}

template <class Problem>
rl::detail::n_step_kernels<Problem> n_step_entry() noexcept {
  return {&n_step_run<Problem>, &all_finite<typename Problem::value_type>, &any_byte};
}
