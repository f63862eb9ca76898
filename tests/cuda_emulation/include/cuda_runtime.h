// A stand-in for the CUDA runtime and for CUDA C++ in a plain C++ compiler: kernels run on the CPU, every thread of a
// block a fiber. Compile with -D MLKIT_CUDA_EMULATION and link ../*.cpp.
#pragma once

#include "mlkit_cuda_emulation/device.hpp"
#include "mlkit_cuda_emulation/runtime.hpp"
