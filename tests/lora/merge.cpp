#include <catch2/catch.hpp>
#include <cstring>
#include <limits>
#include <mlkit/io/safetensors.hpp>
#include <mlkit/lora.hpp>
#include <string>

#include "reference.hpp"
#include "test_data.hpp"

namespace lora = mlkit::lora;
using mlkit::bf16;
using mlkit::f16;
using mlkit::index_t;
using namespace reference;

namespace {

template <class T>
lora::adapter<T> random_adapter(index_t in, index_t out, index_t rank, double alpha, std::uint64_t seed) {
  return {normal<T>(rank, in, seed, 0.3f), normal<T>(out, rank, seed + 1, 0.3f), alpha};
}
template <class T>
mat delta(const lora::adapter<T>& p) {
  return scaled(multiply(from(p.b), from(p.a)), p.scale());
}

}  // namespace

TEMPLATE_TEST_CASE("merge adds s B A, rounded once, and unmerge takes it out", "[lora][merge]", float, double, bf16,
                   f16) {
  for (const index_t rank : {1, 4, 17}) {
    const auto p = random_adapter<TestType>(75, 50, rank, 6, 3);
    const auto start = normal<TestType>(50, 75, 1);
    auto w = start.clone();
    lora::merge(mlkit::cpu{}, w, p, {.weight = 0.8});
    const mat want = add(from(start), delta(p), 0.8);
    // One rounding, half a unit in the last place of the type, after sums in f32 or f64.
    const double ulp = std::is_same_v<TestType, bf16> ? 0x1p-9 : std::is_same_v<TestType, f16> ? 0x1p-12 : 0;
    const double sums = std::is_same_v<TestType, double> ? 1e-14 : 1e-6;
    double worst = 0;
    for (index_t i = 0; i < w.size(); ++i) {
      const double value = want.v[static_cast<std::size_t>(i)];
      worst = std::max(worst, std::abs(static_cast<double>(w.data()[i]) - value) - 2 * ulp * std::abs(value) - sums);
    }
    CHECK(worst <= 0);
    lora::unmerge(mlkit::cpu{}, w, p, {.weight = 0.8});
    CHECK(difference(w, from(start)) < 2 * tolerance<TestType>());
  }
}

TEST_CASE("a merged base computes what base and adapter do", "[lora][merge]") {
  const auto p = random_adapter<float>(64, 48, 4, 8, 3);
  auto w = normal<float>(48, 64, 1);
  const auto x = normal<float>(9, 64, 2);
  mlkit::matrix<float> apart({9, 48}), merged({9, 48});
  lora::linear(mlkit::cpu{}, x, lora::dense{w}, p, apart);
  lora::merge(mlkit::cpu{}, w, p);
  lora::linear(mlkit::cpu{}, x, lora::dense{w}, merged);
  CHECK(difference(merged, from(apart)) < 1e-6);
}

TEST_CASE("a transposed weight merges where it lies", "[lora][merge]") {
  const auto p = random_adapter<float>(30, 20, 3, 3, 3);
  const auto start = normal<float>(30, 20, 1);
  auto w = start.clone();
  lora::merge(mlkit::cpu{}, transposed(w), p);
  CHECK(difference(w, add(from(start), transpose(delta(p)))) < 1e-6);
}

TEST_CASE("DoRA merges and unmerges", "[lora][merge][dora]") {
  const auto p = random_adapter<float>(75, 50, 5, 6, 3);
  const auto start = normal<float>(50, 75, 1);
  const auto m = normal_vector<float>(50, 8, 0.2f, 2.0f);
  auto w = start.clone();
  const auto norms = lora::adapted_norms(mlkit::cpu{}, lora::dense{w}, p);
  const lora::dora dora{p, m, norms};
  lora::merge(mlkit::cpu{}, w, lora::dora{p, m});
  mat want = add(from(start), delta(p));
  for (index_t o = 0; o < 50; ++o) {
    double square = 0;
    for (index_t i = 0; i < 75; ++i) square += want(o, i) * want(o, i);
    for (index_t i = 0; i < 75; ++i) want(o, i) *= static_cast<double>(m(o)) / std::sqrt(square);
  }
  CHECK(difference(w, want) < 1e-6);
  CHECK_THROWS_AS(lora::unmerge(mlkit::cpu{}, w, lora::dora{p, m}), mlkit::value_error);
  lora::unmerge(mlkit::cpu{}, w, dora);
  CHECK(difference(w, from(start)) < 2e-6);
}

