// expect: attention: a bias, boolean_mask, documents, block_sparse or key_lengths is made for one shape of scores
#include <mlkit/attention.hpp>

void f(mlkit::tensor<float, 3>& x, [[maybe_unused]] mlkit::matrix<float>& bias, mlkit::matrix<float>& lse,
       mlkit::tensor<float, 3>& out) {
  namespace attention = mlkit::attention;
  const std::vector<std::int32_t> starts{0, 5};
#ifdef CORRECT
  const attention::scores pipeline{attention::causal{}};
#else
  const attention::scores pipeline{attention::bias{bias}};
#endif
  attention::forward(mlkit::cpu{}, x, x, x, attention::sequences{starts}, pipeline, out, lse);
}
