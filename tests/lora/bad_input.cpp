#include <catch2/catch.hpp>
#include <cstring>
#include <functional>
#include <limits>
#include <mlkit/lora.hpp>
#include <string>

#include "reference.hpp"

namespace lora = mlkit::lora;
using Catch::Matchers::Contains;
using mlkit::index_t;
using mlkit::shape_error;
using mlkit::value_error;
using namespace reference;

namespace {

constexpr float poison = 12345;
constexpr float inf = std::numeric_limits<float>::infinity();

template <class T>
struct poisoned {
  mlkit::matrix<T> m;
  explicit poisoned(index_t rows, index_t cols) : m({rows, cols}) { std::fill(m.begin(), m.end(), T(poison)); }
  bool untouched() const {
    return std::all_of(m.begin(), m.end(), [](T v) { return v == T(poison); });
  }
};

// A layer of 6 tokens, 8 inputs, 5 outputs, rank 2, with everything that calls need.
struct setting {
  mlkit::matrix<float> x = normal<float>(6, 8, 1), w = normal<float>(5, 8, 2), a = normal<float>(2, 8, 3),
                       b = normal<float>(5, 2, 4), dy = normal<float>(6, 5, 5);
  mlkit::vector<float> bias = normal_vector<float>(5, 6), m = normal_vector<float>(5, 7);
  poisoned<float> y{6, 5}, da{2, 8}, db{5, 2}, dx{6, 8}, h{6, 2}, dm{5, 1};

  lora::adapter_view<float> adapter() const { return {a.view(), b.view(), 0.5}; }
  lora::dense<float> base() const { return lora::dense{w, bias}; }
  bool untouched() const {
    return y.untouched() && da.untouched() && db.untouched() && dx.untouched() && h.untouched() && dm.untouched();
  }

  template <class Error, class Call>
  void refuses(Call&& call, const std::string& text) {
    INFO(text);
    CHECK_THROWS_AS(call(), Error);
    CHECK_THROWS_WITH(call(), Contains(text));
    CHECK(untouched());
  }
};

}  // namespace

