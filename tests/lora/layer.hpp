// One adapted layer, where any executor can use it, and what the formulas make of it in f64. tests/lora runs it on the
// CPU (MLKIT_TEST_ON_CPU), tests/cuda on each executor.
#pragma once

#if defined(MLKIT_TEST_ON_CPU)
#include <mlkit/lora.hpp>
#else
#include <mlkit/lora.cuh>
#endif

#include <cstring>
#include <deque>
#include <span>

#include "cuda/executor.hpp"
#include "reference.hpp"

namespace lora = mlkit::lora;
using mlkit::bf16;
using mlkit::f16;
using mlkit::index_t;
using namespace reference;

// A matrix where the executor can use it, and what it was on the host.
template <class T>
struct placed : test::operand<T, 2> {
  mat values;
  placed(const test::executor& exec, const mlkit::matrix<T>& m)
      : test::operand<T, 2>(test::on_device(exec, m)), values(from(m)) {}
};

// Memory of any type where the executor can use it. It travels as floats, which is what executors' memory holds.
class placed_bytes {
 public:
  explicit placed_bytes(const test::executor& exec) : exec_(exec) {}

  template <class T>
  std::span<const T> place(const T* data, index_t count) {
    mlkit::vector<float> words({mlkit::detail::ceil_div(count * static_cast<index_t>(sizeof(T)), 4)});
    if (count > 0) std::memcpy(words.data(), data, static_cast<std::size_t>(count) * sizeof(T));
    memory_.push_back(test::on_device(exec_, words));
    return {reinterpret_cast<const T*>(memory_.back().view().data), static_cast<std::size_t>(count)};
  }

 private:
  test::executor exec_;
  std::deque<test::operand<float, 1>> memory_;
};

struct shape {
  index_t tokens, in, out, rank;
};
inline std::ostream& operator<<(std::ostream& s, const shape& t) {
  return s << t.tokens << " " << t.in << " " << t.out << " " << t.rank;
}

template <class T>
mlkit::matrix<T> nans(index_t rows, index_t cols) {
  mlkit::matrix<T> m({rows, cols});
  for (index_t i = 0; i < m.size(); ++i) m.data()[i] = static_cast<T>(std::nanf(""));
  return m;
}

template <class T>
struct layer {
  test::executor exec = test::exec();
  index_t tokens, in, out, rank;
  double scale;
  placed<T> x, w, a, b, dy;
  mlkit::vector<T> bias_values;
  test::operand<T, 1> bias;
  mat mask;  // what dropout multiplies x by on its way into A; without elements: nothing

  layer(index_t t, index_t i, index_t o, index_t r, double s = 0.5)
      : tokens(t),
        in(i),
        out(o),
        rank(r),
        scale(s),
        x(exec, normal<T>(t, i, 1)),
        w(exec, normal<T>(o, i, 2, 0.3f)),
        a(exec, normal<T>(r, i, 3, 0.3f)),
        b(exec, normal<T>(o, r, 4, 0.3f)),
        dy(exec, normal<T>(t, o, 5)),
        bias_values(normal_vector<T>(o, 6)),
        bias(test::on_device(exec, bias_values)) {}
  explicit layer(const shape& s, double scale = 0.5) : layer(s.tokens, s.in, s.out, s.rank, scale) {}

  lora::adapter_view<T> adapter() const { return {a.view(), b.view(), scale}; }
  auto base() const { return lora::dense{w.view(), bias.view()}; }

  mat masked(const mat& m) const { return mask.v.empty() ? m : times(m, mask); }
  mat with_bias(mat y) const {
    for (index_t i = 0; i < y.rows; ++i)
      for (index_t j = 0; j < y.cols; ++j) y(i, j) += static_cast<double>(bias_values(j));
    return y;
  }
  mat merged() const { return add(w.values, multiply(b.values, a.values), scale); }
  mat base_y() const { return with_bias(multiply(x.values, transpose(w.values))); }
  mat h() const { return scaled(multiply(masked(x.values), transpose(a.values)), scale); }
  mat g() const { return scaled(multiply(dy.values, b.values), scale); }
  mat y() const { return add(base_y(), multiply(h(), transpose(b.values))); }
  mat db() const { return multiply(transpose(dy.values), h()); }
  mat da() const { return multiply(transpose(g()), masked(x.values)); }
  mat dx() const { return add(multiply(dy.values, w.values), masked(multiply(g(), a.values))); }

  // A matrix for results, which starts as NaN.
  template <class U = T>
  auto result(index_t rows, index_t cols) const {
    return test::on_device(exec, nans<U>(rows, cols));
  }
  template <class U>
  mat read(const test::operand<U, 2>& m) const {
    return from(test::to_host(exec, m));
  }
};

inline double difference(const mat& have, const mat& want) {
  return difference(mlkit::matrix_view<const double>(have.v.data(), {have.rows, have.cols}), want);
}
inline bool same_bits(const mat& a, const mat& b) { return a.v == b.v; }
