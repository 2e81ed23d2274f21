#!/usr/bin/env bash
# First contact: builds, calibrates once, serves the model on a free port, streams an answer, then the
# same one from pruned rungs, runs a burst on each, drains.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
bin=build/release/bin
work=build/demo

bold='' plain=''
[ -t 1 ] && bold=$'\033[1m' plain=$'\033[0m'
say() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }

fail() {
  [ -s $work/server.log ] && tail -n 3 $work/server.log >&2
  echo "demo: $1" >&2
  exit 1
}

# Whatever happens, nothing of ours is left running.
# shellcheck disable=SC2046  # a list of process ids
trap 'kill -KILL $(jobs -p) 2>/dev/null' EXIT
trap 'exit 130' INT TERM

tools/scripts/build.sh release || fail "the build failed (above)"
model=$(tools/scripts/fetch_model.sh) || exit 1

rm -rf $work
mkdir -p $work
ladder=build/ladders/$(basename "${model%.gguf}").ladder
if [ ! -s "$ladder" ]; then
  say "Measuring what the model can spare, once: three minutes or so"
  python3 tests/bench/pruning/texts.py $work/texts >/dev/null 2>&1
  texts=($work/texts/calibrate/*.txt)
  [ -s "${texts[0]}" ] || texts=(self)  # a machine without any text
  mkdir -p build/ladders
  $bin/espalier calibrate --model "$model" --text "${texts[@]}" --tokens 16000 --rungs 0.1,0.3 \
    --out "$ladder" >$work/calibrate.log || ladder=  # a shape that panels cannot have: dense only
fi
rungs=(0)
if [ -s "$ladder" ]; then
  grep '^rung' "$ladder"
  mapfile -t rungs < <(sed -n 's/^rung \([0-9]*\) .*/\1/p' "$ladder")
fi
say "Serving $(basename "$model")"
began=$SECONDS
$bin/espalier-server --model "$model" ${ladder:+--ladder "$ladder"} --host 127.0.0.1 \
  --port 0 --port-file $work/port --metrics-port -1 >$work/server.log 2>&1 &
server=$!
while [ ! -s $work/port ]; do
  kill -0 $server 2>/dev/null || fail "the server ended before it listened; why is above"
  [ $((SECONDS - began)) -lt 120 ] || fail "the server does not listen after 120 s"
  sleep 0.05
done
address=127.0.0.1:$(<$work/port)
$bin/espalier health --wait --deadline 120 --address "$address" >$work/health.log 2>&1 &
health=$!
wait -n $server $health || fail "the server cannot serve; why is above"
echo "SERVING at $address"

say "> Why is the sky blue?"
$bin/espalier chat --address "$address" --deadline 120 --temperature 0 --max-tokens 96 \
  --once "Why is the sky blue?" || fail "no answer"

for rung in "${rungs[@]:1}"; do
  say "> Why is the sky blue?   (rung $rung: fewer channels, at a loss that is told)"
  $bin/espalier chat --address "$address" --deadline 120 --temperature 0 --max-tokens 96 \
    --rung $rung --once "Why is the sky blue?" || fail "no answer at rung $rung"
done

for rung in "${rungs[@]}"; do
  say "16 requests at once, 64 + 64 tokens each, at rung $rung"
  $bin/espalier load --address "$address" --requests 16 --concurrency 16 --prompt-tokens 64 \
    --max-tokens 64 --rung $rung --deadline 300 | tee $work/load.txt || fail "the burst failed"
  grep -q '^16 calls, 16 finished,' $work/load.txt || fail "not all of the burst finished (above)"
done

say "Draining"
kill -TERM $server
wait $server
status=$?
[ $status -eq 0 ] || fail "the server ended with code $status"
echo "The server finished what ran and ended. demo: done in $SECONDS s"
