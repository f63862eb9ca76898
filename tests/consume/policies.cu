// Number types, random numbers and scalar policies, called from device code.
#include <mlkit/core/dtype.hpp>
#include <mlkit/core/functors.hpp>
#include <mlkit/core/random.hpp>

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
