// expect: constraints not satisfied
#include <mlkit/rl.hpp>

struct term {
#ifdef CORRECT
  template <class A>
  mlkit::rl::policy_token<A> operator()(A ratio, A advantage, A) const {
    return {-advantage * ratio, -advantage * ratio, false};
  }
#else
  template <class A>
  A operator()(A ratio, A advantage, A) const {  // a loss without its derivative
    return -advantage * ratio;
  }
#endif
};

void f(const mlkit::rl::policy_batch<float>& batch, mlkit::matrix<float>& gradient) {
  mlkit::rl::policy_loss(mlkit::cpu{}, batch, term{}, mlkit::rl::token_mean{}, {}, {.log_probs = gradient});
}
