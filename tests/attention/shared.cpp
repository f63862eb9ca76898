// Gradients of a bias that serves several scores, and sequences packed into one batch, against loops in f64.
#include <algorithm>
#include <array>
#include <catch2/catch.hpp>
#include <cmath>
#include <mlkit/attention.hpp>
#include <string>
#include <vector>

namespace attention = mlkit::attention;
using mlkit::index_t;

namespace {

using tensor4 = mlkit::tensor<double, 4>;

template <class Tensor>
void fill(Tensor& t, std::uint64_t stream) {
  const mlkit::random_stream random{1, stream};
  for (index_t i = 0; i < t.size(); ++i)
    t.data()[i] = static_cast<std::remove_cvref_t<decltype(*t.data())>>(random.normal(static_cast<std::uint64_t>(i)));
}

// Attention of one query over n keys: `score(j)` is its score, `value(j, c)` and `gradient(c)` are v and dout. Returns
// out, and calls see(j, p, ds) for every key with its probability and the gradient of its score.
template <class Score, class Value, class Gradient, class See>
std::vector<double> attend(index_t n, index_t d_v, Score&& score, Value&& value, Gradient&& gradient, See&& see) {
  std::vector<double> p(static_cast<std::size_t>(n)), dp(p.size()), out(static_cast<std::size_t>(d_v));
  double top = -INFINITY, total = 0, delta = 0;
  for (index_t j = 0; j < n; ++j) top = std::max(top, p[static_cast<std::size_t>(j)] = score(j));
  for (double& x : p) total += x = top == -INFINITY ? 0 : std::exp(x - top);
  for (index_t j = 0; j < n; ++j) {
    double& x = p[static_cast<std::size_t>(j)];
    x = total == 0 ? 0 : x / total;
    for (index_t c = 0; c < d_v; ++c) {
      out[static_cast<std::size_t>(c)] += x * value(j, c);
      dp[static_cast<std::size_t>(j)] += gradient(c) * value(j, c);
    }
    delta += x * dp[static_cast<std::size_t>(j)];
  }
  for (index_t j = 0; j < n; ++j) {
    const double x = p[static_cast<std::size_t>(j)];
    see(j, x, x * (dp[static_cast<std::size_t>(j)] - delta));
  }
  return out;
}

}  // namespace

