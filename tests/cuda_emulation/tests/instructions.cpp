// Each emulated instruction against what the manuals of CUDA and PTX say of it, in loops of the test's own.
#include <mlkit/core/dtype.hpp>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>

#include "launch.hpp"

using namespace emulated;
using Catch::Matchers::Contains;
using Catch::Matchers::Equals;
namespace ptx = mlkit::detail::ptx;

namespace {

constexpr unsigned all = 0xffffffffu;

enum class kind { index, up, down, exclusive_or };
template <kind Kind, class T>
__global__ void shuffle(T* out, int argument, int width) {
  const T mine = static_cast<T>(100 + threadIdx.x);
  T got{};
  if constexpr (Kind == kind::index) got = __shfl_sync(all, mine, argument, width);
  if constexpr (Kind == kind::up) got = __shfl_up_sync(all, mine, static_cast<unsigned>(argument), width);
  if constexpr (Kind == kind::down) got = __shfl_down_sync(all, mine, static_cast<unsigned>(argument), width);
  if constexpr (Kind == kind::exclusive_or) got = __shfl_xor_sync(all, mine, argument, width);
  out[threadIdx.x] = got;
}

// The lane that is read, from the pseudo code of shfl in the PTX manual: c = (32 - width) << 8 | 0x1f, or 0 for up.
int source_lane(kind k, int lane, int b, int width) {
  const int segment = 32 - width;
  const int clamp = k == kind::up ? 0 : 0x1f;
  const int most = (lane & segment) | (clamp & ~segment), least = lane & segment;
  int j = 0;
  bool p = false;
  switch (k) {
    case kind::up: j = lane - b, p = j >= most; break;
    case kind::down: j = lane + b, p = j <= most; break;
    case kind::exclusive_or: j = lane ^ b, p = j <= most; break;
    case kind::index: j = least | (b & ~segment), p = j <= most; break;
  }
  return p ? j : lane;
}

template <kind Kind, class T>
void check_shuffle() {
  const device_vector<T> out(32);
  for (const int width : {1, 2, 4, 8, 16, 32})
    for (int argument = 0; argument < 32; argument += Kind == kind::index ? 5 : 1) {
      INFO("width " << width << ", argument " << argument);
      REQUIRE_THAT(fault_of({}, shuffle<Kind, T>, out.data(), argument, width), Equals(""));
      const std::vector<T> have = out.host();
      for (int lane = 0; lane < 32; ++lane)
        CHECK(have[static_cast<std::size_t>(lane)] == static_cast<T>(100 + source_lane(Kind, lane, argument, width)));
    }
}

__global__ void votes(const int* predicates, unsigned* out) {
  const unsigned i = threadIdx.x;
  const int mine = predicates[i];
  const unsigned mask = i < 8 ? 0xffu : 0xffffff00u;
  out[5 * i] = __ballot_sync(all, mine);
  out[5 * i + 1] = static_cast<unsigned>(__any_sync(mask, mine));
  out[5 * i + 2] = static_cast<unsigned>(__all_sync(mask, mine));
  out[5 * i + 3] = __ballot_sync(mask, mine == 0);
  out[5 * i + 4] = i % 2 == 0 ? __ballot_sync(0x55555555u, 1) : __ballot_sync(0xaaaaaaaau, 1);
}

}  // namespace

TEST_CASE("emulation: shuffles", "[cuda]") {
  check_shuffle<kind::index, int>();
  check_shuffle<kind::up, float>();
  check_shuffle<kind::down, double>();
  check_shuffle<kind::exclusive_or, unsigned>();
}

TEST_CASE("emulation: votes", "[cuda]") {
  std::vector<int> p(32);
  unsigned ballot = 0;
  for (std::size_t i = 0; i < 32; ++i) {
    p[i] = i < 8 || i % 3 == 0 ? 4 : 0;
    ballot |= p[i] ? 1u << i : 0u;
  }
  const device_vector<int> given(p);
  const device_vector<unsigned> out(32 * 5);
  REQUIRE_THAT(fault_of({}, votes, given.data(), out.data()), Equals(""));
  const std::vector<unsigned> have = out.host();
  for (std::size_t i = 0; i < 32; ++i) {
    const unsigned mask = i < 8 ? 0xffu : 0xffffff00u;
    CHECK(have[5 * i] == ballot);
    CHECK(have[5 * i + 1] == 1);
    CHECK(have[5 * i + 2] == (i < 8 ? 1 : 0));
    CHECK(have[5 * i + 3] == (~ballot & mask));
    CHECK(have[5 * i + 4] == (i % 2 == 0 ? 0x55555555u : 0xaaaaaaaau));
  }
}

