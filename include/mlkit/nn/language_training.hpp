// Training of a language model: texts packed into sequences, and a loop over them.
#pragma once

#include <numbers>
#include <numeric>

#include "adamw.hpp"
#include "language_model.hpp"
#include "loss.hpp"

namespace MLKIT_NAMESPACE::nn {

/// A text to learn from: its ids, of which the first `prompt` are given and not learnt (1 or more: the first token
/// follows nothing).
struct training_text {
  std::vector<std::int32_t> ids;
  index_t prompt = 1;
};

/// Several texts in one sequence, side by side without padding: what language_model::hidden and cross_entropy take.
/// labels[i] is the token that follows ids[i] in its text, or ignore_label where that is of a prompt or there is none.
struct packed_texts {
  std::vector<std::int32_t> ids, labels, documents;
  index_t learnt = 0;  ///< labels that are not ignored

  void clear() noexcept {
    ids.clear(), labels.clear(), documents.clear();
    learnt = 0;
  }
  /// Throws value_error for a text without ids, or a prompt that is empty or longer than its text.
  void add(const training_text& text) {
    const auto n = static_cast<index_t>(text.ids.size());
    if (text.prompt < 1 || text.prompt > n)
      detail::fail_value("nn::packed_texts::add: prompt = ", text.prompt, " is outside [1, ", n,
                         "], the text's length");
    const std::int32_t document = documents.empty() ? 0 : documents.back() + 1;
    ids.insert(ids.end(), text.ids.begin(), text.ids.end());
    documents.insert(documents.end(), text.ids.size(), document);
    for (index_t i = 1; i <= n; ++i) {
      const bool given = i < text.prompt || i == n;
      labels.push_back(given ? ignore_label : text.ids[static_cast<std::size_t>(i)]);
      learnt += !given;
    }
  }
};

/// Scales the gradients of parameters so that their common length is at most `most`; returns the length that it was.
/// Parameters that backward has not reached count nothing. Throws value_error for a `most` that is not positive, and
/// where a gradient is not finite. Pascanu, Mikolov, Bengio: "On the difficulty of training recurrent neural networks",
/// 2013.
template <real T>
double clip_gradients(const cpu& exec, std::span<parameter<T>* const> parameters, double most) {
  if (!(most > 0)) detail::fail_value("nn::clip_gradients: most = ", most, " is not positive");
  double square = 0;
  for (const parameter<T>* p : parameters)
    if (p->has_grad)
      square += detail::sum_of(exec, p->size(), [g = p->grad.data()](index_t i) {
        return static_cast<double>(g[i]) * static_cast<double>(g[i]);
      });
  const double length = std::sqrt(square);
  if (!std::isfinite(length)) detail::fail_value("nn::clip_gradients: a gradient is not finite");
  if (length > most)
    for (parameter<T>* p : parameters)
      if (p->has_grad)
        detail::for_each(exec, p->size(),
                         [g = p->grad.data(), s = static_cast<T>(most / length)](index_t i) { g[i] *= s; });
  return length;
}

/// How a language model is trained.
struct language_training_options {
  index_t steps = 100;
  index_t tokens = 1024;  ///< of a step, at most; texts are packed until the next one does not fit
  double rate = 3e-3;     ///< after warm_up steps, from where it falls to `last` times itself along half a cosine
  index_t warm_up = 20;
  double last = 0.1;
  double clip = 1;         ///< see clip_gradients
  std::uint64_t seed = 0;  ///< of the order of texts
};

/// Numbers below n, each once before any comes again, in an order that is new each time around: a function of the seed.
class shuffled {
 public:
  /// Throws value_error for an n of 0.
  shuffled(std::size_t n, std::uint64_t seed) : order_(n), seed_(seed) {
    if (n == 0) detail::fail_value("nn::shuffled: n = 0, of which there is no number");
  }
  std::size_t operator()() {
    if (at_ == 0) {
      std::iota(order_.begin(), order_.end(), std::size_t{0});
      const random_stream random{seed_, 0x73687566u + rounds_++};
      for (std::size_t i = order_.size(); i > 1; --i)
        std::swap(order_[i - 1],
                  order_[static_cast<std::size_t>(static_cast<double>(random.uniform(i)) * static_cast<double>(i))]);
    }
    const std::size_t next = order_[at_];
    at_ = (at_ + 1) % order_.size();
    return next;
  }

