"""The picture of size against damage: places on two log scales, in the drawing's own units."""

from __future__ import annotations

from math import ceil, floor, log10
from typing import TYPE_CHECKING, Any

from attar.report import wording

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attar.records import FrontierPoint

# What the edges leave for the scales, and how far apart two sizes are written.
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 26, 48
APART = 82


def draw_frontier(points: Sequence[FrontierPoint], width: int, height: int) -> dict[str, Any]:
    """Line, marks and scale lines. A point that loses nothing has no place on a log scale."""
    empty = {"width": width, "height": height, "left": LEFT, "floor": height - BOTTOM}
    shown = [(i, p) for i, p in enumerate(points) if p.corrected_damage > 0]
    if not shown:
        return {**empty, "line": "", "marks": [], "sizes": [], "nats": []}
    damages = [d for _, p in shown for d in (p.corrected_damage, _drawn(p))]
    sizes = [p.weight_bytes for _, p in shown]
    low, high = floor(log10(min(damages))), ceil(log10(max(damages)))
    high = max(high, low + 1)

    def x(size: int) -> float:
        span = log10(max(sizes) / min(sizes)) or 1.0
        return round(LEFT + (width - LEFT - RIGHT) * log10(size / min(sizes)) / span, 1)

    def y(nats: float) -> float:
        return round(TOP + (height - TOP - BOTTOM) * (high - log10(nats)) / (high - low), 1)

    return {
        **empty,
        "line": " ".join(f"{x(p.weight_bytes)},{y(p.corrected_damage)}" for _, p in shown),
        "marks": [
            {
                "index": index,
                "x": x(p.weight_bytes),
                "y": y(_drawn(p)),
                "kind": _kind(p),
                "is_made": p.is_made,
                "text": f"{wording.size_text(p.weight_bytes)}: " + wording.nats_text(_drawn(p)),
            }
            for index, p in shown
        ],
        "sizes": [{"x": x(s), "text": wording.size_text(s)} for s in _apart(sizes, x)],
        "nats": [
            {"y": y(10.0**e), "text": wording.short_text(10.0**e)} for e in range(low, high + 1)
        ],
    }


def _drawn(point: FrontierPoint) -> float:
    """What was measured, where it was and is more than its noise; else what is corrected."""
    measured = point.measured_damage
    return measured if measured is not None and measured > 0 else point.corrected_damage


def _kind(point: FrontierPoint) -> str:
    if point.measured_damage is not None:
        return "measured"
    return "sure" if point.is_sure else "unsure"


def _apart(sizes: Sequence[int], x: Any) -> list[int]:
    """Sizes far enough from each other to be written side by side."""
    written: list[int] = []
    for size in sizes:
        if not written or x(size) - x(written[-1]) >= APART:
            written.append(size)
    return written
