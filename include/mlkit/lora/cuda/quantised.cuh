// NF4 and int8 weights as kernels read them: decoded in registers.
#pragma once

#include "../../matmul/cuda/simt.cuh"
#include "../../matmul/cuda/thin.cuh"
#include "../../matmul/cuda/tile.cuh"
#include "../quantised.hpp"

namespace MLKIT_NAMESPACE::detail {

struct nf4_level_table {
  float values[16] = {};
  constexpr nf4_level_table() noexcept {
    for (int i = 0; i < 16; ++i) values[i] = lora::nf4_levels[i];
  }
};
// One level, where all threads of a warp ask for the same.
__device__ __forceinline__ float nf4_level(int code) {
  constexpr nf4_level_table table;
  return table.values[code];
}
__device__ __forceinline__ float nf4_factor(const lora::nf4_view& v, index_t i) {
  const index_t block = i >> v.block_log2;
  return v.absmax ? v.absmax[block]
                  : v.code_book[v.absmax_codes[block]] * v.nested_absmax[block >> v.nested_block_log2] + v.offset;
}
__device__ __forceinline__ int nf4_code(const lora::nf4_view& v, index_t i) {
  return v.packed[i / 2] >> (i % 2 == 0 ? 4 : 0) & 15;
}

template <class A, class T>
__device__ __forceinline__ A element(const quantised_source<lora::nf4_view, T>& s, index_t row, index_t col) {
  const index_t i = row * s.view.inputs + col;
  return static_cast<A>(nf4_level(nf4_code(s.view, i)) * nf4_factor(s.view, i));
}
template <class A, class T>
__device__ __forceinline__ A element(const quantised_source<lora::int8_view, T>& s, index_t row, index_t col) {
  return static_cast<A>(static_cast<float>(s.view.codes[row * s.view.inputs + col]) * s.view.scales[row]);
}

// The four bytes of a word, of which each was a signed number plus 128, as f32: in the mantissa of 2^23 they are that
// much above it.
__device__ __forceinline__ float int8_value(std::uint32_t biased, int byte) {
  return __uint_as_float(ptx::permute(biased, 0x4b000000u, 0x7440u + static_cast<std::uint32_t>(byte))) - 8388736.0f;
}

template <class E, class T>
struct tile::run<E, quantised_source<lora::nf4_view, T>> {
  static __device__ __forceinline__ void fill_table(float* table) {
#pragma unroll
    for (int i = 0; i < 16; ++i) table[i] = nf4_level(i);
  }
  std::uint32_t words[run_length / 2];  // pairs already, or two words of codes
  float factor;
  bool decoded;

  __device__ __forceinline__ void load(const quantised_source<lora::nf4_view, T>& s, index_t row, index_t col,
                                       int count) {
    const index_t i = row * s.view.inputs + col;
    decoded = count < run_length || i % run_length != 0 || reinterpret_cast<std::uintptr_t>(s.view.packed) % 8 != 0;
    if (!decoded) {
      const uint2 codes = __ldg(reinterpret_cast<const uint2*>(s.view.packed + i / 2));
      words[0] = codes.x, words[1] = codes.y;
      factor = nf4_factor(s.view, i);
      return;
    }
#pragma unroll
    for (int n = 0; n < run_length; n += 2)
      words[n / 2] = pack_pair<E>(n < count ? element<float>(s, row, col + n) : 0.0f,
                                  n + 1 < count ? element<float>(s, row, col + n + 1) : 0.0f);
  }
  __device__ __forceinline__ void pairs(const float* levels, std::uint32_t (&to)[run_length / 2]) const {
    if (decoded) {
#pragma unroll
      for (int n = 0; n < run_length / 2; ++n) to[n] = words[n];
      return;
    }
#pragma unroll
    for (int n = 0; n < run_length / 2; ++n) {
      const std::uint32_t byte = words[n / 4] >> (n % 4 * 8) & 255;
      to[n] = pack_pair<E>(levels[byte >> 4] * factor, levels[byte & 15] * factor);
    }
  }
};

template <class E, class T>
struct tile::run<E, quantised_source<lora::int8_view, T>> {
  static __device__ __forceinline__ void fill_table(float*) {}
  std::uint32_t words[run_length / 2];
  float scale;
  bool decoded;

