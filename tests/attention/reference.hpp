// Attention in loops, forward and backward, over scores that a test gives the formula and the derivatives of.
#pragma once

#include <algorithm>
#include <array>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <functional>
#include <mlkit/attention.hpp>
#include <string>
#include <vector>

namespace attention_reference {

using mlkit::index_t;
inline constexpr double inf = INFINITY;
inline constexpr double tight = 1e-12;

template <class T, class Tensor>
void fill(Tensor& t, std::uint64_t stream, float size = 1) {
  const mlkit::random_stream random{7, stream};
  for (index_t i = 0; i < t.size(); ++i)
    t.data()[i] = static_cast<T>(size * random.normal(static_cast<std::uint64_t>(i)));
}

// What a pipeline means: the score of (b, h, i, j) made of q . k, its derivative by q . k and by the pipeline's bias,
// the logit of a sink, and the factor that dropout puts on a probability.
struct meaning {
  using of_score = std::function<double(double, index_t, index_t, index_t, index_t)>;
  of_score score;
  of_score derivative;
  std::function<double(index_t)> sink = [](index_t) { return -inf; };
  std::function<double(index_t, index_t, index_t, index_t)> factor = [](index_t, index_t, index_t, index_t) {
    return 1.0;
  };
  of_score bias_derivative = [](double, index_t, index_t, index_t, index_t) { return 1.0; };
};

// What forward and backward write.
struct result {
  static constexpr std::array<const char*, 7> names{"out", "lse", "dq", "dk", "dv", "dsinks", "dbias"};
  std::array<std::vector<double>, 7> of;
};

// The largest error of each, and the largest value that it should have.
struct errors {
  std::array<double, 7> error{}, size{};
  errors(const result& want, const result& have) {
    for (std::size_t r = 0; r < error.size(); ++r) {
      REQUIRE(want.of[r].size() == have.of[r].size());
      for (std::size_t i = 0; i < want.of[r].size(); ++i) {
        const double x = want.of[r][i], y = have.of[r][i];
        if (std::isinf(x) && x == y) continue;
        error[r] = std::isfinite(y) ? std::max(error[r], std::fabs(x - y)) : inf;
        size[r] = std::max(size[r], std::fabs(x));
      }
    }
  }
  double relative(std::size_t r) const { return error[r] / std::max(size[r], 1e-3); }
};

template <class T>
struct problem {
  using A = mlkit::accumulator_t<T>;
  index_t batch, heads, kv_heads, queries, keys, d, d_v;
  mlkit::tensor<T, 4> q{{batch, heads, queries, d}}, k{{batch, kv_heads, keys, d}}, v{{batch, kv_heads, keys, d_v}},
      out{{batch, heads, queries, d_v}}, dout{{batch, heads, queries, d_v}}, dq{{batch, heads, queries, d}},
      dk{{batch, kv_heads, keys, d}}, dv{{batch, kv_heads, keys, d_v}};
  mlkit::tensor<A, 3> lse{{batch, heads, queries}}, dlse{{batch, heads, queries}};
  mlkit::vector<T> dsinks{{heads}};
  mlkit::tensor<T, 4> dbias{{0, 0, 0, 0}};  // of the shape of the pipeline's bias, once that is known

  problem(index_t b, index_t h, index_t kv, index_t n, index_t m, index_t width, index_t value_width)
      : batch(b), heads(h), kv_heads(kv), queries(n), keys(m), d(width), d_v(value_width) {
    fill<T>(q, 1), fill<T>(k, 2), fill<T>(v, 3), fill<T>(dout, 4), fill<A>(dlse, 5);
  }

  // Forward and backward into memory that holds NaN.
  template <class... Stages>
  void run(const mlkit::attention::scores<Stages...>& pipeline, const mlkit::cpu& exec = {}) {
    const auto spoil = [](auto&... t) {
      (std::fill(t.begin(), t.end(), static_cast<std::remove_cvref_t<decltype(*t.begin())>>(std::nanf(""))), ...);
    };
    spoil(out, lse, dq, dk, dv);
    mlkit::attention::forward(exec, q, k, v, pipeline, out, lse);
    mlkit::attention::gradients g{dq, dk, dv};
    if constexpr ((mlkit::attention::detail::is_sinks<Stages> || ...)) {
      spoil(dsinks);
      g.dsinks = dsinks.view();
    }
    mlkit::attention::detail::each_stage(pipeline, [&](const auto& stage) {
      if constexpr (mlkit::attention::detail::is_bias<std::remove_cvref_t<decltype(stage)>>) {
        if (dbias.extents() != stage.values.extents) dbias = mlkit::tensor<T, 4>(stage.values.extents);
        spoil(dbias);
        g.dbias = dbias.view();
      }
    });
    mlkit::attention::backward(exec, q, k, v, pipeline, out, lse, dout, g, dlse.view());
  }

