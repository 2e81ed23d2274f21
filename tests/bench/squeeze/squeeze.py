#!/usr/bin/env python3
"""What pruning under pressure is worth: the same open-loop load on a server that always serves the
full model, on two at fixed rungs, on one with each policy, and on llama-server, with all of the KV
memory that the load needs and with less of it. `make bench-squeeze`.

Goodput: calls with their first token within --ttft and a token every --tpot on average, per second
of arrivals. Capacity is measured first: finished calls per second of the full model, closed loop,
with all memory. Loss is as the server told it, nats per token.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import summary
import squeeze_picture
from summary import DQN, FIXED, FULL, LADDER, LLAMA, REFUSING

HERE = pathlib.Path(__file__).resolve().parent
FIGURES = pathlib.Path("build/figures/bench-squeeze.json")
PROMPT, OUTPUT, STREAMS = 128, 128, 32
PAGE_TOKENS = 16
CALM_SECONDS = 60  # some 170 calls at half the load


def load_loss(options):
    return [] if options.load_loss is None else ["--load-loss", str(options.load_loss)]


@contextlib.contextmanager
def server(options, policy, kv_bytes, *more):
    """A server's address; its process is `server.process` while it runs."""
    with tempfile.TemporaryDirectory() as folder:
        port, log = pathlib.Path(folder, "port"), pathlib.Path(folder, "log")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ESPALIER_")}
        with open(log, "wb") as out:
            process = subprocess.Popen(
                [f"{options.bin}/espalier-server", "--model", options.model, "--ladder",
                 options.ladder, "--policy", policy, "--port", "0", "--port-file", port,
                 "--metrics-port", "-1", "--kv-memory", str(kv_bytes), "--max-sequences",
                 str(STREAMS), *load_loss(options), "--ttft-target", str(options.ttft), "--tpot-target",
                 str(options.tpot), "--prefix-cache=false", *map(str, more)],
                stdout=out, stderr=out, env=environment)
        server.process = process
        try:
            while not port.exists():
                if process.poll() is not None:
                    sys.exit(f"squeeze: the server ended: {log.read_text()}")
                time.sleep(0.02)
            address = f"127.0.0.1:{port.read_text().strip()}"
            subprocess.run([f"{options.bin}/espalier", "health", "--wait", "--deadline", "120",
                            "--address", address], check=True, stdout=subprocess.DEVNULL)
            yield address
        finally:
            process.kill()
            process.wait()


