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

namespace attention = mlkit::attention;
using mlkit::index_t;
inline constexpr double inf = INFINITY;
inline constexpr double tight = 1e-12;

// Half a unit in the last place of one; more for f64, whose loops are what is right.
template <class T>
inline constexpr double rounding = std::is_same_v<T, double>        ? tight
                                   : std::is_same_v<T, float>       ? 0x1p-24
                                   : std::is_same_v<T, mlkit::bf16> ? 0x1p-8
                                                                    : 0x1p-11;

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
  errors() = default;
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
  void add(const errors& other) {
    for (std::size_t r = 0; r < error.size(); ++r) {
      error[r] = std::max(error[r], other.error[r]);
      size[r] = std::max(size[r], other.size[r]);
    }
  }
  double relative(std::size_t r) const { return error[r] / std::max(size[r], 1e-3); }
};

// The first `count` of what is written err at most twice as much as loops in the same dtype, and so many roundings.
template <class T>
void check_errors(const errors& loops, const errors& ours, double roundings = 1, std::size_t count = 7) {
  for (std::size_t r = 0; r < count; ++r) {
    INFO(result::names[r] << " of size " << ours.size[r]);
    // lse is what sums are, whatever T is.
    const bool lse = result::names[r] == std::string("lse");
    const double least = roundings * (lse ? rounding<mlkit::accumulator_t<T>> : rounding<T>);
    CHECK(std::isfinite(loops.error[r]));
    CHECK(ours.error[r] <= 2 * loops.error[r] + least * ours.size[r]);
  }
}

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

// A stage of a user's own that can be switched off.
struct bent {
  double size = 0;
  double operator()(double s, const attention::position& at) const {
    return s + size * (0.1 * s * s + 0.02 * static_cast<double>(at.j) - 0.03 * static_cast<double>(at.i + at.h));
  }
  double derivative(double s, const attention::position&) const { return 1 + size * 0.2 * s; }
};

// One pipeline is all pairs, so that its kernels are compiled once: every stage stands before every other, the masks
// stand between them, and each is a no-op until it is switched on.
template <class T>
struct everything {
  using A = mlkit::accumulator_t<T>;
  static constexpr index_t batch = 2, heads = 2, tokens = 60, far = attention::window::unlimited;

  // Without effect: a cap so large that tanh is linear to the last bit but one.
  double scales[2] = {1, 1}, caps[2] = {1e9, 1e9}, bends[2] = {0, 0};
  bool alibis[2] = {false, false};
  double p = 0;
  mlkit::vector<A> no_slopes{{heads}}, slopes{{heads}}, sinks{{heads}};
  mlkit::tensor<T, 4> bias;
  attention::window window{far, far, attention::align::top_left};
  std::vector<std::uint8_t> bits = std::vector<std::uint8_t>(batch * tokens * tokens, 1);
  std::vector<int> ids = std::vector<int>(tokens, 0), lengths = std::vector<int>(batch, tokens);
  std::vector<std::uint8_t> block_bits = std::vector<std::uint8_t>(heads * 4 * 3, 1);

  explicit everything(const mlkit::extents_t<4>& bias_shape = {1, heads, tokens, tokens}) : bias(bias_shape) {
    slopes(0) = A(0.05), slopes(1) = A(0.02);
    std::fill(sinks.begin(), sinks.end(), A(-inf));
  }
  mlkit::tensor_view<const std::uint8_t, 4> mask() const { return {bits.data(), {batch, 1, tokens, tokens}}; }
  mlkit::tensor_view<const std::uint8_t, 3> blocks() const { return {block_bits.data(), {heads, 4, 3}}; }

  // Calls f with the stages that change scores.
  template <class F>
  auto with_stages(F&& f) const {
    const auto& before = alibis[0] ? slopes : no_slopes;
    const auto& after = alibis[1] ? slopes : no_slopes;
    return f(attention::scale{scales[0]}, attention::softcap{caps[0]}, attention::alibi{before}, bent{bends[0]},
             attention::bias{bias}, bent{bends[1]}, attention::alibi{after}, attention::softcap{caps[1]},
             attention::scale{scales[1]});
  }
  template <class Mask>
  auto pipeline_with(Mask mask_of_runs) const {
    return with_stages(
        [&](auto scale, auto cap, auto slope, auto bend, auto b, auto bend_2, auto slope_2, auto cap_2, auto scale_2) {
          return attention::scores{attention::documents{ids},
                                   scale,
                                   cap,
                                   attention::boolean_mask{mask()},
                                   slope,
                                   bend,
                                   b,
                                   mask_of_runs,
                                   bend_2,
                                   attention::key_lengths{lengths},
                                   slope_2,
                                   cap_2,
                                   scale_2,
                                   attention::block_sparse{blocks(), 16, 25},
                                   attention::sinks{sinks},
                                   attention::dropout{.p = p, .seed = 3, .stream = 9}};
        });
  }
  auto pipeline() const { return pipeline_with(window); }

