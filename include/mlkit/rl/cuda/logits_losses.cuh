// Losses over logits on a GPU: cross-entropy and policy losses, on log_probs.cuh's pass over rows.
#pragma once

#include "../cross_entropy.hpp"
#include "../logits_policy_loss.hpp"
#include "kl.cuh"
#include "log_probs.cuh"
#include "policy_loss.cuh"

namespace MLKIT_NAMESPACE::rl::detail {

// The label of each row and whether it has one; how many have. Of `labels`, a problem, the tokens count.
template <class Labels>
__global__ void __launch_bounds__(sum_threads)
    label_kernel(const Labels labels, const device_sequences of, std::int64_t ignore, bool shift, std::int64_t* to,
                 std::uint8_t* counts, unsigned long long* count) {
  __shared__ unsigned long long here;
  if (threadIdx.x == 0) here = 0;
  __syncthreads();
  const index_t row = index_t{blockIdx.x} * sum_threads + threadIdx.x;
  if (row < labels.rows) {
    const index_t b = row / labels.time, t = row - b * labels.time;
    std::int64_t y = ignore;
    if (!shift || row + 1 < of.end(of.at(row))) {
      const index_t at = b * labels.token_batch_stride + (t + (shift ? 1 : 0)) * labels.token_time_stride;
      y = labels.wide_tokens ? labels.wide_tokens[at] : std::int64_t{labels.narrow_tokens[at]};
    }
    to[row] = y;
    counts[row] = y != ignore;
    if (y != ignore) atomicAdd(&here, 1ull);
  }
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(count, here);
}

// A row's loss; with Smoothed, part of the target is spread over the vocabulary.
template <class A, bool Smoothed>
struct label_loss {
  A* losses;
  const unsigned long long* count;
  double normaliser;  // 0: the count
  A smoothing, inverse_temperature, classes;
  static constexpr bool wants_total = Smoothed;

  __device__ __forceinline__ token_gradient<A> of(index_t row, A loss) const {
    losses[row] = loss;
    const double n = normaliser > 0 ? normaliser : static_cast<double>(*count);
    const A scale = static_cast<A>(1 / n);
    return {-(1 - smoothing) * scale, 0, -smoothing * scale};
  }
  __device__ __forceinline__ token_gradient<A> operator()(index_t row, A logp, A, A) const { return of(row, -logp); }
  // total: the sum of the row's logits.
  __device__ __forceinline__ token_gradient<A> operator()(index_t row, A logp, A, A lse, A total) const {
    return of(row, (1 - smoothing) * -logp - smoothing * (total * inverse_temperature / classes - lse));
  }
  __device__ __forceinline__ void masked(index_t row) const { losses[row] = 0; }
};

template <class A>
struct loss_terms {
  using number = A;
  static constexpr int sums = 1, maxima = 0, each = run_tokens<A>;
  device_plane<const A> losses;
  __device__ __forceinline__ void operator()(const token_run& run, double (&x)[1]) const {
    A loss[each];
    run.load(losses, loss);
#pragma unroll
    for (int i = 0; i < each; ++i) x[0] += i < run.count ? static_cast<double>(loss[i]) : 0.0;
  }
};
struct label_result {
  cross_entropy_result* to;
  const unsigned long long* count;
  double normaliser;
  __device__ __forceinline__ void operator()(const double (&x)[1]) const {
    cross_entropy_result r;
    r.count = static_cast<index_t>(*count);
    const double n = normaliser > 0 ? normaliser : r.count > 0 ? static_cast<double>(r.count) : 1;
    r.loss = x[0] / n;
    *to = r;
  }
};

// The labels of rows and what is made of their losses.
class device_labels {
 public:
  device_labels(std::string_view function, const cuda& exec, const token_ids<2>& given, const extents_t<2>& shape,
                const sequence_places& places, const cross_entropy_options& o)
      : function_(function), shape_(shape), labels_(exec, rows()), counted_(exec, rows()), count_(exec, 1) {
    launch(function, exec, set_kernel<unsigned long long>, {1, 1}, count_.data(), 0ull);
    device_logits<float> tokens;
    tokens.rows = rows(), tokens.time = shape[1];
    tokens.set_tokens(given);
    const token_sequences of{places.starts ? places.sequences : shape[0], shape[1], places.starts, false};
    launch(function, exec, label_kernel<device_logits<float>>,
           {static_cast<unsigned>(ceil_div(rows(), sum_threads)), sum_threads}, tokens, device_sequences(of, rows()),
           o.ignore, o.shift, labels_.data(), counted_.data(), count_.data());
  }
  index_t rows() const noexcept { return shape_[0] * shape_[1]; }
  tensor_view<const std::int64_t, 2> labels() const noexcept { return {labels_.data(), shape_}; }
  tensor_view<const std::uint8_t, 2> counted() const noexcept { return {counted_.data(), shape_}; }
  const unsigned long long* count() const noexcept { return count_.data(); }

  /// The sum of losses [rows] over the normaliser, or over the count.
  template <class A>
  device_value<cross_entropy_result> mean(const cuda& exec, const A* losses, double normaliser) const {
    if (rows() == 0) return known_value(function_, exec, cross_entropy_result{});
    device_value<cross_entropy_result> result(exec);
    sum_tokens(function_, exec, loss_terms<A>{plane<const A>{losses, 0, 1}}, 1, rows(),
               label_result{result.data(), count(), normaliser});
    return result;
  }

