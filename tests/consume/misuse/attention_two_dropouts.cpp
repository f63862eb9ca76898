// expect: attention: dropout stands once
#include <mlkit/attention.hpp>

void f() {
  namespace attention = mlkit::attention;
#ifdef CORRECT
  const attention::scores pipeline{attention::causal{}, attention::dropout{0.2}};
#else
  const attention::scores pipeline{attention::causal{}, attention::dropout{0.1}, attention::dropout{0.1}};
#endif
  (void)pipeline;
}
