#include <catch2/catch.hpp>
#include <mlkit/io/safetensors.hpp>
#include <string>

#include "linear_cases.hpp"
#include "test_data.hpp"

namespace {

template <class T>
using sums = mlkit::accumulator_t<T>;

template <class T>
bool same_bits(const mlkit::matrix<T>& a, const mlkit::matrix<T>& b) {
  return std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * sizeof(T)) == 0;
}

}  // namespace

TEMPLATE_TEST_CASE("linear computes x W^T + b + s (x A^T) B^T", "[lora]", float, double, bf16, f16) {
  for (const shape& s : {shape{1, 64, 48, 4}, shape{5, 37, 70, 3}, shape{16, 128, 33, 16}, shape{33, 100, 130, 12},
                         shape{130, 65, 64, 64}, shape{2, 1, 1, 1}, shape{20, 640, 90, 20}})
    linear_cases::check_forward<TestType>(s);
}

TEMPLATE_TEST_CASE("linear_backward gives da, db and dx", "[lora]", float, double, bf16, f16) {
  for (const shape& s : {shape{1, 64, 48, 4}, shape{5, 37, 70, 3}, shape{33, 100, 130, 12}, shape{130, 65, 64, 17},
                         shape{40, 200, 90, 8}})
    linear_cases::check_backward<TestType>(s);
}

TEMPLATE_TEST_CASE("in low precision, at most twice the error of the plain algorithm", "[lora]", bf16, f16) {
  linear_cases::check_low_precision<TestType>({40, 300, 90, 12});
}

TEST_CASE("a backward with the saved h, and one that adds, agree with the plain one", "[lora]") {
  linear_cases::check_saved_h<float>({21, 50, 40, 6});
}

TEMPLATE_TEST_CASE("dropout drops x on its way into A alone, by the counters of its stream", "[lora]", float, double,
                   bf16) {
  for (const index_t in : {64, 37, 130}) linear_cases::check_dropout<TestType>({19, in, 50, 5}, 1234567890123);
}

TEMPLATE_TEST_CASE("a scale of 0 gives the base's bits", "[lora]", float, double, bf16, f16) {
  for (const index_t tokens : {1, 7, 40}) linear_cases::check_no_scale<TestType>({tokens, 90, 70, 8});
}

TEST_CASE("gradients agree with central differences in f64", "[lora]") {
  layer<double> l(6, 9, 7, 3);
  for (const double p : {0.0, 0.4}) {
    const lora::linear_options<double> options{.dropout = p, .seed = 11, .stream = 5};
    const lora::dense base{l.w, l.bias};
    mlkit::matrix<double> y({6, 7}), da({3, 9}), db({7, 3}), dx({6, 9});
    lora::linear_backward(mlkit::cpu{}, l.x, base, l.adapter(), l.dy, lora::gradients{da, db}, dx, options);
    const auto loss = [&] {
      lora::linear(mlkit::cpu{}, l.x, base, l.adapter(), y, options);
      double sum = 0;
      for (index_t i = 0; i < y.size(); ++i) sum += y.data()[i] * l.dy.data()[i];
      return sum;
    };
    const auto check = [&](auto& parameter, const mlkit::matrix<double>& gradient) {
      for (index_t i = 0; i < parameter.size(); ++i) {
        const double start = parameter.data()[i], step = 1e-5;
        parameter.data()[i] = start + step;
        const double up = loss();
        parameter.data()[i] = start - step;
        const double down = loss();
        parameter.data()[i] = start;
        CHECK(gradient.data()[i] == Approx((up - down) / (2 * step)).epsilon(1e-7).margin(1e-8));
      }
    };
    check(l.a, da);
    check(l.b, db);
    check(l.x, dx);
  }
}

TEST_CASE("views with any strides are read and written where they lie", "[lora]") {
  const layer<float> l(14, 60, 44, 5);
  mlkit::matrix<float> xt({60, 14}), wt({60, 44}), at({60, 5}), bt({5, 44}), yt({44, 14}), wide({14, 100});
  for (index_t i = 0; i < 14; ++i)
    for (index_t j = 0; j < 60; ++j) xt(j, i) = l.x.view()(i, j);
  for (index_t i = 0; i < 44; ++i)
    for (index_t j = 0; j < 60; ++j) wt(j, i) = l.w.view()(i, j);
  for (index_t i = 0; i < 5; ++i)
    for (index_t j = 0; j < 60; ++j) at(j, i) = l.a.view()(i, j);
  for (index_t i = 0; i < 44; ++i)
    for (index_t j = 0; j < 5; ++j) bt(j, i) = l.b.view()(i, j);
  const lora::adapter_view<float> turned{transposed(at), transposed(bt), l.scale};
  const lora::linear_options<float> options{.dropout = 0.25, .seed = 3};
  mlkit::matrix<float> y({14, 44});
  lora::linear(mlkit::cpu{}, l.x, lora::dense{l.w}, l.adapter(), y, options);
  lora::linear(mlkit::cpu{}, transposed(xt), lora::dense{transposed(wt)}, turned, transposed(yt), options);
  CHECK(difference(transposed(yt), from(y)) < 1e-6);
  mlkit::matrix_view<float> inside(wide.data() + 3, {14, 44}, {100, 1});
  lora::linear(mlkit::cpu{}, transposed(xt), lora::dense{l.w}, turned, inside, options);
  CHECK(difference(inside, from(y)) < 1e-6);
  for (index_t i = 0; i < 14; ++i)
    for (index_t j = 0; j < 100; ++j)
      if (j < 3 || j >= 47) CHECK(wide(i, j) == 0.0f);

  mlkit::matrix<float> da({5, 60}), db({44, 5}), dx({14, 60}), dxt({60, 14}), dat({60, 5});
  lora::linear_backward(mlkit::cpu{}, l.x, lora::dense{l.w}, l.adapter(), l.dy, lora::gradients{da, db}, dx, options);
  const mat want_b = from(db);
  auto turned_da = transposed(dat), turned_dx = transposed(dxt);
  lora::linear_backward(mlkit::cpu{}, transposed(xt), lora::dense{transposed(wt)}, turned, l.dy,
                        lora::gradients{turned_da, db}, turned_dx, options);
  CHECK(difference(turned_da, from(da)) < 2e-6);
  CHECK(difference(db, want_b) < 2e-6);
  CHECK(difference(turned_dx, from(dx)) < 2e-6);
}