  result written() const {
    const auto values = [](const auto& t) {
      std::vector<double> x(static_cast<std::size_t>(t.size()));
      std::transform(t.begin(), t.end(), x.begin(), [](auto e) { return static_cast<double>(e); });
      return x;
    };
    return {{values(out), values(lse), values(dq), values(dk), values(dv), values(dsinks), values(dbias)}};
  }

  // The largest error of anything that forward and backward write, relative to the largest value of its kind.
  template <class... Stages>
  double error(const mlkit::attention::scores<Stages...>& pipeline, const meaning& m) {
    run(pipeline);
    const errors e(naive<double, double>(m, (mlkit::attention::detail::is_sinks<Stages> || ...)), written());
    double worst = 0;
    std::string all;
    for (std::size_t r = 0; r < e.error.size(); ++r) {
      worst = std::max(worst, e.relative(r));
      all += std::string(result::names[r]) + " " + std::to_string(e.relative(r)) + " ";
    }
    UNSCOPED_INFO(all << "worst " << worst);
    return worst;
  }

  // The same in loops, with sums of type Sum, and with matrices between two steps rounded to Stored: <double, double>
  // is what is right, <float, bf16> what comes of keeping scores and probabilities in bf16.
  template <class Sum, class Stored>
  result naive(const meaning& m, bool with_sinks = false) const {
    const auto at = [](index_t j) { return static_cast<std::size_t>(j); };
    const auto sums = [](const auto& t) {
      std::vector<Sum> x(static_cast<std::size_t>(t.size()));
      std::transform(t.begin(), t.end(), x.begin(), [](auto e) { return static_cast<Sum>(e); });
      return x;
    };
    const auto stored = [](auto x) { return static_cast<Sum>(static_cast<Stored>(static_cast<Sum>(x))); };
    const std::vector<Sum> all_q = sums(q), all_k = sums(k), all_v = sums(v), all_dout = sums(dout);
    result r;
    auto& [out_want, lse_want, dq_want, dk_want, dv_want, sinks_want, bias_want] = r.of;
    std::vector<Sum> dk_sum(all_k.size()), dv_sum(all_v.size()), bias_sum(at(dbias.size()));
    sinks_want.resize(at(heads));
    std::vector<Sum> x(at(keys)), s(x.size()), p(x.size()), dp(x.size());
    for (index_t b = 0; b < batch; ++b)
      for (index_t h = 0; h < heads; ++h)
        for (index_t i = 0; i < queries; ++i) {
          const index_t kv = h / (heads / kv_heads);
          const Sum* q_row = all_q.data() + ((b * heads + h) * queries + i) * d;
          const Sum* dout_row = all_dout.data() + ((b * heads + h) * queries + i) * d_v;
          const index_t k_first = (b * kv_heads + kv) * keys * d, v_first = (b * kv_heads + kv) * keys * d_v;
          const Sum sink = static_cast<Sum>(m.sink(h)), infinity = static_cast<Sum>(inf);
          Sum top = sink, total = 0, delta = 0;
          for (index_t j = 0; j < keys; ++j) {
            const Sum* k_row = all_k.data() + k_first + j * d;
            Sum dot = 0;
            for (index_t c = 0; c < d; ++c) dot += q_row[c] * k_row[c];
            x[at(j)] = stored(dot);
            s[at(j)] = stored(m.score(static_cast<double>(x[at(j)]), b, h, i, j));
            top = std::max(top, s[at(j)]);
          }
          for (index_t j = 0; j < keys; ++j) total += p[at(j)] = top == -infinity ? 0 : std::exp(s[at(j)] - top);
          if (sink != -infinity) total += std::exp(sink - top);
          std::vector<Sum> o(at(d_v)), row(at(d));
          for (index_t j = 0; j < keys; ++j) {
            p[at(j)] = total == 0 ? 0 : stored(p[at(j)] / total);
            dp[at(j)] = 0;
            if (p[at(j)] == 0) continue;
            const Sum factor = static_cast<Sum>(m.factor(b, h, i, j)), weight = stored(factor * p[at(j)]);
            const Sum* v_row = all_v.data() + v_first + j * d_v;
            Sum dot = 0;
            for (index_t c = 0; c < d_v; ++c) {
              o[at(c)] += weight * v_row[c];
              dot += dout_row[c] * v_row[c];
            }
            dp[at(j)] = factor * stored(dot);
            delta += p[at(j)] * dp[at(j)];
          }
          // Where numbers are rounded, D comes from out, as everywhere that probabilities are not kept.
          if constexpr (!std::is_same_v<Stored, double>) {
            delta = 0;
            for (index_t c = 0; c < d_v; ++c) delta += stored(o[at(c)]) * dout_row[c];
          }
          const Sum lse_here = total == 0 ? -infinity : top + std::log(total);
          delta -= total == 0 ? 0 : static_cast<Sum>(dlse(b, h, i));
          for (index_t j = 0; j < keys; ++j) {
            if (p[at(j)] == 0) continue;
            const Sum g = stored(p[at(j)] * (dp[at(j)] - delta));
            const double before = static_cast<double>(x[at(j)]);
            const Sum ds = stored(static_cast<double>(g) * m.derivative(before, b, h, i, j));
            const Sum weight = stored(static_cast<Sum>(m.factor(b, h, i, j)) * p[at(j)]);
            const Sum* k_row = all_k.data() + k_first + j * d;
            for (index_t c = 0; c < d; ++c) {
              row[at(c)] += ds * k_row[c];
              dk_sum[at(k_first + j * d + c)] += ds * q_row[c];
            }
            for (index_t c = 0; c < d_v; ++c) dv_sum[at(v_first + j * d_v + c)] += weight * dout_row[c];
            if (!bias_sum.empty()) {
              const auto& e = dbias.extents();
              const index_t of = ((b % e[0] * e[1] + h % e[1]) * e[2] + i % e[2]) * e[3] + j % e[3];
              bias_sum[at(of)] += g * static_cast<Sum>(m.bias_derivative(before, b, h, i, j));
            }
          }
          if (sink != -infinity) sinks_want[at(h)] -= static_cast<double>(std::exp(sink - lse_here) * delta);
          for (const Sum e : o) out_want.push_back(static_cast<double>(stored(e)));
          for (const Sum e : row) dq_want.push_back(static_cast<double>(stored(e)));
          lse_want.push_back(static_cast<double>(lse_here));
        }
    for (const Sum e : dk_sum) dk_want.push_back(static_cast<double>(stored(e)));
    for (const Sum e : dv_sum) dv_want.push_back(static_cast<double>(stored(e)));
    for (const Sum e : bias_sum) bias_want.push_back(static_cast<double>(stored(e)));
    if (!with_sinks) std::fill(sinks_want.begin(), sinks_want.end(), 0.0);
    return r;
  }
};

// A tensor's elements, or room for them, among others that are NaN: rows in `order` of memory, and columns so many
// elements apart.
template <class T>
struct scattered {
  mlkit::tensor<T, 4> memory;
  mlkit::tensor_view<T, 4> view;

