// Log-probabilities, entropies and their gradient, on the device and on the CPU, against loops of doubles.
#include <executor.hpp>

#include "../rl/logits_reference.hpp"

#if defined(MLKIT_TEST_ON_CPU)
#include <mlkit/rl.hpp>
#else
#include <mlkit/rl.cuh>
#endif

namespace rl = mlkit::rl;
using namespace logits_reference;

namespace {

std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

// How rows of logits lie: `shift` elements behind where memory starts, a row after `gap` more elements, classes `step`
// apart; and what is done with them.
struct manner {
  index_t shift = 0, gap = 0, step = 1;
  bool masked = false, in_place = false;
  double temperature = 1;
  double scale = 1;  // of the logits
};
struct shape : manner {
  index_t batch, time, classes;
  index_t rows() const { return batch * time; }
};

// Derivatives that depend on the row, and, as a loss, on its log-probability and entropy.
struct loss {
  template <class A>
  MLKIT_HOST_DEVICE rl::token_gradient<A> operator()(index_t row, A logp, A entropy) const {
    const A x = static_cast<A>(row % 5) - 2;
    return {x * logp / 4, entropy / 8 * x, x / 2};
  }
};
struct plain_loss {
  template <class A>
  MLKIT_HOST_DEVICE A operator()(index_t row, A) const {
    return static_cast<A>(row % 3) - A(0.5);
  }
};

template <class T>
inline constexpr double unit = sizeof(T) == 8                   ? 1e-13
                               : sizeof(T) == 4                 ? 3e-6
                               : std::is_same_v<T, mlkit::bf16> ? 0x1p-8
                                                                : 0x1p-11;

template <class T, class Token>
void check(index_t batch, index_t time, index_t classes, const manner& how = {}) {
  const shape s{how, batch, time, classes};
  using A = mlkit::accumulator_t<T>;
  INFO("[" << s.batch << ", " << s.time << ", " << s.classes << "] " << mlkit::dtype_name<T>() << ", shift " << s.shift
           << ", gap " << s.gap << ", step " << s.step << ", masked " << s.masked << ", in place " << s.in_place
           << ", temperature " << s.temperature << ", scale " << s.scale);
  const numbers number(5);
  const index_t row_stride = s.classes * s.step + s.gap;
  std::vector<T> memory(at(s.shift + s.rows() * row_stride));
  for (index_t i = 0; i < static_cast<index_t>(memory.size()); ++i) memory[at(i)] = static_cast<T>(s.scale * number(i));
  const auto offset = [&](index_t row, index_t j) { return at(s.shift + row * row_stride + j * s.step); };
  std::vector<Token> tokens(at(s.rows()));
  std::vector<std::uint8_t> mask(at(s.rows()), 1);
  for (index_t r = 0; r < s.rows(); ++r) {
    tokens[at(r)] = static_cast<Token>(number.below(r, s.classes));
    if (r % 7 == 3) memory[offset(r, number.below(r + 1, s.classes))] = static_cast<T>(-inf);
    if (r % 11 == 5)
      for (index_t j = 0; j < s.classes; ++j) memory[offset(r, j)] = static_cast<T>(-inf);
    if (!s.masked || r % 3 != 1) continue;
    mask[at(r)] = 0;
    for (index_t j = 0; j < s.classes; ++j) memory[offset(r, j)] = static_cast<T>(NAN);
  }

  const auto exec = test::exec();
  auto on = test::on_device(exec, memory);
  auto gradient_on = test::on_device(exec, memory);
  auto tokens_on = test::on_device(exec, tokens);
  auto mask_on = test::on_device(exec, mask);
  const mlkit::extents_t<3> extents{s.batch, s.time, s.classes}, strides{s.time * row_stride, row_stride, s.step};
  const auto logits_of = [&](auto& x) { return mlkit::tensor_view<T, 3>(x.view().data + s.shift, extents, strides); };
  const mlkit::tensor_view<const T, 3> logits = logits_of(s.in_place ? gradient_on : on);
  const mlkit::tensor_view<const Token, 2> token_view(tokens_on.view().data, {s.batch, s.time});
  rl::log_prob_options<2> options{.temperature = s.temperature};
  if (s.masked) options.mask = mlkit::tensor_view<const std::uint8_t, 2>(mask_on.view().data, {s.batch, s.time});
  const auto numbers_on = [&] { return test::on_device(exec, std::vector<A>(at(s.rows()), A(7))); };
  auto logp = numbers_on(), entropy = numbers_on(), lse = numbers_on();
  const auto rows_of = [&](auto& x) { return mlkit::tensor_view<A, 2>(x.view().data, {s.batch, s.time}); };

  // -1: values alone; 0: a loss of logp and entropy; 1: of neither; 2: given derivatives.
  for (const int way : {-1, 0, 1, 2}) {
    INFO("way " << way);
    if (way >= 0) gradient_on = test::on_device(exec, memory);
    const mlkit::tensor_view<const T, 3> z =
        s.in_place ? mlkit::tensor_view<const T, 3>(logits_of(gradient_on)) : logits;
    const rl::log_prob_outputs<A, 2> out{.logp = rows_of(logp), .entropy = rows_of(entropy), .lse = rows_of(lse)};
    auto slopes = numbers_on(), entropy_slopes = numbers_on();
    if (way == -1) {
      rl::log_probs(exec, z, token_view, options, out);
    } else if (way == 0) {
      rl::log_probs_and_gradient(exec, z, token_view, options, loss{}, out, logits_of(gradient_on));
    } else if (way == 1) {
      rl::log_probs_and_gradient(exec, z, token_view, options, plain_loss{}, {.logp = rows_of(logp)},
                                 logits_of(gradient_on));
    } else {
      std::vector<A> given(at(s.rows()));
      for (index_t r = 0; r < s.rows(); ++r) given[at(r)] = mask[at(r)] ? A(1) / A(1 + r) : A(NAN);
      slopes = test::on_device(exec, given);
      for (A& x : given) x = -x;
      entropy_slopes = test::on_device(exec, given);
      rl::log_probs_backward(exec, z, token_view, options,
                             {.dlogp = rows_of(slopes), .dentropy = rows_of(entropy_slopes)}, logits_of(gradient_on));
    }
    const auto l = test::to_host(exec, logp), h = test::to_host(exec, entropy), e = test::to_host(exec, lse);
    const auto d = test::to_host(exec, gradient_on);
    // Sums of as many exponentials in f32.
    const double bound = sizeof(A) == 8 ? 1e-12 : 4e-6;
    bool good = true;
    for (index_t r = 0; r < s.rows() && good; ++r) {
      INFO("row " << r);
      std::vector<double> row(at(s.classes));
      for (index_t j = 0; j < s.classes; ++j) row[at(j)] = static_cast<double>(memory[offset(r, j)]);
      if (!mask[at(r)]) {
        good = l(r) == 0 && (way == 1 || way == 2 || (h(r) == 0 && e(r) == 0));
        for (index_t j = 0; j < s.classes && way >= 0; ++j)
          good = good && static_cast<double>(d(index_t(offset(r, j)))) == 0;
        CHECK(good);
        continue;
      }
      const index_t y = static_cast<index_t>(tokens[at(r)]);
      const logits_reference::row want(row, y, s.temperature);
      const double size = std::max(1.0, s.scale / s.temperature);
      good = close(static_cast<double>(l(r)), want.logp, bound * size) &&
             close(static_cast<double>(h(r)), want.entropy, 4 * bound * size) &&
             close(static_cast<double>(e(r)), want.lse, bound * size);
      CHECK(good);
      if (way < 0 || !good) continue;
      const double x = static_cast<double>(r % 5) - 2;
      const double dlogp = way == 0 ? x * want.logp / 4 : way == 1 ? static_cast<double>(r % 3) - 0.5 : 1.0 / (1 + r);
      const double dentropy = way == 0   ? want.entropy / 8 * x
                              : way == 1 ? 0
                                         : -1.0 / (1 + r),
                   dmean = way == 0 ? x / 2 : 0;
      const bool nothing = want.lse == -inf;
      for (index_t j = 0; j < s.classes && good; ++j) {
        double g = 0;
        if (!nothing)
          g = want.gradient(j, y, s.temperature, dlogp, dentropy) +
              dmean * (1 / static_cast<double>(s.classes) - want.p[at(j)]) / s.temperature;
        if (std::isnan(g)) continue;  // a token of probability 0
        const double have = static_cast<double>(d(index_t(offset(r, j)))),
                     most = std::max(1.0, std::fabs(dlogp) + std::fabs(dentropy));
        const double allowed =
            unit<T> * std::fabs(g) + 8 * bound * size * most / s.temperature + (sizeof(T) == 2 ? 1e-7 : 0);
        good = std::fabs(have - g) <= allowed;
        if (!good) INFO("class " << j << ": " << have << " for " << g);
        if (!good) CHECK(have == Approx(g));
      }
    }
  }
}

template <class T, class Token>
void check_shapes() {
  for (const index_t classes : {1, 3, 33, 130})
    check<T, Token>(2, 6, classes, {.shift = classes % 2, .masked = classes == 33, .temperature = 0.7});
  check<T, Token>(1, 3, 1030, {.gap = 3});
  check<T, Token>(2, 2, 5003, {.shift = 1, .masked = true, .temperature = 2});
  check<T, Token>(1, 12, 130, {.shift = 3, .in_place = true});
  check<T, Token>(1, 12, 130, {.step = 2, .masked = true});
  check<T, Token>(1, 3, 2500, {.step = 3, .in_place = true});
}

}  // namespace

