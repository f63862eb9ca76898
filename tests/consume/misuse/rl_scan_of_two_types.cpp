// expect: rl: affine_scan's inputs have one type, which affine_scan<double> names where it is not float
#include <mlkit/rl.hpp>

void f(const mlkit::matrix<double>& rewards, mlkit::matrix<float>& out32, mlkit::matrix<double>& out64) {
  const auto map = [](auto r) { return mlkit::rl::affine<decltype(r)>{0, r}; };
#ifdef CORRECT
  mlkit::rl::affine_scan<double>(mlkit::cpu{}, map, {}, out64, rewards);
#else
  mlkit::rl::affine_scan(mlkit::cpu{}, map, {}, out32, rewards);
#endif
  (void)out32, (void)out64;
}
