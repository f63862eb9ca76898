// Rows of logits on a GPU: the largest logit and the sums of exponentials in one pass, and the gradient of what follows
// from them while the row is still in shared memory.
//
// A block, or a warp where rows are short, takes a row. Its threads copy the row's 16-byte pieces into shared memory,
// each a few ahead of the one that it adds to its sums, and later makes the gradient of the pieces that it has copied
// itself: so logits are read from memory once, and each thread waits for its own copies alone. Elements before the
// first multiple of 16 bytes and behind the last one are read one by one. Rows that do not fit into shared memory, or
// whose classes do not lie side by side, are read again for the gradient.
#pragma once

#include "../log_probs.hpp"
#include "device.cuh"

namespace MLKIT_NAMESPACE::rl::detail {

// Sixteen bytes of elements as numbers, and back.
template <class T>
__device__ __forceinline__ void widen(const uint4& u, accumulator_t<T> (&to)[16 / sizeof(T)]) {
  const std::uint32_t words[] = {u.x, u.y, u.z, u.w};
  if constexpr (std::is_same_v<T, bf16>) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      to[2 * i] = __uint_as_float(words[i] << 16), to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  } else if constexpr (std::is_same_v<T, f16>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[2 * i] = ptx::widen_f16(words[i]), to[2 * i + 1] = ptx::widen_f16(words[i] >> 16);
  } else {
    const quad<T> q = mlkit::detail::bit_cast<quad<T>>(u);
#pragma unroll
    for (int i = 0; i < quad<T>::count; ++i) to[i] = q.of[i];
  }
}
template <class T>
__device__ __forceinline__ uint4 narrow(const accumulator_t<T> (&from)[16 / sizeof(T)]) {
  if constexpr (std::is_same_v<T, bf16>) {
    return make_uint4(ptx::pack_bf16(from[0], from[1]), ptx::pack_bf16(from[2], from[3]),
                      ptx::pack_bf16(from[4], from[5]), ptx::pack_bf16(from[6], from[7]));
  } else if constexpr (std::is_same_v<T, f16>) {
    return make_uint4(ptx::pack_f16(from[0], from[1]), ptx::pack_f16(from[2], from[3]), ptx::pack_f16(from[4], from[5]),
                      ptx::pack_f16(from[6], from[7]));
  } else {
    quad<T> q;
#pragma unroll
    for (int i = 0; i < quad<T>::count; ++i) q.of[i] = from[i];
    return mlkit::detail::bit_cast<uint4>(q);
  }
}
__device__ __forceinline__ float power_of_2(float x) { return ptx::exp2(x); }
__device__ __forceinline__ double power_of_2(double x) { return ::exp2(x); }
// The larger; a NaN is passed over.
__device__ __forceinline__ float larger(float a, float b) { return ::fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return ::fmax(a, b); }

template <class A>
__device__ __forceinline__ A no_logit() {
  return -static_cast<A>(__builtin_inff());
}

// Over some logits z, with x = (z - top) log2(e) / temperature: the largest z, the sum of 2^x and of x 2^x.
template <class A, bool Entropy>
struct logit_sums {
  A top = no_logit<A>(), sum = 0, weighted = 0;

