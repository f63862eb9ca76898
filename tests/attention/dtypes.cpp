// Each dtype over shapes of every kind: the error against f64 is at most twice that of loops in the same dtype. And
// views that are not contiguous.
#include "reference.hpp"

namespace attention = mlkit::attention;
using namespace attention_reference;

namespace {

// The same pipeline everywhere, so that it is compiled once: without limits a window is no mask.
using scores = attention::scores<attention::scale, attention::window>;
constexpr index_t far = attention::window::unlimited;

scores pipeline(index_t d, index_t left, index_t right) {
  return scores{attention::scale{1 / std::sqrt(static_cast<double>(d))},
                attention::window{left, right, attention::align::bottom_right}};
}

struct shape {
  index_t batch, heads, kv_heads, queries, keys, d, d_v, left, right;
};
// Sizes around those at which kernels change: 24 and 64 of registers, 240 of blocks of keys, 256 of blocks of d.
const std::vector<shape> shapes{
    {1, 1, 1, 1, 1, 1, 1, far, far},       {2, 3, 3, 1, 23, 64, 64, far, far},   {1, 4, 2, 63, 24, 3, 40, far, far},
    {2, 2, 1, 64, 25, 40, 3, far, far},    {1, 4, 1, 65, 77, 64, 80, far, 0},    {1, 2, 2, 77, 239, 80, 64, far, far},
    {1, 2, 1, 129, 240, 128, 128, far, 0}, {1, 1, 1, 65, 241, 1, 300, far, far}, {1, 2, 1, 77, 500, 256, 1, 100, 20},
    {1, 1, 1, 129, 25, 300, 256, far, 0},  {1, 8, 1, 1, 500, 128, 64, far, 0},   {2, 2, 2, 63, 241, 64, 1, 30, 5},
    {1, 3, 1, 64, 1, 80, 3, far, far},     {1, 1, 1, 77, 77, 40, 40, 2, 2}};

}  // namespace

TEMPLATE_TEST_CASE("the error is at most twice that of loops in the same dtype", "[attention][dtypes]", float,
                   mlkit::bf16, mlkit::f16) {
  using T = TestType;
  for (const shape& s : shapes) {
    problem<T> p(s.batch, s.heads, s.kv_heads, s.queries, s.keys, s.d, s.d_v);
    const index_t diagonal = s.keys - s.queries;
    const meaning m = masked(1 / std::sqrt(static_cast<double>(s.d)), [&](index_t, index_t, index_t i, index_t j) {
      return j >= i + diagonal - s.left && j <= i + diagonal + s.right;
    });
    p.run(pipeline(s.d, s.left, s.right));
    const result want = p.template naive<double, double>(m);
    INFO(s.batch << " x " << s.heads << " heads (" << s.kv_heads << "), " << s.queries << " queries, " << s.keys
                 << " keys, d " << s.d << ", d_v " << s.d_v << ", window " << s.left << " " << s.right);
    check_errors<T>(errors(want, p.template naive<float, T>(m)), errors(want, p.written()));
  }
}

TEMPLATE_TEST_CASE("the same of all stages at once, over each mask and all of them", "[attention][dtypes]", float,
                   mlkit::bf16, mlkit::f16) {
  using T = TestType;
  using all_stages = everything<T>;
  problem<T> p(all_stages::batch, all_stages::heads, 1, all_stages::tokens, all_stages::tokens, 40, 24);
  // One mask leaves two numbers of dsinks, whose errors are chance.
  errors loops, ours;
  const auto add = [&](const std::vector<std::string>& masks) {
    all_stages e;
    for (const std::string& name : value_stages)
      for (const int place : {0, 1}) e.switch_on_value(name, place);
    for (const std::string& name : masks) e.switch_on_mask(name);
    e.sinks(0) = 0.5, e.sinks(1) = -1;
    e.p = 0.3;
    p.run(e.pipeline());
    const result want = p.template naive<double, double>(e.means(), true);
    loops.add({want, p.template naive<float, T>(e.template means<float>(), true)});
    ours.add({want, p.written()});
  };
  for (const std::string& mask : mask_stages) add({mask});
  add(mask_stages);
  check_errors<T>(loops, ours);
}

TEMPLATE_TEST_CASE("views that are not contiguous, and nothing around them is touched", "[attention][dtypes]", float,
                   mlkit::bf16, mlkit::f16) {
  using T = TestType;
  problem<T> p(2, 4, 2, 77, 241, 40, 80);
  const scores s = pipeline(40, far, 0);
  p.run(s);
  for (const bool tokens_first : {true, false}) {
    const auto full = [&](const auto& t) { return scattered<T>(t, tokens_first, true); };
    const auto room = [&](const auto& t) { return scattered<T>(t, tokens_first, false); };
    const scattered<T> q = full(p.q), k = full(p.k), v = full(p.v), dout = full(p.dout), out = room(p.out),
                       dq = room(p.dq), dk = room(p.dk), dv = room(p.dv);
    mlkit::tensor<float, 3> memory({2, 77, 4});
    const mlkit::tensor_view<float, 3> lse(memory.data(), {2, 4, 77}, {4 * 77, 1, 4});
    attention::forward(mlkit::cpu{}, q.view, k.view, v.view, s, out.view, lse);
    // Sums run through memory as it lies, so that only where columns stand beside each other bits must be the same.
    const double most = tokens_first ? 0 : 8 * rounding<T>;
    CHECK(out.difference(p.out) <= 0);
    for (index_t h = 0; h < 4; ++h)
      for (index_t i = 0; i < 77; ++i) REQUIRE(lse(1, h, i) == p.lse(1, h, i));
    attention::backward(mlkit::cpu{}, q.view, k.view, v.view, s, out.view, lse, dout.view,
                        attention::gradients(dq.view, dk.view, dv.view), p.dlse.view());
    const errors e(p.written(), p.written());
    CHECK(dq.difference(p.dq) <= most * e.size[2]);
    CHECK(dk.difference(p.dk) <= most * e.size[3]);
    CHECK(dv.difference(p.dv) <= most * e.size[4]);
  }
}
