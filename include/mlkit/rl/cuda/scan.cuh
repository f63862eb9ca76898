// Affine recurrences backward in time on a GPU.
//
// Where steps lie along memory, a thread takes four of them, 16 bytes of f32, composes their maps, and a warp scans the
// maps of its 128 steps by shuffles: a part. Eight parts make a group of 1024 steps: within it the value behind each
// part is the next one's map of what lies behind that; the value behind a group is the next group's composed map of
// what lies behind that. A block has the whole sequence, up to 32 parts at a time; rows of up to 64 steps share warps;
// few long sequences are spread by groups over all multiprocessors, which compose their groups' maps first.
// All of these take the same sums in the same order: the bits are those of the sequence alone.
//
// Where sequences lie side by side in memory, a thread takes eight steps of one of them, a warp those of 32 neighbours,
// and a block of 12 warps goes through the 96 steps of a group, whose maps it composes as above.
#pragma once

#include "scan_rules.cuh"

namespace MLKIT_NAMESPACE::rl::detail {

inline constexpr int thread_steps = 4, part_steps = warp_threads * thread_steps, group_parts = 8,
                     group_steps = group_parts * part_steps, most_parts = 32;
inline constexpr int column_steps = 8, column_warps = 12, column_group = column_steps * column_warps;

// A problem as kernels are given it.
template <class Rule>
struct device_scan {
  using rule_type = Rule;
  using T = typename Rule::value_type;
  static constexpr int inputs = Rule::inputs > 0 ? Rule::inputs : 1;

  Rule rule;
  stream<const T> in[inputs];
  stream<T> out[Rule::outputs];
  stream<const T> final_values, bootstrap;
  stream<const std::uint8_t> terminated, truncated, mask, last_terminated, last_truncated;
  const std::int32_t* starts;
  index_t sequences;
  int time;
  bool begins, needs_end;

  template <class Problem>
  device_scan(const Problem& p, bool end_values)
      : rule(p.rule),
        final_values(p.final_values),
        bootstrap(p.bootstrap),
        terminated(p.terminated),
        truncated(p.truncated),
        mask(p.mask),
        last_terminated(p.last_terminated),
        last_truncated(p.last_truncated),
        starts(p.starts),
        sequences(p.sequences),
        time(static_cast<int>(p.time)),
        begins(p.begins),
        needs_end(end_values) {
    for (int i = 0; i < inputs; ++i) in[i] = p.in[static_cast<std::size_t>(i)];
    for (int i = 0; i < Rule::outputs; ++i) out[i] = p.out[static_cast<std::size_t>(i)];
  }

  // Whether a step depends on those behind it otherwise than through x.
  __device__ __forceinline__ bool looks_behind() const { return Rule::lookahead > 0 || begins; }
  __device__ __forceinline__ bool counts(index_t row, int t) const { return !mask || *mask.at(row, t) != 0; }
  static __device__ __forceinline__ int code_of(bool terminated, bool truncated) {
    return terminated ? step_terminated : truncated ? step_truncated : 0;
  }
  __device__ __forceinline__ int code(index_t row, int t) const {
    return code_of(terminated && *terminated.at(row, t) != 0, truncated && *truncated.at(row, t) != 0);
  }
};

// Where a sequence is: steps [first, last) of a row. Starts that make no sense end within the tokens.
struct sequence_range {
  index_t row = 0;
  int first = 0, last = 0;

  template <class Rule>
  __device__ __forceinline__ sequence_range(const device_scan<Rule>& p, index_t s) : row(s), last(p.time) {
    if (!p.starts) return;
    row = 0;
    first = min(max(p.starts[s], 0), p.time);
    last = min(max(p.starts[s + 1], first), p.time);
  }
};

// The next two steps that count, -1 where there are none.
struct steps_behind {
  int at[2] = {-1, -1};

