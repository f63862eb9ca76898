#!/usr/bin/env bash
# Makes the API reference, build/reference/html/index.html. Fails on any warning, and on any function, type, concept or macro
# without documentation. Members of a documented type may speak for themselves.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p build
doxygen docs/Doxyfile
undocumented=$({ cat docs/Doxyfile; printf '%s\n' WARN_IF_UNDOCUMENTED=YES WARN_AS_ERROR=NO GENERATE_HTML=NO \
  GENERATE_XML=YES; } |
  doxygen - 2>&1 | grep -vE 'Member .* of (struct|class) .* is not documented' || true)
if [[ $undocumented ]]; then
  echo "$undocumented"
  exit 1
fi
echo "build/reference/html/index.html"
