// nn: a small reverse-mode tape over the kernels.
#pragma once

#include "nn/adamw.hpp"
#include "nn/attention.hpp"
#include "nn/group_norm.hpp"
#include "nn/guidance.hpp"
#include "nn/linear.hpp"
#include "nn/loss.hpp"
#include "nn/noise_schedule.hpp"
#include "nn/norm.hpp"
#include "nn/ops.hpp"
#include "nn/parameter.hpp"
#include "nn/samplers.hpp"
#include "nn/shape.hpp"
#include "nn/tape.hpp"
#include "nn/time_features.hpp"