TEST_CASE("lora::linear refuses what does not fit, and says what", "[lora][bad input]") {
  setting s;
  const mlkit::cpu exec;
  const auto p = s.adapter();
  const auto call = [&](const auto& x, const auto& base, const auto& adapter, auto&& y,
                        const lora::linear_options<float>& o = {}) {
    return [&, y, o] { lora::linear(exec, x, base, adapter, y, o); };
  };
  const auto x7 = normal<float>(6, 7, 1);
  s.refuses<shape_error>(call(x7, s.base(), p, s.y.m.view()), "lora::linear: x has 7 columns, but base has 8 inputs");
  mlkit::matrix_view<float> y4(s.y.m.data(), {6, 4}), y5(s.y.m.data(), {5, 5});
  s.refuses<shape_error>(call(s.x, s.base(), p, y4), "y has 4 columns, but base has 5 outputs");
  s.refuses<shape_error>(call(s.x, s.base(), p, y5), "y has 5 rows, but x has 6");
  mlkit::matrix_view<float> crossed(s.y.m.data(), {6, 5}, {2, 1});
  s.refuses<shape_error>(call(s.x, s.base(), p, crossed), "y of shape [6, 5] has overlapping strides [2, 1]");
  s.refuses<value_error>(call(s.x, s.base(), p, mlkit::matrix_view<float>(nullptr, {6, 5})),
                         "y is null, but has shape [6, 5]");
  s.refuses<value_error>(call(mlkit::matrix_view<const float>(nullptr, {6, 8}), s.base(), p, s.y.m.view()),
                         "x is null, but has shape [6, 8]");
  s.refuses<value_error>(call(s.x, lora::dense{mlkit::matrix_view<const float>(nullptr, {5, 8})}, p, s.y.m.view()),
                         "base is null");
  s.refuses<shape_error>(call(s.x, s.base(), p, mlkit::matrix_view<float>(s.x.data(), {6, 5}, {8, 1})),
                         "y [6, 5] overlaps x [6, 8]");
  s.refuses<shape_error>(call(s.x, s.base(), p, mlkit::matrix_view<float>(s.w.data(), {6, 5})),
                         "y [6, 5] overlaps base [5, 8]");
  const auto bias4 = normal_vector<float>(4, 1);
  s.refuses<shape_error>(call(s.x, lora::dense{s.w, bias4}, p, s.y.m.view()),
                         "bias has 4 elements, but the output has 5");

  const auto adapter = [&](const auto& a, const auto& b, double scale = 1) {
    return lora::adapter_view<float>{mlkit::as_view(a), mlkit::as_view(b), scale};
  };
  const mlkit::matrix<float> a0({0, 8}), b0({5, 0}), a7({2, 7}), b4({4, 2}), b3({5, 3});
  s.refuses<shape_error>(call(s.x, s.base(), adapter(a0, b0), s.y.m.view()), "adapter has rank 0");
  s.refuses<shape_error>(call(s.x, s.base(), adapter(a7, s.b), s.y.m.view()),
                         "adapter.a has 7 columns, but base has 8");
  s.refuses<shape_error>(call(s.x, s.base(), adapter(s.a, b4), s.y.m.view()), "adapter.b has 4 rows, but base has 5");
  s.refuses<shape_error>(call(s.x, s.base(), adapter(s.a, b3), s.y.m.view()),
                         "adapter.b has 3 columns, but adapter.a has 2 rows");
  for (const double bad : {double{inf}, -double{inf}, std::nan("")})
    s.refuses<value_error>(call(s.x, s.base(), adapter(s.a, s.b, bad), s.y.m.view()), "which is not finite");
  s.refuses<value_error>(
      call(s.x, s.base(), adapter(mlkit::matrix_view<const float>(nullptr, {2, 8}), s.b), s.y.m.view()),
      "adapter.a is null, but has shape [2, 8]");
  s.refuses<shape_error>(call(s.x, s.base(), p, mlkit::matrix_view<float>(s.b.data(), {6, 5})),
                         "y [6, 5] overlaps adapter.b [5, 2]");

  for (const double bad : {1.0, -0.1, 2.0, std::nan("")})
    s.refuses<value_error>(call(s.x, s.base(), p, s.y.m.view(), {.dropout = bad}), "is outside [0, 1)");
  poisoned<float> h5(5, 2), h3(6, 3);
  s.refuses<shape_error>(call(s.x, s.base(), p, s.y.m.view(), {.h = h5.m}), "h has 5 rows, but x has 6");
  s.refuses<shape_error>(call(s.x, s.base(), p, s.y.m.view(), {.h = h3.m}), "h has 3 columns, but adapter.a has 2");
  CHECK((h5.untouched() && h3.untouched()));
  s.refuses<value_error>([&] { lora::linear(mlkit::cpu{.threads = -1}, s.x, s.base(), p, s.y.m); }, "is negative");
}

