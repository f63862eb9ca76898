// Ranges of options.
#pragma once

#include <cmath>

#include "../core/error.hpp"

namespace MLKIT_NAMESPACE::rl::detail {

using namespace mlkit::detail;

inline void check_unit_interval(std::string_view function, std::string_view name, double value) {
  if (!(value >= 0 && value <= 1)) fail_value(function, ": ", name, " = ", value, " is outside [0, 1]");
}
// Infinity is no bound.
inline void check_bound(std::string_view function, std::string_view name, double value) {
  if (!(value >= 0)) fail_value(function, ": ", name, " = ", value, " is negative or NaN");
}
inline void check_finite(std::string_view function, std::string_view name, double value) {
  if (!std::isfinite(value)) fail_value(function, ": ", name, " = ", value, " is not finite");
}
inline void check_positive(std::string_view function, std::string_view name, double value) {
  if (!(std::isfinite(value) && value > 0)) fail_value(function, ": ", name, " = ", value, " is not positive");
}
inline void check_non_negative(std::string_view function, std::string_view name, double value) {
  if (!(std::isfinite(value) && value >= 0))
    fail_value(function, ": ", name, " = ", value, " is negative or not finite");
}
// Kernels multiply by the inverse, in f32 too.
inline void check_temperature(std::string_view function, double value) {
  if (!(std::isfinite(value) && value > 0))
    fail_value(function, ": temperature = ", value, " is not above 0 and finite");
  if (value < 1e-30 || value > 1e30) fail_value(function, ": temperature = ", value, " is outside [1e-30, 1e30]");
}

}  // namespace MLKIT_NAMESPACE::rl::detail
