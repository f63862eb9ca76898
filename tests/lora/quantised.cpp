// NF4 and int8 weights against bitsandbytes' own, and against f64 loops over values decoded here.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <mlkit/io/safetensors.hpp>
#include <mlkit/lora/quantised.hpp>
#include <random>
#include <vector>

#include "test_data.hpp"

namespace lora = mlkit::lora;
using mlkit::index_t;

namespace {

// QLoRA's table, written again.
constexpr double levels[16] = {-1.0,
                               -0.6961928009986877,
                               -0.5250730514526367,
                               -0.39491748809814453,
                               -0.28444138169288635,
                               -0.18477343022823334,
                               -0.09105003625154495,
                               0.0,
                               0.07958029955625534,
                               0.16093020141124725,
                               0.24611230194568634,
                               0.33791524171829224,
                               0.44070982933044434,
                               0.5626170039176941,
                               0.7229568362236023,
                               1.0};

const mlkit::io::safetensors& fixtures() {
  static const auto file = mlkit::io::safetensors::open(test_data("bitsandbytes.safetensors"));
  return file;
}
template <class T>
std::span<const T> fixture(const std::string& name) {
  const auto& info = fixtures().at(name);
  const T* data = info.rank() == 1 ? info.view<T, 1>().data : info.view<T, 2>().data;
  return {data, static_cast<std::size_t>(info.count())};
}
lora::nf4_view plain_fixture(const std::string& name, index_t block) {
  const auto& shape = fixtures().at(name + ".w").shape;
  return {{shape[0], shape[1]}, fixture<std::uint8_t>(name + ".packed"), fixture<float>(name + ".absmax"), block};
}
lora::nf4_view nested_fixture(const std::string& name, index_t block) {
  const auto& shape = fixtures().at(name + ".w").shape;
  return {{shape[0], shape[1]},
          fixture<std::uint8_t>(name + ".packed"),
          lora::nf4_nested{.codes = fixture<std::uint8_t>(name + ".absmax_codes"),
                           .absmax = fixture<float>(name + ".nested_absmax"),
                           .offset = fixture<float>(name + ".offset")[0],
                           .code_book = fixture<float>("dynamic_map")},
          block};
}

mlkit::matrix<float> random_matrix(index_t rows, index_t cols, unsigned seed) {
  std::mt19937 g(seed);
  std::normal_distribution<float> normal;
  mlkit::matrix<float> m({rows, cols});
  for (float& x : m) x = normal(g);
  return m;
}

// Element [row, col] as a formula, in f64.
double value(const lora::nf4_view& w, index_t row, index_t col) {
  const index_t i = row * w.inputs + col, block = i / w.block();
  const int code = i % 2 == 0 ? w.packed[i / 2] >> 4 : w.packed[i / 2] & 15;
  const double factor =
      w.absmax ? double{w.absmax[block]}
               : double{w.code_book[w.absmax_codes[block]]} * w.nested_absmax[block >> w.nested_block_log2] +
                     double{w.offset};
  return levels[code] * factor;
}
double value(const lora::int8_view& w, index_t row, index_t col) {
  return w.codes[row * w.inputs + col] * double{w.scales[row]};
}

template <class T>
constexpr double unit_roundoff = std::is_same_v<T, mlkit::bf16>  ? 0x1p-8
                                 : std::is_same_v<T, mlkit::f16> ? 0x1p-11
                                                                 : 0x1p-24;

struct layout {
  const char* name;
  index_t block;
};
constexpr layout layouts[] = {{"even", 64}, {"odd", 64}, {"many", 32}};

}  // namespace

TEST_CASE("the code book is bitsandbytes' dynamic map") {
  const auto want = fixture<float>("dynamic_map");
  const auto have = lora::dynamic_map();
  for (int i = 0; i < 256; ++i) {
    CAPTURE(i);
    CHECK(have[i] == want[i]);
  }
}