namespace {

__global__ void bit_functions(const unsigned* x, unsigned* out) {
  const unsigned v = x[threadIdx.x];
  unsigned* to = out + 6 * threadIdx.x;
  to[0] = static_cast<unsigned>(__popc(v));
  to[1] = static_cast<unsigned>(__clz(static_cast<int>(v)));
  to[2] = static_cast<unsigned>(__ffs(static_cast<int>(v)));
  to[3] = __byte_perm(v, ~v, 0x7531);
  to[4] = __umulhi(v, v);
  to[5] = __brev(v);
}

template <class T>
__global__ void atomics(T* device, T* out) {
  __shared__ T shared[5];
  const T i = static_cast<T>(threadIdx.x);
  if (threadIdx.x < 5) shared[threadIdx.x] = device[threadIdx.x];
  __syncthreads();
  for (T* at : {device, static_cast<T*>(shared)}) {
    out[threadIdx.x] = atomicAdd(at, T(1));
    atomicMax(at + 1, i);
    atomicMin(at + 2, i);
    atomicExch(at + 3, i);
    if (i == 3) atomicCAS(at + 4, T(5), T(9)), atomicCAS(at + 4, T(5), T(10));
  }
  __syncthreads();
  if (threadIdx.x < 5) out[64 + threadIdx.x] = shared[threadIdx.x];
}

template <class T>
void check_atomics() {
  const device_vector<T> device(std::vector<T>{10, 20, 30, 40, 5}), out(64 + 5);
  REQUIRE_THAT(fault_of({.block = 64}, atomics<T>, device.data(), out.data()), Equals(""));
  std::vector<T> before = out.host();
  const std::vector<T> shared(before.begin() + 64, before.end());
  for (const std::vector<T>& have : {device.host(), shared}) {
    CHECK(have[0] == 74);
    CHECK(have[1] == 63);
    CHECK(have[2] == 0);
    CHECK(have[3] < 64);
    CHECK(have[4] == 9);
  }
  // Each thread saw another value.
  std::sort(before.begin(), before.begin() + 64);
  for (std::size_t i = 0; i < 64; ++i) CHECK(before[i] == static_cast<T>(10 + i));
}

__global__ void float_atomics(float* sum, double* wide) {
  atomicAdd(sum, 0.5f);
  atomicAdd(wide, 0.25);
}

}  // namespace

TEST_CASE("emulation: functions of bits", "[cuda]") {
  const std::vector<unsigned> x{0, 1, 0x80000000u, 0x00f0ff00u, 0xffffffffu, 0x12345678u};
  const device_vector<unsigned> given(x), out(6 * x.size());
  REQUIRE_THAT(fault_of({.block = 6}, bit_functions, given.data(), out.data()), Equals(""));
  const std::vector<unsigned> have = out.host();
  for (std::size_t k = 0; k < x.size(); ++k) {
    unsigned ones = 0, first = 0, zeros = 32, turned = 0;
    for (unsigned b = 0; b < 32; ++b) {
      if (!(x[k] >> b & 1)) continue;
      ++ones;
      if (first == 0) first = b + 1;
      zeros = 31 - b;
      turned |= 1u << (31 - b);
    }
    CHECK(have[6 * k] == ones);
    CHECK(have[6 * k + 1] == zeros);
    CHECK(have[6 * k + 2] == first);
    const auto byte = [&](unsigned i) { return (i < 4 ? x[k] >> (8 * i) : ~x[k] >> (8 * (i - 4))) & 0xffu; };
    CHECK(have[6 * k + 3] == (byte(1) | byte(3) << 8 | byte(5) << 16 | byte(7) << 24));
    CHECK(have[6 * k + 4] == static_cast<unsigned>(std::uint64_t{x[k]} * x[k] >> 32));
    CHECK(have[6 * k + 5] == turned);
  }
}

