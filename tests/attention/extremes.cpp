// Nothing of everything, and too much of it: empty dimensions, one key, scores and values near the ends of what a dtype
// holds, and NaN where nobody may look.
#include <limits>

#include "reference.hpp"

namespace attention = mlkit::attention;
using namespace attention_reference;

namespace {

// One pipeline, so that it is compiled once for each dtype.
struct stages {
  double scale = 1;
  mlkit::tensor<float, 4> bias{{1, 1, 1, 1}};
  std::vector<int> lengths;

  auto pipeline() const {
    return attention::scores{attention::scale{scale}, attention::bias{bias}, attention::key_lengths{lengths}};
  }
  meaning means() const {
    meaning m;
    m.score = [this](double x, index_t b, index_t h, index_t i, index_t j) {
      const auto& e = bias.extents();
      return j < lengths[static_cast<std::size_t>(b)]
                 ? scale * x + static_cast<double>(bias(b % e[0], h % e[1], i % e[2], j % e[3]))
                 : -inf;
    };
    m.derivative = [this](double, index_t, index_t, index_t, index_t) { return scale; };
    return m;
  }
};

// The error is at most twice that of loops whose matrices are of type Stored, and so many roundings to T.
template <class Stored, class T>
void check_errors(problem<T>& p, const stages& s, double roundings) {
  p.run(s.pipeline());
  const result want = p.template naive<double, double>(s.means());
  const errors loops(want, p.template naive<float, Stored>(s.means())), ours(want, p.written());
  check_errors<T>(loops, ours, roundings);
}

template <class T>
void poison_rows(mlkit::tensor<T, 4>& t, index_t b, index_t first, index_t last) {
  for (index_t h = 0; h < t.extent(1); ++h)
    for (index_t j = first; j < last; ++j)
      for (index_t c = 0; c < t.extent(3); ++c) t(b, h, j, c) = static_cast<T>(std::nanf(""));
}

}  // namespace

TEST_CASE("dimensions of zero and one", "[attention][extremes]") {
  const std::array<index_t, 7> usual{2, 4, 2, 5, 30, 6, 3};
  for (std::size_t dimension = 0; dimension < 7; ++dimension)
    for (const index_t extent : {0, 1}) {
      auto n = usual;
      n[dimension] = extent;
      if (dimension == 1) n[2] = extent;               // heads, and those of keys with them
      if (dimension == 2) n[1] = extent == 0 ? 0 : 4;  // heads of keys: none serve none
      problem<float> p(n[0], n[1], n[2], n[3], n[4], n[5], n[6]);
      stages s;
      s.lengths.assign(static_cast<std::size_t>(n[0]), static_cast<int>(n[4]));
      INFO("dimension " << dimension << " is " << extent);
      CHECK(p.error(s.pipeline(), s.means()) < 1e-5);
      s.bias = mlkit::tensor<float, 4>({n[0], 1, n[3], n[4]});
      fill<float>(s.bias, 8);
      CHECK(p.error(s.pipeline(), s.means()) < 1e-5);
    }
  problem<float> p(2, 0, 2, 5, 30, 6, 3);  // keys without queries' heads have gradients of zero
  stages s;
  s.lengths = {30, 30};
  CHECK(p.error(s.pipeline(), s.means()) == 0);
}

TEMPLATE_TEST_CASE("one key gives its value, bit for bit", "[attention][extremes]", float, mlkit::bf16, mlkit::f16) {
  using T = TestType;
  problem<T> p(2, 4, 2, 70, 30, 6, 40);
  std::fill(p.dlse.begin(), p.dlse.end(), 0.0f);
  stages s;
  s.lengths = {1, 1};
  p.run(s.pipeline());
  double most = 0;
  for (index_t b = 0; b < 2; ++b)
    for (index_t h = 0; h < 4; ++h)
      for (index_t i = 0; i < 70; ++i) {
        REQUIRE(std::memcmp(&p.out(b, h, i, 0), &p.v(b, h / 2, 0, 0), 40 * sizeof(T)) == 0);
        for (index_t c = 0; c < 6; ++c) most = std::max(most, std::fabs(static_cast<double>(p.dq(b, h, i, c))));
      }
  CHECK(most < 1e-4);  // no softmax over one key depends on its score
}

