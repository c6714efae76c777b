"""How a plan's line says what is rounded around a unit while the model runs.

input: {scale: 0.0235, zero_point: 3, nats: 1.2e-05}     a range that was chosen
input: {dynamic: rows, nats: 1.2e-05}                    the range of each row
output: {dynamic: true, nats: 0.0}                       the range of each sample
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from attar.errors import PlanError
from attar.records import Activation, Candidate

SIDES = ("input", "output")
BY_ROW = "rows"
_DYNAMIC, _STATIC = {"dynamic", "nats"}, {"scale", "zero_point", "nats"}


def activations_to_dict(candidate: Candidate) -> dict[str, Any]:
    """Only what is rounded; digits of a scale are kept, for it is carried out as it stands."""
    found: dict[str, Any] = {}
    for side in SIDES:
        activation: Activation | None = getattr(candidate, side)
        if activation is not None:
            found[side] = _range(activation) | {"nats": float(f"{activation.damage:.6g}")}
    return found


def _range(activation: Activation) -> dict[str, Any]:
    if activation.scale is None:
        return {"dynamic": BY_ROW if activation.by_row else True}
    return {"scale": activation.scale, "zero_point": activation.zero_point}


def activations_from_dict(line: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Read back what `activations_to_dict` wrote, edited or not.

    Raises:
        PlanError: It is none, or its numbers are no range.
    """
    return {side: _activation(line[side], side, name) for side in SIDES if side in line}


def _activation(given: Any, side: str, name: str) -> Activation:
    fields = set(given) if isinstance(given, dict) else set()
    nats = given.get("nats", 0.0) if fields else 0.0
    kind = given.get("dynamic") if fields else None
    if fields <= _DYNAMIC and (kind is True or kind == BY_ROW) and _number(nats):
        return Activation(damage=float(nats), by_row=kind == BY_ROW)
    if fields <= _STATIC and {"scale", "zero_point"} <= fields and _number(nats):
        scale, zero_point = given["scale"], given["zero_point"]
        whole = isinstance(zero_point, int) and not isinstance(zero_point, bool)
        if _number(scale) and scale > 0 and whole and 0 <= zero_point <= 255:
            return Activation(float(scale), zero_point, float(nats))
    raise PlanError(
        f"the {side} of {name!r} is {given!r}, which is no rounding to 8 bits.",
        hint="write {scale: 0.02, zero_point: 0} with a zero_point from 0 to 255, or "
        "{dynamic: true} or, of a linear map, {dynamic: rows}, or leave it out.",
    )


def _number(value: Any) -> bool:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return good and math.isfinite(value) and value >= 0