  __device__ __forceinline__ void put_before(int t) {
    at[1] = at[0];
    at[0] = t;
  }
};

// Those of lanes above, as `lanes` names them, before those of `far`.
__device__ __forceinline__ steps_behind nearest_steps(unsigned lanes, const steps_behind& own,
                                                      const steps_behind& far) {
  const int one = lanes ? __ffs(static_cast<int>(lanes)) - 1 : 0;
  const unsigned rest = lanes & (lanes - 1);
  const int two = rest ? __ffs(static_cast<int>(rest)) - 1 : 0;
  const int first = __shfl_sync(whole_warp, own.at[0], one), second = __shfl_sync(whole_warp, own.at[1], one),
            third = __shfl_sync(whole_warp, own.at[0], two);
  if (!lanes) return far;
  steps_behind r;
  r.at[0] = first;
  r.at[1] = second >= 0 ? second : rest ? third : far.at[0];
  return r;
}

// The last step that counts in [first, end), -1 if there is none; by a warp together.
template <class Rule>
__device__ __forceinline__ int last_counted(const device_scan<Rule>& p, index_t row, int first, int end) {
  constexpr int each = 8;
  if (!p.mask) return end > first ? end - 1 : -1;
  const int lane = static_cast<int>(threadIdx.x) % warp_threads;
  for (int top = end; top > first; top -= each * warp_threads) {
    int found = -1;
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const int t = top - 1 - (each - 1 - i) * warp_threads - lane;
      if (t >= first && p.counts(row, t)) found = t;
    }
#pragma unroll
    for (int d = warp_threads / 2; d > 0; d /= 2) found = max(found, __shfl_xor_sync(whole_warp, found, d));
    if (found >= 0) return found;
  }
  return -1;
}
// The first two that count in [begin, last); by a warp together.
template <class Rule>
__device__ __forceinline__ steps_behind first_counted(const device_scan<Rule>& p, index_t row, int begin, int last) {
  steps_behind r;
  if (!p.mask) {
    if (begin < last) r.at[0] = begin;
    if (begin + 1 < last) r.at[1] = begin + 1;
    return r;
  }
  const int lane = static_cast<int>(threadIdx.x) % warp_threads;
  int have = 0;
  for (int base = begin; base < last && have < 2; base += warp_threads) {
    unsigned some = __ballot_sync(whole_warp, base + lane < last && p.counts(row, base + lane));
    for (; some && have < 2; some &= some - 1) r.at[have++] = base + __ffs(static_cast<int>(some)) - 1;
  }
  return r;
}

// What lies behind a sequence: the value there, given its last step that counts, and the code that flags of the other
// convention give that step.
template <class T>
struct sequence_end {
  T value = T{};
  int code = 0;

  template <class Rule>
  __device__ __forceinline__ sequence_end(const device_scan<Rule>& p, index_t s, index_t row, int last_step) {
    if (p.begins)
      code = p.code_of(p.last_terminated && *p.last_terminated.at(s, 0) != 0,
                       p.last_truncated && *p.last_truncated.at(s, 0) != 0);
    if (p.bootstrap)
      value = *p.bootstrap.at(s, 0);
    else if (p.final_values)
      value = last_step >= 0 ? *p.final_values.at(row, last_step) : T{};
    else if (p.needs_end)
      value = not_a_number<T>();
  }
};

// Steps of one sequence that a thread has. Wide: they may lie side by side.
template <class Rule, int Steps, bool Wide>
struct scan_chunk {
  using T = typename Rule::value_type;
  using step = scan_step<Rule>;
  static constexpr int inputs = Rule::inputs > 0 ? Rule::inputs : 1, outputs = Rule::outputs,
                       carried = Rule::carried > 0 ? Rule::carried : 1;

  T in[inputs][Steps], final_value[Steps];
  T before[Steps][carried];
  affine<T> map[Steps];
  std::uint32_t terminated[Steps / 4], truncated[Steps / 4], mask[Steps / 4],
      codes[Steps / 4] = {};  // a byte to a step
  int count;

  // Asks for the steps [t, t + n) of a row, and their flags.
  __device__ __forceinline__ void load(const device_scan<Rule>& p, index_t row, int t, int n) {
    count = n;
#pragma unroll
    for (int i = 0; i < Rule::inputs; ++i) load_steps<Steps, Wide>(p.in[i].at(row, t), p.in[i].time, n, in[i]);
    static_assert(Steps % 4 == 0);
#pragma unroll
    for (int k = 0; k < Steps; k += 4) {
      const auto flags = [&](const stream<const std::uint8_t>& s) {
        const std::uint32_t bytes = load_flags<4, Wide>(s.at(row, t + k), s.time, n - k);
        return Wide ? bytes : set_flags(bytes);  // at once where each byte has a register of its own meanwhile
      };
      terminated[k / 4] = truncated[k / 4] = 0, mask[k / 4] = ~0u;
      if (p.terminated) terminated[k / 4] = flags(p.terminated);
      if (p.truncated) truncated[k / 4] = flags(p.truncated);
      if (p.mask) mask[k / 4] = flags(p.mask);
    }
  }
  // The codes of the steps, once the flags are there.
  __device__ __forceinline__ void decode() {
    constexpr std::uint32_t ones = 0x01010101u;
#pragma unroll
    for (int k = 0; k < Steps; k += 4) {
      const std::uint32_t ended = set_flags(terminated[k / 4]), cut = set_flags(truncated[k / 4]) & ~ended;
      std::uint32_t counted = set_flags(mask[k / 4]);
      const int missing = k + 4 - count;
      if (missing > 0) counted = missing >= 4 ? 0 : counted & (ones >> (8 * missing));
      codes[k / 4] =
          (ones & ~counted) * step_skipped + (ended & counted) * step_terminated + (cut & counted) * step_truncated;
    }
  }

