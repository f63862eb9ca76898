// What LoRA refuses: the message names the argument and both sizes, outputs stay as they were, the next call works.
#include "lora/linear_cases.hpp"

using Catch::Matchers::Contains;

namespace {

// A call that is refused, with this message, and leaves its outputs as they were.
template <class Error, class F, class... Outputs>
void refused(const layer<float>& l, const char* text, F&& call, const Outputs&... outputs) {
  INFO(text);
  CHECK_THROWS_AS(call(), Error);
  try {
    call();
  } catch (const mlkit::error& e) {
    CHECK_THAT(e.what(), Contains(text));
  }
  [[maybe_unused]] const auto untouched = [&](const auto& m) {
    bool all = true;
    for (const double v : l.read(m).v) all = all && std::isnan(v);
    return all;
  };
  CHECK((untouched(outputs) && ...));
}

}  // namespace

TEST_CASE("what forward and backward refuse leaves outputs as they were, on every executor", "[lora][cuda]") {
  using mlkit::shape_error;
  using mlkit::value_error;
  const layer<float> l(5, 16, 12, 2);
  auto y = l.result(5, 12), wide = l.result(5, 13), few = l.result(4, 12);
  linear_cases::gradients_of<float> d(l);
  const auto forward = [&](const auto& x, const auto& adapter, auto&& out) {
    return [&] { lora::linear(l.exec, x, l.base(), adapter, out); };
  };
  refused<shape_error>(l, "lora::linear: y has 13 columns, but base has 12 outputs", forward(l.x, l.adapter(), wide),
                       wide);
  refused<shape_error>(l, "lora::linear: y has 4 rows, but x has 5", forward(l.x, l.adapter(), few), few);
  refused<shape_error>(l, "lora::linear: x has 12 columns, but base has 16 inputs", forward(l.dy, l.adapter(), y), y);
  const lora::adapter_view<float> none{{l.a.data(), {0, 16}}, {l.b.data(), {12, 0}}, 1};
  refused<shape_error>(l, "lora::linear: adapter has rank 0; an adapter has rank 1 or more", forward(l.x, none, y), y);
  const lora::adapter_view<float> torn{l.a.view(), {l.b.data(), {12, 1}}, 1};
  refused<shape_error>(l, "lora::linear: adapter.b has 1 columns, but adapter.a has 2 rows", forward(l.x, torn, y), y);
  const lora::adapter_view<float> endless{l.a.view(), l.b.view(), HUGE_VAL};
  refused<value_error>(l, "lora::linear: adapter has scale inf, which is not finite", forward(l.x, endless, y), y);
  auto one = l.result(5, 16);
  refused<shape_error>(
      l, "lora::linear: y [5, 12] overlaps x [5, 16]",
      [&] {
        lora::linear(l.exec, one, l.base(), l.adapter(), mlkit::matrix_view<float>(one.data(), {5, 12}));
      },
      one);
  refused<value_error>(
      l, "lora::linear: dropout = 1 is outside [0, 1)",
      [&] { lora::linear(l.exec, l.x, l.base(), l.adapter(), y, {.dropout = 1}); }, y);

  auto low = l.result(1, 16);
  const auto backward = [&](const auto& dy, auto&& da, auto&& dx) {
    return [&] { lora::linear_backward(l.exec, l.x, l.base(), l.adapter(), dy, lora::gradients{da, d.db}, dx); };
  };
  refused<shape_error>(l, "lora::linear_backward: dy has 16 columns, but base has 12 outputs",
                       backward(l.x, d.da, d.dx), d.da, d.db, d.dx);
  refused<shape_error>(l, "lora::linear_backward: da has 1 rows, but adapter.a has 2", backward(l.dy, low, d.dx), low,
                       d.db, d.dx);
  refused<shape_error>(l, "lora::linear_backward: dx has 12 columns, but x has 16", backward(l.dy, d.da, y), d.da, d.db,
                       y);
  refused<shape_error>(l, "lora::linear_backward: dx [5, 16] overlaps da [2, 16]",
                       backward(l.dy, mlkit::matrix_view<float>(one.data(), {2, 16}), one), one, d.db);

  lora::linear(l.exec, l.x, l.base(), l.adapter(), y);
  CHECK(difference(l.read(y), l.y()) < 3e-6);
}

