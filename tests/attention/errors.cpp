// What attention refuses, in words, with nothing written. What is wrong with packed sequences and with the lengths and
// pages of a cache stands beside their tests.
#include <array>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <mlkit/attention.hpp>
#include <span>
#include <string>
#include <vector>

namespace attention = mlkit::attention;
using mlkit::cpu;
using mlkit::extents_t;
using mlkit::index_t;
using mlkit::matrix_view;
using mlkit::tensor_view;
using mlkit::vector_view;

namespace {

constexpr float poison = 12345;
using four = extents_t<4>;
using three = extents_t<3>;

// What calls read, all of it the same numbers, and what they must not write.
struct memory {
  std::vector<float> read = std::vector<float>(4096, 0.5f), written = std::vector<float>(8192, poison);

  template <std::size_t R>
  tensor_view<const float, static_cast<int>(R)> in(const std::array<index_t, R>& e) const {
    return {read.data(), e};
  }
  template <std::size_t R>
  tensor_view<float, static_cast<int>(R)> out(index_t at, const std::array<index_t, R>& e) {
    return {written.data() + at, e};
  }
  bool untouched() const {
    return std::all_of(written.begin(), written.end(), [](float x) { return x == poison; });
  }

  // What a call says when it refuses: the kind of error, and what follows the function's name.
  template <class Call>
  std::string refusal(const std::string& function, const Call& call) const {
    std::string said = "no error", kind;
    try {
      call();
    } catch (const mlkit::shape_error& e) {
      kind = "shape", said = e.what();
    } catch (const mlkit::value_error& e) {
      kind = "value", said = e.what();
    }
    if (!untouched()) return "written to, and: " + said;
    const std::string start = "mlkit::" + kind + "_error: " + function + ": ";
    return said.rfind(start, 0) == 0 ? kind + ": " + said.substr(start.size()) : said;
  }
};

// Everything that a call takes, of shapes that fit.
struct shapes {
  four q{2, 4, 6, 5}, k{2, 2, 7, 5}, v{2, 2, 7, 3}, out{2, 4, 6, 3};
  three lse{2, 4, 6};
  four dout{2, 4, 6, 3}, dq{2, 4, 6, 5}, dk{2, 2, 7, 5}, dv{2, 2, 7, 3};
  three dlse{2, 4, 6};
};

// The pipeline of most tests, so that its kernels are compiled once.
auto all_stages(const memory& m) {
  static const std::uint8_t all = 1;
  static const std::vector<int> lengths{7, 7};
  return attention::scores{attention::scale{0.5},
                           attention::softcap{30},
                           attention::alibi{m.in<1>({4})},
                           attention::bias{m.in<4>({2, 1, 6, 7})},
                           attention::window{3, 3, attention::align::top_left},
                           attention::boolean_mask{tensor_view<const std::uint8_t, 2>(&all, {1, 1})},
                           attention::key_lengths{lengths},
                           attention::sinks{m.in<1>({4})},
                           attention::dropout{0.1}};
}
using all = decltype(all_stages(memory{}));
template <class Stage>
Stage& stage_of(all& pipeline) {
  return std::get<Stage>(pipeline.stages);
}
using alibi = attention::alibi<float>;
using bias = attention::bias<float>;
using sinks = attention::sinks<float>;
using mask = attention::boolean_mask<std::uint8_t>;
using lengths = attention::key_lengths<int>;

const std::string in_forward = "attention::forward", in_backward = "attention::backward";

// Where things are written; far enough apart.
constexpr index_t at_out = 0, at_lse = 1024, at_dq = 2048, at_dk = 3072, at_dv = 4096, at_dbias = 5120,
                  at_dsinks = 6144;

template <class Scores>
void forward(memory& m, const shapes& s, const Scores& pipeline) {
  attention::forward(cpu{}, m.in(s.q), m.in(s.k), m.in(s.v), pipeline, m.out(at_out, s.out), m.out(at_lse, s.lse));
}
attention::gradients<float> gradients_of(memory& m, const shapes& s) {
  return {m.out(at_dq, s.dq), m.out(at_dk, s.dk), m.out(at_dv, s.dv)};
}
template <class Scores>
void backward(memory& m, const shapes& s, const Scores& pipeline, const attention::gradients<float>& g) {
  attention::backward(cpu{}, m.in(s.q), m.in(s.k), m.in(s.v), pipeline, m.in(s.out), m.in(s.lse), m.in(s.dout), g,
                      m.in(s.dlse));
}

}  // namespace

