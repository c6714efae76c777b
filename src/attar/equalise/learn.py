"""Learn the scales of all links together, and the ranges of rounded activations with them.

Every link's channels are divided by s and what reads them is multiplied by s, which changes nothing
(`links.py`); what changes is how well weights and activations round. So the model is run as it
will be: weights rounded to nearest, what enters a unit rounded to 8 bits. s and the ends of the
ranges follow the gradient of the divergence from the original's own answers, which passes rounding
as if it were not there.

Source: Tan et al. 2024, MobileQuant: Mobile-friendly quantization for on-device language models,
https://arxiv.org/abs/2408.13933 (equal-output transformations of all layers and ranges of
activations, learned jointly and end to end); Esser et al. 2020, Learned step size quantization,
https://arxiv.org/abs/1902.08153, eq. 3 (gradient of a step). We differ in four ways. The
answers to keep are the original's, not the next tokens of a text. Scales start where their price is
least (`fold_scale`), not at a formula. The ranges learned serve to learn the scales: those of the
plan are searched anew by price, and weights are rounded anew with feedback. Products are left in
floats here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from attar.activations import TOP_CODE
from attar.copies import Copies
from attar.divergence import Divergence, predictions_of
from attar.errors import SettingError
from attar.links import Change, Link, folded, scaling
from attar.parallel import in_order
from attar.records import Batch, Model, Progress, Unit
from attar.settings import WIDTHS, check_choice, check_group_size
from attar.sites import Call, Roundings, watched

TINY = 1e-30
ACTIVATIONS = ("none", "static", "dynamic")
# Batches whose gradients make one step; each runs on a thread of its own.
BATCHES_PER_STEP = 2

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Learned:
    """How scales are learned.

    Attributes:
        bits: Of the weights that are rounded meanwhile, 2 to 8.
        group_size: Columns that share one of their steps; 0 = the whole row.
        activations: Whether what enters a unit is rounded to 8 bits: "none", "static" or "dynamic".
        passes: Over the calibration data.
        rate: Of Adam at the start; it falls to 0 in a straight line.
    """

    bits: int = 4
    group_size: int = 0
    activations: str = "none"
    passes: int = 4
    rate: float = 0.01

    def __post_init__(self) -> None:
        check_choice("learned", "bits", self.bits, WIDTHS, suggestion=4)
        check_group_size("learned", self.group_size)
        check_choice("learned", "passes", self.passes, range(1, 1001), suggestion=4)
        if self.activations not in ACTIVATIONS:
            raise SettingError(
                f"activations are {self.activations!r}, which is none of {', '.join(ACTIVATIONS)}.",
                hint="set activations to static.",
            )
        if not isinstance(self.rate, int | float) or not 0 < self.rate <= 1:
            raise SettingError(
                f"rate is {self.rate!r}, but learned takes more than 0 and at most 1.",
                hint="set rate to 0.01.",
            )


def through(x: Tensor) -> Tensor:
    """Round to whole numbers; gradients pass as if nothing had been done."""
    return x + (x.round() - x).detach()


def rounded_weight(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Round to nearest with one step for each group of a row, the largest at the last code.

    Args:
        weight: Rows first; any shape.
    """
    flat = weight.flatten(1)
    size = group_size if group_size and flat.shape[1] % group_size == 0 else flat.shape[1]
    groups = flat.reshape(len(flat), -1, size)
    top = 2 ** (bits - 1) - 1
    step = groups.abs().amax(-1, keepdim=True).clamp(min=TINY) / top
    codes = through(groups / step).clamp(-top - 1, top)
    rounded: Tensor = codes * step
    return rounded.reshape(weight.shape)


def rounded_between(x: Tensor, low: Float[Tensor, "..."], high: Float[Tensor, "..."]) -> Tensor:
    """Round to 8 bits within a range that holds 0.

    Args:
        low: End of the range, 0 or less; in a shape that goes with x.
        high: The other end, 0 or more.
    """
    step = ((high - low) / TOP_CODE).clamp(min=TINY)
    zero = through(-low / step)
    return ((through(x / step) + zero).clamp(0, TOP_CODE) - zero) * step


def rounded_to_own_range(x: Tensor, *, by_row: bool = False) -> Tensor:
    """Round each sample to 8 bits within the range of its own.

    Args:
        x: Samples first.
        by_row: Each row that a linear map reads has a range, not each sample.
    """
    if by_row:
        ends = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        return rounded_between(x, *ends)
    rows = x.flatten(1) if x.dim() > 1 else x[:, None]
    shape = (-1, *[1] * (x.dim() - 1))
    low, high = rows.amin(1).clamp(max=0).view(shape), rows.amax(1).clamp(min=0).view(shape)
    return rounded_between(x, low, high)


