#!/usr/bin/env bash
# setup.sh <command>: installs the Debian packages that <command> needs and that are missing (see packages.txt).
# Without the right to install, prints the line that does it and exits with 1. Safe to run again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
command=${1:?usage: setup.sh test|demo|benchmark|ci}

wanted=()
while read -r package users; do
  if [[ $package && $package != \#* && " $users " == *" $command "* ]]; then wanted+=("$package"); fi
done <"$here/packages.txt"

if ! command -v dpkg-query >/dev/null; then
  echo "Not a Debian system: this needs what Debian calls ${wanted[*]}"
  exit 0
fi

missing=()
for package in "${wanted[@]}"; do
  state=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
  [[ $state == installed ]] || missing+=("$package")
done
((${#missing[@]})) || exit 0

install=(apt-get install -y --no-install-recommends "${missing[@]}")
if [[ $(id -u) == 0 ]]; then
  root=()
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
  root=(sudo -n)
else
  echo "Some Debian packages are missing, and this user may not install them. Please run as root:"
  echo
  echo "    apt-get update && ${install[*]}"
  echo
  exit 1
fi

echo "Installing ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { "${root[@]}" apt-get update && "${root[@]}" env DEBIAN_FRONTEND=noninteractive "${install[@]}"; } >"$log" 2>&1; then
  tail -n 30 "$log"
  echo "The installation failed. The command was: ${install[*]}"
  exit 1
fi
