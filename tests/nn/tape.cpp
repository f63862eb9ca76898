// What the tape promises: frozen weights cost nothing, threads change no bit, misuse is refused by name.
#include <mlkit/nn.hpp>

#include <catch2/catch.hpp>
#include <functional>

namespace nn = mlkit::nn;
using Catch::Matchers::Contains;
using mlkit::index_t;

namespace {

// A residual network of one block, adapted or not.
template <class T>
struct network {
  nn::parameters<T> base{5}, adapters{6};
  nn::linear_layer<T> in, out;
  nn::layer_norm_layer<T> norm;

  network(index_t columns, index_t width)
      : in(nn::scope<T>(base) / "in", columns, width),
        out(nn::scope<T>(base) / "out", width, columns),
        norm(nn::scope<T>(base) / "norm", columns) {}
  nn::var<T> operator()(nn::var<T> x) const { return x + out(nn::activate(in(norm(x)), mlkit::silu{})); }
};

template <class T>
mlkit::matrix<T> noise(index_t rows, index_t columns, std::uint64_t stream) {
  mlkit::matrix<T> x({rows, columns});
  for (index_t i = 0; i < x.size(); ++i)
    x.data()[i] = mlkit::random_stream{9, stream}.normal(static_cast<std::uint64_t>(i));
  return x;
}

std::vector<float> train(int threads, bool dora) {
  network<float> net(96, 160);
  net.base.freeze();
  net.in.adapt(net.adapters, {.rank = 3, .alpha = 6, .dora = dora});
  net.out.adapt(net.adapters, {.rank = 3, .alpha = 6, .dora = dora});
  for (float& v : net.adapters.at("in.lora_B.weight").value) v = 0.01f;  // so that every factor has a gradient at once
  nn::adamw<float> optimizer(nn::trainable(net.base, net.adapters), {.rate = 1e-2});
  const mlkit::cpu exec{.threads = threads};
  nn::tape<float> t(exec);
  std::vector<float> losses;
  for (int step = 0; step < 3; ++step) {
    t.clear();
    const auto y = net(t.constant(noise<float>(200, 96, 1)));
    const auto loss = nn::mse(y, t.constant(noise<float>(200, 96, 2)));
    t.backward(loss);
    optimizer.step(exec);
    losses.push_back(loss.item());
  }
  for (const auto& p : net.adapters) losses.insert(losses.end(), p.value.begin(), p.value.end());
  return losses;
}

}  // namespace

TEST_CASE("a frozen base passes gradients through and gets none", "[nn]") {
  network<double> net(6, 8);
  net.base.freeze();
  net.in.adapt(net.adapters, {.rank = 2, .alpha = 4});
  net.out.adapt(net.adapters, {.rank = 2, .alpha = 4, .dora = true});
  nn::tape<double> t;
  const auto x = t.input(noise<double>(5, 6, 1));
  t.backward(nn::mse(net(x), t.constant(noise<double>(5, 6, 2))));
  for (const auto& p : net.base) {
    INFO(p.name);
    CHECK(p.grad.size() == 0);
    CHECK_FALSE(p.has_grad);
  }
  CHECK(x.has_grad());
  for (const auto& p : net.adapters) {
    INFO(p.name);
    CHECK(p.has_grad);
  }
  // Up starts at zero, so the first gradient of down is zero and that of up is not.
  const auto largest = [&](const std::string& name) {
    double high = 0;
    for (const double g : net.adapters.at(name).grad) high = std::max(high, std::abs(g));
    return high;
  };
  CHECK(largest("in.lora_A.weight") == 0);
  CHECK(largest("in.lora_B.weight") > 0);
  CHECK(nn::trainable(net.base, net.adapters).size() == 5);
}

TEST_CASE("a new adapter changes no output, and strength 0 is the base to the bit", "[nn]") {
  network<float> net(24, 40);
  const auto x = noise<float>(17, 24, 1);
  const auto run = [&] {
    nn::tape<float> t(mlkit::cpu{}, {.record = false});
    const auto y = net(t.constant(x));
    return std::vector<float>(y.data(), y.data() + y.size());
  };
  const auto base = run();
  for (const bool dora : {false, true}) {
    nn::parameters<float> adapters(3);
    net.in.adapt(adapters, {.rank = 4, .alpha = 8, .dora = dora});
    const auto fresh = run();
    for (std::size_t i = 0; i < base.size(); ++i) CHECK(fresh[i] == Approx(base[i]).margin(dora ? 1e-5 : 0));
    for (float& v : adapters.at("in.lora_B.weight").value) v = 0.3f;
    CHECK(run() != base);
    net.in.set_strength(0);
    CHECK(run() == base);
    net.in.set_strength(1);
    net.in.remove_adapter();
    CHECK(run() == base);
  }
}

