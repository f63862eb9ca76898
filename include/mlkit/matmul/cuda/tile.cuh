// A product of 16-bit operands on tensor cores, for weights that are decoded on their way and for epilogues of any
// kind.
#pragma once

#include "access.cuh"

namespace MLKIT_NAMESPACE::detail::tile {

// A block makes a tile of c of 128 x 128 by steps of 32 along the depth, of which `stages` are in shared memory. Lines
// of shared memory are 80 bytes apart, so that the eight rows of a matrix lie in different banks.
inline constexpr int lines = 128, depth = 32, threads = 256, stages = 3;
inline constexpr int pitch = depth + 8;
inline constexpr int sum_pitch = lines + 8;
inline constexpr int run_length = 16;  // elements that a thread decodes at a time

/// Sources that are decoded in registers have a `run<Source>` of theirs: load(source, row, col, count) reads elements
/// [row, col .. col + count) of it, count <= 16, and pairs(table, words) gives all 16 as E, zeros after the last. The
/// table in shared memory, of 16 floats, is what fill_table(table) has put there.
template <class E, class Source>
struct run;

template <class Source>
inline constexpr bool is_copied = is_dense<Source>;

// One operand's part in filling the stages: dense ones are copied past the registers, others wait in them.
template <class E, class Source>
struct loader {
  run<E, Source> held;

  // What a thread decodes: a line's 16 elements along the depth, or 16 lines' elements at one depth.
  __device__ __forceinline__ void start(const device_operand<Source>& op, index_t first, index_t k, E*) {
    const int thread = static_cast<int>(threadIdx.x);
    const index_t row = op.depth_first ? first + thread / 2 : k + thread / 8;
    const index_t col = op.depth_first ? k + thread % 2 * run_length : first + thread % 8 * run_length;
    const index_t rows = op.depth_first ? op.lines : op.depth, cols = op.depth_first ? op.depth : op.lines;
    const index_t left = row < rows ? cols - col : 0;
    held.load(op.source, row, col, left < 0 ? 0 : left > run_length ? run_length : static_cast<int>(left));
  }
  __device__ __forceinline__ void finish(bool depth_first, const float* table, E* stage) const {
    const int thread = static_cast<int>(threadIdx.x);
    std::uint32_t words[run_length / 2];
    held.pairs(table, words);
    if (depth_first) {
      uint4* to = reinterpret_cast<uint4*>(stage + thread / 2 * pitch + thread % 2 * run_length);
      to[0] = make_uint4(words[0], words[1], words[2], words[3]);
      to[1] = make_uint4(words[4], words[5], words[6], words[7]);
    } else {
      E* to = stage + thread % 8 * run_length * pitch + thread / 8;
#pragma unroll
      for (int i = 0; i < run_length; ++i)
        to[i * pitch] = E::from_bits(static_cast<std::uint16_t>(words[i / 2] >> (i % 2 * 16)));
    }
  }
};
template <class E, class Source>
  requires is_copied<Source>
struct loader<E, Source> {
  __device__ __forceinline__ void start(const device_operand<Source>& op, index_t first, index_t k, E* stage) {
#pragma unroll
    for (int i = 0; i < lines * depth / 8 / threads; ++i) {
      const int piece = static_cast<int>(threadIdx.x) + i * threads;
      const index_t line = first + piece / 4, d = k + piece % 4 * 8;
      const bool valid = line < op.lines && d < op.depth;
      ptx::cp_async_16(stage + piece / 4 * pitch + piece % 4 * 8,
                       op.source.data + (valid ? line * op.source.row_stride + d : 0), valid);
    }
  }
  __device__ __forceinline__ void finish(bool, const float*, E*) const {}
};

// sums += a tile's product over one stage. Warps stand 2 x 4 on the tile, each on 64 x 32 of it.
template <class E>
__device__ __forceinline__ void multiply_stage(const E* lefts, const E* rights, float (&sums)[4][4][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const E* left = lefts + (warp / 4 * 64 + lane % 16) * pitch + lane / 16 * 8;
  const E* right = rights + (warp % 4 * 32 + lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < depth; k += 16) {
    std::uint32_t b[4][2];
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      std::uint32_t r[4];
      ptx::ldmatrix_x4(r, right + j * 8 * pitch + k);
      b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      std::uint32_t a[4];
      ptx::ldmatrix_x4(a, left + i * 16 * pitch + k);
#pragma unroll
      for (int j = 0; j < 4; ++j) multiply_tiles<E>(sums[i][j], a, b[j]);
    }
  }
}

template <class E, class Product>
__global__ __launch_bounds__(threads, 2) void product_kernel(const Product p) {
  MLKIT_SHARED_MEMORY(E, memory);
  __shared__ float table[16];
  static_assert(is_copied<decltype(p.left.source)>, "decoded operands stand on the right");
  if constexpr (!is_copied<decltype(p.right.source)>) {
    if (threadIdx.x == 0) run<E, decltype(p.right.source)>::fill_table(table);
    __syncthreads();
  }
  const index_t row = static_cast<index_t>(blockIdx.y) * lines, col = static_cast<index_t>(blockIdx.x) * lines;
  const int first_steps = static_cast<int>(ceil_div(p.left.depth, depth));
  const int steps = first_steps + static_cast<int>(ceil_div(p.left2.depth, depth));
  const auto lefts = [&](int step) { return memory + step % stages * 2 * lines * pitch; };
  const auto rights = [&](int step) { return memory + (step % stages * 2 + 1) * lines * pitch; };

  loader<E, decltype(p.left.source)> left;
  loader<E, decltype(p.right.source)> right;
  loader<E, decltype(p.left2.source)> left2;
  loader<E, decltype(p.right2.source)> right2;
  const auto start = [&](int step) {
    if (step < first_steps) {
      left.start(p.left, row, index_t{step} * depth, lefts(step));
      right.start(p.right, col, index_t{step} * depth, rights(step));
    } else if (step < steps) {
      left2.start(p.left2, row, index_t{step - first_steps} * depth, lefts(step));
      right2.start(p.right2, col, index_t{step - first_steps} * depth, rights(step));
    }
    ptx::cp_async_commit();
  };
  const auto finish = [&](int step) {
    if (step < first_steps) {
      left.finish(p.left.depth_first, table, lefts(step));
      right.finish(p.right.depth_first, table, rights(step));
    } else if (step < steps) {
      left2.finish(p.left2.depth_first, table, lefts(step));
      right2.finish(p.right2.depth_first, table, rights(step));
    }
  };

  for (int step = 0; step < stages - 1; ++step) {
    start(step);
    finish(step);
  }
  float sums[4][4][4] = {};
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<stages - 2>();
    __syncthreads();  // the stage is there, and the one before it has been read by all
    start(step + stages - 1);
    multiply_stage<E>(lefts(step), rights(step), sums);
    finish(step + stages - 1);
  }
  ptx::cp_async_wait<0>();

