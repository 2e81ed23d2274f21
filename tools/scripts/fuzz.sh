#!/usr/bin/env bash
# Runs every fuzzer of tests/fuzz for FUZZ_SECONDS (5) each, or those named: from its seeds, from what
# earlier runs found, and over every input that ever failed. Stops at the first finding; the last line
# is what came of it all.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
seconds=${FUZZ_SECONDS:-5}
build=build/fuzz
source=tests/fuzz
passed=0

finish() {
  echo "$passed passed, $1 failed, 0 skipped"
  exit "$1"
}

if ! [[ $seconds =~ ^[1-9][0-9]*$ ]]; then
  echo "fuzz: FUZZ_SECONDS is a whole number from 1, got '$seconds'"
  finish 1
fi
if ! tools/scripts/build.sh fuzz; then
  echo "fuzz: building failed (above)"
  finish 1
fi
rm -rf $build/seeds
python3 -B $source/make_seeds.py $build/seeds || finish 1
targets=("$@")
[ $# -gt 0 ] || targets=($(cd $source && ls ./*_fuzz.cc | sed 's|^\./||; s|_fuzz\.cc$||'))

# The files that are opened again and again, in memory where that can be had; a finding leaves some.
TEST_TMPDIR=$(mktemp -d -p "$([ -w /dev/shm ] && echo /dev/shm)")
export TEST_TMPDIR
trap 'rm -rf "$TEST_TMPDIR"' EXIT
export UBSAN_OPTIONS=print_stacktrace=1
mkdir -p $build/findings

for target in "${targets[@]}"; do
  corpus=$build/corpus/$target
  log=$build/$target.log
  mkdir -p "$corpus"
  folders=("$corpus" "$build/seeds/$target")
  [ -d "$source/regressions/$target" ] && folders+=("$source/regressions/$target")
  options=(-max_total_time="$seconds" -timeout=5 -rss_limit_mb=512 -malloc_limit_mb=256
    -max_len=8192 -print_final_stats=1 -artifact_prefix="$build/findings/$target-")
  [ -f "$source/$target.dict" ] && options+=(-dict="$source/$target.dict")
  # Not nice: libFuzzer times an input by the wall, and starved ones look slow.
  if ! "$build/bin/${target}_fuzz" "${options[@]}" "${folders[@]}" >"$log" 2>&1; then
    grep -vE '^#[0-9]+' "$log" | tail -n 60
    echo "fuzz: $target failed; mend it, and keep the input in $source/regressions/$target"
    finish 1
  fi
  passed=$((passed + 1))
  last=$(grep -E '^#[0-9]+[[:space:]]+DONE' "$log")
  printf '%-14s %9s executions  coverage %5s  corpus %s\n' "$target" \
    "$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")" \
    "$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' <<<"$last")" \
    "$(sed -n 's/.* corp: \([^ ]*\) .*/\1/p' <<<"$last")"
done
finish 0
