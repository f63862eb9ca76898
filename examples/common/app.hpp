// What every example's main is made of: the options that all share, errors in words, an exit code.
#pragma once

#include <mlkit/core/cpu.hpp>

#include <CLI/CLI.hpp>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace examples {

class app {
 public:
  /// `name` is the folder's ("10_lora_diffusion"); pictures go to out/<name> unless --out says otherwise.
  app(const std::string& name, const std::string& about, const std::vector<std::string>& devices = {"cpu"});

  std::uint64_t seed = 0;
  std::filesystem::path out;
  std::string device = "cpu";
  int threads = 0;

  /// For options of the example's own.
  CLI::App& options() { return cli_; }
  mlkit::cpu exec() const { return {.threads = threads}; }

  /// Parses the arguments, makes the output folder and calls body, whose result is the exit code: 0, or 1 where a claim
  /// does not hold. What goes wrong is printed and gives 2.
  int run(int argc, char** argv, const std::function<int()>& body);

 private:
  CLI::App cli_;
};

}  // namespace examples
