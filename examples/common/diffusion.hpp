// Training and sampling of a denoiser.
#pragma once

#include "denoiser.hpp"
#include "digits.hpp"
#include "progress.hpp"
#include "report.hpp"

#include <chrono>

namespace examples {

struct training {
  index_t steps = 1000;
  index_t batch = 128;
  double rate = 2e-3;       // after a warm-up of 50 steps; falls to 0 along half a cosine
  double prior = 0;         // the share of each batch that comes from the prior images
  double drop_label = 0.1;  // the share whose label is hidden, so that the unconditional model is learnt too
  std::uint64_t seed = 0;
};

struct training_result {
  std::vector<double> losses;
  double seconds = 0;
  double steps_per_second() const { return static_cast<double>(losses.size()) / seconds; }
};

// Separate streams of one seed.
enum class draw : std::uint64_t { image = 1, time, hide, noise, start };

inline mlkit::random_stream stream(std::uint64_t seed, draw use) { return {seed, static_cast<std::uint64_t>(use)}; }

/// Minimises |eps(x_t, t, label) - eps|^2 with t uniform in [1, steps] (Ho et al. 2020, algorithm 1). `prior`, if
/// given, fills its share of each batch: images of the old kinds, so that they are not forgotten (Ruiz et al.,
/// "DreamBooth", 2023, section 3.2).
template <nn::real T, template <class> class C, nn::optimizer Optimizer>
training_result train(const mlkit::cpu& exec, denoiser<T, C>& model, const nn::noise_schedule& schedule,
                      Optimizer& optimizer, const image_set& images, const image_set* prior, const training& o,
                      progress& bar, index_t done = 0) {
  const index_t d = images.size(), old = prior ? static_cast<index_t>(o.prior * static_cast<double>(o.batch)) : 0;
  mlkit::matrix<T> x0({o.batch, d}), eps({o.batch, d}), x({o.batch, d});
  std::vector<std::int32_t> t(static_cast<std::size_t>(o.batch)), labels(t.size());
  nn::tape<T> tape(exec);
  training_result result;
  const auto start = std::chrono::steady_clock::now();
  for (index_t step = 0; step < o.steps; ++step) {
    for (index_t row = 0; row < o.batch; ++row) {
      const auto at = static_cast<std::uint64_t>(step * o.batch + row);
      const auto r = static_cast<std::size_t>(row);
      const auto pick = [&](draw use, index_t n) {
        return static_cast<index_t>(stream(o.seed, use).uniform(at) * static_cast<float>(n));
      };
      const image_set& from = row < old ? *prior : images;
      const index_t image = pick(draw::image, from.count());
      std::copy_n(&from.pixels(image, 0), d, &x0(row, 0));
      const bool hidden = static_cast<double>(stream(o.seed, draw::hide).uniform(at)) < o.drop_label;
      labels[r] = hidden ? model.no_label() : from.labels[static_cast<std::size_t>(image)];
      t[r] = static_cast<std::int32_t>(1 + pick(draw::time, schedule.steps()));
      for (index_t c = 0; c < d; ++c)
        eps(row, c) =
            T{stream(o.seed, draw::noise).normal(at * static_cast<std::uint64_t>(d) + static_cast<std::uint64_t>(c))};
    }
    schedule.add_noise<T>(exec, x0, t, eps, x);

    const double progress_made = static_cast<double>(step) / static_cast<double>(o.steps);
    const double warm = std::min(1.0, static_cast<double>(step + 1) / 50);
    optimizer.set_rate(o.rate * warm * 0.5 * (1 + std::cos(std::numbers::pi * progress_made)));
    tape.clear();
    const nn::var<T> loss = nn::mse(model(tape.constant(x), t, labels), tape.constant(eps));
    tape.backward(loss);
    optimizer.step(exec);
    result.losses.push_back(static_cast<double>(loss.item()));
    bar.at(done + step + 1, "loss " + number(result.losses.back()));
  }
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

struct sampling {
  index_t steps = 40;
  double guidance = 2;  // eps = eps_u + guidance (eps_c - eps_u)
  std::uint64_t seed = 0;
};

/// An image for each label, by DDIM with classifier-free guidance. Image i depends on the seed, its own place and
/// label, and the model alone.
template <nn::real T, template <class> class C>
image_set sample(const mlkit::cpu& exec, const denoiser<T, C>& model, const nn::noise_schedule& schedule,
                 const std::vector<std::int32_t>& labels, const sampling& o = {}) {
  const index_t n = static_cast<index_t>(labels.size()), d = model.options().pixels;
  mlkit::matrix<T> x({n, d});
  for (index_t i = 0; i < n * d; ++i)
    x.data()[i] = T{stream(o.seed, draw::start).normal(static_cast<std::uint64_t>(i))};
  nn::tape<T> tape(exec, {.record = false});
  const auto predict = [&](mlkit::matrix_view<const T> now, index_t t, mlkit::matrix_view<const std::int32_t> of,
                           mlkit::matrix_view<T> eps) {
    tape.clear();
    const auto rows = static_cast<std::size_t>(now.extent(0));
    const std::vector<std::int32_t> times(rows, static_cast<std::int32_t>(t));
    const T* predicted = model(tape.constant(now), times, {of.data, rows}).data();
    std::copy_n(predicted, now.size(), eps.data);
  };
  const std::int32_t hidden = model.no_label();
  const mlkit::matrix_view<const std::int32_t> prompt(labels.data(), {n, 1}), none(&hidden, {1, 1});
  nn::sample<T>(exec, nn::guided<T>(exec, predict, prompt, none, o.guidance), nn::ddim{}, schedule, x,
                {.steps = o.steps});
  image_set result{mlkit::matrix<float>({n, d}), labels};
  for (index_t i = 0; i < n * d; ++i)
    result.pixels.data()[i] = std::clamp(static_cast<float>(x.data()[i]), -1.0f, 1.0f);
  return result;
}

/// The denoising loss on images that nothing was trained on: each with `times` times spread over the schedule and noise
/// that does not depend on the model, so that models can be compared.
template <nn::real T, template <class> class C>
double denoising_loss(const mlkit::cpu& exec, const denoiser<T, C>& model, const nn::noise_schedule& schedule,
                      const image_set& images, index_t times = 4) {
  const index_t n = images.count() * times, d = images.size();
  mlkit::matrix<T> x0({n, d}), eps({n, d}), x({n, d});
  std::vector<std::int32_t> t, labels;
  for (index_t i = 0; i < n; ++i) {
    const index_t image = i % images.count();
    std::copy_n(&images.pixels(image, 0), d, &x0(i, 0));
    labels.push_back(images.labels[static_cast<std::size_t>(image)]);
    t.push_back(static_cast<std::int32_t>(1 + stream(0, draw::time).uniform(static_cast<std::uint64_t>(i)) *
                                                  static_cast<float>(schedule.steps())));
    for (index_t c = 0; c < d; ++c) eps(i, c) = T{stream(0, draw::noise).normal(static_cast<std::uint64_t>(i * d + c))};
  }
  schedule.add_noise<T>(exec, x0, t, eps, x);
  nn::tape<T> tape(exec, {.record = false});
  return static_cast<double>(nn::mse(model(tape.constant(x), t, labels), tape.constant(eps)).item());
}

}  // namespace examples
