// Attention layers against loops: projections of every kind, grouped queries, rotary embedding, masks; every dtype; and
// gradients against differences of what the loops give.
#include "layer.hpp"

using namespace layer_reference;

namespace {

template <kind Q, kind K, kind V, kind Out, bool Self, bool Rotary>
double error_of_layer(const layer_shape& s) {
  layer_problem<double, Self, Rotary> p(s, Q, K, V, Out);
  return worst_error(p.template naive<double, double>(), p.template run<Q, K, V, Out>());
}

}  // namespace

TEST_CASE("layers of every kind of projection are what loops make of them", "[attention][layer]") {
  using enum kind;
  const layer_shape small, odd{3, 4, 9, 3, 1, 5, 8, 7, 11, 6}, plain_heads{1, 6, 6, 2, 2, 4, 4, 5, 5, 5};
  for (const layer_shape& s : {small, odd, plain_heads}) {
    CHECK(error_of_layer<plain, plain, plain, plain, false, false>(s) < tight);
    CHECK(error_of_layer<lora, lora, lora, lora, false, false>(s) < tight);
    CHECK(error_of_layer<lora, lora, lora, lora, true, false>(s) < tight);
    CHECK(error_of_layer<dora, plain, lora, dora, false, true>(s) < tight);
    CHECK(error_of_layer<plain, dora, dora, plain, true, true>(s) < tight);
    CHECK(error_of_layer<nf4, nf4, nf4, nf4, false, false>(s) < tight);
  }
}

TEST_CASE("layers under masks", "[attention][layer]") {
  using enum kind;
  layer_shape s{2, 40, 70, 4, 2, 8, 8, 16, 24, 16};
  for (const auto& w : {std::pair{far, index_t{0}}, std::pair{index_t{5}, index_t{3}}}) {
    s.left = w.first, s.right = w.second;
    CHECK(error_of_layer<lora, lora, lora, lora, false, false>(s) < tight);
    CHECK(error_of_layer<lora, lora, lora, lora, true, false>(s) < tight);
    CHECK(error_of_layer<dora, plain, lora, dora, false, true>(s) < tight);
  }
}
