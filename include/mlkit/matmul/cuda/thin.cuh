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

// A block takes 16 Rows of the wide operand's lines and all of the few; its warps share the depth out in turns. Their
// sums are added in the order of warps.
template <int Tiles, int Rows, class E, class Wide, class Tail, class Out, class Stage>
__global__ __launch_bounds__(threads,
                             Rows == 1 ? 2 : 1) void product_kernel(const problem<E, Wide, Tail, Out, Stage> p) {
  using reader = wide_reader<E, Wide>;
  constexpr int step = reader::step, lane_depth = step / 4, words = lane_depth / 2, tiles = step / 16;
  constexpr int unroll = Tiles > 2 ? 1 : step == 32 ? 4 : 2;
  constexpr int wide_lines = 16 * Rows, few_lines = 8 * Tiles;
  MLKIT_SHARED_MEMORY(float, memory);
  std::uint32_t* const table = reinterpret_cast<std::uint32_t*>(memory + warps * wide_lines * few_lines);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;

  reader read;
  if constexpr (reader::table_words > 0) {
    read.make_table(table);
    __syncthreads();
  }
  if (!p.early) ptx::let_next_kernel_start();

  for (index_t first = index_t{blockIdx.x} * wide_lines; first < p.wide_lines;
       first += index_t{gridDim.x} * wide_lines) {
    // B is asked for now, so that it is there in the end.
    Tail held[most_held];
    const bool hold = wide_lines * p.rank <= threads * most_held;
#pragma unroll
    for (int i = 0; i < most_held; ++i) {
      const int e = thread + i * threads;
      if (hold && e < wide_lines * p.rank && first + e / p.rank < p.wide_lines)
        held[i] = p.b[(first + e / p.rank) * p.b_row + e % p.rank * p.b_column];
    }

    float sums[Rows][Tiles][4] = {};
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
              const uint4& f = few[u][j][m / 2];
              const std::uint32_t b[2] = {m % 2 ? f.z : f.x, m % 2 ? f.w : f.y};
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

#pragma unroll
    for (int i = 0; i < Rows; ++i)
#pragma unroll
      for (int j = 0; j < Tiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          memory[(warp * few_lines + j * 8 + t * 2 + e % 2) * wide_lines + i * 16 + e / 2 * 8 + g] = sums[i][j][e];
    float* const b = reinterpret_cast<float*>(table + reader::table_words);
#pragma unroll
    for (int i = 0; i < most_held; ++i)
      if (hold && thread + i * threads < wide_lines * p.rank) b[thread + i * threads] = static_cast<float>(held[i]);
    if (p.early) ptx::wait_for_previous_kernel();
    __syncthreads();

    for (int e = thread; e < wide_lines * few_lines; e += threads) {
      const int w = p.wide_is_rows ? e / few_lines : e % wide_lines;
      const int f = p.wide_is_rows ? e % few_lines : e / wide_lines;
      const index_t line = first + w;
      if (line >= p.c.extent(p.wide_is_rows ? 0 : 1) || f >= p.c.extent(p.wide_is_rows ? 1 : 0)) continue;
      float x = 0;
#pragma unroll
      for (int i = 0; i < warps; ++i) x += memory[(i * few_lines + f) * wide_lines + w];
      if constexpr (reader::by_line) x *= reader::factor(p.wide, line, 0);
      for (int j = 0; j < p.rank; ++j)
        x += static_cast<float>(p.h[f * p.h_row + j * p.h_column]) *
             (hold ? b[w * p.rank + j] : static_cast<float>(p.b[line * p.b_row + j * p.b_column]));
      const index_t row = p.wide_is_rows ? line : f, col = p.wide_is_rows ? f : line;
      p.c.data[row * p.c.stride(0) + col * p.c.stride(1)] =
          static_cast<Out>(finish_element(p.stage, x, row, col, 0.0f));
    }
    __syncthreads();
  }
}

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
