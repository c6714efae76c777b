"""Draw what `equal_bytes.py` stored, and print it as a table.

    bench/equal_bytes_picture.py           writes docs/equal_bytes.svg; prints Markdown

One panel for each model: bits per parameter of everything shipped against divergence from the
original, both of the same judge. Nothing is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from xml.sax.saxutils import escape

from equal_bytes import Point, best_peer, front_of, own_at, points_of
from equal_bytes_subjects import ATTAR, ATTAR_GGUF, BITS, SUBJECTS
from results_file import ROOT, Table

PICTURE = ROOT / "docs" / "equal_bytes.svg"
# One panel: its size, and the room left around its curves. Panels stand in rows of COLUMNS.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 280, 62, 14, 36, 46
COLUMNS = 2
LEGEND_LINE, LEGEND_ITEM = 24, 150
# Okabe and Ito's colours, which people with colour blindness can tell apart, and three more that
# differ from them in lightness.
COLOURS = {
    ATTAR: "#0072b2",
    ATTAR_GGUF: "#56b4e9",
    "llama_cpp": "#d55e00",
    "auto_round": "#009e73",
    "llm_compressor": "#cc79a7",
    "hqq": "#e69f00",
    "quanto": "#777777",
    "torchao": "#000000",
    "nncf_weights": "#7a4b00",
    "onnxruntime_weights": "#4b2a85",
}
NAMES = {
    ATTAR: "Attar",
    ATTAR_GGUF: "Attar, GGUF",
    "llama_cpp": "llama.cpp, imatrix",
    "auto_round": "AutoRound",
    "llm_compressor": "llm-compressor",
    "hqq": "HQQ",
    "quanto": "quanto",
    "torchao": "torchao",
    "nncf_weights": "NNCF",
    "onnxruntime_weights": "onnxruntime",
}
# Not drawn: a model of no use, and one hardly smaller than in 16 bits. A sentence encoder's nats
# add up over the numbers of its vector.
WORST_NATS, WORST_NATS_OF_ENCODER, MOST_BITS = 3.0, 100.0, 10.0

Points = Mapping[str, Sequence[Point]]


def drawn(rows: Sequence[Mapping[str, str]], model: str) -> dict[str, list[Point]]:
    """Points of every tool, smallest first."""
    own = [row for row in rows if row["model"] == model]
    found = {tool: sorted(points_of(own, tool)) for tool in NAMES}
    return {tool: points for tool, points in found.items() if points}


def draw(panels: Mapping[str, Points]) -> str:
    """All panels, and one legend below them."""
    columns = min(COLUMNS, len(panels))
    width, grid = WIDTH * columns, HEIGHT * math.ceil(len(panels) / columns)
    used = [tool for tool in NAMES if any(tool in points for points in panels.values())]
    per_line = width // LEGEND_ITEM
    height = grid + LEGEND_LINE * (math.ceil(len(used) / per_line) + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for place, (model, points) in enumerate(panels.items()):
        row, column = divmod(place, columns)
        parts.append(f'<g transform="translate({column * WIDTH} {row * HEIGHT})">')
        parts += [*panel(model, points), "</g>"]
    for place, tool in enumerate(used):
        row, column = divmod(place, per_line)
        x, y = LEFT + column * LEGEND_ITEM, grid + LEGEND_LINE * (row + 0.5)
        parts += [
            f'<circle cx="{x}" cy="{y}" r="5" fill="{COLOURS[tool]}"/>',
            f'<text x="{x + 11}" y="{y + 4}">{NAMES[tool]}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


Place = Callable[[float], float]


def panel(model: str, points: Points) -> list[str]:
    """Scales and curves of one model."""
    encodes = SUBJECTS[model].kind == "encoder"
    worst = WORST_NATS_OF_ENCODER if encodes else WORST_NATS
    shown = {
        tool: [(b, d) for b, d in of if d <= worst and b <= MOST_BITS]
        for tool, of in points.items()
    }
    every = [point for of in shown.values() for point in of]
    low = math.floor(math.log10(min(d for _, d in every)))
    high = math.ceil(math.log10(max(d for _, d in every)))
    first, last = math.floor(min(b for b, _ in every)), math.ceil(max(b for b, _ in every))

    def x(bits: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (bits - first) / (last - first), 1)

    def y(nats: float) -> float:
        share = (high - math.log10(nats)) / max(1, high - low)
        return round(TOP + (HEIGHT - TOP - BOTTOM) * share, 1)

    title = f'<text x="{LEFT}" y="22" font-weight="bold">{escape(model)}</text>'
    scales = _scales(range(first, last + 1), range(low, high + 1), x, y)
    return [title, *scales, *_curves(shown, x, y)]


def _scales(bits: range, powers: range, x: Place, y: Place) -> list[str]:
    parts, floor, middle = [], HEIGHT - BOTTOM, (LEFT + WIDTH - RIGHT) / 2
    for power in powers:
        at_power = y(10.0**power)
        parts += [
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at_power}" y2="{at_power}" '
            'stroke="#ddd"/>',
            f'<text x="{LEFT - 8}" y="{at_power + 4}" text-anchor="end">{10.0**power:g}</text>',
        ]
    for bit in bits:
        parts.append(f'<text x="{x(bit)}" y="{floor + 18}" text-anchor="middle">{bit}</text>')
    parts += [
        f'<text x="{middle}" y="{floor + 38}" text-anchor="middle">'
        "bits per parameter, everything shipped</text>",
        f'<text transform="translate(18 {(TOP + floor) / 2}) rotate(-90)" text-anchor="middle">'
        "divergence, nats</text>",
    ]
    return parts


def _curves(shown: Points, x: Place, y: Place) -> list[str]:
    parts = []
    for tool, of in reversed([(t, of) for t, of in shown.items() if of]):  # Attar on top
        colour = COLOURS[tool]
        path = " ".join(f"{x(b)},{y(d)}" for b, d in front_of(of))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(b)}" cy="{y(d)}" r="3.5" fill="{colour}"/>' for b, d in of]
    return parts


def table(rows: Sequence[Mapping[str, str]], models: Sequence[str]) -> str:
    """Attar's divergence at every target, over the best peer's there, as Markdown.

    A peer's figure is read off the line between its two nearest points, of the logarithm of the
    divergence; beyond its largest point that point stands.
    """
    head = " | ".join(f"{bits:g} bits" for bits in BITS)
    lines = [f"| model | {head} |", "|---" * (1 + len(BITS)) + "|"]
    for model in models:
        own = [row for row in rows if row["model"] == model]
        cells = " | ".join(_cell(own, bits) for bits in BITS)
        lines.append(f"| {model} | {cells} |")
    return "\n".join(lines)


def _cell(rows: Sequence[Mapping[str, str]], bits: float) -> str:
    nats, best = own_at(points_of(rows, ATTAR), bits), best_peer(rows, bits)
    if math.isnan(nats):
        return ""
    if best is None:
        return f"{nats:.2g}"
    return f"{nats:.2g}, **{nats / best[1]:.2g} ×** {NAMES[best[0]]}"


def main() -> None:
    rows = Table("equal_bytes").rows
    models = [m for m in SUBJECTS if any(row["model"] == m for row in rows)]
    panels = {model: drawn(rows, model) for model in models}
    panels = {m: p for m, p in panels.items() if ATTAR in p and len(p) > 1}
    PICTURE.write_text(draw(panels), encoding="utf-8")
    print(table(rows, list(panels)), end="\n\n")
    print(f"written: {PICTURE}")


if __name__ == "__main__":
    main()
