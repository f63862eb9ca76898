// Diagonal Gaussian policies: log-probabilities, entropies, sampling and gradients.
#pragma once

#include <cmath>

#include "../core/random.hpp"
#include "../core/tensor.hpp"
#include "categorical.hpp"
#include "functions.hpp"

namespace MLKIT_NAMESPACE::rl {

/// Actions [rows, d] whose elements are independent and normal: mean [rows, d], log of the standard deviation [rows,
/// d], or [1, d], one row that serves all (a parameter of its own, as in CleanRL and Stable-Baselines3). It owns
/// nothing.
template <storage T>
struct gaussian {
  using value_type = T;
  matrix_view<const T> mean = {};
  matrix_view<const T> log_std = {};
};

/// Where the gradient of a gaussian goes, each of the shape of what it is the gradient of; what is left out is not
/// written.
template <storage T>
struct gaussian_gradients {
  matrix_view<T> mean = {};
  matrix_view<T> log_std = {};
};

namespace detail {

// Rows that a task takes, and whose gradient of a shared log_std is one partial sum.
inline constexpr index_t gaussian_rows = 256;

template <class T>
void check_gaussian(arguments& call, std::string_view function, const gaussian<T>& policy) {
  check_view(function, "mean", policy.mean);
  check_view(function, "log_std", policy.log_std);
  check_extent(function, "log_std", "columns", policy.log_std.extent(1), "mean", policy.mean.extent(1));
  if (policy.log_std.extent(0) != 1)
    check_extent(function, "log_std", "rows", policy.log_std.extent(0), "mean", policy.mean.extent(0));
  call.reads("mean", policy.mean);
  call.reads("log_std", policy.log_std);
}

// log_std as if each row had its own.
template <class T>
matrix_view<const T> log_std_of_rows(const gaussian<T>& policy) noexcept {
  const matrix_view<const T>& s = policy.log_std;
  return {s.data, policy.mean.extents, {s.extent(0) == 1 ? 0 : s.stride(0), s.stride(1)}};
}

template <class T>
void run_gaussian_log_probs(by_executor, std::string_view, const cpu& exec, const gaussian<T>& policy,
                            const matrix_view<const T>& a, const policy_log_probs<accumulator_t<T>>& out) {
  using A = accumulator_t<T>;
  const index_t rows = a.extent(0), d = a.extent(1);
  const matrix_view<const T> log_std = log_std_of_rows(policy);
  constexpr A half_log_2pi = static_cast<A>(0.91893853320467274178);
  parallel_for(threads_for(exec, rows * d), rows, [&](index_t r) {
    A squares = 0, logs = 0;
    for (index_t c = 0; c < d; ++c) {
      const A log_sigma = static_cast<A>(log_std(r, c));
      const A z = (static_cast<A>(a(r, c)) - static_cast<A>(policy.mean(r, c))) * exp_of(-log_sigma);
      squares += z * z;
      logs += log_sigma;
    }
    if (out.logp.data) out.logp(r) = -(A(0.5) * squares + logs + static_cast<A>(d) * half_log_2pi);
    if (out.entropy.data) out.entropy(r) = logs + static_cast<A>(d) * (half_log_2pi + A(0.5));
  });
}

template <class T>
void run_gaussian_backward(by_executor, std::string_view, const cpu& exec, const gaussian<T>& policy,
                           const matrix_view<const T>& a, const policy_derivatives<accumulator_t<T>>& derivatives,
                           const gaussian_gradients<T>& out) {
  using A = accumulator_t<T>;
  const index_t rows = a.extent(0), d = a.extent(1), blocks = ceil_div(rows, gaussian_rows);
  const matrix_view<const T> log_std = log_std_of_rows(policy);
  const bool sums = policy.log_std.extent(0) == 1 && out.log_std.data;
  const workspace<double> partial(sums ? blocks * d : 0);
  parallel_for(threads_for(exec, rows * d), blocks, [&](index_t block) {
    double* sum = partial.data() + block * d;
    if (sums) std::fill_n(sum, d, 0.0);
    for (index_t r = block * gaussian_rows; r < std::min(rows, (block + 1) * gaussian_rows); ++r) {
      const A dlogp = derivatives.dlogp.data ? derivatives.dlogp(r) : A{};
      const A dentropy = derivatives.dentropy.data ? derivatives.dentropy(r) : A{};
      for (index_t c = 0; c < d; ++c) {
        const A inverse = exp_of(-static_cast<A>(log_std(r, c)));
        const A z = (static_cast<A>(a(r, c)) - static_cast<A>(policy.mean(r, c))) * inverse;
        if (out.mean.data) out.mean(r, c) = static_cast<T>(dlogp * z * inverse);
        const A of_log_std = dlogp * (z * z - A(1)) + dentropy;
        if (sums)
          sum[c] += static_cast<double>(of_log_std);
        else if (out.log_std.data)
          out.log_std(r, c) = static_cast<T>(of_log_std);
      }
    }
  });
  if (!sums) return;
  for (index_t c = 0; c < d; ++c) {
    double total = 0;
    for (index_t block = 0; block < blocks; ++block) total += partial.data()[block * d + c];
    out.log_std(0, c) = static_cast<T>(static_cast<A>(total));
  }
}

template <class T>
void run_gaussian_sample(by_executor, std::string_view, const cpu& exec, const gaussian<T>& policy,
                         const random_stream& random, const matrix_view<T>& a, index_t first) {
  using A = accumulator_t<T>;
  const index_t d = a.extent(1);
  const matrix_view<const T> log_std = log_std_of_rows(policy);
  parallel_for(threads_for(exec, a.size()), a.extent(0), [&](index_t r) {
    for (index_t c = 0; c < d; ++c) {
      const A normal = static_cast<A>(random.normal(
          (static_cast<std::uint64_t>(first) + static_cast<std::uint64_t>(r)) * static_cast<std::uint64_t>(d) +
          static_cast<std::uint64_t>(c)));
      a(r, c) = static_cast<T>(static_cast<A>(policy.mean(r, c)) + exp_of(static_cast<A>(log_std(r, c))) * normal);
    }
  });
}

}  // namespace detail

/// For each row, over its d elements:
///   logp = -sum of ((a - mean) / sigma)^2 / 2 + log sigma + log(2 pi) / 2,   entropy = sum of log sigma + log(2 pi e)
///   / 2.
/// actions [rows, d] of the policy's type, any strides; f32, f64, bf16 and f16; outputs and sums f32 (f64 for f64).
/// Nothing bounds log_std: where sigma overflows or vanishes, so does what depends on it. Throws shape_error where
/// shapes do not fit or memory overlaps, before anything is written. The same bits for any number of threads.
template <executor Executor, storage T, viewable<2> Actions>
void log_probs(const Executor& exec, const gaussian<T>& policy, const Actions& actions,
               const policy_log_probs<accumulator_t<T>>& out) {
  constexpr std::string_view function = "rl::log_probs";
  using namespace detail;
  using A = accumulator_t<T>;
  static_assert(std::is_same_v<element_t<const Actions>, T>, "rl: a gaussian's actions are of its type");
  const matrix_view<const T> a = as_view(actions);
  arguments call(function, exec);
  check_gaussian(call, function, policy);
  check_same_shape<2>(function, "actions", a.extents, "mean", policy.mean.extents);
  check_view(function, "actions", a);
  call.reads("actions", a);
  const index_t rows = a.extent(0);
  const auto output = [&](std::string_view name, const vector_view<A>& v) {
    if (!is_given(v)) return;
    check_rows(function, name, v, "mean's rows", rows);
    call.writes(name, v);
  };
  output("logp", out.logp);
  output("entropy", out.entropy);
  run_gaussian_log_probs(by_executor{}, function, exec, policy, a, out);
}

/// The gradient of a loss from its derivatives by log_probs' outputs, z = (a - mean) / sigma:
///   dmean = dlogp z / sigma,   dlog_std = dlogp (z^2 - 1) + dentropy,
/// the latter summed over rows, in f64, where one log_std serves all. Otherwise as log_probs.
template <executor Executor, storage T, viewable<2> Actions>
void backward(const Executor& exec, const gaussian<T>& policy, const Actions& actions,
              const policy_derivatives<accumulator_t<T>>& derivatives, const gaussian_gradients<T>& out) {
  constexpr std::string_view function = "rl::backward";
  using namespace detail;
  using A = accumulator_t<T>;
  static_assert(std::is_same_v<element_t<const Actions>, T>, "rl: a gaussian's actions are of its type");
  const matrix_view<const T> a = as_view(actions);
  arguments call(function, exec);
  check_gaussian(call, function, policy);
  check_same_shape<2>(function, "actions", a.extents, "mean", policy.mean.extents);
  check_view(function, "actions", a);
  call.reads("actions", a);
  const index_t rows = a.extent(0);
  const auto input = [&](std::string_view name, const vector_view<const A>& v) {
    if (!is_given(v)) return;
    check_rows(function, name, v, "mean's rows", rows);
    call.reads(name, v);
  };
  input("dlogp", derivatives.dlogp);
  input("dentropy", derivatives.dentropy);
  const auto output = [&](std::string_view name, const matrix_view<T>& v, std::string_view of,
                          const extents_t<2>& shape) {
    if (!is_given(v)) return;
    check_same_shape<2>(function, name, v.extents, of, shape);
    check_view(function, name, v);
    call.writes(name, v);
  };
  output("the gradient of mean", out.mean, "mean", policy.mean.extents);
  output("the gradient of log_std", out.log_std, "log_std", policy.log_std.extents);
  run_gaussian_backward(by_executor{}, function, exec, policy, a, derivatives, out);
}

/// Draws actions [rows, d]: mean + sigma normal, element c of row r with number (first + r) d + c of the random stream,
/// so that a row's actions depend on neither its neighbours nor the number of threads, and `first` continues a stream.
/// Throws shape_error where shapes do not fit or memory overlaps, value_error for a negative `first`.
/// With a mlkit::cuda the normal numbers are the same, but where a GPU rounds logarithm and cosine otherwise.
template <executor Executor, storage T, viewable<2> Actions>
void sample(const Executor& exec, const gaussian<T>& policy, const random_stream& random, Actions&& actions,
            index_t first = 0) {
  constexpr std::string_view function = "rl::sample";
  using namespace detail;
  static_assert(std::is_same_v<element_t<std::remove_reference_t<Actions>>, T>,
                "rl: a gaussian's actions are of its type");
  const matrix_view<T> a = as_view(actions);
  arguments call(function, exec);
  check_gaussian(call, function, policy);
  check_same_shape<2>(function, "actions", a.extents, "mean", policy.mean.extents);
  check_view(function, "actions", a);
  call.writes("actions", a);
  if (first < 0) fail_value(function, ": first = ", first, " is negative");
  run_gaussian_sample(by_executor{}, function, exec, policy, random, a, first);
}

}  // namespace MLKIT_NAMESPACE::rl
