// cub::BlockReduce, by its default algorithm: each warp by shuffles, then the warps' results one after another.
#pragma once

#include "../warp/warp_reduce.cuh"

namespace cub {

enum BlockReduceAlgorithm {
  BLOCK_REDUCE_RAKING_COMMUTATIVE_ONLY,
  BLOCK_REDUCE_RAKING,
  BLOCK_REDUCE_WARP_REDUCTIONS,
};

/// The result is thread 0's; what others get has no meaning.
template <class T, int X, BlockReduceAlgorithm = BLOCK_REDUCE_WARP_REDUCTIONS, int Y = 1, int Z = 1>
class BlockReduce {
 public:
  static constexpr int threads = X * Y * Z, warps = (threads + 31) / 32;
  struct TempStorage {
    T of_warps[static_cast<std::size_t>(warps)];
  };

  explicit BlockReduce(TempStorage& storage)
      : storage_(storage),
        thread_(static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z))) {}

  template <class F>
  T Reduce(T value, F f) {
    return Reduce(value, f, threads);
  }
  template <int Items, class F>
  T Reduce(T (&values)[Items], F f) {
    T value = values[0];
    for (int i = 1; i < Items; ++i) value = f(value, values[i]);
    return Reduce(value, f);
  }
  /// Of the first `valid` threads.
  template <class F>
  T Reduce(T value, F f, int valid) {
    const int warp = thread_ / 32;
    typename WarpReduce<T>::TempStorage nothing;
    const int there = valid - 32 * warp < 32 ? valid - 32 * warp : 32;
    value = WarpReduce<T>(nothing).Reduce(value, f, there);
    if (thread_ % 32 == 0) storage_.of_warps[warp] = value;
    __syncthreads();
    if (thread_ == 0)
      for (int i = 1; i < warps && 32 * i < valid; ++i) value = f(value, storage_.of_warps[i]);
    return value;
  }
  T Sum(T value) { return Reduce(value, emulated::plus{}); }
  T Sum(T value, int valid) { return Reduce(value, emulated::plus{}, valid); }
  template <int Items>
  T Sum(T (&values)[Items]) {
    return Reduce(values, emulated::plus{});
  }

 private:
  TempStorage& storage_;
  int thread_;
};

}  // namespace cub
