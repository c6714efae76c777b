"""Spend the bytes that no step of the menu fits, on units whose bits may be any number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from attar.plan.candidates import Build
from attar.records import Candidate, Units

# The treatment whose `bits` may be any number, the most it allows, and the steps they are kept to.
CONTINUOUS, MOST_BITS, STEPS_PER_BIT = "quantize_entropy", 7, 10_000
# At most this much more for one unit: beyond it, the next unit gains more.
MOST_MORE = 0.5


def refine(
    choices: Mapping[str, Candidate], units: Units, left: int, build: Build
) -> dict[str, Candidate]:
    """Raise bits where each byte saves most, until `left` bytes are spent or no unit is left.

    A bit more quarters the damage, as it does wherever steps are small beside weights.
    """
    refined = dict(choices)
    open_to_more = [c for c in choices.values() if c.treatment == CONTINUOUS]
    for old in sorted(open_to_more, key=lambda c: -_worth(c, units.named(c.unit).n_weights)):
        unit = units.named(old.unit)
        more = min(8 * left / unit.n_weights, MOST_MORE)
        bits = min(
            MOST_BITS, math.floor((old.settings["bits"] + more) * STEPS_PER_BIT) / STEPS_PER_BIT
        )
        settings = {**old.settings, "bits": bits}
        cost = build(CONTINUOUS, settings).cost(unit)
        spent = cost.weight_bytes - old.cost.weight_bytes
        if 0 < spent <= left:
            gained = 4.0 ** (old.settings["bits"] - bits)
            damage = (old.predicted_damage or 0.0) * gained
            refined[old.unit] = replace(old, settings=settings, cost=cost, predicted_damage=damage)
            left -= spent
    return refined


def _worth(candidate: Candidate, n_weights: int) -> float:
    """Damage that a bit more for each weight saves, for each byte."""
    return (candidate.predicted_damage or 0.0) / n_weights
