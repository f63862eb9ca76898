// Training and sampling of denoisers that are told what to draw: by a label, or by the words of a caption.
#pragma once

#include "images.hpp"
#include "progress.hpp"
#include "report.hpp"

#include <mlkit/nn.hpp>

#include <chrono>

namespace examples {

namespace nn = mlkit::nn;
using mlkit::index_t;

/// model(x [n, pixels], a time for each row, ids) predicts `predicts` of each image; its ids are labels_each() for each
/// row, and hidden() are those that say nothing: the unconditional model, which classifier-free guidance needs.
template <class M>
concept conditional_denoiser = requires(const M& model, nn::var<typename M::value_type> x,
                                        std::span<const std::int32_t> ids) {
  { model(x, ids, ids) } -> std::same_as<nn::var<typename M::value_type>>;
  { model.pixels() } -> std::same_as<index_t>;
  { model.hidden() } -> std::same_as<std::vector<std::int32_t>>;
  { M::predicts } -> std::convertible_to<nn::prediction>;
};

struct training {
  index_t steps = 1000;
  index_t batch = 128;
  double rate = 2e-3;       // after a warm-up of 50 steps; falls to 0 along half a cosine
  double beta2 = 0.999;     // of AdamW
  double prior = 0;         // the share of each batch that comes from the prior images
  double drop_label = 0.1;  // the share whose labels are hidden, so that the unconditional model is learnt too
  double snr_cap = 0;  // 0: the error of what is predicted; else that of x_0, times min(signal / noise power, this)
  std::uint64_t seed = 0;
};

struct training_result {
  std::vector<double> losses;
  double seconds = 0;
  double steps_per_second() const { return static_cast<double>(losses.size()) / seconds; }
};

// Separate streams of one seed.
enum class draw_of : std::uint64_t { image = 1, time, hide, noise, start };

inline mlkit::random_stream stream(std::uint64_t seed, draw_of use) { return {seed, static_cast<std::uint64_t>(use)}; }

/// What the error of a prediction counts at a noise level: min(snr, cap) times its part in x_0's, squared. Hang et al.:
/// "Efficient diffusion training via min-SNR weighting strategy", 2023.
inline double loss_weight(nn::prediction predicts, nn::noise_level level, double snr_cap) {
  if (snr_cap == 0) return 1;
  const double snr = std::pow(level.signal / level.noise, 2);
  return std::min(snr, snr_cap) * std::pow(predicts.recovered(level).second, 2);
}

/// Minimises |model(x_t, t, labels) - what it predicts|^2, weighted, with t uniform in [1, steps] (Ho et al. 2020,
/// algorithm 1). `prior`, if given, fills its share of each batch: images of the old kinds, so that they are not
/// forgotten (Ruiz et al., "DreamBooth", 2023, section 3.2).
template <conditional_denoiser Model, nn::optimizer Optimizer>
training_result train(const mlkit::cpu& exec, const Model& model, const nn::noise_schedule& schedule,
                      Optimizer& optimizer, const image_set& images, const image_set* prior, const training& o,
                      progress& bar, index_t done = 0) {
  using T = typename Model::value_type;
  const index_t d = images.size(), old = prior ? static_cast<index_t>(o.prior * static_cast<double>(o.batch)) : 0;
  const std::vector<std::int32_t> hidden = model.hidden();
  mlkit::matrix<T> x0({o.batch, d}), eps({o.batch, d}), x({o.batch, d}), target({o.batch, d}), weights({o.batch, 1});
  std::vector<std::int32_t> t(static_cast<std::size_t>(o.batch)), labels(t.size() * hidden.size());
  nn::tape<T> tape(exec);
  training_result result;
  const auto start = std::chrono::steady_clock::now();
  for (index_t step = 0; step < o.steps; ++step) {
    mlkit::parallel_for(exec, o.batch, [&](index_t row) {
      const auto at = static_cast<std::uint64_t>(step * o.batch + row);
      const auto r = static_cast<std::size_t>(row);
      const auto pick = [&](draw_of use, index_t n) {
        return static_cast<index_t>(stream(o.seed, use).uniform(at) * static_cast<float>(n));
      };
      const image_set& from = row < old ? *prior : images;
      const index_t image = pick(draw_of::image, from.count());
      std::copy_n(&from.pixels(image, 0), d, &x0(row, 0));
      const bool hide = static_cast<double>(stream(o.seed, draw_of::hide).uniform(at)) < o.drop_label;
      std::copy_n(hide ? hidden.data() : from.labels_of(image), hidden.size(), labels.data() + r * hidden.size());
      t[r] = static_cast<std::int32_t>(1 + pick(draw_of::time, schedule.steps()));
      weights(row, 0) = static_cast<T>(std::sqrt(loss_weight(Model::predicts, schedule.level(t[r]), o.snr_cap)));
      for (index_t c = 0; c < d; ++c)
        eps(row, c) = T{
            stream(o.seed, draw_of::noise).normal(at * static_cast<std::uint64_t>(d) + static_cast<std::uint64_t>(c))};
    });
    schedule.add_noise<T>(exec, x0, t, eps, x);
    schedule.target<T>(exec, Model::predicts, x0, t, eps, target);

    const double progress_made = static_cast<double>(step) / static_cast<double>(o.steps);
    const double warm = std::min(1.0, static_cast<double>(step + 1) / 50);
    optimizer.set_rate(o.rate * warm * 0.5 * (1 + std::cos(std::numbers::pi * progress_made)));
    tape.clear();
    const nn::var<T> weight = tape.constant(weights);
    const nn::var<T> loss = nn::mse(model(tape.constant(x), t, labels) * weight, tape.constant(target) * weight);
    tape.backward(loss);
    optimizer.step(exec);
    result.losses.push_back(static_cast<double>(loss.item()));
    bar.at(done + step + 1, "loss " + number(result.losses.back()));
  }
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

/// The model as nn::guided asks it: model(x, t, labels, out), the same t for every row.
template <conditional_denoiser Model>
class asked {
 public:
  using T = typename Model::value_type;
  asked(const mlkit::cpu& exec, const Model& model)
      : model_(&model), tape_(std::make_unique<nn::tape<T>>(exec, typename nn::tape<T>::options{.record = false})) {}

  void operator()(mlkit::matrix_view<const T> x, index_t t, mlkit::matrix_view<const std::int32_t> labels,
                  mlkit::matrix_view<T> out) {
    tape_->clear();
    const std::vector<std::int32_t> times(static_cast<std::size_t>(x.extent(0)), static_cast<std::int32_t>(t));
    const nn::var<T> y = (*model_)(tape_->constant(x), times, {labels.data, static_cast<std::size_t>(labels.size())});
    std::copy_n(y.data(), x.size(), out.data);
  }

 private:
  const Model* model_;
  std::unique_ptr<nn::tape<T>> tape_;
};

struct sampling {
  index_t steps = 40;
  double guidance = 2;  // eps = eps_u + guidance (eps_c - eps_u)
  std::uint64_t seed = 0;
  std::vector<std::int32_t> negative = {};  // labels in the place of those that say nothing: what is not to be seen
};

/// The model with classifier-free guidance, as nn::sample and nn::img2img call it: labels for each row.
template <conditional_denoiser Model>
auto guided(const mlkit::cpu& exec, const Model& model, const std::vector<std::int32_t>& labels, const sampling& o) {
  const std::vector<std::int32_t> none = o.negative.empty() ? model.hidden() : o.negative;
  const auto each = static_cast<index_t>(none.size());
  using context = mlkit::matrix_view<const std::int32_t>;
  return nn::guided<typename Model::value_type>(
      exec, asked(exec, model), context(labels.data(), {static_cast<index_t>(labels.size()) / each, each}),
      context(none.data(), {1, each}), o.guidance);
}

/// An image for the labels of each row. Image i depends on the seed, its own place and labels, and the model alone.
template <conditional_denoiser Model, nn::sampler Sampler = nn::ddim>
image_set sample(const mlkit::cpu& exec, const Model& model, const nn::noise_schedule& schedule,
                 const std::vector<std::int32_t>& labels, const sampling& o = {}, const Sampler& sampler = {}) {
  using T = typename Model::value_type;
  const index_t n = static_cast<index_t>(labels.size() / model.hidden().size()), d = model.pixels();
  mlkit::matrix<T> x({n, d});
  for (index_t i = 0; i < n * d; ++i)
    x.data()[i] = T{stream(o.seed, draw_of::start).normal(static_cast<std::uint64_t>(i))};
  nn::sample<T>(exec, guided(exec, model, labels, o), sampler, schedule, x,
                {.steps = o.steps, .predicts = Model::predicts, .seed = o.seed});
  image_set result{mlkit::matrix<float>({n, d}), labels};
  for (index_t i = 0; i < n * d; ++i)
    result.pixels.data()[i] = std::clamp(static_cast<float>(x.data()[i]), -1.0f, 1.0f);
  return result;
}

/// The denoising loss on images that nothing was trained on: each with `times` times spread over the schedule and noise
/// that does not depend on the model, so that models can be compared.
template <conditional_denoiser Model>
double denoising_loss(const mlkit::cpu& exec, const Model& model, const nn::noise_schedule& schedule,
                      const image_set& images, index_t times = 4) {
  using T = typename Model::value_type;
  const index_t n = images.count() * times, d = images.size();
  mlkit::matrix<T> x0({n, d}), eps({n, d}), x({n, d}), target({n, d});
  std::vector<std::int32_t> t, labels;
  for (index_t i = 0; i < n; ++i) {
    const index_t image = i % images.count();
    std::copy_n(&images.pixels(image, 0), d, &x0(i, 0));
    labels.insert(labels.end(), images.labels_of(image), images.labels_of(image) + images.labels_each());
    t.push_back(static_cast<std::int32_t>(1 + stream(0, draw_of::time).uniform(static_cast<std::uint64_t>(i)) *
                                                  static_cast<float>(schedule.steps())));
    for (index_t c = 0; c < d; ++c)
      eps(i, c) = T{stream(0, draw_of::noise).normal(static_cast<std::uint64_t>(i * d + c))};
  }
  schedule.add_noise<T>(exec, x0, t, eps, x);
  schedule.target<T>(exec, Model::predicts, x0, t, eps, target);
  nn::tape<T> tape(exec, {.record = false});
  return static_cast<double>(nn::mse(model(tape.constant(x), t, labels), tape.constant(target)).item());
}

}  // namespace examples
