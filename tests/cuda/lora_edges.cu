// LoRA on a GPU at its edges: strides, bits, and the error of low precision. For the CPU tests/lora has them.
#if !defined(MLKIT_TEST_ON_CPU)

#include "lora/linear_cases.hpp"

namespace {

enum class layout { plain, gaps, turned };

// A matrix somewhere in memory that begins with it and ends with it: row by row, with 3 or 8 elements behind each row
// but the last, or column by column.
template <class T>
class laid_out {
 public:
  laid_out(const test::executor& exec, const mlkit::matrix<T>& m, layout how, index_t gap)
      : exec_(exec), extents_(m.extents()), turned_(how == layout::turned), gap_(how == layout::plain ? 0 : gap) {
    std::vector<T> memory(static_cast<std::size_t>((lines() - 1) * pitch() + run()), static_cast<T>(std::nanf("")));
    for (index_t i = 0; i < lines(); ++i)
      for (index_t j = 0; j < run(); ++j)
        memory[static_cast<std::size_t>(i * pitch() + j)] = turned_ ? m(j, i) : m(i, j);
    memory_ = test::on_device(exec, memory);
  }
  mlkit::matrix_view<T> view() {
    const mlkit::matrix_view<T> v(memory_.data(), {lines(), run()}, {pitch(), 1});
    return turned_ ? transposed(v) : v;
  }
  mat read() const {
    const auto memory = test::to_host(exec_, memory_);
    mat m(extents_[0], extents_[1]);
    for (index_t i = 0; i < lines(); ++i)
      for (index_t j = 0; j < pitch(); ++j)
        if (j < run())
          (turned_ ? m(j, i) : m(i, j)) = static_cast<double>(memory(i * pitch() + j));
        else if (i + 1 < lines())
          CHECK(std::isnan(static_cast<float>(memory(i * pitch() + j))));  // nobody has written between rows
    return m;
  }

 private:
  index_t lines() const { return extents_[turned_ ? 1 : 0]; }
  index_t run() const { return extents_[turned_ ? 0 : 1]; }
  index_t pitch() const { return run() + gap_; }

  test::executor exec_;
  mlkit::extents_t<2> extents_;
  bool turned_;
  index_t gap_;
  test::operand<T, 1> memory_;
};

// Forward and backward where each operand lies as said.
template <class T>
void check_layouts(const shape& s, layout x_how, layout w_how, layout half_how, layout out_how, index_t gap) {
  INFO(s << ", " << gap << " behind rows, layouts of x, w, halves and outputs " << static_cast<int>(x_how)
         << static_cast<int>(w_how) << static_cast<int>(half_how) << static_cast<int>(out_how));
  const layer<T> l(s);
  using A = mlkit::accumulator_t<T>;
  laid_out<T> x(l.exec, normal<T>(s.tokens, s.in, 1), x_how, gap),
      w(l.exec, normal<T>(s.out, s.in, 2, 0.3f), w_how, gap);
  laid_out<T> a(l.exec, normal<T>(s.rank, s.in, 3, 0.3f), half_how, gap);
  laid_out<T> b(l.exec, normal<T>(s.out, s.rank, 4, 0.3f), half_how, gap);
  laid_out<T> dy(l.exec, normal<T>(s.tokens, s.out, 5), x_how, gap);
  laid_out<T> y(l.exec, nans<T>(s.tokens, s.out), out_how, gap), dx(l.exec, nans<T>(s.tokens, s.in), out_how, gap);
  laid_out<A> da(l.exec, nans<A>(s.rank, s.in), out_how, gap), db(l.exec, nans<A>(s.out, s.rank), out_how, gap);
  const lora::dense base{w.view(), l.bias.view()};
  const lora::adapter_view<T> adapter{a.view(), b.view(), l.scale};
  lora::linear(l.exec, x.view(), base, adapter, y.view());
  CHECK(difference(y.read(), l.y()) < tolerance<T>());
  lora::linear_backward(l.exec, x.view(), base, adapter, dy.view(), lora::gradients{da.view(), db.view()}, dx.view());
  CHECK(difference(dx.read(), l.dx()) < tolerance<T>());
  CHECK(difference(da.read(), l.da()) < tolerance<T>());
  CHECK(difference(db.read(), l.db()) < tolerance<T>());
}

}  // namespace

TEMPLATE_TEST_CASE("operands of any strides on a GPU", "[lora][cuda]", float, bf16) {
  constexpr auto plain = layout::plain, gaps = layout::gaps, turned = layout::turned;
  for (const shape& s : {shape{3, 64, 40, 8}, shape{40, 64, 48, 5}})
    for (const index_t gap : {8, 3}) {
      check_layouts<TestType>(s, gaps, gaps, gaps, gaps, gap);
      check_layouts<TestType>(s, turned, plain, gaps, gaps, gap);
      check_layouts<TestType>(s, gaps, turned, plain, turned, gap);
      check_layouts<TestType>(s, plain, gaps, turned, plain, gap);
    }
  check_layouts<TestType>({70, 136, 120, 8}, gaps, gaps, turned, gaps, 8);  // a library's
  check_layouts<TestType>({70, 136, 120, 8}, turned, turned, plain, turned, 8);
}

TEMPLATE_TEST_CASE("a scale of 0 gives the bits of the base on a GPU", "[lora][cuda]", float, bf16) {
  for (const shape& s : {shape{3, 128, 40, 8}, shape{70, 136, 120, 8}}) linear_cases::check_no_scale<TestType>(s);
}

TEMPLATE_TEST_CASE("in low precision, at most twice the error of the plain algorithm on a GPU", "[lora][cuda]", bf16,
                   f16) {
  for (const index_t tokens : {4, 40, 130}) linear_cases::check_low_precision<TestType>({tokens, 304, 88, 12});
}

TEMPLATE_TEST_CASE("every call gives the same bits on a GPU", "[lora][cuda]", float, bf16) {
  for (const shape& s : {shape{3, 128, 40, 8}, shape{40, 64, 48, 5}, shape{70, 136, 120, 8}}) {
    INFO(s);
    const layer<TestType> l(s);
    const auto magnitude = test::on_device(l.exec, normal_vector<TestType>(s.out, 8, 0.2f, 1.5f));
    const auto run = [&] {
      linear_cases::gradients_of<TestType> d(l);
      auto y = l.result(s.tokens, s.out), z = l.result(s.tokens, s.out);
      lora::linear(l.exec, l.x, l.base(), l.adapter(), y);
      lora::linear(l.exec, l.x, l.base(), lora::dora{l.adapter(), magnitude}, z);
      lora::linear_backward(l.exec, l.x, l.base(), l.adapter(), l.dy, d.both(), d.dx);
      return std::array{l.read(y), l.read(z), l.read(d.da), l.read(d.db), l.read(d.dx)};
    };
    const auto first = run(), again = run();
    for (std::size_t i = 0; i < first.size(); ++i) CHECK(same_bits(first[i], again[i]));
  }
}

#endif
