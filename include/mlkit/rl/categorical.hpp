// Categorical and multi-discrete policies: log-probabilities, entropies, sampling and gradients over logits.
#pragma once

#include <span>

#include "../core/random.hpp"
#include "../core/tensor.hpp"
#include "functions.hpp"
#include "log_probs.hpp"

namespace MLKIT_NAMESPACE::rl {

/// Independent choices that stand side by side in a row of logits [rows, sum of sizes]: choice c, among sizes[c]
/// classes, has the columns that follow those of choice c - 1. Actions are [rows, choices] of std::int32_t or
/// std::int64_t, log-probabilities and entropies the sums over choices. Gymnasium's MultiDiscrete. It owns nothing.
template <storage T>
struct multi_discrete {
  using value_type = T;
  matrix_view<const T> logits = {};
  std::span<const index_t> sizes = {};
};

/// One choice among the classes of a row of logits [rows, classes]; actions are [rows, 1]. (rl::log_probs over logits
/// and tokens does the same without a policy.) It owns nothing.
template <storage T>
struct categorical {
  using value_type = T;
  matrix_view<const T> logits = {};
};

/// What log_probs over a policy writes, [rows] each; what is left out is not written.
template <class A>
struct policy_log_probs {
  vector_view<A> logp = {};     ///< log p(action)
  vector_view<A> entropy = {};  ///< of the row's distribution
};

/// The derivatives of a loss by log-probabilities and entropies, [rows] each; one that is not given is 0.
template <class A>
struct policy_derivatives {
  vector_view<const A> dlogp = {};
  vector_view<const A> dentropy = {};
};

namespace detail {

// The choices of one call, each as columns of logits.
template <class T>
struct choices {
  matrix_view<const T> logits;
  std::vector<index_t> begins;  // and the end

  index_t count() const noexcept { return static_cast<index_t>(begins.size()) - 1; }
  template <class U>
  matrix_view<U> of(const matrix_view<U>& v, index_t c) const noexcept {
    const index_t first = begins[static_cast<std::size_t>(c)], end = begins[static_cast<std::size_t>(c) + 1];
    return {v.data ? v.data + first * v.strides[1] : nullptr, {v.extents[0], end - first}, v.strides};
  }
};

template <class T>
choices<T> choices_of(std::string_view function, const multi_discrete<T>& policy) {
  check_view(function, "logits", policy.logits);
  choices<T> c{policy.logits, {0}};
  for (std::size_t i = 0; i < policy.sizes.size(); ++i) {
    const index_t n = policy.sizes[i];
    if (n < 1) fail_value(function, ": sizes[", i, "] = ", n, " is not positive");
    if (n > most_elements - c.begins.back()) fail_value(function, ": sizes[", i, "] = ", n, " is too large");
    c.begins.push_back(c.begins.back() + n);
  }
  if (c.begins.back() != policy.logits.extent(1))
    fail_shape(function, ": logits has ", policy.logits.extent(1), " columns, but sizes add up to ", c.begins.back());
  return c;
}
template <class T>
choices<T> choices_of(std::string_view function, const categorical<T>& policy) {
  check_view(function, "logits", policy.logits);
  if (policy.logits.extent(1) < 1) fail_shape(function, ": logits has no columns");
  return {policy.logits, {0, policy.logits.extent(1)}};
}

// Actions [rows, choices], in range where they can be looked at.
template <class T, class I>
void check_actions(arguments& call, std::string_view function, const choices<T>& c, const matrix_view<const I>& actions,
                   bool look) {
  static_assert(std::is_same_v<I, std::int32_t> || std::is_same_v<I, std::int64_t>,
                "rl: actions are std::int32_t or std::int64_t");
  check_view(function, "actions", actions);
  check_extent(function, "actions", "rows", actions.extent(0), "logits", c.logits.extent(0));
  check_extent(function, "actions", "columns", actions.extent(1), "the policy", c.count());
  for (index_t r = 0; look && r < actions.extent(0); ++r)
    for (index_t i = 0; i < c.count(); ++i) {
      const index_t n = c.begins[static_cast<std::size_t>(i) + 1] - c.begins[static_cast<std::size_t>(i)];
      if (actions(r, i) < 0 || actions(r, i) >= n)
        fail_value(function, ": actions[", r, ", ", i, "] = ", actions(r, i), " is outside [0, ", n, ")");
    }
  call.reads("actions", actions);
}

template <class A>
void check_rows(std::string_view function, std::string_view name, const vector_view<A>& v, std::string_view of,
                index_t rows) {
  check_extent(function, name, "elements", v.extent(0), of, rows);
  check_view(function, name, v);
}

template <class T, class I>
logits_problem<T> problem_of_choice(const choices<T>& c, index_t i, const matrix_view<const I>& actions) {
  const matrix_view<const T> z = c.of(c.logits, i);
  logits_problem<T> p;
  p.batch = 1;
  p.time = z.extents[0];
  p.classes = z.extents[1];
  p.logits = z.data;
  p.time_stride = z.strides[0];
  p.class_stride = z.strides[1];
  p.tokens = matrix_view<const I>(actions.data + i * actions.strides[1], {1, z.extents[0]}, {0, actions.strides[0]});
  p.scale = static_cast<accumulator_t<T>>(1.44269504088896340736);
  return p;
}

// Adds what a choice has of a row to what those before it had.
template <class A>
struct add_choice {
  vector_view<A> logp, entropy;
  bool first;

