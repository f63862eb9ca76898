// expect: lora: f64 goes with f64 alone: x, base, adapter and outputs are all f64, or none is
#include <mlkit/lora.hpp>

void f(mlkit::matrix<double>& x, mlkit::matrix<double>& w, mlkit::matrix<double>& y) {
#ifdef CORRECT
  const auto adapter = mlkit::lora::make_adapter<double>({.in = 8, .out = 8, .rank = 2});
#else
  const auto adapter = mlkit::lora::make_adapter<float>({.in = 8, .out = 8, .rank = 2});
#endif
  mlkit::lora::linear(mlkit::cpu{}, x, mlkit::lora::dense{w}, adapter, y);
}
