// attention: softmax(scores(q k^T)) v, with score pipelines that are types.
#pragma once

#include "attention/alignment.hpp"
#include "attention/backward.hpp"
#include "attention/cache.hpp"
#include "attention/decode.hpp"
#include "attention/edit.hpp"
#include "attention/forward.hpp"
#include "attention/layer.hpp"
#include "attention/maps.hpp"
#include "attention/rotary.hpp"
#include "attention/scores.hpp"
#include "core/cpu.hpp"
#include "core/tensor.hpp"
