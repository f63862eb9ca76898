// The fused language-model head, on the device and on the CPU, against loops of doubles.
#include <executor.hpp>

#include "../rl/head_reference.hpp"

#if defined(MLKIT_TEST_ON_CPU)
#include <mlkit/rl.hpp>
#else
#include <mlkit/rl.cuh>
#endif

using namespace head_reference;

namespace {

struct manner {
  bool masked = false, accumulates = false, strided = false;
  double temperature = 1;
};

template <class T>
problem<T> make(index_t rows, index_t depth, index_t classes, const manner& how) {
  problem<T> p(rows, depth, classes, 17);
  p.accumulate = how.accumulates;
  p.temperature = how.temperature;
  for (index_t i = 0; how.masked && i < rows; i += 3) {
    const auto at = static_cast<std::size_t>(i);
    p.mask[at] = 0, p.dlogp[at] = NAN, p.dentropy[at] = NAN;
    std::fill_n(p.hidden.begin() + i * depth, depth, static_cast<T>(NAN));
  }
  return p;
}

// A copy on the device with rows and elements further apart.
template <class T>
struct spread {
  index_t rows, cols, row, step;
  test::operand<T, 1> memory;

  spread(const test::executor& exec, const std::vector<T>& x, index_t n, index_t m, bool strided)
      : rows(n), cols(m), row(strided ? 2 * m + 3 : m), step(strided ? 2 : 1) {
    std::vector<T> y(static_cast<std::size_t>(rows * row), T(3));
    for (index_t i = 0; i < rows; ++i)
      for (index_t j = 0; j < cols; ++j)
        y[static_cast<std::size_t>(i * row + j * step)] = x[static_cast<std::size_t>(i * cols + j)];
    memory = test::on_device(exec, y);
  }
  matrix_view<T> view() { return {memory.view().data, {rows, cols}, {row, step}}; }
  void take(const test::executor& exec, std::vector<T>& to) {
    const auto y = test::to_host(exec, memory);
    for (index_t i = 0; i < rows; ++i)
      for (index_t j = 0; j < cols; ++j) to[static_cast<std::size_t>(i * cols + j)] = y(i * row + j * step);
  }
};

template <class T>
void check(index_t rows, index_t depth, index_t classes, const manner& how, double bound, double gradient_bound) {
  using A = mlkit::accumulator_t<T>;
  const auto exec = test::exec();
  problem<T> p = make<T>(rows, depth, classes, how);
  spread<T> hidden(exec, p.hidden, rows, depth, how.strided), dhidden(exec, p.dhidden, rows, depth, how.strided),
      weight(exec, p.weight, classes, depth, how.strided), dweight(exec, p.dweight, classes, depth, how.strided);
  auto tokens = test::on_device(exec, p.tokens);
  auto mask = test::on_device(exec, p.mask);
  auto dlogp = test::on_device(exec, p.dlogp), dentropy = test::on_device(exec, p.dentropy);
  auto logp = test::on_device(exec, p.logp), entropy = test::on_device(exec, p.entropy),
       lse = test::on_device(exec, p.lse);
  rl::log_prob_options<1> options{.temperature = how.temperature};
  if (how.masked) options.mask = vector_view<const std::uint8_t>(mask.view());
  const vector_view<const std::int64_t> y(tokens.view());
  const matrix_view<const T> h = hidden.view(), w = weight.view();
  rl::log_probs(exec, h, w, y, options, {.logp = logp.view(), .entropy = entropy.view(), .lse = lse.view()});
  rl::log_probs_backward(
      exec, h, w, y, options,
      {.dlogp = vector_view<const A>(dlogp.view()), .dentropy = vector_view<const A>(dentropy.view())},
      {.dhidden = dhidden.view(), .dweight = dweight.view(), .accumulate_dweight = how.accumulates});
  const auto take = [&](auto& on, std::vector<A>& to) {
    const auto x = test::to_host(exec, on);
    std::copy_n(x.data(), rows, to.begin());
  };
  take(logp, p.logp), take(entropy, p.entropy), take(lse, p.lse);
  dhidden.take(exec, p.dhidden), dweight.take(exec, p.dweight);
  for (index_t i = 0; how.masked && i < rows; i += 3)  // the loops skip those rows, which the call was given as NaN
    std::fill_n(p.hidden.begin() + i * depth, depth, T(0));
  INFO(mlkit::dtype_name<T>() << ", masked " << how.masked << ", strided " << how.strided);
  p.require(bound, gradient_bound);
}

}  // namespace

