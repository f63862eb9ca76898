// expect: rl: values and out of whiten have the same rank
#include <mlkit/rl.hpp>

void f(const mlkit::matrix<float>& values, mlkit::matrix<float>& matrix, mlkit::vector<float>& vector) {
#ifdef CORRECT
  auto& out = matrix;
#else
  auto& out = vector;
#endif
  mlkit::rl::whiten(mlkit::cpu{}, values, {}, {}, out);
  (void)matrix, (void)vector;
}
