// Streams and captured graphs, for what else gives work to a stream: cublaslt.cpp.
#pragma once

#include <functional>
#include <vector>

#include "internal.hpp"

namespace cuda_emulation {

// What was given to a stream while it was captured.
struct graph {
  std::vector<std::function<void()>> work;
  std::vector<void*> taken, freed;  // device memory, during the capture

  graph() = default;
  graph(const graph&) = delete;
  graph& operator=(const graph&) = delete;
  ~graph();
};

/// What cudaGetLastError will say.
cudaError_t error(cudaError_t code);
/// Other than success if a test wants the call of this name to fail.
cudaError_t begin_call(std::string_view name);
/// Does the work, or adds it to the graph that the stream is captured into.
cudaError_t submit(cudaStream_t stream, std::function<void()> work);
graph* graph_of(cudaStream_t stream);

unsigned char* state_of(const void* p);  // of device memory

}  // namespace cuda_emulation
