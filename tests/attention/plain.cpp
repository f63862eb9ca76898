// Sizes, dtypes, threads and memory.
#include "reference.hpp"

namespace attention = mlkit::attention;
using attention::align;
using namespace attention_reference;

TEST_CASE("without stages, over heads that share keys, sizes of every kind", "[attention][stages]") {
  for (const auto& [n, m, d, d_v] : std::vector<std::array<index_t, 4>>{
           {70, 130, 5, 7}, {1, 1, 1, 1}, {3, 77, 40, 40}, {300, 9, 3, 2}, {17, 500, 2, 1}, {65, 24, 16, 70}}) {
    INFO(n << " queries, " << m << " keys, d " << d << ", d_v " << d_v);
    problem<double> p(2, 4, 2, n, m, d, d_v);
    CHECK(p.error(attention::scores<>{}, scaled(1 / std::sqrt(static_cast<double>(d)))) < tight);
  }
  problem<double> deep(1, 1, 1, 5, 6, 900, 3);  // more than one block of d
  CHECK(deep.error(attention::scores{attention::scale{0.03}}, scaled(0.03)) < tight);
}

TEST_CASE("each dtype against f64", "[attention][stages]") {
  const auto check = [](auto zero, double bound) {
    using T = decltype(zero);
    problem<T> p(2, 4, 2, 70, 333, 48, 40);
    CHECK(p.error(attention::scores<>{}, scaled(1 / std::sqrt(48.0))) < bound);
    problem<T> narrow(1, 2, 1, 33, 77, 40, 24);
    CHECK(narrow.error(attention::scores{attention::causal{align::top_left}},
                       masked(1 / std::sqrt(40.0), [](index_t, index_t, index_t i, index_t j) { return j <= i; })) <
          bound);
  };
  check(float{}, 3e-6);
  check(mlkit::bf16{}, 1.6e-2);
  check(mlkit::f16{}, 2e-3);
}

TEST_CASE("the same bits for any number of threads, and alone or in a batch", "[attention][stages]") {
  const auto check = [](auto zero) {
    using T = decltype(zero);
    problem<T> p(3, 2, 1, 1100, 270, 6, 5);  // several parts of a head, one of them left over
    const attention::scores pipeline{attention::causal{align::top_left}};
    const auto run = [&](int threads) {
      const mlkit::cpu exec{.threads = threads};
      attention::forward(exec, p.q, p.k, p.v, pipeline, p.out, p.lse);
      attention::backward(exec, p.q, p.k, p.v, pipeline, p.out, p.lse, p.dout, attention::gradients{p.dq, p.dk, p.dv});
    };
    run(1);
    const auto out = p.out.clone(), dq = p.dq.clone(), dk = p.dk.clone(), dv = p.dv.clone();
    const auto same = [](const auto& a, const auto& b) {
      return std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * sizeof(T)) == 0;
    };
    for (const int threads : {2, 3, 7}) {
      run(threads);
      CHECK((same(out, p.out) && same(dq, p.dq) && same(dk, p.dk) && same(dv, p.dv)));
    }
    const auto alone = [](const auto& t) {
      return mlkit::tensor_view<const T, 4>(&t(1, 0, 0, 0), {1, t.extent(1), t.extent(2), t.extent(3)},
                                            t.view().strides);
    };
    mlkit::tensor<T, 4> one({1, 2, 1100, 5});
    attention::forward(mlkit::cpu{}, alone(p.q), alone(p.k), alone(p.v), pipeline, one);
    CHECK(std::memcmp(one.data(), &out(1, 0, 0, 0), static_cast<std::size_t>(one.size()) * sizeof(T)) == 0);
  };
  check(float{});
  check(mlkit::bf16{});
}

TEST_CASE("forward's scratch memory does not grow with keys", "[attention][stages]") {
  const auto peak = [](index_t keys) {
    mlkit::tensor<float, 4> q({1, 1, 20, 8}), k({1, 1, keys, 8}), v({1, 1, keys, 8}), out({1, 1, 20, 8});
    mlkit::reset_workspace_peak();
    attention::forward(mlkit::cpu{.threads = 1}, q, k, v, out);
    return mlkit::workspace_peak_bytes();
  };
  CHECK(peak(1024) == peak(32768));
}
