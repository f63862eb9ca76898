// Noise schedules of diffusion models: how much signal and noise there is at each time, what a model is to predict
// there, and the times at which it is asked.
#pragma once

#include <cmath>
#include <numbers>
#include <span>
#include <utility>
#include <vector>

#include "elementwise.hpp"

namespace MLKIT_NAMESPACE::nn {

/// How much there is of each at a time: x_t = signal x_0 + noise eps.
struct noise_level {
  double signal, noise;
};

/// What a model predicts: a mixture of x_0 and eps. `epsilon`, `sample` (x_0) and `v` are those of diffusers; one of
/// the user's own is a function that gives its weights of x_0 and eps at a noise level.
struct prediction {
  std::pair<double, double> (*weights)(noise_level);

  static const prediction epsilon;
  static const prediction sample;
  /// signal eps - noise x_0. Salimans, Ho: "Progressive distillation for fast sampling of diffusion models", 2022,
  /// section 4.
  static const prediction v;

  /// x_0 = first * x_t + second * what the model predicts. Not finite where x_0 does not follow from them: from eps
  /// where there is no signal.
  constexpr std::pair<double, double> recovered(noise_level l) const {
    const auto [of_x0, of_eps] = weights(l);
    const double d = of_eps * l.signal - of_x0 * l.noise;
    return {of_eps / d, -l.noise / d};
  }
};
inline constexpr prediction prediction::epsilon{[](noise_level) { return std::pair(0.0, 1.0); }};
inline constexpr prediction prediction::sample{[](noise_level) { return std::pair(1.0, 0.0); }};
inline constexpr prediction prediction::v{[](noise_level l) { return std::pair(-l.noise, l.signal); }};

/// A variance-preserving noise schedule: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps for t = 1 .. steps, abar_0 = 1,
/// abar_t = prod_{s <= t} (1 - beta_s). Tables are in double. Time t is t - 1 in diffusers, which has no name for the
/// clean image's time 0.
class noise_schedule {
 public:
  /// beta_t from `first` to `last` in equal steps. Ho, Jain, Abbeel: "Denoising diffusion probabilistic models", 2020.
  static noise_schedule linear(index_t steps, double first = 1e-4, double last = 0.02) {
    noise_schedule s("nn::noise_schedule::linear", steps);
    for (index_t t = 1; t <= steps; ++t)
      s.push(steps == 1 ? first : first + (last - first) * static_cast<double>(t - 1) / static_cast<double>(steps - 1));
    return s;
  }
  /// sqrt(beta_t) from sqrt(first) to sqrt(last) in equal steps: "scaled_linear", the schedule of latent diffusion,
  /// with Stable Diffusion's numbers.
  static noise_schedule scaled_linear(index_t steps, double first = 0.00085, double last = 0.012) {
    noise_schedule s("nn::noise_schedule::scaled_linear", steps);
    const double low = std::sqrt(first), high = std::sqrt(last);
    for (index_t t = 1; t <= steps; ++t) {
      const double root =
          steps == 1 ? low : low + (high - low) * static_cast<double>(t - 1) / static_cast<double>(steps - 1);
      s.push(root * root);
    }
    return s;
  }
  /// abar_t = f(t) / f(0), f(t) = cos^2((t / steps + offset) / (1 + offset) pi / 2), no beta above `cap`.
  /// Nichol, Dhariwal: "Improved denoising diffusion probabilistic models", 2021, equation 17.
  static noise_schedule cosine(index_t steps, double offset = 0.008, double cap = 0.999) {
    noise_schedule s("nn::noise_schedule::cosine", steps);
    const auto f = [&](index_t t) {
      const double c = std::cos((static_cast<double>(t) / static_cast<double>(steps) + offset) / (1 + offset) *
                                std::numbers::pi / 2);
      return c * c;
    };
    for (index_t t = 1; t <= steps; ++t) s.push(std::min(cap, 1 - f(t) / f(t - 1)));
    return s;
  }

  /// The betas of t = 1, 2, ...
  static noise_schedule from_betas(std::span<const double> betas) {
    noise_schedule s("nn::noise_schedule::from_betas", static_cast<index_t>(betas.size()));
    for (const double b : betas) s.push(b);
    return s;
  }

  index_t steps() const noexcept { return static_cast<index_t>(beta_.size()) - 1; }
  /// beta_t, t in [1, steps].
  double beta(index_t t) const { return beta_[at("beta", t, 1)]; }
  /// abar_t, t in [0, steps].
  double alpha_bar(index_t t) const { return alpha_bar_[at("alpha_bar", t, 0)]; }
  /// sqrt(abar_t) and sqrt(1 - abar_t), t in [0, steps].
  noise_level level(index_t t) const {
    const double a = alpha_bar(t);
    return {std::sqrt(a), std::sqrt(1 - a)};
  }
  /// The variance of q(x_{t-1} | x_t, x_0): (1 - abar_{t-1}) / (1 - abar_t) beta_t. 0 at t = 1.
  double posterior_variance(index_t t) const { return (1 - alpha_bar(t - 1)) / (1 - alpha_bar(t)) * beta(t); }
  /// The mean of q(x_{t-1} | x_t, x_0) is first * x_0 + second * x_t.
  std::pair<double, double> posterior_mean(index_t t) const {
    return {std::sqrt(alpha_bar(t - 1)) * beta(t) / (1 - alpha_bar(t)),
            std::sqrt(1 - beta(t)) * (1 - alpha_bar(t - 1)) / (1 - alpha_bar(t))};
  }

