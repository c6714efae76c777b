"""A and G: second moments of what enters a weight and of the gradients at what leaves it.

One forward and one backward pass over unlabelled data, the gradient being that of an answer
sampled from the model itself. Nothing but sums is kept, so memory does not grow with the data.

Source: Martens and Grosse 2015, Optimizing neural networks with Kronecker-factored approximate
curvature, https://arxiv.org/abs/1503.05671, section 3; convolutions as in Grosse and Martens 2016,
https://arxiv.org/abs/1602.01407, eq. 31 (positions taken as independent); embeddings and tied
weights by applying the same sum to one-hot inputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attar.divergence import Divergence
from attar.errors import DataError
from attar.explain import moments
from attar.records import Batch, Curvature, Model, Progress, Statistics, Unit, Units
from attar.sites import Call, watched

# A full C of this side is 100 MB in float32, and there are two; beyond it, the diagonal only.
FULL_COLUMNS_LIMIT = 5000
# R beyond this side is kept as its diagonal: rounding rows one by one makes errors that do not hang
# together between rows, so what lies off the diagonal hardly changes a price.
FULL_ROWS_LIMIT = 1024
# Samples of one backward pass, which keeps much for the way back.
SAMPLES_AT_ONCE = {"language": 1, "transcribe": 1, "classify": 2}
SAMPLES_AT_ONCE_OTHERWISE = 4
ALL = ""  # the slice that holds every sample


@dataclass
class _Use:
    """Running sums of one use of one weight."""

    operation: str
    rows: Tensor
    halves: list[Tensor]  # C of every other piece, and of the pieces between
    positions: list[int]
    is_answer: bool = False


@dataclass
class _Sums:
    """Running sums over all batches so far; keys are slice label, then unit name."""

    uses: dict[str, list[_Use]] = field(default_factory=lambda: defaultdict(list))
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


def gather_statistics(
    model: Model,
    units: Units,
    batches: Sequence[Batch],
    divergence: Divergence,
    *,
    seed: int,
    progress: Progress,
    slices: Sequence[Sequence[str]] = (),
    draws: int = 1,
) -> Statistics:
    """Run the model forward and backward over `batches` and keep the second moments.

    Args:
        divergence: Of the model's task; for "gaussian" already fitted.
        seed: Of the sampled answers.
        slices: Label of each sample of each batch, or empty.
        draws: Answers sampled per prediction; each more costs a backward pass.

    Raises:
        DataError: The model's outputs are not finite on this data.
    """
    gatherer = _Gatherer(model, units, divergence, seed, draws)
    with progress.stage("explain", len(batches)) as advance:
        for number, batch in enumerate(batches):
            labels = slices[number] if slices else ()
            for piece, piece_labels in pieces(batch, labels, model):
                gatherer.add(piece, piece_labels)
            advance(1)
    return gatherer.result()


def samples_at_once(task: str) -> int:
    """Samples of one forward and backward pass."""
    return SAMPLES_AT_ONCE.get(task, SAMPLES_AT_ONCE_OTHERWISE)


def pieces(
    batch: Batch, labels: Sequence[str], model: Model
) -> Iterator[tuple[Batch, Sequence[str]]]:
    """Cut a batch so that one backward pass stays small: one sequence, or a few other samples."""
    samples = len(next(iter(batch.values())))
    step = samples_at_once(model.task.name)
    for start in range(0, samples, step):
        piece = {name: tensor[start : start + step] for name, tensor in batch.items()}
        yield piece, labels[start : start + step]


class _Gatherer:
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
        self._sums = _Sums()
        self._labels: Sequence[str] = ()
        self._n_samples = 0
        self._calls: dict[str, int] = {}
        self._last: tuple[_Use, Tensor] | None = None
        self._last_input: tuple[Tensor, _Use] | None = None
        self._half = 1

    def add(self, batch: Batch, labels: Sequence[str]) -> None:
        """Add one small batch to the sums."""
        self._labels, self._calls, self._last_input = labels, defaultdict(int), None
        self._half = 1 - self._half
        self._n_samples = len(next(iter(batch.values())))
        batch = {
            name: t.detach().clone().requires_grad_() if t.is_floating_point() else t
            for name, t in batch.items()
        }
        with torch.enable_grad(), watched(self._model.module, self._visit):
            outputs = self._model.task.forward(self._model.module, batch)
        if not bool(torch.isfinite(outputs).all()):
            raise DataError(
                f"{self._model.name} answers with NaN or infinity on this data.",
                hint="look at the inputs with --data; are they scaled as the model expects?",
            )
        self._mark_answer(outputs)
        mask = batch.get("mask", torch.ones(outputs.shape[:2], dtype=torch.bool))
        self._count(mask)
        for draw in range(self._draws):
            gradient = self._gradient(outputs.detach(), mask, first=draw == 0)
            outputs.backward(gradient, retain_graph=draw + 1 < self._draws)  # type: ignore[no-untyped-call]

    def _gradient(self, outputs: Tensor, mask: Tensor, *, first: bool) -> Tensor:
        chosen = outputs[mask]
        if first and self._divergence.family == "categorical":
            p = chosen.softmax(-1)
            answers = p.sum(0)
            spread = answers - p.square_().sum(0)
            sums = self._sums
            sums.answers = answers if sums.answers is None else sums.answers + answers
            sums.spread = spread if sums.spread is None else sums.spread + spread
        gradient = torch.zeros_like(outputs)
        gradient[mask] = self._divergence.sampled_gradient(chosen, self._generator)
        return gradient

    def _mark_answer(self, outputs: Tensor) -> None:
        """Note which use of a weight makes the answer itself: its G is known without sampling."""
        if self._last is None or self._divergence.family != "categorical":
            return
        use, value = self._last
        use.is_answer = value.numel() == outputs.numel() and torch.equal(
            value.reshape(-1, value.shape[-1])[-1],
            outputs.detach().reshape(-1, outputs.shape[-1])[-1],
        )

    def _count(self, mask: Tensor) -> None:
        for sample, n in enumerate(mask.sum(1).tolist()):
            for label in {ALL, *self._labels[sample : sample + 1]}:
                self._sums.predictions[label] += n
                self._sums.samples[label] += 1

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
        value = output.detach().clone() if in_place else output.detach()
        self._last = (use, value)
        if call.operation == "embedding":
            # Positions, say, are looked up once for all samples: then there is one row of them.
            tokens = call.input.reshape(len(call.input) if call.input.dim() > 1 else 1, -1)
            use.rows += torch.bincount(tokens.flatten(), minlength=unit.rows)
            use.positions[self._half] += tokens.numel()
            output.register_hook(lambda g: self._looked_up(unit, use, tokens, value, g))  # type: ignore[no-untyped-call]
            return output
        self._add_inputs(use, call)
        x = moments.inputs_of(call, self._n_samples).detach() if unit.heads else None
        output.register_hook(lambda g: self._answered(unit, use, x, value, g))  # type: ignore[no-untyped-call]
        return output

    def _use(self, unit: Unit, call: Call) -> _Use:
        """Find the sums of this call: the first call of a weight is its first use, and so on."""
        number = self._calls[unit.name]
        self._calls[unit.name] += 1
        uses = self._sums.uses[unit.name]
        if number == len(uses):
            uses.append(_new_use(unit, call))
        return uses[number]

    def _add_inputs(self, use: _Use, call: Call) -> None:
        """Add to A; weights that read the very same input (q, k and v, say) share one."""
        last = self._last_input
        linear = last is not None and call.operation == last[1].operation == "linear"
        if linear and last is not None and last[0] is call.input:
            use.halves, use.positions = last[1].halves, last[1].positions
            return
        x = moments.inputs_of(call, self._n_samples, moments.POSITIONS_AT_MOST).detach()
        moments.add_second_moment(use.halves[self._half], x)
        use.positions[self._half] += x.shape[0] * x.shape[2]
        self._last_input = (call.input, use)

    def _looked_up(
        self, unit: Unit, use: _Use, tokens: Tensor, value: Tensor, gradient: Tensor
    ) -> None:
        """Add the gradients that meet an embedding's rows."""
        moments.add_second_moment(
            use.halves[self._half], gradient.reshape(1, 1, -1, gradient.shape[-1])
        )
        products = (gradient * value).sum(-1).reshape(tokens.shape)
        self._add_relevance_of_tokens(unit, tokens, products)

    def _answered(
        self, unit: Unit, use: _Use, x: Tensor | None, value: Tensor, gradient: Tensor
    ) -> None:
        """Add the gradient's second moment and the relevance of what the weight answers."""
        g = moments.outputs_of(unit, gradient, self._n_samples)
        y = moments.outputs_of(unit, value, self._n_samples)
        chosen = moments.thinned(g, moments.POSITIONS_AT_MOST) if unit.kind == "convolution" else g
        # The sum over all positions is wanted; what was left out is like what was kept.
        moments.add_second_moment(use.rows, chosen, g.shape[2] / chosen.shape[2])
        products = moments.channel_products(y, g)
        self._add_relevance(unit, products)
        _add_to(self._sums.activation, unit.name, y.abs().sum((0, 2)).flatten())
        self._sums.outputs[unit.name] += y.shape[0] * y.shape[2]
        _add_to(self._sums.taylor, unit.name, products.abs().sum(0))
        if x is not None:
            weight = self._weights[unit.name + ".weight"].detach()
            heads = moments.head_products(x, g, weight, unit.heads)
            for label, chosen in self._by_label(heads):
                _add_to(self._sums.heads[label], unit.name, chosen.square().sum(0))

    def _by_label(self, values: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield every slice label with the samples that carry it."""
        yield ALL, values
        if len(self._labels) == len(values):
            for label in sorted(set(self._labels)):
                chosen = [i for i, own in enumerate(self._labels) if own == label]
                yield label, values[chosen]

    def _add_relevance(self, unit: Unit, products: Tensor) -> None:
        for label, chosen in self._by_label(products):
            _add_to(self._sums.channel[label], unit.name, chosen.square().sum(0))
            whole = self._sums.whole[label]
            whole[unit.name] = whole.get(unit.name, 0.0) + float(chosen.sum(1).square().sum())

    def _add_relevance_of_tokens(self, unit: Unit, tokens: Tensor, products: Tensor) -> None:
        for label, chosen in self._by_label(torch.arange(len(tokens))):
            rows = moments.token_products(tokens[chosen], products[chosen], unit.rows)
            _add_to(self._sums.channel[label], unit.name, rows)
            whole = self._sums.whole[label]
            added = float(products[chosen].sum(1).square().sum())
            whole[unit.name] = whole.get(unit.name, 0.0) + added

    def result(self) -> Statistics:
        """Turn the sums into means per prediction."""
        sums, draws = self._sums, self._draws
        n = sums.predictions[ALL]

        def per_prediction(by_label: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
            """Half the mean square: second order, nats per prediction."""
            return {
                label: {u: 0.5 * v / (sums.predictions[label] * draws) for u, v in of.items()}
                for label, of in by_label.items()
            }

        curvatures = self._curvatures(n)
        reads = {
            unit.name: [use != "embedding" for use in unit.uses] for unit in self._units.values()
        }
        return Statistics(
            curvatures=curvatures,
            column_power={
                name: _power(curvatures[name][linear.index(True)])
                for name, linear in reads.items()
                if any(linear)
            },
            channel_relevance=per_prediction(sums.channel),
            unit_relevance=per_prediction(sums.whole),
            head_relevance=per_prediction(sums.heads),
            channel_activation={
                name: total / sums.outputs[name] for name, total in sums.activation.items()
            },
            channel_taylor={name: total / (n * draws) for name, total in sums.taylor.items()},
            n_predictions=n,
            n_samples=dict(sums.samples),
        )

    def _curvatures(self, n: int) -> dict[str, tuple[Curvature, ...]]:
        """Curvature of every unit; uses that share an input go on sharing its moment."""
        done: dict[int, tuple[Tensor, Tensor]] = {}
        curvatures = {}
        for unit in self._units.values():
            uses = self._sums.uses[unit.name]
            curvatures[unit.name] = tuple(self._curvature(use, n, done) for use in uses)
        return curvatures

    def _curvature(self, use: _Use, n: int, done: dict[int, tuple[Tensor, Tensor]]) -> Curvature:
        """Normalise one use so that damage comes out in nats per prediction."""
        if id(use.halves) not in done:
            done[id(use.halves)] = _means(use, self._draws if use.operation == "embedding" else 1)
        first, second = done[id(use.halves)]
        if use.operation == "embedding":
            # The one-hot input is the frequency; gradients are what the columns meet.
            frequency = moments.token_frequency(use.rows, self._sums.answers)
            return Curvature(frequency * (sum(use.positions) / n), first, second)
        if use.is_answer and use.rows.dim() == 1 and self._sums.spread is not None:
            return Curvature(self._sums.spread / n, first, second)
        return Curvature(use.rows / (n * self._draws), first, second)


def _means(use: _Use, draws: int) -> tuple[Tensor, Tensor]:
    """Turn the two sums into means; a single piece of data stands for both halves."""
    means = [
        half.div_(max(1, n * draws)) for half, n in zip(use.halves, use.positions, strict=True)
    ]
    if use.positions[1] == 0:
        return means[0], means[0]
    return means[0], means[1]


def _new_use(unit: Unit, call: Call) -> _Use:
    """Make zero sums; a diagonal where the full matrix would be too large."""
    shapes = curvature_shapes(unit, call.operation)
    halves = [torch.zeros(shapes[1]) for _ in range(2)]
    return _Use(call.operation, torch.zeros(shapes[0]), halves, [0, 0])


def curvature_shapes(unit: Unit, operation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of R and of each half of C for one use of a unit; diagonals where too large."""

    def side(groups: int, size: int, limit: int) -> tuple[int, ...]:
        return (groups * size,) if size > limit else (groups, size, size)

    if operation == "embedding":
        return (unit.rows,), side(1, unit.columns, FULL_COLUMNS_LIMIT)
    rows = side(unit.groups, unit.rows // unit.groups, FULL_ROWS_LIMIT)
    return rows, side(unit.groups, unit.columns, FULL_COLUMNS_LIMIT)


def tracked(output: Tensor) -> Tensor:
    """Start the graph at a tensor nothing before it needs gradients for.

    The copy is not a leaf, so that the model may go on to change it in place.
    """
    return output.detach().requires_grad_().clone()


def statistics_bytes(units: Units) -> int:
    """Bytes of every R and C before weights that read one input share theirs, and of the sums."""
    numbers = 0
    for unit in units:
        for use in unit.uses:
            rows, columns = curvature_shapes(unit, use)
            # Relevance, activation and Taylor sums of each channel.
            numbers += torch.Size(rows).numel() + 2 * torch.Size(columns).numel() + 4 * unit.rows
    return numbers * torch.float32.itemsize


def _power(curvature: Curvature) -> Tensor:
    """E[x²] per column, mean over groups."""
    columns = curvature.columns
    return columns if columns.dim() == 1 else columns.diagonal(dim1=1, dim2=2).mean(0)


def _add_to(sums: dict[str, Tensor], name: str, values: Tensor) -> None:
    if name in sums:
        sums[name] += values
    else:
        sums[name] = values.clone()
