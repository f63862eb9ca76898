// exp, exp2, log, erf, tanh, sigmoid, silu, gelu, gelu_tanh and derivatives for vec<T> of every instruction set.
//
// Each is a free function beside vec<T> in the set's namespace, so that an unqualified call finds it through its
// argument. Bounds for float and double, in units in the last place against the exact value, over all arguments
// (tests/simd/math.cpp measures them):
//
//   exp, exp2, log                 1
//   erf                            1.5
//   tanh, sigmoid                  2.75
//   silu, gelu_tanh                3.5    also far in the negative tail, down to subnormal results
//   gelu                           5      the same
//   derivatives of tanh, sigmoid   4.5
//   derivatives of silu, gelu      5      of the larger of their two terms, as they cross zero
//   derivative of gelu_tanh        6      the same
//
// NaN gives NaN; infinities give the limits; results that underflow are rounded into the subnormals. None of this holds
// under -ffast-math, or with subnormals flushed to zero.
#pragma once

#include "../core/functors.hpp"
#include "vec.hpp"

namespace MLKIT_NAMESPACE::detail {

// Coefficients are minimax fits (Remez) of mlkit's own, in ascending powers.
template <class T>
struct math_table;

template <>
struct math_table<float> {
  static constexpr int mantissa_bits = 23;
  static constexpr std::int32_t bias = 127;
  static constexpr float round_shift = 0x1.8p23f;        // x + round_shift - round_shift rounds x to an integer
  static constexpr float integer_shift = 0x1p23f;        // its bits | k are the number integer_shift + k
  static constexpr std::int32_t sqrt_half = 0x3f3504f3;  // bits of sqrt(1/2)
  static constexpr float min_normal = 0x1p-126f, infinity = __builtin_inff(), nan = __builtin_nanf("");
  static constexpr float subnormal_scale = 0x1p24f, subnormal_shift = 24;

  static constexpr float log2_e = 0x1.715476p+0f;
  static constexpr float ln2_high = 0x1.63p-1f, ln2_low = -0x1.bd0106p-13f;  // n * ln2_high is exact
  static constexpr float ln2 = 0x1.62e430p-1f;
  static constexpr float exp_min = -104.5f, exp_max = 89.0f;  // e^x is 0 and infinity there
  static constexpr float exp2_min = -151.0f, exp2_max = 128.0f;
  static constexpr float tanh_max = 10.0f, erf_max = 4.5f;                             // 1 from there on
  static constexpr float silu_max = 112.0f, gelu_max = 14.75f, gelu_tanh_max = 11.2f;  // the tail is 0 from there on

  // (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2
  static constexpr float exp[] = {0.5f, 0x1.5554aap-3f, 0x1.555534p-5f, 0x1.122bf8p-7f, 0x1.6ce752p-10f};
  // (log((1 + s) / (1 - s)) - 2 s) / s^3 in s^2, for s up to (sqrt 2 - 1) / (sqrt 2 + 1)
  static constexpr float log[] = {0x1.55557ap-1f, 0x1.995ec2p-2f, 0x1.31e3dcp-2f};
  // erf(x) / x - 1 in x^2, for |x| <= 1
  static constexpr float erf[] = {0x1.06eba8p-3f, -0x1.812720p-2f,  0x1.ce2678p-4f, -0x1.b78454p-6f,
                                  0x1.507342p-8f, -0x1.8a9052p-11f, 0x1.0638a4p-14f};
  // Phi(-a) e^(a^2 / 2) / q in q = tail_pole / (a + tail_pole), Phi the normal distribution, for 0 <= a <= gelu_max
  static constexpr float tail_pole = 3.0f;
  static constexpr float tail[] = {0x1.105234p-3f, 0x1.10e986p-3f,  0x1.d895f6p-4f, 0x1.ac3caep-4f, -0x1.1e1020p-8f,
                                   0x1.e82e42p-4f, -0x1.21598ep-3f, 0x1.95e7d0p-6f, 0x1.96e776p-6f, -0x1.30c082p-7f};

