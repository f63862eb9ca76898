// The gradient of a bias that is larger than caches, whose rows lie across cache lines.
#include "reference.hpp"

namespace attention = mlkit::attention;
using namespace attention_reference;

namespace {

constexpr index_t heads = 3, queries = 257, keys = 2777, far = attention::window::unlimited;

}  // namespace

TEMPLATE_TEST_CASE("the gradient of a bias that caches do not hold", "[attention][bias]", float, mlkit::bf16) {
  using T = TestType;
  const index_t d = GENERATE(0, 9), d_v = 7;
  const bool causal = GENERATE(false, true);
  INFO("d " << d << (causal ? ", causal" : ", all keys"));
  problem<T> p(1, heads, 1, queries, keys, d, d_v);
  mlkit::tensor<T, 4> bias({1, heads, queries, keys});
  fill<T>(bias, 6);
  const attention::scores scores{attention::scale{0.3}, attention::bias{bias},
                                 attention::window{far, causal ? 0 : far, attention::align::top_left}};
  meaning m;
  m.score = [&](double x, index_t, index_t h, index_t i, index_t j) {
    return causal && j > i ? -inf : 0.3 * x + static_cast<double>(bias(0, h, i, j));
  };
  m.derivative = [](double, index_t, index_t, index_t, index_t) { return 0.3; };
  p.run(scores, {.threads = 3});
  REQUIRE(p.dbias.size() * index_t{sizeof(T)} > attention::detail::cached_bytes);
  const result want = p.template naive<double, double>(m);
  const errors ours(want, p.written());
  const errors loops(want, p.template naive<float, T>(m));
  for (std::size_t r = 0; r < 7; ++r) {
    INFO(result::names[r] << " of size " << ours.size[r]);
    // Probabilities come from lse, which is between 8 and 16: its last place is 16 roundings of f32.
    CHECK(ours.error[r] <= 2 * loops.error[r] + (rounding<T> + 16 * 0x1p-24) * ours.size[r]);
  }

  for (const bool columns_together : {true, false}) {
    const scattered<T> dbias(p.dbias, columns_together, false);
    attention::backward(mlkit::cpu{.threads = 1}, p.q, p.k, p.v, scores, p.out, p.lse, p.dout,
                        attention::gradients{p.dq, p.dk, p.dv, dbias.view}, p.dlse.view());
    CHECK(dbias.difference(p.dbias) <= 0);
  }
}
