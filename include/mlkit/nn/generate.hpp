// Tokens from a language model: how the next is chosen from its logits, and whole continuations of prompts.
#pragma once

#include <numeric>

#include "language_model.hpp"

namespace MLKIT_NAMESPACE::nn {

/// How a token is chosen from logits, in this order: the penalty, the temperature, top-k, top-p, a draw.
struct choice_options {
  /// Logits over this, before the softmax. 0 is the limit: the largest logit, of equal ones the lowest id.
  double temperature = 1;
  index_t top_k = 0;  ///< only the k most probable, of equal ones the lower ids; 0 means all
  /// Only the most probable, up to and with the one that brings their sum to p. Holtzman et al.: "The curious case of
  /// neural text degeneration", 2020.
  double top_p = 1;
  /// Logits of tokens that the text has already are divided by this if they are positive, and else multiplied. Keskar
  /// et al.: "CTRL", 2019, section 4.1.
  double repetition_penalty = 1;
};

/// A token, and the logarithm of the probability that it was drawn with.
struct choice {
  std::int32_t id;
  double log_prob;
};

namespace detail {

inline void check_choice(std::string_view name, const choice_options& o) {
  if (!(o.temperature >= 0 && std::isfinite(o.temperature)))
    fail_value(name, ": temperature = ", o.temperature, " is negative or not finite");
  if (o.top_k < 0) fail_value(name, ": top_k = ", o.top_k, " is negative");
  if (!(o.top_p > 0 && o.top_p <= 1)) fail_value(name, ": top_p = ", o.top_p, " is outside (0, 1]");
  if (!(o.repetition_penalty > 0 && std::isfinite(o.repetition_penalty)))
    fail_value(name, ": repetition_penalty = ", o.repetition_penalty, " is not positive");
}

// choose, without its checks; `memory` and `order` are kept from one call to the next.
template <real T>
choice choose(std::span<const T> logits, std::span<const std::int32_t> text, const choice_options& o, double uniform,
              std::vector<double>& memory, std::vector<std::int32_t>& order) {
  memory.assign(logits.begin(), logits.end());
  std::vector<double>& p = memory;
  if (o.repetition_penalty != 1)
    for (const std::int32_t id : text) {  // once for each, however often it is there
      const auto i = static_cast<std::size_t>(id);
      const double z = static_cast<double>(logits[i]);
      p[i] = z > 0 ? z / o.repetition_penalty : z * o.repetition_penalty;
    }
  const auto top = std::max_element(p.begin(), p.end());
  if (o.temperature == 0) return {static_cast<std::int32_t>(top - p.begin()), 0};
  const double high = *top;
  double total = 0;
  for (double& z : p) total += z = std::exp((z - high) / o.temperature);
  const auto n = static_cast<std::int32_t>(p.size());
  if (const bool all = (o.top_k == 0 || o.top_k >= n) && o.top_p == 1; all) {
    order.clear();
  } else {
    order.resize(p.size());
    std::iota(order.begin(), order.end(), 0);
    const auto before = [&](std::int32_t a, std::int32_t b) {
      const double pa = p[static_cast<std::size_t>(a)], pb = p[static_cast<std::size_t>(b)];
      return pa > pb || (pa == pb && a < b);
    };
    if (o.top_k > 0 && o.top_k < n) {
      std::partial_sort(order.begin(), order.begin() + o.top_k, order.end(), before);
      order.resize(static_cast<std::size_t>(o.top_k));
      total = 0;
      for (const std::int32_t i : order) total += p[static_cast<std::size_t>(i)];
    } else {
      std::sort(order.begin(), order.end(), before);
    }
    if (o.top_p < 1) {
      double sum = 0;
      std::size_t kept = 0;
      while (kept < order.size() && sum < o.top_p * total) sum += p[static_cast<std::size_t>(order[kept++])];
      order.resize(std::max<std::size_t>(kept, 1));
      total = kept ? sum : p[static_cast<std::size_t>(order[0])];
    }
  }
  // The token at which the sum passes u; where rounding lets none, the last that can be.
  const double u = uniform * total;
  double sum = 0;
  std::int32_t id = -1;
  const std::size_t count = order.empty() ? p.size() : order.size();
  for (std::size_t i = 0; i < count; ++i) {
    const std::int32_t at = order.empty() ? static_cast<std::int32_t>(i) : order[i];
    const double w = p[static_cast<std::size_t>(at)];
    if (w > 0) id = at;
    sum += w;
    if (w > 0 && sum > u) break;
  }
  return {id, std::log(p[static_cast<std::size_t>(id)] / total)};
}

}  // namespace detail

/// A token for logits [vocabulary], given the tokens of the text so far and a uniform number in [0, 1). A logit of -inf
/// is never chosen. Throws value_error for options out of range, a token outside the vocabulary, and logits of which
/// one is NaN or +inf, or none is finite. Cost: a pass over the vocabulary, and a sort of it where top-k or top-p asks.
template <real T>
choice choose(std::span<const T> logits, std::span<const std::int32_t> text, const choice_options& o, double uniform) {
  constexpr std::string_view name = "nn::choose";
  detail::check_choice(name, o);
  if (!(uniform >= 0 && uniform < 1)) detail::fail_value(name, ": uniform = ", uniform, " is outside [0, 1)");
  for (const std::int32_t id : text)
    if (id < 0 || static_cast<std::size_t>(id) >= logits.size())
      detail::fail_value(name, ": id ", id, " of the text is outside the vocabulary of ", logits.size());
  bool finite = false;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (!(logits[i] < std::numeric_limits<T>::infinity()))
      detail::fail_value(name, ": logits[", i, "] = ", logits[i], " is not a number below infinity");
    finite = finite || logits[i] > -std::numeric_limits<T>::infinity();
  }
  if (!finite) detail::fail_value(name, ": none of the ", logits.size(), " logits is finite");
  std::vector<double> memory;
  std::vector<std::int32_t> order;
  return detail::choose(logits, text, o, uniform, memory, order);
}

