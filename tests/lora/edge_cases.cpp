// What stands at the edges: rows that an adapter cancels, sums in narrow types, arguments that are given by half.
#include <catch2/catch.hpp>
#include <limits>
#include <mlkit/lora.hpp>
#include <string>

#include "reference.hpp"

namespace lora = mlkit::lora;
using Catch::Matchers::Contains;
using mlkit::bf16;
using mlkit::index_t;
using namespace reference;

namespace {

constexpr float poison = 12345;

template <class T>
void fill_with(T& t, float v) {
  std::fill(t.begin(), t.end(), typename T::value_type(v));
}

}  // namespace

TEST_CASE("the norm of a row that the adapter all but cancels is that of what is left", "[lora][dora]") {
  // B A = -W up to one part in a thousand, in one row; the others are as they come.
  auto w = normal<float>(3, 40, 1), b = normal<float>(3, 2, 2), a = normal<float>(2, 40, 3);
  b(1, 0) = -1, b(1, 1) = 0;
  for (index_t k = 0; k < 40; ++k) a(0, k) = w(1, k) * (1 + (k % 7 == 0 ? 1e-3f : 0.0f));
  const lora::adapter_view<float> p{a, b, 1};
  const mat adapted = add(from(w), multiply(from(b), from(a)));
  for (const bool turned : {false, true}) {
    mlkit::matrix<float> columns({40, 3});
    for (index_t i = 0; i < 3; ++i)
      for (index_t k = 0; k < 40; ++k) columns(k, i) = w(i, k);
    const auto norms = turned ? lora::adapted_norms(mlkit::cpu{}, lora::dense<float>{transposed(columns)}, p)
                              : lora::adapted_norms(mlkit::cpu{}, lora::dense<float>{w}, p);
    for (index_t i = 0; i < 3; ++i) {
      double square = 0;
      for (index_t k = 0; k < 40; ++k) square += adapted(i, k) * adapted(i, k);
      CHECK(norms.norms(i) == Approx(std::sqrt(square)).epsilon(1e-5));
    }
  }
}

TEST_CASE("gradients in bf16 are rounded once, however many tokens and images add to them", "[lora]") {
  constexpr index_t count = 1024;  // in bf16, 256 + 1 is 256
  mlkit::matrix<bf16> a({1, 1}), b({1, 1}), w({1, 1}), da({1, 1}), db({1, 1});
  for (auto* m : {&a, &b, &w}) fill_with(*m, 1);
  const lora::adapter_view<bf16> p{a, b, 1};
  for (const bool accumulate : {false, true}) {
    mlkit::tensor<bf16, 4> x({count, 1, 1, 1}), dy({count, 1, 1, 1}), dx({count, 1, 1, 1});
    fill_with(x, 1), fill_with(dy, 1), fill_with(da, 8), fill_with(db, 8);
    lora::conv2d_backward(mlkit::cpu{}, x, lora::dense{w}, p, dy, lora::gradients{da, db}, dx, {}, accumulate);
    CHECK(static_cast<float>(da(0, 0)) == count + (accumulate ? 8 : 0));
    CHECK(static_cast<float>(db(0, 0)) == count + (accumulate ? 8 : 0));

    // Ids 1 and 3 of four; the gradients of the others are 0, or what they were.
    std::vector<int> ids(count, 3);
    ids[5] = 1;
    mlkit::matrix<bf16> table({4, 1}), wide({1, 4}), dwide({1, 4}), dys({count, 1});
    fill_with(table, 1), fill_with(wide, 1), fill_with(dys, 1), fill_with(dwide, 8), fill_with(db, 8);
    lora::embedding_backward(mlkit::cpu{}, ids, table, lora::adapter_view<bf16>{wide, b, 1}, dys,
                             lora::gradients{dwide, db}, accumulate);
    const float before = accumulate ? 8 : 0;
    CHECK(static_cast<float>(dwide(0, 0)) == before);
    CHECK(static_cast<float>(dwide(0, 1)) == before + 1);
    CHECK(static_cast<float>(dwide(0, 2)) == before);
    CHECK(static_cast<float>(dwide(0, 3)) == static_cast<float>(bf16(before + count - 1)));
    CHECK(static_cast<float>(db(0, 0)) == before + count);
  }
}

