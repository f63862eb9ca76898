// Blocks in clusters: their barrier, what they read of each other's shared memory, and each mistake once.
#include "launch.hpp"

using namespace emulated;
using Catch::Matchers::Contains;
using Catch::Matchers::Equals;
namespace ptx = mlkit::detail::ptx;

namespace {

void cluster_barrier() {
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// Thread i of each block writes, and sums what thread i of all blocks wrote, `rounds` times over; all blocks get the
// same sums. `Dynamic`: in dynamic shared memory, else in a variable.
enum class mistake { none, reads_early, writes_early, reads_between, no_barrier_before_return };
template <mistake What, bool Dynamic>
__global__ void sum_over_cluster(float* out, int blocks, int rounds) {
  __shared__ float variable[64];
  MLKIT_SHARED_MEMORY(float, dynamic);
  float* const mine = Dynamic ? dynamic : variable;
  const int i = static_cast<int>(threadIdx.x), rank = ptx::cluster_rank();
  float sum = 0;
  for (int round = 0; round < rounds; ++round) {
    if (What != mistake::writes_early && round > 0) cluster_barrier();  // all have read
    mine[i] = static_cast<float>(1 + rank + 10 * round + 100 * i);
    if (What == mistake::reads_between) ptx::cluster_arrive();
    if (What != mistake::reads_early && What != mistake::reads_between) cluster_barrier();
    for (int k = 0; k < blocks; ++k) sum += ptx::load_cluster(mine + i, k);
    if (What == mistake::reads_between) ptx::cluster_wait();
  }
  const int block = static_cast<int>(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
  out[block * static_cast<int>(blockDim.x) + i] = sum;
  if (What != mistake::no_barrier_before_return) cluster_barrier();
}

template <mistake What, bool Dynamic = false>
std::string fault_of_sums(int rounds = 2) {
  const device_vector<float> out(4 * 64);
  return fault_of({.grid = 4, .block = 64, .shared = Dynamic ? 256u : 0u, .cluster = 4},
                  sum_over_cluster<What, Dynamic>, out.data(), 4, rounds);
}

template <class F>
void in_both_orders(F&& f) {
  f();
  cuda_emulation::take_turns(cuda_emulation::turns::backward);
  f();
  cuda_emulation::take_turns(cuda_emulation::turns::forward);
}

}  // namespace

TEST_CASE("emulation: blocks of a cluster read each other's shared memory", "[cuda]") {
  in_both_orders([] {
    for (const dim3& cluster : {dim3(1), dim3(4), dim3(2, 2), dim3(1, 2, 2), dim3(8)}) {
      const dim3 grid(2 * cluster.x, 3 * cluster.y, cluster.z);
      const int blocks = static_cast<int>(cluster.x * cluster.y * cluster.z), rounds = 3;
      const std::size_t count = std::size_t{grid.x} * grid.y * grid.z;
      std::vector<float> want;
      for (std::size_t b = 0; b < count; ++b)
        for (int i = 0; i < 64; ++i)
          want.push_back(
              static_cast<float>(rounds * blocks * (blocks + 1) / 2 + 30 * blocks + rounds * blocks * 100 * i));
      const device_vector<float> out(count * 64), other(count * 64);
      CHECK_THAT(fault_of({.grid = grid, .block = 64, .cluster = cluster}, sum_over_cluster<mistake::none, false>,
                          out.data(), blocks, rounds),
                 Equals(""));
      CHECK(out.host() == want);
      CHECK_THAT(fault_of({.grid = grid, .block = 64, .shared = 256, .cluster = cluster},
                          sum_over_cluster<mistake::none, true>, other.data(), blocks, rounds),
                 Equals(""));
      CHECK(other.host() == want);
    }
  });
}

namespace {

__global__ void ranks(int* out) {
  const int at = static_cast<int>(blockIdx.x + gridDim.x * blockIdx.y);
  if (threadIdx.x == 0) out[at] = ptx::cluster_rank();
}

}  // namespace

TEST_CASE("emulation: a block's number in its cluster", "[cuda]") {
  const device_vector<int> out(4 * 2);
  CHECK_THAT(fault_of({.grid = dim3(4, 2), .cluster = dim3(2, 2)}, ranks, out.data()), Equals(""));
  CHECK(out.host() == std::vector<int>{0, 1, 0, 1, 2, 3, 2, 3});
  CHECK_THAT(fault_of({.grid = dim3(4, 2)}, ranks, out.data()), Equals(""));
  CHECK(out.host() == std::vector<int>(8, 0));
  CHECK_THAT(fault_of({.grid = 6, .cluster = 4}, ranks, out.data()), Equals("cudaErrorInvalidConfiguration"));
  CHECK_THAT(fault_of({.grid = 16, .cluster = 16}, ranks, out.data()), Equals("cudaErrorInvalidConfiguration"));
}

TEST_CASE("emulation: what blocks of a cluster do out of order", "[cuda]") {
  REQUIRE_WATCHED();
  in_both_orders([] {
    CHECK_THAT(fault_of_sums<mistake::none>(), Equals(""));
    CHECK_THAT(fault_of_sums<mistake::reads_early>(), Contains("which nobody there has written"));
    CHECK_THAT((fault_of_sums<mistake::reads_early, true>()), Contains("which nobody there has written"));
    CHECK_THAT(fault_of_sums<mistake::reads_between>(1),
               Contains("load_cluster of block ") && Contains("of the cluster"));
    CHECK_THAT(fault_of_sums<mistake::writes_early>(), Contains("and no cluster barrier lies between"));
    CHECK_THAT((fault_of_sums<mistake::writes_early, true>()), Contains("and no cluster barrier lies between"));
    CHECK_THAT(fault_of_sums<mistake::no_barrier_before_return>(),
               Contains("of the cluster, whose threads have all returned"));
  });
}

namespace {

// Block 1 reads what block 0 writes after it has arrived.
__global__ void writes_after_arrival(float* out) {
  __shared__ float word;
  const int rank = ptx::cluster_rank();
  if (threadIdx.x == 0) word = 1;
  ptx::cluster_arrive();
  if (rank == 0 && threadIdx.x == 0) word = 2;
  ptx::cluster_wait();
  if (rank == 1 && threadIdx.x == 0) *out = ptx::load_cluster(&word, 0);
  cluster_barrier();
}

// Block 0 reads what block 1 has written, which writes it again meanwhile.
__global__ void overtakes(float* out) {
  __shared__ float word;
  const int rank = ptx::cluster_rank();
  if (threadIdx.x == 0) word = 1;
  cluster_barrier();
  if (threadIdx.x == 0) {
    if (rank == 0)
      *out = ptx::load_cluster(&word, 1);
    else
      word = 2;
  }
  cluster_barrier();
}

enum class misuse { arrives_twice, waits_first, some_warps, half_a_warp, one_block_waits, out_of_bounds, no_block };
template <misuse How>
__global__ void wrong(float* out) {
  MLKIT_SHARED_MEMORY(float, memory);
  const int rank = ptx::cluster_rank(), i = static_cast<int>(threadIdx.x);
  memory[i] = 1;
  if constexpr (How == misuse::arrives_twice) {
    ptx::cluster_arrive();
    ptx::cluster_arrive();
  } else if constexpr (How == misuse::waits_first) {
    ptx::cluster_wait();
  } else if constexpr (How == misuse::some_warps) {
    if (i >= 32) __syncthreads();
    cluster_barrier();
  } else if constexpr (How == misuse::half_a_warp) {
    if (i % 32 < 16) ptx::cluster_arrive();
  } else if constexpr (How == misuse::one_block_waits) {
    if (rank == 1) __syncthreads();
    ptx::cluster_arrive();
    if (rank == 0) ptx::cluster_wait();
  } else {
    cluster_barrier();
    out[i] = ptx::load_cluster(How == misuse::out_of_bounds ? memory + 64 : memory, How == misuse::no_block ? 2 : 1);
    cluster_barrier();
  }
}

template <misuse How>
std::string fault_of_misuse() {
  const device_vector<float> out(64);
  return fault_of({.grid = 2, .block = 64, .shared = 256, .cluster = 2}, wrong<How>, out.data());
}

}  // namespace

TEST_CASE("emulation: barriers of clusters that are used wrongly", "[cuda]") {
  in_both_orders([] {
    CHECK_THAT(fault_of_misuse<misuse::arrives_twice>(), Contains("cluster_arrive again, without a cluster_wait"));
    CHECK_THAT(fault_of_misuse<misuse::waits_first>(), Contains("cluster_wait without a cluster_arrive before it"));
    CHECK_THAT(fault_of_misuse<misuse::some_warps>(),
               Contains("threads 0 to 31 wait in cluster_wait at clusters.cpp:") &&
                   Contains("threads 32 to 63 wait in __syncthreads"));
    CHECK_THAT(fault_of_misuse<misuse::half_a_warp>(), Contains("cluster_arrive"));
    CHECK_THAT(fault_of_misuse<misuse::one_block_waits>(), Equals(""));
    CHECK_THAT(fault_of_misuse<misuse::out_of_bounds>(), Contains("out of bounds"));
    CHECK_THAT(fault_of_misuse<misuse::no_block>(), Contains("load_cluster of block 2 of a cluster of 2"));
  });
  REQUIRE_WATCHED();
  const device_vector<float> out(1);
  CHECK_THAT(fault_of({.grid = 2, .block = 64, .cluster = 2}, writes_after_arrival, out.data()),
             Contains("load_cluster of block 0 of the cluster, which was written there, and no cluster barrier"));
  const auto overtaken = [&] { return fault_of({.grid = 2, .block = 64, .cluster = 2}, overtakes, out.data()); };
  cuda_emulation::take_turns(cuda_emulation::turns::backward);  // the last to arrive goes on first
  CHECK_THAT(overtaken(),
             Contains("writes 4 bytes at offset 0 of shared variable") &&
                 Contains("which another block of the cluster reads, and no cluster barrier lies between"));
  cuda_emulation::take_turns(cuda_emulation::turns::forward);
  CHECK_THAT(overtaken(), Contains("which was written there, and no cluster barrier lies between"));
  // The next launch is not disturbed.
  CHECK_THAT(fault_of_sums<mistake::none>(), Equals(""));
}
