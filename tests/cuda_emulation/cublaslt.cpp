// Products, as cuBLASLt describes them: d = epilogue(alpha op(a) op(b) + beta c), matrices by columns unless a layout
// says otherwise.
#include <cublasLt.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "internal.hpp"
#include "runtime.hpp"

struct cublasLtContext {};

struct cublasLtMatmulDescOpaque_t {
  cublasComputeType_t compute;
  cudaDataType_t scale;
  cublasOperation_t a = CUBLAS_OP_N, b = CUBLAS_OP_N;
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  const void* bias = nullptr;
  std::int64_t bias_batch_stride = 0;
  std::int32_t bias_type = -1;  // as d
};

struct cublasLtMatrixLayoutOpaque_t {
  cudaDataType_t type;
  std::uint64_t rows, cols;
  std::int64_t ld;
  cublasLtOrder_t order = CUBLASLT_ORDER_COL;
  std::int32_t batches = 1;
  std::int64_t batch_stride = 0;

  std::int64_t offset(std::uint64_t row, std::uint64_t col, std::int32_t batch) const {
    const auto r = static_cast<std::int64_t>(row), c = static_cast<std::int64_t>(col);
    return (order == CUBLASLT_ORDER_COL ? c * ld + r : r * ld + c) + batch * batch_stride;
  }
};

struct cublasLtMatmulPreferenceOpaque_t {
  std::uint64_t workspace = 0;
  std::uint32_t alignment[4] = {256, 256, 256, 256};
};