TEST_CASE("an output that is given a shape but no memory is refused", "[lora][bad input]") {
  const mlkit::cpu exec;
  const auto x = normal<float>(6, 8, 1), w = normal<float>(5, 8, 2), a = normal<float>(2, 8, 3),
             b = normal<float>(5, 2, 4), dy = normal<float>(6, 5, 5);
  mlkit::matrix<float> y({6, 5}), da({2, 8}), db({5, 2});
  for (auto* m : {&y, &da, &db}) fill_with(*m, poison);
  const lora::adapter_view<float> p{a, b, 1};
  const mlkit::matrix_view<float> no_dx(nullptr, {6, 8}), no_h(nullptr, {6, 2});
  const mlkit::vector_view<const float> no_bias(nullptr, {5});
  CHECK_THROWS_WITH(lora::linear_backward(exec, x, lora::dense{w}, p, dy, lora::gradients{da, db}, no_dx),
                    "mlkit::value_error: lora::linear_backward: dx is null, but has shape [6, 8]");
  CHECK_THROWS_WITH(lora::linear(exec, x, lora::dense{w}, p, y, {.h = no_h}),
                    "mlkit::value_error: lora::linear: h is null, but has shape [6, 2]");
  CHECK_THROWS_WITH(lora::linear(exec, x, lora::dense{w, no_bias}, p, y),
                    "mlkit::value_error: lora::linear: bias is null, but has shape [5]");
  CHECK_THROWS_WITH(lora::linear(exec, x, lora::dense{w}, p.scaled(1e300), y),
                    "mlkit::value_error: lora::linear: adapter has scale 1e+300, which is not finite in f32");
  for (auto* m : {&y, &da, &db}) CHECK(std::all_of(m->begin(), m->end(), [](float v) { return v == poison; }));
}

TEST_CASE("a row that DoRA's merge made zero cannot be unmerged, and nothing is", "[lora][bad input]") {
  const mlkit::cpu exec;
  auto w = normal<float>(5, 8, 2);
  const auto a = normal<float>(2, 8, 3), b = normal<float>(5, 2, 4);
  auto m = normal_vector<float>(5, 6, 0.1f, 1);
  m(3) = 0;
  const lora::adapter_view<float> p{a, b, 1};
  const auto norms = lora::adapted_norms(exec, lora::dense<float>{w}, p);
  lora::merge(exec, w, lora::dora{p, m, norms});
  for (index_t k = 0; k < 8; ++k) CHECK(w(3, k) == 0);
  const auto before = w.clone();
  CHECK_THROWS_WITH(lora::unmerge(exec, w, lora::dora{p, m, norms}),
                    "mlkit::value_error: lora::unmerge: row 3 was merged with the factor 0");
  CHECK(std::equal(w.begin(), w.end(), before.begin()));
}

TEST_CASE("an output over the memory of a quantised weight is refused", "[lora][bad input]") {
  const mlkit::cpu exec;
  const auto x = normal<float>(6, 8, 1), a = normal<float>(2, 8, 3), b = normal<float>(5, 2, 4);
  std::vector<float> memory(64, poison);
  const std::vector<std::uint8_t> packed(20);
  const std::vector<std::int8_t> codes(40);
  const mlkit::matrix_view<float> y(memory.data(), {6, 5}), whole(memory.data(), {5, 8});
  const lora::nf4_view four({5, 8}, packed, std::span<const float>(memory.data(), 1));
  const lora::int8_view eight({5, 8}, codes, std::span<const float>(memory.data() + 10, 5));
  const lora::adapter_view<float> p{a, b, 1};
  CHECK_THROWS_WITH(lora::linear(exec, x, lora::nf4{four}, p, y),
                    "mlkit::shape_error: lora::linear: y [6, 5] overlaps base's absmax [1]");
  CHECK_THROWS_WITH(lora::linear(exec, x, lora::int8{eight}, p, y),
                    "mlkit::shape_error: lora::linear: y [6, 5] overlaps base's scales [5]");
  CHECK_THROWS_WITH(lora::dequantise(exec, four, whole),
                    "mlkit::shape_error: lora::dequantise: out [5, 8] overlaps the weight's absmax [1]");
  CHECK(std::all_of(memory.begin(), memory.end(), [](float v) { return v == poison; }));
}

TEST_CASE("an output over one of many adapters is refused", "[lora][bad input]") {
  const auto x = normal<float>(6, 8, 1), w = normal<float>(5, 8, 2), a = normal<float>(2, 8, 3),
             b = normal<float>(5, 2, 4);
  mlkit::matrix<float> y({6, 5});
  fill_with(y, poison);
  const mlkit::matrix_view<const float> over(y.data(), {5, 2});
  const std::vector<lora::adapter_view<float>> adapters{{a, b, 1}, {a, over, 1}};
  const std::vector<int> ids(6), starts{0, 3, 6};
  CHECK_THROWS_WITH(lora::linear(mlkit::cpu{}, x, lora::dense{w}, lora::per_row{adapters, ids}, y),
                    Contains("y [6, 5] overlaps adapter.b [5, 2]"));
  CHECK_THROWS_WITH(lora::linear(mlkit::cpu{}, x, lora::dense{w}, lora::segments{adapters, starts}, y),
                    Contains("y [6, 5] overlaps adapter.b [5, 2]"));
  CHECK(std::all_of(y.begin(), y.end(), [](float v) { return v == poison; }));
}

