// Every operation's gradient in f64 against central differences of its value.
#include <mlkit/nn.hpp>

#include <catch2/catch.hpp>
#include <functional>

namespace nn = mlkit::nn;
using mlkit::index_t;
using var = nn::var<double>;
using tape = nn::tape<double>;
using function = std::function<var(tape&, std::vector<var>&)>;

namespace {

// The largest |analytic - numeric| / max(1, |numeric|) over all elements of all inputs, or every `stride`-th of them,
// for sum(f(inputs) * weights).
double worst(std::vector<nn::shape> shapes, const function& f, index_t stride = 1) {
  nn::parameters<double> store(7);
  std::vector<nn::parameter<double>*> inputs;
  for (std::size_t i = 0; i < shapes.size(); ++i)
    inputs.push_back(&store.add("input" + std::to_string(i), shapes[i], nn::normal{1.0}));
  const auto value = [&](bool backward) {
    tape t(mlkit::cpu{.threads = 2});
    std::vector<var> x;
    for (auto* p : inputs) x.push_back(t.use(*p));
    const var y = f(t, x);
    std::vector<double> weights(static_cast<std::size_t>(y.size()));
    for (std::size_t i = 0; i < weights.size(); ++i) weights[i] = mlkit::random_stream{3, 1}.normal(i);
    const var loss = nn::sum(nn::multiply(y, nn::reshape(t.constant(weights), y.shape())));
    if (backward) t.backward(loss);
    return loss.item();
  };
  value(true);
  double high = 0;
  for (auto* p : inputs)
    for (index_t i = 0; i < p->size(); i += stride) {
      const double x = p->value(i), step = 1e-5;
      p->value(i) = x + step;
      const double above = value(false);
      p->value(i) = x - step;
      const double below = value(false);
      p->value(i) = x;
      const double numeric = (above - below) / (2 * step);
      const double analytic = p->grad.size() ? p->grad(i) : 0;
      high = std::max(high, std::abs(analytic - numeric) / std::max(1.0, std::abs(numeric)));
    }
  return high;
}

double worst_of_few(std::vector<nn::shape> shapes, const function& f) { return worst(std::move(shapes), f, 37); }

constexpr double tolerance = 2e-8;

}  // namespace

TEST_CASE("gradients of sums and products", "[nn]") {
  const nn::shape x{3, 5}, row{5}, deep{2, 3, 5};
  CHECK(worst({x, x}, [](tape&, auto& v) { return v[0] + v[1]; }) < tolerance);
  CHECK(worst({x, row}, [](tape&, auto& v) { return v[0] + v[1]; }) < tolerance);
  CHECK(worst({deep, row}, [](tape&, auto& v) { return v[0] + v[1]; }) < tolerance);
  CHECK(worst({x, x}, [](tape&, auto& v) { return v[0] * v[1]; }) < tolerance);
  CHECK(worst({x, row}, [](tape&, auto& v) { return v[0] * v[1]; }) < tolerance);
  CHECK(worst({x}, [](tape&, auto& v) { return v[0] * v[0]; }) < tolerance);  // one operand twice
  CHECK(worst({x}, [](tape&, auto& v) { return nn::scale(v[0], 2.5, 1); }) < tolerance);
  CHECK(worst({x}, [](tape&, auto& v) { return nn::sum(v[0]); }) < tolerance);
}

