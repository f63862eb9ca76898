// What matmul refuses, in words, with nothing written; and operands that are produced while they are packed.
#include "reference.hpp"

using namespace reference;
using mlkit::cpu;
using mlkit::epilogue;
using mlkit::matrix_view;

namespace {

template <class Error, class Call>
std::string refused(const Call& call) {
  try {
    call();
  } catch (const Error& e) {
    return e.what();
  } catch (const mlkit::error& e) {
    return std::string("another error: ") + e.what();
  }
  return "no error";
}

}  // namespace

TEST_CASE("matmul names the argument and both sizes, and writes nothing") {
  mlkit::matrix<float> a({4, 5}), b({5, 6}), c({4, 6}), small({3, 6}), narrow({4, 7});
  for (float& x : c) x = 3;
  const cpu exec;
  const auto shape = [](const auto& call) { return refused<mlkit::shape_error>(call); };
  const auto value = [](const auto& call) { return refused<mlkit::value_error>(call); };

  CHECK(shape([&] {
          mlkit::matmul(exec, a, mlkit::matrix<float>({4, 6}), c);
        }) == "mlkit::shape_error: matmul: a has 5 columns, but b has 4 rows");
  CHECK(shape([&] { mlkit::matmul(exec, a, b, small); }) == "mlkit::shape_error: matmul: c has 3 rows, but a has 4");
  CHECK(shape([&] { mlkit::matmul(exec, a, b, narrow); }) ==
        "mlkit::shape_error: matmul: c has 7 columns, but b has 6");
  CHECK(shape([&] {
          mlkit::matmul(exec, matrix_view<const float>(a.data(), {-4, 5}), b, c);
        }) == "mlkit::shape_error: matmul: a has the negative extent -4 in dimension 0");
  CHECK(value([&] {
          mlkit::matmul(exec, matrix_view<const float>(nullptr, {4, 5}), b, c);
        }) == "mlkit::value_error: matmul: a is null, but has shape [4, 5]");
  CHECK(value([&] {
          mlkit::matmul(exec, a, matrix_view<const float>(nullptr, {5, 6}), c);
        }) == "mlkit::value_error: matmul: b is null, but has shape [5, 6]");
  CHECK(value([&] {
          mlkit::matmul(exec, a, b, matrix_view<float>(nullptr, {4, 6}));
        }) == "mlkit::value_error: matmul: c is null, but has shape [4, 6]");
  CHECK(shape([&] {
          mlkit::matmul(exec, a, b, matrix_view<float>(c.data(), {4, 6}, {5, 1}));
        }) == "mlkit::shape_error: matmul: c of shape [4, 6] has overlapping strides [5, 1]");
  CHECK(shape([&] {
          mlkit::matmul(exec, a, b, matrix_view<float>(c.data(), {4, 6}, {0, 1}));
        }) == "mlkit::shape_error: matmul: c of shape [4, 6] has overlapping strides [0, 1]");
  CHECK(value([&] { mlkit::matmul(cpu{.threads = -2}, a, b, c); }) ==
        "mlkit::value_error: cpu: threads = -2 is negative");
  // Strides of zero make a shape of any size out of one element; what is computed from it must not wrap.
  const float one = 1;
  constexpr index_t endless = index_t{1} << 60;
  CHECK(shape([&] {
          mlkit::matmul(exec, matrix_view<const float>(&one, {4, endless}, {0, 0}),
                        matrix_view<const float>(&one, {endless, 6}, {0, 0}), c);
        }) == "mlkit::shape_error: matmul: a of shape [4, 1152921504606846976] and strides [0, 0] is too large");
  for (float x : c) REQUIRE(x == 3);

  mlkit::matrix<float> square({5, 5}), other({5, 5});
  for (float& x : square) x = 2;
  CHECK(shape([&] { mlkit::matmul(exec, square, other, square); }) ==
        "mlkit::shape_error: matmul: c [5, 5] overlaps a [5, 5]");
  CHECK(shape([&] { mlkit::matmul(exec, other, square, square); }) ==
        "mlkit::shape_error: matmul: c [5, 5] overlaps b [5, 5]");
  CHECK(shape([&] { mlkit::matmul(exec, other, other, square, epilogue{mlkit::add{square}}); }) ==
        "mlkit::shape_error: matmul: c [5, 5] overlaps residual [5, 5]");
  for (float x : square) REQUIRE(x == 2);
}

TEST_CASE("matmul checks what its stages read") {
  const mlkit::matrix<float> a({4, 5}), b({5, 6});
  mlkit::matrix<float> c({4, 6});
  for (float& x : c) x = 3;
  const cpu exec;
  const auto with = [&](const auto& stage) {
    return refused<mlkit::shape_error>([&] { mlkit::matmul(exec, a, b, c, epilogue{stage}); });
  };
  const std::vector<float> five(5), six(6), twelve(12);
  CHECK(with(mlkit::add_bias{five}) == "mlkit::shape_error: matmul: bias has 5 elements, but the output has 6");
  CHECK(with(mlkit::scale_columns{five}) ==
        "mlkit::shape_error: matmul: column factors has 5 elements, but the output has 6");
  CHECK(with(mlkit::scale_rows{five}) ==
        "mlkit::shape_error: matmul: row factors has 5 elements, but the output has 4");
  CHECK(with(mlkit::add{mlkit::matrix<float>({3, 6})}) ==
        "mlkit::shape_error: matmul: residual has 3 rows, but the output has 4");
  CHECK(with(mlkit::add{mlkit::matrix<float>({4, 5})}) ==
        "mlkit::shape_error: matmul: residual has 5 columns, but the output has 6");
  CHECK(with(mlkit::add{matrix_view<const float>(twelve.data(), {4, 6}, {1, 2})}) ==
        "mlkit::shape_error: matmul: residual has column stride 2, but must have 1");
  CHECK(with(mlkit::add_bias{mlkit::vector_view<const float>(twelve.data(), {6}, {2})}) ==
        "mlkit::shape_error: matmul: bias has stride 2, but must have 1");
  for (float x : c) REQUIRE(x == 3);
}

