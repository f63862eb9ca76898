// rl on a GPU: the calls of rl.hpp with a mlkit::cuda as their executor.
#pragma once

#include "core/cuda.cuh"
#include "rl.hpp"
#include "rl/cuda/categorical.cuh"
#include "rl/cuda/gaussian.cuh"
#include "rl/cuda/group.cuh"
#include "rl/cuda/kl.cuh"
#if __has_include(<cublasLt.h>)
#include "rl/cuda/lm_head.cuh"  // whose products are cuBLASLt's: link cublasLt where it is used
#endif
#include "rl/cuda/log_probs.cuh"
#include "rl/cuda/logits_losses.cuh"
#include "rl/cuda/policy_loss.cuh"
#include "rl/cuda/preference.cuh"
#include "rl/cuda/running_stats.cuh"
#include "rl/cuda/scan.cuh"
#include "rl/cuda/whiten.cuh"
