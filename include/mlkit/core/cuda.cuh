// cuda: the executor that runs kernels on a GPU, in the order of a stream; its memory, and launches over it.
#pragma once

#if !defined(__CUDACC__) && !defined(MLKIT_CUDA_EMULATION)
#error "mlkit/core/cuda.cuh is CUDA code: compile the file that includes it with nvcc, as .cu"
#endif

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>

#include "arguments.hpp"
#include "tensor.hpp"

namespace MLKIT_NAMESPACE {
namespace detail {

[[noreturn]] inline void fail_cuda(std::string_view what, cudaError_t code) {
  const char* advice = "";
  switch (code) {
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver: advice = "; no usable GPU: mlkit::cpu runs the same call"; break;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      advice = "; the program holds no code for this GPU: compile with -arch=native, or name its sm_XX";
      break;
    case cudaErrorMemoryAllocation: advice = "; the GPU's memory is full"; break;
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorMisalignedAddress:
      advice = "; a kernel before this call failed, and the process has to start anew to use the GPU";
      break;
    default: break;
  }
  throw_error<device_error>({what, ": ", cudaGetErrorName(code), ", ", cudaGetErrorString(code), advice});
}

/// Throws device_error naming the call and the code, unless all is well.
inline void check_cuda(std::string_view what, cudaError_t code) {
  if (code == cudaSuccess) return;
  (void)cudaGetLastError();  // so that the next call does not find this one's error
  fail_cuda(what, code);
}

/// Makes a device the current one, for as long as this lives.
class current_device {
 public:
  explicit current_device(int device) {
    check_cuda("cudaGetDevice", cudaGetDevice(&before_));
    if (before_ != device)
      check_cuda("cudaSetDevice", cudaSetDevice(device));
    else
      before_ = -1;
  }
  ~current_device() {
    if (before_ >= 0) (void)cudaSetDevice(before_);
  }
  current_device(const current_device&) = delete;
  current_device& operator=(const current_device&) = delete;

 private:
  int before_ = -1;
};

inline constexpr int most_devices = 64;

}  // namespace detail

/// What kernels are planned by.
struct device_properties {
  int multiprocessors = 0;           ///< SMs
  int compute_capability = 0;        ///< 80, 90, ...
  int shared_memory = 0;             ///< bytes of shared memory that a block can ask for
  int cache = 0;                     ///< bytes of level-2 cache
  bool reaches_host_memory = false;  ///< kernels may use any host pointer (Grace, HMM)
};

/// Runs kernels on a GPU, in the order of a stream, and returns at once: results are there when the stream gets to
/// them, and `synchronize()` waits for it. Copies are cheap. The stream is the caller's and outlives the executor.
///
/// Calls check shapes and pointers as on the CPU; what device memory holds is not looked at beforehand, which would
/// wait for it: the entry points say what becomes of values that they would refuse on the CPU. Workspace comes from a
/// pool of mlkit's own in the stream's order, so that calls can be captured into a graph.
class cuda {
 public:
  /// The default stream of the current device. Throws device_error if there is no usable GPU.
  cuda() : cuda(cudaStream_t{}) {}
  explicit cuda(cudaStream_t stream) : stream_(stream) {
    if (stream)
      detail::check_cuda("mlkit::cuda: cudaStreamGetDevice", cudaStreamGetDevice(stream, &device_));
    else
      detail::check_cuda("mlkit::cuda: cudaGetDevice", cudaGetDevice(&device_));
    (void)properties();
  }

  cudaStream_t stream() const noexcept { return stream_; }
  int device() const noexcept { return device_; }

  /// Waits until all that was given to the stream is done. Throws device_error if any of it failed.
  void synchronize() const { detail::check_cuda("cudaStreamSynchronize", cudaStreamSynchronize(stream_)); }

