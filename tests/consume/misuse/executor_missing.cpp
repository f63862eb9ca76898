// expect: constraints not satisfied|no matching function
// expect: executor
#include <mlkit/matmul.hpp>

void f(mlkit::matrix<float>& a, mlkit::matrix<float>& b, mlkit::matrix<float>& c) {
#ifdef CORRECT
  mlkit::matmul(mlkit::cpu{}, a, b, c);
#else
  mlkit::matmul(2, a, b, c);  // a number of threads is cpu{.threads = 2}
#endif
}