TEST_CASE("gradients of sums and products with a repeated operand", "[nn]") {
  // Every way in which four extents can be kept and repeated, extents of 1 and single numbers among them.
  const nn::shape x{2, 3, 4, 5};
  for (int kept = 0; kept < 16; ++kept) {
    const auto e = [&](int d) { return kept >> d & 1 ? x[d] : 1; };
    const nn::shape y{e(0), e(1), e(2), e(3)};
    INFO(y.text());
    CHECK(worst({x, y}, [](tape&, auto& v) { return v[0] + v[1]; }) < tolerance);
    CHECK(worst({x, y}, [](tape&, auto& v) { return v[0] * v[1]; }) < tolerance);
  }
  for (const nn::shape& y : {nn::shape{2, 3}, {2, 3, 4}, {5}, {}}) {
    INFO(y.text());
    CHECK(worst({x, y}, [](tape&, auto& v) { return v[0] + v[1]; }) < tolerance);
    CHECK(worst({x, y}, [](tape&, auto& v) { return v[0] * v[1]; }) < tolerance);
  }
  CHECK(worst({{1, 3, 1, 4}, {1, 3}}, [](tape&, auto& v) { return v[0] * v[1]; }) < tolerance);
  CHECK(worst({{1}, {}}, [](tape&, auto& v) { return v[0] * v[1]; }) < tolerance);
  // Long enough for several tasks, strips and blocks.
  CHECK(worst_of_few({{70, 2, 130}, {130}}, [](tape&, auto& v) { return v[0] * v[1]; }) < tolerance);
  CHECK(worst_of_few({{70, 2, 130}, {70, 1, 130}}, [](tape&, auto& v) { return v[0] * v[1]; }) < tolerance);
  CHECK(worst_of_few({{70, 2, 130}, {70, 2}}, [](tape&, auto& v) { return v[0] * v[1]; }) < tolerance);
  CHECK(worst_of_few({{70, 2, 130}, {1, 2, 1}}, [](tape&, auto& v) { return v[0] * v[1]; }) < tolerance);
}

TEST_CASE("gradients of activations", "[nn]") {
  const nn::shape x{4, 7};
  CHECK(worst({x}, [](tape&, auto& v) { return nn::activate(v[0], mlkit::silu{}); }) < tolerance);
  CHECK(worst({x}, [](tape&, auto& v) { return nn::activate(v[0], mlkit::gelu{}); }) < tolerance);
  CHECK(worst({x}, [](tape&, auto& v) { return nn::activate(v[0], mlkit::relu{}); }) < tolerance);
  CHECK(worst({x}, [](tape&, auto& v) { return nn::activate(v[0], mlkit::tanh{}); }) < tolerance);
}

TEST_CASE("gradients of normalisations", "[nn]") {
  const nn::shape x{4, 7}, row{7};
  CHECK(worst({x, row, row}, [](tape&, auto& v) { return nn::layer_norm(v[0], v[1], v[2]); }) < tolerance);
  CHECK(worst({x}, [](tape&, auto& v) { return nn::layer_norm(v[0]); }) < tolerance);
  CHECK(worst({x, row}, [](tape&, auto& v) { return nn::rms_norm(v[0], v[1]); }) < tolerance);
  CHECK(worst({{2, 3, 7}}, [](tape&, auto& v) { return nn::rms_norm(v[0]); }) < tolerance);
}

TEST_CASE("gradients of group normalisation", "[nn]") {
  const nn::shape x{2, 6, 3, 2}, row{6};
  for (const index_t groups : {1, 2, 3, 6})
    CHECK(worst({x, row, row}, [=](tape&, auto& v) { return nn::group_norm(v[0], groups, v[1], v[2]); }) < tolerance);
  CHECK(worst({{3, 8}}, [](tape&, auto& v) { return nn::group_norm(v[0], 2); }) < tolerance);
  CHECK(worst({{3, 4, 5}, {4}}, [](tape&, auto& v) { return nn::group_norm(v[0], 2, v[1]); }) < tolerance);
  // A frozen gain beside a trained bias, and the other way round.
  CHECK(worst({x, row}, [&](tape& t, auto& v) {
          return nn::group_norm(v[0], 2, t.constant(std::vector<double>(6, 0.5)), v[1]);
        }) < tolerance);
  CHECK(worst({row, row}, [&](tape& t, auto& v) {
          return nn::group_norm(nn::reshape(t.constant(std::vector<double>(6, 0.5)), {1, 6}), 2, v[0], v[1]);
        }) < tolerance);
}

