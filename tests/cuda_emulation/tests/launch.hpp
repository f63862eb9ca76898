// Launches kernels on the emulated GPU, and gives what the emulation said of them.
#pragma once

#include <cuda_runtime.h>
#include <mlkit_cuda_emulation/ptx.hpp>
#include <mlkit_cuda_emulation/testing.hpp>

#include <catch2/catch.hpp>

#include <string>
#include <vector>

namespace emulated {

/// Device memory that holds a vector.
template <class T>
class device_vector {
 public:
  explicit device_vector(std::size_t count) : count_(count) {
    REQUIRE(cudaMalloc(&data_, count * sizeof(T)) == cudaSuccess);
  }
  explicit device_vector(const std::vector<T>& values) : device_vector(values.size()) {
    REQUIRE(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyDefault) == cudaSuccess);
  }
  device_vector(const device_vector&) = delete;
  device_vector& operator=(const device_vector&) = delete;
  ~device_vector() { (void)cudaFree(data_); }
  T* data() const { return data_; }
  std::vector<T> host() const {
    std::vector<T> values(count_);
    REQUIRE(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDefault) == cudaSuccess);
    return values;
  }

 private:
  std::size_t count_;
  T* data_ = nullptr;
};

struct shape {
  dim3 grid = 1, block = 32;
  std::size_t shared = 0;
  dim3 cluster = 1;
};

template <class... P, class... A>
cudaError_t launch(const shape& s, void (*kernel)(P...), A... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = s.grid;
  config.blockDim = s.block;
  config.dynamicSmemBytes = s.shared;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = s.cluster.x;
  attribute.val.clusterDim.y = s.cluster.y;
  attribute.val.clusterDim.z = s.cluster.z;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
}

/// What was wrong with a kernel; empty if nothing.
template <class... P, class... A>
std::string fault_of(const shape& s, void (*kernel)(P...), A... arguments) {
  try {
    const cudaError_t code = launch(s, kernel, arguments...);
    return code == cudaSuccess ? "" : cudaGetErrorName(code);
  } catch (const cuda_emulation::fault& f) {
    return f.what();
  }
}

/// Not instrumented, the emulation finds less: then these tests have nothing to say.
#define REQUIRE_WATCHED() \
  if (!cuda_emulation::watches_memory()) return

}  // namespace emulated
