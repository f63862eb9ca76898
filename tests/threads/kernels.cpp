// Products, adapted layers and attention.
#include <mlkit/attention.hpp>
#include <mlkit/lora.hpp>
#include <mlkit/matmul.hpp>

#include "calls.hpp"

namespace attention = mlkit::attention;
namespace lora = mlkit::lora;

namespace {

struct layer {
  index_t tokens, in, out, rank;
  matrix<float> x = noise(tokens, in, 1), w = noise(out, in, 2), a = noise(rank, in, 3), b = noise(out, rank, 4),
                dy = noise(tokens, out, 5);
  mlkit::vector<float> magnitude = [this] {
    mlkit::vector<float> m({out});
    std::fill(m.begin(), m.end(), 2.0f);
    return m;
  }();

  lora::adapter_view<float> adapter() const { return {a, b, 0.5}; }
};

const layer wide{260, 192, 320, 12};

}  // namespace

TEST_CASE("products, blocked and thin, packed, batched and grouped", "[threads]") {
  struct shape {
    index_t m, n, k;
  };
  for (const shape& s :
       {shape{203, 331, 260}, shape{40, 2000, 300}, shape{5, 2100, 700}, shape{3001, 9, 400}, shape{1, 2048, 1024}}) {
    const matrix<float> a = noise(s.m, s.k, 1), b = noise(s.k, s.n, 2);
    check([&](const cpu& exec) {
      outputs all;
      matrix<float> c({s.m, s.n});
      mlkit::matmul(exec, a, b, c, mlkit::epilogue{mlkit::relu{}});
      append(all, c);
      mlkit::matmul(exec, a, mlkit::pack(exec, b), c);
      append(all, c);
      return all;
    });
  }
  check([](const cpu& exec) {
    mlkit::tensor<float, 3> a({6, 90, 70}), b({6, 70, 110}), c({6, 90, 110});
    for (auto* t : {&a, &b})
      for (index_t i = 0; i < t->size(); ++i) t->data()[i] = static_cast<float>(i % 13) - 6;
    mlkit::matmul(exec, a, b, c);
    return outputs(c.begin(), c.end());
  });
}

TEST_CASE("adapted layers, forward and backward", "[threads]") {
  const layer& l = wide;
  check([&](const cpu& exec) {
    outputs all;
    matrix<float> y({l.tokens, l.out}), dx({l.tokens, l.in}), da({l.rank, l.in}), db({l.out, l.rank});
    mlkit::vector<float> dm({l.out});
    const lora::linear_options<float> options{.dropout = 0.2, .seed = 3};
    lora::linear(exec, l.x, lora::dense{l.w}, l.adapter(), y, options);
    append(all, y);
    lora::linear_backward(exec, l.x, lora::dense{l.w}, l.adapter(), l.dy, lora::gradients{da, db}, dx, options);
    for (const auto* t : {&da, &db, &dx}) append(all, *t);
    const lora::dora dora{l.adapter(), l.magnitude};
    lora::linear(exec, l.x, lora::dense{l.w}, dora, y);
    append(all, y);
    lora::linear_backward(exec, l.x, lora::dense{l.w}, dora, l.dy, lora::gradients{da, db, dm}, dx);
    for (const auto* t : {&da, &db, &dx}) append(all, *t);
    append(all, dm);
    return all;
  });
}

TEST_CASE("many adapters, quantised weights, merging", "[threads]") {
  const layer& l = wide;
  check([&](const cpu& exec) {
    outputs all;
    matrix<float> y({l.tokens, l.out}), merged = l.w.clone();
    const std::vector<lora::adapter_view<float>> adapters{l.adapter(), l.adapter().scaled(2), l.adapter().scaled(-1)};
    std::vector<int> ids(static_cast<std::size_t>(l.tokens));
    for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int>(i * 7 % 4) - 1;
    lora::linear(exec, l.x, lora::dense{l.w}, lora::per_row{adapters, ids}, y);
    append(all, y);
    const auto stored = lora::quantise_nf4(exec, l.w, {.double_quantise = true});
    lora::linear(exec, l.x, lora::nf4{stored}, l.adapter(), y);
    append(all, y);
    lora::merge(exec, merged, l.adapter());
    append(all, merged);
    return all;
  });
}

