// Batches for the tests of policy losses, and their losses as naive loops in f64.
#pragma once

#include <catch2/catch.hpp>
#include <cmath>
#include <functional>
#include <limits>
#include <mlkit/core/random.hpp>
#include <mlkit/rl/policy_loss.hpp>
#include <string>
#include <vector>

namespace policy_tests {

namespace rl = mlkit::rl;
using mlkit::index_t;

inline constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

// Operands of one loss, [batch, time] in row-major order, or packed with starts.
struct sample {
  index_t batch = 0, time = 0;
  std::vector<double> logp, old_logp, advantages, entropies, values, old_values, returns;
  std::vector<std::uint8_t> mask;
  std::vector<std::int32_t> starts;

  std::size_t size() const { return logp.size(); }
  // The tokens of each sequence that count.
  std::vector<std::vector<std::size_t>> sequences() const {
    std::vector<std::vector<std::size_t>> s;
    const index_t n = starts.empty() ? batch : static_cast<index_t>(starts.size()) - 1;
    for (index_t b = 0; b < n; ++b) {
      const index_t begin = starts.empty() ? b * time : starts[static_cast<std::size_t>(b)];
      const index_t end = starts.empty() ? begin + time : starts[static_cast<std::size_t>(b) + 1];
      s.emplace_back();
      for (index_t i = begin; i < end; ++i)
        if (mask[static_cast<std::size_t>(i)]) s.back().push_back(static_cast<std::size_t>(i));
    }
    return s;
  }
};

// Gaps of the mask hold NaN.
inline sample make_sample(index_t batch, index_t time, double kept = 0.8, std::uint64_t seed = 1) {
  const mlkit::random_stream random{seed, 7};
  sample s;
  s.batch = batch, s.time = time;
  const auto n = static_cast<std::size_t>(batch * time);
  std::uint64_t at = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const bool on = random.uniform(1'000'000 + i) < kept;
    const auto normal = [&](double mean, double scale) {
      return on ? mean + scale * random.normal(at++) : not_a_number;
    };
    s.mask.push_back(on);
    s.logp.push_back(normal(-1.5, 0.4));
    s.old_logp.push_back(on ? s.logp.back() + 0.3 * random.normal(at++) : not_a_number);
    s.advantages.push_back(normal(0, 1));
    s.entropies.push_back(normal(1, 0.2));
    s.values.push_back(normal(0, 1));
    s.old_values.push_back(on ? s.values.back() + 0.3 * random.normal(at++) : not_a_number);
    s.returns.push_back(normal(0.5, 1));
  }
  return s;
}

// Storage of one type for a sample, and its outputs, with every view taken through `make`.
template <class T>
struct storage_of {
  std::vector<T> logp, old_logp, advantages, entropies, values, old_values, returns, dlogp, dvalues, dentropies;
  std::vector<std::uint8_t> mask;

  explicit storage_of(const sample& s) : mask(s.mask) {
    const auto cast = [](const std::vector<double>& from) {
      std::vector<T> to;
      for (const double v : from) to.push_back(static_cast<T>(v));
      return to;
    };
    logp = cast(s.logp), old_logp = cast(s.old_logp), advantages = cast(s.advantages), entropies = cast(s.entropies);
    values = cast(s.values), old_values = cast(s.old_values), returns = cast(s.returns);
    dlogp = dvalues = dentropies = std::vector<T>(s.size(), static_cast<T>(77));
  }
};

// The views of a row-major batch.
template <class T>
rl::policy_batch<T> batch_of(storage_of<T>& m, const sample& s) {
  const mlkit::extents_t<2> shape{s.batch, s.time};
  const auto view = [&](std::vector<T>& v) { return mlkit::matrix_view<T>(v.data(), shape); };
  rl::policy_batch<T> b{.log_probs = view(m.logp),
                        .old_log_probs = view(m.old_logp),
                        .advantages = view(m.advantages),
                        .entropies = view(m.entropies),
                        .values = view(m.values),
                        .old_values = view(m.old_values),
                        .returns = view(m.returns),
                        .mask = mlkit::matrix_view<const std::uint8_t>(m.mask.data(), shape)};
  if (!s.starts.empty()) b.cu_seqlens = s.starts;
  return b;
}
template <class T>
rl::policy_gradients<T> gradients_of(storage_of<T>& m, const sample& s) {
  const mlkit::extents_t<2> shape{s.batch, s.time};
  const auto view = [&](std::vector<T>& v) { return mlkit::matrix_view<T>(v.data(), shape); };
  return {.log_probs = view(m.dlogp), .values = view(m.dvalues), .entropies = view(m.dentropies)};
}

inline double clip(double x, double low, double high) { return std::min(std::max(x, low), high); }

// The loss of one token from its ratio; `constant` is the ratio as a constant, for terms that take it so.
using naive_term = std::function<double(double ratio, double constant, double advantage, double logp)>;
// The weight of a token of a sequence of n, of all, among so many sequences.
using naive_weight = std::function<double(double n, double all, double sequences)>;

struct naive_loss {
  double policy = 0, value = 0, entropy = 0;
};

inline naive_loss naive(const sample& s, const naive_term& term, bool of_sequence, const naive_weight& weight,
                        double value_clip, const std::vector<double>& frozen_logp) {
  const auto sequences = s.sequences();
  double all = 0, used = 0;
  for (const auto& q : sequences) all += static_cast<double>(q.size()), used += q.empty() ? 0 : 1;
  naive_loss loss;
  for (const auto& q : sequences) {
    const auto n = static_cast<double>(q.size());
    double mean = 0, frozen_mean = 0;
    for (const std::size_t i : q) {
      mean += (s.logp[i] - s.old_logp[i]) / n;
      frozen_mean += (frozen_logp[i] - s.old_logp[i]) / n;
    }
    for (const std::size_t i : q) {
      const double w = weight(n, all, used);
      const double d = clip(of_sequence ? mean : s.logp[i] - s.old_logp[i], -20, 20);
      const double f = clip(of_sequence ? frozen_mean : frozen_logp[i] - s.old_logp[i], -20, 20);
      loss.policy += w * term(std::exp(d), std::exp(f), s.advantages[i], s.logp[i]);
      const double v = s.values[i], e = value_clip > 0 ? value_clip : 1e300;
      const double held = s.old_values[i] + clip(v - s.old_values[i], -e, e), r = s.returns[i];
      loss.value += w * 0.5 * std::max((v - r) * (v - r), (held - r) * (held - r));
      loss.entropy += w * s.entropies[i];
    }
  }
  return loss;
}

}  // namespace policy_tests
