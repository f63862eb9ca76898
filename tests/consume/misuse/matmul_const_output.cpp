// expect: an output must be a view of mutable elements
#include <mlkit/matmul.hpp>

void f(mlkit::matrix<float>& a, mlkit::matrix<float>& b, mlkit::matrix<float>& c) {
#ifdef CORRECT
  mlkit::matmul(mlkit::cpu{}, a, b, c);
#else
  const mlkit::matrix<float>& output = c;
  mlkit::matmul(mlkit::cpu{}, a, b, output);
#endif
}
