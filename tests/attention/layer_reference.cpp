// Whole layers against those of PyTorch, diffusers with PEFT, and transformers (tests/reference).
#include <catch2/catch.hpp>
#include <mlkit/attention.hpp>
#include <mlkit/lora.hpp>

#include "fixtures.hpp"

namespace attention = mlkit::attention;
namespace lora = mlkit::lora;
using mlkit::index_t;

namespace {

// The arrays of one layer.
struct recorded {
  std::string layer;

  std::vector<double> values(const std::string& name) const {
    return fixture(layer + "." + name, "attention_layer_fixtures.txt");
  }
  template <int Rank>
  mlkit::tensor<double, Rank> tensor(const std::string& name, const mlkit::extents_t<Rank>& extents) const {
    mlkit::tensor<double, Rank> t(extents);
    const std::vector<double> v = values(name);
    REQUIRE(static_cast<index_t>(v.size()) == t.size());
    std::copy(v.begin(), v.end(), t.data());
    return t;
  }
  template <class Tensor>
  void check(const std::string& name, const Tensor& have) const {
    const std::vector<double> want = values(name);
    REQUIRE(static_cast<index_t>(want.size()) == have.size());
    double worst = 0, size = 0;
    for (std::size_t i = 0; i < want.size(); ++i) {
      const double error = std::fabs(want[i] - have.data()[i]);
      worst = std::isnan(error) ? INFINITY : std::max(worst, error);
      size = std::max(size, std::fabs(want[i]));
    }
    INFO(layer << "." << name << " of size " << size);
    CHECK(worst < 1e-12 * std::max(size, 1.0));
  }
};

// One projection as it was recorded, and its gradients.
struct part {
  mlkit::matrix<double> w, a, b, da, db;
  mlkit::vector<double> bias, magnitude, dmagnitude;

  part(const recorded& r, const std::string& of, index_t in, index_t out, bool with_bias, bool adapted = false,
       bool with_magnitude = false)
      : w(r.tensor<2>(of + "w", {out, in})),
        a({2, in}),
        b({out, 2}),
        da({2, in}),
        db({out, 2}),
        bias({out}),
        magnitude({out}),
        dmagnitude({out}) {
    if (with_bias) bias = r.tensor<1>(of + "bias", {out});
    if (adapted) {
      a = r.tensor<2>(of + "a", {2, in});
      b = r.tensor<2>(of + "b", {out, 2});
    }
    if (with_magnitude) magnitude = r.tensor<1>(of + "m", {out});
  }
  lora::adapter_view<double> adapter() const { return {a.view(), b.view(), 1.5}; }
  auto plain() const { return lora::projection{lora::dense{w, bias}}; }
  auto with_lora() const { return lora::projection{lora::dense{w, bias}, adapter()}; }
  auto with_dora() const { return lora::projection{lora::dense{w, bias}, lora::dora{adapter(), magnitude}}; }
  void check(const recorded& r, const std::string& of, bool with_magnitude) const {
    r.check("d" + of + "a", da);
    r.check("d" + of + "b", db);
    if (with_magnitude) r.check("d" + of + "m", dmagnitude);
  }
};

constexpr lora::no_gradients none;

}  // namespace

TEST_CASE("cross-attention is torch.nn.MultiheadAttention", "[attention][layer]") {
  const recorded r{"multihead_cross"};
  const part q(r, "q", 8, 8, true), k(r, "k", 6, 8, true), v(r, "v", 6, 8, true), out(r, "o", 8, 8, true);
  const auto x = r.tensor<3>("x", {2, 3, 8}), context = r.tensor<3>("context", {2, 5, 6}),
             dy = r.tensor<3>("dy", {2, 3, 8});
  const auto bias = r.tensor<2>("bias", {3, 5});
  mlkit::tensor<double, 3> y({2, 3, 8}), dx({2, 3, 8}), dcontext({2, 5, 6});
  const attention::cross layer{q.plain(), k.plain(), v.plain(), out.plain(), {.heads = 2}};
  const attention::scores scores{attention::bias{bias}};
  attention::kept<double> kept;
  layer.forward(mlkit::cpu{}, x, context, scores, y, kept);
  layer.backward(mlkit::cpu{}, x, context, scores, kept, dy, attention::layer_gradients{none, none, none, none}, dx,
                 dcontext);
  r.check("y", y);
  r.check("dx", dx);
  r.check("dcontext", dcontext);
}

