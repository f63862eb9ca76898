// DoRA: forward with norms computed or kept, and its gradients.
#include "lora/layer.hpp"

namespace {

// Row norms of the merged weight, and what they make of a layer.
template <class T>
struct dora_layer : layer<T> {
  mlkit::vector<T> magnitude_values;
  test::operand<T, 1> magnitude;
  std::vector<double> norms, factors;

  dora_layer(index_t t, index_t i, index_t o, index_t r)
      : layer<T>(t, i, o, r),
        magnitude_values(normal_vector<T>(o, 8, 0.2f, 1.5f)),
        magnitude(test::on_device(this->exec, magnitude_values)) {
    const mat m = this->merged();
    for (index_t row = 0; row < o; ++row) {
      double square = 0;
      for (index_t k = 0; k < i; ++k) square += m(row, k) * m(row, k);
      norms.push_back(std::sqrt(square));
      factors.push_back(static_cast<double>(magnitude_values(row)) / norms.back());
    }
  }
  mat u() const { return scale_columns(this->dy.values, factors); }
};

template <class T>
mat row_of(const mlkit::tensor<T, 1>& v) {
  mat m(1, v.extent(0));
  for (index_t i = 0; i < m.cols; ++i) m(0, i) = static_cast<double>(v(i));
  return m;
}
template <class T>
auto nan_vector(const test::executor& exec, index_t n) {
  mlkit::vector<T> v({n});
  for (index_t i = 0; i < n; ++i) v.data()[i] = static_cast<T>(std::nanf(""));
  return test::on_device(exec, v);
}

}  // namespace

TEMPLATE_TEST_CASE("dora scales every output by magnitude over norm, on every executor", "[lora][cuda]", float, bf16) {
  for (const shape& s : {shape{1, 64, 40, 4}, shape{9, 128, 33, 16}, shape{20, 96, 140, 40}, shape{5, 37, 21, 3},
                         shape{140, 72, 136, 8}}) {
    INFO(s);
    dora_layer<TestType> l(s.tokens, s.in, s.out, s.rank);
    const mat want = l.with_bias(scale_columns(multiply(l.x.values, transpose(l.merged())), l.factors));
    auto y = l.result(s.tokens, s.out);
    lora::linear(l.exec, l.x.view(), l.base(), lora::dora{l.adapter(), l.magnitude.view()}, y.view());
    CHECK(difference(l.read(y), want) < tolerance<TestType>());
    const auto squares = lora::base_norms(l.exec, l.base());
    lora::linear(l.exec, l.x.view(), l.base(), lora::dora{l.adapter(), l.magnitude.view(), squares}, y.view());
    CHECK(difference(l.read(y), want) < tolerance<TestType>());
    const auto norms = lora::adapted_norms(l.exec, l.base(), l.adapter());
    auto z = l.template result<float>(s.tokens, s.out);
    lora::linear(l.exec, l.x.view(), l.base(), lora::dora{l.adapter(), l.magnitude.view(), norms}, y.view(),
                 {.z = z.view()});
    CHECK(difference(l.read(y), want) < tolerance<TestType>());
    CHECK(difference(l.read(z), multiply(l.x.values, transpose(l.merged()))) < tolerance<TestType>());
  }
}

TEMPLATE_TEST_CASE("dora's gradients hold the norm constant, on every executor", "[lora][cuda]", float, bf16) {
  for (const shape& s : {shape{21, 48, 40, 6}, shape{5, 37, 21, 3}}) {
    INFO(s);
    dora_layer<TestType> l(s.tokens, s.in, s.out, s.rank);
    auto da = l.template result<float>(s.rank, s.in), db = l.template result<float>(s.out, s.rank);
    auto dx = l.result(s.tokens, s.in);
    auto dm = nan_vector<float>(l.exec, s.out);
    lora::linear_backward(l.exec, l.x.view(), l.base(), lora::dora{l.adapter(), l.magnitude.view()}, l.dy.view(),
                          lora::gradients{da.view(), db.view(), dm.view()}, dx.view());
    const mat u = l.u();
    const mat h = scaled(multiply(l.x.values, transpose(l.a.values)), l.scale);
    const mat g = scaled(multiply(u, l.b.values), l.scale);
    const mat z = multiply(l.x.values, transpose(l.merged()));
    mat want_dm(1, s.out);
    for (index_t j = 0; j < s.out; ++j) {
      for (index_t i = 0; i < s.tokens; ++i) want_dm(0, j) += l.dy.values(i, j) * z(i, j);
      want_dm(0, j) /= l.norms[static_cast<std::size_t>(j)];
    }
    CHECK(difference(l.read(db), multiply(transpose(u), h)) < tolerance<TestType>());
    CHECK(difference(l.read(da), multiply(transpose(g), l.x.values)) < tolerance<TestType>());
    CHECK(difference(l.read(dx), multiply(u, l.merged())) < tolerance<TestType>());
    CHECK(difference(row_of(test::to_host(l.exec, dm)), want_dm) < tolerance<TestType>());
  }
}

TEST_CASE("dora with dropout, on every executor", "[lora][cuda]") {
  dora_layer<float> l(19, 50, 40, 6);
  const mat mask = mask_of(19, 50, 0.3, 7, 3);
  const mat dropped = times(l.x.values, mask);
  const lora::linear_options<float> options{.dropout = 0.3, .seed = 7, .stream = 3};
  std::vector<double> less = l.factors;
  for (double& f : less) f -= 1;
  const lora::dora adapter{l.adapter(), l.magnitude.view()};
  auto y = l.result(19, 40);
  lora::linear(l.exec, l.x.view(), l.base(), adapter, y.view(), options);
  const mat h = scaled(multiply(dropped, transpose(l.a.values)), l.scale), up = multiply(h, transpose(l.b.values));
  const mat plain = multiply(l.x.values, transpose(l.w.values)), z = add(multiply(dropped, transpose(l.w.values)), up);
  CHECK(difference(l.read(y), l.with_bias(add(add(plain, up), scale_columns(z, less)))) < 3e-6);

  auto da = l.result<float>(6, 50), db = l.result<float>(40, 6), dx = l.result(19, 50);
  auto dm = nan_vector<float>(l.exec, 40);
  lora::linear_backward(l.exec, l.x.view(), l.base(), adapter, l.dy.view(),
                        lora::gradients{da.view(), db.view(), dm.view()}, dx.view(), options);
  const mat u = l.u(), g = scaled(multiply(u, l.b.values), l.scale);
  CHECK(difference(l.read(da), multiply(transpose(g), dropped)) < 3e-6);
  CHECK(difference(l.read(db), multiply(transpose(u), h)) < 3e-6);
  const mat through = add(multiply(scale_columns(l.dy.values, less), l.w.values), multiply(g, l.a.values));
  CHECK(difference(l.read(dx), add(multiply(l.dy.values, l.w.values), times(through, mask))) < 3e-6);
}
