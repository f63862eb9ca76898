// Adapters over quantised bases: forward and backward against f64 loops over the dequantised weight.
#include <catch2/catch.hpp>
#include <cmath>
#include <mlkit/lora/linear.hpp>
#include <mlkit/lora/quantised.hpp>
#include <random>
#include <vector>

namespace lora = mlkit::lora;
using mlkit::index_t;

namespace {

template <class T>
mlkit::matrix<T> random_matrix(index_t rows, index_t cols, unsigned seed) {
  std::mt19937 g(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  mlkit::matrix<T> m({rows, cols});
  for (T& x : m) x = static_cast<T>(uniform(g));
  return m;
}

// left[i, k] right[j, k] summed over k, in f64.
template <class L, class R>
std::vector<double> product(index_t rows, index_t cols, index_t depth, L&& left, R&& right) {
  std::vector<double> c(static_cast<std::size_t>(rows * cols));
  for (index_t i = 0; i < rows; ++i)
    for (index_t j = 0; j < cols; ++j)
      for (index_t k = 0; k < depth; ++k) c[static_cast<std::size_t>(i * cols + j)] += left(i, k) * right(j, k);
  return c;
}

template <class M>
void close(const char* name, const M& have, const std::vector<double>& want, double tolerance) {
  index_t wrong = 0;
  for (index_t i = 0; i < have.size(); ++i)
    wrong += !(std::fabs(static_cast<double>(have.data()[i]) - want[static_cast<std::size_t>(i)]) <= tolerance);
  CAPTURE(name);
  CHECK(wrong == 0);
}

template <class T, class Base>
void check(const Base& base, index_t tokens, const std::vector<float>& bias) {
  const index_t out = base.outputs(), in = base.inputs(), rank = 4;
  CAPTURE(tokens, out, in);
  const auto x = random_matrix<T>(tokens, in, 1), dy = random_matrix<T>(tokens, out, 2);
  auto adapter = lora::make_adapter<T>({.in = in, .out = out, .rank = rank, .alpha = 8, .seed = 1});
  const auto b_start = random_matrix<T>(out, rank, 3);
  std::copy(b_start.begin(), b_start.end(), mlkit::as_view(adapter.b).data);
  mlkit::matrix<double> w({out, in});
  lora::dequantise(mlkit::cpu{}, base.weight().view, w);
  const auto a = mlkit::as_view(adapter.a), b = mlkit::as_view(adapter.b);
  const double s = 8.0 / rank;

  mlkit::matrix<T> y({tokens, out}), dx({tokens, in}), da({rank, in}), db({out, rank});
  lora::linear(mlkit::cpu{}, x, base, adapter, y);
  lora::linear_backward(mlkit::cpu{}, x, base, adapter, dy, lora::gradients<T>{da, db}, dx);

  const auto merged = [&](index_t o, index_t i) {
    double sum = w(o, i);
    for (index_t r = 0; r < rank; ++r) sum += s * static_cast<double>(b(o, r)) * static_cast<double>(a(r, i));
    return sum;
  };
  const auto of = [](const auto& m) { return [&m](index_t i, index_t j) { return static_cast<double>(m(i, j)); }; };
  const auto across = [](const auto& m) { return [&m](index_t i, index_t j) { return static_cast<double>(m(j, i)); }; };
  auto want_y = product(tokens, out, in, of(x), merged);
  for (index_t t = 0; t < tokens; ++t)
    for (index_t o = 0; o < out; ++o)
      want_y[static_cast<std::size_t>(t * out + o)] += bias[static_cast<std::size_t>(o)];
  const auto want_dx = product(tokens, in, out, of(dy), [&](index_t i, index_t o) { return merged(o, i); });
  // dB = s dy^T (x A^T), dA = s (dy B)^T x
  const auto h = product(tokens, rank, in, of(x), of(a));
  const auto want_db = product(out, rank, tokens, across(dy),
                               [&](index_t r, index_t t) { return s * h[static_cast<std::size_t>(t * rank + r)]; });
  const auto g = product(tokens, rank, out, of(dy), across(b));
  const auto want_da = product(
      rank, in, tokens, [&](index_t r, index_t t) { return s * g[static_cast<std::size_t>(t * rank + r)]; }, across(x));
  const double tolerance = std::is_same_v<T, mlkit::bf16> ? 0.5 : std::is_same_v<T, double> ? 1e-9 : 1e-4;
  close("y", y, want_y, tolerance);
  close("dx", dx, want_dx, tolerance);
  close("da", da, want_da, tolerance);
  close("db", db, want_db, tolerance);
}

}  // namespace

TEMPLATE_TEST_CASE("LoRA over NF4 and int8 bases", "", float, double, mlkit::bf16) {
  using T = std::conditional_t<std::is_same_v<TestType, double>, double, mlkit::bf16>;
  for (const auto& [out, in] : {std::pair<index_t, index_t>{40, 64}, {33, 65}}) {
    const auto w = random_matrix<float>(out, in, 5);
    std::vector<float> bias(static_cast<std::size_t>(out));
    for (std::size_t i = 0; i < bias.size(); ++i) bias[i] = 0.1f * static_cast<float>(i);
    std::vector<mlkit::accumulator_t<T>> base_bias(bias.begin(), bias.end());
    const auto blocks = lora::quantise_nf4(mlkit::cpu{}, w, {.double_quantise = true});
    const auto bytes = lora::quantise_int8(mlkit::cpu{}, w);
    for (const index_t tokens : {1, 5, 20}) {
      check<TestType>(lora::nf4<T>(blocks, base_bias), tokens, bias);
      check<TestType>(lora::int8<T>(bytes, base_bias), tokens, bias);
    }
  }
}