TEST_CASE("lora::linear_backward refuses what does not fit", "[lora][bad input]") {
  setting s;
  const mlkit::cpu exec;
  const auto p = s.adapter();
  const auto run = [&](auto&& x, auto&& dy, auto&& g, auto&& dx) {
    return [&, g, dx] { lora::linear_backward(exec, x, s.base(), p, dy, g, dx); };
  };
  const lora::gradients g{s.da.m, s.db.m};
  const auto dx = s.dx.m.view();
  const auto dy4 = normal<float>(6, 4, 1), dy7 = normal<float>(7, 5, 1);
  s.refuses<shape_error>(run(s.x, dy4, g, dx), "dy has 4 columns, but base has 5 outputs");
  s.refuses<shape_error>(run(s.x, dy7, g, dx), "dy has 7 rows, but x has 6");
  poisoned<float> da3(3, 8), db4(4, 2), dx7(6, 7);
  s.refuses<shape_error>(run(s.x, s.dy, lora::gradients{da3.m, s.db.m}, dx), "da has 3 rows, but adapter.a has 2");
  s.refuses<shape_error>(run(s.x, s.dy, lora::gradients{s.da.m, db4.m}, dx), "db has 4 rows, but adapter.b has 5");
  s.refuses<shape_error>(run(s.x, s.dy, g, dx7.m.view()), "dx has 7 columns, but x has 8");
  CHECK((da3.untouched() && db4.untouched() && dx7.untouched()));
  s.refuses<shape_error>(run(s.x, s.dy, g, s.x.view()), "dx [6, 8] overlaps x [6, 8]");
  s.refuses<shape_error>(run(s.x, s.dy, lora::gradients{s.da.m, mlkit::matrix_view<float>(s.da.m.data(), {5, 2})}, dx),
                         "db [5, 2] overlaps da [2, 8]");
  s.refuses<shape_error>(run(s.x, s.dy, lora::gradients<float>{}, dx), "da has 0 rows, but adapter.a has 2");
  s.refuses<value_error>(
      run(s.x, s.dy, lora::gradients{s.da.m, s.db.m, mlkit::vector_view<float>(s.dm.m.data(), {5})}, dx),
      "dmagnitude is given, but adapter has none");
  const lora::dora dora{p, s.m};
  s.refuses<shape_error>([&] { lora::linear_backward(exec, s.x, s.base(), dora, s.dy, g, dx); },
                         "dmagnitude has 0 elements, but base has 5 outputs");
  const auto m4 = normal_vector<float>(4, 1);
  s.refuses<shape_error>(
      [&] {
        lora::linear(exec, s.x, s.base(), lora::dora{p, m4}, s.y.m);
      },
      "magnitude has 4 elements, but the output has 5");
  const lora::frozen_norms<float> norms{normal_vector<float>(6, 1)};
  s.refuses<shape_error>(
      [&] {
        lora::linear(exec, s.x, s.base(), lora::dora{p, s.m, norms}, s.y.m);
      },
      "the adapted norms has 6 elements");
}

TEST_CASE("batches of adapters refuse ids and starts that do not fit", "[lora][bad input]") {
  setting s;
  const mlkit::cpu exec;
  const std::vector<lora::adapter_view<float>> adapters(3, s.adapter());
  const auto run = [&](std::vector<int> ids) {
    return [&, ids] { lora::linear(exec, s.x, s.base(), lora::per_row{adapters, ids}, s.y.m); };
  };
  s.refuses<value_error>(run({0, 1, 2, 3, 0, 0}), "lora::linear: ids[3] = 3 is outside [-1, 3)");
  s.refuses<value_error>(run({0, 1, 2, 0, -2, 0}), "ids[4] = -2 is outside [-1, 3)");
  s.refuses<shape_error>(run({0, 1, 2}), "ids has 3 elements, but x has 6");
  const auto starts = [&](std::vector<int> at) {
    return [&, at] { lora::linear(exec, s.x, s.base(), lora::segments{adapters, at}, s.y.m); };
  };
  s.refuses<shape_error>(starts({0, 2, 6}), "starts has 3 elements, but 3 adapters need 4");
  s.refuses<value_error>(starts({1, 2, 3, 6}), "starts[0] = 1 is not 0");
  s.refuses<value_error>(starts({0, 4, 3, 6}), "starts[2] = 3 is less than starts[1] = 4");
  s.refuses<value_error>(starts({0, 4, 5, 7}), "starts ends with 7, but x has 6 rows");
  const std::vector<lora::adapter_view<float>> wrong{s.adapter(), {s.a.view(), s.b.view(), double{inf}}};
  s.refuses<value_error>(
      [&] {
        lora::linear(exec, s.x, s.base(), lora::per_row{wrong, std::vector<int>(6, 0)}, s.y.m);
      },
      "adapters[1] has scale inf");
}

TEST_CASE("merge refuses what does not fit", "[lora][bad input]") {
  setting s;
  const mlkit::cpu exec;
  const auto before = s.w.clone();
  const auto refuses = [&](auto&& call, const std::string& text) {
    CHECK_THROWS_WITH(call(), Contains(text));
    CHECK(std::memcmp(before.data(), s.w.data(), sizeof(float) * 40) == 0);
  };
  const mlkit::matrix<float> a7({2, 7}), b4({4, 2});
  refuses(
      [&] {
        lora::merge(exec, s.w, lora::adapter_view<float>{a7, s.b, 1});
      },
      "shape_error: lora::merge: adapter.a has 7 columns, but w has 8");
  refuses(
      [&] {
        lora::merge(exec, s.w, lora::adapter_view<float>{s.a, b4, 1});
      },
      "shape_error: lora::merge: adapter.b has 4 rows, but w has 5");
  refuses([&] { lora::merge(exec, s.w, s.adapter(), {.weight = std::nan("")}); }, "is not finite");
  refuses(
      [&] {
        lora::merge(exec, s.w, std::vector{s.adapter(), s.adapter()}, std::vector<float>{1});
      },
      "weights has 1 elements, but adapters has 2");
  refuses(
      [&] {
        lora::merge(exec, mlkit::matrix_view<float>(s.w.data(), {5, 8}, {1, 1}), s.adapter());
      },
      "overlapping strides");
  refuses(
      [&] {
        lora::unmerge(exec, s.w, lora::dora{s.adapter(), s.m});
      },
      "the norms from before the merge are needed");
}