TEST_CASE("gradients of joining, cutting and looking up", "[nn]") {
  CHECK(worst({{3, 2}, {3, 4}, {3, 1}}, [](tape&, auto& v) { return nn::concat(v); }) < tolerance);
  CHECK(worst({{3, 6}}, [](tape&, auto& v) { return nn::slice(v[0], 2, 3); }) < tolerance);
  CHECK(worst({{3, 6}}, [](tape&, auto& v) { return nn::reshape(v[0], {2, 9}); }) < tolerance);
  for (const int d : {0, 1, 2, -2}) {
    const nn::shape one = nn::shape{2, 3, 4}.with((d + 3) % 3, 1);
    CHECK(worst({{2, 3, 4}, one, {2, 3, 4}}, [=](tape&, auto& v) { return nn::concat(v, d); }) < tolerance);
    CHECK(worst({{2, 3, 4}}, [=](tape&, auto& v) { return nn::slice(v[0], 1, 1, d); }) < tolerance);
  }
  CHECK(worst({{2, 3, 4, 5}}, [](tape&, auto& v) { return nn::permute(v[0], {3, 1, 0, 2}); }) < tolerance);
  CHECK(worst({{3, 4, 5}}, [](tape&, auto& v) {
          return nn::permute(v[0], {1, 2, 0}) * nn::permute(v[0], {1, 2, 0});
        }) < tolerance);
  CHECK(worst({{3, 4}}, [](tape&, auto& v) { return nn::transpose(v[0]); }) < tolerance);
  CHECK(worst({{2, 3, 4, 5}}, [](tape&, auto& v) { return nn::transpose(v[0]); }) < tolerance);
  const std::vector<std::int32_t> ids{4, 0, 4, 2};  // one row twice, two rows never
  CHECK(worst({{5, 3}}, [&](tape&, auto& v) { return nn::embedding<double>(v[0], ids); }) < tolerance);
  CHECK(worst({{5, 3}}, [&](tape&, auto& v) { return nn::embedding<double>(v[0], ids, {2, 2}); }) < tolerance);
}

TEST_CASE("gradients of linear maps", "[nn]") {
  CHECK(worst({{4, 6}, {3, 6}, {3}}, [](tape&, auto& v) { return nn::linear(v[0], v[1], v[2]); }) < tolerance);
  CHECK(worst({{2, 4, 6}, {3, 6}}, [](tape&, auto& v) { return nn::linear(v[0], v[1]); }) < tolerance);
  CHECK(worst({{4, 6}, {3, 6}, {3}, {2, 6}, {3, 2}}, [](tape&, auto& v) {
          return nn::linear(v[0], v[1], v[2], nn::lora_factors<double>{v[3], v[4], 1.5});
        }) < tolerance);
}

TEST_CASE("gradients of DoRA, its norm held", "[nn]") {
  // Central differences would see the norm move, so the function that is differenced holds it at its first value.
  const index_t rows = 4, in = 6, out = 3, rank = 2;
  const double s = 1.5;
  nn::parameters<double> store(11);
  auto& x = store.add("x", {rows, in}, nn::normal{1});
  auto& w = store.add("w", {out, in}, nn::normal{1});
  w.trainable = false;
  auto& b = store.add("b", {out}, nn::normal{1});
  auto& down = store.add("down", {rank, in}, nn::normal{1});
  auto& up = store.add("up", {out, rank}, nn::normal{1});
  auto& magnitude = store.add("magnitude", {out}, nn::normal{1});
  const auto adapted = [&](index_t o, index_t i) {
    double v = w.matrix()(o, i);
    for (index_t r = 0; r < rank; ++r) v += s * up.matrix()(o, r) * down.matrix()(r, i);
    return v;
  };
  std::vector<double> norm;
  for (index_t o = 0; o < out; ++o) {
    double square = 0;
    for (index_t i = 0; i < in; ++i) square += adapted(o, i) * adapted(o, i);
    norm.push_back(std::sqrt(square));
  }
  const auto weight = [](index_t i) { return mlkit::random_stream{3, 1}.normal(static_cast<std::uint64_t>(i)); };
  const auto reference = [&](std::vector<double>* y) {
    double total = 0;
    for (index_t r = 0; r < rows; ++r)
      for (index_t o = 0; o < out; ++o) {
        double sum = 0;
        for (index_t i = 0; i < in; ++i) sum += x.matrix()(r, i) * adapted(o, i);
        sum = sum * magnitude.value(o) / norm[static_cast<std::size_t>(o)] + b.value(o);
        if (y) y->push_back(sum);
        total += sum * weight(r * out + o);
      }
    return total;
  };

  tape t;
  const var y =
      nn::linear(t.use(x), t.use(w), t.use(b), nn::dora_factors<double>{t.use(down), t.use(up), t.use(magnitude), s});
  std::vector<double> expected, weights;
  reference(&expected);
  for (std::size_t i = 0; i < expected.size(); ++i) CHECK(y.data()[i] == Approx(expected[i]).epsilon(1e-12));
  for (index_t i = 0; i < rows * out; ++i) weights.push_back(weight(i));
  t.backward(nn::sum(nn::multiply(y, nn::reshape(t.constant(weights), y.shape()))));
  for (nn::parameter<double>& p : store)
    for (index_t i = 0; i < p.size() && p.trainable; ++i) {
      const double value = p.value(i), step = 1e-5;
      p.value(i) = value + step;
      const double above = reference(nullptr);
      p.value(i) = value - step;
      const double below = reference(nullptr);
      p.value(i) = value;
      const double numeric = (above - below) / (2 * step);
      INFO(p.name << " element " << i);
      CHECK(std::abs(p.grad(i) - numeric) / std::max(1.0, std::abs(numeric)) < tolerance);
    }
}

