// LoRA on a GPU, timed: prints a line of JSON for each case, with the ceilings of the same run first.
//
// Calls are captured into a CUDA graph, over operands that together exceed the level-2 cache, and the graph is
// replayed; the time is the median of the replays, divided by the calls.
#include <mlkit/lora.cuh>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace lora = mlkit::lora;
using mlkit::bf16;
using mlkit::index_t;

namespace {

__global__ void fill_kernel(bf16* to, index_t n, std::uint64_t seed, float size) {
  const mlkit::random_stream random{seed, 0};
  for (index_t i = blockIdx.x * 256 + threadIdx.x; i < n; i += index_t{gridDim.x} * 256)
    to[i] = bf16(size * random.normal(static_cast<std::uint64_t>(i)));
}
__global__ void fill_kernel(float* to, index_t n, std::uint64_t seed, float size) {
  const mlkit::random_stream random{seed, 0};
  for (index_t i = blockIdx.x * 256 + threadIdx.x; i < n; i += index_t{gridDim.x} * 256)
    to[i] = size * random.normal(static_cast<std::uint64_t>(i));
}
__global__ void random_kernel(float* to, index_t n, std::uint64_t seed) {
  const mlkit::random_stream random{seed, 0};
  for (index_t i = blockIdx.x * 256 + threadIdx.x; i < n; i += index_t{gridDim.x} * 256)
    reinterpret_cast<std::uint32_t*>(to)[i] = random.bits(static_cast<std::uint64_t>(i));
}

class bench {
 public:
  explicit bench(cudaStream_t stream, std::string only) : exec_(stream), only_(std::move(only)) {}
  const mlkit::cuda& exec() const { return exec_; }

  template <class T>
  mlkit::device_tensor<T, 2> normal(index_t rows, index_t cols, float size = 1) {
    mlkit::device_tensor<T, 2> t(exec_, {rows, cols});
    void (*kernel)(T*, index_t, std::uint64_t, float) = fill_kernel;
    mlkit::detail::launch("fill", exec_, kernel, {dim3(1024), dim3(256)}, t.data(), t.size(), ++seed_, size);
    return t;
  }

  mlkit::device_tensor<float, 2> random_words(index_t rows, index_t cols) {
    mlkit::device_tensor<float, 2> t(exec_, {rows, cols});
    mlkit::detail::launch("fill", exec_, random_kernel, {dim3(1024), dim3(256)}, t.data(), t.size(), ++seed_);
    return t;
  }

  bool wanted(const std::string& name) const { return only_.empty() || name.find(only_) != std::string::npos; }

  /// `calls` calls of f(i) in a graph.
  double time(int calls, const std::function<void(int)>& f) {
    for (int i = 0; i < std::min(calls, 2); ++i) f(i);
    exec_.synchronize();
    cudaGraph_t graph{};
    cudaGraphExec_t ready{};
    check(cudaStreamBeginCapture(exec_.stream(), cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < calls; ++i) f(i);
    check(cudaStreamEndCapture(exec_.stream(), &graph));
    check(cudaGraphInstantiate(&ready, graph, 0));
    for (int i = 0; i < 3; ++i) check(cudaGraphLaunch(ready, exec_.stream()));
    exec_.synchronize();
    std::vector<double> times;
    double total = 0;
    mlkit::device_event from, to;
    while (times.size() < 9 || (total < 60e3 && times.size() < 41)) {
      from.record(exec_);
      check(cudaGraphLaunch(ready, exec_.stream()));
      to.record(exec_);
      const double us = 1e3 * static_cast<double>(milliseconds(from, to));
      total += us;
      times.push_back(us / calls);
    }
    check(cudaGraphExecDestroy(ready));
    check(cudaGraphDestroy(graph));
    std::nth_element(times.begin(), times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2), times.end());
    return times[times.size() / 2];
  }

  double run(const std::string& name, double bytes, double flops, int calls, const std::function<void(int)>& f) {
    if (!wanted(name)) return 0;
    try {
      const double us = time(calls, f);
      std::printf(
          "{\"case\": \"%s\", \"microseconds\": %.3f, \"bytes\": %.0f, \"flops\": %.0f, \"tb_per_s\": %.3f, "
          "\"tflops\": %.1f}\n",
          name.c_str(), us, bytes, flops, bytes / us * 1e-6, flops / us * 1e-6);
      std::fflush(stdout);
      return us;
    } catch (const std::exception& e) {
      std::printf("{\"case\": \"%s\", \"failed\": \"%s\"}\n", name.c_str(), e.what());
      std::fflush(stdout);
      return 0;
    }
  }

  static void check(cudaError_t code) { mlkit::detail::check_cuda("bench", code); }

