"""Choose for every unit: those that a form reads as one together, and to the last bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from attar.plan.candidates import Build
from attar.plan.fuse import Groups, Options, expand, fuse
from attar.plan.refine import refine
from attar.plan.solve import weight_bytes
from attar.records import Candidate, Units


def choose(
    candidates: Options,
    limit: int,
    *,
    units: Units,
    groups: Groups,
    build: Build,
    decide: Callable[[Mapping[str, Sequence[Candidate]], int], dict[str, Candidate]],
) -> dict[str, Candidate]:
    """Decide within `limit` bytes of all units' tensors, and spend what no candidate fits.

    Args:
        groups: Units that must have the same treatment.
        decide: Chooses among candidates, those of a group being merged.
    """
    chosen = expand(decide(fuse(candidates, groups), limit), candidates, groups)
    fused = {name for group in groups for name in group}
    free = {name: choice for name, choice in chosen.items() if name not in fused}
    left = limit - weight_bytes(chosen)
    return {**chosen, **refine(free, units, left, build)}
