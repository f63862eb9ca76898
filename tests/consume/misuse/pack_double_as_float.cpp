// expect: pack: f64 is packed as f64, and nothing else is
#include <mlkit/matmul.hpp>

void f(mlkit::matrix<double>& b) {
#ifdef CORRECT
  mlkit::pack(mlkit::cpu{}, b);
#else
  mlkit::pack<float>(mlkit::cpu{}, b);
#endif
}