TEST_CASE("weights stored by bitsandbytes have the values that it gives them") {
  for (const auto& [name, block] : layouts) {
    CAPTURE(name);
    const std::string key = name;
    const auto w = plain_fixture(key, block), nested = nested_fixture(key, block);
    mlkit::matrix<float> have({w.outputs, w.inputs}), have_nested({w.outputs, w.inputs});
    lora::dequantise(mlkit::cpu{}, w, have);
    lora::dequantise(mlkit::cpu{}, nested, have_nested);
    std::vector<index_t> rows{0, 1, 64, 65};  // of "many", the others have them all
    if (key != "many") {
      rows.resize(static_cast<std::size_t>(w.outputs));
      for (index_t r = 0; r < w.outputs; ++r) rows[static_cast<std::size_t>(r)] = r;
    }
    // bitsandbytes rounds the values of bf16 weights to bf16.
    const auto same = [&](const std::string& values, const mlkit::matrix<float>& m) {
      const auto want = fixtures().tensor<float, 2>(values);
      for (std::size_t r = 0; r < rows.size(); ++r)
        for (index_t c = 0; c < w.inputs; ++c) {
          const float x = m(rows[r], c);
          const float y = key == "many" ? static_cast<float>(mlkit::bf16(x)) : x;
          if (y != want(static_cast<index_t>(r), c)) {
            CAPTURE(rows[r], c, y, want(static_cast<index_t>(r), c));
            FAIL_CHECK("another value");
            return;
          }
        }
    };
    same(key + ".values", have);
    same(key + ".nested_values", have_nested);
  }
}

TEST_CASE("quantising makes the codes and factors that bitsandbytes makes") {
  for (const auto& [name, block] : layouts) {
    CAPTURE(name);
    const std::string key = name;
    const auto want = plain_fixture(key, block), want_nested = nested_fixture(key, block);
    const auto quantise = [&](const lora::nf4_options& options) {
      if (key == "many") return lora::quantise_nf4(mlkit::cpu{}, fixtures().view<mlkit::bf16, 2>(key + ".w"), options);
      return lora::quantise_nf4(mlkit::cpu{}, fixtures().view<float, 2>(key + ".w"), options);
    };
    const auto plain = quantise({.block = block});
    const auto nested = quantise({.double_quantise = true, .block = block});
    const lora::nf4_view p = plain.view(), q = nested.view();
    const auto bytes = static_cast<std::size_t>((p.size() + 1) / 2);
    CHECK(std::memcmp(p.packed, want.packed, bytes) == 0);
    CHECK(std::memcmp(q.packed, want.packed, bytes) == 0);
    CHECK(std::memcmp(p.absmax, want.absmax, static_cast<std::size_t>(p.blocks()) * 4) == 0);
    CHECK(!p.double_quantised());
    CHECK(q.double_quantised());
    // torch sums the factors in f32: the offset may differ in its last bit, and all that follows from it.
    CHECK(q.offset == Approx(want_nested.offset).epsilon(2e-7));
    for (index_t i = 0; i < q.nested_blocks(); ++i)
      CHECK(q.nested_absmax[i] == Approx(want_nested.nested_absmax[i]).epsilon(1e-6));
    for (index_t i = 0; i < q.blocks(); ++i) {
      if (q.absmax_codes[i] == want_nested.absmax_codes[i]) continue;
      // Its CPU kernel finds the code on a grid of 2^16 points: neighbours, where the factor lies between them.
      CAPTURE(i);
      CHECK(std::abs(int{q.absmax_codes[i]} - int{want_nested.absmax_codes[i]}) == 1);
      const double x = (double{p.absmax[i]} - q.offset) / q.nested_absmax[i >> 8];
      const double mine = std::fabs(x - q.code_book[q.absmax_codes[i]]);
      const double its = std::fabs(x - q.code_book[want_nested.absmax_codes[i]]);
      CHECK(mine <= its);
      CHECK(its - mine < 2.0 / 65535);
    }
  }
}