  // 2 sqrt(2 / pi) (a + 0.044715 a^3) = a (cubic1 + cubic3 a^2), in two parts each
  static constexpr float cubic1 = 0x1.988454p+0f, cubic1_low = -0x1.857936p-25f;
  static constexpr float cubic3 = 0x1.2444f2p-4f, cubic3_low = 0x1.49b16ap-29f;
  static constexpr float inv_sqrt_2pi = 0x1.988454p-2f, sqrt2 = 0x1.6a09e6p+0f;
};

template <>
struct math_table<double> {
  static constexpr int mantissa_bits = 52;
  static constexpr std::int64_t bias = 1023;
  static constexpr double round_shift = 0x1.8p52;
  static constexpr double integer_shift = 0x1p52;
  static constexpr std::int64_t sqrt_half = 0x3fe6a09e667f3bcd;
  static constexpr double min_normal = 0x1p-1022, infinity = __builtin_inf(), nan = __builtin_nan("");
  static constexpr double subnormal_scale = 0x1p54, subnormal_shift = 54;

  static constexpr double log2_e = 0x1.71547652b82fep+0;
  static constexpr double ln2_high = 0x1.62e42fefp-1, ln2_low = 0x1.473de6af278edp-34;
  static constexpr double ln2 = 0x1.62e42fefa39efp-1;
  static constexpr double exp_min = -746.0, exp_max = 710.0;
  static constexpr double exp2_min = -1076.0, exp2_max = 1024.0;
  static constexpr double tanh_max = 20.0, erf_max = 6.5;
  static constexpr double silu_max = 756.0, gelu_max = 39.0, gelu_tanh_max = 22.0;

  static constexpr double exp[] = {0.5,
                                   0x1.5555555555559p-3,
                                   0x1.5555555555558p-5,
                                   0x1.111111110f678p-7,
                                   0x1.6c16c16c14ee4p-10,
                                   0x1.a01a01b004dbap-13,
                                   0x1.a01a01adb9004p-16,
                                   0x1.71ddf7eee9756p-19,
                                   0x1.27e4cbe7080dep-22,
                                   0x1.af5f8dd32095fp-26,
                                   0x1.1f8b8f15d9d50p-29};
  static constexpr double log[] = {0x1.5555555555592p-1, 0x1.999999997fd9ep-2, 0x1.24924942043bbp-2,
                                   0x1.c71c51ef4cc73p-3, 0x1.746645fcf787bp-3, 0x1.39a0de3edae27p-3,
                                   0x1.2f0f5e7154282p-3};
  static constexpr double erf[] = {0x1.06eba8214db69p-3,   -0x1.812746b037999p-2,  0x1.ce2f21a03f30bp-4,
                                   -0x1.b82ce311837dbp-6,  0x1.565bcce78b34ep-8,   -0x1.c02dad285adfdp-11,
                                   0x1.f9a262f467497p-14,  -0x1.f4c3e16c21c26p-17, 0x1.b92f70d691e02p-20,
                                   -0x1.596dee7b8de4ap-23, 0x1.bbcfbfa9d9c93p-27,  -0x1.06e0d1830cd4dp-31,
                                   -0x1.b39a9f1a35820p-35};
  static constexpr double tail_pole = 4.0;
  static constexpr double tail[] = {
      0x1.9884533d66192p-4,  0x1.9884533307fbdp-4,  0x1.7efc0f6bdbff3p-4,  0x1.4beb665f8d9cdp-4,  0x1.041de81253813p-4,
      0x1.621ffeeda5753p-5,  0x1.8189770a4360dp-6,  0x1.a2098e7474d3fp-8,  0x1.a13ed9389a4fdp-11, -0x1.5a766369a871bp-6,
      0x1.36e8041aa6999p-5,  -0x1.958cab6a6742fp-4, 0x1.5df494e6fe780p-3,  -0x1.88f398f9fa352p-3, 0x1.826eea004ee79p-4,
      0x1.42d21f39e4a0ep-3,  -0x1.c4110bfbbce7fp-2, 0x1.1854b9cbda54fp-1,  -0x1.b2c7c627a4f9cp-2, 0x1.be234d3de5ad6p-3,
      -0x1.294c42add95ffp-4, 0x1.d622e88a17432p-7,  -0x1.50e43a1a79cf1p-10};

  static constexpr double cubic1 = 0x1.9884533d43651p+0, cubic1_low = -0x1.cbc0d30ebfd15p-54;
  static constexpr double cubic3 = 0x1.2444f2a4d8b4bp-4, cubic3_low = -0x1.6c843a29d1c70p-61;
  static constexpr double inv_sqrt_2pi = 0x1.9884533d43651p-2, sqrt2 = 0x1.6a09e667f3bcdp+0;
};

}  // namespace MLKIT_NAMESPACE::detail

#define MLKIT_FOREACH "math-inl.hpp"
#include "foreach_isa.hpp"
