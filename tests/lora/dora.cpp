#include <catch2/catch.hpp>
#include <cstring>
#include <mlkit/io/safetensors.hpp>
#include <mlkit/lora.hpp>
#include <string>

#include "reference.hpp"
#include "test_data.hpp"

namespace lora = mlkit::lora;
using mlkit::bf16;
using mlkit::index_t;
using namespace reference;

namespace {

template <class T>
using sums = mlkit::accumulator_t<T>;

// One layer under DoRA, and what the formulas make of it, in f64; dropout as a mask on x, or none (all ones).
template <class T>
struct layer {
  index_t tokens, in, out, rank;
  mlkit::matrix<T> x, w, a, b, dy;
  mlkit::vector<T> bias, magnitude;
  double scale = 0.7;
  mat mask;

  layer(index_t t, index_t i, index_t o, index_t r)
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
        magnitude(normal_vector<T>(o, 7, 0.3f, 2.0f)),
        mask(t, i) {
    std::fill(mask.v.begin(), mask.v.end(), 1.0);
  }

  lora::adapter_view<T> adapter() const { return {a.view(), b.view(), scale}; }
  mat merged() const { return add(from(w), multiply(from(b), from(a)), scale); }
  std::vector<double> norms() const {
    std::vector<double> n(static_cast<std::size_t>(out));
    const mat m = merged();
    for (index_t o = 0; o < out; ++o) {
      double sum = 0;
      for (index_t i = 0; i < in; ++i) sum += m(o, i) * m(o, i);
      n[static_cast<std::size_t>(o)] = std::sqrt(sum);
    }
    return n;
  }
  std::vector<double> factors(double minus = 0) const {
    std::vector<double> g = norms();
    for (index_t o = 0; o < out; ++o) {
      double& n = g[static_cast<std::size_t>(o)];
      n = static_cast<double>(magnitude(o)) / n - minus;
    }
    return g;
  }
  mat dropped() const { return times(from(x), mask); }
  mat z() const { return multiply(dropped(), transpose(merged())); }
  // x W^T + bias + (g - 1) W D(x) + g s B A D(x), as PEFT has it.
  mat y() const {
    mat y =
        add(multiply(from(x), transpose(from(w))), scale_columns(multiply(dropped(), transpose(from(w))), factors(1)));
    y = add(y, scale_columns(multiply(multiply(dropped(), transpose(from(a))), transpose(from(b))), factors()), scale);
    for (index_t i = 0; i < tokens; ++i)
      for (index_t j = 0; j < out; ++j) y(i, j) += static_cast<double>(bias(j));
    return y;
  }
  mat u() const { return scale_columns(from(dy), factors()); }
  mat db() const { return scaled(multiply(transpose(u()), multiply(dropped(), transpose(from(a)))), scale); }
  mat da() const { return scaled(multiply(transpose(multiply(u(), from(b))), dropped()), scale); }
  mat dx() const {
    const mat through =
        add(multiply(scale_columns(from(dy), factors(1)), from(w)), multiply(multiply(u(), from(b)), from(a)), scale);
    return add(multiply(from(dy), from(w)), times(through, mask));
  }
  mat dm() const {
    const mat products = times(from(dy), z());
    const auto n = norms();
    mat sum(1, out);
    for (index_t o = 0; o < out; ++o)
      for (index_t t = 0; t < tokens; ++t) sum(0, o) += products(t, o) / n[static_cast<std::size_t>(o)];
    return sum;
  }
};

template <class V>
auto as_row(const V& v) {
  return mlkit::tensor_view<const typename V::value_type, 2>(v.data(), {1, v.extent(0)});
}

}  // namespace

