// The executor itself: memory, copies, launches, events, graphs; and what goes wrong with them.
#include <array>
#include <cmath>
#include <limits>
#include <string>

#include "captured.hpp"

#if !defined(MLKIT_TEST_ON_CPU)
#include <mlkit/core/cuda/ptx.cuh>
#endif
#if defined(MLKIT_CUDA_EMULATION)
#include <mlkit_cuda_emulation/testing.hpp>
#endif

using mlkit::bf16;
using mlkit::f16;
using mlkit::index_t;

namespace {

template <class T>
std::vector<T> some(index_t count) {
  std::vector<T> x(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<T>(static_cast<float>(i % 251) - 100);
  return x;
}

template <class T>
void check_round_trip(const test::executor& exec) {
  for (const index_t count : {0, 1, 7, 1000}) {
    const std::vector<T> x = some<T>(count);
    const auto there = test::on_device(exec, x);
    CHECK(there.extent(0) == count);
    const auto back = test::to_host(exec, there);
    REQUIRE(static_cast<std::size_t>(back.size()) == x.size());
    CHECK(std::equal(x.begin(), x.end(), back.data(),
                     [](T a, T b) { return static_cast<double>(a) == static_cast<double>(b); }));
  }
}

}  // namespace

TEST_CASE("cuda core: what tests put on the device comes back", "[cuda]") {
  const test::executor exec = test::exec();
  check_round_trip<float>(exec);
  check_round_trip<double>(exec);
  check_round_trip<bf16>(exec);
  check_round_trip<f16>(exec);
  check_round_trip<std::int32_t>(exec);
  mlkit::tensor<float, 3> x({2, 3, 4});
  x(1, 2, 3) = 5;
  auto there = test::on_device(exec, x);
  CHECK(there.extents() == mlkit::extents_t<3>{2, 3, 4});
  CHECK(test::to_host(exec, there)(1, 2, 3) == 5);
  auto shaped = test::on_device(exec, some<float>(6), {2, 3});
  CHECK(test::to_host(exec, shaped)(1, 0) == -97);
}

#if !defined(MLKIT_TEST_ON_CPU)

using Catch::Matchers::Contains;
using Catch::Matchers::Equals;
using mlkit::detail::device_memory;
using mlkit::detail::launch;

namespace {

template <class F>
std::string message(F&& f) {
  try {
    f();
  } catch (const mlkit::error& e) {
    return e.what();
  }
  return "";
}

__global__ void add(float* x, index_t count, float value) {
  for (index_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += index_t{blockDim.x} * gridDim.x)
    x[i] += value;
}

// out = the sum of so many words of dynamic shared memory, each of them its index.
__global__ void use_shared(float* out, int words) {
  MLKIT_SHARED_MEMORY(float, memory);
  for (int i = static_cast<int>(threadIdx.x); i < words; i += static_cast<int>(blockDim.x))
    memory[i] = static_cast<float>(i);
  __syncthreads();
  float sum = 0;
  if (threadIdx.x == 0)
    for (int i = 0; i < words; ++i) sum += memory[i];
  if (threadIdx.x == 0) *out = sum;
}

void add_one(const test::executor& exec, mlkit::device_tensor<float, 1>& x, float value = 1) {
  launch("add", exec, add, {.grid = 2, .block = 64}, x.data(), x.size(), value);
}

}  // namespace

TEST_CASE("cuda core: the device", "[cuda]") {
  const test::executor exec = test::exec();
  const mlkit::device_properties& p = exec.properties();
  CHECK(p.multiprocessors > 0);
  CHECK(p.compute_capability >= 80);
  CHECK(p.shared_memory >= 48 << 10);
  CHECK(p.cache > 0);
  CHECK(exec.stream() == cudaStream_t{});
  const test::own_stream stream;
  const mlkit::cuda other(stream);
  CHECK(other.stream() == stream);
  CHECK(other.device() == exec.device());
}

TEST_CASE("cuda core: tensors and copies", "[cuda]") {
  const test::executor exec = test::exec();
  const std::vector<float> host = some<float>(6);
  const mlkit::tensor_view<const float, 2> given(host.data(), {2, 3});
  auto a = mlkit::to_device(exec, given);
  CHECK(a.extents() == mlkit::extents_t<2>{2, 3});
  CHECK(a.extent(1) == 3);
  CHECK(a.size() == 6);
  CHECK(reinterpret_cast<std::uintptr_t>(a.data()) % 256 == 0);
  mlkit::device_tensor<float, 2> b(exec, {2, 3});
  mlkit::copy(exec, a, b);
  CHECK(mlkit::to_host(exec, b)(1, 2) == host[5]);
  const float* const place = b.data();
  mlkit::device_tensor<float, 2> moved = std::move(b);
  CHECK(moved.data() == place);
  b = std::move(moved);
  CHECK(b.data() == place);
  // Nothing at all.
  mlkit::device_tensor<float, 2> empty(exec, {0, 3});
  CHECK(empty.size() == 0);
  CHECK(mlkit::to_host(exec, empty).size() == 0);
  mlkit::device_tensor<float, 2> none;
  CHECK(none.data() == nullptr);

  CHECK_THAT(message([&] {
               mlkit::device_tensor<float, 2>(exec, {2, -3});
             }),
             Contains("shape_error: device_tensor: extent -3 in dimension 1 is negative"));
  CHECK_THAT(message([&] {
               mlkit::device_tensor<float, 2>(exec, {index_t{1} << 40, index_t{1} << 40});
             }),
             Contains("shape_error: device_tensor: shape [") && Contains("is too large"));
  mlkit::device_tensor<float, 2> wider(exec, {2, 4});
  CHECK_THAT(message([&] { mlkit::copy(exec, a, wider); }),
             Contains("shape_error: copy: to has shape [2, 4], but from has [2, 3]"));
  CHECK_THAT(message([&] {
               mlkit::copy(exec, mlkit::tensor_view<float, 2>(a.data(), {2, 2}, {3, 1}), wider.view());
             }),
             Contains("copy: to has shape"));
  mlkit::device_tensor<float, 2> narrow(exec, {2, 2});
  const mlkit::tensor_view<float, 2> gaps(a.data(), {2, 2}, {3, 1});
  CHECK_THAT(message([&] { mlkit::copy(exec, gaps, narrow); }), Contains("copy: from has gaps between its elements"));
  CHECK_THAT(message([&] { mlkit::copy(exec, narrow, gaps); }), Contains("copy: to has gaps between its elements"));
}

TEST_CASE("cuda core: host memory is refused where kernels cannot reach it", "[cuda]") {
  const test::executor exec = test::exec();
  std::vector<float> host(4);
  const auto there = test::on_device(exec, host);
  CHECK_THAT(message([&] { exec.check_memory("f", "x", there.data()); }), Equals(""));
  if (exec.properties().reaches_host_memory) return;
  CHECK_THAT(message([&] { exec.check_memory("f", "x", host.data()); }),
             Equals("mlkit::device_error: f: x lies in host memory, which the GPU cannot reach; copy it to a "
                    "mlkit::device_tensor"));
  void* pinned = nullptr;
  REQUIRE(cudaMallocHost(&pinned, 16) == cudaSuccess);
  CHECK_THAT(message([&] { exec.check_memory("f", "x", pinned); }), Equals(""));
  REQUIRE(cudaFreeHost(pinned) == cudaSuccess);
}

TEST_CASE("cuda core: launches", "[cuda]") {
  const test::executor exec = test::exec();
  auto x = mlkit::to_device(exec, some<float>(1000));
  add_one(exec, x, 2);
  launch("add", exec, add, {.grid = 0, .block = 64}, x.data(), x.size(), 100.0f);  // nothing
  launch("add", exec, add, {.grid = dim3(1, 0), .block = 64}, x.data(), x.size(), 100.0f);
  const auto back = mlkit::to_host(exec, x);
  for (index_t i = 0; i < 1000; ++i) CHECK(back(i) == some<float>(1000)[static_cast<std::size_t>(i)] + 2);

  mlkit::device_tensor<float, 1> sum(exec, {1});
  for (const int words : {256, 12288, exec.properties().shared_memory / 4}) {
    launch("use_shared", exec, use_shared, {.grid = 1, .block = 128, .shared = static_cast<std::size_t>(words) * 4},
           sum.data(), words);
    CHECK(mlkit::to_host(exec, sum)(0) == Approx(0.5 * words * (words - 1)).epsilon(1e-3));
  }
}

TEST_CASE("cuda core: what cannot be launched says so, and the next call works", "[cuda]") {
  const test::executor exec = test::exec();
  auto x = mlkit::to_device(exec, some<float>(100));
  CHECK_THAT(message([&] { launch("f", exec, add, {.grid = 1, .block = 2048}, x.data(), x.size(), 1.0f); }),
             Contains("mlkit::device_error: f: cudaErrorInvalid"));
  CHECK_THAT(message([&] { launch("f", exec, add, {.grid = dim3(1, 70000), .block = 32}, x.data(), x.size(), 1.0f); }),
             Contains("mlkit::device_error: f: cudaErrorInvalid"));
  CHECK_THAT(message([&] { launch("f", exec, use_shared, {.grid = 1, .block = 32, .shared = 1 << 20}, x.data(), 1); }),
             Contains("mlkit::device_error: f: cudaErrorInvalidValue, invalid argument"));
  CHECK(cudaGetLastError() == cudaSuccess);
  add_one(exec, x);
  CHECK(mlkit::to_host(exec, x)(0) == -99);
}

TEST_CASE("cuda core: memory that there is not", "[cuda]") {
  const test::executor exec = test::exec();
  const index_t bytes = index_t{1} << 42;
  CHECK_THAT(message([&] { mlkit::device_tensor<float, 1>(exec, {bytes / 4}); }),
             Equals("mlkit::device_error: cudaMallocFromPoolAsync of 4398046511104 bytes: cudaErrorMemoryAllocation, "
                    "out of memory; the GPU's memory is full"));
  CHECK(cudaGetLastError() == cudaSuccess);
  auto x = mlkit::to_device(exec, some<float>(100));
  add_one(exec, x);
  CHECK(mlkit::to_host(exec, x)(0) == -99);
}

TEST_CASE("cuda core: memory that is given back is used again", "[cuda]") {
  const test::executor exec = test::exec();
  const auto reserved = [&] {
    std::uint64_t bytes = 0;
    REQUIRE(cudaMemPoolGetAttribute(mlkit::detail::device_pool(exec.device()), cudaMemPoolAttrReservedMemCurrent,
                                    &bytes) == cudaSuccess);
    return bytes;
  };
  constexpr index_t count = 1 << 20;
  { const device_memory<float> first(exec, count); }
  exec.synchronize();
  const std::uint64_t before = reserved();
  for (int i = 0; i < 100; ++i) {
    const device_memory<float> one(exec, count);
    CHECK(reinterpret_cast<std::uintptr_t>(one.data()) % 256 == 0);
  }
  exec.synchronize();
  CHECK(reserved() == before);
  device_memory<float> a(exec, 8), b;
  const float* const place = a.data();
  b = std::move(a);
  CHECK(b.data() == place);
  CHECK(a.data() == nullptr);
}

TEST_CASE("cuda core: events", "[cuda]") {
  const test::executor exec = test::exec();
  auto x = mlkit::to_device(exec, some<float>(1000));
  mlkit::device_event begin, end;
  begin.record(exec);
  add_one(exec, x);
  end.record(exec);
  const float elapsed = mlkit::milliseconds(begin, end);
  CHECK(elapsed >= 0);
  CHECK(elapsed < 10000);
}

TEST_CASE("cuda core: calls are captured into a graph, their workspace with them", "[cuda]") {
  (void)test::exec();
  const test::own_stream stream;
  const mlkit::cuda exec(stream);
  auto x = mlkit::to_device(exec, some<float>(100));
  mlkit::device_tensor<float, 1> y(exec, {100});
  exec.synchronize();
  const auto call = [&] {  // y = x + 3, through workspace
    mlkit::device_tensor<float, 1> workspace(exec, {100});
    mlkit::copy(exec, x, workspace);
    add_one(exec, workspace, 3);
    mlkit::copy(exec, workspace, y);
  };
  const test::captured graph(stream, call);
  for (int i = 0; i < 3; ++i) {
    add_one(exec, x);
    graph.launch();
    CHECK(mlkit::to_host(exec, y)(0) == -100 + static_cast<float>(i) + 4);
  }
}

#if defined(MLKIT_CUDA_EMULATION)

TEST_CASE("cuda core: no GPU, no driver, no code for the GPU", "[cuda]") {
  const auto says = [](const char* call, cudaError_t code, auto&& f) {
    cuda_emulation::fail_call(call, code);
    const std::string text = message(f);
    CHECK_FALSE(cuda_emulation::forget_failing_calls());
    return text;
  };
  const auto construct = [] { const mlkit::cuda exec; };
  CHECK_THAT(says("cudaGetDevice", cudaErrorNoDevice, construct),
             Equals("mlkit::device_error: mlkit::cuda: cudaGetDevice: cudaErrorNoDevice, no CUDA-capable device is "
                    "detected; no usable GPU: mlkit::cpu runs the same call"));
  CHECK_THAT(says("cudaGetDevice", cudaErrorInsufficientDriver, construct),
             Contains("cudaErrorInsufficientDriver") && Contains("; no usable GPU: mlkit::cpu runs the same call"));
  const mlkit::cuda exec;
  auto x = mlkit::to_device(exec, some<float>(100));
  CHECK_THAT(says("cudaLaunchKernelEx", cudaErrorNoKernelImageForDevice, [&] { add_one(exec, x); }),
             Contains("mlkit::device_error: add: cudaErrorNoKernelImageForDevice") &&
                 Contains("compile with -arch=native, or name its sm_XX"));
  CHECK_THAT(says("cudaStreamSynchronize", cudaErrorIllegalAddress, [&] { exec.synchronize(); }),
             Contains("cudaStreamSynchronize: cudaErrorIllegalAddress, an illegal memory access was encountered; a "
                      "kernel before this call failed"));
  CHECK_THAT(says("cudaPointerGetAttributes", cudaErrorLaunchFailure, [&] { exec.check_memory("f", "x", x.data()); }),
             Contains("cudaErrorLaunchFailure"));
}

TEST_CASE("cuda core: whichever call fails, its name is told, nothing leaks and the next call works", "[cuda]") {
  const auto work = [] {
    const mlkit::cuda exec;
    auto x = mlkit::to_device(exec, some<float>(100));
    mlkit::device_event begin, end;
    begin.record(exec);
    add_one(exec, x);
    mlkit::device_tensor<float, 1> one(exec, {1});
    launch("use_shared", exec, use_shared, {.grid = 1, .block = 32, .shared = 60 << 10}, one.data(), 1000);
    end.record(exec);
    (void)mlkit::milliseconds(begin, end);
    exec.check_memory("f", "x", x.data());
    return mlkit::to_host(exec, x)(0);
  };
  CHECK(work() == -99);
  const cuda_emulation::usage before = cuda_emulation::in_use();
  int failures = 0;
  for (const char* name : {"cudaGetDevice", "cudaMallocFromPoolAsync", "cudaMemcpyAsync", "cudaLaunchKernelEx",
                           "cudaFuncSetAttribute", "cudaStreamSynchronize", "cudaEventCreate", "cudaEventRecord",
                           "cudaEventSynchronize", "cudaEventElapsedTime", "cudaPointerGetAttributes"})
    for (int after = 0;; ++after) {
      INFO(name << ", after " << after);
      cuda_emulation::fail_call(name, cudaErrorUnknown, after);
      const std::string text = message([&] { (void)work(); });
      if (cuda_emulation::forget_failing_calls()) {  // it was not called so often
        CHECK(after > 0);
        CHECK_THAT(text, Equals(""));
        break;
      }
      ++failures;
      CHECK_THAT(text, Contains("mlkit::device_error: ") && Contains("cudaErrorUnknown"));
      if (std::string(name) != "cudaLaunchKernelEx" && std::string(name) != "cudaFuncSetAttribute")
        CHECK_THAT(text, Contains(name));
      CHECK(cudaGetLastError() == cudaSuccess);
      CHECK(cuda_emulation::in_use() == before);
      CHECK(work() == -99);
    }
  CHECK(failures > 15);
}

TEST_CASE("cuda core: a wait or a copy to the host while a graph is captured is refused", "[cuda]") {
  const test::own_stream stream;
  const mlkit::cuda exec(stream);
  const auto x = mlkit::to_device(exec, some<float>(100));
  REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
  CHECK_THAT(message([&] { exec.synchronize(); }), Contains("cudaErrorStreamCaptureUnsupported"));
  CHECK(cudaMalloc(static_cast<void**>(nullptr), 8) == cudaErrorStreamCaptureUnsupported);
  cudaGraph_t graph = nullptr;
  REQUIRE(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
  REQUIRE(cudaGraphDestroy(graph) == cudaSuccess);
}

#endif
#endif
