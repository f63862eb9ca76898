// The affine scan that advantages and returns are made of: x_t = a_t x_{t+1} + b_t, backward in time.
#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <mutex>
#include <vector>

#include "../core/memory.hpp"
#include "../simd/math.hpp"
#include "steps.hpp"

namespace MLKIT_NAMESPACE::rl {

/// The map x -> a x + b.
template <class T>
struct affine {
  T a = 1, b = 0;

  MLKIT_HOST_DEVICE constexpr T operator()(T x) const noexcept { return a * x + b; }
};

/// The map that applies `second` and then `first`: (a1 a2, b1 + a1 b2). Associative up to rounding; {1, 0} is neutral.
template <class T>
MLKIT_HOST_DEVICE constexpr affine<T> compose(const affine<T>& first, const affine<T>& second) noexcept {
  return {first.a * second.a, first.b + first.a * second.b};
}

namespace detail {

// Steps of a tile; steps of a part, after which what lies behind it is one map away.
inline constexpr index_t scan_depth = 64, scan_part = 256;

// Bits of a step's code.
inline constexpr int step_skipped = 1, step_terminated = 2, step_truncated = 4;

/// Steps [begin, end) of row `row`, which belong to sequence `sequence`.
struct scan_unit {
  index_t row, begin, end, sequence;
};

template <class T, int Inputs, class F>
struct affine_rule {
  using value_type = T;
  // Matrices read and written; what a step carries to the one before it beside x; how many steps behind a part have to
  // be looked at to know that.
  static constexpr int inputs = Inputs, outputs = 1, carried = 0, lookahead = 0;
  // What masked steps give: the value that passes through them, or 0.
  static constexpr bool carries_through_mask = true;
  F f;
};

/// What the kernels are given.
template <class Rule>
struct scan_problem {
  using rule_type = Rule;
  using value_type = typename Rule::value_type;
  using T = value_type;

  Rule rule;
  index_t batch = 0, time = 0;
  std::array<stream<const T>, static_cast<std::size_t>(Rule::inputs > 0 ? Rule::inputs : 1)> in = {};
  std::array<stream<T>, static_cast<std::size_t>(Rule::outputs)> out = {};
  stream<const T> final_values = {};
  stream<const std::uint8_t> terminated = {}, truncated = {}, mask = {};
  stream<const std::uint8_t> last_terminated = {}, last_truncated = {};  // [batch]
  stream<const T> bootstrap = {};                                        // [batch]
  bool begins = false;                                                   // flags say it of the step before
  const std::int32_t* starts = nullptr;                                  // of packed sequences, which lie in row 0
  index_t sequences = 0, longest = 0;
  const T* ends = nullptr;       // the value behind each sequence
  bool beside = false;           // all matrices lie along the batch
  bool flags_along_time = true;  // all that are given do
  bool plain_rows = false;       // all matrices lie along time, flags say it of their own step, and every step counts
  bool far_reads = false, far_lanes = false, past_caches = false;

