// Log-probabilities of tokens and entropies from logits, and their gradient, without a matrix of log-softmax.
//
// Losses over logits stand on detail::run_logits, the one pass that all of this is:
//
//   arguments call(function, exec);
//   auto p = make_logits_problem<T>(call, function, logits, tokens, options, looks_at_data<Executor>);
//   set_gradient(call, function, dlogits, logits, p);  // without it, values alone
//   p.with_entropy = true;                             // else f's entropy is 0
//   run_logits(exec, p, f);
//
// calls f(row, logp, entropy, lse) once for each row that the mask keeps, from several threads at once, and writes the
// gradient of what f returns, a token_gradient, while the row's logits are still in cache. `row` counts over [batch,
// time] or [rows]. What f keeps of a row belongs into memory of that row's own, to be summed in order afterwards: so
// sums are the same bits for any number of threads. Rows that are masked are neither read nor passed to f, and their
// gradient is 0.
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "../simd/math.hpp"
#include "lanes.hpp"
#include "options.hpp"
#include "token_ids.hpp"

namespace MLKIT_NAMESPACE::rl {

/// What log_probs may be told. Rank is that of the tokens: 1 for logits [rows, vocabulary], 2 for [batch, time,
/// vocabulary].
template <int Rank>
struct log_prob_options {
  double temperature = 1;     ///< logits are divided by it; in [1e-30, 1e30]
  mask_view<Rank> mask = {};  ///< rows to leave out
};

/// What log_probs writes: each of the tokens' shape, and each left out if it is not given.
template <class A, int Rank>
struct log_prob_outputs {
  tensor_view<A, Rank> logp = {};     ///< log p of the token
  tensor_view<A, Rank> entropy = {};  ///< -sum over j of p_j log p_j
  tensor_view<A, Rank> lse = {};      ///< log of the sum of exp(z_j / temperature)
};

/// What a loss is to a row: its derivatives by the log-probability of the token, by the entropy, and by the mean of all
/// log-probabilities, 1/V sum log p_j.
template <class A>
struct token_gradient {
  A dlogp = 0;
  A dentropy = 0;
  A dmean = 0;
};

/// The same for all rows, each of the tokens' shape; one that is not given is 0.
template <class A, int Rank>
struct log_prob_gradients {
  tensor_view<const A, Rank> dlogp = {};
  tensor_view<const A, Rank> dentropy = {};
};

namespace detail {

// Classes that are reduced together: 8 KiB of f32, which a first-level cache holds beside what comes next. Sums over a
// row are sums over chunks in order, whoever reduces them.
inline constexpr index_t chunk_classes = 2048;
// Rows that are worked on together, at most.
inline constexpr index_t block_rows = 64;

// What an exponential costs, in elements of simpler loops.
inline constexpr index_t exponential_cost = 4;

// A gradient larger than this will not be in cache when it is read.
inline constexpr index_t cached_bytes = index_t{16} << 20;

// Over a stretch of a row, with x_j = (z_j - top) log2(e) / temperature: the largest z, the sum of 2^x and of x 2^x.
template <class A>
struct chunk_state {
  A top, sum, weighted;
};

template <class A>
struct row_block {
  alignas(64) A top[block_rows]{}, sum[block_rows]{}, weighted[block_rows]{}, log_sum[block_rows]{}, logp[block_rows]{},
      entropy[block_rows]{}, lse[block_rows]{};
  alignas(64) A probability[block_rows]{}, less_one[block_rows]{};  // e^logp and e^logp - 1
  void set(index_t i, const chunk_state<A>& s) noexcept {
    top[i] = s.top;
    sum[i] = s.sum;
    weighted[i] = s.weighted;
  }
};

// What kernels are given: rows [batch, time] of logits and of their gradient, which may be the same memory.
template <class T>
struct logits_problem {
  using A = accumulator_t<T>;
  index_t batch = 0, time = 0, classes = 0;
  const T* logits = nullptr;
  index_t batch_stride = 0, time_stride = 0, class_stride = 0;
  T* gradient = nullptr;
  index_t gradient_batch_stride = 0, gradient_time_stride = 0, gradient_class_stride = 0;
  token_ids<2> tokens;
  mask_view<2> mask;
  A scale = 0;  // log2(e) / temperature
  A inverse_temperature = 1;
  bool with_entropy = false;
  bool streams_gradient = false;  // its rows are written past the caches