  template <int N>
  __device__ __forceinline__ void add(const A (&z)[N], A scale) {
    A highest = z[0];
#pragma unroll
    for (int i = 1; i < N; ++i) highest = larger(highest, z[i]);
    if (highest > top) {
      if (sum != 0) {
        const A down = (top - highest) * scale, factor = power_of_2(down);
        if constexpr (Entropy) weighted = factor * fused(down, sum, weighted);
        sum *= factor;
      }
      top = highest;
    }
    const A level = top == no_logit<A>() ? A{} : top;
    A even = 0, odd = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A x = (z[i] - level) * scale, e = power_of_2(x);
      (i % 2 ? odd : even) += e;
      if constexpr (Entropy) weighted = fused(e, e > 0 ? x : A{}, weighted);
    }
    sum += even + odd;
  }
  __device__ __forceinline__ void add(A z, A scale) {
    const A one[1] = {z};
    add(one, scale);
  }

  __device__ __forceinline__ void merge(const logit_sums& other, A scale) {
    if (other.sum == 0) return;  // false of NaN
    if (sum == 0) {
      *this = other;
      return;
    }
    const A highest = larger(top, other.top), down = (top - highest) * scale, far = (other.top - highest) * scale,
            factor = power_of_2(down), far_factor = power_of_2(far);
    if constexpr (Entropy)
      weighted = factor * fused(down, sum, weighted) + far_factor * fused(far, other.sum, other.weighted);
    sum = factor * sum + far_factor * other.sum;
    top = highest;
  }
  __device__ __forceinline__ logit_sums from_lane(int lane) const {
    logit_sums r;
    r.top = __shfl_sync(whole_warp, top, lane), r.sum = __shfl_sync(whole_warp, sum, lane);
    if constexpr (Entropy) r.weighted = __shfl_sync(whole_warp, weighted, lane);
    return r;
  }
  // Those of a warp, in each of its threads.
  __device__ __forceinline__ void merge_warp(A scale) {
#pragma unroll
    for (unsigned d = warp_threads / 2; d > 0; d /= 2) {
      logit_sums far;
      far.top = __shfl_down_sync(whole_warp, top, d), far.sum = __shfl_down_sync(whole_warp, sum, d);
      if constexpr (Entropy) far.weighted = __shfl_down_sync(whole_warp, weighted, d);
      merge(far, scale);
    }
    *this = from_lane(0);
  }
};

