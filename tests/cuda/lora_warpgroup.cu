// lora::linear for many tokens by Hopper's warpgroups: tiles that reach past the ends of y, and depths that fill no
// step.
#include "lora/layer.hpp"

TEMPLATE_TEST_CASE("linear for many tokens, on every executor", "[lora][cuda]", bf16, f16) {
  for (const shape& s : {shape{600, 512, 248, 16}, shape{620, 648, 256, 40}}) {
    INFO(s);
    layer<TestType> l(s.tokens, s.in, s.out, s.rank);
    auto y = l.result(s.tokens, s.out);
    lora::linear(l.exec, l.x.view(), l.base(), l.adapter(), y.view());
    CHECK(difference(l.read(y), l.y()) < tolerance<TestType>());
    lora::linear(l.exec, l.x.view(), l.base(), y.view());
    CHECK(difference(l.read(y), l.with_bias(multiply(l.x.values, transpose(l.w.values)))) < tolerance<TestType>());
    const auto magnitude = normal_vector<TestType>(s.out, 8, 0.2f, 1.5f);
    mlkit::vector<float> ones({s.out});
    std::vector<double> factors;
    for (index_t i = 0; i < s.out; ++i) {
      ones.data()[i] = 2;
      factors.push_back(static_cast<double>(magnitude(i)) / 2);
    }
    auto m = test::on_device(l.exec, magnitude);
    auto norms = test::on_device(l.exec, ones);
    lora::dora adapter{l.adapter(), m.view()};
    adapter.norms = norms.view();
    lora::linear(l.exec, l.x.view(), l.base(), adapter, y.view());
    CHECK(difference(l.read(y), l.with_bias(scale_columns(multiply(l.x.values, transpose(l.merged())), factors))) <
          tolerance<TestType>());
  }
}
