// Elementary functions and activations of one register. math.hpp states their bounds and holds the coefficients.

template <class T, std::size_t N>
MLKIT_ALWAYS_INLINE vec<T> horner(vec<T> x, const T (&coefficients)[N]) noexcept {
  vec<T> r(coefficients[N - 1]);
  MLKIT_UNROLL
  for (std::size_t i = N - 1; i > 0; --i) r = fma(r, x, vec<T>(coefficients[i - 1]));
  return r;
}

template <class T>
MLKIT_ALWAYS_INLINE vec<T> copysign(vec<T> magnitude, vec<T> sign) noexcept {
  const auto mask = vec<T>::sign_bit();
  return vec<T>::from_bits((magnitude.bits() & ~mask) | (sign.bits() & mask));
}

// The nearest integer, for |x| < 2^(mantissa bits - 1).
template <class T>
MLKIT_ALWAYS_INLINE vec<T> round_to_integer(vec<T> x) noexcept {
  return (x + math_table<T>::round_shift) - math_table<T>::round_shift;
}

// A product or sum as high + low, exactly.
template <class T>
struct two_parts {
  vec<T> high, low;
};

template <class T>
MLKIT_ALWAYS_INLINE two_parts<T> exact_product(vec<T> a, vec<T> b) noexcept {
  const vec<T> high = a * b;
#if MLKIT_SET_AVX2 || MLKIT_SET_AVX512 || MLKIT_SET_NEON
  return {high, fma(a, b, -high)};
#else  // Dekker: the upper halves of the mantissas multiply exactly
  const auto upper = [](vec<T> x) {
    return vec<T>::from_bits(x.bits() & -(typename vec<T>::int_type{1} << (sizeof(T) == 4 ? 12 : 27)));
  };
  const vec<T> ah = upper(a), bh = upper(b), al = a - ah, bl = b - bh;
  return {high, ((ah * bh - high) + ah * bl + al * bh) + al * bl};
#endif
}

template <class T>
MLKIT_ALWAYS_INLINE two_parts<T> exact_sum(vec<T> a, vec<T> b) noexcept {
  const vec<T> high = a + b, b_part = high - a;
  return {high, (a - (high - b_part)) + (b - b_part)};
}

// 2^n for an integer n in the normal range.
template <class T>
MLKIT_ALWAYS_INLINE vec<T> power_of_two(vec<T> n) noexcept {
  using table = math_table<T>;
  const vec<T> shifted = n + (table::round_shift + static_cast<T>(table::bias));  // bias + n in the lowest bits
  return vec<T>::from_bits(shifted.bits() << table::mantissa_bits);
}

// y 2^n for an integer n, also where that is subnormal, zero or infinite: |n| <= 4 bias / 3 or so, y near 1.
template <class T>
MLKIT_ALWAYS_INLINE vec<T> scale_by_power(vec<T> y, vec<T> n) noexcept {
#if MLKIT_SET_AVX512
  if constexpr (sizeof(T) == 4)
    return typename vec<T>::native(_mm512_scalef_ps(y.v, n.v));
  else
    return typename vec<T>::native(_mm512_scalef_pd(y.v, n.v));
#else
  const vec<T> half = round_to_integer(n * T(0.5));
  return y * power_of_two(half) * power_of_two(n - half);
#endif
}

// e^(x + low) = e^r 2^n, |r| <= ln(2) / 2, |low| tiny; curve = (e^r - 1 - r) / r^2.
template <class T>
struct exp_parts {
  vec<T> r, curve, n;

  MLKIT_ALWAYS_INLINE vec<T> expm1() const noexcept { return fma(r * r, curve, r); }
  // e^r, without the rounding of r + r^2 curve.
  MLKIT_ALWAYS_INLINE vec<T> mantissa() const noexcept {
    const vec<T> s = T(1) + r;
    return s + fma(r * r, curve, r - (s - T(1)));
  }
};

template <class T>
MLKIT_ALWAYS_INLINE exp_parts<T> split_exp(vec<T> x, vec<T> low = vec<T>::zero()) noexcept {
  using table = math_table<T>;
  const vec<T> n = round_to_integer(x * table::log2_e);
  const vec<T> r = fma(n, vec<T>(-table::ln2_low), fma(n, vec<T>(-table::ln2_high), x)) + low;
  return {r, horner(r, table::exp), n};
}

template <class T>
MLKIT_ALWAYS_INLINE exp_parts<T> split_exp(two_parts<T> x) noexcept {
  return split_exp(x.high, x.low);
}

