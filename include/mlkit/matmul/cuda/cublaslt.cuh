// Plain products by cuBLASLt: c = alpha left right (+ bias) (+ c), planned once for each shape.
#pragma once

#include <cublasLt.h>

#include <map>
#include <memory>

#include "../../core/cuda.cuh"
#include "../operand.hpp"

namespace MLKIT_NAMESPACE::detail {

[[noreturn]] inline void fail_cublaslt(std::string_view what, cublasStatus_t status) {
  throw_error<device_error>({what, ": cuBLASLt status ", static_cast<int>(status),
                             status == CUBLAS_STATUS_NOT_INITIALIZED ? ", the library could not be initialised"
                             : status == CUBLAS_STATUS_ALLOC_FAILED  ? ", memory is short"
                             : status == CUBLAS_STATUS_ARCH_MISMATCH ? ", the library has no code for this GPU"
                                                                     : ""});
}
inline void check_cublaslt(std::string_view what, cublasStatus_t status) {
  if (status != CUBLAS_STATUS_SUCCESS) fail_cublaslt(what, status);
}

template <storage T>
constexpr cudaDataType_t cublas_type() noexcept {
  if constexpr (std::is_same_v<T, float>) return CUDA_R_32F;
  if constexpr (std::is_same_v<T, double>) return CUDA_R_64F;
  if constexpr (std::is_same_v<T, bf16>) return CUDA_R_16BF;
  if constexpr (std::is_same_v<T, f16>) return CUDA_R_16F;
}

/// One product as cuBLASLt sees it, which is column by column: rows are the right operand's lines.
struct cublaslt_problem {
  std::int64_t rows, cols, depth;
  std::int64_t right_ld, left_ld, c_ld;
  std::int64_t right_turned, left_turned;
  std::int64_t operand_type, c_type;
  std::int64_t right_alignment, left_alignment, c_alignment;
  std::int64_t has_bias, adds;
  std::int64_t device;
  friend auto operator<=>(const cublaslt_problem&, const cublaslt_problem&) = default;
};

/// Plans of products on one device. They stay for the life of the process: a GPU's context may be gone before statics
/// are destroyed.
class cublaslt {
 public:
  static cublaslt& on(int device) {
    static std::array<std::once_flag, most_devices> once;
    static std::array<cublaslt*, most_devices> all{};
    const auto i = static_cast<std::size_t>(device);
    std::call_once(once[i], [&] { all[i] = new cublaslt; });
    return *all[i];
  }