TEST_CASE("conv2d refuses geometry that does not fit", "[lora][bad input]") {
  const mlkit::cpu exec;
  mlkit::tensor<float, 4> x({1, 2, 5, 5}), y({1, 3, 4, 4});
  const mlkit::matrix<float> w({3, 8}), a({1, 8}), b({3, 1});
  const lora::adapter_view<float> p{a, b, 1};
  const auto call = [&](const lora::conv_options& o) {
    return [&, o] { lora::conv2d(exec, x, lora::dense{w}, p, y, o); };
  };
  call({.kernel = {2, 2}})();
  std::fill(y.begin(), y.end(), poison);
  CHECK_THROWS_WITH(call({.kernel = {3, 2}})(), Contains("12 elements to a patch, but base has 8 inputs"));
  CHECK_THROWS_WITH(call({.kernel = {2, 2}, .stride = {0, 1}})(), Contains("stride[0] = 0 is not positive"));
  CHECK_THROWS_WITH(call({.kernel = {2, 2}, .padding = {0, -1}})(), Contains("padding[1] = -1 is negative"));
  CHECK_THROWS_WITH(call({.kernel = {2, 2}, .dilation = {1, 2}})(),
                    Contains("y has 4 columns, but the convolution has 3"));
  CHECK(std::all_of(y.begin(), y.end(), [](float v) { return v == poison; }));
}

TEST_CASE("no tokens is no work, and no error", "[lora][bad input]") {
  setting s;
  const mlkit::cpu exec;
  const mlkit::matrix<float> x({0, 8}), dy({0, 5});
  mlkit::matrix<float> y({0, 5}), dx({0, 8});
  lora::linear(exec, x, s.base(), s.adapter(), y, {.dropout = 0.5});
  lora::linear(exec, x, s.base(), lora::dora{s.adapter(), s.m}, y);
  lora::linear(exec, x, s.base(), lora::per_row{std::vector{s.adapter()}, std::vector<int>{}}, y);
  CHECK(s.untouched());
  lora::linear_backward(exec, x, s.base(), s.adapter(), dy, lora::gradients{s.da.m, s.db.m}, dx);
  for (const float v : s.da.m) CHECK(v == 0);
  for (const float v : s.db.m) CHECK(v == 0);
}

TEST_CASE("a fresh adapter's update is zero, its scale is alpha / rank or alpha / sqrt(rank)", "[lora]") {
  const auto p = lora::make_adapter<float>({.in = 4000, .out = 10, .rank = 16, .alpha = 8, .seed = 1});
  CHECK(p.scale() == 0.5);
  double sum = 0, square = 0, largest = 0;
  for (const float v : p.a) {
    sum += v;
    square += v * v;
    largest = std::max(largest, std::abs(double{v}));
  }
  const double n = 64000, bound = 1 / std::sqrt(4000.0);
  CHECK(std::abs(sum / n) < 4 * bound / std::sqrt(3 * n));
  CHECK(square / n == Approx(bound * bound / 3).epsilon(0.02));
  CHECK(largest <= bound);
  for (const float v : p.b) CHECK(v == 0);
  const auto g = lora::make_adapter<float>(
      {.in = 4000, .out = 10, .rank = 16, .alpha = 8, .seed = 1, .rs = true, .init = lora::init::gaussian});
  CHECK(g.scale() == 2);
  square = 0;
  for (const float v : g.a) square += v * v;
  CHECK(square / n == Approx(1 / 256.0).epsilon(0.03));
  const auto e = lora::make_adapter<float>({.in = 100, .out = 300, .rank = 8, .embedding = true});
  for (const float v : e.a) CHECK(v == 0);
  square = 0;
  for (const float v : e.b) square += v * v;
  CHECK(square / 2400 == Approx(1).epsilon(0.1));

  CHECK_THROWS_WITH(lora::make_adapter<float>({.in = 4, .out = 4, .rank = 0}),
                    "mlkit::shape_error: lora::make_adapter: rank = 0 is not positive");
  CHECK_THROWS_AS(lora::make_adapter<float>({.in = 0, .out = 4}), shape_error);
  CHECK_THROWS_AS(lora::make_adapter<float>({.in = 4, .out = -4}), shape_error);
  CHECK_THROWS_AS(lora::make_adapter<float>({.in = 4, .out = 4, .alpha = std::nan("")}), value_error);
}

