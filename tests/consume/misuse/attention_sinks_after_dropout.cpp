// expect: attention: sinks and dropout are of the softmax, not of a score: they stand last, dropout after sinks
#include <mlkit/attention.hpp>

void f(mlkit::vector<float>& logits) {
  namespace attention = mlkit::attention;
#ifdef CORRECT
  const attention::scores pipeline{attention::sinks{logits}, attention::dropout{0.1}};
#else
  const attention::scores pipeline{attention::dropout{0.1}, attention::sinks{logits}};
#endif
  (void)pipeline;
}