TEST_CASE("int8 codes are those of bitsandbytes") {
  const auto w = fixtures().view<float, 2>("int8.w");
  const auto codes = fixture<std::int8_t>("int8.codes");
  const auto stats = fixture<float>("int8.stats");
  const auto q = lora::quantise_int8(mlkit::cpu{}, w);
  CHECK(std::memcmp(q.view().codes, codes.data(), codes.size()) == 0);
  for (index_t r = 0; r < w.extent(0); ++r) CHECK(q.view().scales[r] == Approx(stats[r] / 127).epsilon(2e-7));
  CHECK(q.bytes() == w.size() + 4 * w.extent(0));
}

TEST_CASE("every level is reached by its own value, and every weight by the nearest") {
  // One block with all levels, scaled by a power of two, so that products are exact.
  std::vector<float> w(64);
  for (int i = 0; i < 64; ++i) w[i] = static_cast<float>(levels[i % 16]) * 4.0f;
  const auto q = lora::quantise_nf4(mlkit::cpu{}, mlkit::matrix_view<const float>(w.data(), {2, 32}));
  for (int i = 0; i < 64; ++i) CHECK((q.view().packed[i / 2] >> (i % 2 ? 0 : 4) & 15) == i % 16);
  CHECK(q.view().absmax[0] == 4.0f);

  const auto r = random_matrix(37, 53, 3);
  const auto m = lora::quantise_nf4(mlkit::cpu{}, r);
  for (index_t i = 0; i < r.extent(0); ++i)
    for (index_t j = 0; j < r.extent(1); ++j) {
      const double have = std::fabs(value(m.view(), i, j) - r(i, j));
      const double factor = m.view().absmax[(i * r.extent(1) + j) / 64];
      double best = 1e9;
      for (const double level : levels) best = std::min(best, std::fabs(level * factor - r(i, j)));
      if (have > best * (1 + 1e-5) + 1e-7) FAIL("weight " << i << ", " << j << " is " << have << " off, not " << best);
    }
}

TEST_CASE("storage takes about 4.5, 4.127 and 8 bits a weight") {
  const auto w = random_matrix(256, 1024, 5);
  CHECK(lora::quantise_nf4(mlkit::cpu{}, w).bytes() * 8.0 / w.size() == 4.5);
  CHECK(lora::quantise_nf4(mlkit::cpu{}, w, {.double_quantise = true}).bytes() * 8.0 / w.size() ==
        Approx(4.127).epsilon(1e-4));
  CHECK(lora::quantise_int8(mlkit::cpu{}, w).bytes() * 8.0 / w.size() == Approx(8).epsilon(0.01));
}

TEST_CASE("quantising is the same for any number of threads, strides and dtype that hold the same values") {
  auto w = random_matrix(45, 77, 6);
  for (float& x : w) x = static_cast<float>(mlkit::bf16(x));
  const auto want = lora::quantise_nf4(mlkit::cpu{.threads = 1}, w, {.double_quantise = true});
  const auto want8 = lora::quantise_int8(mlkit::cpu{.threads = 1}, w);
  const auto same = [&](const auto& any) {
    const auto have = lora::quantise_nf4(mlkit::cpu{.threads = 3}, any, {.double_quantise = true});
    const auto &a = want.view(), &b = have.view();
    CHECK(std::memcmp(a.packed, b.packed, static_cast<std::size_t>((a.size() + 1) / 2)) == 0);
    CHECK(std::memcmp(a.absmax_codes, b.absmax_codes, static_cast<std::size_t>(a.blocks())) == 0);
    CHECK(std::memcmp(a.nested_absmax, b.nested_absmax, static_cast<std::size_t>(a.nested_blocks()) * 4) == 0);
    CHECK(a.offset == b.offset);
    const auto have8 = lora::quantise_int8(mlkit::cpu{.threads = 3}, any);
    CHECK(std::memcmp(want8.view().codes, have8.view().codes, static_cast<std::size_t>(w.size())) == 0);
    CHECK(std::memcmp(want8.view().scales, have8.view().scales, 45 * 4) == 0);
  };
  same(w);
  mlkit::matrix<float> columns({77, 45});
  mlkit::matrix<double> wide({45, 77});
  mlkit::matrix<mlkit::bf16> narrow({45, 77});
  for (index_t r = 0; r < 45; ++r)
    for (index_t c = 0; c < 77; ++c) {
      columns(c, r) = w(r, c);
      wide(r, c) = w(r, c);
      narrow(r, c) = mlkit::bf16(w(r, c));
    }
  same(mlkit::transposed(columns));
  same(wide);
  same(narrow);
}

