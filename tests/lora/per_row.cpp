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
std::vector<lora::adapter<T>> random_adapters(index_t in, index_t out, std::initializer_list<index_t> ranks) {
  std::vector<lora::adapter<T>> all;
  std::uint64_t seed = 10;
  for (const index_t rank : ranks) {
    all.push_back(
        {normal<T>(rank, in, seed, 0.3f), normal<T>(out, rank, seed + 1, 0.3f), static_cast<double>(seed) / 9});
    seed += 2;
  }
  return all;
}

// Row by row: the base, plus the row's adapter.
template <class T>
mat expected(const mlkit::matrix<T>& x, const mlkit::matrix<T>& w, const mlkit::vector<T>& bias,
             const std::vector<lora::adapter<T>>& adapters, const std::vector<int>& ids) {
  mat y = multiply(from(x), transpose(from(w)));
  for (index_t i = 0; i < y.rows; ++i) {
    const int id = ids[static_cast<std::size_t>(i)];
    mat row(1, x.extent(1));
    for (index_t k = 0; k < row.cols; ++k) row(0, k) = static_cast<double>(x(i, k));
    mat added(1, y.cols);
    if (id >= 0) {
      const auto& p = adapters[static_cast<std::size_t>(id)];
      added = scaled(multiply(multiply(row, transpose(from(p.a))), transpose(from(p.b))), p.scale());
    }
    for (index_t j = 0; j < y.cols; ++j) y(i, j) += added(0, j) + static_cast<double>(bias(j));
  }
  return y;
}

}  // namespace

TEMPLATE_TEST_CASE("each row has its own adapter, of any rank and scale", "[lora][per_row]", float, double, bf16) {
  for (const index_t tokens : {1, 5, 40})
    for (const index_t out : {33, 90}) {
      const auto adapters = random_adapters<TestType>(130, out, {4, 16, 1, 20, 8, 64});
      std::vector<int> ids;
      for (index_t i = 0; i < tokens; ++i) ids.push_back(static_cast<int>((i * 5 + 2) % 7) - 1);
      const auto x = normal<TestType>(tokens, 130, 1), w = normal<TestType>(out, 130, 2, 0.3f);
      const auto bias = normal_vector<TestType>(out, 3);
      mlkit::matrix<TestType> y({tokens, out});
      lora::linear(mlkit::cpu{}, x, lora::dense{w, bias}, lora::per_row{adapters, ids}, y);
      CHECK(difference(y, expected(x, w, bias, adapters, ids)) < tolerance<TestType>());
    }
}

TEST_CASE("runs of rows are the same as their ids", "[lora][per_row]") {
  const auto adapters = random_adapters<float>(64, 48, {4, 16, 1, 7});
  const std::vector<std::int64_t> starts{0, 3, 3, 10, 21};
  const std::vector<int> ids{0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3};
  const auto x = normal<float>(21, 64, 1), w = normal<float>(48, 64, 2);
  mlkit::matrix<float> a({21, 48}), b({21, 48});
  lora::linear(mlkit::cpu{}, x, lora::dense{w}, lora::segments{adapters, starts}, a);
  lora::linear(mlkit::cpu{}, x, lora::dense{w}, lora::per_row{adapters, ids}, b);
  CHECK(std::memcmp(a.data(), b.data(), sizeof(float) * 21 * 48) == 0);
  CHECK(difference(a, expected(x, w, mlkit::vector<float>({48}), adapters, ids)) < 1e-6);
}

