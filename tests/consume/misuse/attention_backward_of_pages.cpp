// expect: attention: a cache has no backward
#include <mlkit/attention.hpp>

void f(mlkit::tensor<float, 4>& x, mlkit::tensor<float, 3>& lse,
       [[maybe_unused]] const mlkit::matrix_view<const std::int32_t>& table) {
  namespace attention = mlkit::attention;
#ifdef CORRECT
  const auto& k = x;
#else
  const std::vector<int> lengths{5};
  const attention::paged k(x, x, table, lengths);
#endif
  attention::backward(mlkit::cpu{}, x, k, k, attention::scores<>{}, x, lse, x, attention::gradients{x, x, x});
}
