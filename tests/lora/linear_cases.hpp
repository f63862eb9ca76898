// What lora::linear and linear_backward are to compute, on any executor: each function is a test of one shape.
#pragma once

#include "layer.hpp"

namespace linear_cases {

template <class T>
void check_forward(const shape& s) {
  INFO(s);
  const layer<T> l(s);
  auto y = l.result(s.tokens, s.out);
  lora::linear(l.exec, l.x, l.base(), l.adapter(), y);
  CHECK(difference(l.read(y), l.y()) < tolerance<T>());
  lora::linear(l.exec, l.x, l.base(), y);
  CHECK(difference(l.read(y), l.base_y()) < tolerance<T>());
}

// The gradients, in the type of sums.
template <class T>
struct gradients_of {
  using A = mlkit::accumulator_t<T>;
  test::operand<A, 2> da, db;
  test::operand<T, 2> dx;

  explicit gradients_of(const layer<T>& l)
      : da(l.template result<A>(l.rank, l.in)), db(l.template result<A>(l.out, l.rank)), dx(l.result(l.tokens, l.in)) {}
  auto both() { return lora::gradients{da, db}; }
  void check(const layer<T>& l) const {
    CHECK(difference(l.read(da), l.da()) < tolerance<T>());
    CHECK(difference(l.read(db), l.db()) < tolerance<T>());
    CHECK(difference(l.read(dx), l.dx()) < tolerance<T>());
  }
};

template <class T>
void check_backward(const shape& s) {
  INFO(s);
  const layer<T> l(s);
  gradients_of<T> d(l);
  lora::linear_backward(l.exec, l.x, l.base(), l.adapter(), l.dy, d.both(), d.dx);
  d.check(l);
  lora::linear_backward(l.exec, l.base(), l.dy, d.dx);
  CHECK(difference(l.read(d.dx), multiply(l.dy.values, l.w.values)) < tolerance<T>());
}

// A saved h, gradients that add, and no dx.
template <class T>
void check_saved_h(const shape& s) {
  INFO(s);
  const layer<T> l(s);
  gradients_of<T> d(l);
  auto y = l.result(s.tokens, s.out);
  auto h = l.template result<mlkit::accumulator_t<T>>(s.tokens, s.rank);
  lora::linear(l.exec, l.x, l.base(), l.adapter(), y, {.h = h.view()});
  CHECK(difference(l.read(y), l.y()) < tolerance<T>());
  CHECK(difference(l.read(h), l.h()) < tolerance<T>());
  lora::linear_backward(l.exec, l.x, l.base(), l.adapter(), l.dy, d.both(), d.dx, {.h = h.view()});
  d.check(l);
  mlkit::matrix_view<T> no_dx;
  lora::linear_backward(l.exec, l.x, l.base(), l.adapter(), l.dy, d.both(), no_dx, {.accumulate = true});
  CHECK(difference(l.read(d.da), scaled(l.da(), 2)) < tolerance<T>());
  CHECK(difference(l.read(d.db), scaled(l.db(), 2)) < tolerance<T>());
}

template <class T>
void check_dropout(const shape& s, std::uint64_t stream) {
  INFO(s << ", stream " << stream);
  layer<T> l(s);
  l.mask = mask_of(s.tokens, s.in, 0.3, 7, stream);
  const lora::linear_options<mlkit::accumulator_t<T>> options{.dropout = 0.3, .seed = 7, .stream = stream};
  gradients_of<T> d(l);
  auto y = l.result(s.tokens, s.out), plain = l.result(s.tokens, s.out);
  lora::linear(l.exec, l.x, l.base(), l.adapter(), y, options);
  CHECK(difference(l.read(y), l.y()) < tolerance<T>());
  lora::linear_backward(l.exec, l.x, l.base(), l.adapter(), l.dy, d.both(), d.dx, options);
  d.check(l);

  lora::linear(l.exec, l.x, l.base(), l.adapter(), plain);
  lora::linear(l.exec, l.x, l.base(), l.adapter(), y, {.dropout = 0.3, .training = false});
  CHECK(same_bits(l.read(y), l.read(plain)));
}

// In low precision at most twice the error of the plain algorithm, which rounds every intermediate result as a chain of
// separate operations does.
template <class T>
void check_low_precision(const shape& s) {
  INFO(s);
  const layer<T> l(s);
  const mat h = rounded<T>(multiply(l.x.values, transpose(l.a.values)));
  const mat up = rounded<T>(scaled(rounded<T>(multiply(h, transpose(l.b.values))), l.scale));
  const mat g = rounded<T>(l.g());
  const mat through = rounded<T>(multiply(g, l.a.values));
  const auto bounded = [&](const test::operand<T, 2>& have, const mat& naive, const mat& want) {
    CHECK(difference(l.read(have), want) <= 2 * difference(rounded<T>(naive), want));
  };
  auto y = l.result(s.tokens, s.out), dx = l.result(s.tokens, s.in);
  auto da = l.result(s.rank, s.in), db = l.result(s.out, s.rank);
  lora::linear(l.exec, l.x, l.base(), l.adapter(), y);
  bounded(y, add(rounded<T>(l.base_y()), up), l.y());
  lora::linear_backward(l.exec, l.x, l.base(), l.adapter(), l.dy, lora::gradients{da, db}, dx);
  bounded(dx, add(rounded<T>(multiply(l.dy.values, l.w.values)), through), l.dx());
  bounded(da, multiply(transpose(g), l.x.values), l.da());
  bounded(db, multiply(transpose(l.dy.values), rounded<T>(scaled(h, l.scale))), l.db());
}

// A scale of 0 gives the bits of the base alone, whether h is kept or not.
template <class T>
void check_no_scale(const shape& s) {
  INFO(s);
  const layer<T> l(s, 0.0);
  auto with = l.result(s.tokens, s.out), without = l.result(s.tokens, s.out);
  auto h = l.template result<mlkit::accumulator_t<T>>(s.tokens, s.rank);
  lora::linear(l.exec, l.x, l.base(), l.adapter(), with);
  lora::linear(l.exec, l.x, l.base(), without);
  CHECK(same_bits(l.read(with), l.read(without)));
  lora::linear(l.exec, l.x, l.base(), l.adapter(), with, {.dropout = 0.5, .h = h.view()});
  CHECK(same_bits(l.read(with), l.read(without)));
}

}  // namespace linear_cases