// As many numbers as there are in 16 bytes of another type, to one address.
template <class D, int N, class A>
__device__ __forceinline__ void store_piece(D* to, const A (&x)[N]) {
  if constexpr (N * sizeof(D) == 16) {
    if (on_quad(to)) {
      __stcs(reinterpret_cast<uint4*>(to), narrow<D>(x));
      return;
    }
  } else if constexpr (std::is_same_v<D, bf16> && N == 4) {
    if ((reinterpret_cast<std::uintptr_t>(to) & 7) == 0) {
      __stcs(reinterpret_cast<uint2*>(to), make_uint2(ptx::pack_bf16(x[0], x[1]), ptx::pack_bf16(x[2], x[3])));
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = narrow_one<D>(x[i]);
}

// A problem as kernels are given it: rows [first_row, rows) of [batch, time]. D is the type of the gradient.
template <class T, class D = T>
struct device_logits {
  using A = accumulator_t<T>;
  index_t first_row = 0, rows, time;
  int classes;
  const T* logits;
  index_t batch_stride, time_stride, class_stride;
  D* gradient = nullptr;
  index_t gradient_batch_stride, gradient_time_stride, gradient_class_stride;
  const std::int32_t* narrow_tokens = nullptr;
  const std::int64_t* wide_tokens = nullptr;
  index_t token_batch_stride, token_time_stride;
  const std::uint8_t* mask;
  index_t mask_batch_stride, mask_time_stride;
  A scale, inverse_temperature;

  device_logits() = default;
  explicit device_logits(const logits_problem<T>& p)
      : rows(p.rows()),
        time(p.time),
        classes(static_cast<int>(p.classes)),
        logits(p.logits),
        batch_stride(p.batch_stride),
        time_stride(p.time_stride),
        class_stride(p.class_stride),
        gradient_batch_stride(p.gradient_batch_stride),
        gradient_time_stride(p.gradient_time_stride),
        gradient_class_stride(p.gradient_class_stride),
        mask(p.mask.values.data),
        mask_batch_stride(p.mask.values.strides[0]),
        mask_time_stride(p.mask.values.strides[1]),
        scale(p.scale),
        inverse_temperature(p.inverse_temperature) {
    if constexpr (std::is_same_v<T, D>) gradient = p.gradient;
    set_tokens(p.tokens);
  }
  void set_tokens(const token_ids<2>& tokens) {
    tokens.visit([&](const auto& v) {
      if constexpr (sizeof(*v.data) == 8)
        wide_tokens = v.data;
      else
        narrow_tokens = v.data;
      token_batch_stride = v.strides[0], token_time_stride = v.strides[1];
    });
  }
};

// What the gradient of a row is made of: 2^x (constant + slope x) + shift for a class, of_token for the token.
template <class A>
struct row_curve {
  A constant, slope, shift, of_token;
  int token;  // -1 where there is none
  int nothing;
};

// Whether a loss is also given the sum of the row's logits.
template <class F>
inline constexpr bool totals = false;
template <class F>
  requires requires { F::wants_total; }
inline constexpr bool totals<F> = F::wants_total;

// Whether a row is read alone; or kept in shared memory for its gradient; or of any strides, and read again.
enum class logits_pass { values, staged, plain };

inline constexpr int copies_ahead = 4, most_row_threads = 1024, rows_of_warps = 4;

template <class T, class D, class F, logits_pass Pass, bool Entropy>
__global__ void __launch_bounds__(most_row_threads, 1) logits_kernel(const device_logits<T, D> p, const F f) {
  using A = accumulator_t<T>;
  using sums_t = logit_sums<A, Entropy>;
  constexpr int each = 16 / static_cast<int>(sizeof(T));
  constexpr bool whole_pieces = Pass != logits_pass::plain;
  __shared__ A tops[most_row_threads / warp_threads], sums[most_row_threads / warp_threads],
      weights[most_row_threads / warp_threads], row_totals[totals<F> ? most_row_threads / warp_threads : 1];
  __shared__ row_curve<A> curves[rows_of_warps];
  MLKIT_SHARED_MEMORY(uint4, staged);
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x), classes = p.classes;
  const index_t row = p.first_row + index_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;
  const index_t b = row < p.time ? 0 : row / p.time, t = row - b * p.time;
  const T* const z = p.logits + b * p.batch_stride + t * p.time_stride;
  D* const dz = p.gradient ? p.gradient + b * p.gradient_batch_stride + t * p.gradient_time_stride : nullptr;
  const index_t out_step = Pass == logits_pass::staged ? 1 : p.gradient_class_stride;
  if (p.mask && p.mask[b * p.mask_batch_stride + t * p.mask_time_stride] == 0) {
    if (thread == 0) f.masked(row);
    if (dz)
      for (int j = thread; j < classes; j += threads) dz[j * out_step] = narrow_one<D>(A{});
    return;
  }

  // The token's logit is asked for first and needed last.
  index_t token = 0;
  A of_token = not_a_number<A>();
  bool known = false;
  if (thread == 0) {
    const index_t at = b * p.token_batch_stride + t * p.token_time_stride;
    token = p.wide_tokens ? static_cast<index_t>(p.wide_tokens[at]) : static_cast<index_t>(p.narrow_tokens[at]);
    known = token >= 0 && token < classes;
    if (known) of_token = widen_one(z[token * (whole_pieces ? 1 : p.class_stride)]);
  }

  sums_t s;
  A total = 0;
  int head = 0, pieces = 0, tail = 0;
  uint4* const own = staged + static_cast<std::ptrdiff_t>(threadIdx.y) * (classes / each);
  A first = no_logit<A>(), last = no_logit<A>();
  if constexpr (whole_pieces) {
    head = min(classes,
               static_cast<int>((16 - (reinterpret_cast<std::uintptr_t>(z) & 15)) & 15) / static_cast<int>(sizeof(T)));
    pieces = (classes - head) / each;
    tail = classes - head - pieces * each;
    if (thread < head) first = widen_one(z[thread]);
    if (thread < tail) last = widen_one(z[head + pieces * each + thread]);
    const uint4* const from = reinterpret_cast<const uint4*>(z + head);
    const auto add = [&](const uint4& u) {
      A x[each];
      widen<T>(u, x);
      s.add(x, p.scale);
      if constexpr (totals<F>)
#pragma unroll
        for (int k = 0; k < each; ++k) total += x[k];
    };
    if constexpr (Pass == logits_pass::staged) {
      int next = thread;
      const auto copy = [&] {
        if (next < pieces) ptx::cp_async_16(own + next, from + next, true);
        ptx::cp_async_commit();
        next += threads;
      };
#pragma unroll
      for (int i = 0; i < copies_ahead; ++i) copy();
      for (int i = thread; i < pieces; i += threads) {
        ptx::cp_async_wait<copies_ahead - 1>();
        const uint4 u = own[i];
        copy();
        add(u);
      }
    } else {
      int i = thread;
      for (; i + 3 * threads < pieces; i += 4 * threads) {
        uint4 u[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) u[k] = __ldcs(from + i + k * threads);
#pragma unroll
        for (int k = 0; k < 4; ++k) add(u[k]);
      }
      for (; i < pieces; i += threads) add(__ldcs(from + i));
    }
    if (thread < head) s.add(first, p.scale), total += first;
    if (thread < tail) s.add(last, p.scale), total += last;
  } else {
    int j = thread;
    for (; j + 3 * threads < classes; j += 4 * threads) {
      A x[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) x[k] = widen_one(z[(j + k * threads) * p.class_stride]);
      s.add(x, p.scale);
      if constexpr (totals<F>) total += (x[0] + x[1]) + (x[2] + x[3]);
    }
    for (; j < classes; j += threads) {
      const A x = widen_one(z[j * p.class_stride]);
      s.add(x, p.scale), total += x;
    }
  }

  const auto sum_warp = [](A x) {
#pragma unroll
    for (unsigned d = warp_threads / 2; d > 0; d /= 2) x += __shfl_down_sync(whole_warp, x, d);
    return x;
  };
  s.merge_warp(p.scale);
  if constexpr (totals<F>) total = sum_warp(total);
  if (threads > warp_threads) {
    const int lane = thread % warp_threads, warp = thread / warp_threads;
    if constexpr (totals<F>)
      if (lane == 0) row_totals[warp] = total;
    if (lane == 0) tops[warp] = s.top, sums[warp] = s.sum, weights[warp] = s.weighted;
    __syncthreads();
    s = {};
    if (lane < threads / warp_threads) {
      s.top = tops[lane], s.sum = sums[lane];
      if constexpr (Entropy) s.weighted = weights[lane];
    }
    s.merge_warp(p.scale);
    if constexpr (totals<F>) total = sum_warp(lane < threads / warp_threads ? row_totals[lane] : A{});
  }

  if (thread == 0) {
    constexpr A ln2 = static_cast<A>(0.69314718055994530942);
    const bool impossible = s.sum == 0;
    const A log_sum = ::log(s.sum),
            logp = impossible && known ? no_logit<A>() : (of_token - s.top) * p.inverse_temperature - log_sum,
            lse = impossible ? no_logit<A>() : fused(s.top, p.inverse_temperature, log_sum),
            entropy = impossible || !Entropy ? A{} : log_sum - s.weighted * ln2 / s.sum;
    token_gradient<A> g;
    if constexpr (totals<F>)
      g = f(row, logp, entropy, lse, total);
    else
      g = f(row, logp, entropy, lse);
    if (dz) {
      if (!known) g.dlogp = not_a_number<A>();
      row_curve<A> c;
      c.nothing = (g.dlogp == 0 && g.dentropy == 0 && g.dmean == 0) || (impossible && known);
      const A factor = -p.inverse_temperature / s.sum, classes_of = static_cast<A>(classes);
      c.constant = factor * (g.dlogp + g.dmean + g.dentropy * (entropy - log_sum));
      c.slope = factor * g.dentropy * ln2;
      c.shift = p.inverse_temperature * g.dmean / classes_of;
      c.token = known ? static_cast<int>(token) : -1;
      // Without the cancellation of 1 - p.
      const A probability = ::exp(logp);
      A of = g.dlogp * -::expm1(logp) + g.dmean * (1 / classes_of - probability);
      if (g.dentropy != 0 && probability > 0) of -= g.dentropy * probability * (logp + entropy);
      c.of_token = p.inverse_temperature * of;
      curves[threadIdx.y] = c;
    }
  }
  if (Pass == logits_pass::values || !dz) return;
  if (threads > warp_threads)
    __syncthreads();
  else
    __syncwarp();

  const row_curve<A> c = curves[threadIdx.y];
  const auto slope_of = [&](A of) {
    if (c.nothing) return A{};
    const A x = (of - s.top) * p.scale;
    return fused(power_of_2(x), fused(larger(x, A(-1e4)), c.slope, c.constant), c.shift);
  };
  int owner = c.token % threads;
  if constexpr (whole_pieces) {
    if (thread < head) dz[thread] = narrow_one<D>(slope_of(first));
    if (thread < tail) dz[head + pieces * each + thread] = narrow_one<D>(slope_of(last));
    D* const to = dz + head;
    for (int i = thread; i < pieces; i += threads) {
      A x[each];
      widen<T>(own[i], x);
#pragma unroll
      for (int k = 0; k < each; ++k) x[k] = slope_of(x[k]);
      store_piece(to + i * each, x);
    }
    const int in_pieces = c.token - head;
    owner = in_pieces < 0               ? c.token
            : in_pieces < pieces * each ? in_pieces / each % threads
                                        : in_pieces - pieces * each;
  } else {
    for (int j = thread; j < classes; j += threads)
      dz[j * out_step] = narrow_one<D>(slope_of(widen_one(z[j * p.class_stride])));
  }
  if (c.token >= 0 && thread == owner && !c.nothing) dz[c.token * out_step] = narrow_one<D>(c.of_token);
}

template <logits_pass Pass, class T, class D, class F>
void launch_logits(const cuda& exec, const device_logits<T, D>& d, bool with_entropy, const F& f,
                   const launch_shape& shape) {
  constexpr std::string_view function = "rl::log_probs";
  if (with_entropy)
    launch(function, exec, logits_kernel<T, D, F, Pass, true>, shape, d, f);
  else
    launch(function, exec, logits_kernel<T, D, F, Pass, false>, shape, d, f);
}

// Whether a problem with this loss has a gradient to write; what keeps values alone says that it has none.
template <class F>
inline constexpr bool differentiates = true;
template <class A>
inline constexpr bool differentiates<keep_row<A>> = false;

template <class T, class D, class F>
void run_device_logits(const cuda& exec, const device_logits<T, D>& d, bool with_entropy, const F& f) {
  constexpr index_t each = 16 / sizeof(T);
  const index_t pieces = d.classes / each, rows = d.rows - d.first_row;
  launch_shape shape;
  if (d.classes <= 4 * warp_threads * each) {
    shape.block = dim3(warp_threads, rows_of_warps);
  } else {
    unsigned threads = 2 * warp_threads;
    while (threads < most_row_threads && threads * 2 * 8 <= pieces) threads *= 2;
    shape.block = dim3(threads);
  }
  const index_t blocks = ceil_div(rows, shape.block.y);
  if (blocks > INT32_MAX) fail_shape("rl: ", rows, " rows of logits are more than a GPU takes in one call");
  shape.grid = dim3(static_cast<unsigned>(blocks));
  if (d.class_stride != 1 && d.classes > 1) return launch_logits<logits_pass::plain>(exec, d, with_entropy, f, shape);
  if (!d.gradient) return launch_logits<logits_pass::values>(exec, d, with_entropy, f, shape);
  if constexpr (differentiates<F>) {
    shape.shared = static_cast<std::size_t>(shape.block.y * pieces * 16);
    constexpr std::size_t kept_back = 4 << 10;  // what the kernel has besides
    if (d.gradient_class_stride == 1 &&
        shape.shared + kept_back <= static_cast<std::size_t>(exec.properties().shared_memory))
      return launch_logits<logits_pass::staged>(exec, d, with_entropy, f, shape);
    shape.shared = 0;
    launch_logits<logits_pass::plain>(exec, d, with_entropy, f, shape);
  }
}

inline void check_vocabulary(index_t classes) {
  constexpr index_t most = index_t{1} << 30;
  if (classes > most) fail_shape("rl: a vocabulary of ", classes, " is larger than the ", most, " that a GPU takes");
}

template <class T, class F>
void run_logits(const cuda& exec, const logits_problem<T>& p, const F& f) {
  if (p.rows() == 0) return;
  check_vocabulary(p.classes);
  run_device_logits(exec, device_logits<T>(p), p.with_entropy, f);
}

}  // namespace MLKIT_NAMESPACE::rl::detail
