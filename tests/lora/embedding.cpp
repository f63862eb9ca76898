#include <catch2/catch.hpp>
#include <mlkit/io/safetensors.hpp>
#include <mlkit/lora.hpp>
#include <string>

#include "reference.hpp"
#include "test_data.hpp"

namespace lora = mlkit::lora;
using mlkit::index_t;
using namespace reference;

TEST_CASE("PEFT's embeddings, forward and backward", "[lora][embedding]") {
  for (const char* kind : {"lora", "dora"}) {
    const auto file = mlkit::io::safetensors::open(test_data(std::string("peft_embedding_") + kind + ".safetensors"));
    const auto ids = file.at("x").elements<std::int64_t>();
    const auto w = file.view<float, 2>("w"), dy = file.view<float, 2>("dy");
    const lora::adapter_view<float> adapter{file.view<float, 2>("a"), file.view<float, 2>("b"),
                                            file.at("scale").scalar()};
    mlkit::matrix<float> y({7, 12}), da({3, 30}), db({12, 3});
    mlkit::vector<float> dm({12});
    auto merged = file.tensor<float, 2>("w");
    if (file.find("m")) {
      const lora::dora dora{adapter, file.view<float, 1>("m")};
      lora::embedding(mlkit::cpu{}, ids, w, dora, y);
      lora::embedding_backward(mlkit::cpu{}, ids, w, dora, dy, lora::gradients{da, db, dm});
      const auto want = file.view<double, 1>("dm");
      for (index_t i = 0; i < 12; ++i) CHECK(dm(i) == Approx(want(i)).epsilon(1e-5).margin(1e-6));
      lora::merge(mlkit::cpu{}, transposed(merged), dora);
    } else {
      lora::embedding(mlkit::cpu{}, ids, w, adapter, y);
      lora::embedding_backward(mlkit::cpu{}, ids, w, adapter, dy, lora::gradients{da, db});
      lora::merge(mlkit::cpu{}, transposed(merged), adapter);
    }
    CHECK(difference(y, from(file.view<double, 2>("y"))) < 1e-6);
    CHECK(difference(da, from(file.view<double, 2>("da"))) < 1e-6);
    CHECK(difference(db, from(file.view<double, 2>("db"))) < 1e-6);
    CHECK(difference(merged, from(file.view<double, 2>("merged"))) < 1e-6);
  }
}

TEST_CASE("an embedding's gradients agree with central differences in f64", "[lora][embedding]") {
  const std::vector<int> ids{3, 0, 3, 5, 3};
  const auto w = normal<double>(6, 4, 1), dy = normal<double>(5, 4, 2);
  auto a = normal<double>(2, 6, 3), b = normal<double>(4, 2, 4);
  const lora::adapter_view<double> p{a, b, 0.5};
  mlkit::matrix<double> y({5, 4}), da({2, 6}), db({4, 2});
  lora::embedding_backward(mlkit::cpu{}, ids, w, p, dy, lora::gradients{da, db});
  const auto loss = [&] {
    lora::embedding(mlkit::cpu{}, ids, w, p, y);
    double sum = 0;
    for (index_t i = 0; i < y.size(); ++i) sum += y.data()[i] * dy.data()[i];
    return sum;
  };
  const auto check = [&](mlkit::matrix<double>& parameter, const mlkit::matrix<double>& gradient) {
    for (index_t i = 0; i < parameter.size(); ++i) {
      const double start = parameter.data()[i];
      parameter.data()[i] = start + 1e-5;
      const double up = loss();
      parameter.data()[i] = start - 1e-5;
      const double down = loss();
      parameter.data()[i] = start;
      CHECK(gradient.data()[i] == Approx((up - down) / 2e-5).epsilon(1e-7).margin(1e-8));
    }
  };
  check(a, da);
  check(b, db);
}

TEST_CASE("an id outside of the vocabulary is named, and nothing written", "[lora][embedding]") {
  const auto w = normal<float>(6, 4, 1);
  const lora::adapter<float> p{normal<float>(2, 6, 3), normal<float>(4, 2, 4)};
  mlkit::matrix<float> y({3, 4});
  for (auto& v : y) v = 7;
  for (const int bad : {-1, 6})
    CHECK_THROWS_WITH(lora::embedding(mlkit::cpu{}, std::vector<int>{1, bad, 2}, w, p, y),
                      "mlkit::value_error: lora::embedding: ids[1] = " + std::to_string(bad) + " is outside [0, 6)");
  for (const float v : y) CHECK(v == 7);
}
