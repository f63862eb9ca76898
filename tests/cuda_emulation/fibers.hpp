// Runs kernels.
#pragma once

#include "internal.hpp"

namespace cuda_emulation {

constexpr unsigned round_to_warps(unsigned threads) { return (threads + 31) / 32 * 32; }

/// Throws fault if a thread does what it must not.
void run_grid(grid& g, const void* kernel, kernel_call call, const void* parameters);

}  // namespace cuda_emulation
