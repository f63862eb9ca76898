// The language-model head fused with what is wanted of its logits: log-probabilities, losses and gradients from hidden
// states and weights, in chunks of the vocabulary, so that [tokens, vocabulary] takes no memory of its own.
//
// Three products are the work: logits z = h W^T, dh = dz W and dW = dz^T h. Between the first and the others stand the
// sums over each token's whole row. So either the logits wait for them somewhere, or they are computed twice:
//   - dweight's own memory holds them, a row of it the logits of that row's class, until the gradient takes their
//     place: where it is written, is of the type of sums, and has a column for each token;
//   - a workspace holds them for some tokens at a time, where so many tokens fit into a twenty-fourth of all logits
//     that products are efficient;
//   - elsewhere the first product is done a second time.
#pragma once

#include "../matmul/run.hpp"
#include "labels.hpp"
#include "log_probs.hpp"

namespace MLKIT_NAMESPACE::rl {

/// Where the gradients of a fused head go; each is left out if it is not given.
template <class Hidden, class Weight, int Rank>
struct lm_head_gradients {
  tensor_view<Hidden, Rank + 1> dhidden = {};  ///< of hidden's shape
  matrix_view<Weight> dweight = {};            ///< [vocabulary, d]
  bool accumulate_dweight = false;             ///< added to what dweight holds, which is otherwise replaced
};

namespace detail {

template <class A, class D>
struct column_kernels {
  void (*scan)(const A* z, index_t classes, index_t stride, index_t tokens, A scale, bool with_entropy,
               row_block<A>&) noexcept;
  void (*differentiate)(const A* z, index_t first, index_t classes, index_t all, index_t stride, index_t tokens,
                        A scale, A inverse_temperature, const row_block<A>&, const token_gradient<A>* given,
                        const index_t* labels, D* out, index_t out_stride) noexcept;
  void (*finish)(index_t tokens, A inverse_temperature, row_block<A>&) noexcept;
};

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::rl

#define MLKIT_FOREACH "../rl/cpu/lm_head-inl.hpp"
#include "../simd/foreach_isa.hpp"

namespace MLKIT_NAMESPACE::rl {
namespace detail {

// Tokens that share a pass over the weights, at most, and logits of a chunk: 1 MiB of f32, which a second-level cache
// holds.
inline constexpr index_t tokens_at_once = 512, chunk_logits = index_t{1} << 18;
// Tokens, at least, for which weights are worth reading once more rather than recomputing logits.
inline constexpr index_t least_kept_tokens = 128;
// Part of all logits that a workspace may hold.
inline constexpr index_t kept_part = 24;

/// hidden [rows, d] and weight [vocabulary, d], the rows that count and what each is a token of.
template <class H, class W>
struct head_problem {
  using A = std::conditional_t<std::is_same_v<W, double>, double, float>;
  // What dz is rounded to before it meets the weights: bf16 where all is bf16, as the logits' gradient would be.
  using D = std::conditional_t<std::is_same_v<H, bf16> && std::is_same_v<W, bf16>, bf16, A>;
  tensor_view<const H, 3> hidden;  // [batch, time, d]
  matrix_view<const W> weight;
  tensor_view<H, 3> dhidden;
  matrix_view<W> dweight;
  bool accumulate_dweight = false;
  std::vector<index_t> rows, labels;  // of the rows that count, in order
  double temperature = 1;
  bool with_entropy = false;

  index_t depth() const noexcept { return weight.extents[1]; }
  index_t classes() const noexcept { return weight.extents[0]; }
};

// Rows [first, first + n) of those that count as a matrix: a view where they lie evenly, else a copy in `copy`.
template <class H, class W>
class gathered_rows {
 public:
  gathered_rows(const head_problem<H, W>& p)
      : p_(p), even_(evenly(p)), copy_(even_ ? 0 : std::min(most(p), count(p)) * p.depth()) {}
  static index_t count(const head_problem<H, W>& p) { return static_cast<index_t>(p.rows.size()); }
  static index_t most(const head_problem<H, W>& p) { return std::max(tokens_at_once, p.depth()); }

