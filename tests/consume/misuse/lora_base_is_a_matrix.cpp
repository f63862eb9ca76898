// A weight is named as what it is: dense, nf4, int8.
// expect: constraints not satisfied|no matching function
// expect: linear_base
#include <mlkit/lora.hpp>

void f(mlkit::matrix<float>& x, mlkit::matrix<float>& w, mlkit::matrix<float>& y) {
  const auto adapter = mlkit::lora::make_adapter<float>({.in = 8, .out = 8, .rank = 2});
#ifdef CORRECT
  mlkit::lora::linear(mlkit::cpu{}, x, mlkit::lora::dense{w}, adapter, y);
#else
  mlkit::lora::linear(mlkit::cpu{}, x, w, adapter, y);
#endif
}
