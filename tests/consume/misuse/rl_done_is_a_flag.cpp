// expect: rl: the last argument is done_ends{} or done_begins{}
#include <mlkit/rl.hpp>

void f(const mlkit::rl::rollout<float>& steps, mlkit::matrix<float>& out) {
#ifdef CORRECT
  const mlkit::rl::done_begins begins;
#else
  const bool begins = true;
#endif
  mlkit::rl::gae(mlkit::cpu{}, steps, {}, {.advantages = out}, begins);
}