TEST_CASE("attention names the argument whose extents do not fit", "[attention][bad input]") {
  memory m;
  const all pipeline = all_stages(m);
  const auto check = [&](const shapes& s, const std::string& text) {
    CHECK(m.refusal(in_forward, [&] { forward(m, s, pipeline); }) == text);
    CHECK(m.refusal(in_backward, [&] { backward(m, s, pipeline, gradients_of(m, s)); }) == text);
  };
  shapes s;
  check((s = {}, s.k[0] = 3, s), "shape: k has 3 batches, but q has 2");
  check((s = {}, s.v[0] = 1, s), "shape: v has 1 batches, but q has 2");
  check((s = {}, s.v[1] = 4, s), "shape: v has 4 heads, but k has 2");
  check((s = {}, s.k[1] = s.v[1] = 3, s), "shape: q has 4 heads, which is no multiple of k's 3");
  check((s = {}, s.k[1] = s.v[1] = 8, s), "shape: q has 4 heads, which is no multiple of k's 8");
  check((s = {}, s.k[1] = s.v[1] = 0, s), "shape: q has 4 heads, which is no multiple of k's 0");
  check((s = {}, s.k[3] = 6, s), "shape: k has 6 columns, but q has 5");
  check((s = {}, s.v[2] = 6, s), "shape: v has 6 keys, but k has 7");
  check((s = {}, s.out[0] = 1, s), "shape: out has 1 batches, but q has 2");
  check((s = {}, s.out[1] = 2, s), "shape: out has 2 heads, but q has 4");
  check((s = {}, s.out[2] = 7, s), "shape: out has 7 queries, but q has 6");
  check((s = {}, s.out[3] = 5, s), "shape: out has 5 columns, but v has 3");
  check((s = {}, s.lse[0] = 3, s), "shape: lse has 3 batches, but q has 2");
  check((s = {}, s.lse[1] = 2, s), "shape: lse has 2 heads, but q has 4");
  check((s = {}, s.lse[2] = 5, s), "shape: lse has 5 queries, but q has 6");
  check((s = {}, s.q[2] = -6, s), "shape: q has the negative extent -6 in dimension 2");
  check((s = {}, s.v[3] = -1, s), "shape: v has the negative extent -1 in dimension 3");
  check((s = {}, s.out[0] = -1, s), "shape: out has the negative extent -1 in dimension 0");

  const auto back = [&](const shapes& r, const std::string& text) {
    CHECK(m.refusal(in_backward, [&] { backward(m, r, pipeline, gradients_of(m, r)); }) == text);
  };
  back((s = {}, s.dout[3] = 5, s), "shape: dout has shape [2, 4, 6, 5], but out has [2, 4, 6, 3]");
  back((s = {}, s.dout[0] = 1, s), "shape: dout has shape [1, 4, 6, 3], but out has [2, 4, 6, 3]");
  back((s = {}, s.dq[3] = 3, s), "shape: dq has shape [2, 4, 6, 3], but q has [2, 4, 6, 5]");
  back((s = {}, s.dq[1] = 2, s), "shape: dq has shape [2, 2, 6, 5], but q has [2, 4, 6, 5]");
  back((s = {}, s.dk[1] = 4, s), "shape: dk has shape [2, 4, 7, 5], but k has [2, 2, 7, 5]");
  back((s = {}, s.dk[2] = 6, s), "shape: dk has shape [2, 2, 6, 5], but k has [2, 2, 7, 5]");
  back((s = {}, s.dv[3] = 5, s), "shape: dv has shape [2, 2, 7, 5], but v has [2, 2, 7, 3]");
  back((s = {}, s.dv[0] = 3, s), "shape: dv has shape [3, 2, 7, 3], but v has [2, 2, 7, 3]");
  back((s = {}, s.dlse[2] = 5, s), "shape: dlse has 5 queries, but q has 6");
  back((s = {}, s.dlse[1] = 2, s), "shape: dlse has 2 heads, but q has 4");
  back((s = {}, s.dlse[0] = 1, s), "shape: dlse has 1 batches, but q has 2");

  const auto with_bias = [&](const four& shape) {
    auto g = gradients_of(m, {});
    g.dbias = m.out(at_dbias, shape);
    return m.refusal(in_backward, [&] { backward(m, {}, pipeline, g); });
  };
  CHECK(with_bias({2, 4, 6, 7}) == "shape: dbias has shape [2, 4, 6, 7], but bias has [2, 1, 6, 7]");
  CHECK(with_bias({2, 1, 1, 7}) == "shape: dbias has shape [2, 1, 1, 7], but bias has [2, 1, 6, 7]");
  const auto with_sinks = [&](index_t heads) {
    auto g = gradients_of(m, {});
    g.dsinks = m.out<1>(at_dsinks, {heads});
    return m.refusal(in_backward, [&] { backward(m, {}, pipeline, g); });
  };
  CHECK(with_sinks(2) == "shape: dsinks has shape [2], but sinks has [4]");
  CHECK(with_sinks(5) == "shape: dsinks has shape [5], but sinks has [4]");
}

TEST_CASE("attention refuses gradients of what a pipeline does not have", "[attention][bad input]") {
  memory m;
  const shapes s;
  const attention::scores<attention::scale> plain{attention::scale{0.5}};
  auto g = gradients_of(m, s);
  g.dbias = m.out<4>(at_dbias, {1, 1, 6, 7});
  CHECK(m.refusal(in_backward, [&] { backward(m, s, plain, g); }) == "value: dbias is given, but scores have no bias");
  g.dbias = {};
  g.dsinks = m.out<1>(at_dsinks, {4});
  CHECK(m.refusal(in_backward, [&] { backward(m, s, plain, g); }) ==
        "value: dsinks is given, but scores have no sinks");
}

