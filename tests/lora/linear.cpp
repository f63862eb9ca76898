#include <catch2/catch.hpp>
#include <mlkit/io/safetensors.hpp>
#include <mlkit/lora.hpp>
#include <string>

#include "reference.hpp"
#include "test_data.hpp"

namespace lora = mlkit::lora;
using mlkit::bf16;
using mlkit::f16;
using mlkit::index_t;
using namespace reference;

namespace {

template <class T>
using sums = mlkit::accumulator_t<T>;

// One adapted layer and what the formulas make of it, in f64.
template <class T>
struct layer {
  index_t tokens, in, out, rank;
  mlkit::matrix<T> x, w, a, b, dy;
  mlkit::vector<T> bias;
  double scale;

  layer(index_t t, index_t i, index_t o, index_t r, double s = 0.5)
      : tokens(t),
        in(i),
        out(o),
        rank(r),
        x(normal<T>(t, i, 1)),
        w(normal<T>(o, i, 2, 0.3f)),
        a(normal<T>(r, i, 3, 0.3f)),
        b(normal<T>(o, r, 4, 0.3f)),
        dy(normal<T>(t, o, 5)),
        bias(normal_vector<T>(o, 6)),
        scale(s) {}

  lora::adapter_view<T> adapter() const { return {a.view(), b.view(), scale}; }
  mat merged() const { return add(from(w), multiply(from(b), from(a)), scale); }
  mat with_bias(mat y) const {
    for (index_t i = 0; i < y.rows; ++i)
      for (index_t j = 0; j < y.cols; ++j) y(i, j) += static_cast<double>(bias(j));
    return y;
  }
  mat y() const { return with_bias(multiply(from(x), transpose(merged()))); }
  mat dx() const { return multiply(from(dy), merged()); }
  mat db() const { return scaled(multiply(transpose(from(dy)), multiply(from(x), transpose(from(a)))), scale); }
  mat da() const { return scaled(multiply(transpose(multiply(from(dy), from(b))), from(x)), scale); }
};

template <class T>
bool same_bits(const mlkit::matrix<T>& a, const mlkit::matrix<T>& b) {
  return std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * sizeof(T)) == 0;
}

// The mask, word by word as its definition says.
mat mask_of(index_t rows, index_t cols, double p, std::uint64_t seed, std::uint64_t stream) {
  const mlkit::random_stream random{seed, stream};
  mat m(rows, cols);
  for (index_t i = 0; i < rows * cols; ++i)
    m.v[static_cast<std::size_t>(i)] =
        random.bits(static_cast<std::uint64_t>(i)) >= static_cast<std::uint32_t>(p * 0x1p32) ? 1 / (1 - p) : 0;
  return m;
}

}  // namespace

TEMPLATE_TEST_CASE("linear computes x W^T + b + s (x A^T) B^T", "[lora]", float, double, bf16, f16) {
  const struct {
    index_t tokens, in, out, rank;
  } shapes[] = {{1, 64, 48, 4},    {5, 37, 70, 3}, {16, 128, 33, 16}, {33, 100, 130, 12},
                {130, 65, 64, 64}, {2, 1, 1, 1},   {20, 640, 90, 20}};
  for (const auto& s : shapes) {
    const layer<TestType> l(s.tokens, s.in, s.out, s.rank);
    mlkit::matrix<TestType> y({s.tokens, s.out});
    INFO(s.tokens << " " << s.in << " " << s.out << " " << s.rank);
    lora::linear(mlkit::cpu{}, l.x, lora::dense{l.w, l.bias}, l.adapter(), y);
    CHECK(difference(y, l.y()) < tolerance<TestType>());
    lora::linear(mlkit::cpu{}, l.x, lora::dense{l.w, l.bias}, y);
    CHECK(difference(y, l.with_bias(multiply(from(l.x), transpose(from(l.w))))) < tolerance<TestType>());
  }
}

TEMPLATE_TEST_CASE("linear_backward gives da, db and dx", "[lora]", float, double, bf16, f16) {
  const struct {
    index_t tokens, in, out, rank;
  } shapes[] = {{1, 64, 48, 4}, {5, 37, 70, 3}, {33, 100, 130, 12}, {130, 65, 64, 17}, {40, 200, 90, 8}};
  for (const auto& s : shapes) {
    const layer<TestType> l(s.tokens, s.in, s.out, s.rank);
    INFO(s.tokens << " " << s.in << " " << s.out << " " << s.rank);
    mlkit::matrix<sums<TestType>> da({s.rank, s.in}), db({s.out, s.rank});
    mlkit::matrix<TestType> dx({s.tokens, s.in});
    lora::linear_backward(mlkit::cpu{}, l.x, lora::dense{l.w, l.bias}, l.adapter(), l.dy, lora::gradients{da, db}, dx);
    CHECK(difference(da, l.da()) < tolerance<TestType>());
    CHECK(difference(db, l.db()) < tolerance<TestType>());
    CHECK(difference(dx, l.dx()) < tolerance<TestType>());
  }
}

