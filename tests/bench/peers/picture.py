"""The picture of the README: bars of tokens/s from the figures. picture.py FIGURES.json > PICTURE.svg"""

import json
import sys
from xml.sax.saxutils import escape

import figures

# Each is legible on white and on GitHub's dark grey: the picture knows neither.
COLOURS = {figures.OURS: "#2da44e", figures.LLAMA: "#8b949e", figures.OPENVINO: "#5b9bd5"}
TEXT = "#7d8590"

PANELS = (("decode, 128 + 128 tokens", [(f"decode_b{b}", f"batch {b}") for b in figures.BATCHES]),
          ("prefill", [(f"prefill_p128_b{b}", f"{b} of 128") for b in figures.BATCHES]
           + [("prefill_p512_b1", "1 of 512")]),
          ("server", [(figures.SERVE, "32 streams")]))

BAR, GAP, GROUP_GAP, PANEL_GAP, MARGIN = 26, 3, 20, 36, 10
HEIGHT, TOP, BASE = 306, 82, 266  # bars stand on BASE and reach TOP at most


def text(x, y, words, size=11, anchor="middle", extra=""):
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{TEXT}"{extra}>{escape(words)}</text>')


def svg(width, height, label, parts):
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif" '
        f'role="img" aria-label="{escape(label)}">',
        *parts, "</svg>\n"])


def _bar(x, value, least, most, scale, colour):
    top = BASE - value * scale
    middle = x + BAR / 2
    parts = [f'<rect x="{x:.1f}" y="{top:.1f}" width="{BAR}" height="{BASE - top:.1f}" rx="2" '
             f'fill="{colour}"/>']
    if most > least:
        parts.append(f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{BASE - least * scale:.1f}" '
                     f'y2="{BASE - most * scale:.1f}" stroke="{TEXT}" stroke-width="1.5"/>')
    parts.append(text(middle, BASE - most * scale - 5, f"{value:.0f}", 10))
    return parts


def draw(result):
    """SVG of the flat figures; an engine without a figure has no bar there."""
    def key(engine, what):
        return f"{engine}_{what}_tokens_per_s"

    parts = []
    x = MARGIN
    for title, groups in PANELS:
        begin = x
        keys = [key(engine, what) for engine in COLOURS for what, _ in groups]
        scale = (BASE - TOP) / max(result.get(f"{k}_max", 0) for k in keys)
        for what, label in groups:
            group = x
            for engine, colour in COLOURS.items():
                k = key(engine, what)
                if k in result:
                    parts += _bar(x, result[k], result[f"{k}_min"], result[f"{k}_max"], scale,
                                  colour)
                    x += BAR + GAP
            x -= GAP
            parts.append(text((group + x) / 2, BASE + 17, label))
            x += GROUP_GAP
        x -= GROUP_GAP
        parts.append(f'<line x1="{begin - 6}" x2="{x + 6}" y1="{BASE}" y2="{BASE}" '
                     f'stroke="{TEXT}" stroke-width="1"/>')
        parts.append(text(begin, 52, title, 13, "start", ' font-weight="600"'))
        x += PANEL_GAP
    width = x - PANEL_GAP + MARGIN

    at = MARGIN
    for engine, colour in COLOURS.items():
        parts.append(f'<rect x="{at}" y="10" width="11" height="11" rx="2" fill="{colour}"/>')
        name = figures.NAMES[engine]
        parts.append(text(at + 17, 20, name, 12, "start"))
        at += 40 + 7 * len(name)
    parts.append(text(width - MARGIN, 20, "tokens/s, more is better", 12, "end"))
    parts.append(text(MARGIN, HEIGHT - 4, f"{result['machine']}; medians of {result['turns']}, "
                       "lines from least to most", 10, "start"))
    return svg(width, HEIGHT, "Tokens per second of Espalier, llama.cpp and OpenVINO GenAI", parts)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        sys.stdout.write(draw(json.load(file)))
