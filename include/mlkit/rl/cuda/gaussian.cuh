// Gaussian policies on a GPU: some lanes of a warp to a row for log-probabilities, a thread to a column for gradients.
#pragma once

#include "../gaussian.hpp"
#include "columns.cuh"

namespace MLKIT_NAMESPACE::rl::detail {

template <class T>
struct device_gaussian {
  using A = accumulator_t<T>;
  matrix_view<const T> mean, log_std, actions;

  __device__ __forceinline__ A inverse(index_t r, index_t c) const { return exp_of(-widen_one(log_std(r, c))); }
  __device__ __forceinline__ A distance(index_t r, index_t c) const {
    return widen_one(actions(r, c)) - widen_one(mean(r, c));
  }
};

template <class T>
__global__ void __launch_bounds__(sum_threads)
    gaussian_log_probs_kernel(const device_gaussian<T> p, int lanes, const vector_view<accumulator_t<T>> logp,
                              const vector_view<accumulator_t<T>> entropy) {
  using A = accumulator_t<T>;
  const index_t rows = p.mean.extent(0), d = p.mean.extent(1),
                r = (index_t{blockIdx.x} * sum_threads + threadIdx.x) / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  A squares = 0, logs = 0;
  if (r < rows)
    for (index_t c = lane; c < d; c += lanes) {
      const A z = p.distance(r, c) * p.inverse(r, c);
      squares = fused(z, z, squares), logs += widen_one(p.log_std(r, c));
    }
  for (int far = lanes / 2; far > 0; far /= 2) {
    squares += __shfl_xor_sync(whole_warp, squares, far);
    logs += __shfl_xor_sync(whole_warp, logs, far);
  }
  if (r >= rows || lane != 0) return;
  constexpr A half_log_2pi = static_cast<A>(0.91893853320467274178);
  if (logp.data) logp(r) = -(A(0.5) * squares + logs + static_cast<A>(d) * half_log_2pi);
  if (entropy.data) entropy(r) = logs + static_cast<A>(d) * (half_log_2pi + A(0.5));
}

template <class T>
void run_gaussian_log_probs(by_executor, std::string_view function, const cuda& exec, const gaussian<T>& policy,
                            const matrix_view<const T>& actions, const policy_log_probs<accumulator_t<T>>& out) {
  const index_t rows = actions.extent(0);
  int lanes = 1;
  while (lanes < warp_threads && lanes < actions.extent(1)) lanes *= 2;
  launch(function, exec, gaussian_log_probs_kernel<T>,
         {checked_blocks(function, ceil_div(rows * lanes, sum_threads), rows, "rows"), sum_threads},
         device_gaussian<T>{policy.mean, log_std_of_rows(policy), actions}, lanes, out.logp, out.entropy);
}

// With Shared, what parts have of the gradient of a log_std that serves all rows.
template <class T, bool Shared>
__global__ void __launch_bounds__(sum_threads)
    gaussian_backward_kernel(const device_gaussian<T> p, const column_tiles of,
                             const policy_derivatives<accumulator_t<T>> given, const gaussian_gradients<T> out,
                             double* parts) {
  using A = accumulator_t<T>;
  const index_t c = of.column();
  double sum = 0;
#pragma unroll 4
  for (int k = 0; k < column_rounds; ++k) {
    const index_t r = of.row(k);
    if (r >= of.rows || c >= of.columns) break;
    const A dlogp = given.dlogp.data ? given.dlogp(r) : A{}, dentropy = given.dentropy.data ? given.dentropy(r) : A{},
            inverse = p.inverse(r, c), z = p.distance(r, c) * inverse, of_log_std = dlogp * (z * z - A(1)) + dentropy;
    if (out.mean.data) out.mean(r, c) = narrow_one<T>(dlogp * z * inverse);
    if constexpr (Shared)
      sum += static_cast<double>(of_log_std);
    else if (out.log_std.data)
      out.log_std(r, c) = narrow_one<T>(of_log_std);
  }
  if constexpr (Shared) {
    sum = over_column(sum, of.wide);
    if (of.leads()) parts[of.part() * of.columns + c] = sum;
  }
}
template <class T>
struct shared_log_std {
  matrix_view<T> to;
  __device__ __forceinline__ void operator()(index_t c, double sum) const {
    to(0, c) = narrow_one<T>(static_cast<accumulator_t<T>>(sum));
  }
};

template <class T>
void run_gaussian_backward(by_executor, std::string_view function, const cuda& exec, const gaussian<T>& policy,
                           const matrix_view<const T>& actions, const policy_derivatives<accumulator_t<T>>& derivatives,
                           const gaussian_gradients<T>& out) {
  const device_gaussian<T> p{policy.mean, log_std_of_rows(policy), actions};
  const column_tiles of(function, actions.extent(0), actions.extent(1));
  const launch_shape shape{of.count(), sum_threads};
  if (policy.log_std.extent(0) != 1 || !out.log_std.data)
    return launch(function, exec, gaussian_backward_kernel<T, false>, shape, p, of, derivatives, out, nullptr);
  const device_memory<double> parts(exec, of.down * of.columns);
  launch(function, exec, gaussian_backward_kernel<T, true>, shape, p, of, derivatives, out, parts.data());
  finish_columns(function, exec, of, static_cast<const double*>(parts.data()), shared_log_std<T>{out.log_std});
}

template <class T>
__global__ void __launch_bounds__(sum_threads)
    gaussian_sample_kernel(const device_gaussian<T> p, const random_stream random, std::uint64_t first,
                           const matrix_view<T> to) {
  using A = accumulator_t<T>;
  const index_t i = index_t{blockIdx.x} * sum_threads + threadIdx.x, d = to.extent(1);
  if (i >= to.size()) return;
  const index_t r = i / d, c = i - r * d;
  const A normal = static_cast<A>(random.normal(first + static_cast<std::uint64_t>(i)));
  to(r, c) = narrow_one<T>(widen_one(p.mean(r, c)) + exp_of(widen_one(p.log_std(r, c))) * normal);
}
template <class T>
void run_gaussian_sample(by_executor, std::string_view function, const cuda& exec, const gaussian<T>& policy,
                         const random_stream& random, const matrix_view<T>& actions, index_t first) {
  launch(function, exec, gaussian_sample_kernel<T>,
         {checked_blocks(function, ceil_div(actions.size(), sum_threads), actions.size(), "elements"), sum_threads},
         device_gaussian<T>{policy.mean, log_std_of_rows(policy), {}}, random,
         static_cast<std::uint64_t>(first) * static_cast<std::uint64_t>(actions.extent(1)), actions);
}

}  // namespace MLKIT_NAMESPACE::rl::detail
