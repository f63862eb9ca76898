// expect: attention: a cache that is appended to needs keys, values and lengths that may be written
#include <mlkit/attention.hpp>

#ifdef CORRECT
using counts = std::vector<int>;
#else
using counts = const std::vector<int>;
#endif

void f(mlkit::tensor<float, 4>& more, mlkit::tensor<float, 4>& k, mlkit::tensor<float, 4>& v, counts& lengths) {
  mlkit::attention::append(mlkit::cpu{}, more, more, mlkit::attention::contiguous(k, v, lengths));
}
