// The fused language-model head in f32: threads, memory, rounding.
#include "head_reference.hpp"

using namespace head_reference;

TEST_CASE("a fused head has the same bits for any number of threads", "[rl][lm_head]") {
  for (const bool accumulate : {false, true}) {
    problem<float> one(200, 210, 700, 13);
    one.accumulate = accumulate;
    one.run(cpu{.threads = 1});
    for (const int threads : {2, 3, 8}) {
      problem<float> p(200, 210, 700, 13);
      p.accumulate = accumulate;
      p.run(cpu{.threads = threads});
      CHECK(p.logp == one.logp);
      CHECK(p.entropy == one.entropy);
      CHECK(p.dhidden == one.dhidden);
      CHECK(p.dweight == one.dweight);
    }
  }
}

TEST_CASE("a fused head in f32", "[rl][lm_head]") {
  for (const bool accumulate : {false, true}) {
    problem<float> p(130, 140, 900, 17);
    p.accumulate = accumulate;
    p.run(cpu{});
    p.require(3e-6, 1e-5);
  }
}

TEST_CASE("a fused head takes little memory", "[rl][lm_head]") {
  problem<float> p(512, 768, 4096, 31);
  p.dlogp.assign(512, -1.0f / 512);
  p.dentropy.assign(512, 0);
  mlkit::reset_workspace_peak();
  p.run(cpu{.threads = 2});
  CHECK(mlkit::workspace_peak_bytes() <
        512 * 50257 * 4 / 20);  // at the vocabulary of GPT-2, on which it does not depend
}
