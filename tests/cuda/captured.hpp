// A stream of a test's own, and calls captured from it into a graph. On the CPU there is neither.
#pragma once

#include "executor.hpp"

#if !defined(MLKIT_TEST_ON_CPU)

namespace test {

class own_stream {
 public:
  own_stream() { REQUIRE(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking) == cudaSuccess); }
  ~own_stream() { (void)cudaStreamDestroy(stream_); }
  own_stream(const own_stream&) = delete;
  own_stream& operator=(const own_stream&) = delete;
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

/// What `calls` give to the stream, which has to be none of other threads, as a graph.
class captured {
 public:
  template <class Calls>
  captured(cudaStream_t stream, Calls&& calls) : stream_(stream) {
    cudaGraph_t graph = nullptr;
    REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
    calls();
    REQUIRE(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
    REQUIRE(cudaGraphInstantiate(&graph_, graph, 0) == cudaSuccess);
    REQUIRE(cudaGraphDestroy(graph) == cudaSuccess);
  }
  ~captured() { (void)cudaGraphExecDestroy(graph_); }
  captured(const captured&) = delete;
  captured& operator=(const captured&) = delete;
  void launch() const { REQUIRE(cudaGraphLaunch(graph_, stream_) == cudaSuccess); }

 private:
  cudaStream_t stream_;
  cudaGraphExec_t graph_ = nullptr;
};

}  // namespace test

#endif
