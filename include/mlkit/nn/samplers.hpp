// Sampling from diffusion models: one loop, and the samplers that are its policies.
#pragma once

#include "noise_schedule.hpp"

namespace MLKIT_NAMESPACE::nn {

/// One step of sampling, as a sampler sees it: from one noise level to a lower one.
struct sampling_step {
  noise_level from, to;
  const noise_level* before;  ///< where the last step came from; null in the first one
};

/// What a step does: x <- x * x_t + x0 * x_0 + previous_x0 * (the x_0 of the last step) + noise * z, where x_0 is what
/// the model's prediction says and z is standard normal.
struct step_weights {
  double x = 0, x0 = 0, previous_x0 = 0, noise = 0;
};

/// A sampler: the weights of each step. Whatever is linear in x_t and in the last two predictions is one. `weights`
/// says by an exception that the sampler's options mean nothing; it is asked for all steps before the model is called.
template <class S>
concept sampler = requires(const S& s, const sampling_step& step) {
  { s.weights(step) } -> std::same_as<step_weights>;
};

/// x_s = signal_s x_0 + sqrt(noise_s^2 - sigma^2) eps + sigma z,
/// sigma = eta noise_s / noise_t sqrt(1 - signal_t^2 / signal_s^2), with the eps that goes with x_t and x_0.
/// Song, Meng, Ermon: "Denoising diffusion implicit models", 2021, equations 12 and 16.
struct ddim {
  double eta = 0;  ///< 0: deterministic; 1: the variance of DDPM's posterior

  step_weights weights(const sampling_step& step) const {
    if (!(eta >= 0) || !std::isfinite(eta)) detail::fail_value("nn::ddim: eta = ", eta, " is outside [0, inf)");
    const auto& [from, to, before] = step;
    const double ratio = from.signal / to.signal;
    const double sigma = eta * to.noise / from.noise * std::sqrt(1 - ratio * ratio);
    const double direction = std::sqrt(std::max(0.0, to.noise * to.noise - sigma * sigma)) / from.noise;
    return {.x = direction, .x0 = to.signal - direction * from.signal, .noise = sigma};
  }
};

/// x_s drawn from q(x_s | x_t, x_0), with beta = 1 - signal_t^2 / signal_s^2:
/// mean signal_s beta / noise_t^2 x_0 + signal_t / signal_s noise_s^2 / noise_t^2 x_t, variance noise_s^2 / noise_t^2
/// beta. Ho, Jain, Abbeel: "Denoising diffusion probabilistic models", 2020, equations 6 and 7.
struct ddpm {
  /// A variance of beta, which is right for an x_0 of no structure ("fixed_large"); the last step adds none.
  bool large_variance = false;

  step_weights weights(const sampling_step& step) const {
    const auto& [from, to, before] = step;
    const double kept = from.signal / to.signal, beta = 1 - kept * kept;
    const double left = to.noise * to.noise / (from.noise * from.noise);
    const double variance = large_variance && to.noise > 0 ? beta : left * beta;
    return {.x = kept * left, .x0 = to.signal * beta / (from.noise * from.noise), .noise = std::sqrt(variance)};
  }
};

/// DPM-Solver++ of the second order in its multistep form (2M, midpoint): one call of the model a step, where the last
/// prediction gives the slope. Its first step, and the one that ends at the clean image, are of the first order, which
/// is DDIM. Some 15 to 25 steps are enough. Lu et al.: "DPM-Solver++: fast solver for guided sampling of diffusion
/// probabilistic models", 2022, algorithm 2.
struct dpm_solver {
  int order = 2;  ///< or 1: DDIM, all the way

