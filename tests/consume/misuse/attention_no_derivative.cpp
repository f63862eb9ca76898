// expect: attention: backward needs a member `derivative` of each stage of the user's own
#include <mlkit/attention.hpp>

struct halved {
  float operator()(float s) const { return 0.5f * s; }
#ifdef CORRECT
  float derivative(float) const { return 0.5f; }
#endif
};

void f(mlkit::tensor<float, 4>& x, mlkit::tensor<float, 3>& lse, mlkit::tensor<float, 4>& dq,
       mlkit::tensor<float, 4>& dk, mlkit::tensor<float, 4>& dv) {
  namespace attention = mlkit::attention;
  attention::backward(mlkit::cpu{}, x, x, x, attention::scores{halved{}}, x, lse, x, attention::gradients{dq, dk, dv});
}