TEST_CASE("what DoRA and merging refuse leaves outputs as they were, on every executor", "[lora][cuda]") {
  using mlkit::shape_error;
  const layer<float> l(5, 16, 12, 2);
  auto y = l.result(5, 12), short_w = l.result(12, 15), low_w = l.result(11, 16), w = l.result(12, 16);
  linear_cases::gradients_of<float> d(l);
  auto dm = l.result(1, 12);
  const auto magnitude = test::on_device(l.exec, normal_vector<float>(12, 8, 0.2f, 1.5f));
  const lora::dora whole{l.adapter(), magnitude};
  const lora::dora torn{l.adapter(), mlkit::vector_view<const float>(magnitude.data(), {11})};
  refused<shape_error>(
      l, "lora::linear: magnitude has 11 elements, but the output has 12",
      [&] { lora::linear(l.exec, l.x, l.base(), torn, y); }, y);
  const lora::gradients grads{d.da, d.db, mlkit::vector_view<float>(dm.data(), {11})};
  refused<shape_error>(
      l, "lora::linear_backward: dmagnitude has 11 elements, but base has 12 outputs",
      [&] { lora::linear_backward(l.exec, l.x, l.base(), whole, l.dy, grads, d.dx); }, d.da, d.db, d.dx, dm);
  refused<shape_error>(
      l, "adapter.a has 16 columns, but w has 15", [&] { lora::merge(l.exec, short_w, l.adapter()); }, short_w);
  refused<shape_error>(
      l, "adapter.b has 12 rows, but w has 11", [&] { lora::unmerge(l.exec, low_w, l.adapter()); }, low_w);
  refused<mlkit::value_error>(
      l, "weight = inf is not finite", [&] { lora::merge(l.exec, w, l.adapter(), {.weight = HUGE_VAL}); }, w);
}

#if !defined(MLKIT_TEST_ON_CPU)

TEST_CASE("lora on a GPU: memory of the host is refused", "[lora][cuda]") {
  using mlkit::device_error;
  const layer<float> l(5, 16, 12, 2);
  if (l.exec.properties().reaches_host_memory) return;
  auto y = l.result(5, 12);
  linear_cases::gradients_of<float> d(l);
  const auto x = normal<float>(5, 16, 1), w = normal<float>(12, 16, 2), a = normal<float>(2, 16, 3),
             b = normal<float>(12, 2, 4), dy = normal<float>(5, 12, 5);
  auto host_y = nans<float>(5, 12), host_a = nans<float>(2, 16);
  const auto forward = [&](const auto& in, const auto& base, const auto& adapter, auto&& out) {
    return [&] { lora::linear(l.exec, in, base, adapter, out); };
  };
  const auto lies = [](const char* name) {
    return std::string("lora::linear: ") + name + " lies in host memory, which the GPU cannot reach";
  };
  refused<device_error>(l, lies("x").c_str(), forward(x, l.base(), l.adapter(), y), y);
  refused<device_error>(l, lies("base").c_str(), forward(l.x, lora::dense{w}, l.adapter(), y), y);
  refused<device_error>(l, lies("bias").c_str(), forward(l.x, lora::dense{l.w, l.bias_values}, l.adapter(), y), y);
  const lora::adapter_view<float> host_down{a.view(), l.b.view(), 1}, host_up{l.a.view(), b.view(), 1};
  refused<device_error>(l, lies("adapter.a").c_str(), forward(l.x, l.base(), host_down, y), y);
  refused<device_error>(l, lies("adapter.b").c_str(), forward(l.x, l.base(), host_up, y), y);
  refused<device_error>(l, lies("y").c_str(), forward(l.x, l.base(), l.adapter(), host_y));
  refused<device_error>(
      l, "lora::linear_backward: dy lies in host memory",
      [&] { lora::linear_backward(l.exec, l.x, l.base(), l.adapter(), dy, d.both(), d.dx); }, d.da, d.db, d.dx);
  refused<device_error>(
      l, "lora::linear_backward: da lies in host memory",
      [&] {
        lora::linear_backward(l.exec, l.x, l.base(), l.adapter(), l.dy, lora::gradients{host_a, d.db}, d.dx);
      },
      d.db, d.dx);
  for (index_t i = 0; i < host_y.size(); ++i) REQUIRE(std::isnan(host_y.data()[i]));
  lora::linear(l.exec, l.x, l.base(), l.adapter(), y);
  CHECK(difference(l.read(y), l.y()) < 3e-6);
}

#endif
