// The fused language-model head in bf16.
#include "head_reference.hpp"

using namespace head_reference;

TEST_CASE("a fused head of bf16", "[rl][lm_head]") {
  // Sums are f32 and values are not rounded; gradients are, to bf16, and so is dz on its way into them.
  for (const bool accumulate : {false, true}) {
    problem<mlkit::bf16> p(130, 140, 900, 17);
    p.accumulate = accumulate;
    p.run(cpu{});
    p.require(1e-5, 0.03);
  }
}
