// GEMM and linear: mlkit, and Eigen, OpenBLAS and oneDNN on the same memory.
#include <mlkit/matmul.hpp>

#include "harness.hpp"
#include "peers.hpp"

namespace {

using bench::operand;
using bench::peers::gemm;
using mlkit::bf16;

template <class T>
const auto& call_of(const bench::peers::peer& peer) {
  if constexpr (std::is_same_v<T, float>)
    return peer.f32;
  else if constexpr (std::is_same_v<T, double>)
    return peer.f64;
  else
    return peer.bf16;
}

// Products that take less than a microsecond are timed many in a row, on operands that stay in the first-level cache.
constexpr int calls_in_a_row = 256;
template <class T>
void add_small(int n) {
  const bench::work work{.flop = 2.0 * n * n * n, .calls = calls_in_a_row};
  const auto a = [=]() -> auto& { return operand<T>("a", n, n); };
  const auto b = [=]() -> auto& { return operand<T>("b", n, n); };
  const auto c = [=]() -> auto& { return operand<T>("c", n, n); };
  bench::label label{"small_gemm", mlkit::dtype_name<T>(), bench::shape(n, n, n), 1, "mlkit"};
  bench::add_mlkit(label, work, [=]() -> std::function<void()> {
    return [=, &a = a(), &b = b(), &c = c(), exec = mlkit::cpu{.threads = 1}] {
      for (int i = 0; i < calls_in_a_row; ++i) mlkit::matmul(exec, a, b, c);
    };
  });
  for (const bench::peers::peer& peer : bench::peers::all()) {
    const auto& make = call_of<T>(peer);
    if (!make) continue;
    label.by = peer.name;
    bench::add(label, work, [=] {
      return make(gemm{n, n, n, false, 1, calls_in_a_row}, a().data(), b().data(), c().data());
    });
  }
}

// c [m, n] = a [m, k] b; b is [k, n] for a GEMM, [n, k] for a linear layer's weight.
template <class T>
void add(const std::string& name, int m, int n, int k, bool transposed) {
  const bench::work work{.flop = 2.0 * m * n * k, .bytes = (1.0 * m * k + 1.0 * n * k + 1.0 * m * n) * sizeof(T)};
  const auto a = [=]() -> auto& { return operand<T>("a", m, k); };
  const auto b = [=]() -> auto& { return transposed ? operand<T>("b", n, k) : operand<T>("b", k, n); };
  const auto c = [=]() -> auto& { return operand<T>("c", m, n); };

  for (const int threads : bench::thread_counts()) {
    bench::label label{name, mlkit::dtype_name<T>(), bench::shape(m, n, k), threads, "mlkit"};
    const mlkit::cpu exec{.threads = threads};
    bench::add_mlkit(label, work, [=]() -> std::function<void()> {
      if (transposed) return [=, &a = a(), &b = b(), &c = c()] { mlkit::matmul(exec, a, mlkit::transposed(b), c); };
      return [=, &a = a(), &b = b(), &c = c()] { mlkit::matmul(exec, a, b, c); };
    });
    if (transposed) {
      label.by = "mlkit packed";
      bench::add_mlkit(label, work, [=] {
        auto packed = std::make_shared<decltype(mlkit::pack(exec, mlkit::transposed(b())))>(
            mlkit::pack(exec, mlkit::transposed(b())));
        return [=, &a = a(), &c = c()] { mlkit::matmul(exec, a, *packed, c); };
      });
    }
    for (const bench::peers::peer& peer : bench::peers::all()) {
      const auto& make = call_of<T>(peer);
      if (!make) continue;
      label.by = peer.name;
      bench::add(label, work, [=] {
        return make(gemm{m, n, k, transposed, threads}, a().data(), b().data(), c().data());
      });
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  constexpr double mib = 1 << 20;
  bench::add_ceilings({32 * mib, 64 * mib, 512 * mib});
  for (const int n : {512, 1024, 2048}) {
    add<float>("gemm", n, n, n, false);
    add<bf16>("gemm", n, n, n, false);
    add<double>("gemm", n, n, n, false);
  }
  add<float>("gemm", 300, 1000, 640, false);
  add<bf16>("gemm", 300, 1000, 640, false);
  add<double>("gemm", 300, 1000, 640, false);
  for (const int n : {4, 8, 16, 32}) {
    add_small<float>(n);
    add_small<double>(n);
  }
  for (const int m : {1, 4, 16, 32, 512}) {
    add<float>("linear", m, 4096, 4096, true);
    add<bf16>("linear", m, 4096, 4096, true);
  }
  for (const bench::peers::peer& peer : bench::peers::all()) bench::note(peer.name, peer.version);
  return bench::run(argc, argv);
}