TEST_CASE("cuda: a fused head and its gradients", "[cuda][rl]") {
  check<double>(1, 1, 1, {}, 1e-12, 1e-12);
  check<double>(9, 5, 17, {.masked = true, .temperature = 0.7}, 1e-12, 1e-12);
  check<double>(70, 33, 130, {.accumulates = true, .strided = true}, 1e-12, 1e-12);
  check<float>(40, 64, 600, {.masked = true, .accumulates = true}, 2e-5, 2e-5);
  check<mlkit::bf16>(33, 32, 200, {.masked = true}, 2e-5, 0.03);
  check<mlkit::f16>(12, 16, 70, {}, 2e-5, 4e-3);
}

TEST_CASE("cuda: a fused head of more rows than are worked on together, and the same bits again", "[cuda][rl]") {
  check<double>(700, 3, 5, {.masked = true}, 1e-12, 1e-11);
  const auto exec = test::exec();
  problem<float> p(600, 16, 90, 23);
  auto hidden = test::on_device(exec, p.hidden), weight = test::on_device(exec, p.weight);
  auto tokens = test::on_device(exec, p.tokens);
  auto dlogp = test::on_device(exec, p.dlogp);
  std::vector<float> first;
  for (const int run : {0, 1}) {
    auto dhidden = test::on_device(exec, p.dhidden), dweight = test::on_device(exec, p.dweight);
    rl::log_probs_backward(
        exec, matrix_view<const float>(hidden.data(), {600, 16}), matrix_view<const float>(weight.data(), {90, 16}),
        vector_view<const std::int64_t>(tokens.view()), {}, {.dlogp = vector_view<const float>(dlogp.view())},
        {.dhidden = matrix_view<float>(dhidden.data(), {600, 16}),
         .dweight = matrix_view<float>(dweight.data(), {90, 16})});
    const auto h = test::to_host(exec, dhidden), w = test::to_host(exec, dweight);
    std::vector<float> all(h.data(), h.data() + h.size());
    all.insert(all.end(), w.data(), w.data() + w.size());
    if (run == 0) first = all;
    CHECK(std::memcmp(all.data(), first.data(), all.size() * sizeof(float)) == 0);
  }
}