TEST_CASE("attention refuses null data, shared memory and strides that name an element twice",
          "[attention][bad input]") {
  memory m;
  const shapes s;
  const attention::scores<attention::scale> plain{attention::scale{0.5}};
  const auto null4 = [](const four& e) { return tensor_view<float, 4>(nullptr, e); };
  const auto null3 = [](const three& e) { return tensor_view<float, 3>(nullptr, e); };
  using input = tensor_view<const float, 4>;
  struct arguments {
    input q, k, v;
    tensor_view<float, 4> out;
    tensor_view<float, 3> lse;
    input dout;
    tensor_view<float, 4> dq, dk, dv;
    tensor_view<const float, 3> dlse;
  };
  const arguments good{m.in(s.q),    m.in(s.k),          m.in(s.v),          m.out(at_out, s.out), m.out(at_lse, s.lse),
                       m.in(s.dout), m.out(at_dq, s.dq), m.out(at_dk, s.dk), m.out(at_dv, s.dv),   m.in(s.dlse)};
  const auto run_forward = [&](const arguments& a, const auto& pipeline) {
    attention::forward(cpu{}, a.q, a.k, a.v, pipeline, a.out, a.lse);
  };
  const auto run_backward = [&](const arguments& a, const auto& pipeline) {
    attention::backward(cpu{}, a.q, a.k, a.v, pipeline, a.out, a.lse, a.dout, attention::gradients(a.dq, a.dk, a.dv),
                        a.dlse);
  };
  const auto forward_says = [&](const arguments& a) { return m.refusal(in_forward, [&] { run_forward(a, plain); }); };
  const auto backward_says = [&](const arguments& a) {
    return m.refusal(in_backward, [&] { run_backward(a, plain); });
  };
  arguments a = good;
  const auto both = [&](const arguments& bad, const std::string& text) {
    CHECK(forward_says(bad) == text);
    CHECK(backward_says(bad) == text);
  };
  both((a = good, a.q = null4(s.q), a), "value: q is null, but has shape [2, 4, 6, 5]");
  both((a = good, a.k = null4(s.k), a), "value: k is null, but has shape [2, 2, 7, 5]");
  both((a = good, a.v = null4(s.v), a), "value: v is null, but has shape [2, 2, 7, 3]");
  both((a = good, a.out = null4(s.out), a), "value: out is null, but has shape [2, 4, 6, 3]");
  both((a = good, a.lse = null3(s.lse), a), "value: lse is null, but has shape [2, 4, 6]");
  CHECK(backward_says((a = good, a.dout = null4(s.dout), a)) == "value: dout is null, but has shape [2, 4, 6, 3]");
  CHECK(backward_says((a = good, a.dlse = null3(s.dlse), a)) == "value: dlse is null, but has shape [2, 4, 6]");
  CHECK(backward_says((a = good, a.dq = null4(s.dq), a)) == "value: dq is null, but has shape [2, 4, 6, 5]");
  CHECK(backward_says((a = good, a.dk = null4(s.dk), a)) == "value: dk is null, but has shape [2, 2, 7, 5]");
  CHECK(backward_says((a = good, a.dv = null4(s.dv), a)) == "value: dv is null, but has shape [2, 2, 7, 3]");

  // Outputs that share memory with inputs and with each other. 8 elements on, so that no name is left to chance.
  const auto from = [&](index_t at, const four& e) { return tensor_view<float, 4>(m.written.data() + at + 8, e); };
  const auto rows_from = [&](index_t at) { return tensor_view<float, 3>(m.written.data() + at + 8, s.lse); };
  CHECK(forward_says((a = good, a.q = from(at_out, s.q), a)) == "shape: out [2, 4, 6, 3] overlaps q [2, 4, 6, 5]");
  CHECK(forward_says((a = good, a.k = from(at_out, s.k), a)) == "shape: out [2, 4, 6, 3] overlaps k [2, 2, 7, 5]");
  CHECK(forward_says((a = good, a.v = from(at_out, s.v), a)) == "shape: out [2, 4, 6, 3] overlaps v [2, 2, 7, 3]");
  CHECK(forward_says((a = good, a.q = from(at_lse, s.q), a)) == "shape: lse [2, 4, 6] overlaps q [2, 4, 6, 5]");
  CHECK(forward_says((a = good, a.lse = rows_from(at_out), a)) == "shape: lse [2, 4, 6] overlaps out [2, 4, 6, 3]");

  CHECK(backward_says((a = good, a.dq = from(at_out, s.dq), a)) == "shape: dq [2, 4, 6, 5] overlaps out [2, 4, 6, 3]");
  CHECK(backward_says((a = good, a.dk = from(at_lse, s.dk), a)) == "shape: dk [2, 2, 7, 5] overlaps lse [2, 4, 6]");
  CHECK(backward_says((a = good, a.dk = from(at_dq, s.dk), a)) == "shape: dk [2, 2, 7, 5] overlaps dq [2, 4, 6, 5]");
  CHECK(backward_says((a = good, a.dv = from(at_dk, s.dv), a)) == "shape: dv [2, 2, 7, 3] overlaps dk [2, 2, 7, 5]");
  CHECK(backward_says((a = good, a.q = from(at_dq, s.q), a)) == "shape: dq [2, 4, 6, 5] overlaps q [2, 4, 6, 5]");
  CHECK(backward_says((a = good, a.k = from(at_dk, s.k), a)) == "shape: dk [2, 2, 7, 5] overlaps k [2, 2, 7, 5]");
  CHECK(backward_says((a = good, a.v = from(at_dv, s.v), a)) == "shape: dv [2, 2, 7, 3] overlaps v [2, 2, 7, 3]");
  CHECK(backward_says((a = good, a.dout = from(at_dv, s.dout), a)) ==
        "shape: dv [2, 2, 7, 3] overlaps dout [2, 4, 6, 3]");
  CHECK(backward_says((a = good, a.dlse = rows_from(at_dq), a)) == "shape: dq [2, 4, 6, 5] overlaps dlse [2, 4, 6]");

  // An element named twice: fine to read, not to write.
  const auto bent = [&](index_t at, const four& e, const four& strides) {
    return tensor_view<float, 4>(m.written.data() + at, e, strides);
  };
  CHECK(forward_says((a = good, a.out = bent(at_out, s.out, {72, 18, 2, 1}), a)) ==
        "shape: out of shape [2, 4, 6, 3] has overlapping strides [72, 18, 2, 1]");
  CHECK(forward_says((a = good, a.out = bent(at_out, s.out, {72, 0, 3, 1}), a)) ==
        "shape: out of shape [2, 4, 6, 3] has overlapping strides [72, 0, 3, 1]");
  CHECK(forward_says((a = good, a.lse.strides = {24, 0, 1}, a)) ==
        "shape: lse of shape [2, 4, 6] has overlapping strides [24, 0, 1]");
  CHECK(backward_says((a = good, a.dq = bent(at_dq, s.dq, {120, 30, 0, 1}), a)) ==
        "shape: dq of shape [2, 4, 6, 5] has overlapping strides [120, 30, 0, 1]");
  CHECK(backward_says((a = good, a.dk = bent(at_dk, s.dk, {70, 0, 5, 1}), a)) ==
        "shape: dk of shape [2, 2, 7, 5] has overlapping strides [70, 0, 5, 1]");
  CHECK(backward_says((a = good, a.dv = bent(at_dv, s.dv, {21, 21, 3, 1}), a)) ==
        "shape: dv of shape [2, 2, 7, 3] has overlapping strides [21, 21, 3, 1]");
  constexpr index_t endless = index_t{1} << 50;
  both((a = good, a.k.extents[2] = endless, a.k.strides[2] = 0, a.v.extents[2] = endless, a.v.strides[2] = 0, a),
       "shape: k of shape [2, 2, 1125899906842624, 5] and strides [70, 35, 0, 1] is too large");

  // What stages read is not written to either.
  all pipeline = all_stages(m);
  const auto stages_say = [&] { return m.refusal(in_forward, [&] { forward(m, s, pipeline); }); };
  const auto stages_say_backward = [&](const attention::gradients<float>& g) {
    return m.refusal(in_backward, [&] { backward(m, s, pipeline, g); });
  };
  stage_of<alibi>(pipeline).slopes.data = m.written.data() + at_out;
  CHECK(stages_say() == "shape: out [2, 4, 6, 3] overlaps alibi's slopes [4]");
  pipeline = all_stages(m);
  stage_of<bias>(pipeline).values.data = m.written.data() + at_lse;
  CHECK(stages_say() == "shape: lse [2, 4, 6] overlaps bias [2, 1, 6, 7]");
  stage_of<bias>(pipeline).values.data = m.written.data() + at_dk;
  CHECK(stages_say_backward(gradients_of(m, s)) == "shape: dk [2, 2, 7, 5] overlaps bias [2, 1, 6, 7]");
  pipeline = all_stages(m);
  stage_of<mask>(pipeline).values.data = reinterpret_cast<std::uint8_t*>(m.written.data() + at_out) + 3;
  CHECK(stages_say() == "shape: out [2, 4, 6, 3] overlaps boolean_mask [1, 1, 1, 1]");
  pipeline = all_stages(m);
  stage_of<sinks>(pipeline).logits.data = m.written.data() + at_dv;
  CHECK(stages_say_backward(gradients_of(m, s)) == "shape: dv [2, 2, 7, 3] overlaps sinks [4]");
  pipeline = all_stages(m);
  auto g = gradients_of(m, s);
  g.dbias = m.out<4>(at_dk + 8, {2, 1, 6, 7});
  CHECK(stages_say_backward(g) == "shape: dbias [2, 1, 6, 7] overlaps dk [2, 2, 7, 5]");
  g.dbias = m.out<4>(at_dbias, {2, 1, 6, 7});
  g.dsinks = m.out<1>(at_dbias + 8, {4});
  CHECK(stages_say_backward(g) == "shape: dsinks [4] overlaps dbias [2, 1, 6, 7]");
  g.dsinks = vector_view<float>(nullptr, extents_t<1>{4});
  CHECK(stages_say_backward(g) == "value: dsinks is null, but has shape [4]");
  g.dsinks = {};
  g.dbias.data = nullptr;
  CHECK(stages_say_backward(g) == "value: dbias is null, but has shape [2, 1, 6, 7]");
  g.dbias = m.out<4>(at_dbias, {2, 1, 6, 7});
  g.dbias.strides[0] = 0;
  CHECK(stages_say_backward(g) == "shape: dbias of shape [2, 1, 6, 7] has overlapping strides [0, 42, 7, 1]");
}

