// lora: low-rank adapters beside frozen weights.
#pragma once

#include "core/cpu.hpp"
#include "core/tensor.hpp"
#include "lora/adapter.hpp"
#include "lora/base.hpp"
#include "lora/conv.hpp"
#include "lora/dora.hpp"
#include "lora/embedding.hpp"
#include "lora/linear.hpp"
#include "lora/merge.hpp"
#include "lora/per_row.hpp"
#include "lora/projection.hpp"
#include "lora/quantised.hpp"