  /// Whether there is a way to compute this; then it has been given to the stream.
  bool run(std::string_view function, const cuda& exec, const cublaslt_problem& problem, const void* right,
           const void* left, void* c, const void* bias, double alpha) {
    const std::lock_guard lock(mutex_);
    plan& p = plan_of(problem);
    if (!p.found) return false;
    if (bias) set(p.desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    const device_memory<std::byte> memory(exec, static_cast<index_t>(p.workspace));
    const float alpha32 = static_cast<float>(alpha), beta32 = problem.adds ? 1.0f : 0.0f;
    const double beta64 = problem.adds ? 1.0 : 0.0;
    const bool wide = problem.c_type == CUDA_R_64F;
    check_cublaslt(function, cublasLtMatmul(handle_, p.desc, wide ? static_cast<const void*>(&alpha) : &alpha32, right,
                                            p.right, left, p.left, wide ? static_cast<const void*>(&beta64) : &beta32,
                                            c, p.c, c, p.c, &p.algorithm, memory.data(), p.workspace, exec.stream()));
    return true;
  }

 private:
  struct plan {
    cublasLtMatmulDesc_t desc{};
    cublasLtMatrixLayout_t right{}, left{}, c{};
    cublasLtMatmulAlgo_t algorithm{};
    std::size_t workspace = 0;
    bool found = false;
  };

  cublaslt() { check_cublaslt("cublasLtCreate", cublasLtCreate(&handle_)); }

  template <class T>
  static void set(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute, const T& value) {
    check_cublaslt("cublasLtMatmulDescSetAttribute",
                   cublasLtMatmulDescSetAttribute(desc, attribute, &value, sizeof value));
  }
  template <class T>
  static void set(cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t attribute, const T& value) {
    check_cublaslt("cublasLtMatmulPreferenceSetAttribute",
                   cublasLtMatmulPreferenceSetAttribute(p, attribute, &value, sizeof value));
  }

  plan& plan_of(const cublaslt_problem& q) {
    const auto [at, fresh] = plans_.try_emplace(q);
    plan& p = at->second;
    if (!fresh) return p;
    const auto type = static_cast<cudaDataType_t>(q.operand_type), c_type = static_cast<cudaDataType_t>(q.c_type);
    const bool wide = type == CUDA_R_64F;
    check_cublaslt("cublasLtMatmulDescCreate",
                   cublasLtMatmulDescCreate(&p.desc, wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F,
                                            wide ? CUDA_R_64F : CUDA_R_32F));
    set(p.desc, CUBLASLT_MATMUL_DESC_TRANSA, q.right_turned ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(p.desc, CUBLASLT_MATMUL_DESC_TRANSB, q.left_turned ? CUBLAS_OP_T : CUBLAS_OP_N);
    if (q.has_bias) set(p.desc, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    const auto layout = [](cublasLtMatrixLayout_t& to, cudaDataType_t t, std::int64_t rows, std::int64_t cols,
                           std::int64_t ld) {
      check_cublaslt("cublasLtMatrixLayoutCreate", cublasLtMatrixLayoutCreate(&to, t, static_cast<std::uint64_t>(rows),
                                                                              static_cast<std::uint64_t>(cols), ld));
    };
    layout(p.right, type, q.right_turned ? q.depth : q.rows, q.right_turned ? q.rows : q.depth, q.right_ld);
    layout(p.left, type, q.left_turned ? q.cols : q.depth, q.left_turned ? q.depth : q.cols, q.left_ld);
    layout(p.c, c_type, q.rows, q.cols, q.c_ld);

    cublasLtMatmulPreference_t preference{};
    check_cublaslt("cublasLtMatmulPreferenceCreate", cublasLtMatmulPreferenceCreate(&preference));
    set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, most_workspace);
    const auto alignment = [&](cublasLtMatmulPreferenceAttributes_t attribute, std::int64_t bytes) {
      set(preference, attribute, static_cast<std::uint32_t>(bytes));
    };
    alignment(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, q.right_alignment);
    alignment(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, q.left_alignment);
    alignment(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, q.c_alignment);
    alignment(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, q.c_alignment);
    cublasLtMatmulHeuristicResult_t result{};
    int count = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(handle_, p.desc, p.right, p.left, p.c, p.c, preference, 1, &result, &count);
    (void)cublasLtMatmulPreferenceDestroy(preference);
    if (status != CUBLAS_STATUS_NOT_SUPPORTED) check_cublaslt("cublasLtMatmulAlgoGetHeuristic", status);
    if (status == CUBLAS_STATUS_SUCCESS && count > 0 && result.state == CUBLAS_STATUS_SUCCESS) {
      p.algorithm = result.algo;
      p.workspace = result.workspaceSize;
      p.found = true;
    }
    return p;
  }

  static constexpr std::uint64_t most_workspace = std::uint64_t{32} << 20;

  cublasLtHandle_t handle_{};
  std::mutex mutex_;
  std::map<cublaslt_problem, plan> plans_;
};

// The largest power of two, 256 at most, that divides an address.
inline std::int64_t alignment_of(const void* p) noexcept {
  const auto bits = reinterpret_cast<std::uintptr_t>(p) | 256;
  return static_cast<std::int64_t>(bits & (~bits + 1));
}

// A source whose rows are runs, each longer than its columns: what cuBLASLt can read.
template <class T>
bool plain_rows(const dense_source<T>& s) noexcept {
  return (s.col_stride == 1 || s.cols() == 1) && (s.row_stride >= s.cols() || s.rows() == 1) && s.row_stride >= 0;
}

/// c = alpha left right + bias (+ c), bias [columns] or null. False where cuBLASLt cannot; nothing has happened then.
template <class E, class C>
bool multiply_plainly(std::string_view function, const cuda& exec, const operand<dense_source<E>>& left,
                      const operand<dense_source<E>>& right, const matrix_view<C>& c, double alpha, const C* bias,
                      bool adds) {
  if (!plain_rows(left.source) || !plain_rows(right.source)) return false;
  if ((c.stride(1) != 1 && c.extent(1) > 1) || (c.stride(0) < c.extent(1) && c.extent(0) > 1)) return false;
  if (left.depth() == 0) return false;
  const auto ld = [](const dense_source<E>& s) { return std::max(s.rows() == 1 ? 1 : s.row_stride, s.cols()); };
  const cublaslt_problem problem{.rows = c.extent(1),
                                 .cols = c.extent(0),
                                 .depth = left.depth(),
                                 .right_ld = ld(right.source),
                                 .left_ld = ld(left.source),
                                 .c_ld = std::max(c.extent(0) == 1 ? 1 : c.stride(0), c.extent(1)),
                                 .right_turned = right.depth_first,
                                 .left_turned = !left.depth_first,
                                 .operand_type = cublas_type<E>(),
                                 .c_type = cublas_type<C>(),
                                 .right_alignment = alignment_of(right.source.data),
                                 .left_alignment = alignment_of(left.source.data),
                                 .c_alignment = alignment_of(c.data),
                                 .has_bias = bias != nullptr,
                                 .adds = adds,
                                 .device = exec.device()};
  const current_device here(exec.device());
  return cublaslt::on(exec.device())
      .run(function, exec, problem, right.source.data, left.source.data, c.data, bias, alpha);
}

}  // namespace MLKIT_NAMESPACE::detail
