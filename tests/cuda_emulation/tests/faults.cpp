// Each thing that a kernel must not do is done once, and found.
#include <cub/cub.cuh>

#include <cstring>

#include "launch.hpp"

using namespace emulated;
using Catch::Matchers::Contains;
using Catch::Matchers::Equals;

namespace {

enum class how { well, badly };

__global__ void copy(const float* from, float* to, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) to[i] = from[i];
}

template <how How>
__global__ void reverse(float* x) {
  __shared__ float tile[64];
  const unsigned i = threadIdx.x;
  tile[i] = x[i];
  if constexpr (How == how::well) __syncthreads();
  x[i] = tile[63 - i];
}

}  // namespace

TEST_CASE("emulation: a good kernel is not complained of", "[cuda]") {
  std::vector<float> values(1000);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  const device_vector<float> from(values), to(1000);
  CHECK_THAT(fault_of({.grid = 8, .block = 128}, copy, from.data(), to.data(), 1000), Equals(""));
  CHECK(to.host() == values);
  CHECK_THAT(fault_of({.block = 64}, reverse<how::well>, to.data()), Equals(""));
  std::reverse(values.begin(), values.begin() + 64);
  CHECK(to.host() == values);
}

TEST_CASE("emulation: out of bounds of device memory", "[cuda]") {
  REQUIRE_WATCHED();
  const device_vector<float> from(std::vector<float>(1000)), to(1000);
  CHECK_THAT(fault_of({.grid = 8, .block = 128}, copy, from.data(), to.data(), 1001),
             Contains("copy(float const*, float*, int)") && Contains("block (7, 0, 0): thread (104, 0, 0)") &&
                 Contains("reads 4 bytes out of bounds: offset 4000 of device memory of 4000 bytes"));
  CHECK_THAT(fault_of({.grid = 8, .block = 128}, copy, from.data(), to.data() + 1, 1000),
             Contains("writes 4 bytes out of bounds: offset 4000 of device memory of 4000 bytes"));
  CHECK_THAT(fault_of({}, copy, from.data() - 8, to.data(), 32),
             Contains("thread (0, 0, 0): reads 4 bytes out of bounds: ") && Contains("32 bytes before device memory"));
}

TEST_CASE("emulation: use of what was freed", "[cuda]") {
  REQUIRE_WATCHED();
  const device_vector<float> to(32);
  const float* gone = nullptr;
  {
    const device_vector<float> from(std::vector<float>(32));
    gone = from.data();
  }
  const device_vector<float> another(std::vector<float>(32));
  CHECK_THAT(fault_of({}, copy, gone, to.data(), 32), Contains("offset 0 of freed device memory of 128 bytes"));
}

TEST_CASE("emulation: device memory that nobody has written", "[cuda]") {
  REQUIRE_WATCHED();
  const device_vector<float> from(32), to(32);
  REQUIRE(cudaMemset(from.data(), 0, 64) == cudaSuccess);
  CHECK_THAT(fault_of({}, copy, from.data(), to.data(), 32),
             Contains("thread (16, 0, 0): reads 4 bytes that nobody has written: offset 64 of device memory"));
}

TEST_CASE("emulation: pointers to host memory", "[cuda]") {
  REQUIRE_WATCHED();
  std::vector<float> host(32);
  const device_vector<float> to(32);
  CHECK_THAT(fault_of({}, copy, host.data(), to.data(), 32), Contains("reads 4 bytes of host memory"));
  static float global[32] = {1};
  CHECK_THAT(fault_of({}, copy, global, to.data(), 32), Contains("reads 4 bytes of host memory"));
  CHECK_THAT(fault_of({}, copy, nullptr, to.data(), 32), Contains("at a null pointer, offset 0"));
}

TEST_CASE("emulation: a barrier that is missing", "[cuda]") {
  REQUIRE_WATCHED();
  const device_vector<float> x(std::vector<float>(64));
  // Thread 0 reads what thread 63 has not written yet.
  CHECK_THAT(fault_of({.block = 64}, reverse<how::badly>, x.data()),
             Contains("reads 4 bytes at offset 252 of shared variable ") &&
                 Contains("::tile of 256 bytes, which nobody has written"));
  cuda_emulation::take_turns(cuda_emulation::turns::backward);
  CHECK_THAT(fault_of({.block = 64}, reverse<how::badly>, x.data()), Contains("which nobody has written"));
  cuda_emulation::take_turns(cuda_emulation::turns::forward);
}

