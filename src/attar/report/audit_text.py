"""What an audit says beyond the loss itself, for a terminal: better or worse, for whom, by whom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from attar.report.layout import plain_table
from attar.report.wording import interval_text, number_text, percent_text, size_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

SHOWN = 8


def truth_rows(truth: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Against true answers: whether what changed is for the worse."""
    if truth is None:
        return []
    before, after = truth["accuracy_before"], truth["accuracy_after"]
    negative, positive = truth["negative_flips"], truth["positive_flips"]
    rows = [
        (
            "right answers",
            f"{percent_text(before['value'])} before, {percent_text(after['value'])} after"
            f" (95% interval {interval_text(after, percent=True)})",
        ),
        (
            "right, then wrong",
            f"{percent_text(negative['value'])} (95% interval"
            f" {interval_text(negative, percent=True)}); the reverse"
            f" {percent_text(positive['value'])}; p {number_text(truth['p_value'], 2)}",
        ),
        (
            "could have shown",
            f"a change of {percent_text(truth['smallest_shown'], 2)} of the answers",
        ),
    ]
    if truth["calibration_before"] is not None:
        errors = [truth[f"calibration_{side}"]["ece"] for side in ("before", "after")]
        rows.append(
            (
                "calibration error",
                f"{percent_text(errors[0], 2)} before, {percent_text(errors[1], 2)} after",
            )
        )
    return rows


def slice_parts(slices: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    """Who lost how much, most first."""
    if not slices:
        return []
    numbers = ("samples", "divergence", "95% interval", "changed", "p worse")
    table = plain_table("slice", *numbers, right=numbers)
    for one in slices[:SHOWN]:
        flips = one["flips"]
        table.add_row(
            Text(one["label"]),
            f"{one['n_samples']:,}",
            number_text(one["divergence"]["value"]),
            interval_text(one["divergence"]),
            "" if flips is None else percent_text(flips["value"]),
            number_text(one["p_worse"], 2),
        )
    left = len(slices) - SHOWN
    more = [Text(f"and {left} more in the report")] if left > 0 else []
    return [table, *more, Text("")]


def responsible_parts(verdict: Mapping[str, Any]) -> list[RenderableType]:
    """Which layers and treatments lost how much of it, and what a bit more would return."""
    units = verdict["responsible"]
    if not units:
        return []
    numbers = ("share", "nats", "one bit more", "returns", "measured")
    table = plain_table("layer", "where", *numbers, right=numbers)
    for one in units[:SHOWN]:
        table.add_row(
            Text(one["unit"]),
            Text(one["where"]),
            percent_text(one["share"]),
            number_text(one["damage"]["value"]),
            size_text(one["cost_bytes"]),
            number_text(one["returned"]),
            "" if one["measured"] is None else number_text(one["measured"]),
        )
    left = [Text(f"and {len(units) - SHOWN} more in the report")] if len(units) > SHOWN else []
    rest = Text(
        f"{percent_text(verdict['unattributed'], 2)} of the divergence is in no layer's weights"
    )
    return [table, *left, rest, *_by_treatment(verdict), *_ways_back(verdict), Text("")]


def _by_treatment(verdict: Mapping[str, Any]) -> list[RenderableType]:
    """One line; nothing where it is not known, or one treatment was given to all."""
    treatments = verdict["treatments_responsible"]
    if len(treatments) < 2:
        return []
    shares = (f"{one['treatment']} {percent_text(one['share'], 2)}" for one in treatments[:SHOWN])
    return [Text(f"by treatment: {'; '.join(shares)}")]


def _ways_back(verdict: Mapping[str, Any]) -> list[RenderableType]:
    """The cheapest way back, and that of several layers together."""
    whole = sum(one["damage"]["value"] for one in verdict["responsible"])
    lines = []
    for one in verdict["rollbacks"]:
        first, *others = one["units"]
        also = f" and {len(others)} more, to {others[-1]}," if others else ""
        lines.append(
            Text(
                f"giving {first}{also} one bit more costs {size_text(one['cost_bytes'])} and"
                f" returned {percent_text(one['measured'] / whole, 2)} of the damage"
            )
        )
    return [lines[0], *lines[1:][-1:]] if lines else []
