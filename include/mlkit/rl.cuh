// rl on a GPU: the calls of rl.hpp with a mlkit::cuda as their executor.
#pragma once

#include "core/cuda.cuh"
#include "rl.hpp"
#include "rl/cuda/log_probs.cuh"
#include "rl/cuda/scan.cuh"
