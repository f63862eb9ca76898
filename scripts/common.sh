# Sourced by ./test, ./demo, ./benchmark and .ci/run: set-up, and a build that uses every core it has memory for.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Compilations of the larger kernels take up to about 1.2 GB each.
job_count() {
  local cores memory_gb
  cores=$(nproc)
  memory_gb=$(awk '/MemAvailable/ { print int($2 / 1.2e6) }' /proc/meminfo 2>/dev/null || echo 2)
  ((memory_gb > 0)) || memory_gb=1
  echo $((cores < memory_gb ? cores : memory_gb))
}
# Whether tests are compiled several files at a time: where few cores share them, with the 6 GB that each may then take.
unity() {
  awk -v cores="$(nproc)" '/MemTotal/ { print ((cores <= 4 && $2 >= cores * 6e6) ? "ON" : "OFF") }' /proc/meminfo
}

say() { printf '\n==> %s\n' "$*"; }

# bar <what> <total>: how many of so many lines it has read, as a bar like those of the examples; one line at the end where
# the output is no terminal.
bar() {
  local what=$1 total=$2 read=0 began=$SECONDS left='' hashes='############################' dots='............................'
  [[ -t 1 ]] && left=$'\r'
  draw() {
    local full=$((total ? 28 * read / total : 28))
    printf '%s%-34s [%s%s] %3d %% %6d s' "$left" "$what" "${hashes:0:full}" "${dots:full}" \
      $((total ? 100 * read / total : 100)) $((SECONDS - began))
  }
  while IFS= read -r _; do
    if ((read < total)); then ((++read)); fi
    if [[ $left ]]; then draw; fi
  done
  draw
  echo
}

# build <directory> <cmake options and --target names after -->: configure quietly, then build with progress.
build() {
  local directory=$1 options=() log
  shift
  while (($#)) && [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  (($#)) && shift
  mkdir -p "$directory"
  log=$directory/configure.log
  if ! cmake -S "$root" -B "$directory" -G Ninja -DCMAKE_CXX_COMPILER_LAUNCHER=ccache \
    -DMLKIT_UNITY_TESTS="$(unity)" ${MLKIT_PYTHON:+-DMLKIT_PYTHON="$MLKIT_PYTHON"} "${options[@]}" >"$log" 2>&1; then
    cat "$log"
    return 1
  fi
  NINJA_STATUS="[%f/%t %es] " cmake --build "$directory" -j "$(job_count)" ${1:+--target "$@"}
}

# A fresh clone elsewhere hits the same cache entries.
export CCACHE_BASEDIR=$root CCACHE_NOHASHDIR=1

# python_venv <package>...: a virtual environment in .venv that holds the packages; MLKIT_PYTHON names its interpreter.
# Without the network the tests that need them are skipped.
python_venv() {
  local venv=$root/.venv stamp
  stamp=$venv/installed-$(echo "$*" | tr -c 'a-zA-Z0-9.=\n' _)
  if [[ ! -e $stamp ]]; then
    say "Installing $* into .venv"
    python3 -m venv "$venv" 2>/dev/null || { echo "python3 -m venv failed; tests that need $* are skipped"; return 0; }
    if ! "$venv/bin/pip" install --quiet --disable-pip-version-check "$@" 2>&1 | tail -n 3; then
      echo "PyPI cannot be reached; tests that need $* are skipped"
      return 0
    fi
    touch "$stamp"
  fi
  export MLKIT_PYTHON=$venv/bin/python3
}