  // The sums of 64 rows at a time go through shared memory, so that a warp stores runs of c, and the stage stands here
  // once and not for each sum.
  static_assert(lines / 2 * sum_pitch * sizeof(float) <= stages * 2 * lines * pitch * sizeof(E));
  float* const rows = reinterpret_cast<float*>(memory);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  for (int upper = 0; upper < 2; ++upper) {
    __syncthreads();
    if (warp / 4 == upper) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            rows[(i * 16 + lane / 4 + e / 2 * 8) * sum_pitch + warp % 4 * 32 + j * 8 + lane % 4 * 2 + e % 2] =
                sums[i][j][e];
    }
    __syncthreads();
    const index_t c = col + thread % lines;
    if (c >= p.c.extent(1)) continue;
#pragma unroll 4
    for (int i = thread / lines; i < lines / 2; i += threads / lines)
      if (const index_t r = row + upper * (lines / 2) + i; r < p.c.extent(0))
        p.store(rows[i * sum_pitch + thread % lines], r, c);
  }
}

template <class E, class Product>
void launch_product(std::string_view function, const cuda& exec, const Product& p) {
  constexpr std::size_t bytes = std::size_t{stages} * 2 * lines * pitch * sizeof(E);
  launch(function, exec, product_kernel<E, Product>,
         {grid_of(ceil_div(p.c.extent(1), lines), ceil_div(p.c.extent(0), lines)), dim3(threads), bytes}, p);
}

}  // namespace MLKIT_NAMESPACE::detail::tile