TEST_CASE("adapters go to the layers that are named, or to all", "[nn]") {
  struct model {
    nn::parameters<float> store{5};
    nn::scope<float> at{store};
    std::vector<nn::linear_layer<float>> layers;
    model() {
      for (const char* path : {"a.to_q", "a.to_out.0", "b.to_q", "b.into_q", "b.to_q.late", "0"})
        layers.emplace_back(at / path, 3, 2);
    }
    void each_linear(const std::function<void(nn::linear_layer<float>&)>& f) {
      for (auto& layer : layers) f(layer);
    }
    std::string adapted() const {
      std::string which;
      for (const auto& layer : layers) which += layer.adapted() ? '1' : '0';
      return which;
    }
  };
  const auto of = [](const std::vector<std::string>& targets) {
    model m;
    nn::parameters<float> adapters;
    nn::adapt(m, adapters, {.rank = 1}, targets);
    return m.adapted();
  };
  CHECK(of({}) == "111111");
  CHECK(of({"to_q"}) == "101000");
  CHECK(of({"to_q", "to_out.0"}) == "111000");
  CHECK(of({"a.to_q"}) == "100000");
  CHECK(of({"0"}) == "010001");
  model m;
  nn::parameters<float> adapters;
  CHECK_THROWS_WITH(nn::adapt(m, adapters, {}, {"to_q", "to_k"}), Contains("no linear layer to_k"));
  CHECK_THROWS_WITH(nn::adapt(m, adapters, {}, {"q"}), Contains("no linear layer q"));
  CHECK(m.adapted() == "000000");
}

TEST_CASE("training gives the same bits for any number of threads", "[nn]") {
  for (const bool dora : {false, true}) {
    const auto one = train(1, dora);
    CHECK(train(2, dora) == one);
    CHECK(train(5, dora) == one);
    CHECK(one[2] < one[0]);
  }
}

TEST_CASE("images and tokens have the same bits for any number of threads", "[nn]") {
  const auto run = [](int threads) {
    nn::parameters<float> store(2);
    auto& image = store.add("image", {4, 24, 12, 11}, nn::normal{1});
    auto& style = store.add("style", {4, 24}, nn::normal{1});
    auto& position = store.add("position", {1, 24, 12, 11}, nn::normal{1});
    auto& bias = store.add("bias", {1, 24, 1, 1}, nn::normal{1});
    auto& row = store.add("row", {24}, nn::normal{1});
    nn::tape<float> t(mlkit::cpu{.threads = threads});
    const auto h = nn::group_norm(t.use(image) * t.use(style) + t.use(position) * t.use(bias), 3, t.use(row));
    const auto tokens = nn::transpose(nn::reshape(nn::concat<float>({h, nn::slice(h, 3, 7, 1)}, 1), {4, 31, 132}));
    const auto y = nn::slice(tokens, 0, 24) + t.use(row);
    t.backward(nn::sum(y * y));
    std::vector<float> values(y.data(), y.data() + y.size());
    for (const auto& p : store) values.insert(values.end(), p.grad.begin(), p.grad.end());
    return values;
  };
  const auto one = run(1);
  CHECK(run(2) == one);
  CHECK(run(5) == one);
}

TEST_CASE("parameters start from the seed and their own name", "[nn]") {
  nn::parameters<float> a(1), b(1), c(2);
  a.add("first", {8}, nn::normal{1});
  auto& x = a.add("w", {8}, nn::normal{1});
  auto& y = b.add("w", {8}, nn::normal{1});
  auto& z = c.add("w", {8}, nn::normal{1});
  CHECK(std::equal(x.value.begin(), x.value.end(), y.value.begin()));
  CHECK_FALSE(std::equal(x.value.begin(), x.value.end(), z.value.begin()));
  CHECK_FALSE(std::equal(x.value.begin(), x.value.end(), a.at("first").value.begin()));
  CHECK_THROWS_WITH(a.add("w", {1}, nn::zeros{}), Contains("the name w is taken"));
  CHECK_THROWS_WITH(a.at("v"), Contains("no parameter is named v"));
  CHECK_THROWS_AS(a.copy_values(b), mlkit::shape_error);
}

