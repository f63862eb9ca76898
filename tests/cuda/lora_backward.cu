// lora::linear_backward with a weight in memory, and what the options keep and draw.
#include "lora/linear_cases.hpp"

TEMPLATE_TEST_CASE("linear_backward gives da, db and dx on every executor", "[lora][cuda]", float, double, bf16) {
  for (const shape& s : {shape{1, 64, 48, 4}, shape{5, 37, 70, 3}, shape{33, 100, 130, 12}, shape{40, 64, 48, 8},
                         shape{130, 136, 72, 8}})
    linear_cases::check_backward<TestType>(s);
}

TEMPLATE_TEST_CASE("a saved h, gradients that add, and no dx agree with the plain call on every executor",
                   "[lora][cuda]", float, bf16) {
  linear_cases::check_saved_h<TestType>({21, 48, 40, 6});
}

TEMPLATE_TEST_CASE("dropout draws the mask of its definition on every executor", "[lora][cuda]", float, bf16) {
  linear_cases::check_dropout<TestType>({19, 50, 40, 6}, 3);
}

TEST_CASE("without tokens y is empty and gradients are 0, or stay as they are, on every executor", "[lora][cuda]") {
  const layer<float> l(0, 8, 6, 2);
  linear_cases::gradients_of<float> d(l);
  auto y = l.result(0, 6);
  lora::linear(l.exec, l.x, l.base(), l.adapter(), y);
  lora::linear_backward(l.exec, l.x, l.base(), l.adapter(), l.dy, d.both(), d.dx, {.accumulate = true});
  for (const double v : l.read(d.da).v) CHECK(std::isnan(v));
  lora::linear_backward(l.exec, l.x, l.base(), l.adapter(), l.dy, d.both(), d.dx);
  CHECK(same_bits(l.read(d.da), mat(2, 8)));
  CHECK(same_bits(l.read(d.db), mat(6, 2)));
}
