"""Samples, and how they are dealt to calibration, recovery and audit without overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from attar.errors import SettingError

SPLITS = ("calibration", "recovery", "audit")


@dataclass(frozen=True)
class Counts:
    """How much each split holds: predictions of a language model, samples of any other.

    Attributes:
        more: What is wanted beside the three, at most, to learn from.
    """

    calibration: int
    recovery: int
    audit: int
    more: int = 0

    def __post_init__(self) -> None:
        for name in SPLITS:
            if getattr(self, name) < 1:
                raise SettingError(
                    f"the {name} split would hold {getattr(self, name)} predictions or samples.",
                    hint="give every split at least 1",
                )

    def as_tuple(self) -> tuple[int, int, int]:
        """In the order of `SPLITS`."""
        return self.calibration, self.recovery, self.audit


@dataclass(frozen=True)
class Sample:
    """One sample without a batch dimension.

    Attributes:
        tensors: Named as in the batch. The first dimension may differ between samples.
        label: Of the slice it belongs to; "" where there are no slices.
        shown: For the report.
        answer: Number of its true class; -1 where it is not known.
    """

    tensors: Mapping[str, Tensor]
    label: str = ""
    shown: str = ""
    answer: int = -1


@dataclass(frozen=True)
class Splits:
    """Samples of the three splits, in the order of `SPLITS`, and where they come from.

    Attributes:
        more: Samples that are in none of them.
    """

    samples: tuple[tuple[Sample, ...], tuple[Sample, ...], tuple[Sample, ...]]
    origin: str
    more: tuple[Sample, ...] = ()


@dataclass
class Dealer:
    """Deals sources (documents, pictures, files) one by one to the split that lacks most.

    Attributes:
        needs: Of each split, any unit > 0.
        got: Of each split, the same unit.
    """

    needs: Sequence[int]
    got: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.got = self.got or [0] * len(self.needs)

    def deal(self, amount: int) -> int:
        """Take a source of this size; the index of the split that gets it."""
        shares = [got / need for got, need in zip(self.got, self.needs, strict=True)]
        chosen = shares.index(min(shares))
        self.got[chosen] += amount
        return chosen

    def filled(self) -> bool:
        """Whether every split has what it needs."""
        return all(got >= need for got, need in zip(self.got, self.needs, strict=True))


def deal_evenly(n_sources: int, counts: Counts) -> tuple[list[int], list[int], list[int]]:
    """Deal sources of size 1 (already shuffled) in proportion; at most its count to each split."""
    dealt: tuple[list[int], list[int], list[int]] = ([], [], [])
    dealer = Dealer(counts.as_tuple())
    for source in range(n_sources):
        if dealer.filled():
            break
        dealt[dealer.deal(1)].append(source)
    return dealt


def into_batches(samples: Sequence[Sample], per_batch: int) -> list[dict[str, Tensor]]:
    """Stack samples; shorter ones are filled with zeros (False) at the end of dimension 0."""
    batches = []
    for start in range(0, len(samples), per_batch):
        chosen = [sample.tensors for sample in samples[start : start + per_batch]]
        batches.append({name: _stack([tensors[name] for tensors in chosen]) for name in chosen[0]})
    return batches


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    if tensors[0].ndim == 0:
        return torch.stack(list(tensors))
    longest = max(len(tensor) for tensor in tensors)
    edges = [0, 0] * (tensors[0].ndim - 1)
    return torch.stack([F.pad(tensor, [*edges, 0, longest - len(tensor)]) for tensor in tensors])
