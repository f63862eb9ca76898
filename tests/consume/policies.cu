// Number types, random numbers, views and policies, called from device code.
#include <mlkit/core/dtype.hpp>
#include <mlkit/core/functors.hpp>
#include <mlkit/core/random.hpp>
#include <mlkit/core/view.hpp>
#include <mlkit/lora/dropout.hpp>
#include <mlkit/lora/products.hpp>
#include <mlkit/matmul/epilogue.hpp>

template <class Policy>
__global__ void apply(const mlkit::bf16* x, mlkit::f16* y, mlkit::random_stream random, Policy policy) {
  const auto i = static_cast<std::uint64_t>(threadIdx.x);
  const float value = static_cast<float>(x[i]) * random.uniform(i);
  y[i] = mlkit::f16(policy(value) + policy.derivative(value));
}

template __global__ void apply(const mlkit::bf16*, mlkit::f16*, mlkit::random_stream, mlkit::identity);
template __global__ void apply(const mlkit::bf16*, mlkit::f16*, mlkit::random_stream, mlkit::scale);
template __global__ void apply(const mlkit::bf16*, mlkit::f16*, mlkit::random_stream, mlkit::relu);
template __global__ void apply(const mlkit::bf16*, mlkit::f16*, mlkit::random_stream, mlkit::gelu);
template __global__ void apply(const mlkit::bf16*, mlkit::f16*, mlkit::random_stream, mlkit::gelu_tanh);
template __global__ void apply(const mlkit::bf16*, mlkit::f16*, mlkit::random_stream, mlkit::silu);
template __global__ void apply(const mlkit::bf16*, mlkit::f16*, mlkit::random_stream, mlkit::tanh);
template __global__ void apply(const mlkit::bf16*, mlkit::f16*, mlkit::random_stream, mlkit::sigmoid);

// c[row, col] = stage(c[row, col]), with views made, turned and asked on the device.
template <class C, class Stage>
__global__ void finish(mlkit::matrix_view<C> c, Stage stage) {
  using A = mlkit::accumulator_t<C>;
  const mlkit::matrix_view<const C> before = c;
  const mlkit::matrix_view<C> again(c.data, c.extents, c.strides);
  const mlkit::matrix_view<C> turned = mlkit::transposed(again);
  const mlkit::index_t row = blockIdx.x, col = threadIdx.x;
  if (c.empty() || row >= turned.extent(1) || col >= turned.extent(0) || c.size() == 0) return;
  const A x = static_cast<A>(before(row, col));
  if constexpr (requires { stage(x, row, col); })
    turned(col, row) = static_cast<C>(stage(x, row, col));
  else if constexpr (requires { stage(x, row, col, x); })
    turned(col, row) = static_cast<C>(stage(x, row, col, x));
  else
    turned(col, row) = static_cast<C>(stage(x, x));
}

struct users_own {
  __device__ float operator()(float x) const { return x * x; }
};
struct users_own_with_position {
  __device__ float operator()(float x, mlkit::index_t row, mlkit::index_t col) const {
    return x + static_cast<float>(row - col);
  }
};

template <class T>
using contiguous = mlkit::tensor_view<T, 3>;
__global__ void lay_out(float* data, bool* out) { *out = contiguous<float>(data, {2, 3, 4}).contiguous(); }

using mlkit::bf16;
using mlkit::f16;
template __global__ void finish(mlkit::matrix_view<float>, mlkit::add_bias<bf16>);
template __global__ void finish(mlkit::matrix_view<bf16>, mlkit::scale_columns<f16>);
template __global__ void finish(mlkit::matrix_view<f16>, mlkit::scale_rows<float>);
template __global__ void finish(mlkit::matrix_view<double>, mlkit::add<double>);
template __global__ void finish(mlkit::matrix_view<float>, mlkit::accumulate);
template __global__ void finish(mlkit::matrix_view<float>, mlkit::lora::detail::dropout_mask);
template __global__ void finish(mlkit::matrix_view<double>, mlkit::lora::detail::mask_output);
template __global__ void finish(mlkit::matrix_view<bf16>, mlkit::lora::detail::finish<float, bf16, bf16>);
template __global__ void finish(mlkit::matrix_view<float>, mlkit::lora::detail::add_token_rows<f16, int, float>);
template __global__ void finish(mlkit::matrix_view<float>, mlkit::epilogue<>);
template __global__ void finish(mlkit::matrix_view<bf16>,
                                mlkit::epilogue<mlkit::add_bias<bf16>, mlkit::gelu, users_own, mlkit::scale_rows<float>,
                                                users_own_with_position, mlkit::add<bf16>>);
template __global__ void finish(mlkit::matrix_view<float>,
                                mlkit::epilogue<mlkit::scale, mlkit::accumulate, mlkit::relu>);
