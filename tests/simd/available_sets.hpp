// The instruction sets that this machine has, and a guard that puts the chosen one back.
#pragma once

#include <mlkit/simd/isa.hpp>
#include <vector>

inline std::vector<mlkit::isa> available_sets() {
  std::vector<mlkit::isa> sets;
  for (int i = 0; i < mlkit::isa_count; ++i)
    if (mlkit::isa_available(static_cast<mlkit::isa>(i))) sets.push_back(static_cast<mlkit::isa>(i));
  return sets;
}

struct restore_isa {
  mlkit::isa before = mlkit::active_isa();
  ~restore_isa() { mlkit::set_isa(before); }
};