def load(options, address, *arguments):
    done = subprocess.run(
        [f"{options.bin}/espalier", "load", "--address", address, "--prompt-tokens", str(PROMPT),
         "--max-tokens", str(OUTPUT), "--json", "--ttft-target", str(options.ttft),
         "--tpot-target", str(options.tpot), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    report = json.loads(done.stdout)
    report["refused"] = sum(each["calls"] for code, each in report["refusals"].items()
                            if code == "RESOURCE_EXHAUSTED")
    return report


def seconds_of(options, times):
    """Of arrivals: beyond its capacity a line that queues looks good until the queue is long."""
    return options.seconds * (1 if times <= 1 else 2.5)


class Bench:
    """The grid: what each line makes of each cell."""

    def __init__(self, options, token_bytes, rungs, need):
        self.options, self.token_bytes, self.need = options, token_bytes, need
        self.policies = {FULL: "fixed:0"} | {line: f"fixed:{rung}" for line, rung in rungs.items()}
        self.policies[LADDER] = "ladder"
        if pathlib.Path(options.ladder).with_suffix(".dqn").exists():
            self.policies[DQN] = "dqn"
        self.llama = None
        self.traffic = FIGURES.with_name("squeeze.traffic")
        self.traffic.parent.mkdir(parents=True, exist_ok=True)

    def with_llama(self):
        """llama.cpp, which is built once where bench-peers has it."""
        sys.path.insert(0, str(HERE.parent / "peers"))
        import engines  # noqa: E402
        import install  # noqa: E402
        model = pathlib.Path(self.options.model)
        peers = install.install_llama(pathlib.Path(self.options.peers).resolve())
        install.convert_llama(peers, model)
        self.llama = engines.Setup(model, len(os.sched_getaffinity(0)), None, peers)

    def cell(self, taken, times, capacity, llama):
        seconds = seconds_of(self.options, times)
        kv_bytes = int(self.need * (1 - taken))
        reports = {}
        lines = dict(self.policies)
        if times > 1:  # below the capacity nobody is refused
            lines[REFUSING] = "ladder"
        for line, policy in lines.items():
            own = argparse.Namespace(**vars(self.options))
            if line == REFUSING:
                own.load_loss = 0
            with server(own, policy, kv_bytes) as address:
                report = load(self.options, address, "--rate", capacity * times, "--duration",
                              seconds, "--seed", 7, "--traffic-out", self.traffic, "--give-up")
            reports[line] = {"goodput": report["good"] / seconds,
                             "refused": report["refused"], "calls": report["calls"],
                             "loss": report["told_loss"]}
        reports[LADDER]["simulated"] = simulated(self.options, self.traffic, kv_bytes) / seconds
        if llama:
            reports[LLAMA] = self.llama_report(taken, kv_bytes, seconds)
        return reports

    def llama_report(self, taken, kv_bytes, seconds):
        """The better of its two ways to share the KV, which with all of it are one."""
        import llama_line  # noqa: E402
        reports = [llama_line.run(self.llama, kind, self.traffic, int(kv_bytes / self.token_bytes),
                                  (STREAMS, PROMPT, OUTPUT), (self.options.ttft, self.options.tpot))
                   for kind in llama_line.KINDS[:2 if taken > 0 else 1]]
        best = max(reports, key=lambda report: (report["good"], report["finished"]))
        # It refuses none: what fails, fails because its KV is full.
        return {"goodput": best["good"] / seconds, "refused": best["failed"],
                "calls": best["calls"], "loss": 0}


def simulated(options, traffic, kv_bytes):
    """Good calls that the simulator says of the rule on the same calls."""
    done = subprocess.run(
        [f"{options.bin}/espalier", "simulate", "--ladder", options.ladder, "--costs",
         options.costs, "--policy", "ladder", "--traffic", traffic, "--kv-memory",
         str(kv_bytes / 2**20), "--max-sequences", str(STREAMS), *load_loss(options), "--ttft-target",
         str(options.ttft), "--tpot-target", str(options.tpot), "--json"],
        check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)["good"]


def cost_without_squeeze(options, capacity, kv_bytes):
    """Of the full model's good calls at half the load with all memory, the share that the rule
    loses; and the rule's median TPOT over the full model's. In turns, and then back again: a
    machine that slows down does so for both."""
    good, tpot = {"fixed:0": 0, "ladder": 0}, {"fixed:0": 0, "ladder": 0}
    for turn, policy in enumerate(("fixed:0", "ladder", "ladder", "fixed:0")):
        with server(options, policy, kv_bytes) as address:
            report = load(options, address, "--rate", 0.5 * capacity, "--duration",
                          CALM_SECONDS / 2, "--seed", 11 + turn // 2)
        good[policy] += report["good"]
        tpot[policy] += report["tpot_p50_s"]
    return 1 - good["ladder"] / good["fixed:0"], tpot["ladder"] / tpot["fixed:0"]


def recovery(options, rate, kv_bytes):
    """Seconds from the last sign of pressure to rung 0, and the dwells that these take at least."""
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder, "decisions")
        with server(options, "ladder", kv_bytes, "--decision-log", log) as address:
            load(options, address, "--rate", 3 * rate, "--duration", 5, "--seed", 8)
            load(options, address, "--rate", 0.3 * rate, "--duration", 8, "--seed", 9)
            time.sleep(0.5)
        rule, *lines = map(json.loads, log.read_text().splitlines())
    decisions = [line for line in lines if "time_s" in line]
    pressed = [each for each in decisions
               if each["oldest_wait_s"] >= rule["wait"][0] * rule["ttft_target_s"]
               or each["step_s"] >= rule["step"][0] * rule["tpot_target_s"]
               or each["kv_used"] > 1]
    if not pressed:
        return None
    last, hardest = pressed[-1]["time_s"], max(each["rung"] for each in decisions)
    back = next((each["time_s"] - last for each in decisions
                 if each["time_s"] > last and each["rung"] == 0), None)
    return None if back is None else (back, hardest * rule["lower_dwell_s"])


def resident(process):
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])


