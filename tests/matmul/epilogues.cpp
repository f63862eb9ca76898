// Epilogues: every stage, their order, and every way of calling a functor, on flipped and unflipped products.
#include "reference.hpp"

using namespace reference;
using mlkit::bf16;
using mlkit::cpu;
using mlkit::epilogue;

namespace {

// Thin both ways, blocked both ways, a tail in every dimension.
constexpr shape shapes[] = {{37, 75, 20}, {75, 37, 20}, {3, 70, 33}, {70, 3, 33}, {20, 65, 0}, {130, 200, 40}};
constexpr layout outputs[] = {layout::padded_rows, layout::padded_columns, layout::strided_reversed};

// What epilogues read; values are multiples of 1/8, so that f16 and bf16 hold them.
struct extras {
  std::vector<double> columns, rows, residual;
  explicit extras(const shape& s) {
    for (index_t j = 0; j < s.n; ++j) columns.push_back(static_cast<double>(j % 11 - 5) / 8);
    for (index_t i = 0; i < s.m; ++i) rows.push_back(static_cast<double>(i % 7 - 2) / 8);
    for (index_t i = 0; i < s.m * s.n; ++i) residual.push_back(static_cast<double>(i % 23 - 11) / 8);
  }
};

template <class T>
std::vector<T> as(const std::vector<double>& v) {
  std::vector<T> out;
  for (double x : v) out.push_back(from_double<T>(x));
  return out;
}

// make(e, s, call) calls with the epilogue; want(sum, row, col, before, e) is what that gives, and `gain` how much it
// may enlarge the error of the sum.
template <class A, class C, class Make, class Want>
void check_epilogue(double gain, const Make& make, const Want& want) {
  for_each_isa([&] {
    std::uint64_t seed = 0;
    for (const shape& s : shapes)
      for (layout lc : outputs) {
        ++seed;
        guarded<A> a(s.m, s.k, static_cast<layout>(pick(seed, 1, 2))),
            b(s.k, s.n, static_cast<layout>(pick(seed, 2, 2)));
        guarded<C> c(s.m, s.n, lc);
        a.fill(seed), b.fill(seed + 100), c.fill(seed + 200);
        sums expected = naive(a.view(), b.view());
        const extras e(s);
        for (index_t i = 0; i < s.m; ++i)
          for (index_t j = 0; j < s.n; ++j) {
            const double before = to_double(c.view()(i, j));
            expected(i, j) = want(expected(i, j), i, j, before, e);
            double& magnitude = expected.magnitude[static_cast<std::size_t>(i * s.n + j)];
            magnitude = gain * (magnitude + std::fabs(before) + 4);
          }
        make(e, s, [&](const auto& stages) { mlkit::matmul(cpu{.threads = 2}, a.view(), b.view(), c.view(), stages); });
        const std::string what = describe(s, layout::rows, layout::rows, lc);
        expect(c.view(), expected, what);
        INFO(what);
        REQUIRE(c.untouched_outside());
      }
  });
}

}  // namespace

TEST_CASE("epilogue: bias, factors, residual and accumulation, in the order written") {
  check_epilogue<float, float>(
      1,
      [](const extras& e, const shape& s, const auto& call) {
        const auto columns = as<float>(e.columns), rows = as<float>(e.rows);
        guarded<float> residual(s.m, s.n, layout::padded_rows);
        for (index_t i = 0; i < s.m; ++i)
          for (index_t j = 0; j < s.n; ++j)
            residual.view()(i, j) = static_cast<float>(e.residual[static_cast<std::size_t>(i * s.n + j)]);
        call(epilogue{mlkit::add_bias{columns}, mlkit::scale_rows{rows}, mlkit::accumulate{},
                      mlkit::scale_columns{columns}, mlkit::add{residual.view()}});
      },
      [](double x, index_t i, index_t j, double before, const extras& e) {
        const auto row = static_cast<std::size_t>(i), col = static_cast<std::size_t>(j);
        return ((x + e.columns[col]) * e.rows[row] + before) * e.columns[col] +
               e.residual[row * e.columns.size() + col];
      });
}

