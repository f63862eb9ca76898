// Many adapters in one batch on a GPU.
#pragma once

#include "../per_row.hpp"
#include "linear.cuh"

namespace MLKIT_NAMESPACE::lora::detail {

/// An adapter as kernels find it. `vectors`: the rows of its halves are runs that 16-byte loads reach.
template <class T>
struct device_adapter {
  const T *a, *b;
  index_t a_row, a_column, b_row, b_column;
  accumulator_t<T> scale;
  int rank;
  bool vectors;
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
};

inline constexpr int row_warps = 8;

/// h[row, j] = s x[row] . A[j]: a warp for each.
template <class X, class Y, class T, class Find>
__global__ __launch_bounds__(32 * row_warps) void project_rows_kernel(const rows_problem<X, Y, T, Find> p) {
  using A = accumulator_t<X>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const index_t row = blockIdx.x, j = index_t{blockIdx.y} * row_warps + threadIdx.x / 32;
  const device_adapter<T>* const adapter = p.adapter_of(row);
  if (!adapter || j >= adapter->rank) return;
  const index_t depth = p.x.extent(1);
  A sum{};
  if constexpr (std::is_same_v<X, T> && sizeof(T) <= 4) {
    constexpr int lanes = 16 / sizeof(T);
    if (p.vectors && adapter->vectors) {
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
    }
  }
  if (!(std::is_same_v<X, T> && sizeof(T) <= 4 && p.vectors && adapter->vectors))
    for (index_t k = lane; k < depth; k += 32)
      sum += static_cast<A>(p.x(row, k)) * static_cast<A>(adapter->a[j * adapter->a_row + k * adapter->a_column]);
#pragma unroll
  for (int far = 16; far > 0; far /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, far);
  if (lane == 0) p.h[row * p.rank + j] = static_cast<A>(adapter->scale) * sum;
}

/// y[row, col] += h[row] . B[col]. A row without an adapter stays as it is.
template <class X, class Y, class T, class Find>
__global__ __launch_bounds__(256) void add_rows_kernel(const rows_problem<X, Y, T, Find> p) {
  using A = accumulator_t<X>;
  const index_t row = blockIdx.x, col = index_t{blockIdx.y} * 256 + threadIdx.x;
  const device_adapter<T>* const adapter = p.adapter_of(row);
  if (!adapter || adapter->rank == 0 || col >= p.y.extent(1)) return;
  const A* const h = p.h + row * p.rank;
  const T* const b = adapter->b + col * adapter->b_row;
  A sum{};
  int j = 0;
  constexpr int lanes = 16 / sizeof(T);
  struct alignas(16) run {
    T v[lanes];
  };
  if (adapter->vectors)
    for (; j + lanes <= adapter->rank; j += lanes) {
      const run bs = *reinterpret_cast<const run*>(b + j);
#pragma unroll
      for (int i = 0; i < lanes; ++i) sum += h[j + i] * static_cast<A>(bs.v[i]);
    }
  for (; j < adapter->rank; ++j) sum += h[j] * static_cast<A>(b[j * adapter->b_column]);
  p.y(row, col) = static_cast<Y>(static_cast<A>(p.y(row, col)) + sum);
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
                           .vectors = reached(p.a) && reached(p.b)};
    }
    launch(function, exec, keep_adapters_kernel<T>, {dim3(1), dim3(adapters_at_once)}, batch, static_cast<int>(count),
           table.data() + first);
  }
  const device_memory<A> h(exec, tokens * rank);
  const auto find = finder(many, table.data());
  const rows_problem<X, Y, T, std::remove_const_t<decltype(find)>> p{
      .x = x, .y = y, .adapter_of = find, .h = h.data(), .rank = rank, .vectors = reached_by_vectors(left_of(x))};
  launch(function, exec, project_rows_kernel<X, Y, T, std::remove_const_t<decltype(find)>>,
         {mlkit::detail::grid_of(tokens, ceil_div(rank, row_warps)), dim3(32 * row_warps)}, p);
  launch(function, exec, add_rows_kernel<X, Y, T, std::remove_const_t<decltype(find)>>,
         {mlkit::detail::grid_of(tokens, ceil_div(y.extent(1), 256)), dim3(256)}, p);
}

}  // namespace MLKIT_NAMESPACE::lora::detail