TEST_CASE("gradients add up over passes until the optimizer takes them", "[nn]") {
  nn::parameters<double> store;
  auto& w = store.add("w", {3}, nn::ones{});
  auto& unused = store.add("unused", {3}, nn::ones{});
  nn::adamw<double> optimizer(nn::trainable(store));
  nn::tape<double> t;
  for (int pass = 1; pass <= 2; ++pass) {
    t.clear();
    const auto v = t.use(w);
    t.backward(nn::sum(v * v + t.use(w)));  // used three times: d = 2 w + 1
    CHECK(w.grad(0) == 3.0 * pass);
  }
  optimizer.step({});
  CHECK(w.value(0) < 1);
  CHECK(unused.value(0) == 1);
  const double after = w.value(0);
  optimizer.step({});  // nothing has arrived since
  CHECK(w.value(0) == after);
  t.clear();
  t.backward(nn::sum(t.use(w)));
  CHECK(w.grad(0) == 1.0);
}

TEST_CASE("a tape reuses its memory", "[nn]") {
  nn::tape<float> t;
  const float* first = nullptr;
  for (int step = 0; step < 3; ++step) {
    t.clear();
    const auto x = t.constant(noise<float>(300, 400, 1));
    if (!first) first = x.data();
    CHECK(x.data() == first);
    CHECK(reinterpret_cast<std::uintptr_t>(x.data()) % 64 == 0);
  }
}

TEST_CASE("misuse of the tape is refused by name", "[nn]") {
  nn::parameters<float> store;
  auto& w = store.add("w", {4, 3}, nn::ones{});
  nn::tape<float> t, other;
  const auto x = t.constant(noise<float>(2, 3, 1));
  CHECK_THROWS_WITH(nn::linear(x, t.constant(noise<float>(4, 5, 1))), Contains("x has 3 columns, but w has 5"));
  CHECK_THROWS_WITH(nn::linear(x, other.use(w)), Contains("different tapes"));
  CHECK_THROWS_WITH(x + t.constant(noise<float>(2, 4, 1)), Contains("[2, 3]") && Contains("[2, 4]"));
  CHECK_THROWS_WITH(nn::mse(x, t.use(w)), Contains("[2, 3]") && Contains("[4, 3]"));
  CHECK_THROWS_WITH(nn::slice(x, 2, 2), Contains("x has 3"));
  CHECK_THROWS_WITH(nn::reshape(x, {5}), Contains("[5]"));
  CHECK_THROWS_AS(nn::shape({1, 2, 3, 4, 5}), mlkit::shape_error);
  const std::vector<std::int32_t> wrong{0, 4}, ignored{nn::ignore_label, nn::ignore_label};
  CHECK_THROWS_WITH(nn::embedding<float>(t.use(w), wrong), Contains("id 4") && Contains("4 rows"));
  CHECK_THROWS_WITH(nn::cross_entropy<float>(x, wrong), Contains("label 4") && Contains("3 classes"));
  CHECK_THROWS_WITH(nn::cross_entropy<float>(x, ignored), Contains("no row has a label"));
  CHECK_THROWS_WITH(t.backward(x), Contains("[2, 3]"));
  CHECK_THROWS_WITH(t.backward(nn::sum(x)), Contains("nothing that is trainable"));
  const auto loss = nn::sum(nn::linear(x, t.use(w)));
  t.backward(loss);
  CHECK_THROWS_WITH(t.backward(loss), Contains("has run already"));
  t.clear();
  CHECK_THROWS_WITH(x.data(), Contains("cleared"));
  CHECK_THROWS_WITH(nn::adamw<float>({}, {.beta1 = 1.0}), Contains("beta1 = 1"));
}

