// Adapters merged into a weight and taken out of it.
#include "lora/layer.hpp"

TEMPLATE_TEST_CASE("merge and unmerge, on every executor", "[lora][cuda]", float, double, bf16) {
  for (const shape& s : {shape{1, 64, 40, 4}, shape{1, 37, 21, 3}, shape{1, 328, 256, 16}}) {
    INFO(s);
    layer<TestType> l(s.tokens, s.in, s.out, s.rank);
    const mat update = multiply(l.b.values, l.a.values);
    lora::merge(l.exec, l.w.view(), l.adapter(), {.weight = 0.7});
    CHECK(difference(l.read(l.w), add(l.w.values, update, 0.7 * l.scale)) < tolerance<TestType>());
    lora::unmerge(l.exec, l.w.view(), l.adapter(), {.weight = 0.7});
    CHECK(difference(l.read(l.w), l.w.values) < tolerance<TestType>());
    const mat before = l.read(l.w);
    const std::vector<lora::adapter_view<TestType>> both = {l.adapter(), l.adapter().scaled(2)};
    lora::merge(l.exec, l.w.view(), both, std::vector<double>{1.0, -0.25});
    CHECK(difference(l.read(l.w), add(before, update, 0.5 * l.scale)) < tolerance<TestType>());
  }
}

TEMPLATE_TEST_CASE("dora merges by its factors, on every executor", "[lora][cuda]", float, bf16) {
  layer<TestType> l(1, 64, 40, 4);
  auto magnitude_values = normal_vector<TestType>(40, 8, 0.2f, 1.5f);
  auto magnitude = test::on_device(l.exec, magnitude_values);
  const auto norms = lora::adapted_norms(l.exec, l.base(), l.adapter());
  const lora::dora adapter{l.adapter(), magnitude.view(), norms};
  mat want = l.merged();
  for (index_t i = 0; i < 40; ++i) {
    double square = 0;
    for (index_t k = 0; k < 64; ++k) square += want(i, k) * want(i, k);
    for (index_t k = 0; k < 64; ++k) want(i, k) *= static_cast<double>(magnitude_values(i)) / std::sqrt(square);
  }
  lora::merge(l.exec, l.w.view(), adapter);
  CHECK(difference(l.read(l.w), want) < tolerance<TestType>());
  lora::unmerge(l.exec, l.w.view(), adapter);
  CHECK(difference(l.read(l.w), l.w.values) < tolerance<TestType>());
}
