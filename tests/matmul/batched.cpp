// Batches of one shape and groups of many, against the naive product of each.
#include <memory>
#include <mlkit/matmul/batched.hpp>
#include <ranges>

#include "reference.hpp"

using namespace reference;
using mlkit::cpu;
using mlkit::epilogue;
using mlkit::tensor;

namespace {

template <class T>
tensor<T, 3> random(const mlkit::extents_t<3>& extents, std::uint64_t seed) {
  tensor<T, 3> t(extents);
  for (index_t i = 0; i < t.size(); ++i) t.data()[i] = from_double<T>(uniform(seed, static_cast<std::uint64_t>(i)));
  return t;
}

template <class T>
mlkit::matrix_view<T> slice(mlkit::tensor_view<T, 3> v, index_t i) {
  return {v.data + i * v.stride(0), {v.extent(1), v.extent(2)}, {v.stride(1), v.stride(2)}};
}

std::string message_of(const auto& call) {
  try {
    call();
  } catch (const mlkit::error& e) {
    return e.what();
  }
  return "no error";
}

}  // namespace

TEST_CASE("batched products are the products of their matrices") {
  for_each_isa([] {
    constexpr shape shapes[] = {{8, 8, 8}, {5, 33, 17}, {1, 40, 30}, {64, 64, 64}, {200, 150, 180}};
    for (const shape& s : shapes)
      for (index_t batch : {0, 1, 3, 20}) {
        const auto a = random<float>({batch, s.m, s.k}, 1), b = random<float>({batch, s.k, s.n}, 2);
        tensor<float, 3> c({batch, s.m, s.n}), shared({batch, s.m, s.n});
        const auto turned = random<float>({batch, s.n, s.k}, 3);
        tensor<float, 3> from_turned({batch, s.m, s.n});
        mlkit::matmul(cpu{.threads = 3}, a, b, c);
        mlkit::matmul(cpu{.threads = 3}, a, mlkit::transposed(turned), from_turned);
        if (batch > 0) mlkit::matmul(cpu{.threads = 3}, a, slice(b.view(), 0), shared);
        for (index_t i = 0; i < batch; ++i) {
          sums expected = naive(slice(a.view(), i), slice(b.view(), i));
          expect(slice(c.view(), i), expected, "batched");
          expected = naive(slice(a.view(), i), slice(mlkit::transposed(turned.view()), i));
          expect(slice(from_turned.view(), i), expected, "batched, transposed");
          expected = naive(slice(a.view(), i), slice(b.view(), 0));
          expect(slice(shared.view(), i), expected, "shared b");
        }
      }
  });
}

TEST_CASE("batched products with a shared b take batches that are not evenly spaced, packed weights and row stages") {
  const auto a = random<float>({4, 6, 20}, 1), b = random<float>({1, 20, 30}, 2);
  const auto packed = mlkit::pack(cpu{}, slice(b.view(), 0));
  const auto residual = random<float>({1, 6, 30}, 3);
  tensor<float, 3> c({4, 9, 30});
  for (float& x : c) x = 7;
  const mlkit::tensor_view<float, 3> spaced(c.data(), {4, 6, 30}, {270, 30, 1});
  mlkit::matmul(cpu{}, a, packed, spaced, epilogue{mlkit::add{slice(residual.view(), 0)}});
  for (index_t i = 0; i < 4; ++i) {
    sums expected = naive(slice(a.view(), i), slice(b.view(), 0));
    for (index_t r = 0; r < 6; ++r)
      for (index_t j = 0; j < 30; ++j) expected(r, j) += residual(0, r, j);
    expect(slice(spaced, i), expected, "residual per matrix");
    for (index_t r = 6; r < 9; ++r)
      for (index_t j = 0; j < 30; ++j) REQUIRE(c(i, r, j) == 7);
  }
  tensor<float, 3> even({4, 6, 30});
  mlkit::matmul(cpu{}, a, packed, even, epilogue{mlkit::add{slice(residual.view(), 0)}});
  for (index_t i = 0; i < 4; ++i)
    for (index_t r = 0; r < 6; ++r)
      for (index_t j = 0; j < 30; ++j) REQUIRE(even(i, r, j) == spaced(i, r, j));
}