TEST_CASE("misuse of shapes is refused by name", "[nn]") {
  nn::tape<float> t;
  const auto image = t.constant(mlkit::tensor<float, 4>({2, 6, 4, 3})), x = t.constant(noise<float>(2, 3, 1));
  const auto of = [&](const nn::shape& s) { return nn::reshape(t.constant(std::vector<float>(s.size())), s); };
  for (const nn::shape& s : {nn::shape{6}, {3, 6}, {2, 6, 3}, {2, 6, 4, 2}, {1, 6}, {2, 5, 1, 1}}) {
    CHECK_THROWS_WITH(image + of(s),
                      Contains("nn::add: the first operand has shape [2, 6, 4, 3]") && Contains(s.text()));
    CHECK_THROWS_WITH(image * of(s), Contains("nn::multiply") && Contains(s.text()));
  }
  CHECK_THROWS_AS(x + image, mlkit::shape_error);

  CHECK_THROWS_WITH(nn::group_norm(image, 4), Contains("nn::group_norm: 4 groups do not divide the 6 channels of x"));
  CHECK_THROWS_WITH(nn::group_norm(image, 0), Contains("groups = 0 is not positive"));
  CHECK_THROWS_WITH(nn::group_norm(image, 2, of({5})), Contains("gain has 5 elements, but x has 6"));
  CHECK_THROWS_WITH(nn::group_norm(image, 2, {}, of({7})), Contains("bias has 7 elements, but x has 6"));
  CHECK_THROWS_WITH(nn::group_norm<float>(image, 2, {}, {}, -1), Contains("epsilon = -1"));
  CHECK_THROWS_WITH(nn::group_norm(of({6}), 2), Contains("[6]") && Contains("[n, channels, ...]"));
  CHECK_THROWS_WITH(nn::group_norm(of({2, 6, 0}), 2), Contains("[2, 6, 0]"));

  CHECK_THROWS_WITH(nn::permute(image, {0, 1, 2}), Contains("order has 3 dimensions, but x has shape [2, 6, 4, 3]"));
  CHECK_THROWS_WITH(nn::permute(image, {0, 1, 2, 4}), Contains("order names dimension 4, but"));
  CHECK_THROWS_WITH(nn::permute(image, {0, 1, 2, -1}), Contains("order names dimension -1, but"));
  CHECK_THROWS_WITH(nn::permute(image, {0, 1, 2, 1}), Contains("order names dimension 1 twice"));
  CHECK_THROWS_WITH(nn::transpose(of({6})), Contains("[6]"));
  CHECK_THROWS_WITH(nn::concat<float>({image, image}, 4), Contains("nn::concat: dimension = 4 is none of the 4"));
  CHECK_THROWS_WITH(nn::concat<float>({image, image}, -5), Contains("dimension = -5"));
  CHECK_THROWS_WITH(nn::concat<float>({image, of({2, 6, 4, 2})}, 1), Contains("a part has shape [2, 6, 4, 2]"));
  CHECK_THROWS_WITH(nn::concat<float>({image, of({2, 6, 12})}, 1), Contains("a part has shape [2, 6, 12]"));
  CHECK_THROWS_WITH(nn::slice(image, 2, 5, 1), Contains("5 elements from 2 on are asked for, but x has 6"));
  CHECK_THROWS_WITH(nn::slice(image, 0, 1, 4), Contains("nn::slice: dimension = 4"));

  const std::vector<std::int32_t> ids{0, 1, -1};
  CHECK_THROWS_WITH(nn::embedding<float>(x, ids), Contains("nn::embedding: id -1 at place 2 is outside"));
  CHECK_THROWS_WITH(nn::embedding<float>(x, ids, {2, 2}), Contains("there are 3 ids, which do not fill [2, 2]"));
  const std::vector<std::int32_t> one{0};
  CHECK_THROWS_AS(nn::embedding<float>(x, one, {1, 1, 1, 1}), mlkit::shape_error);
}

TEST_CASE("nothing is made of nothing", "[nn]") {
  nn::tape<float> t;
  const auto none = t.input(mlkit::matrix<float>({0, 3})), row = t.input(std::vector<float>(3));
  const auto y = nn::concat<float>({none + row, none * row}, 0);
  CHECK(y.shape() == nn::shape{0, 3});
  CHECK(nn::permute(y, {1, 0}).shape() == nn::shape{3, 0});
  t.backward(nn::sum(nn::group_norm(y, 3)));
  for (index_t i = 0; i < 3; ++i) CHECK(row.grad()(0, i) == 0);
}

