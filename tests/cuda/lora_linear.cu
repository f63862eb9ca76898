// lora::linear with a weight in memory: forward, for few tokens and for many, aligned and not.
#include "lora_support.hpp"

namespace {

// Decoding steps of all row counts, ranks that fill no vector, shapes that libraries and tensor cores take, and odd
// ones.
constexpr shape shapes[] = {{1, 64, 48, 4},     {3, 256, 33, 16},   {9, 128, 40, 5},  {16, 320, 31, 24},
                            {5, 37, 70, 3},     {33, 100, 130, 12}, {40, 64, 48, 8},  {130, 136, 72, 8},
                            {70, 136, 120, 33}, {2, 1, 1, 1},       {20, 96, 140, 70}};

}  // namespace

TEMPLATE_TEST_CASE("linear computes x W^T + b + s (x A^T) B^T on every executor", "[lora][cuda]", float, double, bf16,
                   f16) {
  for (const shape& s : shapes) {
    INFO(s);
    layer<TestType> l(s.tokens, s.in, s.out, s.rank);
    auto y = l.result(s.tokens, s.out);
    lora::linear(l.exec, l.x.view(), l.base(), l.adapter(), y.view());
    CHECK(difference(l.read(y), l.y()) < tolerance<TestType>());
    lora::linear(l.exec, l.x.view(), l.base(), y.view());
    CHECK(difference(l.read(y), l.with_bias(multiply(l.x.values, transpose(l.w.values)))) < tolerance<TestType>());
  }
}