TEMPLATE_TEST_CASE("DoRA forward and backward follow the paper, with and without dropout", "[lora][dora]", float,
                   double, bf16) {
  const struct { index_t tokens, in, out, rank; } shapes[] = {{1, 64, 48, 4}, {5, 37, 70, 3}, {300, 100, 130, 12}};
  for (const auto& s : shapes)
    for (const double p : {0.0, 0.3}) {
      INFO(s.tokens << " " << s.in << " " << s.out << " " << s.rank << " dropout " << p);
      layer<TestType> l(s.tokens, s.in, s.out, s.rank);
      if (p > 0) l.mask = mask_of(s.tokens, s.in, p, 9, 4);
      const lora::linear_options<sums<TestType>> options{.dropout = p, .seed = 9, .stream = 4};
      const lora::dense base{l.w, l.bias};
      const lora::dora dora{l.adapter(), l.magnitude};
      mlkit::matrix<TestType> y({s.tokens, s.out}), dx({s.tokens, s.in});
      mlkit::matrix<sums<TestType>> da({s.rank, s.in}), db({s.out, s.rank});
      mlkit::vector<sums<TestType>> dm({s.out});
      lora::linear(mlkit::cpu{}, l.x, base, dora, y, options);
      CHECK(difference(y, l.y()) < tolerance<TestType>());
      lora::linear_backward(mlkit::cpu{}, l.x, base, dora, l.dy, lora::gradients{da, db, dm}, dx, options);
      CHECK(difference(da, l.da()) < tolerance<TestType>());
      CHECK(difference(db, l.db()) < tolerance<TestType>());
      CHECK(difference(dx, l.dx()) < tolerance<TestType>());
      CHECK(difference(as_row(dm), l.dm()) < tolerance<TestType>());

      // With h and z kept by forward, z in the middle of something wider.
      using A = sums<TestType>;
      mlkit::matrix<A> h({s.tokens, s.rank}), wide({s.tokens, s.out + 3});
      std::fill(wide.begin(), wide.end(), A{7});
      auto keeping = options;
      keeping.h = h;
      keeping.z = {wide.data() + 2, {s.tokens, s.out}, {s.out + 3, 1}};
      mlkit::matrix<TestType> y2({s.tokens, s.out}), dx2({s.tokens, s.in});
      lora::linear(mlkit::cpu{}, l.x, base, dora, y2, keeping);
      CHECK(difference(y2, l.y()) < tolerance<TestType>());
      CHECK(difference(keeping.z, l.z()) < tolerance<TestType>());
      CHECK((wide(0, 1) == 7 && wide(s.tokens - 1, s.out + 2) == 7));
      for (index_t i = 0; i < da.size(); ++i) da.data()[i] = 1;
      for (index_t i = 0; i < db.size(); ++i) db.data()[i] = 1;
      for (index_t i = 0; i < s.out; ++i) dm(i) = 1;
      keeping.accumulate = true;
      lora::linear_backward(mlkit::cpu{}, l.x, base, dora, l.dy, lora::gradients{da, db, dm}, dx2, keeping);
      const auto plus_one = [](mat m) {
        for (double& v : m.v) v += 1;
        return m;
      };
      CHECK(difference(da, plus_one(l.da())) < tolerance<TestType>());
      CHECK(difference(db, plus_one(l.db())) < tolerance<TestType>());
      CHECK(difference(dx2, l.dx()) < tolerance<TestType>());
      CHECK(difference(as_row(dm), plus_one(l.dm())) < tolerance<TestType>());
    }
}

TEST_CASE("DoRA reads the z that is given to backward", "[lora][dora]") {
  layer<double> l(5, 7, 6, 2);
  mlkit::matrix<double> z({5, 6}), da({2, 7}), db({6, 2}), dx({5, 7});
  mlkit::vector<double> dm({6}), zero({6});
  const lora::dora dora{l.adapter(), l.magnitude};
  lora::linear_backward(mlkit::cpu{}, l.x, lora::dense{l.w}, dora, l.dy, lora::gradients{da, db, dm}, dx, {.z = z});
  for (index_t o = 0; o < 6; ++o) CHECK(dm(o) == 0);  // z is all zeros
}

