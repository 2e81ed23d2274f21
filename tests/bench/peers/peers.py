#!/usr/bin/env python3
"""Espalier beside llama.cpp and OpenVINO GenAI, in turns on the same cores: `make bench-peers`.

Run from the repository's root, after the build. Prints what each turn gave, then a table; writes
the figures, the table and the picture beside FIGURES (build/figures/bench-peers.json, .md, .svg).
"""

import argparse
import json
import os
import pathlib
import sys

import cpu_watch
import engines
import figures
import install
import picture


def warn(message):
    print(f"warning: {message}", file=sys.stderr, flush=True)


class Bench:
    """The turns and what they gave."""

    def __init__(self, setup):
        self.setup = setup
        self.samples, self.roofline, self.ours, self.others = {}, {}, {}, []

    def watched(self, title, work):
        """work(), with a line of what it gave and a warning if others took part."""
        with cpu_watch.CpuWatch() as watch:
            values = work()
        self.others.append(watch.others)
        told = "  ".join(f"{what} {value:.{2 if value < 100 else 0}f}"
                         for what, value in values.items())
        print(f"{title:28} {told}", flush=True)
        if watch.others > figures.DISTURBED:
            warn(f"other processes took {100 * watch.others:.0f} % of the cores: too low")
        return values

    def turn(self, number, turns):
        """Each engine once at each thing; who begins changes from turn to turn."""
        setup = self.setup

        def bench_ours():
            speeds, shares, self.ours = engines.bench_ours(setup, number)
            for what, share in shares.items():
                self.roofline.setdefault(what, []).append(share)
            return speeds

        def cold_start(engine):
            engine(setup)  # its files come into the page cache
            return {figures.COLD_START: engine(setup)}

        runs = (
            ((figures.OURS, bench_ours),
             (figures.LLAMA, lambda: engines.bench_llama(setup, number)),
             (figures.OPENVINO, lambda: engines.bench_openvino(setup, number))),
            ((figures.OURS, lambda: {figures.SERVE: engines.serve_ours(setup, number)}),
             (figures.LLAMA, lambda: {figures.SERVE: engines.serve_llama(setup, number)})),
            ((figures.OURS, lambda: cold_start(engines.cold_start_ours)),
             (figures.LLAMA, lambda: cold_start(engines.cold_start_llama))),
        )
        for group in runs:
            first = number % len(group)
            for engine, work in group[first:] + group[:first]:
                title = f"turn {number + 1}/{turns} {figures.NAMES[engine]}"
                figures.merge(self.samples, engine, self.watched(title, work))

    def perplexity(self):
        """{name: perplexity}, as served and of the weights alone; empty without a text."""
        text = os.environ.get("ESPALIER_TEXT")
        if not text:
            print("ESPALIER_TEXT names no text: ppl_int8_rel and ppl_int4_rel are left out")
            return {}
        return self.watched("perplexity", lambda: {
            name: engines.perplexity_ours(self.setup, text, weights, kv)
            for name, weights, kv in (("f32", "f32", "auto"), ("int8", "int8", "auto"),
                                      ("int4", "int4", "auto"), ("int8_f16kv", "int8", "f16"),
                                      ("int4_f16kv", "int4", "f16"))})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=pathlib.Path, help="a .gguf file")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)),
                        help="of every engine; default: the cores this process may use")
    parser.add_argument("--bin", type=pathlib.Path, default="build/release/bin")
    parser.add_argument("--peers", type=pathlib.Path, default="build/peers")
    parser.add_argument("--figures", type=pathlib.Path, default="build/figures/bench-peers.json")
    options = parser.parse_args()
    if options.turns < 1 or options.threads < 1:
        parser.error("--turns and --threads are at least 1")
    if options.model.suffix != ".gguf":
        parser.error(f"--model {options.model}: the peers are compared on a .gguf file")

    peers = install.install(options.peers.resolve())
    install.convert(peers, options.model)
    bench = Bench(engines.Setup(options.model, options.threads, options.bin.resolve(), peers))
    for number in range(options.turns):
        bench.turn(number, options.turns)
    perplexity = bench.perplexity()

    result = {"machine": bench.ours["machine"], "cpu_flags": cpu_watch.machine_flags(),
              "commit": bench.ours["commit"], "model": bench.ours["model"],
              "weights": bench.ours["weights"], "llamacpp": install.LLAMA_SOURCE,
              "openvino": install.openvino_pin(), "turns": options.turns,
              "threads": options.threads, "others_cpu_share": max(bench.others),
              **figures.flat(bench.samples, bench.roofline, perplexity)}
    table = figures.table(bench.samples, bench.roofline)
    print(f"\n{result['machine']}, commit {result['commit']}\n\n{table}")
    for what, value in result.items():
        if what.endswith(("_vs_best", "_rel")) or "_vs_llama" in what or "roofline_" in what:
            print(f"{what:24} {value:.4f}")
    if result["others_cpu_share"] > figures.DISTURBED:
        warn("some runs were disturbed by other processes: see above, and measure again")

    options.figures.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(result, indent=2) + "\n"), (".md", table),
                         (".svg", picture.draw(result))):
        options.figures.with_suffix(suffix).write_text(text, encoding="utf-8")
    print(f"figures in {options.figures}, table and picture beside them")


if __name__ == "__main__":
    try:
        main()
    except (install.Failure, ValueError) as failure:
        sys.exit(f"bench-peers: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
