// cub::WarpScan.
#pragma once

#include "../util.cuh"

namespace cub {

template <class T, int Width = 32>
class WarpScan {
 public:
  struct TempStorage {};

  explicit WarpScan(TempStorage&) {}

  template <class F>
  void InclusiveScan(T in, T& out, F f) {
    const unsigned mask = emulated::group_mask(Width);
    const int lane = static_cast<int>(cuda_emulation::lane_index()) % Width;
    for (int offset = 1; offset < Width; offset *= 2) {
      const T other = emulated::by_words(
          in, [&](unsigned word) { return __shfl_up_sync(mask, word, static_cast<unsigned>(offset), Width); });
      if (lane >= offset) in = f(other, in);
    }
    out = in;
  }
  template <class F>
  void InclusiveScan(T in, T& out, F f, T& aggregate) {
    InclusiveScan(in, out, f);
    const unsigned mask = emulated::group_mask(Width);
    aggregate = emulated::by_words(out, [&](unsigned word) { return __shfl_sync(mask, word, Width - 1, Width); });
  }
  /// The first lane of each group gets `initial`.
  template <class F>
  void ExclusiveScan(T in, T& out, T initial, F f) {
    T inclusive = in;
    InclusiveScan(in, inclusive, f);
    const unsigned mask = emulated::group_mask(Width);
    const T before =
        emulated::by_words(inclusive, [&](unsigned word) { return __shfl_up_sync(mask, word, 1u, Width); });
    out = cuda_emulation::lane_index() % static_cast<unsigned>(Width) == 0 ? initial : f(initial, before);
  }
  /// What the first lane of each group gets has no meaning.
  template <class F>
  void ExclusiveScan(T in, T& out, F f) {
    T inclusive = in;
    InclusiveScan(in, inclusive, f);
    const unsigned mask = emulated::group_mask(Width);
    out = emulated::by_words(inclusive, [&](unsigned word) { return __shfl_up_sync(mask, word, 1u, Width); });
  }
  void InclusiveSum(T in, T& out) { InclusiveScan(in, out, emulated::plus{}); }
  void ExclusiveSum(T in, T& out) { ExclusiveScan(in, out, T{}, emulated::plus{}); }
};

}  // namespace cub
