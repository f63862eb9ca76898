// expect: lora: per_row and segments take plain adapters
#include <mlkit/lora.hpp>

void f(mlkit::matrix<float>& x, mlkit::matrix<float>& w, mlkit::vector<float>& magnitude, mlkit::matrix<float>& y) {
  const auto adapter = mlkit::lora::make_adapter<float>({.in = 8, .out = 8, .rank = 2});
  const std::vector<int> ids(8, 0);
#ifdef CORRECT
  const std::vector<mlkit::lora::adapter_view<float>> many{adapter};
#else
  const std::vector<mlkit::lora::dora<float>> many{{adapter, magnitude}};
#endif
  mlkit::lora::linear(mlkit::cpu{}, x, mlkit::lora::dense{w}, mlkit::lora::per_row{many, ids}, y);
  (void)magnitude;
}
