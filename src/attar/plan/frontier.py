"""The frontier: what the least damage is at every size, from one pricing.

A file of it holds every priced candidate, so that a plan for any size between its ends is solved
from it without pricing again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from attar.errors import PlanError
from attar.plan.activation_fields import activations_from_dict, activations_to_dict
from attar.plan.candidates import Build
from attar.plan.cut_fields import cut_to_dict, cuts_from_dict, rounded
from attar.plan.planfile import (
    equalised_from_dict,
    equalised_to_list,
    recipe_from_dict,
    recipe_to_dict,
)
from attar.records import (
    AGREES_WITHIN,
    Candidate,
    Cost,
    Cut,
    Equalised,
    Frontier,
    FrontierPoint,
    Recipe,
    Unit,
    Units,
)

VERSION = 1
FRONTIER_FILE = "frontier.json"
LARGEST_FILE_BYTES = 1 << 28
_HINT = "make one with: attar plan MODEL --frontier DIR"


def spread_sizes(least: int, most: int, n: int) -> list[int]:
    """Sizes from `least` to `most`, evenly spread by ratio; fewer where they are the same."""
    if most <= least:
        return [least]
    step = (most / least) ** (1 / max(1, n - 1))
    sizes = {min(most, max(least, math.ceil(least * step**i))) for i in range(n - 1)}
    return sorted(sizes | {most})


def corrected(points: Sequence[FrontierPoint], smallest_damage: float) -> tuple[FrontierPoint, ...]:
    """Correct what was predicted by what was measured at the nearest sizes.

    Between two measured sizes the logarithm of the ratio is drawn as a straight line over that of
    the size; beyond the last, the ratio stays, and it is compared with one, to which it must go.

    Args:
        smallest_damage: Nats below which a ratio is noise, and taken to be one.
    """

    def log_ratio(point: FrontierPoint) -> float:
        if min(point.predicted_damage, point.measured_damage or 0.0) <= smallest_damage:
            return 0.0
        return math.log((point.measured_damage or 1.0) / point.predicted_damage)

    known = [(math.log(p.weight_bytes), log_ratio(p)) for p in points if p.measured_damage]
    return tuple(_corrected(point, known) for point in points)


def _corrected(point: FrontierPoint, known: Sequence[tuple[float, float]]) -> FrontierPoint:
    place = math.log(point.weight_bytes)
    ratio, far_apart = 0.0, not known
    if known and place <= known[0][0]:
        ratio, far_apart = known[0][1], place < known[0][0]
    elif known and place >= known[-1][0]:
        ratio = known[-1][1]
        far_apart = place > known[-1][0] and abs(ratio) > math.log(AGREES_WITHIN)
    for (left, one), (right, two) in pairwise(known):
        if left <= place <= right:
            share = (place - left) / (right - left)
            ratio, far_apart = one + share * (two - one), abs(two - one) > math.log(AGREES_WITHIN)
    return replace(
        point,
        corrected_damage=point.predicted_damage * math.exp(ratio),
        is_sure=point.measured_damage is not None or not far_apart,
    )


def frontier_to_json(frontier: Frontier) -> str:
    """Write all of it as JSON text."""
    content = {
        "attar_frontier": VERSION,
        "model": frontier.recipe.model,
        "recipe": recipe_to_dict(replace(frontier.recipe, size="")),
        "keep": list(frontier.recipe.keep),
        "equalised": equalised_to_list(frontier.equalised),
        **({"cuts": [cut_to_dict(cut) for cut in frontier.cuts]} if frontier.cuts else {}),
        "n_parameters": frontier.n_parameters,
        "bytes_at_16_bits": frontier.bytes_at_16_bits,
        "overhead_bytes": frontier.overhead_bytes,
        "points": [
            {
                "weight_bytes": p.weight_bytes,
                "predicted_damage": rounded(p.predicted_damage),
                "corrected_damage": rounded(p.corrected_damage),
                "measured_damage": None
                if p.measured_damage is None
                else rounded(p.measured_damage),
                "is_sure": p.is_sure,
            }
            for p in frontier.points
        ],
        "units": {
            name: [_candidate_to_dict(c) for c in of] for name, of in frontier.candidates.items()
        },
    }
    return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


def _candidate_to_dict(candidate: Candidate) -> dict[str, Any]:
    line: dict[str, Any] = {
        "treatment": candidate.treatment,
        **candidate.settings,
        **activations_to_dict(candidate),
    }
    if candidate.predicted_damage is None:
        return {**line, "refused": candidate.refused}
    # Not rounded: solving again must find what was found.
    return {**line, "bytes": candidate.cost.weight_bytes, "nats": candidate.predicted_damage}


def read_prices(
    path: Path, units_of: Callable[[Recipe, Sequence[Cut]], Units], build: Build
) -> tuple[dict[str, list[Candidate]], tuple[Equalised, ...], tuple[Cut, ...]]:
    """Read the candidates of a frontier's file, whose bytes are worked out again, and what was
    equalised and cut before they were priced.

    Args:
        units_of: The recipe in the file, and what it cuts, to the units that are left of its model.
        build: Treatment and settings to a transform; raises SettingError on bad ones.

    Raises:
        PlanError: The file is not a frontier, or not of this model.
    """
    content = _read_json(path)
    cuts = cuts_from_dict(content)
    units = units_of(recipe_from_dict(content), cuts)
    listed = content.get("units")
    if not isinstance(listed, dict) or sorted(listed) != sorted(unit.name for unit in units):
        raise PlanError(f"{path} does not list the units of {content['model']}.", hint=_HINT)
    candidates = {}
    for unit in units:
        lines = listed[unit.name]
        if not isinstance(lines, list) or not lines:
            raise PlanError(f"{path} has no prices for {unit.name!r}.", hint=_HINT)
        candidates[unit.name] = [_candidate(unit, line, build) for line in lines]
        if all(c.predicted_damage is None for c in candidates[unit.name]):
            raise PlanError(f"{path} leaves {unit.name!r} nothing to choose.", hint=_HINT)
    return candidates, equalised_from_dict(content), cuts


def _candidate(unit: Unit, line: Any, build: Build) -> Candidate:
    if not isinstance(line, dict) or not isinstance(line.get("treatment"), str):
        raise PlanError(f"a price of {unit.name!r} has no treatment.", hint=_HINT)
    around = activations_from_dict(line, unit.name)
    known = ("treatment", "bytes", "nats", "refused", *around)
    settings = {k: v for k, v in line.items() if k not in known}
    name: str = line["treatment"]
    nats: Any = line.get("nats")
    transform = build(name, settings)
    refused = transform.rejects(unit) or line.get("refused")
    if refused is not None:
        return Candidate(unit.name, name, settings, Cost(0, unit.macs), None, str(refused))
    number = isinstance(nats, int | float) and not isinstance(nats, bool)
    if not number or not math.isfinite(nats) or nats < 0:
        raise PlanError(f"{unit.name!r} has the price {nats!r}, not nats.", hint=_HINT)
    return Candidate(unit.name, name, settings, transform.cost(unit), float(nats), **around)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise PlanError(f"{path} is too large to be a frontier.", hint=_HINT)
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"cannot read {path}: {error.strerror}.", hint=_HINT) from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is not readable JSON.", hint=_HINT) from error
    if not isinstance(content, dict) or content.get("attar_frontier") != VERSION:
        hint = _HINT
        if isinstance(content, dict) and "attar_plan" in content:
            hint = "a plan has its size already: leave --size out."
        raise PlanError(f"{path} is not a frontier (no attar_frontier: {VERSION}).", hint=hint)
    return content
