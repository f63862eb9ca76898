// Elementwise functions as types: relu, gelu, gelu_tanh, silu, tanh, sigmoid, identity, scale.
//
// f(x) is the value and f.derivative(x) is df/dx, for x a float or a double, on the host and in CUDA device code.
//
// Kernels take a functor as a template argument and call evaluate(f, x) and evaluate_derivative(f, x), with x a float,
// a double or a SIMD register vec<T> (there found by argument-dependent lookup, simd/math-inl.hpp). For registers the
// functors below have an overload each that computes with vectors (their has_register_form says so); a functor of the
// user's own, such as a lambda on float, is applied lane by lane, inlined and compiled for the instruction set, so that
// the compiler can vectorise it. It cannot be called with a register itself: a function written outside the region of a
// set must not take or return its registers.
#pragma once

#include <cmath>
#include <concepts>
#include <type_traits>

#include "config.hpp"

namespace MLKIT_NAMESPACE {
namespace detail::scalar {

// Host code computes float in double, which is as good as exact; device code computes in the type itself.
#if defined(__CUDA_ARCH__)
template <std::floating_point T>
using wide_t = T;
#else
template <std::floating_point T>
using wide_t = double;
#endif

// a S(-a) for S = sigmoid(v), a >= 0, v >= 0, and its derivative; dv is the derivative of v.
template <class W>
MLKIT_HOST_DEVICE inline W logistic(W v) noexcept {
  const W e = std::exp(-v);
  return e / (1 + e);
}
template <class W>
MLKIT_HOST_DEVICE inline W normal_tail(W a) noexcept {  // the normal distribution at -a
  return W(0.5) * std::erfc(a * W(0.70710678118654752440));
}
template <class W>
MLKIT_HOST_DEVICE inline W cubic(W a) noexcept {  // 2 sqrt(2 / pi) (a + 0.044715 a^3)
  return a * (W(1.59576912160573071176) + W(0.07135481627260024877) * a * a);
}

template <std::floating_point T>
MLKIT_HOST_DEVICE inline T sigmoid(T x) noexcept {
  using W = wide_t<T>;
  const W tail = logistic(std::fabs(W(x)));
  return static_cast<T>(x > 0 ? 1 - tail : tail);
}
template <std::floating_point T>
MLKIT_HOST_DEVICE inline T sigmoid_derivative(T x) noexcept {
  using W = wide_t<T>;
  const W e = std::exp(-std::fabs(W(x)));
  return static_cast<T>(e / ((1 + e) * (1 + e)));
}
template <std::floating_point T>
MLKIT_HOST_DEVICE inline T tanh(T x) noexcept {
  return std::tanh(x);
}
template <std::floating_point T>
MLKIT_HOST_DEVICE inline T tanh_derivative(T x) noexcept {
  using W = wide_t<T>;
  const W e = std::exp(-2 * std::fabs(W(x)));
  return static_cast<T>(4 * e / ((1 + e) * (1 + e)));
}
template <std::floating_point T>
MLKIT_HOST_DEVICE inline T relu(T x) noexcept {
  return x < 0 ? T(0) : x;
}
template <std::floating_point T>
MLKIT_HOST_DEVICE inline T relu_derivative(T x) noexcept {
  return x <= 0 ? T(0) : T(1);
}

// x S(x) with S(x) + S(-x) = 1 is max(x, 0) - |x| S(-|x|); infinities take the limits.
template <std::floating_point T, class W>
MLKIT_HOST_DEVICE inline T gated(T x, W gate) noexcept {
  const W tail = gate == 0 ? W(0) : std::fabs(W(x)) * gate;
  return static_cast<T>(x > 0 ? W(x) - tail : std::copysign(tail, W(x)));
}
template <std::floating_point T>
MLKIT_HOST_DEVICE inline T silu(T x) noexcept {
  return gated(x, logistic(std::fabs(wide_t<T>(x))));
}
template <std::floating_point T>
MLKIT_HOST_DEVICE inline T gelu(T x) noexcept {
  return gated(x, normal_tail(std::fabs(wide_t<T>(x))));
}
template <std::floating_point T>
MLKIT_HOST_DEVICE inline T gelu_tanh(T x) noexcept {
  return gated(x, logistic(cubic(std::fabs(wide_t<T>(x)))));
}

template <std::floating_point T, class W>
MLKIT_HOST_DEVICE inline T gated_derivative(T x, W gate, W slope) noexcept {
  const W tail = gate == 0 ? W(0) : gate + std::fabs(W(x)) * slope;
  return static_cast<T>(x > 0 ? 1 - tail : tail);
}
template <std::floating_point T>
MLKIT_HOST_DEVICE inline T silu_derivative(T x) noexcept {
  using W = wide_t<T>;
  const W s = logistic(std::fabs(W(x)));
  return gated_derivative(x, s, -s * (1 - s));
}
template <std::floating_point T>
MLKIT_HOST_DEVICE inline T gelu_derivative(T x) noexcept {
  using W = wide_t<T>;
  const W a = std::fabs(W(x));
  return gated_derivative(x, normal_tail(a), W(-0.39894228040143267794) * std::exp(W(-0.5) * a * a));
}
template <std::floating_point T>
MLKIT_HOST_DEVICE inline T gelu_tanh_derivative(T x) noexcept {
  using W = wide_t<T>;
  const W a = std::fabs(W(x)), s = logistic(cubic(a));
  const W slope = W(1.59576912160573071176) + 3 * W(0.07135481627260024877) * a * a;
  return gated_derivative(x, s, -s * (1 - s) * slope);
}

}  // namespace detail::scalar

/// x, unchanged.
struct identity {
  using has_register_form = void;
  template <std::floating_point T>
  MLKIT_HOST_DEVICE constexpr T operator()(T x) const noexcept {
    return x;
  }
  template <std::floating_point T>
  MLKIT_HOST_DEVICE constexpr T derivative(T) const noexcept {
    return 1;
  }
};

/// value * x.
struct scale {
  using has_register_form = void;
  float value = 1.0f;

