// matmul: matrix products with prologues and epilogues, batched, grouped, and with weights packed once.
#pragma once

#include "core/cpu.hpp"
#include "core/tensor.hpp"
#include "matmul/batched.hpp"
#include "matmul/matmul.hpp"
