#!/usr/bin/env bash
# Builds a preset (release, asan, tsan ...) and runs its tests; the last line is what came of them.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
preset=${1:-release}
build=build/$preset
scripts=tools/scripts

give_up() {
  echo "$1"
  echo "0 passed, 1 failed, 0 skipped"
  exit 1
}

$scripts/install_packages.sh test || give_up "packages are missing"
$scripts/build.sh "$preset" || give_up "building $preset failed (above)"

# The real model's tests belong to the release build: under a sanitizer they take minutes and see
# nothing that the small model's do not.
if [ "$preset" = release ]; then
  model=$(MODEL=${MODEL:-${ESPALIER_MODEL:-}} $scripts/fetch_model.sh)
  case $? in
    0) export ESPALIER_MODEL=$model ;;
    3)
      unset ESPALIER_MODEL
      echo "model: tests of the real model will be skipped"
      ;;
    *) give_up "no model to test with (above)" ;;
  esac
else
  unset ESPALIER_MODEL ESPALIER_GOLDEN ESPALIER_TEXT
fi
unset ESPALIER_PYTHON
if [ "$preset" != tsan ]; then
  python=$($scripts/python_env.sh)
  case $? in
    0) export ESPALIER_PYTHON=$python ;;
    3) echo "python: tests by foreign clients will be skipped" ;;
    *) give_up "no Python for the foreign clients (above)" ;;
  esac
fi

reports=$PWD/$build/reports
rm -rf "$reports"
mkdir -p "$reports"
export GTEST_OUTPUT=xml:$reports/ GTEST_BRIEF=1
export ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=0:second_deadlock_stack=1
# Two at a time: a program with the real model fills the cores by itself. The time limit is for what
# sets none of its own.
ctest --test-dir "$build" -j 2 --timeout 300 --output-on-failure \
  --output-junit "$reports/ctest.junit"
python3 $scripts/test_summary.py "$reports/ctest.junit" "$reports"
