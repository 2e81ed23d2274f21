"""What the samples of all turns come to: medians, ratios, the flat figures, a table. Pure.

Samples are {engine: {what: [a value a turn]}}, in tokens/s, seconds or shares.
"""

import json
import statistics

OURS, LLAMA, OPENVINO = "espalier", "llamacpp", "openvino"
NAMES = {OURS: "Espalier", LLAMA: "llama.cpp", OPENVINO: "OpenVINO GenAI"}
PEERS = (LLAMA, OPENVINO)

BATCHES = (1, 8, 32)
DECODE = tuple(f"decode_b{batch}" for batch in BATCHES)
PREFILL = tuple(f"prefill_p128_b{batch}" for batch in BATCHES) + ("prefill_p512_b1",)
SPEEDS = DECODE + PREFILL
SERVE, COLD_START = "serve_b32", "cold_start"

# Others' share of the cores above which figures are too low to be believed.
DISTURBED = 0.05

ROWS = ([(f"decode_b{b}", f"decode, batch {b}, 128 + 128", "tokens/s") for b in BATCHES]
        + [(f"prefill_p128_b{b}", f"prefill, batch {b} of 128", "tokens/s") for b in BATCHES]
        + [("prefill_p512_b1", "prefill, 1 of 512", "tokens/s"),
           (SERVE, "server, 32 streams, 128 + 128", "tokens/s"),
           (COLD_START, "cold start to first token (less is better)", "s")])


def parse_bench(text):
    """The figures file of `espalier bench`: (speeds, shares of the roofline), by our names."""
    figures = json.loads(text)
    prefix = {what: what.replace("decode_", "decode_p128_") for what in SPEEDS}
    return ({what: figures[prefix[what] + "_tokens_per_s"] for what in SPEEDS},
            {what: figures[prefix[what] + "_roofline_share"] for what in SPEEDS})


def parse_lines(text):
    """The JSON lines of llama-batched-bench or openvino_engine.py, among others: speeds."""
    speeds = {}
    for line in text.splitlines():
        if not line.startswith("{"):
            continue
        shape = json.loads(line)
        speeds[f"prefill_p{shape['pp']}_b{shape['pl']}"] = shape["speed_pp"]
        if shape["tg"] > 1:
            speeds[f"decode_b{shape['pl']}"] = shape["speed_tg"]
    missing = [what for what in SPEEDS if not speeds.get(what, 0) > 0]
    if missing:
        raise ValueError(f"no speed of {', '.join(missing)}")
    return speeds


def streamed_tokens(lines):
    """Of the lines of a llama-server stream: tokens drawn, by the stream's last message."""
    last = None
    for line in lines:
        if line.startswith(b"data: "):
            last = line
        elif line.startswith(b"error: "):
            raise ValueError(line.decode(errors="replace").strip())
    message = json.loads(last[len(b"data: "):]) if last else {}
    if not message.get("stop"):
        raise ValueError("a stream ended before its last message")
    return message["tokens_predicted"]


def others_share(busy_seconds, own_seconds, wall_seconds, cores):
    """The share of the cores that neither was idle nor went to us and our children."""
    return min(max((busy_seconds - own_seconds) / (wall_seconds * cores), 0.0), 1.0)


def merge(samples, engine, values):
    """Appends a turn's values to the samples."""
    for what, value in values.items():
        samples.setdefault(engine, {}).setdefault(what, []).append(value)


def best_peer(samples, what):
    """(engine, median) of the peer that is better at `what`; a cold start is better if shorter."""
    medians = [(statistics.median(samples[peer][what]), peer) for peer in PEERS
               if what in samples.get(peer, {})]
    value, peer = min(medians) if what == COLD_START else max(medians)
    return peer, value


def ratio(samples, what):
    """Our median over the better peer's."""
    return statistics.median(samples[OURS][what]) / best_peer(samples, what)[1]


def flat(samples, roofline, perplexity):
    """Keys to numbers. `roofline`: {what: [a share a turn]}; `perplexity`: {name: ppl}, one f32."""
    figures = {f"{what}_vs_best": ratio(samples, what) for what in DECODE}
    # One figure for all shapes: the shape that we are worst at.
    figures["prefill_vs_best"] = min(ratio(samples, what) for what in PREFILL)
    figures["serve_b32_vs_llamaserver"] = ratio(samples, SERVE)
    figures["cold_start_vs_llamacpp"] = ratio(samples, COLD_START)
    shares = {what: statistics.median(values) for what, values in roofline.items()}
    figures |= {f"roofline_{what}": shares[what] for what in DECODE}
    figures["roofline_prefill"] = min(shares[what] for what in PREFILL)
    if perplexity:
        figures |= {f"ppl_{name}": value for name, value in perplexity.items()}
        figures |= {f"ppl_{name}_rel": value / perplexity["f32"] - 1
                    for name, value in perplexity.items() if name != "f32"}
    for engine, whats in samples.items():
        for what, unit in ((row[0], row[2]) for row in ROWS if row[0] in whats):
            key = f"{engine}_{what}_{'s' if unit == 's' else 'tokens_per_s'}"
            figures[key] = statistics.median(whats[what])
            figures[key + "_min"], figures[key + "_max"] = min(whats[what]), max(whats[what])
    return figures


def table(samples, roofline):
    """Markdown: median (min to max) of each engine, our share of the roofline, our ratio."""
    def cell(engine, what, unit):
        values = samples.get(engine, {}).get(what)
        if not values:
            return ""
        digits = 2 if unit == "s" else 0
        low, middle, high = (f"{value:.{digits}f}" for value in
                             (min(values), statistics.median(values), max(values)))
        return f"{middle} ({low} to {high})" if len(values) > 1 else middle

    lines = [f"| median (min to max) | {' | '.join(NAMES.values())} | to the better | roofline |",
             "|---|---|---|---|---|---|"]
    for what, title, unit in ROWS:
        share = f"{100 * statistics.median(roofline[what]):.0f} %" if what in roofline else ""
        cells = [f"{title}, {unit}", *(cell(engine, what, unit) for engine in NAMES),
                 f"**{ratio(samples, what):.2f}x**", share]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
