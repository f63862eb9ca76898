// Log-probabilities in loops of doubles.
#pragma once

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstdint>
#include <mlkit/core/random.hpp>
#include <mlkit/core/tensor.hpp>
#include <string>
#include <vector>

namespace logits_reference {

using mlkit::index_t;
inline constexpr double inf = INFINITY;

struct row {
  double logp, entropy, lse;
  std::vector<double> p, log_p;

  row(const std::vector<double>& z, index_t token, double temperature) {
    double top = -inf, sum = 0;
    for (double x : z) top = std::max(top, x);
    const double level = top == -inf ? 0 : top;
    for (double x : z) sum += std::exp((x - level) / temperature);
    lse = level / temperature + std::log(sum);
    entropy = 0;
    for (double x : z) {
      log_p.push_back(sum == 0 ? -inf : (x - level) / temperature - std::log(sum));
      p.push_back(std::exp(log_p.back()));
      if (p.back() > 0) entropy -= p.back() * log_p.back();
    }
    logp = log_p[static_cast<std::size_t>(token)];
  }
  // The derivative of dlogp logp + dentropy entropy by z_j.
  double gradient(index_t j, index_t token, double temperature, double dlogp, double dentropy) const {
    const double q = p[static_cast<std::size_t>(j)], log_q = log_p[static_cast<std::size_t>(j)];
    const double of_entropy = q > 0 ? q * (log_q + entropy) : 0;
    return (dlogp * ((j == token ? 1 : 0) - q) - dentropy * of_entropy) / temperature;
  }
};

// Numbers that depend on their index alone.
struct numbers {
  mlkit::random_stream random;
  explicit numbers(std::uint64_t stream) : random{11, stream} {}
  double operator()(index_t i) const { return static_cast<double>(random.normal(static_cast<std::uint64_t>(i))); }
  index_t below(index_t i, index_t n) const {
    return static_cast<index_t>(random.block(static_cast<std::uint64_t>(i))[0] % static_cast<std::uint32_t>(n));
  }
};

// Equal within `bound` times the size of numbers, infinities exactly.
inline bool close(double have, double want, double bound) {
  if (std::isinf(want) || std::isinf(have)) return have == want;
  return std::fabs(have - want) <= bound * std::max(1.0, std::fabs(want));
}

}  // namespace logits_reference
