// ptx: the instructions that CUDA C++ has no name for, one function each; and a kernel's dynamic shared memory.
//
// The tests' emulation has functions of the same names that do what the PTX manual says of the instructions.
#pragma once

#include "../config.hpp"

#if defined(MLKIT_CUDA_EMULATION)

#include <mlkit_cuda_emulation/ptx.hpp>

#else

/// Declares `name`, a T* at the start of a block's dynamic shared memory, aligned to 128 bytes.
#define MLKIT_SHARED_MEMORY(T, name)                                    \
  extern __shared__ __align__(128) unsigned char mlkit_shared_memory[]; \
  T* const name = reinterpret_cast<T*>(mlkit_shared_memory)

namespace MLKIT_NAMESPACE::detail::ptx {

/// Where a pointer to shared memory points, as instructions want it.
__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// ldmatrix: 8 x 8 matrices of 16-bit elements from shared memory, spread over a warp. Thread 8 i + j gives the address
// of row j of matrix i (16 bytes, aligned to 16; the threads past the last matrix give any valid one) and gets, of each
// matrix i, in r[i] the elements 2 (lane % 4) and one more of row lane / 4: what an mma wants. `_trans` hands out each
// matrix transposed.

__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(std::uint32_t (&r)[2], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared_row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(std::uint32_t (&r)[2], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared_row))
               : "memory");
}

// mma: d += a b, with d [16, 8] in f32, by the threads of a warp. With g = lane / 4 and t = lane % 4, a thread holds
// d[g][2t], d[g][2t + 1], d[g + 8][2t], d[g + 8][2t + 1]. A pair of 16-bit elements has the first in the low half.

/// a [16, 16] row by row: pairs a[g][2t], a[g + 8][2t], a[g][2t + 8], a[g + 8][2t + 8]; b [16, 8]: pairs along its
/// rows, b[2t][g], b[2t + 8][g].
__device__ __forceinline__ void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/// The same of f16.
__device__ __forceinline__ void mma_f16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/// a [16, 8] of tf32: a[g][t], a[g + 8][t], a[g][t + 4], a[g + 8][t + 4]; b [8, 8]: b[t][g], b[t + 4][g]. Of each f32
/// the upper 19 bits count; to_tf32 rounds to them.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/// The nearest tf32, ties away from zero, in the upper 19 bits.
__device__ __forceinline__ std::uint32_t to_tf32(float x) {
  std::uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}

/// low and high rounded to nearest even, the first in the low half.
__device__ __forceinline__ std::uint32_t pack_bf16(float low, float high) {
  std::uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ std::uint32_t pack_f16(float low, float high) {
  std::uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
/// The f16 in the lower 16 bits; those above are not looked at.
__device__ __forceinline__ float widen_f16(std::uint32_t bits) {
  float x;
  asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(x) : "r"(bits));
  return x;
}

/// Four bytes of the eight of low and high: byte i of the result is byte (selector >> 4 i) & 7.
__device__ __forceinline__ std::uint32_t permute(std::uint32_t low, std::uint32_t high, std::uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// Copies from global to shared memory that the thread does not wait for. Both addresses are multiples of 16.

/// 16 bytes; zeros where not valid, and then nothing of `global` is read.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
/// Ends a group of copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most N groups of this thread's are under way. Other threads see what came after a barrier.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/// __syncthreads of the `threads` threads (a multiple of 32) that name barrier `id`, 1 to 15.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// 2^x, within 2 units in the last place.
__device__ __forceinline__ float exp2(float x) {
  float r;
  asm("ex2.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

/// Four words that this block reads once: they do not displace others from the level-1 cache. Memory that no thread
/// writes while the kernel runs.
__device__ __forceinline__ uint4 load_streaming(const uint4* p) {
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p));
  return r;
}

// Kernels that were launched to start early (cudaLaunchAttributeProgrammaticStreamSerialization, sm_90): the one before
// lets the next start, and the next waits for all that the one before has written. Elsewhere nothing starts early.

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace MLKIT_NAMESPACE::detail::ptx

#endif
