#include "app.hpp"

#include <iostream>

namespace examples {

app::app(const std::string& name, const std::string& about, const std::vector<std::string>& devices)
    : out(std::filesystem::path("out") / name), cli_(about, name) {
  cli_.add_option("--seed", seed, "of everything random")->capture_default_str();
  cli_.add_option("--out", out, "where pictures, curves and files go")->capture_default_str();
  cli_.add_option("--device", device, "what to compute on")->check(CLI::IsMember(devices))->capture_default_str();
  cli_.add_option("--threads", threads, "0 means every core")->check(CLI::Range(0, 1 << 20))->capture_default_str();
}

int app::run(int argc, char** argv, const std::function<int()>& body) {
  try {
    cli_.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return cli_.exit(e);
  }
  try {
    std::filesystem::create_directories(out);
    return body();
  } catch (const std::exception& e) {
    std::cerr << '\n' << e.what() << '\n';
    return 2;
  }
}

}  // namespace examples