namespace {

// A source of the user's own: element [i, j] is (i - j) / 8.
struct differences {
  using value_type = float;
  index_t n_rows, n_cols;
  index_t rows() const noexcept { return n_rows; }
  index_t cols() const noexcept { return n_cols; }
  template <class T>
  void decode(index_t row, index_t col, int count, T* out) const noexcept {
    for (int i = 0; i < count; ++i) out[i] = from_double<T>(static_cast<double>(row - col - i) / 8);
  }
};

template <class T>
void fill_differences(mlkit::matrix_view<T> v) {
  for (index_t i = 0; i < v.extent(0); ++i)
    for (index_t j = 0; j < v.extent(1); ++j) v(i, j) = from_double<T>(static_cast<double>(i - j) / 8);
}

constexpr shape produced[] = {{30, 40, 25}, {3, 70, 41}, {70, 3, 41}, {66, 65, 130}};

}  // namespace

TEST_CASE("prologues pass every element through a function while it is read") {
  for_each_isa([] {
    for (const shape& s : produced)
      for (int l = 0; l < layouts; ++l) {
        guarded<float> a(s.m, s.k, static_cast<layout>(l)), b(s.k, s.n, layout::rows), c(s.m, s.n, layout::rows);
        guarded<float> squared(s.m, s.k, layout::rows);
        a.fill(1), b.fill(2);
        for (index_t i = 0; i < s.m; ++i)
          for (index_t j = 0; j < s.k; ++j)
            squared.view()(i, j) = a.view()(i, j) * a.view()(i, j) + static_cast<float>(i - j) / 16;
        sums expected = naive(squared.view(), b.view());
        const auto f = [](float x, index_t row, index_t col) { return x * x + static_cast<float>(row - col) / 16; };
        mlkit::matmul(cpu{}, mlkit::prologue{a.view(), f}, b.view(), c.view());
        expect(c.view(), expected, "prologue, " + describe(s, static_cast<layout>(l), layout::rows, layout::rows));
      }
  });
}

TEST_CASE("what a prologue reads is checked as any operand is") {
  mlkit::matrix<float> x({5, 5}), w({5, 5}), c({5, 5});
  for (float& v : x) v = 2;
  const cpu exec;
  const auto twice = [](float v) { return 2 * v; };
  const matrix_view<const float> none(nullptr, {5, 5}), negative(w.data(), {5, -5}), endless(w.data(), {5, INT64_MAX});
  CHECK(refused<mlkit::shape_error>([&] {
          mlkit::matmul(exec, mlkit::prologue{x, twice}, w, x);
        }) == "mlkit::shape_error: matmul: c [5, 5] overlaps a [5, 5]");
  CHECK(refused<mlkit::shape_error>([&] {
          mlkit::matmul(exec, w, mlkit::transposed(mlkit::prologue{x, twice}), x);
        }) == "mlkit::shape_error: matmul: c [5, 5] overlaps b [5, 5]");
  for (float v : x) REQUIRE(v == 2);
  CHECK(refused<mlkit::value_error>([&] {
          mlkit::matmul(exec, mlkit::prologue{none, twice}, w, c);
        }) == "mlkit::value_error: matmul: a is null, but has shape [5, 5]");
  CHECK(refused<mlkit::shape_error>([&] {
          mlkit::matmul(exec, mlkit::prologue{negative, twice}, w, c);
        }) == "mlkit::shape_error: matmul: a has the negative extent -5 in dimension 1");
  CHECK(refused<mlkit::shape_error>([&] {
          (void)mlkit::pack(exec, mlkit::transposed(mlkit::prologue{endless, twice}));
        }).find("pack: b of shape [5, 9223372036854775807]") != std::string::npos);
}

TEST_CASE("sources on either side, as they are and transposed, also packed") {
  for_each_isa([] {
    for (const shape& s : produced) {
      guarded<float> a(s.m, s.k, layout::rows), b(s.k, s.n, layout::rows), c(s.m, s.n, layout::rows);
      a.fill(1);
      fill_differences(b.view());
      sums expected = naive(a.view(), b.view());
      const differences right{s.k, s.n};
      mlkit::matmul(cpu{}, a.view(), right, c.view());
      expect(c.view(), expected, "source as b");
      mlkit::matmul(cpu{}, a.view(), mlkit::pack(cpu{}, right), c.view());
      expect(c.view(), expected, "packed source");
      guarded<float> turned(s.m, s.k, layout::rows), dense(s.k, s.n, layout::columns);
      dense.fill(2);
      for (index_t i = 0; i < s.m; ++i)
        for (index_t j = 0; j < s.k; ++j) turned.view()(i, j) = static_cast<float>(j - i) / 8;
      expected = naive(turned.view(), dense.view());
      mlkit::matmul(cpu{}, mlkit::transposed(differences{s.k, s.m}), dense.view(), c.view());
      expect(c.view(), expected, "transposed source as a");
    }
  });
}
