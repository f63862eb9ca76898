// Attention over the shapes of diffusion and language models, forward and backward, and decoding. PyTorch runs from
// peers/attention.py.
#include <map>
#include <mlkit/attention.hpp>
#include <mlkit/lora.hpp>
#include <numeric>

#include "harness.hpp"

namespace {

namespace attention = mlkit::attention;
namespace lora = mlkit::lora;
using bench::operand;
using mlkit::bf16;
using mlkit::index_t;
using call = std::function<void()>;
using tensor_view3 = mlkit::tensor_view<float, 3>;

struct problem {
  index_t batch, heads, kv_heads, queries, keys, d;
  bool one_thread = false;  // measured on one thread too

  // "1x8kv2x1024x1024x128"
  std::string shape() const {
    return bench::shape(batch, heads) + (kv_heads == heads ? "" : "kv" + std::to_string(kv_heads)) + 'x' +
           bench::shape(queries, keys, d);
  }
  double query_elements() const { return static_cast<double>(batch * heads * queries * d); }
  double key_elements() const { return static_cast<double>(batch * kv_heads * keys * d); }
};

template <class T>
mlkit::tensor_view<T, 4> tensor(const std::string& name, index_t batch, index_t heads, index_t rows, index_t cols) {
  return {operand<T>(name, batch * heads * rows, cols).data(), {batch, heads, rows, cols}};
}

// The memory of a case; what it writes is its own, as backward reads what forward has written.
template <class T>
struct operands {
  mlkit::tensor_view<T, 4> q, k, v, out, dout, dq, dk, dv;
  mlkit::tensor_view<float, 3> lse;
  operands(const std::string& name, const problem& p)
      : q(tensor<T>("q", p.batch, p.heads, p.queries, p.d)),
        k(tensor<T>("k", p.batch, p.kv_heads, p.keys, p.d)),
        v(tensor<T>("v", p.batch, p.kv_heads, p.keys, p.d)),
        out(tensor<T>("out " + name, p.batch, p.heads, p.queries, p.d)),
        dout(tensor<T>("dout", p.batch, p.heads, p.queries, p.d)),
        dq(tensor<T>("dq", p.batch, p.heads, p.queries, p.d)),
        dk(tensor<T>("dk", p.batch, p.kv_heads, p.keys, p.d)),
        dv(tensor<T>("dv", p.batch, p.kv_heads, p.keys, p.d)),
        lse(operand<float>("lse " + name, p.batch * p.heads, p.queries).data(), {p.batch, p.heads, p.queries}) {}
};

// What happens to the scores. A kind has the name of its case, the pipeline, the pairs of a query and a key that count
// for a head, and the elements that the pipeline reads.
struct every_key {
  static double pairs(const problem& p) { return static_cast<double>(p.queries * p.keys); }
  static double elements(const problem&) { return 0; }
};
struct plain : every_key {
  static constexpr auto name = "attention";
  template <class T>
  static auto scores(const problem&) {
    return attention::scores<>{};
  }
};
struct causal : every_key {
  static constexpr auto name = "attention_causal";
  static double pairs(const problem& p) { return static_cast<double>(p.queries * (p.queries + 1) / 2); }
  template <class T>
  static auto scores(const problem&) {
    return attention::scores{attention::causal{attention::align::top_left}};
  }
};
struct window : every_key {
  static constexpr auto name = "attention_window256";
  static constexpr index_t size = 256;
  static double pairs(const problem& p) { return static_cast<double>(size * p.queries - size * (size - 1) / 2); }
  template <class T>
  static auto scores(const problem&) {
    return attention::scores{attention::window{.left = size - 1}};
  }
};
// Masks that leave every pair: whether whole blocks pay for being asked about.
struct full_ranges : every_key {
  static constexpr auto name = "attention_full_ranges";
  template <class T>
  static auto scores(const problem& p) {
    static const std::vector<std::int32_t> lengths(static_cast<std::size_t>(p.batch),
                                                   static_cast<std::int32_t>(p.keys)),
        one_document(static_cast<std::size_t>(p.keys));
    return attention::scores{attention::window{.left = p.keys, .right = p.keys}, attention::key_lengths{lengths},
                             attention::documents{one_document}};
  }
};
struct full_mask : every_key {
  static constexpr auto name = "attention_full_mask";
  template <class T>
  static auto scores(const problem& p) {
    static const std::vector<std::uint8_t> ones(static_cast<std::size_t>(p.queries * p.keys), 1);
    return attention::scores{
        attention::boolean_mask{mlkit::matrix_view<const std::uint8_t>(ones.data(), {p.queries, p.keys})}};
  }
};
struct bias : every_key {
  static constexpr auto name = "attention_bias";
  static double elements(const problem& p) { return static_cast<double>(p.batch * p.heads) * pairs(p); }
  template <class T>
  static auto values(const std::string& of, const problem& p) {
    return tensor<T>(of, p.batch, p.heads, p.queries, p.keys);
  }
  template <class T>
  static auto scores(const problem& p) {
    return attention::scores{attention::bias{values<T>("bias", p)}};
  }
};

// A built-in stage, and a functor of the user's that does the same.
mlkit::vector_view<const float> slopes() {
  static const std::vector<float> values{0.5f, 0.25f, 0.125f, 0.0625f, 0.03125f, 0.015625f, 0.0078125f, 0.00390625f};
  return {values.data(), {static_cast<index_t>(values.size())}};
}
struct alibi : every_key {
  static constexpr auto name = "attention_alibi";
  template <class T>
  static auto scores(const problem&) {
    return attention::scores{attention::alibi{slopes()}};
  }
};
struct distance {
  const float* slopes;
  float operator()(float score, const attention::position& at) const {
    return score - slopes[at.h] * std::fabs(static_cast<float>(at.i - at.j));
  }
  float derivative(float, const attention::position&) const { return 1; }
};
struct alibi_functor : every_key {
  static constexpr auto name = "attention_alibi_functor";
  template <class T>
  static auto scores(const problem&) {
    return attention::scores{distance{slopes().data}};
  }
};

template <class T>
bench::work work_of(const problem& p, double pairs, double products, double elements) {
  return {2 * products * static_cast<double>(p.batch * p.heads * p.d) * pairs, elements * sizeof(T)};
}

// Registers a case for the thread counts that it is measured on; make(exec) returns the call to time.
template <class T, class Make>
void add(const std::string& name, const std::string& shape, bool one_thread, const bench::work& work, Make make) {
  for (const int threads : bench::thread_counts())
    if (one_thread || threads == bench::thread_counts().back())
      bench::add_mlkit({name, mlkit::dtype_name<T>(), shape, threads, "mlkit"}, work,
                       [=] { return call(make(mlkit::cpu{.threads = threads})); });
}

template <class Kind, class T>
auto forward(const problem& p) {
  return [p](mlkit::cpu exec) {
    return [=, m = operands<T>(Kind::name, p), scores = Kind::template scores<T>(p)] {
      attention::forward(exec, m.q, m.k, m.v, scores, m.out);
    };
  };
}
template <class Kind, class T>
bench::work forward_work(const problem& p) {
  return work_of<T>(p, Kind::pairs(p), 2, 2 * p.query_elements() + 2 * p.key_elements() + Kind::elements(p));
}

template <class Kind, class T = float>
void add_forward(const problem& p) {
  add<T>(Kind::name, p.shape(), p.one_thread, forward_work<Kind, T>(p), forward<Kind, T>(p));
}

// The workspace of one call, which is not timed.
template <class Kind, class T = float>
void add_forward_memory(const problem& p) {
  bench::add_memory({Kind::name, mlkit::dtype_name<T>(), p.shape(), 0, ""}, forward_work<Kind, T>(p),
                    [=] { return call(forward<Kind, T>(p)(mlkit::cpu{})); });
}

// Forward that backward follows, which also writes the lse.
template <class Kind, class T = float>
void add_training_forward(const problem& p) {
  const std::string name = std::string(Kind::name) + "_training";
  add<T>(name, p.shape(), p.one_thread, forward_work<Kind, T>(p), [=](mlkit::cpu exec) {
    return [=, m = operands<T>(name, p), scores = Kind::template scores<T>(p)] {
      attention::forward(exec, m.q, m.k, m.v, scores, m.out, m.lse);
    };
  });
}

// Backward alone: forward has run before, and its out and lse are read.
template <class Kind, class T = float>
void add_backward(const problem& p) {
  const std::string name = std::string(Kind::name) + "_backward";
  const double elements = 4 * p.query_elements() + 4 * p.key_elements() + 2 * Kind::elements(p);
  add<T>(name, p.shape(), p.one_thread, work_of<T>(p, Kind::pairs(p), 5, elements), [=](mlkit::cpu exec) {
    const operands<T> m(name, p);
    const auto scores = Kind::template scores<T>(p);
    attention::forward(exec, m.q, m.k, m.v, scores, m.out, m.lse);
    return [=] {
      attention::gradients g{m.dq, m.dk, m.dv};
      if constexpr (std::is_same_v<Kind, bias>) g.dbias = bias::values<T>("dbias", p);
      attention::backward(exec, m.q, m.k, m.v, scores, m.out, m.lse, m.dout, g);
    };
  });
}

template <class Kind>
void add_all(const problem& p) {
  add_forward<Kind, float>(p);
  add_forward<Kind, bf16>(p);
  add_backward<Kind, float>(p);
  add_backward<Kind, bf16>(p);
}

// Attention that also writes the mean of its heads' maps, of all keys or of three words among them.
template <class T>
void add_map(const std::string& name, const problem& p, bool words) {
  const index_t columns = words ? 3 : p.keys;
  const double elements = static_cast<double>(p.batch * p.queries * columns);
  bench::work work = forward_work<plain, T>(p);
  work.bytes += elements * sizeof(T);
  add<T>(name, p.shape(), false, work, [=](mlkit::cpu exec) {
    const operands<T> m(name, p);
    const mlkit::tensor_view<T, 3> map(operand<T>("map " + name, p.batch * p.queries, columns).data(),
                                       {p.batch, p.queries, columns});
    return [=, keys = std::vector<std::int32_t>{1, 4, 5}] {
      attention::forward(exec, m.q, m.k, m.v, attention::scores<>{}, m.out,
                         words ? attention::averaged_map{map, keys} : attention::averaged_map{map});
    };
  });
}

// Prompt-to-Prompt: a source prompt and an edit of it, of which a word in the middle is new, halfway through the steps
// of editing; once with a local blend.
template <class T>
void add_edit(const std::string& name, const problem& p, bool blended) {
  add<T>(name, p.shape(), false, forward_work<plain, T>(p), [=](mlkit::cpu exec) {
    std::vector<std::int32_t> source(9), target(10);
    std::iota(source.begin(), source.end(), 0);
    std::iota(target.begin(), target.end(), 0);
    std::rotate(target.begin() + 4, target.end() - 1, target.end());
    const attention::edit_plan plan({}, {{.words = attention::align_refined(source, target, p.keys)}});
    const attention::local_blend blend({.height = p.queries, .width = 1}, p.keys, {{3}, {3, 4}});
    return [=, m = operands<T>(name, p), blend = std::make_shared<attention::local_blend>(blend)] {
      if (blended)
        attention::edited_cross(exec, m.q, m.k, m.v, attention::scores<>{}, plan, 20, m.out, *blend);
      else
        attention::edited_cross(exec, m.q, m.k, m.v, attention::scores<>{}, plan, 20, m.out);
    };
  });
}
template <class T>
void add_self_edit(const problem& p) {
  add<T>("attention_edit_self", p.shape(), false, forward_work<plain, T>(p), [=](mlkit::cpu exec) {
    const attention::edit_plan plan({}, {{.words = attention::align_same(77)}});
    return [=, m = operands<T>("attention_edit_self", p)] {
      attention::edited_self(exec, m.q, m.k, m.v, attention::scores<>{}, plan, 10, m.out);
    };
  });
}

// One query of each sequence against its cache of keys and values.
template <class T>
void add_decode(const problem& p) {
  const std::string shape =
      bench::shape(p.batch, p.heads) + "kv" + std::to_string(p.kv_heads) + 'x' + bench::shape(p.keys, p.d);
  add<T>("decode", shape, p.one_thread,
         work_of<T>(p, static_cast<double>(p.keys), 2, 2 * p.query_elements() + 2 * p.key_elements()),
         [=](mlkit::cpu exec) {
           const operands<T> m("decode", p);
           const auto rows = [&](const auto& x) { return mlkit::tensor_view<T, 3>(x.data, {p.batch, p.heads, p.d}); };
           return [=, q = rows(m.q), out = rows(m.out),
                   lengths = std::vector<int>(static_cast<std::size_t>(p.batch), static_cast<int>(p.keys))] {
             attention::decode(exec, q, attention::contiguous(m.k, m.v, lengths), out);
           };
         });
}

// A layer of cross-attention as in Stable Diffusion 1.5: tokens of an image, 320 wide in its largest blocks, over 77 of
// a text, 768 wide; the result's projection has a bias. The adapters are as after training: B is not zero.
struct layer {
  static constexpr index_t width = 320, context_width = 768, rank = 4;
  problem p;

