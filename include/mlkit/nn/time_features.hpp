// Features of a time, for a model that is told when it is.
#pragma once

#include <cmath>
#include <span>

#include "../core/view.hpp"
#include "parameter.hpp"

namespace MLKIT_NAMESPACE::nn {

/// Sinusoids of a time: [sin(t w_0), ..., sin(t w_{d/2-1}), cos(t w_0), ...], w_i = period^(-i / (d/2)). out [n, d],
/// d even. Vaswani et al.: "Attention is all you need", 2017, section 3.5.
template <real T>
void time_features(std::span<const std::int32_t> t, matrix_view<T> out, double period = 10000) {
  detail::check_extent("nn::time_features", "out", "rows", out.extent(0), "t", static_cast<index_t>(t.size()));
  if (out.extent(1) % 2) detail::fail_shape("nn::time_features: out has ", out.extent(1), " columns, an odd number");
  detail::check_output("nn::time_features", "out", out);
  if (!(period > 0) || !std::isfinite(period))
    detail::fail_value("nn::time_features: period = ", period, " is outside (0, inf)");
  const index_t half = out.extent(1) / 2;
  for (index_t i = 0; i < half; ++i) {
    const double w = std::pow(period, -static_cast<double>(i) / static_cast<double>(half));
    for (index_t r = 0; r < out.extent(0); ++r) {
      const double angle = w * t[static_cast<std::size_t>(r)];
      out(r, i) = static_cast<T>(std::sin(angle));
      out(r, half + i) = static_cast<T>(std::cos(angle));
    }
  }
}

}  // namespace MLKIT_NAMESPACE::nn
