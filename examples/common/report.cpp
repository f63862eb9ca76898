#include "report.hpp"

#include <mlkit/core/error.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <functional>

namespace examples {

statistics over(const std::vector<double>& values) {
  if (values.empty()) return {};
  statistics s;
  for (const double v : values) s.mean += v;
  s.mean /= static_cast<double>(values.size());
  for (const double v : values) s.deviation += (v - s.mean) * (v - s.mean);
  s.deviation = values.size() > 1 ? std::sqrt(s.deviation / static_cast<double>(values.size() - 1)) : 0;
  return s;
}

std::vector<double> differences(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> all(a.size());
  std::transform(a.begin(), a.end(), b.begin(), all.begin(), std::minus<>());
  return all;
}
std::vector<double> ratios(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> all(a.size());
  std::transform(a.begin(), a.end(), b.begin(), all.begin(), std::divides<>());
  return all;
}

std::string number(double value) {
  char text[32];
  const double size = std::abs(value);
  if (value == std::round(value) && size < 1e15)
    std::snprintf(text, sizeof text, "%.0f", value);
  else if (size != 0 && size < 1e-3)
    std::snprintf(text, sizeof text, "%.1e", value);
  else
    std::snprintf(text, sizeof text, "%.*f", size < 10 ? 3 : size < 1000 ? 1 : 0, value);
  return text;
}

std::string number(double value, int digits) {
  char text[32];
  std::snprintf(text, sizeof text, "%.*g", digits, value);
  return text;
}

namespace {

std::string with_unit(const std::string& text, const std::string& unit) {
  return unit.empty() ? text : text + " " + unit;
}

std::string spread(const statistics& s) { return number(s.mean) + " +- " + number(s.deviation); }

std::string quoted(const std::string& s) {
  std::string q = "\"";
  for (const char c : s) q += c == '"' ? std::string("\"\"") : std::string(1, c);
  return q + '"';
}

}  // namespace

void report::measured(const std::string& what, double value, const std::string& unit) {
  rows_.push_back({what, with_unit(number(value), unit), "", -1});
}
void report::measured(const std::string& what, const statistics& s, const std::string& unit) {
  rows_.push_back({what, with_unit(spread(s), unit), "", -1});
}
void report::at_least(const std::string& claim, double value, double required, const std::string& unit) {
  rows_.push_back({claim, with_unit(number(value), unit), ">= " + number(required), value >= required});
}
void report::at_most(const std::string& claim, double value, double required, const std::string& unit) {
  rows_.push_back({claim, with_unit(number(value), unit), "<= " + number(required), value <= required});
}
void report::at_least(const std::string& claim, const statistics& s, double required) {
  rows_.push_back({claim, spread(s), ">= " + number(required), s.mean - s.deviation >= required});
}
void report::at_most(const std::string& claim, const statistics& s, double required) {
  rows_.push_back({claim, spread(s), "<= " + number(required), s.mean + s.deviation <= required});
}
void report::holds(const std::string& claim, bool truth) {
  rows_.push_back({claim, truth ? "yes" : "no", "yes", truth});
}

int report::finish(const std::filesystem::path& out) const {
  std::size_t widths[3] = {5, 8, 8};
  for (const row& r : rows_) {
    widths[0] = std::max(widths[0], r.claim.size());
    widths[1] = std::max(widths[1], r.measured.size());
    widths[2] = std::max(widths[2], r.required.size());
  }
  const auto line = [&](const std::string& a, const std::string& b, const std::string& c, const std::string& d) {
    std::printf("%-*s  %*s  %*s  %s\n", static_cast<int>(widths[0]), a.c_str(), static_cast<int>(widths[1]), b.c_str(),
                static_cast<int>(widths[2]), c.c_str(), d.c_str());
  };
  std::printf("\n");
  line("claim", "measured", "required", "ok");
  line(std::string(widths[0], '-'), std::string(widths[1], '-'), std::string(widths[2], '-'), "--");
  std::ofstream csv(out / "results.csv");
  csv << "claim,measured,required,ok\n";
  bool good = true;
  for (const row& r : rows_) {
    const std::string ok = r.ok < 0 ? "" : r.ok ? "yes" : "NO";
    line(r.claim, r.measured, r.required, ok);
    csv << quoted(r.claim) << ',' << quoted(r.measured) << ',' << quoted(r.required) << ',' << ok << '\n';
    good = good && r.ok != 0;
  }
  if (!csv) throw mlkit::io_error((out / "results.csv").string() + ": cannot be written");
  std::printf("\n%s; pictures, curves and files are in %s\n", good ? "every claim holds" : "A CLAIM DOES NOT HOLD",
              out.string().c_str());
  return good ? 0 : 1;
}

}  // namespace examples