 private:
  mlkit::cuda exec_;
  std::string only_;
  std::uint64_t seed_ = 0;
};

struct layer {
  index_t tokens, in, out, rank;
  mlkit::device_tensor<bf16, 2> x, w, a, b, y;
  layer(bench& bench, index_t t, index_t i, index_t o, index_t r)
      : tokens(t),
        in(i),
        out(o),
        rank(r),
        x(bench.normal<bf16>(t, i)),
        w(bench.normal<bf16>(o, i, 0.02f)),
        a(bench.normal<bf16>(r, i, 0.02f)),
        b(bench.normal<bf16>(o, r, 0.02f)),
        y(bench.exec(), {t, o}) {}
  lora::adapter_view<bf16> adapter() const { return {a.view(), b.view(), 2.0}; }
  double flops() const { return 2.0 * static_cast<double>(tokens) * static_cast<double>(in * out + rank * (in + out)); }
  double bytes(double weight_bytes = 2) const {
    return 2.0 * static_cast<double>(tokens * (in + out) + rank * (in + out)) +
           weight_bytes * static_cast<double>(in * out);
  }
};

std::string shape_of(const layer& l) {
  return std::to_string(l.tokens) + "x" + std::to_string(l.in) + "x" + std::to_string(l.out) + " r" +
         std::to_string(l.rank);
}

std::vector<std::unique_ptr<layer>> layers(bench& bench, int count, index_t t, index_t i, index_t o, index_t r) {
  std::vector<std::unique_ptr<layer>> all;
  for (int n = 0; n < count; ++n) all.push_back(std::make_unique<layer>(bench, t, i, o, r));
  return all;
}

void ceilings(bench& bench) {
  const index_t n = index_t{1} << 30;
  const mlkit::device_tensor<float, 1> from(bench.exec(), {n / 4}), to(bench.exec(), {n / 4});
  bench.run("ceiling: copy", 2.0 * static_cast<double>(n), 0, 4, [&](int) {
    bench.check(cudaMemcpyAsync(to.data(), from.data(), static_cast<std::size_t>(n), cudaMemcpyDeviceToDevice,
                                bench.exec().stream()));
  });
}

using mlkit::detail::left_operand;
using mlkit::detail::right_operand;

// y = x w^T by the library alone.
template <class C>
void plain(bench& bench, mlkit::matrix_view<const bf16> x, mlkit::matrix_view<const bf16> w, mlkit::matrix_view<C> y,
           double alpha = 1, bool adds = false) {
  mlkit::detail::multiply_plainly<bf16, C>("bench", bench.exec(), left_operand(x), right_operand(transposed(w)), y,
                                           alpha, nullptr, adds);
}

// The largest difference between y and what the library makes of it in f32, relative to the largest value.
void compare(bench& bench, const std::string& name, layer& l) {
  if (!bench.wanted(name)) return;
  const mlkit::cuda& exec = bench.exec();
  const mlkit::device_tensor<bf16, 2> h(exec, {l.tokens, l.rank});
  mlkit::device_tensor<float, 2> want(exec, {l.tokens, l.out});
  const mlkit::matrix_view<bf16> h_view(h.data(), h.extents());
  plain<bf16>(bench, l.x.view(), l.a.view(), h_view, 2.0);
  plain<float>(bench, l.x.view(), l.w.view(), want.view());
  plain<float>(bench, h.view(), l.b.view(), want.view(), 1, true);
  bench.check(cudaMemsetAsync(l.y.data(), 0xff, static_cast<std::size_t>(l.y.size()) * 2, exec.stream()));
  lora::linear(exec, l.x, lora::dense{l.w}, l.adapter(), l.y);
  const auto have = mlkit::to_host(exec, l.y);
  const auto reference = mlkit::to_host(exec, want);
  double worst = 0, largest = 0;
  for (index_t i = 0; i < have.size(); ++i) {
    const double d = std::abs(static_cast<double>(have.data()[i]) - static_cast<double>(reference.data()[i]));
    worst = d > worst || d != d ? d : worst;
    if (d != d) break;
    largest = std::max(largest, std::abs(static_cast<double>(reference.data()[i])));
  }
  std::printf("{\"check\": \"%s\", \"error\": %.3g}\n", name.c_str(), worst / largest);
  std::fflush(stdout);
}

void forward(bench& bench) {
  for (const index_t tokens : {4096, 512}) {
    auto all = layers(bench, 3, tokens, 4096, 4096, 16);
    const auto at = [&](int i) -> layer& { return *all[static_cast<std::size_t>(i % 3)]; };
    const std::string name = shape_of(at(0));
    compare(bench, "forward bf16 " + name, at(0));
    const double t = static_cast<double>(tokens);
    bench.run("ceiling: cublaslt gemm bf16 " + std::to_string(tokens) + "x4096x4096", 2 * (2 * t * 4096 + 4096 * 4096),
              2 * t * 4096 * 4096, 9,
              [&](int i) { plain<bf16>(bench, at(i).x.view(), at(i).w.view(), at(i).y.view()); });
    bench.run("forward bf16 " + name, at(0).bytes(), at(0).flops(), 9, [&](int i) {
      layer& l = at(i);
      lora::linear(bench.exec(), l.x, lora::dense{l.w}, l.adapter(), l.y);
    });
    bench.run("part: x W^T by mlkit " + name, 2 * (2 * t * 4096 + 4096 * 4096), 2 * t * 4096 * 4096, 9,
              [&](int i) { lora::linear(bench.exec(), at(i).x, lora::dense{at(i).w}, at(i).y); });
    // Its parts, and the one product of depth in + rank that it would be if [W | B] and [x | h] lay side by side.
    const mlkit::device_tensor<bf16, 2> h(bench.exec(), {tokens, 16});
    const mlkit::matrix_view<bf16> h_view(h.data(), h.extents());
    bench.run("part: x A^T " + name, 2 * t * 4096, 2 * t * 4096 * 16, 9, [&](int i) {
      lora::detail::project_down_on<bf16, bf16, bf16>("bench", bench.exec(), at(i).x.view(), at(i).a.view(), 2.0,
                                                      h_view);
    });
    bench.run("part: x A^T by cublaslt " + name, 2 * t * 4096, 2 * t * 4096 * 16, 9,
              [&](int i) { plain<bf16>(bench, at(i).x.view(), at(i).a.view(), h_view, 2.0); });
    bench.run("part: y += h B^T " + name, 4 * t * 4096, 2 * t * 4096 * 16, 9,
              [&](int i) { plain<bf16>(bench, h.view(), at(i).b.view(), at(i).y.view(), 1, true); });
    const auto xh = bench.normal<bf16>(tokens, 4112), wb = bench.normal<bf16>(4096, 4112, 0.02f);
    bench.run("part: [x | h] [W | B]^T " + name, 2 * (2 * t * 4112 + 4096 * 4112), 2 * t * 4096 * 4112, 9,
              [&](int i) { plain<bf16>(bench, xh.view(), wb.view(), at(i).y.view()); });
  }
}

void decode(bench& bench) {
  struct size {
    index_t in, out;
  };
  for (const size& s : {size{4096, 4096}, size{4096, 11008}})
    for (const index_t tokens : {1, 4, 16, 0}) {  // the last: a rank that one kernel does not take
      auto all = layers(bench, s.out > 4096 ? 4 : 8, tokens > 0 ? tokens : 4, s.in, s.out, tokens > 0 ? 16 : 32);
      const int count = static_cast<int>(all.size());
      const std::string name = shape_of(*all[0]);
      compare(bench, "decode bf16 " + name, *all[0]);
      bench.run("decode bf16 " + name, all[0]->bytes(), all[0]->flops(), 2 * count, [&](int i) {
        layer& l = *all[static_cast<std::size_t>(i % count)];
        lora::linear(bench.exec(), l.x, lora::dense{l.w}, l.adapter(), l.y);
      });
      bench.run("decode bf16 without adapter " + name, all[0]->bytes(), all[0]->flops(), 2 * count, [&](int i) {
        layer& l = *all[static_cast<std::size_t>(i % count)];
        lora::linear(bench.exec(), l.x, lora::dense{l.w}, l.y);
      });
      bench.run("ceiling: cublaslt gemm bf16 " + name, all[0]->bytes(), all[0]->flops(), 2 * count, [&](int i) {
        layer& l = *all[static_cast<std::size_t>(i % count)];
        plain<bf16>(bench, l.x.view(), l.w.view(), l.y.view());
      });
    }
}

void quantised(bench& bench) {
  constexpr index_t n = 4096;
  constexpr int count = 16;
  std::vector<mlkit::device_tensor<float, 2>> bytes;  // random ones: what they are is no matter
  std::vector<mlkit::device_tensor<float, 2>> factors;
  for (int i = 0; i < count; ++i) {
    bytes.push_back(bench.random_words(n, n / 4));
    factors.push_back(bench.normal<float>(n, n / 64, 0.02f));
  }
  for (const index_t tokens : {1, 16, 512}) {
    layer l(bench, tokens, n, n, 16);
    const std::string name = shape_of(l);
    const auto at = [&](int i) { return static_cast<std::size_t>(i % count); };
    bench.run("nf4 " + name, l.bytes(0.5 + 4.0 / 64), l.flops(), count, [&](int i) {
      const auto* p = reinterpret_cast<const std::uint8_t*>(bytes[at(i)].data());
      const lora::nf4_view w({n, n}, {p, static_cast<std::size_t>(n * n / 2)},
                             {factors[at(i)].data(), static_cast<std::size_t>(n * n / 64)});
      lora::linear(bench.exec(), l.x, lora::nf4{w}, l.adapter(), l.y);
    });
    bench.run("int8 " + name, l.bytes(1), l.flops(), count, [&](int i) {
      const auto* p = reinterpret_cast<const std::int8_t*>(bytes[at(i)].data());
      const lora::int8_view w({n, n}, {p, static_cast<std::size_t>(n * n)},
                              {factors[at(i)].data(), static_cast<std::size_t>(n)});
      lora::linear(bench.exec(), l.x, lora::int8{w}, l.adapter(), l.y);
    });
  }
}

void backward(bench& bench) {
  auto all = layers(bench, 2, 4096, 4096, 4096, 16);
  mlkit::device_tensor<bf16, 2> dx(bench.exec(), {4096, 4096});
  mlkit::device_tensor<float, 2> da(bench.exec(), {16, 4096}), db(bench.exec(), {4096, 16});
  bench.run("backward bf16 " + shape_of(*all[0]), 2.0 * 4096 * 4096 * 4, 2.0 * 4096 * (4096.0 * 4096 + 5 * 4096 * 16),
            4, [&](int i) {
              layer& l = *all[static_cast<std::size_t>(i % 2)];
              lora::linear_backward(bench.exec(), l.x, lora::dense{l.w}, l.adapter(), l.y,
                                    lora::gradients{da.view(), db.view()}, dx);
            });
}

void dora(bench& bench) {
  auto all = layers(bench, 2, 4096, 4096, 4096, 16);
  const auto magnitude = bench.normal<bf16>(1, 4096);
  const mlkit::vector_view<const bf16> m(magnitude.data(), {4096});
  const std::string name = shape_of(*all[0]);
  const auto norms = lora::adapted_norms(bench.exec(), lora::dense{all[0]->w.view()}, all[0]->adapter());
  bench.run("dora bf16, norms kept " + name, all[0]->bytes(), all[0]->flops(), 4, [&](int i) {
    layer& l = *all[static_cast<std::size_t>(i % 2)];
    lora::linear(bench.exec(), l.x, lora::dense{l.w}, lora::dora{l.adapter(), m, norms}, l.y);
  });
  bench.run("dora bf16 " + name, all[0]->bytes(), all[0]->flops(), 4, [&](int i) {
    layer& l = *all[static_cast<std::size_t>(i % 2)];
    lora::linear(bench.exec(), l.x, lora::dense{l.w}, lora::dora{l.adapter(), m}, l.y);
  });
}

void many(bench& bench) {
  constexpr int count = 32;
  auto all = layers(bench, 6, count, 4096, 4096, 16);
  std::vector<mlkit::device_tensor<bf16, 2>> halves;
  std::vector<lora::adapter_view<bf16>> adapters;
  for (int i = 0; i < count; ++i) {
    halves.push_back(bench.normal<bf16>(16, 4096, 0.02f));
    halves.push_back(bench.normal<bf16>(4096, 16, 0.02f));
  }
  for (std::size_t i = 0; i < count; ++i)
    adapters.push_back({std::as_const(halves[2 * i]).view(), std::as_const(halves[2 * i + 1]).view(), 2.0});
  std::vector<float> words(count);
  for (int i = 0; i < count; ++i) std::memcpy(&words[static_cast<std::size_t>(i)], &i, sizeof i);
  const auto ids = mlkit::to_device(bench.exec(), words);
  const std::span<const int> rows(reinterpret_cast<const int*>(ids.data()), count);
  bench.run("per_row bf16 32 adapters " + shape_of(*all[0]), all[0]->bytes() + 31.0 * 2 * 16 * 8192, all[0]->flops(),
            12, [&](int i) {
              layer& l = *all[static_cast<std::size_t>(i % 6)];
              lora::linear(bench.exec(), l.x, lora::dense{l.w}, lora::per_row{adapters, rows}, l.y);
            });
}

}  // namespace

int main(int count, char** arguments) {
  try {
    cudaStream_t stream{};
    bench::check(cudaStreamCreate(&stream));
    bench b(stream, count > 1 ? arguments[1] : "");
    ceilings(b);
    decode(b);
    quantised(b);
    backward(b);
    many(b);
    forward(b);
    dora(b);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