TEST_CASE("DoRA's gradients may not share memory, with each other or with what is read", "[lora][bad input]") {
  const mlkit::cpu exec;
  const lora::conv_options o{.kernel = {3, 3}, .padding = {1, 1}};
  mlkit::tensor<float, 4> x({2, 3, 5, 5}), dy({2, 5, 5, 5}), dx({2, 3, 5, 5});
  mlkit::matrix<float> w({5, 27}), a({2, 27}), b({5, 2}), da({2, 27}), db({5, 2});
  mlkit::vector<float> m({5}), dm({5});
  for (auto* t : {&w, &a, &b, &da, &db}) fill_with(*t, poison);
  fill_with(m, poison), fill_with(dm, poison);
  const lora::adapter_view<float> p{a, b, 1};
  const auto over = [](auto& t) { return mlkit::vector_view<float>(t.data(), {5}); };
  const auto conv = [&](const auto& magnitude, auto&& dmagnitude) {
    lora::conv2d_backward(exec, x, lora::dense{w}, lora::dora{p, magnitude}, dy, lora::gradients{da, db, dmagnitude},
                          dx, o);
  };
  const std::string function = "mlkit::shape_error: lora::conv2d_backward: ";
  CHECK_THROWS_WITH(conv(m, m), function + "dmagnitude [5] overlaps magnitude [5]");
  CHECK_THROWS_WITH(conv(m, over(db)), function + "dmagnitude [5] overlaps db [5, 2]");
  CHECK_THROWS_WITH(conv(over(db), dm), function + "db [5, 2] overlaps magnitude [5]");
  CHECK_THROWS_WITH(conv(m, over(dy)), function + "dmagnitude [5] overlaps dy [2, 5, 5, 5]");
  CHECK_THROWS_WITH(conv(m, over(x)), function + "dmagnitude [5] overlaps x [2, 3, 5, 5]");
  CHECK_THROWS_WITH(conv(m, over(w)), function + "dmagnitude [5] overlaps base [5, 27]");
  CHECK_THROWS_WITH(conv(m, over(dx)), function + "dmagnitude [5] overlaps dx [2, 3, 5, 5]");
  CHECK_THROWS_WITH(conv(over(dx), dm), function + "dx [2, 3, 5, 5] overlaps magnitude [5]");

  const std::vector<int> ids{0, 2, 2};
  mlkit::matrix<float> table({3, 5}), wide({2, 3}), dwide({2, 3}), dys({3, 5});
  const lora::adapter_view<float> q{wide, b, 1};
  const auto embedding = [&](const auto& magnitude, auto&& to, auto&& dmagnitude) {
    lora::embedding_backward(exec, ids, table, lora::dora{q, magnitude}, dys, lora::gradients{to, db, dmagnitude});
  };
  const std::string other = "mlkit::shape_error: lora::embedding_backward: ";
  CHECK_THROWS_WITH(embedding(m, dwide, m), other + "dmagnitude [5] overlaps magnitude [5]");
  CHECK_THROWS_WITH(embedding(m, dwide, over(db)), other + "dmagnitude [5] overlaps db [5, 2]");
  CHECK_THROWS_WITH(embedding(m, dwide, over(table)), other + "dmagnitude [5] overlaps w [3, 5]");
  CHECK_THROWS_WITH(embedding(m, dwide, over(dys)), other + "dmagnitude [5] overlaps dy [3, 5]");
  CHECK_THROWS_WITH(embedding(m, mlkit::matrix_view<float>(table.data(), {2, 3}), dm),
                    other + "da [2, 3] overlaps w [3, 5]");

  std::vector<float> h(12, poison);
  const auto rows = normal<float>(6, 27, 1), drows = normal<float>(6, 5, 2);
  CHECK_THROWS_WITH(
      lora::linear_backward(exec, rows, lora::dense{w}, lora::dora{p, m}, drows, lora::gradients{da, db, over(h)},
                            mlkit::matrix_view<float>{}, {.h = mlkit::matrix_view<float>(h.data(), {6, 2})}),
      "mlkit::shape_error: lora::linear_backward: dmagnitude [5] overlaps h [6, 2]");
  for (auto* t : {&w, &da, &db}) CHECK(std::all_of(t->begin(), t->end(), [](float v) { return v == poison; }));
  CHECK(std::all_of(m.begin(), m.end(), [](float v) { return v == poison; }));
}

TEST_CASE("a convolution's geometry stays where positions can be counted", "[lora][bad input]") {
  const mlkit::tensor<float, 4> x({1, 3, 5, 5});
  mlkit::tensor<float, 4> y({1, 5, 5, 5});
  const mlkit::matrix<float> w({5, 27}), a({2, 27}), b({5, 2});
  const auto call = [&](const lora::conv_options& o) {
    return [&, o] { lora::conv2d(mlkit::cpu{}, x, lora::dense{w}, lora::adapter_view<float>{a, b, 1}, y, o); };
  };
  constexpr index_t most = std::numeric_limits<index_t>::max();
  CHECK_THROWS_WITH(call({.kernel = {3, most}})(), Contains("kernel[1] = 9223372036854775807 is above 2147483647"));
  CHECK_THROWS_WITH(call({.kernel = {3, 3}, .stride = {most, 1}})(), Contains("stride[0]"));
  CHECK_THROWS_WITH(call({.kernel = {3, 3}, .padding = {1, most}})(), Contains("padding[1]"));
  CHECK_THROWS_WITH(call({.kernel = {3, 3}, .dilation = {most, 1}})(), Contains("dilation[0]"));
}
