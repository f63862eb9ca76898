// A base and its adapter as one callable, and the gradient of a base alone.
#include <catch2/catch.hpp>
#include <mlkit/lora.hpp>

#include "reference.hpp"

namespace lora = mlkit::lora;
using namespace reference;
using mlkit::matrix;

namespace {

constexpr index_t tokens = 6, in = 9, out = 7, rank = 2;

struct setting {
  matrix<double> x = normal<double>(tokens, in, 1), w = normal<double>(out, in, 2), a = normal<double>(rank, in, 3),
                 b = normal<double>(out, rank, 4), dy = normal<double>(tokens, out, 5);
  mlkit::vector<double> bias = normal_vector<double>(out, 6), magnitude = normal_vector<double>(out, 7, 0.1f, 1);
  lora::adapter_view<double> adapter{a.view(), b.view(), 0.5};
  lora::dense<double> base{w, bias};
};

bool same(const matrix<double>& a, const matrix<double>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

std::string said_by(const std::function<void()>& call) {
  try {
    call();
  } catch (const mlkit::error& e) {
    return e.what();
  }
  return "no error";
}

}  // namespace

TEST_CASE("the gradient of a base alone", "[lora][projection]") {
  const setting s;
  matrix<double> dx({tokens, in});
  lora::linear_backward(mlkit::cpu{}, s.base, s.dy, dx);
  CHECK(difference(dx, multiply(from(s.dy), from(s.w))) < 1e-14);
  lora::linear_backward(mlkit::cpu{}, s.base, s.dy, mlkit::matrix_view<double>{});
  lora::linear_backward(mlkit::cpu{}, s.base, matrix<double>({0, out}), matrix<double>({0, in}));
}

TEST_CASE("the gradient of a base alone refuses what does not fit", "[lora][projection][bad input]") {
  const setting s;
  matrix<double> dx({tokens, in}), wide({tokens, in + 1}), few({tokens - 1, in});
  const auto start = std::string("mlkit::shape_error: lora::linear_backward: ");
  const auto said = [&](const auto& dy, matrix<double>& to) {
    return said_by([&] { lora::linear_backward(mlkit::cpu{}, s.base, dy, to); });
  };
  CHECK(said(s.x, dx) == start + "dy has 9 columns, but base has 7 outputs");
  CHECK(said(s.dy, wide) == start + "dx has 10 columns, but base has 9 inputs");
  CHECK(said(s.dy, few) == start + "dx has 5 rows, but dy has 6");
  CHECK(said(mlkit::matrix_view<double>(dx.data(), {tokens, out}), dx) == start + "dx [6, 9] overlaps dy [6, 7]");
  matrix<double> w = normal<double>(out, in, 2);
  CHECK(said_by([&] {
          lora::linear_backward(mlkit::cpu{}, lora::dense{w}, s.dy, mlkit::matrix_view<double>(w.data(), {tokens, in}));
        }) == start + "dx [6, 9] overlaps base [7, 9]");
  CHECK(std::all_of(dx.begin(), dx.end(), [](double v) { return v == 0; }));
}

TEST_CASE("a projection calls what it is made of", "[lora][projection]") {
  const setting s;
  const mlkit::cpu exec;
  matrix<double> have({tokens, out}), want({tokens, out}), dx({tokens, in}), want_dx({tokens, in});
  matrix<double> da({rank, in}), db({out, rank}), want_da({rank, in}), want_db({out, rank});
  mlkit::vector<double> dm({out}), want_dm({out});
  const auto owned = lora::adapter<double>{s.a.clone(), s.b.clone(), 1.0};  // a scale of 1 / rank

  const lora::projection plain{s.base};
  plain(exec, s.x, have);
  lora::linear(exec, s.x, s.base, want);
  CHECK(same(have, want));
  plain.backward(exec, s.x, s.dy, lora::no_gradients{}, dx);
  lora::linear_backward(exec, s.base, s.dy, want_dx);
  CHECK(same(dx, want_dx));

  lora::projection adapted{s.base, owned};
  static_assert(std::is_same_v<decltype(adapted), lora::projection<lora::dense<double>, lora::adapter_view<double>>>);
  CHECK(adapted.inputs() == in);
  CHECK(adapted.outputs() == out);
  adapted(exec, s.x, have);
  lora::linear(exec, s.x, s.base, s.adapter, want);
  CHECK(same(have, want));
  adapted.options.dropout = 0.5;
  adapted.options.stream = 3;
  adapted(exec, s.x, have);
  lora::linear(exec, s.x, s.base, s.adapter, want, {.dropout = 0.5, .stream = 3});
  CHECK(same(have, want));
  adapted.backward(exec, s.x, s.dy, lora::gradients{da, db}, dx);
  lora::linear_backward(exec, s.x, s.base, s.adapter, s.dy, lora::gradients{want_da, want_db}, want_dx,
                        {.dropout = 0.5, .stream = 3});
  CHECK(same(dx, want_dx));
  CHECK(same(da, want_da));
  CHECK(same(db, want_db));

  const lora::dora dora{s.adapter, s.magnitude};
  const lora::projection with_dora{s.base, dora, {.dropout = 0.25}};
  with_dora(exec, s.x, have);
  lora::linear(exec, s.x, s.base, dora, want, {.dropout = 0.25});
  CHECK(same(have, want));
  with_dora.backward(exec, s.x, s.dy, lora::gradients{da, db, dm}, dx);
  lora::linear_backward(exec, s.x, s.base, dora, s.dy, lora::gradients{want_da, want_db, want_dm}, want_dx,
                        {.dropout = 0.25});
  CHECK(same(dx, want_dx));
  CHECK(same(da, want_da));
  CHECK(std::equal(dm.begin(), dm.end(), want_dm.begin()));

  const std::vector<lora::adapter_view<double>> adapters{s.adapter, s.adapter.scaled(2)};
  const std::vector<int> ids{0, 1, -1, 0, 1, 1}, starts{0, 2, 6};
  lora::projection{s.base, lora::per_row{adapters, ids}}(exec, s.x, have);
  lora::linear(exec, s.x, s.base, lora::per_row{adapters, ids}, want);
  CHECK(same(have, want));
  lora::projection{s.base, lora::segments{adapters, starts}}(exec, s.x, have);
  lora::linear(exec, s.x, s.base, lora::segments{adapters, starts}, want);
  CHECK(same(have, want));

  const auto codes = lora::quantise_int8(exec, s.w);
  const lora::int8<double, double> base{codes, s.bias};
  lora::projection{base, s.adapter}(exec, s.x, have);
  lora::linear(exec, s.x, base, s.adapter, want);
  CHECK(same(have, want));
}
