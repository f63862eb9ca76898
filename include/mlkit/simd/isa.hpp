// Which instruction sets this build knows, which this machine has, and which one kernels use.
#pragma once

#include <atomic>
#include <cstdlib>
#include <string_view>

#include "../core/config.hpp"
#include "../core/error.hpp"

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
#define MLKIT_X86 1
#else
#define MLKIT_X86 0
#endif

#if MLKIT_X86 && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace MLKIT_NAMESPACE {

/// Instruction sets, each including those before it. `baseline` is what every machine of the architecture has: SSE2 on
/// x86-64, NEON on AArch64. `amx` has matrices of bf16 in registers.
enum class isa : int { baseline, avx2, avx512, avx512_bf16, amx };
inline constexpr int isa_count = 5;

constexpr const char* isa_name(isa set) noexcept {
  constexpr const char* names[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};
  return names[static_cast<int>(set)];
}

namespace detail {

// Whether this machine has matrix registers of bf16, and the operating system lets this process use them. Linux is
// asked once: from then on it keeps room for them in every thread.
inline bool amx_available() noexcept {
#if MLKIT_X86 && defined(__linux__)
  static const bool available = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned bf16_matrices = 1u << 22, matrices = 1u << 24;
    if ((d & bf16_matrices) == 0 || (d & matrices) == 0) return false;
    constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return available;
#else
  return false;
#endif
}

}  // namespace detail

/// Whether this build has the set and this machine (and operating system) can run it.
inline bool isa_available(isa set) noexcept {
#if MLKIT_X86
  if (MLKIT_TWO_SETS && (set == isa::avx2 || set == isa::avx512 || set == isa::amx)) return false;
  const auto has_avx2 = [] {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2");  // every such machine also has f16c
  };
  const auto has_avx512 = [&] {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  };
  switch (set) {
    case isa::baseline: return true;
    case isa::avx2: return has_avx2();
    case isa::avx512: return has_avx512();
    case isa::avx512_bf16: return has_avx512() && __builtin_cpu_supports("avx512bf16");
    case isa::amx: return isa_available(isa::avx512_bf16) && detail::amx_available();
  }
  return false;
#else
  return set == isa::baseline;
#endif
}

namespace detail {

// Whether multiplying pairs of bf16 beats widening them to f32. On AMD it doubles the rate of f32; Intel's cores issue
// one such instruction every other cycle, which is half the rate of f32.
inline bool native_bf16_pays() noexcept {
#if MLKIT_X86
  return MLKIT_TWO_SETS || __builtin_cpu_is("amd");
#else
  return false;
#endif
}

inline isa best_isa() noexcept {
  for (int i = isa_count - 1; i > 0; --i) {
    const isa set = static_cast<isa>(i);
    if (isa_available(set) && (set != isa::avx512_bf16 || native_bf16_pays())) return set;
  }
  return isa::baseline;
}

// MLKIT_FORCE_ISA, or the best there is.
inline isa initial_isa() {
  const char* forced = std::getenv("MLKIT_FORCE_ISA");
  if (!forced || !*forced) return best_isa();
  for (int i = 0; i < isa_count; ++i) {
    const isa set = static_cast<isa>(i);
    if (std::string_view(forced) != isa_name(set)) continue;
    if (!isa_available(set)) fail_value("MLKIT_FORCE_ISA = ", forced, ", which this machine does not have");
    return set;
  }
  fail_value("MLKIT_FORCE_ISA = ", forced, " is none of baseline, avx2, avx512, avx512_bf16, amx");
}

inline std::atomic<int>& chosen_isa() {
  static std::atomic<int> chosen{static_cast<int>(initial_isa())};
  return chosen;
}

}  // namespace detail

/// The set that kernels use: the fastest that this machine has, unless MLKIT_FORCE_ISA or set_isa says otherwise.
/// Throws value_error if MLKIT_FORCE_ISA names no set, or one that this machine lacks.
inline isa active_isa() { return static_cast<isa>(detail::chosen_isa().load(std::memory_order_relaxed)); }

/// Makes every later call in the process use `set`. For tests and benchmarks. Throws value_error if it is not
/// available.
inline void set_isa(isa set) {
  if (!isa_available(set)) detail::fail_value("set_isa: this machine does not have ", isa_name(set));
  detail::chosen_isa().store(static_cast<int>(set), std::memory_order_relaxed);
}

}  // namespace MLKIT_NAMESPACE

// MLKIT_SELECT(f<args>) is a pointer to mlkit::detail::<active set>::f<args>. A macro, since namespaces are no template
// arguments. Kernels are reached through such a pointer, taken outside the parallel region. What multiplies no matrices
// takes avx512's functions on amx; MLKIT_SELECT_PRODUCT is for what does, in bf16.
#if MLKIT_X86 && MLKIT_TWO_SETS
#define MLKIT_SELECT(...)                                                                    \
  (::mlkit::active_isa() == ::mlkit::isa::baseline ? &::mlkit::detail::baseline::__VA_ARGS__ \
                                                   : &::mlkit::detail::avx512_bf16::__VA_ARGS__)
#define MLKIT_SELECT_PRODUCT(...) MLKIT_SELECT(__VA_ARGS__)
#elif MLKIT_X86
#define MLKIT_SELECT_PRODUCT(...) \
  (::mlkit::active_isa() == ::mlkit::isa::amx ? &::mlkit::detail::amx::__VA_ARGS__ : MLKIT_SELECT(__VA_ARGS__))
#define MLKIT_SELECT(...)                                                                \
  ([]() -> decltype(&::mlkit::detail::baseline::__VA_ARGS__) {                           \
    switch (::mlkit::active_isa()) {                                                     \
      case ::mlkit::isa::avx512_bf16: return &::mlkit::detail::avx512_bf16::__VA_ARGS__; \
      case ::mlkit::isa::amx:                                                            \
      case ::mlkit::isa::avx512: return &::mlkit::detail::avx512::__VA_ARGS__;           \
      case ::mlkit::isa::avx2: return &::mlkit::detail::avx2::__VA_ARGS__;               \
      default: return &::mlkit::detail::baseline::__VA_ARGS__;                           \
    }                                                                                    \
  }())
#else
#define MLKIT_SELECT(...) (&::mlkit::detail::baseline::__VA_ARGS__)
#define MLKIT_SELECT_PRODUCT(...) MLKIT_SELECT(__VA_ARGS__)
#endif

// MLKIT_SELECT for code that gains nothing from bf16 instructions: on avx512_bf16 it takes avx512's, so that one set
// less is compiled.
#if MLKIT_X86 && !MLKIT_TWO_SETS
#define MLKIT_SELECT_WITHOUT_BF16(...)                                         \
  ([]() -> decltype(&::mlkit::detail::baseline::__VA_ARGS__) {                 \
    switch (::mlkit::active_isa()) {                                           \
      case ::mlkit::isa::amx:                                                  \
      case ::mlkit::isa::avx512_bf16:                                          \
      case ::mlkit::isa::avx512: return &::mlkit::detail::avx512::__VA_ARGS__; \
      case ::mlkit::isa::avx2: return &::mlkit::detail::avx2::__VA_ARGS__;     \
      default: return &::mlkit::detail::baseline::__VA_ARGS__;                 \
    }                                                                          \
  }())
#else
#define MLKIT_SELECT_WITHOUT_BF16(...) MLKIT_SELECT(__VA_ARGS__)
#endif