namespace {

// Who reads what whom wrote, with what between.
enum class between { nothing, block, warp, named, shuffle };
template <between What>
__global__ void pass(int from, int to, int* out) {
  __shared__ int word;
  const int i = static_cast<int>(threadIdx.x);
  if (i == from) word = 7;
  if constexpr (What == between::block) __syncthreads();
  if constexpr (What == between::warp) __syncwarp();
  if constexpr (What == between::named) mlkit::detail::ptx::named_barrier(3, 128);
  if constexpr (What == between::shuffle) (void)__shfl_sync(0xffffffffu, i, 0);
  if (i == to) *out = word;
}

// Thread 0 reads, then thread 33 writes.
__global__ void overtake(int* out) {
  __shared__ int word;
  const unsigned i = threadIdx.x;
  if (i == 0) word = 1;
  __syncthreads();
  if (i == 0) *out = word;
  __syncwarp();
  if (i == 33) word = 2;
}

template <bool Barrier>
__global__ void write_after_read(int* out) {
  __shared__ int words[64];
  const unsigned i = threadIdx.x;
  words[i] = static_cast<int>(i);
  __syncthreads();
  out[i] = words[(i + 32) % 64];
  if (Barrier) __syncthreads();
  words[i] = 0;
}

template <bool Barrier>
__global__ void twice(int* out) {
  using reduce = cub::BlockReduce<int, 64>;
  __shared__ typename reduce::TempStorage storage;
  const int a = reduce(storage).Sum(1);
  if (Barrier) __syncthreads();
  const int b = reduce(storage).Sum(2);
  if (threadIdx.x == 0) *out = a + b;
}

__global__ void both_write() {
  __shared__ int word;
  if (threadIdx.x % 40 == 1) word = 1;
}

template <bool Atomically>
__global__ void count(int* out) {
  __shared__ int n;
  if (threadIdx.x == 0) n = 0;
  __syncthreads();
  if (Atomically)
    atomicAdd(&n, 1);
  else
    ++n;
  __syncthreads();
  if (threadIdx.x == 0) *out = n;
}

}  // namespace

TEST_CASE("emulation: what orders accesses to shared memory", "[cuda]") {
  const device_vector<int> out(1);
  const auto passed = [&](auto kernel, int from, int to) {
    const std::string text = fault_of({.block = 128}, kernel, from, to, out.data());
    if (text.empty()) CHECK(out.host()[0] == 7);
    return text;
  };
  CHECK_THAT(passed(pass<between::block>, 100, 3), Equals(""));
  CHECK_THAT(passed(pass<between::named>, 100, 3), Equals(""));
  CHECK_THAT(passed(pass<between::warp>, 34, 33), Equals(""));
  CHECK_THAT(passed(pass<between::shuffle>, 34, 33), Equals(""));
  CHECK_THAT(passed(pass<between::nothing>, 34, 34), Equals(""));
  REQUIRE_WATCHED();
  CHECK_THAT(passed(pass<between::nothing>, 33, 34),
             Contains("thread (34, 0, 0): reads 4 bytes at offset 0 of shared variable") &&
                 Contains("::word of 4 bytes, which thread (33, 0, 0) wrote, and no barrier lies between"));
  CHECK_THAT(passed(pass<between::warp>, 31, 32), Contains("which thread (31, 0, 0) wrote, and no barrier"));
  CHECK_THAT(passed(pass<between::shuffle>, 31, 32), Contains("which thread (31, 0, 0) wrote, and no barrier"));
}

TEST_CASE("emulation: races of other kinds", "[cuda]") {
  REQUIRE_WATCHED();
  const device_vector<int> out(64);
  CHECK_THAT(fault_of({.block = 64}, write_after_read<true>, out.data()), Equals(""));
  CHECK_THAT(fault_of({.block = 64}, write_after_read<false>, out.data()),
             Contains("which thread (63, 0, 0) wrote, and no barrier lies between"));
  CHECK_THAT(fault_of({.block = 64}, overtake, out.data()),
             Contains("thread (33, 0, 0): writes 4 bytes") &&
                 Contains("which thread (0, 0, 0) read, and no barrier lies between"));
  CHECK_THAT(fault_of({.block = 64}, both_write),
             Contains("writes 4 bytes") && Contains("(41, 0, 0)") && Contains("which thread (1, 0, 0) wrote"));
  CHECK_THAT(fault_of({.block = 64}, twice<true>, out.data()), Equals(""));
  CHECK(out.host()[0] == 64 + 128);
  CHECK_THAT(fault_of({.block = 64}, twice<false>, out.data()),
             Contains("storage") && Contains("no barrier lies between"));
  CHECK_THAT(fault_of({.block = 64}, count<true>, out.data()), Equals(""));
  CHECK(out.host()[0] == 64);
  CHECK_THAT(fault_of({.block = 64}, count<false>, out.data()), Contains("no barrier lies between"));
}

