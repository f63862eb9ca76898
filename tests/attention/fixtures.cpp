// Values and gradients against PyTorch's scaled_dot_product_attention and FlexAttention and against transformers, and
// vectors that other projects publish.
#include "fixtures.hpp"

#include <set>

#include "reference.hpp"

namespace attention = mlkit::attention;
using attention::align;
using namespace attention_reference;

namespace {

const std::vector<double>& torch(const std::string& name) { return fixture(name, "attention_fixtures.txt"); }

void load(const std::string& name, auto& t) {
  const std::vector<double>& values = torch(name);
  REQUIRE(static_cast<std::size_t>(t.size()) == values.size());
  std::copy(values.begin(), values.end(), t.begin());
}
template <int Rank>
mlkit::tensor<double, Rank> tensor(const std::string& name, const mlkit::extents_t<Rank>& shape) {
  mlkit::tensor<double, Rank> t(shape);
  load(name, t);
  return t;
}
template <class T>
std::vector<T> integers(const std::string& name) {
  return {torch(name).begin(), torch(name).end()};
}

// Batch, heads, kv heads, queries, keys, d, d_v.
mlkit::extents_t<7> sizes(const std::string& of) {
  mlkit::extents_t<7> n;
  std::copy_n(integers<index_t>(of + ".shape").begin(), 7, n.begin());
  return n;
}

problem<double> inputs(const std::string& name) {
  const auto n = sizes(name);
  problem<double> p(n[0], n[1], n[2], n[3], n[4], n[5], n[6]);
  load(name + ".q", p.q), load(name + ".k", p.k), load(name + ".v", p.v);
  load(name + ".dout", p.dout), load(name + ".dlse", p.dlse);
  return p;
}

// Compares what a pipeline makes of these inputs with a case: out and the gradients of q, k and v, and what `more`
// names. Where lse is among that, a gradient of it comes in.
template <class... Stages>
void check(const std::string& of, const std::string& name, const attention::scores<Stages...>& pipeline,
           const std::set<std::string>& more = {}) {
  problem<double> p = inputs(of);
  if (!more.contains("lse")) std::fill(p.dlse.begin(), p.dlse.end(), 0.0);
  p.run(pipeline);
  const result have = p.written();
  result want = have;
  INFO(of << ", " << name);
  for (std::size_t r = 0; r < want.of.size(); ++r) {
    const std::string part = result::names[r];
    if (more.contains(part) || std::set<std::string>{"out", "dq", "dk", "dv"}.contains(part))
      want.of[r] = torch(of + "." + name + "." + part);
  }
  const errors e(want, have);
  for (std::size_t r = 0; r < want.of.size(); ++r) {
    INFO(result::names[r] << " of size " << e.size[r]);
    CHECK(e.error[r] <= 1e-14 * std::max(e.size[r], 1.0));
  }
}

// Two pipelines, so that few kernels are compiled: stages do nothing until a test gives them values.
struct stages {
  mlkit::extents_t<7> n;
  double scale = 1 / std::sqrt(static_cast<double>(n[5])), cap = 1e9;
  mlkit::tensor<double, 1> slopes{{n[1]}}, sinks{{n[1]}};
  mlkit::tensor<double, 4> bias{{1, 1, 1, 1}};
  attention::window window{attention::window::unlimited, attention::window::unlimited, align::top_left};
  std::vector<std::uint8_t> bits = std::vector<std::uint8_t>(static_cast<std::size_t>(n[1] * n[3] * n[4]), 1);
  std::vector<int> lengths = std::vector<int>(static_cast<std::size_t>(n[0]), static_cast<int>(n[4]));

  explicit stages(const std::string& of) : n(sizes(of)) { std::fill(sinks.begin(), sinks.end(), -inf); }

  auto capped_first() const {
    return attention::scores{
        attention::scale{scale},
        attention::softcap{cap},
        attention::alibi{slopes},
        attention::bias{bias},
        window,
        attention::boolean_mask{mlkit::tensor_view<const std::uint8_t, 3>(bits.data(), {n[1], n[3], n[4]})},
        attention::key_lengths{lengths},
        attention::sinks{sinks}};
  }
  auto capped_last() const {
    return attention::scores{attention::scale{scale}, attention::alibi{slopes}, attention::bias{bias},
                             attention::softcap{cap}};
  }
};

}  // namespace

TEST_CASE("scaled_dot_product_attention, which has masks level at either corner", "[attention][torch]") {
  check("wide", "plain", stages("wide").capped_first());
  stages scaled("words");
  scaled.scale = 0.3;
  check("words", "scaled", scaled.capped_first());
  for (const std::string of : {"wide", "tall"}) {
    check(of, "causal_top_left", attention::scores{attention::causal{align::top_left}});
    check(of, "causal_bottom_right", attention::scores{attention::causal{align::bottom_right}});
    check(of, "causal", attention::scores{attention::causal{align::bottom_right}}, {"lse"});
  }
}

