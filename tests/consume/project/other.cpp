#include <mlkit/matmul.hpp>

// The same product as in main.cpp, from a translation unit of its own; its last element.
float other_corner(const float* a, const float* b, int m, int n, int k) {
  mlkit::matrix<float> c({m, n});
  mlkit::matmul(mlkit::cpu{}, mlkit::matrix_view<const float>(a, {m, k}), mlkit::matrix_view<const float>(b, {k, n}),
                c);
  return c(m - 1, n - 1);
}
