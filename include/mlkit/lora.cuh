// LoRA on a GPU: include it in a .cu file and pass a mlkit::cuda to the functions of lora.hpp.
#pragma once

#include "core/cuda.cuh"
#include "lora.hpp"
#include "lora/cuda/dora.cuh"
#include "lora/cuda/linear.cuh"
#include "lora/cuda/merge.cuh"
#include "lora/cuda/per_row.cuh"
