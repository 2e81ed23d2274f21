#!/usr/bin/env bash
# run_python.sh SECONDS TEST.py ARGUMENTS...: the test under a hard time limit; 77 (skipped) without
# the Python that `make test` sets up.
if [ -z "${ESPALIER_PYTHON:-}" ]; then
  echo "skipped: ESPALIER_PYTHON is not set; tools/scripts/python_env.sh makes one"
  exit 77
fi
seconds=$1
shift
# `timeout` leads a process group of its own, where what stops the whole run does not reach it.
timeout -k 10 "$seconds" "$ESPALIER_PYTHON" "$@" &
trap 'kill $!' INT TERM
wait $!
