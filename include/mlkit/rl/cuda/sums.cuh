// Passes over the tokens of a batch that write something for each and add something up, and what is returned of them.
#pragma once

#include "../mask.hpp"
#include "../policy_loss.hpp"
#include "device.cuh"

namespace MLKIT_NAMESPACE {

/// What a call with a mlkit::cuda returns in place of a small value: the value in device memory, where it is when the
/// stream gets there. `get()`, and the conversion to T, wait for that; nothing else does.
template <class T>
class device_value {
 public:
  using value_type = T;

  explicit device_value(const cuda& exec) : exec_(exec), memory_(exec, 1) {}

  /// In device memory, for kernels of one's own in the same stream.
  T* data() const noexcept { return memory_.data(); }
  /// Waits for the stream. Throws device_error if what was given to it has failed.
  T get() const {
    T value;
    const detail::current_device here(exec_.device());
    detail::check_cuda("device_value: cudaMemcpyAsync",
                       cudaMemcpyAsync(&value, data(), sizeof(T), cudaMemcpyDefault, exec_.stream()));
    exec_.synchronize();
    return value;
  }
  operator T() const { return get(); }

 private:
  cuda exec_;
  detail::device_memory<T> memory_;
};

}  // namespace MLKIT_NAMESPACE

namespace MLKIT_NAMESPACE::rl::detail {

using mlkit::device_value;
using mlkit::detail::device_memory;
using mlkit::detail::launch;
using mlkit::detail::launch_shape;

template <class T>
struct result_of<cuda, T> {
  using type = device_value<T>;
};

// A plane as kernels read it, which may be absent.
template <class T>
struct device_plane {
  T* data = nullptr;
  index_t row_stride = 0, col_stride = 0;

  device_plane() = default;
  device_plane(const plane<T>& p) noexcept : data(p.data), row_stride(p.row_stride), col_stride(p.col_stride) {}
  __device__ __forceinline__ explicit operator bool() const { return data != nullptr; }
  __device__ __forceinline__ T* at(index_t row, index_t col) const {
    return data + row * row_stride + col * col_stride;
  }
};

// Some tokens that a thread takes together: `count` of them from token `first` on, in the order of visiting.
struct token_run {
  index_t first, row, col, cols;
  int count;

  __device__ __forceinline__ token_run(index_t from, int n, index_t rows, index_t columns)
      : first(from), row(rows == 1 ? 0 : from / columns), col(from - row * columns), cols(columns), count(n) {}
  __device__ __forceinline__ bool in_one_row() const { return col + count <= cols; }

  template <int N, class T>
  __device__ __forceinline__ void load(const device_plane<const T>& p, T (&to)[N]) const {
    if (in_one_row()) return load_steps<N, true>(p.at(row, col), p.col_stride, count, to);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const index_t r = (first + i) / cols;
      to[i] = i < count ? *p.at(r, first + i - r * cols) : T{};
    }
  }
  template <int N, class T>
  __device__ __forceinline__ void store(const device_plane<T>& p, const T (&from)[N]) const {
    if (in_one_row()) return store_steps<N, true>(p.at(row, col), p.col_stride, count, from);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const index_t r = (first + i) / cols;
      if (i < count) *p.at(r, first + i - r * cols) = from[i];
    }
  }
  // Those alone whose bit is set.
  template <int N, class T>
  __device__ __forceinline__ void store_kept(const device_plane<T>& p, const T (&from)[N], unsigned bits) const {
    if (bits == (1u << count) - 1) return store(p, from);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const index_t r = in_one_row() ? row : (first + i) / cols;
      if (bits >> i & 1) *p.at(r, in_one_row() ? col + i : first + i - r * cols) = from[i];
    }
  }
  // Bit i says whether token i is there and counts.
  template <int N>
  __device__ __forceinline__ unsigned kept(const device_plane<const std::uint8_t>& mask) const {
    unsigned bits = (1u << count) - 1;
    if (!mask) return bits;
    if (in_one_row()) {
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        const std::uint32_t set = set_flags(load_flags<4, true>(mask.at(row, col + i), mask.col_stride, count - i));
        // Bits 0, 8, 16 and 24 side by side.
        const unsigned side = (set * 0x00204081u >> 21 & 8u) | (set & 1u) | (set >> 7 & 2u) | (set >> 14 & 4u);
        bits &= ~(0xfu << i) | (side << i);
      }
      return bits;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const index_t r = (first + i) / cols;
      if (i < count && *mask.at(r, first + i - r * cols) == 0) bits &= ~(1u << i);
    }
    return bits;
  }
};

// Tokens that a thread takes together: 16 bytes of them, and four at least.
template <class T>
inline constexpr int run_tokens = quad<T>::count > 4 ? quad<T>::count : 4;

inline constexpr int sum_threads = 256, sum_rounds = 4;

inline unsigned checked_blocks(std::string_view function, index_t blocks, index_t count, std::string_view what) {
  if (blocks > INT32_MAX) fail_shape(function, ": ", count, " ", what, " are more than a GPU takes in one call");
  return static_cast<unsigned>(blocks);
}

