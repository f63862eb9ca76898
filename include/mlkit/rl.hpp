// rl: advantages and returns as affine scans, log-probabilities, policy, value and preference losses.
#pragma once

#include "core/cpu.hpp"
#include "core/tensor.hpp"
