// expect: attention: q, k and v have one type of elements
#include <mlkit/attention.hpp>

#ifdef CORRECT
using type = double;
#else
using type = float;
#endif

void f(mlkit::tensor<type, 4>& q, mlkit::tensor<double, 4>& k, mlkit::tensor<type, 4>& out) {
  mlkit::attention::forward(mlkit::cpu{}, q, k, k, out);
}
