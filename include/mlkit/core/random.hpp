// Counter-based random numbers: the same value for the same (seed, stream, index), in any order and on any thread.
#pragma once

#include <cmath>

#include "config.hpp"

namespace MLKIT_NAMESPACE {

/// N random words: std::array, but usable in device code too.
template <int N>
struct random_words {
  std::uint32_t word[N];

  MLKIT_HOST_DEVICE constexpr std::uint32_t operator[](std::size_t i) const noexcept { return word[i]; }
  friend MLKIT_HOST_DEVICE constexpr bool operator==(const random_words&, const random_words&) noexcept = default;
};

/// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
/// Maps a 128-bit counter and a 64-bit key to 128 random bits.
struct philox4x32 {
  using counter_type = random_words<4>;
  using key_type = random_words<2>;

  static constexpr std::uint32_t multiplier0 = 0xD2511F53u, multiplier1 = 0xCD9E8D57u;
  static constexpr std::uint32_t weyl0 = 0x9E3779B9u, weyl1 = 0xBB67AE85u;
  static constexpr int rounds = 10;

  MLKIT_HOST_DEVICE static constexpr counter_type generate(counter_type counter, key_type key) noexcept {
    std::uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    std::uint32_t k0 = key[0], k1 = key[1];
    for (int r = 0; r < rounds; ++r) {
      const std::uint64_t p0 = std::uint64_t{multiplier0} * c0;
      const std::uint64_t p1 = std::uint64_t{multiplier1} * c2;
      const std::uint32_t n0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
      const std::uint32_t n2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c1 = static_cast<std::uint32_t>(p1);
      c3 = static_cast<std::uint32_t>(p0);
      c0 = n0;
      c2 = n2;
      k0 += weyl0;
      k1 += weyl1;
    }
    return {c0, c1, c2, c3};
  }
};

/// Random numbers keyed by (seed, stream); number `index` is the same whoever asks for it, and when.
/// Streams separate the uses of one seed (initialisation, dropout of layer 3, ...).
struct random_stream {
  std::uint64_t seed = 0;
  std::uint64_t stream = 0;

  /// 32 random bits. Index i is word i mod 4 of Philox block i / 4.
  MLKIT_HOST_DEVICE constexpr std::uint32_t bits(std::uint64_t index) const noexcept {
    return block(index / 4)[index % 4];
  }
  /// Words 4b .. 4b+3 at once.
  MLKIT_HOST_DEVICE constexpr random_words<4> block(std::uint64_t b) const noexcept {
    return philox4x32::generate({static_cast<std::uint32_t>(b), static_cast<std::uint32_t>(b >> 32),
                                 static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32)},
                                {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
  }
  /// Uniform in [0, 1), a multiple of 2^-24.
  MLKIT_HOST_DEVICE constexpr float uniform(std::uint64_t index) const noexcept {
    return static_cast<float>(bits(index) >> 8) * 0x1p-24f;
  }
  /// Standard normal, by Box and Muller from words 2i and 2i + 1, in f64; |normal| < 6.8.
  MLKIT_HOST_DEVICE float normal(std::uint64_t index) const noexcept {
    constexpr double two_pi = 6.28318530717958647692;
    const auto words = block(index / 2);
    const std::size_t at = (index % 2) * 2;
    const double u = (static_cast<double>(words[at]) + 0.5) * 0x1p-32;
    const double v = static_cast<double>(words[at + 1]) * 0x1p-32;
    return static_cast<float>(std::sqrt(-2.0 * std::log(u)) * std::cos(two_pi * v));
  }
};

}  // namespace MLKIT_NAMESPACE
