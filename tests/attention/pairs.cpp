// Every ordered pair of stages that change scores, with each mask, in f64; and derivatives by differences of forward.
#include "reference.hpp"

namespace attention = mlkit::attention;
using namespace attention_reference;

namespace {

using all_stages = everything<double>;
constexpr index_t batch = all_stages::batch, heads = all_stages::heads, tokens = all_stages::tokens;

problem<double> inputs() { return {batch, heads, 1, tokens, tokens, 5, 3}; }

}  // namespace

TEST_CASE("every pair of stages, in order, with each mask", "[attention][pairs]") {
  problem<double> p = inputs();
  for (const std::string& first : value_stages)
    for (const std::string& second : value_stages)
      for (const std::string& mask : mask_stages) {
        if (first == "bias" && second == "bias") continue;
        all_stages e;
        e.switch_on_value(first, 0);
        e.switch_on_value(second, 1);
        e.switch_on_mask(mask);
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
    all_stages e(shape);
    for (const std::string& name : value_stages)
      for (const int place : {0, 1}) e.switch_on_value(name, place);
    for (const std::string& name : mask_stages) e.switch_on_mask(name);
    e.sinks(0) = 0.5, e.sinks(1) = -1;
    e.p = 0.3;
    INFO("bias " << mlkit::detail::shape_text<4>(shape));
    CHECK(p.error(e.pipeline(), e.means()) < tight);
  }
}

TEST_CASE("gradients are what differences of forward say", "[attention][pairs]") {
  problem<double> p = inputs();
  all_stages e({1, heads, tokens, 1});
  for (const std::string& name : value_stages)
    for (const int place : {0, 1}) e.switch_on_value(name, place);
  e.switch_on_mask("window"), e.switch_on_mask("boolean"), e.switch_on_mask("lengths");
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
