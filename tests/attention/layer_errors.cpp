// What attention layers refuse, in words, with nothing written.
#include <array>
#include <catch2/catch.hpp>
#include <cmath>
#include <mlkit/attention.hpp>
#include <mlkit/lora.hpp>
#include <string>
#include <vector>

namespace attention = mlkit::attention;
namespace lora = mlkit::lora;
using mlkit::index_t;

namespace {

constexpr float poison = 12345;

// A tensor within memory that all inputs, or all outputs, share.
template <int Rank>
struct place {
  index_t at = 0;
  mlkit::extents_t<Rank> extents{};
  mlkit::extents_t<Rank> strides = {};  // as they come, unless they are given
  bool null = false;

  template <class T>
  mlkit::tensor_view<T, Rank> in(T* memory) const {
    mlkit::tensor_view<T, Rank> v(null ? nullptr : memory + at, extents);
    if (strides != mlkit::extents_t<Rank>{}) v.strides = strides;
    return v;
  }
};
using three = place<3>;
using two = place<2>;
using one = place<1>;

// A layer of 4 heads over 2, 2 wide and with values 3 wide, and all that its calls are given, of shapes that fit.
struct arguments {
  std::vector<float> read = std::vector<float>(8192, 0.5f), written = std::vector<float>(8192, poison);
  mlkit::cpu exec;
  attention::layer_options options{.heads = 4, .kv_heads = 2};
  two qw{0, {8, 6}}, qa{100, {2, 6}}, qb{200, {8, 2}}, kw{300, {4, 5}}, vw{400, {6, 5}}, va{500, {2, 5}},
      vb{600, {6, 2}}, ow{700, {7, 12}};
  one qbias{800, {8}}, magnitude{900, {6}};
  double scale = 1;
  lora::linear_options<float> adapter_options;
  three x{1000, {2, 3, 6}}, context{1100, {2, 4, 5}}, dy{1200, {2, 3, 7}};
  place<4> bias{1300, {1, 4, 3, 4}};
  attention::rotary_table<float> table{{.positions = 8, .d = 2}};
  attention::rotation q_rotation, k_rotation;
  std::vector<std::int32_t> positions = std::vector<std::int32_t>(16, 1);
  attention::kept<float> kept;

  three y{0, {2, 3, 7}}, dx{1000, {2, 3, 6}}, dcontext{2000, {2, 4, 5}};
  two qda{3000, {2, 6}}, qdb{3100, {8, 2}}, vda{3200, {2, 5}}, vdb{3300, {6, 2}};
  one dmagnitude{3400, {6}};
  place<4> dbias{3500, {1, 4, 3, 4}};
  // Memory that is read in place of written, so that outputs can overlap it.
  bool y_is_read = false, qda_is_read = false;

  auto layer() {
    const float* const r = read.data();
    const lora::adapter_view<float> of_q{qa.in(r), qb.in(r), scale}, of_v{va.in(r), vb.in(r), 1};
    return attention::cross{lora::projection{lora::dense{qw.in(r), qbias.in(r)}, of_q, adapter_options},
                            lora::projection{lora::dense{kw.in(r)}},
                            lora::projection{lora::dense{vw.in(r)}, lora::dora{of_v, magnitude.in(r)}},
                            lora::projection{lora::dense{ow.in(r)}},
                            options,
                            attention::rotary{table, q_rotation, k_rotation}};
  }
  auto scores() const { return attention::scores{attention::bias{bias.in(read.data())}}; }
  void forward() {
    const float* const r = read.data();
    layer().forward(exec, x.in(r), context.in(r), scores(), y.in((y_is_read ? read : written).data()), kept);
  }
  void backward() {
    const float* const r = read.data();
    float* const w = written.data();
    const attention::layer_gradients grads{
        lora::gradients{qda.in((qda_is_read ? read : written).data()), qdb.in(w)}, lora::no_gradients{},
        lora::gradients{vda.in(w), vdb.in(w), dmagnitude.in(w)}, lora::no_gradients{}, dbias.in(w)};
    layer().backward(exec, x.in(r), context.in(r), scores(), kept, dy.in(r), grads, dx.in(w), dcontext.in(w));
  }

