// expect: matmul: f64 operands give f64 outputs only
#include <mlkit/matmul.hpp>

void f(mlkit::matrix<double>& a, mlkit::matrix<double>& b) {
#ifdef CORRECT
  mlkit::matrix<double> c({a.extent(0), b.extent(1)});
#else
  mlkit::matrix<float> c({a.extent(0), b.extent(1)});
#endif
  mlkit::matmul(mlkit::cpu{}, a, b, c);
}
