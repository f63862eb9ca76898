// lora::linear with a weight in memory: forward, for few tokens and for many, aligned and not.
#include "lora/linear_cases.hpp"

// Decoding steps of all row counts, ranks that fill no vector, shapes that libraries and tensor cores take, and odd
// ones.
TEMPLATE_TEST_CASE("linear computes x W^T + b + s (x A^T) B^T on every executor", "[lora][cuda]", float, double, bf16,
                   f16) {
  for (const shape& s : {shape{1, 64, 48, 4}, shape{3, 256, 33, 16}, shape{9, 128, 40, 5}, shape{16, 320, 31, 24},
                         shape{5, 37, 70, 3}, shape{33, 100, 130, 12}, shape{40, 64, 48, 8}, shape{130, 136, 72, 8},
                         shape{70, 136, 120, 33}, shape{2, 1, 1, 1}, shape{20, 96, 140, 70}})
    linear_cases::check_forward<TestType>(s);
}