  // Times at which to ask a model, `count` of [1, steps], the latest first, as diffusers spaces them (Lin et al.:
  // "Common diffusion noise schedules and sample steps are flawed", 2024, table 2). Throw value_error if there are not
  // as many.

  /// Evenly spaced, the last time among them: round(steps i / count), i = count .. 1.
  std::vector<index_t> trailing(index_t count) const {
    const double n = static_cast<double>(steps()), stride = n / static_cast<double>(count);
    return spaced("trailing", count, [=](double i) { return n - i * stride; });
  }
  /// Evenly spaced, the first time among them, in whole strides.
  std::vector<index_t> leading(index_t count) const {
    const index_t stride = count < 1 ? 0 : steps() / count;
    return spaced("leading", count,
                  [=](double i) { return 1 + (static_cast<double>(count - 1) - i) * static_cast<double>(stride); });
  }
  /// From the last time to the first, both among them; one time alone is the first.
  std::vector<index_t> linspace(index_t count) const {
    const double stride = count < 2 ? 0 : static_cast<double>(steps() - 1) / static_cast<double>(count - 1);
    return spaced("linspace", count,
                  [=](double i) { return 1 + std::nearbyint((static_cast<double>(count - 1) - i) * stride); });
  }

  /// x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, with a t in [0, steps] for each row. All [n, d].
  template <real T>
  void add_noise(const cpu& exec, matrix_view<const T> x0, std::span<const std::int32_t> t, matrix_view<const T> eps,
                 matrix_view<T> out) const {
    mix(exec, "add_noise", x0, t, eps, out, [](noise_level l) { return std::pair(l.signal, l.noise); });
  }

  /// What a model is to predict for x_t: eps, x_0, or v, with a t in [0, steps] for each row. All [n, d].
  template <real T>
  void target(const cpu& exec, prediction predicts, matrix_view<const T> x0, std::span<const std::int32_t> t,
              matrix_view<const T> eps, matrix_view<T> out) const {
    mix(exec, "target", x0, t, eps, out, predicts.weights);
  }

 private:
  noise_schedule(std::string_view function, index_t steps) : beta_{0}, alpha_bar_{1} {
    if (steps < 1) detail::fail_value(function, ": steps = ", steps, " is not positive");
  }
  void push(double beta) {
    if (!(beta > 0 && beta < 1)) detail::fail_value("nn::noise_schedule: beta = ", beta, " is outside (0, 1)");
    if (1 - beta == 1) detail::fail_value("nn::noise_schedule: beta = ", beta, " is nothing beside 1");
    beta_.push_back(beta);
    alpha_bar_.push_back(alpha_bar_.back() * (1 - beta));
  }
  std::size_t at(std::string_view what, index_t t, index_t low) const {
    if (t < low || t > steps())
      detail::fail_value("nn::noise_schedule::", what, ": t = ", t, " is outside [", low, ", ", steps(), "]");
    return static_cast<std::size_t>(t);
  }

  template <class F>
  std::vector<index_t> spaced(std::string_view what, index_t count, const F& time) const {
    if (count < 1 || count > steps())
      detail::fail_value("nn::noise_schedule::", what, ": ", count, " times are asked for, outside [1, ", steps(), "]");
    std::vector<index_t> times(static_cast<std::size_t>(count));
    for (std::size_t i = 0; i < times.size(); ++i)
      times[i] = static_cast<index_t>(std::nearbyint(time(static_cast<double>(i))));
    return times;
  }

  // out = first * x0 + second * eps, each row with the weights of its time.
  template <real T, class F>
  void mix(const cpu& exec, std::string_view what, matrix_view<const T> x0, std::span<const std::int32_t> t,
           matrix_view<const T> eps, matrix_view<T> out, const F& weights) const {
    const std::string name = "nn::noise_schedule::" + std::string(what);
    detail::check_extent(name, "t", "elements", static_cast<index_t>(t.size()), "the number of rows of x0",
                         x0.extent(0));
    for (int d = 0; d < 2; ++d) {
      detail::check_extent(name, "eps", d ? "columns" : "rows", eps.extent(d), "x0", x0.extent(d));
      detail::check_extent(name, "out", d ? "columns" : "rows", out.extent(d), "x0", x0.extent(d));
    }
    detail::check_view(name, "x0", x0);
    detail::check_view(name, "eps", eps);
    detail::check_output(name, "out", out);
    for (const std::int32_t step : t) at(what, step, 0);
    detail::check_disjoint(name, "out", out, "x0", x0);
    detail::check_disjoint(name, "out", out, "eps", eps);
    detail::for_rows(exec, x0.extent(0), x0.extent(1), [&](index_t r) {
      const auto pair = weights(level(t[static_cast<std::size_t>(r)]));
      const T signal = static_cast<T>(pair.first), noise = static_cast<T>(pair.second);
      for (index_t c = 0; c < x0.extent(1); ++c) out(r, c) = signal * x0(r, c) + noise * eps(r, c);
    });
  }

  std::vector<double> beta_, alpha_bar_;  // index t; beta_[0] is unused
};

}  // namespace MLKIT_NAMESPACE::nn