TEST_CASE("DoRA's norms: computed, prepared and frozen are the same", "[lora][dora]") {
  const layer<float> l(9, 700, 90, 6);
  const lora::dense base{l.w, l.bias};
  const auto squares = lora::base_norms(mlkit::cpu{}, base);
  const auto frozen = lora::adapted_norms(mlkit::cpu{}, base, l.adapter());
  const auto want = l.norms();
  for (index_t o = 0; o < 90; ++o) CHECK(frozen.norms(o) == Approx(want[static_cast<std::size_t>(o)]).epsilon(1e-6));
  mlkit::matrix<float> y1({9, 90}), y2({9, 90}), y3({9, 90});
  lora::linear(mlkit::cpu{}, l.x, base, lora::dora{l.adapter(), l.magnitude}, y1);
  lora::linear(mlkit::cpu{}, l.x, base, lora::dora{l.adapter(), l.magnitude, squares}, y2);
  lora::linear(mlkit::cpu{}, l.x, base, lora::dora{l.adapter(), l.magnitude, frozen}, y3);
  CHECK(std::memcmp(y1.data(), y2.data(), sizeof(float) * 810) == 0);
  CHECK(std::memcmp(y1.data(), y3.data(), sizeof(float) * 810) == 0);

  // A weight stored the other way round.
  mlkit::matrix<float> turned({700, 90});
  for (index_t i = 0; i < 90; ++i)
    for (index_t j = 0; j < 700; ++j) turned(j, i) = l.w(i, j);
  const auto other = lora::adapted_norms(mlkit::cpu{}, lora::dense{transposed(turned)}, l.adapter());
  for (index_t o = 0; o < 90; ++o) CHECK(other.norms(o) == Approx(want[static_cast<std::size_t>(o)]).epsilon(1e-6));
}

TEST_CASE("a row of length zero gives zero, not NaN", "[lora][dora]") {
  layer<float> l(4, 20, 10, 2);
  for (index_t i = 0; i < 20; ++i) l.w(3, i) = 0;
  for (index_t j = 0; j < 2; ++j) l.b(3, j) = 0;
  mlkit::matrix<float> y({4, 10}), da({2, 20}), db({10, 2}), dx({4, 20});
  mlkit::vector<float> dm({10});
  const lora::dora dora{l.adapter(), l.magnitude};
  lora::linear(mlkit::cpu{}, l.x, lora::dense{l.w}, dora, y);
  for (index_t t = 0; t < 4; ++t) CHECK(y(t, 3) == 0.0f);
  lora::linear_backward(mlkit::cpu{}, l.x, lora::dense{l.w}, dora, l.dy, lora::gradients{da, db, dm}, dx);
  for (index_t i = 0; i < dx.size(); ++i) CHECK(std::isfinite(dx.data()[i]));
  CHECK(dm(3) == 0.0f);
}

TEST_CASE("DoRA has the same bits for any number of threads", "[lora][dora]") {
  const layer<float> l(150, 200, 300, 12);
  const lora::dense base{l.w, l.bias};
  const lora::dora dora{l.adapter(), l.magnitude};
  mlkit::matrix<float> y1({150, 300}), y({150, 300});
  mlkit::vector<float> dm1({300}), dm({300});
  mlkit::matrix<float> da({12, 200}), db({300, 12}), dx({150, 200});
  lora::linear(mlkit::cpu{.threads = 1}, l.x, base, dora, y1);
  lora::linear_backward(mlkit::cpu{.threads = 1}, l.x, base, dora, l.dy, lora::gradients{da, db, dm1}, dx);
  for (const int threads : {2, 3, 7}) {
    lora::linear(mlkit::cpu{.threads = threads}, l.x, base, dora, y);
    lora::linear_backward(mlkit::cpu{.threads = threads}, l.x, base, dora, l.dy, lora::gradients{da, db, dm}, dx);
    CHECK(std::memcmp(y.data(), y1.data(), sizeof(float) * 150 * 300) == 0);
    CHECK(std::memcmp(dm.data(), dm1.data(), sizeof(float) * 300) == 0);
  }
}