  static tensor_view3 tokens(const std::string& name, index_t batch, index_t count, index_t columns) {
    return {operand<float>(name, batch * count, columns).data(), {batch, count, columns}};
  }
  auto x() const { return tokens("layer x", p.batch, p.queries, width); }
  auto context() const { return tokens("layer context", p.batch, p.keys, context_width); }
  auto y() const { return tokens("layer y", p.batch, p.queries, width); }
  auto dy() const { return tokens("layer dy", p.batch, p.queries, width); }
  auto dx() const { return tokens("layer dx", p.batch, p.queries, width); }
  // Weights as large as those that layers start with, so that scores are of ordinary sizes.
  static mlkit::matrix<float>& weight(const std::string& name, index_t in) {
    static std::map<std::string, mlkit::matrix<float>> weights;
    const auto [it, fresh] = weights.try_emplace(name, mlkit::extents_t<2>{width, in}, mlkit::uninitialized);
    const auto& w = operand<float>("layer " + name, width, in);
    const float size = 1 / std::sqrt(static_cast<float>(in));
    if (fresh) std::transform(w.begin(), w.end(), it->second.begin(), [=](float v) { return size * v; });
    return it->second;
  }
  static lora::dense<float> base(const std::string& name, index_t in) { return lora::dense{weight(name, in)}; }
  static lora::dense<float> base_of_out() {
    return {weight("out", width), mlkit::vector_view<float>(operand<float>("layer bias", 1, width).data(), {width})};
  }
  static lora::adapter_view<float> adapter(const std::string& name, index_t in) {
    return {operand<float>("layer a " + name, rank, in), operand<float>("layer b " + name, width, rank), 0.01};
  }
  static lora::gradients<float> gradients(const std::string& name, index_t in) {
    return {operand<float>("layer da " + name, rank, in), operand<float>("layer db " + name, width, rank)};
  }
  auto plain() const {
    return attention::cross{lora::projection{base("q", width)},
                            lora::projection{base("k", context_width)},
                            lora::projection{base("v", context_width)},
                            lora::projection{base_of_out()},
                            {.heads = p.heads}};
  }
  auto adapted() const {
    return attention::cross{lora::projection{base("q", width), adapter("q", width)},
                            lora::projection{base("k", context_width), adapter("k", context_width)},
                            lora::projection{base("v", context_width), adapter("v", context_width)},
                            lora::projection{base_of_out(), adapter("out", width)},
                            {.heads = p.heads}};
  }
  auto all_gradients() const {
    return attention::layer_gradients{gradients("q", width), gradients("k", context_width),
                                      gradients("v", context_width), gradients("out", width)};
  }