TEST_CASE("cuda: a fused head over sequences that lie apart", "[cuda][rl]") {
  const auto exec = test::exec();
  const index_t batch = 3, time = 4, depth = 6, step = time * depth + 10;
  problem<float> p(batch * time, depth, 40, 31);
  for (const std::size_t i : {std::size_t{1}, std::size_t{7}}) {
    p.mask[i] = 0;
    std::fill_n(p.hidden.begin() + static_cast<std::ptrdiff_t>(i) * depth, depth, NAN);
  }
  const auto apart = [&](const std::vector<float>& x) {
    std::vector<float> y(static_cast<std::size_t>(batch * step), 3);
    for (index_t b = 0; b < batch; ++b) std::copy_n(x.begin() + b * time * depth, time * depth, y.begin() + b * step);
    return test::on_device(exec, y);
  };
  auto hidden = apart(p.hidden), dhidden = apart(p.dhidden);
  auto weight = test::on_device(exec, p.weight), dweight = test::on_device(exec, p.dweight);
  auto tokens = test::on_device(exec, std::vector<std::int32_t>(p.tokens.begin(), p.tokens.end()));
  auto mask = test::on_device(exec, p.mask);
  auto logp = test::on_device(exec, p.logp), entropy = test::on_device(exec, p.entropy),
       lse = test::on_device(exec, p.lse), dlogp = test::on_device(exec, p.dlogp),
       dentropy = test::on_device(exec, p.dentropy);
  const auto rows = [&](auto& x) {
    auto* data = x.data();
    return tensor_view<std::remove_pointer_t<decltype(data)>, 2>(data, {batch, time});
  };
  const auto states = [&](auto& x) { return tensor_view<float, 3>(x.data(), {batch, time, depth}, {step, depth, 1}); };
  const tensor_view<const float, 3> h = states(hidden);
  const matrix_view<const float> w(weight.data(), {40, depth});
  rl::log_prob_options<2> options;
  options.mask = rows(mask);
  rl::log_probs(exec, h, w, rows(tokens), options, {.logp = rows(logp), .entropy = rows(entropy), .lse = rows(lse)});
  rl::log_probs_backward(exec, h, w, rows(tokens), options, {.dlogp = rows(dlogp), .dentropy = rows(dentropy)},
                         {.dhidden = states(dhidden), .dweight = matrix_view<float>(dweight.data(), {40, depth})});
  const auto l = test::to_host(exec, logp), e = test::to_host(exec, entropy), s = test::to_host(exec, lse),
             d = test::to_host(exec, dhidden), dw = test::to_host(exec, dweight);
  std::copy_n(l.data(), p.rows, p.logp.begin()), std::copy_n(e.data(), p.rows, p.entropy.begin());
  std::copy_n(s.data(), p.rows, p.lse.begin()), std::copy_n(dw.data(), dw.size(), p.dweight.begin());
  for (index_t b = 0; b < batch; ++b) {
    std::copy_n(d.data() + b * step, time * depth, p.dhidden.begin() + b * time * depth);
    CHECK(std::count(d.data() + b * step + time * depth, d.data() + (b + 1) * step, 3.0f) == 10);
  }
  p.require(2e-5, 2e-5);
}

TEST_CASE("cuda: a fused head of bf16 is as exact as loops in bf16", "[cuda][rl]") {
  const auto exec = test::exec();
  using mlkit::bf16;
  problem<bf16> p(200, 24, 90, 41);
  auto hidden = test::on_device(exec, p.hidden), weight = test::on_device(exec, p.weight),
       dhidden = test::on_device(exec, p.dhidden), dweight = test::on_device(exec, p.dweight);
  auto tokens = test::on_device(exec, p.tokens);
  auto dlogp = test::on_device(exec, p.dlogp);
  std::fill(p.dentropy.begin(), p.dentropy.end(), 0.0f);
  rl::log_probs_backward(
      exec, matrix_view<const bf16>(hidden.data(), {200, 24}), matrix_view<const bf16>(weight.data(), {90, 24}),
      vector_view<const std::int64_t>(tokens.view()), {}, {.dlogp = vector_view<const float>(dlogp.view())},
      {.dhidden = matrix_view<bf16>(dhidden.data(), {200, 24}),
       .dweight = matrix_view<bf16>(dweight.data(), {90, 24})});
  problem<bf16> naive = p;  // the logits' gradient in bf16, sums in f32
  std::vector<float> dh(p.hidden.size()), dw(p.weight.size());
  for (std::size_t i = 0; i < 200; ++i) {
    std::vector<float> z(90);
    float sum = 0;
    for (std::size_t j = 0; j < 90; ++j) {
      for (std::size_t k = 0; k < 24; ++k)
        z[j] += static_cast<float>(p.hidden[i * 24 + k]) * static_cast<float>(p.weight[j * 24 + k]);
      sum += std::exp(z[j]);
    }
    for (std::size_t j = 0; j < 90; ++j) {
      const float is = static_cast<std::int64_t>(j) == p.tokens[i] ? 1.0f : 0.0f;
      const float dz = static_cast<float>(static_cast<bf16>(p.dlogp[i] * (is - std::exp(z[j]) / sum)));
      for (std::size_t k = 0; k < 24; ++k) {
        dh[i * 24 + k] += dz * static_cast<float>(p.weight[j * 24 + k]);
        dw[j * 24 + k] += dz * static_cast<float>(p.hidden[i * 24 + k]);
      }
    }
  }
  for (std::size_t i = 0; i < dh.size(); ++i) naive.dhidden[i] = static_cast<bf16>(dh[i]);
  for (std::size_t i = 0; i < dw.size(); ++i) naive.dweight[i] = static_cast<bf16>(dw[i]);
  const auto h = test::to_host(exec, dhidden), w = test::to_host(exec, dweight);
  std::copy_n(h.data(), h.size(), p.dhidden.begin()), std::copy_n(w.data(), w.size(), p.dweight.begin());
  const auto have = p.check(), allowed = naive.check();
  CHECK(have.dhidden <= 2 * allowed.dhidden);
  CHECK(have.dweight <= 2 * allowed.dweight);
}

