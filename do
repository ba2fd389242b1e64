#!/usr/bin/env bash
# The one list of commands of this project. `./do help` prints it.
set -euo pipefail
cd "$(dirname "$0")"
# Where rustup puts cargo, for a shell that was open before.
PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin

# The first line of each command's comment is its line in the help.

# demo [IMAGE]   A real guest checkpoints, is killed, and resumes; IMAGE: a raw or qcow2 file of yours
do_demo() {
  step "Install what is missing"
  tests/setup.sh
  step "Build"
  cargo build --release --locked -p blobcr-cli -p blobcr-tests --bins
  step "Run"
  exec target/release/blobcr-demo "$@"
}

# test [ARGS]    Everything that a change must pass; ARGS select tests (as for the test runner)
do_test() {
  step "Install what is missing"
  tests/setup.sh
  local mounts_before processes_before started=$SECONDS
  mounts_before=$(our_mounts)
  processes_before=$(our_processes)
  [ $# -gt 0 ] || do_check
  step "Build"
  # The whole workspace, whatever is selected: the end-to-end tests run the command beside theirs.
  cargo test --locked --workspace --no-run
  step "Unit, property, integration and end-to-end tests"
  local log outcome=0
  log=$(mktemp)
  if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --locked --workspace --no-fail-fast "$@" 2>&1 | tee "$log" || outcome=$?
  else
    cargo test --locked --workspace --no-fail-fast "$@" 2>&1 | tee "$log" || outcome=$?
  fi
  step "Nothing is left mounted or running"
  local left
  left=$(comm -13 <(echo "$mounts_before") <(our_mounts); comm -13 <(echo "$processes_before") <(our_processes))
  if [ -n "$left" ]; then
    printf 'left behind:\n%s\n' "$left"
    outcome=1
  fi
  step "Done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s"
  count "$log"
  rm -f "$log"
  return "$outcome"
}

# check          Format and lints; licences and advisories where cargo-deny is installed
do_check() {
  step "Format"
  cargo fmt --all --check
  step "Lints"
  cargo clippy --locked --workspace --all-targets -- -D warnings
  step "Licences, banned crates, advisories"
  if ! cargo deny --version >/dev/null 2>&1; then
    echo "left out: cargo-deny is not installed (cargo install cargo-deny)"
    return
  fi
  cargo deny --locked check licenses bans sources
  if cargo deny fetch db >/dev/null 2>&1; then
    cargo deny --locked check advisories
  else
    echo "advisories left out: their database cannot be fetched"
  fi
}

# bench [NAMES]  Benchmarks beside the alternatives, with JSON, plots and a page; `./do bench --help` lists them
do_bench() {
  step "Install what is missing"
  tests/setup.sh --bench
  cargo build --release --locked -p blobcr-cli -p blobcr-bench -p blobcr-guest-mpi
  exec target/release/blobcr-bench "$@"
}

# figures FIGURE [ARGS]  Overhead, repair, status, collect, snapshots, or all: beside theory or alternative
do_figures() {
  cargo build --release --locked -p blobcr-cli -p blobcr-bench
  exec target/release/repository_figures "$@"
}

# guest-figures FIGURE [ARGS]  neighbour (beside a guest's CHECKPOINTs), job (MPI, beside copies and stops), or all
do_guest-figures() {
  step "Install what is missing"
  tests/setup.sh
  cargo build --release --locked -p blobcr-cli -p blobcr-bench
  exec target/release/guest_figures "$@"
}

# soak [MINUTES] Random operations, kills, fio and fsx against a mounted disk, seed after seed
do_soak() {
  step "Install what is missing"
  tests/setup.sh
  cargo build --release --locked -p blobcr-cli -p blobcr-tests --bins
  exec target/release/blobcr-soak "$@"
}

# simulate [ARGS] Seeds of the deterministic simulation: --seed N, --seeds FROM..TO, --plant BUG
do_simulate() {
  cargo build --release --locked -p blobcr-sim --bins
  exec target/release/blobcr-simulate "$@"
}

# node-soak [MINUTES] [--pool replica:3|ec:4+2]   Nodes killed at random, one wiped, under a verified load
do_node-soak() {
  step "Install what is missing"
  tests/setup.sh
  cargo build --release --locked -p blobcr-cli -p blobcr-tests --bins
  exec target/release/blobcr-node-soak "$@"
}

# job-soak [SEEDS] A parallel job in two VMs that loses one of them again and again, seed after seed
do_job-soak() {
  step "Install what is missing"
  tests/setup.sh
  cargo build --release --locked -p blobcr-cli -p blobcr-tests --bins
  exec target/release/blobcr-job-soak "$@"
}

# fuzz [S] [T..] Fuzz every decoder of disk and wire formats, or the targets T of tests/fuzz, for S (600) seconds each
do_fuzz() {
  local seconds=600 target targets=() outcome=0 scratch
  if [[ ${1-} =~ ^[0-9]+$ ]]; then
    seconds=$1
    shift
  fi
  cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz
  # It needs flags of the compiler that the stable one takes only when told to.
  if cargo +nightly --version >/dev/null 2>&1; then
    export RUSTUP_TOOLCHAIN=nightly
  else
    export RUSTC_BOOTSTRAP=1
  fi
  [ $# -gt 0 ] || mapfile -t targets < <(cargo fuzz list --fuzz-dir tests/fuzz)
  [ $# -eq 0 ] || targets=("$@")
  for target in "${targets[@]}"; do
    cargo fuzz build --fuzz-dir tests/fuzz "$target"
  done
  scratch=$(mktemp -d -p "$([ -w /dev/shm ] && echo /dev/shm || echo "${TMPDIR:-/tmp}")")
  for target in "${targets[@]}"; do
    TMPDIR=$scratch fuzz_one "$target" "$seconds" "$scratch/log" || outcome=1
  done
  rm -rf "$scratch"
  return "$outcome"
}

# One target, and one line about it; what is wrong with it behind that.
fuzz_one() {
  local target=$1 seconds=$2 log=$3 outcome=0 corpus=tests/fuzz/corpus/$1 crashes
  mkdir -p "$corpus" "tests/fuzz/artifacts/$target"
  touch "$log"
  # Leaks are left out: threads of the code under test come and go. No length field may ask for 64 MiB.
  BLOBCR_FUZZ_SEEDS=$PWD/$corpus ASAN_OPTIONS=detect_leaks=0 \
    cargo fuzz run --fuzz-dir tests/fuzz "$target" "$corpus" -- -max_total_time="$seconds" \
    -print_final_stats=1 -detect_leaks=0 -malloc_limit_mb=64 -max_len=16384 >"$log.$target" 2>&1 || outcome=1
  crashes=$(find "tests/fuzz/artifacts/$target" -type f -newer "$log" ! -name 'slow-unit-*')
  printf '%-16s %10d executions, coverage %5d, corpus %5d, crashes %d\n' "$target" \
    "$(sed -n 's/^stat::number_of_executed_units: *//p' "$log.$target")" \
    "$(grep -o 'cov: [0-9]*' "$log.$target" | tail -n 1 | cut -c 6-)" \
    "$(find "$corpus" -type f | wc -l)" "$(grep -c . <<<"$crashes")"
  [ "$outcome" -eq 0 ] || grep -m 1 -A 3 'panicked at\|ERROR: ' "$log.$target" || tail -n 5 "$log.$target"
  [ -z "$crashes" ] || printf 'input: %s\n' $crashes
  return "$outcome"
}

# help           This list
do_help() {
  sed -n '/^# \([a-z-]\+\) .*/{s/^# /  .\/do /;p}' "$0"
}

step() { printf '\n== %s\n' "$*"; }

our_mounts() { awk '$3 ~ /^fuse/ && $1 ~ /blobcr/ { print $2 }' /proc/mounts | sort; }

our_processes() {
  local exe
  for exe in /proc/[0-9]*/exe; do
    case $(readlink "$exe" 2>/dev/null) in
      "$PWD"/target/*/blobcr | "$PWD"/target/*/blobcr' (deleted)') echo "process ${exe//[^0-9]/}" ;;
    esac
  done | sort
}

# The last line: how many passed and how many failed, whichever runner it was.
count() {
  awk '
    { gsub(/\033\[[0-9;]*m/, "") }
    # nextest: Summary [ 12.3s] 45 tests run: 44 passed (1 slow), 1 failed, 0 skipped
    /Summary \[/ {
      for (i = 2; i <= NF; i++) {
        if ($i ~ /^passed/) passed += $(i - 1)
        if ($i ~ /^failed/ || $i ~ /^timed/) failed += $(i - 1)
      }
    }
    # cargo test: test result: ok. 12 passed; 0 failed; ...
    /^test result:/ { passed += $4; failed += $6 }
    END { printf "%d passed, %d failed\n", passed, failed }
  ' "$1"
}

command=${1:-help}
[ $# -eq 0 ] || shift
if declare -F "do_$command" >/dev/null; then
  "do_$command" "$@"
else
  echo "there is no ./do $command" >&2
  do_help >&2
  exit 2
fi
