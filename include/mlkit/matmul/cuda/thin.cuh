// Products of a wide operand and one of few lines, such as a weight and the tokens of a decoding step: bound by reading
// the wide one, once, from memory.
#pragma once

#include "access.cuh"

namespace MLKIT_NAMESPACE::detail::thin {

inline constexpr int threads = 256, warps = threads / 32, most_held = 4;

/// How a warp reads 16 lines of a wide operand, `step` of their depth at a time. Lane l reads lines l / 4 and l / 4 +
/// 8, step / 4 elements of each from (l % 4) step / 4 on, and pairs() gives these as E. Which depth an mma calls which
/// is no matter, as long as the few lines are read alike. `by_block`: factor(line, k) is to be multiplied into each
/// step's sums; `by_line`: into the line's.
template <class E, class Source>
struct wide_reader;

template <class E>
struct wide_reader<E, dense_source<E>> {
  static constexpr int step = 32;
  static constexpr bool by_block = false, by_line = false;
  using raw = uint4;
  static __device__ __forceinline__ raw load(const dense_source<E>& s, index_t line, index_t k) {
    return ptx::load_streaming(reinterpret_cast<const uint4*>(s.data + line * s.row_stride + k));
  }
  static __device__ __forceinline__ raw nothing() { return make_uint4(0, 0, 0, 0); }
  __device__ __forceinline__ void pairs(const raw& r, std::uint32_t (&words)[4]) const {
    words[0] = r.x, words[1] = r.y, words[2] = r.z, words[3] = r.w;
  }
  static __device__ __forceinline__ float factor(const dense_source<E>&, index_t, index_t) { return 1.0f; }
  static constexpr int table_words = 0;
  __device__ __forceinline__ void make_table(std::uint32_t*) {}
};

/// The product: stage of the sums of wide few^T, and of tail.b tail.h^T after them. `wide_is_rows`: the wide operand's
/// lines are c's rows, else its columns. c may have more rows and columns than there are lines, within the last
/// block's: they get the stage of 0. `most_blocks`: so many multiprocessors are enough, or 0.
template <class E, class Wide, class Tail, class Out, class Stage>
struct problem {
  Wide wide;
  index_t wide_lines, depth;
  const E* few;
  index_t few_stride;
  int few_lines;
  // What is added: sum over j < rank of h[few line, j] b[wide line, j].
  const E* h;
  index_t h_row, h_column;
  const Tail* b;
  index_t b_row, b_column;
  int rank;
  matrix_view<Out> c;
  bool wide_is_rows;
  int most_blocks;
  bool early;  // the kernel before makes h, and may still be running
  Stage stage;
};

// How a block adds up 16 Rows of the wide operand's lines with all of the few. Its warps share the depth out in turns;
// their sums are added in the order of warps.
template <int Tiles, int Rows, class E, class Wide>
struct streamer {
  using reader = wide_reader<E, Wide>;
  static constexpr int step = reader::step, lane_depth = step / 4, words = lane_depth / 2, tiles = step / 16;
  static constexpr int unroll = Tiles > 2 ? 1 : step == 32 ? 4 : 2;
  static constexpr int wide_lines = 16 * Rows, few_lines = 8 * Tiles;
  static constexpr int part_words = warps * wide_lines * few_lines;