TEMPLATE_TEST_CASE("scores of 10,000", "[attention][extremes]", float, mlkit::bf16, mlkit::f16) {
  using T = TestType;
  problem<T> p(1, 2, 1, 65, 250, 4, 5);
  fill<T>(p.q, 1, 100), fill<T>(p.k, 2, 100);  // beyond what f16 holds, before the scale
  stages s;
  s.scale = 0.5;
  s.lengths = {250};
  check_errors<float>(p, s, 8);
  // The largest comes last, so that everything before it is scaled away.
  for (index_t i = 0; i < 65; ++i)
    for (index_t c = 0; c < 4; ++c) p.q(0, 0, i, c) = static_cast<T>(1.0f), p.k(0, 0, 249, c) = static_cast<T>(9000.0f);
  check_errors<float>(p, s, 8);
}

TEMPLATE_TEST_CASE("biases of minus infinity, and others that are as large as can be", "[attention][extremes]", float,
                   mlkit::bf16, mlkit::f16) {
  using T = TestType;
  problem<T> p(2, 2, 1, 70, 250, 6, 5);
  stages s;
  s.lengths = {250, 33};
  s.bias = mlkit::tensor<float, 4>({1, 2, 70, 250});
  constexpr float least = std::numeric_limits<float>::lowest();
  for (index_t h = 0; h < 2; ++h)
    for (index_t i = 0; i < 70; ++i)
      for (index_t j = 0; j < 250; ++j) {
        float& b = s.bias(0, h, i, j);
        if (i % 7 == 0) b = -INFINITY;                            // a row without keys
        if (i % 7 == 1) b = j == 240 || j == 20 ? 0 : -INFINITY;  // keys in later blocks alone, or none
        if (i % 7 == 2) b = j % 2 == 0 ? -1e30f : 0;              // masked, as far as f32 can tell
        if (i % 7 == 3) b = j == 30 || j > 245 ? -5 : least;      // the least of all, until a later block
        if (i % 7 == 4) b = j % 5 == 0 ? std::nextafter(0.0f, -1.0f) : 0;
        if (i % 7 == 5) b = j < 30 ? -INFINITY : h == 0 ? -80 : 0;
      }
  for (index_t i = 0; i < 70; i += 7) p.dlse(0, 1, i) = std::nanf("");  // merging two of nothing is 0 / 0
  check_errors<float>(p, s, std::is_same_v<T, float> ? 80 : 4);         // an lse of -80 is rounded by as much
  for (index_t i = 0; i < 70; i += 7) {
    REQUIRE(p.lse(0, 1, i) == -INFINITY);
    REQUIRE(p.out(0, 1, i, 4) == static_cast<T>(0.0f));
    REQUIRE(p.dq(0, 1, i, 5) == static_cast<T>(0.0f));
    REQUIRE(p.dbias(0, 1, i, 249) == static_cast<T>(0.0f));
  }
  // A row that is masked as a whole by numbers is one of equal probabilities.
  for (const float low : {-1e30f, least, 1e30f}) {
    std::fill(s.bias.begin(), s.bias.end(), low);
    attention::forward(mlkit::cpu{}, p.q, p.k, p.v, s.pipeline(), p.out, p.lse);
    CHECK(std::all_of(p.lse.begin(), p.lse.end(), [&](float x) { return x == low; }));
    for (index_t c = 0; c < 5; ++c) {
      double mean = 0;
      for (index_t j = 0; j < 33; ++j) mean += static_cast<double>(p.v(1, 0, j, c)) / 33;
      for (index_t i = 0; i < 70; ++i)
        REQUIRE(std::fabs(static_cast<double>(p.out(1, 1, i, c)) - mean) < 4 * rounding<T>);
    }
    // Its lse has lost the number of keys, but where no gradient comes in, none goes out.
    std::fill(p.dout.begin(), p.dout.end(), static_cast<T>(0.0f)), std::fill(p.dlse.begin(), p.dlse.end(), 0.0f);
    p.run(s.pipeline());
    for (const auto* t : {&p.dq, &p.dk, &p.dv, &p.dbias})
      CHECK(std::all_of(t->begin(), t->end(), [](T x) { return x == static_cast<T>(0.0f); }));
  }
  std::fill(s.bias.begin(), s.bias.end(), -INFINITY);
  p.run(s.pipeline());
  for (const auto* t : {&p.out, &p.dq, &p.dk, &p.dv, &p.dbias})
    CHECK(std::all_of(t->begin(), t->end(), [](T x) { return x == static_cast<T>(0.0f); }));
}