  __device__ __forceinline__ int code(int k) const { return static_cast<int>(codes[k / 4] >> (8 * (k % 4))) & 7; }
  __device__ __forceinline__ bool skipped(int k) const { return (code(k) & step_skipped) != 0; }

  // The first two of the steps that count.
  __device__ __forceinline__ steps_behind counted(int t) const {
    steps_behind r;
#pragma unroll
    for (int k = Steps - 1; k >= 0; --k)
      if (!skipped(k)) r.put_before(t + k);
    return r;
  }

  // What steps carry to those before them, from the end of the sequence through the steps behind the chunk, as far as
  // the rule looks.
  struct carry {
    T next[carried];
    int code;

    __device__ __forceinline__ carry(const device_scan<Rule>& p, index_t row, const sequence_end<T>& end,
                                     const steps_behind& behind)
        : code(end.code) {
      step::end(p.rule, end.value, next);
      constexpr int looks = Rule::lookahead > 1 ? Rule::lookahead : 1;
#pragma unroll
      for (int j = looks - 1; j >= 0; --j) {
        const int t = behind.at[j];
        if (t < 0 || !p.looks_behind()) continue;
        T x[inputs];
#pragma unroll
        for (int i = 0; i < Rule::inputs; ++i) x[i] = *p.in[i].at(row, t);
        // Flags of the one step that is looked at matter to the step before it alone.
        const int own = looks > 1 || p.begins ? p.code(row, t) : 0, now = p.begins ? code : own;
        code = own;
        (void)step::map(p.rule, x, final_of(p, row, t, now), step_dones<T>{now}, next);
      }
    }
  };

  static __device__ __forceinline__ T final_of(const device_scan<Rule>& p, index_t row, int t, int code) {
    if (!(code & step_truncated)) return T{};
    return p.final_values ? *p.final_values.at(row, t) : not_a_number<T>();
  }

  // The maps of the steps, and of all of them.
  __device__ __forceinline__ affine<T> compose(const device_scan<Rule>& p, index_t row, int t, carry c) {
    affine<T> all{};
#pragma unroll
    for (int k = Steps - 1; k >= 0; --k) {
      map[k] = {};
      if (skipped(k)) continue;
      const int own = code(k), now = p.begins ? c.code : own;
      c.code = own;
      codes[k / 4] ^= static_cast<std::uint32_t>(own ^ now) << (8 * (k % 4));
      T x[inputs];
#pragma unroll
      for (int i = 0; i < inputs; ++i) x[i] = in[i][k];
#pragma unroll
      for (int i = 0; i < carried; ++i) before[k][i] = c.next[i];
      final_value[k] = final_of(p, row, t + k, now);
      map[k] = step::map(p.rule, x, final_value[k], step_dones<T>{now}, c.next);
      all = join_maps(map[k], all);
    }
    return all;
  }

  // Writes the outputs, with x behind the chunk.
  __device__ __forceinline__ void emit(const device_scan<Rule>& p, index_t row, int t, T x) const {
    T result[outputs][Steps];
#pragma unroll
    for (int k = Steps - 1; k >= 0; --k) {
      T now[inputs], written[outputs];
#pragma unroll
      for (int o = 0; o < outputs; ++o) written[o] = Rule::carries_through_mask ? x : T{};
      if (!skipped(k)) {
#pragma unroll
        for (int i = 0; i < inputs; ++i) now[i] = in[i][k];
        const T after = x;
        x = apply_map(map[k], after);
        step::emit(p.rule, now, final_value[k], step_dones<T>{code(k)}, before[k], after, x, written);
      }
#pragma unroll
      for (int o = 0; o < outputs; ++o) result[o][k] = written[o];
    }
#pragma unroll
    for (int o = 0; o < outputs; ++o)
      if (p.out[o]) store_steps<Steps, Wide>(p.out[o].at(row, t), p.out[o].time, count, result[o]);
  }
};

