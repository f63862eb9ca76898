// The steps of the scans' rules, one step of one sequence at a time: what rl/cpu's recurrences are to registers of
// them.
#pragma once

#include "../advantages.hpp"
#include "../off_policy.hpp"
#include "../returns.hpp"
#include "../vtrace.hpp"
#include "device.cuh"

namespace MLKIT_NAMESPACE::rl::detail {

// What becomes of values where a step is done.
template <class T>
struct step_dones {
  int code;
  // The value of what follows the step: next, or that of the final observation, or 0 behind a terminal state.
  __device__ __forceinline__ T following(T next, T final_value) const {
    return (code & step_terminated) ? T{} : (code & step_truncated) ? final_value : next;
  }
  __device__ __forceinline__ T where_done(T done, T other) const {
    return (code & (step_terminated | step_truncated)) ? done : other;
  }
};

// a x + b; a = 0 cuts: what x was, NaN or not, is not looked at.
template <class T>
__device__ __forceinline__ T apply_map(const affine<T>& m, T x) {
  return fused(m.a, m.a == T{} ? T{} : x, m.b);
}
// The map that applies `far` and then `near`.
template <class T>
__device__ __forceinline__ affine<T> join_maps(const affine<T>& near, const affine<T>& far) {
  return {near.a * (near.a == T{} ? T{} : far.a), apply_map(near, far.b)};
}

// e^x, the exponent clamped; NaN stays.
template <class T>
__device__ __forceinline__ T importance_weight(T log_ratio) {
  return ::exp(log_ratio > T(20) ? T(20) : log_ratio < T(-20) ? T(-20) : log_ratio);
}
// min(bound, x); NaN stays.
template <class T>
__device__ __forceinline__ T at_most(T bound, T x) {
  return x > bound ? bound : x;
}

// map(rule, inputs, final value, dones, next): the map of a step; next, what the step behind it carried, becomes what
// this one carries. emit(rule, inputs, final value, dones, next, x behind, x, outputs). seed(rule, end value): the x
// behind the last step; end(rule, end value, next): what is carried there.
template <class Rule>
struct scan_step;

template <class T, int Inputs, class F>
struct scan_step<affine_rule<T, Inputs, F>> {
  using Rule = affine_rule<T, Inputs, F>;

  static __device__ __forceinline__ affine<T> map(const Rule& p, const T* in, T, step_dones<T>, T*) {
    return call(p.f, in, std::make_index_sequence<static_cast<std::size_t>(Inputs)>{});
  }
  template <std::size_t... I>
  static __device__ __forceinline__ affine<T> call(const F& f, const T* in, std::index_sequence<I...>) {
    return f(in[I]...);
  }
  static __device__ __forceinline__ void emit(const Rule&, const T*, T, step_dones<T>, const T*, T, T x, T* out) {
    out[0] = x;
  }
  static __device__ __forceinline__ T seed(const Rule&, T end) { return end; }
  static __device__ __forceinline__ void end(const Rule&, T, T*) {}
};

template <class T>
struct scan_step<gae_rule<T>> {
  using Rule = gae_rule<T>;

  // in: reward, value. next: the value behind the step.
  static __device__ __forceinline__ affine<T> map(const Rule& p, const T* in, T final_value, step_dones<T> dones,
                                                  T* next) {
    const T following = dones.following(next[0], final_value);
    next[0] = in[1];
    return {dones.where_done(T{}, p.decay), fused(p.gamma, following, in[0]) - in[1]};
  }
  static __device__ __forceinline__ void emit(const Rule&, const T* in, T, step_dones<T>, const T*, T, T x, T* out) {
    out[0] = x;
    out[1] = x + in[1];
  }
  static __device__ __forceinline__ T seed(const Rule&, T) { return T{}; }
  static __device__ __forceinline__ void end(const Rule&, T end, T* next) { next[0] = end; }
};

template <class T>
struct scan_step<discount_rule<T>> {
  using Rule = discount_rule<T>;

  // in: reward.
  static __device__ __forceinline__ affine<T> map(const Rule& p, const T* in, T final_value, step_dones<T> dones, T*) {
    return {dones.where_done(T{}, p.gamma), fused(p.gamma, dones.following(T{}, final_value), in[0])};
  }
  static __device__ __forceinline__ void emit(const Rule&, const T*, T, step_dones<T>, const T*, T, T x, T* out) {
    out[0] = x;
  }
  static __device__ __forceinline__ T seed(const Rule&, T end) { return end; }
  static __device__ __forceinline__ void end(const Rule&, T, T*) {}
};

template <class T>
struct scan_step<td_lambda_rule<T>> {
  using Rule = td_lambda_rule<T>;

