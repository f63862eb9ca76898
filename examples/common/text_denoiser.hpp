// A denoiser that is told in words what to draw: a transformer over patches of the image, which attends to a caption.
#pragma once

#include <mlkit/nn.hpp>
#include <mlkit/nn/word_tokenizer.hpp>

#include <deque>

namespace examples {

namespace nn = mlkit::nn;
using mlkit::index_t;

struct text_denoiser_options {
  index_t side = 16, channels = 3;  ///< of the image
  index_t patch = 4;                ///< side of a patch, which is a token
  index_t width = 128, heads = 4, blocks = 3;
  index_t words = 0;   ///< ids of the vocabulary
  index_t length = 8;  ///< ids of a caption, padding included
  index_t text_width = 64, text_heads = 2;
  index_t time_features = 64;
  std::uint64_t seed = 0;

  index_t pixels() const { return side * side * channels; }
  index_t tokens() const { return side / patch * (side / patch); }
};

/// How the model attends: softmax(q k^T / sqrt(d)) v, to the valid words of a caption, and among patches. Whoever edits
/// what is attended to (Prompt-to-Prompt) brings a class of the same two members: it is given q, k and v of every
/// attention of the blocks, one after the other, all prompts of the batch at once.
struct plain_attention {
  template <nn::real T>
  nn::var<T> cross(nn::var<T> q, nn::var<T> k, nn::var<T> v, index_t heads,
                   std::span<const std::int32_t> lengths) const {
    return nn::multi_head_attention(q, k, v, heads, mlkit::attention::scores{mlkit::attention::key_lengths{lengths}});
  }
  template <nn::real T>
  nn::var<T> self(nn::var<T> q, nn::var<T> k, nn::var<T> v, index_t heads) const {
    return nn::multi_head_attention(q, k, v, heads);
  }
};

/// The projections of an attention, named as diffusers names them; keys and values come from a context, which may be of
/// another width.
template <nn::real T>
struct attention_projections {
  nn::linear_layer<T> q, k, v, out;

  attention_projections(const nn::scope<T>& in, index_t width, index_t context)
      : q(in / "to_q", width, width, false),
        k(in / "to_k", context, width, false),
        v(in / "to_v", context, width, false),
        out(in / "to_out.0", width, width) {}
  template <class F>
  void each_linear(F&& f) {
    f(q), f(k), f(v), f(out);
  }
};
/// Their names: the layers that LoRA for diffusion adapts.
inline const std::vector<std::string> attention_targets{"to_q", "to_k", "to_v", "to_out.0"};

/// v(x_t, t, caption). Patches of the image are tokens; in each block they attend to one another, then to the words,
/// then pass two linear maps; the time scales and shifts what is normalised. The words pass one attention of their own.
template <nn::real T>
class text_denoiser {
 public:
  using value_type = T;
  static constexpr nn::prediction predicts = nn::prediction::v;

  explicit text_denoiser(const text_denoiser_options& o)
      : options_(o),
        store_(o.seed),
        words_(&store_.add("text.words", {o.words, o.text_width}, nn::normal{1})),
        places_(&store_.add("text.places", {1, o.length, o.text_width}, nn::normal{0.3})),
        text_norm_(scope() / "text.norm", o.text_width),
        text_attention_(scope() / "text.attn1", o.text_width, o.text_width),
        text_out_(scope() / "text.out_norm", o.text_width),
        time0_(scope() / "time.0", o.time_features, o.width),
        time1_(scope() / "time.1", o.width, o.width),
        in_(scope() / "in", o.patch * o.patch * o.channels, o.width),
        positions_(&store_.add("positions", {1, o.tokens(), o.width}, nn::normal{0.5})),
        norm_(scope() / "norm", o.width),
        out_(scope() / "out", o.width, o.patch * o.patch * o.channels) {
    for (index_t i = 0; i < o.blocks; ++i) blocks_.emplace_back(scope() / "blocks" / std::to_string(i), o);
  }
  text_denoiser(const text_denoiser&) = delete;

  const text_denoiser_options& options() const { return options_; }
  nn::parameters<T>& store() { return store_; }
  index_t pixels() const { return options_.pixels(); }
  /// The empty caption.
  std::vector<std::int32_t> hidden() const {
    std::vector<std::int32_t> ids{nn::word_tokenizer::begin, nn::word_tokenizer::end};
    ids.resize(static_cast<std::size_t>(options_.length), nn::word_tokenizer::padding);
    return ids;
  }

  /// Adds a word, the next id after the vocabulary, whose embedding is a parameter in a store of its own: "token". It
  /// starts as the embedding of a word that is known. Gal et al.: "An image is worth one word", 2022.
  std::int32_t add_word(nn::parameters<T>& store, std::int32_t like) {
    added_ = &store.add("token", {1, options_.text_width}, nn::zeros{});
    std::copy_n(words_->value.data() + like * options_.text_width, options_.text_width, added_->value.data());
    return static_cast<std::int32_t>(options_.words);
  }

