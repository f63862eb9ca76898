// A stand-in for the parts of CUB that mlkit's kernels use.
#pragma once

#include "block/block_reduce.cuh"
#include "block/block_scan.cuh"
#include "warp/warp_reduce.cuh"
#include "warp/warp_scan.cuh"
