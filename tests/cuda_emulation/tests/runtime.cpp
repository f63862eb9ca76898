// The emulated runtime: device memory, what calls refuse, graphs, cuBLASLt's products.
#include <cublasLt.h>
#include <mlkit/core/dtype.hpp>

#include <cmath>
#include <thread>

#include "launch.hpp"

using namespace emulated;
using Catch::Matchers::Contains;
using Catch::Matchers::Equals;

namespace {

__global__ void fill(int* x, int value) { x[blockIdx.x * blockDim.x + threadIdx.x] = value; }
__global__ void twice_as_much(int* x) { x[threadIdx.x] *= 2; }

struct large {
  char bytes[5000];
};
__global__ void takes_much(large) {}

}  // namespace

TEST_CASE("emulation: device memory is not handed out twice, and counted", "[cuda]") {
  const auto before = cuda_emulation::in_use();
  void *a = nullptr, *b = nullptr;
  REQUIRE(cudaMalloc(&a, 100) == cudaSuccess);
  CHECK(cuda_emulation::in_use().allocations == before.allocations + 1);
  CHECK(cuda_emulation::in_use().bytes == before.bytes + 100);
  REQUIRE(cudaFree(a) == cudaSuccess);
  REQUIRE(cudaMalloc(&b, 100) == cudaSuccess);
  CHECK(a != b);
  CHECK(reinterpret_cast<std::uintptr_t>(b) % 256 == 0);
  CHECK(cudaFree(a) == cudaErrorInvalidValue);
  CHECK(cudaGetLastError() == cudaErrorInvalidValue);
  CHECK(cudaGetLastError() == cudaSuccess);
  char host[200];
  CHECK(cudaMemcpy(host, b, 101, cudaMemcpyDefault) == cudaErrorInvalidValue);
  CHECK(cudaMemcpy(host, a, 8, cudaMemcpyDefault) == cudaErrorInvalidValue);
  CHECK(cudaMemset(b, 0, 101) == cudaErrorInvalidValue);
  CHECK(cudaMemset(host, 0, 8) == cudaErrorInvalidValue);
  REQUIRE(cudaFree(b) == cudaSuccess);
  CHECK(cudaMalloc(&a, cuda_emulation::device_memory_bytes + 1) == cudaErrorMemoryAllocation);
  CHECK(a == nullptr);
  CHECK(cudaMalloc(&a, 0) == cudaSuccess);
  CHECK(a == nullptr);
  CHECK(cuda_emulation::in_use() == before);
  (void)cudaGetLastError();

  cudaPointerAttributes found{};
  const device_vector<int> x(4);
  REQUIRE(cudaPointerGetAttributes(&found, x.data() + 1) == cudaSuccess);
  CHECK(found.type == cudaMemoryTypeDevice);
  REQUIRE(cudaPointerGetAttributes(&found, host) == cudaSuccess);
  CHECK(found.type == cudaMemoryTypeUnregistered);
}

TEST_CASE("emulation: launches that no GPU would do", "[cuda]") {
  const device_vector<int> x(2048);
  CHECK_THAT(fault_of({.block = 1025}, fill, x.data(), 1), Equals("cudaErrorInvalidConfiguration"));
  CHECK_THAT(fault_of({.block = dim3(8, 8, 65)}, fill, x.data(), 1), Equals("cudaErrorInvalidConfiguration"));
  CHECK_THAT(fault_of({.grid = dim3(1, 65536)}, fill, x.data(), 1), Equals("cudaErrorInvalidConfiguration"));
  CHECK_THAT(fault_of({.grid = 0}, fill, x.data(), 1), Equals("cudaErrorInvalidConfiguration"));
  CHECK_THAT(fault_of({.shared = 49153}, fill, x.data(), 1), Equals("cudaErrorInvalidValue"));
  CHECK_THAT(fault_of({}, takes_much, large{}), Equals("cudaErrorInvalidValue"));
  CHECK(cudaFuncSetAttribute(fill, cudaFuncAttributeMaxDynamicSharedMemorySize, 100000) == cudaSuccess);
  CHECK_THAT(fault_of({.shared = 49153}, fill, x.data(), 1), Equals(""));
  CHECK_THAT(fault_of({.shared = 100001}, fill, x.data(), 1), Equals("cudaErrorInvalidValue"));
  CHECK(cudaFuncSetAttribute(fill, cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 20) == cudaErrorInvalidValue);
  CHECK_THAT(fault_of({.grid = 2, .block = 1024}, fill, x.data(), 1), Equals(""));
  (void)cudaGetLastError();
}