TEST_CASE("attention does not write to what says which keys there are", "[attention][bad input]") {
  using Catch::Matchers::Contains;
  // All in one: zeros are lengths, documents and starts as well as elements of q, k, v and results.
  std::vector<float> zeros(512);
  const auto view = [&](const auto& e) {
    return tensor_view<float, static_cast<int>(std::tuple_size_v<std::remove_cvref_t<decltype(e)>>)>(zeros.data(), e);
  };
  const std::vector<float> read(512);
  const tensor_view<const float, 4> q(read.data(), four{2, 4, 4, 8});
  const std::span<const std::int32_t> ids(reinterpret_cast<const std::int32_t*>(zeros.data()) + 3, 4);
  const auto refuses = [&](const auto& pipeline, const std::string& name) {
    CHECK_THROWS_WITH(attention::forward(cpu{}, q, q, q, pipeline, view(four{2, 4, 4, 8})), Contains(name));
    CHECK(zeros == read);
  };
  refuses(attention::scores{attention::key_lengths{ids.first(2)}}, "out [2, 4, 4, 8] overlaps key_lengths [2]");
  refuses(attention::scores{attention::documents{ids}}, "out [2, 4, 4, 8] overlaps documents [4]");
  const tensor_view<const float, 3> one(read.data(), three{2, 4, 8});
  CHECK_THROWS_WITH(attention::decode(cpu{}, one, attention::contiguous(q, q, ids.first(2)), view(three{2, 4, 8})),
                    Contains("out [2, 4, 8] overlaps cache.lengths [2]"));
  CHECK(zeros == read);
  std::vector<std::int32_t> starts{0, 4, 0, 0};
  const tensor_view<const float, 3> rows(read.data(), three{4, 1, 1});
  const tensor_view<float, 3> over(reinterpret_cast<float*>(starts.data()), three{4, 1, 1});
  CHECK_THROWS_WITH(attention::forward(cpu{}, rows, rows, rows, attention::sequences(std::span(starts).first(2)),
                                       attention::scores<>{}, over, view(extents_t<2>{1, 4})),
                    Contains("out [1, 1, 4, 1] overlaps sequences.queries [2]"));
  CHECK(starts == std::vector<std::int32_t>{0, 4, 0, 0});
}

