// expect: attention: lse is of the type of sums: f64 for f64, f32 for all others
#include <mlkit/attention.hpp>

#ifdef CORRECT
using type = float;
#else
using type = double;
#endif

void f(mlkit::tensor<mlkit::bf16, 4>& x, mlkit::tensor<mlkit::bf16, 4>& out, mlkit::tensor<type, 3>& lse) {
  namespace attention = mlkit::attention;
  attention::forward(mlkit::cpu{}, x, x, x, attention::scores<>{}, out, lse);
}
