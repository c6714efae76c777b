"""Turn channels onto the axes of what they carry, then spread those evenly.

Q = V H: V the eigenvectors of the channels' second moment, H a Hadamard matrix. A Hadamard matrix
alone leaves channels of unequal power, as their correlations have it; after V they are
uncorrelated, so that after H each has the mean power.

Source: Xu et al. 2025, MambaQuant, https://arxiv.org/abs/2501.13484, its KLT-enhanced
rotation. We differ in that the moment counts each input by the gradient that answers it, and is
taken as it is, without its mean removed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attar.equalise.facts import Facts
from attar.equalise.fold_hadamard import hadamard, refuses_rotation
from attar.errors import SettingError
from attar.links import Change, Link, rotation


@dataclass(frozen=True)
class FoldKarhunenLoeve:
    """Make all channels of a block carry the same power.

    Attributes:
        spread: Whether the Hadamard matrix follows; without it each channel is one axis.
    """

    spread: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.spread, bool):
            raise SettingError(
                f"spread is {self.spread!r}, but fold_karhunen_loeve takes true or false.",
                hint="set spread to true.",
            )

    def refuses(self, link: Link) -> str | None:
        return refuses_rotation(link)

    def change(self, link: Link, facts: Facts) -> Change:
        assert link.blocks is not None
        width = link.blocks.shape[1]
        if facts.moment is None:
            return rotation(
                link, torch.eye(width, dtype=torch.float64).repeat(len(link.blocks), 1, 1)
            )
        axes = torch.linalg.eigh(facts.moment.double()).eigenvectors
        # An axis has no sign of its own; give it one, so that the same data make the same weights.
        largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
        axes = axes * torch.where(largest < 0, -1.0, 1.0)
        return rotation(link, axes @ hadamard(width) if self.spread else axes)