TEST_CASE("attention refuses options of stages that are out of range", "[attention][bad input]") {
  memory m;
  const shapes s;
  const double nan = std::nan(""), inf = INFINITY;
  const auto says = [&](const auto& change) {
    all pipeline = all_stages(m);
    change(pipeline);
    const std::string text = m.refusal(in_forward, [&] { forward(m, s, pipeline); });
    CHECK(m.refusal(in_backward, [&] { backward(m, s, pipeline, gradients_of(m, s)); }) == text);
    return text;
  };
  const auto scale_of = [&](double x) { return says([&](all& p) { stage_of<attention::scale>(p).value = x; }); };
  CHECK(scale_of(nan) == "value: scale = nan is not finite");
  CHECK(scale_of(inf) == "value: scale = inf is not finite");
  CHECK(scale_of(-inf) == "value: scale = -inf is not finite");
  CHECK(scale_of(-1e39) == "value: scale = -1e+39 is infinite in f32");
  const auto cap_of = [&](double x) { return says([&](all& p) { stage_of<attention::softcap>(p).cap = x; }); };
  CHECK(cap_of(0) == "value: softcap = 0 is not positive");
  CHECK(cap_of(-30) == "value: softcap = -30 is not positive");
  CHECK(cap_of(nan) == "value: softcap = nan is not positive");
  CHECK(cap_of(inf) == "value: softcap = inf is not positive");
  const std::string range = " is outside [1.1754944e-38, 8.507059e+37], which f32 holds with its inverse";
  CHECK(cap_of(1e38) == "value: softcap = 1e+38" + range);
  CHECK(cap_of(1e-39) == "value: softcap = 1e-39" + range);
  const auto dropped = [&](double x) { return says([&](all& p) { stage_of<attention::dropout>(p).p = x; }); };
  CHECK(dropped(1) == "value: dropout = 1 is outside [0, 1)");
  CHECK(dropped(-0.1) == "value: dropout = -0.1 is outside [0, 1)");
  CHECK(dropped(2) == "value: dropout = 2 is outside [0, 1)");
  CHECK(dropped(nan) == "value: dropout = nan is outside [0, 1)");
  CHECK(says([](all& p) { stage_of<attention::window>(p).left = -1; }) == "value: window.left = -1 is negative");
  CHECK(says([](all& p) { stage_of<attention::window>(p).right = -2; }) == "value: window.right = -2 is negative");
  CHECK(says([](all& p) { stage_of<attention::window>(p).alignment = attention::align::unstated; }) ==
        "value: window needs an alignment, top_left or bottom_right, for 6 queries and 7 keys");
  const auto keys = [&](const std::vector<int>& l) { return says([&](all& p) { stage_of<lengths>(p) = lengths{l}; }); };
  CHECK(keys({8, 7}) == "value: key_lengths[0] = 8 is outside [0, 7]");
  CHECK(keys({0, -1}) == "value: key_lengths[1] = -1 is outside [0, 7]");
  for (const std::size_t n : {0, 1, 3})
    CHECK(says([&, few = std::vector<int>(n, 1)](all& p) { stage_of<lengths>(p) = lengths{few}; }) ==
          "shape: key_lengths has " + std::to_string(n) + " elements, but the batch has 2");

  CHECK(says([&](all& p) { stage_of<alibi>(p).slopes.extents[0] = 2; }) ==
        "shape: alibi's slopes has 2 elements, but q's heads has 4");
  CHECK(says([&](all& p) { stage_of<sinks>(p).logits.extents[0] = 3; }) ==
        "shape: sinks has 3 elements, but q's heads has 4");
  const auto biased = [&](const four& e) { return says([&](all& p) { stage_of<bias>(p).values.extents = e; }); };
  CHECK(biased({3, 1, 6, 7}) == "shape: bias has 3 batches, but the scores have 2 (1 would serve all)");
  CHECK(biased({1, 2, 6, 7}) == "shape: bias has 2 heads, but the scores have 4 (1 would serve all)");
  CHECK(biased({1, 4, 7, 7}) == "shape: bias has 7 queries, but the scores have 6 (1 would serve all)");
  CHECK(biased({1, 4, 6, 6}) == "shape: bias has 6 keys, but the scores have 7 (1 would serve all)");
  CHECK(biased({1, 4, 6, 0}) == "shape: bias has 0 keys, but the scores have 7 (1 would serve all)");
  CHECK(says([&](all& p) {
          stage_of<mask>(p).values.extents = {2, 4, 5, 7};
        }) == "shape: boolean_mask has 5 queries, but the scores have 6 (1 would serve all)");
  CHECK(says([&](all& p) { stage_of<bias>(p).values.data = nullptr; }) ==
        "value: bias is null, but has shape [2, 1, 6, 7]");
  CHECK(says([&](all& p) { stage_of<alibi>(p).slopes.data = nullptr; }) ==
        "value: alibi's slopes is null, but has shape [4]");
  CHECK(says([&](all& p) { stage_of<sinks>(p).logits.data = nullptr; }) == "value: sinks is null, but has shape [4]");
  CHECK(says([&](all& p) { stage_of<mask>(p).values.data = nullptr; }) ==
        "value: boolean_mask is null, but has shape [1, 1, 1, 1]");
}