/// How continuations are generated.
struct generation_options {
  index_t most = 64;      ///< tokens of a continuation
  std::int32_t end = -1;  ///< the id that ends one, which it keeps as its last; -1: none
  choice_options choice = {};
  std::uint64_t seed = 0;  ///< of the stream whose number i * most + t draws token t of prompt i
};

/// A continuation: its tokens, and for each the logarithm of the probability that it was drawn with, at the temperature
/// and among the tokens that the options leave.
struct continuation {
  std::vector<std::int32_t> ids;
  std::vector<double> log_probs;
};

/// Stream of generate's random numbers.
inline constexpr std::uint64_t generation_stream = 0x67656e65;

/// Continues each prompt, all side by side over a cache: prompt i by at most o.most tokens, fewer where `end` is drawn.
/// The same prompts and seed give the same continuations on any number of threads. Throws value_error for options out
/// of range, an empty prompt, and where prompt and continuation together are longer than the context; the model's
/// logits are taken as finite.
template <real T>
std::vector<continuation> generate(const cpu& exec, const language_model<T>& model,
                                   std::span<const std::vector<std::int32_t>> prompts,
                                   const generation_options& o = {}) {
  constexpr std::string_view name = "nn::generate";
  detail::check_choice(name, o.choice);
  if (o.most < 0) detail::fail_value(name, ": most = ", o.most, " is negative");
  const std::size_t batch = prompts.size();
  std::vector<continuation> all(batch);
  if (batch == 0 || o.most == 0) return all;
  std::size_t longest = 0;
  for (std::size_t i = 0; i < batch; ++i) {
    if (prompts[i].empty()) detail::fail_value(name, ": prompt ", i, " is empty");
    longest = std::max(longest, prompts[i].size());
  }
  const index_t columns = static_cast<index_t>(longest), capacity = columns + o.most - 1;
  if (capacity > model.options().context)
    detail::fail_value(name, ": a prompt of ", longest, " tokens and ", o.most, " more exceed the context of ",
                       model.options().context);
  std::vector<std::int32_t> ids(batch * longest), lengths, last(batch);
  for (std::size_t i = 0; i < batch; ++i) {
    std::copy(prompts[i].begin(), prompts[i].end(), ids.begin() + static_cast<std::ptrdiff_t>(i * longest));
    lengths.push_back(static_cast<std::int32_t>(prompts[i].size()));
  }
  kv_cache<T> cache(model.options(), static_cast<index_t>(batch), capacity);
  tape<T> t(exec, {.record = false});
  const random_stream random{o.seed, generation_stream};
  std::vector<char> ended(batch);
  std::vector<std::vector<std::int32_t>> texts;
  if (o.choice.repetition_penalty != 1) texts.assign(prompts.begin(), prompts.end());

  var<T> h = model.prefill(t, ids, lengths, cache);
  std::vector<T> states(batch * static_cast<std::size_t>(h.columns()));  // of the last token of each prompt
  for (std::size_t i = 0; i < batch; ++i)
    std::copy_n(h.data() + (static_cast<index_t>(i) * columns + lengths[i] - 1) * h.columns(), h.columns(),
                states.data() + static_cast<index_t>(i) * h.columns());
  h = t.constant(matrix_view<const T>(states.data(), {static_cast<index_t>(batch), h.columns()}));
  for (index_t step = 0; step < o.most; ++step) {
    const var<T> z = model.logits(h);
    const index_t vocabulary = z.columns();
    detail::parallel_ranges(exec, static_cast<index_t>(batch), [&](index_t begin, index_t end) {
      std::vector<double> memory;
      std::vector<std::int32_t> order;
      for (index_t b = begin; b < end; ++b) {
        const auto i = static_cast<std::size_t>(b);
        if (ended[i]) continue;
        const double u = static_cast<double>(random.uniform(static_cast<std::uint64_t>(b * o.most + step)));
        const std::span<const std::int32_t> text = texts.empty() ? std::span<const std::int32_t>{} : texts[i];
        const choice c =
            detail::choose(std::span<const T>(z.data() + b * vocabulary, static_cast<std::size_t>(vocabulary)), text,
                           o.choice, u, memory, order);
        all[i].ids.push_back(c.id);
        all[i].log_probs.push_back(c.log_prob);
        if (!texts.empty()) texts[i].push_back(c.id);
        last[i] = c.id;
        ended[i] = c.id == o.end;
      }
    });
    if (step + 1 == o.most || std::find(ended.begin(), ended.end(), 0) == ended.end()) break;
    t.clear();
    h = model.next(t, last, cache);
  }
  return all;
}

}  // namespace MLKIT_NAMESPACE::nn
