// Numbers below the least normal one, which cost x86 a hundred times the time of others.
#pragma once

#include "isa.hpp"

#if MLKIT_X86
#include <xmmintrin.h>
#endif

namespace MLKIT_NAMESPACE::detail {

// While one lives, this thread's results that would be subnormal are 0 (f32: below 1.2e-38, f64: 2.2e-308). Where they
// cost nothing extra, as on AArch64, they stay.
class subnormals_flushed {
 public:
#if MLKIT_X86
  subnormals_flushed() noexcept : before_(_mm_getcsr()) { _mm_setcsr(before_ | flush_to_zero); }
  ~subnormals_flushed() { _mm_setcsr((_mm_getcsr() & ~flush_to_zero) | (before_ & flush_to_zero)); }
#else
  subnormals_flushed() noexcept {}
  ~subnormals_flushed() {}
#endif
  subnormals_flushed(const subnormals_flushed&) = delete;
  subnormals_flushed& operator=(const subnormals_flushed&) = delete;

#if MLKIT_X86
 private:
  static constexpr unsigned flush_to_zero = 0x8000;
  unsigned before_;
#endif
};

}  // namespace MLKIT_NAMESPACE::detail