TEST_CASE("attention refuses masks of the wrong sizes", "[attention][bad input]") {
  memory m;
  shapes s;
  s.k[2] = s.v[2] = 6;
  std::vector<int> ids(6);
  const std::vector<std::uint8_t> bits(64, 1);
  const auto says = [&](const std::vector<int>& documents, const three& e, index_t query_block, index_t key_block,
                        attention::align alignment, index_t keys) {
    shapes r = s;
    r.k[2] = r.v[2] = keys;
    const attention::scores pipeline{
        attention::documents{documents}, attention::causal{alignment},
        attention::block_sparse{tensor_view<const std::uint8_t, 3>(bits.data(), e), query_block, key_block}};
    return m.refusal(in_forward, [&] { forward(m, r, pipeline); });
  };
  const auto none = attention::align::unstated;
  CHECK(says(std::vector<int>(5), {1, 2, 2}, 4, 3, none, 6) ==
        "shape: documents has 5 elements, but q's queries has 6");
  CHECK(says(ids, {1, 2, 2}, 4, 3, none, 7) == "shape: documents has 6 elements, but k's keys has 7");
  CHECK(says(ids, {1, 2, 2}, 0, 3, none, 6) == "value: block_sparse.query_block = 0 is not positive");
  CHECK(says(ids, {1, 2, 2}, 4, -3, none, 6) == "value: block_sparse.key_block = -3 is not positive");
  CHECK(says(ids, {2, 2, 2}, 4, 3, none, 6) == "shape: block_sparse has 2 heads, but q has 4");
  CHECK(says(ids, {4, 1, 2}, 4, 3, none, 6) == "shape: block_sparse has 1 rows, but q in blocks has 2");
  CHECK(says(ids, {1, 2, 3}, 4, 3, none, 6) == "shape: block_sparse has 3 columns, but k in blocks has 2");
}

