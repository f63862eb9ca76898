// Sums and products of two values, the second repeated where it has fewer elements than the first.
#pragma once

#include "elementwise.hpp"
#include "tape.hpp"

namespace MLKIT_NAMESPACE::nn {
namespace detail {

// How b lies beside a: a's extents, neighbours of one kind merged, as [r0, k0, r1, k1, r2], where b is repeated over
// r0, r1 and r2 and has an element for each (k0, k1). Four extents of any two kinds fit.
struct repetition {
  index_t r0 = 1, k0 = 1, r1 = 1, k1 = 1, r2 = 1;

  index_t kept() const noexcept { return k0 * k1; }
  index_t repeats() const noexcept { return r0 * r1 * r2; }
  bool none() const noexcept { return repeats() == 1; }
};

inline repetition repetition_of(std::string_view function, const shape& a, const shape& b) {
  // b's extent at d of a's dimensions, 1 where b is repeated over it.
  std::array<index_t, shape::max_rank> extent{1, 1, 1, 1};
  const bool row = b.rank() == 1 && a.rank() > 1;
  const int shift = row ? a.rank() - 1 : 0;
  bool fits = b.rank() <= a.rank();
  for (int d = 0; fits && d < b.rank(); ++d) {
    extent[static_cast<std::size_t>(d) + static_cast<std::size_t>(shift)] = b[d];
    fits = b[d] == a[d + shift] || (b[d] == 1 && b.rank() == a.rank());
  }
  if (!fits)
    fail_shape(function, ": the first operand has shape ", a.text(), ", but the second has ", b.text(),
               ", which is neither that, nor one row of it, nor its leading extents, nor the same with extents of 1");
  repetition r;
  index_t* slots[] = {&r.r2, &r.k1, &r.r1, &r.k0, &r.r0};
  std::size_t slot = 0;
  for (int d = a.rank(); d-- > 0;) {
    if (a[d] == 1) continue;
    const bool kept = extent[static_cast<std::size_t>(d)] == a[d];
    if (kept != (slot % 2 == 1)) ++slot;
    *slots[slot] *= a[d];
  }
  return r;
}

// f(a's offset, b's offset, count, step) for every run of a that one run of b (step 1) or one element of it (step 0)
// goes with, in parallel where that pays.
template <class F>
void for_runs(const cpu& exec, const repetition& s, const F& f) {
  if (s.none()) {
    for_blocks(exec, s.kept(), [&](index_t begin, index_t end) { f(begin, begin, end - begin, index_t{1}); });
  } else if (s.r2 == 1) {
    for_rows(exec, s.r0 * s.k0 * s.r1, s.k1, [&](index_t i) { f(i * s.k1, i / s.r1 % s.k0 * s.k1, s.k1, index_t{1}); });
  } else {
    for_rows(exec, s.r0 * s.k0 * s.r1 * s.k1, s.r2,
             [&](index_t i) { f(i * s.r2, i / (s.r1 * s.k1) % s.k0 * s.k1 + i % s.k1, s.r2, index_t{0}); });
  }
}

// db += Op::second(dy, a, b), summed over what b is repeated over, in an order that the shapes alone decide.
template <class Op, class T>
void repeated_gradient(const cpu& exec, const repetition& s, const T* dy, const T* a, const T* b, T* db) {
  if (s.r2 == 1) {
    constexpr index_t strip = 64;
    const index_t strips = ceil_div(s.k1, strip), stride = s.k0 * s.r1 * s.k1;
    const auto sums = MLKIT_SELECT_WITHOUT_BF16(combined_rows_gradient<Op, T>);
    for_rows(exec, s.k0 * strips, s.repeats() * std::min(strip, s.k1), [=](index_t task) {
      const index_t j = task / strips, first = task % strips * strip, from = j * s.r1 * s.k1 + first;
      sums(s.r0, stride, s.r1, s.k1, std::min(strip, s.k1 - first), dy + from, a + from, b + j * s.k1 + first,
           db + j * s.k1 + first);
    });
  } else {
    const auto sum = MLKIT_SELECT_WITHOUT_BF16(combined_run_sum<Op, T>);
    for_rows(exec, s.kept(), s.repeats(), [=](index_t j) {
      T total = 0;
      for (index_t i = 0; i < s.r0 * s.r1; ++i) {
        const index_t from = (((i / s.r1 * s.k0 + j / s.k1) * s.r1 + i % s.r1) * s.k1 + j % s.k1) * s.r2;
        total += sum(s.r2, dy + from, a + from, b[j]);
      }
      db[j] += total;
    });
  }
}

// Op::value(a, b), and what a and b get of its gradient: Op::first(dy, a, b) and Op::second(dy, a, b).
template <class Op, real T>
var<T> combine(std::string_view function, var<T> a, var<T> b) {
  const repetition s = repetition_of(function, a.shape(), b.shape());
  tape<T>& t = a.on();
  const var<T> y = t.make(a.shape(), {a, b});
  if (a.size() == 0) return y;
  const auto forward = MLKIT_SELECT_WITHOUT_BF16(combine_run<Op, T>);
  const T *pa = a.data(), *pb = b.data();
  for_runs(t.exec(), s, [=, py = y.data()](index_t i, index_t j, index_t count, index_t step) {
    forward(count, pa + i, pb + j, step, py + i);
  });
  t.on_backward(y, [=] {
    const cpu& exec = y.on().exec();
    const T* dy = y.grad_data();
    if (a.needs_grad()) {
      const auto backward = MLKIT_SELECT_WITHOUT_BF16(combine_first_gradient<Op, T>);
      for_runs(exec, s, [=, da = a.grad_data()](index_t i, index_t j, index_t count, index_t step) {
        backward(count, dy + i, pa + i, pb + j, step, da + i);
      });
    }
    if (!b.needs_grad()) return;
    T* db = b.grad_data();
    if (s.none()) {
      const auto backward = MLKIT_SELECT_WITHOUT_BF16(combine_second_gradient<Op, T>);
      for_blocks(exec, s.kept(), [=](index_t begin, index_t end) {
        backward(end - begin, dy + begin, pa + begin, pb + begin, db + begin);
      });
    } else {
      repeated_gradient<Op>(exec, s, dy, pa, pb, db);
    }
  });
  return y;
}

struct sum_of_two {
  template <class T>
  static T value(T a, T b) noexcept {
    return a + b;
  }
  template <class T>
  static T first(T dy, T, T) noexcept {
    return dy;
  }
  template <class T>
  static T second(T dy, T, T) noexcept {
    return dy;
  }
};
struct product_of_two {
  template <class T>
  static T value(T a, T b) noexcept {
    return a * b;
  }
  template <class T>
  static T first(T dy, T, T b) noexcept {
    return dy * b;
  }
  template <class T>
  static T second(T dy, T a, T) noexcept {
    return dy * a;
  }
};

}  // namespace detail

/// a + b, of a's shape. b is repeated where it has fewer elements. It has
/// - a's shape,
/// - one extent, a's last: a row that goes with every row (a bias);
/// - two extents or more, a's leading ones: [n, c] beside [n, c, h, w] is a number for each image and channel;
/// - as many extents as a, some of them 1: [1, tokens, d] beside [n, tokens, d], [n, 1, d], [1, c, 1, 1];
/// - no extent: one number.
///
/// Throws shape_error for any other. b's gradient is summed over the repetitions, in the same order for any number of
/// threads.
template <real T>
var<T> add(var<T> a, var<T> b) {
  return detail::combine<detail::sum_of_two>("nn::add", a, b);
}

/// a * b, element by element, of a's shape. b is repeated as add repeats it.
template <real T>
var<T> multiply(var<T> a, var<T> b) {
  return detail::combine<detail::product_of_two>("nn::multiply", a, b);
}

template <real T>
var<T> operator+(var<T> a, var<T> b) {
  return add(a, b);
}
template <real T>
var<T> operator*(var<T> a, var<T> b) {
  return multiply(a, b);
}

}  // namespace MLKIT_NAMESPACE::nn
