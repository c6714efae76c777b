"""Turn channels by a Hadamard matrix with random signs, so that no channel stands out.

After it each channel is a sum of all others with equal weights, and outliers are spread evenly.
Per head between values and the output projection, and for the residual stream as a whole.

Source: Ashkboos et al. 2024, QuaRot, https://arxiv.org/abs/2404.00456, sections 3 and 4, stages 1a
and 1b; what QuaRot turns while the model runs (stages 1c and 1d, queries and keys, the input of the
down projection) cannot be folded, and is left out. A width that is no power of two is split into a
power of two, and an odd number whose rotation is a discrete cosine transform.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attar.equalise.facts import Facts
from attar.errors import SettingError
from attar.links import Change, Link, rotation


@dataclass(frozen=True)
class FoldHadamard:
    """Spread every channel of a block over all of them.

    Attributes:
        seed: Of the signs.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or self.seed < 0:
            raise SettingError(
                f"seed is {self.seed!r}, but fold_hadamard takes whole numbers.",
                hint="set seed to 0.",
            )

    def refuses(self, link: Link) -> str | None:
        return refuses_rotation(link)

    def change(self, link: Link, facts: Facts) -> Change:  # noqa: ARG002 - any channels are alike
        assert link.blocks is not None
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(0, 2, link.blocks.shape, generator=generator).double() * 2 - 1
        return rotation(link, signs[:, :, None] * hadamard(link.blocks.shape[1]))


def refuses_rotation(link: Link) -> str | None:
    """Say why channels cannot be mixed."""
    return None if link.blocks is not None else "has a path that channels pass one by one"


def hadamard(size: int) -> Float[Tensor, "size size"]:
    """Orthogonal matrix whose entries are as alike as may be; all of one size for powers of two."""
    odd = size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    while odd % 2 == 0:
        matrix, odd = torch.kron(matrix, step), odd // 2
    return torch.kron(matrix, _cosines(odd))


def _cosines(size: int) -> Tensor:
    """Orthonormal discrete cosine transform."""
    number = torch.arange(size, dtype=torch.float64)
    angles = math.pi / size * (number[None] + 0.5) * number[:, None]
    matrix = angles.cos() * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix
