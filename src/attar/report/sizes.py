"""Other sizes of a model that was made, from the prices of its run: facts, and what is shown."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from attar.records import FrontierPoint
from attar.report import wording
from attar.report.curve import draw_frontier

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from attar.records import Candidate, Frontier

    Label = Callable[[Mapping[str, Any], float], str]

# Drawn twice: a phone gets a picture of its own, with letters as large.
WIDE, NARROW = (1040, 380), (348, 270)


def sizes_to_json(
    frontier: Frontier | None, label: Label, weights: Mapping[str, int]
) -> dict[str, Any] | None:
    """Facts of every point; a plan is a list of places in the list of treatments.

    Args:
        label: Settings and stored bits to a few characters.
        weights: Unit name to how many it has, in the order of the plans.
    """
    if frontier is None:
        return None
    table = Treatments(label, weights)
    return {
        "n_parameters": frontier.n_parameters,
        "overhead_bytes": frontier.overhead_bytes,
        "decided_by": frontier.recipe.decide,
        "options": _options(frontier),
        "points": [point_to_json(point, frontier.n_parameters, table) for point in frontier.points],
        "treatments": table.rows,
    }


class Treatments:
    """The treatments that plans name, each once, in order of first use."""

    def __init__(self, label: Label, weights: Mapping[str, int]) -> None:
        self.rows: list[dict[str, Any]] = []
        self._label = label
        self._weights = weights
        self._places: dict[str, int] = {}

    def places(self, choices: Mapping[str, Candidate]) -> list[int]:
        """One place in `rows` for each unit."""
        return [self._place(choices[name], n) for name, n in self._weights.items()]

    def _place(self, choice: Candidate, n_weights: int) -> int:
        bits = choice.cost.weight_bytes * 8 / max(1, n_weights)
        row = {
            "treatment": choice.treatment,
            "label": self._label(choice.settings, bits),
            "settings": {key: choice.settings[key] for key in sorted(choice.settings)},
        }
        place = self._places.setdefault(repr(row), len(self.rows))
        if place == len(self.rows):
            self.rows.append(row)
        return place


def point_to_json(point: FrontierPoint, n_parameters: int, table: Treatments) -> dict[str, Any]:
    """Facts of one point."""
    return {
        "bytes": point.weight_bytes,
        "bits_per_parameter": 8 * point.weight_bytes / max(1, n_parameters),
        "predicted_damage": point.predicted_damage,
        "corrected_damage": point.corrected_damage,
        "measured_damage": point.measured_damage,
        "is_sure": point.is_sure,
        "is_made": point.is_made,
        "plan": table.places(point.choices),
    }


def _options(frontier: Frontier) -> list[str] | None:
    """What another size takes beside itself; None where the model or its data were given from
    Python, and cannot be opened again."""
    if not frontier.opens_again:
        return None
    recipe = frontier.recipe
    code = recipe.factory or (recipe.model if ":" in recipe.model else None)
    return [
        *(["--factory", code] if code else []),
        *(["--accept-licence"] if recipe.accept_licence else []),
    ]


def typed_size(n_bytes: int) -> str:
    """A size to type that a plan of so many bytes fits in, and hardly more."""
    kilobytes = -(-n_bytes // 1000)
    return f"{kilobytes / 1000:.3f}MB" if kilobytes >= 1000 else f"{n_bytes}B"


def show_sizes(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Everything the page shows of a record's sizes: rows, pictures, and what the script reads."""
    if facts["frontier"] is None:
        return None
    folder = facts["size"]["folder"] or "model"
    units = [unit["name"] for unit in facts["units"]]
    shown = shown_sizes(facts["frontier"], units, f"{folder}/report", folder)
    made = next((i for i, row in enumerate(shown["rows"]) if row["is_made"]), 0)
    return {**shown, "start": made}


def shown_sizes(
    sizes: Mapping[str, Any], units: Sequence[str], prices: str, out: str
) -> dict[str, Any]:
    """Do what `show_sizes` does of facts that `sizes_to_json` made.

    Args:
        units: Names, in the order of the plans.
        prices: Folder that another size is applied from.
        out: What the folder of another size is called after.
    """
    known = [
        FrontierPoint(
            point["bytes"],
            point["predicted_damage"] or 0.0,
            point["corrected_damage"] or 0.0,
            point["measured_damage"],
            point["is_sure"],
            is_made=point["is_made"],
        )
        for point in sizes["points"]
    ]
    rows, command = [show_point(point) for point in sizes["points"]], None
    if sizes["options"] is not None:
        command = shlex.join(["attar", "apply", prices, *sizes["options"]])
    return {
        "rows": rows,
        "is_frontier": not any(row["is_made"] for row in rows),
        "pictures": [draw_frontier(known, *side) for side in (WIDE, NARROW)],
        "command": command,
        "decided_by": sizes["decided_by"],
        "data": {
            "points": rows,
            "treatments": [show_treatment(row) for row in sizes["treatments"]],
            "command": command,
            "out": shlex.quote(out),
            "units": list(units),
        },
    }


def show_point(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point with its numbers as texts, so that the script formats none."""
    measured = point["measured_damage"]
    return {
        "bytes": point["bytes"],
        "size": wording.size_text(point["bytes"]),
        "typed": typed_size(point["bytes"]),
        "bits": f"{point['bits_per_parameter']:.2f}",
        "predicted": wording.number_text(point["predicted_damage"]),
        "corrected": wording.number_text(point["corrected_damage"]),
        "measured": "" if measured is None else wording.number_text(measured),
        "known": _known(point),
        "is_made": point["is_made"],
        "plan": point["plan"],
    }


def _known(point: Mapping[str, Any]) -> str:
    if point["measured_damage"] is not None:
        return "measured: this model" if point["is_made"] else "measured"
    return "predicted only" if point["is_sure"] else "predicted only, uncertain"


def show_treatment(row: Mapping[str, Any]) -> list[str]:
    """Name, a few characters, and settings, as texts."""
    return [row["treatment"], row["label"], wording.value_text(row["settings"])]


def treatment_counts(units: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many units have each treatment, by name, the most first."""
    counts: dict[str, int] = {}
    for unit in units:
        counts[unit["treatment"]] = counts.get(unit["treatment"], 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
