// The steps of UPGO and Retrace.

template <class T>
struct recurrence<rl::detail::upgo_rule<T>> {
  using V = vec<T>;
  using Rule = rl::detail::upgo_rule<T>;

  // in: reward, value. next: the value behind the step; 0 where the step behind does as well as that, else -1.
  template <class Dones>
  static MLKIT_ALWAYS_INLINE step_map<V> map(const Rule& p, const V* in, V final_value, const Dones& dones,
                                             V* next) noexcept {
    const V gamma(p.gamma), zero = V::zero();
    const auto as_good = next[1] == zero;
    const V beside = dones.following(V::select(as_good, zero, next[0]), final_value);
    const step_map<V> m{dones.where_done(zero, V::select(as_good, gamma, zero)), fma(gamma, beside, in[0])};
    const V one_step = fma(gamma, dones.following(next[0], final_value), in[0]);
    next[0] = in[1];
    next[1] = V::select(one_step >= in[1], zero, V(T(-1)));
    return m;
  }
  template <class Dones>
  static MLKIT_ALWAYS_INLINE void emit(const Rule&, const V* in, V, const Dones&, const V*, V, V x, V* out) noexcept {
    out[0] = x;
    out[1] = x - in[1];
  }
  static V seed(const Rule&, V end) noexcept { return end; }
  static void end(const Rule&, V end, V* next) noexcept {
    next[0] = end;
    next[1] = V::zero();
  }
};

template <class T>
struct recurrence<rl::detail::retrace_rule<T>> {
  using V = vec<T>;
  using Rule = rl::detail::retrace_rule<T>;

  // in: reward, action value, expected value, log-ratio. next: E_pi Q - c Q(s, a) and c of the step behind.
  template <class Dones>
  static MLKIT_ALWAYS_INLINE step_map<V> map(const Rule& p, const V* in, V final_value, const Dones& dones,
                                             V* next) noexcept {
    const V gamma(p.gamma);
    const step_map<V> m{dones.where_done(V::zero(), gamma * next[1]),
                        fma(gamma, dones.following(next[0], final_value), in[0])};
    next[1] = min(V(T(1)), importance_weight(in[3])) * p.lambda;
    next[0] = fma(-next[1], in[1], in[2]);
    return m;
  }
  template <class Dones>
  static MLKIT_ALWAYS_INLINE void emit(const Rule&, const V*, V, const Dones&, const V*, V, V x, V* out) noexcept {
    out[0] = x;
  }
  static V seed(const Rule&, V) noexcept { return V::zero(); }
  static void end(const Rule&, V end, V* next) noexcept {
    next[0] = end;
    next[1] = V::zero();
  }
};