TEMPLATE_TEST_CASE("values of +-1e30", "[attention][extremes]", float, mlkit::bf16) {
  using T = TestType;
  problem<T> p(1, 2, 2, 70, 250, 6, 5);
  stages s;
  s.scale = 0.4;
  s.lengths = {250};
  s.bias = mlkit::tensor<float, 4>({1, 1, 1, 250});
  fill<T>(p.v, 3, 1e30f);
  check_errors<T>(p, s, 2);
  fill<T>(p.v, 3), fill<T>(p.dout, 4, 1e30f);
  check_errors<T>(p, s, 2);
  fill<T>(p.dout, 4), fill<T>(p.q, 1, 1e30f), fill<T>(p.k, 2, 1e-30f);
  check_errors<T>(p, s, 2);
}

TEMPLATE_TEST_CASE("keys and values beyond a length may be NaN, forward and backward", "[attention][extremes]", float,
                   mlkit::bf16, mlkit::f16) {
  using T = TestType;
  problem<T> p(6, 2, 1, 67, 251, 6, 5);
  stages s;
  s.scale = 0.4;
  s.lengths = {251, 0, 1, 25, 241, 250};
  for (index_t b = 0; b < 6; ++b) {
    poison_rows(p.k, b, s.lengths[static_cast<std::size_t>(b)], 251);
    poison_rows(p.v, b, s.lengths[static_cast<std::size_t>(b)], 251);
  }
  s.bias = mlkit::tensor<float, 4>({6, 1, 67, 251});
  for (index_t b = 0; b < 6; ++b)
    for (index_t i = 0; i < 67; ++i)
      for (index_t j = s.lengths[static_cast<std::size_t>(b)]; j < 251; ++j) s.bias(b, 0, i, j) = std::nanf("");
  check_errors<T>(p, s, 2);
}

