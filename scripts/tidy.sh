#!/usr/bin/env bash
# clang-tidy over the public headers, one translation unit a family.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=build/ci/tidy
mkdir -p "$folder"
units=()
for family in include/mlkit/*/; do
  family=$(basename "$family")
  unit=$folder/$family.cpp
  find "include/mlkit/$family" -name '*.hpp' ! -name '*-inl.hpp' ! -name foreach_isa.hpp | sort |
    sed 's|^include/\(.*\)|#include <\1>|' >"$unit"
  [[ -s $unit ]] && units+=("$unit")
done
printf '%s\0' "${units[@]}" |
  xargs -0 -n 1 -P "$(nproc)" sh -c 'clang-tidy --quiet "$1" -- -std=c++20 -I include -fopenmp-simd 2>/dev/null' sh
echo "${#units[@]} families are clean"
