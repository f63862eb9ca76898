// A progress bar on the terminal; in a pipe or a log, a line every few seconds.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace examples {

class progress {
 public:
  progress(std::string what, std::int64_t total);
  ~progress();
  progress(const progress&) = delete;

  /// Says that `done` of the total are done; `note` stands beside the bar, such as a loss.
  void at(std::int64_t done, const std::string& note = {});
  /// One more is done.
  void next() { at(done_ + 1); }

 private:
  void draw();

  std::string what_, note_;
  std::int64_t total_, done_ = 0;
  std::chrono::steady_clock::time_point start_, last_;
  bool terminal_;
};

}  // namespace examples