TEST_CASE("types mix, as long as f64 stays alone", "[lora]") {
  const layer<float> l(10, 48, 40, 4);
  const auto x = normal<bf16>(10, 48, 1);
  const auto w = normal<bf16>(40, 48, 2, 0.3f);
  mlkit::matrix<f16> y({10, 40});
  lora::linear(mlkit::cpu{}, x, lora::dense{w, l.bias}, l.adapter(), y);
  const mat merged = add(from(w), multiply(from(l.b), from(l.a)), l.scale);
  CHECK(difference(y, l.with_bias(multiply(from(x), transpose(merged)))) < 0.01);
}

TEST_CASE("the same bits for any number of threads", "[lora]") {
  const layer<float> l(300, 200, 300, 12);
  const lora::dense base{l.w, l.bias};
  const lora::linear_options<float> options{.dropout = 0.1, .seed = 3};
  mlkit::matrix<float> y1({300, 300}), da1({12, 200}), db1({300, 12}), dx1({300, 200});
  lora::linear(mlkit::cpu{.threads = 1}, l.x, base, l.adapter(), y1, options);
  lora::linear_backward(mlkit::cpu{.threads = 1}, l.x, base, l.adapter(), l.dy, lora::gradients{da1, db1}, dx1,
                        options);
  for (const int threads : {2, 3, 7}) {
    mlkit::matrix<float> y({300, 300}), da({12, 200}), db({300, 12}), dx({300, 200});
    lora::linear(mlkit::cpu{.threads = threads}, l.x, base, l.adapter(), y, options);
    lora::linear_backward(mlkit::cpu{.threads = threads}, l.x, base, l.adapter(), l.dy, lora::gradients{da, db}, dx,
                          options);
    CHECK(same_bits(y, y1));
    CHECK(same_bits(da, da1));
    CHECK(same_bits(db, db1));
    CHECK(same_bits(dx, dx1));
  }
}

TEST_CASE("more tokens than are worked on at once", "[lora]") {
  const index_t tokens = 2 * lora::detail::tokens_at_once + 5;
  layer<float> l(tokens, 8, 6, 2);
  l.mask = mask_of(tokens, 8, 0.5, 3, 0);
  const lora::linear_options<float> options{.dropout = 0.5, .seed = 3};
  mlkit::matrix<float> y({tokens, 6}), da({2, 8}), db({6, 2}), dx({tokens, 8});
  lora::linear(mlkit::cpu{}, l.x, l.base(), l.adapter(), y, options);
  CHECK(difference(y, l.y()) < 1e-6);
  lora::linear_backward(mlkit::cpu{}, l.x, l.base(), l.adapter(), l.dy, lora::gradients{da, db}, dx, options);
  CHECK(difference(db, l.db()) < 1e-5);
  CHECK(difference(da, l.da()) < 1e-5);
  CHECK(difference(dx, l.dx()) < 1e-6);
}

TEST_CASE("PEFT's linear layers", "[lora]") {
  for (const char* kind : {"lora", "rslora"}) {
    const auto file = mlkit::io::safetensors::open(test_data(std::string("peft_linear_") + kind + ".safetensors"));
    const auto x = file.view<float, 2>("x"), w = file.view<float, 2>("w"), dy = file.view<float, 2>("dy");
    const auto bias = file.view<float, 1>("bias");
    const double scale = file.at("scale").scalar();
    // Through an adapter's own alpha: rank 4, alpha 8.
    lora::adapter<float> adapter{file.tensor<float, 2>("a"), file.tensor<float, 2>("b"), 8, kind[0] == 'r'};
    CHECK(adapter.scale() == Approx(scale));
    mlkit::matrix<float> y({7, 40}), da({4, 24}), db({40, 4}), dx({7, 24});
    lora::linear(mlkit::cpu{}, x, lora::dense{w, bias}, adapter, y);
    CHECK(difference(y, from(file.view<double, 2>("y"))) < 1e-6);
    lora::linear_backward(mlkit::cpu{}, x, lora::dense{w, bias}, adapter, dy, lora::gradients{da, db}, dx);
    CHECK(difference(da, from(file.view<double, 2>("da"))) < 1e-6);
    CHECK(difference(db, from(file.view<double, 2>("db"))) < 1e-6);
    CHECK(difference(dx, from(file.view<double, 2>("dx"))) < 1e-6);
  }
}
