// rl: advantages and returns as affine scans, log-probabilities, policy, value and preference losses.
#pragma once

#include "core/cpu.hpp"
#include "core/tensor.hpp"
#include "rl/advantages.hpp"
#include "rl/categorical.hpp"
#include "rl/gaussian.hpp"
#include "rl/log_probs.hpp"
#include "rl/logits_policy_loss.hpp"
#include "rl/moments.hpp"
#include "rl/policy_loss.hpp"
#include "rl/running_stats.hpp"
#include "rl/scan.hpp"
#include "rl/whiten.hpp"
