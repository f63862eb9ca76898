// Curves: the numbers as CSV, and a picture of them where gnuplot is installed.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace examples {

struct curve {
  std::string name;
  std::vector<double> x, y;
};

struct axes {
  std::string title, x, y;
  bool log_y = false;
  bool points = false;  // each value is a point of its own: no line from one to the next
};

/// Writes <stem>.csv (series, x, y) and, with gnuplot, <stem>.svg. Returns whether the picture was drawn.
bool write_curves(const std::filesystem::path& stem, const axes& axes, const std::vector<curve>& curves);

/// The mean of the values at each x.
curve means(std::string name, const std::map<double, std::vector<double>>& values);
/// Means over windows of `width` values, at the windows' ends: noisy losses made readable.
curve smoothed(std::string name, const std::vector<double>& y, std::size_t width);

}  // namespace examples
