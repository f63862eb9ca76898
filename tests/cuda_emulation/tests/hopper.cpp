// Emulated barriers in shared memory, copies of boxes and products by warpgroups, against what the PTX manual says.
#include <cuda.h>
#include <mlkit/core/dtype.hpp>

#include <cmath>
#include <random>

#include "launch.hpp"

using namespace emulated;
using Catch::Matchers::Contains;
using Catch::Matchers::Equals;
using mlkit::bf16;
using mlkit::f16;
namespace ptx = mlkit::detail::ptx;

namespace {

// Where the 16 bytes `chunk` of a line of 128 bytes lie in 128-byte swizzle: chunks of line r are exchanged by r mod 8.
std::size_t swizzled_byte(std::size_t line, std::size_t byte) {
  return line * 128 + ((byte / 16) ^ (line % 8)) * 16 + byte % 16;
}

__device__ unsigned char* aligned_to_1024(unsigned char* p) {
  return p + (1024 - ptx::shared_address(p) % 1024) % 1024;
}

enum class how {
  well,
  no_wait,       // reads what is still being copied
  wrong_parity,  // waits for the phase before
  no_release,    // expects the next copy before the last has been read
  too_few,       // expects fewer arrivals than there are
  never,         // nobody arrives
};

// Warp 0 has boxes copied, two in flight; the others write them out.
template <how How>
__global__ void pass_boxes(const __grid_constant__ CUtensorMap map, unsigned char* out, int boxes, int bytes) {
  MLKIT_SHARED_MEMORY(unsigned char, dynamic);
  __shared__ std::uint64_t full[2], empty[2];
  unsigned char* const memory = aligned_to_1024(dynamic);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (int i = 0; i < 2; ++i) {
      ptx::barrier_init(full + i, 1);
      ptx::barrier_init(empty + i, How == how::too_few ? 1 : 2);
    }
    ptx::fence_barriers();
  }
  __syncthreads();
  if (thread < 32) {
    if (thread != 0) return;
    for (int box = 0; box < boxes; ++box) {
      const int stage = box % 2;
      const auto phase = static_cast<std::uint32_t>(box / 2 % 2);
      if (How != how::no_release) ptx::barrier_wait(empty + stage, phase ^ 1);
      if (How == how::never) return;
      ptx::barrier_expect(full + stage, static_cast<std::uint32_t>(bytes));
      ptx::copy_box(memory + 8192 * stage, &map, full + stage, 64 * (box % 2), 20 * (box / 2));
    }
  } else {
    for (int box = 0; box < boxes; ++box) {
      const int stage = box % 2;
      const auto phase = static_cast<std::uint32_t>(box / 2 % 2);
      if (How != how::no_wait) ptx::barrier_wait(full + stage, How == how::wrong_parity ? phase ^ 1 : phase);
      for (int i = thread - 32; i < bytes; i += 64) out[box * bytes + i] = memory[8192 * stage + i];
      __syncwarp();
      if (thread % 32 == 0) ptx::barrier_arrive(empty + stage);
    }
  }
}

// A map of x [rows, cols], rows `pitch` apart.
void make_map(CUtensorMap& map, std::uint16_t* x, std::uint64_t rows, std::uint64_t cols, std::uint64_t pitch,
              std::uint32_t lines, CUresult want = CUDA_SUCCESS) {
  const cuuint64_t extents[2] = {cols, rows}, stride = pitch * 2;
  const cuuint32_t box[2] = {64, lines}, ones[2] = {1, 1};
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  REQUIRE(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found) ==
          cudaSuccess);
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  REQUIRE(encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, x, extents, &stride, box, ones,
                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == want);
}

}  // namespace

TEST_CASE("emulation: boxes are copied as the manual says, and barriers order what is done with them", "[cuda]") {
  constexpr std::size_t rows = 50, cols = 100, pitch = 104, lines = 24, bytes = lines * 128;
  std::vector<std::uint16_t> x(rows * pitch);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<std::uint16_t>(i + 1);
  const device_vector<std::uint16_t> given(x);
  CUtensorMap map{};
  make_map(map, given.data(), rows, cols, pitch, lines);
  const device_vector<unsigned char> out(6 * bytes);
  const shape s{.block = 96, .shared = 2 * 8192 + 1024};
  for (const auto order : {cuda_emulation::turns::forward, cuda_emulation::turns::backward}) {
    cuda_emulation::take_turns(order);
    REQUIRE_THAT(fault_of(s, pass_boxes<how::well>, map, out.data(), 6, static_cast<int>(bytes)), Equals(""));
    const std::vector<unsigned char> have = out.host();
    for (std::size_t box = 0; box < 6; ++box)
      for (std::size_t line = 0; line < lines; ++line)
        for (std::size_t e = 0; e < 64; ++e) {
          const std::size_t row = 20 * (box / 2) + line, col = 64 * (box % 2) + e;
          const unsigned want = row < rows && col < cols ? x[row * pitch + col] : 0u;
          const std::size_t at = box * bytes + swizzled_byte(line, 2 * e);
          CHECK((have[at] | have[at + 1] << 8) == static_cast<int>(want));
        }
  }
  cuda_emulation::take_turns(cuda_emulation::turns::forward);
  const auto fault = [&](auto kernel) { return fault_of(s, kernel, map, out.data(), 6, static_cast<int>(bytes)); };
  // Phases end too early, until nobody knows which it is.
  CHECK_THAT(fault(pass_boxes<how::too_few>), Contains("threads wait for each other in vain: thread 0 waits in"));
  // A phase begins before the one before has ended.
  CHECK_THAT(fault(pass_boxes<how::no_release>),
             Contains("more arrivals in a phase of a barrier than it was made for"));
  CHECK_THAT(fault(pass_boxes<how::never>),
             Contains("threads wait for each other in vain: threads 0 to 31 have returned; threads 32 to 95 wait in "
                      "barrier_wait at hopper.cpp:"));
  REQUIRE_WATCHED();
  CHECK_THAT(fault(pass_boxes<how::no_wait>), Contains("which nobody has written"));
  CHECK_THAT(fault(pass_boxes<how::wrong_parity>), Contains("which nobody has written"));
  cuda_emulation::take_turns(cuda_emulation::turns::backward);  // thread 0 comes last to the first barrier and goes on
  CHECK_THAT(fault(pass_boxes<how::no_wait>), Contains("a cp.async of thread (0, 0, 0) is under way"));
  cuda_emulation::take_turns(cuda_emulation::turns::forward);
}