  struct place {
    index_t b, t;
  };
  // A division, which rows of a few classes would feel, only where there is more than one sequence.
  place at(index_t i) const noexcept { return batch == 1 ? place{0, i} : place{i / time, i % time}; }

  index_t rows() const noexcept { return batch * time; }
  const T* row(index_t i) const noexcept {
    const place r = at(i);
    return logits + r.b * batch_stride + r.t * time_stride;
  }
  T* gradient_row(index_t i) const noexcept {
    const place r = at(i);
    return gradient + r.b * gradient_batch_stride + r.t * gradient_time_stride;
  }
  index_t token(index_t i) const noexcept {
    const place r = at(i);
    return tokens(r.b, r.t);
  }
  bool keeps(index_t i) const noexcept {
    const place r = at(i);
    return !mask || mask.values(r.b, r.t) != 0;
  }
};

template <class T>
struct logits_kernels {
  using A = accumulator_t<T>;
  using problem = logits_problem<T>;
  void (*scan)(const problem&, index_t row, index_t first, index_t last, chunk_state<A>*) noexcept;
  void (*measure)(const problem&, const index_t* rows, index_t count, row_block<A>&, A* kept) noexcept;
  void (*collect)(const problem&, const index_t* rows, index_t count, const chunk_state<A>*, row_block<A>&) noexcept;
  void (*differentiate)(const problem&, index_t row, index_t begin, index_t end, const row_block<A>&, index_t i,
                        const token_gradient<A>&, const A* kept) noexcept;
  A (*total)(const problem&, index_t row) noexcept;
  index_t (*kept_stride)(index_t classes) noexcept;
};

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::rl

#define MLKIT_FOREACH "../rl/cpu/log_probs-inl.hpp"
#include "../simd/foreach_isa.hpp"

namespace MLKIT_NAMESPACE::rl {
namespace detail {

/// Runs a problem: f(row, logp, entropy, lse) for each row that counts, and the gradient of what it returns where the
/// problem has one. entropy is 0 where the problem is without.
template <class T, class F>
void run_logits(const cpu& exec, const logits_problem<T>& p, const F& f) {
  using A = accumulator_t<T>;
  const index_t rows = p.rows(), chunks = ceil_div(p.classes, chunk_classes);
  if (rows == 0) return;
  const auto kernels = MLKIT_SELECT_WITHOUT_BF16(logits_entry<T>)();
  // Rows that count, where not all do; the others' gradient is 0.
  std::vector<index_t> kept;
  if (p.mask) {
    kept.reserve(static_cast<std::size_t>(rows));
    for (index_t i = 0; i < rows; ++i)
      if (p.keeps(i)) kept.push_back(i);
    const row_block<A> none{};
    if (p.gradient)
      parallel_ranges(threads_for(exec, (rows - static_cast<index_t>(kept.size())) * p.classes), rows,
                      [&](index_t begin, index_t end) {
                        for (index_t i = begin; i < end; ++i)
                          if (!p.keeps(i)) kernels.differentiate(p, i, 0, p.classes, none, 0, {}, nullptr);
                      });
  }
  const index_t count = p.mask ? static_cast<index_t>(kept.size()) : rows;
  if (count == 0) return;
  const cpu limited = threads_for(exec, exponential_cost * count * p.classes);
  const index_t threads = concurrency(limited);
  const auto rows_from = [&](index_t first, index_t n, index_t* own) -> const index_t* {
    if (p.mask) return kept.data() + first;
    std::iota(own, own + n, first);
    return own;
  };
  const auto ask = [&](index_t row, const row_block<A>& block, index_t i) -> token_gradient<A> {
    return f(row, block.logp[i], block.entropy[i], block.lse[i]);
  };

  // Few long rows: each is spread over all threads.
  constexpr index_t rows_of_thread = 4;
  if (threads > 1 && chunks > 1 && count < rows_of_thread * threads) {
    index_t own[block_rows];
    workspace<chunk_state<A>> states(std::min(count, block_rows) * chunks);
    row_block<A> block;
    for (index_t first = 0; first < count; first += block_rows) {
      const index_t n = std::min(block_rows, count - first);
      const index_t* at = rows_from(first, n, own);
      parallel_ranges(limited, n * chunks, [&](index_t begin, index_t end) {
        for (index_t i = begin; i < end; ++i)
          kernels.scan(p, at[i / chunks], i % chunks, i % chunks + 1, states.data() + i);
      });
      kernels.collect(p, at, n, states.data(), block);
      token_gradient<A> gradients[block_rows];
      for (index_t i = 0; i < n; ++i) gradients[i] = ask(at[i], block, i);
      if (!p.gradient) continue;
      parallel_ranges(limited, n * chunks, [&](index_t begin, index_t end) {
        for (index_t i = begin; i < end;) {
          const index_t r = i / chunks, last = std::min(end, (r + 1) * chunks);
          kernels.differentiate(p, at[r], (i - r * chunks) * chunk_classes,
                                std::min(p.classes, (last - r * chunks) * chunk_classes), block, r, gradients[r],
                                nullptr);
          i = last;
        }
      });
    }
    return;
  }

  // Rows whose logits and gradient stay in cache between the two passes over them. Those of one chunk keep their powers
  // for the second.
  constexpr index_t cached_elements = 1 << 13;
  const index_t together = p.gradient ? std::clamp<index_t>(cached_elements / p.classes, 1, block_rows) : block_rows;
  const index_t stride = p.gradient && chunks == 1 ? kernels.kept_stride(p.classes) : 0;
  parallel_ranges(limited, count, [&](index_t begin, index_t end) {
    index_t own[block_rows];
    row_block<A> block;
    const workspace<A> powers(together * stride);
    A* const kept = stride > 0 ? powers.data() : nullptr;
    for (index_t first = begin; first < end; first += together) {
      const index_t n = std::min(together, end - first);
      const index_t* at = rows_from(first, n, own);
      kernels.measure(p, at, n, block, kept);
      for (index_t i = 0; i < n; ++i) {
        const token_gradient<A> g = ask(at[i], block, i);
        if (p.gradient) kernels.differentiate(p, at[i], 0, p.classes, block, i, g, kept ? kept + i * stride : nullptr);
      }
    }
  });
}

template <class T>
matrix_view<T> as_rows(const tensor_view<T, 1>& v) noexcept {
  return {v.data, {1, v.extents[0]}, {0, v.strides[0]}};
}
template <class T>
matrix_view<T> as_rows(const tensor_view<T, 2>& v) noexcept {
  return v;
}

template <int Rank>
extents_t<Rank> leading(const extents_t<Rank + 1>& e) noexcept {
  extents_t<Rank> r;
  std::copy_n(e.begin(), Rank, r.begin());
  return r;
}

/// A problem of rows of logits, without tokens, mask and gradient.
template <class T, int Rank>
logits_problem<T> make_rows(const tensor_view<const T, Rank + 1>& logits, double temperature) noexcept {
  using A = accumulator_t<T>;
  logits_problem<T> p;
  constexpr bool batched = Rank == 2;
  p.batch = batched ? logits.extents[0] : 1;
  p.time = logits.extents[Rank - 1];
  p.classes = logits.extents[Rank];
  p.logits = logits.data;
  p.batch_stride = batched ? logits.strides[0] : 0;
  p.time_stride = logits.strides[Rank - 1];
  p.class_stride = logits.strides[Rank];
  p.inverse_temperature = static_cast<A>(1 / temperature);
  p.scale = static_cast<A>(1.44269504088896340736 / temperature);
  return p;
}

/// Checks logits, tokens and options, names them to the call, and makes a problem of them, without a gradient.
/// Ids of rows that the mask keeps are refused outside the vocabulary where they can be looked at.
template <class T, int Rank>
logits_problem<T> make_logits_problem(arguments& call, std::string_view function,
                                      const tensor_view<const T, Rank + 1>& logits, const token_ids<Rank>& tokens,
                                      const log_prob_options<Rank>& o, bool look, bool logits_are_written = false) {
  check_view(function, "logits", logits);
  const extents_t<Rank> shape = leading<Rank>(logits.extents);
  check_same_shape<Rank>(function, "tokens", tokens.extents(), "logits' rows", shape);
  tokens.visit([&](const auto& v) {
    check_view(function, "tokens", v);
    call.reads("tokens", v);
  });
  check_mask<Rank>(call, function, o.mask, "logits' rows", shape);
  check_temperature(function, o.temperature);
  if (!logits_are_written) call.reads("logits", logits);

  logits_problem<T> p = make_rows<T, Rank>(logits, o.temperature);
  tokens.visit([&](const auto& v) { p.tokens = as_rows(v); });
  if (o.mask) p.mask = as_rows(o.mask.values);
  for (index_t i = 0; look && i < p.rows(); ++i)
    if (p.keeps(i) && (p.token(i) < 0 || p.token(i) >= p.classes))
      fail_value(function, ": ", index_text<Rank>("tokens", i, shape), " = ", p.token(i), " is outside [0, ", p.classes,
                 ")");
  return p;
}

/// Gives the problem a place for the gradient, which may be that of the logits, exactly.
template <class T, int Rank>
void set_gradient(arguments& call, std::string_view function, const tensor_view<T, Rank>& dlogits,
                  const tensor_view<const T, Rank>& logits, logits_problem<T>& p) {
  check_same_shape<Rank>(function, "dlogits", dlogits.extents, "logits", logits.extents);
  check_view(function, "dlogits", dlogits);
  call.writes("dlogits", dlogits);
  if (p.rows() == 0 || p.classes == 0) return;
  p.gradient = dlogits.data;
  p.streams_gradient = sizeof(T) >= 4 && p.gradient != p.logits && p.class_stride == 1 &&
                       dlogits.strides[Rank - 1] == 1 && dlogits.size() * index_t{sizeof(T)} > cached_bytes;
  p.gradient_batch_stride = Rank == 3 ? dlogits.strides[0] : 0;
  p.gradient_time_stride = dlogits.strides[Rank - 2];
  p.gradient_class_stride = dlogits.strides[Rank - 1];
}

template <class T, int Rank>
bool same_memory(const tensor_view<T, Rank>& a, const tensor_view<const T, Rank>& b) noexcept {
  return a.data == b.data && a.extents == b.extents && a.strides == b.strides;
}

template <class A, int Rank>
void check_row_output(arguments& call, std::string_view function, std::string_view name, const tensor_view<A, Rank>& v,
                      const std::type_identity_t<extents_t<Rank>>& shape, std::string_view rows_of) {
  if (!is_given(v)) return;
  check_same_shape<Rank>(function, name, v.extents, rows_of, shape);
  check_view(function, name, v);
  call.writes(name, v);
}

template <class A, int Rank>
void check_derivatives(arguments& call, std::string_view function, const log_prob_gradients<A, Rank>& given,
                       std::string_view rows_of, const std::type_identity_t<extents_t<Rank>>& shape) {
  const auto one = [&](std::string_view name, const tensor_view<const A, Rank>& v) {
    if (!is_given(v)) return;
    check_same_shape<Rank>(function, name, v.extents, rows_of, shape);
    check_view(function, name, v);
    call.reads(name, v);
  };
  one("dlogp", given.dlogp);
  one("dentropy", given.dentropy);
}

// Outputs by row. Those of masked rows are 0.
template <class A>
struct row_outputs {
  matrix_view<A> logp, entropy, lse;
  index_t time;

