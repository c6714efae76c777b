"""What is lost at every size: one picture and one table, as a page and in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attar.report import wording
from attar.report.curve import draw_frontier
from attar.report.html import page_environment
from attar.report.layout import heading, plain_table, render

if TYPE_CHECKING:
    from attar.records import Frontier

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
        picture=draw_frontier(frontier.points, 720, 400),
        style=environment.get_template("page.css.j2").render(),
        unsure=UNSURE,
    )
