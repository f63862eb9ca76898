// The counter-based generator of core/random.hpp on registers of every instruction set.
#pragma once

#include "../core/random.hpp"
#include "vec.hpp"

#define MLKIT_FOREACH "random-inl.hpp"
#include "foreach_isa.hpp"
