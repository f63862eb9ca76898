// Two translation units call the same kernel; both must give what a loop does.
#include <cmath>
#include <cstdio>
#include <mlkit/matmul.hpp>

float other_corner(const float* a, const float* b, int m, int n, int k);

int main() {
  const int m = 37, n = 65, k = 50;
  mlkit::matrix<float> a({m, k}), b({k, n}), c({m, n});
  for (mlkit::index_t i = 0; i < a.size(); ++i) a.data()[i] = static_cast<float>(i % 7) - 3;
  for (mlkit::index_t i = 0; i < b.size(); ++i) b.data()[i] = static_cast<float>(i % 5) - 2;
  mlkit::matmul(mlkit::cpu{}, a, b, c, mlkit::epilogue{mlkit::relu{}});

  double expected = 0;
  for (int p = 0; p < k; ++p) expected += double{a(m - 1, p)} * b(p, n - 1);
  const float here = c(m - 1, n - 1), there = other_corner(a.data(), b.data(), m, n, k);
  std::printf("expected %g, relu of it %g, from the other unit %g\n", expected, here, there);
  return here == std::fmax(expected, 0) && there == expected ? 0 : 1;
}
