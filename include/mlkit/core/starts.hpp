// Starts of packed sequences, of groups, of segments: half-open ranges that follow one another.
#pragma once

#include "view.hpp"

namespace MLKIT_NAMESPACE::detail {

/// Refuses starts [parts + 1] that do not run from 0 to `count` without decreasing. The message about their end says
/// "<name> ends with 5, but <holder> 6 <unit>", such as "q has" 6 "rows".
inline void check_starts(std::string_view function, std::string_view name, const vector_view<const std::int32_t>& v,
                         std::string_view holder, index_t count, std::string_view unit) {
  check_view(function, name, v);
  const index_t n = v.extent(0);
  if (n == 0) fail_shape(function, ": ", name, " is empty; it has one element more than there are sequences");
  if (v(0) != 0) fail_value(function, ": ", name, "[0] = ", v(0), " is not 0");
  for (index_t b = 1; b < n; ++b)
    if (v(b) < v(b - 1))
      fail_value(function, ": ", name, "[", b, "] = ", v(b), " is less than ", name, "[", b - 1, "] = ", v(b - 1));
  if (v(n - 1) != count)
    fail_value(function, ": ", name, " ends with ", v(n - 1), ", but ", holder, " ", count, " ", unit);
}

}  // namespace MLKIT_NAMESPACE::detail
