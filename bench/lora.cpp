// Adapted linear layers. The plain linear of each shape runs beside them, so that the report can say what an adapter
// costs; PEFT and bitsandbytes run from peers/lora.py.
#include <map>
#include <mlkit/lora.hpp>
#include <mlkit/lora/quantised.hpp>
#include <mlkit/matmul.hpp>

#include "harness.hpp"

namespace {

namespace lora = mlkit::lora;
using bench::operand;
using call = std::function<void()>;

struct layer {
  int tokens, out, in, rank = 0;

  auto& x() const { return operand<float>("x", tokens, in); }
  auto& w() const { return operand<float>("w", out, in); }
  auto& y() const { return operand<float>("y", tokens, out); }
  auto& dy() const { return operand<float>("dy", tokens, out); }
  auto& dx() const { return operand<float>("dx", tokens, in); }
  auto& magnitude() const { return operand<float>("magnitude", 1, out); }
  std::string shape() const { return bench::shape(tokens, out, in); }
  std::string adapted_shape() const { return shape() + 'r' + std::to_string(rank); }

  double plain_flop() const { return 2.0 * tokens * in * out; }
  double plain_bytes() const { return 4.0 * (1.0 * tokens * in + 1.0 * out * in + 1.0 * tokens * out); }
  double adapter_flop() const { return 2.0 * tokens * rank * (1.0 * in + out); }
  double adapter_bytes() const { return 4.0 * rank * (1.0 * in + out); }
  bench::work plain() const { return {plain_flop(), plain_bytes()}; }
  bench::work adapted() const { return {plain_flop() + adapter_flop(), plain_bytes() + adapter_bytes()}; }