def freed_over_planned(options, kv_bytes):
    """Of the bytes that a budget takes away while all streams run, the share by which resident
    memory is less two seconds later: the lesser of two budgets. One takes a third of the KV, the
    other all that is in use and a quarter of the weights, so that weights have to leave too."""
    shares = {}
    for beyond_kv in (False, True):
        with server(options, "ladder", kv_bytes, "--admin") as address:
            def ledger(*size):
                told = subprocess.run([f"{options.bin}/espalier", "budget", *map(str, size),
                                       "--address", address], check=True, text=True,
                                      stdout=subprocess.PIPE).stdout
                return {part: float(mib) * 2**20 for part, mib in
                        re.findall(r"(weights|released|KV) ([\d.]+) ?MiB", told)
                        + [("released", mib) for mib in re.findall(r"\(and ([\d.]+) ?MiB", told)]}

            streams = subprocess.Popen(
                [f"{options.bin}/espalier", "load", "--address", address, "--prompt-tokens",
                 str(PROMPT), "--max-tokens", str(OUTPUT), "--requests", str(6 * STREAMS),
                 "--concurrency", str(STREAMS), "--json"], stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL)
            time.sleep(6)
            before, held = resident(server.process), ledger()
            planned = held["KV"] + held["weights"] / 4 if beyond_kv else kv_bytes // 3
            ledger(int(before - planned))
            time.sleep(2)
            shares[beyond_kv] = (before - resident(server.process)) / planned
            print(f"budget less {planned / 1e6:.0f} MB: {shares[beyond_kv]:.2f} of them free, "
                  f"{ledger().get('released', 0) / 1e6:.0f} MB of them weights")
            streams.kill()
            streams.wait()
    return min(shares.values())