  // f() is called once, while the first loads are on their way.
  template <class Problem, class F>
  static __device__ __forceinline__ void add(const Problem& p, const reader& read, index_t first,
                                             float (&sums)[Rows][Tiles][4], F&& f) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int g = lane / 4, t = lane % 4;
    bool called = false;
    for (index_t k0 = index_t{warp} * step; k0 < p.depth; k0 += index_t{warps} * step * unroll) {
      typename reader::raw wide[unroll][Rows][2];
      uint4 few[unroll][Tiles][lane_depth / 8];
      [[maybe_unused]] float factors[unroll][Rows][2];
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        const index_t k = k0 + u * warps * step + t * lane_depth;
#pragma unroll
        for (int i = 0; i < Rows; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const index_t line = first + i * 16 + half * 8 + g;
            const bool valid = line < p.wide_lines && k < p.depth;
            wide[u][i][half] = valid ? reader::load(p.wide, line, k) : reader::nothing();
            if constexpr (reader::by_block) factors[u][i][half] = valid ? reader::factor(p.wide, line, k) : 0.0f;
          }
#pragma unroll
        for (int j = 0; j < Tiles; ++j)
#pragma unroll
          for (int v = 0; v < lane_depth / 8; ++v)
            few[u][j][v] = j * 8 + g < p.few_lines && k < p.depth
                               ? *reinterpret_cast<const uint4*>(p.few + (j * 8 + g) * p.few_stride + k + v * 8)
                               : make_uint4(0, 0, 0, 0);
      }
      if (!called) {
        f();
        called = true;
      }
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
#pragma unroll
        for (int i = 0; i < Rows; ++i) {
          std::uint32_t low[words], high[words];
          read.pairs(wide[u][i][0], low);
          read.pairs(wide[u][i][1], high);
#pragma unroll
          for (int j = 0; j < Tiles; ++j) {
            [[maybe_unused]] float block[4] = {};
#pragma unroll
            for (int m = 0; m < tiles; ++m) {
              const std::uint32_t a[4] = {low[2 * m], high[2 * m], low[2 * m + 1], high[2 * m + 1]};
              const uint4& x = few[u][j][m / 2];
              const std::uint32_t b[2] = {m % 2 ? x.z : x.x, m % 2 ? x.w : x.y};
              if constexpr (reader::by_block)
                multiply_tiles<E>(block, a, b);
              else
                multiply_tiles<E>(sums[i][j], a, b);
            }
            if constexpr (reader::by_block)
#pragma unroll
              for (int e = 0; e < 4; ++e) sums[i][j][e] += factors[u][i][e / 2] * block[e];
          }
        }
      }
    }
    if (!called) f();
  }

  // parts [warp][few line][wide line]
  static __device__ __forceinline__ void keep(const float (&sums)[Rows][Tiles][4], float* parts) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
    for (int i = 0; i < Rows; ++i)
#pragma unroll
      for (int j = 0; j < Tiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          parts[(warp * few_lines + j * 8 + lane % 4 * 2 + e % 2) * wide_lines + i * 16 + e / 2 * 8 + lane / 4] =
              sums[i][j][e];
  }
  static __device__ __forceinline__ float total(const float* parts, int w, int f) {
    float x = 0;
#pragma unroll
    for (int i = 0; i < warps; ++i) x += parts[(i * few_lines + f) * wide_lines + w];
    return x;
  }
};

// B of a block's lines, [line, rank]: asked for in the beginning, so that it is in shared memory in the end. More than
// fits is read then.
template <class Tail>
struct tail_lines {
  Tail held[most_held];
  bool hold;

  template <class Problem>
  __device__ __forceinline__ void ask(const Problem& p, index_t first, int lines) {
    hold = lines * p.rank <= threads * most_held;
#pragma unroll
    for (int i = 0; i < most_held; ++i) {
      const int e = static_cast<int>(threadIdx.x) + i * threads;
      if (hold && e < lines * p.rank && first + e / p.rank < p.wide_lines)
        held[i] = p.b[(first + e / p.rank) * p.b_row + e % p.rank * p.b_column];
    }
  }
  template <class Problem>
  __device__ __forceinline__ void keep(const Problem& p, int lines, float* b) const {
#pragma unroll
    for (int i = 0; i < most_held; ++i) {
      const int e = static_cast<int>(threadIdx.x) + i * threads;
      if (hold && e < lines * p.rank) b[e] = static_cast<float>(held[i]);
    }
  }
  template <class Problem>
  __device__ __forceinline__ float at(const Problem& p, const float* b, index_t first, int w, int j) const {
    return hold ? b[w * p.rank + j] : static_cast<float>(p.b[(first + w) * p.b_row + j * p.b_column]);
  }
};