TEST_CASE("grouped products take every problem in its own shape, with the same bits for any number of threads") {
  struct matrices {
    guarded<float> a, b, c;
    explicit matrices(const shape& s, std::uint64_t seed)
        : a(s.m, s.k, static_cast<layout>(pick(seed, 1, layouts))),
          b(s.k, s.n, static_cast<layout>(pick(seed, 2, layouts))),
          c(s.m, s.n, static_cast<layout>(pick(seed, 3, layouts))) {
      a.fill(seed), b.fill(seed + 100);
    }
  };
  std::vector<std::unique_ptr<matrices>> all;
  std::vector<mlkit::matmul_problem<float, float, float>> problems;
  for (std::uint64_t i = 0; i < 40; ++i) {
    shape s{pick(i, 10, 60), pick(i, 11, 60), pick(i, 12, 60)};
    if (i == 20) s = {400, 300, 500};
    all.push_back(std::make_unique<matrices>(s, i));
    problems.push_back({all.back()->a.view(), all.back()->b.view(), all.back()->c.view()});
  }
  std::vector<std::vector<float>> first;
  for (int threads = 1; threads <= 8; ++threads) {
    for (const auto& p : problems)
      for (index_t i = 0; i < p.c.extent(0); ++i)
        for (index_t j = 0; j < p.c.extent(1); ++j) p.c(i, j) = -5;
    mlkit::matmul(cpu{.threads = threads}, problems);
    for (std::size_t i = 0; i < all.size(); ++i) {
      REQUIRE(all[i]->c.untouched_outside());
      if (threads == 1) {
        sums expected = naive(problems[i].a, problems[i].b);
        expect(problems[i].c, expected, "grouped");
        first.push_back(all[i]->c.storage());
      } else {
        REQUIRE(std::memcmp(first[i].data(), all[i]->c.storage().data(), first[i].size() * sizeof(float)) == 0);
      }
    }
  }
  mlkit::matmul(cpu{}, std::vector<mlkit::matmul_problem<float, float, float>>{});
}

TEST_CASE("batches that are not evenly spaced, with a shared b and stages that are the same for every row") {
  const auto a = random<float>({4, 9, 20}, 1), b = random<float>({1, 20, 30}, 2);
  const mlkit::tensor_view<const float, 3> some(a.data(), {4, 6, 20}, {180, 20, 1});
  tensor<float, 3> even({4, 6, 30}), c({4, 9, 30});
  for (float& x : c) x = 7;
  const mlkit::tensor_view<float, 3> spaced(c.data(), {4, 6, 30}, {270, 30, 1});
  mlkit::matmul(cpu{}, some, slice(b.view(), 0), even);
  mlkit::matmul(cpu{}, some, slice(b.view(), 0), spaced, epilogue{mlkit::scale{2}});
  for (index_t i = 0; i < 4; ++i) {
    sums expected = naive(slice(some, i), slice(b.view(), 0));
    expect(slice(even.view(), i), expected, "a not evenly spaced");
    for (double& v : expected.value) v *= 2;
    for (double& v : expected.magnitude) v *= 2;
    expect(slice(spaced, i), expected, "neither evenly spaced");
    for (index_t r = 6; r < 9; ++r)
      for (index_t j = 0; j < 30; ++j) REQUIRE(c(i, r, j) == 7);
  }
}

TEST_CASE("a group's problem without any work is done too, wherever it stands") {
  const auto a = random<float>({1, 120, 130}, 1), b = random<float>({1, 130, 110}, 2);
  const mlkit::matrix<float> left({3, 0}), right({0, 4});
  for (int threads : {1, 2, 5}) {
    tensor<float, 3> c({9, 120, 110});
    mlkit::matrix<float> first({3, 4}), last({3, 4});
    for (auto* m : {&first, &last}) std::fill(m->begin(), m->end(), 5.0f);
    std::vector<mlkit::matmul_problem<float, float, float>> problems{{left, right, first}};
    for (index_t i = 0; i < 9; ++i) problems.push_back({slice(a.view(), 0), slice(b.view(), 0), slice(c.view(), i)});
    problems.push_back({left, right, last});
    mlkit::matmul(cpu{.threads = threads}, problems);
    for (auto* m : {&first, &last})
      for (float x : *m) REQUIRE(x == 0);
    sums expected = naive(slice(a.view(), 0), slice(b.view(), 0));
    for (index_t i = 0; i < 9; ++i) expect(slice(c.view(), i), expected, "beside empty ones");
  }
}

