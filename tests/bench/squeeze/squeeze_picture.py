"""The picture of the README: goodput over load, a panel for each share of memory taken."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "peers"))
import picture  # noqa: E402
import summary  # noqa: E402

# Each is legible on white and on GitHub's dark grey.
COLOURS = {summary.LADDER: "#2da44e", summary.DQN: "#9a6dd7", "fixed_20": "#5b9bd5",
           "fixed_40": "#d4943a", summary.FULL: "#cf6679", summary.REFUSING: "#a05252",
           summary.LLAMA: "#8b949e"}
WIDTH, HEIGHT, TOP, BASE, MARGIN = 330, 320, 72, 258, 40  # WIDTH: of a panel


def _points(cells, taken, line):
    return [(load, lines[line]["goodput"]) for (each, load), lines in sorted(cells.items())
            if each == taken and line in lines]


def draw(cells, where):
    """SVG of the first and the last share of memory taken; `where` it was measured."""
    taken = sorted({each for each, _ in cells})
    panels = taken[:1] + taken[1:][-1:]
    loads = [load for _, load in cells]
    most = max(report["goodput"] for lines in cells.values() for report in lines.values())
    parts = []
    for number, share in enumerate(panels):
        left = MARGIN + number * (WIDTH + MARGIN)

        def at(load, goodput, left=left):
            return (left + WIDTH * load / max(loads),
                    BASE - (BASE - TOP) * goodput / max(most, 1e-9))

        title = "all of the KV memory" if share == 0 else f"{share:.0%} of it taken away"
        parts.append(picture.text(left, 56, title.replace("%", " %"), 13, "start",
                                  ' font-weight="600"'))
        for tick in range(int(most) + 1):
            if tick % max(1, round(most / 5)) == 0:
                y = at(0, tick)[1]
                parts.append(f'<line x1="{left}" x2="{left + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" '
                             f'stroke="{picture.TEXT}" stroke-width="0.4"/>')
                parts.append(picture.text(left - 6, y + 4, f"{tick}", 10, "end"))
        for load in sorted(set(loads)):
            parts.append(picture.text(at(load, 0)[0], BASE + 16, f"{load:g}x", 10))
        for line, colour in reversed(COLOURS.items()):  # the rule lies on top
            points = [at(*point) for point in _points(cells, share, line)]
            if points:
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
                parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" '
                             'stroke-width="2.2"/>')
                parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{colour}"/>'
                          for x, y in points]
    x = MARGIN
    for line, colour in COLOURS.items():
        if any(line in lines for lines in cells.values()):
            name = summary.NAMES[line].strip("`")
            parts.append(f'<rect x="{x}" y="12" width="11" height="11" rx="2" fill="{colour}"/>')
            parts.append(picture.text(x + 17, 22, name, 12, "start"))
            x += 42 + 7 * len(name)
    width = MARGIN + len(panels) * (WIDTH + MARGIN)
    parts.append(picture.text(MARGIN, BASE + 36, "calls a second that came in time, over the load "
                              "as a multiple of what the full model can serve", 11, "start"))
    parts.append(picture.text(MARGIN, HEIGHT - 6, where, 10, "start"))
    return picture.svg(width, HEIGHT, "Goodput over load of seven ways to serve", parts)
