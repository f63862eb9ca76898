// exp, log(sigmoid) and log(1 - exp) against long double, in units in the last place.
#include <mlkit/rl/functions.hpp>

#include "numbers.hpp"

using namespace mlkit::rl::detail;
using namespace rl_test;

namespace {

// The error of `have` in units of the last place of T at `want`.
template <class T>
double ulps(T have, long double want) {
  if (want == 0) return have == 0 ? 0 : inf;
  return static_cast<double>(std::fabs(static_cast<long double>(have) / want - 1) / epsilon_of<T>);
}

}  // namespace

TEMPLATE_TEST_CASE("functions within two units in the last place", "[rl][functions]", float, double) {
  using T = TestType;
  double worst = 0;
  for (const double reach : {1e-6, 1e-3, 1.0, 20.0, 80.0})
    for (int i = -20000; i <= 20000; ++i) {
      const T x = static_cast<T>(reach * i / 20000);
      const long double w = x, e = std::exp(w);
      worst = std::max(worst, ulps(exp_of(x), e));
      const mlkit::rl::detail::log_sigmoid<T> s(x);
      worst = std::max(worst, ulps(s.value, w < 0 ? w - std::log1p(e) : -std::log1p(1 / e)));
      worst = std::max(worst, ulps(s.derivative, 1 / (1 + e)));
      worst = std::max(worst, ulps(expm1_of(x), std::expm1(w)));
      if (x < 0) {
        const log1mexp<T> m(x);
        worst = std::max(worst, ulps(m.complement, -std::expm1(w)));
        worst = std::max(worst, ulps(m.value, w > -0.7L ? std::log(-std::expm1(w)) : std::log1p(-e)));
      }
    }
  CHECK(worst < 2);
}
