// Lanes of a register: those that a mask keeps, and what all have in common, in each instruction set's namespace.
#pragma once

#include "../simd/vec.hpp"
#include "mask.hpp"

#define MLKIT_FOREACH "../rl/cpu/lanes-inl.hpp"
#include "../simd/foreach_isa.hpp"