// Scans the maps of neighbouring lanes from the right, `lanes` of them together: the map of each lane's and all behind.
template <class T>
__device__ __forceinline__ affine<T> scan_lanes(affine<T> m, int lane, int lanes) {
#pragma unroll
  for (int d = 1; d < warp_threads; d *= 2) {
    const affine<T> far{__shfl_down_sync(whole_warp, m.a, static_cast<unsigned>(d)),
                        __shfl_down_sync(whole_warp, m.b, static_cast<unsigned>(d))};
    if (lane + d < lanes) m = join_maps(m, far);
  }
  return m;
}
// x behind each lane, of that behind the last one.
template <class T>
__device__ __forceinline__ T behind_lane(const affine<T>& scanned, int lane, int lanes, T x) {
  const affine<T> rest{__shfl_down_sync(whole_warp, scanned.a, 1u), __shfl_down_sync(whole_warp, scanned.b, 1u)};
  return lane + 1 < lanes ? apply_map(rest, x) : x;
}

// What a block does: all of a sequence, some parts at a time; or, of one group of it, the outputs or the map.
enum class scan_stage { whole, emit, compose };
template <class T, scan_stage Stage>
inline constexpr int stage_parts = Stage != scan_stage::whole ? group_parts
                                   : sizeof(T) == 8           ? most_parts / 2
                                                              : most_parts;
// Blocks of an SM, which keeps registers few enough.
template <class Rule, scan_stage Stage>
inline constexpr int stage_blocks = Stage == scan_stage::whole               ? 1
                                    : sizeof(typename Rule::value_type) == 8 ? 2
                                    : Rule::inputs > 2                       ? 4
                                                                             : 5;

