// A fused head's arguments, and loops of doubles over them.
#pragma once

#include <mlkit/rl/lm_head.hpp>

#include "logits_reference.hpp"

namespace head_reference {

namespace rl = mlkit::rl;
using namespace logits_reference;
using mlkit::cpu;
using mlkit::matrix_view;
using mlkit::tensor_view;
using mlkit::vector_view;

template <class T>
struct problem {
  using A = mlkit::accumulator_t<T>;
  index_t rows, depth, classes;
  std::vector<T> hidden, weight, dhidden, dweight;
  std::vector<std::int64_t> tokens;
  std::vector<std::uint8_t> mask;
  std::vector<A> logp, entropy, lse, dlogp, dentropy;
  double temperature = 1;
  bool accumulate = false;

  problem(index_t n, index_t d, index_t v, std::uint64_t seed) : rows(n), depth(d), classes(v) {
    const numbers h(seed), w(seed + 1), g(seed + 2), e(seed + 3), y(seed + 4);
    const double size = 1 / std::sqrt(static_cast<double>(std::max<index_t>(1, d)));
    for (index_t i = 0; i < n * d; ++i) hidden.push_back(static_cast<T>(2 * h(i)));
    for (index_t i = 0; i < v * d; ++i) weight.push_back(static_cast<T>(size * w(i)));
    for (index_t i = 0; i < n; ++i) {
      tokens.push_back(y.below(i, v));
      mask.push_back(1);
      dlogp.push_back(static_cast<A>(g(i)));
      dentropy.push_back(static_cast<A>(e(i)));
    }
    dhidden.assign(hidden.size(), T(7));
    dweight.assign(weight.size(), T(0.5));
    logp.assign(static_cast<std::size_t>(n), A(7));
    entropy = lse = logp;
  }
  matrix_view<T> matrix(std::vector<T>& m, index_t n) const { return {m.data(), {n, depth}}; }
  vector_view<A> vector(std::vector<A>& v) const { return {v.data(), {rows}}; }
  rl::log_prob_options<1> options() const { return {.temperature = temperature, .mask = mask}; }

  void run(const cpu& exec, bool to_hidden = true, bool to_weight = true) {
    rl::lm_head_gradients<T, T, 1> to;
    if (to_hidden) to.dhidden = matrix(dhidden, rows);
    if (to_weight) to.dweight = matrix(dweight, classes);
    to.accumulate_dweight = accumulate;
    rl::log_probs_and_gradient(
        exec, matrix(hidden, rows), matrix(weight, classes), tokens, options(),
        [&](index_t i, A, A) {
          return rl::token_gradient<A>{dlogp[static_cast<std::size_t>(i)], dentropy[static_cast<std::size_t>(i)]};
        },
        {.logp = vector(logp), .entropy = vector(entropy), .lse = vector(lse)}, to);
  }

  struct errors {
    double logp = 0, entropy = 0, lse = 0, dhidden = 0, dweight = 0;
  };
  // The largest error of each, in units of the largest value of the gradients.
  errors check() const {
    errors e;
    std::vector<double> dh(hidden.size()), dw(weight.size(), accumulate ? 0.5 : 0.0);
    const auto at = [](index_t i) { return static_cast<std::size_t>(i); };
    const auto note = [](double& worst, double have, double want) {
      const double d = have == want ? 0 : std::fabs(have - want) / std::max(1.0, std::fabs(want));
      worst = d <= worst ? worst : std::isfinite(d) ? d : inf;
    };
    for (index_t i = 0; i < rows; ++i) {
      if (!mask[at(i)]) {
        note(e.logp, static_cast<double>(logp[at(i)]), 0);
        note(e.entropy, static_cast<double>(entropy[at(i)]), 0);
        note(e.lse, static_cast<double>(lse[at(i)]), 0);
        continue;
      }
      std::vector<double> z(at(classes));
      for (index_t j = 0; j < classes; ++j)
        for (index_t k = 0; k < depth; ++k)
          z[at(j)] += static_cast<double>(hidden[at(i * depth + k)]) * static_cast<double>(weight[at(j * depth + k)]);
      const row r(z, tokens[at(i)], temperature);
      note(e.logp, static_cast<double>(logp[at(i)]), r.logp);
      note(e.entropy, static_cast<double>(entropy[at(i)]), r.entropy);
      note(e.lse, static_cast<double>(lse[at(i)]), r.lse);
      for (index_t j = 0; j < classes; ++j) {
        const double dz = r.gradient(j, tokens[at(i)], temperature, static_cast<double>(dlogp[at(i)]),
                                     static_cast<double>(dentropy[at(i)]));
        for (index_t k = 0; k < depth; ++k) {
          dh[at(i * depth + k)] += dz * static_cast<double>(weight[at(j * depth + k)]);
          dw[at(j * depth + k)] += dz * static_cast<double>(hidden[at(i * depth + k)]);
        }
      }
    }
    for (std::size_t i = 0; i < dh.size(); ++i) note(e.dhidden, static_cast<double>(dhidden[i]), dh[i]);
    for (std::size_t i = 0; i < dw.size(); ++i) note(e.dweight, static_cast<double>(dweight[i]), dw[i]);
    return e;
  }
  void require(double bound, double gradient_bound) const {
    const errors e = check();
    INFO("rows " << rows << ", depth " << depth << ", vocabulary " << classes);
    CHECK(e.logp <= bound);
    CHECK(e.entropy <= bound);
    CHECK(e.lse <= bound);
    CHECK(e.dhidden <= gradient_bound);
    CHECK(e.dweight <= gradient_bound);
  }
};

}  // namespace head_reference
