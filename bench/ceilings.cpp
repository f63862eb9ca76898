// The ceilings, registered as cases of their own: they are measured between the kernels that they are compared with.
#include <benchmark/benchmark.h>

#include <mlkit/core/cpu.hpp>
#include <mlkit/matmul/run.hpp>
#include <mlkit/simd/vec.hpp>

#include "harness.hpp"

#define MLKIT_FOREACH <ceilings-inl.hpp>
#include <mlkit/simd/foreach_isa.hpp>

namespace bench {
namespace {

using mlkit::index_t;

constexpr index_t rounds = 200'000;                   // about a millisecond
constexpr index_t stream_bytes = index_t{256} << 20;  // of each array of the largest triad and of Adam

// f(begin, end) in ranges of whole cache lines.
template <class F>
void in_parts(int threads, index_t n, F f) {
  constexpr index_t line = 512;
  mlkit::detail::parallel_ranges(mlkit::cpu{.threads = threads}, n / line,
                                 [&](index_t begin, index_t end) { f(begin * line, end * line); });
}

template <class T>
void add_peak(int threads, const std::string& by, mlkit::isa set) {
  const mlkit::isa chosen = mlkit::active_isa();
  mlkit::set_isa(set);
  const double flop = MLKIT_SELECT_PRODUCT(peak_flop<T>)(rounds) * threads;
  const auto loop = MLKIT_SELECT_PRODUCT(peak_loop<T>);
  mlkit::set_isa(chosen);
  add({"peak", mlkit::dtype_name<T>(), "registers", threads, by}, {.flop = flop}, [=] {
    return [=] {
      mlkit::parallel_for(mlkit::cpu{.threads = threads}, threads,
                          [&](index_t) { benchmark::DoNotOptimize(loop(rounds)); });
    };
  });
}

// Streams that start at the same place of a page would make loads wait for stores of others.
float* stream(int i, index_t bytes = stream_bytes) {
  constexpr index_t page = 1024, apart = 208;
  return operand<float>("stream" + std::to_string(i), bytes / 4096 + 1, page).data() + i * apart;
}

// Three arrays of so many bytes, a multiple of 4096, each.
void add_triad(int threads, index_t bytes) {
  const bool whole = bytes % (1 << 20) == 0;
  const std::string shape = "3x" + bench::shape(bytes >> (whole ? 20 : 10)) + (whole ? "MiB" : "KiB");
  add({"triad", "f32", shape, threads, "ceiling"}, {.bytes = 3.0 * static_cast<double>(bytes)}, [=] {
    return [=, a = stream(0, bytes), b = stream(1, bytes), c = stream(2, bytes)] {
      const auto loop = MLKIT_SELECT(triad_loop<float>);
      in_parts(threads, bytes / 4, [&](index_t i, index_t e) { loop(a + i, b + i, c + i, 3.0f, e - i); });
    };
  });
}

}  // namespace

void add_ceilings(const std::vector<double>& read_bytes, const std::vector<double>& triad_bytes) {
  for (const int threads : thread_counts()) {
    for (int i = 0; i < mlkit::isa_count; ++i) {
      const auto set = static_cast<mlkit::isa>(i);
      if (!mlkit::isa_available(set)) continue;
      const bool active = set == mlkit::active_isa();
      if (!active && threads != thread_counts().back()) continue;
      const std::string by = active ? "ceiling" : std::string("ceiling:") + mlkit::isa_name(set);
      add_peak<float>(threads, by, set);
      add_peak<double>(threads, by, set);
      add_peak<mlkit::bf16>(threads, by, set);
    }
    for (const double bytes : read_bytes) {
      const auto n = static_cast<index_t>(bytes / 4);
      add({"read", "f32", shape(n * 4 >> 20) + "MiB", threads, "ceiling"}, {.bytes = bytes}, [=] {
        const float* p = operand<float>("read", n / 1024, 1024).data();
        return [=] {
          const auto loop = MLKIT_SELECT(read_loop<float>);
          in_parts(threads, n, [&](index_t b, index_t e) { benchmark::DoNotOptimize(loop(p + b, e - b)); });
        };
      });
    }
    add_triad(threads, stream_bytes);
    for (const double bytes : triad_bytes) add_triad(threads, static_cast<index_t>(bytes / 3) / 4096 * 4096);
    constexpr index_t n = stream_bytes / 4;
    add({"adam_shaped", "f32", "4x256MiB", threads, "ceiling"}, {.bytes = 7.0 * stream_bytes}, [=] {
      return [=, p = stream(0), m = stream(1), v = stream(2), g = stream(3)] {
        const auto loop = MLKIT_SELECT(adam_shaped_loop<float>);
        in_parts(threads, n, [&](index_t i, index_t e) { loop(p + i, m + i, v + i, g + i, e - i); });
      };
    });
  }
}

}  // namespace bench
