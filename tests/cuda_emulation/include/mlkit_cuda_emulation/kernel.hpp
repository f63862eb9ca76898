// What emulated device code asks of the scheduler: who it is, and to wait for others.
#pragma once

#include "types.hpp"

// Variables, other than threadIdx and blockIdx: cudaLaunchConfig_t has members of their names.
extern thread_local constinit uint3 gridDim, blockDim;

namespace cuda_emulation {

// The same throughout a thread's life, so that the compiler may ask once.
__attribute__((const)) uint3 thread_index() noexcept;
__attribute__((const)) uint3 block_index() noexcept;
__attribute__((const)) unsigned lane_index() noexcept;
__attribute__((const)) void* dynamic_shared_memory() noexcept;

/// Waits until `threads` threads have come to a barrier; 0: all threads of the block.
void barrier(int id, int threads, const char* name, int line, const char* file);

/// An instruction that the lanes of a warp named by a mask do together, as one lane sees it.
struct warp_call {
  const char* name;
  unsigned mask;
  // Runs once, when all are there: lanes[i] is lane i's call, null where the mask does not name it.
  void (*evaluate)(warp_call* const* lanes);
  const void* in = nullptr;  // of this lane
  void* out = nullptr;
  std::size_t bytes = 0;  // of in, or of out
  int argument = 0, width = 32;
};
void meet(warp_call& call, int line, const char* file);

/// Says that the thread reads or writes memory in a way that the compiler's instrumentation does not see.
void touch(const void* p, std::size_t bytes, std::size_t alignment, bool write);
/// An atomic operation of it, which no other atomic operation on the same word disturbs.
void touch_atomically(const void* p, std::size_t bytes);

// What evaluates the calls: collectives.cpp, ptx.cpp.
void exchange_lanes(warp_call* const* lanes);
enum class pick : int { index, up, down, exclusive_or };  // in the upper bits of warp_call::argument
void vote_lanes(warp_call* const* lanes);

void copy_async(void* shared, const void* global, bool valid);
void copy_async_commit();
void copy_async_wait(int groups);

void load_matrices(std::uint32_t* r, int count, bool transposed, const void* shared_row, int line, const char* file);
// Where a pointer to shared memory points, as instructions want it; and back.
std::uint32_t shared_address(const void* p);
void* shared_pointer(std::uint32_t address);

void mbarrier_init(std::uint64_t* barrier, int arrivals);
void mbarrier_arrive(std::uint64_t* barrier, std::uint32_t bytes);  // for so many bytes more of copies
void mbarrier_wait(std::uint64_t* barrier, std::uint32_t parity, int line, const char* file);
void copy_matrix_box(void* shared, const void* map, std::uint64_t* barrier, int x, int y);
void warpgroup_multiply(bool is_f16, float* d, std::uint64_t a, std::uint64_t b, bool adds, int line, const char* file);
void warpgroup_commit(int line, const char* file);
void warpgroup_wait(int groups, int line, const char* file);
void warpgroup_fence(int line, const char* file);

// Blocks of a cluster.
int cluster_rank();
void cluster_arrive(int line, const char* file);
void cluster_wait(int line, const char* file);
float load_cluster(const float* shared, int rank);

std::uint32_t round_bf16(float x) noexcept;  // to nearest even
std::uint32_t round_f16(float x) noexcept;
float widen_f16(std::uint32_t bits) noexcept;
enum class mma_type { bf16, f16, tf32 };
void multiply_add(mma_type type, float* d, const std::uint32_t* a, const std::uint32_t* b, int line, const char* file);

}  // namespace cuda_emulation