TEST_CASE("cuda: log-probabilities of f32", "[cuda][rl]") {
  check_shapes<float, std::int32_t>();
  check<float, std::int64_t>(1, 2, 20011, {.shift = 1});
  check<float, std::int64_t>(1, 1, 60007);  // longer than shared memory
  check<float, std::int32_t>(1, 12, 200, {.temperature = 0.5, .scale = 1e4});
}

TEST_CASE("cuda: log-probabilities of bf16", "[cuda][rl]") {
  check_shapes<mlkit::bf16, std::int64_t>();
  check<mlkit::bf16, std::int32_t>(1, 2, 20011, {.shift = 5});
}

TEST_CASE("cuda: log-probabilities of f16 and f64", "[cuda][rl]") {
  check<mlkit::f16, std::int32_t>(2, 6, 130, {.shift = 1, .masked = true});
  check<mlkit::f16, std::int32_t>(1, 2, 5003);
  check<mlkit::f16, std::int32_t>(1, 12, 70, {.step = 2});
  check<double, std::int32_t>(2, 6, 33, {.shift = 1, .masked = true, .temperature = 0.7});
  check<double, std::int32_t>(1, 2, 3001);
  check<double, std::int32_t>(1, 12, 70, {.step = 2});
}

TEST_CASE("cuda: log-probabilities refuse what does not fit", "[cuda][rl]") {
  const auto exec = test::exec();
  auto z = test::on_device(exec, std::vector<float>(60)), l = test::on_device(exec, std::vector<float>(6, 7.0f));
  auto tokens = test::on_device(exec, std::vector<std::int32_t>(5));
  const mlkit::tensor_view<const float, 2> logits(z.view().data, {6, 10});
  CHECK_THROWS_WITH(rl::log_probs(exec, logits, mlkit::tensor_view<const std::int32_t, 1>(tokens.view()), {}, l.view()),
                    "mlkit::shape_error: rl::log_probs: tokens has shape [5], but logits' rows has [6]");
  const auto have = test::to_host(exec, l);
  CHECK(std::count(have.data(), have.data() + 6, 7.0f) == 6);
}

