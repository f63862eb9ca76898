// Every ordered pair of stages that change scores, with each mask, in f64; and derivatives by differences of forward.
#include "reference.hpp"

namespace attention = mlkit::attention;
using attention::align;
using namespace attention_reference;

namespace {

constexpr index_t batch = 2, heads = 2, tokens = 60;
constexpr index_t far = attention::window::unlimited;

// A stage of a user's own that can be switched off.
struct bent {
  double size = 0;
  double operator()(double s, const attention::position& at) const {
    return s + size * (0.1 * s * s + 0.02 * static_cast<double>(at.j) - 0.03 * static_cast<double>(at.i + at.h));
  }
  double derivative(double s, const attention::position&) const { return 1 + size * 0.2 * s; }
};

// One pipeline is all pairs, so that its kernels are compiled once: every stage stands before every other, the masks
// stand between them, and each is a no-op until it is switched on.
struct everything {
  // Without effect: a cap so large that tanh is linear to the last bit but one.
  double scales[2] = {1, 1}, caps[2] = {1e9, 1e9}, bends[2] = {0, 0};
  bool alibis[2] = {false, false};
  double p = 0;
  mlkit::vector<double> no_slopes{{heads}}, slopes{{heads}}, sinks{{heads}};
  mlkit::tensor<double, 4> bias;
  attention::window window{far, far, align::top_left};
  std::vector<std::uint8_t> bits = std::vector<std::uint8_t>(batch * tokens * tokens, 1);
  std::vector<int> ids = std::vector<int>(tokens, 0), lengths = std::vector<int>(batch, tokens);
  std::vector<std::uint8_t> block_bits = std::vector<std::uint8_t>(heads * 4 * 3, 1);

  explicit everything(const mlkit::extents_t<4>& bias_shape = {1, heads, tokens, tokens}) : bias(bias_shape) {
    slopes(0) = 0.05, slopes(1) = 0.02;
    std::fill(sinks.begin(), sinks.end(), -inf);
  }
  mlkit::tensor_view<const std::uint8_t, 4> mask() const { return {bits.data(), {batch, 1, tokens, tokens}}; }
  mlkit::tensor_view<const std::uint8_t, 3> blocks() const { return {block_bits.data(), {heads, 4, 3}}; }

  // Calls f with the stages that change scores.
  template <class F>
  auto with_stages(F&& f) const {
    const auto& before = alibis[0] ? slopes : no_slopes;
    const auto& after = alibis[1] ? slopes : no_slopes;
    return f(attention::scale{scales[0]}, attention::softcap{caps[0]}, attention::alibi{before}, bent{bends[0]},
             attention::bias{bias}, bent{bends[1]}, attention::alibi{after}, attention::softcap{caps[1]},
             attention::scale{scales[1]});
  }
  template <class Mask>
  auto pipeline_with(Mask mask_of_runs) const {
    return with_stages(
        [&](auto scale, auto cap, auto slope, auto bend, auto b, auto bend_2, auto slope_2, auto cap_2, auto scale_2) {
          return attention::scores{attention::documents{ids},
                                   scale,
                                   cap,
                                   attention::boolean_mask{mask()},
                                   slope,
                                   bend,
                                   b,
                                   mask_of_runs,
                                   bend_2,
                                   attention::key_lengths{lengths},
                                   slope_2,
                                   cap_2,
                                   scale_2,
                                   attention::block_sparse{blocks(), 16, 25},
                                   attention::sinks{sinks},
                                   attention::dropout{.p = p, .seed = 3, .stream = 9}};
        });
  }
  auto pipeline() const { return pipeline_with(window); }

