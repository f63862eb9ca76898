// Many adapters in one batch on a GPU.
#pragma once

#include "../per_row.hpp"
#include "linear.cuh"

namespace MLKIT_NAMESPACE::lora::detail {

/// An adapter as kernels find it. `a_vectors`, `b_vectors`: where the rows of a half are runs that 16-byte loads reach.
template <class T>
struct device_adapter {
  const T *a, *b;
  index_t a_row, a_column, b_row, b_column;
  accumulator_t<T> scale;
  int rank;  // 0 where the scale is 0
  bool a_vectors, b_vectors;
};

/// Adapters travel to the device as a kernel's arguments, so that a captured call keeps them.
inline constexpr int adapters_at_once = 32;
template <class T>
struct adapter_batch {
  device_adapter<T> adapters[adapters_at_once];
};
template <class T>
__global__ __launch_bounds__(adapters_at_once) void keep_adapters_kernel(const adapter_batch<T> batch, int count,
                                                                         device_adapter<T>* to) {
  if (static_cast<int>(threadIdx.x) < count) to[threadIdx.x] = batch.adapters[threadIdx.x];
}

/// The adapter of a row, or null: ids out of range count as none.
template <class T, class I>
struct adapter_of_row {
  const device_adapter<T>* adapters;
  index_t count;
  vector_view<const I> ids;

  __device__ __forceinline__ const device_adapter<T>* operator()(index_t row) const {
    const I id = ids(row);
    if (id < I{} || static_cast<std::uint64_t>(id) >= static_cast<std::uint64_t>(count)) return nullptr;
    return adapters + static_cast<index_t>(id);
  }
};
/// The same of runs: the last run that starts at or before the row.
template <class T, class I>
struct adapter_of_run {
  const device_adapter<T>* adapters;
  index_t count;
  vector_view<const I> starts;

  __device__ __forceinline__ const device_adapter<T>* operator()(index_t row) const {
    index_t low = 0, high = count;
    while (low < high) {
      const index_t middle = (low + high) / 2;
      if (static_cast<index_t>(starts(middle)) <= row)
        low = middle + 1;
      else
        high = middle;
    }
    if (low == 0 || row >= static_cast<index_t>(starts(low))) return nullptr;
    return adapters + (low - 1);
  }
};

template <class X, class Y, class T, class Find>
struct rows_problem {
  matrix_view<const X> x;
  matrix_view<Y> y;
  Find adapter_of;
  accumulator_t<X>* h;  // [tokens, rank]
  index_t rank;         // the largest
  bool vectors;         // rows of x are runs that 16-byte loads reach

  // Whether tensor cores make an adapter's h, and whether they add what it makes to y.
  static constexpr bool half = is_half<X> && std::is_same_v<X, T>;
  __device__ bool tiles_a(const device_adapter<T>& a) const { return half && vectors && a.a_vectors; }
  __device__ bool tiles_b(const device_adapter<T>& a) const { return half && a.b_vectors; }
};

inline constexpr int row_warps = 8, tile_rows = 16, tile_threads = thin::threads, tile_columns = tile_threads;

/// The adapters that differ among 16 rows, in the order of their first rows, as a warp finds them: those that `takes`
/// likes.
template <class T>
struct tile_adapters {
  int id;            // of the row with the lane's number, or -1
  unsigned leaders;  // rows that are their adapter's first, one bit each

  template <class Find, class Takes>
  __device__ __forceinline__ tile_adapters(const Find& adapter_of, index_t first, index_t tokens, Takes&& takes) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const device_adapter<T>* mine = nullptr;
    if (lane < tile_rows && first + lane < tokens) mine = adapter_of(first + lane);
    id = mine && takes(*mine) ? static_cast<int>(mine - adapter_of.adapters) : -1;
    bool leads = id >= 0;
#pragma unroll
    for (int i = 0; i < tile_rows; ++i) {
      const int other = __shfl_sync(0xffffffffu, id, i);
      if (i < lane && other == id) leads = false;
    }
    leaders = __ballot_sync(0xffffffffu, leads);
  }
  __device__ __forceinline__ void skip(unsigned count) {
    for (unsigned i = 0; i < count; ++i) leaders &= leaders - 1;
  }
  __device__ __forceinline__ int first() const {
    return __shfl_sync(0xffffffffu, id, __ffs(static_cast<int>(leaders)) - 1);
  }
  /// The rows that have an adapter, one bit each.
  __device__ __forceinline__ unsigned rows_of(int adapter) const { return __ballot_sync(0xffffffffu, id == adapter); }
};

// What thin::streamer multiplies: rows of x and lines of an adapter's A.
template <class E>
struct tile_product {
  dense_source<E> wide;
  index_t wide_lines, depth;
  const E* few;
  index_t few_stride;
  int few_lines;
};

