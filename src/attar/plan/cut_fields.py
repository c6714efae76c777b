"""What was cut and healed, and what else was tried, as YAML and JSON hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from attar.errors import PlanError
from attar.records import Cut, Healed, Plan

KINDS = ("head", "neuron", "channel", "channel group")


def cuts_to_dict(plan: Plan) -> dict[str, Any]:
    """The fields of a plan that cut something, or might have; no field in any other."""
    found: dict[str, Any] = {}
    if plan.contenders:
        found["contenders"] = [
            {k: rounded(v) if isinstance(v, float) else v for k, v in asdict(one).items()}
            for one in plan.contenders
        ]
    if plan.cuts:
        found["cuts"] = [cut_to_dict(cut) for cut in plan.cuts]
    if plan.healed is not None:
        found["healed"] = {
            k: rounded(v) if isinstance(v, float) else v for k, v in asdict(plan.healed).items()
        }
    return found


def healed_from_dict(content: Mapping[str, Any]) -> Healed | None:
    """Read back how a plan was healed; None where it was not.

    Raises:
        PlanError: It names no method and steps.
    """
    line = content.get("healed")
    if line is None:
        return None
    good = (
        isinstance(line, dict)
        and isinstance(line.get("method"), str)
        and _is_count(line.get("of"))
        and type(line.get("steps")) is int
        and 0 <= line["steps"] <= line["of"]
    )
    if not good:
        raise PlanError(
            f"the plan is healed by {line!r}, which names no method and steps.",
            hint="write healed: {method: distill, steps: 300, of: 300}, or take the line out.",
        )
    nats = [_number(line.get(key)) for key in ("damage_before", "damage_after")]
    return Healed(line["method"], line["steps"], line["of"], *nats)


def cut_to_dict(cut: Cut) -> dict[str, Any]:
    """One line for what goes of one group in one turn."""
    line: dict[str, Any] = {
        "group": cut.group,
        "turn": cut.turn,
        "units": list(cut.units),
        "of": cut.of,
        "kind": cut.kind,
        "weights": cut.weights,
        "nats": rounded(cut.predicted_damage),
    }
    return (
        line if cut.measured_damage is None else line | {"measured": rounded(cut.measured_damage)}
    )


def cuts_from_dict(content: Mapping[str, Any]) -> tuple[Cut, ...]:
    """Read back what `cut_to_dict` made; a plan without cuts cuts nothing.

    Raises:
        PlanError: A line names no group, turn and units.
    """
    lines = content.get("cuts", [])
    if not isinstance(lines, list):
        raise PlanError(f"the plan's 'cuts' is {lines!r}, which is no list.", hint=_HINT)
    return tuple(_cut(line) for line in lines)


_HINT = "write {group: NAME, turn: 1, units: [3, 5]}, or take the line out."


def _cut(line: Any) -> Cut:
    good = (
        isinstance(line, dict)
        and isinstance(line.get("group"), str)
        and _is_count(line.get("turn"))
        and isinstance(line.get("units"), list)
        and line["units"]
        and all(type(unit) is int and unit >= 0 for unit in line["units"])
    )
    if not good:
        raise PlanError(
            f"the plan cuts {line!r}, which names no group, turn and units.", hint=_HINT
        )
    kind, measured = line.get("kind"), line.get("measured")
    return Cut(
        turn=line["turn"],
        group=line["group"],
        kind=kind if kind in KINDS else KINDS[2],
        units=tuple(line["units"]),
        of=line["of"] if _is_count(line.get("of")) else 0,
        weights=line["weights"] if _is_count(line.get("weights")) else 0,
        predicted_damage=_number(line.get("nats")),
        measured_damage=None if measured is None else _number(measured),
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and value >= 0 else 0.0


def rounded(number: float) -> float:
    """Six digits: more would not be read, and differ between machines."""
    return float(f"{number:.6g}")
