// A copy of a tensor is asked for by name.
// expect: deleted
#include <mlkit/core/tensor.hpp>

mlkit::matrix<float> f(const mlkit::matrix<float>& a) {
#ifdef CORRECT
  return a.clone();
#else
  return a;
#endif
}
