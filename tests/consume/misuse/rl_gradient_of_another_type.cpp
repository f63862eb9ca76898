// expect: rl: dlogits has the rank and type of logits
#include <mlkit/rl.hpp>

#ifdef CORRECT
using type = mlkit::bf16;
#else
using type = float;
#endif

void f(const mlkit::matrix<mlkit::bf16>& logits, const std::vector<int>& labels, mlkit::matrix<type>& dlogits) {
  mlkit::rl::cross_entropy(mlkit::cpu{}, logits, labels, {}, dlogits);
}