  template <int Rank>
  row_outputs(arguments& call, std::string_view function, const log_prob_outputs<A, Rank>& out,
              const std::type_identity_t<extents_t<Rank>>& shape, std::string_view rows_of = "logits' rows")
      : logp(as_rows(out.logp)), entropy(as_rows(out.entropy)), lse(as_rows(out.lse)), time(shape[Rank - 1]) {
    check_row_output(call, function, "logp", out.logp, shape, rows_of);
    check_row_output(call, function, "entropy", out.entropy, shape, rows_of);
    check_row_output(call, function, "lse", out.lse, shape, rows_of);
  }
  MLKIT_HOST_DEVICE void set(index_t row, A l, A h, A s) const noexcept {
    const index_t b = row < time ? 0 : row / time, t = row - b * time;
    if (logp.data) logp(b, t) = l;
    if (entropy.data) entropy(b, t) = h;
    if (lse.data) lse(b, t) = s;
  }
  template <class T>
  void clear_masked(const logits_problem<T>& p) const noexcept {
    if (!p.mask) return;
    for (index_t i = 0; i < p.rows(); ++i)
      if (!p.keeps(i)) set(i, A{}, A{}, A{});
  }
};

// f(row, logp, entropy), or f(row, logp) of what needs no entropy; it returns a token_gradient, or dlogp alone.
template <class F, class A>
inline constexpr bool wants_entropy = std::is_invocable_v<const F&, index_t, A, A>;

#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // f runs where the kernel does
#endif
template <class A, class F>
MLKIT_HOST_DEVICE token_gradient<A> call_loss(const F& f, index_t row, A logp, A entropy) {
  const auto returned = [&] {
    if constexpr (wants_entropy<F, A>)
      return f(row, logp, entropy);
    else
      return f(row, logp);
  }();
  if constexpr (std::is_arithmetic_v<std::remove_cvref_t<decltype(returned)>>)
    return {static_cast<A>(returned)};
  else
    return returned;
}

// What run_logits calls for a row: f(row, logp, entropy, lse). On a GPU it also calls masked(row) for rows that the
// mask leaves out.

// Keeps what log_probs writes.
template <class A>
struct keep_row {
  row_outputs<A> rows;

