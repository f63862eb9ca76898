#include "harness.hpp"
int main(int argc, char** argv) {
  constexpr double kib = 1 << 10, mib = 1 << 20;
  bench::add_ceilings({26 * mib, 64 * mib}, {576 * kib, 2304 * kib, 4.125 * mib, 18 * mib, 102 * mib});
  return bench::run(argc, argv);
}
