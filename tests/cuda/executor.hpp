// One test file, three executors: the CPU (MLKIT_TEST_ON_CPU), a GPU, and one that is emulated (MLKIT_CUDA_EMULATION).
// Tests put what they give a function where the executor can reach it, and get back what it made.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#if defined(MLKIT_TEST_ON_CPU)
#include <mlkit/core/cpu.hpp>
#include <mlkit/core/tensor.hpp>
#else
#include <mlkit/core/cuda.cuh>
#endif

#include <catch2/catch.hpp>

namespace test {

using mlkit::index_t;

#if defined(MLKIT_TEST_ON_CPU)

using executor = mlkit::cpu;
inline constexpr bool on_cpu = true, emulated = false;

inline executor exec() { return {}; }

template <class T>
class memory {
 public:
  memory() = default;
  memory(const executor&, index_t count) : data_(new T[static_cast<std::size_t>(count)]) {}
  T* data() const noexcept { return data_.get(); }

 private:
  std::unique_ptr<T[]> data_;  // of exactly that size, so that AddressSanitizer sees what goes past the end
};

inline void copy_bytes(const executor&, void* to, const void* from, std::size_t bytes) {
  if (bytes != 0) std::memcpy(to, from, bytes);
}

inline void synchronize(const executor&) {}

#else

using executor = mlkit::cuda;
#if defined(MLKIT_CUDA_EMULATION)
inline constexpr bool on_cpu = false, emulated = true;
#else
inline constexpr bool on_cpu = false, emulated = false;
#endif

/// Without a GPU the program ends here, and says with 77 that it was skipped.
inline executor exec() {
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  if (code == cudaErrorNoDevice || code == cudaErrorInsufficientDriver || (code == cudaSuccess && count == 0)) {
    std::printf("skipped: there is no GPU\n");
    std::exit(77);
  }
  return executor();
}

template <class T>
using memory = mlkit::detail::device_memory<T>;

inline void synchronize(const executor& exec) { exec.synchronize(); }

inline void copy_bytes(const executor& exec, void* to, const void* from, std::size_t bytes) {
  if (bytes == 0) return;
  mlkit::detail::check_cuda("cudaMemcpyAsync", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, exec.stream()));
  exec.synchronize();
}

#endif

/// A row-major tensor of T, of any type that can be copied by bytes, in the executor's memory.
template <class T, int R>
class operand {
 public:
  using value_type = T;
  static constexpr int rank = R;

  operand() = default;
  /// Its elements are unset.
  operand(const executor& exec, const mlkit::extents_t<R>& extents)
      : extents_(extents), memory_(exec, mlkit::detail::element_count<R>(extents)) {}

  T* data() const noexcept { return memory_.data(); }
  const mlkit::extents_t<R>& extents() const noexcept { return extents_; }
  index_t extent(int d) const noexcept { return extents_[static_cast<std::size_t>(d)]; }
  index_t size() const noexcept { return mlkit::detail::element_count<R>(extents_); }
  mlkit::tensor_view<T, R> view() noexcept { return {data(), extents_}; }
  mlkit::tensor_view<const T, R> view() const noexcept { return {data(), extents_}; }
  operator mlkit::tensor_view<T, R>() noexcept { return view(); }
  operator mlkit::tensor_view<const T, R>() const noexcept { return view(); }

 private:
  mlkit::extents_t<R> extents_{};
  memory<T> memory_;
};

/// A copy of a view without gaps, a tensor or an operand.
template <class T, int R>
operand<std::remove_const_t<T>, R> on_device(const executor& exec, mlkit::tensor_view<T, R> x) {
  operand<std::remove_const_t<T>, R> copy(exec, x.extents);
  REQUIRE(x.contiguous());
  copy_bytes(exec, copy.data(), x.data, static_cast<std::size_t>(x.size()) * sizeof(T));
  return copy;
}
template <mlkit::has_view X>
auto on_device(const executor& exec, const X& x) {
  return on_device(exec, x.view());
}
template <class T>
operand<T, 1> on_device(const executor& exec, const std::vector<T>& x) {
  return on_device(exec, mlkit::tensor_view<const T, 1>(x.data(), {static_cast<index_t>(x.size())}));
}
/// The elements of a vector in another shape.
template <class T, int R>
operand<T, R> on_device(const executor& exec, const std::vector<T>& x, const index_t (&extents)[R]) {
  mlkit::tensor_view<const T, R> view(x.data(), std::to_array(extents));
  REQUIRE(view.size() == static_cast<index_t>(x.size()));
  return on_device(exec, view);
}

/// What the host can look at: a tensor, or a vector of those types of which there are no tensors.
template <class T, int R>
auto to_host(const executor& exec, const operand<T, R>& x) {
  const std::size_t bytes = static_cast<std::size_t>(x.size()) * sizeof(T);
  if constexpr (mlkit::storage<T>) {
    mlkit::tensor<T, R> copy(x.extents(), mlkit::uninitialized);
    copy_bytes(exec, copy.data(), x.data(), bytes);
    return copy;
  } else {
    std::vector<T> copy(static_cast<std::size_t>(x.size()));
    copy_bytes(exec, copy.data(), x.data(), bytes);
    return copy;
  }
}

}  // namespace test
