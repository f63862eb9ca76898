#include "harness.hpp"

#include <benchmark/benchmark.h>

#include <chrono>
#include <map>
#include <memory>
#include <mlkit/core/cpu.hpp>
#include <mlkit/core/random.hpp>
#include <thread>

namespace bench {
namespace {

using call = std::function<void()>;

struct prepared {
  call run;
  double workspace = 0;
};

// Other implementations' threads may spin for a moment after their last call; the timed one starts on idle cores.
constexpr auto settle = std::chrono::milliseconds(3);

// `once`: nothing is timed, the call that finds the workspace is the only one.
benchmark::internal::Benchmark* add_case(const label& l, const work& w, std::function<call()> make, mlkit::isa set,
                                         bool is_mlkit, bool once = false) {
  const std::string name = l.name + '/' + l.dtype + '/' + l.shape + "/t" + std::to_string(l.threads) + '/' + l.by;
  static const void* last = nullptr;
  const auto state_of_case = std::make_shared<prepared>();
  const auto timed = [=](benchmark::State& state) {
    const mlkit::isa chosen = mlkit::active_isa();
    mlkit::set_isa(set);
    prepared& p = *state_of_case;
    if (!p.run) {
      p.run = make();
      mlkit::reset_workspace_peak();
      p.run();
      p.workspace = static_cast<double>(mlkit::workspace_peak_bytes());
    }
    if (!once && last != &p) {
      std::this_thread::sleep_for(settle);
      p.run();
    }
    last = &p;
    while (state.KeepRunningBatch(w.calls))
      if (!once) p.run();
    state.counters["flop"] = w.flop;
    state.counters["bytes"] = w.bytes;
    if (w.written > 0) state.counters["written"] = w.written;
    if (w.weights > 0) state.counters["weights"] = w.weights;
    if (is_mlkit) state.counters["workspace"] = p.workspace;
    mlkit::set_isa(chosen);
  };
  return benchmark::RegisterBenchmark(name.c_str(), timed)->UseRealTime()->Unit(benchmark::kNanosecond);
}

}  // namespace

void add(const label& l, const work& w, std::function<call()> make) {
  add_case(l, w, std::move(make), mlkit::active_isa(), false);
}

void add_mlkit(label l, const work& w, std::function<call()> make) {
  add_case(l, w, make, mlkit::active_isa(), true);
  if (l.threads != thread_counts().back()) return;
  const std::string by = l.by;
  for (int i = 0; i < mlkit::isa_count; ++i) {
    const auto set = static_cast<mlkit::isa>(i);
    if (!mlkit::isa_available(set) || set == mlkit::active_isa()) continue;
    l.by = by + ':' + mlkit::isa_name(set);
    add_case(l, w, make, set, true);
  }
}

void add_memory(label l, const work& w, std::function<call()> make) {
  l.threads = thread_counts().back();
  l.by = "memory";
  add_case(l, w, std::move(make), mlkit::active_isa(), true, true)->Iterations(1)->Repetitions(1);
}

const std::vector<int>& thread_counts() {
  static const std::vector<int> counts = [] {
    const int all = mlkit::detail::hardware_threads();
    std::vector<int> c{1};
    if (all >= 2) c.push_back(2);
    if (all > 2) c.push_back(all);
    return c;
  }();
  return counts;
}

template <class T>
mlkit::matrix<T>& operand(const std::string& name, mlkit::index_t rows, mlkit::index_t cols) {
  static std::map<std::string, mlkit::matrix<T>> operands;
  const std::string key = name + shape(rows, cols);
  auto [it, fresh] = operands.try_emplace(key, mlkit::extents_t<2>{rows, cols}, mlkit::uninitialized);
  if (fresh) {
    std::uint64_t bits = std::hash<std::string>{}(key) | 1;
    for (T& x : it->second) {
      bits = bits * 6364136223846793005u + 1442695040888963407u;
      x = static_cast<T>(static_cast<float>(static_cast<std::int64_t>(bits) >> 40) * 0x1p-23f);
    }
  }
  return it->second;
}
template mlkit::matrix<float>& operand<float>(const std::string&, mlkit::index_t, mlkit::index_t);
template mlkit::matrix<double>& operand<double>(const std::string&, mlkit::index_t, mlkit::index_t);
template mlkit::matrix<mlkit::bf16>& operand<mlkit::bf16>(const std::string&, mlkit::index_t, mlkit::index_t);

void note(const std::string& key, const std::string& value) { benchmark::AddCustomContext(key, value); }

int run(int argc, char** argv) {
  note("isa", mlkit::isa_name(mlkit::active_isa()));
#if defined(__clang__)
  note("compiler", "Clang " __clang_version__);
#else
  note("compiler", "GCC " __VERSION__);
#endif
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace bench
