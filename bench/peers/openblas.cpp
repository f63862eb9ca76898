// OpenBLAS reads its kernel choice from OPENBLAS_CORETYPE when it is loaded: ./benchmark sets it.
#include <cblas.h>
#include <sched.h>
#include <unistd.h>

#include "peers.hpp"

namespace bench::peers {

peer openblas() {
  // Its threads inherit the cores of the thread that makes them, and OMP_PROC_BIND has bound that one to a single core.
  cpu_set_t bound, every;
  sched_getaffinity(0, sizeof bound, &bound);
  CPU_ZERO(&every);
  for (int core = 0; core < CPU_SETSIZE; ++core) CPU_SET(core, &every);
  sched_setaffinity(0, sizeof every, &every);
  openblas_set_num_threads(static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)));
  sched_setaffinity(0, sizeof bound, &bound);

  const auto order = [](const gemm& g) { return g.transposed ? CblasTrans : CblasNoTrans; };
  const auto stride = [](const gemm& g) { return g.transposed ? g.k : g.n; };
  return {"openblas",
          openblas_get_config(),
          [=](const gemm& g, const float* a, const float* b, float* c) {
            return [=] {
              openblas_set_num_threads(g.threads);
              repeat(g, [&] {
                cblas_sgemm(CblasRowMajor, CblasNoTrans, order(g), g.m, g.n, g.k, 1, a, g.k, b, stride(g), 0, c, g.n);
              });
            };
          },
          [=](const gemm& g, const double* a, const double* b, double* c) {
            return [=] {
              openblas_set_num_threads(g.threads);
              repeat(g, [&] {
                cblas_dgemm(CblasRowMajor, CblasNoTrans, order(g), g.m, g.n, g.k, 1, a, g.k, b, stride(g), 0, c, g.n);
              });
            };
          },
          {}};
}

}  // namespace bench::peers