// Bounds that keep NaN, as min and max return their second argument then.
template <class T>
MLKIT_ALWAYS_INLINE vec<T> at_most(vec<T> x, T bound) noexcept {
  return min(vec<T>(bound), x);
}
template <class T>
MLKIT_ALWAYS_INLINE vec<T> at_least(vec<T> x, T bound) noexcept {
  return max(vec<T>(bound), x);
}

template <class T>
MLKIT_ALWAYS_INLINE vec<T> exp(vec<T> x) noexcept {
  using table = math_table<T>;
  const exp_parts<T> e = split_exp(at_most(at_least(x, table::exp_min), table::exp_max));
  return scale_by_power(e.mantissa(), e.n);
}

template <class T>
MLKIT_ALWAYS_INLINE vec<T> exp2(vec<T> x) noexcept {
  using table = math_table<T>;
  x = at_most(at_least(x, table::exp2_min), table::exp2_max);
  const vec<T> n = round_to_integer(x);
  const vec<T> f = x - n, r = f * table::ln2;
  const vec<T> s = fma(f, vec<T>(table::ln2), vec<T>(T(1)));
  return scale_by_power(s + fma(r * r, horner(r, table::exp), fma(f, vec<T>(table::ln2), T(1) - s)), n);
}

// x = 2^e m with m in [sqrt(1/2), sqrt(2)); log(m) = 2 atanh(s), s = f / (2 + f), f = m - 1.
template <class T>
MLKIT_ALWAYS_INLINE vec<T> log(vec<T> x) noexcept {
  using table = math_table<T>;
  using native_int = typename vec<T>::native_int;
  const native_int subnormal = x < vec<T>(table::min_normal);
  const vec<T> scaled = vec<T>::select(subnormal, x * table::subnormal_scale, x);
  const native_int above = scaled.bits() - table::sqrt_half;
  const typename vec<T>::int_type mask = (typename vec<T>::int_type{1} << table::mantissa_bits) - 1;
  const vec<T> m = vec<T>::from_bits((above & mask) + table::sqrt_half);
  // The exponent in the lowest bits of integer_shift, made positive by the bias; only valid for x > 0.
  // Unsigned, as the sum is above the largest signed number where x is infinite or NaN.
  using bits = typename vec<T>::native_uint;
  using one = std::make_unsigned_t<typename vec<T>::int_type>;
  const bits biased = ((bits)above + static_cast<one>(table::bias << table::mantissa_bits)) >> table::mantissa_bits;
  const vec<T> offset = vec<T>::select(subnormal, vec<T>(table::integer_shift + table::bias + table::subnormal_shift),
                                       vec<T>(table::integer_shift + table::bias));
  const vec<T> e = vec<T>::from_bits((native_int)biased | vec<T>(table::integer_shift).bits()) - offset;

  const vec<T> f = m - T(1);
  const vec<T> s = f / (f + T(2)), z = s * s;
  const vec<T> half_square = f * f * T(0.5);
  const vec<T> r = fma(s, fma(z, horner(z, table::log), half_square), e * table::ln2_low);
  vec<T> y = fma(e, vec<T>(table::ln2_high), f - (half_square - r));
  y = vec<T>::select(x < vec<T>(table::infinity), y, x);
  y = vec<T>::select(x < vec<T>::zero(), vec<T>(table::nan), y);
  return vec<T>::select(x == vec<T>::zero(), vec<T>(-table::infinity), y);
}

// (e^2a - 1) / (e^2a + 1), a = |x|.
template <class T>
MLKIT_ALWAYS_INLINE vec<T> tanh(vec<T> x) noexcept {
  const vec<T> a = at_most(abs(x), math_table<T>::tanh_max);
  const exp_parts<T> e = split_exp(a + a);
  const vec<T> power = power_of_two(e.n);
  const vec<T> d = fma(e.expm1(), power, power - T(1));
  return copysign(d / (d + T(2)), x);
}

template <class T>
MLKIT_ALWAYS_INLINE vec<T> sigmoid(vec<T> x) noexcept {
  const vec<T> e = exp(-abs(x));
  return vec<T>::select(x < vec<T>::zero(), e, vec<T>(T(1))) / (T(1) + e);
}

// g(a) = Phi(-a) e^(a^2 / 2) for a >= 0, Phi the normal distribution. The rounding of q = k / (a + k) moves a by
// `shift`, which g' = a g - 1 / sqrt(2 pi) puts right.
template <class T>
MLKIT_ALWAYS_INLINE vec<T> scaled_normal_tail(vec<T> a) noexcept {
  using table = math_table<T>;
  const vec<T> k(table::tail_pole), s = a + k, q = k / s;
  const vec<T> g = q * horner(q, table::tail);
  const auto [product, product_low] = exact_product(q, s);
  const vec<T> rest = (product - k) + fma(q, a - (s - k), product_low);  // q (a + k) - k
  const vec<T> shift = rest * (s * (T(1) / table::tail_pole));
  return fma(shift, fma(a, g, vec<T>(-table::inv_sqrt_2pi)), g);
}

