// A product of 16-bit operands by Hopper's warpgroups: c = (left right^T + left2 right2^T) * columns + bias, in one
// pass. In code for sm_90a alone.
#pragma once

#include "thin.cuh"

#include <cuda.h>

namespace MLKIT_NAMESPACE::detail::warpgroup {

// A block makes tiles of 128 x 256, one after another, by steps of 64 along the depth. One thread has them copied into
// shared memory, four steps ahead; two warpgroups multiply 64 x 256 each.
inline constexpr int rows = 128, cols = 256, depth = 64, stages = 4, threads = 384;
inline constexpr int group = 16;  // rows of tiles that are made together, so that caches hold what they read
inline constexpr std::size_t stage_bytes = std::size_t{rows + cols} * depth * 2;

template <class Out, class A, class B>
struct problem {
  index_t m, n;
  int steps, steps2;  // along both depths
  int last_depth;     // of the second depth, in its last step, in units of 16
  Out* c;
  index_t c_row;
  const A* columns;
  const B* bias;
  bool early;
};

// Tile number `at` of a grid that is walked in groups of rows, down the rows first.
struct tile_walk {
  int row_tiles, col_tiles;
  __device__ __forceinline__ void find(int at, int& row, int& col) const {
    const int in_group = group * col_tiles;
    const int first = at / in_group * group;
    const int height = row_tiles - first < group ? row_tiles - first : group;
    row = first + at % in_group % height;
    col = at % in_group / height;
  }
};

// What four lanes hold of four columns each, turned: lane t of them gets what all had in place t.
__device__ __forceinline__ void exchange(std::uint32_t (&x)[4], int t) {
#pragma unroll
  for (int far = 1; far < 4; far *= 2)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int low = far == 1 ? 2 * i : i, high = low + far;
      const bool upper = (t & far) != 0;
      const std::uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? x[low] : x[high], far);
      (upper ? x[low] : x[high]) = got;
    }
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(MLKIT_CUDA_EMULATION)
// sums (+)= a b^T of 16 elements along the depth, the k-th in a line.
template <class E>
__device__ __forceinline__ void multiply(float (&sums)[128], std::uint64_t a, std::uint64_t b, int k, bool adds) {
  const auto offset = static_cast<std::uint64_t>(2 * k);
  if constexpr (std::is_same_v<E, bf16>)
    ptx::warpgroup_bf16(sums, a + offset, b + offset, adds);
  else
    ptx::warpgroup_f16(sums, a + offset, b + offset, adds);
}
#endif

