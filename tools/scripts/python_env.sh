#!/usr/bin/env bash
# Prints the Python of build/venv, which the end-to-end tests and `make lint-proto` use; makes it once.
# Exit 3: no network.
set -euo pipefail
cd "$(dirname "$0")/../.."

requirements=tests/e2e/requirements.txt
venv=build/venv
made=$venv/requirements.txt  # what it was made from
if ! cmp -s "$requirements" "$made"; then
  echo "python: installing $(grep -vc '^#' "$requirements") packages into $venv" >&2
  rm -rf "$venv"
  mkdir -p build
  python3 -m venv "$venv"
  if ! "$venv/bin/python3" -m pip install --quiet --disable-pip-version-check --only-binary :all: \
    --retries 2 -r "$requirements" >"$venv/log" 2>&1; then
    echo "python: $(grep -E '^ERROR' "$venv/log" | tail -n 1 || echo 'cannot install'); no network?" >&2
    exit 3
  fi
  cp "$requirements" "$made"
fi
echo "$PWD/$venv/bin/python3"