TEMPLATE_TEST_CASE("in low precision, at most twice the error of the plain algorithm", "[lora]", bf16, f16) {
  const layer<TestType> l(40, 300, 90, 12);
  const auto round = [](mat m) {
    for (double& v : m.v) v = static_cast<double>(TestType(static_cast<float>(v)));
    return m;
  };
  // Every intermediate result rounded to the type, as a chain of separate operations does.
  const mat h = round(multiply(from(l.x), transpose(from(l.a))));
  const mat up = round(scaled(round(multiply(h, transpose(from(l.b)))), l.scale));
  const mat naive = round(add(round(l.with_bias(multiply(from(l.x), transpose(from(l.w))))), up));
  mlkit::matrix<TestType> y({40, 90});
  lora::linear(mlkit::cpu{}, l.x, lora::dense{l.w, l.bias}, l.adapter(), y);
  CHECK(difference(y, l.y()) <= 2 * difference(mlkit::matrix_view<const double>(naive.v.data(), {40, 90}), l.y()));

  const mat g = round(scaled(multiply(from(l.dy), from(l.b)), l.scale));
  const mat naive_dx = round(add(round(multiply(from(l.dy), from(l.w))), round(multiply(g, from(l.a)))));
  mlkit::matrix<TestType> dx({40, 300}), da({12, 300}), db({90, 12});
  lora::linear_backward(mlkit::cpu{}, l.x, lora::dense{l.w, l.bias}, l.adapter(), l.dy, lora::gradients{da, db}, dx);
  CHECK(difference(dx, l.dx()) <=
        2 * difference(mlkit::matrix_view<const double>(naive_dx.v.data(), {40, 300}), l.dx()));
  const mat naive_da = round(multiply(transpose(g), from(l.x)));
  CHECK(difference(da, l.da()) <=
        2 * difference(mlkit::matrix_view<const double>(naive_da.v.data(), {12, 300}), l.da()));
  const mat naive_db = round(multiply(transpose(from(l.dy)), round(scaled(h, l.scale))));
  CHECK(difference(db, l.db()) <=
        2 * difference(mlkit::matrix_view<const double>(naive_db.v.data(), {90, 12}), l.db()));
}

