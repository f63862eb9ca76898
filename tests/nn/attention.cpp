// Multi-head attention on a tape against loops in f64; its gradients are checked with all others.
#include <mlkit/nn.hpp>
#include <mlkit/nn/edited_attention.hpp>

#include <catch2/catch.hpp>

namespace attention = mlkit::attention;
namespace nn = mlkit::nn;
using Catch::Matchers::Contains;
using mlkit::index_t;

namespace {

template <class T>
nn::var<T> noise(nn::tape<T>& t, const nn::shape& s, std::uint64_t stream) {
  const nn::var<T> x = t.make(s, {});
  for (index_t i = 0; i < x.size(); ++i)
    x.data()[i] = mlkit::random_stream{9, stream}.normal(static_cast<std::uint64_t>(i));
  return x;
}

// The largest difference from softmax(q k^T / sqrt(d)) v, of the first lengths[b] keys, head by head.
template <class T>
double error(index_t heads, index_t kv_heads, index_t d, index_t d_v, const std::vector<index_t>& lengths) {
  const index_t batch = static_cast<index_t>(lengths.size()), queries = 7, keys = 5;
  nn::tape<T> t(mlkit::cpu{.threads = 2}, {.record = false});
  const auto q = noise(t, {batch, queries, heads * d}, 1), k = noise(t, {batch, keys, kv_heads * d}, 2),
             v = noise(t, {batch, keys, kv_heads * d_v}, 3);
  const auto y = nn::multi_head_attention(q, k, v, heads, attention::scores{attention::key_lengths{lengths}});
  REQUIRE(y.shape() == nn::shape{batch, queries, heads * d_v});
  const auto at = [](const nn::var<T>& x, index_t b, index_t i, index_t column) {
    return static_cast<double>(x.data()[(b * x.shape()[1] + i) * x.columns() + column]);
  };
  double high = 0;
  for (index_t b = 0; b < batch; ++b)
    for (index_t h = 0; h < heads; ++h)
      for (index_t i = 0; i < queries; ++i) {
        const index_t from = h / (heads / kv_heads);
        std::vector<double> p;
        double total = 0;
        for (index_t j = 0; j < lengths[static_cast<std::size_t>(b)]; ++j) {
          double s = 0;
          for (index_t c = 0; c < d; ++c) s += at(q, b, i, h * d + c) * at(k, b, j, from * d + c);
          p.push_back(std::exp(s / std::sqrt(static_cast<double>(d))));
          total += p.back();
        }
        for (index_t c = 0; c < d_v; ++c) {
          double want = 0;
          for (std::size_t j = 0; j < p.size(); ++j)
            want += p[j] / total * at(v, b, static_cast<index_t>(j), from * d_v + c);
          high = std::max(high, std::abs(at(y, b, i, h * d_v + c) - want));
        }
      }
  return high;
}

}  // namespace

TEST_CASE("multi-head attention is softmax(q k^T / sqrt(d)) v in each head", "[nn]") {
  for (const auto& lengths : {std::vector<index_t>{5, 5, 5}, {5, 1, 3}}) {
    CHECK(error<double>(1, 1, 4, 4, lengths) < 1e-12);
    CHECK(error<double>(4, 4, 3, 2, lengths) < 1e-12);
    CHECK(error<double>(4, 2, 3, 5, lengths) < 1e-12);
    CHECK(error<float>(4, 1, 8, 8, lengths) < 2e-6);
  }
}

TEST_CASE("what padding holds does not reach a result or a gradient", "[nn]") {
  const std::vector<index_t> lengths{2, 3};
  const auto run = [&](float padding) {
    nn::parameters<float> store(3);
    auto &pq = store.add("q", {2, 4, 6}, nn::normal{1}), &pk = store.add("k", {2, 3, 6}, nn::normal{1}),
         &pv = store.add("v", {2, 3, 6}, nn::normal{1});
    for (index_t c = 0; c < 6; ++c) pk.value(12 + c) = pv.value(12 + c) = padding;  // the first text's third word
    nn::tape<float> t;
    const auto y = nn::multi_head_attention(t.use(pq), t.use(pk), t.use(pv), 2,
                                            attention::scores{attention::key_lengths{lengths}});
    t.backward(nn::sum(nn::multiply(y, y)));
    std::vector<float> all(y.data(), y.data() + y.size());
    for (const auto* p : {&pq, &pk, &pv}) all.insert(all.end(), p->grad.begin(), p->grad.end());
    return all;
  };
  CHECK(run(NAN) == run(0));
}