// The sum over a warp, in each of its threads.
__device__ __forceinline__ double sum_warp(double x) {
#pragma unroll
  for (unsigned d = warp_threads / 2; d > 0; d /= 2) x += __shfl_down_sync(whole_warp, x, d);
  return __shfl_sync(whole_warp, x, 0);
}
// Adds the sums of a block's threads, and takes the largest of the maxima that come behind them, in a fixed order; the
// result is thread 0's.
template <int Sums, int Maxima>
__device__ __forceinline__ void sum_block(double (&x)[Sums + Maxima]) {
  __shared__ double shared[Sums + Maxima][sum_threads / warp_threads];
  const int lane = static_cast<int>(threadIdx.x) % warp_threads, warp = static_cast<int>(threadIdx.x) / warp_threads;
#pragma unroll
  for (int i = 0; i < Sums + Maxima; ++i) {
#pragma unroll
    for (unsigned d = warp_threads / 2; d > 0; d /= 2) {
      const double far = __shfl_down_sync(whole_warp, x[i], d);
      x[i] = i < Sums ? x[i] + far : ::fmax(x[i], far);
    }
    if (lane == 0) shared[i][warp] = x[i];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int i = 0; i < Sums + Maxima; ++i) {
    x[i] = shared[i][0];
    for (int w = 1; w < sum_threads / warp_threads; ++w)
      x[i] = i < Sums ? x[i] + shared[i][w] : ::fmax(x[i], shared[i][w]);
  }
}

// Blocks of an SM, as registers go.
template <class F>
inline constexpr int sum_blocks = sizeof(typename F::number) == 8 ? 1
                                  : F::each > 4                   ? 2
                                                                  : 3;

// f(run, sums) for all tokens; the sums of part i go to parts[i].
template <class F>
__global__ void __launch_bounds__(sum_threads, sum_blocks<F>)
    sum_kernel(const F f, index_t rows, index_t cols, double* parts) {
  constexpr int sums = F::sums, maxima = F::maxima, each = F::each;
  constexpr index_t part = index_t{sum_threads} * sum_rounds * each;
  double x[sums + maxima];
#pragma unroll
  for (int i = 0; i < sums + maxima; ++i) x[i] = i < sums ? 0 : -static_cast<double>(__builtin_inff());
  const index_t n = rows * cols;
#pragma unroll 1
  for (int r = 0; r < sum_rounds; ++r) {
    const index_t first = blockIdx.x * part + (index_t{r} * sum_threads + threadIdx.x) * each;
    if (first < n) f(token_run(first, n - first < each ? static_cast<int>(n - first) : each, rows, cols), x);
  }
  sum_block<sums, maxima>(x);
  if (threadIdx.x == 0)
#pragma unroll
    for (int i = 0; i < sums + maxima; ++i) parts[blockIdx.x * index_t{sums + maxima} + i] = x[i];
}
// g(sums of all parts).
template <int Sums, int Maxima, class G>
__global__ void __launch_bounds__(sum_threads) finish_kernel(const G g, const double* parts, index_t count) {
  double x[Sums + Maxima];
#pragma unroll
  for (int i = 0; i < Sums + Maxima; ++i) {
    x[i] = i < Sums ? 0 : -static_cast<double>(__builtin_inff());
    for (index_t k = threadIdx.x; k < count; k += sum_threads) {
      const double part = parts[k * (Sums + Maxima) + i];
      x[i] = i < Sums ? x[i] + part : ::fmax(x[i], part);
    }
  }
  sum_block<Sums, Maxima>(x);
  if (threadIdx.x == 0) g(x);
}

template <class F, class G>
void sum_tokens(std::string_view function, const cuda& exec, const F& f, index_t rows, index_t cols, const G& g) {
  constexpr index_t part = index_t{sum_threads} * sum_rounds * F::each;
  const index_t count = ceil_div(rows * cols, part);
  const unsigned blocks = checked_blocks(function, count, rows * cols, "elements");
  const device_memory<double> parts(exec, count * (F::sums + F::maxima));
  launch(function, exec, sum_kernel<F>, {blocks, sum_threads}, f, rows, cols, parts.data());
  launch(function, exec, finish_kernel<F::sums, F::maxima, G>, {1, sum_threads}, g, parts.data(), count);
}

struct keep_count {
  double* to;
  __device__ __forceinline__ void operator()(const double (&x)[1]) const { *to = x[0]; }
};

// *to = value, in the order of the stream.
template <class T>
__global__ void set_kernel(T* to, const T value) {
  *to = value;
}
template <class T>
device_value<T> known_value(std::string_view function, const cuda& exec, const T& value) {
  device_value<T> v(exec);
  launch(function, exec, set_kernel<T>, {1, 1}, v.data(), value);
  return v;
}

}  // namespace MLKIT_NAMESPACE::rl::detail
