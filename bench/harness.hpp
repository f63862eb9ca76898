// What the benchmark binaries share: how a case is named and timed, and the operands it runs on.
#pragma once

#include <functional>
#include <mlkit/core/tensor.hpp>
#include <mlkit/simd/isa.hpp>
#include <string>
#include <vector>

namespace bench {

/// One row of one table: what is computed, and by whom. In the JSON it is called name/dtype/shape/t<threads>/by.
struct label {
  std::string name, dtype, shape;
  int threads = 1;
  std::string by;
};

/// What one call does: the useful flops, and the bytes that have to move at least once, of which `written` are written;
/// `weights` are the bytes that a quantised base takes. `calls`: the function to time makes that many calls in a row;
/// the times are those of one.
struct work {
  double flop = 0, bytes = 0, written = 0, weights = 0;
  int calls = 1;
};

/// Registers a case. `make` is called once, before the first timing, and returns the call to time.
void add(const label& label, const work& work, std::function<std::function<void()>()> make);

/// add() for mlkit, once for the set that it chooses on this machine ("mlkit") and, with all threads, once for each
/// other set that the machine has ("mlkit:avx2"). The peak of workspace during one call joins the counters.
void add_mlkit(label label, const work& work, std::function<std::function<void()>()> make);

/// One call with all threads, for the peak of its workspace alone ("memory").
void add_memory(label label, const work& work, std::function<std::function<void()>()> make);

/// 1, 2 and all threads of the machine, each once.
const std::vector<int>& thread_counts();

/// FMA peaks of every set and dtype, and the bandwidths; `read_bytes` are the footprints that the family reads, and
/// `triad_bytes` those of what it reads and writes, beside a triad that no cache holds.
void add_ceilings(const std::vector<double>& read_bytes, const std::vector<double>& triad_bytes = {});

/// "512x4096x4096"
template <class... I>
std::string shape(I... extents) {
  std::string s;
  ((s += (s.empty() ? "" : "x") + std::to_string(extents)), ...);
  return s;
}

/// The operand of that name and shape, uniform in [-1, 1) and the same in every run; made when first asked for and
/// shared by all cases, so that peers and mlkit read the same memory.
template <class T>
mlkit::matrix<T>& operand(const std::string& name, mlkit::index_t rows, mlkit::index_t cols);

/// A fact about this run that the report shows, such as the version of a peer.
void note(const std::string& key, const std::string& value);

/// Runs what was registered: `main` of every family.
int run(int argc, char** argv);

}  // namespace bench
