"""A symmetric matrix that is summed up from outer products and kept without most of its lower half.

`reference_sum` is the definition; `Symmetric` must agree with it to rounding. Its rows are cut into
STEPS blocks, and each block is kept from its own first column on: 5/8 of the whole for four, and as
much less to multiply. What is summed up is kept as correlations in 16 bits (`Packed`), which change
a matrix by less than a thousandth of its diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from attar.disk import give_back

STEPS = 4


def reference_sum(x: Float[Tensor, "n side"]) -> Float[Tensor, "side side"]:
    """Add the outer product of each row with itself. Slow and obvious."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)
    for row in x:
        total += torch.outer(row, row)
    return total


def stored_numbers(side: int) -> int:
    """Count the numbers that are kept."""
    bounds = _bounds(side)
    return sum((end - start) * (side - start) for start, end in bounds)


class Symmetric:
    """The running sum; `dense` makes the whole matrix of it."""

    def __init__(self, side: int, zeros: Callable[[int, int], Tensor] = torch.zeros) -> None:
        """Start at zero.

        Args:
            zeros: Makes zeros where the sum is to lie.
        """
        self._bounds = _bounds(side)
        self._blocks = [zeros(end - start, side - start) for start, end in self._bounds]

    def add_outer(self, x: Float[Tensor, "n side"], times: int | float = 1.0) -> None:
        """Add `times` · xᵀ x."""
        for (start, end), block in zip(self._bounds, self._blocks, strict=True):
            block.addmm_(x[:, start:end].T, x[:, start:], alpha=times)
            give_back(block)

    def add_(self, other: Symmetric) -> Symmetric:
        """Add another sum of the same side in place."""
        for block, more in zip(self._blocks, other._blocks, strict=True):
            block.add_(more)
            give_back(block, more)
        return self

    def div_(self, divisor: int | float) -> Symmetric:
        """Divide in place."""
        for block in self._blocks:
            block.div_(divisor)
            give_back(block)
        return self

    def __deepcopy__(self, memo: object) -> Symmetric:
        """Copy into memory: a block may lie in a file with much else."""
        twin = Symmetric(self._blocks[0].shape[1])
        return twin.add_(self)

    def diagonal(self) -> Float[Tensor, " side"]:
        """Copy the diagonal."""
        return torch.cat([block.diagonal() for block in self._blocks])

    def dense(self) -> Float[Tensor, "side side"]:
        """Put the blocks in place and mirror them."""
        return _mirrored(self._bounds, self._blocks)

    def packed(self, moved: Callable[[Tensor], Tensor] = lambda block: block) -> Packed:
        """Take the sum as it is now, in half the memory.

        Args:
            moved: Puts a block where it is to lie.
        """
        return Packed(self._bounds, self._blocks, moved)


class Packed:
    """A positive semidefinite matrix kept as the roots of its diagonal and correlations."""

    def __init__(
        self,
        bounds: list[tuple[int, int]],
        blocks: list[Tensor],
        moved: Callable[[Tensor], Tensor],
    ) -> None:
        diagonal = torch.cat([block.diagonal() for block in blocks])
        self._bounds, self._root = bounds, diagonal.clamp(min=0).sqrt()
        inverse = torch.where(self._root > 0, 1 / self._root, 0.0)
        self._blocks = []
        for (start, end), block in zip(bounds, blocks, strict=True):
            self._blocks.append(moved((block * inverse[start:end, None] * inverse[start:]).half()))
            give_back(block)

    def __getstate__(self) -> dict[str, object]:
        """Give another process the blocks alone, not the files in which they lie with others."""
        return {**vars(self), "_blocks": [block.clone() for block in self._blocks]}

    def dense(self) -> Float[Tensor, "side side"]:
        """Make the whole matrix, in float32."""
        whole = _mirrored(self._bounds, self._blocks)
        whole.fill_diagonal_(1.0)
        return whole.mul_(self._root).mul_(self._root[:, None])


def _mirrored(bounds: list[tuple[int, int]], blocks: list[Tensor]) -> Float[Tensor, "side side"]:
    side = blocks[0].shape[1]
    whole = torch.empty(side, side)
    for (start, end), block in zip(bounds, blocks, strict=True):
        whole[start:end, start:] = block
        whole[end:, start:end] = block[:, end - start :].T
        give_back(block)
    return whole


def _bounds(side: int) -> list[tuple[int, int]]:
    """First row of each block, and the one after its last; fewer blocks of a small matrix."""
    edges = [side * step // STEPS for step in range(STEPS + 1)]
    return [(start, end) for start, end in pairwise(edges) if end > start]
