// expect: attention: a cache that is not int8 has no scales
#include <mlkit/attention.hpp>

void f(mlkit::tensor<float, 4>& k, [[maybe_unused]] mlkit::tensor<float, 3>& scales) {
  const std::vector<int> lengths{5};
#ifdef CORRECT
  const mlkit::attention::contiguous cache(k, k, lengths);
#else
  const mlkit::attention::contiguous cache(k, k, lengths, scales, scales);
#endif
  (void)cache;
}
