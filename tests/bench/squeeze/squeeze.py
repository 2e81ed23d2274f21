#!/usr/bin/env python3
"""What pruning under pressure is worth: the same open-loop load on a server that always serves the
full model, on one at each of two fixed rungs, and on one whose policy chooses, with all of the KV
memory that the load needs and with less of it. `make bench-squeeze`.

Goodput: calls that finished with their first token within --ttft and a token every --tpot on
average, per second of the run. Capacity is measured first: finished calls per second of the full
model, closed loop, with all memory. Loss is as the server told it, nats per token.
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

PROMPT, OUTPUT, STREAMS = 128, 128, 32
PAGE_TOKENS = 16


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
                 str(STREAMS), "--ttft-target", str(options.ttft), "--tpot-target",
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
    report["refused"] = sum(each["calls"] for each in report["refusals"].values())
    report["goodput"] = report["good"] / report["seconds"]
    return report


def simulated(options, traffic, kv_bytes):
    """What the simulator says of the policy on the same calls; None without costs."""
    if not options.costs.exists():
        return None
    done = subprocess.run(
        [f"{options.bin}/espalier", "simulate", "--ladder", options.ladder, "--costs",
         options.costs, "--policy", "ladder", "--traffic", traffic, "--kv-memory",
         str(kv_bytes / 2**20), "--max-sequences", str(STREAMS), "--ttft-target",
         str(options.ttft), "--tpot-target", str(options.tpot), "--json"],
        check=True, stdout=subprocess.PIPE, text=True)
    report = json.loads(done.stdout)
    # As the load generator counts: over the seconds until the last call ended.
    return report["good"] / report["seconds"]


def recovery(options, rate, kv_bytes):
    """Seconds from the last sign of pressure to rung 0, and the dwells that these take at least."""
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder, "decisions")
        with server(options, "ladder", kv_bytes, "--decision-log", log) as address:
            load(options, address, "--rate", 3 * rate, "--duration", 5, "--seed", 8)
            load(options, address, "--rate", 0.3 * rate, "--duration", 8, "--seed", 9)
            time.sleep(0.5)
        rule, *decisions = map(json.loads, log.read_text().splitlines())
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


def ladder_of(path):
    """(kv bytes a token of rung 0, number of the last rung)."""
    rungs = re.findall(r"^rung (\d+) .*?kv_bytes=([\d.]+)", pathlib.Path(path).read_text(), re.M)
    return float(rungs[0][1]), int(rungs[-1][0])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--ladder", required=True)
    parser.add_argument("--bin", default="build/release/bin")
    parser.add_argument("--seconds", type=float, default=15, help="of arrivals, for each figure")
    parser.add_argument("--ttft", type=float, default=2)
    parser.add_argument("--tpot", type=float, default=0.08)
    parser.add_argument("--loads", default="0.5,1,2", help="shares of the full model's capacity")
    parser.add_argument("--taken", default="0,0.4,0.7", help="shares of the KV memory taken away")
    options = parser.parse_args()
    options.costs = pathlib.Path(options.ladder).with_suffix(".costs")
    token_bytes, last = ladder_of(options.ladder)
    need = int(token_bytes * STREAMS * (PROMPT + OUTPUT + PAGE_TOKENS))
    mild, hard = max(1, last // 4), max(1, last // 2)
    policies = {"full": "fixed:0", f"fixed {mild}": f"fixed:{mild}", f"fixed {hard}": f"fixed:{hard}",
                "policy": "ladder"}
    if pathlib.Path(options.ladder).with_suffix(".dqn").exists():
        policies["learned"] = "dqn"
    with server(options, "fixed:0", need) as address:
        load(options, address, "--requests", STREAMS, "--concurrency", STREAMS, "--seed", 90)
        closed = load(options, address, "--requests", 4 * STREAMS, "--concurrency", STREAMS,
                      "--seed", 91)
    capacity = closed["finished"] / closed["seconds"]
    print(f"capacity of the full model: {capacity:.2f} calls/s of {PROMPT} + {OUTPUT} tokens, "
          f"{closed['tokens_per_s']:.0f} tokens/s, {need / 1e6:.0f} MB of KV\n")
    print(f"{'KV taken':>9}{'load':>6}{'':>3}" + "".join(f"{name:>34}" for name in policies))
    print(f"{'':>18}" + "".join(f"{'good/s':>12}{'refused':>10}{'told loss':>12}" for _ in policies))
    figures, ratios, off = {"capacity_calls_per_s": capacity}, {}, []
    for taken in map(float, options.taken.split(",")):
        for times in map(float, options.loads.split(",")):
            line = f"{taken:9.0%}{times:5.1f}x{'':>3}"
            cells, kv_bytes = {}, int(need * (1 - taken))
            for name, policy in policies.items():
                traffic = pathlib.Path("build/figures/squeeze.traffic")
                traffic.parent.mkdir(parents=True, exist_ok=True)
                with server(options, policy, kv_bytes) as address:
                    report = load(options, address, "--rate", capacity * times, "--duration",
                                  options.seconds, "--seed", 7, "--traffic-out", traffic)
                if name == "policy":
                    predicted = simulated(options, traffic, kv_bytes)
                    if predicted is not None:
                        off.append(abs(predicted / max(report["goodput"], 1e-9) - 1))
                cells[name] = report
                line += f"{report['goodput']:12.2f}{report['refused']:10}{report['told_loss']:12.3f}"
                key = f"{name.replace(' ', '_')}_kv{round(100 * (1 - taken))}_load{round(100 * times)}"
                figures[f"goodput_{key}"] = report["goodput"]
                figures[f"loss_{key}"] = report["told_loss"]
            print(line, flush=True)
            ratios[taken, times] = cells
    worst = ratios[max(taken for taken, _ in ratios), 2.0] if any(
        times == 2.0 for _, times in ratios) else None
    fixed = [name for name in policies if name.startswith("fixed")]
    if worst is not None:
        figures["goodput_vs_dense"] = worst["policy"]["goodput"] / max(worst["full"]["goodput"], 1e-9)
    best = [(cells["policy"]["goodput"] / max(cells[name]["goodput"], 1e-9),
             cells["policy"]["told_loss"] / max(cells[name]["told_loss"], 1e-9))
            for cells in ratios.values()
            for name in [max(fixed, key=lambda each: cells[each]["goodput"])]]
    figures["goodput_vs_best_fixed"] = min(goodput for goodput, _ in best)
    figures["loss_vs_best_fixed"] = max(loss for _, loss in best)
    calm = ratios.get((0.0, 0.5))
    if calm is not None:
        figures["cost_without_squeeze"] = 1 - (calm["policy"]["goodput"]
                                               / max(calm["full"]["goodput"], 1e-9))
    if "learned" in policies:
        figures["learned_vs_policy_goodput"] = min(
            cells["learned"]["goodput"] / max(cells["policy"]["goodput"], 1e-9)
            for cells in ratios.values())
    if off:
        figures["simulator_error"] = max(off)
        figures["simulator_error_median"] = sorted(off)[len(off) // 2]
    recovered = recovery(options, capacity, need)
    if recovered is not None:
        figures["recovery_s"], figures["recovery_dwells_s"] = recovered
    figures["rss_freed_over_planned"] = freed_over_planned(options, need)
    policy_bench = pathlib.Path(options.bin, "policy_bench")
    subprocess.run([policy_bench], check=True)
    for task, figure in (("serve", "dqn_vs_ladder"), ("rap", "rap_dqn_vs_greedy")):
        trained = pathlib.Path(f"build/figures/train-{task}.json")
        if trained.exists():  # by `espalier train`, whenever that was
            figures[figure] = json.loads(trained.read_text())[figure]
    # With the machine and the commit.
    figures = json.loads(pathlib.Path("build/figures/bench-policy.json").read_text()) | figures
    out = pathlib.Path("build/figures")
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench-squeeze.json").write_text(json.dumps(figures, indent=2) + "\n")
    for name in ("goodput_vs_dense", "goodput_vs_best_fixed", "loss_vs_best_fixed",
                 "cost_without_squeeze", "learned_vs_policy_goodput", "simulator_error",
                 "simulator_error_median", "recovery_s", "recovery_dwells_s", "rss_freed_over_planned",
                 "policy_p99_us"):
        if name in figures:
            print(f"{name} {figures[name]:.3f}")
    print(f"figures: {out}/bench-squeeze.json")


if __name__ == "__main__":
    main()
