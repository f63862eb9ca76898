// The emulated collectives of CUB, by loops, with an operator that does not commute.
#include <cub/cub.cuh>

#include <random>

#include "launch.hpp"

using namespace emulated;
using Catch::Matchers::Equals;

namespace {

// x -> a x + b, modulo 2^32; the later of two goes second.
struct map {
  unsigned a, b;
  friend bool operator==(const map&, const map&) = default;
};
struct then {
  map operator()(const map& first, const map& second) const {
    return {first.a * second.a, second.a * first.b + second.b};
  }
};

template <int X, int Y, class T, class F>
__global__ void block_reduce(const T* x, T* out, F f, int valid) {
  using reduce = cub::BlockReduce<T, X, cub::BLOCK_REDUCE_WARP_REDUCTIONS, Y>;
  __shared__ typename reduce::TempStorage storage;
  const unsigned i = threadIdx.x + static_cast<unsigned>(X) * threadIdx.y;
  const T all = reduce(storage).Reduce(x[i], f, valid);
  if (i == 0) *out = all;
}

struct from_above {
  map carried;
  int* calls;
  map operator()(const map& aggregate) {
    const map before = carried;
    carried = then{}(carried, aggregate);
    if (threadIdx.x == 0) ++*calls;
    return before;
  }
};

template <int X>
__global__ void block_scan(const map* x, map* out, int* calls) {
  using scan = cub::BlockScan<map, X>;
  __shared__ typename scan::TempStorage storage;
  const unsigned i = threadIdx.x;
  const map first{3, 1};
  map aggregate{};
  scan(storage).InclusiveScan(x[i], out[i], then{}, aggregate);
  out[X + i] = aggregate;
  __syncthreads();
  scan(storage).ExclusiveScan(x[i], out[2 * X + i], first, then{});
  __syncthreads();
  map two[2] = {x[2 * i], x[2 * i + 1]}, done[2];
  scan(storage).InclusiveScan(two, done, then{});
  out[3 * X + 2 * i] = done[0], out[3 * X + 2 * i + 1] = done[1];
  __syncthreads();
  scan(storage).ExclusiveScan(two, done, first, then{});
  out[5 * X + 2 * i] = done[0], out[5 * X + 2 * i + 1] = done[1];
  __syncthreads();
  from_above prefix{first, calls};
  map result{};
  scan(storage).InclusiveScan(x[i], result, then{}, prefix);
  out[7 * X + i] = result;
  __syncthreads();
  scan(storage).ExclusiveScan(x[i], result, then{}, prefix);
  out[8 * X + i] = result;
}

template <int Width>
__global__ void warp_collectives(const map* x, map* out) {
  __shared__ typename cub::WarpReduce<map, Width>::TempStorage reduce_storage[2];
  __shared__ typename cub::WarpScan<map, Width>::TempStorage scan_storage[2];
  const unsigned i = threadIdx.x;
  out[i] = cub::WarpReduce<map, Width>(reduce_storage[0]).Reduce(x[i], then{});
  cub::WarpScan<map, Width>(scan_storage[0]).InclusiveScan(x[i], out[64 + i], then{});
  cub::WarpScan<map, Width>(scan_storage[0]).ExclusiveScan(x[i], out[128 + i], map{3, 1}, then{});
}

std::vector<map> some_maps(std::size_t count) {
  std::mt19937 random(7);
  std::vector<map> maps(count);
  for (auto& m : maps) m = {static_cast<unsigned>(random()) | 1u, static_cast<unsigned>(random())};
  return maps;
}

map reduced(const std::vector<map>& x, std::size_t from, std::size_t to) {
  map all = x[from];
  for (std::size_t i = from + 1; i < to; ++i) all = then{}(all, x[i]);
  return all;
}

template <int X, int Y>
void check_block_reduce() {
  constexpr std::size_t threads = X * Y;
  const std::vector<map> x = some_maps(threads);
  const device_vector<map> given(x), out(1);
  for (const std::size_t valid : {threads, threads - 1, threads / 2 + 1, std::size_t{1}}) {
    INFO("threads " << threads << ", valid " << valid);
    REQUIRE_THAT(fault_of({.block = dim3(X, Y)}, block_reduce<X, Y, map, then>, given.data(), out.data(), then{},
                          static_cast<int>(valid)),
                 Equals(""));
    CHECK(out.host()[0] == reduced(x, 0, valid));
  }
}

template <int X>
void check_block_scan() {
  const std::vector<map> x = some_maps(2 * X);
  const device_vector<map> given(x), out(9 * X);
  const device_vector<int> calls(std::vector<int>{0});
  REQUIRE_THAT(fault_of({.block = X}, block_scan<X>, given.data(), out.data(), calls.data()), Equals(""));
  const std::vector<map> have = out.host();
  CHECK(calls.host()[0] == 2);
  const map first{3, 1};
  const map after = then{}(first, reduced(x, 0, X));
  const auto behind = [&](const map& start, std::size_t i) {  // start, then the first i
    return i == 0 ? start : then{}(start, reduced(x, 0, i));
  };
  INFO("threads " << X);
  for (std::size_t i = 0; i < X; ++i) {
    CHECK(have[i] == reduced(x, 0, i + 1));
    CHECK(have[X + i] == reduced(x, 0, X));
    CHECK(have[2 * X + i] == behind(first, i));
    CHECK(have[7 * X + i] == behind(first, i + 1));
    CHECK(have[8 * X + i] == behind(after, i));
  }
  for (std::size_t i = 0; i < 2 * X; ++i) {
    CHECK(have[3 * X + i] == reduced(x, 0, i + 1));
    CHECK(have[5 * X + i] == behind(first, i));
  }
}

template <int Width>
void check_warp() {
  const std::vector<map> x = some_maps(64);
  const device_vector<map> given(x), out(192);
  REQUIRE_THAT(fault_of({.block = 64}, warp_collectives<Width>, given.data(), out.data()), Equals(""));
  const std::vector<map> have = out.host();
  for (std::size_t i = 0; i < 64; ++i) {
    const std::size_t group = i / Width * Width;
    if (i == group) CHECK(have[i] == reduced(x, group, group + Width));
    CHECK(have[64 + i] == reduced(x, group, i + 1));
    CHECK(have[128 + i] == (i == group ? map{3, 1} : then{}(map{3, 1}, reduced(x, group, i))));
  }
}

}  // namespace

TEST_CASE("emulation: cub::BlockReduce", "[cuda]") {
  check_block_reduce<32, 1>();
  check_block_reduce<128, 1>();
  check_block_reduce<48, 1>();
  check_block_reduce<33, 3>();
  check_block_reduce<1024, 1>();
}

TEST_CASE("emulation: cub::BlockScan", "[cuda]") {
  check_block_scan<32>();
  check_block_scan<96>();
  check_block_scan<256>();
  check_block_scan<50>();
}

TEST_CASE("emulation: cub::WarpReduce and cub::WarpScan", "[cuda]") {
  check_warp<32>();
  check_warp<8>();
  check_warp<2>();
}
