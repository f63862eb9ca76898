// What the collectives are made of. They are device code like any other: what they touch in their temporary storage is
// watched, so that a caller who forgets the barrier between two uses of it is found.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

namespace cub {

struct NullType {};

namespace emulated {

/// A shuffle of any type that can be copied by bytes, word by word as CUB does it.
template <class T, class Shuffle>
T by_words(const T& value, Shuffle shuffle) {
  static_assert(std::is_trivially_copyable_v<T>);
  constexpr std::size_t words = (sizeof(T) + 3) / 4;
  unsigned bits[words] = {};
  std::memcpy(bits, &value, sizeof(T));
  for (auto& word : bits) word = shuffle(word);
  T result = value;
  std::memcpy(&result, bits, sizeof(T));
  return result;
}

struct plus {
  template <class T>
  T operator()(const T& a, const T& b) const {
    return static_cast<T>(a + b);
  }
};

/// The lanes of a group of `Width` lanes; where the block ends within a warp, those that there are.
inline unsigned group_mask(int width) {
  const unsigned lane = cuda_emulation::lane_index();
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  const unsigned warp = (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) / 32;
  const unsigned there = threads - 32 * warp >= 32 ? 0xffffffffu : (1u << (threads - 32 * warp)) - 1;
  const unsigned all = width == 32 ? 0xffffffffu
                                   : ((1u << width) - 1)
                                         << (lane / static_cast<unsigned>(width) * static_cast<unsigned>(width));
  return all & there;
}

}  // namespace emulated
}  // namespace cub