  index_t row(index_t s) const noexcept { return starts ? 0 : s; }
  index_t first(index_t s) const noexcept { return starts ? starts[s] : 0; }
  index_t last(index_t s) const noexcept { return starts ? starts[s + 1] : time; }
  bool counts(index_t b, index_t t) const noexcept { return !mask || *mask.at(b, t) != 0; }
  static int code_of(bool terminated, bool truncated) noexcept {
    return terminated ? step_terminated : truncated ? step_truncated : 0;
  }
  int code(index_t b, index_t t) const noexcept {
    return code_of(terminated && *terminated.at(b, t) != 0, truncated && *truncated.at(b, t) != 0);
  }
  int last_code(index_t s) const noexcept {
    return code_of(last_terminated && *last_terminated.at(s, 0) != 0, last_truncated && *last_truncated.at(s, 0) != 0);
  }
};

template <class Problem>
struct scan_kernels {
  using T = typename Problem::value_type;
  void (*scan_sequences)(const Problem&, index_t first, index_t end) noexcept;
  void (*compose_units)(const Problem&, const scan_unit*, index_t first, index_t end, T* a, T* b) noexcept;
  void (*emit_units)(const Problem&, const scan_unit*, index_t first, index_t end, const T* x) noexcept;
  void (*carry)(const Problem&, const scan_unit*, index_t count, index_t maps, const T* a, const T* b, T* x) noexcept;
  bool (*all_finite)(const T*, index_t) noexcept;
  bool (*any_byte)(const std::uint8_t*, index_t) noexcept;
  int width;
};

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::rl

namespace MLKIT_NAMESPACE::detail {
using rl::detail::scan_depth;
using rl::detail::scan_part;
using rl::detail::step_skipped;
using rl::detail::step_terminated;
using rl::detail::step_truncated;
}  // namespace MLKIT_NAMESPACE::detail

#define MLKIT_FOREACH "../rl/cpu/scan-inl.hpp"
#include "../simd/foreach_isa.hpp"

namespace MLKIT_NAMESPACE::rl {
namespace detail {

/// What a scan cannot go on with, by kind, sequence and step; the first in that order is reported.
struct scan_defect {
  enum kinds : int { reward, final_value, end, none } kind = none;
  index_t sequence = 0, step = 0;