TEMPLATE_TEST_CASE("NaN in one sequence of a packed batch, or one sequence of a batch, stays there",
                   "[attention][extremes]", float, mlkit::bf16) {
  using T = TestType;
  const std::vector<std::int32_t> query_starts{0, 5, 38, 41}, key_starts{0, 7, 32, 35};
  const auto run = [&](bool poisoned) {
    struct {
      mlkit::tensor<T, 3> q{{41, 2, 6}}, k{{35, 1, 6}}, v{{35, 1, 5}}, dout{{41, 2, 5}}, out{{41, 2, 5}},
          dq{{41, 2, 6}}, dk{{35, 1, 6}}, dv{{35, 1, 5}};
      mlkit::matrix<float> lse{{2, 41}};
    } t;
    fill<T>(t.q, 1), fill<T>(t.k, 2), fill<T>(t.v, 3), fill<T>(t.dout, 4);
    const auto spoil = [&](auto& x, index_t first, index_t last) {
      for (index_t i = first; i < last; ++i)
        for (index_t h = 0; h < x.extent(1); ++h)
          for (index_t c = 0; c < x.extent(2); ++c) x(i, h, c) = static_cast<T>(std::nanf(""));
    };
    if (poisoned) spoil(t.q, 5, 38), spoil(t.dout, 5, 38), spoil(t.k, 7, 32), spoil(t.v, 7, 32);
    const attention::sequences packed(query_starts, key_starts);
    const attention::scores<attention::scale> scores{attention::scale{0.4}};
    attention::forward(mlkit::cpu{}, t.q, t.k, t.v, packed, scores, t.out, t.lse);
    attention::backward(mlkit::cpu{}, t.q, t.k, t.v, packed, scores, t.out, t.lse, t.dout, t.dq, t.dk, t.dv);
    return t;
  };
  const auto clean = run(false), dirty = run(true);
  const auto same = [](const auto& a, const auto& b, index_t first, index_t last) {
    for (index_t i = 0; i < a.extent(0); ++i)
      for (index_t h = 0; h < a.extent(1); ++h)
        for (index_t c = 0; c < a.extent(2); ++c) {
          const bool inside = i >= first && i < last;
          if (inside ? !std::isnan(static_cast<float>(b(i, h, c))) : a(i, h, c) != b(i, h, c)) return false;
        }
    return true;
  };
  CHECK(same(clean.out, dirty.out, 5, 38));
  CHECK(same(clean.dq, dirty.dq, 5, 38));
  CHECK(same(clean.dk, dirty.dk, 7, 32));
  CHECK(same(clean.dv, dirty.dv, 7, 32));

  problem<T> whole(3, 2, 1, 67, 51, 6, 5), part(3, 2, 1, 67, 51, 6, 5);
  stages s;
  s.lengths = {51, 51, 51};
  for (auto* t : {&part.q, &part.dout}) poison_rows(*t, 1, 0, 67);
  for (auto* t : {&part.k, &part.v}) poison_rows(*t, 1, 0, 51);
  whole.run(s.pipeline()), part.run(s.pipeline());
  const auto same_outside = [](const auto& a, const auto& b) {
    const auto n = a.size() / 3;
    return std::equal(a.begin(), a.begin() + n, b.begin()) && std::equal(a.begin() + 2 * n, a.end(), b.begin() + 2 * n);
  };
  CHECK(same_outside(whole.out, part.out));
  CHECK(same_outside(whole.dq, part.dq));
  CHECK(same_outside(whole.dk, part.dk));
  CHECK(same_outside(whole.dv, part.dv));
}

TEST_CASE("NaN in one query or its gradient stays there, but for keys", "[attention][extremes]") {
  problem<float> whole(1, 2, 1, 130, 51, 6, 5), part(1, 2, 1, 130, 51, 6, 5);
  stages s;
  s.lengths = {51};
  part.q(0, 1, 70, 2) = part.dout(0, 0, 9, 1) = std::nanf("");
  whole.run(s.pipeline()), part.run(s.pipeline());
  for (index_t h = 0; h < 2; ++h)
    for (index_t i = 0; i < 130; ++i) {
      const bool of_query = h == 1 && i == 70, of_gradient = h == 0 && i == 9;
      REQUIRE(std::isnan(part.lse(0, h, i)) == of_query);
      for (index_t c = 0; c < 5; ++c)
        REQUIRE((of_query ? std::isnan(part.out(0, h, i, c)) : part.out(0, h, i, c) == whole.out(0, h, i, c)));
      for (index_t c = 0; c < 6; ++c)
        REQUIRE(
            (of_query || of_gradient ? std::isnan(part.dq(0, h, i, c)) : part.dq(0, h, i, c) == whole.dq(0, h, i, c)));
    }
}

namespace {

// log(1 + s), which is no number where a mask hides the score.
struct logarithm {
  double operator()(double s) const { return std::log1p(s); }
  double derivative(double s) const { return 1 / (1 + s); }
};

}  // namespace

TEST_CASE("scores that are no numbers where a mask hides them", "[attention][extremes]") {
  problem<double> p(1, 1, 1, 40, 40, 5, 7);
  std::vector<std::uint8_t> bits(40 * 40);
  for (index_t i = 0; i < 40; ++i)
    for (index_t j = 0; j < 40; ++j) {
      double x = 0;
      for (index_t c = 0; c < 5; ++c) x += p.q(0, 0, i, c) * p.k(0, 0, j, c);
      bits[static_cast<std::size_t>(i * 40 + j)] = x > -0.9;
    }
  const mlkit::matrix_view<const std::uint8_t> mask(bits.data(), {40, 40});
  meaning m;
  m.score = [&](double x, index_t, index_t, index_t i, index_t j) {
    return mask(i, j) ? 2 * std::tanh(std::log1p(x) / 2) : -inf;
  };
  m.derivative = [&](double x, index_t, index_t, index_t, index_t) {
    const double t = std::tanh(std::log1p(x) / 2);
    return (1 - t * t) / (1 + x);
  };
  CHECK(
      p.error(attention::scores{attention::scale{1}, logarithm{}, attention::softcap{2}, attention::boolean_mask{mask}},
              m) < tight);
}