#if !defined(MLKIT_TEST_ON_CPU)

TEST_CASE("cuda: a token outside the vocabulary gives NaN, and reads nothing there", "[cuda][rl]") {
  const auto exec = test::exec();
  auto z = test::on_device(exec, std::vector<float>(40, 1.0f)), dz = test::on_device(exec, std::vector<float>(40));
  auto l = test::on_device(exec, std::vector<float>(4)), h = test::on_device(exec, std::vector<float>(4));
  auto tokens = test::on_device(exec, std::vector<std::int32_t>{3, -1, 10, 1 << 30});
  rl::log_probs_and_gradient(exec, mlkit::tensor_view<const float, 2>(z.view().data, {4, 10}),
                             mlkit::tensor_view<const std::int32_t, 1>(tokens.view()), {}, plain_loss{},
                             {.logp = l.view(), .entropy = h.view()},
                             mlkit::tensor_view<float, 2>(dz.view().data, {4, 10}));
  const auto logp = test::to_host(exec, l), entropy = test::to_host(exec, h);
  const auto d = test::to_host(exec, dz);
  for (index_t r = 0; r < 4; ++r) {
    CHECK(std::isnan(logp(r)) == (r > 0));
    CHECK(entropy(r) == Approx(std::log(10.0)));
    for (index_t j = 0; j < 10; ++j) CHECK(std::isnan(d(10 * r + j)) == (r > 0));
  }
}

#endif