TEST_CASE("epilogue: stages commute only where arithmetic does") {
  check_epilogue<float, float>(
      6,
      [](const extras& e, const shape&, const auto& call) {
        const auto columns = as<float>(e.columns);
        call(epilogue{mlkit::scale{2.0f}, mlkit::relu{}, mlkit::add_bias{columns}, mlkit::scale{-3.0f}});
      },
      [](double x, index_t, index_t j, double, const extras& e) {
        return -3 * (std::max(2 * x, 0.0) + e.columns[static_cast<std::size_t>(j)]);
      });
}

TEST_CASE("epilogue: what it reads may be of any type") {
  check_epilogue<float, mlkit::bf16>(
      1,
      [](const extras& e, const shape& s, const auto& call) {
        const auto columns = as<mlkit::f16>(e.columns);
        const auto residual = as<mlkit::bf16>(e.residual);
        call(epilogue{mlkit::add_bias{columns},
                      mlkit::add{mlkit::matrix_view<const mlkit::bf16>(residual.data(), {s.m, s.n})},
                      mlkit::accumulate{}});
      },
      [](double x, index_t i, index_t j, double before, const extras& e) {
        const auto row = static_cast<std::size_t>(i), col = static_cast<std::size_t>(j);
        return x + e.columns[col] + e.residual[row * e.columns.size() + col] + before;
      });
}

TEST_CASE("epilogue: functors of the user's own see values, rows and columns") {
  const float shift = 0.25f;
  check_epilogue<float, float>(
      8,
      [&](const extras&, const shape&, const auto& call) {
        call(epilogue{[shift](float x) { return x * x + shift; },
                      [](float x, index_t row, index_t col) { return x + static_cast<float>(row - 2 * col) / 64; },
                      [](auto x) { return x / 2; }});
      },
      [&](double x, index_t i, index_t j, double, const extras&) {
        return (x * x + shift + static_cast<double>(i - 2 * j) / 64) / 2;
      });
}

TEST_CASE("epilogue: a chain called on one element gives what the product gives") {
  const auto square = [](float x) { return x * x; };
  const auto tilt = [](float x, index_t row, index_t col) { return x + static_cast<float>(row - 2 * col) / 64; };
  for (const shape& s : {shape{5, 11, 3}, shape{130, 70, 0}}) {
    const extras e(s);
    const auto columns = as<mlkit::bf16>(e.columns);
    const auto rows = as<float>(e.rows);
    const auto residual = as<mlkit::f16>(e.residual);
    const mlkit::matrix_view<const mlkit::f16> residual_view(residual.data(), {s.m, s.n});
    const epilogue chain{mlkit::add_bias{columns},
                         square,
                         mlkit::scale_rows{rows},
                         mlkit::accumulate{},
                         mlkit::relu{},
                         tilt,
                         mlkit::scale_columns{columns},
                         mlkit::add{residual_view}};

    // k = 0, or factors of 1/4 and sums of a few: all exact.
    mlkit::matrix<float> a({s.m, s.k}), b({s.k, s.n}), c({s.m, s.n});
    for (index_t i = 0; i < a.size(); ++i) a.data()[i] = static_cast<float>(i % 5 - 2) / 4;
    for (index_t i = 0; i < b.size(); ++i) b.data()[i] = static_cast<float>(i % 7 - 3) / 4;
    for (index_t i = 0; i < c.size(); ++i) c.data()[i] = static_cast<float>(i % 13 - 6) / 8;
    std::vector<float> want;
    for (index_t i = 0; i < s.m; ++i)
      for (index_t j = 0; j < s.n; ++j) {
        double sum = 0;
        for (index_t k = 0; k < s.k; ++k) sum += a(i, k) * b(k, j);
        const auto row = static_cast<std::size_t>(i), col = static_cast<std::size_t>(j);
        const double x = sum + e.columns[col], y = x * x * e.rows[row] + c(i, j);
        const double z = (std::max(y, 0.0) + static_cast<double>(i - 2 * j) / 64) * e.columns[col];
        want.push_back(static_cast<float>(z + e.residual[row * e.columns.size() + col]));
        REQUIRE(chain(static_cast<float>(sum), i, j, c(i, j)) == want.back());
        REQUIRE(chain(sum, i, j, c(i, j)) == want.back());
      }
    mlkit::matmul(cpu{.threads = 1}, a, b, c, chain);
    REQUIRE(std::equal(want.begin(), want.end(), c.data()));
  }
}

