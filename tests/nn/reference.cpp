// Values and gradients against PyTorch's, and AdamW's steps.
#include <mlkit/nn.hpp>

#include <catch2/catch.hpp>

#include "fixtures.hpp"

namespace nn = mlkit::nn;
using mlkit::index_t;

namespace {

template <class T>
double largest_difference(const T* have, const std::vector<double>& want, double scale = 1) {
  double high = 0;
  for (std::size_t i = 0; i < want.size(); ++i)
    high = std::max(high, std::abs(static_cast<double>(have[i]) - want[i]) / std::max(scale, std::abs(want[i])));
  return high;
}

// f's value and its inputs' gradients, for the gradient dy of the value, against the fixture of that name.
template <class T, class F>
void check(const std::string& name, std::vector<std::pair<std::string, nn::shape>> inputs, F f, double tolerance,
           const std::string& gradient = "dy") {
  INFO(name << " in " << mlkit::dtype_name<T>());
  nn::tape<T> t;
  std::vector<nn::var<T>> x;
  for (const auto& [source, shape] : inputs) x.push_back(nn::reshape(t.input(fixture(source)), shape));
  const nn::var<T> y = f(x);
  CHECK(largest_difference(y.data(), fixture(name)) < tolerance);
  std::vector<double> dy = fixture(gradient);
  dy.resize(static_cast<std::size_t>(y.size()));
  t.backward(y.size() == 1 ? y : nn::sum(nn::multiply(y, nn::reshape(t.constant(dy), y.shape()))));
  for (std::size_t i = 0; i < x.size(); ++i)
    CHECK(largest_difference(x[i].grad_data(), fixture(name + ".d" + std::to_string(i))) < tolerance);
}

template <class T>
void check_all(double tolerance) {
  using vars = std::vector<nn::var<T>>&;
  const nn::shape matrix{5, 9}, row{9};
  check<T>(
      "layer_norm", {{"x", matrix}, {"gain", row}, {"bias", row}},
      [](vars v) { return nn::layer_norm(v[0], v[1], v[2]); }, tolerance);
  check<T>(
      "rms_norm", {{"x", matrix}, {"gain", row}}, [](vars v) { return nn::rms_norm(v[0], v[1]); }, tolerance);
  check<T>(
      "silu", {{"x", matrix}}, [](vars v) { return nn::activate(v[0], mlkit::silu{}); }, tolerance);
  check<T>(
      "gelu", {{"x", matrix}}, [](vars v) { return nn::activate(v[0], mlkit::gelu{}); }, tolerance);
  check<T>(
      "tanh", {{"x", matrix}}, [](vars v) { return nn::activate(v[0], mlkit::tanh{}); }, tolerance);
  check<T>(
      "mse", {{"x", matrix}, {"dy", matrix}}, [](vars v) { return nn::mse(v[0], v[1]); }, tolerance);
  const std::vector<std::int32_t> labels{3, nn::ignore_label, 0, 8, 3};
  check<T>(
      "cross_entropy", {{"x", matrix}}, [&](vars v) { return nn::cross_entropy<T>(v[0], labels); }, tolerance);
}

template <class T>
void check_images(double tolerance) {
  using vars = std::vector<nn::var<T>>&;
  const nn::shape image{2, 6, 4, 3}, channels{6}, style{2, 6}, position{1, 6, 1, 3};
  const auto run = [&](const std::string& name, std::vector<std::pair<std::string, nn::shape>> inputs, auto f) {
    check<T>(name, std::move(inputs), f, tolerance, "image.dy");
  };
  for (const index_t groups : {1, 2, 6})
    run("group_norm." + std::to_string(groups), {{"image", image}, {"gains", channels}, {"biases", channels}},
        [&](vars v) { return nn::group_norm(v[0], groups, v[1], v[2]); });
  run("group_norm.plain", {{"image", image}}, [](vars v) { return nn::group_norm<T>(v[0], 3, {}, {}, 0.1); });
  run("group_norm.flat", {{"style", style}, {"gains", channels}, {"biases", channels}},
      [](vars v) { return nn::group_norm(v[0], 2, v[1], v[2]); });
  run("modulate", {{"image", image}, {"style", style}, {"biases", {1, 6, 1, 1}}},
      [](vars v) { return v[0] * v[1] + v[2]; });
  run("positions", {{"image", image}, {"position", position}}, [](vars v) { return v[0] + v[1]; });
  run("positions.product", {{"image", image}, {"position", position}}, [](vars v) { return v[0] * v[1]; });
  run("channels_last", {{"image", image}, {"other", {2, 3, 4, 3}}}, [](vars v) {
    return nn::permute(nn::concat(v, 1), {0, 2, 3, 1});
  });
  run("tokens", {{"image", image}}, [](vars v) {
    return nn::slice(nn::transpose(nn::reshape(v[0], {2, 6, 12})), 5, 4, 1);
  });
  const std::vector<std::int32_t> ids{5, 0, 0, 3, 5, 5};
  nn::tape<T> t;
  const auto &gains = fixture("gains"), &biases = fixture("biases");
  mlkit::matrix<T> table({6, 6});
  for (index_t i = 0; i < 36; ++i)
    table.data()[i] = static_cast<T>(gains[static_cast<std::size_t>(i / 6)] * biases[static_cast<std::size_t>(i % 6)]);
  const auto w = t.input(table), y = nn::embedding<T>(w, ids, {2, 3});
  CHECK(y.shape() == nn::shape{2, 3, 6});
  CHECK(largest_difference(y.data(), fixture("embedding")) < tolerance);
  std::vector<double> dy(fixture("image.dy").begin(), fixture("image.dy").begin() + 36);
  t.backward(nn::sum(nn::multiply(y, nn::reshape(t.constant(dy), y.shape()))));
  CHECK(largest_difference(w.grad_data(), fixture("embedding.d0")) < tolerance);
}

template <class T>
void check_adamw(const std::string& name, double decay, double tolerance) {
  INFO(name << " in " << mlkit::dtype_name<T>());
  const std::vector<double>&start = fixture("adamw.start"), &gradients = fixture("adamw.gradients");
  const index_t n = static_cast<index_t>(start.size());
  nn::parameters<T> store;
  auto& p = store.add("p", {n}, [&](mlkit::random_stream, index_t i) { return start[static_cast<std::size_t>(i)]; });
  nn::adamw<T> optimizer({&p}, {.rate = 0.02, .beta1 = 0.85, .beta2 = 0.98, .epsilon = 1e-6, .decay = decay});
  const mlkit::cpu exec;
  for (std::size_t step = 0; step * start.size() < gradients.size(); ++step) {
    const auto* g = gradients.data() + step * start.size();
    nn::tape<T> t;
    t.backward(nn::sum(nn::multiply(t.use(p), t.constant(mlkit::tensor_view<const double, 1>(g, {n})))));
    optimizer.step(exec);
    const auto* want = fixture(name).data() + step * start.size();
    CHECK(largest_difference(p.value.data(), {want, want + n}) < tolerance);
  }
}

}  // namespace

TEST_CASE("operations compute what PyTorch computes", "[nn]") {
  check_all<double>(1e-13);
  check_all<float>(2e-6);
}

TEST_CASE("operations on images and tokens compute what PyTorch computes", "[nn]") {
  check_images<double>(1e-13);
  check_images<float>(2e-5);
}

TEST_CASE("AdamW steps as PyTorch's does", "[nn]") {
  check_adamw<double>("adamw.decay", 0.1, 1e-14);
  check_adamw<double>("adamw.plain", 0.0, 1e-14);
  check_adamw<float>("adamw.decay", 0.1, 1e-6);
}
