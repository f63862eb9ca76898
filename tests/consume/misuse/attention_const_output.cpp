// expect: an output must be a view of mutable elements
#include <mlkit/attention.hpp>

void f(mlkit::tensor<float, 4>& x, mlkit::tensor<float, 4>& out) {
#ifdef CORRECT
  auto& output = out;
#else
  const auto& output = out;
#endif
  mlkit::attention::forward(mlkit::cpu{}, x, x, x, output);
}
