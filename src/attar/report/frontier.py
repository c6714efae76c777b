"""What is lost at every size: one picture and one table, as a page and in the terminal."""

from __future__ import annotations

from math import ceil, floor, log10
from typing import TYPE_CHECKING, Any

from attar.report import wording
from attar.report.html import page_environment
from attar.report.layout import heading, plain_table, render

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attar.records import Frontier, FrontierPoint

# The drawing's own units, and what its edges leave for the scales.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 64, 24, 18, 48
UNSURE = "uncertain"


def frontier_rows(frontier: Frontier) -> list[dict[str, Any]]:
    """One row for each point, as numbers."""
    return [
        {
            "bytes": point.weight_bytes,
            "bits": 8 * point.weight_bytes / frontier.n_parameters,
            "smaller": wording.times_text(frontier.bytes_at_16_bits, point.weight_bytes),
            "predicted": point.predicted_damage,
            "corrected": point.corrected_damage,
            "measured": point.measured_damage,
            "is_sure": point.is_sure,
        }
        for point in frontier.points
    ]


def frontier_to_text(frontier: Frontier, width: int = 100, colour: bool = False) -> str:
    """The table of sizes."""
    columns = ("size", "bits per parameter", "predicted", "corrected", "measured", "in 16 bits")
    table = plain_table(*columns, "", right=columns)
    for row in frontier_rows(frontier):
        table.add_row(
            wording.size_text(row["bytes"]),
            f"{row['bits']:.2f}",
            wording.number_text(row["predicted"]),
            wording.number_text(row["corrected"]),
            "" if row["measured"] is None else wording.number_text(row["measured"]),
            row["smaller"],
            "" if row["is_sure"] else UNSURE,
        )
    title = f"frontier of {frontier.recipe.model}: nats lost per prediction at every size"
    return render([heading(title), table], width, colour)


def frontier_to_html(frontier: Frontier) -> str:
    """A page of its own, without network and script."""
    environment = page_environment()
    return environment.get_template("frontier.html.j2").render(
        model=frontier.recipe.model,
        bytes_at_16_bits=frontier.bytes_at_16_bits,
        rows=frontier_rows(frontier),
        picture=draw_frontier(frontier.points),
        style=environment.get_template("page.css.j2").render(),
        unsure=UNSURE,
    )


def draw_frontier(points: Sequence[FrontierPoint]) -> dict[str, Any]:
    """Places on two log scales, in the drawing's units: line, marks and scale lines."""
    shown = [p for p in points if p.corrected_damage > 0]
    damages = [d for p in shown for d in (p.corrected_damage, p.measured_damage) if d]
    if not shown:
        return {"width": WIDTH, "height": HEIGHT, "line": "", "marks": [], "sizes": [], "nats": []}
    sizes = [p.weight_bytes for p in shown]
    low, high = floor(log10(min(damages))), ceil(log10(max(damages)))
    high = max(high, low + 1)

    def x(size: int) -> float:
        span = log10(max(sizes) / min(sizes)) or 1.0
        return round(LEFT + (WIDTH - LEFT - RIGHT) * log10(size / min(sizes)) / span, 1)

    def y(nats: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - log10(nats)) / (high - low), 1)

    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "floor": HEIGHT - BOTTOM,
        "line": " ".join(f"{x(p.weight_bytes)},{y(p.corrected_damage)}" for p in shown),
        "marks": [
            {
                "x": x(p.weight_bytes),
                "y": y(p.measured_damage or p.corrected_damage),
                "kind": "measured" if p.measured_damage else "sure" if p.is_sure else "unsure",
                "text": f"{wording.size_text(p.weight_bytes)}: "
                + wording.nats_text(p.measured_damage or p.corrected_damage),
            }
            for p in shown
        ],
        "sizes": [
            {"x": x(s), "text": wording.size_text(s)} for s in sizes[:: ceil(len(sizes) / 6)]
        ],
        "nats": [
            {"y": y(10.0**e), "text": wording.short_text(10.0**e)} for e in range(low, high + 1)
        ],
    }