  // An adapter as after training: B is not zero.
  std::shared_ptr<lora::adapter<float>> adapter(int stream = 0) const {
    auto p = std::make_shared<lora::adapter<float>>(lora::make_adapter<float>(
        {.in = in, .out = out, .rank = rank, .alpha = 2.0 * rank, .seed = 1, .stream = std::uint64_t(stream)}));
    const auto& b = operand<float>("b", out, rank);
    std::transform(b.begin(), b.end(), p->b.begin(), [](float v) { return 0.02f * v; });
    return p;
  }
};

struct gradients {
  mlkit::matrix<float> h, z, da, db;
  mlkit::vector<float> dm;
  explicit gradients(const layer& l)
      : h({l.tokens, l.rank}), z({l.tokens, l.out}), da({l.rank, l.in}), db({l.out, l.rank}), dm({l.out}) {}
};

// A vector that operand() holds as a matrix of one row.
mlkit::vector_view<float> row(mlkit::matrix<float>& m) { return {m.data(), {m.size()}}; }

// Registers `name` for every thread count; make(exec) returns the call to time. Of a layer with many tokens, only the
// workspace of one call.
template <class Make>
void add(const std::string& name, const layer& l, const std::string& shape, const bench::work& work, Make make) {
  if (l.tokens > 1024)
    return bench::add_memory({name, "f32", shape, 0, ""}, work, [=] { return call(make(mlkit::cpu{})); });
  for (const int threads : bench::thread_counts())
    bench::add_mlkit({name, "f32", shape, threads, "mlkit"}, work,
                     [=] { return call(make(mlkit::cpu{.threads = threads})); });
}

void add_plain(const layer& l) {
  add("plain", l, l.shape(), l.plain(), [l](mlkit::cpu exec) {
    return [=, &x = l.x(), &w = l.w(), &y = l.y()] { mlkit::matmul(exec, x, mlkit::transposed(w), y); };
  });
}

void add_forward(const layer& l) {
  add("lora", l, l.adapted_shape(), l.adapted(), [l](mlkit::cpu exec) {
    return [=, &x = l.x(), &w = l.w(), &y = l.y(), p = l.adapter()] { lora::linear(exec, x, lora::dense{w}, *p, y); };
  });
}

// What a training step does: forward, which saves h (and z under DoRA, as PyTorch saves it), then the gradients of x, A
// and B.
void add_training(const layer& l) {
  const bench::work work{2 * l.plain_flop() + 3 * l.adapter_flop(), 2 * l.plain_bytes() + 3 * l.adapter_bytes()};
  add("lora_training", l, l.adapted_shape(), work, [l](mlkit::cpu exec) {
    return [=, &x = l.x(), &w = l.w(), &y = l.y(), &dy = l.dy(), &dx = l.dx(), p = l.adapter(),
            g = std::make_shared<gradients>(l)] {
      const lora::linear_options<float> options{.h = g->h};
      lora::linear(exec, x, lora::dense{w}, *p, y, options);
      lora::linear_backward(exec, x, lora::dense{w}, *p, dy, lora::gradients{g->da, g->db}, dx, options);
    };
  });
}

// DoRA with the adapter's part of the norms computed in every call, as PEFT does, and with norms that are kept.
void add_dora(const layer& l) {
  const bench::work norms{2.0 * l.rank * l.in * l.out, 0};
  add("dora", l, l.adapted_shape(), {l.adapted().flop + norms.flop, l.adapted().bytes}, [l](mlkit::cpu exec) {
    auto base = std::make_shared<lora::base_squares<float>>(lora::base_norms(exec, lora::dense{l.w()}));
    return [=, &x = l.x(), &w = l.w(), &y = l.y(), &m = l.magnitude(), p = l.adapter()] {
      lora::linear(exec, x, lora::dense{w}, lora::dora{*p, row(m), *base}, y);
    };
  });
  add("dora_frozen", l, l.adapted_shape(), l.adapted(), [l](mlkit::cpu exec) {
    auto p = l.adapter();
    auto kept = std::make_shared<lora::frozen_norms<float>>(lora::adapted_norms(exec, lora::dense{l.w()}, *p));
    return [=, &x = l.x(), &w = l.w(), &y = l.y(), &m = l.magnitude()] {
      lora::linear(exec, x, lora::dense{w}, lora::dora{*p, row(m), *kept}, y);
    };
  });
}

void add_dora_training(const layer& l) {
  const double norms = 2.0 * l.rank * l.in * l.out;
  const bench::work work{2 * l.plain_flop() + 3 * l.adapter_flop() + norms,
                         2 * l.plain_bytes() + 3 * l.adapter_bytes()};
  add("dora_training", l, l.adapted_shape(), work, [l](mlkit::cpu exec) {
    auto base = std::make_shared<lora::base_squares<float>>(lora::base_norms(exec, lora::dense{l.w()}));
    return [=, &x = l.x(), &w = l.w(), &y = l.y(), &dy = l.dy(), &dx = l.dx(), &m = l.magnitude(), p = l.adapter(),
            g = std::make_shared<gradients>(l)] {
      const lora::linear_options<float> options{.h = g->h, .z = g->z};
      const lora::dora adapter{*p, row(m), *base};
      lora::linear(exec, x, lora::dense{w}, adapter, y, options);
      lora::linear_backward(exec, x, lora::dense{w}, adapter, dy, lora::gradients{g->da, g->db, g->dm}, dx, options);
    };
  });
}

// 32 adapters, the rows taking turns with them: one each where there are 32 rows.
void add_adapters(const layer& l) {
  add("adapters32", l, l.adapted_shape(), {l.adapted().flop, l.plain_bytes() + 32 * l.adapter_bytes()},
      [l](mlkit::cpu exec) {
        auto adapters = std::make_shared<std::vector<lora::adapter<float>>>();
        std::vector<int> ids(l.tokens);
        for (int i = 0; i < 32; ++i) adapters->push_back(std::move(*l.adapter(i)));
        for (int i = 0; i < l.tokens; ++i) ids[i] = i % 32;
        return [=, &x = l.x(), &w = l.w(), &y = l.y()] {
          lora::linear(exec, x, lora::dense{w}, lora::per_row{*adapters, ids}, y);
        };
      });
}

// A doubly quantised base, which stays at about 4.13 bits a weight.
void add_nf4(const layer& l) {
  static std::map<std::pair<int, int>, lora::nf4_matrix> quantised;  // one for each weight, by its extents
  auto& blocks = quantised[{l.out, l.in}];
  if (blocks.bytes() == 0) blocks = lora::quantise_nf4(mlkit::cpu{}, l.w(), {.double_quantise = true});
  const double stored = static_cast<double>(blocks.bytes());
  add("nf4", l, l.shape(), {l.plain_flop(), 4.0 * l.tokens * (l.in + l.out) + stored, stored},
      [l, &blocks](mlkit::cpu exec) {
        return [=, &x = l.x(), &y = l.y(), &blocks] { lora::linear(exec, x, lora::nf4{blocks}, y); };
      });
}

}  // namespace

int main(int argc, char** argv) {
  constexpr double mib = 1 << 20;
  bench::add_ceilings({8 * mib, 64 * mib});
  for (const layer& l : {layer{512, 4096, 4096, 16}, layer{512, 768, 768, 4}, layer{512, 1024, 1024, 16},
                         layer{300, 1000, 640, 12}, layer{32, 4096, 4096, 16}}) {
    add_plain(l);
    add_forward(l);
    add_training(l);
    add_dora(l);
    add_dora_training(l);
  }
  add_adapters({32, 4096, 4096, 16});
  add_adapters({300, 1000, 640, 12});
  for (const int tokens : {1, 32, 512}) add_nf4({tokens, 4096, 4096});
  add_nf4({300, 1000, 640});

  const layer many{4096, 4096, 4096, 16};
  add_plain(many);
  add_forward(many);
  add_training(many);
  add_dora(many);
  add_dora_training(many);
  add_nf4(many);
  return bench::run(argc, argv);
}
