// Lanes of a register: those that a mask keeps, and what all have in common, in each instruction set's namespace.
#pragma once

#include "../simd/vec.hpp"
#include "mask.hpp"

// Behind the parameters of a lambda that is the body of a loop: what it adds to stays in registers.
#if defined(__GNUC__)
#define MLKIT_RL_LOOP_BODY __attribute__((always_inline))
#else
#define MLKIT_RL_LOOP_BODY
#endif

#define MLKIT_FOREACH "../rl/cpu/lanes-inl.hpp"
#include "../simd/foreach_isa.hpp"