TEST_CASE("rows without an adapter, or with scale 0, have the base's bits", "[lora][per_row]") {
  auto adapters = random_adapters<float>(64, 48, {4, 16});
  adapters[1].alpha = 0;
  const std::vector<int> ids{-1, 0, 1, 1, -1, 0, 0, 1};
  const auto x = normal<float>(8, 64, 1), w = normal<float>(48, 64, 2);
  mlkit::matrix<float> y({8, 48}), plain({8, 48});
  lora::linear(mlkit::cpu{}, x, lora::dense{w}, lora::per_row{adapters, ids}, y);
  lora::linear(mlkit::cpu{}, x, lora::dense{w}, plain);
  for (const index_t row : {0, 2, 3, 4, 7}) CHECK(std::memcmp(&y(row, 0), &plain(row, 0), sizeof(float) * 48) == 0);
  CHECK(std::memcmp(&y(1, 0), &plain(1, 0), sizeof(float) * 48) != 0);
  const std::vector<lora::adapter<float>> none;
  lora::linear(mlkit::cpu{}, x, lora::dense{w}, lora::per_row{none, std::vector<int>(8, -1)}, y);
  CHECK(std::memcmp(y.data(), plain.data(), sizeof(float) * 8 * 48) == 0);
}

TEST_CASE("a row's bits do not depend on the others' adapters, nor on threads", "[lora][per_row]") {
  const auto adapters = random_adapters<float>(300, 200, {4, 16, 9});
  const auto x = normal<float>(24, 300, 1), w = normal<float>(200, 300, 2);
  std::vector<int> ids, others;
  for (int i = 0; i < 24; ++i) {
    ids.push_back(i % 4 - 1);
    others.push_back(i % 2 ? ids.back() : 2);
  }
  mlkit::matrix<float> y({24, 200}), z({24, 200});
  lora::linear(mlkit::cpu{.threads = 1}, x, lora::dense{w}, lora::per_row{adapters, ids}, y);
  lora::linear(mlkit::cpu{.threads = 1}, x, lora::dense{w}, lora::per_row{adapters, others}, z);
  for (index_t i = 1; i < 24; i += 2) CHECK(std::memcmp(&y(i, 0), &z(i, 0), sizeof(float) * 200) == 0);
  for (const int threads : {2, 3, 7}) {
    lora::linear(mlkit::cpu{.threads = threads}, x, lora::dense{w}, lora::per_row{adapters, ids}, z);
    CHECK(std::memcmp(y.data(), z.data(), sizeof(float) * 24 * 200) == 0);
  }
}

TEST_CASE("adapters with other strides", "[lora][per_row]") {
  const auto a = normal<float>(64, 5, 1), b = normal<float>(5, 48, 2);
  mlkit::matrix<float> wide({48, 20});
  for (index_t i = 0; i < 48; ++i)
    for (index_t j = 0; j < 5; ++j) wide(i, 3 * j) = b(j, i);
  const mlkit::matrix_view<const float> apart(wide.data(), {48, 5}, {20, 3});
  const std::vector<lora::adapter_view<float>> adapters{{transposed(a), transposed(b), 0.5},
                                                        {transposed(a), apart, 0.5}};
  const auto x = normal<float>(6, 64, 3), w = normal<float>(48, 64, 4);
  mlkit::matrix<float> y({6, 48});
  lora::linear(mlkit::cpu{}, x, lora::dense{w}, lora::per_row{adapters, std::vector<int>{0, 1, 0, 1, 1, 0}}, y);
  const mat merged = add(from(w), multiply(transpose(from(b)), transpose(from(a))), 0.5);
  CHECK(difference(y, multiply(from(x), transpose(merged))) < 1e-6);
}

TEST_CASE("PEFT's mixed batch", "[lora][per_row]") {
  const auto file = mlkit::io::safetensors::open(test_data("peft_batch.safetensors"));
  const auto scales = file.view<double, 1>("scales");
  std::vector<lora::adapter_view<float>> adapters;
  for (int i = 0; i < 3; ++i)
    adapters.push_back(
        {file.view<float, 2>("a" + std::to_string(i)), file.view<float, 2>("b" + std::to_string(i)), scales(i)});
  const auto ids = file.at("ids").elements<std::int64_t>();
  mlkit::matrix<float> y({9, 40});
  lora::linear(mlkit::cpu{}, file.view<float, 2>("x"),
               lora::dense{file.view<float, 2>("w"), file.view<float, 1>("bias")}, lora::per_row{adapters, ids}, y);
  CHECK(difference(y, from(file.view<double, 2>("y"))) < 1e-6);
}
