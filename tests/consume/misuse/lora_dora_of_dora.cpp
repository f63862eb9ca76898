// expect: lora: dora takes a plain adapter (lora::adapter or lora::adapter_view); DoRA of DoRA
#include <mlkit/lora.hpp>

void f(mlkit::vector<float>& magnitude) {
  const auto adapter = mlkit::lora::make_adapter<float>({.in = 8, .out = 8, .rank = 2});
  const mlkit::lora::dora once{adapter, magnitude};
#ifndef CORRECT
  const mlkit::lora::dora twice{once, magnitude};
#endif
}