/// h[row, j] = s x[row] . A[j] for 16 rows and 16 lines of one of their adapters at a time, on tensor cores. Blocks
/// (tile of rows, tile of lines, z) share the tile's adapters out by z. What a row gets depends on its own adapter
/// alone.
template <class E, class Y, class Find>
__global__ __launch_bounds__(tile_threads, 2) void project_tiles_kernel(const rows_problem<E, Y, E, Find> p) {
  using streamer = thin::streamer<2, 1, E, dense_source<E>>;
  __shared__ float parts[streamer::part_words];
  const index_t tokens = p.x.extent(0), first = index_t{blockIdx.x} * tile_rows;
  const int line = static_cast<int>(blockIdx.y) * 16;
  tile_adapters<E> adapters(p.adapter_of, first, tokens,
                            [&](const device_adapter<E>& a) { return a.a_vectors && line < a.rank; });
  for (adapters.skip(blockIdx.z); adapters.leaders != 0; adapters.skip(gridDim.z)) {
    const int taken = adapters.first();
    const unsigned rows = adapters.rows_of(taken);
    const device_adapter<E>& adapter = p.adapter_of.adapters[taken];
    const tile_product<E> q{.wide = {p.x.data, tokens, p.x.extent(1), p.x.stride(0), 1},
                            .wide_lines = tokens,
                            .depth = p.x.extent(1),
                            .few = adapter.a + line * adapter.a_row,
                            .few_stride = adapter.a_row,
                            .few_lines = adapter.rank - line < 16 ? adapter.rank - line : 16};
    float sums[1][2][4] = {};
    streamer::add(q, typename streamer::reader{}, first, sums, [] {});
    streamer::keep(sums, parts);
    __syncthreads();
    const int row = static_cast<int>(threadIdx.x) % 16, j = static_cast<int>(threadIdx.x) / 16;
    if ((rows >> row & 1) != 0 && j < q.few_lines)
      p.h[(first + row) * p.rank + line + j] = adapter.scale * streamer::total(parts, row, j);
    __syncthreads();
  }
}

/// h[row, j] = s x[row] . A[j]: a warp for each. Not of adapters that project_tiles_kernel takes.
template <class X, class Y, class T, class Find>
__global__ __launch_bounds__(32 * row_warps) void project_rows_kernel(const rows_problem<X, Y, T, Find> p) {
  using A = accumulator_t<X>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const index_t row = blockIdx.x, j = index_t{blockIdx.y} * row_warps + threadIdx.x / 32;
  const device_adapter<T>* const adapter = p.adapter_of(row);
  if (!adapter || j >= adapter->rank || p.tiles_a(*adapter)) return;
  const index_t depth = p.x.extent(1);
  A sum{};
  bool added = false;
  if constexpr (std::is_same_v<X, float> && std::is_same_v<T, float>) {
    constexpr int lanes = 16 / sizeof(T);
    if (p.vectors && adapter->a_vectors) {
      struct alignas(16) run {
        T v[lanes];
      };
      const run* const x = reinterpret_cast<const run*>(p.x.data + row * p.x.stride(0));
      const run* const a = reinterpret_cast<const run*>(adapter->a + j * adapter->a_row);
#pragma unroll 4
      for (index_t k = lane; k < depth / lanes; k += 32) {
        const run xs = x[k], as = a[k];
#pragma unroll
        for (int i = 0; i < lanes; ++i) sum += static_cast<A>(xs.v[i]) * static_cast<A>(as.v[i]);
      }
      added = true;
    }
  }
  if (!added)
    for (index_t k = lane; k < depth; k += 32)
      sum += static_cast<A>(p.x(row, k)) * static_cast<A>(adapter->a[j * adapter->a_row + k * adapter->a_column]);
#pragma unroll
  for (int far = 16; far > 0; far /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, far);
  if (lane == 0) p.h[row * p.rank + j] = static_cast<A>(adapter->scale) * sum;
}

