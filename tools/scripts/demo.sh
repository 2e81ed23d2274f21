#!/usr/bin/env bash
# First contact: builds, serves the model on a free port, streams an answer, then the same one from
# pruned rungs, runs a burst, takes memory away while streams run and gives it back, drains.
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
name=$(basename "${model%.gguf}").ladder
ladder=deploy/ladders/$name
[ -s "$ladder" ] || ladder=build/ladders/$name  # a model of one's own
if [ ! -s "$ladder" ]; then
  say "Measuring what the model can spare, once: three minutes or so"
  python3 tests/bench/pruning/texts.py $work/texts >/dev/null 2>&1
  texts=($work/texts/calibrate/*.txt)
  [ -s "${texts[0]}" ] || texts=(self)  # a machine without any text
  mkdir -p build/ladders
  $bin/espalier calibrate --model "$model" --text "${texts[@]}" --tokens 16000 --rungs 0.1,0.3 \
    --out "$ladder" >$work/calibrate.log || ladder=  # a shape that panels cannot have: dense only
fi
rungs=0
if [ -s "$ladder" ]; then
  grep '^rung' "$ladder" | cut -d ' ' -f -6
  rungs=$(grep -c '^rung [1-9]' "$ladder")
fi
# Answers at a mild and a harder rung.
shown=($((rungs > 4 ? 2 : rungs > 0)) $((rungs > 4 ? 4 : rungs)))
say "Serving $(basename "$model")"
began=$SECONDS
$bin/espalier-server --model "$model" ${ladder:+--ladder "$ladder" --policy ladder --ttft-target 4} --admin --host 127.0.0.1 \
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

for rung in $(printf '%s\n' "${shown[@]}" | sort -un); do
  [ "$rung" -gt 0 ] || continue
  say "> Why is the sky blue?   (rung $rung: fewer channels, at a loss that is told)"
  $bin/espalier chat --address "$address" --deadline 120 --temperature 0 --max-tokens 96 \
    --rung "$rung" --once "Why is the sky blue?" || fail "no answer at rung $rung"
done

# finished N FILE: all calls of a load did.
finished() { grep -q "^$1 calls, $1 finished," "$2" || fail "not all of the burst finished (above)"; }

say "16 requests at once, 64 + 64 tokens each, full model"
$bin/espalier load --address "$address" --requests 16 --concurrency 16 --prompt-tokens 64 \
  --max-tokens 64 --rung 0 --deadline 300 | tee $work/load.txt || fail "the burst failed"
finished 16 $work/load.txt

say "The squeeze: 32 streams of 64 + 256 tokens, rungs as the policy says"
before=$($bin/espalier budget --address "$address") || fail "no ledger"
$bin/espalier load --address "$address" --requests 32 --concurrency 32 --prompt-tokens 64 \
  --max-tokens 256 --seed 2 --deadline 300 >$work/squeeze.txt &
load=$!
sleep 4
resident() { sed 's/.*resident \([0-9]*\).*/\1/' <<<"$1"; }
all=$($bin/espalier budget --address "$address")
echo "with all of it:       $all"
# What the process held without streams, less 10 MiB: weights that no rung needs have to leave.
$bin/espalier budget --address "$address" $(($(resident "$before") - 10))MiB >/dev/null ||
  fail "the budget was refused"
sleep 1
less=$($bin/espalier budget --address "$address")
echo "a second after less:  $less"
[ "$(resident "$less")" -lt "$(resident "$all")" ] || fail "resident memory did not fall"
sleep 3
$bin/espalier budget --address "$address" 0 >/dev/null
wait $load || fail "the squeezed streams failed"
cat $work/squeeze.txt
finished 32 $work/squeeze.txt
grep -h ' policy \| memory kv\| weights ' $work/server.log | cut -c1-120 | sed 's/^/  /'
sleep 3
say "> Why is the sky blue?   (three seconds after)"
$bin/espalier chat --address "$address" --deadline 120 --temperature 0 --max-tokens 24 \
  --once "Why is the sky blue?" || fail "no answer after the squeeze"
if [ -n "$ladder" ]; then
  $bin/espalier decisions --last 1 --address "$address" | tail -n 1 | tee $work/last
  grep -q '"rung":0' $work/last || fail "it does not serve the full model again"
fi

say "Draining"
kill -TERM $server
wait $server
status=$?
[ $status -eq 0 ] || fail "the server ended with code $status"
echo "The server finished what ran and ended. demo: done in $SECONDS s"