TEST_CASE("no entry point of lora writes before it has looked at the executor", "[lora][bad input]") {
  setting s;
  const auto p = s.adapter();
  const lora::dora d{p, s.m};
  const lora::gradients g{s.da.m, s.db.m};
  const lora::gradients with_m{s.da.m, s.db.m, mlkit::vector_view<float>(s.dm.m.data(), {5})};
  const auto dx = s.dx.m.view();
  // As an image of 8 channels in one row, and as a table of 8 tokens.
  const mlkit::tensor_view<const float, 4> image(s.x.data(), {1, 8, 1, 6}), dimage(s.dy.data(), {1, 5, 1, 6});
  const mlkit::tensor_view<float, 4> out(s.y.m.data(), {1, 5, 1, 6}), image_dx(s.dx.m.data(), {1, 8, 1, 6});
  const lora::adapter_view<float> token_adapter{s.a.view(), s.b.view(), 0.5};
  const mlkit::matrix<float> table = normal<float>(8, 5, 9);
  const std::vector<int> ids{7, 0, 3, 3, 1, 2};
  const std::vector<lora::adapter_view<float>> many(2, p);
  for (const int threads : {-1, 100000}) {
    const mlkit::cpu exec{.threads = threads};
    const std::string text = threads < 0 ? "cpu: threads = -1 is negative" : "cpu: threads = 100000 is above ";
    s.refuses<value_error>([&] { lora::linear(exec, s.x, s.base(), s.y.m); }, text);
    s.refuses<value_error>([&] { lora::linear(exec, s.x, s.base(), p, s.y.m); }, text);
    s.refuses<value_error>([&] { lora::linear(exec, s.x, s.base(), d, s.y.m); }, text);
    s.refuses<value_error>(
        [&] {
          lora::linear(exec, s.x, s.base(), lora::per_row{many, std::vector<int>(6, 0)}, s.y.m);
        },
        text);
    s.refuses<value_error>([&] { lora::linear_backward(exec, s.x, s.base(), p, s.dy, g, dx); }, text);
    s.refuses<value_error>([&] { lora::linear_backward(exec, s.x, s.base(), d, s.dy, with_m, dx); }, text);
    s.refuses<value_error>([&] { lora::conv2d(exec, image, s.base(), p, out, {}); }, text);
    s.refuses<value_error>([&] { lora::conv2d_backward(exec, image, s.base(), p, dimage, g, image_dx, {}); }, text);
    s.refuses<value_error>([&] { lora::conv2d_backward(exec, image, s.base(), d, dimage, with_m, image_dx, {}); },
                           text);
    s.refuses<value_error>([&] { lora::embedding(exec, ids, table, token_adapter, s.y.m); }, text);
    s.refuses<value_error>([&] { lora::embedding_backward(exec, ids, table, token_adapter, s.dy, g); }, text);
    s.refuses<value_error>(
        [&] {
          lora::embedding_backward(exec, ids, table, lora::dora{token_adapter, s.m}, s.dy, with_m);
        },
        text);
    poisoned<float> w(5, 8);
    s.refuses<value_error>([&] { lora::merge(exec, w.m, p); }, text);
    s.refuses<value_error>([&] { lora::merge(exec, w.m, d); }, text);
    s.refuses<value_error>([&] { lora::unmerge(exec, w.m, p); }, text);
    CHECK(w.untouched());
  }
}
