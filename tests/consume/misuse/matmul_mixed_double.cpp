// expect: matmul: f64 operands multiply f64 operands only; convert one of them
#include <mlkit/matmul.hpp>

void f(mlkit::matrix<float>& a, mlkit::matrix<float>& single, [[maybe_unused]] mlkit::matrix<double>& b,
       mlkit::matrix<float>& c) {
#ifdef CORRECT
  mlkit::matmul(mlkit::cpu{}, a, single, c);
#else
  mlkit::matmul(mlkit::cpu{}, a, b, c);
#endif
}
