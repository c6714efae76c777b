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


@dataclass
class Levels:
    """Whole numbers on a grid, as they are stored.

    Attributes:
        start: Where they start.
        wanted: What they were rounded from, in steps.
        step: Between two of them; of each weight.
        lowest: Of each weight, or of all.
        highest: The same.
        shape: That the model reads.
        dead_zone: Who leaves a level for one farther from 0 must pass the middle by so many steps.
            What is entropy coded may take no more bytes than before, and 0 takes fewest.
        fitting: Sets the dead zone for which what is learned takes the bytes there are; None where
            all levels take as many.
    """

    start: Float[Tensor, "rows columns"]
    wanted: Float[Tensor, "rows columns"]
    step: Float[Tensor, "rows columns"]
    lowest: Tensor
    highest: Tensor
    shape: tuple[int, ...]
    fitting: Callable[[Tensor], float] | None = None
    dead_zone: float = 0.0


class OnGrid:
    """A weight on a grid: a number behind each is learned, and rounded wherever it is read.

    The gradient passes the rounding as if it were not there (straight-through estimator).

    Source: Bengio, Léonard and Courville 2013, https://arxiv.org/abs/1308.3432, section 4; for
    quantized students, Polino, Pascanu and Alistarh 2018, Model compression via distillation and
    quantization, https://arxiv.org/abs/1802.05668, algorithm 1. We differ in that the start is what
    error feedback rounded to, not the nearest levels of the original: behind a level is the number
    nearest to the original that is rounded to it. All in the middle, they would leave their levels
    at the same time.
    """

    rate = 1.0

    def __init__(self, levels: Levels) -> None:
        self._levels = levels
        off = (levels.wanted - levels.start).clamp(-NEAR_THE_EDGE, NEAR_THE_EDGE)
        self.learned = (levels.start + off).detach().float().requires_grad_()

    def tensor(self) -> Tensor:
        """On the grid, in the shape that the model reads."""
        rounded = self.learned + (self.levels() - self.learned).detach()
        return (rounded * self._levels.step).view(self._levels.shape)

    def levels(self) -> Tensor:
        """Whole numbers, as floats."""
        with torch.no_grad():
            return rounded_to(self.learned, self._levels)

    def fit(self) -> None:
        """Choose the dead zone anew."""
        if self._levels.fitting is not None:
            self._levels.dead_zone = self._levels.fitting(self.learned.detach())


Part = Whole | OnGrid
"""A tensor of a model that is learned: `learned` is what moves, about as fast in any part, and
`tensor()` what the model reads."""


def rounded_to(learned: Tensor, levels: Levels) -> Tensor:
    """Round to levels: to the nearest, but for the dead zone."""
    away = (learned.abs() + (0.5 - levels.dead_zone)).floor()
    return torch.minimum(torch.maximum(learned.sign() * away, levels.lowest), levels.highest)
