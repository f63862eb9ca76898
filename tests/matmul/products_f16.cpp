// Products of f16 against a naive loop in f64.
#include "products.hpp"

using namespace reference;

TEST_CASE("matmul f16: every extent from 1 to 70, empty ones") {
  for_each_isa([] {
    check_small_shapes<mlkit::f16, mlkit::f16, mlkit::f16>(3);
    check_empty_shapes<mlkit::f16, mlkit::f16, mlkit::f16>();
  });
}

TEST_CASE("matmul f16: thin, deep and large shapes") {
  for_each_isa([] {
    check_thin_shapes<mlkit::f16, mlkit::f16, mlkit::f16>(3);
    check_deep_shapes<mlkit::f16, mlkit::f16, mlkit::f16>();
    check_large_shapes<mlkit::f16, mlkit::f16, mlkit::f16>();
  });
}

TEST_CASE("matmul f16 to f32: every extent from 1 to 70, empty ones") {
  for_each_isa([] {
    check_small_shapes<mlkit::f16, mlkit::f16, float>(2);
    check_empty_shapes<mlkit::f16, mlkit::f16, float>();
  });
}

TEST_CASE("matmul f16 to f32: thin, deep and large shapes") {
  for_each_isa([] {
    check_thin_shapes<mlkit::f16, mlkit::f16, float>(5);
    check_deep_shapes<mlkit::f16, mlkit::f16, float>();
    check_large_shapes<mlkit::f16, mlkit::f16, float>();
  });
}