TEST_CASE("the gradient of a bias sums over the scores that share it", "[attention][bias]") {
  constexpr index_t batch = 2, heads = 3, queries = 270, keys = 130, d = 5, d_v = 4;
  constexpr double s = 0.7;
  tensor4 q({batch, heads, queries, d}), k({batch, heads, keys, d}), v({batch, heads, keys, d_v}),
      out({batch, heads, queries, d_v}), dout(out.extents()), dq(q.extents()), dk(k.extents()), dv(v.extents());
  mlkit::tensor<double, 3> lse({batch, heads, queries});
  fill(q, 1), fill(k, 2), fill(v, 3), fill(dout, 4);
  const bool causal = GENERATE(false, true);
  const auto shape =
      GENERATE(std::array<index_t, 4>{batch, heads, queries, keys}, std::array<index_t, 4>{1, heads, queries, keys},
               std::array<index_t, 4>{1, 1, queries, keys}, std::array<index_t, 4>{batch, 1, queries, keys},
               std::array<index_t, 4>{batch, heads, 1, keys}, std::array<index_t, 4>{batch, 1, 1, keys},
               std::array<index_t, 4>{1, 1, 1, keys}, std::array<index_t, 4>{batch, heads, queries, 1},
               std::array<index_t, 4>{1, 1, 1, 1});
  INFO("causal " << causal << ", bias " << mlkit::detail::shape_text<4>(shape));
  tensor4 bias(shape), dbias(shape), want(shape);
  fill(bias, 5);
  std::fill(dbias.begin(), dbias.end(), 99.0);
  const auto run = [&](const auto& scores, const mlkit::cpu& exec) {
    attention::forward(exec, q, k, v, scores, out, lse);
    attention::gradients g{dq, dk, dv, dbias};
    if (exec.threads == 1) g.dbias = dbias.view();  // its dimensions of 1 have strides
    attention::backward(exec, q, k, v, scores, out, lse, dout, g);
  };
  const auto run_any = [&](const mlkit::cpu& exec) {
    if (causal)
      run(attention::scores{attention::scale{s}, attention::bias{bias}, attention::causal{attention::align::top_left}},
          exec);
    else
      run(attention::scores{attention::scale{s}, attention::bias{bias}}, exec);
  };
  run_any({.threads = 3});
  const auto of = [&](auto& t, index_t b, index_t h, index_t i, index_t j) -> double& {
    return t(shape[0] > 1 ? b : 0, shape[1] > 1 ? h : 0, shape[2] > 1 ? i : 0, shape[3] > 1 ? j : 0);
  };
  double worst = 0;
  for (index_t b = 0; b < batch; ++b)
    for (index_t h = 0; h < heads; ++h)
      for (index_t i = 0; i < queries; ++i) {
        const auto score = [&](index_t j) {
          double x = 0;
          for (index_t c = 0; c < d; ++c) x += q(b, h, i, c) * k(b, h, j, c);
          return causal && j > i ? -INFINITY : s * x + of(bias, b, h, i, j);
        };
        const auto o = attend(
            keys, d_v, score, [&](index_t j, index_t c) { return v(b, h, j, c); },
            [&](index_t c) { return dout(b, h, i, c); },
            [&](index_t j, double, double ds) { of(want, b, h, i, j) += ds; });
        for (index_t c = 0; c < d_v; ++c)
          worst = std::max(worst, std::fabs(o[static_cast<std::size_t>(c)] - out(b, h, i, c)));
      }
  CHECK(worst < 1e-13);
  double bias_worst = 0;
  for (index_t i = 0; i < want.size(); ++i)
    bias_worst = std::max(bias_worst, std::fabs(want.data()[i] - dbias.data()[i]));
  CHECK(bias_worst < 1e-11);
  const tensor4 before = dbias.clone();
  run_any({.threads = 1});
  CHECK(std::equal(before.begin(), before.end(), dbias.begin()));
}

TEST_CASE("packed sequences see their own keys alone, forward and backward", "[attention][packed]") {
  constexpr index_t heads = 4, kv_heads = 2, d = 6, d_v = 3;
  const std::vector<std::int32_t> query_starts{0, 5, 5, 305, 306}, key_starts{0, 7, 12, 312, 312};
  const index_t queries = query_starts.back(), keys = key_starts.back();
  mlkit::tensor<double, 3> q({queries, heads, d}), k({keys, kv_heads, d}), v({keys, kv_heads, d_v}),
      out({queries, heads, d_v}), dout(out.extents()), dq(q.extents()), dk(k.extents()), dv(v.extents()),
      dq_want(q.extents()), dk_want(k.extents()), dv_want(v.extents());
  mlkit::matrix<double> lse({heads, queries});
  fill(q, 1), fill(k, 2), fill(v, 3), fill(dout, 4);
  const attention::sequences packed(query_starts, key_starts);
  const attention::scores scores{attention::scale{0.5}, attention::causal{attention::align::bottom_right}};
  attention::forward(mlkit::cpu{}, q, k, v, packed, scores, out, lse);
  attention::backward(mlkit::cpu{}, q, k, v, packed, scores, out, lse, dout, dq, dk, dv);
  double worst = 0;
  for (std::size_t b = 0; b + 1 < query_starts.size(); ++b) {
    const index_t n = query_starts[b + 1] - query_starts[b], m = key_starts[b + 1] - key_starts[b];
    for (index_t h = 0; h < heads; ++h)
      for (index_t i = 0; i < n; ++i) {
        const index_t row = query_starts[b] + i, first = key_starts[b], kv = h / (heads / kv_heads);
        const auto score = [&](index_t j) {
          double x = 0;
          for (index_t c = 0; c < d; ++c) x += q(row, h, c) * k(first + j, kv, c);
          return j > i + m - n ? -INFINITY : 0.5 * x;
        };
        const auto o = attend(
            m, d_v, score, [&](index_t j, index_t c) { return v(first + j, kv, c); },
            [&](index_t c) { return dout(row, h, c); },
            [&](index_t j, double p, double ds) {
              for (index_t c = 0; c < d; ++c) {
                dq_want(row, h, c) += 0.5 * ds * k(first + j, kv, c);
                dk_want(first + j, kv, c) += 0.5 * ds * q(row, h, c);
              }
              for (index_t c = 0; c < d_v; ++c) dv_want(first + j, kv, c) += p * dout(row, h, c);
            });
        for (index_t c = 0; c < d_v; ++c)
          worst = std::max(worst, std::fabs(o[static_cast<std::size_t>(c)] - out(row, h, c)));
      }
  }
  CHECK(worst < 1e-13);
  CHECK(lse(0, 305) == -INFINITY);  // a query of a sequence without keys
  const auto difference = [](const auto& a, const auto& b) {
    double most = 0;
    for (index_t i = 0; i < a.size(); ++i) most = std::max(most, std::fabs(a.data()[i] - b.data()[i]));
    return most;
  };
  CHECK(difference(dq, dq_want) < 1e-12);
  CHECK(difference(dk, dk_want) < 1e-11);
  CHECK(difference(dv, dv_want) < 1e-11);
}