// c's elements of a block: its sums, and h b where h(few line, j) tells h.
template <class Streamer, class Problem, class Tail, class H>
__device__ __forceinline__ void finish_lines(const Problem& p, index_t first, const float* parts,
                                             const tail_lines<Tail>& tail, const float* b, H&& h) {
  constexpr int wide_lines = Streamer::wide_lines, few_lines = Streamer::few_lines;
  for (int e = static_cast<int>(threadIdx.x); e < wide_lines * few_lines; e += threads) {
    const int w = p.wide_is_rows ? e / few_lines : e % wide_lines;
    const int f = p.wide_is_rows ? e % few_lines : e / wide_lines;
    const index_t line = first + w;
    if (line >= p.c.extent(p.wide_is_rows ? 0 : 1) || f >= p.c.extent(p.wide_is_rows ? 1 : 0)) continue;
    float x = Streamer::total(parts, w, f);
    if constexpr (Streamer::reader::by_line) x *= Streamer::reader::factor(p.wide, line, 0);
    for (int j = 0; j < p.rank; ++j) x += h(f, j) * tail.at(p, b, first, w, j);
    const index_t row = p.wide_is_rows ? line : f, col = p.wide_is_rows ? f : line;
    p.c.data[row * p.c.stride(0) + col * p.c.stride(1)] =
        static_cast<std::remove_reference_t<decltype(*p.c.data)>>(finish_element(p.stage, x, row, col, 0.0f));
  }
}

template <int Tiles, int Rows, class E, class Wide, class Tail, class Out, class Stage>
__global__ __launch_bounds__(threads,
                             Rows == 1 ? 2 : 1) void product_kernel(const problem<E, Wide, Tail, Out, Stage> p) {
  using streamer = thin::streamer<Tiles, Rows, E, Wide>;
  constexpr int wide_lines = streamer::wide_lines;
  MLKIT_SHARED_MEMORY(float, memory);
  std::uint32_t* const table = reinterpret_cast<std::uint32_t*>(memory + streamer::part_words);
  float* const b = memory + streamer::part_words + streamer::reader::table_words;

  typename streamer::reader read;
  if constexpr (streamer::reader::table_words > 0) {
    read.make_table(table);
    __syncthreads();
  }
  if (!p.early) ptx::let_next_kernel_start();
  for (index_t first = index_t{blockIdx.x} * wide_lines; first < p.wide_lines;
       first += index_t{gridDim.x} * wide_lines) {
    tail_lines<Tail> tail;
    tail.ask(p, first, wide_lines);
    float sums[Rows][Tiles][4] = {};
    streamer::add(p, read, first, sums, [] {});
    streamer::keep(sums, memory);
    tail.keep(p, wide_lines, b);
    if (p.early) ptx::wait_for_previous_kernel();
    __syncthreads();
    finish_lines<streamer>(p, first, memory, tail, b,
                           [&](int f, int j) { return static_cast<float>(p.h[f * p.h_row + j * p.h_column]); });
    __syncthreads();
  }
}

// Defined as 1: a decoding step with an adapter is one kernel on GPUs whose blocks form clusters. Not the default,
// since the emulation alone has run it.
#if !defined(MLKIT_CLUSTERS)
#define MLKIT_CLUSTERS 0
#endif

#if MLKIT_CLUSTERS

// The whole of a decoding step in one kernel: h = s x A^T for up to `fused_rank` lines of A as well. The blocks of a
// cluster share its depth out, tell each other their parts, and add them in order.
inline constexpr int fused_rank = 16, cluster = 4;