TEST_CASE("emulation: maps that the driver refuses", "[cuda]") {
  const device_vector<std::uint16_t> x(std::vector<std::uint16_t>(1000));
  CUtensorMap map{};
  make_map(map, x.data(), 4, 64, 64, 4);
  make_map(map, x.data() + 1, 4, 64, 64, 4, CUDA_ERROR_INVALID_VALUE);
  make_map(map, x.data(), 4, 64, 65, 4, CUDA_ERROR_INVALID_VALUE);
  make_map(map, x.data(), 4, 64, 64, 257, CUDA_ERROR_INVALID_VALUE);
  make_map(map, x.data(), 0, 64, 64, 4, CUDA_ERROR_INVALID_VALUE);
}

namespace {

enum class order { well, too_early, overwritten };

// d = a b^T for a [64, 64], b [256, 64], laid down in swizzle; then d += a b^T once more.
template <class E, order Order>
__global__ void products(const E* a, const E* b, float* d) {
  MLKIT_SHARED_MEMORY(unsigned char, dynamic);
  unsigned char* const memory = aligned_to_1024(dynamic);
  const auto put = [&](unsigned char* to, const E* from, unsigned lines) {
    for (unsigned i = threadIdx.x; i < lines * 64; i += 128) {
      const unsigned line = i / 64, byte = i % 64 * 2;
      *reinterpret_cast<E*>(to + line * 128 + ((byte / 16) ^ (line % 8)) * 16 + byte % 16) = from[i];
    }
  };
  put(memory, a, 64);
  put(memory + 64 * 128, b, 256);
  __syncthreads();
  const std::uint64_t da = ptx::warpgroup_operand(memory), db = ptx::warpgroup_operand(memory + 64 * 128);
  float sums[128];
  for (int round = 0; round < 2; ++round) {
    ptx::warpgroup_fence();
    for (int k = 0; k < 4; ++k) {
      const auto step = static_cast<std::uint64_t>(2 * k);
      if constexpr (std::is_same_v<E, bf16>)
        ptx::warpgroup_bf16(sums, da + step, db + step, round > 0 || k > 0);
      else
        ptx::warpgroup_f16(sums, da + step, db + step, round > 0 || k > 0);
    }
    ptx::warpgroup_commit();
  }
  if (Order == order::overwritten && threadIdx.x == 5) memory[0] = 1;
  if (Order != order::too_early) ptx::warpgroup_wait<0>();
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (unsigned j = 0; j < 32; ++j)
    for (unsigned e = 0; e < 4; ++e) {
      const unsigned row = 16 * warp + lane / 4 + (e < 2 ? 0 : 8), col = 8 * j + lane % 4 * 2 + e % 2;
      d[row * 256 + col] = sums[4 * j + e];
    }
  ptx::warpgroup_wait<0>();
}

template <class E>
void check_products() {
  std::mt19937 random(9);
  const auto numbers = [&](std::size_t count) {
    std::vector<E> x(count);
    for (auto& v : x) v = E(static_cast<float>(static_cast<int>(random() % 17) - 8) / 4);
    return x;
  };
  const auto a = numbers(64 * 64), b = numbers(256 * 64);
  const device_vector<E> da(a), db(b);
  const device_vector<float> d(64 * 256);
  const shape s{.block = 128, .shared = 320 * 128 + 1024};
  REQUIRE_THAT(fault_of(s, products<E, order::well>, da.data(), db.data(), d.data()), Equals(""));
  std::vector<float> have = d.host();
  for (std::size_t row = 0; row < 64; ++row)
    for (std::size_t col = 0; col < 256; ++col) {
      double sum = 0;
      for (std::size_t k = 0; k < 64; ++k)
        sum += static_cast<double>(static_cast<float>(a[row * 64 + k])) * static_cast<float>(b[col * 64 + k]);
      CHECK(have[row * 256 + col] == 2 * sum);
    }
  // What is read before it is waited for is NaN.
  REQUIRE_THAT(fault_of(s, products<E, order::too_early>, da.data(), db.data(), d.data()), Equals(""));
  have = d.host();
  CHECK(std::all_of(have.begin(), have.end(), [](float x) { return std::isnan(x); }));
  REQUIRE_WATCHED();
  CHECK_THAT(fault_of(s, products<E, order::overwritten>, da.data(), db.data(), d.data()),
             Contains("no barrier lies between"));
}

}  // namespace

TEST_CASE("emulation: products by warpgroups", "[cuda]") {
  check_products<bf16>();
  check_products<f16>();
}