  // What a call says when it refuses: the kind of error, and what follows the function's name.
  template <class Call>
  std::string refusal(const std::string& function, const Call& call) const {
    const std::vector<float> inputs = read;
    const float* const q = kept.q.data();
    std::string said = "no error", kind;
    try {
      call();
    } catch (const mlkit::shape_error& e) {
      kind = "shape", said = e.what();
    } catch (const mlkit::value_error& e) {
      kind = "value", said = e.what();
    }
    const bool untouched = std::all_of(written.begin(), written.end(), [](float v) { return v == poison; }) &&
                           inputs == read && kept.q.data() == q;
    if (!untouched) return "written to, and: " + said;
    const std::string start = "mlkit::" + kind + "_error: " + function + ": ";
    return said.rfind(start, 0) == 0 ? kind + ": " + said.substr(start.size()) : said;
  }
};

std::string of_forward(arguments& a) {
  return a.refusal("attention::cross::forward", [&] { a.forward(); });
}
std::string of_backward(arguments& a) {
  return a.refusal("attention::cross::backward", [&] { a.backward(); });
}
// Arguments with something changed.
template <class Change>
arguments with(const Change& change, bool after_forward = false) {
  arguments a;
  if (after_forward) {
    a.forward();
    std::fill(a.written.begin(), a.written.end(), poison);
  }
  change(a);
  return a;
}
template <class Change>
void refuses(const std::string& text, const Change& change) {
  arguments forward = with(change), backward = with(change, true);
  CHECK(of_forward(forward) == text);
  CHECK(of_backward(backward) == text);
}
template <class Change>
void refuses_forward(const std::string& text, const Change& change) {
  arguments a = with(change);
  CHECK(of_forward(a) == text);
}
template <class Change>
void refuses_backward(const std::string& text, const Change& change) {
  arguments a = with(change, true);
  CHECK(of_backward(a) == text);
}
using args = arguments&;

}  // namespace

TEST_CASE("a layer takes what fits", "[attention][layer][bad input]") {
  arguments a;
  CHECK(of_forward(a) == "written to, and: no error");
  std::fill(a.written.begin(), a.written.end(), poison);
  CHECK(of_backward(a) == "written to, and: no error");
}

TEST_CASE("a layer names heads and projections that do not fit", "[attention][layer][bad input]") {
  refuses("value: heads = 0 is not positive", [](args a) { a.options.heads = 0; });
  refuses("value: kv_heads = -1 is negative", [](args a) { a.options.kv_heads = -1; });
  refuses("shape: there are 4 heads, which is no multiple of kv_heads = 3", [](args a) { a.options.kv_heads = 3; });
  refuses("shape: q has 9 outputs, which is no multiple of 4 heads", [](args a) { a.qw.extents[0] = 9; });
  refuses("shape: v has 7 outputs, which is no multiple of 2 heads", [](args a) { a.vw.extents[0] = 7; });
  refuses("shape: k has 6 outputs, but 2 heads as wide as q's 2 need 4", [](args a) { a.kw.extents[0] = 6; });
  refuses("shape: out has 11 inputs, but 4 heads as wide as v's 3 give 12", [](args a) { a.ow.extents[1] = 11; });
  refuses("shape: x has 7 columns, but q has 6 inputs", [](args a) { a.x.extents[2] = 7; });
  refuses("shape: context has 4 columns, but k has 5 inputs", [](args a) { a.context.extents[2] = 4; });
  refuses("shape: context has 5 columns, but v has 4 inputs", [](args a) { a.vw.extents[1] = a.va.extents[1] = 4; });
  refuses("shape: q: adapter.a has 5 columns, but base has 6", [](args a) { a.qa.extents[1] = 5; });
  refuses("shape: q: adapter.b has 9 rows, but base has 8", [](args a) { a.qb.extents[0] = 9; });
  refuses("shape: v: adapter has rank 0; an adapter has rank 1 or more",
          [](args a) { a.va.extents[0] = a.vb.extents[1] = 0; });
  refuses("value: q: adapter has scale inf, which is not finite", [](args a) { a.scale = INFINITY; });
  refuses("value: q: dropout = 1.5 is outside [0, 1)", [](args a) { a.adapter_options.dropout = 1.5; });
  refuses("value: out: base is null, but has shape [7, 12]", [](args a) { a.ow.null = true; });
  refuses("shape: q: bias has 7 elements, but the output has 8", [](args a) { a.qbias.extents[0] = 7; });
  refuses("shape: v: magnitude has 5 elements, but the output has 6", [](args a) { a.magnitude.extents[0] = 5; });
}