TEST_CASE("decode refuses what does not fit", "[attention][decode][bad input]") {
  memory m;
  const std::vector<int> lengths{5, 7};
  const std::vector<std::int32_t> table{0, 1, 2, 3};
  struct arguments {
    three q{2, 4, 5};
    four k{2, 2, 7, 5}, v{2, 2, 7, 3};
    three out{2, 4, 3};
    extents_t<2> lse{2, 4};
    attention::decode_options options{};
  } s;
  const auto contiguous = [&](const arguments& a) {
    return m.refusal("attention::decode", [&] {
      attention::decode(cpu{}, m.in(a.q), attention::contiguous(m.in(a.k), m.in(a.v), lengths), m.out(at_out, a.out),
                        a.options, m.out(at_lse, a.lse));
    });
  };
  CHECK(contiguous((s = {}, s.q[0] = 1, s)) == "shape: q has 1 batches, but cache has 2");
  CHECK(contiguous((s = {}, s.q[1] = 5, s)) == "shape: q has 5 heads, which is no multiple of the cache's 2");
  CHECK(contiguous((s = {}, s.k[1] = s.v[1] = 0, s)) == "shape: q has 4 heads, which is no multiple of the cache's 0");
  CHECK(contiguous((s = {}, s.q[2] = 3, s)) == "shape: q has 3 columns, but cache.k has 5");
  CHECK(contiguous((s = {}, s.v[0] = 3, s)) == "shape: cache.v has 3 batches, but cache.k has 2");
  CHECK(contiguous((s = {}, s.v[1] = 4, s)) == "shape: cache.v has 4 heads, but cache.k has 2");
  CHECK(contiguous((s = {}, s.v[2] = 6, s)) == "shape: cache.v has 6 entries, but cache.k has 7");
  CHECK(contiguous((s = {}, s.out[0] = 1, s)) == "shape: out has 1 batches, but q has 2");
  CHECK(contiguous((s = {}, s.out[1] = 2, s)) == "shape: out has 2 heads, but q has 4");
  CHECK(contiguous((s = {}, s.out[2] = 5, s)) == "shape: out has 5 columns, but cache.v has 3");
  CHECK(contiguous((s = {}, s.lse[0] = 3, s)) == "shape: lse has 3 rows, but q has 2");
  CHECK(contiguous((s = {}, s.lse[1] = 2, s)) == "shape: lse has 2 columns, but q has 4");
  CHECK(contiguous((s = {}, s.options.scale = INFINITY, s)) == "value: scale = inf is not finite");
  CHECK(contiguous((s = {}, s.options.softcap = -1, s)) == "value: softcap = -1 is not positive");
  CHECK(contiguous((s = {}, s.options.softcap = std::nan(""), s)) == "value: softcap = nan is not positive");
  CHECK(contiguous((s = {}, s.options.softcap = INFINITY, s)) == "value: softcap = inf is not positive");
  CHECK(contiguous((s = {}, s.options.softcap = 1e39, s)) ==
        "value: softcap = 1e+39 is outside [1.1754944e-38, 8.507059e+37], which f32 holds with its inverse");
  CHECK(contiguous((s = {}, s.options.scale = 1e39, s)) == "value: scale = 1e+39 is infinite in f32");
  s = {};

  // Views as a test makes them.
  const auto run = [&](const auto& q, const auto& k, const auto& v, const auto& out, const matrix_view<float>& lse) {
    return m.refusal("attention::decode",
                     [&] { attention::decode(cpu{}, q, attention::contiguous(k, v, lengths), out, {}, lse); });
  };
  const auto q = m.in(s.q);
  const auto k = m.in(s.k), v = m.in(s.v);
  const auto out = m.out(at_out, s.out);
  const auto lse = m.out(at_lse, s.lse);
  using view3 = tensor_view<float, 3>;
  using view4 = tensor_view<float, 4>;
  CHECK(run(view3(nullptr, s.q), k, v, out, lse) == "value: q is null, but has shape [2, 4, 5]");
  CHECK(run(q, view4(nullptr, s.k), v, out, lse) == "value: cache.k is null, but has shape [2, 2, 7, 5]");
  CHECK(run(q, k, view4(nullptr, s.v), out, lse) == "value: cache.v is null, but has shape [2, 2, 7, 3]");
  CHECK(run(q, k, v, view3(nullptr, s.out), lse) == "value: out is null, but has shape [2, 4, 3]");
  CHECK(run(q, k, v, out, matrix_view<float>(nullptr, s.lse)) == "value: lse is null, but has shape [2, 4]");
  CHECK(run(q, k, v, view3(out.data, s.out, {12, 0, 1}), lse) ==
        "shape: out of shape [2, 4, 3] has overlapping strides [12, 0, 1]");
  CHECK(run(q, k, v, out, matrix_view<float>(lse.data, s.lse, {1, 1})) ==
        "shape: lse of shape [2, 4] has overlapping strides [1, 1]");
  CHECK(run(view3(out.data + 8, s.q), k, v, out, lse) == "shape: out [2, 4, 3] overlaps q [2, 4, 5]");
  CHECK(run(q, view4(out.data + 8, s.k), v, out, lse) == "shape: out [2, 4, 3] overlaps cache.k [2, 2, 7, 5]");
  CHECK(run(q, k, view4(lse.data + 4, s.v), out, lse) == "shape: lse [2, 4] overlaps cache.v [2, 2, 7, 3]");
  CHECK(run(q, k, v, out, matrix_view<float>(out.data + 8, s.lse)) == "shape: lse [2, 4] overlaps out [2, 4, 3]");
  const std::string apart = "shape: cache: the elements of a key or value must lie beside each other";
  CHECK(run(q, tensor_view<const float, 4>(m.read.data(), s.k, {140, 70, 10, 2}), v, out, lse) == apart);
  CHECK(run(q, k, tensor_view<const float, 4>(m.read.data(), s.v, {42, 21, 1, 7}), out, lse) == apart);

  const auto paged = [&](const four& pk, const four& pv, const extents_t<2>& t, const std::int32_t* data) {
    return m.refusal("attention::decode", [&] {
      attention::decode(cpu{}, q,
                        attention::paged(m.in(pk), m.in(pv), matrix_view<const std::int32_t>(data, t), lengths), out,
                        {}, lse);
    });
  };
  CHECK(paged({4, 0, 2, 5}, {4, 0, 2, 3}, {2, 2}, table.data()) == "shape: cache.k has pages of 0 entries");
  CHECK(paged({4, 4, 2, 5}, {3, 4, 2, 3}, {2, 2}, table.data()) == "shape: cache.v has 3 pages, but cache.k has 4");
  CHECK(paged({4, 4, 2, 5}, {4, 5, 2, 3}, {2, 2}, table.data()) ==
        "shape: cache.v has 5 entries to a page, but cache.k has 4");
  CHECK(paged({4, 4, 2, 5}, {4, 4, 1, 3}, {2, 2}, table.data()) == "shape: cache.v has 1 heads, but cache.k has 2");
  CHECK(paged({4, 4, 2, 5}, {4, 4, 2, 3}, {1, 2}, table.data()) ==
        "shape: cache.lengths has 2 elements, but cache.table has 1");
  CHECK(paged({4, 4, 2, 5}, {4, 4, 2, 3}, {2, 1}, table.data()) == "value: cache.lengths[0] = 5 is outside [0, 4]");
  CHECK(paged({3, 4, 2, 5}, {3, 4, 2, 3}, {2, 2}, table.data()) == "value: cache.table[1, 1] = 3 is outside [0, 3)");
  CHECK(paged({4, 4, 2, 5}, {4, 4, 2, 3}, {2, 2}, nullptr) == "value: cache.table is null, but has shape [2, 2]");
}