  /// x [n, pixels], RGB row by row; a time and `length` ids for each row.
  template <class Attention = plain_attention>
  nn::var<T> operator()(nn::var<T> x, std::span<const std::int32_t> t, std::span<const std::int32_t> ids,
                        Attention&& attention = {}) const {
    nn::tape<T>& tape = x.on();
    const text_denoiser_options& o = options_;
    const index_t n = x.rows(), grid = o.side / o.patch, strip = o.patch * o.channels;

    auto* counts = tape.template scratch_of<std::int32_t>(n);  // of words, which backward reads too
    for (index_t r = 0; r < n; ++r)
      counts[r] =
          static_cast<std::int32_t>(o.length - std::count(ids.begin() + r * o.length, ids.begin() + (r + 1) * o.length,
                                                          nn::word_tokenizer::padding));
    const std::span<const std::int32_t> lengths(counts, static_cast<std::size_t>(n));
    nn::var<T> table = tape.use(*words_);
    if (added_) table = nn::concat<T>({table, tape.use(*added_)}, 0);
    nn::var<T> text = nn::embedding(table, ids, {n, o.length}) + tape.use(*places_);
    const nn::var<T> words = text_norm_(text);
    text =
        text_out_(text + text_attention_.out(plain_attention{}.cross(text_attention_.q(words), text_attention_.k(words),
                                                                     text_attention_.v(words), o.text_heads, lengths)));

    mlkit::matrix<T> waves({n, o.time_features});
    nn::time_features<T>(t, waves);
    const nn::var<T> time =
        nn::activate(time1_(nn::activate(time0_(tape.constant(waves)), mlkit::silu{})), mlkit::silu{});

    // [n, side, side, channels] to [n, tokens, patch * patch * channels], and back at the end.
    nn::var<T> h = nn::permute(nn::reshape(x, {n * grid, o.patch, grid, strip}), {0, 2, 1, 3});
    h = in_(nn::reshape(h, {n, o.tokens(), o.patch * strip})) + tape.use(*positions_);
    for (const block& b : blocks_) {
      const nn::var<T> m = nn::reshape(b.modulate(time), {n, 1, 4 * o.width});
      const auto modulated = [&](nn::var<T> value, index_t i) {
        return value * nn::scale(nn::slice(m, i * o.width, o.width), 1, 1) + nn::slice(m, (i + 1) * o.width, o.width);
      };
      const nn::var<T> a = modulated(b.norm0(h), 0);
      h = h + b.self.out(attention.self(b.self.q(a), b.self.k(a), b.self.v(a), o.heads));
      const nn::var<T> q = b.cross.q(b.norm1(h));
      h = h + b.cross.out(attention.cross(q, b.cross.k(text), b.cross.v(text), o.heads, lengths));
      h = h + b.down(nn::activate(b.up(modulated(b.norm2(h), 2)), mlkit::silu{}));
    }
    h = nn::permute(nn::reshape(out_(norm_(h)), {n * grid, grid, o.patch, strip}), {0, 2, 1, 3});
    return nn::reshape(h, {n, o.pixels()});
  }

  /// f(layer) for every linear layer, in the order of the forward pass: where adapters go.
  template <class F>
  void each_linear(F&& f) {
    text_attention_.each_linear(f);
    f(time0_), f(time1_), f(in_);
    for (block& b : blocks_) {
      f(b.modulate);
      b.self.each_linear(f);
      b.cross.each_linear(f);
      f(b.up), f(b.down);
    }
    f(out_);
  }

 private:
  struct block {
    nn::linear_layer<T> modulate;
    nn::layer_norm_layer<T> norm0, norm1, norm2;
    attention_projections<T> self, cross;
    nn::linear_layer<T> up, down;
    block(const nn::scope<T>& in, const text_denoiser_options& o)
        : modulate(in / "modulate", o.width, 4 * o.width),
          norm0(in / "norm0", o.width),
          norm1(in / "norm1", o.width),
          norm2(in / "norm2", o.width),
          self(in / "attn1", o.width, o.width),
          cross(in / "attn2", o.width, o.text_width),
          up(in / "up", o.width, 2 * o.width),
          down(in / "down", 2 * o.width, o.width) {}
  };
  nn::scope<T> scope() { return store_; }

  text_denoiser_options options_;
  nn::parameters<T> store_;
  nn::parameter<T>* words_;
  nn::parameter<T>* places_;
  nn::layer_norm_layer<T> text_norm_;
  attention_projections<T> text_attention_;
  nn::layer_norm_layer<T> text_out_;
  nn::linear_layer<T> time0_, time1_, in_;
  nn::parameter<T>* positions_;
  std::deque<block> blocks_;
  nn::layer_norm_layer<T> norm_;
  nn::linear_layer<T> out_;
  nn::parameter<T>* added_ = nullptr;
};

}  // namespace examples