template <int Tiles, class E, class Wide, class Tail, class Out, class Stage>
__global__ __launch_bounds__(threads, 2) void fused_kernel(const problem<E, Wide, Tail, Out, Stage> p,
                                                           const dense_source<E> a, float scale) {
  using streamer = thin::streamer<Tiles, 1, E, Wide>;
  using down = thin::streamer<Tiles, 1, E, dense_source<E>>;
  constexpr int wide_lines = 16, few_lines = 8 * Tiles;
  MLKIT_SHARED_MEMORY(float, memory);
  std::uint32_t* const table = reinterpret_cast<std::uint32_t*>(memory + streamer::part_words);
  float* const b = memory + streamer::part_words + streamer::reader::table_words;
  float* const down_parts = b + wide_lines * fused_rank;
  float* const own = down_parts + down::part_words;  // this block's part of h, [few line][rank]
  float* const h = own + few_lines * fused_rank;

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const index_t first = index_t{blockIdx.x} * wide_lines;
  typename streamer::reader read;
  if constexpr (streamer::reader::table_words > 0) {
    read.make_table(table);
    __syncthreads();
  }
  tail_lines<Tail> tail;
  tail.ask(p, first, wide_lines);

  float sums[1][Tiles][4] = {}, downs[1][Tiles][4] = {};
  streamer::add(p, read, first, sums, [&] {
    const index_t own_step = index_t{ptx::cluster_rank()} * warps + warp;
#pragma unroll(Tiles == 1 ? 2 : 1)
    for (index_t k0 = own_step * 32; k0 < p.depth; k0 += index_t{cluster} * warps * 32) {
      const index_t k = k0 + t * 8;
      uint4 lines[2];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        lines[half] = half * 8 + g < p.rank && k < p.depth
                          ? *reinterpret_cast<const uint4*>(a.data + (half * 8 + g) * a.row_stride + k)
                          : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int j = 0; j < Tiles; ++j) {
        const uint4 x = j * 8 + g < p.few_lines && k < p.depth
                            ? *reinterpret_cast<const uint4*>(p.few + (j * 8 + g) * p.few_stride + k)
                            : make_uint4(0, 0, 0, 0);
        const std::uint32_t a0[4] = {lines[0].x, lines[1].x, lines[0].y, lines[1].y};
        const std::uint32_t a1[4] = {lines[0].z, lines[1].z, lines[0].w, lines[1].w};
        const std::uint32_t b0[2] = {x.x, x.y}, b1[2] = {x.z, x.w};
        multiply_tiles<E>(downs[0][j], a0, b0);
        multiply_tiles<E>(downs[0][j], a1, b1);
      }
    }
  });
  streamer::keep(sums, memory);
  down::keep(downs, down_parts);
  tail.keep(p, wide_lines, b);
  __syncthreads();
  for (int e = thread; e < few_lines * fused_rank; e += threads)
    own[e] = scale * down::total(down_parts, e % fused_rank, e / fused_rank);
  ptx::cluster_arrive();
  ptx::cluster_wait();
  for (int e = thread; e < few_lines * fused_rank; e += threads) {
    float x[cluster];
#pragma unroll
    for (int i = 0; i < cluster; ++i) x[i] = ptx::load_cluster(own + e, i);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < cluster; ++i) sum += x[i];
    h[e] = sum;
  }
  ptx::cluster_arrive();
  __syncthreads();
  finish_lines<streamer>(p, first, memory, tail, b, [&](int f, int j) { return h[f * fused_rank + j]; });
  ptx::cluster_wait();  // none ends while others read what it holds
}

#endif

// The same in f32, without tensor cores, for up to Few lines. Four warps take four of the wide lines and share their
// depth out in turns, each lane four elements at a time; a block has two such groups.
inline constexpr int single_lines = 4, single_warps = 4;

