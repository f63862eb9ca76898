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

// Hopper: barriers in shared memory, copies of tiles by the tensor memory accelerator, and products by warpgroups,
// which need code for sm_90a.

/// A barrier of `arrivals` arrivals in each of its phases, made by one thread; fence_barriers, then __syncthreads.
__device__ __forceinline__ void barrier_init(std::uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(std::uint64_t* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
/// Arrives, and lets the phase wait for `bytes` more of copies.
__device__ __forceinline__ void barrier_expect(std::uint64_t* barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
/// Waits until the phase of that parity, 0 for the first, is over.
__device__ __forceinline__ void barrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
  std::uint32_t done = 0;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}
/// Copies the box at column x, row y of a mapped matrix to shared memory; its bytes count for the barrier.
__device__ __forceinline__ void copy_box(void* shared, const void* map, std::uint64_t* barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// How many registers a thread of this warpgroup has from here on.
template <int Count>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

__device__ __forceinline__ void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until at most N groups of products are under way.
template <int N>
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

/// After a wait: nothing that reads d is moved to before it.
__device__ __forceinline__ void warpgroup_settle(float (&d)[128]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Operands of the 128 sums, and the one product that is an instruction of its own for each type.
#define MLKIT_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MLKIT_SUMS_16(i) MLKIT_SUMS_4(i), MLKIT_SUMS_4(i + 4), MLKIT_SUMS_4(i + 8), MLKIT_SUMS_4(i + 12)
#define MLKIT_SUMS_64(i) MLKIT_SUMS_16(i), MLKIT_SUMS_16(i + 16), MLKIT_SUMS_16(i + 32), MLKIT_SUMS_16(i + 48)
#define MLKIT_WARPGROUP_PRODUCT(type)                                                                     \
  asm volatile(                                                                                           \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                                       \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                        \
      " {"                                                                                                \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                            \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                  \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                  \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                  \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "      \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, " \
      "%128, %129, p, 1, 1, 0, 0;\n}\n"                                                                   \
      : MLKIT_SUMS_64(0), MLKIT_SUMS_64(64)                                                               \
      : "l"(a), "l"(b), "r"(static_cast<int>(adds)))

/// d (+)= a b^T for a [64, 16] and b [256, 16] in shared memory, as warpgroup_operand says where; without `adds`, d is
/// overwritten. Warp w of the four has rows 16 w to 16 w + 15, as mma has them: d[4 j + e] is element e of columns 8 j
/// to 8 j + 7.
__device__ __forceinline__ void warpgroup_bf16(float (&d)[128], std::uint64_t a, std::uint64_t b, bool adds) {
  MLKIT_WARPGROUP_PRODUCT("bf16");
}
/// The same of f16.
__device__ __forceinline__ void warpgroup_f16(float (&d)[128], std::uint64_t a, std::uint64_t b, bool adds) {
  MLKIT_WARPGROUP_PRODUCT("f16");
}

#undef MLKIT_WARPGROUP_PRODUCT
#undef MLKIT_SUMS_64
#undef MLKIT_SUMS_16
#undef MLKIT_SUMS_4

#endif

// Blocks of a cluster (cudaLaunchAttributeClusterDimension), which reach each other's shared memory; sm_90.

/// This block's number in its cluster.
__device__ __forceinline__ int cluster_rank() {
  std::uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}
/// A barrier of all threads of a cluster: what was written before any has arrived is seen by who has waited.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
/// What another block of the cluster holds at this place of its shared memory.
__device__ __forceinline__ float load_cluster(const float* shared, int rank) {
  float x = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .b32 a;\nmapa.shared::cluster.u32 a, %1, %2;\nld.shared::cluster.f32 %0, [a];\n}\n"
               : "=f"(x)
               : "r"(shared_address(shared)), "r"(rank)
               : "memory");
#endif
  return x;
}

/// Lines of 64 16-bit elements, 128 bytes, as copy_box lays them down with CU_TENSOR_MAP_SWIZZLE_128B: the address is a
/// multiple of 1024, or that and 32 bytes for each 16 elements along the line.
__device__ __forceinline__ std::uint64_t warpgroup_operand(const void* shared) {
  return static_cast<std::uint64_t>((shared_address(shared) & 0x3ffff) >> 4) | std::uint64_t{1} << 16 |
         std::uint64_t{1024 >> 4} << 32 | std::uint64_t{1} << 62;
}

}  // namespace MLKIT_NAMESPACE::detail::ptx

#endif
