// Attention layers against loops: projections of every kind, grouped queries, rotary embedding, masks, and gradients
// against differences of what the loops give.
#include "layer.hpp"

using namespace layer_reference;

namespace {

template <kind Q, kind K, kind V, kind Out, bool Self, bool Rotary>
double error_of_layer(const layer_shape& s) {
  layer_problem<double, Self, Rotary> p(s, Q, K, V, Out);
  return worst_error(p.template naive<double, double>(), p.template run<Q, K, V, Out>());
}

// The sum of y dy, whose gradients backward gives.
template <class Problem>
double objective(const Problem& p) {
  const std::vector<double> y = p.template naive<double, double>().at("y");
  double sum = 0;
  for (std::size_t i = 0; i < y.size(); ++i) sum += y[i] * p.dy.data()[i];
  return sum;
}

// The largest difference between an array's gradient and the slope of the objective, relative to the largest slope.
template <class Problem, class Tensor>
double slope_error(const Problem& p, Tensor& t, const std::vector<double>& gradient) {
  REQUIRE(static_cast<index_t>(gradient.size()) == t.size());
  double worst = 0, largest = 0;
  for (index_t i = 0; i < t.size(); ++i) {
    const double at = t.data()[i], step = 1e-5;
    t.data()[i] = at + step;
    const double above = objective(p);
    t.data()[i] = at - step;
    const double slope = (above - objective(p)) / (2 * step);
    t.data()[i] = at;
    worst = std::max(worst, std::fabs(slope - gradient[static_cast<std::size_t>(i)]));
    largest = std::max(largest, std::fabs(slope));
  }
  REQUIRE(largest > 1e-3);
  return worst / largest;
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

TEST_CASE("gradients of x, context, adapters and bias are slopes", "[attention][layer]") {
  using enum kind;
  constexpr double most = 1e-8;
  const layer_shape s{2, 3, 4, 2, 1, 4, 2, 5, 4, 3, far, 1};
  {
    layer_problem<double, false, true> p(s, lora, dora, lora, dora);
    const results g = p.run<lora, dora, lora, dora>();
    CHECK(slope_error(p, p.x, g.at("dx")) < most);
    CHECK(slope_error(p, p.context, g.at("dcontext")) < most);
    CHECK(slope_error(p, p.bias, g.at("dbias")) < most);
    CHECK(slope_error(p, p.q.a, g.at("q.da")) < most);
    CHECK(slope_error(p, p.q.b, g.at("q.db")) < most);
    CHECK(slope_error(p, p.k.a, g.at("k.da")) < most);
    CHECK(slope_error(p, p.k.b, g.at("k.db")) < most);
    CHECK(slope_error(p, p.k.magnitude, g.at("k.dmagnitude")) < most);
    CHECK(slope_error(p, p.v.a, g.at("v.da")) < most);
    CHECK(slope_error(p, p.v.b, g.at("v.db")) < most);
    CHECK(slope_error(p, p.out.a, g.at("out.da")) < most);
    CHECK(slope_error(p, p.out.b, g.at("out.db")) < most);
    CHECK(slope_error(p, p.out.magnitude, g.at("out.dmagnitude")) < most);
  }
  layer_problem<double, true, false> p(s, plain, lora, plain, plain);
  const results g = p.run<plain, lora, plain, plain>();
  CHECK(slope_error(p, p.x, g.at("dx")) < most);
  CHECK(slope_error(p, p.k.a, g.at("k.da")) < most);
  CHECK(slope_error(p, p.k.b, g.at("k.db")) < most);
}

TEMPLATE_TEST_CASE("a layer gives the same bits for any number of threads", "[attention][layer]", float, mlkit::bf16) {
  using enum kind;
  const layer_shape s{2, 90, 130, 4, 2, 32, 32, 96, 64, 96, far, 0};
  layer_problem<TestType, false, false> cross(s, lora, plain, lora, lora);
  layer_problem<TestType, true, true> self(s, lora, plain, lora, lora);
  const auto run_cross = [&](int threads) { return cross.template run<lora, plain, lora, lora>({.threads = threads}); };
  const auto run_self = [&](int threads) { return self.template run<lora, plain, lora, lora>({.threads = threads}); };
  const results one_cross = run_cross(1), one_self = run_self(1);
  for (const int threads : {2, 3}) {
    CHECK(run_cross(threads) == one_cross);
    CHECK(run_self(threads) == one_self);
  }
}

TEST_CASE("tokens of one batch have adapters of their own", "[attention][layer]") {
  using enum kind;
  layer_problem<double, false, false> first({}, lora, lora, plain, plain), second({}, lora, lora, plain, plain);
  fill<double>(second.q.a, 500), fill<double>(second.q.b, 501), fill<double>(second.k.b, 502);
  const auto view = [](const part<double>& p) { return lora::adapter_view<double>{p.a.view(), p.b.view(), p.scale}; };
  const std::vector<lora::adapter_view<double>> of_q{view(first.q), view(second.q)},
      of_k{view(first.k), view(second.k)};
  const std::vector<int> ids{0, 0, 0, 0, 0, 1, 1, 1, 1, 1}, starts{0, 7, 14};
  const attention::cross layer{lora::projection{lora::dense{first.q.w, first.q.bias}, lora::per_row{of_q, ids}},
                               lora::projection{lora::dense{first.k.w, first.k.bias}, lora::segments{of_k, starts}},
                               first.v.projection<plain>(),
                               first.out.projection<plain>(),
                               {.heads = 4, .kv_heads = 2}};
  layer.forward(mlkit::cpu{}, first.x, first.context, first.pipeline(), first.y);
  std::vector<double> want = first.naive<double, double>().at("y");
  const std::vector<double> of_second = second.naive<double, double>().at("y");
  const auto half = static_cast<std::ptrdiff_t>(want.size() / 2);
  std::copy(of_second.begin() + half, of_second.end(), want.begin() + half);
  CHECK(error_of(want, {first.y.begin(), first.y.end()}).first < tight);
}

TEST_CASE("a layer without keys, queries or batch", "[attention][layer]") {
  using enum kind;
  layer_problem<double, false, false> no_keys({2, 5, 0}, lora, plain, lora, lora);
  const results r = no_keys.run<lora, plain, lora, lora>();
  for (index_t t = 0; t < 10; ++t)
    for (index_t c = 0; c < 9; ++c) CHECK(r.at("y")[static_cast<std::size_t>(t * 9 + c)] == no_keys.out.bias(c));
  const auto zeros = [](const std::vector<double>& v) {
    return std::all_of(v.begin(), v.end(), [](double x) { return x == 0; });
  };
  CHECK(zeros(r.at("dx")));
  CHECK(zeros(r.at("q.da")));
  CHECK(zeros(r.at("v.db")));
  for (const layer_shape& s : {layer_shape{2, 0, 7}, layer_shape{0, 5, 7}}) {
    layer_problem<double, false, false> p(s, lora, plain, lora, lora);
    std::fill(p.v.db.begin(), p.v.db.end(), 3.0);
    const results of = p.run<lora, plain, lora, lora>();
    CHECK(zeros(of.at("dcontext")));
    CHECK(zeros(of.at("v.db")));
  }
}

TEST_CASE("a layer's tokens may be columns of something wider", "[attention][layer]") {
  using enum kind;
  layer_problem<double, false, false> p({}, lora, plain, lora, lora);
  const results want = p.run<lora, plain, lora, lora>();
  struct wide {
    mlkit::tensor<double, 3> memory;
    mlkit::tensor_view<double, 3> view;
    explicit wide(const mlkit::tensor<double, 3>& t)
        : memory({t.extent(0), t.extent(1), t.extent(2) + 3}),
          view(memory.data() + 1, t.extents(), memory.view().strides) {
      std::fill(memory.begin(), memory.end(), NAN);
      for (index_t b = 0; b < t.extent(0); ++b)
        for (index_t i = 0; i < t.extent(1); ++i)
          for (index_t c = 0; c < t.extent(2); ++c) view(b, i, c) = t(b, i, c);
    }
    std::vector<double> values() const {
      std::vector<double> v;
      std::copy_if(memory.begin(), memory.end(), std::back_inserter(v), [](double x) { return !std::isnan(x); });
      return v;
    }
  };
  const wide x(p.x), context(p.context), dy(p.dy), y(p.y), dx(p.dx), dcontext(p.dcontext);
  const auto layer = p.layer<lora, plain, lora, lora>();
  const attention::layer_gradients grads{p.q.gradients<lora>(), lora::no_gradients{}, p.v.gradients<lora>(),
                                         p.out.gradients<lora>()};
  attention::kept<double> kept;
  layer.forward(mlkit::cpu{}, x.view, context.view, p.pipeline(), y.view, kept);
  layer.backward(mlkit::cpu{}, x.view, context.view, p.pipeline(), kept, dy.view, grads, dx.view, dcontext.view);
  CHECK(y.values() == want.at("y"));
  CHECK(dx.values() == want.at("dx"));
  CHECK(dcontext.values() == want.at("dcontext"));
}

TEST_CASE("gradients that are not wanted change no other", "[attention][layer]") {
  using enum kind;
  layer_problem<double, false, false> p({}, lora, plain, lora, lora);
  const results want = p.run<lora, plain, lora, lora>();
  const auto layer = p.layer<lora, plain, lora, lora>();
  const attention::layer_gradients grads{p.q.gradients<lora>(), lora::no_gradients{}, p.v.gradients<lora>(),
                                         p.out.gradients<lora>()};
  for (const bool with_dx : {true, false}) {
    std::fill(p.q.da.begin(), p.q.da.end(), NAN);
    std::fill(p.v.db.begin(), p.v.db.end(), NAN);
    std::fill(p.dx.begin(), p.dx.end(), NAN);
    layer.backward(mlkit::cpu{}, p.x, p.context, p.pipeline(), p.kept, p.dy, grads,
                   with_dx ? p.dx.view() : mlkit::tensor_view<double, 3>{});
    CHECK(std::vector<double>(p.q.da.begin(), p.q.da.end()) == want.at("q.da"));
    CHECK(std::vector<double>(p.v.db.begin(), p.v.db.end()) == want.at("v.db"));
    CHECK((std::vector<double>(p.dx.begin(), p.dx.end()) == want.at("dx")) == with_dx);
  }
}

TEST_CASE("a layer makes room for what it keeps once", "[attention][layer]") {
  using enum kind;
  layer_problem<double, false, false> p({}, lora, plain, lora, lora);
  p.run<lora, plain, lora, lora>();
  const double* q = p.kept.q.data();
  const double* lse = p.kept.lse.data();
  p.run<lora, plain, lora, lora>();
  CHECK(p.kept.q.data() == q);
  CHECK(p.kept.lse.data() == lse);
}

TEST_CASE("a projection's dropout is drawn alike on the way back", "[attention][layer]") {
  using enum kind;
  layer_problem<double, false, false> p({}, lora, plain, lora, lora);
  auto layer = p.layer<lora, plain, lora, lora>();
  layer.q.options.dropout = layer.v.options.dropout = 0.4;
  layer.v.options.stream = 7;
  const auto objective_of = [&] {
    layer.forward(mlkit::cpu{}, p.x, p.context, p.pipeline(), p.y, p.kept);
    double sum = 0;
    for (index_t i = 0; i < p.y.size(); ++i) sum += p.y.data()[i] * p.dy.data()[i];
    return sum;
  };
  const double dropped = objective_of();
  const attention::layer_gradients grads{p.q.gradients<lora>(), lora::no_gradients{}, p.v.gradients<lora>(),
                                         p.out.gradients<lora>()};
  layer.backward(mlkit::cpu{}, p.x, p.context, p.pipeline(), p.kept, p.dy, grads, p.dx, p.dcontext);
  for (auto* t : {&p.x, &p.context})
    for (index_t i = 0; i < t->size(); i += 7) {
      const double at = t->data()[i], step = 1e-5;
      t->data()[i] = at + step;
      const double above = objective_of();
      t->data()[i] = at - step;
      const double slope = (above - objective_of()) / (2 * step);
      t->data()[i] = at;
      CHECK(slope == Approx((t == &p.x ? p.dx : p.dcontext).data()[i]).margin(1e-7));
    }
  layer.v.options.stream = 8;
  CHECK(objective_of() != dropped);
  layer.q.options.training = layer.v.options.training = false;
  objective_of();
  CHECK(error_of(p.naive<double, double>().at("y"), {p.y.begin(), p.y.end()}).first < tight);
}
