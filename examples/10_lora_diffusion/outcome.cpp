#include "outcome.hpp"

#include <cstdio>
#include <fstream>
#include <iterator>

using namespace examples;

std::string bytes_of(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

bool same(const image_set& a, const image_set& b) {
  return std::equal(a.pixels.begin(), a.pixels.end(), b.pixels.begin(), b.pixels.end());
}

std::vector<float> predictions(const mlkit::cpu& exec, const denoiser<float>& model, const image_set& images) {
  nn::tape<float> tape(exec, {.record = false});
  std::vector<std::int32_t> times;
  for (index_t i = 0; i < images.count(); ++i) times.push_back(static_cast<std::int32_t>(1 + 999 * i / images.count()));
  const auto eps = model(tape.constant(images.pixels), times, images.labels);
  return {eps.data(), eps.data() + eps.size()};
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double high = 0;
  for (std::size_t i = 0; i < a.size(); ++i) high = std::max(high, std::abs(static_cast<double>(a[i] - b[i])));
  return high;
}

namespace {

std::string spread(const std::vector<double>& values, double factor = 1) {
  const statistics s = over(values);
  char text[48];
  std::snprintf(text, sizeof text, "%.3f +- %.3f", factor * s.mean, factor * s.deviation);
  return text;
}

void write_table(const std::filesystem::path& out, const std::vector<outcome>& outcomes) {
  std::ofstream csv(out / "methods.csv");
  csv << "method,new kind recognised,spread,old kinds recognised,spread,old loss / base,spread,trained,file "
         "bytes,steps per "
         "second\n";
  std::printf("\n%-16s %17s %17s %17s %10s %12s %9s\n", "", "new recognised", "old recognised", "old loss / base",
              "trained", "file, bytes", "steps/s");
  const double base = outcomes[0].old_loss[0];
  for (const outcome& o : outcomes) {
    std::printf("%-16s %17s %17s %17s %10lld %12ju %9s\n", o.name.c_str(), spread(o.recognised).c_str(),
                spread(o.old_recognised).c_str(), spread(o.old_loss, 1 / base).c_str(),
                static_cast<long long>(o.trained), o.bytes, o.speed.empty() ? "" : number(over(o.speed).mean).c_str());
    csv << '"' << o.name << '"';
    for (const auto* values : {&o.recognised, &o.old_recognised})
      csv << ',' << over(*values).mean << ',' << over(*values).deviation;
    csv << ',' << over(o.old_loss).mean / base << ',' << over(o.old_loss).deviation / base << ',' << o.trained << ','
        << o.bytes << ',' << (o.speed.empty() ? "" : number(over(o.speed).mean)) << '\n';
  }
  if (!csv) throw mlkit::io_error((out / "methods.csv").string() + ": cannot be written");
}

}  // namespace

void show(const std::filesystem::path& out, const std::string& kind, const image_set& real,
          const std::vector<outcome>& outcomes, const std::vector<sheet_row>& strip, const curve& sweep,
          const std::vector<double>& pretraining) {
  write_table(out, outcomes);
  std::vector<sheet_row> fresh{{"real", real.rows(0, 16)}}, old;
  std::vector<curve> losses;
  for (const outcome& o : outcomes) {
    fresh.push_back({o.name, o.fresh.rows(0, 16)});
    old.push_back({o.name, o.old.rows(0, 18)});
    if (!o.losses.empty()) losses.push_back(smoothed(o.name, o.losses, 10));
  }
  contact_sheet(kind + ": real images, then each model's samples from the same noise", fresh)
      .write_png(out / "new_kind.png");
  contact_sheet("the old kinds, before and after", old).write_png(out / "old_kinds.png");
  contact_sheet(kind + " at growing strength of the adapter", strip).write_png(out / "scale_strip.png");
  write_curves(out / "losses", {"Teaching one kind: loss of each method on its own batches", "step", "loss"}, losses);
  write_curves(out / "pretraining", {"Pretraining the base", "step", "loss"}, {smoothed("base", pretraining, 25)});
  write_curves(out / "scale_sweep", {"Recognised samples by adapter strength", "scale", "share recognised"}, {sweep});
}