  void add(kinds k, index_t s, index_t t) noexcept {
    if (k < kind || (k == kind && (s < sequence || (s == sequence && t < step)))) *this = {k, s, t};
  }
};

/// Which of its inputs a scan looks at before it begins.
struct scan_needs {
  bool finite_rewards = true;  // in[0]
  bool end_values = true;      // a bootstrap or final value, unless the last step is terminated
};

// Calls f(pointer, count) for runs of memory that hold steps of sequences [first, end), and not more.
template <class Problem, class U, class F>
bool each_run(const Problem& p, const stream<U>& s, index_t first, index_t end, F&& f) {
  if (first >= end) return true;
  if (p.starts) {
    if (s.time == 1) return f(s.at(0, p.first(first)), p.last(end - 1) - p.first(first));
    for (index_t t = p.first(first); t < p.last(end - 1); ++t)
      if (!f(s.at(0, t), 1)) return false;
    return true;
  }
  if (s.time == 1) {
    if (s.batch == p.time) return f(s.at(first, 0), (end - first) * p.time);
    for (index_t b = first; b < end; ++b)
      if (!f(s.at(b, 0), p.time)) return false;
    return true;
  }
  if (s.batch == 1 && s.time == end - first) return f(s.at(first, 0), (end - first) * p.time);
  for (index_t t = 0; t < p.time; ++t) {
    if (s.batch == 1) {
      if (!f(s.at(first, t), end - first)) return false;
      continue;
    }
    for (index_t b = first; b < end; ++b)
      if (!f(s.at(b, t), 1)) return false;
  }
  return true;
}

/// Looks for defects in sequences [first, end), and finds the values behind them.
template <class Problem, class Kernels>
scan_defect inspect(const Problem& p, const Kernels& kernels, const scan_needs& needs, index_t first, index_t end,
                    typename Problem::value_type* ends) {
  using T = typename Problem::value_type;
  scan_defect found;
  if (needs.finite_rewards && !each_run(p, p.in[0], first, end, kernels.all_finite))
    for (index_t s = first; s < end && found.kind != scan_defect::reward; ++s)
      for (index_t t = p.first(s); t < p.last(s); ++t)
        if (p.counts(p.row(s), t) && !std::isfinite(*p.in[0].at(p.row(s), t))) found.add(scan_defect::reward, s, t);
  // With a value behind each, and no truncation without one, there is nothing else to look at.
  if (p.bootstrap && (p.final_values || !(p.truncated || p.last_truncated))) {
    for (index_t s = first; s < end; ++s) ends[s] = *p.bootstrap.at(s, 0);
    return found;
  }
  const bool no_finals =
      !p.final_values && p.truncated &&
      !each_run(p, p.truncated, first, end, [&](const std::uint8_t* q, index_t n) { return !kernels.any_byte(q, n); });
  for (index_t s = first; s < end; ++s) {
    const index_t b = p.row(s), begin = p.first(s);
    index_t t = p.last(s) - 1;
    while (t >= begin && !p.counts(b, t)) --t;
    ends[s] = p.bootstrap ? *p.bootstrap.at(s, 0) : T{};
    if (t < begin) continue;
    const int code = p.begins ? p.last_code(s) : p.code(b, t);
    if (code == step_truncated && !p.final_values) found.add(scan_defect::final_value, s, t);
    if (code != step_terminated) {
      if (!p.bootstrap && p.final_values) ends[s] = *p.final_values.at(b, t);
      if (!p.bootstrap && !p.final_values && needs.end_values) found.add(scan_defect::end, s, t);
    }
    if (!no_finals) continue;
    int later = code;
    for (; t >= begin; --t) {
      if (!p.counts(b, t)) continue;
      const int own = p.code(b, t);
      if ((p.begins ? later : own) == step_truncated) found.add(scan_defect::final_value, s, t);
      later = own;
    }
  }
  return found;
}

template <class Problem>
[[noreturn]] void fail_scan(std::string_view function, const Problem& p, const scan_defect& d) {
  const std::string step = p.starts ? message("[", d.step, "]") : message("[", d.sequence, ", ", d.step, "]");
  if (d.kind == scan_defect::reward)
    fail_value(function, ": rewards", step, " = ", *p.in[0].at(p.row(d.sequence), d.step), " is not finite");
  if (d.kind == scan_defect::final_value)
    fail_value(function, ": step ", step, " was truncated, but there are no final_values");
  fail_value(function, ": the window ends with step ", step,
             ", which is not terminated, and there is neither a bootstrap nor final_values");
}

// Steps that a thread must have to be worth its start.
inline constexpr index_t steps_per_thread = 1 << 13;

// Inputs, and outputs, of more bytes than this come from beyond the caches of a core, and go there.
inline constexpr index_t far_bytes = index_t{1} << 21;

template <class T>
bool whole_lines(const stream<T>& s, bool along_batch) noexcept {
  constexpr index_t line = 64;
  const index_t run = along_batch ? s.batch : s.time, step = along_batch ? s.time : s.batch;
  return reinterpret_cast<std::uintptr_t>(s.data) % line == 0 && run == 1 && step * index_t{sizeof(T)} % line == 0;
}

inline cpu limit_scan_threads(const cpu& exec, index_t steps) {
  cpu limited = exec;
  const index_t useful = std::max<index_t>(1, steps / steps_per_thread);
  limited.threads = useful == 1 ? 1 : static_cast<int>(std::min<index_t>(useful, concurrency(exec)));
  return limited;
}

/// Looks into all sequences; throws for the first defect, else the values behind them are `ends` and the problem's.
template <class Problem, class Kernels>
void inspect_all(std::string_view function, const cpu& exec, Problem& p, const Kernels& kernels,
                 const scan_needs& needs, typename Problem::value_type* ends) {
  constexpr index_t grain = 16;
  scan_defect defect;
  std::mutex adding;
  parallel_ranges(exec, ceil_div(p.sequences, grain), [&](index_t begin, index_t end) {
    // Along time the last ones first: those that the scan begins with are in cache then.
    scan_defect found;
    const index_t step = p.beside ? end - begin : 1;
    for (index_t last = end; last > begin; last -= step) {
      const scan_defect d =
          inspect(p, kernels, needs, (last - step) * grain, std::min(p.sequences, last * grain), ends);
      if (d.kind != scan_defect::none) found.add(d.kind, d.sequence, d.step);
    }
    if (found.kind == scan_defect::none) return;
    std::lock_guard lock(adding);
    defect.add(found.kind, found.sequence, found.step);
  });
  if (defect.kind != scan_defect::none) fail_scan(function, p, defect);
  p.ends = ends;
}

/// Checks what only the data can tell, then scans. Shapes are checked before.
template <class Problem>
void run_scan(std::string_view function, const cpu& exec, Problem& p, const scan_needs& needs) {
  using T = typename Problem::value_type;
  if (p.sequences == 0 || p.batch == 0 || p.time == 0) return;
  const auto kernels = MLKIT_SELECT_WITHOUT_BF16(scan_entry<Problem>)();
  const index_t steps = p.batch * p.time, width = kernels.width;
  p.longest = p.time;
  if (p.starts) {
    p.longest = 0;
    for (index_t s = 0; s < p.sequences; ++s) p.longest = std::max(p.longest, p.last(s) - p.first(s));
  }
  p.beside = !p.starts;
  const auto look_at = [&](const auto& s) { p.beside = p.beside && (!s || (s.batch == 1 && s.time != 1)); };
  for (const auto& s : p.in) look_at(s);
  for (const auto& s : p.out) look_at(s);
  look_at(p.final_values);
  for (const auto* flags : {&p.terminated, &p.truncated, &p.mask}) {
    look_at(*flags);
    p.flags_along_time = p.flags_along_time && (!*flags || flags->time == 1);
  }
  p.plain_rows = p.flags_along_time && !p.begins && !p.mask && (!p.final_values || p.final_values.time == 1);
  for (const auto& s : p.in) p.plain_rows = p.plain_rows && s.time == 1;
  for (const auto& s : p.out) p.plain_rows = p.plain_rows && (!s || s.time == 1);
  const bool far = steps * index_t{sizeof(T)} * std::max(1, Problem::rule_type::inputs) > far_bytes;
  p.far_reads = far && !p.beside && p.flags_along_time;
  for (const auto& s : p.in) p.far_reads = p.far_reads && (!s || s.time == 1);
  p.far_lanes = far && p.beside;
  p.past_caches = !p.starts && steps * index_t{sizeof(T)} * Problem::rule_type::outputs > far_bytes;
  for (const auto& s : p.out) p.past_caches = p.past_caches && (!s || whole_lines(s, p.beside));
  const cpu limited = limit_scan_threads(exec, steps);
  const workspace<T> ends(p.sequences);
  inspect_all(function, limited, p, kernels, needs, ends.data());

  // Sequences in one part each, or enough of them for all lanes and threads, are scanned whole. Both ways give the same
  // bits.
  constexpr index_t few_beside = 4;
  const index_t groups = ceil_div(p.sequences, width);
  const bool whole =
      p.longest <= scan_part || (!p.starts && p.sequences >= (p.beside ? few_beside : width * limited.threads));
  if (whole) {
    parallel_ranges(limited, groups, [&](index_t begin, index_t end) {
      kernels.scan_sequences(p, begin * width, std::min(p.sequences, end * width));
    });
    return;
  }
  std::vector<scan_unit> units, later;
  units.reserve(static_cast<std::size_t>(p.batch * p.time / scan_part + p.sequences));
  later.reserve(units.capacity());
  for (index_t s = 0; s < p.sequences; ++s)
    for (index_t begin = p.first(s); begin < p.last(s); begin += scan_part) {
      const scan_unit u{p.row(s), begin, std::min(begin + scan_part, p.last(s)), s};
      units.push_back(u);
      if (begin > p.first(s)) later.push_back(u);
    }
  const index_t count = static_cast<index_t>(units.size()), maps = static_cast<index_t>(later.size());
  const workspace<T> values(count + 2 * maps);
  T *x = values.data(), *a = x + count, *b = a + maps;
  parallel_ranges(limited, ceil_div(maps, width), [&](index_t begin, index_t end) {
    kernels.compose_units(p, later.data(), begin * width, std::min(maps, end * width), a, b);
  });
  kernels.carry(p, units.data(), count, maps, a, b, x);
  parallel_ranges(limited, ceil_div(count, width), [&](index_t begin, index_t end) {
    kernels.emit_units(p, units.data(), begin * width, std::min(count, end * width), x);
  });
}

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::rl
