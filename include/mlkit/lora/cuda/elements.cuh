// Passes over matrices in device memory, element by element.
#pragma once

#include "../../core/cuda.cuh"
#include "../products.hpp"

namespace MLKIT_NAMESPACE::lora::detail {

/// f(row, col) for every element of [rows, cols].
template <class F>
__global__ __launch_bounds__(256) void each_element_kernel(index_t rows, index_t cols, const F f) {
  const index_t stride = index_t{gridDim.x} * 256;
  for (index_t i = index_t{blockIdx.x} * 256 + threadIdx.x; i < rows * cols; i += stride) f(i / cols, i % cols);
}
template <class F>
void each_element(std::string_view function, const cuda& exec, index_t rows, index_t cols, const F& f) {
  const index_t blocks = std::min<index_t>(ceil_div(rows * cols, 256), index_t{16} * exec.properties().multiprocessors);
  launch(function, exec, each_element_kernel<F>, {dim3(static_cast<unsigned>(blocks)), dim3(256)}, rows, cols, f);
}

/// to = from, as another type; past from's extents, 0.
template <class From, class To>
struct convert {
  matrix_view<const From> from;
  matrix_view<To> to;
  __device__ void operator()(index_t i, index_t j) const {
    const bool inside = i < from.extent(0) && j < from.extent(1);
    to(i, j) = inside ? static_cast<To>(static_cast<accumulator_t<To>>(from(i, j))) : static_cast<To>(0.0f);
  }
};

/// to = from, dropped and scaled.
template <class T>
struct drop {
  matrix_view<const T> from;
  matrix_view<T> to;
  dropout_mask mask;
  __device__ void operator()(index_t i, index_t j) const {
    to(i, j) = static_cast<T>(mask(static_cast<accumulator_t<T>>(from(i, j)), i, j));
  }
};

/// A matrix in device memory that belongs to a call.
template <class T>
struct device_matrix {
  device_memory<T> memory;
  matrix_view<T> view;

  device_matrix() = default;
  device_matrix(const cuda& exec, index_t rows, index_t cols)
      : memory(exec, rows * cols), view(memory.data(), {rows, cols}) {}
};

/// v as E with rows that vectors reach: itself where it is so already, else a copy of it with zeros behind its rows.
template <class E>
struct reachable {
  device_matrix<E> copy;
  matrix_view<const E> view;

  template <class T>
  reachable(std::string_view function, const cuda& exec, const matrix_view<const T>& v) {
    if constexpr (std::is_same_v<T, E>) {
      view = v;
      if (mlkit::detail::reached_by_vectors(left_of(v))) return;
    }
    copy = device_matrix<E>(exec, v.extent(0), round_up(v.extent(1), index_t{16 / sizeof(E)}));
    each_element(function, exec, copy.view.extent(0), copy.view.extent(1), convert<T, E>{v, copy.view});
    view = copy.view;
  }
};

}  // namespace MLKIT_NAMESPACE::lora::detail