TEST_CASE("multi-head attention refuses what does not fit", "[nn]") {
  nn::tape<float> t;
  const auto x = [&](const nn::shape& s) { return noise(t, s, 1); };
  const auto q = x({2, 3, 8});
  CHECK_THROWS_WITH(nn::multi_head_attention(x({6, 8}), q, q, 2), Contains("q has shape [6, 8]"));
  CHECK_THROWS_WITH(nn::multi_head_attention(q, q, x({8}), 2), Contains("v has shape [8]"));
  CHECK_THROWS_WITH(nn::multi_head_attention(q, q, q, 3), Contains("3 heads do not divide the 8 columns of q"));
  CHECK_THROWS_WITH(nn::multi_head_attention(q, q, q, 0), Contains("0 heads"));
  CHECK_THROWS_WITH(nn::multi_head_attention(q, x({2, 3, 6}), q, 2), Contains("k has 6 columns") && Contains("of 4"));
  CHECK_THROWS_WITH(nn::multi_head_attention(q, q, x({2, 3, 7}), 2), Contains("v has 7 columns"));
  CHECK_THROWS_WITH(nn::multi_head_attention(q, x({1, 3, 8}), x({1, 3, 8}), 2), Contains("batches"));
  CHECK_THROWS_WITH(nn::multi_head_attention(q, x({2, 4, 8}), x({2, 5, 8}), 2), Contains("keys"));
  CHECK_THROWS_WITH(nn::multi_head_attention(x({2, 3, 12}), x({2, 3, 8}), x({2, 3, 8}), 3), Contains("heads"));
}

TEST_CASE("edited attention on a tape is attention::edited_cross and edited_self in each head", "[nn]") {
  const std::vector<std::int32_t> source{1, 4, 5, 2}, target{1, 4, 6, 5, 2};
  const attention::edit_plan plan({.steps = 4, .unedited = 1},
                                  {{.words = attention::align_refined(source, target, 5)}});
  nn::tape<double> t(mlkit::cpu{.threads = 2}, {.record = false});
  const auto q = noise(t, {3, 6, 8}, 1), k = noise(t, {3, 5, 4}, 2), v = noise(t, {3, 5, 6}, 3),
             own_k = noise(t, {3, 6, 4}, 4), own_v = noise(t, {3, 6, 6}, 5);
  // Heads of two columns of q and k and of three of v, side by side.
  const auto heads = [](const nn::var<double>& x, mlkit::index_t d) {
    const mlkit::index_t n = x.shape()[1], columns = x.columns();
    return mlkit::tensor_view<double, 4>(x.data(), {3, columns / d, n, d}, {n * columns, d, columns, 1});
  };
  const attention::scores pipeline{attention::scale{0.5}};
  attention::local_blend blend({.height = 2, .width = 3}, 5, {{1}, {2}}), same = blend;
  mlkit::tensor<double, 4> want({3, 4, 6, 3});
  const auto check = [&](const nn::var<double>& y) {
    REQUIRE(y.shape() == nn::shape{3, 6, 12});
    double most = 0;
    for (mlkit::index_t b = 0; b < 3; ++b)
      for (mlkit::index_t h = 0; h < 4; ++h)
        for (mlkit::index_t i = 0; i < 6; ++i)
          for (mlkit::index_t c = 0; c < 3; ++c)
            most = std::max(most, std::abs(heads(y, 3)(b, h, i, c) - want(b, h, i, c)));
    CHECK(most == 0);
  };
  attention::edited_cross(mlkit::cpu{}, heads(q, 2), heads(k, 2), heads(v, 3), pipeline, plan, 1, want, same);
  check(nn::edited_cross_attention(q, k, v, 4, pipeline, plan, 1, &blend));
  check(nn::edited_cross_attention(q, k, v, 4, pipeline, plan, 1));
  for (mlkit::index_t i = 0; i < 12; ++i) CHECK(blend.sums().data[i] == same.sums().data[i]);
  attention::edited_self(mlkit::cpu{}, heads(q, 2), heads(own_k, 2), heads(own_v, 3), pipeline, plan, 0, want);
  check(nn::edited_self_attention(q, own_k, own_v, 4, pipeline, plan, 0));

  CHECK_THROWS_WITH(nn::edited_cross_attention(q, k, v, 3, pipeline, plan, 1),
                    "mlkit::shape_error: nn::edited_cross_attention: 3 heads do not divide the 8 columns of q");
  CHECK_THROWS_WITH(nn::edited_cross_attention(q, own_k, own_v, 4, pipeline, plan, 1),
                    "mlkit::shape_error: attention::edited_cross: k has 6 keys, but plan has 5");
  nn::parameters<double> store(1);
  auto& parameter = store.add("p", {3, 6, 8}, nn::normal{1});
  nn::tape<double> recording;
  const nn::var<double> x = recording.use(parameter);
  CHECK_THROWS_WITH(
      nn::edited_self_attention(x, x, x, 4, pipeline, plan, 0),
      "mlkit::value_error: nn::edited_self_attention: edited attention has no gradient; its tape must not "
      "record");
}