// Rows, or packed sequences. groups: the maps of groups [sequences, most_groups], or the values behind them in b; null
// where each sequence has but one group.
template <class Rule, scan_stage Stage>
__global__ void __launch_bounds__((stage_parts<typename Rule::value_type, Stage>)*warp_threads,
                                  (stage_blocks<Rule, Stage>))
    scan_rows(const device_scan<Rule> p, affine<typename Rule::value_type>* groups, int most_groups) {
  using T = typename Rule::value_type;
  using chunk = scan_chunk<Rule, thread_steps, true>;
  constexpr int room = stage_parts<T, Stage>;
  __shared__ T part_a[room], part_b[room], part_x[room];
  __shared__ int part_first[room], part_second[room];
  const int lane = static_cast<int>(threadIdx.x) % warp_threads, warp = static_cast<int>(threadIdx.x) / warp_threads,
            parts = static_cast<int>(blockDim.x) / warp_threads, tile_steps = parts * part_steps;

  __shared__ index_t row_of_block;

  const index_t s = Stage == scan_stage::whole ? blockIdx.x : blockIdx.x / most_groups;
  const sequence_range range(p, s);
  int tile = (range.last - range.first + tile_steps - 1) / tile_steps - 1;
  if constexpr (Stage != scan_stage::whole) {
    const int last = tile;
    tile = static_cast<int>(blockIdx.x - s * most_groups);
    // The map of the first group is not asked for.
    if (tile > last || (Stage == scan_stage::compose && tile == 0)) return;
  }
  const bool needs_last = p.mask && !p.bootstrap && p.final_values;
  const int last_step = needs_last ? last_counted(p, range.row, range.first, range.last) : range.last - 1;
  const sequence_end<T> end(p, s, range.row, last_step);
  T x = scan_step<Rule>::seed(p.rule, end.value);  // behind the tile; known to warp 0
  steps_behind behind;                             // the tile, where there is a mask
  if (Stage == scan_stage::emit && groups) x = groups[s * most_groups + tile].b;
  if (Stage != scan_stage::whole && p.mask && p.looks_behind())
    behind = first_counted(p, range.row, range.first + (tile + 1) * tile_steps, range.last);

  // Read anew for each tile, so that no registers are spent on what follows from it.
  if (threadIdx.x == 0) row_of_block = range.row;
  __syncthreads();
  for (; tile >= 0; --tile) {
    const index_t row = row_of_block;
    const int t = range.first + tile * tile_steps + (warp * warp_threads + lane) * thread_steps,
              count = max(0, min(thread_steps, range.last - t));
    chunk c;
    c.load(p, row, t, count);
    steps_behind after;
    if (p.mask) {
      c.decode();
      // Those of the lanes behind, of the parts behind, of the tiles behind.
      if (p.looks_behind()) {
        const steps_behind own = c.counted(t);
        const unsigned some = __ballot_sync(whole_warp, own.at[0] >= 0);
        const steps_behind first = nearest_steps(some, own, {});
        if (lane == 0) part_first[warp] = first.at[0], part_second[warp] = first.at[1];
        __syncthreads();
        steps_behind of_part;
        if (lane < parts) of_part.at[0] = part_first[lane], of_part.at[1] = part_second[lane];
        const unsigned filled = __ballot_sync(whole_warp, of_part.at[0] >= 0), above = ~0u << warp << 1;
        const steps_behind part_behind = nearest_steps(filled & above, of_part, behind);
        behind = nearest_steps(filled, of_part, behind);
        after = nearest_steps(some & (~0u << lane << 1), own, part_behind);
      }
    } else {
      if (t + thread_steps < range.last) after.at[0] = t + thread_steps;
      if (t + thread_steps + 1 < range.last) after.at[1] = t + thread_steps + 1;
    }
    const typename chunk::carry from_behind(p, row, end, after);
    if (!p.mask) c.decode();
    const affine<T> of_chunk = c.compose(p, row, t, from_behind);
    const affine<T> scanned = scan_lanes(of_chunk, lane, warp_threads);
    if (lane == 0) part_a[warp] = scanned.a, part_b[warp] = scanned.b;
    __syncthreads();

    // x behind each part; that behind a group by the next one's map.
    affine<T> of_part{};
    if (lane < parts) of_part = {part_a[lane], part_b[lane]};
    const auto part_map = [&](int j) -> affine<T> {
      return {__shfl_sync(whole_warp, of_part.a, j), __shfl_sync(whole_warp, of_part.b, j)};
    };
    T part_behind = x;
    if constexpr (Stage == scan_stage::whole) {
      if (warp == 0) {
        T mine = x, inside = x;
        affine<T> group{};
        for (int j = parts - 1; j >= 0; --j) {
          const affine<T> m = part_map(j);
          if (lane == j) mine = inside;
          inside = apply_map(m, inside);
          group = join_maps(m, group);
          if (j % group_parts == 0) {
            x = inside = apply_map(group, x);
            group = {};
          }
        }
        if (lane < parts) part_x[lane] = mine;
      }
      __syncthreads();
      part_behind = part_x[warp];
    } else if constexpr (Stage == scan_stage::emit) {
      for (int j = parts - 1; j > warp; --j) part_behind = apply_map(part_map(j), part_behind);
    } else if (warp == 0) {
      affine<T> group{};
      for (int j = parts - 1; j >= 0; --j) group = join_maps(part_map(j), group);
      if (lane == 0) groups[s * most_groups + tile] = group;
    }
    if constexpr (Stage != scan_stage::compose)
      c.emit(p, row, t, behind_lane(scanned, lane, warp_threads, part_behind));
    if constexpr (Stage != scan_stage::whole) return;
  }
}

// The value behind each group of a sequence, from the maps of those behind it; a warp to each sequence.
template <class Rule>
__global__ void __launch_bounds__(warp_threads)
    carry_groups(const device_scan<Rule> p, affine<typename Rule::value_type>* groups, int most_groups) {
  using T = typename Rule::value_type;
  const int lane = static_cast<int>(threadIdx.x);
  const index_t s = blockIdx.x;
  const sequence_range range(p, s);
  const int count = (range.last - range.first + group_steps - 1) / group_steps;
  const bool needs_last = p.mask && !p.bootstrap && p.final_values;
  const int last_step = needs_last ? last_counted(p, range.row, range.first, range.last) : range.last - 1;
  const sequence_end<T> end(p, s, range.row, range.last > range.first ? last_step : -1);
  T x = scan_step<Rule>::seed(p.rule, end.value);
  affine<T>* const own = groups + s * most_groups;
  for (int base = (count - 1) / warp_threads * warp_threads; base >= 0; base -= warp_threads) {
    affine<T> m{};
    const int g = base + lane;
    if (g > 0 && g < count) m = own[g];  // the first has none
    T mine = x;
#pragma unroll 8
    for (int j = warp_threads - 1; j >= 0; --j) {
      const affine<T> of{__shfl_sync(whole_warp, m.a, j), __shfl_sync(whole_warp, m.b, j)};
      if (lane == j) mine = x;
      if (base + j < count) x = apply_map(of, x);
    }
    if (g < count) own[g].b = mine;
  }
}