TEST_CASE("emulation: a graph does its work when it is launched, and each time", "[cuda]") {
  cudaStream_t stream = nullptr;
  REQUIRE(cudaStreamCreate(&stream) == cudaSuccess);
  const device_vector<int> x(32);
  REQUIRE_THAT(fault_of({}, fill, x.data(), 3), Equals(""));
  REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
  cudaLaunchConfig_t config{};
  config.blockDim = 32;
  config.stream = stream;
  REQUIRE(cudaLaunchKernelEx(&config, twice_as_much, x.data()) == cudaSuccess);
  void* own = nullptr;
  REQUIRE(cudaMallocAsync(&own, 128, stream) == cudaSuccess);
  REQUIRE(cudaMemcpyAsync(own, x.data(), 128, cudaMemcpyDefault, stream) == cudaSuccess);
  REQUIRE(cudaFreeAsync(own, stream) == cudaSuccess);
  CHECK(cudaStreamSynchronize(stream) == cudaErrorStreamCaptureUnsupported);
  CHECK(cudaFree(nullptr) == cudaErrorStreamCaptureUnsupported);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  REQUIRE(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
  REQUIRE(cudaGraphInstantiate(&exec, graph) == cudaSuccess);
  CHECK(x.host()[5] == 3);
  REQUIRE(cudaGraphLaunch(exec, stream) == cudaSuccess);
  REQUIRE(cudaGraphLaunch(exec, stream) == cudaSuccess);
  CHECK(x.host()[5] == 12);
  const auto before = cuda_emulation::in_use();
  REQUIRE(cudaGraphDestroy(graph) == cudaSuccess);
  REQUIRE(cudaGraphExecDestroy(exec) == cudaSuccess);
  CHECK(cuda_emulation::in_use().allocations == before.allocations - 1);
  REQUIRE(cudaStreamDestroy(stream) == cudaSuccess);
  CHECK(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal) == cudaErrorStreamCaptureUnsupported);
  (void)cudaGetLastError();
}

TEST_CASE("emulation: threads of the host run kernels side by side", "[cuda]") {
  const device_vector<int> x(std::vector<int>(32)), y(std::vector<int>(32));
  std::string faults[2];
  const auto work = [](int* p, std::string& text) {
    for (int i = 0; i < 200 && text.empty(); ++i) text = fault_of({.block = 32}, fill, p, i);
  };
  std::thread other([&] { work(x.data(), faults[0]); });
  work(y.data(), faults[1]);
  other.join();
  CHECK_THAT(faults[0], Equals(""));
  CHECK_THAT(faults[1], Equals(""));
  CHECK(x.host()[31] == 199);
  CHECK(y.host()[31] == 199);
}