TEST_CASE("cuda: a fused head refuses what does not fit, and writes nothing", "[cuda][rl]") {
  const auto exec = test::exec();
  auto hidden = test::on_device(exec, std::vector<float>(24)), weight = test::on_device(exec, std::vector<float>(40));
  auto out = test::on_device(exec, std::vector<float>(40, 7.0f));
  auto tokens = test::on_device(exec, std::vector<std::int32_t>(6));
  const matrix_view<const float> h(hidden.data(), {6, 4}), w(weight.data(), {10, 4}), narrow(weight.data(), {10, 3});
  const vector_view<const std::int32_t> y(tokens.view()), few(tokens.data(), {5});
  const vector_view<float> logp(out.data(), {6});
  CHECK_THROWS_WITH(rl::log_probs(exec, h, narrow, y, {}, logp),
                    "mlkit::shape_error: rl::log_probs: lm_head has 3 columns, but hidden has 4");
  CHECK_THROWS_WITH(rl::log_probs(exec, h, w, few, {}, logp),
                    "mlkit::shape_error: rl::log_probs: tokens has shape [5], but hidden's rows has [6]");
  CHECK_THROWS_WITH(rl::log_probs(exec, h, w, y, {.temperature = 0}, logp),
                    "mlkit::value_error: rl::log_probs: temperature = 0 is not above 0 and finite");
  CHECK_THROWS_WITH(rl::cross_entropy(exec, h, w, y, {}, {.dweight = matrix_view<float>(out.data(), {10, 3})}),
                    "mlkit::shape_error: rl::cross_entropy: dweight has shape [10, 3], but lm_head has [10, 4]");
  CHECK_THROWS_WITH(rl::cross_entropy(exec, h, w, y, {.label_smoothing = 0.5}),
                    Catch::Contains("label_smoothing = 0.5 needs the mean of all logits"));
  CHECK_THROWS_WITH(rl::cross_entropy(exec, h, w, y, {}, {.dweight = matrix_view<float>(weight.data(), {10, 4})}),
                    "mlkit::shape_error: rl::cross_entropy: dweight [10, 4] overlaps lm_head [10, 4]");
  const auto have = test::to_host(exec, out);
  CHECK(std::count(have.data(), have.data() + 40, 7.0f) == 40);
}

#if !defined(MLKIT_TEST_ON_CPU)

TEST_CASE("cuda: logits of a fused head take less than a twentieth of all, and a fixed size at most", "[cuda][rl]") {
  for (const index_t rows : {16384, 32768, 262144})
    for (const index_t classes : {32000, 128256})
      for (const index_t bytes : {4, 6}) {  // with a gradient that takes the logits' place, and with one of bf16
        const index_t at_once = rl::detail::head_rows_at_once(rows, classes * 4, classes * bytes);
        CHECK(at_once >= 256);
        CHECK(20 * at_once * bytes < 4 * rows);
        CHECK(at_once * classes * bytes <= (index_t{512} << 20));
      }
  CHECK(rl::detail::head_rows_at_once(70, 400, 400) == 70);
}