TEST_CASE("causal self-attention is torch.nn.MultiheadAttention", "[attention][layer]") {
  const recorded r{"multihead_self"};
  const part q(r, "q", 8, 8, true), k(r, "k", 8, 8, true), v(r, "v", 8, 8, true), out(r, "o", 8, 8, true);
  const auto x = r.tensor<3>("x", {2, 4, 8}), dy = r.tensor<3>("dy", {2, 4, 8});
  mlkit::tensor<double, 3> y({2, 4, 8}), dx({2, 4, 8});
  const attention::self layer{q.plain(), k.plain(), v.plain(), out.plain(), {.heads = 2}};
  const attention::scores scores{attention::causal{}};
  attention::kept<double> kept;
  layer.forward(mlkit::cpu{}, x, scores, y, kept);
  layer.backward(mlkit::cpu{}, x, scores, kept, dy, attention::layer_gradients{none, none, none, none}, dx);
  r.check("y", y);
  r.check("dx", dx);
}

TEST_CASE("adapted cross-attention is that of diffusers with PEFT", "[attention][layer]") {
  const auto compare = [](const recorded& r, bool with_magnitude, auto of, auto gradients_of) {
    part q(r, "q", 8, 6, false, true, with_magnitude), k(r, "k", 6, 6, false, true, with_magnitude),
        v(r, "v", 6, 6, false, true, with_magnitude), out(r, "o", 6, 8, true, true, with_magnitude);
    const auto x = r.tensor<3>("x", {2, 3, 8}), context = r.tensor<3>("context", {2, 5, 6}),
               dy = r.tensor<3>("dy", {2, 3, 8});
    mlkit::tensor<double, 3> y({2, 3, 8}), only_y({2, 3, 8}), dx({2, 3, 8}), dcontext({2, 5, 6});
    const attention::cross layer{of(q), of(k), of(v), of(out), {.heads = 2}};
    attention::kept<double> kept;
    layer.forward(mlkit::cpu{}, x, context, only_y);
    layer.forward(mlkit::cpu{}, x, context, attention::scores<>{}, y, kept);
    layer.backward(mlkit::cpu{}, x, context, attention::scores<>{}, kept, dy,
                   attention::layer_gradients{gradients_of(q), gradients_of(k), gradients_of(v), gradients_of(out)}, dx,
                   dcontext);
    r.check("y", only_y);
    r.check("y", y);
    r.check("dx", dx);
    r.check("dcontext", dcontext);
    q.check(r, "q", with_magnitude);
    k.check(r, "k", with_magnitude);
    v.check(r, "v", with_magnitude);
    out.check(r, "o", with_magnitude);
  };
  compare(
      recorded{"diffusers_lora"}, false, [](const part& p) { return p.with_lora(); },
      [](part& p) {
        return lora::gradients{p.da, p.db};
      });
  compare(
      recorded{"diffusers_dora"}, true, [](const part& p) { return p.with_dora(); },
      [](part& p) {
        return lora::gradients{p.da, p.db, p.dmagnitude};
      });
}

TEST_CASE("rotary self-attention of grouped queries is Llama's", "[attention][layer]") {
  const recorded r{"llama"};
  const part q(r, "q", 8, 16, false), k(r, "k", 8, 8, false), v(r, "v", 8, 8, false), out(r, "o", 16, 8, false);
  const auto x = r.tensor<3>("x", {2, 5, 8}), dy = r.tensor<3>("dy", {2, 5, 8});
  mlkit::tensor<double, 3> y({2, 5, 8}), dx({2, 5, 8});
  const attention::rotary_table<double> table({.positions = 5, .d = 4, .base = 100});
  const attention::self layer{
      q.plain(), k.plain(), v.plain(), out.plain(), {.heads = 4, .kv_heads = 2}, attention::rotary{table}};
  const attention::scores scores{attention::causal{}};
  attention::kept<double> kept;
  layer.forward(mlkit::cpu{}, x, scores, y, kept);
  layer.backward(mlkit::cpu{}, x, scores, kept, dy, attention::layer_gradients{none, none, none, none}, dx);
  r.check("y", y);
  r.check("dx", dx);
}