  /// Throws device_error, naming a function's argument, if kernels on this device cannot use its memory.
  void check_memory(std::string_view function, std::string_view name, const void* p) const {
    cudaPointerAttributes found{};
    detail::check_cuda("cudaPointerGetAttributes", cudaPointerGetAttributes(&found, p));
    if (found.type == cudaMemoryTypeUnregistered && !properties().reaches_host_memory)
      detail::throw_error<device_error>({function, ": ", name,
                                         " lies in host memory, which the GPU cannot reach; copy ",
                                         "it to a mlkit::device_tensor"});
    if (found.type == cudaMemoryTypeDevice && found.device != device_)
      detail::throw_error<device_error>(
          {function, ": ", name, " lies on device ", found.device, ", but the stream is of device ", device_});
  }

  const device_properties& properties() const {
    static std::array<std::once_flag, detail::most_devices> once;
    static std::array<device_properties, detail::most_devices> all;
    const auto i = static_cast<std::size_t>(device_);
    std::call_once(once[i], [&] {
      const auto ask = [&](cudaDeviceAttr attribute) {
        int value = 0;
        detail::check_cuda("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, attribute, device_));
        return value;
      };
      device_properties p;
      p.multiprocessors = ask(cudaDevAttrMultiProcessorCount);
      p.compute_capability = 10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor);
      p.shared_memory = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
      p.cache = ask(cudaDevAttrL2CacheSize);
      p.reaches_host_memory = ask(cudaDevAttrPageableMemoryAccess) != 0;
      all[i] = p;
    });
    return all[i];
  }

 private:
  cudaStream_t stream_ = nullptr;
  int device_ = 0;
};

namespace detail {

template <>
inline constexpr bool is_executor<cuda> = true;

// Memory of one device from which workspace and tensors come; freed blocks stay in it, so that a call that was made
// before does not wait for the operating system.
inline cudaMemPool_t device_pool(int device) {
  static std::array<std::once_flag, most_devices> once;
  static std::array<cudaMemPool_t, most_devices> pools{};
  const auto i = static_cast<std::size_t>(device);
  std::call_once(once[i], [&] {
    cudaMemPoolProps props{};
    props.allocType = cudaMemAllocationTypePinned;
    props.location.type = cudaMemLocationTypeDevice;
    props.location.id = device;
    cudaMemPool_t pool = nullptr;
    check_cuda("cudaMemPoolCreate", cudaMemPoolCreate(&pool, &props));
    std::uint64_t keep = UINT64_MAX;
    check_cuda("cudaMemPoolSetAttribute", cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep));
    pools[i] = pool;
  });
  return pools[i];
}

/// Memory of a device, taken and given back in the order of a stream. Uninitialised; aligned to 256 bytes.
template <class T>
class device_memory {
 public:
  device_memory() = default;
  device_memory(const cuda& exec, index_t count) : stream_(exec.stream()), device_(exec.device()) {
    if (count == 0) return;
    const current_device here(device_);
    void* p = nullptr;
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    const cudaError_t code = cudaMallocFromPoolAsync(&p, bytes, device_pool(device_), stream_);
    if (code != cudaSuccess) check_cuda(message("cudaMallocFromPoolAsync of ", bytes, " bytes"), code);
    data_ = static_cast<T*>(p);
  }
  device_memory(device_memory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), stream_(other.stream_), device_(other.device_) {}
  device_memory& operator=(device_memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(stream_, other.stream_);
    std::swap(device_, other.device_);
    return *this;
  }
  ~device_memory() {
    if (data_) (void)cudaFreeAsync(data_, stream_);
  }
  T* data() const noexcept { return data_; }

 private:
  T* data_ = nullptr;
  cudaStream_t stream_ = nullptr;
  int device_ = 0;
};

struct launch_shape {
  dim3 grid, block;
  std::size_t shared = 0;  // bytes of dynamic shared memory
};

/// Launches a kernel by a call, which the tests' emulation understands too. An empty grid is no launch.
template <class... Parameters, class... Arguments>
void launch(std::string_view function, const cuda& exec, void (*kernel)(Parameters...), const launch_shape& shape,
            Arguments&&... arguments) {
  constexpr std::size_t without_asking = 48 << 10;
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  const current_device here(exec.device());
  if (shape.shared > without_asking)
    check_cuda(function,
               cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shape.shared)));
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared;
  config.stream = exec.stream();
  check_cuda(function, cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

}  // namespace detail

