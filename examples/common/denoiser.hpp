// A denoiser: predicts the noise in an image from the image, the time and a label.
#pragma once

#include <mlkit/nn.hpp>

#include <deque>

namespace examples {

namespace nn = mlkit::nn;
using mlkit::index_t;

/// The slot through which conditioning enters a block: what a policy adds to the block's hidden values h [n, width],
/// given the context [n, width] of time and label. This one adds a projection of it; cross-attention over a sequence of
/// context rows takes the same place.
template <nn::real T>
class added_context {
 public:
  added_context(const nn::scope<T>& in, index_t width) : project_(in / "project", width, width) {}

  nn::var<T> operator()(nn::var<T> h, nn::var<T> context) const { return h + project_(context); }
  template <class F>
  void each_linear(F&& f) {
    f(project_);
  }

 private:
  nn::linear_layer<T> project_;
};

struct denoiser_options {
  index_t pixels = 64;
  index_t classes = 10;
  index_t width = 192;
  index_t blocks = 3;
  index_t time_features = 64;
  std::uint64_t seed = 0;
};

/// eps(x, t, label): residual blocks x + down(silu(condition(up(norm(x)), context))) between two linear maps, with
/// context = silu(embedding of t + embedding of the label).
template <nn::real T, template <class> class Condition = added_context>
class denoiser {
 public:
  using value_type = T;
  static constexpr nn::prediction predicts = nn::prediction::epsilon;

  explicit denoiser(const denoiser_options& o)
      : options_(o),
        store_(o.seed),
        in_(scope() / "in", o.pixels, o.width),
        time0_(scope() / "time.0", o.time_features, o.width),
        time1_(scope() / "time.1", o.width, o.width),
        labels_(&store_.add("labels.weight", {o.classes + 1, o.width}, nn::normal{1})),
        norm_(scope() / "norm", o.width),
        out_(scope() / "out", o.width, o.pixels) {
    for (index_t i = 0; i < o.blocks; ++i) blocks_.emplace_back(scope() / "blocks" / std::to_string(i), o.width);
  }
  denoiser(const denoiser&) = delete;

  nn::parameters<T>& store() { return store_; }
  index_t pixels() const { return options_.pixels; }
  std::vector<std::int32_t> hidden() const { return {static_cast<std::int32_t>(options_.classes)}; }

  /// x [n, pixels], a time and a label for each row.
  nn::var<T> operator()(nn::var<T> x, std::span<const std::int32_t> t, std::span<const std::int32_t> labels) const {
    nn::tape<T>& tape = x.on();
    mlkit::matrix<T> waves({x.rows(), options_.time_features});
    nn::time_features<T>(t, waves);
    const nn::var<T> time = time1_(nn::activate(time0_(tape.constant(waves)), mlkit::silu{}));
    const nn::var<T> context = nn::activate(time + nn::embedding(tape.use(*labels_), labels), mlkit::silu{});
    nn::var<T> h = in_(x);
    for (const block& b : blocks_) h = h + b.down(nn::activate(b.condition(b.up(b.norm(h)), context), mlkit::silu{}));
    return out_(norm_(h));
  }

  /// f(layer) for every linear layer, in the order of the forward pass: where adapters go.
  template <class F>
  void each_linear(F&& f) {
    f(in_), f(time0_), f(time1_);
    for (block& b : blocks_) {
      f(b.up);
      b.condition.each_linear(f);
      f(b.down);
    }
    f(out_);
  }

 private:
  struct block {
    nn::layer_norm_layer<T> norm;
    nn::linear_layer<T> up;
    Condition<T> condition;
    nn::linear_layer<T> down;
    block(const nn::scope<T>& in, index_t width)
        : norm(in / "norm", width),
          up(in / "up", width, width),
          condition(in / "condition", width),
          down(in / "down", width, width) {}
  };
  nn::scope<T> scope() { return store_; }

  denoiser_options options_;
  nn::parameters<T> store_;
  nn::linear_layer<T> in_, time0_, time1_;
  nn::parameter<T>* labels_;
  std::deque<block> blocks_;
  nn::layer_norm_layer<T> norm_;
  nn::linear_layer<T> out_;
};

}  // namespace examples