TEST_CASE("cuda: a fused head's token outside the vocabulary is NaN in its row", "[cuda][rl]") {
  const auto exec = test::exec();
  problem<float> p(4, 3, 7, 51);
  auto hidden = test::on_device(exec, p.hidden), weight = test::on_device(exec, p.weight),
       dhidden = test::on_device(exec, p.dhidden), logp = test::on_device(exec, p.logp);
  auto tokens = test::on_device(exec, std::vector<std::int64_t>{3, -1, 7, 6});
  auto slopes = test::on_device(exec, p.dlogp);
  const matrix_view<const float> h(hidden.data(), {4, 3}), w(weight.data(), {7, 3});
  const vector_view<const std::int64_t> y(tokens.view());
  rl::log_probs(exec, h, w, y, {}, vector_view<float>(logp.view()));
  rl::log_probs_backward(exec, h, w, y, {}, {.dlogp = vector_view<const float>(slopes.view())},
                         {.dhidden = matrix_view<float>(dhidden.data(), {4, 3})});
  const auto l = test::to_host(exec, logp), d = test::to_host(exec, dhidden);
  for (index_t i = 0; i < 4; ++i) {
    CHECK(std::isnan(l(i)) == (i == 1 || i == 2));
    for (index_t k = 0; k < 3; ++k) CHECK(std::isnan(d(3 * i + k)) == (i == 1 || i == 2));
  }
}

#endif

TEST_CASE("cuda: cross-entropy over a fused head", "[cuda][rl]") {
  const auto exec = test::exec();
  const index_t batch = 3, time = 7, depth = 20, classes = 50, rows = batch * time;
  problem<float> p(rows, depth, classes, 5);
  for (index_t i = 0; i < rows; i += 4) p.tokens[static_cast<std::size_t>(i)] = -100;
  auto hidden = test::on_device(exec, p.hidden), weight = test::on_device(exec, p.weight),
       dhidden = test::on_device(exec, p.hidden);
  auto labels = test::on_device(exec, p.tokens);
  const rl::cross_entropy_result have = rl::cross_entropy(
      exec, mlkit::tensor_view<const float, 3>(hidden.view().data, {batch, time, depth}),
      matrix_view<const float>(weight.view().data, {classes, depth}),
      matrix_view<const std::int64_t>(labels.view().data, {batch, time}), {.shift = true, .temperature = 0.8},
      {.dhidden = mlkit::tensor_view<float, 3>(dhidden.view().data, {batch, time, depth})});
  double loss = 0, count = 0;
  std::vector<double> want(p.hidden.size());
  for (const bool second : {false, true})
    for (index_t i = 0; i < rows; ++i) {
      const std::int64_t y = (i + 1) % time == 0 ? -100 : p.tokens[static_cast<std::size_t>(i + 1)];
      if (y == -100) continue;
      std::vector<double> z(static_cast<std::size_t>(classes));
      for (index_t j = 0; j < classes; ++j)
        for (index_t k = 0; k < depth; ++k)
          z[static_cast<std::size_t>(j)] += static_cast<double>(p.hidden[static_cast<std::size_t>(i * depth + k)]) *
                                            static_cast<double>(p.weight[static_cast<std::size_t>(j * depth + k)]);
      const logits_reference::row r(z, y, 0.8);
      if (!second) {
        loss -= r.logp, count += 1;
        continue;
      }
      for (index_t j = 0; j < classes; ++j)
        for (index_t k = 0; k < depth; ++k)
          want[static_cast<std::size_t>(i * depth + k)] +=
              r.gradient(j, y, 0.8, -1 / count, 0) *
              static_cast<double>(p.weight[static_cast<std::size_t>(j * depth + k)]);
    }
  CHECK(have.loss == Approx(loss / count).epsilon(1e-5));
  CHECK(static_cast<double>(have.count) == count);
  const auto d = test::to_host(exec, dhidden);
  bool good = true;
  for (std::size_t i = 0; i < want.size(); ++i)
    good = good && std::fabs(static_cast<double>(d(static_cast<index_t>(i))) - want[i]) < 1e-5;
  CHECK(good);
}