  MLKIT_HOST_DEVICE token_gradient<A> operator()(index_t row, A l, A h, A) const noexcept {
    if (logp.data) logp(row) = (first ? A{} : logp(row)) + l;
    if (entropy.data) entropy(row) = (first ? A{} : entropy(row)) + h;
    return {};
  }
  MLKIT_HOST_DEVICE void masked(index_t) const noexcept {}
};

// The empty sum.
template <class A>
void write_no_choice(by_executor, std::string_view, const cpu&, index_t rows, const policy_log_probs<A>& out) {
  for (index_t r = 0; r < rows; ++r) {
    if (out.logp.data) out.logp(r) = A{};
    if (out.entropy.data) out.entropy(r) = A{};
  }
}

// An index with probability proportional to e^z, from u in [0, 1): the first whose cumulated share is above u. All
// logits are finite or -inf, and one is finite.
template <class T>
index_t sample_class(const T* z, index_t stride, index_t n, double u) noexcept {
  using A = accumulator_t<T>;
  A top = -std::numeric_limits<A>::infinity();
  for (index_t j = 0; j < n; ++j) top = std::max(top, static_cast<A>(z[j * stride]));
  const auto weight = [&](index_t j) { return static_cast<double>(exp_of(static_cast<A>(z[j * stride]) - top)); };
  double total = 0;
  for (index_t j = 0; j < n; ++j) total += weight(j);
  double below = 0;
  index_t last = 0;  // of positive weight: rounding may leave u * total at the end
  for (index_t j = 0; j < n; ++j) {
    const double w = weight(j);
    if (w > 0) last = j;
    below += w;
    if (below > u * total) return j;
  }
  return last;
}

template <class T>
void check_logits_to_sample(std::string_view function, const choices<T>& c) {
  for (index_t r = 0; r < c.logits.extent(0); ++r)
    for (index_t i = 0; i < c.count(); ++i) {
      const matrix_view<const T> z = c.of(c.logits, i);
      bool any = false;
      for (index_t j = 0; j < z.extent(1); ++j) {
        const double value = static_cast<double>(z(r, j));
        if (std::isnan(value) || value == std::numeric_limits<double>::infinity())
          fail_value(function, ": logits[", r, ", ", c.begins[static_cast<std::size_t>(i)] + j, "] = ", value,
                     " is no logit");
        any = any || value > -std::numeric_limits<double>::infinity();
      }
      if (!any) fail_value(function, ": choice ", i, " of row ", r, " has no class that is possible");
    }
}

template <class T, class I>
void run_sample(std::string_view, const cpu& exec, const choices<T>& c, const random_stream& random,
                const matrix_view<I>& actions, index_t first) {
  parallel_for(threads_for(exec, c.logits.size()), c.logits.extent(0), [&](index_t r) {
    for (index_t i = 0; i < c.count(); ++i) {
      const matrix_view<const T> z = c.of(c.logits, i);
      const double u = random.uniform((static_cast<std::uint64_t>(first) + static_cast<std::uint64_t>(r)) *
                                          static_cast<std::uint64_t>(c.count()) +
                                      static_cast<std::uint64_t>(i));
      actions(r, i) = static_cast<I>(sample_class(z.data + r * z.strides[0], z.strides[1], z.extent(1), u));
    }
  });
}

}  // namespace detail

/// A categorical or multi_discrete policy.
template <class P>
concept discrete_policy =
    std::same_as<P, categorical<typename P::value_type>> || std::same_as<P, multi_discrete<typename P::value_type>>;

/// logp[r] = sum over choices of log softmax(z of the choice)[action], entropy[r] = sum of their entropies. Logits f32,
/// f64, bf16 or f16, of any strides; outputs f32 (f64 for f64). Throws shape_error where shapes do not fit or memory
/// overlaps, value_error for an action out of range, named by its index, before anything is written. The same bits for
/// any number of threads.
/// With a mlkit::cuda an action out of range is not refused: its row's logp is NaN, and so is the gradient of its
/// choice.
template <executor Executor, discrete_policy Policy, class I>
void log_probs(const Executor& exec, const Policy& policy, const tensor_view<I, 2>& actions,
               const policy_log_probs<accumulator_t<typename Policy::value_type>>& out) {
  constexpr std::string_view function = "rl::log_probs";
  using namespace detail;
  using T = typename Policy::value_type;
  using A = accumulator_t<T>;
  const choices<T> c = choices_of(function, policy);
  const matrix_view<const std::remove_const_t<I>> ids = actions;
  const index_t rows = c.logits.extent(0);
  arguments call(function, exec);
  call.reads("logits", c.logits);
  check_actions(call, function, c, ids, looks_at_data<Executor>);
  const auto output = [&](std::string_view name, const vector_view<A>& v) {
    if (!is_given(v)) return;
    check_rows(function, name, v, "logits' rows", rows);
    call.writes(name, v);
  };
  output("logp", out.logp);
  output("entropy", out.entropy);
  if (c.count() == 0) write_no_choice(by_executor{}, function, exec, rows, out);
  for (index_t i = 0; i < c.count(); ++i) {
    auto p = problem_of_choice(c, i, ids);
    p.with_entropy = out.entropy.data != nullptr;
    run_logits(exec, p, add_choice<A>{out.logp, out.entropy, i == 0});
  }
}

/// dlogits from a loss's derivatives by log_probs' outputs, dz_j = dlogp (1[j = action] - p_j) - dentropy p_j (log p_j
/// + H) within each choice. dlogits has logits' shape and may be the logits themselves. Otherwise as log_probs.
template <executor Executor, discrete_policy Policy, class I>
void backward(const Executor& exec, const Policy& policy, const tensor_view<I, 2>& actions,
              const policy_derivatives<accumulator_t<typename Policy::value_type>>& derivatives,
              const matrix_view<typename Policy::value_type>& dlogits) {
  constexpr std::string_view function = "rl::backward";
  using namespace detail;
  using T = typename Policy::value_type;
  using A = accumulator_t<T>;
  const choices<T> c = choices_of(function, policy);
  const matrix_view<const std::remove_const_t<I>> ids = actions;
  const index_t rows = c.logits.extent(0);
  arguments call(function, exec);
  if (!same_memory(dlogits, c.logits)) call.reads("logits", c.logits);
  check_actions(call, function, c, ids, looks_at_data<Executor>);
  const auto input = [&](std::string_view name, const vector_view<const A>& v) {
    if (!is_given(v)) return;
    check_rows(function, name, v, "logits' rows", rows);
    call.reads(name, v);
  };
  input("dlogp", derivatives.dlogp);
  input("dentropy", derivatives.dentropy);
  check_same_shape<2>(function, "dlogits", dlogits.extents, "logits", c.logits.extents);
  check_view(function, "dlogits", dlogits);
  call.writes("dlogits", dlogits);
  for (index_t i = 0; i < c.count() && rows > 0; ++i) {
    auto p = problem_of_choice(c, i, ids);
    const matrix_view<T> dz = c.of(dlogits, i);
    p.gradient = dz.data;
    p.gradient_time_stride = dz.strides[0];
    p.gradient_class_stride = dz.strides[1];
    p.with_entropy = derivatives.dentropy.data != nullptr;
    run_logits(exec, p, known_slopes<A>{as_rows(derivatives.dlogp), as_rows(derivatives.dentropy), rows});
  }
}

/// Draws actions [rows, choices] from a policy: choice c of row r with number (first + r) choices + c of the random
/// stream, so that a row's actions depend on neither its neighbours nor the number of threads, and `first` continues a
/// stream. A class is drawn with its probability to 2^-24, the resolution of the stream's uniform numbers. Throws
/// shape_error where shapes do not fit or memory overlaps, value_error for logits that are NaN or +inf, or all -inf,
/// named by their row, before anything is written.
/// With a mlkit::cuda logits that cannot be drawn from give the action -1; other actions are those of the CPU, except
/// where a number falls on the boundary of two classes to within rounding.
template <executor Executor, discrete_policy Policy, class I>
void sample(const Executor& exec, const Policy& policy, const random_stream& random, const tensor_view<I, 2>& actions,
            index_t first = 0) {
  constexpr std::string_view function = "rl::sample";
  using namespace detail;
  using T = typename Policy::value_type;
  static_assert(std::is_same_v<I, std::int32_t> || std::is_same_v<I, std::int64_t>,
                "rl: actions are std::int32_t or std::int64_t");
  const choices<T> c = choices_of(function, policy);
  const index_t rows = c.logits.extent(0);
  arguments call(function, exec);
  call.reads("logits", c.logits);
  check_view(function, "actions", actions);
  check_extent(function, "actions", "rows", actions.extent(0), "logits", rows);
  check_extent(function, "actions", "columns", actions.extent(1), "the policy", c.count());
  call.writes("actions", actions);
  if (first < 0) fail_value(function, ": first = ", first, " is negative");
  if constexpr (looks_at_data<Executor>) check_logits_to_sample(function, c);
  run_sample(function, exec, c, random, actions, first);
}

}  // namespace MLKIT_NAMESPACE::rl
