// A product takes matrices; which argument is none is said by the constraint.
// expect: constraints not satisfied|no matching function
// expect: matmul_operand
#include <mlkit/matmul.hpp>

void f(mlkit::matrix<float>& a, [[maybe_unused]] mlkit::vector<float>& x, mlkit::matrix<float>& c) {
#ifdef CORRECT
  mlkit::matmul(mlkit::cpu{}, a, a, c);
#else
  mlkit::matmul(mlkit::cpu{}, a, x, c);
#endif
}
