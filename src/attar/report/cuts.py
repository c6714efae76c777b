"""What was cut, group by group, for the record, the page and a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from attar.report.wording import number_text, percent_text, plural

if TYPE_CHECKING:
    from attar.records import Plan, Report, Unit


def cuts_to_json(report: Report) -> dict[str, Any] | None:
    """Groups in order with what is gone, and the ways that were tried; None where none was."""
    plan = report.plan
    if not plan.cuts and not plan.contenders:
        return None
    counts: dict[str, Any] = {}
    if report.narrowed is not None:
        for name, (before, after) in asdict(report.narrowed).items():
            counts[name] = {"before": before, "after": after}
    return {
        **counts,
        "predicted_damage": plan.cut_damage,
        "groups": _groups(plan),
        "contenders": [asdict(one) for one in plan.contenders],
    }


def _groups(plan: Plan) -> list[dict[str, Any]]:
    """One entry for each group, all turns together."""
    found: dict[str, dict[str, Any]] = {}
    for cut in plan.cuts:
        empty = {"units": 0, "of": cut.of, "weights": 0, "turns": 0}
        nats = {"predicted_damage": 0.0, "measured_damage": 0.0}
        name = {"group": cut.group, "kind": cut.kind}
        group = found.setdefault(cut.group, {**name, **empty, **nats})
        group["units"] += len(cut.units)
        group["weights"] += cut.weights
        group["turns"] += 1
        group["predicted_damage"] += cut.predicted_damage
        if cut.measured_damage is None:
            group["measured_damage"] = None
        elif group["measured_damage"] is not None:
            group["measured_damage"] += cut.measured_damage
    return list(found.values())


def left_to_json(unit: Unit | None) -> dict[str, Any]:
    """What a cut left of a unit; nothing is said of a unit that is whole."""
    if unit is None:
        return {}
    n_weights, macs = unit.n_weights, unit.macs
    left = {"shape": list(unit.shape), "groups": unit.groups, "n_weights": n_weights, "macs": macs}
    return {"left": left}


def cut_rows(cuts: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Rows of the table in a terminal; none where nothing was cut."""
    if not cuts or not cuts["groups"]:
        return []
    units = sum(group["units"] for group in cuts["groups"])
    rows = [("cut", f"{plural(units, 'unit')} of {plural(len(cuts['groups']), 'group')}")]
    if "numbers" in cuts:
        numbers, macs, time = (cuts[name] for name in ("numbers", "macs", "milliseconds"))
        rows.append(
            (
                "",
                f"{_gone_text(numbers)} of the numbers and {_gone_text(macs)} "
                f"of the multiplications are gone; a forward pass takes "
                f"{number_text(time['after'], 3)} ms instead of {number_text(time['before'], 3)}",
            )
        )
    return rows


def _gone_text(count: Mapping[str, int]) -> str:
    return percent_text(1 - count["after"] / count["before"])
