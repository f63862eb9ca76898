#include "progress.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

namespace examples {

using clock = std::chrono::steady_clock;

progress::progress(std::string what, std::int64_t total)
    : what_(std::move(what)),
      total_(std::max<std::int64_t>(1, total)),
      start_(clock::now()),
      last_(start_),
      terminal_(isatty(STDERR_FILENO) == 1) {
  if (terminal_) draw();
}

progress::~progress() {
  draw();
  if (terminal_) std::fputc('\n', stderr);
}

void progress::at(std::int64_t done, const std::string& note) {
  done_ = done;
  note_ = note;
  const auto now = clock::now();
  if (now - last_ < (terminal_ ? std::chrono::milliseconds(80) : std::chrono::milliseconds(5000))) return;
  last_ = now;
  draw();
}

void progress::draw() {
  constexpr int width = 28;
  const double share = std::min(1.0, static_cast<double>(done_) / static_cast<double>(total_));
  const double seconds = std::chrono::duration<double>(clock::now() - start_).count();
  const int full = static_cast<int>(share * width);
  const std::string bar =
      std::string(static_cast<std::size_t>(full), '#') + std::string(static_cast<std::size_t>(width - full), '.');
  std::fprintf(stderr, "%s%-34s [%s] %3.0f %% %6.1f s  %s%s", terminal_ ? "\r" : "", what_.c_str(), bar.c_str(),
               100 * share, seconds, note_.c_str(), terminal_ ? "\033[K" : "\n");
  std::fflush(stderr);
}

}  // namespace examples
