// rl on a GPU: times of its kernels, as JSON lines beside the copy bandwidth of the same run.
//
// A case replays a CUDA graph of several calls and divides; the median of many replays counts. Where a case is meant to
// be bound by memory, its calls go through buffers that together exceed the level-2 cache several times ("cold");
// where they fit, they stay there, and the case says so ("hot").
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mlkit/rl.cuh>
#include <string>
#include <vector>

namespace {

namespace rl = mlkit::rl;
using mlkit::index_t;

template <class T>
class buffer {
 public:
  buffer() = default;
  explicit buffer(index_t count) : count_(count) {
    mlkit::detail::check_cuda("cudaMalloc", cudaMalloc(reinterpret_cast<void**>(&data_), bytes()));
  }
  buffer(buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), count_(other.count_) {}
  buffer& operator=(buffer&& other) noexcept {
    std::swap(data_, other.data_), std::swap(count_, other.count_);
    return *this;
  }
  ~buffer() { (void)cudaFree(data_); }
  T* data() const { return data_; }
  std::size_t bytes() const { return static_cast<std::size_t>(count_) * sizeof(T); }

 private:
  T* data_ = nullptr;
  index_t count_ = 0;
};

// Numbers about 0 of size `scale`, from their index.
template <class T>
__global__ void fill_numbers(T* to, index_t count, float scale, unsigned seed) {
  for (index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += index_t{gridDim.x} * blockDim.x) {
    std::uint64_t x = (static_cast<std::uint64_t>(i) + 1) * 0x9e3779b97f4a7c15ull + seed;
    x ^= x >> 30, x *= 0xbf58476d1ce4e5b9ull, x ^= x >> 27, x *= 0x94d049bb133111ebull, x ^= x >> 31;
    to[i] = static_cast<T>(scale * (static_cast<float>(x >> 40) * 0x1p-23f - 1.0f));
  }
}
__global__ void fill_below(std::int32_t* to, index_t count, int below) {
  for (index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += index_t{gridDim.x} * blockDim.x)
    to[i] =
        static_cast<std::int32_t>((static_cast<std::uint64_t>(i) * 2654435761u + 12345) % static_cast<unsigned>(below));
}
// A one in `every`, else 0.
__global__ void fill_flags(std::uint8_t* to, index_t count, int every) {
  for (index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += index_t{gridDim.x} * blockDim.x)
    to[i] = every > 0 && (static_cast<std::uint64_t>(i) * 2654435761u >> 7) % static_cast<unsigned>(every) == 0;
}

class bench {
 public:
  bench(int argc, char** argv) {
    if (argc > 1) filter_ = argv[1];
    mlkit::detail::check_cuda("cudaStreamCreate", cudaStreamCreate(&stream_));
    exec_ = std::make_unique<mlkit::cuda>(stream_);
    cudaDeviceProp device{};
    mlkit::detail::check_cuda("cudaGetDeviceProperties", cudaGetDeviceProperties(&device, exec_->device()));
    cache_ = device.l2CacheSize;
    std::printf("{\"device\": \"%s\", \"multiprocessors\": %d, \"l2_bytes\": %d}\n", device.name,
                device.multiProcessorCount, device.l2CacheSize);
  }
  const mlkit::cuda& exec() const { return *exec_; }
  bool wanted(const std::string& name) const { return name.find(filter_) != std::string::npos; }

  template <class T>
  buffer<T> numbers(index_t count, float scale, unsigned seed = 1) {
    buffer<T> b(count);
    launch(fill_numbers<T>, b.data(), count, scale, seed);
    return b;
  }
  buffer<std::int32_t> below(index_t count, int limit) {
    buffer<std::int32_t> b(count);
    launch(fill_below, b.data(), count, limit);
    return b;
  }
  buffer<std::uint8_t> flags(index_t count, int every) {
    buffer<std::uint8_t> b(count);
    launch(fill_flags, b.data(), count, every);
    return b;
  }
  // How many sets of buffers of so many bytes exceed the cache four times.
  int sets(double bytes) const { return std::clamp(static_cast<int>(4.0 * cache_ / bytes) + 1, 1, 64); }