TEST_CASE("a layer names tokens that do not fit", "[attention][layer][bad input]") {
  refuses("shape: context has 3 batches, but x has 2", [](args a) { a.context.extents[0] = 3; });
  refuses("value: x is null, but has shape [2, 3, 6]", [](args a) { a.x.null = true; });
  refuses("value: context is null, but has shape [2, 4, 5]", [](args a) { a.context.null = true; });
  refuses("shape: x's tokens are 6 elements apart, and its batches of 3 20; projections take tokens at equal distances",
          [](args a) {
            a.x.strides = {20, 6, 1};
          });
  refuses(
      "shape: context's tokens are 5 elements apart, and its batches of 4 0; projections take tokens at equal "
      "distances",
      [](args a) {
        a.context.strides = {0, 5, 1};
      });
  refuses("shape: bias has 5 keys, but the scores have 4 (1 would serve all)", [](args a) { a.bias.extents[3] = 5; });
  refuses_forward("shape: y has 3 batches, but x has 2", [](args a) { a.y.extents[0] = 3; });
  refuses_forward("shape: y has 4 tokens, but x has 3", [](args a) { a.y.extents[1] = 4; });
  refuses_forward("shape: y has 8 columns, but out has 7 outputs", [](args a) { a.y.extents[2] = 8; });
  refuses_forward("value: y is null, but has shape [2, 3, 7]", [](args a) { a.y.null = true; });
  refuses_forward(
      "shape: y's tokens are 7 elements apart, and its batches of 3 30; projections take tokens at equal distances",
      [](args a) {
        a.y.strides = {30, 7, 1};
      });
  refuses_forward("shape: y of shape [2, 3, 7] has overlapping strides [9, 3, 1]", [](args a) {
    a.y.strides = {9, 3, 1};
  });
  refuses_backward("shape: dy has 1 batches, but x has 2", [](args a) { a.dy.extents[0] = 1; });
  refuses_backward("shape: dy has 6 columns, but out has 7 outputs", [](args a) { a.dy.extents[2] = 6; });
  refuses_backward("shape: dx has 4 tokens, but x has 3", [](args a) { a.dx.extents[1] = 4; });
  refuses_backward("shape: dx has 7 columns, but x has 6", [](args a) { a.dx.extents[2] = 7; });
  refuses_backward("shape: dcontext has 4 columns, but context has 5", [](args a) { a.dcontext.extents[2] = 4; });
  refuses_backward("value: dcontext is null, but has shape [2, 4, 5]", [](args a) { a.dcontext.null = true; });
}

TEST_CASE("a layer names gradients that do not fit", "[attention][layer][bad input]") {
  refuses_backward("shape: q: da has 3 rows, but adapter.a has 2", [](args a) { a.qda.extents[0] = 3; });
  refuses_backward("shape: q: db has 3 columns, but adapter.b has 2", [](args a) { a.qdb.extents[1] = 3; });
  refuses_backward("value: v: da is null, but has shape [2, 5]", [](args a) { a.vda.null = true; });
  refuses_backward("shape: v: dmagnitude has 7 elements, but base has 6 outputs",
                   [](args a) { a.dmagnitude.extents[0] = 7; });
  refuses_backward("shape: dbias has shape [1, 4, 3, 3], but bias has [1, 4, 3, 4]",
                   [](args a) { a.dbias.extents[3] = 3; });
}

TEST_CASE("a layer's backward wants what forward kept", "[attention][layer][bad input]") {
  refuses_backward(
      "shape: kept.q has shape [0, 0, 0, 0], but this call's is [2, 3, 4, 2]; forward of the same shapes "
      "keeps it",
      [](args a) { a.kept = {}; });
  refuses_backward(
      "shape: kept.k has shape [2, 4, 2, 2], but this call's is [2, 5, 2, 2]; forward of the same shapes "
      "keeps it",
      [](args a) { a.context.extents[1] = a.dcontext.extents[1] = a.bias.extents[3] = a.dbias.extents[3] = 5; });
}

TEST_CASE("a layer names rotary embedding that does not fit", "[attention][layer][bad input]") {
  refuses("shape: rotary: table turns 4 elements, but q has 2 columns",
          [](args a) { a.table = attention::rotary_table<float>({.positions = 8, .d = 4}); });
  refuses("value: rotary: positions 6 to 9 are wanted, but table has 8", [](args a) { a.k_rotation.first = 6; });
  refuses("value: rotary: positions[0, 2] = 8 is outside [0, 8)", [](args a) {
    a.positions[2] = 8;
    a.q_rotation.positions = mlkit::matrix_view<const std::int32_t>(a.positions.data(), {1, 3});
  });
  refuses("shape: rotary: positions has 3 columns, but k has 4", [](args a) {
    a.k_rotation.positions = mlkit::matrix_view<const std::int32_t>(a.positions.data(), {2, 3});
  });
  refuses("shape: rotary: positions has 3 rows, but k's batch has 2", [](args a) {
    a.k_rotation.positions = mlkit::matrix_view<const std::int32_t>(a.positions.data(), {3, 4});
  });
}

