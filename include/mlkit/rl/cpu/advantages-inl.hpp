// The step of generalized advantage estimation.

template <class T>
struct recurrence<rl::detail::gae_rule<T>> {
  using V = vec<T>;
  using Rule = rl::detail::gae_rule<T>;

  static constexpr int carried_input = 1;

  // in: reward, value. next: the value behind the step.
  template <class Dones>
  static MLKIT_ALWAYS_INLINE step_map<V> map(const Rule& p, const V* in, V final_value, const Dones& dones,
                                             V* next) noexcept {
    const V following = dones.following(next[0], final_value);
    next[0] = in[1];
    return {dones.where_done(V::zero(), V(p.decay)), fma(V(p.gamma), following, in[0]) - in[1]};
  }
  template <class Dones>
  static MLKIT_ALWAYS_INLINE void emit(const Rule&, const V* in, V, const Dones&, const V*, V, V x, V* out) noexcept {
    out[0] = x;
    out[1] = x + in[1];
  }
  static V seed(const Rule&, V) noexcept { return V::zero(); }
  static void end(const Rule&, V end, V* next) noexcept { next[0] = end; }
};