TEST_CASE("starts of sequences that are none are refused, and nothing is written", "[attention][packed][bad input]") {
  constexpr double poison = 12345;
  mlkit::tensor<double, 3> q({4, 2, 3}), k({5, 2, 3}), v(k.extents()), out(q.extents()), dout(q.extents()),
      dq(q.extents()), dk(k.extents()), dv(k.extents());
  mlkit::matrix<double> lse({2, 4});
  const auto all_outputs = [&](auto&& f) { return f(out) && f(lse) && f(dq) && f(dk) && f(dv); };
  all_outputs([&](auto& t) { return std::fill(t.begin(), t.end(), poison), true; });
  for (const bool backward : {false, true}) {
    const auto call = [&](const std::vector<std::int32_t>& queries, const std::vector<std::int32_t>& keys) {
      const attention::sequences packed(queries, keys);
      const attention::scores scores{attention::scale{0.5}, attention::causal{attention::align::bottom_right}};
      if (backward)
        attention::backward(mlkit::cpu{}, q, k, v, packed, scores, out, lse, dout, dq, dk, dv);
      else
        attention::forward(mlkit::cpu{}, q, k, v, packed, scores, out, lse);
    };
    const std::string function = backward ? "attention::backward: " : "attention::forward: ";
    const std::string value = "mlkit::value_error: " + function, shape = "mlkit::shape_error: " + function;
    CHECK_THROWS_WITH(call({0, 3, 2, 4}, {0, 1, 2, 5}),
                      value + "sequences.queries[2] = 2 is less than sequences.queries[1] = 3");
    CHECK_THROWS_WITH(call({0, 2, 4}, {0, 6, 5}), value + "sequences.keys[2] = 5 is less than sequences.keys[1] = 6");
    CHECK_THROWS_WITH(call({1, 4}, {0, 5}), value + "sequences.queries[0] = 1 is not 0");
    CHECK_THROWS_WITH(call({0, 4}, {-1, 5}), value + "sequences.keys[0] = -1 is not 0");
    CHECK_THROWS_WITH(call({0, 5}, {0, 5}), value + "sequences.queries ends with 5, but q has 4 rows");
    CHECK_THROWS_WITH(call({0, 4}, {0, 4}), value + "sequences.keys ends with 4, but k has 5 rows");
    CHECK_THROWS_WITH(call({0, 4}, {0, 2, 5}), shape + "sequences.keys has 3 elements, but sequences.queries has 2");
    CHECK_THROWS_WITH(call({}, {0, 5}),
                      shape + "sequences.queries is empty; it has one element more than there are sequences");
  }
  CHECK(all_outputs(
      [&](const auto& t) { return std::all_of(t.begin(), t.end(), [&](double x) { return x == poison; }); }));
}
