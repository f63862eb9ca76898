// Products and adapted layers.
#include <mlkit/lora.hpp>
#include <mlkit/matmul.hpp>

#include "calls.hpp"

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
