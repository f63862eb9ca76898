// rl: advantages and returns as affine scans, log-probabilities, policy, value and preference losses.
#pragma once

#include "core/cpu.hpp"
#include "core/tensor.hpp"
#include "rl/group.hpp"
#include "rl/kl.hpp"
#include "rl/moments.hpp"
#include "rl/preference.hpp"
#include "rl/running_stats.hpp"
#include "rl/whiten.hpp"
