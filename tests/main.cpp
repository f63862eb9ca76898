// The tests' main. Exits with 77, which ctest reports as skipped, where MLKIT_FORCE_ISA names an instruction set that
// this machine does not have.
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#include <cstdio>
#include <cstdlib>
#include <mlkit/simd/isa.hpp>
#include <string_view>

#include "test_data.hpp"

std::string test_data(const std::string& name) { return name.empty() ? MLKIT_TEST_DATA : MLKIT_TEST_DATA "/" + name; }

int main(int argc, char** argv) {
  constexpr int skipped = 77;
  if (const char* forced = std::getenv("MLKIT_FORCE_ISA"))
    for (int i = 0; i < mlkit::isa_count; ++i)
      if (const auto set = static_cast<mlkit::isa>(i); forced == std::string_view(mlkit::isa_name(set)))
        if (!mlkit::isa_available(set)) {
          std::printf("skipped: this machine does not have %s\n", forced);
          return skipped;
        }
  return Catch::Session().run(argc, argv);
}