template <class E, class Out, class A, class B>
__global__ __launch_bounds__(threads, 1) void product_kernel(const __grid_constant__ CUtensorMap left,
                                                             const __grid_constant__ CUtensorMap right,
                                                             const __grid_constant__ CUtensorMap left2,
                                                             const __grid_constant__ CUtensorMap right2,
                                                             const problem<Out, A, B> p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(MLKIT_CUDA_EMULATION)
  MLKIT_SHARED_MEMORY(unsigned char, dynamic);
  __shared__ std::uint64_t full_barriers[stages], empty_barriers[stages];
  unsigned char* const memory = dynamic + (1024 - ptx::shared_address(dynamic) % 1024) % 1024;
  const int thread = static_cast<int>(threadIdx.x), warps_group = thread / 128;
  if (thread == 0) {
    for (int i = 0; i < stages; ++i) {
      ptx::barrier_init(full_barriers + i, 1);
      ptx::barrier_init(empty_barriers + i, 8);
    }
    ptx::fence_barriers();
  }
  __syncthreads();

  const tile_walk walk{static_cast<int>(ceil_div(p.m, rows)), static_cast<int>(ceil_div(p.n, cols))};
  const int tiles = walk.row_tiles * walk.col_tiles, steps = p.steps + p.steps2;
  int stage = 0;
  std::uint32_t phase = 0;
  const auto advance = [&] {
    if (++stage == stages) stage = 0, phase ^= 1;
  };

  if (warps_group == 0) {
    ptx::give_registers<40>();
    if (thread == 0) {
      ptx::prefetch_map(&left);
      ptx::prefetch_map(&right);
      bool waited = !p.early;
      for (int at = static_cast<int>(blockIdx.x); at < tiles; at += static_cast<int>(gridDim.x)) {
        int row = 0, col = 0;
        walk.find(at, row, col);
        for (int step = 0; step < steps; ++step) {
          const bool second = step >= p.steps;
          if (second && !waited) {
            ptx::wait_for_previous_kernel();
            waited = true;
          }
          ptx::barrier_wait(empty_barriers + stage, phase ^ 1);
          ptx::barrier_expect(full_barriers + stage, stage_bytes);
          unsigned char* const to = memory + static_cast<std::size_t>(stage) * stage_bytes;
          const int k = (second ? step - p.steps : step) * depth;
          ptx::copy_box(to, second ? &left2 : &left, full_barriers + stage, k, row * rows);
          ptx::copy_box(to + rows * depth * 2, second ? &right2 : &right, full_barriers + stage, k, col * cols);
          advance();
        }
      }
    }
  } else {
    ptx::take_registers<232>();
    const int lane = thread % 32, warp = thread % 128 / 32, half = warps_group - 1;
    float sums[128];
    for (int at = static_cast<int>(blockIdx.x); at < tiles; at += static_cast<int>(gridDim.x)) {
      int row = 0, col = 0;
      walk.find(at, row, col);
      int before = -1;  // the stage whose products may still be under way
      // `full`: four products; else the end of the second depth, which is short. Each kind has its own code, so that
      // the compiler sees which products belong to which group.
      const auto make_step = [&](bool first, auto full) {
        ptx::barrier_wait(full_barriers + stage, phase);
        const unsigned char* const from = memory + static_cast<std::size_t>(stage) * stage_bytes;
        const std::uint64_t a = ptx::warpgroup_operand(from + half * 64 * depth * 2);
        const std::uint64_t b = ptx::warpgroup_operand(from + rows * depth * 2);
        ptx::warpgroup_fence();
        if constexpr (decltype(full)::value) {
#pragma unroll
          for (int k = 0; k < depth / 16; ++k) multiply<E>(sums, a, b, k, !first || k > 0);
        } else {
          for (int k = 0; k < p.last_depth; ++k) multiply<E>(sums, a, b, k, !first || k > 0);
        }
        ptx::warpgroup_commit();
        ptx::warpgroup_wait<1>();
        if (before >= 0 && lane == 0) ptx::barrier_arrive(empty_barriers + before);
        before = stage;
        advance();
      };
      const int full_steps = p.steps2 > 0 ? steps - 1 : steps;
      make_step(true, std::true_type{});
      for (int step = 1; step < full_steps; ++step) make_step(false, std::true_type{});
      if (full_steps < steps) make_step(false, std::false_type{});
      ptx::warpgroup_wait<0>();
#if !defined(MLKIT_CUDA_EMULATION)
      ptx::warpgroup_settle(sums);
#endif
      if (lane == 0) ptx::barrier_arrive(empty_barriers + before);

      // A lane has two columns of each eight. Four lanes exchange theirs, so that each has all eight of every fourth,
      // 16 bytes in a row.
      const int t = lane % 4;
      const index_t r0 = index_t{row} * rows + half * 64 + warp * 16 + lane / 4;
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const index_t r = r0 + 8 * upper;
#pragma unroll
        for (int j = 0; j < 32; j += 4) {
          std::uint32_t pairs[4];
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            float x0 = sums[(j + q) * 4 + upper * 2], x1 = sums[(j + q) * 4 + upper * 2 + 1];
            const index_t c = index_t{col} * cols + (j + q) * 8 + t * 2;
            if (p.columns && c < p.n)
              x0 *= static_cast<float>(p.columns[c]), x1 *= static_cast<float>(p.columns[c + 1]);
            if (p.bias && c < p.n) x0 += static_cast<float>(p.bias[c]), x1 += static_cast<float>(p.bias[c + 1]);
            pairs[q] = pack_pair<E>(x0, x1);
          }
          exchange(pairs, t);
          const index_t c = index_t{col} * cols + (j + t) * 8;
          if (r < p.m && c < p.n)
            __stcs(reinterpret_cast<uint4*>(p.c + r * p.c_row + c), make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
        }
      }
    }
  }
#endif
}

/// Whether the program has code for sm_90a: only that has barriers in shared memory.
template <class Kernel>
bool is_compiled(Kernel* kernel) {
  cudaFuncAttributes found{};
  check_cuda("cudaFuncGetAttributes", cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(kernel)));
  return found.sharedSizeBytes >= 2 * stages * sizeof(std::uint64_t);
}

using encode_function = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                     const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                     CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, asked for through the runtime, so that programs need not be linked with the driver.
inline encode_function encoder() {
  static const encode_function f = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result) !=
            cudaSuccess ||
        result != cudaDriverEntryPointSuccess)
      found = nullptr;
    return reinterpret_cast<encode_function>(found);
  }();
  return f;
}

