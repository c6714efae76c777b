"""Units that a runtime reads as one, and which must have the same treatment.

Merged candidates stand for a whole group: those treatments that every member allows, with bytes
and prices summed. The solver sees no difference, so its plan is the best of those that obey.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from attar.errors import PlanError
from attar.records import Candidate, Cost, Protected

Groups = Sequence[Sequence[str]]
"""Names of units, each in at most one group."""
Options = Mapping[str, Sequence[Candidate]]


def groups_of(names: Sequence[str], roles: Sequence[Sequence[str]]) -> list[list[str]]:
    """Find the units of one place that a format reads as one.

    Args:
        roles: For each kind of group what its members' names end in, as in ("q_proj", "k_proj") or
            ("experts.*.up_proj",); what stands before must be the same.
    """
    found: dict[tuple[int, str], list[str]] = {}
    for name in names:
        for number, patterns in enumerate(roles):
            place = _place(name, patterns)
            if place is not None:
                found.setdefault((number, place), []).append(name)
                break
    return [group for group in found.values() if len(group) > 1]


def _place(name: str, patterns: Sequence[str]) -> str | None:
    """Give what stands before the role in a name; None where it has no such role."""
    words = name.split(".")
    for pattern in patterns:
        n = pattern.count(".") + 1
        if fnmatchcase(".".join(words[-n:]), pattern) and len(words) >= n:
            return ".".join(words[:-n])
    return None


def fuse(candidates: Options, groups: Groups) -> dict[str, Sequence[Candidate]]:
    """Put merged candidates in place of those of each group's members, under the first's name.

    Raises:
        PlanError: A group has no treatment that all its members allow.
    """
    merged = dict(candidates)
    for group in groups:
        merged[group[0]] = _merged(group, candidates)
        for name in group[1:]:
            del merged[name]
    return merged


def _merged(group: Sequence[str], candidates: Options) -> list[Candidate]:
    priced = [
        {treatment_of(c): c for c in candidates[name] if c.predicted_damage is not None}
        for name in group
    ]
    common = [key for key in priced[0] if all(key in of for of in priced)]
    if not common:
        raise PlanError(
            f"{', '.join(group)} must have one treatment, and no treatment fits all of them.",
            hint="pin all of them with --keep, or none.",
        )
    return [_sum([of[key] for of in priced]) for key in common]


def _sum(members: Sequence[Candidate]) -> Candidate:
    first = members[0]
    cost = Cost(sum(c.cost.weight_bytes for c in members), sum(c.cost.macs for c in members))
    nats = sum(c.predicted_damage or 0.0 for c in members)
    return Candidate(first.unit, first.treatment, first.settings, cost, nats)


def fuse_protected(protected: Sequence[Protected], groups: Groups) -> tuple[Protected, ...]:
    """Let the first of each group be worth what its members are together."""

    def summed(worth: Mapping[str, float]) -> dict[str, float]:
        return {**worth, **{group[0]: sum(worth[name] for name in group) for group in groups}}

    return tuple(
        replace(one, there=summed(one.there), everywhere=summed(one.everywhere))
        for one in protected
    )


def expand(
    choices: Mapping[str, Candidate], candidates: Options, groups: Groups
) -> dict[str, Candidate]:
    """Give each member the treatment that was chosen for its group, in order of `candidates`."""
    leader = {name: group[0] for group in groups for name in group}
    return {
        name: next(c for c in of if treatment_of(c) == treatment_of(choices[leader[name]]))
        if name in leader
        else choices[name]
        for name, of in candidates.items()
    }


def treatment_of(candidate: Candidate) -> tuple[str, str]:
    """Treatment and settings, to compare."""
    return candidate.treatment, json.dumps(candidate.settings, sort_keys=True)
