// A small causal transformer language model, whole sequences at once or token by token over a cache.
#pragma once

#include <deque>

#include "../attention/decode.hpp"
#include "linear.hpp"
#include "norm.hpp"
#include "rotary.hpp"

namespace MLKIT_NAMESPACE::nn {

/// The sizes of a language model.
struct language_model_options {
  index_t vocabulary = 0;  ///< ids are in [0, vocabulary)
  index_t context = 256;   ///< the longest sequence
  index_t width = 128;
  index_t heads = 4;
  index_t kv_heads = 0;  ///< of keys and values, which groups of heads share; 0 means as many as heads
  index_t blocks = 4;
  index_t hidden = 0;  ///< of the two linear maps of a block; 0 means 4 width
  bool tied = true;    ///< the head is the embedding's table
  double rotary_base = 10000;
  std::uint64_t seed = 0;

  index_t head_width() const noexcept { return width / heads; }
  index_t kv_width() const noexcept { return (kv_heads ? kv_heads : heads) * head_width(); }
};

namespace detail {

inline const language_model_options& checked(const language_model_options& o) {
  constexpr std::string_view name = "nn::language_model";
  const auto positive = [&](std::string_view what, index_t value) {
    if (value < 1) fail_value(name, ": ", what, " = ", value, " is not positive");
  };
  positive("vocabulary", o.vocabulary), positive("context", o.context), positive("width", o.width);
  positive("heads", o.heads), positive("blocks", o.blocks);
  if (o.hidden < 0) fail_value(name, ": hidden = ", o.hidden, " is negative");
  if (o.width % o.heads || o.head_width() % 2)
    fail_value(name, ": width = ", o.width, " is not an even number for each of ", o.heads, " heads");
  if (o.kv_heads < 0 || (o.kv_heads && o.heads % o.kv_heads))
    fail_value(name, ": kv_heads = ", o.kv_heads, " does not divide ", o.heads, " heads");
  return o;
}

// Keys of the query's own document alone. ids [batch, tokens] grow along a sequence, so that the ends of a block
// decide; without ids a sequence is one document.
struct same_document {
  const std::int32_t* ids = nullptr;
  index_t tokens = 0;

  void check(std::string_view, const attention::detail::score_shape&) const noexcept {}
  attention::block classify(const attention::detail::score_shape&, index_t b, index_t, index_t i, index_t i_end,
                            index_t j, index_t j_end) const noexcept {
    if (!ids) return attention::block::full;
    const std::int32_t* of = ids + b * tokens;
    if (of[j_end - 1] < of[i] || of[i_end - 1] < of[j]) return attention::block::empty;
    return of[i] == of[i_end - 1] && of[j] == of[j_end - 1] ? attention::block::full : attention::block::partial;
  }
  bool at(index_t b, index_t, index_t i, index_t j) const noexcept {
    return !ids || ids[b * tokens + i] == ids[b * tokens + j];
  }
};

}  // namespace detail

/// The keys and values that a language model has computed for the tokens so far, for each sequence of a batch its own
/// number: what makes the next token cost one token's work.
template <real T>
class kv_cache {
 public:
  /// For `batch` sequences of at most `capacity` tokens. Memory: 2 blocks batch capacity kv_width elements.
  kv_cache(const language_model_options& o, index_t batch, index_t capacity)
      : lengths_(static_cast<std::size_t>(batch)) {
    const index_t d = o.head_width();
    for (index_t i = 0; i < o.blocks; ++i)
      blocks_.push_back({tensor<T, 4>({batch, o.kv_width() / d, capacity, d}, uninitialized),
                         tensor<T, 4>({batch, o.kv_width() / d, capacity, d}, uninitialized)});
  }

  index_t batch() const noexcept { return static_cast<index_t>(lengths_.size()); }
  index_t capacity() const noexcept { return blocks_.empty() ? 0 : blocks_.front().k.extent(2); }
  index_t blocks() const noexcept { return static_cast<index_t>(blocks_.size()); }
  /// How many tokens of each sequence are in the cache.
  std::span<const std::int32_t> lengths() const noexcept { return lengths_; }
  /// Forgets what follows the first lengths[b] tokens of each sequence. Throws value_error for more than there are.
  void truncate(std::span<const std::int32_t> lengths) {
    detail::check_extent("nn::kv_cache::truncate", "lengths", "elements", static_cast<index_t>(lengths.size()),
                         "the batch", batch());
    for (std::size_t b = 0; b < lengths_.size(); ++b)
      if (lengths[b] < 0 || lengths[b] > lengths_[b])
        detail::fail_value("nn::kv_cache::truncate: lengths[", b, "] = ", lengths[b], " is outside [0, ", lengths_[b],
                           "]");
    std::copy(lengths.begin(), lengths.end(), lengths_.begin());
  }