  double query_tokens() const { return static_cast<double>(p.batch * p.queries); }
  double key_tokens() const { return static_cast<double>(p.batch * p.keys); }
  // The flops of attention, of the four projections and of their adapters.
  double attention_flop() const { return 4 * query_tokens() * static_cast<double>(p.heads * p.keys * p.d); }
  double plain_flop() const { return 4 * width * (query_tokens() * width + key_tokens() * context_width); }
  double adapter_flop() const {
    return 4 * rank * (query_tokens() * (width + width) + key_tokens() * (context_width + width));
  }
  double bytes() const {
    return 4 * (2 * query_tokens() * width + key_tokens() * context_width + 2 * width * (width + context_width));
  }
  bench::work plain_work() const { return {attention_flop() + plain_flop(), bytes()}; }
  bench::work adapted_work() const { return {attention_flop() + plain_flop() + adapter_flop(), bytes()}; }
  // Forward; backward with all five products of attention, those of dq and dout with the weights, and three of each
  // adapter's.
  bench::work training_work() const {
    return {3.5 * attention_flop() + plain_flop() + 4 * query_tokens() * width * width + 3 * adapter_flop(),
            2 * bytes()};
  }
};

// Plain, with adapters, and as calls of their own: four linears and an attention.
void add_layer(const layer& l) {
  add<float>("attention_layer", l.p.shape(), true, l.plain_work(),
             [=](mlkit::cpu exec) { return [=, of = l.plain()] { of.forward(exec, l.x(), l.context(), l.y()); }; });
  add<float>("attention_layer_lora", l.p.shape(), true, l.adapted_work(),
             [=](mlkit::cpu exec) { return [=, of = l.adapted()] { of.forward(exec, l.x(), l.context(), l.y()); }; });
  add<float>("attention_layer_parts", l.p.shape(), true, l.plain_work(), [=](mlkit::cpu exec) {
    const auto matrix = [](const tensor_view3& t) {
      return mlkit::matrix_view<float>(t.data, {t.extent(0) * t.extent(1), t.extent(2)});
    };
    const auto heads = [=](const tensor_view3& t) {
      const index_t n = t.extent(1), columns = t.extent(2);
      return mlkit::tensor_view<float, 4>(t.data, {l.p.batch, l.p.heads, n, l.p.d}, {n * columns, l.p.d, columns, 1});
    };
    const auto result = [=](const std::string& name, index_t tokens) {
      return layer::tokens("layer result " + name, l.p.batch, tokens, layer::width);
    };
    return [=, q = result("q", l.p.queries), k = result("k", l.p.keys), v = result("v", l.p.keys),
            out = result("out", l.p.queries), x = matrix(l.x()), context = matrix(l.context()), y = matrix(l.y()),
            base_q = l.base("q", layer::width), base_k = l.base("k", layer::context_width),
            base_v = l.base("v", layer::context_width), base_out = l.base_of_out()] {
      lora::linear(exec, x, base_q, matrix(q));
      lora::linear(exec, context, base_k, matrix(k));
      lora::linear(exec, context, base_v, matrix(v));
      attention::forward(exec, heads(q), heads(k), heads(v), heads(out));
      lora::linear(exec, matrix(out), base_out, y);
    };
  });
  add<float>("attention_layer_lora_training", l.p.shape(), true, l.training_work(), [=](mlkit::cpu exec) {
    return [=, of = l.adapted(), kept = std::make_shared<attention::kept<float>>(), grads = l.all_gradients()] {
      of.forward(exec, l.x(), l.context(), attention::scores<>{}, l.y(), *kept);
      of.backward(exec, l.x(), l.context(), attention::scores<>{}, *kept, l.dy(), grads, l.dx());
    };
  });
}

}  // namespace

