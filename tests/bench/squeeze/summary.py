"""What the cells of bench-squeeze come to: flat figures, the README's table. Pure."""

import re

# REFUSING: the rule at the full model, which prunes only where memory makes it: what refusing in
# time is worth by itself.
FULL, REFUSING, LADDER, DQN, LLAMA = "full", "refusing", "ladder", "dqn", "llamaserver"
FIXED = {"fixed_20": 0.2, "fixed_40": 0.4}  # line: share of all MLP channels left out
NAMES = {FULL: "full model", REFUSING: "full, refusing", "fixed_20": "fixed 20 %", "fixed_40": "fixed 40 %", LADDER: "`ladder`",
         DQN: "`dqn`", LLAMA: "llama-server"}
# `simulated`: of the rule, the goodput that `espalier simulate` tells.
MEASURES = ("goodput", "refused", "calls", "loss", "simulated")


def ladder_of(text):
    """KV bytes a token of rung 0, and [rungs] the share of all MLP channels left out."""
    rungs = re.findall(r"^rung \d+ .*$", text, re.M)
    kept = []
    for rung in rungs:
        channels = re.search(r"channels=(\S+)", rung)
        pairs = (part.partition("*") for part in channels[1].split(",")) if channels else ()
        kept.append(sum(int(width) * int(count or 1) for width, _, count in pairs))
    whole = max(int(width) * int(layers) for layers, width in
                re.findall(r"^model layers=(\d+) .*channels=(\d+)", text, re.M))
    bytes_ = float(re.search(r"kv_bytes=([\d.]+)", rungs[0])[1])
    return bytes_, [1 - (each or whole) / whole for each in kept]


def rung_of(left_out, share):
    """The pruned rung that is nearest to leaving out `share` of the channels."""
    return min(range(1, len(left_out)), key=lambda rung: abs(left_out[rung] - share))


def key(measure, line, cell):
    taken, load = cell
    return f"{measure}_{line}_taken{round(100 * taken)}_load{round(100 * load)}"


def flat(cells):
    """{(taken, load): {line: {measure: number}}} as flat figures."""
    return {key(measure, line, cell): report[measure] for cell, lines in cells.items()
            for line, report in lines.items() for measure in MEASURES if measure in report}


def cells_of(figures):
    """The inverse of flat()."""
    cells = {}
    for name, value in figures.items():
        found = re.fullmatch(rf"({'|'.join(MEASURES)})_(.+)_taken(\d+)_load(\d+)", name)
        if found:
            cell = (int(found[3]) / 100, int(found[4]) / 100)
            cells.setdefault(cell, {}).setdefault(found[2], {})[found[1]] = value
    return dict(sorted(cells.items()))


def ratios(cells, seconds):
    """The figures that compare lines. A line that finished no call in time counts as one that
    finished one in the seconds(load) of a run: no ratio is made of nothing."""
    def goodput(line, cell):
        return max(cells[cell][line]["goodput"], 1 / seconds(cell[1]))

    figures = {}
    worst = max(taken for taken, _ in cells)
    if (worst, 2) in cells:
        figures["goodput_vs_dense"] = goodput(LADDER, (worst, 2)) / goodput(FULL, (worst, 2))
        if REFUSING in cells[worst, 2]:
            figures["goodput_vs_refusing"] = (goodput(LADDER, (worst, 2))
                                              / goodput(REFUSING, (worst, 2)))
    best = {cell: max(FIXED, key=lambda line, cell=cell: goodput(line, cell)) for cell in cells}
    figures["goodput_vs_best_fixed"] = min(goodput(LADDER, cell) / goodput(best[cell], cell)
                                           for cell in cells)
    figures["loss_vs_best_fixed"] = (sum(lines[LADDER]["loss"] for lines in cells.values())
                                     / sum(cells[cell][best[cell]]["loss"] for cell in cells))
    errors = sorted(abs(lines[LADDER]["simulated"] / goodput(LADDER, cell) - 1)
                    for cell, lines in cells.items() if "simulated" in lines[LADDER])
    if errors:
        figures["simulator_error"] = errors[-1]
        figures["simulator_error_median"] = errors[len(errors) // 2]
    # Below the capacity nobody queues, and at it the rule may finish all calls that there are.
    llama = {cell[1]: goodput(LADDER, cell) / goodput(LLAMA, cell)
             for cell, lines in cells.items() if LLAMA in lines and cell[0] == worst}
    if beyond := [ratio for times, ratio in llama.items() if times > 1]:
        figures["goodput_vs_llamaserver"] = min(beyond)
    if 1 in llama:
        figures["goodput_vs_llamaserver_at_capacity"] = llama[1]
    learned = [goodput(DQN, cell) / goodput(LADDER, cell) for cell, lines in cells.items()
               if DQN in lines]
    if learned:
        figures["dqn_goodput_vs_ladder"] = min(learned)
    return figures


def _told(report, most):
    text = f"{report['goodput']:.2f}"
    if report["goodput"] == most:
        text = f"**{text}**"
    if report.get("loss"):
        text += f" ({report['loss']:.3f})"
    if report.get("refused"):
        text += f", {report['refused']} of {report['calls']} refused"
    return text


def markdown(cells):
    lines = [line for line in NAMES if any(line in cell for cell in cells.values())]
    rows = ["| KV memory taken | load | " + " | ".join(NAMES[line] for line in lines) + " |",
            "|---" * (len(lines) + 2) + "|"]
    for (taken, load), reports in cells.items():
        most = max(report["goodput"] for report in reports.values())
        told = (_told(reports[line], most) if line in reports else "" for line in lines)
        rows.append(f"| {taken:.0%} | {load:g}x | ".replace("%", " %") + " | ".join(told) + " |")
    return "\n".join(rows) + "\n"