  template <std::floating_point T>
  MLKIT_HOST_DEVICE constexpr T operator()(T x) const noexcept {
    return x * value;
  }
  template <std::floating_point T>
  MLKIT_HOST_DEVICE constexpr T derivative(T) const noexcept {
    return value;
  }
};

// A functor whose value and derivative are the functions `name` and `name`_derivative above.
#define MLKIT_FUNCTOR(name)                              \
  struct name {                                          \
    using has_register_form = void;                      \
    template <std::floating_point T>                     \
    MLKIT_HOST_DEVICE T operator()(T x) const noexcept { \
      return detail::scalar::name(x);                    \
    }                                                    \
    template <std::floating_point T>                     \
    MLKIT_HOST_DEVICE T derivative(T x) const noexcept { \
      return detail::scalar::name##_derivative(x);       \
    }                                                    \
  };

/// max(x, 0). The derivative at 0 is 0. (NaN stays NaN.)
MLKIT_FUNCTOR(relu)
/// x Phi(x) = x (1 + erf(x / sqrt 2)) / 2, torch's gelu(approximate="none"). Hendrycks and Gimpel, arXiv 1606.08415.
MLKIT_FUNCTOR(gelu)
/// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, torch's gelu(approximate="tanh").
MLKIT_FUNCTOR(gelu_tanh)
/// x sigmoid(x), also called swish. Elfwing, Uchibe and Doya, arXiv 1702.03118.
MLKIT_FUNCTOR(silu)
/// The hyperbolic tangent.
MLKIT_FUNCTOR(tanh)
/// 1 / (1 + e^-x).
MLKIT_FUNCTOR(sigmoid)

#undef MLKIT_FUNCTOR

namespace detail {

template <class F, std::floating_point T>
MLKIT_HOST_DEVICE constexpr T evaluate(const F& f, T x) {
  return f(x);
}
template <class F, std::floating_point T>
MLKIT_HOST_DEVICE constexpr T evaluate_derivative(const F& f, T x) {
  return f.derivative(x);
}

}  // namespace detail
}  // namespace MLKIT_NAMESPACE