TEMPLATE_TEST_CASE("dequantised values are the formula's, rounded once", "", float, double, mlkit::bf16, mlkit::f16) {
  for (const auto& [rows, cols] :
       {std::pair<index_t, index_t>{1, 1}, {1, 2}, {3, 5}, {5, 64}, {2, 63}, {9, 130}, {4, 1000}})
    for (const bool nested : {false, true}) {
      CAPTURE(rows, cols, nested);
      const auto q = lora::quantise_nf4(mlkit::cpu{}, random_matrix(rows, cols, 8), {.double_quantise = nested});
      const auto i8 = lora::quantise_int8(mlkit::cpu{}, random_matrix(rows, cols, 9));
      const auto check = [&](const auto& w, auto&& out) {
        lora::dequantise(mlkit::cpu{}, w, out);
        const auto o = mlkit::as_view(out);
        for (index_t r = 0; r < o.extent(0); ++r)
          for (index_t c = 0; c < o.extent(1); ++c) {
            const double want = value(w, r, c), have = static_cast<double>(o(r, c));
            if (!(std::fabs(have - want) <= std::fabs(want) * (unit_roundoff<TestType> + 3 * 0x1p-24) + 1e-7))
              FAIL("[" << r << ", " << c << "] is " << have << ", not " << want);
          }
      };
      mlkit::matrix<TestType> out({rows, cols}), across({cols, rows});
      check(q.view(), out);
      check(q.view(), mlkit::transposed(across));
      check(i8.view(), out);
      check(i8.view(), mlkit::transposed(across));
    }
}

namespace {

// y = x w^T and d = y w against f64 loops.
template <class X, class Base>
void check_products(const Base& base, index_t tokens, unsigned seed) {
  const auto w = base.weight();
  const index_t out = base.outputs(), in = base.inputs();
  CAPTURE(tokens, out, in);
  const auto x32 = random_matrix(tokens, in, seed), dy32 = random_matrix(tokens, out, seed + 1);
  mlkit::matrix<X> x({tokens, in}), dy({tokens, out});
  std::transform(x32.begin(), x32.end(), x.begin(), [](float v) { return static_cast<X>(v); });
  std::transform(dy32.begin(), dy32.end(), dy.begin(), [](float v) { return static_cast<X>(v); });
  using Y = mlkit::accumulator_t<X>;
  mlkit::matrix<Y> y({tokens, out}), dx({tokens, in});
  mlkit::matmul(mlkit::cpu{}, x, mlkit::transposed(w), y);
  mlkit::matmul(mlkit::cpu{}, dy, w, dx);
  // The f32 roundings of factors, weights and sums; for bf16 also that of the weights. Errors add up at random.
  const double rounding = std::is_same_v<X, mlkit::bf16> ? 0x1p-8 : 0x1p-20;
  const auto check = [&](const auto& have, const auto& left, auto weight, index_t rows, index_t cols, index_t depth) {
    for (index_t i = 0; i < rows; ++i)
      for (index_t j = 0; j < cols; ++j) {
        double sum = 0, size = 0;
        for (index_t k = 0; k < depth; ++k) {
          const double term = static_cast<double>(left(i, k)) * weight(j, k);
          sum += term;
          size += std::fabs(term);
        }
        if (!(std::fabs(static_cast<double>(have(i, j)) - sum) <= size * rounding + 1e-12))
          FAIL("[" << i << ", " << j << "] is off by " << static_cast<double>(have(i, j)) - sum << ", sum " << sum
                   << " of terms " << size);
      }
  };
  const auto& view = w.view;
  check(
      y, x, [&](index_t j, index_t k) { return value(view, j, k); }, tokens, out, in);
  check(
      dx, dy, [&](index_t j, index_t k) { return value(view, k, j); }, tokens, in, out);
}

}  // namespace

