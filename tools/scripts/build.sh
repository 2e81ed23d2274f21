#!/usr/bin/env bash
# Configures and builds a preset (release, debug, asan, tsan, fuzz), installing what that needs.
set -euo pipefail
cd "$(dirname "$0")/../.."
preset=$1

groups=(build)
case $preset in asan | tsan | fuzz) groups+=(clang) ;; esac
tools/scripts/install_packages.sh "${groups[@]}"
mkdir -p build
if ! cmake --preset "$preset" >"build/$preset.log" 2>&1; then
  tail -n 20 "build/$preset.log" >&2
  echo "build: configuring $preset failed (above)" >&2
  exit 1
fi
# Another clone of this tree finds what this one compiled.
export CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1
# A core's worth of jobs, not ninja's two more: a unit with gRPC in it takes 400 MB.
cmake --build --preset "$preset" -j "$(nproc)"