/// An owning row-major tensor in device memory, taken and freed in the order of the executor's stream. Elements are
/// unset. Movable.
template <storage T, int Rank>
class device_tensor {
 public:
  using value_type = T;
  static constexpr int rank = Rank;

  device_tensor() = default;
  /// Throws shape_error for a negative extent or a product that does not fit, device_error if memory is short.
  device_tensor(const cuda& exec, const extents_t<Rank>& extents)
      : memory_(exec, detail::checked_count<T, Rank>("device_tensor", extents)), extents_(extents) {}

  T* data() const noexcept { return memory_.data(); }
  const extents_t<Rank>& extents() const noexcept { return extents_; }
  index_t extent(int d) const noexcept { return extents_[static_cast<std::size_t>(d)]; }
  index_t size() const noexcept { return detail::element_count<Rank>(extents_); }
  tensor_view<T, Rank> view() noexcept { return {data(), extents_}; }
  tensor_view<const T, Rank> view() const noexcept { return {data(), extents_}; }
  operator tensor_view<T, Rank>() noexcept { return view(); }
  operator tensor_view<const T, Rank>() const noexcept { return view(); }

 private:
  detail::device_memory<T> memory_;
  extents_t<Rank> extents_{};
};

/// to = from, in the order of the stream; either may lie on the host or on the device, row-major and without gaps. Host
/// memory has to stay as it is until the stream has got there. Throws shape_error for shapes that differ or have gaps.
template <class From, class To>
  requires requires(const From& from, To& to) { as_view(from), as_view(to); }
void copy(const cuda& exec, const From& from, To&& to) {
  constexpr int rank = decltype(as_view(to))::rank;
  using T = element_t<std::remove_reference_t<To>>;
  const tensor_view<const T, rank> source = as_view(from);
  const tensor_view<T, rank> target = as_view(to);
  detail::check_same_shape<rank>("copy", "to", target.extents, "from", source.extents);
  if (!source.contiguous()) detail::fail_shape("copy: from has gaps between its elements");
  if (!target.contiguous()) detail::fail_shape("copy: to has gaps between its elements");
  if (target.empty()) return;
  const detail::current_device here(exec.device());
  detail::check_cuda("copy: cudaMemcpyAsync",
                     cudaMemcpyAsync(target.data, source.data, static_cast<std::size_t>(target.size()) * sizeof(T),
                                     cudaMemcpyDefault, exec.stream()));
}

/// A copy in device memory, in the order of the stream.
template <class X>
  requires requires(const X& x) { as_view(x); }
auto to_device(const cuda& exec, const X& x) {
  const auto source = as_view(x);
  device_tensor<element_t<X>, decltype(as_view(x))::rank> t(exec, source.extents);
  copy(exec, source, t);
  return t;
}

/// A copy in host memory; waits until it is there.
template <class X>
  requires requires(const X& x) { as_view(x); }
auto to_host(const cuda& exec, const X& x) {
  const auto source = as_view(x);
  tensor<element_t<X>, decltype(as_view(x))::rank> t(source.extents, uninitialized);
  copy(exec, source, t);
  exec.synchronize();
  return t;
}

/// A moment in a stream's order.
class device_event {
 public:
  device_event() { detail::check_cuda("cudaEventCreate", cudaEventCreate(&event_)); }
  ~device_event() { (void)cudaEventDestroy(event_); }
  device_event(const device_event&) = delete;
  device_event& operator=(const device_event&) = delete;

  void record(const cuda& exec) { detail::check_cuda("cudaEventRecord", cudaEventRecord(event_, exec.stream())); }

 private:
  friend float milliseconds(const device_event&, const device_event&);
  cudaEvent_t event_ = nullptr;
};

/// From one event to another; waits for the later one. Both were recorded.
inline float milliseconds(const device_event& from, const device_event& to) {
  float elapsed = 0;
  detail::check_cuda("cudaEventSynchronize", cudaEventSynchronize(to.event_));
  detail::check_cuda("cudaEventElapsedTime", cudaEventElapsedTime(&elapsed, from.event_, to.event_));
  return elapsed;
}

}  // namespace MLKIT_NAMESPACE
