// The host's side of the CUDA runtime.
#include <cuda.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>

#include "fibers.hpp"
#include "internal.hpp"
#include "memory.hpp"
#include "runtime.hpp"

using cuda_emulation::graph;

struct CUstream_st {
  std::unique_ptr<graph> captured;  // while a capture is under way
};
struct CUevent_st {
  std::chrono::steady_clock::time_point when;
  bool recorded = false;
};
struct CUmemPoolHandle_st {
  std::uint64_t release_threshold = 0;
};
struct CUgraph_st {
  std::shared_ptr<graph> g;
};
struct CUgraphExec_st {
  std::shared_ptr<graph> g;
};

namespace cuda_emulation {
namespace {

std::mutex mutex;
struct failing_call {
  cudaError_t code;
  int after;
};
std::map<std::string, failing_call, std::less<>> failing;
std::map<const void*, int> most_dynamic;  // shared memory, by kernel
usage taken;
int captures = 0;

thread_local cudaError_t last_error = cudaSuccess;

constexpr std::size_t shared_without_asking = 48 << 10;

// 80 or 90, say; MLKIT_EMULATED_COMPUTE_CAPABILITY in the environment chooses.
int compute_capability() {
  static const int capability = [] {
    const char* text = std::getenv("MLKIT_EMULATED_COMPUTE_CAPABILITY");
    return text ? std::atoi(text) : 90;
  }();
  return capability;
}
int shared_per_block() { return compute_capability() >= 90 ? static_cast<int>(most_shared) : 166912; }

void count(std::size_t& n, int by) {
  const std::lock_guard lock(mutex);
  n += static_cast<std::size_t>(by);
}

}  // namespace

void fail_call(std::string_view name, cudaError_t code, int after) {
  const std::lock_guard lock(mutex);
  failing.insert_or_assign(std::string(name), failing_call{code, after});
}

bool forget_failing_calls() {
  const std::lock_guard lock(mutex);
  const bool any = !failing.empty();
  failing.clear();
  return any;
}

usage in_use() {
  const memory_in_use memory = device_memory_in_use();
  const std::lock_guard lock(mutex);
  usage all = taken;
  all.allocations = memory.allocations;
  all.bytes = memory.bytes;
  return all;
}

cudaError_t error(cudaError_t code) {
  if (code != cudaSuccess) last_error = code;
  return code;
}

cudaError_t begin_call(std::string_view name) {
  const std::lock_guard lock(mutex);
  const auto at = failing.find(name);
  if (at == failing.end() || at->second.after-- > 0) return cudaSuccess;
  const cudaError_t code = at->second.code;
  failing.erase(at);
  return error(code);
}

graph* graph_of(cudaStream_t stream) {
  return stream && stream != cudaStreamLegacy && stream->captured ? stream->captured.get() : nullptr;
}

cudaError_t submit(cudaStream_t stream, std::function<void()> work) {
  if (graph* g = graph_of(stream))
    g->work.push_back(std::move(work));
  else
    work();
  return cudaSuccess;
}

graph::~graph() {
  for (void* p : freed) give_device_memory_back(p);
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, kernel_call call,
                   std::shared_ptr<const void> parameters, std::size_t bytes) {
  if (const auto code = begin_call("cudaLaunchKernelEx")) return code;
  const dim3 g = config.gridDim, b = config.blockDim;
  if (g.x == 0 || g.y == 0 || g.z == 0 || b.x == 0 || b.y == 0 || b.z == 0 || g.x > 0x7fffffffu || g.y > 65535 ||
      g.z > 65535 || b.z > 64 || std::uint64_t{b.x} * b.y * b.z > most_threads)
    return error(cudaErrorInvalidConfiguration);
  std::size_t most = shared_without_asking;
  {
    const std::lock_guard lock(mutex);
    if (const auto at = most_dynamic.find(kernel); at != most_dynamic.end())
      most = std::max(most, static_cast<std::size_t>(at->second));
  }
  if (config.dynamicSmemBytes > most) return error(cudaErrorInvalidValue);
  constexpr std::size_t most_parameters = 4096;
  if (bytes > most_parameters) return error(cudaErrorInvalidValue);
  dim3 cluster;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) return error(cudaErrorNotSupported);
    if (attribute.id == cudaLaunchAttributeClusterDimension)
      cluster = {attribute.val.clusterDim.x, attribute.val.clusterDim.y, attribute.val.clusterDim.z};
  }
  constexpr unsigned most_blocks = 8;  // of a cluster, on every device that has them
  const std::uint64_t blocks = std::uint64_t{cluster.x} * cluster.y * cluster.z;
  if (blocks == 0 || blocks > most_blocks || g.x % cluster.x != 0 || g.y % cluster.y != 0 || g.z % cluster.z != 0 ||
      (blocks > 1 && compute_capability() < 90))
    return error(cudaErrorInvalidConfiguration);
  return submit(config.stream, [=] {
    grid running;
    running.function = kernel;
    running.kernel = function_name(kernel);
    running.size = g;
    running.block = b;
    running.cluster = cluster;
    running.shared = config.dynamicSmemBytes;
    running.parameters = reinterpret_cast<std::uintptr_t>(parameters.get());
    running.parameter_bytes = bytes;
    run_grid(running, kernel, call, parameters.get());
  });
}