template <int Few, class Tail, class Out, class Stage>
__global__ __launch_bounds__(threads,
                             2) void single_kernel(const problem<float, dense_source<float>, Tail, Out, Stage> p) {
  constexpr int unroll = Few > 4 ? 1 : 2, step = 32 * 4;
  __shared__ float parts[warps][single_lines][Few];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const index_t first = (index_t{blockIdx.x} * (warps / single_warps) + warp / single_warps) * single_lines;
  if (!p.early) ptx::let_next_kernel_start();

  float sums[single_lines][Few] = {};
  for (index_t k0 = index_t{warp % single_warps} * step; k0 < p.depth; k0 += index_t{single_warps} * step * unroll) {
    float wide[unroll][single_lines][4];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const index_t k = k0 + u * single_warps * step + lane * 4;
#pragma unroll
      for (int i = 0; i < single_lines; ++i) {
        const bool valid = first + i < p.wide_lines && k < p.depth;
        const uint4 w =
            valid
                ? ptx::load_streaming(reinterpret_cast<const uint4*>(p.wide.data + (first + i) * p.wide.row_stride + k))
                : make_uint4(0, 0, 0, 0);
        wide[u][i][0] = __uint_as_float(w.x), wide[u][i][1] = __uint_as_float(w.y);
        wide[u][i][2] = __uint_as_float(w.z), wide[u][i][3] = __uint_as_float(w.w);
      }
    }
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const index_t k = k0 + u * single_warps * step + lane * 4;
#pragma unroll
      for (int f = 0; f < Few; ++f) {
        if (f >= p.few_lines || k >= p.depth) continue;
        const float4 x = *reinterpret_cast<const float4*>(p.few + f * p.few_stride + k);
#pragma unroll
        for (int i = 0; i < single_lines; ++i)
          sums[i][f] += wide[u][i][0] * x.x + wide[u][i][1] * x.y + wide[u][i][2] * x.z + wide[u][i][3] * x.w;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < single_lines; ++i)
#pragma unroll
    for (int f = 0; f < Few; ++f) {
#pragma unroll
      for (int far = 16; far > 0; far /= 2) sums[i][f] += __shfl_xor_sync(0xffffffffu, sums[i][f], far);
      if (lane == 0) parts[warp][i][f] = sums[i][f];
    }
  if (p.early) ptx::wait_for_previous_kernel();
  __syncthreads();

  for (int e = static_cast<int>(threadIdx.x); e < warps / single_warps * single_lines * Few; e += threads) {
    const int w = e % (warps / single_warps * single_lines), f = e / (warps / single_warps * single_lines);
    const index_t line = index_t{blockIdx.x} * (warps / single_warps) * single_lines + w;
    if (line >= p.c.extent(p.wide_is_rows ? 0 : 1) || f >= p.c.extent(p.wide_is_rows ? 1 : 0)) continue;
    float x = 0;
    for (int i = 0; i < single_warps; ++i) x += parts[w / single_lines * single_warps + i][w % single_lines][f];
    for (int j = 0; j < p.rank; ++j)
      x += p.h[f * p.h_row + j * p.h_column] * static_cast<float>(p.b[line * p.b_row + j * p.b_column]);
    const index_t row = p.wide_is_rows ? line : f, col = p.wide_is_rows ? f : line;
    p.c.data[row * p.c.stride(0) + col * p.c.stride(1)] = static_cast<Out>(finish_element(p.stage, x, row, col, 0.0f));
  }
}

/// Launches a kernel; with `early` it may start while the kernel before it still runs, and waits where it has to.
template <class... Parameters, class... Arguments>
void launch_early(std::string_view function, const cuda& exec, bool early, void (*kernel)(Parameters...),
                  const launch_shape& shape, Arguments&&... arguments) {
  if (early && exec.properties().compute_capability >= 90) {
    const current_device here(exec.device());
    if (shape.shared > (48 << 10))
      check_cuda(function,
                 cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared)));
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = shape.shared;
    config.stream = exec.stream();
    config.attrs = &attribute;
    config.numAttrs = 1;
    check_cuda(function, cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
    return;
  }
  launch(function, exec, kernel, shape, std::forward<Arguments>(arguments)...);
}

template <int Tiles, int Rows, class E, class Wide, class Tail, class Out, class Stage>
void launch_product(std::string_view function, const cuda& exec, const problem<E, Wide, Tail, Out, Stage>& p) {
  constexpr int wide_lines = 16 * Rows, few_lines = 8 * Tiles;
  const std::size_t words = static_cast<std::size_t>(warps * wide_lines * few_lines) +
                            wide_reader<E, Wide>::table_words + threads * most_held;
  const index_t blocks = ceil_div(p.wide_lines, wide_lines);
  launch_early(function, exec, p.early, product_kernel<Tiles, Rows, E, Wide, Tail, Out, Stage>,
               {grid_of(p.most_blocks > 0 ? std::min<index_t>(blocks, p.most_blocks) : blocks), dim3(threads),
                words * sizeof(float)},
               p);
}