template <class T>
MLKIT_ALWAYS_INLINE vec<T> erf(vec<T> x) noexcept {
  using table = math_table<T>;
  const vec<T> a = at_most(abs(x), table::erf_max), square = a * a;
  const vec<T> small = fma(a, horner(square, table::erf), a);
  const vec<T> tail = exp(-square) * scaled_normal_tail(a * table::sqrt2);
  return copysign(vec<T>::select(a < vec<T>(T(1)), small, T(1) - (tail + tail)), x);
}

// Gated activations are x S(x) with S(x) + S(-x) = 1. With the gate S(-a) = value 2^n at a = |x|, they are
// max(x, 0) - a S(-a), which keeps its relative accuracy in the tail; slope 2^n is the derivative of a S(-a).
template <class T>
struct gate {
  vec<T> value, slope, n;
};

template <class T>
MLKIT_ALWAYS_INLINE vec<T> gated(vec<T> x, vec<T> a, gate<T> g) noexcept {
  const vec<T> tail = scale_by_power(a * g.value, g.n);
  return vec<T>::select(x > vec<T>::zero(), x - tail, copysign(tail, x));
}

template <class T>
MLKIT_ALWAYS_INLINE vec<T> gated_derivative(vec<T> x, gate<T> g) noexcept {
  const vec<T> tail = scale_by_power(g.slope, g.n);
  return vec<T>::select(x > vec<T>::zero(), T(1) - tail, tail);
}

// S = sigmoid(v), v a function of a with derivative dv.
template <class T, class V>
MLKIT_ALWAYS_INLINE gate<T> logistic_gate(vec<T> a, V minus_v, vec<T> dv) noexcept {
  const exp_parts<T> e = split_exp(minus_v);
  const vec<T> p = e.mantissa();
  const vec<T> d = fma(p, power_of_two(at_least(e.n, T(1 - math_table<T>::bias))), vec<T>(T(1)));
  return {p / d, p * (d - a * dv) / (d * d), e.n};
}

template <class T>
MLKIT_ALWAYS_INLINE gate<T> silu_gate(vec<T> a) noexcept {
  return logistic_gate(a, -a, vec<T>(T(1)));
}

template <class T>
MLKIT_ALWAYS_INLINE gate<T> gelu_gate(vec<T> a) noexcept {
  const auto [high, low] = exact_product(a, a * T(-0.5));
  const exp_parts<T> e = split_exp(high, low);
  const vec<T> p = e.mantissa(), g = scaled_normal_tail(a);
  return {p * g, p * (g - a * math_table<T>::inv_sqrt_2pi), e.n};
}

template <class T>
MLKIT_ALWAYS_INLINE gate<T> gelu_tanh_gate(vec<T> a) noexcept {
  using table = math_table<T>;
  const auto [square, square_low] = exact_product(a, a);
  const auto [cubic, cubic_low] = exact_product(square, vec<T>(table::cubic3));
  const auto [w, w_low] = exact_sum(cubic, vec<T>(table::cubic1));
  const vec<T> rest = fma(square_low, vec<T>(table::cubic3), fma(square, vec<T>(table::cubic3_low), cubic_low)) +
                      (w_low + table::cubic1_low);
  const auto [v, v_low] = exact_product(a, w);
  const two_parts<T> minus_v{-v, -fma(a, rest, v_low)};
  return logistic_gate(a, minus_v, fma(square, vec<T>(T(3) * table::cubic3), vec<T>(table::cubic1)));
}

template <class T>
MLKIT_ALWAYS_INLINE vec<T> silu(vec<T> x) noexcept {
  const vec<T> a = at_most(abs(x), math_table<T>::silu_max);
  return gated(x, a, silu_gate(a));
}
template <class T>
MLKIT_ALWAYS_INLINE vec<T> gelu(vec<T> x) noexcept {
  const vec<T> a = at_most(abs(x), math_table<T>::gelu_max);
  return gated(x, a, gelu_gate(a));
}
template <class T>
MLKIT_ALWAYS_INLINE vec<T> gelu_tanh(vec<T> x) noexcept {
  const vec<T> a = at_most(abs(x), math_table<T>::gelu_tanh_max);
  return gated(x, a, gelu_tanh_gate(a));
}
template <class T>
MLKIT_ALWAYS_INLINE vec<T> relu(vec<T> x) noexcept {
  return max(vec<T>::zero(), x);
}

