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

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double high = 0;
  for (std::size_t i = 0; i < a.size(); ++i) high = std::max(high, std::abs(static_cast<double>(a[i] - b[i])));
  return high;
}

namespace {

std::string spread(const std::vector<double>& values, double factor = 1) {
  if (values.empty()) return "";
  const statistics s = over(values);
  char text[48];
  std::snprintf(text, sizeof text, "%.3f +- %.3f", factor * s.mean, factor * s.deviation);
  return text;
}

}  // namespace

void tell(const std::filesystem::path& out, const std::vector<outcome>& outcomes) {
  std::ofstream csv(out / "methods.csv");
  const bool composed = !outcomes[0].composed.empty();
  csv << "method,new kind recognised,spread," << (composed ? "new colours as asked,spread," : "")
      << "old kinds recognised,spread,old loss / base,spread,trained,file bytes,steps per second\n";
  std::printf("\n%-18s %17s %17s %17s %17s %10s %12s %9s\n", "", "new recognised", composed ? "in new colours" : "",
              "old recognised", "old loss / base", "trained", "file, bytes", "steps/s");
  const double base = outcomes[0].old_loss[0];
  for (const outcome& o : outcomes) {
    std::printf("%-18s %17s %17s %17s %17s %10lld %12ju %9s\n", o.name.c_str(), spread(o.recognised).c_str(),
                spread(o.composed).c_str(), spread(o.old_recognised).c_str(), spread(o.old_loss, 1 / base).c_str(),
                static_cast<long long>(o.trained), o.bytes, o.speed.empty() ? "" : number(over(o.speed).mean).c_str());
    csv << '"' << o.name << '"';
    for (const auto* values : {&o.recognised, &o.composed, &o.old_recognised})
      if (!values->empty()) csv << ',' << over(*values).mean << ',' << over(*values).deviation;
    csv << ',' << over(o.old_loss).mean / base << ',' << over(o.old_loss).deviation / base << ',' << o.trained << ','
        << o.bytes << ',' << (o.speed.empty() ? "" : number(over(o.speed).mean)) << '\n';
  }
  if (!csv) throw mlkit::io_error((out / "methods.csv").string() + ": cannot be written");
}
