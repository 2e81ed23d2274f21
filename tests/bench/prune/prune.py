#!/usr/bin/env python3
"""What pruning weights takes and loses: SwiftPrune beside what it is compared with, in one run on
one machine, calibrated on one text and scored on another. `make bench-prune`; half an hour on two
quiet cores.

The stages come first, by prune_kernels, beside a memcpy of the same bytes. Then each row prunes the
model by `espalier prune` and scores what was written by `espalier score`, which serves it as any
model. Two conventions of time, as the literature has both: `alone` is statistics, scores, masks and
updates, without the forward passes (Wanda's); `end to end` is the whole process by the wall clock.
Rows whose times make a ratio are timed five times, in turns, and tell medians; others once.

--markdown prints the README's tables from what the last run left in build/figures.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "pruning"))
import texts  # noqa: E402

PATTERNS = ("0.5", "4:8", "2:4")
WINDOW = 1024
PIECE = 3_000  # characters of one kind, where kinds take turns
SCORES = ("--method", "swift", "--compensate", "none", "--activations", "pruned")
EWMA = (*SCORES, "--select", "ewma", "--loose")
ONCE = ("--activations", "sequential")
OURS = ("--tokens", "2048", "--window", "128")  # the default's own calibration
# name: (what it is, arguments); calibration tokens are each method's own, as published, but for the
# rows that say otherwise.
ROWS = {
    "magnitude": ("magnitude", ("--method", "magnitude")),
    "lscore": ("L-score as published", (*SCORES, "--metric", "lscore")),
    "lscore-ewma": ("L-score, EWMA 1/8", (*EWMA, "--metric", "lscore")),
    "obd-damped": ("OBD, damped", (*SCORES, "--metric", "obd_damped")),
    "ria": ("RIA", ("--method", "ria")),
    "wanda": ("Wanda", ("--method", "wanda")),
    "wanda-2048": ("Wanda, our 2,048 tokens", ("--method", "wanda", *OURS)),
    "wanda-2048-once": ("Wanda, the same, layers run once", ("--method", "wanda", *OURS, *ONCE)),
    "wanda-ewma": ("Wanda's metric, EWMA 1/8", EWMA),
    "wanda-ewma-02": ("Wanda's metric, EWMA 0.02", (*EWMA, "--alpha", "0.02")),
    "swift": ("SwiftPrune, our default", ("--method", "swift")),
    "swift-pruned": ("our default, layers run twice", ("--method", "swift", "--activations", "pruned")),
    "swift-wanda": ("our default by Wanda's metric", ("--method", "swift", "--metric", "wanda")),
    "quality": ("SwiftPrune --quality", ("--method", "swift", "--quality")),
    "sparsegpt": ("SparseGPT", ("--method", "sparsegpt")),
    "sparsegpt-2048": ("SparseGPT, our 2,048 tokens", ("--method", "sparsegpt", *OURS)),
    "sparsegpt-once": ("SparseGPT, layers run once", ("--method", "sparsegpt", *ONCE)),
}
UNGROUPED = ("lscore-ewma", "wanda-ewma", "wanda-ewma-02")
TIMED = ("swift", "quality", "sparsegpt", "sparsegpt-once")
TIMED_PATTERN, TURNS = "2:4", 5
PHASES = ("load", "forward", "statistics", "read", "select", "update", "write")
WIDTH = 11
FIGURES = pathlib.Path("build/figures")


def alone(seconds):
    return seconds["statistics"] + seconds["select"] + seconds["update"]


def held_texts(folder, text):
    """(calibration files, the text to score)."""
    folder.mkdir(parents=True, exist_ok=True)
    test = folder / "test.txt"
    if text:
        whole = pathlib.Path(text).read_text()
        calibrate = folder / "calibrate.txt"
        calibrate.write_text(whole[: len(whole) // 2])
        test.write_text(whole[len(whole) // 2 :])
        return [calibrate], test
    kinds = texts.build(folder / "texts")
    parts = [(folder / f"texts/test/{kind}.txt").read_text() for kind in kinds]
    pieces = [part[at : at + PIECE] for at in range(0, max(map(len, parts)), PIECE)
              for part in parts if at < len(part)]
    test.write_text("\n\n".join(pieces))
    return [folder / f"texts/calibrate/{kind}.txt" for kind in kinds], test


class Bench:
    def __init__(self, options):
        self.options = options
        self.folder = pathlib.Path("build/prune")
        self.calibrate, self.test = held_texts(self.folder, options.text)

    def run(self, *arguments):
        command = [f"{self.options.bin}/espalier", *map(str, arguments)]
        print("$ espalier", *map(str, arguments), file=sys.stderr, flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(f"bench-prune: {' '.join(command)} ended with {done.returncode}")
        return done.stdout

    def prune(self, name, pattern):
        """(report, path of what was written); `wall` is of the whole process."""
        out, report = self.folder / "pruned.gguf", self.folder / "report.json"
        begin = time.monotonic()
        self.run("prune", "--model", self.options.model, "--pattern", pattern, "--out", out,
                 "--json", report, "--calibration", *self.calibrate, *ROWS[name][1])
        wall = time.monotonic() - begin
        return json.loads(report.read_text()) | {"wall": wall}, out

    def perplexity(self, model):
        score = json.loads(self.run("score", "--model", model, "--file", self.test, "--window", WINDOW,
                                    "--windows", self.options.windows, "--json"))
        return score["ppl"], score["terms"]


def line_of(row, swift):
    seconds = row["seconds"]
    return (f"{row['name']:28}{row['pattern']:>5}{row['tokens']:7}"
            + "".join(f"{seconds[phase]:{WIDTH}.2f}" for phase in PHASES)
            + f"{alone(seconds):8.2f}{alone(seconds) / alone(swift['seconds']):8.2f}x"
            + f"{row['wall']:8.2f}{row['wall'] / swift['wall']:8.2f}x"
            + f"{100 * row['sparsity']:9.2f}%{row['ppl']:10.2f}")


def table(rows):
    lines = [f"{'':28}{'':>5}{'':>7}{'seconds, by phase':^{7 * WIDTH}}{'alone':^17}{'end to end':^17}",
             f"{'method':28}{'':>5}{'tokens':>7}" + "".join(f"{phase:>{WIDTH}}" for phase in PHASES)
             + f"{'s':>8}{'to ours':>9}{'s':>8}{'to ours':>9}{'zeros':>10}{'ppl':>10}"]
    for pattern in PATTERNS:
        swift = rows.get(f"swift {pattern}")
        lines += [line_of(row, swift) for row in rows.values()
                  if row["pattern"] == pattern and swift is not None]
    return "\n".join(lines)


def ratios(rows, dense):
    """Flat figures; what a run left out makes none."""
    figures = {"ppl_dense": dense}
    for row in rows.values():
        key = f"{row['key'].replace('-', '_')}_{row['pattern'].replace('0.5', '50').replace(':', '')}"
        figures[f"ppl_{key}"] = row["ppl"]
        figures[f"alone_s_{key}"] = alone(row["seconds"])
        figures[f"end_to_end_s_{key}"] = row["wall"]

    def ratio(key, of, to, value):
        if of in rows and to in rows:
            figures[key] = value(rows[of]) / value(rows[to])

    def ppl(row):
        return row["ppl"]

    def wall(row):
        return row["wall"]

    for pattern in PATTERNS:
        of = pattern.replace("0.5", "50").replace(":", "")
        # The same calibration for both, Wanda's text through layers once or twice, whichever is
        # better; Wanda's own calibration; --quality has Wanda's own too.
        same = min((row for row in (f"wanda-2048 {pattern}", f"wanda-2048-once {pattern}")
                    if row in rows), key=lambda row: rows[row]["ppl"], default=None)
        ratio(f"ppl_default_vs_wanda_{of}", f"swift {pattern}", same, ppl)
        ratio(f"ppl_default_vs_wanda_8192_{of}", f"swift {pattern}", f"wanda {pattern}", ppl)
        ratio(f"ppl_quality_vs_wanda_{of}", f"quality {pattern}", f"wanda {pattern}", ppl)
        # The default is what compensates the mean.
        ratio(f"ppl_compensated_vs_wanda_{of}", f"swift {pattern}", same, ppl)
    ratio("sparsegpt_vs_swift_end_to_end", "sparsegpt 2:4", "swift 2:4", wall)
    ratio("sparsegpt_once_vs_swift_end_to_end", "sparsegpt-once 2:4", "swift 2:4", wall)
    ratio("quality_over_sparsegpt_time", "quality 2:4", "sparsegpt 2:4", lambda row: alone(row["seconds"]))
    ratio("quality_over_sparsegpt_end_to_end", "quality 2:4", "sparsegpt 2:4", wall)
    if "swift 2:4" in rows:
        figures["swift_seconds"] = rows["swift 2:4"]["wall"]
    return figures


def markdown(rows, figures):
    def cell(key, pattern, form):
        row = rows.get(f"{key} {pattern}")
        return form(row) if row else ""

    lines = ["| perplexity (dense "
             f"{figures['ppl_dense']:.1f}); seconds at 2:4 | tokens | 50 % | 4:8 | 2:4 | alone | end to end |",
             "|---|---|---|---|---|---|---|"]
    for key, (name, _) in ROWS.items():
        any_row = next((row for row in rows.values() if row["key"] == key), None)
        if any_row is None:
            continue
        bold = "**" if key in ("swift", "quality") else ""
        cells = [cell(key, pattern, lambda row: f"{row['ppl']:.1f}") for pattern in PATTERNS]
        cells += [cell(key, "2:4", lambda row: f"{alone(row['seconds']):.2f}"),
                  cell(key, "2:4", lambda row: f"{row['wall']:.1f}")]
        lines.append(f"| {bold}{name}{bold} | {any_row['tokens'] or ''} | " + " | ".join(cells) + " |")
    lines += ["", "| of the whole model, 2 threads | asked | measured |", "|---|---|---|"]
    for key, what, asked in (
            ("mask24_vs_memcpy", "2:4 score + mask, to a memcpy of the same bytes", "at most 1.25"),
            ("mask48_vs_memcpy", "4:8", "at most 1.25"),
            ("exact50_vs_memcpy", "50 %, exactly, by bisection", "at most 2"),
            ("ewma50_vs_memcpy", "50 % by EWMA", "at most 2"),
            ("sparsegpt_vs_mask24", "SparseGPT, Hessian given, to 2:4 score + mask", "100"),
            ("sparsegpt_vs_swift_without_forward", "both with statistics, without forward passes", "12.29"),
            ("sparsegpt_vs_swift_end_to_end", "end to end, 4,096 tokens to our 2,048", "5"),
            ("sparsegpt_once_vs_swift_end_to_end", "the same, SparseGPT's text through each layer once too", ""),
            ("swift_seconds", "our default at 2:4, end to end, seconds", "below 4"),
            ("quality_over_sparsegpt_time", "`--quality` to SparseGPT, alone", "at most 0.25"),
            ("ppl_default_vs_wanda_50", "perplexity to Wanda's, same calibration, 50 %", "at most 1"),
            ("ppl_default_vs_wanda_48", "4:8", "at most 1"),
            ("ppl_compensated_vs_wanda_24", "2:4", "at most 0.90"),
            ("ppl_default_vs_wanda_8192_50", "to Wanda's on its 8,192 tokens, 50 %", "at most 1.05"),
            ("ppl_default_vs_wanda_8192_48", "4:8", "at most 1.05"),
            ("ppl_default_vs_wanda_8192_24", "2:4", "at most 1.05"),
            ("ppl_quality_vs_wanda_24", "`--quality` to Wanda's, 8,192 tokens both, 2:4", "at most 0.70")):
        if key in figures:
            lines.append(f"| {what} | {asked} | {figures[key]:.2f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--bin", default="build/release/bin")
    parser.add_argument("--text", default=os.environ.get("ESPALIER_TEXT") or None,
                        help="prose of a megabyte or so: its first half calibrates, its second is "
                             "scored; without it, kinds of text that this machine has")
    parser.add_argument("--windows", type=int, default=32, help=f"of {WINDOW} tokens, to score")
    parser.add_argument("--turns", type=int, default=TURNS, help="of the rows that ratios are of")
    parser.add_argument("--rows", help="comma-separated: " + ", ".join(ROWS))
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    kept = FIGURES / "bench-prune-rows.json"
    if options.markdown:
        print(markdown(json.loads(kept.read_text()), json.loads((FIGURES / "bench-prune.json").read_text())))
        return
    if not options.model:
        parser.error("--model is missing")
    chosen = options.rows.split(",") if options.rows else list(ROWS)
    FIGURES.mkdir(parents=True, exist_ok=True)
    subprocess.run([f"{options.bin}/prune_kernels", options.model], check=True)
    stages = json.loads((FIGURES / "bench-prune-kernels.json").read_text())

    bench, rows = Bench(options), {}
    dense, terms = bench.perplexity(options.model)
    for pattern in options.patterns.split(","):
        for key in chosen:
            if key in UNGROUPED and ":" in pattern:
                continue
            report, out = bench.prune(key, pattern)
            ppl, terms = bench.perplexity(out)
            out.unlink()
            rows[f"{key} {pattern}"] = {
                "key": key, "name": ROWS[key][0], "pattern": pattern, "tokens": report["tokens"],
                "seconds": report["seconds"], "wall": report["wall"], "sparsity": report["sparsity"],
                "ppl": ppl}
            print(f"{ROWS[key][0]:28}{pattern:>5}  perplexity {ppl:.2f}, {report['wall']:.1f} s",
                  file=sys.stderr, flush=True)
    # In turns, so that a slow minute of the machine is everyone's.
    again = [f"{key} {TIMED_PATTERN}" for key in TIMED if f"{key} {TIMED_PATTERN}" in rows]
    times = {name: [(rows[name]["wall"], rows[name]["seconds"])] for name in again}
    for _ in range(options.turns - 1):
        for name in again:
            report, out = bench.prune(rows[name]["key"], TIMED_PATTERN)
            out.unlink()
            times[name].append((report["wall"], report["seconds"]))
    for name, taken in times.items():
        rows[name]["wall"] = statistics.median(wall for wall, _ in taken)
        rows[name]["seconds"] = {phase: statistics.median(seconds[phase] for _, seconds in taken)
                                 for phase in taken[0][1]}

    figures = stages | ratios(rows, dense)
    kept.write_text(json.dumps(rows, indent=2) + "\n")
    (FIGURES / "bench-prune.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\n{terms} tokens scored, windows of {WINDOW}; dense: perplexity {dense:.2f}. alone: statistics, "
          f"select, update\n(score and mask are one loop); end to end: the process, forward passes and files "
          f"included.\nMedians of {options.turns} turns: {', '.join(again)}; one turn: the rest.\n")
    print(table(rows))
    print()
    for key, value in figures.items():
        if isinstance(value, float) and ("_vs_" in key or key.startswith(("quality_", "swift_"))):
            print(f"{key} {value:.3f}")
    print(f"figures: {FIGURES}/bench-prune.json")


if __name__ == "__main__":
    main()