  // [batch, tokens, heads, columns] where `tokens_first`, else [batch, heads, columns, tokens].
  scattered(const mlkit::tensor<T, 4>& like, bool tokens_first, bool filled)
      : memory(tokens_first
                   ? mlkit::extents_t<4>{like.extent(0), like.extent(2), like.extent(1) + 1, like.extent(3) + 3}
                   : mlkit::extents_t<4>{like.extent(0), like.extent(1), like.extent(3), like.extent(2) + 3}),
        view(memory.data(), like.extents()) {
    const auto& s = memory.view().strides;
    view.strides =
        tokens_first ? mlkit::extents_t<4>{s[0], s[2], s[1], s[3]} : mlkit::extents_t<4>{s[0], s[1], s[3], s[2]};
    std::fill(memory.begin(), memory.end(), static_cast<T>(std::nanf("")));
    if (filled) each([&](T& x, index_t at) { x = like.data()[at]; });
  }
  template <class F>
  void each(F&& f) const {
    index_t at = 0;
    for (index_t b = 0; b < view.extent(0); ++b)
      for (index_t h = 0; h < view.extent(1); ++h)
        for (index_t i = 0; i < view.extent(2); ++i)
          for (index_t c = 0; c < view.extent(3); ++c) f(view(b, h, i, c), at++);
  }
  // The largest difference to what should stand here; infinity where anything else was written to.
  double difference(const mlkit::tensor<T, 4>& want) const {
    double most = 0;
    each([&](T& x, index_t at) {
      most = std::max(most, std::fabs(static_cast<double>(x) - static_cast<double>(want.data()[at])));
    });
    const auto numbers =
        std::count_if(memory.begin(), memory.end(), [](T x) { return !std::isnan(static_cast<float>(x)); });
    return numbers == want.size() ? most : inf;
  }
};

inline meaning scaled(double value) {
  meaning m;
  m.score = [=](double x, index_t, index_t, index_t, index_t) { return value * x; };
  m.derivative = [=](double, index_t, index_t, index_t, index_t) { return value; };
  return m;
}
// The meaning of a mask after a scale.
template <class Sees>
meaning masked(double value, Sees sees) {
  meaning m = scaled(value);
  m.score = [=](double x, index_t b, index_t h, index_t i, index_t j) { return sees(b, h, i, j) ? value * x : -inf; };
  return m;
}

}  // namespace attention_reference