TEST_CASE("PEFT's DoRA layers", "[lora][dora]") {
  for (const char* kind : {"dora", "rsdora"}) {
    const auto file = mlkit::io::safetensors::open(test_data(std::string("peft_linear_") + kind + ".safetensors"));
    const auto x = file.view<float, 2>("x"), w = file.view<float, 2>("w"), dy = file.view<float, 2>("dy");
    const auto bias = file.view<float, 1>("bias"), m = file.view<float, 1>("m");
    const lora::adapter_view<float> adapter{file.view<float, 2>("a"), file.view<float, 2>("b"),
                                            file.at("scale").scalar()};
    mlkit::matrix<float> y({7, 40}), da({4, 24}), db({40, 4}), dx({7, 24});
    mlkit::vector<float> dm({40});
    const lora::dora dora{adapter, m};
    lora::linear(mlkit::cpu{}, x, lora::dense{w, bias}, dora, y);
    CHECK(difference(y, from(file.view<double, 2>("y"))) < 1e-6);
    lora::linear_backward(mlkit::cpu{}, x, lora::dense{w, bias}, dora, dy, lora::gradients{da, db, dm}, dx);
    CHECK(difference(da, from(file.view<double, 2>("da"))) < 1e-6);
    CHECK(difference(db, from(file.view<double, 2>("db"))) < 1e-6);
    CHECK(difference(dx, from(file.view<double, 2>("dx"))) < 1e-6);
    const auto want = file.view<double, 1>("dm");
    for (index_t o = 0; o < 40; ++o) CHECK(dm(o) == Approx(want(o)).epsilon(1e-5).margin(1e-5));
  }
}

TEST_CASE("a z that does not fit is refused before anything is written", "[lora][dora][errors]") {
  using Catch::Contains;
  const layer<float> l(5, 7, 6, 2);
  mlkit::matrix<float> y({5, 6}), z({5, 6}), small({5, 5}), da({2, 7}), db({6, 2}), dx({5, 7});
  mlkit::vector<float> dm({6});
  std::fill(y.begin(), y.end(), 7.0f);
  const lora::dora dora{l.adapter(), l.magnitude};
  const auto forward = [&](const lora::linear_options<float>& o) {
    lora::linear(mlkit::cpu{}, l.x, lora::dense{l.w}, dora, y, o);
  };
  const auto backward = [&](const lora::linear_options<float>& o) {
    lora::linear_backward(mlkit::cpu{}, l.x, lora::dense{l.w}, dora, l.dy, lora::gradients{da, db, dm}, dx, o);
  };
  CHECK_THROWS_WITH(forward({.z = small}), Contains("lora::linear: z has 5 columns") && Contains("6"));
  CHECK_THROWS_WITH(backward({.z = small}), Contains("lora::linear_backward: z has 5 columns") && Contains("6"));
  CHECK_THROWS_WITH(forward({.z = {z.data(), {4, 6}}}), Contains("z has 4 rows") && Contains("5"));
  CHECK_THROWS_WITH(forward({.z = {z.data(), {5, 6}, {1, 5}}}), Contains("z has elements 5 apart in a row"));
  CHECK_THROWS_WITH(forward({.z = {nullptr, {5, 6}}}), Contains("z is null"));
  CHECK_THROWS_WITH(forward({.z = y}), Contains("z") && Contains("overlap"));
  CHECK_THROWS_WITH(backward({.z = {dx.data(), {5, 6}, {7, 1}}}), Contains("z") && Contains("overlap"));
  CHECK_THROWS_WITH(lora::linear(mlkit::cpu{}, l.x, lora::dense{l.w}, l.adapter(), y, {.z = z}),
                    Contains("z is given, but only DoRA has one"));
  CHECK(std::all_of(y.begin(), y.end(), [](float v) { return v == 7; }));
}
