// Products of mixed types against a naive loop in f64.
#include "products.hpp"

using namespace reference;

TEST_CASE("matmul f32 by bf16: every extent from 1 to 70, empty ones") {
  for_each_isa([] {
    check_small_shapes<float, mlkit::bf16, float>(2);
    check_empty_shapes<float, mlkit::bf16, float>();
  });
}

TEST_CASE("matmul f32 by bf16: thin, deep and large shapes") {
  for_each_isa([] {
    check_thin_shapes<float, mlkit::bf16, float>(5);
    check_deep_shapes<float, mlkit::bf16, float>();
    check_large_shapes<float, mlkit::bf16, float>();
  });
}

TEST_CASE("matmul bf16 by f16 to f32: every extent from 1 to 70, empty ones") {
  for_each_isa([] {
    check_small_shapes<mlkit::bf16, mlkit::f16, float>(2);
    check_empty_shapes<mlkit::bf16, mlkit::f16, float>();
  });
}

TEST_CASE("matmul bf16 by f16 to f32: thin, deep and large shapes") {
  for_each_isa([] {
    check_thin_shapes<mlkit::bf16, mlkit::f16, float>(5);
    check_deep_shapes<mlkit::bf16, mlkit::f16, float>();
    check_large_shapes<mlkit::bf16, mlkit::f16, float>();
  });
}

TEST_CASE("matmul f16 by f32 to bf16: every extent from 1 to 70, empty ones") {
  for_each_isa([] {
    check_small_shapes<mlkit::f16, float, mlkit::bf16>(2);
    check_empty_shapes<mlkit::f16, float, mlkit::bf16>();
  });
}

TEST_CASE("matmul f16 by f32 to bf16: thin, deep and large shapes") {
  for_each_isa([] {
    check_thin_shapes<mlkit::f16, float, mlkit::bf16>(5);
    check_deep_shapes<mlkit::f16, float, mlkit::bf16>();
    check_large_shapes<mlkit::f16, float, mlkit::bf16>();
  });
}
