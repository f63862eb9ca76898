#include "gpu_layers.hpp"
#include "outcome.hpp"

#include <mlkit/io/adapter_file.hpp>
#include <mlkit/lora/merge.hpp>

#include <chrono>

using namespace examples;

void real_sizes(const mlkit::cpu& exec, const std::filesystem::path& out, [[maybe_unused]] bool gpu, report& report) {
  using clock = std::chrono::steady_clock;
  const auto milliseconds = [](clock::time_point since) {
    return std::chrono::duration<double, std::milli>(clock::now() - since).count();
  };
  constexpr index_t rank = 4;
  const auto projections = sd15::attention_projections();
  auto fill = [n = std::uint64_t{0}](mlkit::matrix<float>& m) mutable {
    const mlkit::random_stream numbers{15, n++};
    for (index_t i = 0; i < m.size(); ++i)
      m.data()[i] = 0.02f * (numbers.uniform(static_cast<std::uint64_t>(i)) - 0.5f);
  };
  std::vector<mlkit::matrix<float>> halves, weights;
  std::vector<mlkit::io::adapter_entry> entries;
  for (const auto& p : projections) {
    fill(halves.emplace_back(mlkit::extents_t<2>{rank, p.in}));
    fill(halves.emplace_back(mlkit::extents_t<2>{p.out, rank}));
    mlkit::io::adapter_entry e;
    e.component = "unet";
    e.module = p.module;
    e.alpha = rank;
    entries.push_back(std::move(e));
    weights.emplace_back(mlkit::extents_t<2>{p.out, p.in});
  }
  for (std::size_t i = 0; i < entries.size(); ++i) {
    entries[i].a = mlkit::io::named("a", halves[2 * i]);
    entries[i].b = mlkit::io::named("b", halves[2 * i + 1]);
  }

  const std::string path = (out / "sd15_rank4.safetensors").string();
  auto start = clock::now();
  mlkit::io::write_adapters(path, entries, {.naming = mlkit::io::adapter_naming::diffusers});
  report.measured("SD 1.5, rank 4: written, with fsync", milliseconds(start), "ms");

  start = clock::now();
  const auto file = mlkit::io::read_adapters(path);
  report.measured("    mapped and checked", milliseconds(start), "ms");
  const auto raw = mlkit::io::safetensors::open(path);
  double bytes = 0;
  for (const auto& t : raw) bytes += static_cast<double>(t.bytes);
  report.holds("    256 tensors, 3188736 bytes of data", raw.size() == 256 && bytes == 3188736);

  start = clock::now();
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const auto& e = file.at("unet." + projections[i].module);
    mlkit::lora::merge(exec, weights[i],
                       mlkit::lora::adapter_view<float>{e.a.view<float, 2>(), e.b.view<float, 2>(), e.scale()});
  }
  report.measured("    merged into its 128 weights", milliseconds(start), "ms");

  double error = 0;
  for (std::size_t i = 0; i < entries.size(); i += 17) {
    const auto &a = halves[2 * i], &b = halves[2 * i + 1];
    for (index_t row = 0; row < weights[i].extent(0); row += 37)
      for (index_t column = 0; column < weights[i].extent(1); column += 41) {
        double sum = 0;
        for (index_t r = 0; r < rank; ++r) sum += static_cast<double>(b(row, r)) * static_cast<double>(a(r, column));
        error = std::max(error, std::abs(sum - static_cast<double>(weights[i](row, column))));
      }
  }
  report.at_most("    merged values against a sum in f64, largest difference", error, 1e-9);
  if constexpr (with_cuda)
    if (gpu) layers_on_gpu(projections, path, report);
}
