// expect: attention: f64 goes with f64 alone: q, k, v and out are all f64, or none is
#include <mlkit/attention.hpp>

#ifdef CORRECT
using type = double;
#else
using type = float;
#endif

void f(mlkit::tensor<type, 4>& x, mlkit::tensor<double, 4>& out) {
  mlkit::attention::forward(mlkit::cpu{}, x, x, x, out);
}
