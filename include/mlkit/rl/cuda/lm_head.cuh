// The fused language-model head on a GPU: logits of some rows at a time by a product of cuBLASLt, log_probs.cuh's pass
// over them, which puts their gradient in their place, and the products of that with weights and hidden states. A
// workspace holds the logits of those rows, so that [tokens, vocabulary] never exists.
//
// Which rows count is not known to the host: those that do not are zeros in the products, which they do not leave out.
#pragma once

#include "../../matmul/cuda/cublaslt.cuh"
#include "../../matmul/cuda/simt.cuh"
#include "../lm_head.hpp"
#include "logits_losses.cuh"

namespace MLKIT_NAMESPACE::rl::detail {

// Bytes that logits and their gradient may take, and rows that are worked on together: fewer than the least of them,
// and weights, which are read for each part again, would take longer than the arithmetic; of more, nothing is won.
inline constexpr index_t head_bytes = index_t{512} << 20, least_head_rows = 256, most_head_rows = 4096;

// Rows of logits that are worked on together: no more than a twenty-fourth of all logits, if those are enough rows.
constexpr index_t head_rows_at_once(index_t rows, index_t bytes_of_logits, index_t bytes_of_row) noexcept {
  const index_t share = rows * bytes_of_logits / kept_part, room = std::min(head_bytes, share) / bytes_of_row;
  return std::min(rows, std::clamp(room / block_rows * block_rows, least_head_rows, most_head_rows));
}

// x, and what c holds where it is added to.
template <class A, class C>
struct add_to {
  const C* c;  // or null
  index_t row_stride, col_stride;
  MLKIT_HOST_DEVICE A operator()(A x, index_t row, index_t col) const noexcept {
    return c ? x + static_cast<A>(c[row * row_stride + col * col_stride]) : x;
  }
};

// c = left right (+ c), summed in C's type of sums.
template <class L, class R, class C>
void multiply(std::string_view function, const cuda& exec, const matrix_view<const L>& left,
              const matrix_view<const R>& right, const matrix_view<C>& c, bool adds) {
  using A = accumulator_t<C>;
  if (c.empty()) return;
  const auto l = left_operand(left);
  const auto r = right_operand(right);
  // Of less, a launch of cuBLASLt's is not worth its planning.
  constexpr double worth_a_library = 1 << 20;
  if constexpr (std::is_same_v<L, R>)
    if (static_cast<double>(c.size()) * static_cast<double>(l.depth()) >= worth_a_library &&
        multiply_plainly<L, C>(function, exec, l, r, c, 1, static_cast<const C*>(nullptr), adds))
      return;
  const auto none = mlkit::detail::dense_operand<L>(matrix_view<const L>(nullptr, {c.extent(0), 0}), 0);
  const auto none_right = mlkit::detail::dense_operand<R>(matrix_view<const R>(nullptr, {0, c.extent(1)}), 1);
  const add_to<A, C> stage{adds ? c.data : nullptr, c.stride(0), c.stride(1)};
  mlkit::detail::simt::run<A>(
      function, exec,
      mlkit::detail::device_product<dense_source<L>, dense_source<R>, dense_source<L>, dense_source<R>, C,
                                    add_to<A, C>>{l, r, none, none_right, c, stage});
}

// to [n, d] = rows [first, first + n) of [batch, time, d], zeros where they do not count; or the other way.
template <class H, bool Back>
__global__ void __launch_bounds__(sum_threads)
    head_rows_kernel(H* rows, index_t time, index_t d, index_t batch_stride, index_t time_stride, index_t col_stride,
                     device_plane<const std::uint8_t> mask, index_t first, H* packed) {
  const index_t i = blockIdx.x, row = first + i, b = row / time, t = row - b * time;
  H* const at = rows + b * batch_stride + t * time_stride;
  const bool counts = !mask || *mask.at(b, t) != 0;
  for (index_t k = threadIdx.x; k < d; k += sum_threads) {
    if constexpr (Back)
      at[k * col_stride] = packed[i * d + k];
    else
      packed[i * d + k] = counts ? at[k * col_stride] : H{};
  }
}

template <class T>
__global__ void __launch_bounds__(sum_threads) clear_kernel(matrix_view<T> m) {
  const index_t n = m.size();
  for (index_t i = index_t{blockIdx.x} * sum_threads + threadIdx.x; i < n; i += index_t{gridDim.x} * sum_threads) {
    const index_t row = i / m.extent(1);
    m(row, i - row * m.extent(1)) = T{};
  }
}

// Rows of [batch, time, d] as a matrix, where they lie evenly and their elements side by side.
template <class H>
bool rows_lie_evenly(const tensor_view<H, 3>& v) noexcept {
  return (v.strides[2] == 1 || v.extents[2] == 1) &&
         (v.extents[0] == 1 || v.extents[1] == 1 || v.strides[0] == v.extents[1] * v.strides[1]);
}
template <class H>
matrix_view<H> even_rows(const tensor_view<H, 3>& v, index_t first, index_t n) noexcept {
  const index_t step = v.extents[1] == 1 ? v.strides[0] : v.strides[1];
  return {v.data + first * step, {n, v.extents[2]}, {step, 1}};
}

template <class H, class W, class F>
void run_head(std::string_view function, const cuda& exec, const head_problem<H, W>& p, const token_ids<2>& tokens,
              const mask_view<2>& mask, const F& f) {
  using Problem = head_problem<H, W>;
  using A = typename Problem::A;
  using D = typename Problem::D;
  constexpr bool in_place = std::is_same_v<D, A>;
  const index_t batch = p.hidden.extents[0], time = p.hidden.extents[1], rows = batch * time, d = p.depth(),
                classes = p.classes();
  const bool to_hidden = p.dhidden.data != nullptr, to_weight = p.dweight.data != nullptr;
  if (rows == 0) {
    if (to_weight && !p.accumulate_dweight)
      launch(function, exec, clear_kernel<W>,
             {static_cast<unsigned>(std::min<index_t>(ceil_div(p.dweight.size(), sum_threads), 4096)), sum_threads},
             p.dweight);
    return;
  }
  check_vocabulary(classes);
  const bool differentiates = to_hidden || to_weight, rounds = differentiates && !in_place;
  const index_t ld = round_up(std::max<index_t>(classes, 1), 16), of_logits = ld * index_t{sizeof(A)},
                at_once = head_rows_at_once(rows, of_logits, of_logits + (rounds ? ld * index_t{sizeof(D)} : 0));
  const device_memory<A> logits(exec, at_once * ld);
  const device_memory<D> rounded(exec, rounds ? at_once * ld : 0);
  const device_plane<const std::uint8_t> kept(mask ? plane_by_sequence(mask.values) : plane<const std::uint8_t>{});
  const bool gathers = mask || !rows_lie_evenly(p.hidden), scatters = to_hidden && !rows_lie_evenly(p.dhidden);
  const device_memory<H> gathered(exec, gathers ? at_once * d : 0), scattered(exec, scatters ? at_once * d : 0);

  device_logits<A, D> x;
  x.rows = rows, x.time = time, x.classes = static_cast<int>(classes);
  x.batch_stride = time * ld, x.time_stride = ld, x.class_stride = 1;
  x.gradient_batch_stride = time * ld, x.gradient_time_stride = ld, x.gradient_class_stride = 1;
  x.set_tokens(tokens);
  x.mask = kept.data, x.mask_batch_stride = kept.row_stride, x.mask_time_stride = kept.col_stride;
  x.scale = static_cast<A>(1.44269504088896340736 / p.temperature);
  x.inverse_temperature = static_cast<A>(1 / p.temperature);
  for (index_t first = 0; first < rows; first += at_once) {
    const index_t n = std::min(at_once, rows - first);
    const launch_shape of_rows{static_cast<unsigned>(n), sum_threads};
    matrix_view<const H> h;
    if (gathers) {
      launch(function, exec, head_rows_kernel<H, false>, of_rows, const_cast<H*>(p.hidden.data), time, d,
             p.hidden.strides[0], p.hidden.strides[1], p.hidden.strides[2], kept, first, gathered.data());
      h = matrix_view<const H>(gathered.data(), {n, d});
    } else {
      h = even_rows(p.hidden, first, n);
    }
    const matrix_view<A> z(logits.data(), {n, classes}, {ld, 1});
    multiply(function, exec, h, matrix_view<const W>(transposed(p.weight)), z, false);
    // Rows are counted over all of them: so that those of this part stand where they do.
    x.first_row = first, x.rows = first + n;
    x.logits = logits.data() - first * ld;
    D* dz = nullptr;
    if constexpr (in_place)
      dz = logits.data();
    else
      dz = rounded.data();
    x.gradient = differentiates ? dz - first * ld : nullptr;
    run_device_logits(exec, x, p.with_entropy, f);
    if (!differentiates) continue;
    const matrix_view<const D> slopes(dz, {n, classes}, {ld, 1});
    if (to_hidden) {
      const matrix_view<H> dh = scatters ? matrix_view<H>(scattered.data(), {n, d}) : even_rows(p.dhidden, first, n);
      multiply(function, exec, slopes, p.weight, dh, false);
      if (scatters)
        launch(function, exec, head_rows_kernel<H, true>, of_rows, p.dhidden.data, time, d, p.dhidden.strides[0],
               p.dhidden.strides[1], p.dhidden.strides[2], device_plane<const std::uint8_t>{}, first, scattered.data());
    }
    if (to_weight)
      multiply(function, exec, matrix_view<const D>(transposed(slopes)), h, p.dweight,
               first > 0 || p.accumulate_dweight);
  }
}

template <class H, class W>
device_value<cross_entropy_result> run_head_cross_entropy(const cuda& exec, head_problem<H, W>& p,
                                                          const token_ids<2>& labels, const sequence_places& places,
                                                          const cross_entropy_options& o) {
  constexpr std::string_view function = "rl::cross_entropy";
  using A = head_sum_t<H, W>;
  const extents_t<2> shape{p.hidden.extents[0], p.hidden.extents[1]};
  device_labels of(function, exec, labels, shape, places, o);
  const device_memory<A> losses(exec, of.rows());
  run_head(function, exec, p, token_ids<2>(of.labels()), mask_view<2>(of.counted()),
           label_loss<A, false>{losses.data(), of.count(), o.normaliser, A{}, A(1), A(1)});
  return of.mean(exec, losses.data(), o.normaliser);
}

}  // namespace MLKIT_NAMESPACE::rl::detail