namespace {

__global__ void static_overrun(int n) {
  __shared__ float tile[32];
  tile[threadIdx.x + static_cast<unsigned>(n)] = 1;
}

__global__ void dynamic_overrun(int n) {
  MLKIT_SHARED_MEMORY(float, tile);
  tile[static_cast<int>(threadIdx.x) + n] = 1;
}

__global__ void unset_dynamic(float* out) {
  MLKIT_SHARED_MEMORY(float, tile);
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void unset_in_the_second_block(float* out) {
  __shared__ float tile[32];
  if (blockIdx.x == 0) tile[threadIdx.x] = 1;
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void misaligned(float* x) { *reinterpret_cast<volatile double*>(x + 1) = 1; }

__global__ void others_locals(float* out) {
  __shared__ float* where;
  float mine = 1;
  if (threadIdx.x == 0) where = &mine;
  __syncthreads();
  out[threadIdx.x] = *where;
  __syncthreads();
}

}  // namespace

TEST_CASE("emulation: out of bounds of shared memory, and before it is set", "[cuda]") {
  REQUIRE_WATCHED();
  CHECK_THAT(fault_of({}, static_overrun, 0), Equals(""));
  CHECK_THAT(fault_of({}, static_overrun, 1),
             Contains("thread (31, 0, 0): writes 4 bytes out of bounds: offset 128 of shared variable") &&
                 Contains("::tile of 128 bytes"));
  CHECK_THAT(fault_of({}, static_overrun, 20), Contains("out of bounds: offset 128 of shared variable"));
  CHECK_THAT(fault_of({.shared = 128}, dynamic_overrun, 0), Equals(""));
  CHECK_THAT(fault_of({.shared = 128}, dynamic_overrun, 1),
             Contains("out of bounds: offset 128 of dynamic shared memory of 128 bytes"));
  CHECK_THAT(fault_of({.shared = 128}, dynamic_overrun, -1),
             Contains("out of bounds: offset -4 of dynamic shared memory of 128 bytes"));
  const device_vector<float> out(32);
  CHECK_THAT(fault_of({.shared = 128}, unset_dynamic, out.data()), Contains("which nobody has written"));
  CHECK_THAT(fault_of({.grid = 2}, unset_in_the_second_block, out.data()),
             Contains("block (1, 0, 0)") && Contains("which nobody has written"));
  CHECK_THAT(fault_of({.block = 1}, misaligned, out.data()), Contains("at an address that is no multiple of 8"));
  CHECK_THAT(fault_of({}, others_locals, out.data()),
             Contains("reads 4 bytes of the local variables of thread (0, 0, 0)"));
}

namespace {

enum class divergence { some_return, two_places, lanes_return, two_kinds, wrong_count, not_in_mask, other_instruction };
template <divergence How>
__global__ void diverge() {
  const unsigned i = threadIdx.x;
  if constexpr (How == divergence::some_return) {
    if (i >= 40) return;
    __syncthreads();
  } else if constexpr (How == divergence::two_places) {
    if (i >= 40)
      __syncthreads();
    else
      __syncthreads();
  } else if constexpr (How == divergence::lanes_return) {
    if (i == 3) return;
    __syncwarp();
  } else if constexpr (How == divergence::two_kinds) {
    if (i < 32)
      __syncthreads();
    else
      mlkit::detail::ptx::named_barrier(1, 64);
  } else if constexpr (How == divergence::wrong_count) {
    mlkit::detail::ptx::named_barrier(1, i < 32 ? 64 : 32);
  } else if constexpr (How == divergence::not_in_mask) {
    (void)__shfl_sync(0xffu, 1, 0);
  } else {
    if (i % 2)
      (void)__shfl_sync(0xffffffffu, 1, 0);
    else
      (void)__ballot_sync(0xffffffffu, 1);
  }
}

}  // namespace

TEST_CASE("emulation: threads that do not come to where others wait", "[cuda]") {
  CHECK_THAT(fault_of({.block = 64}, diverge<divergence::some_return>),
             Contains("threads wait for each other in vain: threads 0 to 39 wait in __syncthreads at faults.cpp:") &&
                 Contains("; threads 40 to 63 have returned"));
  CHECK_THAT(fault_of({.block = 64}, diverge<divergence::two_places>),
             Contains("divergent barrier: thread 0 waits in __syncthreads at faults.cpp:") &&
                 Contains(", thread 40 in __syncthreads at"));
  CHECK_THAT(fault_of({}, diverge<divergence::lanes_return>),
             Contains("__syncwarp: the mask names lane 3, which has returned"));
  CHECK_THAT(fault_of({.block = 20}, diverge<divergence::not_in_mask>),
             Contains("__shfl_sync: the mask does not name the calling lane"));
  CHECK_THAT(
      fault_of({.block = 64}, diverge<divergence::two_kinds>),
      Contains("threads 0 to 31 wait in __syncthreads at") && Contains("threads 32 to 63 wait in named_barrier at"));
  CHECK_THAT(fault_of({.block = 64}, diverge<divergence::wrong_count>),
             Contains("barrier 1 of 32 threads, where thread 0 waits for 64"));
  CHECK_THAT(fault_of({}, diverge<divergence::other_instruction>), Contains("which the mask names, is in __"));
  // The next launch is not disturbed.
  const device_vector<float> from(std::vector<float>(32)), to(32);
  CHECK_THAT(fault_of({}, copy, from.data(), to.data(), 32), Equals(""));
}

namespace {

enum class wait { well, not_at_all, for_too_few, before_barrier };
template <wait How>
__global__ void fetch(const float* from, float* to) {
  using namespace mlkit::detail::ptx;
  MLKIT_SHARED_MEMORY(float, tile);
  const unsigned i = threadIdx.x;
  cp_async_16(tile + 4 * i, from + 4 * i, true);
  cp_async_commit();
  cp_async_16(tile + 256 + 4 * i, from + 4 * i, i % 2 == 0);
  cp_async_commit();
  if constexpr (How == wait::for_too_few) cp_async_wait<1>();
  if constexpr (How == wait::well || How == wait::before_barrier) cp_async_wait<0>();
  if constexpr (How != wait::before_barrier) __syncthreads();
  const unsigned other = (i + 1) % 64;
  for (unsigned j = 0; j < 4; ++j) to[4 * i + j] = tile[4 * other + j] + tile[256 + 4 * other + j];
}

}  // namespace

TEST_CASE("emulation: cp.async that is not waited for", "[cuda]") {
  std::vector<float> values(256);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  const device_vector<float> from(values), to(256);
  const shape s{.block = 64, .shared = 2048};
  CHECK_THAT(fault_of(s, fetch<wait::well>, from.data(), to.data()), Equals(""));
  const std::vector<float> have = to.host();
  for (std::size_t i = 0; i < 256; ++i) {
    const std::size_t from_index = (i + 4) % 256;
    CHECK(have[i] == (from_index / 4 % 2 == 0 ? 2.0f : 1.0f) * values[from_index]);
  }
  REQUIRE_WATCHED();
  CHECK_THAT(fault_of(s, fetch<wait::not_at_all>, from.data(), to.data()),
             Contains("where a cp.async of thread (0, 0, 0) is under way that has not been waited for"));
  CHECK_THAT(fault_of(s, fetch<wait::for_too_few>, from.data(), to.data()),
             Contains("where a cp.async of thread (0, 0, 0) is under way"));
  CHECK_THAT(fault_of(s, fetch<wait::before_barrier>, from.data(), to.data()),
             Contains("nobody has written") || Contains("no barrier lies between") || Contains("is under way"));
  CHECK_THAT(fault_of(s, fetch<wait::well>, from.data() + 1, to.data()),
             Contains("cp.async of 16 bytes at an address that is no multiple of 16"));
  CHECK_THAT(fault_of(s, fetch<wait::well>, from.data() + 4, to.data()),
             Contains("reads 16 bytes out of bounds: offset 1024 of device memory"));
  CHECK_THAT(fault_of(s, fetch<wait::well>, values.data(), to.data()), Contains("cp.async"));
}
