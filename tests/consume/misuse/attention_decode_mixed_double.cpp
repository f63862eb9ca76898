// expect: attention: f64 goes with f64 alone: q and the cache are both f64, or neither is
#include <mlkit/attention.hpp>

#ifdef CORRECT
using type = float;
#else
using type = double;
#endif

void f(mlkit::tensor<float, 3>& q, mlkit::tensor<type, 4>& k, mlkit::tensor<float, 3>& out) {
  namespace attention = mlkit::attention;
  const std::vector<int> lengths(2, 5);
  attention::decode(mlkit::cpu{}, q, attention::contiguous{k, k, lengths}, out);
}
