// Includes the file named by MLKIT_FOREACH once per instruction set, inside namespace mlkit::detail::<set> and with the
// compiler's target switched to that set. No include guard: a header defines MLKIT_FOREACH and includes this file.
//
// The bodies are templates. Code generated from a template keeps the target of the place where it is defined, also when
// it is instantiated later, and plain functors passed into it are compiled for that target as they are inlined.
//
// In a body, MLKIT_SET_BITS is the vector width in bits, and MLKIT_SET_{AVX2,AVX512,BF16,AMX,NEON} are 0 or 1.
// Bodies include nothing: what they need is included before, outside of the region.

#ifndef MLKIT_FOREACH
#error "define MLKIT_FOREACH as the file to include"
#endif

#define MLKIT_SET_AVX2 0
#define MLKIT_SET_AVX512 0
#define MLKIT_SET_BF16 0
#define MLKIT_SET_AMX 0
#if defined(__aarch64__)
#define MLKIT_SET_NEON 1
#else
#define MLKIT_SET_NEON 0
#endif
#define MLKIT_SET_BITS 128
namespace MLKIT_NAMESPACE::detail::baseline {
#include MLKIT_FOREACH
}
#undef MLKIT_SET_BITS
#undef MLKIT_SET_NEON
#define MLKIT_SET_NEON 0

#if MLKIT_X86

#undef MLKIT_SET_AVX2
#define MLKIT_SET_AVX2 1
#define MLKIT_SET_BITS 256
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif
namespace MLKIT_NAMESPACE::detail::avx2 {
#include MLKIT_FOREACH
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef MLKIT_SET_BITS

#undef MLKIT_SET_AVX512
#define MLKIT_SET_AVX512 1
#define MLKIT_SET_BITS 512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
namespace MLKIT_NAMESPACE::detail::avx512 {
#include MLKIT_FOREACH
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#undef MLKIT_SET_BF16
#define MLKIT_SET_BF16 1
#if defined(__clang__)
#pragma clang attribute push(                                                                        \
    __attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#endif
namespace MLKIT_NAMESPACE::detail::avx512_bf16 {
#include MLKIT_FOREACH
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#undef MLKIT_SET_AMX
#define MLKIT_SET_AMX 1
#if defined(__clang__)
#pragma clang attribute push(                                                                                          \
    __attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")
#endif
namespace MLKIT_NAMESPACE::detail::amx {
#include MLKIT_FOREACH
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef MLKIT_SET_BITS

#endif  // MLKIT_X86

#undef MLKIT_SET_AVX2
#undef MLKIT_SET_AVX512
#undef MLKIT_SET_BF16
#undef MLKIT_SET_AMX
#undef MLKIT_SET_NEON
#undef MLKIT_FOREACH
