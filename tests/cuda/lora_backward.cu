// lora::linear_backward with a weight in memory, and what the options keep and draw.
#include "lora_support.hpp"

namespace {

constexpr shape shapes[] = {{1, 64, 48, 4}, {5, 37, 70, 3}, {33, 100, 130, 12}, {40, 64, 48, 8}, {130, 136, 72, 8}};

// The mask, word by word as its definition says.
mat mask_of(index_t rows, index_t cols, double p, std::uint64_t seed, std::uint64_t stream) {
  const mlkit::random_stream random{seed, stream};
  mat m(rows, cols);
  for (index_t i = 0; i < rows * cols; ++i)
    m.v[static_cast<std::size_t>(i)] =
        random.bits(static_cast<std::uint64_t>(i)) >= static_cast<std::uint32_t>(p * 0x1p32) ? 1 / (1 - p) : 0;
  return m;
}

}  // namespace

TEMPLATE_TEST_CASE("linear_backward gives da, db and dx on every executor", "[lora][cuda]", float, double, bf16) {
  using A = mlkit::accumulator_t<TestType>;
  for (const shape& s : shapes) {
    INFO(s);
    layer<TestType> l(s.tokens, s.in, s.out, s.rank);
    auto da = l.template result<A>(s.rank, s.in), db = l.template result<A>(s.out, s.rank);
    auto dx = l.result(s.tokens, s.in);
    lora::linear_backward(l.exec, l.x.view(), l.base(), l.adapter(), l.dy.view(), lora::gradients{da.view(), db.view()},
                          dx.view());
    CHECK(difference(l.read(da), l.da()) < tolerance<TestType>());
    CHECK(difference(l.read(db), l.db()) < tolerance<TestType>());
    CHECK(difference(l.read(dx), l.dx()) < tolerance<TestType>());
    lora::linear_backward(l.exec, l.base(), l.dy.view(), dx.view());
    CHECK(difference(l.read(dx), multiply(l.dy.values, l.w.values)) < tolerance<TestType>());
  }
}

TEMPLATE_TEST_CASE("a saved h, gradients that add, and no dx agree with the plain call on every executor",
                   "[lora][cuda]", float, bf16) {
  layer<TestType> l(21, 48, 40, 6);
  auto da = l.template result<float>(6, 48), db = l.template result<float>(40, 6), h = l.template result<float>(21, 6);
  auto y = l.result(21, 40), dx = l.result(21, 48);
  lora::linear(l.exec, l.x.view(), l.base(), l.adapter(), y.view(), {.h = h.view()});
  const mat want_h = scaled(multiply(l.x.values, transpose(l.a.values)), l.scale);
  CHECK(difference(l.read(y), l.y()) < tolerance<TestType>());
  CHECK(difference(l.read(h), want_h) < tolerance<TestType>());
  lora::linear_backward(l.exec, l.x.view(), l.base(), l.adapter(), l.dy.view(), lora::gradients{da.view(), db.view()},
                        dx.view(), {.h = h.view()});
  CHECK(difference(l.read(da), l.da()) < tolerance<TestType>());
  CHECK(difference(l.read(db), l.db()) < tolerance<TestType>());
  CHECK(difference(l.read(dx), l.dx()) < tolerance<TestType>());
  mlkit::matrix_view<TestType> no_dx;
  lora::linear_backward(l.exec, l.x.view(), l.base(), l.adapter(), l.dy.view(), lora::gradients{da.view(), db.view()},
                        no_dx, {.accumulate = true});
  CHECK(difference(l.read(da), scaled(l.da(), 2)) < tolerance<TestType>());
  CHECK(difference(l.read(db), scaled(l.db(), 2)) < tolerance<TestType>());
}

TEST_CASE("dropout draws the mask of its definition on every executor", "[lora][cuda]") {
  layer<float> l(19, 50, 40, 6);
  const mat mask = mask_of(19, 50, 0.3, 7, 3);
  const mat dropped = times(l.x.values, mask);
  const lora::linear_options<float> options{.dropout = 0.3, .seed = 7, .stream = 3};
  auto y = l.result(19, 40);
  lora::linear(l.exec, l.x.view(), l.base(), l.adapter(), y.view(), options);
  const mat h = scaled(multiply(dropped, transpose(l.a.values)), l.scale);
  CHECK(difference(l.read(y), l.with_bias(add(multiply(l.x.values, transpose(l.w.values)),
                                              multiply(h, transpose(l.b.values))))) < 3e-6);
  auto da = l.result<float>(6, 50), db = l.result<float>(40, 6), dx = l.result(19, 50);
  lora::linear_backward(l.exec, l.x.view(), l.base(), l.adapter(), l.dy.view(), lora::gradients{da.view(), db.view()},
                        dx.view(), options);
  const mat g = scaled(multiply(l.dy.values, l.b.values), l.scale);
  CHECK(difference(l.read(da), multiply(transpose(g), dropped)) < 3e-6);
  CHECK(difference(l.read(db), multiply(transpose(l.dy.values), h)) < 3e-6);
  CHECK(difference(l.read(dx), add(multiply(l.dy.values, l.w.values), times(multiply(g, l.a.values), mask))) < 3e-6);
}

TEST_CASE("without tokens y is empty and gradients are 0, or stay as they are, on every executor", "[lora][cuda]") {
  layer<float> l(0, 8, 6, 2);
  auto y = l.result(0, 6), dx = l.result(0, 8), da = l.result(2, 8), db = l.result(6, 2);
  lora::linear(l.exec, l.x.view(), l.base(), l.adapter(), y.view());
  lora::linear_backward(l.exec, l.x.view(), l.base(), l.adapter(), l.dy.view(), lora::gradients{da.view(), db.view()},
                        dx.view());
  CHECK(same_bits(l.read(da), mat(2, 8)));
  CHECK(same_bits(l.read(db), mat(6, 2)));
}
