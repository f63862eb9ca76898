// expect: an output must be a view of mutable elements
#include <mlkit/rl.hpp>

void f(const mlkit::matrix<float>& advantages, mlkit::matrix<float>& out) {
#ifdef CORRECT
  auto& output = out;
#else
  const auto& output = out;
#endif
  mlkit::rl::whiten(mlkit::cpu{}, advantages, {}, {}, output);
}