TEST_CASE("emulation: atomic operations", "[cuda]") {
  check_atomics<int>();
  check_atomics<unsigned>();
  check_atomics<unsigned long long>();
  const device_vector<float> sum(std::vector<float>{1});
  const device_vector<double> wide(std::vector<double>{1});
  REQUIRE_THAT(fault_of({.grid = 3, .block = 50}, float_atomics, sum.data(), wide.data()), Equals(""));
  CHECK(sum.host()[0] == 76);
  CHECK(wide.host()[0] == 38.5);
}

namespace {

// A matrix [32, 8] of 16-bit numbers in shared memory, whose rows lie `pitch` apart.
template <int Count, bool Transposed>
__global__ void load(const std::uint16_t* x, unsigned* out) {
  constexpr int pitch = 24;
  MLKIT_SHARED_MEMORY(std::uint16_t, rows);
  const int i = static_cast<int>(threadIdx.x);
  for (int j = 0; j < 8; ++j) rows[i * pitch + j] = x[8 * i + j];
  __syncthreads();
  std::uint32_t r[Count];
  if constexpr (Count == 4 && !Transposed) ptx::ldmatrix_x4(r, rows + i * pitch);
  if constexpr (Count == 4 && Transposed) ptx::ldmatrix_x4_trans(r, rows + i * pitch);
  if constexpr (Count == 2 && !Transposed) ptx::ldmatrix_x2(r, rows + i % 16 * pitch);
  if constexpr (Count == 2 && Transposed) ptx::ldmatrix_x2_trans(r, rows + i % 16 * pitch);
  for (int k = 0; k < Count; ++k) out[Count * i + k] = r[k];
}

template <int Count, bool Transposed>
void check_load() {
  std::vector<std::uint16_t> x(256);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<std::uint16_t>(1000 + i);
  const device_vector<std::uint16_t> given(x);
  const device_vector<unsigned> out(32 * Count);
  REQUIRE_THAT(fault_of({.shared = 32 * 48}, load<Count, Transposed>, given.data(), out.data()), Equals(""));
  const std::vector<unsigned> have = out.host();
  // "Each thread holds, of row lane / 4, the elements 2 (lane % 4) and 2 (lane % 4) + 1"; the row of lane 8 m + i is
  // row i of matrix m.
  for (std::size_t lane = 0; lane < 32; ++lane)
    for (std::size_t m = 0; m < Count; ++m)
      for (std::size_t e = 0; e < 2; ++e) {
        const std::size_t row = lane / 4, col = 2 * (lane % 4) + e;
        const std::uint16_t want = Transposed ? x[8 * (8 * m + col) + row] : x[8 * (8 * m + row) + col];
        CHECK((have[Count * lane + m] >> (16 * e) & 0xffffu) == want);
      }
}

__global__ void load_beside(int how) {
  MLKIT_SHARED_MEMORY(std::uint16_t, rows);
  for (unsigned i = threadIdx.x; i < 256; i += 32) rows[i] = 1;
  if (how != 1) __syncwarp();
  std::uint32_t r[4];
  ptx::ldmatrix_x4(r, rows + 8 * threadIdx.x + (how == 2 ? 4 : 0) + (how == 3 ? 8 : 0));
}

}  // namespace

TEST_CASE("emulation: ldmatrix", "[cuda]") {
  check_load<4, false>();
  check_load<4, true>();
  check_load<2, false>();
  check_load<2, true>();
  CHECK_THAT(fault_of({.shared = 512}, load_beside, 0), Equals(""));
  CHECK_THAT(fault_of({.shared = 512}, load_beside, 2), Contains("is not at a multiple of 16 in shared memory"));
  CHECK_THAT(fault_of({.shared = 512}, load_beside, 3),
             Contains("thread (31, 0, 0): reads 16 bytes out of bounds: offset 512"));
  REQUIRE_WATCHED();
  CHECK_THAT(fault_of({.shared = 512}, load_beside, 1), Contains("no barrier lies between"));
}

namespace {

struct bf16_numbers {
  static constexpr int depth = 16;
  static std::uint32_t bits(float x) { return mlkit::bf16(x).bits; }
  static void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) { ptx::mma_bf16(d, a, b); }
};
struct f16_numbers {
  static constexpr int depth = 16;
  static std::uint32_t bits(float x) { return mlkit::f16(x).bits; }
  static void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) { ptx::mma_f16(d, a, b); }
};
struct tf32_numbers {
  static constexpr int depth = 8;
  static std::uint32_t bits(float x) { return __float_as_uint(x); }
  static void mma(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) { ptx::mma_tf32(d, a, b); }
};

