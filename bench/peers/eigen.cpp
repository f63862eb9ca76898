// Eigen chooses its instruction set when it is compiled: this file alone has -march=native and -fopenmp.
#include <Eigen/Core>

#include "peers.hpp"

namespace bench::peers {
namespace {

template <class T>
std::function<void()> product(const gemm& g, const T* a, const T* b, T* c) {
  using rows = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using columns = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::ColMajor>;
  return [=] {
    Eigen::setNbThreads(g.threads);
    const Eigen::Map<const rows> left(a, g.m, g.k);
    Eigen::Map<rows> out(c, g.m, g.n);
    if (g.transposed)
      repeat(g, [&] { out.noalias() = left * Eigen::Map<const columns>(b, g.k, g.n); });
    else
      repeat(g, [&] { out.noalias() = left * Eigen::Map<const rows>(b, g.k, g.n); });
  };
}

}  // namespace

peer eigen() {
  const std::string version = std::to_string(EIGEN_WORLD_VERSION) + '.' + std::to_string(EIGEN_MAJOR_VERSION) + '.' +
                              std::to_string(EIGEN_MINOR_VERSION) + " -O2 -march=native -fopenmp";
  return {"eigen", version, product<float>, product<double>, {}};
}

}  // namespace bench::peers