 private:
  template <real U>
  friend class language_model;
  struct block {
    tensor<T, 4> k, v;
  };
  std::vector<block> blocks_;
  std::vector<std::int32_t> lengths_;
};

/// A decoder of pre-norm blocks, x + attention(norm(x)) and then x + down(gelu(up(norm(x)))), with rotary positions and
/// a last norm; the head gives a logit for each id of the vocabulary. Radford et al.: "Language models are unsupervised
/// multitask learners", 2019, with the positions of Su et al.: "RoFormer", 2021.
///
/// Parameters are named "embed.weight", "blocks.0.norm1.weight", "blocks.0.attn.q_proj.weight" (also k_proj, v_proj,
/// o_proj), "blocks.0.mlp.up_proj.weight" (also down_proj), "norm.weight" and, where the head is not tied,
/// "lm_head.weight"; adapters go to any of the linear layers.
template <real T>
class language_model {
 public:
  using value_type = T;

  /// Throws value_error for sizes that do not fit each other.
  explicit language_model(const language_model_options& o)
      : options_(detail::checked(o)),
        store_(o.seed),
        angles_({.positions = o.context, .d = o.head_width(), .base = o.rotary_base}),
        table_(
            &store_.add("embed.weight", {o.vocabulary, o.width}, normal{1 / std::sqrt(static_cast<double>(o.width))})),
        norm_(scope<T>(store_) / "norm", o.width) {
    for (index_t i = 0; i < o.blocks; ++i) {
      block& b = blocks_.emplace_back(scope<T>(store_) / "blocks" / std::to_string(i), o);
      // As many residuals add up as there are blocks, twice; so that their sum does not grow (Radford et al., 2.3).
      for (linear_layer<T>* last : {&b.out, &b.down})
        for (T& w : last->weight->value) w /= static_cast<T>(std::sqrt(2 * static_cast<double>(o.blocks)));
    }
    if (!o.tied) head_.emplace(scope<T>(store_) / "lm_head", o.width, o.vocabulary, false);
  }
  language_model(const language_model&) = delete;
  language_model& operator=(const language_model&) = delete;

  const language_model_options& options() const noexcept { return options_; }
  parameters<T>& store() noexcept { return store_; }
  const parameters<T>& store() const noexcept { return store_; }
  /// The head's weight [vocabulary, width]; logits are hidden times its transpose.
  parameter<T>& head() const noexcept { return head_ ? *head_->weight : *table_; }

  /// The last hidden states [batch, tokens, width] of ids [batch, tokens]. Each token sees those before it, and
  /// itself, of its own sequence; where `documents` [batch, tokens] is given, of its own document, whose numbers grow
  /// along a sequence (several texts packed into one), and whose tokens count positions from 0. Padding behind a text
  /// therefore changes nothing before it. Throws value_error for an id outside the vocabulary, for numbers of documents
  /// that fall, and for a text longer than the context; shape_error where ids do not fill the batch.
  var<T> hidden(tape<T>& t, std::span<const std::int32_t> ids, index_t batch,
                std::span<const std::int32_t> documents = {}) const {
    constexpr std::string_view name = "nn::language_model::hidden";
    const index_t tokens = tokens_of(name, ids, batch);
    detail::same_document same{nullptr, tokens};
    std::span<const std::int32_t> positions;
    if (documents.empty()) {
      check_length(name, tokens);
    } else {
      detail::check_extent(name, "documents", "elements", static_cast<index_t>(documents.size()), "ids",
                           batch * tokens);
      const index_t n = batch * tokens;
      auto* kept = t.template scratch_of<std::int32_t>(2 * n);
      std::copy(documents.begin(), documents.end(), kept);
      for (index_t i = 0; i < n; ++i) {
        const bool first = i % tokens == 0;
        if (!first && kept[i] < kept[i - 1])
          detail::fail_value(name, ": documents[", i, "] = ", kept[i], " is below its predecessor, ", kept[i - 1]);
        kept[n + i] = first || kept[i] != kept[i - 1] ? 0 : kept[n + i - 1] + 1;
        check_length(name, kept[n + i] + 1);
      }
      same.ids = kept;
      positions = {kept + n, static_cast<std::size_t>(n)};
    }
    return run(t, ids, batch, [&](const block&, index_t, var<T> q, var<T> k, var<T> v) {
      return multi_head_attention(turned(q, options_.heads, positions), turned(k, kv_heads(), positions), v,
                                  options_.heads, attention::scores{attention::causal{}, same});
    });
  }

