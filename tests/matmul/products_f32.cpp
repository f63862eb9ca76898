// Products of f32 against a naive loop in f64.
#include "products.hpp"

using namespace reference;

TEST_CASE("matmul f32: every extent from 1 to 70, empty ones") {
  for_each_isa([] {
    check_small_shapes<float, float, float>(6);
    check_empty_shapes<float, float, float>();
  });
}

TEST_CASE("matmul f32: thin, deep and large shapes") {
  for_each_isa([] {
    check_thin_shapes<float, float, float>(1);
    check_deep_shapes<float, float, float>();
    check_large_shapes<float, float, float>();
  });
}

TEST_CASE("matmul f32: every layout of every operand") {
  for_each_isa([] {
    check_layouts<float, float, float>({29, 35, 37});
    check_layouts<float, float, float>({3, 70, 21});
    check_layouts<float, float, float>({50, 2, 19});
  });
}

TEST_CASE("matmul f32: a last part of few lines") {
  for_each_isa([] { check_narrow_last_part<float, float, float>(13); });
}