#if MLKIT_CLUSTERS
template <int Tiles, class E, class Wide, class Tail, class Out, class Stage>
void launch_fused(std::string_view function, const cuda& exec, const problem<E, Wide, Tail, Out, Stage>& p,
                  const dense_source<E>& a, float scale) {
  using streamer = thin::streamer<Tiles, 1, E, Wide>;
  constexpr int few_lines = 8 * Tiles;
  constexpr std::size_t words = std::size_t{streamer::part_words} + streamer::reader::table_words + 16 * fused_rank +
                                warps * 16 * few_lines + 2 * few_lines * fused_rank;
  const auto kernel = fused_kernel<Tiles, E, Wide, Tail, Out, Stage>;
  const current_device here(exec.device());
  if (words * sizeof(float) > (48 << 10))
    check_cuda(function,
               cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(words * sizeof(float))));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid_of(round_up(ceil_div(p.wide_lines, 16), cluster));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = words * sizeof(float);
  config.stream = exec.stream();
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_cuda(function, cudaLaunchKernelEx(&config, kernel, p, a, scale));
}

#endif

/// The product and h = s x A^T before it in one kernel, where a is A. False where the device has no clusters or A has
/// too many lines.
template <class E, class Wide, class Tail, class Out, class Stage>
bool run_fused([[maybe_unused]] std::string_view function, [[maybe_unused]] const cuda& exec,
               [[maybe_unused]] const problem<E, Wide, Tail, Out, Stage>& p,
               [[maybe_unused]] const operand<dense_source<E>>& a, [[maybe_unused]] double scale) {
#if MLKIT_CLUSTERS
  if constexpr (is_half<E>)
    if (exec.properties().compute_capability >= 90 && p.rank <= fused_rank && reached_by_vectors(a)) {
      if (p.few_lines <= 8)
        launch_fused<1>(function, exec, p, a.source, static_cast<float>(scale));
      else
        launch_fused<2>(function, exec, p, a.source, static_cast<float>(scale));
      return true;
    }
#endif
  return false;
}

/// Sources that the kernels have a reader for, and whether it can read this one.
template <class E, class Source>
inline constexpr bool has_reader = (is_half<E> && !is_dense<Source>) ||
                                   (!std::is_same_v<E, double> && std::is_same_v<Source, dense_source<E>>);
template <class E, class Source>
bool reads_wide(const operand<Source>& op) noexcept {
  if constexpr (is_dense<Source>)
    return reached_by_vectors(op);
  else
    return op.depth_first && wide_reader<E, Source>::reads(op.source);
}

/// Few lines that run takes, and those that run_many takes.
inline constexpr index_t most_lines = 16, most_many = 64;

/// The product for few_lines <= most_lines.
template <class E, class Wide, class Tail, class Out, class Stage>
void run(std::string_view function, const cuda& exec, const problem<E, Wide, Tail, Out, Stage>& p) {
  if constexpr (std::is_same_v<E, float>) {
    const launch_shape shape{grid_of(ceil_div(p.wide_lines, warps / single_warps * single_lines)), dim3(threads)};
    const auto kernel = p.few_lines == 1   ? single_kernel<1, Tail, Out, Stage>
                        : p.few_lines <= 4 ? single_kernel<4, Tail, Out, Stage>
                                           : single_kernel<16, Tail, Out, Stage>;
    launch_early(function, exec, p.early, kernel, shape, p);
  } else if (p.few_lines <= 8) {
    launch_product<1, 1>(function, exec, p);
  } else {
    launch_product<2, 1>(function, exec, p);
  }
}
/// The product for few_lines <= most_many and many wide ones.
template <class E, class Wide, class Tail, class Out, class Stage>
void run_many(std::string_view function, const cuda& exec, const problem<E, Wide, Tail, Out, Stage>& p) {
  const bool many_blocks = ceil_div(p.wide_lines, 32) >= exec.properties().multiprocessors / 2;
  if (p.few_lines <= 16 && !many_blocks)
    launch_product<2, 1>(function, exec, p);
  else if (p.few_lines <= 16)
    launch_product<2, 2>(function, exec, p);
  else
    launch_product<8, 2>(function, exec, p);
}

}  // namespace MLKIT_NAMESPACE::detail::thin
