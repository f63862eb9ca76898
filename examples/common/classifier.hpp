// A small classifier of images: the probe that says what a sample shows.
#pragma once

#include "digits.hpp"
#include "progress.hpp"
#include "report.hpp"

#include <mlkit/nn.hpp>

namespace examples {

/// Two linear layers with silu between them, trained on images with a little noise.
class classifier {
 public:
  classifier(mlkit::index_t pixels, mlkit::index_t classes, std::uint64_t seed)
      : store_(seed),
        seed_(seed),
        first_(mlkit::nn::scope<float>(store_) / "first", pixels, 128),
        second_(mlkit::nn::scope<float>(store_) / "second", 128, classes) {}

  void train(const mlkit::cpu& exec, const image_set& images, mlkit::index_t steps) {
    progress bar("probe: a classifier", steps);
    namespace nn = mlkit::nn;
    constexpr mlkit::index_t batch = 128;
    nn::adamw<float> optimizer(nn::trainable(store_), {.rate = 2e-3});
    nn::tape<float> tape(exec);
    const mlkit::random_stream pick{seed_, 101}, noise{seed_, 102};
    mlkit::matrix<float> x({batch, images.size()});
    std::vector<std::int32_t> labels(batch);
    for (mlkit::index_t step = 0; step < steps; ++step) {
      for (mlkit::index_t row = 0; row < batch; ++row) {
        const auto at = static_cast<std::uint64_t>(step * batch + row);
        const auto image = static_cast<mlkit::index_t>(pick.uniform(at) * static_cast<float>(images.count()));
        labels[static_cast<std::size_t>(row)] = images.labels[static_cast<std::size_t>(image)];
        for (mlkit::index_t c = 0; c < images.size(); ++c)
          x(row, c) = images.pixels(image, c) + 0.15f * noise.normal(at * static_cast<std::uint64_t>(images.size()) +
                                                                     static_cast<std::uint64_t>(c));
      }
      tape.clear();
      const auto loss = nn::cross_entropy<float>(logits(tape.constant(x)), labels);
      tape.backward(loss);
      optimizer.step(exec);
      bar.at(step + 1, "loss " + number(static_cast<double>(loss.item())));
    }
  }

  /// The share of images that are recognised as what their label says.
  double accuracy(const mlkit::cpu& exec, const image_set& images) const {
    mlkit::nn::tape<float> tape(exec, {.record = false});
    const auto scores = logits(tape.constant(images.pixels)).matrix();
    mlkit::index_t right = 0;
    for (mlkit::index_t r = 0; r < images.count(); ++r) {
      const float* row = &scores(r, 0);
      right += std::max_element(row, row + scores.extent(1)) - row == images.labels[static_cast<std::size_t>(r)];
    }
    return static_cast<double>(right) / static_cast<double>(images.count());
  }

 private:
  mlkit::nn::var<float> logits(mlkit::nn::var<float> x) const {
    return second_(mlkit::nn::activate(first_(x), mlkit::silu{}));
  }

  mlkit::nn::parameters<float> store_;
  std::uint64_t seed_;
  mlkit::nn::linear_layer<float> first_, second_;
};

}  // namespace examples