  /// The logits [..., vocabulary] of hidden states [..., width].
  var<T> logits(var<T> hidden) const { return head_ ? (*head_)(hidden) : linear(hidden, hidden.on().use(*table_)); }
  var<T> operator()(tape<T>& t, std::span<const std::int32_t> ids, index_t batch,
                    std::span<const std::int32_t> documents = {}) const {
    return logits(hidden(t, ids, batch, documents));
  }

  /// As hidden, for prompts [batch, tokens] that are padded on the right: fills an empty cache with the first
  /// lengths[b] tokens of each. On a tape that does not record. Throws value_error if the cache is not empty or has no
  /// room, or a length is outside [1, tokens].
  var<T> prefill(tape<T>& t, std::span<const std::int32_t> ids, std::span<const std::int32_t> lengths,
                 kv_cache<T>& cache) const {
    constexpr std::string_view name = "nn::language_model::prefill";
    const index_t batch = cache.batch(), tokens = tokens_of(name, ids, batch);
    check_cache(name, cache);
    check_length(name, tokens);
    detail::check_extent(name, "lengths", "elements", static_cast<index_t>(lengths.size()), "the cache's batch", batch);
    for (std::size_t b = 0; b < lengths.size(); ++b) {
      if (lengths[b] < 1 || lengths[b] > tokens)
        detail::fail_value(name, ": lengths[", b, "] = ", lengths[b], " is outside [1, ", tokens, "]");
      if (cache.lengths_[b] != 0)
        detail::fail_value(name, ": sequence ", b, " of the cache holds ", cache.lengths_[b], " tokens already");
    }
    if (tokens > cache.capacity())
      detail::fail_value(name, ": ids have ", tokens, " tokens, but the cache has room for ", cache.capacity());
    const var<T> h = run(t, ids, batch, [&](const block&, index_t i, var<T> q, var<T> k, var<T> v) {
      k = turned(k, kv_heads(), {});
      append(t.exec(), cache, i, k, v);
      return multi_head_attention(turned(q, options_.heads, {}), k, v, options_.heads,
                                  attention::scores{attention::causal{}, detail::same_document{}});
    });
    std::copy(lengths.begin(), lengths.end(), cache.lengths_.begin());
    return h;
  }

  /// The last hidden states [batch, 1, width] of one token more of each sequence, ids [batch], which joins the cache.
  /// The same numbers as hidden has for it, within rounding; costs the work of one token and the reading of the cache.
  /// On a tape that does not record. Throws value_error for a sequence that the cache or the context has no room for.
  var<T> next(tape<T>& t, std::span<const std::int32_t> ids, kv_cache<T>& cache) const {
    constexpr std::string_view name = "nn::language_model::next";
    const index_t batch = cache.batch();
    check_cache(name, cache);
    detail::check_extent(name, "ids", "elements", static_cast<index_t>(ids.size()), "the cache's batch", batch);
    for (std::size_t b = 0; b < cache.lengths_.size(); ++b) {
      if (cache.lengths_[b] >= cache.capacity())
        detail::fail_value(name, ": sequence ", b, " fills the cache of ", cache.capacity(), " tokens");
      check_length(name, cache.lengths_[b] + 1);
    }
    const std::vector<std::int32_t> positions = cache.lengths_;
    const var<T> h = run(t, ids, batch, [&](const block&, index_t i, var<T> q, var<T> k, var<T> v) {
      q = turned(q, options_.heads, positions);
      std::vector<std::int32_t> lengths = append(t.exec(), cache, i, turned(k, kv_heads(), positions), v);
      const auto& b = cache.blocks_[static_cast<std::size_t>(i)];
      const var<T> y = t.make(q.shape(), {q});
      const index_t d = options_.head_width();
      const auto heads = [&](T* data) { return tensor_view<T, 3>(data, {batch, options_.heads, d}); };
      attention::decode(t.exec(), heads(q.data()), attention::contiguous(b.k, b.v, lengths), heads(y.data()));
      return y;
    });
    for (std::int32_t& length : cache.lengths_) ++length;
    return h;
  }

