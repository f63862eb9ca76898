// expect: attention: a pipeline has one bias; add them up beforehand
#include <mlkit/attention.hpp>

void f(mlkit::matrix<float>& a, [[maybe_unused]] mlkit::matrix<float>& b) {
  namespace attention = mlkit::attention;
#ifdef CORRECT
  const attention::scores pipeline{attention::bias{a}, attention::causal{}};
#else
  const attention::scores pipeline{attention::bias{a}, attention::bias{b}};
#endif
  (void)pipeline;
}