TEMPLATE_TEST_CASE("products with quantised weights", "", float, double, mlkit::bf16, mlkit::f16) {
  using T = std::conditional_t<std::is_same_v<TestType, double>, double, mlkit::bf16>;
  for (const auto& [out, in] : {std::pair<index_t, index_t>{1, 1}, {5, 3}, {64, 64}, {33, 65}, {130, 127}, {40, 1100}})
    for (const index_t tokens : {1, 2, 3, 4, 7, 8, 16, 17, 40}) {
      const auto w = random_matrix(out, in, 11);
      check_products<TestType>(lora::nf4<T>(lora::quantise_nf4(mlkit::cpu{}, w)), tokens, 12);
    }
  const auto w = random_matrix(97, 201, 13);
  const auto plain = lora::quantise_nf4(mlkit::cpu{}, w);
  const auto nested = lora::quantise_nf4(mlkit::cpu{}, w, {.double_quantise = true});
  const auto large = lora::quantise_nf4(mlkit::cpu{}, w, {.double_quantise = true, .block = 512});
  const auto small = lora::quantise_nf4(mlkit::cpu{}, w, {.block = 32});
  const auto bytes = lora::quantise_int8(mlkit::cpu{}, w);
  for (const index_t tokens : {1, 3, 16, 33}) {
    check_products<TestType>(lora::nf4<T>(plain), tokens, 14);
    check_products<TestType>(lora::nf4<T>(nested), tokens, 14);
    check_products<TestType>(lora::nf4<T>(large), tokens, 14);
    check_products<TestType>(lora::nf4<T>(small), tokens, 14);
    check_products<TestType>(lora::int8<T>(bytes), tokens, 14);
  }
}

TEST_CASE("products with quantised weights are the same bits for any number of threads") {
  const auto q = lora::quantise_nf4(mlkit::cpu{}, random_matrix(300, 260, 15), {.double_quantise = true});
  for (const index_t tokens : {1, 5, 32, 100}) {
    const auto x = random_matrix(tokens, 260, 16);
    mlkit::matrix<float> one({tokens, 300}), three({tokens, 300});
    mlkit::matmul(mlkit::cpu{.threads = 1}, x, mlkit::transposed(q.view()), one);
    mlkit::matmul(mlkit::cpu{.threads = 3}, x, mlkit::transposed(q.view()), three);
    CHECK(std::memcmp(one.data(), three.data(), static_cast<std::size_t>(one.size()) * 4) == 0);
  }
}

TEST_CASE("scratch does not grow with the base, which stays at four bits") {
  constexpr index_t size = 4096;
  const auto q = lora::quantise_nf4(mlkit::cpu{}, random_matrix(size, size, 17), {.double_quantise = true});
  for (const index_t tokens : {1, 32}) {
    CAPTURE(tokens);
    const auto x = random_matrix(tokens, size, 18);
    mlkit::matrix<float> y({tokens, size});
    mlkit::reset_workspace_peak();
    mlkit::matmul(mlkit::cpu{.threads = 2}, x, mlkit::transposed(q.view()), y);
    CHECK(mlkit::workspace_peak_bytes() < size * size * 4 / 4);
    mlkit::reset_workspace_peak();
    mlkit::matmul(mlkit::cpu{.threads = 2}, y, q.view(), x.clone());
    CHECK(mlkit::workspace_peak_bytes() < size * size * 4 / 4);
  }
}