TEST_CASE("a stage that may be called with or without a position sees the rows of one matrix") {
  const auto a = random<float>({3, 4, 5}, 1);
  const mlkit::matrix<float> zero({5, 6});
  tensor<float, 3> c({3, 4, 6});
  mlkit::matmul(cpu{}, a, zero, c, epilogue{[](float v, index_t row = 0, index_t col = 0) {
                  return v + static_cast<float>(10 * row + col);
                }});
  for (index_t i = 0; i < 3; ++i)
    for (index_t j = 0; j < 4; ++j)
      for (index_t l = 0; l < 6; ++l) REQUIRE(c(i, j, l) == static_cast<float>(10 * j + l));
}

#if !defined(__clang__) || __clang_major__ > 15  // earlier ones cannot read the library's views
TEST_CASE("a group's problems may be made as they are asked for") {
  const auto a = random<float>({5, 7, 9}, 1), b = random<float>({5, 9, 4}, 2);
  tensor<float, 3> c({5, 7, 4});
  const auto problems =
      std::views::iota(index_t{0}, index_t{5}) | std::views::transform([&](index_t i) {
        return mlkit::matmul_problem<float, float, float>{slice(a.view(), i), slice(b.view(), i), slice(c.view(), i)};
      });
  mlkit::matmul(cpu{.threads = 2}, problems);
  for (index_t i = 0; i < 5; ++i) {
    sums expected = naive(slice(a.view(), i), slice(b.view(), i));
    expect(slice(c.view(), i), expected, "grouped over a lazy range");
  }
}
#endif

TEST_CASE("batched and grouped products refuse what does not fit, and touch nothing") {
  const auto a = random<float>({3, 4, 5}, 1), b = random<float>({3, 5, 6}, 2);
  tensor<float, 3> c({3, 4, 6}), two({2, 4, 6}), narrow({3, 4, 5});
  const cpu exec;
  CHECK(message_of([&] { mlkit::matmul(exec, a, b, two); }) ==
        "mlkit::shape_error: matmul: a has 3 matrices, but c has 2");
  CHECK(message_of([&] {
          mlkit::matmul(exec, a, random<float>({2, 5, 6}, 1), c);
        }) == "mlkit::shape_error: matmul: b has 2 matrices, but c has 3");
  CHECK(message_of([&] { mlkit::matmul(exec, a, b, narrow); }) ==
        "mlkit::shape_error: matmul: c has 5 columns, but b has 6");
  CHECK(message_of([&] {
          mlkit::matmul(exec, a, mlkit::matrix<float>({4, 6}), c);
        }) == "mlkit::shape_error: matmul: a has 5 columns, but b has 4 rows");
  tensor<float, 3> square({3, 4, 4});
  const auto other = random<float>({3, 4, 4}, 3);
  CHECK(message_of([&] { mlkit::matmul(exec, other, square, square); }) ==
        "mlkit::shape_error: matmul: c [3, 4, 4] overlaps b [3, 4, 4]");
  CHECK(message_of([&] { mlkit::matmul(exec, other, slice(square.view(), 2), square); }) ==
        "mlkit::shape_error: matmul: c [3, 4, 4] overlaps b [4, 4]");
  CHECK(message_of([&] { mlkit::matmul(exec, other, other, square, epilogue{mlkit::add{slice(square.view(), 2)}}); }) ==
        "mlkit::shape_error: matmul: c [3, 4, 4] overlaps residual [4, 4]");
  for (float x : square) REQUIRE(x == 0);
  const mlkit::tensor_view<float, 3> folded(c.data(), {3, 4, 6}, {0, 6, 1});
  CHECK(message_of([&] { mlkit::matmul(exec, a, b, folded); }) ==
        "mlkit::shape_error: matmul: c of shape [3, 4, 6] has overlapping strides [0, 6, 1]");
  const mlkit::matrix<float> x({2, 3}), y({3, 4});
  mlkit::matrix<float> z({2, 4}), wrong({2, 5});
  z(0, 0) = 9;
  const std::vector<mlkit::matmul_problem<float, float, float>> problems{{x, y, z}, {x, y, wrong}};
  CHECK(message_of([&] { mlkit::matmul(exec, problems); }) ==
        "mlkit::shape_error: matmul: problem 1: c has 5 columns, but b has 4");
  CHECK(z(0, 0) == 9);
}
