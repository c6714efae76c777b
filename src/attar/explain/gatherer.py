"""The hooks that gather sums while a model runs forward and backward over a few samples."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from attar.disk import Scratch, Stash, lies_on_disk
from attar.divergence import Divergence, predictions_mask
from attar.errors import DataError
from attar.explain import moments
from attar.explain.sampling import PREDICTIONS_AT_ONCE, drawn_gradient, go_back
from attar.kernels.symmetric import Symmetric, stored_numbers
from attar.records import Batch, Model, Unit, Units
from attar.sites import Call, tracked, watched

# A full C of this side is 100 MB in float32, and there are two; beyond it, the diagonal only.
FULL_COLUMNS_LIMIT = 5000
# From this side on, R and C are kept without their lower halves.
KEPT_BY_HALF_FROM = 512
# R beyond this side is kept as its diagonal: rounding rows one by one makes errors that do not hang
# together between rows, so what lies off the diagonal hardly changes a price.
FULL_ROWS_LIMIT = 1024
ALL = ""  # the slice that holds every sample

Stashed = Callable[[], Tensor]
"""Gives a tensor that was put aside."""


@dataclass
class Columns:
    """Running sums over what meets the columns of a weight; weights that read one input share them.

    Attributes:
        moment: Of inputs, each counted as much as the gradient that answers it is large; of
            gradients, where the input is a token.
        total: Sum of what enters each column, counted as in `moment`; 0 for tokens.
        mass: What both are divided by to make them means.
        power: Sum of squares of what enters each column, all counted alike; 0 for tokens.
        positions: How many inputs were seen.
    """

    moment: Tensor | Symmetric
    power: Tensor
    total: Tensor
    mass: float = 0.0
    positions: int = 0


@dataclass
class Use:
    """Running sums of one use of one weight."""

    operation: str
    rows: Tensor | Symmetric
    columns: Columns
    is_answer: bool = False


@dataclass
class Held:
    """An input that waits until the gradients of all weights that read it have come.

    Attributes:
        x: Gives `samples 1 positions columns`.
        awaited: Gradients still to come.
        weights: Sum of the squared gradients at each position so far, `samples 1 positions`.
    """

    x: Callable[[], Tensor]
    columns: Columns
    awaited: int
    weights: Tensor | float = 0.0


@dataclass
class Sums:
    """Running sums over all samples so far; keys are slice label, then unit name."""

    uses: dict[str, list[Use]] = field(default_factory=lambda: defaultdict(list))
    channel: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    whole: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    heads: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    activation: dict[str, Tensor] = field(default_factory=dict)
    taylor: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    predictions: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    samples: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    answers: Tensor | None = None  # sum of p, `width`
    spread: Tensor | None = None  # sum of p (1 - p), `width`


class Gatherer:
    """Lives over one pass: holds the sums that the hooks add to."""

    def __init__(
        self, model: Model, units: Units, divergence: Divergence, seed: int, draws: int
    ) -> None:
        self._model = model
        self._units = {unit.name + ".weight": unit for unit in units}
        self._weights = dict(model.module.named_parameters())
        self._divergence = divergence
        self._generator = torch.Generator().manual_seed(seed)
        self._draws = draws
        self.sums = Sums()
        self._labels: Sequence[str] = ()
        self._n_samples = 0
        self._calls: dict[str, int] = {}
        on_disk = lies_on_disk(model.module)
        self._scratch, self._stash = Scratch(on_disk=on_disk), Stash(on_disk=on_disk)
        self._last: tuple[Unit, Use, list[Stashed]] | None = None
        self._last_input: tuple[Tensor, Held] | None = None
        self._held: list[Held] = []

    def add(self, batch: Batch, labels: Sequence[str]) -> None:
        """Add one small batch to the sums."""
        self._labels, self._calls = labels, defaultdict(int)
        self._n_samples = len(next(iter(batch.values())))
        edge, answers = self._forward(batch)
        mask = predictions_mask(answers, batch)
        self._count(mask)
        if self._divergence.family == "categorical":
            self._add_answers(answers, mask)
        maker = self._take_answer(answers)

        def draw(answers: Tensor) -> Tensor:
            gradient = drawn_gradient(self._divergence, answers, mask, self._generator)
            if maker is not None:
                self._add_products(maker, answers, gradient)
            return gradient

        kept = [answers]
        del answers
        go_back(edge, kept, draw, self._draws)
        for held in self._held:
            add_held(held)  # some answer it was read for never mattered
        # The input holds the graph, whose hooks hold this object: neither would ever be freed.
        self._last = self._last_input = None
        self._held.clear()
        self._stash.clear()

    def close(self) -> None:
        """Give up the room of what waited for the way back; the sums stay."""
        self._stash.close()

    def _forward(self, batch: Batch) -> tuple[GradientEdge, Tensor]:
        """Run the model; give where its outputs were made, and the outputs without a graph."""
        batch = {
            name: t.detach().clone().requires_grad_() if t.is_floating_point() else t
            for name, t in batch.items()
        }
        watching = watched(self._model.module, self._visit)
        with torch.enable_grad(), self._stash.of_autograd(), watching:
            outputs = self._model.task.forward(self._model.module, batch)
        # The extremes are NaN where any output is, and take no room.
        if not all(bool(end.isfinite()) for end in outputs.detach().aminmax()):
            raise DataError(
                f"{self._model.name} answers with NaN or infinity on this data.",
                hint="look at the inputs with --data; are they scaled as the model expects?",
            )
        return get_gradient_edge(outputs), outputs.detach()

    def _add_answers(self, outputs: Tensor, mask: Tensor) -> None:
        sums = self.sums
        for where in torch.split(mask.nonzero(), PREDICTIONS_AT_ONCE):
            p = outputs[where.unbind(1)].softmax(-1)
            answers = p.sum(0)
            spread = answers - p.square_().sum(0)
            sums.answers = answers if sums.answers is None else sums.answers + answers
            sums.spread = spread if sums.spread is None else sums.spread + spread

    def _take_answer(self, answers: Tensor) -> Unit | None:
        """Find the unit that makes the answer itself: its G is known without sampling.

        What was kept of its output is let go, for that is the answer.
        """
        if self._last is None or self._divergence.family != "categorical":
            return None
        unit, use, kept = self._last
        (stashed,) = kept
        value = stashed()
        use.is_answer = value.numel() == answers.numel() and torch.equal(
            value.reshape(-1, value.shape[-1])[-1], answers.reshape(-1, answers.shape[-1])[-1]
        )
        if use.is_answer:
            kept.clear()
        return unit if use.is_answer else None

    def _count(self, mask: Tensor) -> None:
        for sample, n in enumerate(mask.sum(1).tolist()):
            for label in {ALL, *self._labels[sample : sample + 1]}:
                self.sums.predictions[label] += n
                self.sums.samples[label] += 1

    def _visit(self, call: Call) -> Tensor:
        """Add what enters the weight, and wait for the gradient at what leaves it."""
        output = call.run()
        unit = self._units.get(call.name)
        if unit is None:
            return output
        if not output.requires_grad:
            output = tracked(output)
        use = self._use(unit, call)
        # An in-place operation may overwrite the output; language models have none, and no room.
        in_place = self._model.task.name != "language"
        value = self._stash.put(output.detach().clone() if in_place else output.detach())
        kept = [value]
        self._last = (unit, use, kept)
        if call.operation == "embedding":
            # Positions, say, are looked up once for all samples: then there is one row of them.
            tokens = call.input.reshape(len(call.input) if call.input.dim() > 1 else 1, -1)
            counts = cast(Tensor, use.rows)  # a diagonal: the input is one-hot
            counts += torch.bincount(tokens.flatten(), minlength=unit.rows)
            use.columns.positions += tokens.numel()
            output.register_hook(lambda g: self._looked_up(unit, use, tokens, value, g))  # type: ignore[no-untyped-call]
            return output
        sizes = moments.channel_sizes(unit, output.detach(), self._n_samples)
        add_to(self.sums.activation, unit.name, sizes)
        self.sums.outputs[unit.name] += output.numel() // unit.rows
        held = self._hold(use, call, in_place) if call.operation == "linear" else None
        if held is None:
            self._add_inputs(use, call)
        output.register_hook(lambda g: self._answered(unit, use, held, kept, g))  # type: ignore[no-untyped-call]
        return output

    def _use(self, unit: Unit, call: Call) -> Use:
        """Find the sums of this call: the first call of a weight is its first use, and so on."""
        number = self._calls[unit.name]
        self._calls[unit.name] += 1
        uses = self.sums.uses[unit.name]
        if number == len(uses):
            uses.append(new_use(unit, call, self._scratch))
        return uses[number]

    def _add_inputs(self, use: Use, call: Call) -> None:
        """Add the input of a convolution, all positions alike."""
        x = moments.inputs_of(call, self._n_samples, moments.POSITIONS_AT_MOST).detach()
        moments.add_second_moment(use.columns.moment, x)
        use.columns.total += x.sum((0, 2)).flatten()
        use.columns.mass += x.shape[0] * x.shape[2]
        use.columns.positions += x.shape[0] * x.shape[2]
        use.columns.power = moments.diagonal_of(use.columns.moment)

    def _hold(self, use: Use, call: Call, in_place: bool) -> Held:
        """Keep the input of a linear map; weights that read the very same one share its sums."""
        last = self._last_input
        if last is not None and last[0] is call.input:
            held = last[1]
            use.columns = held.columns
            held.awaited += self._draws
            return held
        x = moments.inputs_of(call, self._n_samples).detach()
        stashed = self._stash.put(x.clone() if in_place else x)
        held = Held(stashed, use.columns, self._draws)
        use.columns.power += x.square().sum((0, 2)).flatten()
        use.columns.positions += x.shape[0] * x.shape[2]
        self._last_input = (call.input, held)
        self._held.append(held)
        return held

    def _looked_up(
        self, unit: Unit, use: Use, tokens: Tensor, value: Stashed, gradient: Tensor
    ) -> None:
        """Add the gradients that meet an embedding's rows."""
        meets = gradient.reshape(1, 1, -1, gradient.shape[-1])
        moments.add_second_moment(use.columns.moment, meets)
        use.columns.mass += tokens.numel()
        products = (gradient * value()).sum(-1).reshape(tokens.shape)
        self._add_relevance_of_tokens(unit, tokens, products)

    def _answered(
        self, unit: Unit, use: Use, held: Held | None, kept: Sequence[Stashed], gradient: Tensor
    ) -> None:
        """Add the gradient's second moment and the relevance of what the weight answers.

        Args:
            kept: What it answers; empty if that is added already.
        """
        g = moments.outputs_of(unit, gradient, self._n_samples)
        chosen = moments.thinned(g, moments.POSITIONS_AT_MOST) if unit.kind == "convolution" else g
        # The sum over all positions is wanted; what was left out is like what was kept.
        times = g.shape[2] / chosen.shape[2]
        for part in moments.parts_of(chosen):
            moments.add_second_moment(use.rows, part, times)
        for value in kept:
            self._add_products(unit, value(), gradient)
        if held is not None and unit.heads:
            weight = self._weights[unit.name + ".weight"].detach()
            heads = moments.head_products(held.x(), g, weight, unit.heads)
            for label, chosen in self._by_label(heads):
                add_to(self.sums.heads[label], unit.name, chosen.square().sum(0))
        if held is not None:
            meet(held, g)

    def _add_products(self, unit: Unit, value: Tensor, gradient: Tensor) -> None:
        """Add the relevance of each output channel, and how large it is."""
        products = moments.channel_products(unit, value, gradient, self._n_samples)
        self._add_relevance(unit, products)
        add_to(self.sums.taylor, unit.name, products.abs().sum(0))

    def _by_label(self, values: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield every slice label with the samples that carry it."""
        yield ALL, values
        if len(self._labels) == len(values):
            for label in sorted(set(self._labels)):
                chosen = [i for i, own in enumerate(self._labels) if own == label]
                yield label, values[chosen]

    def _add_relevance(self, unit: Unit, products: Tensor) -> None:
        for label, chosen in self._by_label(products):
            add_to(self.sums.channel[label], unit.name, chosen.square().sum(0))
            whole = self.sums.whole[label]
            whole[unit.name] = whole.get(unit.name, 0.0) + float(chosen.sum(1).square().sum())

    def _add_relevance_of_tokens(self, unit: Unit, tokens: Tensor, products: Tensor) -> None:
        for label, chosen in self._by_label(torch.arange(len(tokens))):
            rows = moments.token_products(tokens[chosen], products[chosen], unit.rows)
            add_to(self.sums.channel[label], unit.name, rows)
            whole = self.sums.whole[label]
            added = float(products[chosen].sum(1).square().sum())
            whole[unit.name] = whole.get(unit.name, 0.0) + added


def meet(held: Held, gradient: Tensor) -> None:
    """Count each input by the gradient that answers it; add it when the last one has come."""
    held.weights = held.weights + gradient.square().sum(-1)
    held.awaited -= 1
    if held.awaited == 0:
        add_held(held)


def add_held(held: Held) -> None:
    """Add an input to the sums, once."""
    if isinstance(held.weights, Tensor):  # a float where no gradient came, or it is added already
        x = held.x()
        scaled = x * held.weights.sqrt()[..., None]
        moments.add_second_moment(held.columns.moment, scaled)
        held.columns.total += (x * held.weights[..., None]).sum((0, 1, 2))
        held.columns.mass += float(held.weights.double().sum())
    held.x, held.weights = _nothing, 0.0


def _nothing() -> Tensor:
    return torch.empty(0)


def new_use(unit: Unit, call: Call, scratch: Scratch) -> Use:
    """Make zero sums; a diagonal where the full matrix would be too large."""
    rows, columns = curvature_shapes(unit, call.operation)
    n = 0 if call.operation == "embedding" else unit.groups * unit.columns
    sums = Columns(_zeros(columns, scratch), torch.zeros(n), torch.zeros(n))
    return Use(call.operation, _zeros(rows, scratch), sums)


def _zeros(shape: tuple[int, ...], scratch: Scratch) -> Tensor | Symmetric:
    return Symmetric(shape[1], scratch.zeros) if kept_by_half(shape) else torch.zeros(shape)


def kept_by_half(shape: tuple[int, ...]) -> bool:
    """Say whether an R or C of this shape is large enough to be kept without its lower half."""
    return len(shape) == 3 and shape[0] == 1 and shape[1] >= KEPT_BY_HALF_FROM


def kept_numbers(shape: tuple[int, ...]) -> int:
    """Count what is kept of an R or C of this shape."""
    return stored_numbers(shape[1]) if kept_by_half(shape) else math.prod(shape)


def curvature_shapes(unit: Unit, operation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of R and of each half of C for one use of a unit; diagonals where too large."""

    def side(groups: int, size: int, limit: int) -> tuple[int, ...]:
        return (groups * size,) if size > limit else (groups, size, size)

    if operation == "embedding":
        return (unit.rows,), side(1, unit.columns, FULL_COLUMNS_LIMIT)
    rows = side(unit.groups, unit.rows // unit.groups, FULL_ROWS_LIMIT)
    return rows, side(unit.groups, unit.columns, FULL_COLUMNS_LIMIT)


def add_to(sums: dict[str, Tensor], name: str, values: Tensor) -> None:
    """Add to what is there under a name."""
    if name in sums:
        sums[name] += values
    else:
        sums[name] = values.clone()
