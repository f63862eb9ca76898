// A product of any operands in f32 or f64, element by element: the kernel that takes every stride and every type.
#pragma once

#include "access.cuh"

namespace MLKIT_NAMESPACE::detail::simt {

inline constexpr int tile = 64, depth = 16, threads = 256, each = 4;

// A tile of an operand, [depth][tile] in shared memory, fetched along the operand's runs.
template <class A, class Source>
struct loader {
  A held[each];

  __device__ __forceinline__ void fetch(const device_operand<Source>& op, index_t first, index_t k) {
    const int thread = static_cast<int>(threadIdx.x);
    if (op.depth_first) {
      const index_t row = first + thread / each, col = k + thread % each * each;
#pragma unroll
      for (int i = 0; i < each; ++i)
        held[i] = row < op.lines && col + i < op.depth ? element<A>(op.source, row, col + i) : A{};
    } else {
      const index_t row = k + thread / (tile / each), col = first + thread % (tile / each) * each;
#pragma unroll
      for (int i = 0; i < each; ++i)
        held[i] = row < op.depth && col + i < op.lines ? element<A>(op.source, row, col + i) : A{};
    }
  }
  __device__ __forceinline__ void commit(bool depth_first, A (*to)[tile + each]) const {
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < each; ++i) {
      if (depth_first)
        to[thread % each * each + i][thread / each] = held[i];
      else
        to[thread / (tile / each)][thread % (tile / each) * each + i] = held[i];
    }
  }
};

// sums += left right over the whole depth.
template <class A, class Left, class Right>
__device__ __forceinline__ void add_product(const device_operand<Left>& left, const device_operand<Right>& right,
                                            index_t row, index_t col, A (*lefts)[tile + each], A (*rights)[tile + each],
                                            A (&sums)[each][each]) {
  const int i = static_cast<int>(threadIdx.x) / (tile / each) * each;
  const int j = static_cast<int>(threadIdx.x) % (tile / each) * each;
  loader<A, Left> l;
  loader<A, Right> r;
  if (left.depth > 0) {
    l.fetch(left, row, 0);
    r.fetch(right, col, 0);
  }
  for (index_t k = 0; k < left.depth; k += depth) {
    __syncthreads();
    l.commit(left.depth_first, lefts);
    r.commit(right.depth_first, rights);
    __syncthreads();
    if (k + depth < left.depth) {
      l.fetch(left, row, k + depth);
      r.fetch(right, col, k + depth);
    }
#pragma unroll
    for (int d = 0; d < depth; ++d)
#pragma unroll
      for (int p = 0; p < each; ++p)
#pragma unroll
        for (int q = 0; q < each; ++q) sums[p][q] += lefts[d][i + p] * rights[d][j + q];
  }
}

template <class A, class Product>
__global__ __launch_bounds__(threads) void product_kernel(const Product p) {
  __shared__ __align__(16) A lefts[depth][tile + each];
  __shared__ __align__(16) A rights[depth][tile + each];
  const index_t row = static_cast<index_t>(blockIdx.y) * tile, col = static_cast<index_t>(blockIdx.x) * tile;
  A sums[each][each] = {};
  add_product(p.left, p.right, row, col, lefts, rights, sums);
  add_product(p.left2, p.right2, row, col, lefts, rights, sums);
  const index_t i = row + threadIdx.x / (tile / each) * each, j = col + threadIdx.x % (tile / each) * each;
#pragma unroll
  for (int m = 0; m < each; ++m)
#pragma unroll
    for (int n = 0; n < each; ++n)
      if (i + m < p.c.extent(0) && j + n < p.c.extent(1)) p.store(sums[m][n], i + m, j + n);
}

template <class A, class Product>
void run(std::string_view function, const cuda& exec, const Product& p) {
  launch(function, exec, product_kernel<A, Product>,
         {grid_of(ceil_div(p.c.extent(1), tile), ceil_div(p.c.extent(0), tile)), dim3(threads)}, p);
}

}  // namespace MLKIT_NAMESPACE::detail::simt