TEST_CASE("bases keep what they are given") {
  static_assert(lora::linear_base<lora::nf4<>> && lora::linear_base<lora::int8<>>);
  static_assert(lora::linear_base<lora::nf4<double>>);
  const auto q = lora::quantise_nf4(mlkit::cpu{}, random_matrix(6, 10, 19));
  const auto i8 = lora::quantise_int8(mlkit::cpu{}, random_matrix(6, 10, 19));
  std::vector<float> bias(6);
  const lora::nf4 base{q, bias}, without{q.view()};
  CHECK(base.outputs() == 6);
  CHECK(base.inputs() == 10);
  CHECK(base.bias.data == bias.data());
  CHECK(without.bias.data == nullptr);
  const lora::int8 bytes{i8, bias};
  CHECK(bytes.outputs() == 6);
  CHECK(bytes.bias.data == bias.data());
}

TEST_CASE("an owning weight moves") {
  const auto w = random_matrix(3, 70, 20);
  auto a = lora::quantise_nf4(mlkit::cpu{}, w, {.double_quantise = true});
  const auto* packed = a.view().packed;
  lora::nf4_matrix b = std::move(a);
  CHECK(b.view().packed == packed);
  CHECK(a.rows() == 0);
  CHECK(a.view().packed == nullptr);
}

TEST_CASE("empty weights") {
  for (const auto& [rows, cols] : {std::pair<index_t, index_t>{0, 5}, {5, 0}, {0, 0}}) {
    const mlkit::matrix<float> w({rows, cols});
    for (const bool nested : {false, true}) {
      const auto q = lora::quantise_nf4(mlkit::cpu{}, w, {.double_quantise = nested});
      CHECK(q.rows() == rows);
      CHECK(q.cols() == cols);
      mlkit::matrix<float> x({3, cols}), y({3, rows});
      std::fill(y.begin(), y.end(), 7.0f);
      mlkit::matmul(mlkit::cpu{}, x, mlkit::transposed(q.view()), y);
      CHECK(std::all_of(y.begin(), y.end(), [](float v) { return v == 0; }));
    }
    CHECK(lora::quantise_int8(mlkit::cpu{}, w).rows() == rows);
  }
}

