// cub::WarpReduce.
#pragma once

#include "../util.cuh"

namespace cub {

/// The result is the first lane's of each group of `Width`; what others get has no meaning.
template <class T, int Width = 32>
class WarpReduce {
 public:
  struct TempStorage {};

  explicit WarpReduce(TempStorage&) {}

  template <class F>
  T Reduce(T value, F f) {
    return Reduce(value, f, Width);
  }
  /// Of the first `valid` lanes.
  template <class F>
  T Reduce(T value, F f, int valid) {
    const unsigned mask = emulated::group_mask(Width);
    const int lane = static_cast<int>(cuda_emulation::lane_index()) % Width;
    for (int offset = 1; offset < Width; offset *= 2) {
      const T other = emulated::by_words(
          value, [&](unsigned word) { return __shfl_down_sync(mask, word, static_cast<unsigned>(offset), Width); });
      if (lane + offset < Width && lane + offset < valid) value = f(value, other);
    }
    return value;
  }
  T Sum(T value) { return Reduce(value, emulated::plus{}); }
  T Sum(T value, int valid) { return Reduce(value, emulated::plus{}, valid); }
};

}  // namespace cub
