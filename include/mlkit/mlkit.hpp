// Everything that runs on the CPU; files of adapters only where nlohmann/json is installed, which reads their
// configuration.
#pragma once

#include "attention.hpp"
#include "core/cpu.hpp"
#include "core/random.hpp"
#include "core/tensor.hpp"
#include "lora.hpp"
#include "matmul.hpp"
#include "nn.hpp"
#include "rl.hpp"
#include "simd/math.hpp"

#if __has_include(<nlohmann/json.hpp>)
#include "lora/files.hpp"
#endif
#include "io/safetensors.hpp"