TEST_CASE("merge refuses what does not fit", "[attention][bad input]") {
  memory m;
  const four rows{2, 4, 6, 3};
  const three heads{2, 4, 6};
  const auto run = [&](const auto& out, const auto& lse, const auto& other, const auto& other_lse) {
    return m.refusal("attention::merge", [&] { attention::merge(cpu{}, out, lse, other, other_lse); });
  };
  const auto out = m.out(at_out, rows);
  const auto lse = m.out(at_lse, heads);
  const auto other = m.in(rows);
  const auto other_lse = m.in(heads);
  CHECK(run(out, lse, m.in<4>({2, 4, 6, 5}), other_lse) ==
        "shape: other has shape [2, 4, 6, 5], but out has [2, 4, 6, 3]");
  CHECK(run(out, m.out<3>(at_lse, {2, 4, 5}), other, other_lse) ==
        "shape: lse has shape [2, 4, 5] and other_lse [2, 4, 6], but out has rows [2, 4, 6]");
  CHECK(run(out, lse, other, m.in<3>({2, 2, 6})) ==
        "shape: lse has shape [2, 4, 6] and other_lse [2, 2, 6], but out has rows [2, 4, 6]");
  CHECK(run(out, lse, m.out(at_out + 8, rows), other_lse) == "shape: out [2, 4, 6, 3] overlaps other [2, 4, 6, 3]");
  CHECK(run(out, lse, other, m.out(at_lse + 8, heads)) == "shape: lse [2, 4, 6] overlaps other_lse [2, 4, 6]");
  CHECK(run(out, m.out(at_out + 8, heads), other, other_lse) == "shape: lse [2, 4, 6] overlaps out [2, 4, 6, 3]");
  CHECK(run(tensor_view<float, 4>(nullptr, rows), lse, other, other_lse) ==
        "value: out is null, but has shape [2, 4, 6, 3]");
  CHECK(run(out, tensor_view<float, 3>(nullptr, heads), other, other_lse) ==
        "value: lse is null, but has shape [2, 4, 6]");
  CHECK(run(out, lse, tensor_view<float, 4>(nullptr, rows), other_lse) ==
        "value: other is null, but has shape [2, 4, 6, 3]");
  CHECK(run(out, lse, other, tensor_view<float, 3>(nullptr, heads)) ==
        "value: other_lse is null, but has shape [2, 4, 6]");
  CHECK(run(tensor_view<float, 4>(out.data, rows, {72, 18, 1, 1}), lse, other, other_lse) ==
        "shape: out of shape [2, 4, 6, 3] has overlapping strides [72, 18, 1, 1]");
}

TEST_CASE("attention refuses numbers of threads that are none", "[attention][bad input]") {
  memory m;
  const shapes s;
  const attention::scores<attention::scale> plain{attention::scale{0.5}};
  const std::vector<int> lengths{5, 7};
  const attention::contiguous cache(m.in(s.k), m.in(s.v), lengths);
  for (const auto& wrong : {std::pair(-1, "threads = -1 is negative"),
                            std::pair(mlkit::most_threads + 1, "threads = 1025 is above 1024")}) {
    const cpu exec{.threads = wrong.first};
    const auto says = [&](const auto& call) {
      std::string said = "no error";
      try {
        call();
      } catch (const mlkit::value_error& e) {
        said = e.what();
      }
      CHECK(said == std::string("mlkit::value_error: cpu: ") + wrong.second);
      CHECK(m.untouched());
    };
    const auto out = m.out(at_out, s.out);
    const auto lse = m.out(at_lse, s.lse);
    says([&] { attention::forward(exec, m.in(s.q), m.in(s.k), m.in(s.v), plain, out, lse); });
    says([&] {
      attention::backward(exec, m.in(s.q), m.in(s.k), m.in(s.v), plain, m.in(s.out), m.in(s.lse), m.in(s.dout),
                          gradients_of(m, s));
    });
    says([&] { attention::decode(exec, m.in<3>({2, 4, 5}), cache, m.out<3>(at_out, {2, 4, 3})); });
    says([&] { attention::merge(exec, out, lse, m.in(s.out), m.in(s.lse)); });
  }
}
