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


@dataclass(frozen=True)
class CutPrice:
    """Some units of one group, cut together.

    Attributes:
        units: Which, the cheapest first.
        weights: Numbers that go.
        refitted: Nats per prediction when what reads the others is fitted again, on data that
            neither the choice nor the fit has seen.
        plain: The same without the fit.
    """

    units: tuple[int, ...]
    weights: int
    refitted: float
    plain: float


@dataclass(frozen=True)
class CutTrial:
    """What cutting the cheapest share of every group would cost.

    Attributes:
        share: Of the units of each group.
        prices: Of each group alone; none where the share is less than half a unit.
        weights: Numbers that go when all are cut, of `of_weights`.
        predicted: Nats per prediction of that, the sum over all that reads.
        measured: The same, measured on other data with the network that was cut.
        measured_plain: Measured without the fit.
    """

    share: float
    prices: Mapping[str, CutPrice]
    weights: int
    of_weights: int
    predicted: float
    measured: float
    measured_plain: float