  // in: reward, value. next: the value behind the step.
  static __device__ __forceinline__ affine<T> map(const Rule& p, const T* in, T final_value, step_dones<T> dones,
                                                  T* next) {
    const T following = dones.following(next[0], final_value);
    next[0] = in[1];
    return {dones.where_done(T{}, p.decay), fused(dones.where_done(p.gamma, p.rest), following, in[0])};
  }
  static __device__ __forceinline__ void emit(const Rule&, const T*, T, step_dones<T>, const T*, T, T x, T* out) {
    out[0] = x;
  }
  static __device__ __forceinline__ T seed(const Rule&, T end) { return end; }
  static __device__ __forceinline__ void end(const Rule&, T end, T* next) { next[0] = end; }
};

template <class T>
struct scan_step<vtrace_rule<T>> {
  using Rule = vtrace_rule<T>;

  // in: reward, value, log-ratio. next: the value behind the step. x is vs - V.
  static __device__ __forceinline__ affine<T> map(const Rule& p, const T* in, T final_value, step_dones<T> dones,
                                                  T* next) {
    const T weight = importance_weight(in[2]);
    const T following = dones.following(next[0], final_value);
    next[0] = in[1];
    const T error = fused(p.gamma, following, in[0]) - in[1];
    return {dones.where_done(T{}, at_most(p.c_clip, weight) * (p.gamma * p.lambda)),
            at_most(p.rho_clip, weight) * error};
  }
  static __device__ __forceinline__ void emit(const Rule& p, const T* in, T final_value, step_dones<T> dones,
                                              const T* next, T behind, T x, T* out) {
    const T weight = at_most(p.policy_rho_clip, importance_weight(in[2]));
    const T following = dones.following(fused(p.lambda, behind, next[0]), final_value);
    out[0] = x + in[1];
    out[1] = weight * (fused(p.gamma, following, in[0]) - in[1]);
  }
  static __device__ __forceinline__ T seed(const Rule&, T) { return T{}; }
  static __device__ __forceinline__ void end(const Rule&, T end, T* next) { next[0] = end; }
};

template <class T>
struct scan_step<upgo_rule<T>> {
  using Rule = upgo_rule<T>;

  // in: reward, value. next: the value behind the step; 0 where the step behind does as well as that, else -1.
  static __device__ __forceinline__ affine<T> map(const Rule& p, const T* in, T final_value, step_dones<T> dones,
                                                  T* next) {
    const bool as_good = next[1] == T{};
    const T beside = dones.following(as_good ? T{} : next[0], final_value);
    const affine<T> m{dones.where_done(T{}, as_good ? p.gamma : T{}), fused(p.gamma, beside, in[0])};
    const T one_step = fused(p.gamma, dones.following(next[0], final_value), in[0]);
    next[0] = in[1];
    next[1] = one_step >= in[1] ? T{} : T(-1);
    return m;
  }
  static __device__ __forceinline__ void emit(const Rule&, const T* in, T, step_dones<T>, const T*, T, T x, T* out) {
    out[0] = x;
    out[1] = x - in[1];
  }
  static __device__ __forceinline__ T seed(const Rule&, T end) { return end; }
  static __device__ __forceinline__ void end(const Rule&, T end, T* next) {
    next[0] = end;
    next[1] = T{};
  }
};

template <class T>
struct scan_step<retrace_rule<T>> {
  using Rule = retrace_rule<T>;

  // in: reward, action value, expected value, log-ratio. next: E_pi Q - c Q(s, a) and c of the step behind.
  static __device__ __forceinline__ affine<T> map(const Rule& p, const T* in, T final_value, step_dones<T> dones,
                                                  T* next) {
    const affine<T> m{dones.where_done(T{}, p.gamma * next[1]),
                      fused(p.gamma, dones.following(next[0], final_value), in[0])};
    next[1] = at_most(T(1), importance_weight(in[3])) * p.lambda;
    next[0] = fused(-next[1], in[1], in[2]);
    return m;
  }
  static __device__ __forceinline__ void emit(const Rule&, const T*, T, step_dones<T>, const T*, T, T x, T* out) {
    out[0] = x;
  }
  static __device__ __forceinline__ T seed(const Rule&, T) { return T{}; }
  static __device__ __forceinline__ void end(const Rule&, T end, T* next) {
    next[0] = end;
    next[1] = T{};
  }
};

}  // namespace MLKIT_NAMESPACE::rl::detail