template <class Numbers>
__global__ void multiply(const std::uint32_t* a, const std::uint32_t* b, float* d) {
  const unsigned i = threadIdx.x;
  const std::uint32_t ra[4] = {a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3]}, rb[2] = {b[2 * i], b[2 * i + 1]};
  float rd[4] = {d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]};
  Numbers::mma(rd, ra, rb);
  for (unsigned k = 0; k < 4; ++k) d[4 * i + k] = rd[k];
}

// The fragments as the tables of the PTX manual have them, for mma.m16n8k16 of 16-bit types and mma.m16n8k8 of tf32.
template <class Numbers>
void check_multiply() {
  constexpr int depth = Numbers::depth;
  std::mt19937 random(3);
  const auto small = [&] {
    return static_cast<float>(static_cast<int>(random() % 33) - 16) / 8;
  };  // exact in all types
  float a[16][depth], b[depth][8], c[16][8];
  for (auto& row : a)
    for (auto& x : row) x = small();
  for (auto& row : b)
    for (auto& x : row) x = small();
  for (auto& row : c)
    for (auto& x : row) x = small();
  std::vector<std::uint32_t> ra(128), rb(64);
  std::vector<float> rd(128);
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;
    const auto at = [&](int registers, int i) { return static_cast<std::size_t>(registers * lane + i); };
    if (depth == 16) {
      for (int i = 0; i < 8; ++i) {  // a0 to a7
        const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
        const int col = (in_group * 2) + (i & 1) + (i >= 4 ? 8 : 0);
        ra[at(4, i / 2)] |= Numbers::bits(a[row][col]) << (16 * (i % 2));
      }
      for (int i = 0; i < 4; ++i) {  // b0 to b3
        const int row = (in_group * 2) + (i & 1) + (i >= 2 ? 8 : 0);
        rb[at(2, i / 2)] |= Numbers::bits(b[row][group]) << (16 * (i % 2));
      }
    } else {
      for (int i = 0; i < 4; ++i) {
        const int row = (i == 0 || i == 2) ? group : group + 8;
        const int col = (i < 2) ? in_group : in_group + 4;
        ra[at(4, i)] = Numbers::bits(a[row][col]);
      }
      for (int i = 0; i < 2; ++i) rb[at(2, i)] = Numbers::bits(b[i == 0 ? in_group : in_group + 4][group]);
    }
    for (int i = 0; i < 4; ++i) rd[at(4, i)] = c[i < 2 ? group : group + 8][in_group * 2 + (i & 1)];
  }
  const device_vector<std::uint32_t> da(ra), db(rb);
  const device_vector<float> dd(rd);
  REQUIRE_THAT(fault_of({}, multiply<Numbers>, da.data(), db.data(), dd.data()), Equals(""));
  const std::vector<float> have = dd.host();
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? lane / 4 : lane / 4 + 8, col = lane % 4 * 2 + (i & 1);
      float want = c[row][col];
      for (int k = 0; k < depth; ++k) want += a[row][k] * b[k][col];
      CHECK(have[static_cast<std::size_t>(4 * lane + i)] == want);
    }
}

}  // namespace

TEST_CASE("emulation: mma", "[cuda]") {
  check_multiply<bf16_numbers>();
  check_multiply<f16_numbers>();
  check_multiply<tf32_numbers>();
}

