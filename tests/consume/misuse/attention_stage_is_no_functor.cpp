// expect: attention: a stage is one of attention's own, or callable as float(float) or float(float, const
// attention::position&)
#include <mlkit/attention.hpp>

struct halved {
  float factor = 0.5f;
#ifdef CORRECT
  float operator()(float s) const { return factor * s; }
#endif
};

void f() {
  const mlkit::attention::scores pipeline{halved{}};
  (void)pipeline;
}