TEST_CASE("a backward with the saved h, and one that adds, agree with the plain one", "[lora]") {
  const layer<float> l(21, 50, 40, 6);
  mlkit::matrix<float> da({6, 50}), db({40, 6}), dx({21, 50}), h({21, 6}), y({21, 40});
  const lora::dense base{l.w};
  lora::linear(mlkit::cpu{}, l.x, base, l.adapter(), y, {.h = h});
  CHECK(difference(h, scaled(multiply(from(l.x), transpose(from(l.a))), l.scale)) < 1e-6);
  lora::linear_backward(mlkit::cpu{}, l.x, base, l.adapter(), l.dy, lora::gradients{da, db}, dx, {.h = h});
  CHECK(difference(da, l.da()) < 3e-6);
  CHECK(difference(db, l.db()) < 3e-6);
  CHECK(difference(dx, l.dx()) < 3e-6);
  mlkit::matrix_view<float> no_dx;
  lora::linear_backward(mlkit::cpu{}, l.x, base, l.adapter(), l.dy, lora::gradients{da, db}, no_dx,
                        {.accumulate = true});
  CHECK(difference(da, scaled(l.da(), 2)) < 3e-6);
  CHECK(difference(db, scaled(l.db(), 2)) < 3e-6);
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
    const auto check = [&](mlkit::matrix<double>& parameter, const mlkit::matrix<double>& gradient) {
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

TEMPLATE_TEST_CASE("dropout drops x on its way into A alone, by the counters of its stream", "[lora]", float, double,
                   bf16) {
  for (const index_t in : {64, 37, 130}) {
    const layer<TestType> l(19, in, 50, 5);
    const double p = 0.3;
    const mat mask = mask_of(19, in, p, 9, 1234567890123);
    const mat dropped = times(from(l.x), mask);
    const lora::linear_options<sums<TestType>> options{.dropout = p, .seed = 9, .stream = 1234567890123};
    mlkit::matrix<TestType> y({19, 50}), dx({19, in});
    mlkit::matrix<sums<TestType>> da({5, in}), db({50, 5});
    const lora::dense base{l.w, l.bias};
    const mat h = multiply(dropped, transpose(from(l.a)));
    lora::linear(mlkit::cpu{}, l.x, base, l.adapter(), y, options);
    CHECK(difference(y, l.with_bias(add(multiply(from(l.x), transpose(from(l.w))), multiply(h, transpose(from(l.b))),
                                        l.scale))) < tolerance<TestType>());
    lora::linear_backward(mlkit::cpu{}, l.x, base, l.adapter(), l.dy, lora::gradients{da, db}, dx, options);
    const mat g = multiply(from(l.dy), from(l.b));
    CHECK(difference(db, scaled(multiply(transpose(from(l.dy)), h), l.scale)) < tolerance<TestType>());
    CHECK(difference(da, scaled(multiply(transpose(g), dropped), l.scale)) < tolerance<TestType>());
    CHECK(difference(dx, add(multiply(from(l.dy), from(l.w)), times(multiply(g, from(l.a)), mask), l.scale)) <
          tolerance<TestType>());

    mlkit::matrix<TestType> plain({19, 50});
    lora::linear(mlkit::cpu{}, l.x, base, l.adapter(), plain);
    lora::linear(mlkit::cpu{}, l.x, base, l.adapter(), y, {.dropout = p, .training = false});
    CHECK(same_bits(y, plain));
  }
}

TEMPLATE_TEST_CASE("a scale of 0 gives the base's bits", "[lora]", float, double, bf16, f16) {
  for (const index_t tokens : {1, 7, 40}) {
    layer<TestType> l(tokens, 90, 70, 8, 0);
    mlkit::matrix<TestType> with({tokens, 70}), without({tokens, 70});
    const lora::dense base{l.w, l.bias};
    lora::linear(mlkit::cpu{}, l.x, base, l.adapter(), with);
    lora::linear(mlkit::cpu{}, l.x, base, without);
    CHECK(same_bits(with, without));
    mlkit::matrix<sums<TestType>> h({tokens, 8});
    lora::linear(mlkit::cpu{}, l.x, base, l.adapter(), with, {.dropout = 0.5, .h = h});
    CHECK(same_bits(with, without));
  }
}

TEST_CASE("views with any strides are read and written where they lie", "[lora]") {
  const layer<float> l(14, 60, 44, 5);
  mlkit::matrix<float> xt({60, 14}), wt({60, 44}), at({60, 5}), bt({5, 44}), yt({44, 14}), wide({14, 100});
  for (index_t i = 0; i < 14; ++i)
    for (index_t j = 0; j < 60; ++j) xt(j, i) = l.x(i, j);
  for (index_t i = 0; i < 44; ++i)
    for (index_t j = 0; j < 60; ++j) wt(j, i) = l.w(i, j);
  for (index_t i = 0; i < 5; ++i)
    for (index_t j = 0; j < 60; ++j) at(j, i) = l.a(i, j);
  for (index_t i = 0; i < 44; ++i)
    for (index_t j = 0; j < 5; ++j) bt(j, i) = l.b(i, j);
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
  const layer<float> l(tokens, 8, 6, 2);
  const lora::linear_options<float> options{.dropout = 0.5, .seed = 3};
  const mat mask = mask_of(tokens, 8, 0.5, 3, 0);
  const mat h = multiply(times(from(l.x), mask), transpose(from(l.a)));
  mlkit::matrix<float> y({tokens, 6}), da({2, 8}), db({6, 2}), dx({tokens, 8});
  const lora::dense base{l.w};
  lora::linear(mlkit::cpu{}, l.x, base, l.adapter(), y, options);
  CHECK(difference(y, add(multiply(from(l.x), transpose(from(l.w))), multiply(h, transpose(from(l.b))), l.scale)) <
        1e-6);
  lora::linear_backward(mlkit::cpu{}, l.x, base, l.adapter(), l.dy, lora::gradients{da, db}, dx, options);
  CHECK(difference(db, scaled(multiply(transpose(from(l.dy)), h), l.scale)) < 1e-5);
  CHECK(difference(da, scaled(multiply(transpose(multiply(from(l.dy), from(l.b))), times(from(l.x), mask)), l.scale)) <
        1e-5);
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
