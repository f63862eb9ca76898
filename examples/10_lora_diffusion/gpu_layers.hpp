// The layers of real_sizes on a GPU.
#pragma once

#include "common/report.hpp"
#include "common/sd15.hpp"

/// Whether nvcc was there when the program was built.
#if defined(MLKIT_EXAMPLES_CUDA)
inline constexpr bool with_cuda = true;
#else
inline constexpr bool with_cuda = false;
#endif

/// Throws device_error unless there is a GPU that can be used.
void find_gpu();

/// Each projection in bf16 with its adapter of a file, over the tokens that it has where an image of 512 x 512 is
/// drawn: its outputs against sums in f64, and the time of all of them, with adapters and without.
void layers_on_gpu(const std::vector<sd15::projection>& projections, const std::string& adapters,
                   examples::report& report);