TEST_CASE("what would not be finite is refused before anything is written", "[lora][merge]") {
  const float inf = std::numeric_limits<float>::infinity();
  const auto refuses = [](auto& w, const auto& p, const auto&... more) {
    const auto before = w.clone();
    CHECK_THROWS_AS(lora::merge(mlkit::cpu{}, w, p, more...), mlkit::value_error);
    CHECK(std::memcmp(w.data(), before.data(), sizeof(*w.data()) * static_cast<std::size_t>(w.size())) == 0);
  };
  for (const float bad : {inf, -inf, std::nanf("")})
    for (const int where : {0, 1, 2}) {
      auto p = random_adapter<float>(70, 40, 3, 3, 3);
      auto w = normal<float>(40, 70, 1);
      (where == 0 ? p.a.data()[99] : where == 1 ? p.b.data()[50] : w.data()[2000]) = bad;
      refuses(w, p);
      const auto before = w.clone();
      CHECK_THROWS_AS(lora::merge(mlkit::cpu{}, transposed(w),
                                  lora::adapter<float>{normal<float>(2, 40, 1), normal<float>(70, 2, 1)},
                                  {.weight = where == 2 ? 1 : std::numeric_limits<double>::infinity()}),
                      mlkit::value_error);
    }
  auto p = random_adapter<float>(70, 40, 3, 3, 3);
  auto w = normal<f16>(40, 70, 1);
  w.data()[77] = f16(60000.0f);
  p.alpha = 1e6;
  refuses(w, p);
  // A bound that is not met does not refuse what is finite.
  p.alpha = 1;
  w.data()[77] = f16(65504.0f);
  p.a(0, 7) = p.a(1, 7) = p.a(2, 7) = 0;
  lora::merge(mlkit::cpu{}, w, p);
  CHECK(static_cast<float>(w.data()[77]) == 65504.0f);
}

TEST_CASE("merge has the same bits for any number of threads", "[lora][merge]") {
  const auto p = random_adapter<float>(300, 200, 8, 3, 3);
  const auto start = normal<float>(200, 300, 1);
  auto w1 = start.clone();
  lora::merge(mlkit::cpu{.threads = 1}, w1, p);
  for (const int threads : {2, 3, 7}) {
    auto w = start.clone();
    lora::merge(mlkit::cpu{.threads = threads}, w, p);
    CHECK(std::memcmp(w.data(), w1.data(), sizeof(float) * 60000) == 0);
  }
}

TEST_CASE("PEFT's merged weights", "[lora][merge]") {
  for (const char* kind : {"lora", "rslora", "dora", "rsdora"}) {
    const auto file = mlkit::io::safetensors::open(test_data(std::string("peft_linear_") + kind + ".safetensors"));
    auto w = file.tensor<float, 2>("w");
    const lora::adapter_view<float> adapter{file.view<float, 2>("a"), file.view<float, 2>("b"),
                                            file.at("scale").scalar()};
    if (file.find("m"))
      lora::merge(mlkit::cpu{}, w, lora::dora{adapter, file.view<float, 1>("m")});
    else
      lora::merge(mlkit::cpu{}, w, adapter);
    CHECK(difference(w, from(file.view<double, 2>("merged"))) < 1e-6);
  }
  const auto file = mlkit::io::safetensors::open(test_data("peft_batch.safetensors"));
  std::vector<lora::adapter_view<float>> adapters;
  const auto scales = file.view<double, 1>("scales");
  const auto weights = file.view<float, 1>("weights");
  std::vector<float> factors;
  for (int i = 0; i < 3; ++i) {
    adapters.push_back(
        {file.view<float, 2>("a" + std::to_string(i)), file.view<float, 2>("b" + std::to_string(i)), scales(i)});
    factors.push_back(weights(i));
  }
  auto w = file.tensor<float, 2>("w");
  lora::merge(mlkit::cpu{}, w, adapters, factors);
  CHECK(difference(w, from(file.view<double, 2>("weighted"))) < 1e-6);
  w = file.tensor<float, 2>("w");
  lora::merge(mlkit::cpu{}, w, adapters, std::vector<float>{1, 1, 1});
  CHECK(difference(w, from(file.view<double, 2>("merged"))) < 1e-6);
}
