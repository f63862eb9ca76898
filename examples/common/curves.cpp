#include "curves.hpp"

#include "report.hpp"

#include <mlkit/core/error.hpp>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <sstream>

namespace examples {

namespace {

// A string of gnuplot's, in which a quote is written twice.
std::string quoted(const std::string& text) {
  std::string q = "'";
  for (const char c : text) q += c == '\'' ? std::string("''") : std::string(1, c);
  return q + "'";
}

}  // namespace

bool write_curves(const std::filesystem::path& stem, const axes& axes, const std::vector<curve>& curves) {
  std::ofstream csv(stem.string() + ".csv");
  csv << "series," << axes.x << ',' << axes.y << '\n';
  for (const curve& c : curves)
    for (std::size_t i = 0; i < c.x.size(); ++i) csv << '"' << c.name << "\"," << c.x[i] << ',' << c.y[i] << '\n';
  if (!csv) throw mlkit::io_error(stem.string() + ".csv: cannot be written");

  if (std::system("command -v gnuplot > /dev/null 2>&1") != 0) return false;
  std::ostringstream script;
  script << "set terminal svg size 860,440 font 'sans-serif,14' background 'white'\n"
         << "set output " << quoted(stem.string() + ".svg") << '\n'
         << "set title " << quoted(axes.title) << "\nset xlabel " << quoted(axes.x) << "\nset ylabel " << quoted(axes.y)
         << '\n'
         << (curves.size() > 1 ? "set key outside right top\n" : "set key off\n")
         << "set autoscale xfix\nset grid lc rgb '#e4e6ea'\nset border 3\nset tics nomirror\nset format x '%g'\n"
         << (axes.log_y ? "set logscale y\n" : "");
  constexpr const char* colours[] = {"#0b62a4", "#d1495b", "#2a9d5c", "#8a5cc2", "#e08e1a", "#4a4f5a"};
  constexpr std::size_t few_points = 12;  // which are shown as such
  script << "plot ";
  for (std::size_t i = 0; i < curves.size(); ++i)
    script << (i ? ", " : "") << "'-' using 1:2 with "
           << (axes.points                        ? "points pt 7 ps 0.6"
               : curves[i].x.size() <= few_points ? "linespoints pt 7 ps 0.6"
                                                  : "lines")
           << " lw 2 lc rgb '" << colours[i % std::size(colours)] << "' title " << quoted(curves[i].name);
  script << '\n';
  for (const curve& c : curves) {
    for (std::size_t i = 0; i < c.x.size(); ++i) script << c.x[i] << ' ' << c.y[i] << '\n';
    script << "e\n";
  }
  const std::unique_ptr<FILE, int (*)(FILE*)> gnuplot(popen("gnuplot", "w"), pclose);
  if (!gnuplot) return false;
  const std::string text = script.str();
  return std::fwrite(text.data(), 1, text.size(), gnuplot.get()) == text.size();
}

curve means(std::string name, const std::map<double, std::vector<double>>& values) {
  curve c{std::move(name), {}, {}};
  for (const auto& [x, at] : values) c.x.push_back(x), c.y.push_back(over(at).mean);
  return c;
}

curve smoothed(std::string name, const std::vector<double>& y, std::size_t width) {
  curve c{std::move(name), {}, {}};
  for (std::size_t end = width; end <= y.size(); end += width) {
    double sum = 0;
    for (std::size_t i = end - width; i < end; ++i) sum += y[i];
    c.x.push_back(static_cast<double>(end));
    c.y.push_back(sum / static_cast<double>(width));
  }
  return c;
}

}  // namespace examples
