// expect: rl: advantages are float or double
#include <mlkit/rl.hpp>

#ifdef CORRECT
using type = float;
#else
using type = mlkit::bf16;  // a sum of a thousand steps needs more bits
#endif

void f(const mlkit::matrix<type>& rewards, const mlkit::vector<type>& next, mlkit::matrix<type>& out) {
  mlkit::rl::gae<type>(mlkit::cpu{}, {.rewards = rewards, .values = rewards, .bootstrap = next}, {},
                       {.advantages = out});
}
