// Parameters and adapters through files, and merging them into their layers.
#include <mlkit/nn.hpp>
#include <mlkit/nn/files.hpp>

#include "../temporary_directory.hpp"

#include <catch2/catch.hpp>

namespace nn = mlkit::nn;
using Catch::Matchers::Contains;
using mlkit::index_t;

namespace {

struct pair_of_layers {
  nn::parameters<double> store{5};
  nn::linear_layer<double> first, second;

  pair_of_layers()
      : first(nn::scope<double>(store) / "first", 6, 9), second(nn::scope<double>(store) / "second", 9, 4) {}
  nn::var<double> operator()(nn::var<double> x) const { return second(nn::activate(first(x), mlkit::tanh{})); }
  template <class F>
  void each_linear(F&& f) {
    f(first), f(second);
  }
  std::vector<double> outputs() const {
    mlkit::matrix<double> x({5, 6});
    for (index_t i = 0; i < x.size(); ++i)
      x.data()[i] = mlkit::random_stream{1, 1}.normal(static_cast<std::uint64_t>(i));
    nn::tape<double> t(mlkit::cpu{}, {.record = false});
    const auto y = (*this)(t.constant(x));
    return {y.data(), y.data() + y.size()};
  }
};

struct one_layer {
  nn::parameters<double> store;
  nn::linear_layer<double> only;
  explicit one_layer(index_t inputs) : only(nn::scope<double>(store) / "first", inputs, 9) {}
  template <class F>
  void each_linear(F&& f) {
    f(only);
  }
};

void stir(nn::parameters<double>& store) {
  std::uint64_t i = 0;
  for (auto& p : store)
    for (double& v : p.value) v += 0.2 * static_cast<double>(mlkit::random_stream{2, 3}.normal(i++));
}

}  // namespace

TEST_CASE("parameters come back from a file as they were", "[nn]") {
  const temporary_directory at;
  pair_of_layers a, b;
  stir(a.store);
  nn::save(at / "model.safetensors", a.store);
  CHECK(a.outputs() != b.outputs());
  nn::load(at / "model.safetensors", b.store);
  CHECK(a.outputs() == b.outputs());
  const auto file = mlkit::io::safetensors::open(at / "model.safetensors");
  CHECK(file.at("first.weight").shape == std::vector<index_t>{9, 6});

  nn::parameters<double> other;
  other.add("first.weight", {9, 6}, nn::zeros{});
  CHECK_THROWS_WITH(nn::load(at / "model.safetensors", other), Contains("4 tensors") && Contains("1 parameters"));
  for (const char* name : {"first.bias", "second.bias"}) other.add(name, {9}, nn::zeros{});
  other.add("second.weight", {4, 9}, nn::zeros{});
  CHECK_THROWS_WITH(nn::load(at / "model.safetensors", other),
                    Contains("second.bias") && Contains("[4]") && Contains("[9]"));
  CHECK(other.at("first.weight").value(0) == 0);  // nothing was loaded by half
}

TEST_CASE("adapters come back from a file, and merge without changing what is computed", "[nn]") {
  const temporary_directory at;
  for (const bool dora : {false, true})
    for (const bool rs : {false, true}) {
      INFO("dora " << dora << ", rs " << rs);
      pair_of_layers a, b;
      nn::parameters<double> mine(1), theirs(2);
      nn::adapt(a, mine, {.rank = 3, .alpha = 5, .rs = rs, .dora = dora});
      stir(mine);
      nn::save_adapters<double>(at / "adapter", a);
      nn::load_adapters(at / "adapter", b, theirs);
      const auto before = a.outputs();
      CHECK(b.outputs() == before);
      CHECK(before != pair_of_layers().outputs());

      b.each_linear([](auto& layer) { layer.merge({}); });
      CHECK(b.first.adapted() == nullptr);
      const auto merged = b.outputs();
      for (std::size_t i = 0; i < merged.size(); ++i) CHECK(merged[i] == Approx(before[i]).epsilon(1e-12));
      if (dora) continue;
      a.each_linear([](auto& layer) { layer.set_strength(0.4); });
      const auto weaker = a.outputs();
      a.each_linear([](auto& layer) { layer.merge({}); });
      for (std::size_t i = 0; i < weaker.size(); ++i) CHECK(a.outputs()[i] == Approx(weaker[i]).epsilon(1e-12));
    }
}

TEST_CASE("adapters for layers that are not there are refused", "[nn]") {
  const temporary_directory at;
  pair_of_layers a;
  nn::parameters<double> mine(1), theirs(2);
  CHECK_THROWS_AS(nn::save_adapters<double>(at / "adapter", a), mlkit::value_error);
  nn::adapt(a, mine, {.rank = 3, .alpha = 5});
  nn::save_adapters<double>(at / "adapter", a);
  one_layer smaller(6), wider(7);
  CHECK_THROWS_WITH(nn::load_adapters(at / "adapter", smaller, theirs), Contains("no linear layer second"));
  nn::parameters<double> none(2);
  CHECK_THROWS_WITH(nn::load_adapters(at / "adapter", wider, none),
                    Contains("first") && Contains("[9, 6]") && Contains("[9, 7]"));
}