def told_over_measured(options, rate, kv_bytes):
    """live_loss.py on a server with the rule, at 1.5 times the full model's capacity; None without
    the Python packages, or texts."""
    python = subprocess.run([HERE.parents[2] / "tools/scripts/python_env.sh"], text=True,
                            stdout=subprocess.PIPE, check=False)
    if python.returncode != 0:
        return None
    texts = pathlib.Path("build/ladders/texts")
    if not list(texts.glob("test/*.txt")):
        subprocess.run([sys.executable, HERE.parent / "pruning/texts.py", texts], check=True,
                       stdout=subprocess.DEVNULL)
    paths = sorted(texts.glob("test/*.txt"))
    if not paths:
        return None
    with server(options, "ladder", kv_bytes, "--quality-check", 0) as address:
        with subprocess.Popen(
                [f"{options.bin}/espalier", "load", "--address", address, "--prompt-tokens",
                 str(PROMPT), "--max-tokens", str(OUTPUT), "--rate", str(1.5 * rate), "--duration",
                 str(options.live_seconds), "--seed", "10", "--json"], stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL):
            done = subprocess.run([python.stdout.strip(), HERE / "live_loss.py", address,
                                   str(options.live_seconds), *paths], check=True, text=True,
                                  stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def picture_of(figures, cells):
    return squeeze_picture.draw(cells, f"{figures['machine']}, commit {figures['commit']}")


def finish(figures, cells):
    """Writes figures, table and picture, and tells them."""
    FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
    FIGURES.with_suffix(".md").write_text(summary.markdown(cells))
    FIGURES.with_suffix(".svg").write_text(picture_of(figures, cells))
    told = figures.keys() - summary.flat(cells).keys()
    for name, value in figures.items():
        if name in told and isinstance(value, float):
            print(f"{name} {value:.3f}")
    print(f"figures: {FIGURES}, table and picture beside it")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--ladder", required=True)
    parser.add_argument("--bin", default="build/release/bin")
    parser.add_argument("--peers", default="build/peers", help="where llama.cpp is, or will be")
    parser.add_argument("--seconds", type=float, default=6,
                        help="of arrivals, for each figure; 2.5 times that beyond the capacity")
    parser.add_argument("--live-seconds", type=float, default=30,
                        help="in which texts are scored under load, for told_over_measured")
    parser.add_argument("--ttft", type=float, default=2)
    parser.add_argument("--tpot", type=float, default=0.08)
    parser.add_argument("--load-loss", type=float, help="nats a token; the server's default unless told")
    parser.add_argument("--loads", default="0.5,1,2,3", help="shares of the full model's capacity")
    parser.add_argument("--taken", default="0,0.35,0.7", help="shares of the KV memory taken away")
    parser.add_argument("--costs", type=pathlib.Path, help="what `espalier simulate` goes by; "
                        "unless told, `espalier bench --fit` times this machine first, three minutes")
    parser.add_argument("--no-llama", action="store_true", help="leave out llama-server")
    parser.add_argument("--markdown", action="store_true",
                        help="run nothing: print the last run's table as the README has it, and "
                        "make its picture the README's")
    options = parser.parse_args()
    if options.markdown:
        figures = json.loads(FIGURES.read_text())
        cells = summary.cells_of(figures)
        sys.stdout.write(summary.markdown(cells))
        (HERE / "squeeze.svg").write_text(picture_of(figures, cells))
        return
    token_bytes, left_out = summary.ladder_of(pathlib.Path(options.ladder).read_text())
    rungs = {line: summary.rung_of(left_out, share) for line, share in FIXED.items()}
    need = int(token_bytes * STREAMS * (PROMPT + OUTPUT + PAGE_TOKENS))
    bench = Bench(options, token_bytes, rungs, need)
    if not options.no_llama:
        bench.with_llama()
    if options.costs is None:
        options.costs = FIGURES.with_name("squeeze.costs")
        subprocess.run([f"{options.bin}/espalier", "bench", "--model", options.model, "--ladder",
                        options.ladder, "--fit", options.costs], check=True)
    with server(options, "fixed:0", need) as address:
        load(options, address, "--requests", STREAMS, "--concurrency", STREAMS, "--seed", 90)
        closed = load(options, address, "--requests", 4 * STREAMS, "--concurrency", STREAMS,
                      "--seed", 91)
    capacity = closed["finished"] / closed["seconds"]
    print(f"capacity of the full model: {capacity:.2f} calls/s of {PROMPT} + {OUTPUT} tokens, "
          f"{closed['tokens_per_s']:.0f} tokens/s, {need / 1e6:.0f} MB of KV\n"
          + ", ".join(f"{line}: rung {rung}, {left_out[rung]:.1%} of the channels"
                      for line, rung in rungs.items())
          + "\ngood calls/s, refused or failed, told loss", flush=True)
    taken = list(map(float, options.taken.split(",")))
    cells = {}
    for share in taken:
        for times in map(float, options.loads.split(",")):
            if share not in (min(taken), max(taken)) and times not in (1, 2):
                continue  # what lies between is told by fewer
            # llama-server: with all memory and at the worst squeeze.
            llama = bench.llama is not None and share in (min(taken), max(taken))
            cells[share, times] = bench.cell(share, times, capacity, llama)
            print(f"{share:5.0%} {times:4.1f}x " + "".join(
                f" {line} {report['goodput']:.2f} {report['refused']} {report['loss']:.3f}"
                for line, report in cells[share, times].items()), flush=True)
    figures = {"capacity_calls_per_s": capacity, "seconds": options.seconds}
    figures |= summary.flat(cells) | summary.ratios(cells, lambda times: seconds_of(options, times))
    figures["cost_without_squeeze"], figures["tpot_without_squeeze"] = cost_without_squeeze(
        options, capacity, need)
    recovered = recovery(options, capacity, need)
    if recovered is not None:
        figures["recovery_s"], figures["recovery_dwells_s"] = recovered
    figures["rss_freed_over_planned"] = freed_over_planned(options, need)
    live = told_over_measured(options, capacity, need)
    if live is not None:
        print(f"texts scored under load: {live}")
        figures["told_over_measured"] = live["told"] / live["measured"]
        figures["measured_loss_live"] = live["measured"]
        figures["measured_loss_live_error"] = live["standard_error"]
    subprocess.run([pathlib.Path(options.bin, "policy_bench")], check=True)
    for task, figure in (("serve", "dqn_vs_ladder"), ("rap", "rap_dqn_vs_greedy")):
        trained = pathlib.Path(f"build/figures/train-{task}.json")
        if trained.exists():  # by `espalier train`, whenever that was
            told = json.loads(trained.read_text())
            figures[figure], figures[f"{figure}_commit"] = told[figure], told["commit"]
        else:
            print(f"{figure} is left out: `espalier train --task {task}` has not run here")
    # With the machine and the commit.
    figures = json.loads(FIGURES.with_name("bench-policy.json").read_text()) | figures
    finish(figures, cells)


if __name__ == "__main__":
    main()