  /// f(layer) for every linear layer, in the order of the forward pass: where adapters go. The head is left out.
  template <class F>
  void each_linear(F&& f) {
    for (block& b : blocks_) f(b.q), f(b.k), f(b.v), f(b.out), f(b.up), f(b.down);
  }

 private:
  struct block {
    layer_norm_layer<T> norm1;
    linear_layer<T> q, k, v, out;
    layer_norm_layer<T> norm2;
    linear_layer<T> up, down;
    block(const scope<T>& in, const language_model_options& o)
        : norm1(in / "norm1", o.width),
          q(in / "attn.q_proj", o.width, o.width, false),
          k(in / "attn.k_proj", o.width, o.kv_width(), false),
          v(in / "attn.v_proj", o.width, o.kv_width(), false),
          out(in / "attn.o_proj", o.width, o.width, false),
          norm2(in / "norm2", o.width),
          up(in / "mlp.up_proj", o.width, o.hidden ? o.hidden : 4 * o.width),
          down(in / "mlp.down_proj", o.hidden ? o.hidden : 4 * o.width, o.width) {}
  };

  index_t kv_heads() const noexcept { return options_.kv_width() / options_.head_width(); }
  var<T> turned(var<T> x, index_t heads, std::span<const std::int32_t> positions) const {
    return rotate(x, heads, angles_, positions);
  }

  // The blocks, whose attention is attend(block, its number, q, k, v).
  template <class F>
  var<T> run(tape<T>& t, std::span<const std::int32_t> ids, index_t batch, const F& attend) const {
    var<T> x = embedding(t.use(*table_), ids, {batch, static_cast<index_t>(ids.size()) / std::max<index_t>(batch, 1)});
    index_t i = 0;
    for (const block& b : blocks_) {
      const var<T> h = b.norm1(x);
      x = x + b.out(attend(b, i++, b.q(h), b.k(h), b.v(h)));
      x = x + b.down(activate(b.up(b.norm2(x)), gelu{}));
    }
    return norm_(x);
  }

  // Adds the keys and values of block i behind the cache's lengths, which stay; returns the lengths that it has then.
  std::vector<std::int32_t> append(const cpu& exec, kv_cache<T>& cache, index_t i, var<T> k, var<T> v) const {
    std::vector<std::int32_t> lengths = cache.lengths_;
    auto& b = cache.blocks_[static_cast<std::size_t>(i)];
    attention::append(exec, detail::heads_of(k.data(), k.shape(), kv_heads()),
                      detail::heads_of(v.data(), v.shape(), kv_heads()), attention::contiguous(b.k, b.v, lengths));
    return lengths;
  }

  index_t tokens_of(std::string_view name, std::span<const std::int32_t> ids, index_t batch) const {
    const auto n = static_cast<index_t>(ids.size());
    if (batch < 1 || n == 0 || n % batch)
      detail::fail_shape(name, ": ", n, " ids do not fill a batch of ", batch, " sequences");
    return n / batch;
  }
  void check_length(std::string_view name, index_t tokens) const {
    if (tokens > options_.context)
      detail::fail_value(name, ": a text has ", tokens, " tokens, but the context is ", options_.context);
  }
  void check_cache(std::string_view name, const kv_cache<T>& cache) const {
    detail::check_extent(name, "the cache", "blocks", cache.blocks(), "the model", options_.blocks);
    const auto& k = cache.blocks_.front().k;
    detail::check_extent(name, "the cache", "heads", k.extent(1), "the model", kv_heads());
    detail::check_extent(name, "the cache", "columns", k.extent(3), "the model", options_.head_width());
  }

  language_model_options options_;
  parameters<T> store_;
  attention::rotary_table<T> angles_;
  parameter<T>* table_;
  std::deque<block> blocks_;
  layer_norm_layer<T> norm_;
  std::optional<linear_layer<T>> head_;
};

}  // namespace MLKIT_NAMESPACE::nn