TEST_CASE("epilogue: stages called on one element") {
  const std::vector<float> three{2, -3, 0.5f};
  const std::vector<double> six{1, 2, 3, 4, 5, 6};
  const mlkit::matrix_view<const double> turned(six.data(), {3, 2}, {1, 3});
  REQUIRE(mlkit::add_bias{three}(1.0f, 7, 1) == -2);
  REQUIRE(mlkit::scale_columns{three}(4.0f, 7, 2) == 2);
  REQUIRE(mlkit::scale_rows{three}(4.0f, 0, 7) == 8);
  REQUIRE(mlkit::add{turned}(0.5, 2, 1) == 6.5);
  REQUIRE(mlkit::accumulate{}(1.0f, 2.0f) == 3);
  REQUIRE(epilogue<>{}(1.5, 0, 0) == 1.5);
  REQUIRE(epilogue{mlkit::scale{2.0f}, mlkit::add_bias{three}}(1.0f, 0, 2) == 2.5f);

  using unconditional = epilogue<mlkit::scale>;
  using accumulating = epilogue<mlkit::scale, mlkit::accumulate>;
  STATIC_REQUIRE(std::is_invocable_v<const unconditional&, float, index_t, index_t>);
  STATIC_REQUIRE(!std::is_invocable_v<const accumulating&, float, index_t, index_t>);
  STATIC_REQUIRE(std::is_invocable_v<const accumulating&, float, index_t, index_t, float>);
}

TEST_CASE("epilogue: functors are called once for each element of the output, and for nothing else") {
  for_each_isa([] {
    for (const shape& s : shapes) {
      const mlkit::matrix<float> a({s.m, s.k}), b({s.k, s.n});
      mlkit::matrix<float> c({s.m, s.n});
      std::vector<int> calls(static_cast<std::size_t>(s.m * s.n));
      mlkit::matmul(cpu{.threads = 1}, a, b, c, epilogue{[&](float x, index_t row, index_t col) {
                      REQUIRE((row >= 0 && row < s.m && col >= 0 && col < s.n));
                      ++calls[static_cast<std::size_t>(row * s.n + col)];
                      return x;
                    }});
      REQUIRE(std::count(calls.begin(), calls.end(), 1) == s.m * s.n);
    }
  });
}

TEST_CASE("epilogue: a functor may multiply matrices itself") {
  for_each_isa([] {
    const auto ones = [](index_t rows, index_t cols) {
      mlkit::matrix<bf16> m({rows, cols});
      std::fill(m.begin(), m.end(), bf16(1.0f));
      return m;
    };
    const auto a = ones(70, 90), b = ones(90, 80), inner_a = ones(40, 33), inner_b = ones(33, 50);
    mlkit::matrix<float> c({70, 80});
    mlkit::matmul(cpu{.threads = 1}, a, b, c, epilogue{[&](float x) {
                    mlkit::matrix<float> inner({40, 50});
                    mlkit::matmul(cpu{.threads = 1}, inner_a, inner_b, inner);
                    return x + inner(39, 49);
                  }});
    CHECK(std::all_of(c.begin(), c.end(), [](float x) { return x == 90 + 33; }));
  });
}