namespace cuda_emulation {
namespace {

std::size_t size_of(cudaDataType_t type) {
  switch (type) {
    case CUDA_R_64F: return 8;
    case CUDA_R_32F: return 4;
    default: return 2;
  }
}

double read(cudaDataType_t type, const void* data, std::int64_t index) {
  const unsigned char* p = static_cast<const unsigned char*>(data) + index * static_cast<std::int64_t>(size_of(type));
  if (is_device_memory(p)) {
    const std::size_t bytes = size_of(type);
    if (const std::size_t good = addressable_bytes(p, bytes); good < bytes)
      throw fault("CUDA emulation: cublasLtMatmul reads out of bounds: " +
                  where_in_device_memory(reinterpret_cast<std::uintptr_t>(p)));
    // Without instrumentation nothing says what kernels wrote.
    if (instrumented && *state_of(p) != set)
      throw fault("CUDA emulation: cublasLtMatmul reads what nobody has written: " +
                  where_in_device_memory(reinterpret_cast<std::uintptr_t>(p)));
  } else {
    throw fault("CUDA emulation: cublasLtMatmul reads host memory");
  }
  switch (type) {
    case CUDA_R_64F: {
      double x;
      std::memcpy(&x, p, sizeof x);
      return x;
    }
    case CUDA_R_32F: {
      float x;
      std::memcpy(&x, p, sizeof x);
      return static_cast<double>(x);
    }
    default: {
      std::uint16_t bits;
      std::memcpy(&bits, p, sizeof bits);
      if (type == CUDA_R_16F) return static_cast<double>(widen_f16(bits));
      return static_cast<double>(std::bit_cast<float>(std::uint32_t{bits} << 16));
    }
  }
}

void write(cudaDataType_t type, void* data, std::int64_t index, double value) {
  const std::size_t bytes = size_of(type);
  unsigned char* p = static_cast<unsigned char*>(data) + index * static_cast<std::int64_t>(bytes);
  if (!is_device_memory(p) || addressable_bytes(p, bytes) < bytes)
    throw fault("CUDA emulation: cublasLtMatmul writes out of bounds: " +
                where_in_device_memory(reinterpret_cast<std::uintptr_t>(p)));
  mark(p, bytes, set);
  const auto rounded = static_cast<float>(value);
  switch (type) {
    case CUDA_R_64F: std::memcpy(p, &value, sizeof value); break;
    case CUDA_R_32F: std::memcpy(p, &rounded, sizeof rounded); break;
    default: {
      const auto bits = static_cast<std::uint16_t>(type == CUDA_R_16F ? round_f16(rounded) : round_bf16(rounded));
      std::memcpy(p, &bits, sizeof bits);
    }
  }
}

// The matrix that op(m) is, by rows.
template <class T>
std::vector<T> unfold(const cublasLtMatrixLayoutOpaque_t& m, bool turned, const void* data, std::int32_t batch) {
  std::vector<T> all(m.rows * m.cols);
  for (std::uint64_t r = 0; r < m.rows; ++r)
    for (std::uint64_t c = 0; c < m.cols; ++c)
      all[turned ? c * m.rows + r : r * m.cols + c] = static_cast<T>(read(m.type, data, m.offset(r, c, batch)));
  return all;
}

template <class T>
void multiply(const cublasLtMatmulDescOpaque_t& desc, double alpha, const void* a,
              const cublasLtMatrixLayoutOpaque_t& la, const void* b, const cublasLtMatrixLayoutOpaque_t& lb,
              double beta, const void* c, const cublasLtMatrixLayoutOpaque_t& lc, void* d,
              const cublasLtMatrixLayoutOpaque_t& ld) {
  const std::uint64_t depth = desc.a == CUBLAS_OP_N ? la.cols : la.rows;
  const int epilogue = desc.epilogue;
  std::vector<T> sums(ld.cols);
  for (std::int32_t batch = 0; batch < ld.batches; ++batch) {
    const auto left = unfold<T>(la, desc.a != CUBLAS_OP_N, a, batch);
    const auto right = unfold<T>(lb, desc.b != CUBLAS_OP_N, b, batch);
    for (std::uint64_t r = 0; r < ld.rows; ++r) {
      std::fill(sums.begin(), sums.end(), T{});
      for (std::uint64_t k = 0; k < depth; ++k)
        for (std::uint64_t col = 0; col < ld.cols; ++col) sums[col] += left[r * depth + k] * right[k * ld.cols + col];
      double bias = 0;
      if (epilogue & CUBLASLT_EPILOGUE_BIAS)
        bias = read(desc.bias_type < 0 ? ld.type : static_cast<cudaDataType_t>(desc.bias_type), desc.bias,
                    static_cast<std::int64_t>(r) + batch * desc.bias_batch_stride);
      for (std::uint64_t col = 0; col < ld.cols; ++col) {
        double x = alpha * static_cast<double>(sums[col]) + bias;
        if (beta != 0) x += beta * read(lc.type, c, lc.offset(r, col, batch));
        if (epilogue & CUBLASLT_EPILOGUE_RELU) x = std::max(x, 0.0);
        if (epilogue & CUBLASLT_EPILOGUE_GELU)  // by tanh, as cuBLASLt has it
          x = 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
        write(ld.type, d, ld.offset(r, col, batch), x);
      }
    }
  }
}

bool aligned(const void* p, std::size_t to) { return reinterpret_cast<std::uintptr_t>(p) % to == 0; }

// Shapes and types that go together.
cublasStatus_t check_shapes(const cublasLtMatmulDescOpaque_t& desc, const cublasLtMatrixLayoutOpaque_t& a,
                            const cublasLtMatrixLayoutOpaque_t& b, const cublasLtMatrixLayoutOpaque_t& c,
                            const cublasLtMatrixLayoutOpaque_t& d) {
  const auto rows = [](const cublasLtMatrixLayoutOpaque_t& m, cublasOperation_t op) {
    return op == CUBLAS_OP_N ? m.rows : m.cols;
  };
  const auto cols = [](const cublasLtMatrixLayoutOpaque_t& m, cublasOperation_t op) {
    return op == CUBLAS_OP_N ? m.cols : m.rows;
  };
  if (rows(a, desc.a) != d.rows || cols(b, desc.b) != d.cols || cols(a, desc.a) != rows(b, desc.b) ||
      c.rows != d.rows || c.cols != d.cols)
    return CUBLAS_STATUS_INVALID_VALUE;
  for (const auto* m : {&a, &b, &c, &d}) {
    const auto run = static_cast<std::int64_t>(m->order == CUBLASLT_ORDER_COL ? m->rows : m->cols);
    if (m->ld < run || m->batches != d.batches || m->rows == 0 || m->cols == 0) return CUBLAS_STATUS_INVALID_VALUE;
  }
  // From the table of what cublasLtMatmul supports: operands of one type; results of theirs, or f32.
  const bool wide = desc.compute == CUBLAS_COMPUTE_64F;
  const bool types = a.type == b.type && c.type == d.type && desc.scale == (wide ? CUDA_R_64F : CUDA_R_32F) &&
                     (a.type == CUDA_R_64F) == wide && (d.type == a.type || (!wide && d.type == CUDA_R_32F));
  return types ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

template <class T>
cublasStatus_t set_value(T& to, const void* value, std::size_t bytes) {
  if (bytes != sizeof(T) || !value) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(&to, value, sizeof(T));
  return CUBLAS_STATUS_SUCCESS;
}

// A test that wants a call of cuBLASLt to fail names a code of the runtime's.
cublasStatus_t begin_cublaslt(const char* name) {
  switch (begin_call(name)) {
    case cudaSuccess: return CUBLAS_STATUS_SUCCESS;
    case cudaErrorMemoryAllocation: return CUBLAS_STATUS_ALLOC_FAILED;
    case cudaErrorNotSupported: return CUBLAS_STATUS_NOT_SUPPORTED;
    case cudaErrorInitializationError: return CUBLAS_STATUS_NOT_INITIALIZED;
    default: return CUBLAS_STATUS_EXECUTION_FAILED;
  }
}

}  // namespace
}  // namespace cuda_emulation

using namespace cuda_emulation;

#define MLKIT_BEGIN(name) \
  if (const cublasStatus_t injected = begin_cublaslt(#name)) return injected

const char* cublasLtGetStatusName(cublasStatus_t status) {
  switch (status) {
#define MLKIT_NAME(name) \
  case name: return #name;
    MLKIT_NAME(CUBLAS_STATUS_SUCCESS)
    MLKIT_NAME(CUBLAS_STATUS_NOT_INITIALIZED)
    MLKIT_NAME(CUBLAS_STATUS_ALLOC_FAILED)
    MLKIT_NAME(CUBLAS_STATUS_INVALID_VALUE)
    MLKIT_NAME(CUBLAS_STATUS_ARCH_MISMATCH)
    MLKIT_NAME(CUBLAS_STATUS_MAPPING_ERROR)
    MLKIT_NAME(CUBLAS_STATUS_EXECUTION_FAILED)
    MLKIT_NAME(CUBLAS_STATUS_INTERNAL_ERROR)
    MLKIT_NAME(CUBLAS_STATUS_NOT_SUPPORTED)
#undef MLKIT_NAME
  }
  return "unknown";
}
const char* cublasLtGetStatusString(cublasStatus_t status) { return cublasLtGetStatusName(status); }

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  MLKIT_BEGIN(cublasLtCreate);
  *handle = new cublasLtContext;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  delete handle;
  return CUBLAS_STATUS_SUCCESS;
}
std::size_t cublasLtGetVersion() { return 130000; }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t compute, cudaDataType_t scale) {
  MLKIT_BEGIN(cublasLtMatmulDescCreate);
  *desc = new cublasLtMatmulDescOpaque_t{.compute = compute, .scale = scale};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
  delete desc;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, std::size_t bytes) {
  MLKIT_BEGIN(cublasLtMatmulDescSetAttribute);
  std::int32_t ignored = 0;
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA: return set_value(desc->a, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB: return set_value(desc->b, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return set_value(desc->epilogue, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return set_value(desc->bias, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE: return set_value(desc->bias_batch_stride, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return set_value(desc->bias_type, value, bytes);
    case CUBLASLT_MATMUL_DESC_SCALE_TYPE: return set_value(desc->scale, value, bytes);
    case CUBLASLT_MATMUL_DESC_POINTER_MODE: return set_value(ignored, value, bytes);
    default: return CUBLAS_STATUS_INVALID_VALUE;
  }
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType_t type, std::uint64_t rows,
                                          std::uint64_t cols, std::int64_t ld) {
  MLKIT_BEGIN(cublasLtMatrixLayoutCreate);
  *layout = new cublasLtMatrixLayoutOpaque_t{.type = type, .rows = rows, .cols = cols, .ld = ld};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  delete layout;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute, const void* value,
                                                std::size_t bytes) {
  MLKIT_BEGIN(cublasLtMatrixLayoutSetAttribute);
  switch (attribute) {
    case CUBLASLT_MATRIX_LAYOUT_TYPE: return set_value(layout->type, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_ORDER: return set_value(layout->order, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_ROWS: return set_value(layout->rows, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_COLS: return set_value(layout->cols, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_LD: return set_value(layout->ld, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: return set_value(layout->batches, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET: return set_value(layout->batch_stride, value, bytes);
  }
  return CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  MLKIT_BEGIN(cublasLtMatmulPreferenceCreate);
  *preference = new cublasLtMatmulPreferenceOpaque_t;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  delete preference;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void* value,
                                                    std::size_t bytes) {
  MLKIT_BEGIN(cublasLtMatmulPreferenceSetAttribute);
  if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) return set_value(preference->workspace, value, bytes);
  if (attribute >= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES)
    return set_value(preference->alignment[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], value, bytes);
  std::uint32_t ignored = 0;
  return set_value(ignored, value, bytes);
}

// One algorithm, which wants a workspace where it may have one, and remembers for which alignments it was asked.
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                              cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference,
                                              int wanted, cublasLtMatmulHeuristicResult_t* results, int* found) {
  *found = 0;
  MLKIT_BEGIN(cublasLtMatmulAlgoGetHeuristic);
  if (wanted < 1) return CUBLAS_STATUS_INVALID_VALUE;
  if (const auto status = check_shapes(*desc, *a, *b, *c, *d)) return status;
  *results = {};
  results->state = CUBLAS_STATUS_SUCCESS;
  results->wavesCount = 1;
  results->workspaceSize = std::min<std::size_t>(preference->workspace, 1024);
  results->algo.data[0] = results->workspaceSize;
  for (int i = 0; i < 4; ++i) results->algo.data[1 + i] = preference->alignment[i];
  *found = 1;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void* alpha, const void* a,
                              cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout,
                              const void* beta, const void* c, cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algorithm, void* workspace,
                              std::size_t workspace_bytes, cudaStream_t stream) {
  MLKIT_BEGIN(cublasLtMatmul);
  if (const auto status = check_shapes(*desc, *a_layout, *b_layout, *c_layout, *d_layout)) return status;
  const void* const data[] = {a, b, c, d};
  if (algorithm) {
    if (workspace_bytes < algorithm->data[0]) return CUBLAS_STATUS_INVALID_VALUE;
    for (int i = 0; i < 4; ++i)
      if (!aligned(data[i], algorithm->data[1 + i])) return CUBLAS_STATUS_INVALID_VALUE;
  }
  if (workspace_bytes > 0 && (!is_device_memory(workspace) || !aligned(workspace, 16) ||
                              addressable_bytes(workspace, workspace_bytes) < workspace_bytes))
    return CUBLAS_STATUS_INVALID_VALUE;
  const bool wide = desc->scale == CUDA_R_64F;
  const auto factor = [&](const void* p) {
    return wide ? *static_cast<const double*>(p) : static_cast<double>(*static_cast<const float*>(p));
  };
  const double by = factor(alpha), keep = factor(beta);
  submit(stream, [=, desc = *desc, la = *a_layout, lb = *b_layout, lc = *c_layout, ld = *d_layout] {
    if (wide)
      multiply<double>(desc, by, a, la, b, lb, keep, c, lc, d, ld);
    else
      multiply<float>(desc, by, a, la, b, lb, keep, c, lc, d, ld);
  });
  return CUBLAS_STATUS_SUCCESS;
}