// Rows of up to 128 steps, of which a warp takes 32 / lanes.
template <class Rule>
__global__ void __launch_bounds__(256) scan_short_rows(const device_scan<Rule> p, int lanes) {
  using T = typename Rule::value_type;
  using chunk = scan_chunk<Rule, thread_steps, true>;
  const int in_warp = static_cast<int>(threadIdx.x) % warp_threads, lane = in_warp & (lanes - 1),
            t = lane * thread_steps, count = max(0, min(thread_steps, p.time - t));
  const index_t thread = index_t{blockIdx.x} * blockDim.x + threadIdx.x, s = thread / lanes;
  const bool there = s < p.sequences;
  const index_t row = there ? s : 0;
  chunk c;
  c.load(p, row, t, there ? count : 0);
  steps_behind after;
  int last_step = p.time - 1;
  if (p.mask) {
    c.decode();
    const steps_behind own = c.counted(t);
    const unsigned row_lanes = (lanes == warp_threads ? ~0u : (1u << lanes) - 1) << (in_warp - lane);
    const unsigned some = __ballot_sync(whole_warp, own.at[0] >= 0) & row_lanes;
    after = nearest_steps(some & (~0u << in_warp << 1), own, {});
    int last = -1;
#pragma unroll
    for (int k = 0; k < thread_steps; ++k)
      if (!c.skipped(k)) last = t + k;
    const int from = some ? warp_threads - 1 - __clz(static_cast<int>(some)) : 0;
    const int found = __shfl_sync(whole_warp, last, from);
    last_step = some ? found : -1;
  } else {
    if (t + thread_steps < p.time) after.at[0] = t + thread_steps;
    if (t + thread_steps + 1 < p.time) after.at[1] = t + thread_steps + 1;
  }
  const sequence_end<T> end(p, row, row, last_step);
  const typename chunk::carry from_behind(p, row, end, after);
  if (!p.mask) c.decode();
  const affine<T> of_chunk = c.compose(p, row, t, from_behind);
  const affine<T> scanned = scan_lanes(of_chunk, lane, lanes);
  const T behind = behind_lane(scanned, lane, lanes, scan_step<Rule>::seed(p.rule, end.value));
  c.emit(p, row, t, behind);
}

// Blocks of an SM, as registers go.
template <class Rule>
inline constexpr int column_blocks = sizeof(typename Rule::value_type) == 4 && Rule::inputs <= 2 ? 2 : 1;