 private:
  std::string_view function_;
  extents_t<2> shape_;
  device_memory<std::int64_t> labels_;
  device_memory<std::uint8_t> counted_;
  device_memory<unsigned long long> count_;
};

// p's tokens are the labels as they were given.
template <class T>
device_value<cross_entropy_result> run_cross_entropy(const cuda& exec, logits_problem<T>& p,
                                                     const sequence_places& places, const cross_entropy_options& o) {
  constexpr std::string_view function = "rl::cross_entropy";
  using A = accumulator_t<T>;
  const device_labels of(function, exec, p.tokens, {p.batch, p.time}, places, o);
  const device_memory<A> losses(exec, of.rows());
  p.tokens = of.labels();
  p.mask = of.counted();
  const auto run = [&]<bool Smoothed>(std::bool_constant<Smoothed>) {
    run_logits(exec, p,
               label_loss<A, Smoothed>{losses.data(), of.count(), o.normaliser, static_cast<A>(o.label_smoothing),
                                       p.inverse_temperature, static_cast<A>(p.classes)});
  };
  if (o.label_smoothing > 0)
    run(std::true_type{});
  else
    run(std::false_type{});
  return of.mean(exec, losses.data(), o.normaliser);
}

// Keeps log-probabilities and entropies.
template <class A>
struct keep_two {
  matrix_view<A> log_probs, entropies;
  index_t time;

  __device__ __forceinline__ void set(index_t row, A l, A h) const {
    const index_t b = row / time, t = row - b * time;
    log_probs(b, t) = l;
    entropies(b, t) = h;
  }
  __device__ __forceinline__ token_gradient<A> operator()(index_t row, A l, A h, A) const {
    set(row, l, h);
    return {};
  }
  __device__ __forceinline__ void masked(index_t row) const { set(row, A{}, A{}); }
};
template <class A>
inline constexpr bool differentiates<keep_two<A>> = false;

// ... and what the policy's loss says of the row.
template <class A, class Policy>
struct policy_row {
  keep_two<A> keep;
  stream<const A> old_log_probs, advantages;
  device_sequences of;
  device_weights<A> weigh;
  Policy policy;
  A entropy;

  __device__ __forceinline__ token_gradient<A> operator()(index_t row, A l, A h, A) const {
    keep.set(row, l, h);
    const index_t b = row / keep.time, t = row - b * keep.time;
    const token_plan<A> plan = weigh.plan();
    const A weight = plan.weights_differ ? weigh.weights[of.at(row)] : plan.weight;
    A ratio = 1;
    if constexpr (uses_ratio<Policy>) ratio = ::exp(held_exponent(l - *old_log_probs.at(b, t)));
    const policy_token<A> token = policy(ratio, *advantages.at(b, t), l);
    return {weight * token.slope, -entropy * weight};
  }
  __device__ __forceinline__ void masked(index_t row) const { keep.masked(row); }
};

template <class T, class A, class Policy, class Aggregation>
device_value<policy_stats> run_logits_policy(const cuda& exec, logits_problem<T>& p, policy_batch<A>& batch,
                                             const extents_t<2>& shape, const Policy& policy,
                                             const Aggregation& aggregate, const loss_options& o,
                                             const policy_gradients<A>& grads, const sequence_view<A>& log_probs_out,
                                             const sequence_view<A>& entropies_out) {
  constexpr std::string_view function = "rl::policy_loss";
  const bool with_entropy = o.entropy != 0 || is_given(entropies_out);
  const index_t rows = shape[0] * shape[1];
  const device_memory<A> own(exec, 2 * rows);
  const auto memory = [&](const sequence_view<A>& v, index_t at) -> matrix_view<A> {
    return is_given(v) ? matrix_view<A>(v) : matrix_view<A>(own.data() + at * rows, shape);
  };
  const keep_two<A> keep{memory(log_probs_out, 0), memory(entropies_out, 1), shape[1]};
  batch.log_probs = tensor_view<const A, 2>(keep.log_probs);
  if (with_entropy) batch.entropies = tensor_view<const A, 2>(keep.entropies);
  const auto finish = [&](const policy_gradients<A>& to) {
    return run_policy_batch(by_executor{}, exec, batch, policy, aggregate, o, to);
  };
  if (rows == 0) return finish(grads);
  p.with_entropy = with_entropy;
  if constexpr (of_sequence<Policy>) {
    // The ratio of a sequence is known behind its last token: logits are read again for the gradient.
    T* const gradient = std::exchange(p.gradient, nullptr);
    run_logits(exec, p, keep);
    const device_memory<A> slopes(exec, 2 * rows);
    policy_gradients<A> all = grads;
    all.log_probs = matrix_view<A>(slopes.data(), shape);
    if (with_entropy) all.entropies = matrix_view<A>(slopes.data() + rows, shape);
    device_value<policy_stats> stats = finish(all);
    p.gradient = gradient;
    if (gradient) {
      known_slopes<A> known{matrix_view<const A>(slopes.data(), shape), {}, shape[1]};
      if (with_entropy) known.dentropy = matrix_view<const A>(slopes.data() + rows, shape);
      run_logits(exec, p, known);
    }
    return stats;
  } else {
    weight_memory<A> of_weights;
    const token_sequences sequences = sequences_of(shape, {}, batch.cu_seqlens);
    const device_weights<A> weights =
        weigh<A>(function, exec, plane_by_sequence(batch.mask), sequences, rows, aggregate, of_weights);
    run_logits(exec, p,
               policy_row<A, Policy>{keep, stream<const A>(batch.old_log_probs), stream<const A>(batch.advantages),
                                     device_sequences(sequences, rows), weights, policy, static_cast<A>(o.entropy)});
    return finish(grads);
  }
}

}  // namespace MLKIT_NAMESPACE::rl::detail