TEST_CASE("windows of FlexAttention, also where queries see nothing", "[attention][torch]") {
  for (const std::string of : {"wide", "tall"}) {
    stages s(of);
    s.window = {2, 1, align::top_left};
    check(of, "window_top_left", s.capped_first(), {"lse"});
    s.window = {1, 1, align::bottom_right};
    check(of, "window_bottom_right", s.capped_first(), {"lse"});
  }
}

TEST_CASE("masks and biases of scaled_dot_product_attention, with the biases' gradients", "[attention][torch]") {
  stages masked("wide"), biased("wide"), shared("batch"), short_ones("batch");
  masked.bits = integers<std::uint8_t>("wide.mask");
  check("wide", "boolean", masked.capped_first());
  biased.bias = tensor<4>("wide.bias", {1, 2, 5, 9});
  check("wide", "bias", biased.capped_first(), {"dbias"});
  shared.bias = tensor<4>("batch.bias", {1, 4, 1, 8});
  check("batch", "bias", shared.capped_first(), {"dbias"});
  short_ones.lengths = integers<int>("batch.lengths");
  check("batch", "lengths", short_ones.capped_first());
}

TEST_CASE("FlexAttention's score_mod, in either order", "[attention][torch]") {
  stages cap("wide"), slope("wide"), add("wide"), cap_slope("wide"), cap_add("wide");
  cap.cap = cap_slope.cap = cap_add.cap = 1.5;
  slope.slopes = tensor<1>("wide.slopes", {2});
  cap_slope.slopes = slope.slopes.clone();
  cap_add.bias = tensor<4>("wide.bias", {1, 2, 5, 9});
  check("wide", "softcap", cap.capped_first(), {"lse"});
  check("wide", "softcap", cap.capped_last(), {"lse"});
  check("wide", "alibi", slope.capped_first(), {"lse"});
  check("wide", "softcap_alibi", cap_slope.capped_first(), {"lse"});
  check("wide", "alibi_softcap", cap_slope.capped_last(), {"lse"});
  check("wide", "softcap_bias", cap_add.capped_first(), {"lse", "dbias"});
  check("wide", "bias_softcap", cap_add.capped_last(), {"lse", "dbias"});
}

TEST_CASE("ALiBi of BLOOM, sinks of gpt-oss", "[attention][torch]") {
  stages bloom("square"), gpt_oss("tall");
  bloom.slopes = tensor<1>("square.slopes", {3});
  bloom.window.right = 0;
  check("square", "alibi", bloom.capped_first());
  gpt_oss.scale = 0.5;
  gpt_oss.sinks = tensor<1>("tall.sinks", {2});
  gpt_oss.window = {attention::window::unlimited, 0, align::bottom_right};
  check("tall", "sinks", gpt_oss.capped_first(), {"dsinks"});
}

TEST_CASE("documents of FlexAttention, as a mask and packed", "[attention][torch]") {
  const auto ids = integers<int>("square.documents");
  const attention::documents own{ids};
  const attention::window all{attention::window::unlimited, attention::window::unlimited, align::top_left};
  check("square", "documents", attention::scores{all, own}, {"lse"});
  check("square", "documents_causal", attention::scores{attention::window{}, own}, {"lse"});

  problem<double> p = inputs("square");
  const auto tokens = [](auto& t) {  // [1, heads, tokens, d] as [tokens, heads, d]
    const auto& e = t.extents();
    return mlkit::tensor_view<double, 3>(t.data(), {e[2], e[1], e[3]}, {e[3], e[2] * e[3], 1});
  };
  const std::vector<std::int32_t> starts{0, 3, 4, 8};
  const attention::sequences packed(starts);
  const attention::scores pipeline{attention::causal{}};
  const mlkit::matrix_view<double> lse(p.lse.data(), {3, 8});
  attention::forward(mlkit::cpu{}, tokens(p.q), tokens(p.k), tokens(p.v), packed, pipeline, tokens(p.out), lse);
  const auto same = [](const auto& have, const std::string& name) {
    const std::vector<double>& want = torch("square.documents_causal." + name);
    INFO(name);
    for (std::size_t i = 0; i < want.size(); ++i)
      REQUIRE(have.data()[static_cast<index_t>(i)] == Approx(want[i]).epsilon(1e-14).margin(1e-14));
  };
  same(p.out, "out");
  same(p.lse, "lse");
}