namespace {

// Whether so many bytes may be copied from or to there.
bool good_memory(const void* p, std::size_t bytes) {
  return !is_device_memory(p) || addressable_bytes(p, bytes) == bytes;
}

cudaError_t copy(void* to, const void* from, std::size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  if (!to || !from || !good_memory(to, bytes) || !good_memory(from, bytes)) return error(cudaErrorInvalidValue);
  return submit(stream, [=] {
    std::memmove(to, from, bytes);
    if (is_device_memory(to)) {
      if (is_device_memory(from))
        std::memmove(state_of(to), state_of(from), bytes);
      else
        mark(to, bytes, set);
    }
  });
}

cudaError_t take(void** p, std::size_t bytes) {
  *p = nullptr;
  if (bytes == 0) return cudaSuccess;
  *p = take_device_memory(bytes);
  return *p ? cudaSuccess : error(cudaErrorMemoryAllocation);
}

// What a capture cannot hold, and would break.
bool capturing() {
  const std::lock_guard lock(mutex);
  return captures != 0;
}

}  // namespace

unsigned char* state_of(const void* p) { return arena_state + (reinterpret_cast<std::uintptr_t>(p) - arena_begin); }

}  // namespace cuda_emulation

using namespace cuda_emulation;

#define MLKIT_BEGIN(name) \
  if (const cudaError_t injected = begin_call(#name)) return injected

const char* cudaGetErrorName(cudaError_t code) {
  switch (code) {
#define MLKIT_NAME(name) \
  case name: return #name;
    MLKIT_NAME(cudaSuccess)
    MLKIT_NAME(cudaErrorInvalidValue)
    MLKIT_NAME(cudaErrorMemoryAllocation)
    MLKIT_NAME(cudaErrorInitializationError)
    MLKIT_NAME(cudaErrorInvalidConfiguration)
    MLKIT_NAME(cudaErrorInsufficientDriver)
    MLKIT_NAME(cudaErrorInvalidDeviceFunction)
    MLKIT_NAME(cudaErrorNoDevice)
    MLKIT_NAME(cudaErrorInvalidDevice)
    MLKIT_NAME(cudaErrorNoKernelImageForDevice)
    MLKIT_NAME(cudaErrorUnsupportedPtxVersion)
    MLKIT_NAME(cudaErrorInvalidResourceHandle)
    MLKIT_NAME(cudaErrorNotReady)
    MLKIT_NAME(cudaErrorIllegalAddress)
    MLKIT_NAME(cudaErrorLaunchOutOfResources)
    MLKIT_NAME(cudaErrorMisalignedAddress)
    MLKIT_NAME(cudaErrorLaunchFailure)
    MLKIT_NAME(cudaErrorNotSupported)
    MLKIT_NAME(cudaErrorStreamCaptureUnsupported)
    MLKIT_NAME(cudaErrorStreamCaptureInvalidated)
    MLKIT_NAME(cudaErrorUnknown)
#undef MLKIT_NAME
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t code) {
  switch (code) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    case cudaErrorUnsupportedPtxVersion: return "the provided PTX was compiled with an unsupported toolchain.";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorMisalignedAddress: return "misaligned address";
    default: return "an error of the emulation";
  }
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetDeviceCount(int* count) {
  MLKIT_BEGIN(cudaGetDeviceCount);
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  MLKIT_BEGIN(cudaGetDevice);
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  MLKIT_BEGIN(cudaSetDevice);
  return device == 0 ? cudaSuccess : error(cudaErrorInvalidDevice);
}
cudaError_t cudaDeviceSynchronize() {
  MLKIT_BEGIN(cudaDeviceSynchronize);
  return capturing() ? error(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaDeviceReset() { return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  MLKIT_BEGIN(cudaDeviceGetAttribute);
  if (device != 0) return error(cudaErrorInvalidDevice);
  const bool hopper = compute_capability() >= 90;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = most_threads; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = shared_without_asking; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrClockRate: *value = 1980000; break;
    case cudaDevAttrMultiProcessorCount: *value = 6; break;  // few, so that small grids have several waves
    case cudaDevAttrL2CacheSize: *value = (hopper ? 50 : 40) << 20; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrComputeCapabilityMajor: *value = compute_capability() / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = compute_capability() % 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = shared_per_block() + 1024; break;
    case cudaDevAttrPageableMemoryAccess: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shared_per_block(); break;
    case cudaDevAttrMemoryPoolsSupported: *value = 1; break;
    default: return error(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  MLKIT_BEGIN(cudaGetDeviceProperties);
  if (device != 0) return error(cudaErrorInvalidDevice);
  *p = {};
  std::snprintf(p->name, sizeof p->name, "emulated GPU");
  p->totalGlobalMem = device_memory_bytes;
  const auto ask = [](cudaDeviceAttr attribute) {
    int value = 0;
    (void)cudaDeviceGetAttribute(&value, attribute, 0);
    return value;
  };
  p->sharedMemPerBlock = shared_without_asking;
  p->sharedMemPerBlockOptin = static_cast<std::size_t>(shared_per_block());
  p->sharedMemPerMultiprocessor = p->sharedMemPerBlockOptin + 1024;
  p->major = compute_capability() / 10;
  p->minor = compute_capability() % 10;
  p->multiProcessorCount = ask(cudaDevAttrMultiProcessorCount);
  p->l2CacheSize = ask(cudaDevAttrL2CacheSize);
  p->maxThreadsPerBlock = most_threads;
  p->maxThreadsPerMultiProcessor = 2048;
  p->warpSize = 32;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* p) {
  MLKIT_BEGIN(cudaPointerGetAttributes);
  auto* const q = const_cast<void*>(p);
  *attributes = {cudaMemoryTypeUnregistered, -2, nullptr, q};
  if (is_device_memory(p)) *attributes = {cudaMemoryTypeDevice, 0, q, nullptr};
  if (is_pinned(p)) *attributes = {cudaMemoryTypeHost, 0, q, q};
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** p, std::size_t bytes) {
  MLKIT_BEGIN(cudaMalloc);
  return capturing() ? error(cudaErrorStreamCaptureUnsupported) : take(p, bytes);
}
cudaError_t cudaFree(void* p) {
  MLKIT_BEGIN(cudaFree);
  if (capturing()) return error(cudaErrorStreamCaptureUnsupported);
  return !p || give_device_memory_back(p) ? cudaSuccess : error(cudaErrorInvalidValue);
}
cudaError_t cudaMallocHost(void** p, std::size_t bytes) {
  MLKIT_BEGIN(cudaMallocHost);
  *p = std::malloc(bytes);
  pin(*p);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* p) {
  if (!p) return cudaSuccess;
  if (!unpin(p)) return error(cudaErrorInvalidValue);
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  MLKIT_BEGIN(cudaMemGetInfo);
  *total = device_memory_bytes;
  *free = device_memory_bytes - in_use().bytes;
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  MLKIT_BEGIN(cudaMemcpy);
  return capturing() ? error(cudaErrorStreamCaptureUnsupported) : copy(to, from, bytes, nullptr);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  MLKIT_BEGIN(cudaMemcpyAsync);
  return copy(to, from, bytes, stream);
}
cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
                              std::size_t width, std::size_t height, cudaMemcpyKind, cudaStream_t stream) {
  MLKIT_BEGIN(cudaMemcpy2DAsync);
  for (std::size_t i = 0; i < height; ++i)
    if (const auto code =
            copy(static_cast<char*>(to) + i * to_pitch, static_cast<const char*>(from) + i * from_pitch, width, stream))
      return code;
  return cudaSuccess;
}
cudaError_t cudaMemset(void* p, int value, std::size_t bytes) {
  MLKIT_BEGIN(cudaMemset);
  return cudaMemsetAsync(p, value, bytes, nullptr);
}
cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t stream) {
  MLKIT_BEGIN(cudaMemsetAsync);
  if (bytes == 0) return cudaSuccess;
  if (!is_device_memory(p) || !good_memory(p, bytes)) return error(cudaErrorInvalidValue);
  return submit(stream, [=] {
    std::memset(p, value, bytes);
    mark(p, bytes, set);
  });
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps* properties) {
  MLKIT_BEGIN(cudaMemPoolCreate);
  if (properties->location.id != 0 || properties->location.type != cudaMemLocationTypeDevice)
    return error(cudaErrorInvalidValue);
  *pool = new CUmemPoolHandle_st;
  return cudaSuccess;
}
cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) {
  delete pool;
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value) {
  MLKIT_BEGIN(cudaMemPoolSetAttribute);
  if (attribute != cudaMemPoolAttrReleaseThreshold) return error(cudaErrorInvalidValue);
  std::memcpy(&pool->release_threshold, value, sizeof pool->release_threshold);
  return cudaSuccess;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value) {
  MLKIT_BEGIN(cudaMemPoolGetAttribute);
  const std::uint64_t answer = attribute == cudaMemPoolAttrReleaseThreshold ? pool->release_threshold : in_use().bytes;
  std::memcpy(value, &answer, sizeof answer);
  return cudaSuccess;
}
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, std::size_t) { return cudaSuccess; }
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int device) {
  static CUmemPoolHandle_st of_device;
  *pool = &of_device;
  return device == 0 ? cudaSuccess : error(cudaErrorInvalidDevice);
}
cudaError_t cudaMallocAsync(void** p, std::size_t bytes, cudaStream_t stream) {
  MLKIT_BEGIN(cudaMallocAsync);
  return cudaMallocFromPoolAsync(p, bytes, nullptr, stream);
}
// A graph's allocations keep their place; each launch finds them as if taken anew.
cudaError_t cudaMallocFromPoolAsync(void** p, std::size_t bytes, cudaMemPool_t, cudaStream_t stream) {
  MLKIT_BEGIN(cudaMallocFromPoolAsync);
  if (const auto code = take(p, bytes)) return code;
  if (graph* g = graph_of(stream)) {
    g->taken.push_back(*p);
    g->work.push_back([q = *p] { reuse_device_memory(q); });
  }
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* p, cudaStream_t stream) {
  MLKIT_BEGIN(cudaFreeAsync);
  if (!p) return cudaSuccess;
  if (graph* g = graph_of(stream)) {
    if (std::find(g->taken.begin(), g->taken.end(), p) == g->taken.end()) return error(cudaErrorInvalidValue);
    g->freed.push_back(p);
    return cudaSuccess;
  }
  return give_device_memory_back(p) ? cudaSuccess : error(cudaErrorInvalidValue);
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  MLKIT_BEGIN(cudaStreamCreate);
  *stream = new CUstream_st;
  count(taken.streams, 1);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  count(taken.streams, -1);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  MLKIT_BEGIN(cudaStreamSynchronize);
  return graph_of(stream) ? error(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaStreamSynchronize(stream); }
cudaError_t cudaStreamGetDevice(cudaStream_t, int* device) {
  MLKIT_BEGIN(cudaStreamGetDevice);
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  MLKIT_BEGIN(cudaEventCreate);
  *event = new CUevent_st;
  count(taken.events, 1);
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  count(taken.events, -1);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  MLKIT_BEGIN(cudaEventRecord);
  event->when = std::chrono::steady_clock::now();
  event->recorded = true;
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
  MLKIT_BEGIN(cudaEventSynchronize);
  return capturing() ? error(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  MLKIT_BEGIN(cudaEventElapsedTime);
  if (!from->recorded || !to->recorded) return error(cudaErrorInvalidResourceHandle);
  *milliseconds = std::chrono::duration<float, std::milli>(to->when - from->when).count();
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  MLKIT_BEGIN(cudaStreamBeginCapture);
  if (!stream || stream == cudaStreamLegacy || stream->captured) return error(cudaErrorStreamCaptureUnsupported);
  stream->captured = std::make_unique<graph>();
  const std::lock_guard lock(mutex);
  ++captures;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* result) {
  MLKIT_BEGIN(cudaStreamEndCapture);
  if (!graph_of(stream)) return error(cudaErrorInvalidValue);
  *result = new CUgraph_st{std::shared_ptr<graph>(std::move(stream->captured))};
  const std::lock_guard lock(mutex);
  --captures;
  ++taken.graphs;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = graph_of(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t g, unsigned long long) {
  MLKIT_BEGIN(cudaGraphInstantiate);
  *exec = new CUgraphExec_st{g->g};
  count(taken.graphs, 1);
  return cudaSuccess;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  MLKIT_BEGIN(cudaGraphLaunch);
  for (const auto& work : exec->g->work) work();
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t g) {
  delete g;
  count(taken.graphs, -1);
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  count(taken.graphs, -1);
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  MLKIT_BEGIN(cudaGetDriverEntryPointByVersion);
  const bool known = std::string_view(name) == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(cuTensorMapEncodeTiled) : nullptr;
  if (result) *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return known ? cudaSuccess : error(cudaErrorInvalidValue);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  MLKIT_BEGIN(cudaFuncSetAttribute);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > shared_per_block()) return error(cudaErrorInvalidValue);
  const std::lock_guard lock(mutex);
  most_dynamic[kernel] = value;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  MLKIT_BEGIN(cudaFuncGetAttributes);
  *attributes = {};
  attributes->maxThreadsPerBlock = most_threads;
  attributes->numRegs = 64;
  const auto& variables = shared_variables();
  auto kernels = kernels_of_variables();
  claim_variables(kernel, kernels);
  for (std::size_t i = 0; i < variables.size(); ++i)
    if (kernels[i] == kernel) attributes->sharedSizeBytes += variables[i].bytes;
  attributes->ptxVersion = attributes->binaryVersion = compute_capability();
  const std::lock_guard lock(mutex);
  const auto at = most_dynamic.find(kernel);
  attributes->maxDynamicSharedSizeBytes =
      at == most_dynamic.end() ? static_cast<int>(shared_without_asking) : at->second;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, std::size_t shared) {
  MLKIT_BEGIN(cudaOccupancyMaxActiveBlocksPerMultiprocessor);
  if (threads < 1 || threads > most_threads) return error(cudaErrorInvalidValue);
  constexpr std::size_t reserved = 1024;  // for each block
  *blocks = std::min(std::min(32, 2048 / threads),
                     static_cast<int>((static_cast<std::size_t>(shared_per_block()) + reserved) / (shared + reserved)));
  return cudaSuccess;
}
