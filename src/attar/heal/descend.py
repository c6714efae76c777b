"""Go down the gradient of the divergence from the original, for a time or for a number of steps.

Source: Hinton, Vinyals and Dean 2015, Distilling the knowledge in a neural network,
https://arxiv.org/abs/1503.02531, section 2 (the answers of the large network are what the small one
learns). We differ in that there are no labels, and that the temperature is 1: what is made small is
what the audit measures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attar.copies import Copies
from attar.divergence import Divergence, predictions_of
from attar.heal.parts import OnGrid, Part
from attar.parallel import in_order
from attar.records import Batch, Model

# Batches whose gradients make one step; each runs on a thread of its own.
BATCHES_PER_STEP = 2
# Steps that are timed before it is known how many the time allows.
TIMED_STEPS = 3
# Of Adam, at most; it rises over the first steps and then falls to 0 along a cosine.
WARM_UP = 0.05
DECAYS = (0.9, 0.99)
LARGEST_GRADIENT = 1.0
# Steps between two choices of the dead zone.
STEPS_PER_FIT = 10


@dataclass
class State:
    """Where learning is: it can go on from here, in another process.

    Attributes:
        learned: By name of parameter.
        first: Adam's mean gradient, likewise.
        second: Adam's mean square, likewise.
        done: Steps so far.
    """

    learned: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    done: int = 0


class Descent:
    """A compressed model that learns to answer as the original.

    Args:
        original: Whose answers are learned.
        student: The compressed model; another module, and the same task.
        parts: Name of parameter to what is learned of it.
        fixed: Name of parameter to what it is and stays.
        batches: Learned from, in an order of chance.
        rate: Of Adam for weights on a grid, in steps of the grid.
    """

    def __init__(
        self,
        original: Model,
        student: Model,
        parts: Mapping[str, Part],
        fixed: Mapping[str, Tensor],
        *,
        batches: Sequence[Batch],
        divergence: Divergence,
        rate: float,
        seed: int,
    ) -> None:
        self._original, self._parts, self._fixed = original, parts, fixed
        self._batches, self._divergence = batches, divergence
        self._rate, self._seed = rate, seed
        self._student = Copies(student)
        self.state = State(
            {name: part.learned for name, part in parts.items()},
            {name: torch.zeros_like(part.learned) for name, part in parts.items()},
            {name: torch.zeros_like(part.learned) for name, part in parts.items()},
        )

    def steps_in(self, seconds: float) -> int:
        """Time some gradients, and say how many steps the time allows; at least one."""
        self._gradients(0)
        begin = time.perf_counter()
        for number in range(TIMED_STEPS):
            self._gradients(number)
        each = (time.perf_counter() - begin) / TIMED_STEPS
        return max(1, int(seconds / each))

    def go(self, steps: int, of: int, advance: Callable[[int], None]) -> None:
        """Take some steps.

        Args:
            of: How many all are; the rate follows from it.
        """
        for number in range(self.state.done, self.state.done + steps):
            if number % STEPS_PER_FIT == 0:
                self.fit()
            self._step(self._gradients(number), number, of)
            advance(1)
        self.fit()

    def go_on_from(self, state: State) -> None:
        """Take up what another process learned."""
        with torch.no_grad():
            for name, part in self._parts.items():
                part.learned.copy_(state.learned[name])
        learned = {name: part.learned for name, part in self._parts.items()}
        self.state = State(learned, state.first, state.second, state.done)
        self.fit()

    def fit(self) -> None:
        """See that what is entropy coded takes no more bytes than it may."""
        on_grid = [part for part in self._parts.values() if isinstance(part, OnGrid)]
        for _ in in_order(OnGrid.fit, on_grid):
            pass

    def lost(self, batches: Sequence[Batch]) -> float:
        """Nats per prediction that the compressed model loses on these."""

        def one(batch: Batch) -> tuple[float, int]:
            with torch.no_grad():
                lost = self._lost(batch)
                return float(lost.sum()), len(lost)

        found = list(in_order(one, batches))
        return sum(nats for nats, _ in found) / sum(count for _, count in found)

    def _lost(self, batch: Batch) -> Tensor:
        task, module = self._original.task, self._original.module
        with torch.no_grad():
            wanted = predictions_of(task.forward(module, batch), batch)
        tensors = {name: part.tensor() for name, part in self._parts.items()}
        found = self._student.answer(batch, {**self._fixed, **tensors})
        return self._divergence.between(wanted, predictions_of(found, batch))

    def _gradients(self, step: int) -> list[Tensor | None]:
        """Mean gradient over the batches of a step, one for each part."""
        learned = [part.learned for part in self._parts.values()]

        def gradients(batch: Batch) -> tuple[Tensor | None, ...]:
            with torch.enable_grad():
                return torch.autograd.grad(self._lost(batch).mean(), learned, allow_unused=True)

        total: list[Tensor | None] = [None] * len(learned)
        chosen = self._chosen(step)
        for found in in_order(gradients, chosen):
            for place, gradient in enumerate(found):
                if gradient is not None:
                    before = total[place]
                    own = gradient / len(chosen)
                    total[place] = own if before is None else before + own
        return total

    def _chosen(self, step: int) -> list[Batch]:
        """Each batch once in a pass, in another order each time."""
        per_pass = -(-len(self._batches) // BATCHES_PER_STEP)
        turn, place = divmod(step, per_pass)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + turn)
        order = torch.randperm(len(self._batches), generator=generator).tolist()
        start = place * BATCHES_PER_STEP
        return [self._batches[number] for number in order[start : start + BATCHES_PER_STEP]]

    def _step(self, gradients: Sequence[Tensor | None], number: int, of: int) -> None:
        """Move as Adam does, with gradients clipped to a length.

        Source: Kingma and Ba 2015, Adam, https://arxiv.org/abs/1412.6980, algorithm 1.
        """
        lengths = [float(g.square().sum()) for g in gradients if g is not None]
        shrunk = min(1.0, LARGEST_GRADIENT / (sum(lengths) ** 0.5 + 1e-12))
        rate = self._rate * rate_at(number, of)
        slow, fast = DECAYS
        with torch.no_grad():
            for (name, part), gradient in zip(self._parts.items(), gradients, strict=True):
                if gradient is None:
                    continue
                first, second = self.state.first[name], self.state.second[name]
                gradient = gradient * shrunk
                first.lerp_(gradient, 1 - slow)
                second.lerp_(gradient.square(), 1 - fast)
                root = (second / (1 - fast ** (number + 1))).sqrt_().add_(1e-12)
                move = (first / (1 - slow ** (number + 1))) / root
                part.learned -= rate * part.rate * move
        self.state.done = number + 1


def rate_at(number: int, of: int) -> float:
    """Share of the rate at one step of all: up in a straight line, down along a cosine."""
    warm = max(1, round(WARM_UP * of))
    if number < warm:
        return (number + 1) / warm
    passed = torch.tensor((number - warm) / max(1, of - warm)).double()
    return float(0.5 * (1 + torch.cos(torch.pi * passed)))
