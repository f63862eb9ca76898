// Classifier-free guidance: what a prompt adds to a prediction, made stronger.
#pragma once

#include <vector>

#include "elementwise.hpp"

namespace MLKIT_NAMESPACE::nn {

/// A model that is given a context for each row, such as tokens, labels or embeddings: `model(x, t, context, out)`
/// writes its prediction for x [m, d] at time t under context [m, k] to out [m, d].
template <class M, class T, class C>
concept conditional_model = std::invocable<M&, matrix_view<const T>, index_t, matrix_view<const C>, matrix_view<T>>;

/// What guided returns. Neither copied nor shared between threads: it keeps the batch of two halves between calls.
template <real T, class C, conditional_model<T, C> Model>
class guided_model {
 public:
  guided_model(const cpu& exec, Model model, matrix_view<const C> prompt, matrix_view<const C> negative,
               double strength)
      : exec_(exec), model_(std::move(model)), n_(prompt.extent(0)), k_(prompt.extent(1)), strength_(strength) {
    constexpr std::string_view name = "nn::guided";
    if (!std::isfinite(strength)) detail::fail_value(name, ": strength = ", strength, " is not finite");
    detail::check_executor(exec);
    detail::check_view(name, "prompt", prompt);
    detail::check_view(name, "negative", negative);
    detail::check_extent(name, "negative", "columns", negative.extent(1), "prompt", k_);
    if (negative.extent(0) != 1) detail::check_extent(name, "negative", "rows", negative.extent(0), "prompt", n_);
    contexts_.reserve(static_cast<std::size_t>(2 * n_ * k_));
    for (const auto& half : {negative, prompt})
      for (index_t r = 0; r < n_; ++r)
        for (index_t c = 0; c < k_; ++c) contexts_.push_back(half(half.extent(0) == 1 ? 0 : r, c));
  }
  guided_model(guided_model&&) noexcept = default;

  /// x, out [n, d], n as many as the prompt has rows.
  void operator()(matrix_view<const T> x, index_t t, matrix_view<T> out) {
    constexpr std::string_view name = "nn::guided";
    const index_t d = x.extent(1);
    detail::check_extent(name, "x", "rows", x.extent(0), "prompt", n_);
    for (int e = 0; e < 2; ++e)
      detail::check_extent(name, "out", e ? "columns" : "rows", out.extent(e), "x", x.extent(e));
    detail::check_view(name, "x", x);
    detail::check_output(name, "out", out);
    const C* negative = contexts_.data();
    const C* prompt = negative + n_ * k_;
    if (strength_ == 0 || strength_ == 1) {
      model_(x, t, matrix_view<const C>(strength_ == 0 ? negative : prompt, {n_, k_}), out);
      return;
    }
    if (both_.size() != 2 * n_ * d) {
      both_ = matrix<T>({2 * n_, d});
      predicted_ = matrix<T>({2 * n_, d});
    }
    T *px = both_.data(), *pu = predicted_.data(), *pc = pu + n_ * d;
    detail::for_rows(exec_, 2 * n_, d, [=, n = n_](index_t r) {
      for (index_t c = 0; c < d; ++c) px[r * d + c] = x(r < n ? r : r - n, c);
    });
    model_(matrix_view<const T>(px, {2 * n_, d}), t, matrix_view<const C>(negative, {2 * n_, k_}), predicted_.view());
    const T g = static_cast<T>(strength_);
    detail::for_rows(exec_, n_, d, [=](index_t r) {
      for (index_t c = 0; c < d; ++c) {
        const index_t i = r * d + c;
        out(r, c) = pu[i] + g * (pc[i] - pu[i]);
      }
    });
  }

 private:
  cpu exec_;
  Model model_;
  index_t n_, k_;
  double strength_;
  std::vector<C> contexts_;  // [2n, k]: negative, prompt
  matrix<T> both_, predicted_;
};

/// The model that sample calls, made of one that takes a context:
///     prediction(negative) + strength (prediction(prompt) - prediction(negative))
/// from one call of the model with 2n rows, the negative prompt's first. prompt [n, k]; negative [n, k], or one row [1,
/// k] for all: the empty prompt, or what is not to be seen. Contexts are copied. At strength 1 only the prompt's half
/// is asked for, at 0 only the other; the model is then called with n rows.
///
///     nn::sample<float>(exec, nn::guided<float>(exec, model, prompt, negative, 4.0), nn::ddim{}, schedule, x);
///
/// Ho, Salimans: "Classifier-free diffusion guidance", 2022, with the strength counted as in diffusers (1: no
/// guidance).
template <real T, class Model, class P, class N>
  requires viewable<P, 2> && viewable<N, 2>
auto guided(const cpu& exec, Model model, const P& prompt, const N& negative, double strength) {
  using C = element_t<const P>;
  return guided_model<T, C, Model>(exec, std::move(model), as_view(prompt), as_view(negative), strength);
}

}  // namespace MLKIT_NAMESPACE::nn
