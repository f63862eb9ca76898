// expect: attention: a cache of int8 needs the scales of its keys and values
#include <mlkit/attention.hpp>

void f(const mlkit::tensor_view<std::int8_t, 4>& codes, const mlkit::matrix_view<const std::int32_t>& table,
       [[maybe_unused]] mlkit::tensor<float, 3>& scales) {
  const std::vector<int> lengths{5};
#ifdef CORRECT
  const mlkit::attention::paged cache(codes, codes, table, lengths, scales, scales);
#else
  const mlkit::attention::paged cache(codes, codes, table, lengths);
#endif
  (void)cache;
}
