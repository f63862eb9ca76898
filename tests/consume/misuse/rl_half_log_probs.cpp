// expect: rl: log-probabilities are of the type of sums: f64 for f64, f32 for all others
#include <mlkit/rl.hpp>

#ifdef CORRECT
using type = float;
#else
using type = mlkit::bf16;  // what the ratio of two policies is made of is not rounded to 8 bits
#endif

void f(const mlkit::matrix<mlkit::bf16>& logits, const std::vector<int>& tokens, mlkit::vector<type>& logp) {
  mlkit::rl::log_probs(mlkit::cpu{}, logits, tokens, {}, logp);
}
