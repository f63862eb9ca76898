// Products of bf16 against a naive loop in f64.
#include "products.hpp"

using namespace reference;

TEST_CASE("matmul bf16: every extent from 1 to 70, empty ones") {
  for_each_isa([] {
    check_small_shapes<mlkit::bf16, mlkit::bf16, mlkit::bf16>(3);
    check_empty_shapes<mlkit::bf16, mlkit::bf16, mlkit::bf16>();
  });
}

TEST_CASE("matmul bf16: thin, deep and large shapes") {
  for_each_isa([] {
    check_thin_shapes<mlkit::bf16, mlkit::bf16, mlkit::bf16>(3);
    check_deep_shapes<mlkit::bf16, mlkit::bf16, mlkit::bf16>();
    check_large_shapes<mlkit::bf16, mlkit::bf16, mlkit::bf16>();
  });
}

TEST_CASE("matmul bf16: every layout of every operand") {
  for_each_isa([] {
    check_layouts<mlkit::bf16, mlkit::bf16, mlkit::bf16>({29, 35, 37});
    check_layouts<mlkit::bf16, mlkit::bf16, mlkit::bf16>({3, 70, 21});
    check_layouts<mlkit::bf16, mlkit::bf16, mlkit::bf16>({50, 2, 19});
  });
}

TEST_CASE("matmul bf16 to f32: every extent from 1 to 70, empty ones") {
  for_each_isa([] {
    check_small_shapes<mlkit::bf16, mlkit::bf16, float>(3);
    check_empty_shapes<mlkit::bf16, mlkit::bf16, float>();
  });
}

TEST_CASE("matmul bf16 to f32: thin, deep and large shapes") {
  for_each_isa([] {
    check_thin_shapes<mlkit::bf16, mlkit::bf16, float>(3);
    check_deep_shapes<mlkit::bf16, mlkit::bf16, float>();
    check_large_shapes<mlkit::bf16, mlkit::bf16, float>();
  });
}

TEST_CASE("matmul bf16 to f32: a last part of few lines") {
  for_each_isa([] {
    check_narrow_last_part<mlkit::bf16, mlkit::bf16, float>(13);
    check_narrow_last_part<mlkit::bf16, mlkit::bf16, float>(31);
  });
}
