// Activations in epilogues, against their formulas in f64.
#include "reference.hpp"

using namespace reference;
using mlkit::cpu;
using mlkit::epilogue;

namespace {

template <class T, class F, class Formula>
void check_activation(const F& f, const Formula& formula) {
  for_each_isa([&] {
    for (const shape& s : {shape{37, 75, 20}, shape{75, 37, 20}, shape{3, 70, 33}}) {
      guarded<T> a(s.m, s.k, layout::rows), b(s.k, s.n, layout::rows), c(s.m, s.n, layout::padded_rows);
      a.fill(1), b.fill(2);
      sums expected = naive(a.view(), b.view());
      for (index_t i = 0; i < s.m; ++i)
        for (index_t j = 0; j < s.n; ++j) expected(i, j) = formula(expected(i, j));
      mlkit::matmul(cpu{}, a.view(), b.view(), c.view(), epilogue{f});
      expect(c.view(), expected, describe(s, layout::rows, layout::rows, layout::padded_rows));
      REQUIRE(c.untouched_outside());
    }
  });
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double gelu(double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); }
double gelu_tanh(double x) { return 0.5 * x * (1 + std::tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x))); }

}  // namespace

TEST_CASE("activations in f32 epilogues") {
  check_activation<float>(mlkit::relu{}, [](double x) { return std::max(x, 0.0); });
  check_activation<float>(mlkit::gelu{}, gelu);
  check_activation<float>(mlkit::gelu_tanh{}, gelu_tanh);
  check_activation<float>(mlkit::silu{}, [](double x) { return x * sigmoid(x); });
  check_activation<float>(mlkit::tanh{}, [](double x) { return std::tanh(x); });
  check_activation<float>(mlkit::sigmoid{}, sigmoid);
}

TEST_CASE("activations in f64 and bf16 epilogues") {
  check_activation<double>(mlkit::gelu{}, gelu);
  check_activation<double>(mlkit::sigmoid{}, sigmoid);
  check_activation<mlkit::bf16>(mlkit::silu{}, [](double x) { return x * sigmoid(x); });
}