TEST_CASE("attention, forward and backward, a batch and one head, and packed", "[threads]") {
  struct shape {
    index_t batch, heads, queries;
  };
  for (const shape& s : {shape{3, 2, 130}, shape{1, 1, 2100}}) {
    const index_t keys = 100, d = 20;
    const auto q = noise(std::array{s.batch, s.heads, s.queries, d}, 1), dout = noise(q.extents(), 4),
               k = noise(std::array{s.batch, index_t{1}, keys, d}, 2), v = noise(k.extents(), 3),
               bias = noise(std::array{index_t{1}, s.heads, index_t{1}, keys}, 5);
    const auto logits = noise(std::array{s.heads}, 6);
    check([&](const cpu& exec) {
      const attention::scores pipeline{attention::bias{bias}, attention::causal{attention::align::top_left},
                                       attention::sinks{logits}, attention::dropout{.p = 0.1}};
      mlkit::tensor<float, 4> out(q.extents()), dq(q.extents()), dk(k.extents()), dv(v.extents()), db(bias.extents());
      mlkit::tensor<float, 3> lse({s.batch, s.heads, s.queries});
      mlkit::vector<float> ds({s.heads});
      attention::forward(exec, q, k, v, pipeline, out, lse);
      attention::gradients gradients{dq, dk, dv, db};
      gradients.dsinks = ds.view();
      attention::backward(exec, q, k, v, pipeline, out, lse, dout, gradients);
      outputs all;
      for (const auto* t : {&out, &dq, &dk, &dv, &db}) append(all, *t);
      append(all, lse), append(all, ds);
      return all;
    });
  }
  const auto q = noise(std::array<index_t, 3>{500, 2, 20}, 1), k = noise(std::array<index_t, 3>{500, 1, 20}, 2);
  const std::vector<std::int32_t> starts{0, 300, 301, 500};
  check([&](const cpu& exec) {
    mlkit::tensor<float, 3> out(q.extents()), dq(q.extents()), dk(k.extents()), dv(k.extents());
    matrix<float> lse({2, 500});
    const attention::sequences packed(starts);
    const attention::scores<> pipeline;
    attention::forward(exec, q, k, k, packed, pipeline, out, lse);
    attention::backward(exec, q, k, k, packed, pipeline, out, lse, q, dq, dk, dv);
    outputs all;
    for (const auto* t : {&out, &dq, &dk, &dv}) append(all, *t);
    return all;
  });
}

TEST_CASE("rotary embedding, appending to caches, decoding, merging", "[threads]") {
  const index_t batch = 2, kv = 2, capacity = 1300, d = 40;
  const auto x = noise(std::array{batch, kv, index_t{1200}, d}, 1);
  const auto q = noise(std::array{batch, 2 * kv, d}, 2);
  const attention::rotary_table<float> table({.positions = 1200, .d = d});
  check([&](const cpu& exec) {
    mlkit::tensor<float, 4> k({batch, kv, capacity, d}), v({batch, kv, capacity, d}), turned(x.extents());
    mlkit::tensor<float, 3> out({batch, 2 * kv, d});
    matrix<float> lse({batch, 2 * kv});
    std::vector<int> lengths{0, 100};
    const attention::contiguous cache(k, v, lengths);
    attention::rotate(exec, x, table, turned);
    attention::append(exec, turned, x, cache);
    attention::decode(exec, q, cache, out, {}, lse);
    mlkit::tensor<float, 4> merged({batch, 2 * kv, 1, d});
    mlkit::tensor<float, 3> merged_lse({batch, 2 * kv, 1});
    attention::merge(exec, merged, merged_lse, mlkit::tensor_view<float, 4>(out.data(), merged.extents()),
                     mlkit::tensor_view<float, 3>(lse.data(), merged_lse.extents()));
    outputs all;
    for (const auto* t : {&k, &v, &merged}) append(all, *t);
    append(all, merged_lse);
    return all;
  });
}
