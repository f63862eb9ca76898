// cub::BlockScan: each warp by shuffles, then each warp after those before it.
#pragma once

#include "../warp/warp_scan.cuh"

namespace cub {

enum BlockScanAlgorithm { BLOCK_SCAN_RAKING, BLOCK_SCAN_RAKING_MEMOIZE, BLOCK_SCAN_WARP_SCANS };

template <class T, int X, BlockScanAlgorithm = BLOCK_SCAN_WARP_SCANS, int Y = 1, int Z = 1>
class BlockScan {
 public:
  static constexpr int threads = X * Y * Z, warps = (threads + 31) / 32;
  struct TempStorage {
    T of_warps[static_cast<std::size_t>(warps)];
    T prefix;
  };

  explicit BlockScan(TempStorage& storage)
      : storage_(storage),
        thread_(static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z))) {}

  template <class F>
  void InclusiveScan(T in, T& out, F f) {
    T all = in;
    InclusiveScan(in, out, f, all);
  }
  /// `aggregate` is of the whole block, and every thread's.
  template <class F>
  void InclusiveScan(T in, T& out, F f, T& aggregate) {
    T before = in;
    out = scan(in, before, f, aggregate);
  }
  /// `prefix(aggregate)` is called by the first warp; what it gives its lane 0 goes before all.
  template <class F, class Prefix>
    requires requires(Prefix& prefix, const T& x) { prefix(x); }
  void InclusiveScan(T in, T& out, F f, Prefix& prefix) {
    T before = in, aggregate = in;
    const T inclusive = scan(in, before, f, aggregate);
    out = f(from_prefix(prefix, aggregate), inclusive);
  }
  template <class F>
  void ExclusiveScan(T in, T& out, T initial, F f) {
    T all = in;
    ExclusiveScan(in, out, initial, f, all);
  }
  /// `aggregate` is without `initial`.
  template <class F>
  void ExclusiveScan(T in, T& out, T initial, F f, T& aggregate) {
    T before = in;
    (void)scan(in, before, f, aggregate);
    out = thread_ == 0 ? initial : f(initial, before);
  }
  /// What thread 0 gets has no meaning.
  template <class F>
  void ExclusiveScan(T in, T& out, F f) {
    T all = in;
    ExclusiveScan(in, out, f, all);
  }
  template <class F>
    requires(!requires(F & f, const T& x) { f(x); })
  void ExclusiveScan(T in, T& out, F f, T& aggregate) {
    T before = in;
    (void)scan(in, before, f, aggregate);
    out = before;
  }
  template <class F, class Prefix>
    requires requires(Prefix& prefix, const T& x) { prefix(x); }
  void ExclusiveScan(T in, T& out, F f, Prefix& prefix) {
    T before = in, aggregate = in;
    (void)scan(in, before, f, aggregate);
    const T first = from_prefix(prefix, aggregate);
    out = thread_ == 0 ? first : f(first, before);
  }

  template <int Items, class F>
  void InclusiveScan(T (&in)[Items], T (&out)[Items], F f) {
    T all = in[0];
    InclusiveScan(in, out, f, all);
  }
  template <int Items, class F>
  void InclusiveScan(T (&in)[Items], T (&out)[Items], F f, T& aggregate) {
    T mine = in[0];
    for (int i = 1; i < Items; ++i) mine = f(mine, in[i]);
    T before = mine;
    (void)scan(mine, before, f, aggregate);
    T sum = thread_ == 0 ? in[0] : f(before, in[0]);
    for (int i = 0; i < Items; ++i) {
      if (i > 0) sum = f(sum, in[i]);
      out[i] = sum;
    }
  }
  template <int Items, class F>
  void ExclusiveScan(T (&in)[Items], T (&out)[Items], T initial, F f) {
    T all = in[0];
    ExclusiveScan(in, out, initial, f, all);
  }
  template <int Items, class F>
  void ExclusiveScan(T (&in)[Items], T (&out)[Items], T initial, F f, T& aggregate) {
    T mine = in[0];
    for (int i = 1; i < Items; ++i) mine = f(mine, in[i]);
    T before = mine;
    (void)scan(mine, before, f, aggregate);
    T sum = thread_ == 0 ? initial : f(initial, before);
    for (int i = 0; i < Items; ++i) {
      const T next = f(sum, in[i]);
      out[i] = sum;
      sum = next;
    }
  }

  void InclusiveSum(T in, T& out) { InclusiveScan(in, out, emulated::plus{}); }
  void InclusiveSum(T in, T& out, T& aggregate) { InclusiveScan(in, out, emulated::plus{}, aggregate); }
  void ExclusiveSum(T in, T& out) { ExclusiveScan(in, out, T{}, emulated::plus{}); }
  void ExclusiveSum(T in, T& out, T& aggregate) { ExclusiveScan(in, out, T{}, emulated::plus{}, aggregate); }
  template <int Items>
  void InclusiveSum(T (&in)[Items], T (&out)[Items]) {
    InclusiveScan(in, out, emulated::plus{});
  }
  template <int Items>
  void ExclusiveSum(T (&in)[Items], T (&out)[Items]) {
    ExclusiveScan(in, out, T{}, emulated::plus{});
  }

 private:
  // The inclusive scan; `before` becomes the exclusive one, where there is one.
  template <class F>
  T scan(T in, T& before, F f, T& aggregate) {
    const int warp = thread_ / 32, lane = thread_ % 32;
    T inclusive = in;
    typename WarpScan<T>::TempStorage nothing;
    WarpScan<T>(nothing).InclusiveScan(in, inclusive, f);
    const unsigned mask = emulated::group_mask(32);
    before = emulated::by_words(inclusive, [&](unsigned word) { return __shfl_up_sync(mask, word, 1u); });
    if (lane == 31 || thread_ == threads - 1) storage_.of_warps[warp] = inclusive;
    __syncthreads();
    T sum = storage_.of_warps[0];
    T prefix = sum;  // of the warps before this one
    for (int i = 1; i < warps; ++i) {
      if (i == warp) prefix = sum;
      sum = f(sum, storage_.of_warps[i]);
    }
    aggregate = sum;
    if (warp > 0) {
      before = lane == 0 ? prefix : f(prefix, before);
      inclusive = f(prefix, inclusive);
    }
    return inclusive;
  }

  template <class Prefix>
  T from_prefix(Prefix& prefix, const T& aggregate) {
    if (thread_ < 32) {
      const T first = prefix(aggregate);
      if (thread_ == 0) storage_.prefix = first;
    }
    __syncthreads();
    return storage_.prefix;
  }

  TempStorage& storage_;
  int thread_;
};

}  // namespace cub
