// Rows of logits in memory of any strides, and loops of doubles over them.
#pragma once

#include <cstring>
#include <mlkit/rl/log_probs.hpp>

#include "logits_reference.hpp"

namespace rows_reference {

namespace rl = mlkit::rl;
using namespace logits_reference;
using mlkit::cpu;
using mlkit::matrix_view;
using mlkit::vector_view;

// Rows of logits in memory of any strides, and everything that is made of them.
template <class T>
struct problem {
  using A = mlkit::accumulator_t<T>;
  index_t rows, classes;
  bool columns;  // logits stand column by column
  index_t pad;   // elements between rows that belong to nobody
  std::vector<T> memory, gradient_memory;
  std::vector<std::int64_t> tokens;
  std::vector<std::uint8_t> mask;
  std::vector<A> logp, entropy, lse, dlogp, dentropy;
  double temperature = 1;

  problem(index_t r, index_t c, std::uint64_t seed, double size = 3, bool by_columns = false, index_t padding = 0)
      : rows(r), classes(c), columns(by_columns), pad(padding) {
    const auto n = static_cast<std::size_t>(columns ? (rows + pad) * classes : rows * (classes + pad));
    memory.assign(n, T(NAN));
    gradient_memory.assign(n, T(7));
    const numbers z(seed), g(seed + 1), h(seed + 2), y(seed + 3);
    for (index_t i = 0; i < rows; ++i) {
      for (index_t j = 0; j < classes; ++j) logits()(i, j) = static_cast<T>(size * z(i * classes + j));
      tokens.push_back(y.below(i, classes));
      mask.push_back(1);
      dlogp.push_back(static_cast<A>(g(i)));
      dentropy.push_back(static_cast<A>(h(i)));
    }
    logp.assign(static_cast<std::size_t>(rows), A(7));
    entropy = lse = logp;
  }
  matrix_view<T> view(std::vector<T>& m) const {
    return columns ? matrix_view<T>{m.data(), {rows, classes}, {1, rows + pad}}
                   : matrix_view<T>{m.data(), {rows, classes}, {classes + pad, 1}};
  }
  matrix_view<T> logits() { return view(memory); }
  matrix_view<T> gradient() { return view(gradient_memory); }
  vector_view<A> of(std::vector<A>& v) const { return {v.data(), {rows}}; }

  row naive(index_t i) {
    std::vector<double> z;
    for (index_t j = 0; j < classes; ++j) z.push_back(static_cast<double>(logits()(i, j)));
    return {z, tokens[static_cast<std::size_t>(i)], temperature};
  }
  rl::log_prob_options<1> options() const { return {.temperature = temperature, .mask = mask}; }
  // Rows' values and gradient; the gradient from derivatives that are known, or that a loss gives.
  void run(const cpu& exec, bool known, bool in_place = false) {
    const std::vector<T> before = memory;
    const auto dz = in_place ? logits() : gradient();
    rl::log_probs(exec, logits(), tokens, options(), {.logp = of(logp), .entropy = of(entropy), .lse = of(lse)});
    if (known) {
      rl::log_probs_backward(exec, logits(), tokens, options(),
                             {.dlogp = vector_view<const A>(of(dlogp)), .dentropy = vector_view<const A>(of(dentropy))},
                             dz);
    } else {
      const std::vector<A> l = logp, h = entropy;
      bool same = true;
      rl::log_probs_and_gradient(
          exec, logits(), tokens, options(),
          [&](index_t i, A row_logp, A row_entropy) {
            const auto at = static_cast<std::size_t>(i);
            if (std::memcmp(&row_logp, &l[at], sizeof(A)) != 0 || std::memcmp(&row_entropy, &h[at], sizeof(A)) != 0)
              same = false;
            return rl::token_gradient<A>{dlogp[at], dentropy[at]};
          },
          {.logp = of(logp)}, dz);
      CHECK(same);
    }
    if (in_place) {
      gradient_memory = memory;
      memory = before;
    }
  }
  // Every value, within `bound`.
  void check(double bound) {
    for (index_t i = 0; i < rows; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const row want = mask[at] ? naive(i) : row({0}, 0, 1);
      INFO("row " << i << " of " << rows << " x " << classes);
      REQUIRE(close(static_cast<double>(logp[at]), want.logp, bound));
      REQUIRE(close(static_cast<double>(entropy[at]), want.entropy, bound));
      REQUIRE(close(static_cast<double>(lse[at]), want.lse, bound));
      index_t wrong = 0;
      for (index_t j = 0; j < classes; ++j) {
        const double slope = mask[at] ? want.gradient(j, tokens[at], temperature, static_cast<double>(dlogp[at]),
                                                      static_cast<double>(dentropy[at]))
                                      : 0;
        if (!close(static_cast<double>(gradient()(i, j)), slope,
                   sizeof(T) == 2 ? (std::is_same_v<T, mlkit::bf16> ? 5e-3 : 1e-3) : bound))
          ++wrong;
      }
      REQUIRE(wrong == 0);
    }
  }
};

template <class T>
constexpr double bound = std::is_same_v<T, double> ? 2e-14 : 3e-6;

}  // namespace rows_reference