TEST_CASE("a loss of another tape, and extents that wrap, are refused", "[nn]") {
  const mlkit::matrix<double> x({2, 4});
  nn::tape<double> one, other;
  const auto here = nn::sum(one.input(x)), there = nn::sum(other.input(x));
  CHECK_THROWS_WITH(one.backward(there), Contains("nn::tape::backward: loss is on another tape"));
  one.backward(here);  // the refusal was no run

  constexpr index_t most = INT64_MAX;
  const auto v = other.input(x);
  CHECK_THROWS_WITH(nn::slice(v, 2, most),
                    Contains("9223372036854775807 columns from 2 on are asked for, but x has 4"));
  CHECK_THROWS_WITH(nn::slice(v, most, 2), Contains("2 columns from 9223372036854775807 on"));
  CHECK_THROWS_WITH((nn::shape{index_t{1} << 32, index_t{1} << 32}),
                    "mlkit::shape_error: nn::shape: [4294967296, 4294967296] is too large");
  CHECK_THROWS_AS((nn::shape{0, most, most}), mlkit::shape_error);
}

TEST_CASE("AdamW refuses what it cannot step with, and changes nothing", "[nn]") {
  nn::parameters<float> store;
  auto& w = store.add("w", {4}, nn::ones{});
  const float bad[] = {-1, NAN, INFINITY};
  for (const double v : bad) {
    CHECK_THROWS_WITH(nn::adamw<float>({&w}, {.rate = v}), Contains("nn::adamw: rate = "));
    CHECK_THROWS_WITH(nn::adamw<float>({&w}, {.beta2 = v}), Contains("one is outside its range"));
    CHECK_THROWS_WITH(nn::adamw<float>({&w}, {.epsilon = v}), Contains("one is outside its range"));
    CHECK_THROWS_WITH(nn::adamw<float>({&w}, {.decay = v}), Contains("one is outside its range"));
  }
  CHECK_THROWS_WITH((nn::adamw<float>({&w, nullptr})), "mlkit::value_error: nn::adamw: parameter 1 is null");
  nn::adamw<float> optimizer({&w}, {.rate = 0.5});
  CHECK_THROWS_WITH(optimizer.set_rate(std::nan("")), Contains("nn::adamw::set_rate: rate = nan"));
  CHECK(optimizer.options().rate == 0.5);

  mlkit::vector<float> p({4}), g({4}), m({4}), v({4}), wide({8});
  for (auto* t : {&p, &m, &v}) std::fill(t->begin(), t->end(), 7.0f);
  const auto update = [&](mlkit::vector_view<float> to, mlkit::vector_view<float> from, mlkit::vector_view<float> first,
                          mlkit::vector_view<float> second, index_t step = 1,
                          nn::adamw_options o = {}) { nn::adamw_update<float>({}, o, step, to, from, first, second); };
  const mlkit::vector_view<float> none(nullptr, {4}), spread(wide.data(), {4}, {2});
  const std::string name = "nn::adamw_update: ";
  CHECK_THROWS_WITH(update(p, g, m, v, 0), Contains(name + "step = 0, but steps count from 1"));
  CHECK_THROWS_WITH(update(p, g, m, v, 1, {.beta1 = 1}), Contains(name + "rate"));
  CHECK_THROWS_WITH(update(p, wide, m, v), Contains(name + "gradient has 8 elements, but p has 4"));
  CHECK_THROWS_WITH(update(p, none, m, v), Contains(name + "gradient is null"));
  CHECK_THROWS_WITH(update(spread, g, m, v), Contains(name + "p has stride 2"));
  CHECK_THROWS_WITH(update(p, g, m, spread), Contains(name + "v has stride 2"));
  CHECK_THROWS_WITH(update(p, p, m, v), Contains(name + "p [4] overlaps gradient [4]"));
  CHECK_THROWS_WITH(update(p, g, p, v), Contains(name + "m [4] overlaps p [4]"));
  CHECK_THROWS_WITH(update(p, g, m, m), Contains(name + "v [4] overlaps m [4]"));
  CHECK_THROWS_WITH(update(p, g, m, g), Contains(name + "v [4] overlaps gradient [4]"));
  for (const auto* t : {&p, &m, &v}) CHECK(std::all_of(t->begin(), t->end(), [](float x) { return x == 7; }));
}

TEST_CASE("numbers of threads that cannot be are refused when a tape is made", "[nn]") {
  CHECK_THROWS_WITH(nn::tape<float>(mlkit::cpu{.threads = -1}), "mlkit::value_error: cpu: threads = -1 is negative");
  CHECK_THROWS_AS((nn::tape<float>(mlkit::cpu{.threads = 100'000}, {.record = false})), mlkit::value_error);
}
