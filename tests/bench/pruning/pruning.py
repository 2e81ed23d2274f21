#!/usr/bin/env python3
"""What pruning costs in quality: our default and the published methods, in one run, on the same
texts and counts. `make bench-pruning`; takes about an hour on two cores, most of it calibration,
whose ladders are kept in build/pruning for the next run (--fresh makes them again).

(a) One kind of text: calibrate on the first half of TEXT, windows of 1,024 of the second half.
(b) Mixed traffic through prefill, paged KV and decode: eight kinds, prompt 256, 128 forced decode
    steps, batch 8 and 1; calibrated on other files of the same kinds, or on what the model makes up.

Losses are nats/token above the dense model, means with the standard error over texts. The speed
table is pruning_bench's.
"""

import argparse
import json
import math
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys

import texts

RATIOS = (20, 40)  # percent of all MLP channels; layers 0 to 2 stay whole
STATIC = {"static": ("ppsp", "none"), "wanda-sp": ("wanda-sp", "none"), "flap": ("flap", "mean"),
          "flap-no-bias": ("flap", "none")}
WINDOW, WINDOWS, WINDOW_BATCH = 1024, 60, 20
PROMPT = 256
SELF = ("--text", "self", "--tokens", 300000)


class Bench:
    def __init__(self, options):
        self.options = options
        self.folder = pathlib.Path("build/pruning")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.made = set()  # ladders, in this run

    def run(self, *arguments):
        command = [self.options.espalier, *map(str, arguments), "--model", self.options.model]
        print("$", " ".join(map(str, arguments)), file=sys.stderr, flush=True)
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    def ladder(self, name, *arguments):
        """Rungs 1 and 2 leave out 20 and 40 %."""
        path, made_by = self.folder / f"{name}.ladder", self.folder / f"{name}.arguments"
        arguments = ("--rungs", ",".join(str(ratio / 100) for ratio in RATIOS), *arguments)
        told = " ".join(map(str, arguments))
        kept = path.exists() and made_by.exists() and made_by.read_text() == told
        if not kept or (self.options.fresh and name not in self.made):
            self.run("calibrate", "--out", path, *arguments)
            made_by.write_text(told)
        self.made.add(name)
        return path

    def prompts_whole(self, ladder):
        """The same, but that its rungs narrow decode alone."""
        path = ladder.with_name(f"{ladder.stem}-prompts-whole.ladder")
        path.write_text(re.sub(r"^(rung .*) channels=", r"\1 decode.channels=", ladder.read_text(),
                               flags=re.M))
        shutil.copyfile(f"{ladder}.gguf", f"{path}.gguf")
        return path

    def eval(self, ladder, rungs, *arguments):
        """Of each rung: the losses of all texts, and its report."""
        out = self.run("eval", "--ladder", ladder, "--rungs", ",".join(map(str, rungs)), "--json",
                       *arguments)
        report = json.loads(out)
        return {rung["rung"]: ([text["loss"][i] for text in report["texts"]], rung)
                for i, rung in enumerate(report["rungs"])}


def above(losses, dense):
    """Mean and standard error of the paired differences."""
    differences = [a - b for a, b in zip(losses, dense, strict=True)]
    return statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def one_kind(bench, text):
    """(a): {method: {ratio: (loss, error)}}."""
    calibrate, test = bench.folder / "texts/calibrate/wiki.txt", bench.folder / "texts/test/wiki.txt"
    ours = bench.ladder("one", "--text", calibrate, "--tokens", 160000)
    methods = {"ours": (ours,)}
    for name, (rank, compensate) in STATIC.items():
        methods[name] = (bench.ladder(name, "--text", calibrate, "--tokens", 60000, "--rank", rank,
                                      "--compensate", compensate),)
    history = ("--history-text", calibrate, "--history-tokens", 100000)
    uniform = methods["static"][0]  # as published, with weights as loaded
    methods["probe-pruning"] = (uniform, "--probe", "top-norm", "--exact-history", *history)
    methods["spread-probe"] = (uniform, "--probe", "spread", "--probe-budget", 0.015,
                               "--history-keep", 1, *history)
    methods["parallel-probing"] = (*methods["probe-pruning"], "--probe-stale")
    methods["full-batch"] = (uniform, "--probe", "all")
    methods["ours-self"] = (bench.ladder("self", *SELF),)
    windows = ("--text", test, "--prompt", WINDOW, "--decode", 0, "--count", WINDOWS, "--batch",
               WINDOW_BATCH, "--step-rows", WINDOW * WINDOW_BATCH)
    dense = bench.eval(ours, (0,), *windows)[0][0]
    table = {}
    for name, (ladder, *arguments) in methods.items():
        measured = bench.eval(ladder, (1, 2), *windows, *arguments)
        table[name] = {ratio: above(measured[rung][0], dense) for rung, ratio in enumerate(RATIOS, 1)}
    return table