/// y[row, col] += h[row] . B[col] for 16 rows and 256 columns of one of their adapters at a time, on tensor cores, with
/// h rounded to E. Blocks (tile of rows, tile of columns, z) share the tile's adapters out by z.
template <class E, class Y, class Find>
__global__ __launch_bounds__(tile_threads) void add_tiles_kernel(const rows_problem<E, Y, E, Find> p) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const index_t tokens = p.x.extent(0), first = index_t{blockIdx.x} * tile_rows, outputs = p.y.extent(1);
  const index_t first_col = index_t{blockIdx.y} * tile_columns + threadIdx.x / 32 * 32;
  tile_adapters<E> adapters(p.adapter_of, first, tokens,
                            [](const device_adapter<E>& a) { return a.b_vectors && a.rank > 0; });
  for (adapters.skip(blockIdx.z); adapters.leaders != 0; adapters.skip(gridDim.z)) {
    const int taken = adapters.first();
    const unsigned rows = adapters.rows_of(taken);
    const device_adapter<E>& adapter = p.adapter_of.adapters[taken];
    float sums[4][4] = {};
    for (int k = 0; k < adapter.rank; k += 16) {
      std::uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = g + i % 2 * 8, j = k + i / 2 * 8 + t * 2;
        const float* const h = p.h + (first + row) * p.rank + j;
        const bool taken_row = (rows >> row & 1) != 0;
        a[i] =
            pack_pair<E>(taken_row && j < adapter.rank ? h[0] : 0.0f, taken_row && j + 1 < adapter.rank ? h[1] : 0.0f);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const index_t col = first_col + n * 8 + g;
        std::uint32_t b[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int j = k + i * 8 + t * 2;
          const E* const from = adapter.b + col * adapter.b_row + j;
          b[i] = col >= outputs || j >= adapter.rank ? 0
                 : j + 1 < adapter.rank              ? *reinterpret_cast<const std::uint32_t*>(from)
                                                     : from->bits;
        }
        multiply_tiles<E>(sums[n], a, b);
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = g + e / 2 * 8;
        const index_t col = first_col + n * 8 + t * 2 + e % 2;
        if ((rows >> row & 1) != 0 && col < outputs)
          p.y(first + row, col) = static_cast<Y>(static_cast<float>(p.y(first + row, col)) + sums[n][e]);
      }
  }
}

/// y[row, col] += h[row] . B[col]. Not of adapters that add_tiles_kernel takes.
template <class X, class Y, class T, class Find>
__global__ __launch_bounds__(256) void add_rows_kernel(const rows_problem<X, Y, T, Find> p) {
  using A = accumulator_t<X>;
  const index_t row = blockIdx.x, col = index_t{blockIdx.y} * 256 + threadIdx.x;
  const device_adapter<T>* const adapter = p.adapter_of(row);
  if (!adapter || adapter->rank == 0 || col >= p.y.extent(1) || p.tiles_b(*adapter)) return;
  const A* const h = p.h + row * p.rank;
  const T* const b = adapter->b + col * adapter->b_row;
  A sum{};
  int j = 0;
  constexpr int lanes = 16 / sizeof(T);
  struct alignas(16) run {
    T v[lanes];
  };
  if (adapter->b_vectors)
    for (; j + lanes <= adapter->rank; j += lanes) {
      const run bs = *reinterpret_cast<const run*>(b + j);
#pragma unroll
      for (int i = 0; i < lanes; ++i) sum += h[j + i] * static_cast<A>(bs.v[i]);
    }
  for (; j < adapter->rank; ++j) sum += h[j] * static_cast<A>(b[j * adapter->b_column]);
  p.y(row, col) = static_cast<Y>(static_cast<A>(p.y(row, col)) + sum);
}

/// Of a batch's adapters: whether 16-byte loads reach the rows of any, and of all.
struct reached_rows {
  bool any = false, all = true;
  void add(bool reached) noexcept { any = any || reached, all = all && reached; }
};

/// The launches of a batch: on tensor cores what they take, the rest row by row.
template <class X, class Y, class T, class Find>
void add_adapters(std::string_view function, const cuda& exec, const rows_problem<X, Y, T, Find>& p, index_t count,
                  const reached_rows& a, const reached_rows& b) {
  using problem = rows_problem<X, Y, T, Find>;
  const index_t tokens = p.x.extent(0), outputs = p.y.extent(1);
  const bool tile_a = problem::half && p.vectors && a.any, tile_b = problem::half && b.any;
  const auto tiles = [&](auto kernel, index_t y) {
    // Blocks that share a tile's adapters out: as many as keep the device busy.
    const index_t x = ceil_div(tokens, tile_rows);
    const index_t enough = ceil_div(index_t{4} * exec.properties().multiprocessors, x * y);
    const index_t z = std::min({enough, count, index_t{tile_rows}});
    launch(function, exec, kernel,
           {dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)), dim3(tile_threads)}, p);
  };
  if constexpr (problem::half)
    if (tile_a) tiles(project_tiles_kernel<X, Y, Find>, ceil_div(p.rank, 16));
  if (!tile_a || !a.all)
    launch(function, exec, project_rows_kernel<X, Y, T, Find>,
           {mlkit::detail::grid_of(tokens, ceil_div(p.rank, row_warps)), dim3(32 * row_warps)}, p);
  if constexpr (problem::half)
    if (tile_b) tiles(add_tiles_kernel<X, Y, Find>, ceil_div(outputs, tile_columns));
  if (!tile_b || !b.all)
    launch(function, exec, add_rows_kernel<X, Y, T, Find>,
           {mlkit::detail::grid_of(tokens, ceil_div(outputs, 256)), dim3(256)}, p);
}

