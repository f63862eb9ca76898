// A small classifier of images: the probe that says what a sample shows.
#pragma once

#include "images.hpp"
#include "progress.hpp"
#include "report.hpp"

#include <mlkit/nn.hpp>

#include <numeric>

namespace examples {

/// Two linear layers with silu between them, trained on images with a little noise. It answers several questions about
/// an image at once, each with its own number of classes: labels of the images in the same order.
class classifier {
 public:
  classifier(mlkit::index_t pixels, std::vector<mlkit::index_t> classes, std::uint64_t seed)
      : store_(seed),
        seed_(seed),
        classes_(std::move(classes)),
        first_(mlkit::nn::scope<float>(store_) / "first", pixels, 128),
        second_(mlkit::nn::scope<float>(store_) / "second", 128,
                std::accumulate(classes_.begin(), classes_.end(), mlkit::index_t{0})) {}

  void train(const mlkit::cpu& exec, const image_set& images, mlkit::index_t steps) {
    progress bar("probe: a classifier", steps);
    namespace nn = mlkit::nn;
    constexpr mlkit::index_t batch = 128;
    nn::adamw<float> optimizer(nn::trainable(store_), {.rate = 2e-3});
    nn::tape<float> tape(exec);
    const mlkit::random_stream pick{seed_, 101}, noise{seed_, 102};
    mlkit::matrix<float> x({batch, images.size()});
    std::vector<std::vector<std::int32_t>> labels(classes_.size(), std::vector<std::int32_t>(batch));
    for (mlkit::index_t step = 0; step < steps; ++step) {
      mlkit::parallel_for(exec, batch, [&](mlkit::index_t row) {
        const auto at = static_cast<std::uint64_t>(step * batch + row);
        const auto image = static_cast<mlkit::index_t>(pick.uniform(at) * static_cast<float>(images.count()));
        for (std::size_t q = 0; q < classes_.size(); ++q)
          labels[q][static_cast<std::size_t>(row)] = images.labels_of(image)[q];
        for (mlkit::index_t c = 0; c < images.size(); ++c)
          x(row, c) = images.pixels(image, c) + 0.15f * noise.normal(at * static_cast<std::uint64_t>(images.size()) +
                                                                     static_cast<std::uint64_t>(c));
      });
      tape.clear();
      const auto all = logits(tape.constant(x));
      nn::var<float> loss;
      mlkit::index_t column = 0;
      for (std::size_t q = 0; q < classes_.size(); ++q) {
        const auto one = nn::cross_entropy<float>(nn::slice(all, column, classes_[q]), labels[q]);
        loss = loss ? loss + one : one;
        column += classes_[q];
      }
      tape.backward(loss);
      optimizer.step(exec);
      bar.at(step + 1, "loss " + number(static_cast<double>(loss.item())));
    }
  }

  /// The likeliest class of each image for each question, [images, questions].
  std::vector<std::int32_t> answers(const mlkit::cpu& exec, const image_set& images) const {
    mlkit::nn::tape<float> tape(exec, {.record = false});
    const auto scores = logits(tape.constant(images.pixels)).matrix();
    std::vector<std::int32_t> all;
    for (mlkit::index_t r = 0; r < images.count(); ++r) {
      const float* from = &scores(r, 0);
      for (const mlkit::index_t count : classes_) {
        all.push_back(static_cast<std::int32_t>(std::max_element(from, from + count) - from));
        from += count;
      }
    }
    return all;
  }

  /// The share of images that are recognised as what their labels say, for each question.
  std::vector<double> accuracies(const mlkit::cpu& exec, const image_set& images) const {
    const auto found = answers(exec, images);
    std::vector<double> right(classes_.size());
    for (std::size_t i = 0; i < found.size(); ++i)
      right[i % right.size()] += (found[i] == images.labels[i]) / static_cast<double>(images.count());
    return right;
  }
  /// The same for the first question alone.
  double accuracy(const mlkit::cpu& exec, const image_set& images) const { return accuracies(exec, images)[0]; }

 private:
  mlkit::nn::var<float> logits(mlkit::nn::var<float> x) const {
    return second_(mlkit::nn::activate(first_(x), mlkit::silu{}));
  }

  mlkit::nn::parameters<float> store_;
  std::uint64_t seed_;
  std::vector<mlkit::index_t> classes_;
  mlkit::nn::linear_layer<float> first_, second_;
};

}  // namespace examples
