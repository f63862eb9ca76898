// What the tests of preferences share: TRL's values, and the logistic function in f64.
#pragma once

#include <algorithm>
#include <mlkit/rl/preference.hpp>

#include "../fixtures.hpp"
#include "numbers.hpp"

namespace rl_test {

inline const std::vector<double>& stored(const std::string& name) { return fixture(name, "preference_fixtures.txt"); }

template <class T>
mlkit::vector<T> stored_as(const std::string& name) {
  const std::vector<double>& x = stored(name);
  mlkit::vector<T> v({static_cast<index_t>(x.size())});
  std::transform(x.begin(), x.end(), v.data(), [](double d) { return static_cast<T>(d); });
  return v;
}

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
inline double log_sigmoid(double x) { return x < 0 ? x - std::log1p(std::exp(x)) : -std::log1p(std::exp(-x)); }

}  // namespace rl_test
