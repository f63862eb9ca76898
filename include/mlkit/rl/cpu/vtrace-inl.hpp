// The step of V-trace; x is vs - V.

// e^x, the exponent clamped.
template <class T>
MLKIT_ALWAYS_INLINE vec<T> importance_weight(vec<T> log_ratio) noexcept {
  const vec<T> most(T(20));
  return exp(max(-most, min(most, log_ratio)));  // NaN stays
}

template <class T>
struct recurrence<rl::detail::vtrace_rule<T>> {
  using V = vec<T>;
  using Rule = rl::detail::vtrace_rule<T>;

  // in: reward, value, log-ratio. next: the value behind the step.
  template <class Dones>
  static MLKIT_ALWAYS_INLINE step_map<V> map(const Rule& p, const V* in, V final_value, const Dones& dones,
                                             V* next) noexcept {
    const V weight = importance_weight(in[2]);
    const V following = dones.following(next[0], final_value);
    next[0] = in[1];
    const V error = fma(V(p.gamma), following, in[0]) - in[1];
    return {dones.where_done(V::zero(), min(V(p.c_clip), weight) * (p.gamma * p.lambda)),
            min(V(p.rho_clip), weight) * error};
  }
  template <class Dones>
  static MLKIT_ALWAYS_INLINE void emit(const Rule& p, const V* in, V final_value, const Dones& dones, const V* next,
                                       V behind, V x, V* out) noexcept {
    const V weight = min(V(p.policy_rho_clip), importance_weight(in[2]));
    const V following = dones.following(fma(V(p.lambda), behind, next[0]), final_value);
    out[0] = x + in[1];
    out[1] = weight * (fma(V(p.gamma), following, in[0]) - in[1]);
  }
  static V seed(const Rule&, V) noexcept { return V::zero(); }
  static void end(const Rule&, V end, V* next) noexcept { next[0] = end; }
};