  step_weights weights(const sampling_step& step) const {
    if (order != 1 && order != 2) detail::fail_value("nn::dpm_solver: order = ", order, " is neither 1 nor 2");
    const auto& [from, to, before] = step;
    const auto half_log_snr = [](const noise_level& l) { return std::log(l.signal / l.noise); };
    step_weights w;
    w.x = to.noise / from.noise;
    w.x0 = to.signal - from.signal * w.x;
    if (order == 1 || !before || to.noise == 0) return w;
    const double now = half_log_snr(from), h = half_log_snr(to) - now, last = now - half_log_snr(*before);
    w.previous_x0 = -w.x0 * h / (2 * last);
    w.x0 -= w.previous_x0;
    return w;
  }
};

/// How to sample.
struct sampling_options {
  index_t steps = 50;                         ///< how many, at the schedule's trailing(steps) times
  std::vector<index_t> times = {};            ///< instead: at these times in [1, schedule's steps], falling
  prediction predicts = prediction::epsilon;  ///< what the model predicts
  double clip = 1;                            ///< the x_0 it means is kept within [-clip, clip]; 0: left as it is
  std::uint64_t seed = 0;                     ///< of the noise that samplers add
};

/// What sample asks of a model: `model(x, t, out)` writes its prediction for x at time t, the same t for every row.
template <class M, class T>
concept denoising_model = std::invocable<M&, matrix_view<const T>, index_t, matrix_view<T>>;

/// What may look at samples between steps, or change them: `after(i, x)` when step i = 0, 1, ... is made.
template <class F, class T>
concept between_steps = std::invocable<F&, index_t, matrix_view<T>>;

namespace detail {

struct planned_step {
  index_t t;
  std::pair<double, double> x0;  // of x and of the model's prediction
  step_weights w;
};

// The last int(steps * strength) steps, as diffusers counts them; a sampler that looks back starts anew with them.
template <real T, sampler S>
std::vector<planned_step> plan_sampling(std::string_view function, const S& sampler, const noise_schedule& schedule,
                                        double strength, const sampling_options& o) {
  if (!(o.clip >= 0) || !std::isfinite(o.clip)) fail_value(function, ": clip = ", o.clip, " is outside [0, inf)");
  if (o.times.empty() && (o.steps < 1 || o.steps > schedule.steps()))
    fail_value(function, ": steps = ", o.steps, " is outside [1, ", schedule.steps(), "]");
  std::vector<index_t> times = o.times.empty() ? schedule.trailing(o.steps) : o.times;
  for (std::size_t i = 0; i < times.size(); ++i) {
    if (times[i] < 1 || times[i] > schedule.steps())
      fail_value(function, ": times[", i, "] = ", times[i], " is outside [1, ", schedule.steps(), "]");
    if (i > 0 && times[i] >= times[i - 1])
      fail_value(function, ": times[", i, "] = ", times[i], " is not before times[", i - 1, "] = ", times[i - 1]);
  }
  const auto taken = static_cast<std::ptrdiff_t>(static_cast<double>(times.size()) * strength);
  times.erase(times.begin(), times.end() - taken);

  std::vector<planned_step> plan;
  noise_level before{};
  for (std::size_t i = 0; i < times.size(); ++i) {
    const noise_level from = schedule.level(times[i]), to = schedule.level(i + 1 < times.size() ? times[i + 1] : 0);
    const auto finite = [](double x) { return std::fabs(x) <= std::numeric_limits<T>::max(); };
    const auto x0 = o.predicts.recovered(from);
    if (!finite(x0.first) || !finite(x0.second))
      fail_value(function, ": at time ", times[i], " x_0 does not follow from what the model predicts");
    const step_weights w = sampler.weights({from, to, i ? &before : nullptr});
    if (!finite(w.x) || !finite(w.x0) || !finite(w.previous_x0) || !finite(w.noise))
      fail_value(function, ": at time ", times[i], " the sampler's weights are not finite");
    plan.push_back({times[i], x0, w});
    before = from;
  }
  return plan;
}

struct nothing_between {
  template <class T>
  void operator()(index_t, const matrix_view<T>&) const noexcept {}
};

template <real T, denoising_model<T> Model, between_steps<T> After>
void run_sampling(const cpu& exec, Model& model, const std::vector<planned_step>& plan, const sampling_options& o,
                  matrix_view<T> x, After& after) {
  const index_t rows = x.extent(0), columns = x.extent(1);
  matrix<T> predicted({rows, columns}), previous({rows, columns});
  index_t made = 0;
  for (const planned_step& step : plan) {
    model(matrix_view<const T>(x), step.t, predicted.view());
    const T of_x = static_cast<T>(step.x0.first), of_prediction = static_cast<T>(step.x0.second);
    const T clip = static_cast<T>(o.clip), wx = static_cast<T>(step.w.x), w0 = static_cast<T>(step.w.x0),
            wp = static_cast<T>(step.w.previous_x0), wz = static_cast<T>(step.w.noise);
    const bool clipped = o.clip > 0;  // also where T knows the number as zero
    const random_stream stream{o.seed, static_cast<std::uint64_t>(step.t)};
    T *pm = predicted.data(), *pp = previous.data();
    for_rows(exec, rows, columns, [=](index_t r) {
      for (index_t c = 0; c < columns; ++c) {
        const index_t k = r * columns + c;
        T x0 = of_x * x(r, c) + of_prediction * pm[k];
        if (clipped) x0 = std::clamp(x0, -clip, clip);
        T next = wx * x(r, c) + w0 * x0;
        if (wp != 0) next += wp * pp[k];
        if (wz > 0) next += wz * T{stream.normal(static_cast<std::uint64_t>(k))};
        x(r, c) = next;
        pm[k] = x0;
      }
    });
    std::swap(predicted, previous);
    after(made++, matrix_view<T>(x));
  }
}

}  // namespace detail

/// Samples from noise: x [n, d] holds noise of variance 1 on entry and x_0 on return.
///
///     nn::sample<float>(exec, model, nn::dpm_solver{}, schedule, x, {.steps = 20});
///
/// `model(x, t, out)` is called once a step, and `after(i, x)` when it is made, which may change x: a local blend, a
/// region that is kept (inpainting). What is drawn for a sample depends on the seed and on its place in the batch.
/// Throws before the model is called: value_error for options or a sampler that mean nothing, shape_error for an x that
/// cannot be written.
template <real T, denoising_model<T> Model, sampler S, between_steps<T> After = detail::nothing_between>
void sample(const cpu& exec, Model&& model, const S& sampler, const noise_schedule& schedule, matrix_view<T> x,
            const sampling_options& o = {}, After&& after = {}) {
  const auto plan = detail::plan_sampling<T>("nn::sample", sampler, schedule, 1, o);
  detail::check_output("nn::sample", "x", x);
  detail::run_sampling<T>(exec, model, plan, o, x, after);
}

/// Samples from images: of n steps only the last int(n strength) are taken, from x_t of the image at the first of them,
/// so that the less of it stays the greater the strength in [0, 1] is; 0 gives the image itself. image, out [n, d],
/// apart. The noise in x_t depends on the seed and the place in the batch. Errors as of sample. Meng et al.: "SDEdit",
/// 2022; the image-to-image pipelines of diffusers.
template <real T, denoising_model<T> Model, sampler S, between_steps<T> After = detail::nothing_between>
void img2img(const cpu& exec, Model&& model, const S& sampler, const noise_schedule& schedule,
             matrix_view<const T> image, double strength, matrix_view<T> out, const sampling_options& o = {},
             After&& after = {}) {
  constexpr std::string_view name = "nn::img2img";
  if (!(strength >= 0 && strength <= 1)) detail::fail_value(name, ": strength = ", strength, " is outside [0, 1]");
  const auto plan = detail::plan_sampling<T>(name, sampler, schedule, strength, o);
  for (int d = 0; d < 2; ++d)
    detail::check_extent(name, "out", d ? "columns" : "rows", out.extent(d), "image", image.extent(d));
  detail::check_view(name, "image", image);
  detail::check_output(name, "out", out);
  detail::check_disjoint(name, "out", out, "image", image);
  const noise_level level = schedule.level(plan.empty() ? 0 : plan.front().t);
  const T signal = static_cast<T>(level.signal), noise = static_cast<T>(level.noise);
  const random_stream stream{o.seed, 0};  // no step starts at time 0
  const index_t columns = image.extent(1);
  detail::for_rows(exec, image.extent(0), columns, [=](index_t r) {
    for (index_t c = 0; c < columns; ++c)
      out(r, c) = signal * image(r, c) + noise * T{stream.normal(static_cast<std::uint64_t>(r * columns + c))};
  });
  detail::run_sampling<T>(exec, model, plan, o, out, after);
}

}  // namespace MLKIT_NAMESPACE::nn
