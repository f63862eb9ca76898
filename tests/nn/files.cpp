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

  nn::parameters<double> two;
  two.add("a", {2}, nn::zeros{});
  two.add("b", {3}, nn::zeros{});
  const std::vector<double> values{1, 2}, three{1, 2, 3};
  auto b_tensor = mlkit::io::named("b", three);
  b_tensor.dtype = mlkit::io::dtype::i64;
  mlkit::io::write_safetensors(at / "numbers", {mlkit::io::named("a", values), b_tensor});
  CHECK_THROWS_WITH(nn::load(at / "numbers", two), Contains("tensor \"b\" has dtype I64"));
  b_tensor.dtype = mlkit::io::dtype::f64;
  b_tensor.shape = {1, 1, 1, 1, 3};
  mlkit::io::write_safetensors(at / "numbers", {mlkit::io::named("a", values), b_tensor});
  CHECK_THROWS_AS(nn::load(at / "numbers", two), mlkit::io_error);
  CHECK_THROWS_WITH(nn::load(at / "numbers", two), Contains("has shape [1, 1, 1, 1, 3], but the model has [3]"));
  CHECK(two.at("a").value(1) == 0);
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

  // Nothing is adapted by half: neither a layer nor the store.
  CHECK(smaller.only.adapted() == nullptr);
  CHECK(theirs.count() == 0);
  pair_of_layers b;
  nn::parameters<double> taken(2);
  taken.add("second.lora_A.weight", {3, 9}, nn::zeros{});
  CHECK_THROWS_WITH(nn::load_adapters(at / "adapter", b, taken), Contains("second.lora_A.weight already"));
  CHECK(b.first.adapted() == nullptr);
  CHECK(taken.count() == 1);

  // A convolution's adapter, though its first two extents fit.
  const mlkit::matrix<double> down({3, 6 * 9}), up({9, 3});
  mlkit::io::adapter_entry e;
  e.module = "first";
  e.kind = mlkit::io::adapter_kind::convolution;
  e.a = mlkit::io::named("a", down);
  e.b = mlkit::io::named("b", up);
  e.a.shape = {3, 6, 3, 3};
  e.b.shape = {9, 3, 1, 1};
  mlkit::io::write_adapters(at / "convolution", {e});
  CHECK_THROWS_WITH(nn::load_adapters(at / "convolution", b, theirs), Contains("is for a convolution"));
  CHECK(b.first.adapted() == nullptr);
  CHECK(theirs.count() == 0);
}