class Learner:
    """A model whose scales and ranges are being learned.

    Args:
        links: Those whose channels may be scaled.
        units: By the parameter name of their weight; all of them are rounded.
        divergence: What is made small.
    """

    def __init__(
        self,
        model: Model,
        links: Sequence[Link],
        units: Mapping[str, Unit],
        divergence: Divergence,
        how: Learned,
    ) -> None:
        self._model, self._links, self._units = model, links, units
        self._divergence, self._how = divergence, how
        self._state = {name: p.detach() for name, p in model.module.named_parameters()}
        self._logarithms = {
            link.name: torch.zeros(link.channels, requires_grad=True) for link in links
        }
        # Ends of ranges as they were at first, and the logarithm of what they were multiplied by.
        self._first: dict[str, tuple[float, float]] = {}
        self._reach: dict[str, Tensor] = {}
        moved = {name for link in links for name in link.weights}
        self._copies = Copies(model)
        self._still = {
            name: self._round(self._state[name])
            for name in units
            if name in self._state and name not in moved
        }

    def learn(self, batches: Sequence[Batch], progress: Progress) -> None:
        """Go down the gradient.

        Args:
            batches: Calibration data.
        """
        how = self._how
        learned = [*self._logarithms.values(), *self._reach.values()]
        starts = [*range(0, len(batches), BATCHES_PER_STEP)] * how.passes
        optimiser = torch.optim.Adam(learned, lr=how.rate)
        fall = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, len(starts))
        with progress.stage("learn scales", len(starts)) as advance:
            for start in starts:
                self._put_gradients(batches[start : start + BATCHES_PER_STEP], learned)
                optimiser.step()
                fall.step()
                advance(1)

    def changes(self) -> dict[str, Change]:
        """Scales as they are by now, by name of link."""
        return {link.name: scaling(self._factors(link).detach()) for link in self._links}

    def lost(self, batches: Sequence[Batch]) -> float:
        """Mean over batches of what the rounded model loses, nats per prediction."""

        def one(batch: Batch) -> float:
            with torch.no_grad():
                return float(self._loss(batch))

        return sum(in_order(one, batches)) / len(batches)

    def see_ranges(self, batches: Sequence[Batch]) -> None:
        """Start the ranges at what enters each unit of the original, where they are to be fixed."""
        if self._how.activations != "static":
            return

        def look(batch: Batch) -> dict[str, tuple[float, float]]:
            found: dict[str, tuple[float, float]] = {}

            def visit(call: Call) -> Tensor:
                if call.name in self._multiplied:
                    _widen(found, call.name, *(float(end) for end in call.input.aminmax()))
                return call.run()

            with torch.no_grad(), watched(self._model.module, visit):
                self._model.task.forward(self._model.module, batch)
            return found

        for found in in_order(look, batches):
            for name, ends in found.items():
                _widen(self._first, name, *ends)
        self._reach = {name: torch.zeros(2, requires_grad=True) for name in self._first}

    @property
    def _multiplied(self) -> set[str]:
        return {name for name, unit in self._units.items() if "embedding" not in unit.uses}

    def _loss(self, batch: Batch) -> Tensor:
        """Mean divergence of the rounded model from the original's answers to one batch."""
        with torch.no_grad():
            wanted = predictions_of(self._model.task.forward(self._model.module, batch), batch)
        found = self._copies.answer(batch, self._tensors(), Roundings(self._around()))
        return self._divergence.between(wanted, predictions_of(found, batch)).mean()

    def _put_gradients(self, batches: Sequence[Batch], learned: Sequence[Tensor]) -> None:
        """Put the mean gradient over some batches on what is learned."""

        def gradients(batch: Batch) -> tuple[Tensor | None, ...]:
            with torch.enable_grad():
                return torch.autograd.grad(self._loss(batch), learned, allow_unused=True)

        for tensor in learned:
            tensor.grad = torch.zeros_like(tensor)
        for found in in_order(gradients, batches):
            for tensor, gradient in zip(learned, found, strict=True):
                if gradient is not None and tensor.grad is not None:
                    tensor.grad += gradient / len(batches)

    def _factors(self, link: Link) -> Tensor:
        return self._logarithms[link.name].exp().where(link.free, 1.0)

    def _tensors(self) -> Tensors:
        """Parameters that are not as they were: scaled, rounded, or both."""
        state = dict(self._state)
        for link in self._links:
            state |= folded(link, scaling(self._factors(link)), state)
        moved = {name: tensor for name, tensor in state.items() if tensor is not self._state[name]}
        rounded = {name: self._round(t) for name, t in moved.items() if name in self._units}
        return {**self._still, **moved, **rounded}

    def _round(self, weight: Tensor) -> Tensor:
        return rounded_weight(weight, self._how.bits, self._how.group_size)

    def _around(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """What is done to the input of each unit."""
        if self._how.activations == "dynamic":
            return {
                name: partial(rounded_to_own_range, by_row=len(self._units[name].shape) == 2)
                for name in self._multiplied
            }
        around: dict[str, Callable[[Tensor], Tensor]] = {}
        for name, reach in self._reach.items():
            ends = torch.tensor(self._first[name]) * reach.exp()
            around[name] = partial(rounded_between, low=ends[0], high=ends[1])
        return around


def _widen(ends: dict[str, tuple[float, float]], name: str, low: float, high: float) -> None:
    known = ends.get(name, (0.0, 0.0))
    ends[name] = min(low, known[0]), max(high, known[1])
