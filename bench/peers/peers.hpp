// Peers that link: C++ libraries called in the same process and on the same memory as mlkit.
// c [m, n] = a [m, k] b, with b [k, n], or [n, k] if `transposed`; all row-major.
#pragma once

#include <functional>
#include <string>
#include <vector>

namespace bench::peers {

struct gemm {
  int m, n, k;
  bool transposed;
  int threads;
  int calls = 1;  // in a row, for products that are short beside the choice of threads
};

/// product(), g.calls times.
template <class Product>
void repeat(const gemm& g, const Product& product) {
  for (int i = 0; i < g.calls; ++i) {
    product();
    asm volatile("" ::: "memory");
  }
}

struct peer {
  std::string name, version;
  /// The call to time, with everything prepared that may be prepared once; empty where the peer lacks the dtype.
  std::function<std::function<void()>(const gemm&, const float* a, const float* b, float* c)> f32;
  std::function<std::function<void()>(const gemm&, const double* a, const double* b, double* c)> f64;
  std::function<std::function<void()>(const gemm&, const void* a, const void* b, void* c)> bf16;
};

/// The peers found when this was built.
const std::vector<peer>& all();

peer eigen();
peer openblas();
peer onednn();

}  // namespace bench::peers