template <class P, class I, class T>
auto finder(const per_row<P, I>& many, const device_adapter<T>* adapters) {
  return adapter_of_row<T, I>{adapters, static_cast<index_t>(many.adapters.size()), many.ids};
}
template <class P, class I, class T>
auto finder(const segments<P, I>& many, const device_adapter<T>* adapters) {
  return adapter_of_run<T, I>{adapters, static_cast<index_t>(many.adapters.size()), many.starts};
}

template <class P, class I>
void check_rows(arguments& call, std::string_view function, const per_row<P, I>& many, index_t tokens) {
  check_view(function, "ids", many.ids);
  check_extent(function, "ids", "elements", many.ids.extent(0), "x", tokens);
  call.reads("ids", many.ids);
}
template <class P, class I>
void check_rows(arguments& call, std::string_view function, const segments<P, I>& many, index_t) {
  const auto count = static_cast<index_t>(many.adapters.size());
  check_view(function, "starts", many.starts);
  if (many.starts.extent(0) != count + 1)
    fail_shape(function, ": starts has ", many.starts.extent(0), " elements, but ", count, " adapters need ",
               count + 1);
  call.reads("starts", many.starts);
}

template <class X, class Base, class Many, class Y>
void linear_rows(const cuda& exec, const matrix_view<const X>& x, const Base& base, const Many& many,
                 const matrix_view<Y>& y) {
  using T = typename Many::value_type;
  using A = accumulator_t<X>;
  check_types<X, typename Base::value_type, T, Y>();
  constexpr std::string_view function = "lora::linear";
  arguments call(function, exec);
  check_linear(function, x, base, y);
  std::vector<adapter_view<T>> views;
  index_t rank = 0;
  for (const auto& p : many.adapters) {
    views.push_back(as_adapter(p));
    check_adapter(function, views.back(), base.outputs(), base.inputs(),
                  message("adapters[", static_cast<index_t>(views.size()) - 1, "]"));
    rank = std::max(rank, views.back().rank());
  }
  check_rows(call, function, many, x.extent(0));
  call.reads("x", x);
  name_base(call, base);
  for (const adapter_view<T>& p : views) name_adapter(call, p);
  call.writes("y", y);
  if (y.empty()) return;

  run_base(exec, x, base, y);
  if (views.empty()) return;
  const index_t tokens = x.extent(0);
  const device_memory<device_adapter<T>> table(exec, static_cast<index_t>(views.size()));
  reached_rows reached_a, reached_b;
  for (std::size_t first = 0; first < views.size(); first += adapters_at_once) {
    const std::size_t count = std::min<std::size_t>(adapters_at_once, views.size() - first);
    adapter_batch<T> batch{};
    for (std::size_t i = 0; i < count; ++i) {
      const adapter_view<T>& p = views[first + i];
      const auto reached = [](const matrix_view<const T>& v) {  // up to where whole loads reach
        constexpr index_t lanes = 16 / sizeof(T);
        return v.stride(1) == 1 && v.stride(0) % lanes == 0 && reinterpret_cast<std::uintptr_t>(v.data) % 16 == 0;
      };
      batch.adapters[i] = {.a = p.a.data,
                           .b = p.b.data,
                           .a_row = p.a.stride(0),
                           .a_column = p.a.stride(1),
                           .b_row = p.b.stride(0),
                           .b_column = p.b.stride(1),
                           .scale = static_cast<accumulator_t<T>>(p.scale),
                           .rank = p.scale == 0 ? 0 : static_cast<int>(p.rank()),
                           .a_vectors = reached(p.a),
                           .b_vectors = reached(p.b)};
      reached_a.add(batch.adapters[i].a_vectors);
      reached_b.add(batch.adapters[i].b_vectors);
    }
    launch(function, exec, keep_adapters_kernel<T>, {dim3(1), dim3(adapters_at_once)}, batch, static_cast<int>(count),
           table.data() + first);
  }
  const device_memory<A> h(exec, tokens * rank);
  const auto find = finder(many, table.data());
  add_adapters(
      function, exec,
      rows_problem<X, Y, T, std::remove_const_t<decltype(find)>>{
          .x = x, .y = y, .adapter_of = find, .h = h.data(), .rank = rank, .vectors = reached_by_vectors(left_of(x))},
      static_cast<index_t>(views.size()), reached_a, reached_b);
}

}  // namespace MLKIT_NAMESPACE::lora::detail