// Sequences side by side: lanes along the batch. `warps` of a block go through a tile of 8 steps each, and a block has
// as many tiles of 32 sequences as fit.
template <class Rule>
__global__ void __launch_bounds__(column_warps* warp_threads, column_blocks<Rule>)
    scan_columns(const device_scan<Rule> p, int warps) {
  using T = typename Rule::value_type;
  using chunk = scan_chunk<Rule, column_steps, false>;
  __shared__ T map_a[column_warps][warp_threads], map_b[column_warps][warp_threads],
      carried_x[2][column_warps][warp_threads];
  __shared__ index_t row_of_lane[column_warps][warp_threads];
  __shared__ int first[column_warps][warp_threads], second[column_warps][warp_threads];
  __shared__ int carried_first[column_warps][warp_threads], carried_second[column_warps][warp_threads];
  const int lane = static_cast<int>(threadIdx.x) % warp_threads,
            in_block = static_cast<int>(threadIdx.x) / warp_threads, strip = in_block / warps,
            warp = in_block - strip * warps, strips = static_cast<int>(blockDim.x) / warp_threads / warps,
            base_warp = strip * warps;
  const index_t s = (index_t{blockIdx.x} * strips + strip) * warp_threads + lane;
  const bool there = s < p.sequences;
  row_of_lane[in_block][lane] = there ? s : 0;
  int last_step = p.time - 1;
  if (p.mask && !p.bootstrap && p.final_values)
    while (there && last_step >= 0 && !p.counts(s, last_step)) --last_step;
  const sequence_end<T> end(p, there ? s : 0, there ? s : 0, last_step);
  const int tile_steps = warps * column_steps, tiles = (p.time + tile_steps - 1) / tile_steps;
  // What lies behind the tile stays in shared memory, for want of registers.
  if (warp == 0) {
    carried_x[(tiles - 1) & 1][strip][lane] = scan_step<Rule>::seed(p.rule, end.value);
    carried_first[strip][lane] = carried_second[strip][lane] = -1;
  }
  for (int tile = tiles - 1; tile >= 0; --tile) {
    const index_t row = row_of_lane[in_block][lane];
    const int t = tile * tile_steps + warp * column_steps, count = there ? max(0, min(column_steps, p.time - t)) : 0;
    chunk c;
    c.load(p, row, t, count);
    steps_behind after;
    if (p.mask) {
      c.decode();
      if (p.looks_behind()) {
        const steps_behind own = c.counted(t);
        first[in_block][lane] = own.at[0], second[in_block][lane] = own.at[1];
        __syncthreads();
        after.at[0] = carried_first[strip][lane], after.at[1] = carried_second[strip][lane];
        for (int j = warps - 1; j > warp; --j) {
          const int one = first[base_warp + j][lane], two = second[base_warp + j][lane];
          if (two >= 0) after.put_before(two);
          if (one >= 0) after.put_before(one);
        }
      }
    } else {
      if (t + column_steps < p.time) after.at[0] = t + column_steps;
      if (t + column_steps + 1 < p.time) after.at[1] = t + column_steps + 1;
    }
    const typename chunk::carry from_behind(p, row, end, after);
    if (!p.mask) c.decode();
    const affine<T> of_chunk = c.compose(p, row, t, from_behind);
    map_a[in_block][lane] = of_chunk.a, map_b[in_block][lane] = of_chunk.b;
    __syncthreads();
    const T x = carried_x[tile & 1][strip][lane];
    T x_behind = x;
    if (warp == 0 && tile > 0) {
      affine<T> group{};
      for (int j = warps - 1; j > 0; --j) {
        const affine<T> m{map_a[base_warp + j][lane], map_b[base_warp + j][lane]};
        x_behind = apply_map(m, x_behind);
        group = join_maps(m, group);
      }
      carried_x[(tile + 1) & 1][strip][lane] = apply_map(join_maps(of_chunk, group), x);
      if (p.mask) {
        const steps_behind own = c.counted(t);
        if (own.at[1] >= 0) after.put_before(own.at[1]);
        if (own.at[0] >= 0) after.put_before(own.at[0]);
        carried_first[strip][lane] = after.at[0], carried_second[strip][lane] = after.at[1];
      }
    } else {
      for (int j = warps - 1; j > warp; --j)
        x_behind = apply_map({map_a[base_warp + j][lane], map_b[base_warp + j][lane]}, x_behind);
    }
    c.emit(p, row, t, x_behind);
    __syncthreads();
  }
}

// n-step returns: a thread to each step, which composes the maps of those behind it.
template <class T>
__global__ void __launch_bounds__(256) n_step_kernel(const device_scan<n_step_rule<T>> p) {
  const index_t steps = p.starts ? p.time : p.sequences * index_t{p.time};
  for (index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x; i < steps; i += index_t{gridDim.x} * blockDim.x) {
    index_t s = 0;
    int t = 0;
    if (p.starts) {
      // The sequence of token t: the last that starts at or before it.
      t = static_cast<int>(i);
      index_t low = 0, high = p.sequences;
      while (high - low > 1) {
        const index_t middle = (low + high) / 2;
        if (p.starts[middle] <= t)
          low = middle;
        else
          high = middle;
      }
      s = low;
    } else if (p.in[0].batch == 1 && p.in[0].time != 1) {
      t = static_cast<int>(i / p.sequences);
      s = i - t * p.sequences;
    } else {
      s = i / p.time;
      t = static_cast<int>(i - s * p.time);
    }
    const sequence_range range(p, s);
    if (t < range.first || t >= range.last) continue;
    const index_t row = range.row;
    T* const to = p.out[0].at(row, t);
    if (!p.counts(row, t)) {
      *to = T{};
      continue;
    }
    const auto next_counted = [&](int from) {
      while (from < range.last && !p.counts(row, from)) ++from;
      return from;
    };
    affine<T> all{};
    int at = t;
    for (index_t k = 0;; ++k) {
      if (at >= range.last) {  // the window ended with the step before
        const int last_step = p.mask && !p.bootstrap && p.final_values ? [&] {
          int j = range.last - 1;
          while (!p.counts(row, j)) --j;
          return j;
        }() : range.last - 1;
        all.b = apply_map(all, sequence_end<T>(p, s, row, last_step).value);
        break;
      }
      if (k == p.rule.steps) {
        all.b = apply_map(all, *p.in[1].at(row, at));
        break;
      }
      const int behind = next_counted(at + 1);
      const int code = !p.begins             ? p.code(row, at)
                       : behind < range.last ? p.code(row, behind)
                                             : sequence_end<T>(p, s, row, at).code;
      T b = *p.in[0].at(row, at);
      if (code == step_truncated)
        b = fused(p.rule.gamma, p.final_values ? *p.final_values.at(row, at) : not_a_number<T>(), b);
      all = join_maps(all, affine<T>{code == 0 ? p.rule.gamma : T{}, b});
      if (code != 0) break;
      at = behind;
    }
    *to = all.b;
  }
}