  __device__ __forceinline__ void load(const quantised_source<lora::int8_view, T>& s, index_t row, index_t col,
                                       int count) {
    const index_t i = row * s.view.inputs + col;
    decoded = count < run_length || reinterpret_cast<std::uintptr_t>(s.view.codes + i) % 16 != 0;
    if (!decoded) {
      const uint4 codes = __ldg(reinterpret_cast<const uint4*>(s.view.codes + i));
      words[0] = codes.x, words[1] = codes.y, words[2] = codes.z, words[3] = codes.w;
      scale = s.view.scales[row];
      return;
    }
#pragma unroll
    for (int n = 0; n < run_length; n += 2)
      words[n / 2] = pack_pair<E>(n < count ? element<float>(s, row, col + n) : 0.0f,
                                  n + 1 < count ? element<float>(s, row, col + n + 1) : 0.0f);
  }
  __device__ __forceinline__ void pairs(const float*, std::uint32_t (&to)[run_length / 2]) const {
    if (decoded) {
#pragma unroll
      for (int n = 0; n < run_length / 2; ++n) to[n] = words[n];
      return;
    }
#pragma unroll
    for (int n = 0; n < run_length / 2; ++n) {
      const std::uint32_t biased = words[n / 2] ^ 0x80808080u;
      to[n] = pack_pair<E>(int8_value(biased, n % 2 * 2) * scale, int8_value(biased, n % 2 * 2 + 1) * scale);
    }
  }
};

// A table tells of each byte both levels at once, with a column for every lane, so that no two lanes meet in a bank.
// The levels are rounded to E, and the factor of 64 weights multiplies their sum in f32.
template <class E, class T>
struct thin::wide_reader<E, quantised_source<lora::nf4_view, T>> {
  using source = quantised_source<lora::nf4_view, T>;
  static constexpr int step = 64;
  static constexpr bool by_block = true, by_line = false;
  using raw = uint2;
  static constexpr int table_words = 256 * 32;
  const std::uint32_t* table;

  static bool reads(const source& s) noexcept {
    return s.view.inputs % step == 0 && s.view.block_log2 >= 6 &&
           reinterpret_cast<std::uintptr_t>(s.view.packed) % 8 == 0;
  }
  static __device__ __forceinline__ raw load(const source& s, index_t line, index_t k) {
    return __ldg(reinterpret_cast<const uint2*>(s.view.packed + (line * s.view.inputs + k) / 2));
  }
  static __device__ __forceinline__ raw nothing() { return make_uint2(0x77777777u, 0x77777777u); }
  static __device__ __forceinline__ float factor(const source& s, index_t line, index_t k) {
    return nf4_factor(s.view, line * s.view.inputs + k);
  }
  __device__ __forceinline__ void make_table(std::uint32_t* memory) {
    for (int i = static_cast<int>(threadIdx.x); i < table_words; i += threads)
      memory[i] = pack_pair<E>(nf4_level(i / 32 >> 4), nf4_level(i / 32 & 15));
    table = memory + threadIdx.x % 32;
  }
  __device__ __forceinline__ void pairs(const raw& r, std::uint32_t (&words)[8]) const {
#pragma unroll
    for (int n = 0; n < 8; ++n) words[n] = table[((n < 4 ? r.x : r.y) >> (n % 4 * 8) & 255) * 32];
  }
};

// Codes are whole numbers, which E holds exactly; a line's scale multiplies its sum.
template <class E, class T>
struct thin::wide_reader<E, quantised_source<lora::int8_view, T>> {
  using source = quantised_source<lora::int8_view, T>;
  static constexpr int step = 64;
  static constexpr bool by_block = false, by_line = true;
  using raw = uint4;
  static constexpr int table_words = 0;

  static bool reads(const source& s) noexcept {
    return s.view.inputs % step == 0 && reinterpret_cast<std::uintptr_t>(s.view.codes) % 16 == 0;
  }
  static __device__ __forceinline__ raw load(const source& s, index_t line, index_t k) {
    return ptx::load_streaming(reinterpret_cast<const uint4*>(s.view.codes + line * s.view.inputs + k));
  }
  static __device__ __forceinline__ raw nothing() { return make_uint4(0, 0, 0, 0); }
  static __device__ __forceinline__ float factor(const source& s, index_t line, index_t) { return s.view.scales[line]; }
  __device__ __forceinline__ void make_table(std::uint32_t*) {}
  __device__ __forceinline__ void pairs(const raw& r, std::uint32_t (&words)[8]) const {
    const std::uint32_t codes[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const std::uint32_t biased = codes[n / 2] ^ 0x80808080u;
      words[n] = pack_pair<E>(int8_value(biased, n % 2 * 2), int8_value(biased, n % 2 * 2 + 1));
    }
  }
};

}  // namespace MLKIT_NAMESPACE::detail