TEST_CASE("a layer's outputs overlap nothing", "[attention][layer][bad input]") {
  const auto reading = [](index_t at) {
    return [at](args a) {
      a.y_is_read = true;
      a.y.at = at;
    };
  };
  refuses_forward("shape: y [2, 3, 7] overlaps x [2, 3, 6]", reading(1030));
  refuses_forward("shape: y [2, 3, 7] overlaps context [2, 4, 5]", reading(1110));
  refuses_forward("shape: y [2, 3, 7] overlaps q.base [8, 6]", reading(10));
  refuses_forward("shape: y [2, 3, 7] overlaps q.bias [8]", reading(790));
  refuses_forward("shape: y [2, 3, 7] overlaps q.adapter.b [8, 2]", reading(210));
  refuses_forward("shape: y [2, 3, 7] overlaps v.magnitude [6]", reading(890));
  refuses_forward("shape: y [2, 3, 7] overlaps out.base [7, 12]", reading(710));
  refuses_forward("shape: y [2, 3, 7] overlaps bias [1, 4, 3, 4]", reading(1310));
  refuses_backward("shape: q.da [2, 6] overlaps q.adapter.a [2, 6]", [](args a) {
    a.qda_is_read = true;
    a.qda.at = 100;
  });
  refuses_backward("shape: q.da [2, 6] overlaps dy [2, 3, 7]", [](args a) {
    a.qda_is_read = true;
    a.qda.at = 1200;
  });
  refuses_backward("shape: v.da [2, 5] overlaps q.da [2, 6]", [](args a) { a.vda.at = 3005; });
  refuses_backward("shape: dcontext [2, 4, 5] overlaps dx [2, 3, 6]", [](args a) { a.dcontext.at = 1010; });
  refuses_backward("shape: dbias [1, 4, 3, 4] overlaps v.dmagnitude [6]", [](args a) { a.dbias.at = 3402; });
  refuses_backward("shape: dx [2, 3, 6] overlaps q.h [6, 2]", [](args a) {
    a.adapter_options.h = mlkit::matrix_view<float>(a.written.data() + 1020, {6, 2});
  });
}

TEST_CASE("a layer refuses numbers of threads that nothing can run on", "[attention][layer][bad input]") {
  arguments a = with([](args all) { all.exec.threads = -1; });
  CHECK(of_forward(a) == "mlkit::value_error: cpu: threads = -1 is negative");
  CHECK(of_backward(a) == "mlkit::value_error: cpu: threads = -1 is negative");
}

TEST_CASE("a self-attention layer speaks of x", "[attention][layer][bad input]") {
  mlkit::matrix<float> w({8, 8}), narrow({8, 6});
  mlkit::tensor<float, 3> x({1, 3, 8}), y({1, 3, 8});
  const lora::projection p{lora::dense{w}}, from_six{lora::dense{narrow}};
  const auto said = [&](const auto& layer) -> std::string {
    try {
      layer.forward(mlkit::cpu{}, x, y);
    } catch (const mlkit::error& e) {
      return e.what();
    }
    return "no error";
  };
  CHECK(said(attention::self{p, p, p, p, {.heads = 2}}) == "no error");
  CHECK(said(attention::self{p, p, from_six, p, {.heads = 2}}) ==
        "mlkit::shape_error: attention::self::forward: x has 8 columns, but v has 6 inputs");
  CHECK(said(attention::self{p, p, p, p, {.heads = 3}}) ==
        "mlkit::shape_error: attention::self::forward: q has 8 outputs, which is no multiple of 3 heads");
  const std::vector<lora::adapter<float>> none;
  const std::vector<int> ids{-1, -1, 0};
  const lora::projection many{lora::dense{w}, lora::per_row{none, ids}};
  CHECK(said(attention::self{p, many, p, p, {.heads = 2}}) ==
        "mlkit::value_error: attention::self::forward: k: ids[2] = 0 is outside [-1, 0)");
}