 private:
  std::vector<std::size_t> order_;
  std::uint64_t seed_, rounds_ = 0;
  std::size_t at_ = 0;
};

/// Minimises the mean of -log p(token | what is before it) over the tokens of texts that follow their prompts: at every
/// step a pack of texts, each text once before any comes again. on_step(step, loss) is called after each, and is what
/// draws progress; the losses are returned. `over` are the parameters that the optimizer holds, whose gradients are
/// clipped. Throws value_error if there is no text, or one is longer than a step's tokens or the context, or leaves
/// nothing to learn.
template <real T, optimizer Optimizer, std::invocable<index_t, double> F>
std::vector<double> train_language_model(const cpu& exec, const language_model<T>& model,
                                         std::span<parameter<T>* const> over, Optimizer& optimizer,
                                         std::span<const training_text> texts, const language_training_options& o,
                                         F&& on_step) {
  constexpr std::string_view name = "nn::train_language_model";
  if (texts.empty()) detail::fail_value(name, ": there is no text");
  for (std::size_t i = 0; i < texts.size(); ++i) {
    const auto n = static_cast<index_t>(texts[i].ids.size());
    if (n > std::min(o.tokens, model.options().context))
      detail::fail_value(name, ": text ", i, " has ", n, " tokens, but a step has ", o.tokens, " and the context ",
                         model.options().context);
    if (texts[i].prompt < 1 || texts[i].prompt >= n)
      detail::fail_value(name, ": text ", i, " has ", n, " tokens, of which ", texts[i].prompt,
                         " are its prompt: nothing to learn, or no first token");
  }
  shuffled pick(texts.size(), o.seed);
  std::size_t waiting = pick();
  packed_texts pack;
  tape<T> t(exec);
  std::vector<double> losses;
  for (index_t step = 0; step < o.steps; ++step) {
    pack.clear();
    while (pack.ids.size() + texts[waiting].ids.size() <= static_cast<std::size_t>(o.tokens)) {
      pack.add(texts[waiting]);
      waiting = pick();
    }
    const double made = static_cast<double>(step) / static_cast<double>(o.steps);
    const double warm =
        std::min(1.0, static_cast<double>(step + 1) / static_cast<double>(std::max<index_t>(o.warm_up, 1)));
    optimizer.set_rate(o.rate * warm * (o.last + (1 - o.last) * 0.5 * (1 + std::cos(std::numbers::pi * made))));
    t.clear();
    const var<T> loss = cross_entropy<T>(model(t, pack.ids, 1, pack.documents), pack.labels);
    t.backward(loss);
    clip_gradients<T>(exec, over, o.clip);
    optimizer.step(exec);
    losses.push_back(static_cast<double>(loss.item()));
    on_step(step, losses.back());
  }
  return losses;
}

/// The mean of -log p(token | what is before it) over the tokens of texts that follow their prompts: the logarithm of
/// the perplexity. `tokens` as in training.
template <real T>
double language_loss(const cpu& exec, const language_model<T>& model, std::span<const training_text> texts,
                     index_t tokens = 1024) {
  tape<T> t(exec, {.record = false});
  packed_texts pack;
  double sum = 0, count = 0;
  const auto measure = [&] {
    if (pack.learnt == 0) return;
    t.clear();
    const double n = static_cast<double>(pack.learnt);
    sum += n * static_cast<double>(cross_entropy<T>(model(t, pack.ids, 1, pack.documents), pack.labels).item());
    count += n;
  };
  for (const training_text& text : texts) {
    if (!pack.ids.empty() && pack.ids.size() + text.ids.size() > static_cast<std::size_t>(tokens)) {
      measure();
      pack.clear();
    }
    pack.add(text);
  }
  measure();
  if (count == 0) detail::fail_value("nn::language_loss: the texts leave nothing to predict");
  return sum / count;
}

}  // namespace MLKIT_NAMESPACE::nn
