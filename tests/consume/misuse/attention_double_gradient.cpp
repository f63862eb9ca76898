// expect: attention: f64 goes with f64 alone: dout and the gradients are f64 where q is, and only there
#include <mlkit/attention.hpp>

#ifdef CORRECT
using type = double;
#else
using type = float;
#endif

void f(mlkit::tensor<type, 4>& x, mlkit::tensor<type, 3>& lse, mlkit::tensor<double, 4>& dout,
       mlkit::tensor<double, 4>& dq, mlkit::tensor<double, 4>& dk, mlkit::tensor<double, 4>& dv) {
  namespace attention = mlkit::attention;
  attention::backward(mlkit::cpu{}, x, x, x, attention::scores<>{}, x, lse, dout, attention::gradients{dq, dk, dv});
}
