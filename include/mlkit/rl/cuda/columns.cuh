// Passes over a matrix that keep something of each column: a block stands over some columns and rows, its threads
// beside each other along both, and what threads have of a column is put together in a fixed order; then what blocks
// have.
#pragma once

#include "sums.cuh"

namespace MLKIT_NAMESPACE::rl::detail {

inline constexpr int column_rounds = 16;  // rows of a thread

// Blocks of sum_threads over a matrix: `wide` columns side by side, a power of two, and as many rows as are left, so
// often as a thread takes rows. Those that follow each other stand side by side.
struct column_tiles {
  index_t rows, columns, across, down;
  int wide = 1;

  column_tiles(std::string_view function, index_t of_rows, index_t of_columns) : rows(of_rows), columns(of_columns) {
    while (wide < warp_threads && wide < columns) wide *= 2;
    across = ceil_div(columns, index_t{wide});
    down = ceil_div(rows, index_t{height()} * column_rounds);
    (void)checked_blocks(function, across * down, rows * columns, "elements");
  }
  unsigned count() const noexcept { return static_cast<unsigned>(across * down); }
  MLKIT_HOST_DEVICE int height() const noexcept { return sum_threads / wide; }

  __device__ __forceinline__ index_t part() const { return blockIdx.x / across; }
  __device__ __forceinline__ index_t column() const {
    return blockIdx.x % across * wide + static_cast<int>(threadIdx.x) % wide;
  }
  __device__ __forceinline__ index_t row(int round) const {
    return (part() * column_rounds + round) * height() + static_cast<int>(threadIdx.x) / wide;
  }
  // Whether this thread has what its block has of a column.
  __device__ __forceinline__ bool leads() const { return static_cast<int>(threadIdx.x) < wide && column() < columns; }
};

__device__ __forceinline__ double together(double a, double b) { return a + b; }

// What a column's threads have, together in the first of them.
template <class X>
__device__ __forceinline__ X over_column(const X& own, int wide) {
  __shared__ X shared[sum_threads];
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = own;
  for (int half = sum_threads / 2; half >= wide; half /= 2) {
    __syncthreads();
    if (thread < half) shared[thread] = together(shared[thread], shared[thread + half]);
  }
  return shared[thread];
}

// f(column, what all parts [down, columns] have of it), for each column.
template <class X, class F>
__global__ void __launch_bounds__(sum_threads) finish_columns_kernel(const column_tiles of, const X* parts, const F f) {
  const int thread = static_cast<int>(threadIdx.x);
  const index_t column = index_t{blockIdx.x} * of.wide + thread % of.wide;
  X x{};
  for (index_t i = thread / of.wide; i < of.down && column < of.columns; i += of.height())
    x = together(x, parts[i * of.columns + column]);
  x = over_column(x, of.wide);
  if (thread < of.wide && column < of.columns) f(column, x);
}
template <class X, class F>
void finish_columns(std::string_view function, const cuda& exec, const column_tiles& of, const X* parts, const F& f) {
  launch(function, exec, finish_columns_kernel<X, F>, {static_cast<unsigned>(of.across), sum_threads}, of, parts, f);
}

}  // namespace MLKIT_NAMESPACE::rl::detail