namespace {

template <class T>
constexpr cudaDataType_t type_of = std::is_same_v<T, double>        ? CUDA_R_64F
                                   : std::is_same_v<T, float>       ? CUDA_R_32F
                                   : std::is_same_v<T, mlkit::bf16> ? CUDA_R_16BF
                                                                    : CUDA_R_16F;

struct product {
  std::uint64_t m, n, k;
  bool turn_a, turn_b, bias, by_rows;
  double alpha, beta;
  std::int32_t batches = 1;
};

// d = alpha op(a) op(b) + beta c + bias, all numbers small enough to be exact.
template <class In, class Out>
void check_product(const product& p) {
  const bool wide = std::is_same_v<In, double>;
  cublasLtHandle_t handle = nullptr;
  cublasLtMatmulDesc_t desc = nullptr;
  cublasLtMatrixLayout_t la = nullptr, lb = nullptr, ld = nullptr;
  REQUIRE(cublasLtCreate(&handle) == CUBLAS_STATUS_SUCCESS);
  REQUIRE(cublasLtMatmulDescCreate(&desc, wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F,
                                   wide ? CUDA_R_64F : CUDA_R_32F) == CUBLAS_STATUS_SUCCESS);
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, auto value) {
    REQUIRE(cublasLtMatmulDescSetAttribute(desc, attribute, &value, sizeof value) == CUBLAS_STATUS_SUCCESS);
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, p.turn_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(CUBLASLT_MATMUL_DESC_TRANSB, p.turn_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  if (p.bias) set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
  struct matrix {
    std::uint64_t rows, cols, ld;
    bool by_rows;
    std::uint64_t stride() const { return (by_rows ? rows : cols) * ld; }
    std::size_t at(std::uint64_t r, std::uint64_t c, std::uint64_t batch) const {
      return batch * stride() + (by_rows ? r * ld + c : c * ld + r);
    }
  };
  const auto make = [&](std::uint64_t rows, std::uint64_t cols) {
    return matrix{rows, cols, (p.by_rows ? cols : rows) + 2, p.by_rows};
  };
  const matrix a = p.turn_a ? make(p.k, p.m) : make(p.m, p.k), b = p.turn_b ? make(p.n, p.k) : make(p.k, p.n),
               d = make(p.m, p.n);
  const auto layout = [&](cublasLtMatrixLayout_t& to, cudaDataType_t type, const matrix& x) {
    REQUIRE(cublasLtMatrixLayoutCreate(&to, type, x.rows, x.cols, static_cast<std::int64_t>(x.ld)) ==
            CUBLAS_STATUS_SUCCESS);
    const auto attribute = [&](cublasLtMatrixLayoutAttribute_t which, auto value) {
      REQUIRE(cublasLtMatrixLayoutSetAttribute(to, which, &value, sizeof value) == CUBLAS_STATUS_SUCCESS);
    };
    if (x.by_rows) attribute(CUBLASLT_MATRIX_LAYOUT_ORDER, CUBLASLT_ORDER_ROW);
    attribute(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, p.batches);
    attribute(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, static_cast<std::int64_t>(x.stride()));
  };
  layout(la, type_of<In>, a);
  layout(lb, type_of<In>, b);
  layout(ld, type_of<Out>, d);
  unsigned seed = 1;
  const auto numbers = [&](auto zero, std::size_t count) {
    std::vector<decltype(zero)> x(count);
    for (auto& v : x)
      v = decltype(zero)(static_cast<float>(static_cast<int>((seed = seed * 1664525u + 1013904223u) >> 29) - 3));
    return x;
  };
  const auto batches = static_cast<std::uint64_t>(p.batches);
  const auto ha = numbers(In{}, a.stride() * batches), hb = numbers(In{}, b.stride() * batches);
  const auto hc = numbers(Out{}, d.stride() * batches), hbias = numbers(Out{}, p.m);
  const device_vector<In> da(ha), db(hb);
  const device_vector<Out> dd(hc), dbias(hbias);
  if (p.bias) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void*>(dbias.data()));

  cublasLtMatmulPreference_t preference = nullptr;
  REQUIRE(cublasLtMatmulPreferenceCreate(&preference) == CUBLAS_STATUS_SUCCESS);
  const std::uint64_t most = 1 << 20;
  REQUIRE(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &most,
                                               sizeof most) == CUBLAS_STATUS_SUCCESS);
  cublasLtMatmulHeuristicResult_t result{};
  int found = 0;
  REQUIRE(cublasLtMatmulAlgoGetHeuristic(handle, desc, la, lb, ld, ld, preference, 1, &result, &found) ==
          CUBLAS_STATUS_SUCCESS);
  REQUIRE(found == 1);
  const device_vector<char> workspace(result.workspaceSize);
  const float alpha = static_cast<float>(p.alpha), beta = static_cast<float>(p.beta);
  const void* const by = wide ? static_cast<const void*>(&p.alpha) : &alpha;
  const void* const keep = wide ? static_cast<const void*>(&p.beta) : &beta;
  const auto multiply = [&](const In* from, std::size_t bytes) {
    return cublasLtMatmul(handle, desc, by, from, la, db.data(), lb, keep, dd.data(), ld, dd.data(), ld, &result.algo,
                          workspace.data(), bytes, nullptr);
  };
  CHECK(multiply(da.data(), 0) == CUBLAS_STATUS_INVALID_VALUE);                         // no workspace
  CHECK(multiply(da.data() + 1, result.workspaceSize) == CUBLAS_STATUS_INVALID_VALUE);  // not aligned as was said
  REQUIRE(multiply(da.data(), result.workspaceSize) == CUBLAS_STATUS_SUCCESS);
  const std::vector<Out> have = dd.host();
  for (std::uint64_t i = 0; i < batches; ++i)
    for (std::uint64_t r = 0; r < p.m; ++r)
      for (std::uint64_t c = 0; c < p.n; ++c) {
        double sum = 0;
        for (std::uint64_t k = 0; k < p.k; ++k)
          sum += static_cast<double>(ha[p.turn_a ? a.at(k, r, i) : a.at(r, k, i)]) *
                 static_cast<double>(hb[p.turn_b ? b.at(c, k, i) : b.at(k, c, i)]);
        double want = p.alpha * sum + p.beta * static_cast<double>(hc[d.at(r, c, i)]);
        if (p.bias) want += static_cast<double>(hbias[r]);
        CHECK(static_cast<double>(have[d.at(r, c, i)]) == want);
      }
  // What lies between the rows or columns stays as it was.
  CHECK(static_cast<double>(have.back()) == static_cast<double>(hc.back()));

  CHECK(cublasLtMatmul(handle, desc, by, da.data(), lb, db.data(), la, keep, dd.data(), ld, dd.data(), ld, nullptr,
                       nullptr, 0,
                       nullptr) == (p.m == p.n && p.m == p.k ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE));
  cublasLtMatmulPreferenceDestroy(preference);
  for (const auto l : {la, lb, ld}) cublasLtMatrixLayoutDestroy(l);
  cublasLtMatmulDescDestroy(desc);
  cublasLtDestroy(handle);
}

}  // namespace

TEST_CASE("emulation: products of cuBLASLt", "[cuda]") {
  for (const bool turn_a : {false, true})
    for (const bool turn_b : {false, true})
      for (const bool by_rows : {false, true}) {
        check_product<float, float>({3, 5, 7, turn_a, turn_b, false, by_rows, 1, 0});
        check_product<double, double>({6, 2, 3, turn_a, turn_b, false, by_rows, 0.5, 1});
      }
  check_product<mlkit::bf16, mlkit::bf16>({4, 6, 5, true, false, true, false, 1, 0});
  check_product<mlkit::f16, float>({4, 6, 5, false, false, false, false, 1, 1});
  check_product<mlkit::bf16, float>({4, 3, 5, false, true, true, false, 2, 1, 3});
}
