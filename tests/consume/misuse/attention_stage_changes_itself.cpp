// A stage is called through const, from several threads.
// expect: attention: a stage is one of attention's own, or callable as float(float) or float(float, const
// attention::position&)
#include <mlkit/attention.hpp>

struct counted {
  int calls = 0;
#ifdef CORRECT
  float operator()(float s) const { return s; }
#else
  float operator()(float s) { return s + 0.0f * static_cast<float>(++calls); }
#endif
};

void f() {
  const mlkit::attention::scores pipeline{counted{}};
  (void)pipeline;
}
