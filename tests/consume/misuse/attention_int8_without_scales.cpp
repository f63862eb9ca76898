// expect: attention: a cache of int8 needs the scales of its keys and values
#include <mlkit/attention.hpp>

void f(const mlkit::tensor_view<std::int8_t, 4>& codes, [[maybe_unused]] mlkit::tensor<float, 3>& scales) {
  const std::vector<int> lengths{5};
#ifdef CORRECT
  const mlkit::attention::contiguous cache(codes, codes, lengths, scales, scales);
#else
  const mlkit::attention::contiguous cache(codes, codes, lengths);
#endif
  (void)cache;
}