TEST_CASE("probabilities that fade out, and the caller's own subnormal numbers", "[attention][decode][extremes]") {
  const volatile float least = std::numeric_limits<float>::min();
  const auto halves = [&] { return static_cast<float>(least * 0.5f) > 0; };
  REQUIRE(halves());
  problem<float> p(1, 2, 1, 40, 300, 8, 8);
  stages s;
  s.lengths = {300};
  s.bias = mlkit::tensor<float, 4>({1, 1, 40, 300});
  for (index_t i = 0; i < 40; ++i)  // through all that f32 holds, up and down
    for (index_t j = 0; j < 300; ++j)
      s.bias(0, 0, i, j) = static_cast<float>(-std::fabs(static_cast<double>(7 * i - j)) * 0.7);
  check_errors<float>(p, s, 8);
  CHECK(halves());
  mlkit::tensor<float, 3> q({1, 2, 8}), out({1, 2, 8});
  const std::vector<int> lengths{300};
  attention::decode(mlkit::cpu{}, q, attention::contiguous(p.k, p.v, lengths), out);
  CHECK(halves());
}

TEST_CASE("decode over nothing, one entry and scores of 10,000", "[attention][decode][extremes]") {
  const mlkit::cpu exec;
  for (const auto& [batch, heads, d, d_v, n] :
       std::vector<std::array<index_t, 5>>{{0, 4, 6, 5, 3}, {2, 0, 6, 5, 3}, {2, 4, 0, 5, 3}, {2, 4, 6, 0, 3}}) {
    mlkit::tensor<float, 3> q({batch, heads, d}), out({batch, heads, d_v});
    mlkit::tensor<float, 4> k({batch, heads / 2, n, d}), v({batch, heads / 2, n, d_v});
    mlkit::matrix<float> lse({batch, heads});
    fill<float>(q, 1), fill<float>(v, 3);
    const std::vector<int> lengths(static_cast<std::size_t>(batch), 3);
    attention::decode(exec, q, attention::contiguous(k, v, lengths), out, {}, lse);
    for (const float x : lse) CHECK(x == Approx(std::log(3.0)));  // keys of zeros
    if (d == 0)
      for (index_t c = 0; c < d_v; ++c)
        CHECK(out(1, 3, c) == Approx((v(1, 1, 0, c) + v(1, 1, 1, c) + v(1, 1, 2, c)) / 3));
  }
  mlkit::tensor<mlkit::f16, 3> q({1, 3, 4}), out({1, 3, 70});
  mlkit::tensor<mlkit::f16, 4> k({1, 1, 100, 4}), v({1, 1, 100, 70});
  mlkit::matrix<float> lse({1, 3});
  fill<mlkit::f16>(q, 1, 100), fill<mlkit::f16>(k, 2, 100), fill<mlkit::f16>(v, 3);
  for (const int n : {1, 100}) {
    const std::vector<int> lengths{n};
    attention::decode(exec, q, attention::contiguous(k, v, lengths), out, {.scale = 1}, lse);
    for (index_t h = 0; h < 3; ++h) {
      index_t best = 0;
      double top = -inf, next = -inf;
      for (index_t j = 0; j < n; ++j) {
        double x = 0;
        for (index_t c = 0; c < 4; ++c) x += static_cast<double>(q(0, h, c)) * static_cast<double>(k(0, 0, j, c));
        if (x > top)
          next = top, top = x, best = j;
        else
          next = std::max(next, x);
      }
      REQUIRE(top - next > 50);  // so that the best is all there is
      CHECK(lse(0, h) == Approx(top));
      CHECK(std::memcmp(&out(0, h, 0), &v(0, 0, best, 0), 70 * sizeof(mlkit::f16)) == 0);
    }
  }
}
