// expect: attention: a cache that is appended to needs keys, values and lengths that may be written
#include <mlkit/attention.hpp>

#ifdef CORRECT
using keys = mlkit::tensor<float, 4>;
#else
using keys = const mlkit::tensor<float, 4>;
#endif

void f(mlkit::tensor<float, 4>& more, keys& k, mlkit::tensor<float, 4>& v) {
  std::vector<int> lengths{5};
  mlkit::attention::append(mlkit::cpu{}, more, more, mlkit::attention::contiguous(k, v, lengths));
}