def mixed(bench, kinds):
    """(b): {calibration, batch: {ratio: (loss, error, told)}}."""
    calibrate = [bench.folder / f"texts/calibrate/{kind}.txt" for kind in kinds]
    test = [bench.folder / f"texts/test/{kind}.txt" for kind in kinds]
    ours = bench.ladder("mixed", "--text", *calibrate, "--tokens", 240000)
    rows = {
        "mixed": (ours, (8, 1)),
        "self": (bench.ladder("self", *SELF), (8,)),
        "mixed, prompts whole": (bench.prompts_whole(ours), (8,)),
    }
    if "wiki" in kinds:
        static = bench.folder / "static.ladder"
        rows["static wiki"] = (static, (8,))
        # All of a batch's prompts in one step; of one, its own prompt ranks for each request.
        rows["by prompts, whole"] = (bench.prompts_whole(static), (8, 1), "--probe", "prompts",
                                     "--step-rows", 8 * PROMPT)
    table = {}
    for name, (ladder, batches, *arguments) in rows.items():
        for batch in batches:
            measured = bench.eval(ladder, (0, 1, 2), "--text", *test, "--prompt", PROMPT,
                                  "--decode", 128, "--count", 4 * len(kinds), "--batch", batch,
                                  *arguments)
            table[name, batch] = {
                ratio: (*above(measured[rung][0], measured[0][0]), measured[rung][1]["told"])
                for rung, ratio in enumerate(RATIOS, 1)
            }
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--bin", default="build/release/bin")
    parser.add_argument("--text", default=os.environ.get("ESPALIER_TEXT"),
                        help="prose for (a), a megabyte or so; without it (a) is left out")
    parser.add_argument("--fresh", action="store_true", help="calibrate again")
    parser.add_argument("--no-speed", action="store_true", help="quality alone")
    options = parser.parse_args()
    options.espalier = f"{options.bin}/espalier"
    bench = Bench(options)
    kinds = texts.build(bench.folder / "texts", options.text)

    figures, lines = {}, []
    if options.text:
        table = one_kind(bench, options.text)
        lines += ["", f"One kind of text, {WINDOWS} windows of {WINDOW}, prefill; nats/token above dense",
                  f"{'':16}" + "".join(f"{f'{ratio} % of channels':>22}" for ratio in RATIOS)]
        for name, losses in table.items():
            lines.append(f"{name:16}" + "".join(f"{loss:13.3f} +- {error:.3f}"
                                                for loss, error in losses.values()))
            for ratio, (loss, _) in losses.items():
                figures[f"loss_{name.replace('-', '_')}_{ratio}"] = loss
        for ratio in RATIOS:
            figures[f"ratio_one_kind_{ratio}"] = (table["ours"][ratio][0]
                                                  / table["probe-pruning"][ratio][0])
        figures["ratio_self_40"] = table["ours-self"][40][0] / table["probe-pruning"][40][0]
        print("\n".join(lines), flush=True)
    table = mixed(bench, kinds)
    lines = ["", f"Mixed traffic, {len(kinds)} kinds, prompt {PROMPT}, 128 decode rows; nats/token above dense",
              f"{'calibration':21}{'batch':>6}" + "".join(f"{f'{ratio} % of channels':>22}{'told':>8}"
                                                          for ratio in RATIOS)]
    for (name, batch), losses in table.items():
        lines.append(f"{name:21}{batch:6}" + "".join(f"{loss:13.3f} +- {error:.3f}{told:8.3f}"
                                                     for loss, error, told in losses.values()))
        for ratio, (loss, *_) in losses.items():
            row = "_".join(name.replace(",", "").split())
            figures[f"loss_mixed_traffic_{row}_b{batch}_{ratio}"] = loss
    figures["mixed_b8_40"], _, told = table["mixed", 8][40]
    figures["told_over_measured"] = told / figures["mixed_b8_40"]
    figures["mixed_b8_20"] = table["mixed", 8][20][0]
    figures["mixed_b1_40"] = table["mixed", 1][40][0]
    figures["mixed_b8_40_self"] = table["self", 8][40][0]
    print("\n".join(lines), flush=True)

    out = pathlib.Path("build/figures")
    out.mkdir(parents=True, exist_ok=True)
    if not options.no_speed:
        print(flush=True)
        subprocess.run([f"{options.bin}/pruning_bench", options.model], check=True)
        figures = json.loads((out / "bench-pruning-speed.json").read_text()) | figures
    (out / "bench-pruning.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"figures: {out}/bench-pruning.json")


if __name__ == "__main__":
    main()
