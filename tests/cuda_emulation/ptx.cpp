// Instructions that CUDA C++ has no name for, as the PTX manual describes them.
#include <bit>
#include <cmath>
#include <cstring>

#include "internal.hpp"

namespace cuda_emulation {

std::uint32_t round_bf16(float x) noexcept {
  const auto u = std::bit_cast<std::uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
}

std::uint32_t round_f16(float x) noexcept {
  const std::uint32_t sign = std::bit_cast<std::uint32_t>(x) >> 16 & 0x8000u;
  if (std::isnan(x)) return 0x7fff;
  const float magnitude = std::fabs(x);
  if (magnitude == 0) return sign;
  if (magnitude >= 65520.0f) return sign | 0x7c00u;
  int exponent = 0;
  std::frexp(magnitude, &exponent);  // magnitude < 2^exponent
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11;
  // The nearest multiple of the unit in the last place; nearbyint takes the even one of two.
  const auto multiple = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(magnitude, -unit)));
  // 1024 to 2047 units above the subnormal numbers; 2048 carries into the exponent by itself.
  return sign | (static_cast<std::uint32_t>(unit + 24) * 1024u + multiple);
}

float widen_f16(std::uint32_t bits) noexcept {
  const std::uint32_t exponent = bits >> 10 & 31u, mantissa = bits & 1023u;
  const float sign = bits & 0x8000u ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? std::bit_cast<float>(0x7fc00000u) : sign * HUGE_VALF;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa + 1024u), static_cast<int>(exponent) - 25);
}

namespace {

float widen_bf16(std::uint32_t bits) { return std::bit_cast<float>(bits << 16); }
float cut_tf32(std::uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); }

struct load {
  int count;
  bool transposed;
  const void* row;
};

void evaluate_load(warp_call* const* lanes) {
  const auto& how = *static_cast<const load*>(lanes[0]->in);
  const unsigned first = now.current->thread / 32 * 32;
  std::uint16_t matrix[8][8];
  for (int m = 0; m < how.count; ++m) {
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * m + row;
      const void* address = static_cast<const load*>(lanes[lane]->in)->row;
      if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0 || !is_shared_memory(address))
        fail([&] {
          return std::string("ldmatrix: the row of lane ") + std::to_string(lane) +
                 " is not at a multiple of 16 in shared memory";
        });
      check_by(now.fibers[first + static_cast<unsigned>(lane)], address, 16, access_kind::read);
      std::memcpy(matrix[row], address, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const std::uint32_t low = how.transposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const std::uint32_t high = how.transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      static_cast<std::uint32_t*>(lanes[lane]->out)[m] = high << 16 | low;
    }
  }
}

struct product {
  float* d;
  const std::uint32_t *a, *b;
};

// d[g + 8 i][2 t + j] is d[2 i + j] of lane 4 g + t.
template <int Depth, class A, class B>
void multiply(warp_call* const* lanes, A a_at, B b_at) {
  float a[16][Depth], b[Depth][8];
  const auto of = [&](int lane) -> const product& { return *static_cast<const product*>(lanes[lane]->in); };
  for (int lane = 0; lane < 32; ++lane) {
    a_at(of(lane).a, lane / 4, lane % 4, a);
    b_at(of(lane).b, lane / 4, lane % 4, b);
  }
  for (int row = 0; row < 16; ++row)
    for (int col = 0; col < 8; ++col) {
      float& d = of(4 * (row % 8) + col / 2).d[2 * (row / 8) + col % 2];
      double sum = d;
      for (int k = 0; k < Depth; ++k) sum += static_cast<double>(a[row][k]) * b[k][col];
      d = static_cast<float>(sum);
    }
}

template <class Widen>
void multiply_16bit(warp_call* const* lanes, Widen widen) {
  multiply<16>(
      lanes,
      [&](const std::uint32_t* r, int g, int t, float(&a)[16][16]) {
        for (int i = 0; i < 4; ++i)
          for (int j = 0; j < 2; ++j) a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + j] = widen(r[i] >> (16 * j) & 0xffffu);
      },
      [&](const std::uint32_t* r, int g, int t, float(&b)[16][8]) {
        for (int i = 0; i < 2; ++i)
          for (int j = 0; j < 2; ++j) b[2 * t + 8 * i + j][g] = widen(r[i] >> (16 * j) & 0xffffu);
      });
}

void evaluate_bf16(warp_call* const* lanes) { multiply_16bit(lanes, widen_bf16); }
void evaluate_f16(warp_call* const* lanes) { multiply_16bit(lanes, widen_f16); }
void evaluate_tf32(warp_call* const* lanes) {
  multiply<8>(
      lanes,
      [](const std::uint32_t* r, int g, int t, float(&a)[16][8]) {
        for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = cut_tf32(r[i]);
      },
      [](const std::uint32_t* r, int g, int t, float(&b)[8][8]) {
        for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = cut_tf32(r[i]);
      });
}

}  // namespace

void load_matrices(std::uint32_t* r, int count, bool transposed, const void* shared_row, int line, const char* file) {
  const unwatched quietly;
  const load in{count, transposed, shared_row};
  warp_call call{.name = "ldmatrix", .mask = 0xffffffffu, .evaluate = evaluate_load, .in = &in, .out = r};
  meet(call, line, file);
}

void multiply_add(mma_type type, float* d, const std::uint32_t* a, const std::uint32_t* b, int line, const char* file) {
  const unwatched quietly;
  const product in{d, a, b};
  warp_call call{.name = "mma", .mask = 0xffffffffu, .evaluate = evaluate_bf16, .in = &in};
  if (type == mma_type::f16) call.evaluate = evaluate_f16;
  if (type == mma_type::tf32) call.evaluate = evaluate_tf32;
  meet(call, line, file);
}

// The copy is made when it is waited for: as late as the GPU may make it.
void copy_async(void* shared, const void* global, bool valid) {
  const unwatched quietly;
  fiber& self = *now.current;
  for (const void* p : {static_cast<const void*>(shared), global})
    if ((p != global || valid) && reinterpret_cast<std::uintptr_t>(p) % 16 != 0)
      fail([] { return std::string("cp.async of 16 bytes at an address that is no multiple of 16"); });
  if (!is_shared_memory(shared)) fail([] { return std::string("cp.async to what is not shared memory"); });
  if (valid && !is_device_memory(global)) fail([] { return std::string("cp.async from what is not device memory"); });
  if (valid) check(global, 16, access_kind::read);
  check(shared, 16, access_kind::write);
  copy_began(shared, 16);
  pending_copy& copy = self.copies.emplace_back();
  copy.shared = shared;
  copy.group = self.groups;
  if (valid)
    std::memcpy(copy.bytes, global, 16);
  else
    std::memset(copy.bytes, 0, 16);
}

void copy_async_commit() { ++now.current->groups; }

void copy_async_wait(int groups) {
  const unwatched quietly;
  fiber& self = *now.current;
  auto keep = self.copies.begin();
  for (const pending_copy& copy : self.copies) {
    if (copy.group >= self.groups - groups) {
      *keep++ = copy;
      continue;
    }
    std::memcpy(copy.shared, copy.bytes, 16);
    copy_ended(copy.shared, 16);
  }
  self.copies.erase(keep, self.copies.end());
}

}  // namespace cuda_emulation