  bool sees(index_t b, index_t h, index_t i, index_t j) const {
    const auto at = [](index_t x) { return static_cast<std::size_t>(x); };
    return ids[at(i)] == ids[at(j)] && mask()(b, 0, i, j) && j >= i - window.left && j <= i + window.right &&
           j < lengths[at(b)] && blocks()(h, i / 16, j / 25);
  }
  // The score with its derivatives by q . k and by the bias.
  template <class Sum>
  struct dual {
    Sum value, by_dot, by_bias;
    void through(Sum v, Sum slope) { value = v, by_dot *= slope, by_bias *= slope; }
  };
  template <class Sum>
  dual<Sum> score(Sum dot, index_t b, index_t h, index_t i, index_t j) const {
    dual<Sum> s{dot, 1, 0};
    const auto scale = [&](Sum c) { s.through(c * s.value, c); };
    const auto cap = [&](Sum c) {
      if (c > Sum(1e6)) return;
      const Sum t = std::tanh(s.value / c);
      s.through(c * t, 1 - t * t);
    };
    const auto slope = [&](bool on) {
      if (on) s.value -= static_cast<Sum>(slopes(h)) * std::fabs(static_cast<Sum>(i - j));
    };
    const auto bend = [&](Sum size) {
      s.through(s.value + size * (Sum(0.1) * s.value * s.value + Sum(0.02) * static_cast<Sum>(j) -
                                  Sum(0.03) * static_cast<Sum>(i) - Sum(0.03) * static_cast<Sum>(h)),
                1 + Sum(0.2) * size * s.value);
    };
    scale(Sum(scales[0])), cap(Sum(caps[0])), slope(alibis[0]), bend(Sum(bends[0]));
    const auto& e = bias.extents();
    s.value += static_cast<Sum>(bias(b % e[0], h % e[1], i % e[2], j % e[3]));
    s.by_bias = 1;
    bend(Sum(bends[1])), slope(alibis[1]), cap(Sum(caps[1])), scale(Sum(scales[1]));
    return s;
  }
  // With stages that compute in Sum.
  template <class Sum = double>
  meaning means() const {
    const auto score_of = [this](double x, index_t b, index_t h, index_t i, index_t j) {
      return score(static_cast<Sum>(x), b, h, i, j);
    };
    meaning m;
    m.score = [=, this](double x, index_t b, index_t h, index_t i, index_t j) {
      return sees(b, h, i, j) ? score_of(x, b, h, i, j).value : -inf;
    };
    m.derivative = [=](double x, index_t b, index_t h, index_t i, index_t j) { return score_of(x, b, h, i, j).by_dot; };
    m.bias_derivative = [=](double x, index_t b, index_t h, index_t i, index_t j) {
      return score_of(x, b, h, i, j).by_bias;
    };
    m.sink = [this](index_t h) { return static_cast<double>(sinks(h)); };
    const mlkit::random_stream random{3, 9};
    m.factor = [this, random](index_t b, index_t h, index_t i, index_t j) {
      const auto block =
          (static_cast<std::uint64_t>(b * heads + h) << 40) + static_cast<std::uint64_t>(i * (tokens / 4) + j / 4);
      const bool dropped =
          random.block(block)[static_cast<std::size_t>(j % 4)] < static_cast<std::uint32_t>(p * 0x1p32);
      return dropped ? 0.0 : 1 / (1 - p);
    };
    return m;
  }

  void switch_on_value(const std::string& name, int place) {
    if (name == "scale") scales[place] = place == 0 ? 0.6 : -1.3;
    if (name == "softcap") caps[place] = place == 0 ? 1.5 : 2.5;
    if (name == "alibi") alibis[place] = true;
    if (name == "user's") bends[place] = place == 0 ? 0.5 : -0.7;
    if (name == "bias") fill<T>(bias, 20, 0.5f);
  }
  void switch_on_mask(const std::string& name) {
    const mlkit::random_stream random{5, 6};
    if (name == "causal") window = {far, 0, attention::align::top_left};
    if (name == "window") window = {7, 3, attention::align::bottom_right};
    if (name == "boolean")
      for (std::size_t i = 0; i < bits.size(); ++i) bits[i] = i / tokens % tokens != 9 && random.bits(i) % 3 != 0;
    if (name == "documents")
      for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = i < 25 ? 4 : i < 26 ? 5 : 1;
    if (name == "blocks")
      for (std::size_t i = 0; i < block_bits.size(); ++i) block_bits[i] = random.bits(1000 + i) % 2 != 0;
    if (name == "lengths") lengths = {41, 25};
  }
};

inline const std::vector<std::string> value_stages{"scale", "softcap", "alibi", "user's", "bias"};
inline const std::vector<std::string> mask_stages{"none",      "causal", "window", "boolean",
                                                  "documents", "blocks", "lengths"};

}  // namespace attention_reference