  MLKIT_HOST_DEVICE token_gradient<A> operator()(index_t row, A logp, A entropy, A lse) const noexcept {
    rows.set(row, logp, entropy, lse);
    return {};
  }
  MLKIT_HOST_DEVICE void masked(index_t row) const noexcept { rows.set(row, A{}, A{}, A{}); }
};
// Asks a user's loss too. F is a reference where that may not be copied.
template <class A, class F>
struct keep_and_ask {
  row_outputs<A> rows;
  F f;

  MLKIT_HOST_DEVICE token_gradient<A> operator()(index_t row, A logp, A entropy, A lse) const {
    rows.set(row, logp, entropy, lse);
    return call_loss<A>(f, row, logp, entropy);
  }
  MLKIT_HOST_DEVICE void masked(index_t row) const noexcept { rows.set(row, A{}, A{}, A{}); }
};
// Derivatives that are known.
template <class A>
struct known_slopes {
  matrix_view<const A> dlogp, dentropy;
  index_t time;

  MLKIT_HOST_DEVICE token_gradient<A> operator()(index_t row, A, A, A) const noexcept {
    const index_t b = row < time ? 0 : row / time, t = row - b * time;
    return {dlogp.data ? dlogp(b, t) : A{}, dentropy.data ? dentropy(b, t) : A{}};
  }
  MLKIT_HOST_DEVICE void masked(index_t) const noexcept {}
};

template <class X>
concept logits_like = viewable<X, 2> || viewable<X, 3>;
template <class X>
inline constexpr int token_rank = std::remove_cvref_t<decltype(as_view(std::declval<X&>()))>::rank - 1;

template <class Logits, class Gradient>
constexpr void check_gradient_type() {
  static_assert(std::is_same_v<element_t<std::remove_reference_t<Gradient>>, element_t<const Logits>> &&
                    token_rank<std::remove_reference_t<Gradient>> == token_rank<const Logits>,
                "rl: dlogits has the rank and type of logits");
}

}  // namespace detail

/// For each row z of logits with token y: logp = z_y / tau - lse, lse = log of the sum of exp(z_j / tau), entropy =
/// -sum p_j log p_j; whichever of them `out` has. logits [rows, vocabulary] or [batch, time, vocabulary], any strides;
/// tokens of their leading shape, std::int32_t or std::int64_t; f32, f64, bf16 and f16, outputs and sums f32 (f64 for
/// f64).
///
/// Rows that options.mask leaves out are not read, whatever they hold, and give 0. A logit of -inf has probability 0
/// and no part in the entropy; where all are -inf, logp and lse are -inf and the entropy is 0. NaN or +inf give NaN in
/// their row. Differences from the largest logit are what is exponentiated, so that logits of +-1e4 lose nothing.
///
/// Logits are read once; nothing of their size is stored. The same bits for any number of threads. Throws shape_error
/// where shapes do not fit or memory overlaps, value_error for a temperature outside [1e-30, 1e30], and for a
/// token outside the vocabulary, named by its index, before anything is written. Milakov, Gimelshein: "Online
/// normalizer calculation for softmax", 2018.
///
/// With a mlkit::cuda a token outside the vocabulary is not refused: its logp is NaN, and so is its row's gradient.
/// The bits of a row then depend on its logits and on its address modulo 16.
template <executor Executor, detail::logits_like Logits>
void log_probs(const Executor& exec, const Logits& logits, const token_ids<detail::token_rank<const Logits>>& tokens,
               const log_prob_options<detail::token_rank<const Logits>>& options,
               const log_prob_outputs<accumulator_t<element_t<const Logits>>, detail::token_rank<const Logits>>& out) {
  constexpr std::string_view function = "rl::log_probs";
  constexpr int rank = detail::token_rank<const Logits>;
  using T = element_t<const Logits>;
  using A = accumulator_t<T>;
  const tensor_view<const T, rank + 1> z = as_view(logits);
  detail::arguments call(function, exec);
  auto p = detail::make_logits_problem<T, rank>(call, function, z, tokens, options, detail::looks_at_data<Executor>);
  const detail::row_outputs<A> rows(call, function, out, detail::leading<rank>(z.extents));
  p.with_entropy = rows.entropy.data != nullptr;
  if constexpr (detail::looks_at_data<Executor>) rows.clear_masked(p);
  run_logits(exec, p, detail::keep_row<A>{rows});
}

/// The log-probabilities alone.
template <executor Executor, detail::logits_like Logits, viewable<detail::token_rank<const Logits>> Out>
void log_probs(const Executor& exec, const Logits& logits, const token_ids<detail::token_rank<const Logits>>& tokens,
               const log_prob_options<detail::token_rank<const Logits>>& options, Out&& logp) {
  using A = accumulator_t<element_t<const Logits>>;
  static_assert(std::is_same_v<element_t<std::remove_reference_t<Out>>, A>,
                "rl: log-probabilities are of the type of sums: f64 for f64, f32 for all others");
  log_probs(exec, logits, tokens, options,
            log_prob_outputs<A, detail::token_rank<const Logits>>{.logp = as_view(logp)});
}

/// log_probs, and the gradient of a loss over its rows in the same pass. f(row, logp, entropy), or f(row, logp) where
/// the entropy is of no interest, returns the loss's derivatives for that row: a token_gradient, or a number, dlogp
/// alone. dlogits, of logits' shape and type, becomes
///   dz_j = 1 / tau (dlogp (1[j = y] - p_j) - dentropy p_j (log p_j + H) + dmean (1 / V - p_j)),
/// with 0 for 0 log 0, written while the row is in cache. dlogits may be logits itself, which it then replaces.
///
/// `row` counts the rows of [rows] or [batch, time] in row-major order. f is called once for each row that the mask
/// keeps, from several threads at once, in any order, and must not throw; what it keeps of a row belongs into memory of
/// that row's own. Rows that are masked, and those whose derivatives are all 0, get 0, whatever their logits are; so
/// do rows whose logits are all -inf. All else is as for log_probs; a partial overlap of dlogits with logits is a
/// shape_error. Logits are read from memory once and dlogits are written once.
/// With a mlkit::cuda f is a functor that device code can call (MLKIT_HOST_DEVICE), copied to the device as it is; rows
/// that shared memory does not hold (about 56000 classes of f32) are read twice.
template <executor Executor, detail::logits_like Logits, class F, detail::logits_like Gradient>
void log_probs_and_gradient(
    const Executor& exec, const Logits& logits, const token_ids<detail::token_rank<const Logits>>& tokens,
    const log_prob_options<detail::token_rank<const Logits>>& options, const F& f,
    const log_prob_outputs<accumulator_t<element_t<const Logits>>, detail::token_rank<const Logits>>& out,
    Gradient&& dlogits) {
  constexpr std::string_view function = "rl::log_probs_and_gradient";
  constexpr int rank = detail::token_rank<const Logits>;
  using T = element_t<const Logits>;
  using A = accumulator_t<T>;
  detail::check_gradient_type<Logits, Gradient>();
  const tensor_view<const T, rank + 1> z = as_view(logits);
  const tensor_view<T, rank + 1> dz = as_view(dlogits);
  detail::arguments call(function, exec);
  auto p = detail::make_logits_problem<T, rank>(call, function, z, tokens, options, detail::looks_at_data<Executor>,
                                                detail::same_memory(dz, z));
  const detail::row_outputs<A> rows(call, function, out, detail::leading<rank>(z.extents));
  detail::set_gradient(call, function, dz, z, p);
  p.with_entropy = rows.entropy.data != nullptr || detail::wants_entropy<F, A>;
  if constexpr (detail::looks_at_data<Executor>) rows.clear_masked(p);
  using Held = std::conditional_t<detail::looks_at_data<Executor>, const F&, F>;
  run_logits(exec, p, detail::keep_and_ask<A, Held>{rows, f});
}

/// dlogits from derivatives that are known: those of log_probs' outputs. Nothing of log_probs' is needed: the sums are
/// taken again as the logits come by. Derivatives of masked rows are not read. Otherwise as log_probs_and_gradient.
template <executor Executor, detail::logits_like Logits, detail::logits_like Gradient>
void log_probs_backward(
    const Executor& exec, const Logits& logits, const token_ids<detail::token_rank<const Logits>>& tokens,
    const log_prob_options<detail::token_rank<const Logits>>& options,
    const log_prob_gradients<accumulator_t<element_t<const Logits>>, detail::token_rank<const Logits>>& gradients,
    Gradient&& dlogits) {
  constexpr std::string_view function = "rl::log_probs_backward";
  constexpr int rank = detail::token_rank<const Logits>;
  using T = element_t<const Logits>;
  using A = accumulator_t<T>;
  detail::check_gradient_type<Logits, Gradient>();
  const tensor_view<const T, rank + 1> z = as_view(logits);
  const tensor_view<T, rank + 1> dz = as_view(dlogits);
  detail::arguments call(function, exec);
  auto p = detail::make_logits_problem<T, rank>(call, function, z, tokens, options, detail::looks_at_data<Executor>,
                                                detail::same_memory(dz, z));
  detail::check_derivatives<A, rank>(call, function, gradients, "logits' rows", detail::leading<rank>(z.extents));
  detail::set_gradient(call, function, dz, z, p);
  const matrix_view<const A> dlogp = detail::as_rows(gradients.dlogp), dentropy = detail::as_rows(gradients.dentropy);
  p.with_entropy = dentropy.data != nullptr;
  run_logits(exec, p, detail::known_slopes<A>{dlogp, dentropy, p.time});
}

}  // namespace MLKIT_NAMESPACE::rl