TEST_CASE("gradients of multi-head attention", "[nn]") {
  namespace attention = mlkit::attention;
  const nn::shape q{2, 5, 6}, k{2, 4, 6};
  CHECK(worst({q, k, {2, 4, 9}}, [](tape&, auto& v) { return nn::multi_head_attention(v[0], v[1], v[2], 3); }) <
        tolerance);
  const std::vector<std::int32_t> lengths{3, 1};
  CHECK(worst({q, k, k}, [&](tape&, auto& v) {
          return nn::multi_head_attention(
              v[0], v[1], v[2], 2,
              attention::scores{attention::scale{0.7}, attention::softcap{2}, attention::key_lengths{lengths}});
        }) < tolerance);
  CHECK(worst({q, {2, 4, 2}, {2, 4, 3}}, [](tape&, auto& v) {  // three heads share one of keys and values
          return nn::multi_head_attention(v[0], v[1], v[2], 3);
        }) < tolerance);
  CHECK(worst({q}, [](tape&, auto& v) {  // one value in all places, and a gradient that has arrived before
          return v[0] + nn::multi_head_attention(v[0], v[0], v[0], 2, attention::scores{attention::causal{}});
        }) < tolerance);
  CHECK(worst({k}, [&](tape& t, auto& v) {  // a frozen query and frozen values
          const var frozen = nn::reshape(t.constant(std::vector<double>(48, 0.5)), {2, 4, 6});
          return nn::multi_head_attention(frozen, v[0], nn::multi_head_attention(frozen, frozen, v[0], 2), 2);
        }) < tolerance);
}

TEST_CASE("gradients of losses", "[nn]") {
  CHECK(worst({{3, 4}, {3, 4}}, [](tape&, auto& v) { return nn::mse(v[0], v[1]); }) < tolerance);
  const std::vector<std::int32_t> labels{2, nn::ignore_label, 0, 2};
  CHECK(worst({{4, 3}}, [&](tape&, auto& v) { return nn::cross_entropy<double>(v[0], labels); }) < tolerance);
}

TEST_CASE("gradients through a network", "[nn]") {
  // Residual blocks: values that are used twice, several parameters, every kind of node in between.
  CHECK(worst({{3, 5}, {5, 5}, {5}, {5}, {2, 5}, {5, 2}}, [](tape&, auto& v) {
          const var h = nn::activate(nn::linear(nn::layer_norm(v[0], v[2], v[3]), v[1]), mlkit::silu{});
          const var r = v[0] + nn::linear(h, v[1], v[2], nn::lora_factors<double>{v[4], v[5], 0.5});
          return nn::rms_norm(nn::concat<double>({r, h, r}));
        }) < tolerance);
}
