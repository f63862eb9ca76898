// oneDNN's matmul primitive on plain row-major memory; the primitive is made once, outside of the timed call.
#include <omp.h>

#include <memory>
#include <oneapi/dnnl/dnnl.hpp>
#include <unordered_map>

#include "peers.hpp"

namespace bench::peers {
namespace {

template <class T>
auto product(dnnl::memory::data_type type) {
  return [type](const gemm& g, const T* a, const T* b, T* c) -> std::function<void()> {
    using dnnl::memory;
    using tag = memory::format_tag;
    static dnnl::engine engine(dnnl::engine::kind::cpu, 0);
    static dnnl::stream stream(engine);
    omp_set_num_threads(g.threads);  // also what the primitive is planned for
    const memory::desc left({g.m, g.k}, type, tag::ab), out({g.m, g.n}, type, tag::ab),
        right({g.k, g.n}, type, g.transposed ? tag::ba : tag::ab);
    const dnnl::matmul primitive(dnnl::matmul::primitive_desc(dnnl::matmul::desc(left, right, out), engine));
    const std::unordered_map<int, memory> arguments{
        {DNNL_ARG_SRC, memory(left, engine, const_cast<T*>(a))},
        {DNNL_ARG_WEIGHTS, memory(right, engine, const_cast<T*>(b))},
        {DNNL_ARG_DST, memory(out, engine, c)},
    };
    return [=] {
      omp_set_num_threads(g.threads);
      repeat(g, [&] {
        primitive.execute(stream, arguments);
        stream.wait();
      });
    };
  };
}

}  // namespace

peer onednn() {
  const dnnl_version_t* v = dnnl_version();
  const std::string version =
      std::to_string(v->major) + '.' + std::to_string(v->minor) + '.' + std::to_string(v->patch);
  return {"onednn",
          version,
          product<float>(dnnl::memory::data_type::f32),
          {},
          product<void>(dnnl::memory::data_type::bf16)};
}

}  // namespace bench::peers
