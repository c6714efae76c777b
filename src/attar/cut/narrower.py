"""What the groups of a model are after some of their units were cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from attar.coupling import CoupledGroup, HeadCount, Member
from attar.cut.surgery import Removed


def numbers_each(module: nn.Module, members: Iterable[Member]) -> dict[str, int]:
    """Parameter or buffer to how many of its numbers go with one unit."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    parts = list(members)
    left = {one.parameter: list(tensors[one.parameter].shape) for one in parts}
    for one in parts:
        left[one.parameter][one.dim] -= one.indices.shape[1]
    return {name: tensors[name].numel() - prod(shape) for name, shape in left.items()}


def numbers_gone(
    module: nn.Module, groups: Sequence[CoupledGroup], removed: Removed
) -> dict[str, int]:
    """Group to how many numbers go with its units; what two take goes with the first of them.

    Args:
        module: As it is before.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    shapes: dict[str, list[int]] = {}
    found = {}
    for group in groups:
        count, before = len(removed.get(group.name, ())), 0
        held = dict.fromkeys(one.parameter for one in group.members) if count else {}
        for name in held:
            before += prod(shapes.setdefault(name, list(tensors[name].shape)))
        for member in group.members if count else ():
            shapes[member.parameter][member.dim] -= count * member.indices.shape[1]
        found[group.name] = before - sum(prod(shapes[name]) for name in held)
    return found


def narrower(
    module: nn.Module, groups: Sequence[CoupledGroup], removed: Removed
) -> tuple[CoupledGroup, ...]:
    """Number places, units and heads anew.

    Args:
        module: Without the units that were removed.
        groups: As they were before.
    """
    gone = _gone(groups, removed)
    heads = _heads_lost(groups, removed)
    found = []
    for group in groups:
        lost = set(removed.get(group.name, ()))
        left = torch.tensor([unit for unit in range(group.units) if unit not in lost])
        members = tuple(_renumbered(one, left, gone) for one in group.members)
        counts = tuple(
            replace(one, count=one.count - heads[_key(one)]) for one in group.head_counts
        )
        found.append(
            replace(
                group,
                units=len(left),
                members=members,
                weights=sum(numbers_each(module, members).values()),
                head_counts=counts,
            )
        )
    return tuple(found)


def _gone(groups: Sequence[CoupledGroup], removed: Removed) -> Mapping[tuple[str, int], Tensor]:
    """Parameter and dimension to the places along it that are no more."""
    parts: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    for group in groups:
        numbers = list(removed.get(group.name, ()))
        for member in group.members if numbers else ():
            parts[member.parameter, member.dim].append(member.indices[numbers].flatten())
    return {key: torch.cat(places).sort().values for key, places in parts.items()}


def _renumbered(member: Member, left: Tensor, gone: Mapping[tuple[str, int], Tensor]) -> Member:
    indices = member.indices[left]
    places = gone.get((member.parameter, member.dim))
    if places is not None:
        indices = indices - torch.searchsorted(places, indices.contiguous())
    return replace(member, indices=indices)


def _key(one: HeadCount) -> tuple[str, int, int]:
    return one.module, one.count, one.width


def _heads_lost(
    groups: Sequence[CoupledGroup], removed: Removed
) -> Mapping[tuple[str, int, int], int]:
    lost: dict[tuple[str, int, int], int] = defaultdict(int)
    for group in groups:
        for one in set(group.head_counts):
            lost[_key(one)] += one.each * len(removed.get(group.name, ()))
    return lost