int main(int argc, char** argv) {
  constexpr double mib = 1 << 20;
  bench::add_ceilings({8 * mib, 64 * mib, 128 * mib});
  const problem self{1, 8, 8, 1024, 1024, 64, true}, long_self{1, 8, 8, 2048, 2048, 64, true},
      cross_40{2, 8, 8, 4096, 77, 40}, cross_80{2, 8, 8, 1024, 77, 80}, grouped{1, 8, 2, 1024, 1024, 128},
      one_head{1, 1, 1, 4096, 4096, 64}, odd{3, 5, 5, 333, 777, 48, true}, odd_grouped{3, 5, 1, 333, 777, 48};
  for (const problem& p : {self, cross_40, cross_80, one_head, odd}) add_all<plain>(p);
  for (const problem& p : {long_self, grouped, odd_grouped}) add_all<causal>(p);
  for (const problem& p : {self, odd}) {
    add_all<bias>(p);
    add_training_forward<bias, float>(p);
    add_training_forward<bias, bf16>(p);
  }
  for (const problem& p : {problem{8, 32, 8, 1, 2048, 128, true}, problem{3, 5, 5, 1, 777, 48}}) {
    add_decode<float>(p);
    add_decode<bf16>(p);
  }

  add_layer({cross_40});
  for (const problem& p : {cross_40, cross_80, self}) {
    add_map<float>("attention_map", p, false);
    add_map<bf16>("attention_map", p, false);
  }
  add_map<float>("attention_words", cross_40, true);
  const problem self_80{2, 8, 8, 1024, 1024, 80};
  add_forward<plain, float>(self_80);
  add_self_edit<float>(self_80);
  for (const problem& p : {cross_40, cross_80}) {
    add_edit<float>("attention_edit", p, false);
    add_edit<bf16>("attention_edit", p, false);
  }
  add_edit<float>("attention_edit_blend", cross_40, true);

  // What masks save, and cost where they hide nothing, and what a stage of the user's costs.
  const problem long_head{1, 1, 1, 8192, 8192, 64};
  add_forward<causal>(one_head);
  add_backward<causal>(one_head);
  add_forward<plain>(long_head);
  add_forward<window>(long_head);
  add_forward<full_ranges>(self);
  add_forward<full_mask>(self);
  add_forward<alibi>(self);
  add_forward<alibi_functor>(self);
  add_backward<alibi>(self);
  add_backward<alibi_functor>(self);
  for (const index_t keys : {1024, 32768}) add_forward_memory<plain>({1, 1, 1, 1024, keys, 64});
  return bench::run(argc, argv);
}
