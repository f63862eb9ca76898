// What the lanes of a warp do together, but for the tensor cores; atomic operations.
#include <mlkit_cuda_emulation/device.hpp>

#include <algorithm>
#include <cstring>

#include "internal.hpp"

namespace cuda_emulation {

// From the manual of __shfl_sync: lanes form groups of `width`; a lane that would be read outside of the caller's group
// gives the caller's own value.
void exchange_lanes(warp_call* const* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!lanes[lane]) continue;
    const warp_call& call = *lanes[lane];
    const int width = call.width, argument = call.argument & 0xff;
    if (width < 1 || width > 32 || (width & (width - 1)) != 0)
      fail([&] { return std::string(call.name) + " of width " + std::to_string(width); });
    const int group = lane / width * width;
    int source = lane;
    switch (static_cast<pick>(call.argument >> 8)) {
      case pick::index: source = group + (argument & (width - 1)); break;
      case pick::up: source = lane - argument < group ? lane : lane - argument; break;
      case pick::down: source = lane + argument >= group + width ? lane : lane + argument; break;
      case pick::exclusive_or: {
        // Lanes of groups before the caller's may be read.
        const int other = lane ^ (argument & 31);
        source = other >= group + width ? lane : other;
        break;
      }
    }
    // Of a lane that the mask does not name the GPU gives anything; here all bits are set, which is NaN, and -1.
    if (!lanes[source])
      std::memset(call.out, 0xff, call.bytes);
    else
      std::memcpy(call.out, lanes[source]->in, call.bytes);
  }
}

void vote_lanes(warp_call* const* lanes) {
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (lanes[lane] && lanes[lane]->argument) ballot |= 1u << lane;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (lanes[lane]) std::memcpy(lanes[lane]->out, &ballot, sizeof ballot);
}

unsigned vote(const char* name, unsigned mask, int predicate, int line, const char* file) {
  unsigned ballot = 0;
  warp_call call{.name = name, .mask = mask, .evaluate = vote_lanes, .out = &ballot, .argument = predicate != 0};
  meet(call, line, file);
  return ballot;
}

namespace {

template <class T, class F>
T change(T* p, F f) {
  if (now.on_fiber) touch_atomically(p, sizeof(T));
  // Other host threads may run kernels too.
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  using word = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  auto* const at = reinterpret_cast<word*>(p);
  word before = __atomic_load_n(at, __ATOMIC_SEQ_CST);
  while (!__atomic_compare_exchange_n(at, &before, std::bit_cast<word>(static_cast<T>(f(std::bit_cast<T>(before)))),
                                      false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return std::bit_cast<T>(before);
}

}  // namespace
}  // namespace cuda_emulation

using cuda_emulation::change;

void __syncwarp(unsigned mask, int line, const char* file) {
  cuda_emulation::warp_call call{.name = "__syncwarp", .mask = mask, .evaluate = nullptr};
  cuda_emulation::meet(call, line, file);
}

#define MLKIT_ATOMIC(T)                               \
  T atomicAdd(T* p, T value) {                        \
    return change(p, [&](T x) { return x + value; }); \
  }                                                   \
  T atomicExch(T* p, T value) {                       \
    return change(p, [&](T) { return value; });       \
  }
#define MLKIT_ATOMIC_ORDERED(T)                                       \
  T atomicMax(T* p, T value) {                                        \
    return change(p, [&](T x) { return std::max(x, value); });        \
  }                                                                   \
  T atomicMin(T* p, T value) {                                        \
    return change(p, [&](T x) { return std::min(x, value); });        \
  }                                                                   \
  T atomicCAS(T* p, T expected, T value) {                            \
    return change(p, [&](T x) { return x == expected ? value : x; }); \
  }
MLKIT_ATOMIC(int)
MLKIT_ATOMIC(unsigned)
MLKIT_ATOMIC(unsigned long long)
MLKIT_ATOMIC(float)
double atomicAdd(double* p, double value) {
  return change(p, [&](double x) { return x + value; });
}
MLKIT_ATOMIC_ORDERED(int)
MLKIT_ATOMIC_ORDERED(unsigned)
MLKIT_ATOMIC_ORDERED(unsigned long long)
#undef MLKIT_ATOMIC
#undef MLKIT_ATOMIC_ORDERED

int atomicOr(int* p, int value) {
  return change(p, [&](int x) { return x | value; });
}
unsigned atomicOr(unsigned* p, unsigned value) {
  return change(p, [&](unsigned x) { return x | value; });
}
int atomicAnd(int* p, int value) {
  return change(p, [&](int x) { return x & value; });
}
unsigned atomicAnd(unsigned* p, unsigned value) {
  return change(p, [&](unsigned x) { return x & value; });
}
