// Products of f64 against a naive loop in f64.
#include "products.hpp"

using namespace reference;

TEST_CASE("matmul f64: every extent from 1 to 70, empty ones") {
  for_each_isa([] {
    check_small_shapes<double, double, double>(3);
    check_empty_shapes<double, double, double>();
  });
}

TEST_CASE("matmul f64: thin, deep and large shapes") {
  for_each_isa([] {
    check_thin_shapes<double, double, double>(3);
    check_deep_shapes<double, double, double>();
    check_large_shapes<double, double, double>();
  });
}

TEST_CASE("matmul f64: every layout of every operand") {
  for_each_isa([] {
    check_layouts<double, double, double>({29, 35, 37});
    check_layouts<double, double, double>({3, 70, 21});
    check_layouts<double, double, double>({50, 2, 19});
  });
}
