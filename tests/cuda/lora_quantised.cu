// lora::linear over NF4 and int8 weights: decoded in registers for few tokens, into shared memory for many.
#include "lora/layer.hpp"

namespace {

// A quantised weight where the executor can use it, and the dense one that it stands for.
struct placed_weight : placed_bytes {
  mat values;

  template <class Quantised>
  placed_weight(const test::executor& exec, const Quantised& q) : placed_bytes(exec) {
    mlkit::matrix<float> dense({q.rows(), q.cols()});
    lora::dequantise(mlkit::cpu{}, q, dense);
    values = from(dense);
  }
};

struct placed_nf4 : placed_weight {
  lora::nf4_view view;

  placed_nf4(const test::executor& exec, const lora::nf4_matrix& q) : placed_weight(exec, q) {
    const lora::nf4_view& v = q.view();
    const mlkit::extents_t<2> extents{v.outputs, v.inputs};
    const auto bytes = place(v.packed, mlkit::detail::ceil_div(v.size(), 2));
    if (v.double_quantised()) {
      const lora::nf4_nested nested{.codes = place(v.absmax_codes, v.blocks()),
                                    .absmax = place(v.nested_absmax, v.nested_blocks()),
                                    .offset = v.offset,
                                    .code_book = place(v.code_book, 256)};
      view = lora::nf4_view(extents, bytes, nested, v.block());
    } else {
      view = lora::nf4_view(extents, bytes, place(v.absmax, v.blocks()), v.block());
    }
  }
};

struct placed_int8 : placed_weight {
  lora::int8_view view;

  placed_int8(const test::executor& exec, const lora::int8_matrix& q) : placed_weight(exec, q) {
    const lora::int8_view& v = q.view();
    view = lora::int8_view({v.outputs, v.inputs}, place(v.codes, v.size()), place(v.scales, v.outputs));
  }
};

template <class T, class Base>
void check_base(layer<T>& l, const Base& base, const mat& w) {
  const mat merged = add(w, multiply(l.b.values, l.a.values), l.scale);
  auto y = l.result(l.tokens, l.out), dx = l.result(l.tokens, l.in);
  lora::linear(l.exec, l.x.view(), base, l.adapter(), y.view());
  CHECK(difference(l.read(y), multiply(l.x.values, transpose(merged))) < tolerance<T>());
  auto da = l.template result<float>(l.rank, l.in), db = l.template result<float>(l.out, l.rank);
  lora::linear_backward(l.exec, l.x.view(), base, l.adapter(), l.dy.view(), lora::gradients{da.view(), db.view()},
                        dx.view());
  CHECK(difference(l.read(dx), multiply(l.dy.values, merged)) < tolerance<T>());
  CHECK(difference(l.read(da), l.da()) < tolerance<T>());
}

}  // namespace

TEMPLATE_TEST_CASE("linear over quantised weights, on every executor", "[lora][cuda]", float, bf16, f16) {
  constexpr shape shapes[] = {{1, 128, 40, 4}, {16, 192, 33, 16}, {9, 64, 50, 3}, {20, 96, 130, 8}, {3, 37, 21, 2}};
  for (const shape& s : shapes) {
    INFO(s);
    layer<TestType> l(s.tokens, s.in, s.out, s.rank);
    const auto w = normal<float>(s.out, s.in, 9, 0.3f);
    for (const lora::nf4_options& options : {lora::nf4_options{}, lora::nf4_options{.double_quantise = true},
                                             lora::nf4_options{.block = 32}, lora::nf4_options{.block = 256}}) {
      INFO("block " << options.block << (options.double_quantise ? " doubly" : ""));
      const placed_nf4 q(l.exec, lora::quantise_nf4(mlkit::cpu{}, w, options));
      check_base(l, lora::nf4{q.view}, q.values);
    }
    const placed_int8 q(l.exec, lora::quantise_int8(mlkit::cpu{}, w));
    check_base(l, lora::int8{q.view}, q.values);
  }
}
