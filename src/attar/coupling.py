"""Coupled units: rows and columns of several parameters that can only be cut together.

A channel that is written in one place is read in others, meets other channels in sums and products,
and passes norms with numbers of their own for it. A unit is all of that, so that what is left after
a cut still fits together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Member:
    """The part of one parameter, or of a buffer, that goes with the units of a group.

    Attributes:
        parameter: Its name.
        dim: Dimension along which something goes.
        indices: What goes with each unit.
        reads: Whether these are columns that read the unit: the unit is without effect, and can be
            cut without any change of the answer, where they are zero.
    """

    parameter: str
    dim: int
    indices: Int[Tensor, "units width"]
    reads: bool = False


@dataclass(frozen=True)
class HeadCount:
    """A module that divides channels into heads, and may know how many there are.

    Attributes:
        module: Its name.
        count: Heads it divides into.
        width: Channels of one head.
        each: Heads that go with one unit.
    """

    module: str
    count: int
    width: int
    each: int


@dataclass(frozen=True)
class CoupledGroup:
    """Coupled units that are alike: the same parameters lose as many rows and columns with each.

    Attributes:
        name: Of the module that writes them first.
        kind: "head", "neuron", "channel" or "channel group", for people.
        units: How many.
        members: What goes.
        weights: Numbers that go with one unit.
        reasons: Why the members belong together.
        head_counts: Modules in which a number of heads is to be mended.
    """

    name: str
    kind: str
    units: int
    members: tuple[Member, ...]
    weights: int
    reasons: tuple[str, ...] = ()
    head_counts: tuple[HeadCount, ...] = ()


@dataclass(frozen=True)
class CoupledUnits:
    """What was found in a model.

    Attributes:
        groups: That can be cut; each was cut on the examples and the answer compared.
        pinned: Name of a module whose channels cannot be cut, and why.
    """

    groups: tuple[CoupledGroup, ...]
    pinned: Mapping[str, str] = field(default_factory=dict)
