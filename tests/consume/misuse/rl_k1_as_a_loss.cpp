// expect: rl: the gradient of k1 as a loss averages to nothing; take with_kl_gradient<k1>, k2 or k3
#include <mlkit/rl.hpp>

#ifdef CORRECT
using estimator = mlkit::rl::with_kl_gradient<mlkit::rl::k1>;
#else
using estimator = mlkit::rl::k1;  // of every sample the derivative is 1
#endif

void f(const mlkit::rl::kl_batch<float>& tokens, mlkit::matrix<float>& gradient) {
  mlkit::rl::kl_loss(mlkit::cpu{}, tokens, {}, estimator{}, gradient);
}
