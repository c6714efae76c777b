"""What is lost at every size: one picture and one table, as a page and in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attar.report import wording
from attar.report.html import page_environment, style_and_script
from attar.report.layout import heading, plain_table, render
from attar.report.record import clean_text, jsonable, treatment_label
from attar.report.sizes import shown_sizes, sizes_to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attar.records import Frontier, Unit

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


def frontier_to_html(frontier: Frontier, units: Sequence[Unit], task: str, folder: str) -> str:
    """A page of its own, without network: the plan at every size, and a slider to go through them.

    Args:
        units: Of the model, in order.
        task: Its name.
        folder: Where the frontier is written, as typed.
    """
    environment = page_environment()
    weights = {unit.name: unit.n_weights for unit in units}
    facts = jsonable(sizes_to_json(frontier, treatment_label, weights), "", [])
    names = [clean_text(unit.name) for unit in units]
    sizes = shown_sizes(facts, names, folder, folder)
    start = len(sizes["rows"]) // 2
    style, script, digest = style_and_script()
    return environment.get_template("frontier.html.j2").render(
        model=frontier.recipe.model,
        bytes_at_16_bits=frontier.bytes_at_16_bits,
        sizes={**sizes, "start": start},
        units=[
            {"name": name, "weights": unit.n_weights, "treatment": treatment}
            for name, unit, treatment in zip(names, units, _treated(facts, start), strict=True)
        ],
        noun=wording.prediction_noun(task),
        size={"folder": folder},
        token="",
        style=style,
        script=script,
        script_hash=digest,
    )


def _treated(facts: dict[str, Any], at: int) -> list[str]:
    """What is done to each unit at one point, in a few words."""
    rows = [f"{row['treatment']} {row['label']}" for row in facts["treatments"]]
    return [rows[place] for place in facts["points"][at]["plan"]]
