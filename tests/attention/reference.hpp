// Attention in loops in f64, forward and backward, over scores that a test gives the formula and the derivative of.
#pragma once

#include <array>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <functional>
#include <mlkit/attention.hpp>
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

// What a pipeline means: the score of (b, h, i, j) made of q . k, its derivative, the logit of a sink, and the factor
// that dropout puts on a probability.
struct meaning {
  std::function<double(double, index_t, index_t, index_t, index_t)> score;
  std::function<double(double, index_t, index_t, index_t, index_t)> derivative;
  std::function<double(index_t)> sink = [](index_t) { return -inf; };
  std::function<double(index_t, index_t, index_t, index_t)> factor = [](index_t, index_t, index_t, index_t) {
    return 1.0;
  };
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

  problem(index_t b, index_t h, index_t kv, index_t n, index_t m, index_t width, index_t value_width)
      : batch(b), heads(h), kv_heads(kv), queries(n), keys(m), d(width), d_v(value_width) {
    fill<T>(q, 1), fill<T>(k, 2), fill<T>(v, 3), fill<T>(dout, 4), fill<A>(dlse, 5);
  }

  // The largest error of anything that forward and backward write, relative to the largest value of its kind.
  template <class... Stages>
  double error(const mlkit::attention::scores<Stages...>& pipeline, const meaning& m) {
    mlkit::attention::forward(mlkit::cpu{}, q, k, v, pipeline, out, lse);
    mlkit::attention::gradients g{dq, dk, dv};
    g.dsinks = {};
    if constexpr ((mlkit::attention::detail::is_sinks<Stages> || ...)) g.dsinks = dsinks.view();
    mlkit::attention::backward(mlkit::cpu{}, q, k, v, pipeline, out, lse, dout, g, dlse.view());

    struct grown {
      double error = 0, size = 1e-300;
      void see(double want, double have) {
        if (std::isinf(want) && want == have) return;
        error = std::isfinite(have) ? std::max(error, std::fabs(want - have)) : inf;
        size = std::max(size, std::fabs(want));
      }
      double relative() const { return error / std::max(size, 1e-3); }
    } e_out, e_lse, e_dq, e_dk, e_dv, e_sinks;
    std::vector<double> dk_want(static_cast<std::size_t>(k.size())), dv_want(static_cast<std::size_t>(v.size())),
        sinks_want(static_cast<std::size_t>(heads));
    std::vector<double> x(static_cast<std::size_t>(keys)), s(x.size()), p(x.size()), dp(x.size());
    for (index_t b = 0; b < batch; ++b)
      for (index_t h = 0; h < heads; ++h)
        for (index_t i = 0; i < queries; ++i) {
          const index_t kv = h / (heads / kv_heads);
          const auto at = [](index_t j) { return static_cast<std::size_t>(j); };
          const double sink = m.sink(h);
          double top = sink, total = 0, delta = 0;
          for (index_t j = 0; j < keys; ++j) {
            x[at(j)] = 0;
            for (index_t c = 0; c < d; ++c)
              x[at(j)] += static_cast<double>(q(b, h, i, c)) * static_cast<double>(k(b, kv, j, c));
            s[at(j)] = m.score(x[at(j)], b, h, i, j);
            top = std::max(top, s[at(j)]);
          }
          for (index_t j = 0; j < keys; ++j) total += p[at(j)] = top == -inf ? 0 : std::exp(s[at(j)] - top);
          if (sink != -inf) total += std::exp(sink - top);
          std::vector<double> o(static_cast<std::size_t>(d_v)), row(static_cast<std::size_t>(d));
          for (index_t j = 0; j < keys; ++j) {
            p[at(j)] = total == 0 ? 0 : p[at(j)] / total;
            const double factor = p[at(j)] == 0 ? 0 : m.factor(b, h, i, j);
            dp[at(j)] = 0;
            if (p[at(j)] == 0) continue;
            for (index_t c = 0; c < d_v; ++c) {
              o[at(c)] += factor * p[at(j)] * static_cast<double>(v(b, kv, j, c));
              dp[at(j)] += factor * static_cast<double>(dout(b, h, i, c)) * static_cast<double>(v(b, kv, j, c));
            }
            delta += p[at(j)] * dp[at(j)];
          }
          const double lse_want = total == 0 ? -inf : top + std::log(total);
          delta -= total == 0 ? 0 : static_cast<double>(dlse(b, h, i));
          for (index_t j = 0; j < keys; ++j) {
            if (p[at(j)] == 0) continue;
            const double ds = p[at(j)] * (dp[at(j)] - delta) * m.derivative(x[at(j)], b, h, i, j);
            for (index_t c = 0; c < d; ++c) {
              row[at(c)] += ds * static_cast<double>(k(b, kv, j, c));
              dk_want[at(&k(b, kv, j, c) - k.data())] += ds * static_cast<double>(q(b, h, i, c));
            }
            for (index_t c = 0; c < d_v; ++c)
              dv_want[at(&v(b, kv, j, c) - v.data())] +=
                  m.factor(b, h, i, j) * p[at(j)] * static_cast<double>(dout(b, h, i, c));
          }
          if (sink != -inf) sinks_want[at(h)] -= std::exp(sink - lse_want) * delta;
          for (index_t c = 0; c < d_v; ++c) e_out.see(o[at(c)], static_cast<double>(out(b, h, i, c)));
          for (index_t c = 0; c < d; ++c) e_dq.see(row[at(c)], static_cast<double>(dq(b, h, i, c)));
          e_lse.see(lse_want, static_cast<double>(lse(b, h, i)));
        }
    for (index_t i = 0; i < k.size(); ++i)
      e_dk.see(dk_want[static_cast<std::size_t>(i)], static_cast<double>(dk.data()[i]));
    for (index_t i = 0; i < v.size(); ++i)
      e_dv.see(dv_want[static_cast<std::size_t>(i)], static_cast<double>(dv.data()[i]));
    if constexpr ((mlkit::attention::detail::is_sinks<Stages> || ...))
      for (index_t h = 0; h < heads; ++h)
        e_sinks.see(sinks_want[static_cast<std::size_t>(h)], static_cast<double>(dsinks(h)));
    INFO("out " << e_out.relative() << " lse " << e_lse.relative() << " dq " << e_dq.relative() << " dk "
                << e_dk.relative() << " dv " << e_dv.relative() << " dsinks " << e_sinks.relative());
    double worst = 0;
    for (const grown* e : {&e_out, &e_lse, &e_dq, &e_dk, &e_dv, &e_sinks}) worst = std::max(worst, e->relative());
    UNSCOPED_INFO("worst " << worst);
    return worst;
  }
};

inline meaning scaled(double value) {
  return {[=](double x, index_t, index_t, index_t, index_t) { return value * x; },
          [=](double, index_t, index_t, index_t, index_t) { return value; }};
}
// The meaning of a mask after a scale.
template <class Sees>
meaning masked(double value, Sees sees) {
  meaning m = scaled(value);
  m.score = [=](double x, index_t b, index_t h, index_t i, index_t j) { return sees(b, h, i, j) ? value * x : -inf; };
  return m;
}

}  // namespace attention_reference
