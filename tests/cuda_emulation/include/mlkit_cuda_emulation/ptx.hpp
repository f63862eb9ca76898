// The twin of mlkit/core/cuda/ptx.cuh, which says what each function does. Fragments are laid out as the PTX manual
// says of ldmatrix (.m8n8) and of mma (.m16n8k16 with .f16 and .bf16, .m16n8k8 with .tf32).
#pragma once

#include <mlkit/core/config.hpp>

#include "device.hpp"

#define MLKIT_SHARED_MEMORY(T, name) T* const name = static_cast<T*>(::cuda_emulation::dynamic_shared_memory())

#define MLKIT_EMULATED_PLACE int line = __builtin_LINE(), const char *file = __builtin_FILE()

namespace MLKIT_NAMESPACE::detail::ptx {

inline void ldmatrix_x4(std::uint32_t (&r)[4], const void* shared_row, MLKIT_EMULATED_PLACE) {
  cuda_emulation::load_matrices(r, 4, false, shared_row, line, file);
}
inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], const void* shared_row, MLKIT_EMULATED_PLACE) {
  cuda_emulation::load_matrices(r, 4, true, shared_row, line, file);
}
inline void ldmatrix_x2(std::uint32_t (&r)[2], const void* shared_row, MLKIT_EMULATED_PLACE) {
  cuda_emulation::load_matrices(r, 2, false, shared_row, line, file);
}
inline void ldmatrix_x2_trans(std::uint32_t (&r)[2], const void* shared_row, MLKIT_EMULATED_PLACE) {
  cuda_emulation::load_matrices(r, 2, true, shared_row, line, file);
}

inline void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], MLKIT_EMULATED_PLACE) {
  cuda_emulation::multiply_add(cuda_emulation::mma_type::bf16, d, a, b, line, file);
}
inline void mma_f16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], MLKIT_EMULATED_PLACE) {
  cuda_emulation::multiply_add(cuda_emulation::mma_type::f16, d, a, b, line, file);
}
inline void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], MLKIT_EMULATED_PLACE) {
  cuda_emulation::multiply_add(cuda_emulation::mma_type::tf32, d, a, b, line, file);
}

/// Adds half a unit of the upper 19 bits to the magnitude and cuts; a NaN stays one.
inline std::uint32_t to_tf32(float x) {
  const std::uint32_t u = __float_as_uint(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
  return (u & 0x7f800000u) == 0x7f800000u ? u : (u + 0x1000u) & ~0x1fffu;
}

inline std::uint32_t pack_bf16(float low, float high) {
  return cuda_emulation::round_bf16(high) << 16 | cuda_emulation::round_bf16(low);
}
inline std::uint32_t pack_f16(float low, float high) {
  return cuda_emulation::round_f16(high) << 16 | cuda_emulation::round_f16(low);
}
inline float widen_f16(std::uint32_t bits) { return cuda_emulation::widen_f16(bits & 0xffffu); }

inline std::uint32_t permute(std::uint32_t low, std::uint32_t high, std::uint32_t selector) {
  return __byte_perm(low, high, selector);
}

inline void cp_async_16(void* shared, const void* global, bool valid) {
  cuda_emulation::copy_async(shared, global, valid);
}
inline void cp_async_commit() { cuda_emulation::copy_async_commit(); }
template <int N>
void cp_async_wait() {
  cuda_emulation::copy_async_wait(N);
}

inline void named_barrier(int id, int threads, MLKIT_EMULATED_PLACE) {
  cuda_emulation::barrier(id, threads, "named_barrier", line, file);
}

inline float exp2(float x) { return ::exp2f(x); }

inline uint4 load_streaming(const uint4* p) { return *p; }

// One kernel runs after another.
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}

inline std::uint32_t shared_address(const void* p) { return cuda_emulation::shared_address(p); }

inline void barrier_init(std::uint64_t* barrier, int arrivals) { cuda_emulation::mbarrier_init(barrier, arrivals); }
inline void fence_barriers() {}
inline void barrier_arrive(std::uint64_t* barrier) { cuda_emulation::mbarrier_arrive(barrier, 0); }
inline void barrier_expect(std::uint64_t* barrier, std::uint32_t bytes) {
  cuda_emulation::mbarrier_arrive(barrier, bytes);
}
inline void barrier_wait(std::uint64_t* barrier, std::uint32_t parity, MLKIT_EMULATED_PLACE) {
  cuda_emulation::mbarrier_wait(barrier, parity, line, file);
}
inline void copy_box(void* shared, const void* map, std::uint64_t* barrier, int x, int y) {
  cuda_emulation::copy_matrix_box(shared, map, barrier, x, y);
}
inline void prefetch_map(const void*) {}
template <int Count>
void take_registers() {}
template <int Count>
void give_registers() {}

inline void warpgroup_fence(MLKIT_EMULATED_PLACE) { cuda_emulation::warpgroup_fence(line, file); }
inline void warpgroup_commit(MLKIT_EMULATED_PLACE) { cuda_emulation::warpgroup_commit(line, file); }
template <int N>
void warpgroup_wait(MLKIT_EMULATED_PLACE) {
  cuda_emulation::warpgroup_wait(N, line, file);
}
inline void warpgroup_bf16(float (&d)[128], std::uint64_t a, std::uint64_t b, bool adds, MLKIT_EMULATED_PLACE) {
  cuda_emulation::warpgroup_multiply(false, d, a, b, adds, line, file);
}
inline void warpgroup_f16(float (&d)[128], std::uint64_t a, std::uint64_t b, bool adds, MLKIT_EMULATED_PLACE) {
  cuda_emulation::warpgroup_multiply(true, d, a, b, adds, line, file);
}

inline int cluster_rank() { return cuda_emulation::cluster_rank(); }
inline void cluster_arrive(MLKIT_EMULATED_PLACE) { cuda_emulation::cluster_arrive(line, file); }
inline void cluster_wait(MLKIT_EMULATED_PLACE) { cuda_emulation::cluster_wait(line, file); }
inline float load_cluster(const float* shared, int rank) { return cuda_emulation::load_cluster(shared, rank); }

inline std::uint64_t warpgroup_operand(const void* shared) {
  return static_cast<std::uint64_t>((shared_address(shared) & 0x3ffff) >> 4) | std::uint64_t{1} << 16 |
         std::uint64_t{1024 >> 4} << 32 | std::uint64_t{1} << 62;
}

}  // namespace MLKIT_NAMESPACE::detail::ptx

#undef MLKIT_EMULATED_PLACE