// 4 e^-2a / (1 + e^-2a)^2
template <class T>
MLKIT_ALWAYS_INLINE vec<T> tanh_derivative(vec<T> x) noexcept {
  const vec<T> a = at_most(abs(x), T(0.5) * math_table<T>::silu_max);
  const exp_parts<T> e = split_exp(-(a + a));
  const vec<T> p = e.mantissa();
  const vec<T> d = fma(p, power_of_two(at_least(e.n, T(1 - math_table<T>::bias))), vec<T>(T(1)));
  return scale_by_power(p / (d * d), e.n + T(2));
}
template <class T>
MLKIT_ALWAYS_INLINE vec<T> sigmoid_derivative(vec<T> x) noexcept {
  const vec<T> e = exp(-abs(x)), d = T(1) + e;
  return e / (d * d);
}
template <class T>
MLKIT_ALWAYS_INLINE vec<T> silu_derivative(vec<T> x) noexcept {
  return gated_derivative(x, silu_gate(at_most(abs(x), math_table<T>::silu_max)));
}
template <class T>
MLKIT_ALWAYS_INLINE vec<T> gelu_derivative(vec<T> x) noexcept {
  return gated_derivative(x, gelu_gate(at_most(abs(x), math_table<T>::gelu_max)));
}
template <class T>
MLKIT_ALWAYS_INLINE vec<T> gelu_tanh_derivative(vec<T> x) noexcept {
  return gated_derivative(x, gelu_tanh_gate(at_most(abs(x), math_table<T>::gelu_tanh_max)));
}
// 1 above zero, else 0; NaN gives 1, as PyTorch has it.
template <class T>
MLKIT_ALWAYS_INLINE vec<T> relu_derivative(vec<T> x) noexcept {
  return vec<T>::select(x <= vec<T>::zero(), vec<T>::zero(), vec<T>(T(1)));
}

// evaluate(f, x) and evaluate_derivative(f, x): any functor on a register (core/functors.hpp says why not f(x)).
// Those of the user's own are scalar; the loop over lanes is for the compiler to vectorise.
template <class F, class T>
MLKIT_ALWAYS_INLINE vec<T> evaluate(const F& f, vec<T> x) noexcept {
  T lanes[vec<T>::width];
  x.store(lanes);
  MLKIT_SIMD
  for (int i = 0; i < vec<T>::width; ++i) lanes[i] = f(lanes[i]);
  return vec<T>::load(lanes);
}
template <class F, class T>
MLKIT_ALWAYS_INLINE vec<T> evaluate_derivative(const F& f, vec<T> x) noexcept {
  T lanes[vec<T>::width];
  x.store(lanes);
  MLKIT_SIMD
  for (int i = 0; i < vec<T>::width; ++i) lanes[i] = f.derivative(lanes[i]);
  return vec<T>::load(lanes);
}

#define MLKIT_FUNCTOR(name)                                                                 \
  template <class T>                                                                        \
  MLKIT_ALWAYS_INLINE vec<T> evaluate(const ::mlkit::name&, vec<T> x) noexcept {            \
    return name(x);                                                                         \
  }                                                                                         \
  template <class T>                                                                        \
  MLKIT_ALWAYS_INLINE vec<T> evaluate_derivative(const ::mlkit::name&, vec<T> x) noexcept { \
    return name##_derivative(x);                                                            \
  }
MLKIT_FUNCTOR(relu)
MLKIT_FUNCTOR(gelu)
MLKIT_FUNCTOR(gelu_tanh)
MLKIT_FUNCTOR(silu)
MLKIT_FUNCTOR(tanh)
MLKIT_FUNCTOR(sigmoid)
#undef MLKIT_FUNCTOR

template <class T>
MLKIT_ALWAYS_INLINE vec<T> evaluate(const identity&, vec<T> x) noexcept {
  return x;
}
template <class T>
MLKIT_ALWAYS_INLINE vec<T> evaluate_derivative(const identity&, vec<T>) noexcept {
  return vec<T>(T(1));
}
template <class T>
MLKIT_ALWAYS_INLINE vec<T> evaluate(const scale& f, vec<T> x) noexcept {
  return x * T(f.value);
}
template <class T>
MLKIT_ALWAYS_INLINE vec<T> evaluate_derivative(const scale& f, vec<T>) noexcept {
  return vec<T>(T(f.value));
}