  bool sees(index_t b, index_t h, index_t i, index_t j) const {
    const auto at = [](index_t x) { return static_cast<std::size_t>(x); };
    return ids[at(i)] == ids[at(j)] && mask()(b, 0, i, j) && j >= i - window.left && j <= i + window.right &&
           j < lengths[at(b)] && blocks()(h, i / 16, j / 25);
  }
  // The score with its derivatives by q . k and by the bias.
  struct dual {
    double value, by_dot, by_bias;
    void through(double v, double slope) { value = v, by_dot *= slope, by_bias *= slope; }
  };
  dual score(double dot, index_t b, index_t h, index_t i, index_t j) const {
    dual s{dot, 1, 0};
    const auto scale = [&](double c) { s.through(c * s.value, c); };
    const auto cap = [&](double c) {
      if (c > 1e6) return;
      const double t = std::tanh(s.value / c);
      s.through(c * t, 1 - t * t);
    };
    const auto slope = [&](bool on) {
      if (on) s.value -= slopes(h) * std::fabs(static_cast<double>(i - j));
    };
    const auto bend = [&](double size) {
      s.through(s.value + size * (0.1 * s.value * s.value + 0.02 * static_cast<double>(j) -
                                  0.03 * static_cast<double>(i) - 0.03 * static_cast<double>(h)),
                1 + 0.2 * size * s.value);
    };
    scale(scales[0]), cap(caps[0]), slope(alibis[0]), bend(bends[0]);
    const auto& e = bias.extents();
    s.value += bias(b % e[0], h % e[1], i % e[2], j % e[3]);
    s.by_bias = 1;
    bend(bends[1]), slope(alibis[1]), cap(caps[1]), scale(scales[1]);
    return s;
  }
  meaning means() const {
    meaning m;
    m.score = [this](double x, index_t b, index_t h, index_t i, index_t j) {
      return sees(b, h, i, j) ? score(x, b, h, i, j).value : -inf;
    };
    m.derivative = [this](double x, index_t b, index_t h, index_t i, index_t j) { return score(x, b, h, i, j).by_dot; };
    m.bias_derivative = [this](double x, index_t b, index_t h, index_t i, index_t j) {
      return score(x, b, h, i, j).by_bias;
    };
    m.sink = [this](index_t h) { return sinks(h); };
    const mlkit::random_stream random{3, 9};
    m.factor = [this, random](index_t b, index_t h, index_t i, index_t j) {
      const auto block =
          (static_cast<std::uint64_t>(b * heads + h) << 40) + static_cast<std::uint64_t>(i * (tokens / 4) + j / 4);
      const bool dropped =
          random.block(block)[static_cast<std::size_t>(j % 4)] < static_cast<std::uint32_t>(p * 0x1p32);
      return dropped ? 0.0 : 1 / (1 - p);
    };
    return m;
  }
};

const std::vector<std::string> values{"scale", "softcap", "alibi", "user's", "bias"};
const std::vector<std::string> masks{"none", "causal", "window", "boolean", "documents", "blocks", "lengths"};

void switch_on_value(everything& e, const std::string& name, int place) {
  if (name == "scale") e.scales[place] = place == 0 ? 0.6 : -1.3;
  if (name == "softcap") e.caps[place] = place == 0 ? 1.5 : 2.5;
  if (name == "alibi") e.alibis[place] = true;
  if (name == "user's") e.bends[place] = place == 0 ? 0.5 : -0.7;
  if (name == "bias") fill<double>(e.bias, 20, 0.5f);
}
void switch_on_mask(everything& e, const std::string& name) {
  const mlkit::random_stream random{5, 6};
  if (name == "causal") e.window = {far, 0, align::top_left};
  if (name == "window") e.window = {7, 3, align::bottom_right};
  if (name == "boolean")
    for (std::size_t i = 0; i < e.bits.size(); ++i) e.bits[i] = i / tokens % tokens != 9 && random.bits(i) % 3 != 0;
  if (name == "documents")
    for (std::size_t i = 0; i < e.ids.size(); ++i) e.ids[i] = i < 25 ? 4 : i < 26 ? 5 : 1;
  if (name == "blocks")
    for (std::size_t i = 0; i < e.block_bits.size(); ++i) e.block_bits[i] = random.bits(1000 + i) % 2 != 0;
  if (name == "lengths") e.lengths = {41, 25};
}

problem<double> inputs() { return {batch, heads, 1, tokens, tokens, 5, 3}; }

}  // namespace

TEST_CASE("every pair of stages, in order, with each mask", "[attention][pairs]") {
  problem<double> p = inputs();
  for (const std::string& first : values)
    for (const std::string& second : values)
      for (const std::string& mask : masks) {
        if (first == "bias" && second == "bias") continue;
        everything e;
        switch_on_value(e, first, 0);
        switch_on_value(e, second, 1);
        switch_on_mask(e, mask);
        INFO(first << ", then " << second << ", mask " << mask);
        if (mask == "causal")
          CHECK(p.error(e.pipeline_with(attention::causal{}), e.means()) < tight);
        else
          CHECK(p.error(e.pipeline(), e.means()) < tight);
      }
}

TEST_CASE("every stage at once, over biases of every shape", "[attention][pairs]") {
  problem<double> p = inputs();
  for (const mlkit::extents_t<4>& shape : std::vector<mlkit::extents_t<4>>{{batch, heads, tokens, tokens},
                                                                           {1, 1, tokens, tokens},
                                                                           {batch, 1, 1, tokens},
                                                                           {1, heads, tokens, 1},
                                                                           {1, 1, 1, 1}}) {
    everything e(shape);
    for (const std::string& name : values)
      for (const int place : {0, 1}) switch_on_value(e, name, place);
    for (const std::string& name : masks) switch_on_mask(e, name);
    e.sinks(0) = 0.5, e.sinks(1) = -1;
    e.p = 0.3;
    INFO("bias " << mlkit::detail::shape_text<4>(shape));
    CHECK(p.error(e.pipeline(), e.means()) < tight);
  }
}

TEST_CASE("gradients are what differences of forward say", "[attention][pairs]") {
  problem<double> p = inputs();
  everything e({1, heads, tokens, 1});
  for (const std::string& name : values)
    for (const int place : {0, 1}) switch_on_value(e, name, place);
  switch_on_mask(e, "window"), switch_on_mask(e, "boolean"), switch_on_mask(e, "lengths");
  e.sinks(0) = 0.5, e.sinks(1) = -1;
  e.p = 0.2;
  const auto loss = [&] {
    attention::forward(mlkit::cpu{}, p.q, p.k, p.v, e.pipeline(), p.out, p.lse);
    double sum = 0;
    for (index_t i = 0; i < p.out.size(); ++i) sum += p.out.data()[i] * p.dout.data()[i];
    for (index_t i = 0; i < p.lse.size(); ++i) sum += p.lse.data()[i] == -inf ? 0 : p.lse.data()[i] * p.dlse.data()[i];
    return sum;
  };
  p.run(e.pipeline());
  const auto check = [&](const char* name, auto& x, const auto& gradient, index_t step) {
    double size = 0;
    for (const double g : gradient) size = std::max(size, std::fabs(g));
    REQUIRE(size > 0.1);
    for (index_t i = 0; i < x.size(); i += step) {
      constexpr double h = 1e-5;
      const double there = x.data()[i];
      x.data()[i] = there + h;
      const double above = loss();
      x.data()[i] = there - h;
      const double below = loss();
      x.data()[i] = there;
      INFO(name << " [" << i << "]");
      CHECK(gradient.data()[i] == Approx((above - below) / (2 * h)).margin(1e-8 * size));
    }
  };
  check("q", p.q, p.dq, 67);
  check("k", p.k, p.dk, 67);
  check("v", p.v, p.dv, 41);
  check("bias", e.bias, p.dbias, 11);
  check("sinks", e.sinks, p.dsinks, 1);
}
