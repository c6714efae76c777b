"""Scale channels so that those that matter are rounded finely.

A channel is divided by s and the columns that read it are multiplied by s, with
s = x^alpha / w^beta: x the root mean square of the channel, w that of the columns that read it.
Columns that share a step then err less where inputs are large; activations become more alike.

Source: Lin et al. 2024, AWQ, https://arxiv.org/abs/2306.00978, eq. 5; with beta = 1 - alpha it is
Xiao et al. 2023, SmoothQuant, https://arxiv.org/abs/2211.10438, eq. 4.
We differ in three ways. x is a root mean square in which each input counts by the gradient that
answers it, not a mean of magnitudes. Settings are compared by price on held-out statistics, not by
the layer's squared error on the data they were chosen from. Where rows have scales of their own
the writer is left out of the price: a row's scale follows its factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attar.equalise.facts import Facts
from attar.errors import SettingError
from attar.links import Change, Link, scaling

LARGEST_EXPONENT = 2.0
# A channel that hardly ever occurs must not be blown up without end.
LARGEST_FACTOR = 1e3


@dataclass(frozen=True)
class FoldScale:
    """Divide each channel by a power of its size over one of what reads it.

    Attributes:
        alpha: Exponent of the channel's size, 0 to 2.
        beta: Exponent of the size of the columns that read it, 0 to 2.
    """

    alpha: float = 0.5
    beta: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not isinstance(value, int | float) or not 0 <= value <= LARGEST_EXPONENT:
                raise SettingError(
                    f"{name} is {value!r}, but fold_scale takes 0 to {LARGEST_EXPONENT:g}.",
                    hint=f"set {name} to 0.5.",
                )

    def refuses(self, link: Link) -> str | None:
        return "is turned as a whole, not scaled" if link.kind == "stream" else None

    def change(self, link: Link, facts: Facts) -> Change:
        sizes = facts.power.sqrt().pow(self.alpha) / facts.sizes.pow(self.beta)
        return scaling(balanced(link, sizes))


def balanced(link: Link, factors: torch.Tensor) -> torch.Tensor:
    """Make the factors' geometric mean 1, none extreme, and 1 where a channel may not change."""
    logarithms = factors.double().log()
    mean = logarithms[link.free].mean()
    return (logarithms - mean).exp().clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR).where(link.free, 1.0)
