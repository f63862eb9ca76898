// What an example measured, and whether what it claims holds on this run.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace examples {

/// The mean of some values and their standard deviation (n - 1).
struct statistics {
  double mean = 0, deviation = 0;
};
statistics over(const std::vector<double>& values);
/// a[i] - b[i], and a[i] / b[i]: what a seed gives to both cancels.
std::vector<double> differences(const std::vector<double>& a, const std::vector<double>& b);
std::vector<double> ratios(const std::vector<double>& a, const std::vector<double>& b);

/// A number in words: as many digits as it needs, no more.
std::string number(double value);
/// At most so many digits, and no zeros at the end.
std::string number(double value, int digits);

class report {
 public:
  /// A number that is only told.
  void measured(const std::string& what, double value, const std::string& unit = {});
  void measured(const std::string& what, const statistics& s, const std::string& unit = {});
  /// A number that must be at least, or at most, another.
  void at_least(const std::string& claim, double value, double required, const std::string& unit = {});
  void at_most(const std::string& claim, double value, double required, const std::string& unit = {});
  /// A mean that must be so with a standard deviation to spare.
  void at_least(const std::string& claim, const statistics& s, double required);
  void at_most(const std::string& claim, const statistics& s, double required);
  /// A statement that must be true.
  void holds(const std::string& claim, bool truth);

  /// Prints the table, writes it to <out>/results.csv, and gives the exit code: 0, or 1 where a claim failed.
  int finish(const std::filesystem::path& out) const;

 private:
  struct row {
    std::string claim, measured, required;
    int ok;  // 1, 0, or -1: nothing is claimed
  };
  std::vector<row> rows_;
};

}  // namespace examples