TEST_CASE("decode against scaled_dot_product_attention", "[attention][decode][torch]") {
  problem<double> p = inputs("batch");
  const auto lengths = integers<int>("batch.lengths");
  const attention::contiguous cache(p.k, p.v, lengths);
  const std::vector<double>& want = torch("batch.lengths.out");
  mlkit::tensor<double, 3> out({2, 4, 4});
  for (index_t i = 0; i < p.queries; ++i) {
    attention::decode(mlkit::cpu{}, mlkit::tensor_view<const double, 3>(&p.q(0, 0, i, 0), {2, 4, 6}, {72, 18, 1}),
                      cache, out);
    for (index_t b = 0; b < 2; ++b)
      for (index_t h = 0; h < 4; ++h)
        for (index_t c = 0; c < 4; ++c)
          REQUIRE(out(b, h, c) == Approx(want[static_cast<std::size_t>(((b * 4 + h) * 3 + i) * 4 + c)]).epsilon(1e-14));
  }
}

TEST_CASE("rotary embedding of Llama and of GPT-J", "[attention][rotary][torch]") {
  const attention::rotary_table<double> table({.positions = 8, .d = 6, .base = 100});
  const auto x = tensor<4>("rotary.x", {1, 2, 5, 6}), dout = tensor<4>("rotary.dout", {1, 2, 5, 6});
  for (const bool halves : {true, false}) {
    const std::string name = halves ? "rotary.halves" : "rotary.adjacent";
    const attention::pairing pairs = halves ? attention::pairing::halves : attention::pairing::adjacent;
    mlkit::tensor<double, 4> y(x.extents()), dx(x.extents());
    attention::rotate(mlkit::cpu{}, x, table, y, {.pairs = pairs, .first = 3});
    attention::rotate(mlkit::cpu{}, dout, table, dx, {.pairs = pairs, .first = 3, .back = true});
    for (std::size_t i = 0; i < 60; ++i) {
      REQUIRE(y.data()[i] == Approx(torch(name)[i]).margin(1e-14));
      REQUIRE(dx.data()[i] == Approx(torch(name + ".dx")[i]).margin(1e-14));
    }
  }
}

// The documentation of flash_attn_func in Dao-AILab's flash-attention (flash_attn_interface.py).
TEST_CASE("causal masks as FlashAttention's documentation draws them", "[attention][published]") {
  const auto drawn = [](const std::vector<std::string>& rows) {
    const auto queries = static_cast<index_t>(rows.size()), keys = static_cast<index_t>(rows[0].size());
    // With q of zeros a query sees all of its keys alike, and out shows which those are.
    mlkit::tensor<float, 4> q({1, 1, queries, 1}), k({1, 1, keys, 1}), v({1, 1, keys, keys}),
        out({1, 1, queries, keys});
    for (index_t j = 0; j < keys; ++j) v(0, 0, j, j) = 1;
    attention::forward(mlkit::cpu{}, q, k, v, attention::scores{attention::causal{align::bottom_right}}, out);
    std::vector<std::string> have(rows.size(), std::string(rows[0].size(), '0'));
    for (index_t i = 0; i < queries; ++i)
      for (index_t j = 0; j < keys; ++j)
        if (out(0, 0, i, j) > 0) have[static_cast<std::size_t>(i)][static_cast<std::size_t>(j)] = '1';
    CHECK(have == rows);
  };
  drawn({"11110", "11111"});
  drawn({"00", "00", "00", "10", "11"});
}

// keras-team/keras, attention_test.py and the older dense_attention_test.py.
TEST_CASE("vectors of Keras's tests", "[attention][published]") {
  using view = mlkit::tensor_view<const double, 4>;
  const attention::scale one{1};
  {
    const double q[] = {1, 0, 0, 1}, k[] = {0, 1, 1, 0}, v[] = {1, 2, 3, 4}, want[] = {2.462, 3.462, 1.538, 2.538};
    mlkit::tensor<double, 4> out({1, 1, 2, 2});
    attention::forward(mlkit::cpu{}, view(q, {1, 1, 2, 2}), view(k, {1, 1, 2, 2}), view(v, {1, 1, 2, 2}),
                       attention::scores{one}, out);
    for (index_t i = 0; i < 4; ++i) CHECK(out.data()[i] == Approx(want[i]).margin(1e-3));
  }
  const double q[] = {1.1}, k[] = {1.6, 0.7, -0.8}, v[] = {0.5, 0.8, -0.3};
  const std::vector<int> two{2};
  mlkit::tensor<double, 4> out({1, 1, 1, 1});
  const attention::scores masked{one, attention::key_lengths{two}};
  attention::forward(mlkit::cpu{}, view(q, {1, 1, 1, 1}), view(k, {1, 1, 3, 1}), view(k, {1, 1, 3, 1}), masked, out);
  CHECK(out(0, 0, 0, 0) == Approx(1.3561791301).epsilon(1e-10));
  attention::forward(mlkit::cpu{}, view(q, {1, 1, 1, 1}), view(k, {1, 1, 3, 1}), view(v, {1, 1, 3, 1}), masked, out);
  CHECK(out(0, 0, 0, 0) == Approx(0.58127362329).epsilon(1e-10));
}