  matrix_view<const H> operator()(const cpu& exec, index_t first, index_t n) const {
    const index_t d = p_.depth();
    const H* from = p_.hidden.data;
    const auto& s = p_.hidden.strides;
    if (even_) return {from + first * row_stride(p_), {n, d}, {row_stride(p_), s[2]}};
    H* to = copy_.data();
    parallel_ranges(threads_for(exec, n * d), n, [&](index_t begin, index_t end) {
      for (index_t i = begin; i < end; ++i) {
        const index_t row = p_.rows[static_cast<std::size_t>(first + i)], time = p_.hidden.extents[1];
        const H* source = from + row / time * s[0] + row % time * s[1];
        for (index_t k = 0; k < d; ++k) to[i * d + k] = source[k * s[2]];
      }
    });
    return {to, {n, d}};
  }
  bool even() const noexcept { return even_; }
  static index_t row_stride(const head_problem<H, W>& p) noexcept {
    return p.hidden.extents[1] == 1 ? p.hidden.strides[0] : p.hidden.strides[1];
  }

 private:
  static bool evenly(const head_problem<H, W>& p) noexcept {
    const auto &e = p.hidden.extents, &s = p.hidden.strides;
    return count(p) == e[0] * e[1] && (e[0] == 1 || e[1] == 1 || s[0] == e[1] * s[1]);
  }
  const head_problem<H, W>& p_;
  bool even_;
  workspace<H> copy_;
};

// c += a b. Of one kind, so that the three products of f32 are compiled as one; what they are added to lies in cache.
template <class L, class R, class C>
void add_product(const cpu& exec, const matrix_view<const L>& a, const matrix_view<const R>& b,
                 const matrix_view<C>& c) {
  const epilogue<accumulate> sum{accumulate{}};
  run_product<product_type_t<L, R>>(
      exec, make_product(c, sum, segment<dense_source<L>, dense_source<R>>{left_operand(a), right_operand(b)}));
}

template <class T>
void clear_rows(const cpu& exec, const matrix_view<T>& m) {
  parallel_ranges(threads_for(exec, m.size()), m.extents[0], [&](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i) {
      T* row = m.data + i * m.strides[0];
      if (m.strides[1] == 1)
        std::fill_n(row, m.extents[1], T{});
      else
        for (index_t k = 0; k < m.extents[1]; ++k) row[k * m.strides[1]] = T{};
    }
  });
}

/// Runs a problem: f(row, logp, entropy, lse) for each row that counts, as run_logits does, and the gradients.
template <class H, class W, class F>
void run_head(const cpu& exec, const head_problem<H, W>& p, const F& f) {
  using Problem = head_problem<H, W>;
  using A = typename Problem::A;
  using D = typename Problem::D;
  const index_t d = p.depth(), classes = p.classes(), count = static_cast<index_t>(p.rows.size());
  const bool to_hidden = p.dhidden.data != nullptr, to_weight = p.dweight.data != nullptr;
  const auto kernels = MLKIT_SELECT_WITHOUT_BF16(columns_entry<A, D>)();
  const A inverse_temperature = static_cast<A>(1 / p.temperature),
          scale = static_cast<A>(1.44269504088896340736 / p.temperature);

  for (index_t b = 0; to_hidden && b < p.dhidden.extents[0]; ++b)
    clear_rows(exec, matrix_view<H>{p.dhidden.data + b * p.dhidden.strides[0],
                                    {p.dhidden.extents[1], d},
                                    {p.dhidden.strides[1], p.dhidden.strides[2]}});
  if (count == 0) {
    if (to_weight && !p.accumulate_dweight) clear_rows(exec, p.dweight);
    return;
  }

  // How many tokens at once, and where their logits wait.
  const bool differentiates = to_hidden || to_weight;
  const bool dweight_keeps = std::is_same_v<W, A> && to_weight && !p.accumulate_dweight && p.dweight.strides[1] == 1 &&
                             p.dweight.strides[0] >= d;
  constexpr index_t most_tokens = 4 * tokens_at_once;
  index_t at_once = std::min(count, tokens_at_once);
  if (dweight_keeps)
    at_once = std::max(at_once, std::min(count <= d ? count : d / block_rows * block_rows, most_tokens));
  const index_t room = count / kept_part / block_rows * block_rows;
  const bool workspace_keeps = differentiates && room >= least_kept_tokens && at_once < count;
  if (workspace_keeps) at_once = std::min(at_once, room);
  const bool first_in_dweight = dweight_keeps && !workspace_keeps && at_once <= d;

  const index_t stride = round_up(at_once, block_rows);
  const index_t chunk = std::clamp(round_up(chunk_logits / stride, block_rows), index_t{256}, index_t{4096});
  const workspace<A> kept(workspace_keeps ? classes * stride : 0);
  const workspace<A> logits(std::min(chunk, classes) * stride);
  // dz takes the place of the logits where it is of their type.
  constexpr bool in_place = std::is_same_v<D, A>;
  const workspace<D> rounded(in_place || !differentiates ? 0 : std::min(chunk, classes) * stride);
  // Sums of dh, where it is no matrix of the type of sums itself.
  const gathered_rows<H, W> gather(p);
  const bool dhidden_is_sums = std::is_same_v<H, A> && gather.even() && to_hidden && p.dhidden.strides[2] == 1 &&
                               (p.dhidden.extents[0] == 1 || p.dhidden.extents[1] == 1 ||
                                p.dhidden.strides[0] == p.dhidden.extents[1] * p.dhidden.strides[1]);
  const workspace<A> sums(to_hidden && !dhidden_is_sums ? at_once * d : 0);
  const index_t most_blocks = ceil_div(at_once, block_rows);
  std::vector<row_block<A>> blocks(static_cast<std::size_t>(most_blocks));
  std::vector<token_gradient<A>> given(static_cast<std::size_t>(differentiates ? at_once : 0));

  for (index_t first = 0; first < count; first += at_once) {
    const index_t n = std::min(at_once, count - first), n_blocks = ceil_div(n, block_rows);
    const matrix_view<const H> h = gather(exec, first, n);
    const index_t* labels = p.labels.data() + first;
    const bool in_dweight = first_in_dweight && first == 0, keeps = in_dweight || workspace_keeps;
    // Logits [chunk, tokens] of the classes from c on, and where they are kept.
    const auto place_of = [&](index_t c, index_t m) -> matrix_view<A> {
      if constexpr (std::is_same_v<W, A>)
        if (in_dweight) return {p.dweight.data + c * p.dweight.strides[0], {m, n}, {p.dweight.strides[0], 1}};
      if (workspace_keeps) return {kept.data() + c * stride, {m, n}, {stride, 1}};
      return {logits.data(), {m, n}, {stride, 1}};
    };
    const auto weights_of = [&](index_t c, index_t m) -> matrix_view<const W> {
      return {p.weight.data + c * p.weight.strides[0], {m, d}, p.weight.strides};
    };
    const auto compute = [&](index_t c, index_t m, const matrix_view<A>& z) {
      clear_rows(exec, z);
      add_product(exec, weights_of(c, m), transposed(h), z);
    };
    const auto over_blocks = [&](index_t elements, const auto& g) {
      parallel_ranges(threads_for(exec, elements), n_blocks, [&](index_t begin, index_t end) {
        for (index_t b = begin; b < end; ++b) g(b, std::min(block_rows, n - b * block_rows));
      });
    };

    for (row_block<A>& b : blocks) {
      b = {};
      std::fill_n(b.top, block_rows, -std::numeric_limits<A>::infinity());
    }
    for (index_t c = 0; c < classes; c += chunk) {
      const index_t m = std::min(chunk, classes - c);
      const matrix_view<A> z = place_of(c, m);
      compute(c, m, z);
      over_blocks(m * n, [&](index_t b, index_t tokens) {
        row_block<A>& block = blocks[static_cast<std::size_t>(b)];
        const index_t at = b * block_rows;
        kernels.scan(z.data + at, m, z.strides[0], tokens, scale, p.with_entropy, block);
        for (index_t i = 0; i < tokens; ++i)
          if (const index_t j = labels[at + i] - c; j >= 0 && j < m) block.logp[i] = z(j, at + i);
      });
    }
    over_blocks(n * block_rows, [&](index_t b, index_t tokens) {
      row_block<A>& block = blocks[static_cast<std::size_t>(b)];
      kernels.finish(tokens, inverse_temperature, block);
      for (index_t i = 0; i < tokens; ++i) {
        const index_t at = b * block_rows + i;
        const token_gradient<A> g =
            f(p.rows[static_cast<std::size_t>(first + at)], block.logp[i], block.entropy[i], block.lse[i]);
        if (differentiates) given[static_cast<std::size_t>(at)] = g;
      }
    });
    if (!differentiates) continue;

    matrix_view<A> dh{sums.data(), {n, d}};
    if constexpr (std::is_same_v<H, A>)
      if (dhidden_is_sums) {
        const index_t step = p.dhidden.extents[1] == 1 ? p.dhidden.strides[0] : p.dhidden.strides[1];
        dh = {p.dhidden.data + first * step, {n, d}, {step, 1}};
      }
    if (to_hidden && !dhidden_is_sums) std::fill_n(sums.data(), n * d, A{});
    for (index_t c = 0; c < classes; c += chunk) {
      const index_t m = std::min(chunk, classes - c);
      const matrix_view<A> z = place_of(c, m);
      if (!keeps) compute(c, m, z);
      matrix_view<D> dz{rounded.data(), {m, n}, {stride, 1}};
      if constexpr (in_place) dz.data = logits.data();
      over_blocks(m * n, [&](index_t b, index_t tokens) {
        const index_t at = b * block_rows;
        kernels.differentiate(z.data + at, c, m, classes, z.strides[0], tokens, scale, inverse_temperature,
                              blocks[static_cast<std::size_t>(b)], given.data() + at, labels + at, dz.data + at,
                              stride);
      });
      const matrix_view<const D> read(dz);
      if (to_hidden) add_product(exec, transposed(read), weights_of(c, m), dh);
      if (to_weight) {
        const matrix_view<W> dw{p.dweight.data + c * p.dweight.strides[0], {m, d}, p.dweight.strides};
        if (first == 0 && !p.accumulate_dweight) clear_rows(exec, dw);
        add_product(exec, read, h, dw);
      }
    }
    if (to_hidden && !dhidden_is_sums)
      parallel_ranges(threads_for(exec, n * d), n, [&](index_t begin, index_t end) {
        for (index_t i = begin; i < end; ++i) {
          const index_t row = p.rows[static_cast<std::size_t>(first + i)], time = p.dhidden.extents[1];
          for (index_t k = 0; k < d; ++k) p.dhidden(row / time, row % time, k) = static_cast<H>(dh(i, k));
        }
      });
  }
}

template <class T>
tensor_view<T, 3> as_sequences(const tensor_view<T, 2>& v) noexcept {
  return {v.data, {1, v.extents[0], v.extents[1]}, {0, v.strides[0], v.strides[1]}};
}
template <class T>
tensor_view<T, 3> as_sequences(const tensor_view<T, 3>& v) noexcept {
  return v;
}

// Checks hidden states, weights and gradients, and names them to the call.
template <class H, class W, int Rank>
head_problem<H, W> make_head(arguments& call, std::string_view function, const tensor_view<const H, Rank + 1>& hidden,
                             const matrix_view<const W>& weight, double temperature,
                             const lm_head_gradients<H, W, Rank>& to) {
  static_assert(std::is_same_v<H, W>, "rl: hidden and lm_head have one type of elements");
  check_view(function, "hidden", hidden);
  check_view(function, "lm_head", weight);
  check_extent(function, "lm_head", "columns", weight.extent(1), "hidden", hidden.extents[Rank]);
  check_temperature(function, temperature);
  call.reads("hidden", hidden);
  call.reads("lm_head", weight);
  if (is_given(to.dhidden)) {
    check_same_shape<Rank + 1>(function, "dhidden", to.dhidden.extents, "hidden", hidden.extents);
    check_view(function, "dhidden", to.dhidden);
    call.writes("dhidden", to.dhidden);
  }
  if (is_given(to.dweight)) {
    check_same_shape<2>(function, "dweight", to.dweight.extents, "lm_head", weight.extents);
    check_view(function, "dweight", to.dweight);
    call.writes("dweight", to.dweight);
  }
  head_problem<H, W> p;
  p.hidden = as_sequences(hidden);
  p.weight = weight;
  p.dhidden = as_sequences(to.dhidden);
  p.dweight = to.dweight;
  p.accumulate_dweight = to.accumulate_dweight;
  p.temperature = temperature;
  return p;
}

template <int Rank>
void check_tokens(arguments& call, std::string_view function, const token_ids<Rank>& tokens,
                  const mask_view<Rank>& mask, const std::type_identity_t<extents_t<Rank>>& shape) {
  check_same_shape<Rank>(function, "tokens", tokens.extents(), "hidden's rows", shape);
  tokens.visit([&](const auto& v) {
    check_view(function, "tokens", v);
    call.reads("tokens", v);
  });
  check_mask<Rank>(call, function, mask, "hidden's rows", shape);
}

// The rows that the mask keeps, and their tokens, which must be within the vocabulary.
template <class H, class W, int Rank>
void set_tokens(std::string_view function, const token_ids<Rank>& tokens, const mask_view<Rank>& mask,
                const std::type_identity_t<extents_t<Rank>>& shape, head_problem<H, W>& p) {
  const index_t batch = Rank == 2 ? shape[0] : 1, time = shape[Rank - 1];
  for (index_t i = 0; i < batch * time; ++i) {
    index_t y;
    if constexpr (Rank == 1) {
      if (mask && !mask.values(i)) continue;
      y = tokens(i);
    } else {
      if (mask && !mask.values(i / time, i % time)) continue;
      y = tokens(i / time, i % time);
    }
    if (y < 0 || y >= p.classes())
      fail_value(function, ": ", index_text<Rank>("tokens", i, shape), " = ", y, " is outside [0, ", p.classes(), ")");
    p.rows.push_back(i);
    p.labels.push_back(y);
  }
}

template <class H, class W>
using head_sum_t = std::conditional_t<std::is_same_v<W, double>, double, float>;

// Losses of a row that heads are asked for: f(row, logp, entropy).
template <class A>
struct no_loss {
  MLKIT_HOST_DEVICE token_gradient<A> operator()(index_t, A, A) const noexcept { return {}; }
};
template <class A, class F>
struct asked_loss {
  F f;  // a reference where that may not be copied
  MLKIT_HOST_DEVICE token_gradient<A> operator()(index_t row, A logp, A entropy) const {
    return call_loss<A>(f, row, logp, entropy);
  }
};
template <class A>
struct known_loss {
  known_slopes<A> known;
  MLKIT_HOST_DEVICE token_gradient<A> operator()(index_t row, A, A) const noexcept { return known(row, 0, 0, 0); }
};

// What a head keeps of a row.
template <class A, class F>
struct head_row {
  row_outputs<A> rows;
  F f;
  MLKIT_HOST_DEVICE token_gradient<A> operator()(index_t row, A logp, A entropy, A lse) const {
    rows.set(row, logp, entropy, lse);
    return f(row, logp, entropy);
  }
  MLKIT_HOST_DEVICE void masked(index_t row) const noexcept { rows.set(row, A{}, A{}, A{}); }
};

template <class H, class W, int Rank, executor Executor, class F>
void head_log_probs(std::string_view function, const Executor& exec, const tensor_view<const H, Rank + 1>& hidden,
                    const matrix_view<const W>& weight, const token_ids<Rank>& tokens, const log_prob_options<Rank>& o,
                    bool with_entropy, const F& f, const log_prob_outputs<head_sum_t<H, W>, Rank>& out,
                    const lm_head_gradients<H, W, Rank>& to,
                    const log_prob_gradients<head_sum_t<H, W>, Rank>& given = {}) {
  using A = head_sum_t<H, W>;
  arguments call(function, exec);
  auto p = make_head<H, W, Rank>(call, function, hidden, weight, o.temperature, to);
  const extents_t<Rank> shape = leading<Rank>(hidden.extents);
  check_tokens<Rank>(call, function, tokens, o.mask, shape);
  if constexpr (looks_at_data<Executor>) set_tokens<H, W, Rank>(function, tokens, o.mask, shape, p);
  check_derivatives<A, Rank>(call, function, given, "hidden's rows", shape);
  const row_outputs<A> rows(call, function, out, shape, "hidden's rows");
  p.with_entropy = with_entropy || rows.entropy.data != nullptr;
  const head_row<A, F> keep{rows, f};
  if constexpr (looks_at_data<Executor>) {
    if (o.mask)
      for (index_t i = 0, kept = 0; i < p.hidden.extents[0] * p.hidden.extents[1]; ++i) {
        if (kept < static_cast<index_t>(p.rows.size()) && p.rows[static_cast<std::size_t>(kept)] == i)
          ++kept;
        else
          keep.masked(i);
      }
    run_head(exec, p, keep);
  } else {
    token_ids<2> ids;
    tokens.visit([&](const auto& v) { ids = as_rows(v); });
    mask_view<2> mask;
    if (o.mask) mask = as_rows(o.mask.values);
    run_head(function, exec, p, ids, mask, keep);
  }
}

}  // namespace detail

/// log_probs of logits = hidden lm_head^T, which are never stored as a whole: hidden [rows, d] or [batch, time, d],
/// lm_head [vocabulary, d], tokens of hidden's leading shape. Rows that options.mask leaves out are dropped before the
/// product, whatever they hold, and give 0.
///
/// Logits are computed by chunks of the vocabulary, each of them a product of matmul's, and reduced where they lie, in
/// cache: 2 rows d vocabulary flops, the weights read once for every 512 rows, and a workspace that the vocabulary does
/// not decide: about 1 MiB of logits beside that of matmul. f32, f64, bf16 and f16, hidden and lm_head of one type;
/// logits are f32 (f64 for f64), never rounded. The same bits for any number of threads.
/// Throws shape_error where shapes do not fit or memory overlaps, value_error for a temperature outside
/// [1e-30, 1e30] and for a token outside the vocabulary, named by its index, before anything is written.
///
/// With a mlkit::cuda the products are cuBLASLt's, of some hundred rows at a time, whose logits lie in a workspace: of
/// 256 rows, or a twenty-fourth of all logits where that is more, 512 MiB at most. Rows that the mask leaves out are
/// zeros in the products: what they hold does not matter, but they take their time. A token outside the vocabulary is
/// not refused: its logp is NaN, and so are its row's gradient and dweight.
template <executor Executor, detail::logits_like Hidden, viewable<2> Weight>
void log_probs(const Executor& exec, const Hidden& hidden, const Weight& lm_head,
               const token_ids<detail::token_rank<const Hidden>>& tokens,
               const log_prob_options<detail::token_rank<const Hidden>>& options,
               const log_prob_outputs<detail::head_sum_t<element_t<const Hidden>, element_t<const Weight>>,
                                      detail::token_rank<const Hidden>>& out) {
  using H = element_t<const Hidden>;
  using W = element_t<const Weight>;
  constexpr int rank = detail::token_rank<const Hidden>;
  using A = detail::head_sum_t<H, W>;
  detail::head_log_probs<H, W, rank>("rl::log_probs", exec, tensor_view<const H, rank + 1>(as_view(hidden)),
                                     as_view(lm_head), tokens, options, false, detail::no_loss<A>{}, out, {});
}

/// The log-probabilities alone.
template <executor Executor, detail::logits_like Hidden, viewable<2> Weight,
          viewable<detail::token_rank<const Hidden>> Out>
void log_probs(const Executor& exec, const Hidden& hidden, const Weight& lm_head,
               const token_ids<detail::token_rank<const Hidden>>& tokens,
               const log_prob_options<detail::token_rank<const Hidden>>& options, Out&& logp) {
  using A = detail::head_sum_t<element_t<const Hidden>, element_t<const Weight>>;
  static_assert(std::is_same_v<element_t<std::remove_reference_t<Out>>, A>,
                "rl: log-probabilities are of the type of sums: f64 for f64, f32 for all others");
  log_probs(exec, hidden, lm_head, tokens, options,
            log_prob_outputs<A, detail::token_rank<const Hidden>>{.logp = as_view(logp)});
}

/// The same, and the gradients of a loss over the rows: f(row, logp, entropy), or f(row, logp), returns the loss's
/// derivatives for a row, as log_probs_and_gradient has it for logits, and
///   dhidden = dz lm_head,   dweight = dz^T hidden,   dz the gradient of the logits.
/// dhidden is 0 in rows that do not count. Gradients have the types of hidden and of lm_head, sums f32 (f64 for f64);
/// where both are bf16, dz is rounded to bf16, as logits' gradients in bf16 are.
///
/// Three products, 6 rows d vocabulary flops, where logits can wait for the sums over their row: in dweight's own
/// memory, if it is replaced, is f32 (f64) and d is at least the number of rows; or, of thousands of rows, in a
/// workspace of a twenty-fourth of the logits. Elsewhere logits are computed a second time, 8 rows d vocabulary flops.
/// Otherwise as log_probs. Wijmans et al.: "Cut your losses in large-vocabulary language models", 2024; Hsu et
/// al.: "Liger kernel", 2024.
///
/// With a mlkit::cuda logits wait in the workspace: three products. f is a functor that device code can call
/// (MLKIT_HOST_DEVICE). Of f16, dz is f32, which no tensor core multiplies by f16: its gradients take many times as
/// long as those of bf16. Of 16 bits, dweight is rounded once for each part of the rows.
template <executor Executor, detail::logits_like Hidden, viewable<2> Weight, class F>
void log_probs_and_gradient(const Executor& exec, const Hidden& hidden, const Weight& lm_head,
                            const token_ids<detail::token_rank<const Hidden>>& tokens,
                            const log_prob_options<detail::token_rank<const Hidden>>& options, const F& f,
                            const log_prob_outputs<detail::head_sum_t<element_t<const Hidden>, element_t<const Weight>>,
                                                   detail::token_rank<const Hidden>>& out,
                            const lm_head_gradients<element_t<const Hidden>, element_t<const Weight>,
                                                    detail::token_rank<const Hidden>>& gradients) {
  using H = element_t<const Hidden>;
  using W = element_t<const Weight>;
  constexpr int rank = detail::token_rank<const Hidden>;
  using A = detail::head_sum_t<H, W>;
  using Held = std::conditional_t<detail::looks_at_data<Executor>, const F&, F>;
  detail::head_log_probs<H, W, rank>("rl::log_probs_and_gradient", exec, as_view(hidden), as_view(lm_head), tokens,
                                     options, detail::wants_entropy<F, A>, detail::asked_loss<A, Held>{f}, out,
                                     gradients);
}

/// The gradients alone, from derivatives that are known.
template <executor Executor, detail::logits_like Hidden, viewable<2> Weight>
void log_probs_backward(const Executor& exec, const Hidden& hidden, const Weight& lm_head,
                        const token_ids<detail::token_rank<const Hidden>>& tokens,
                        const log_prob_options<detail::token_rank<const Hidden>>& options,
                        const log_prob_gradients<detail::head_sum_t<element_t<const Hidden>, element_t<const Weight>>,
                                                 detail::token_rank<const Hidden>>& derivatives,
                        const lm_head_gradients<element_t<const Hidden>, element_t<const Weight>,
                                                detail::token_rank<const Hidden>>& gradients) {
  using H = element_t<const Hidden>;
  using W = element_t<const Weight>;
  constexpr int rank = detail::token_rank<const Hidden>;
  using A = detail::head_sum_t<H, W>;
  const tensor_view<const H, rank + 1> h = as_view(hidden);
  const auto dlogp = detail::as_rows(derivatives.dlogp), dentropy = detail::as_rows(derivatives.dentropy);
  const index_t time = h.extents[rank - 1];
  detail::head_log_probs<H, W, rank>("rl::log_probs_backward", exec, h, as_view(lm_head), tokens, options,
                                     dentropy.data != nullptr, detail::known_loss<A>{{dlogp, dentropy, time}}, {},
                                     gradients, derivatives);
}

namespace detail {

template <class H, class W>
cross_entropy_result run_head_cross_entropy(const cpu& exec, head_problem<H, W>& p, const row_labels& targets) {
  using A = head_sum_t<H, W>;
  for (std::size_t i = 0; i < targets.of.size(); ++i)
    if (targets.counts[i]) {
      p.rows.push_back(static_cast<index_t>(i));
      p.labels.push_back(static_cast<index_t>(targets.of[i]));
    }
  std::vector<A> logp(targets.of.size());
  const A slope = static_cast<A>(-1 / targets.divisor);
  run_head(exec, p, [&](index_t row, A l, A, A) {
    logp[static_cast<std::size_t>(row)] = l;
    return token_gradient<A>{slope};
  });
  cross_entropy_result result{0, targets.count};
  for (index_t row : p.rows) result.loss -= static_cast<double>(logp[static_cast<std::size_t>(row)]);
  result.loss /= targets.divisor;
  return result;
}

template <class H, class W, int Rank, executor Executor>
result_t<Executor, cross_entropy_result> head_cross_entropy(
    const Executor& exec, const tensor_view<const H, Rank + 1>& hidden, const matrix_view<const W>& weight,
    const token_ids<Rank>& labels, const cross_entropy_options& o, const lm_head_gradients<H, W, Rank>& to) {
  constexpr std::string_view function = "rl::cross_entropy";
  arguments call(function, exec);
  auto p = make_head<H, W, Rank>(call, function, hidden, weight, o.temperature, to);
  const auto no_smoothing = [&] {
    if (o.label_smoothing != 0)
      fail_value(function, ": label_smoothing = ", o.label_smoothing,
                 " needs the mean of all logits, which a fused head does not take; give logits");
  };
  const extents_t<Rank> shape = leading<Rank>(hidden.extents);
  if constexpr (looks_at_data<Executor>) {
    const row_labels targets(call, function, labels, "hidden's rows", shape, weight.extent(0), o);
    no_smoothing();
    return run_head_cross_entropy(exec, p, targets);
  } else {
    const sequence_places places = check_labels<Rank>(call, function, labels, "hidden's rows", shape, o, false);
    no_smoothing();
    token_ids<2> ids;
    labels.visit([&](const auto& v) { ids = as_rows(v); });
    return run_head_cross_entropy(exec, p, ids, places, o);
  }
}

}  // namespace detail

/// cross_entropy of logits = hidden lm_head^T, and its gradients by hidden and lm_head if they are given, as
/// log_probs_and_gradient takes them: prompts, padding and what else is ignored drop out before the product. Labels and
/// options are those of cross_entropy over logits, without label smoothing.
template <executor Executor, detail::logits_like Hidden, viewable<2> Weight>
detail::result_t<Executor, cross_entropy_result> cross_entropy(
    const Executor& exec, const Hidden& hidden, const Weight& lm_head,
    const token_ids<detail::token_rank<const Hidden>>& labels, const cross_entropy_options& options,
    const lm_head_gradients<element_t<const Hidden>, element_t<const Weight>, detail::token_rank<const Hidden>>&
        gradients = {}) {
  using H = element_t<const Hidden>;
  using W = element_t<const Weight>;
  constexpr int rank = detail::token_rank<const Hidden>;
  return detail::head_cross_entropy<H, W, rank>(exec, as_view(hidden), as_view(lm_head), labels, options, gradients);
}

}  // namespace MLKIT_NAMESPACE::rl