// Boxes of `lines` lines and 64 elements of their depth; zeros past the ends.
template <class E>
bool make_map(CUtensorMap& map, const operand<dense_source<E>>& op, int lines) {
  const auto& s = op.source;
  const cuuint64_t extents[2] = {static_cast<cuuint64_t>(s.cols()), static_cast<cuuint64_t>(s.rows())};
  const cuuint64_t step = static_cast<cuuint64_t>(s.rows() == 1 ? s.cols() : s.row_stride) * sizeof(E);
  const cuuint32_t box[2] = {depth, static_cast<cuuint32_t>(lines)}, ones[2] = {1, 1};
  return encoder()(&map, std::is_same_v<E, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                   2, const_cast<E*>(s.data), extents, &step, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

inline index_t tiles_of(index_t m, index_t n) noexcept { return ceil_div(m, rows) * ceil_div(n, cols); }

/// Multiprocessors that have one tile less to make than others: they have time to spare in the beginning.
inline int spare_blocks(const cuda& exec, index_t m, index_t n) {
  const index_t all = exec.properties().multiprocessors;
  return static_cast<int>((all - tiles_of(m, n) % all) % all);
}

// Whether it is worth it: Hopper, operands that the copies reach, and tiles enough for all multiprocessors.
template <class E, class Out>
bool fits(const cuda& exec, const operand<dense_source<E>>& left, const operand<dense_source<E>>& right,
          const matrix_view<Out>& c) {
  const index_t m = c.extent(0), n = c.extent(1), all = exec.properties().multiprocessors;
  if (exec.properties().compute_capability != 90 || !encoder() || !std::is_same_v<E, Out>) return false;
  if (!reached_by_vectors(left) || !reached_by_vectors(right) || left.depth() < 512) return false;
  if (m >= INT32_MAX || n >= INT32_MAX || left.depth() >= INT32_MAX) return false;
  if (c.stride(1) != 1 || c.stride(0) % 8 != 0 || n % 8 != 0 || reinterpret_cast<std::uintptr_t>(c.data) % 16 != 0)
    return false;
  const index_t tiles = tiles_of(m, n), waves = ceil_div(tiles, all);
  return tiles * 10 >= waves * all * 8;
}

/// The product, if the device, the program and the operands allow it, and it is large enough to keep the device busy;
/// else false, and nothing has happened. left2 and right2 may have depth 0. `early`: the kernel before this one makes
/// left2 and may still be running.
template <class E, class Out, class A, class B>
bool run(std::string_view function, const cuda& exec, const operand<dense_source<E>>& left,
         const operand<dense_source<E>>& right, const operand<dense_source<E>>& left2,
         const operand<dense_source<E>>& right2, const matrix_view<Out>& c, const A* columns, const B* bias,
         bool early) {
  const index_t m = c.extent(0), n = c.extent(1);
  if (!fits<E>(exec, left, right, c)) return false;
  if (left2.depth() > 0 && !(reached_by_vectors(left2) && reached_by_vectors(right2))) return false;
  const auto kernel = product_kernel<E, Out, A, B>;
  static const bool compiled = is_compiled(kernel);
  if (!compiled) return false;
  CUtensorMap maps[4];
  if (!make_map(maps[0], left, rows) || !make_map(maps[1], right, cols)) return false;
  const bool second = left2.depth() > 0;
  if (!make_map(maps[2], second ? left2 : left, rows) || !make_map(maps[3], second ? right2 : right, cols))
    return false;
  const index_t steps2 = ceil_div(left2.depth(), depth);
  const problem<Out, A, B> p{.m = m,
                             .n = n,
                             .steps = static_cast<int>(ceil_div(left.depth(), depth)),
                             .steps2 = static_cast<int>(steps2),
                             .last_depth = static_cast<int>(ceil_div(left2.depth() - (steps2 - 1) * depth, 16)),
                             .c = c.data,
                             .c_row = c.stride(0),
                             .columns = columns,
                             .bias = bias,
                             .early = early};
  const index_t blocks = std::min<index_t>(tiles_of(m, n), exec.properties().multiprocessors);
  thin::launch_early(function, exec, early, kernel, {grid_of(blocks), dim3(threads), stages * stage_bytes + 1024},
                     maps[0], maps[1], maps[2], maps[3], p);
  return true;
}

}  // namespace MLKIT_NAMESPACE::detail::warpgroup
