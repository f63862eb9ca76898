#include "gpu_layers.hpp"

#include <mlkit/core/random.hpp>
#include <mlkit/io/adapter_file.hpp>
#include <mlkit/lora.cuh>

#include <deque>

using mlkit::bf16;
using mlkit::index_t;

namespace {

mlkit::matrix<bf16> random_matrix(index_t rows, index_t columns, std::uint64_t seed, float width) {
  mlkit::matrix<bf16> m({rows, columns}, mlkit::uninitialized);
  const mlkit::random_stream numbers{seed, 0x67707573};
  for (index_t i = 0; i < m.size(); ++i)
    m.data()[i] = bf16(width * (numbers.uniform(static_cast<std::uint64_t>(i)) - 0.5f));
  return m;
}
mlkit::matrix<bf16> narrowed(const mlkit::matrix_view<const float>& from) {
  mlkit::matrix<bf16> m(from.extents, mlkit::uninitialized);
  for (index_t r = 0; r < from.extent(0); ++r)
    for (index_t c = 0; c < from.extent(1); ++c) m(r, c) = bf16(from(r, c));
  return m;
}

// A projection on the device, and what it was made of.
struct gpu_layer {
  mlkit::matrix<bf16> x, w, down, up;
  mlkit::device_tensor<bf16, 2> dx, dw, ddown, dup, y;
  double scale;

  gpu_layer(const mlkit::cuda& exec, const sd15::projection& p, const mlkit::io::adapter_entry& adapter,
            std::uint64_t seed)
      : x(random_matrix(sd15::tokens(p), p.in, 2 * seed, 2)),
        w(random_matrix(p.out, p.in, 2 * seed + 1, 0.1f)),
        down(narrowed(adapter.a.view<float, 2>())),
        up(narrowed(adapter.b.view<float, 2>())),
        dx(mlkit::to_device(exec, x)),
        dw(mlkit::to_device(exec, w)),
        ddown(mlkit::to_device(exec, down)),
        dup(mlkit::to_device(exec, up)),
        y(exec, {x.extent(0), w.extent(0)}),
        scale(adapter.scale()) {}

  void run(const mlkit::cuda& exec, bool adapted) {
    const mlkit::lora::dense<bf16> base(dw.view());
    if (adapted)
      mlkit::lora::linear(exec, dx.view(), base, mlkit::lora::adapter_view<bf16>{ddown.view(), dup.view(), scale},
                          y.view());
    else
      mlkit::lora::linear(exec, dx.view(), base, y.view());
  }

  // The largest difference of some outputs to sums in f64, beside the largest of these.
  double error(const mlkit::cuda& exec) const {
    const auto have = mlkit::to_host(exec, y);
    const auto dot = [](const mlkit::matrix<bf16>& a, index_t i, const mlkit::matrix<bf16>& b, index_t j) {
      double sum = 0;
      for (index_t k = 0; k < a.extent(1); ++k)
        sum += static_cast<double>(static_cast<float>(a(i, k))) * static_cast<double>(static_cast<float>(b(j, k)));
      return sum;
    };
    double difference = 0, largest = 0;
    for (index_t t = 0; t < x.extent(0); t += 1 + x.extent(0) / 7)
      for (index_t o = 0; o < w.extent(0); o += 1 + w.extent(0) / 11) {
        double sum = dot(x, t, w, o);
        for (index_t r = 0; r < down.extent(0); ++r)
          sum += scale * static_cast<double>(static_cast<float>(up(o, r))) * dot(x, t, down, r);
        difference = std::max(difference, std::abs(sum - static_cast<double>(static_cast<float>(have(t, o)))));
        largest = std::max(largest, std::abs(sum));
      }
    return difference / largest;
  }
};

}  // namespace

void find_gpu() { const mlkit::cuda exec; }

void layers_on_gpu(const std::vector<sd15::projection>& projections, const std::string& adapters,
                   examples::report& report) {
  const mlkit::cuda exec;
  const auto file = mlkit::io::read_adapters(adapters);
  std::deque<gpu_layer> layers;
  for (const sd15::projection& p : projections)
    layers.emplace_back(exec, p, file.at("unet." + p.module), layers.size());

  const auto all = [&](bool adapted) {
    for (gpu_layer& layer : layers) layer.run(exec, adapted);
  };
  const auto timed = [&](bool adapted) {
    all(adapted);  // the first call of each shape chooses its kernels
    mlkit::device_event begin, end;
    begin.record(exec);
    all(adapted);
    end.record(exec);
    return static_cast<double>(milliseconds(begin, end));
  };
  report.measured("    on the GPU, bf16: its layers, plain", timed(false), "ms");
  report.measured("    and with their adapters", timed(true), "ms");
  double error = 0;
  for (const gpu_layer& layer : layers) error = std::max(error, layer.error(exec));
  report.at_most("    outputs against sums in f64, largest difference, of the largest", error, 1.0 / 128);
}