TEST_CASE("bad quantised weights are refused, by name and size") {
  using Catch::Matchers::Contains;
  std::vector<std::uint8_t> packed(96), codes(3);
  std::vector<float> absmax(3), book(256);
  const mlkit::extents_t<2> shape{3, 64};
  CHECK_NOTHROW(lora::nf4_view(shape, packed, absmax));
  CHECK_THROWS_AS(lora::nf4_view({3, 63}, packed, absmax), mlkit::shape_error);
  CHECK_THROWS_WITH(lora::nf4_view({4, 64}, packed, absmax),
                    Contains("lora::nf4_view: packed has 96 bytes, but shape [4, 64] needs 128"));
  CHECK_THROWS_WITH(lora::nf4_view(shape, packed, absmax, 32),
                    Contains("absmax has 3 elements") && Contains("needs 6"));
  CHECK_THROWS_AS(lora::nf4_view(shape, packed, absmax, 48), mlkit::value_error);
  CHECK_THROWS_WITH(lora::nf4_view(shape, packed, absmax, 16), Contains("block = 16"));
  CHECK_THROWS_AS(lora::nf4_view({-1, 64}, packed, absmax), mlkit::shape_error);
  CHECK_THROWS_AS(lora::nf4_view({index_t{1} << 40, index_t{1} << 40}, packed, absmax), mlkit::shape_error);
  CHECK_THROWS_AS(lora::nf4_view(shape, std::span<const std::uint8_t>(static_cast<std::uint8_t*>(nullptr), 96), absmax),
                  mlkit::value_error);

  const auto nested = [&] {
    return lora::nf4_nested{.codes = codes, .absmax = std::span(absmax).first(1), .offset = 1};
  };
  CHECK_NOTHROW(lora::nf4_view(shape, packed, nested()));
  auto bad = nested();
  bad.codes = bad.codes.first(2);
  CHECK_THROWS_WITH(lora::nf4_view(shape, packed, bad), Contains("nested.codes has 2 elements") && Contains("needs 3"));
  bad = nested();
  bad.absmax = absmax;
  CHECK_THROWS_WITH(lora::nf4_view(shape, packed, bad),
                    Contains("nested.absmax has 3 elements") && Contains("needs 1"));
  bad = nested();
  bad.code_book = std::span(book).first(16);
  CHECK_THROWS_WITH(lora::nf4_view(shape, packed, bad), Contains("16") && Contains("256"));
  bad = nested();
  bad.block = 100;
  CHECK_THROWS_WITH(lora::nf4_view(shape, packed, bad), Contains("nested.block = 100"));
  bad = nested();
  bad.offset = std::numeric_limits<float>::quiet_NaN();
  CHECK_THROWS_AS(lora::nf4_view(shape, packed, bad), mlkit::value_error);

  std::vector<std::int8_t> bytes(192);
  CHECK_NOTHROW(lora::int8_view(shape, bytes, absmax));
  CHECK_THROWS_WITH(lora::int8_view({3, 65}, bytes, absmax), Contains("codes has 192 bytes") && Contains("195"));
  CHECK_THROWS_WITH(lora::int8_view(shape, bytes, book), Contains("scales has 256 elements") && Contains("3"));

  auto w = random_matrix(5, 70, 21);
  CHECK_THROWS_AS(lora::quantise_nf4(mlkit::cpu{}, w, {.block = 100}), mlkit::value_error);
  CHECK_THROWS_AS(lora::quantise_nf4(mlkit::cpu{}, mlkit::matrix_view<const float>(nullptr, {2, 3})),
                  mlkit::value_error);
  for (const float x : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                        -std::numeric_limits<float>::infinity()}) {
    auto broken = w.clone();
    broken(4, 69) = x;
    CHECK_THROWS_WITH(lora::quantise_nf4(mlkit::cpu{}, broken), Contains("w[4, 69] is not finite"));
    CHECK_THROWS_WITH(lora::quantise_int8(mlkit::cpu{}, broken), Contains("w[4, 69] is not finite"));
    broken(1, 3) = x;
    CHECK_THROWS_WITH(lora::quantise_nf4(mlkit::cpu{.threads = 2}, broken), Contains("w[1, 3] is not finite"));
    CHECK_THROWS_AS(lora::quantise_int8(mlkit::cpu{.threads = 2}, broken), mlkit::value_error);
  }

  const auto q = lora::quantise_nf4(mlkit::cpu{}, w);
  mlkit::matrix<float> out({5, 71});
  std::fill(out.begin(), out.end(), 7.0f);
  CHECK_THROWS_WITH(lora::dequantise(mlkit::cpu{}, q, out), Contains("out has 71 columns, but the weight has 70"));
  CHECK(std::all_of(out.begin(), out.end(), [](float v) { return v == 7; }));
}

TEST_CASE("tiny, huge and zero weights quantise to finite values") {
  mlkit::matrix<float> w({4, 64});
  for (index_t c = 0; c < 64; ++c) {
    w(1, c) = 1e-42f * static_cast<float>(c - 30);
    w(2, c) = 3e38f * (c % 2 ? 1 : -1);
    w(3, c) = c == 5 ? 1e-38f : 0;
  }
  const auto q = lora::quantise_nf4(mlkit::cpu{}, w);
  const auto i8 = lora::quantise_int8(mlkit::cpu{}, w);
  mlkit::matrix<float> a({4, 64}), b({4, 64});
  lora::dequantise(mlkit::cpu{}, q, a);
  lora::dequantise(mlkit::cpu{}, i8, b);
  for (index_t c = 0; c < 64; ++c) {
    CHECK(a(0, c) == 0);
    CHECK(b(0, c) == 0);
    CHECK(a(2, c) == w(2, c));
    CHECK(b(2, c) == Approx(w(2, c)));
    CHECK(std::fabs(a(1, c)) <= 4e-41f);
    CHECK(std::fabs(b(1, c)) <= 4e-41f);
  }
}