TEST_CASE("emulation: conversions", "[cuda]") {
  // All f16, and floats around the points where rounding turns.
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = mlkit::f16::from_bits(static_cast<std::uint16_t>(bits));
    const float wide = ptx::widen_f16(0xabcd0000u | bits);
    if (std::isnan(static_cast<float>(half))) {
      if (!std::isnan(wide)) FAIL("f16 " << bits);
      continue;
    }
    if (wide != static_cast<float>(half) || ptx::pack_f16(wide, 1) != (0x3c000000u | bits)) FAIL("f16 " << bits);
  }
  std::mt19937 random(5);
  for (int i = 0; i < 100000; ++i) {
    const float x = __uint_as_float(static_cast<unsigned>(random()));
    if (std::isnan(x)) continue;
    if (ptx::pack_bf16(2, x) != (std::uint32_t{mlkit::bf16(x).bits} << 16 | 0x4000u)) FAIL("bf16 of " << x);
    if (ptx::pack_f16(x, 0) != mlkit::f16(x).bits) FAIL("f16 of " << x);
    const float t = __uint_as_float(ptx::to_tf32(x));
    // The nearest with 10 bits of mantissa, of two the one that is larger.
    if (std::isfinite(x) && std::isfinite(t) && std::fabs(x) > 1e-30f) {
      const float unit = std::ldexp(1.0f, std::ilogb(x) - 10);
      const float want = std::copysign(std::floor(std::fabs(x) / unit + 0.5f) * unit, x);
      if (t != want) FAIL("tf32 of " << x << ": " << t << ", not " << want);
    }
  }
  CHECK(std::isnan(__uint_as_float(ptx::to_tf32(std::numeric_limits<float>::quiet_NaN()))));
  CHECK(ptx::pack_f16(65519.0f, 65520.0f) == 0x7c007bffu);
}

namespace {

// Warps 0 and 1 meet at barrier 1, warps 2 and 3 at barrier 2, three times.
__global__ void barriers(int* out) {
  __shared__ int words[2];
  const int pair = static_cast<int>(threadIdx.x) / 64, i = static_cast<int>(threadIdx.x) % 64;
  for (int round = 0; round < 3; ++round) {
    if (i == 63 - round) words[pair] = 10 * pair + round;
    ptx::named_barrier(1 + pair, 64);
    out[(round * 2 + pair) * 64 + i] = words[pair];
    ptx::named_barrier(1 + pair, 64);
  }
}

__global__ void indices(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned all_threads = blockDim.x * blockDim.y * blockDim.z;
  int* to = out + 6 * (block * all_threads + thread);
  to[0] = static_cast<int>(blockIdx.x);
  to[1] = static_cast<int>(blockIdx.y);
  to[2] = static_cast<int>(blockIdx.z);
  to[3] = static_cast<int>(threadIdx.x);
  to[4] = static_cast<int>(threadIdx.y);
  to[5] = static_cast<int>(threadIdx.z);
}

// The block that ends last adds up what all have written.
__global__ void last_block(int* parts, unsigned* ended, int* out) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
    __threadfence();
    last = atomicAdd(ended, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  int sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += parts[b];
  *out = sum;
}

}  // namespace

TEST_CASE("emulation: named barriers", "[cuda]") {
  const device_vector<int> out(3 * 128);
  for (const auto order : {cuda_emulation::turns::forward, cuda_emulation::turns::backward}) {
    cuda_emulation::take_turns(order);
    REQUIRE_THAT(fault_of({.block = 128}, barriers, out.data()), Equals(""));
    const std::vector<int> have = out.host();
    for (int i = 0; i < 3 * 128; ++i) CHECK(have[static_cast<std::size_t>(i)] == 10 * (i / 64 % 2) + i / 128);
  }
  cuda_emulation::take_turns(cuda_emulation::turns::forward);
}

TEST_CASE("emulation: grids and blocks of three dimensions, in either order", "[cuda]") {
  const dim3 grid(2, 3, 2), block(5, 2, 3);
  const device_vector<int> out(12 * 30 * 6), parts(7), result(1);
  const device_vector<unsigned> ended(1);
  for (const auto order : {cuda_emulation::turns::forward, cuda_emulation::turns::backward}) {
    cuda_emulation::take_turns(order);
    REQUIRE_THAT(fault_of({.grid = grid, .block = block}, indices, out.data()), Equals(""));
    const std::vector<int> have = out.host();
    std::size_t at = 0;
    for (int bz = 0; bz < 2; ++bz)
      for (int by = 0; by < 3; ++by)
        for (int bx = 0; bx < 2; ++bx)
          for (int tz = 0; tz < 3; ++tz)
            for (int ty = 0; ty < 2; ++ty)
              for (int tx = 0; tx < 5; ++tx)
                for (const int want : {bx, by, bz, tx, ty, tz}) CHECK(have[at++] == want);
    REQUIRE(cudaMemset(ended.data(), 0, 4) == cudaSuccess);
    REQUIRE_THAT(fault_of({.grid = 7}, last_block, parts.data(), ended.data(), result.data()), Equals(""));
    CHECK(result.host()[0] == 28);
  }
  cuda_emulation::take_turns(cuda_emulation::turns::forward);
}
