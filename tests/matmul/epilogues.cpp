// Epilogues: every stage, their order, and every way of calling a functor, on flipped and unflipped products.
#include "reference.hpp"

using namespace reference;
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
