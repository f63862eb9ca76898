// LoRA's calls captured into graphs: once the library has its plans they neither wait nor allocate but in the stream's
// order, and a replay does again what the call does, with what its operands hold by then.
#include "captured.hpp"

#if !defined(MLKIT_TEST_ON_CPU)

#include "lora/linear_cases.hpp"

namespace {

// `call`, given an executor, makes `outputs` of a layer.
template <class T, class Call, class... Outputs>
void check_captured(const layer<T>& l, Call&& call, const Outputs&... outputs) {
  const test::own_stream stream;
  const mlkit::cuda exec(stream);
  const auto made = [&] {
    exec.synchronize();
    return std::array{l.read(outputs)...};
  };
  const auto same = [](const auto& a, const auto& b) {
    bool all = true;
    for (std::size_t i = 0; i < a.size(); ++i) all = all && same_bits(a[i], b[i]);
    return all;
  };
  const auto put = [&](const auto& to, const auto& m) {
    using U = typename std::remove_cvref_t<decltype(m)>::value_type;
    test::copy_bytes(l.exec, to.data(), m.data(), static_cast<std::size_t>(m.size()) * sizeof(U));
  };
  call(exec);
  const auto first = made();
  const test::captured graph(stream, [&] { call(exec); });
  const auto spoil = [&](const auto& m) {
    put(m, nans<typename std::remove_cvref_t<decltype(m)>::value_type>(m.extent(0), m.extent(1)));
  };
  (spoil(outputs), ...);
  graph.launch();
  CHECK(same(made(), first));
  const auto before = test::to_host(l.exec, l.x);
  put(l.x, normal<T>(l.tokens, l.in, 91));
  graph.launch();
  const auto second = made();
  CHECK_FALSE(same(second, first));
  call(exec);
  CHECK(same(made(), second));
  put(l.x, before);
}

constexpr shape shapes[] = {{3, 128, 40, 8}, {40, 64, 48, 5}, {70, 136, 120, 8}};

}  // namespace

TEMPLATE_TEST_CASE("lora on a GPU: forward and backward in a graph", "[lora][cuda]", float, bf16) {
  for (const shape& s : shapes) {
    INFO(s);
    const layer<TestType> l(s);
    linear_cases::gradients_of<TestType> d(l);
    auto y = l.result(s.tokens, s.out);
    const auto forward = [&](const mlkit::cuda& exec) { lora::linear(exec, l.x, l.base(), l.adapter(), y); };
    check_captured(l, forward, y);
    const auto both = [&](const mlkit::cuda& exec) {
      lora::linear(exec, l.x, l.base(), l.adapter(), y, {.dropout = 0.25, .seed = 5});
      lora::linear_backward(exec, l.x, l.base(), l.adapter(), y, d.both(), d.dx, {.dropout = 0.25, .seed = 5});
    };
    check_captured(l, both, y, d.da, d.db, d.dx);
  }
}

TEMPLATE_TEST_CASE("lora on a GPU: dora in a graph", "[lora][cuda]", float, bf16) {
  for (const shape& s : shapes) {
    INFO(s);
    const layer<TestType> l(s);
    linear_cases::gradients_of<TestType> d(l);
    const auto magnitude = test::on_device(l.exec, normal_vector<TestType>(s.out, 8, 0.2f, 1.5f));
    auto y = l.result(s.tokens, s.out);
    auto dm = l.template result<float>(1, s.out);
    const mlkit::vector_view<float> dm_row(dm.data(), {s.out});
    const auto both = [&](const mlkit::cuda& exec) {
      const lora::dora adapter{l.adapter(), magnitude};
      lora::linear(exec, l.x, l.base(), adapter, y);
      lora::linear_backward(exec, l.x, l.base(), adapter, y, lora::gradients{d.da, d.db, dm_row}, d.dx);
    };
    check_captured(l, both, y, d.da, d.db, d.dx, dm);
  }
}

TEMPLATE_TEST_CASE("lora on a GPU: many adapters in a graph", "[lora][cuda]", float, bf16) {
  for (const shape& s : {shape{7, 128, 40, 8}, shape{40, 64, 48, 5}}) {
    INFO(s);
    const layer<TestType> l(s);
    std::vector<int> ids;
    for (int i = 0; i < s.tokens; ++i) ids.push_back(i % 3 - 1);
    placed_bytes ints(l.exec);
    const auto device_ids = ints.place(ids.data(), s.tokens);
    auto y = l.result(s.tokens, s.out);
    const auto call = [&](const mlkit::cuda& exec) {
      const std::vector<lora::adapter_view<TestType>> adapters{l.adapter(), l.adapter().scaled(2)};
      lora::linear(exec, l.x, l.base(), lora::per_row{adapters, device_ids}, y);
    };
    check_captured(l, call, y);
  }
}

#endif