  // call(set) for sets in turn, `sets` of them; bytes that one call has to move.
  void run(const std::string& name, double bytes, int sets, const std::function<void(int)>& call) {
    for (int i = 0; i < sets; ++i) call(i);
    synchronize();
    cudaEvent_t begin, end;
    mlkit::detail::check_cuda("cudaEventCreate", cudaEventCreate(&begin));
    mlkit::detail::check_cuda("cudaEventCreate", cudaEventCreate(&end));
    const auto once = [&] {  // roughly, for how many calls to a graph
      mlkit::detail::check_cuda("cudaEventRecord", cudaEventRecord(begin, stream_));
      for (int i = 0; i < sets; ++i) call(i);
      mlkit::detail::check_cuda("cudaEventRecord", cudaEventRecord(end, stream_));
      return elapsed(begin, end) * 1e3f / static_cast<float>(sets);
    };
    const float rough = std::min(once(), once());
    const int rounds = std::clamp(static_cast<int>(500 / (rough * static_cast<float>(sets))), 1, 40);
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    mlkit::detail::check_cuda("cudaStreamBeginCapture",
                              cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    for (int r = 0; r < rounds; ++r)
      for (int i = 0; i < sets; ++i) call(i);
    mlkit::detail::check_cuda("cudaStreamEndCapture", cudaStreamEndCapture(stream_, &graph));
    mlkit::detail::check_cuda("cudaGraphInstantiate", cudaGraphInstantiate(&replay, graph, 0));
    std::vector<float> times;
    const float each = rough * static_cast<float>(sets * rounds);
    const int repetitions = std::clamp(static_cast<int>(150e3f / each), 5, 60);
    for (int i = 0; i < repetitions + 2; ++i) {
      mlkit::detail::check_cuda("cudaEventRecord", cudaEventRecord(begin, stream_));
      mlkit::detail::check_cuda("cudaGraphLaunch", cudaGraphLaunch(replay, stream_));
      mlkit::detail::check_cuda("cudaEventRecord", cudaEventRecord(end, stream_));
      const float t = elapsed(begin, end);
      if (i >= 2) times.push_back(t);
    }
    std::sort(times.begin(), times.end());
    const double us = 1e3 * times[times.size() / 2] / (sets * rounds), best = 1e3 * times[0] / (sets * rounds);
    const double gbs = bytes / us * 1e-3;
    if (name == "copy") copy_ = gbs;
    std::printf(
        "{\"case\": \"%s\", \"microseconds\": %.3f, \"best\": %.3f, \"bytes\": %.0f, \"gb_per_s\": %.1f, "
        "\"of_copy\": %.3f, \"buffers\": \"%s\"}\n",
        name.c_str(), us, best, bytes, gbs, copy_ > 0 ? gbs / copy_ : 0.0,
        bytes * sets > 3.0 * cache_ ? "cold" : "hot");
    std::fflush(stdout);
    (void)cudaGraphExecDestroy(replay), (void)cudaGraphDestroy(graph);
    (void)cudaEventDestroy(begin), (void)cudaEventDestroy(end);
  }
  void synchronize() const { exec_->synchronize(); }

 private:
  template <class... P, class... A>
  void launch(void (*kernel)(P...), A... arguments) {
    mlkit::detail::launch("bench", *exec_, kernel, {1024, 256}, arguments...);
  }
  float elapsed(cudaEvent_t begin, cudaEvent_t end) const {
    float ms = 0;
    mlkit::detail::check_cuda("cudaEventSynchronize", cudaEventSynchronize(end));
    mlkit::detail::check_cuda("cudaEventElapsedTime", cudaEventElapsedTime(&ms, begin, end));
    return ms;
  }

  std::string filter_;
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<mlkit::cuda> exec_;
  double cache_ = 0, copy_ = 0;
};

void copies(bench& b) {
  constexpr index_t n = index_t{1} << 28;
  const auto from = b.numbers<float>(n, 1), to = b.numbers<float>(n, 1);
  b.run("copy", 8.0 * n, 1, [&](int) {
    (void)cudaMemcpyAsync(to.data(), from.data(), from.bytes(), cudaMemcpyDeviceToDevice, b.exec().stream());
  });
}

// GAE of f32 with two flags: 4 numbers and 2 bytes to a step.
void gae(bench& b, index_t batch, index_t time, bool columns, bool hot = false) {
  const std::string name = std::string("gae") + (columns ? " time-major" : "") + " [" + std::to_string(batch) + ", " +
                           std::to_string(time) + "]" + (hot ? " hot" : "");
  if (!b.wanted(name)) return;
  const index_t n = batch * time;
  const double bytes = 18.0 * static_cast<double>(n);
  const int sets = hot ? 1 : b.sets(bytes);
  struct set {
    buffer<float> r, v, a, g;
    buffer<std::uint8_t> te, tr;
  };
  std::vector<set> all;
  for (int i = 0; i < sets; ++i)
    all.push_back({b.numbers<float>(n, 1), b.numbers<float>(n, 1, 2), buffer<float>(n), buffer<float>(n),
                   b.flags(n, 200), b.flags(n, 0)});
  const auto boot = b.numbers<float>(batch, 1);
  const auto view = [&](auto& x) {
    return mlkit::tensor_view<std::remove_pointer_t<decltype(x.data())>, 2>(x.data(), {batch, time},
                                                                            {columns ? 1 : time, columns ? batch : 1});
  };
  b.run(name, bytes, sets, [&](int i) {
    set& s = all[static_cast<std::size_t>(i)];
    rl::gae(b.exec(),
            {.rewards = view(s.r),
             .values = view(s.v),
             .terminated = view(s.te),
             .truncated = view(s.tr),
             .final_values = view(s.v),
             .bootstrap = mlkit::tensor_view<const float, 1>(boot.data(), {batch})},
            {}, {.advantages = view(s.a), .returns = view(s.g)});
  });
}

void vtrace(bench& b, index_t batch, index_t time) {
  const std::string name = "vtrace [" + std::to_string(batch) + ", " + std::to_string(time) + "]";
  if (!b.wanted(name)) return;
  const index_t n = batch * time;
  const double bytes = 22.0 * static_cast<double>(n);
  const int sets = b.sets(bytes);
  struct set {
    buffer<float> r, v, l, a, g;
    buffer<std::uint8_t> te, tr;
  };
  std::vector<set> all;
  for (int i = 0; i < sets; ++i)
    all.push_back({b.numbers<float>(n, 1), b.numbers<float>(n, 1, 2), b.numbers<float>(n, 1, 3), buffer<float>(n),
                   buffer<float>(n), b.flags(n, 200), b.flags(n, 0)});
  const auto boot = b.numbers<float>(batch, 1);
  const auto view = [&](auto& x) {
    return mlkit::tensor_view<std::remove_pointer_t<decltype(x.data())>, 2>(x.data(), {batch, time});
  };
  b.run(name, bytes, sets, [&](int i) {
    set& s = all[static_cast<std::size_t>(i)];
    rl::vtrace(b.exec(),
               {.rewards = view(s.r),
                .values = view(s.v),
                .log_ratios = view(s.l),
                .terminated = view(s.te),
                .truncated = view(s.tr),
                .final_values = view(s.v),
                .bootstrap = mlkit::tensor_view<const float, 1>(boot.data(), {batch})},
               {}, {.vs = view(s.a), .advantages = view(s.g)});
  });
}

struct loss_of_token {
  const float* advantages;
  MLKIT_HOST_DEVICE float operator()(index_t row, float) const { return -advantages[row]; }
};

template <class T>
void log_probs(bench& b, index_t rows, int vocabulary) {
  const std::string shape =
      std::string(" ") + mlkit::dtype_name<T>() + " [" + std::to_string(rows) + ", " + std::to_string(vocabulary) + "]";
  if (!b.wanted("log_probs" + shape) && !b.wanted("log_probs and gradient" + shape) &&
      !b.wanted("log_probs and entropies" + shape))
    return;
  const index_t n = rows * vocabulary;
  const double bytes = static_cast<double>(n) * sizeof(T);
  const int sets = b.sets(bytes);
  std::vector<buffer<T>> z, dz;
  for (int i = 0; i < sets; ++i) z.push_back(b.numbers<T>(n, 8)), dz.emplace_back(n);
  const auto tokens = b.below(rows, vocabulary);
  const auto advantages = b.numbers<float>(rows, 1);
  const buffer<float> logp(rows), entropy(rows);
  const mlkit::tensor_view<const std::int32_t, 1> y(tokens.data(), {rows});
  const auto view = [&](const buffer<T>& x) { return mlkit::tensor_view<T, 2>(x.data(), {rows, vocabulary}); };
  const mlkit::tensor_view<float, 1> l(logp.data(), {rows}), h(entropy.data(), {rows});
  if (b.wanted("log_probs" + shape))
    b.run("log_probs" + shape, bytes, sets,
          [&](int i) { rl::log_probs(b.exec(), view(z[static_cast<std::size_t>(i)]), y, {}, {.logp = l}); });
  if (b.wanted("log_probs and entropies" + shape))
    b.run("log_probs and entropies" + shape, bytes, sets, [&](int i) {
      rl::log_probs(b.exec(), view(z[static_cast<std::size_t>(i)]), y, {}, {.logp = l, .entropy = h});
    });
  if (b.wanted("log_probs and gradient" + shape))
    b.run("log_probs and gradient" + shape, 2 * bytes, sets, [&](int i) {
      rl::log_probs_and_gradient(b.exec(), view(z[static_cast<std::size_t>(i)]), y, {},
                                 loss_of_token{advantages.data()}, {.logp = l}, view(dz[static_cast<std::size_t>(i)]));
    });
}

// Seven numbers in, three out of a token.
void ppo(bench& b, index_t batch, index_t time, bool masked) {
  const std::string name = std::string("ppo_loss") + (masked ? " masked" : "") + " [" + std::to_string(batch) + ", " +
                           std::to_string(time) + "]";
  if (!b.wanted(name)) return;
  const index_t n = batch * time;
  const double bytes = (masked ? 41.0 : 40.0) * static_cast<double>(n);
  const int sets = b.sets(bytes);
  struct set {
    std::vector<buffer<float>> x;
    buffer<std::uint8_t> mask;
  };
  std::vector<set> all;
  for (int i = 0; i < sets; ++i) {
    set s;
    for (unsigned k = 0; k < 10; ++k) s.x.push_back(b.numbers<float>(n, 0.3f, k));
    s.mask = b.flags(n, 1);
    all.push_back(std::move(s));
  }
  b.run(name, bytes, sets, [&](int i) {
    const set& s = all[static_cast<std::size_t>(i)];
    const auto view = [&](std::size_t k) { return mlkit::tensor_view<float, 2>(s.x[k].data(), {batch, time}); };
    rl::policy_batch<float> in{.log_probs = view(0),
                               .old_log_probs = view(1),
                               .advantages = view(2),
                               .entropies = view(3),
                               .values = view(4),
                               .old_values = view(5),
                               .returns = view(6)};
    if (masked) in.mask = mlkit::tensor_view<const std::uint8_t, 2>(s.mask.data(), {batch, time});
    (void)rl::ppo_loss(b.exec(), in, {.value_clip = 0.2, .entropy = 0.01},
                       {.log_probs = view(7), .values = view(8), .entropies = view(9)});
  });
}

// Read twice and written once.
void whiten(bench& b, index_t n) {
  const std::string name = "whiten [" + std::to_string(n) + "]";
  if (!b.wanted(name)) return;
  const double bytes = 12.0 * static_cast<double>(n);
  const int sets = b.sets(bytes);
  std::vector<buffer<float>> x, y;
  for (int i = 0; i < sets; ++i) x.push_back(b.numbers<float>(n, 1)), y.emplace_back(n);
  b.run(name, bytes, sets, [&](int i) {
    const auto k = static_cast<std::size_t>(i);
    (void)rl::whiten(b.exec(), mlkit::tensor_view<const float, 1>(x[k].data(), {n}), {}, {},
                     mlkit::tensor_view<float, 1>(y[k].data(), {n}));
  });
}

void dpo(bench& b, index_t n) {
  const std::string name = "dpo [" + std::to_string(n) + "]";
  if (!b.wanted(name)) return;
  std::vector<buffer<float>> x;
  for (unsigned k = 0; k < 6; ++k) x.push_back(b.numbers<float>(n, 1, k));
  const auto view = [&](std::size_t k) { return mlkit::tensor_view<float, 1>(x[k].data(), {n}); };
  b.run(name, 24.0 * static_cast<double>(n), 1, [&](int) {
    (void)rl::preference_loss(
        b.exec(), {.chosen = view(0), .rejected = view(1), .reference_chosen = view(2), .reference_rejected = view(3)},
        rl::dpo{}, {.chosen = view(4), .rejected = view(5)});
  });
}

template <class T>
void cross_entropy(bench& b, index_t rows, int vocabulary) {
  const std::string name = std::string("cross_entropy and gradient ") + mlkit::dtype_name<T>() + " [" +
                           std::to_string(rows) + ", " + std::to_string(vocabulary) + "]";
  if (!b.wanted(name)) return;
  const index_t n = rows * vocabulary;
  const double bytes = 2.0 * static_cast<double>(n) * sizeof(T);
  const int sets = b.sets(bytes);
  std::vector<buffer<T>> z, dz;
  for (int i = 0; i < sets; ++i) z.push_back(b.numbers<T>(n, 8)), dz.emplace_back(n);
  const auto labels = b.below(rows, vocabulary);
  const mlkit::tensor_view<const std::int32_t, 1> y(labels.data(), {rows});
  b.run(name, bytes, sets, [&](int i) {
    const auto k = static_cast<std::size_t>(i);
    (void)rl::cross_entropy(b.exec(), mlkit::tensor_view<const T, 2>(z[k].data(), {rows, vocabulary}), y, {},
                            mlkit::tensor_view<T, 2>(dz[k].data(), {rows, vocabulary}));
  });
}

// Bound by arithmetic: bytes are those of hidden states, weights and their gradients.
void head(bench& b, index_t rows, index_t depth, int vocabulary) {
  using T = mlkit::bf16;
  const std::string name = "head cross_entropy and gradients bf16 [" + std::to_string(rows) + ", " +
                           std::to_string(depth) + ", " + std::to_string(vocabulary) + "]";
  if (!b.wanted(name)) return;
  const auto h = b.numbers<T>(rows * depth, 1), w = b.numbers<T>(vocabulary * depth, 0.05f, 2);
  const buffer<T> dh(rows * depth), dw(vocabulary * depth);
  const auto labels = b.below(rows, vocabulary);
  b.run(name, 4.0 * static_cast<double>(rows + vocabulary) * static_cast<double>(depth), 1, [&](int) {
    (void)rl::cross_entropy(b.exec(), mlkit::tensor_view<const T, 2>(h.data(), {rows, depth}),
                            mlkit::tensor_view<const T, 2>(w.data(), {vocabulary, depth}),
                            mlkit::tensor_view<const std::int32_t, 1>(labels.data(), {rows}), {},
                            {.dhidden = mlkit::tensor_view<T, 2>(dh.data(), {rows, depth}),
                             .dweight = mlkit::tensor_view<T, 2>(dw.data(), {vocabulary, depth})});
  });
}

// Actions of logits, which are read once from memory.
void draw(bench& b, index_t rows, int classes) {
  const std::string name = "draw actions [" + std::to_string(rows) + ", " + std::to_string(classes) + "]";
  if (!b.wanted(name)) return;
  const index_t n = rows * classes;
  const double bytes = 4.0 * static_cast<double>(n + rows);
  const int sets = b.sets(bytes);
  std::vector<buffer<float>> z;
  for (int i = 0; i < sets; ++i) z.push_back(b.numbers<float>(n, 4));
  const buffer<std::int32_t> actions(rows);
  b.run(name, bytes, sets, [&](int i) {
    rl::sample(b.exec(), rl::categorical<float>{{z[static_cast<std::size_t>(i)].data(), {rows, classes}}}, {.seed = 1},
               mlkit::tensor_view<std::int32_t, 2>(actions.data(), {rows, 1}));
  });
}

// Three times mean and action, once the gradient of the mean, and the action once more as it is drawn.
void gaussian(bench& b, index_t rows, index_t d) {
  const std::string name = "gaussian policy [" + std::to_string(rows) + ", " + std::to_string(d) + "]";
  if (!b.wanted(name)) return;
  const index_t n = rows * d;
  const auto mean = b.numbers<float>(n, 1), log_std = b.numbers<float>(d, 0.5f), slopes = b.numbers<float>(rows, 1);
  const buffer<float> actions(n), dmean(n), dlog_std(d), logp(rows);
  const mlkit::tensor_view<float, 2> a(actions.data(), {rows, d});
  const rl::gaussian<float> policy{.mean = {mean.data(), {rows, d}}, .log_std = {log_std.data(), {1, d}}};
  b.run(name, 28.0 * static_cast<double>(n), 1, [&](int) {
    rl::sample(b.exec(), policy, {.seed = 1}, a);
    rl::log_probs(b.exec(), policy, a, {.logp = mlkit::tensor_view<float, 1>(logp.data(), {rows})});
    rl::backward(b.exec(), policy, a, {.dlogp = mlkit::tensor_view<const float, 1>(slopes.data(), {rows})},
                 {.mean = {dmean.data(), {rows, d}}, .log_std = {dlog_std.data(), {1, d}}});
  });
}

// Taken in and normalised: read twice and written once.
void observations(bench& b, index_t rows, index_t columns) {
  const std::string name = "observations [" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
  if (!b.wanted(name)) return;
  const index_t n = rows * columns;
  const double bytes = 12.0 * static_cast<double>(n);
  const int sets = b.sets(bytes);
  std::vector<buffer<float>> x, y;
  for (int i = 0; i < sets; ++i) x.push_back(b.numbers<float>(n, 1)), y.emplace_back(n);
  rl::device_running_stats stats(b.exec(), columns);
  b.run(name, bytes, sets, [&](int i) {
    const auto k = static_cast<std::size_t>(i);
    const mlkit::tensor_view<const float, 2> v(x[k].data(), {rows, columns});
    stats.update(b.exec(), v);
    stats.normalize(b.exec(), v, {}, mlkit::tensor_view<float, 2>(y[k].data(), {rows, columns}));
  });
}

void k_wise(bench& b, index_t prompts, index_t each) {
  const std::string name = "k_wise [" + std::to_string(prompts) + ", " + std::to_string(each) + "]";
  if (!b.wanted(name)) return;
  const index_t n = prompts * each;
  const auto r = b.numbers<float>(n, 1);
  const buffer<float> d(n);
  b.run(name, 8.0 * static_cast<double>(n), 1, [&](int) {
    (void)rl::preference_loss(b.exec(),
                              {.rewards = mlkit::tensor_view<const float, 1>(r.data(), {n}), .of = rl::groups(each)},
                              rl::k_wise{}, {.rewards = mlkit::tensor_view<float, 1>(d.data(), {n})});
  });
}

}  // namespace

int main(int argc, char** argv) {
  try {
    bench b(argc, argv);
    copies(b);
    for (const bool columns : {false, true}) {
      gae(b, 8192, 1024, columns);
      gae(b, 1024, 1024, columns);
      gae(b, 128, 4096, columns);
      gae(b, 32768, 8, columns);
      if (!columns) gae(b, 1, 32768, columns);
    }
    gae(b, 128, 4096, false, true);
    gae(b, 32768, 8, false, true);
    gae(b, 1, 1 << 20, false);
    vtrace(b, 8192, 1024);
    log_probs<float>(b, 2048, 50257);
    log_probs<mlkit::bf16>(b, 2048, 50257);
    log_probs<float>(b, 4096, 8192);
    log_probs<mlkit::bf16>(b, 4096, 8192);
    cross_entropy<mlkit::bf16>(b, 2048, 50257);
    ppo(b, 4096, 1024, false);
    ppo(b, 4096, 1024, true);
    whiten(b, 1 << 24);
    dpo(b, 4096);
    head(b, 4096, 2048, 50257);
    draw(b, 65536, 18);
    draw(b, 2048, 50257);
    gaussian(b, 65536, 8);
    observations(b, 65536, 64);
    k_wise(b, 4096, 8);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
