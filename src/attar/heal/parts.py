"""What is learned of each tensor of a compressed model, and the tensor it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

TINY = 1e-12
# Of a step, how far from the middle a number may start that is rounded to a level.
NEAR_THE_EDGE = 0.4
# A dead zone is searched for between none and nearly half a step, in halves.
WIDEST, HALVINGS = 0.499, 8


class Whole:
    """A tensor of floats: each number is learned.

    Args:
        tensor: Where it starts.
        rate: As a share of its root mean square, over a step's share of a weight on a grid.
    """

    def __init__(self, tensor: Tensor, rate: float) -> None:
        start = tensor.detach().float()
        self._unit = max(float(start.square().mean().sqrt()), TINY)
        self.rate = rate
        self.learned = (start / self._unit).requires_grad_()

    def tensor(self) -> Tensor:
        """As learned, in the tensor's own units."""
        return self.learned * self._unit


@dataclass(frozen=True)
class Grid:
    """Levels that a weight may be stored at, and where it stands.

    Attributes:
        start: Levels as they are stored: whole numbers, 0 for a weight of 0.
        wanted: What they were rounded from, in steps.
        step: Between two levels; of each weight.
        lowest: Level of each weight, or of all.
        highest: The same.
        shape: That the model reads.
        fits: Whether levels take no more bytes than there are; None where all take as many.
    """

    start: Float[Tensor, "rows columns"]
    wanted: Float[Tensor, "rows columns"]
    step: Float[Tensor, "rows columns"]
    lowest: Tensor
    highest: Tensor
    shape: tuple[int, ...]
    fits: Callable[[Tensor], bool] | None = None


class OnGrid:
    """A weight on a grid: a number behind each is learned, and rounded wherever it is read.

    The gradient passes the rounding as if it were not there (straight-through estimator). Where
    levels are entropy coded, they may take no more bytes than before, and 0 takes fewest: then who
    leaves a level for one farther from 0 must pass the middle by a dead zone.

    Source: Bengio, Léonard and Courville 2013, https://arxiv.org/abs/1308.3432, section 4; for
    quantized students, Polino, Pascanu and Alistarh 2018, Model compression via distillation and
    quantization, https://arxiv.org/abs/1802.05668, algorithm 1. We differ in that the start is what
    error feedback rounded to, not the nearest levels of the original: behind a level is the number
    nearest to the original that is rounded to it. All in the middle, they would leave their levels
    at the same time.
    """

    rate = 1.0

    def __init__(self, grid: Grid) -> None:
        off = (grid.wanted - grid.start).clamp(-NEAR_THE_EDGE, NEAR_THE_EDGE)
        self.learned = (grid.start + off).detach().float().requires_grad_()
        self._step, self._ends = grid.step, (grid.lowest, grid.highest)
        self._shape, self._fits = grid.shape, grid.fits
        self._start = grid.start.to(torch.int16)
        self._dead_zone = 0.0

    def tensor(self) -> Tensor:
        """On the grid, in the shape that the model reads."""
        rounded = self.learned + (self.levels() - self.learned).detach()
        return (rounded * self._step).view(self._shape)

    def levels(self, dead_zone: float | None = None) -> Tensor:
        """Whole numbers, as floats: the nearest levels, but for the dead zone.

        Args:
            dead_zone: In steps, in place of its own.
        """
        zone = self._dead_zone if dead_zone is None else dead_zone
        with torch.no_grad():
            away = self.learned.abs().add_(0.5 - zone).floor_()
            low, high = self._ends
            return torch.minimum(torch.maximum(away.mul_(self.learned.sign()), low), high)

    def fit(self) -> None:
        """Choose the least dead zone with which the levels fit; where none does, begin anew."""
        fits, self._dead_zone = self._fits, 0.0
        if fits is None or fits(self.levels()):
            return
        low, high = 0.0, WIDEST
        if not fits(self.levels(high)):
            with torch.no_grad():
                self.learned.copy_(self._start)
            return
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            low, high = (low, middle) if fits(self.levels(middle)) else (middle, high)
        self._dead_zone = high


Part = Whole | OnGrid
"""A tensor of a model that is learned: `learned` is what moves, about as fast in any part, and
`tensor()` what the model reads."""
