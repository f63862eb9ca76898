// expect: attention: sinks stand once
#include <mlkit/attention.hpp>

void f(mlkit::vector<float>& a, [[maybe_unused]] mlkit::vector<float>& b) {
  namespace attention = mlkit::attention;
#ifdef CORRECT
  const attention::scores pipeline{attention::sinks{a}, attention::dropout{0.1}};
#else
  const attention::scores pipeline{attention::sinks{a}, attention::sinks{b}};
#endif
  (void)pipeline;
}