template <class Problem>
void check_scan_length(std::string_view function, const Problem& p) {
  constexpr index_t most = index_t{1} << 30;
  if (p.time > most)
    fail_shape(function, ": sequences of ", p.time, " steps are longer than the ", most, " that a GPU's scan takes");
}

inline unsigned grid_of(index_t blocks) { return static_cast<unsigned>(std::min<index_t>(blocks, INT32_MAX)); }

template <class Problem>
void run_scan(std::string_view function, const cuda& exec, Problem& p, const scan_needs& needs) {
  using Rule = typename Problem::rule_type;
  using T = typename Problem::value_type;
  if (p.sequences == 0 || p.batch == 0 || p.time == 0) return;
  check_scan_length(function, p);
  const device_scan<Rule> d(p, needs.end_values);
  const int processors = exec.properties().multiprocessors;
  const index_t time = p.time;
  // Side by side: where there are enough of them to fill the GPU, or few steps.
  const bool columns = !p.starts && p.in[0].time != 1 && p.in[0].batch == 1 && p.sequences >= 8 &&
                       (p.sequences >= 512 || time <= 2 * column_group);
  if (columns) {
    const int warps = static_cast<int>(std::min<index_t>(column_warps, ceil_div(time, column_steps))),
              strips = std::max(1, 8 / warps);
    const index_t blocks = ceil_div(p.sequences, strips * warp_threads);
    launch(function, exec, scan_columns<Rule>, {grid_of(blocks), static_cast<unsigned>(strips * warps * warp_threads)},
           d, warps);
    return;
  }
  if (!p.starts && time <= part_steps) {
    int lanes = 1;
    while (lanes * thread_steps < time) lanes *= 2;
    constexpr int threads = 128;
    launch(function, exec, scan_short_rows<Rule>, {grid_of(ceil_div(p.sequences * lanes, threads)), threads}, d, lanes);
    return;
  }
  const index_t average = p.starts ? ceil_div(time, p.sequences) : time;
  const int most_groups = static_cast<int>(ceil_div(time, group_steps));
  if (average > 4 * group_steps && p.sequences < 2 * processors) {
    const mlkit::detail::device_memory<affine<T>> groups(exec, p.sequences * most_groups);
    const launch_shape shape{grid_of(p.sequences * most_groups), group_parts * warp_threads};
    launch(function, exec, scan_rows<Rule, scan_stage::compose>, shape, d, groups.data(), most_groups);
    launch(function, exec, carry_groups<Rule>, {grid_of(p.sequences), warp_threads}, d, groups.data(), most_groups);
    launch(function, exec, scan_rows<Rule, scan_stage::emit>, shape, d, groups.data(), most_groups);
    return;
  }
  const index_t parts = ceil_div(time, part_steps);
  if (parts <= group_parts) {
    launch(function, exec, scan_rows<Rule, scan_stage::emit>,
           {grid_of(p.sequences), static_cast<unsigned>(parts * warp_threads)}, d, nullptr, 1);
    return;
  }
  const index_t together =
      std::min<index_t>(stage_parts<T, scan_stage::whole>, round_up(ceil_div(average, part_steps), group_parts));
  launch(function, exec, scan_rows<Rule, scan_stage::whole>,
         {grid_of(p.sequences), static_cast<unsigned>(together * warp_threads)}, d, nullptr, 0);
}

template <class Problem>
void run_n_step(std::string_view function, const cuda& exec, Problem& p) {
  using T = typename Problem::value_type;
  if (p.sequences == 0 || p.batch == 0 || p.time == 0) return;
  check_scan_length(function, p);
  constexpr int threads = 256;
  const device_scan<n_step_rule<T>> d(p, true);
  launch(function, exec, n_step_kernel<T>, {grid_of(ceil_div(p.batch * p.time, threads)), threads}, d);
}

}  // namespace MLKIT_NAMESPACE::rl::detail
