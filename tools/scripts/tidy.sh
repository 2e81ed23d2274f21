#!/usr/bin/env bash
# clang-tidy over the sources that differ from HEAD (or from main, on a branch); --all: over all.
set -euo pipefail
cd "$(dirname "$0")/../.."

tools/scripts/install_packages.sh clang
if [ "${1:-}" = --all ]; then
  files=$(git ls-files '*.cc')
else
  base=$(git merge-base HEAD main 2>/dev/null || echo HEAD)
  files=$({ git diff --name-only --diff-filter=d "$base" -- '*.cc'
    git ls-files --others --exclude-standard '*.cc'; } | sort -u)
fi
# A file that is in no target has no compile command.
known=$(python3 -c 'import json, os
for entry in json.load(open("build/release/compile_commands.json")):
    print(os.path.relpath(entry["file"]))')
files=$(grep -xF "$known" <<<"$files" || true)
if [ -z "$files" ]; then
  echo "tidy: no source differs; ARGS=--all looks at all"
  exit 0
fi
xargs -P "$(nproc)" -n 1 clang-tidy-19 --quiet -p build/release <<<"$files" 2>/dev/null
echo "tidy: clean"
