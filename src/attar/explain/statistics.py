"""A and G: second moments of what enters a weight and of the gradients at what leaves it.

One forward and one backward pass over unlabelled data, the gradient being that of an answer
sampled from the model itself. Nothing but sums is kept, so memory does not grow with the data.
Two streams, each on one thread, take the samples in turns: each makes one half of C.

Source: Martens and Grosse 2015, Optimizing neural networks with Kronecker-factored approximate
curvature, https://arxiv.org/abs/1503.05671, section 3; convolutions as in Grosse and Martens 2016,
https://arxiv.org/abs/1602.01407, eq. 31 (positions taken as independent); embeddings and tied
weights by applying the same sum to one-hot inputs.

A of a linear map differs: an input counts as much as the squared gradient that answers it, A =
E[|g|² x xᵀ] / E[|g|²], which is exact for errors that are alike in all rows. Plain E[x xᵀ] fills
with what does not matter where a few tokens have huge inputs and no gradient. Source: Kim et al.
2025, GuidedQuant, https://arxiv.org/abs/2505.07004, eq. 7 with one group of output channels. We
sample the answer from the model instead of taking it from the data, and weights that read one
input share one A, weighted by the gradients of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from copy import deepcopy
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from attar.disk import Scratch, lies_on_disk
from attar.divergence import Divergence
from attar.explain.gatherer import (
    ALL,
    Columns,
    Gatherer,
    Sums,
    Use,
    curvature_shapes,
    kept_numbers,
)
from attar.explain.moments import add_second_moment, hedged, token_frequency
from attar.kernels.symmetric import Packed, Symmetric
from attar.memory import release
from attar.parallel import in_order
from attar.records import MEAN_HEDGE, Batch, Curvature, Model, Progress, Statistics, Unit, Units

# What one stream saw is priced against what the other saw.
STREAMS = 2
# Samples of one backward pass, which keeps much for the way back.
SAMPLES_AT_ONCE = {"language": 1, "transcribe": 1, "classify": 2}
SAMPLES_AT_ONCE_OTHERWISE = 4

Piece = tuple[Batch, Sequence[str]]
"""A few samples with their slice labels."""


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

    Where the weights lie on disk, sums and what waits for the way back go to scratch files.

    Args:
        divergence: Of the model's task; for "gaussian" already fitted.
        seed: Of the sampled answers.
        slices: Label of each sample of each batch, or empty.
        draws: Answers sampled per prediction; each more costs a backward pass.

    Raises:
        DataError: The model's outputs are not finite on this data.
    """
    labels = slices or [()] * len(batches)
    dealt = [
        piece
        for batch, own in zip(batches, labels, strict=True)
        for piece in pieces(batch, own, model)
    ]
    on_disk = lies_on_disk(model.module)
    with progress.stage("explain", len(dealt)) as advance:

        def gather(stream: int) -> Sums:
            gatherer = Gatherer(model, units, divergence, seed * STREAMS + stream, draws)
            with closing(gatherer):
                for piece in dealt[stream::STREAMS]:
                    gatherer.add(*piece)
                    release()
                    advance(1)
            return gatherer.sums

        first, second = in_order(gather, range(STREAMS))
    return _result(units, first, second, draws, Scratch(on_disk=on_disk))


def samples_at_once(task: str) -> int:
    """Samples of one forward and backward pass."""
    return SAMPLES_AT_ONCE.get(task, SAMPLES_AT_ONCE_OTHERWISE)


def pieces(batch: Batch, labels: Sequence[str], model: Model) -> Iterator[Piece]:
    """Cut a batch so that one backward pass stays small: one sequence, or a few other samples."""
    samples = len(next(iter(batch.values())))
    step = samples_at_once(model.task.name)
    for start in range(0, samples, step):
        piece = {name: tensor[start : start + step] for name, tensor in batch.items()}
        yield piece, labels[start : start + step]


def _result(units: Units, first: Sums, second: Sums, draws: int, scratch: Scratch) -> Statistics:
    """Turn the sums of both streams into means per prediction; `first` is used up."""
    pairs = {unit.name: _pairs(first, second, unit.name) for unit in units}
    sums = _joined(first, second)
    n = sums.predictions[ALL]

    def per_prediction(by_label: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Half the mean square: second order, nats per prediction."""
        return {
            label: {u: 0.5 * v / (sums.predictions[label] * draws) for u, v in of.items()}
            for label, of in by_label.items()
        }

    power = {unit.name: _power(unit, pairs[unit.name]) for unit in units}
    return Statistics(
        curvatures=_curvatures(units, pairs, sums, n, draws, scratch),
        column_power={name: mean for name, mean in power.items() if mean is not None},
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


Pair = tuple[Use, Use | None]
"""One use of a weight as both streams saw it; the second saw nothing of a single piece of data."""


def _pairs(first: Sums, second: Sums, name: str) -> list[Pair]:
    seen = zip_longest(first.uses[name], second.uses[name])
    # A weight that the data decides whether to use may have been used by the second stream only.
    return [(other, None) if one is None else (one, other) for one, other in seen]


def _joined(first: Sums, second: Sums) -> Sums:
    """Add the second sums, but for those of the uses, to the first."""
    named = ("channel", "whole", "heads", "activation", "taylor")
    for kind in (*named, "outputs", "predictions", "samples"):
        _add_all(getattr(first, kind), getattr(second, kind))
    for kind in ("answers", "spread"):
        if getattr(second, kind) is not None:
            setattr(first, kind, getattr(first, kind) + getattr(second, kind))
    return first


def _add_all(total: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add sums by name, or by slice label and name."""
    for name, value in more.items():
        if isinstance(value, dict):
            _add_all(total[name], value)
        else:
            total[name] = total[name] + value if name in total else value


Half = Tensor | Symmetric | Packed
Kept = tuple[Half, Half, Half, Half | None, Tensor | None]
"""`rows`, `first`, `second`, `rows_first` and `means` of a curvature."""


class Curvatures(Mapping[str, tuple[Curvature, ...]]):
    """Curvature of every unit; what is kept by half is made whole each time it is asked for."""

    def __init__(self, kept: Mapping[str, tuple[Kept, ...]]) -> None:
        self._kept = kept

    def __getitem__(self, name: str) -> tuple[Curvature, ...]:
        return tuple(self._whole(*kept) for kept in self._kept[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def only(self, name: str) -> Curvatures:
        """Those of one unit."""
        return Curvatures({name: self._kept[name]})

    @staticmethod
    def _whole(
        rows: Half, first: Half, second: Half, rows_first: Half | None, means: Tensor | None
    ) -> Curvature:
        one = _dense(first)
        return Curvature(
            _dense(rows),
            one,
            one if second is first else _dense(second),
            None if rows_first is None else _dense(rows_first),
            means,
        )


def of_unit(statistics: Statistics, name: str) -> Statistics:
    """Keep what pricing and treating one unit needs; its curvature stays as small as it is kept."""
    curvatures = statistics.curvatures
    if isinstance(curvatures, Curvatures):
        curvatures = curvatures.only(name)
    else:
        curvatures = {name: curvatures[name]}
    return Statistics(
        curvatures=curvatures,
        column_power={},
        channel_relevance={},
        unit_relevance={},
        head_relevance={},
        channel_activation={},
        channel_taylor={},
        n_predictions=statistics.n_predictions,
        n_samples={},
        coherence={kind: _only(of, name) for kind, of in statistics.coherence.items()},
        row_gain=_only(statistics.row_gain, name),
    )


def _only(by_unit: Mapping[str, float], name: str) -> dict[str, float]:
    return {name: by_unit[name]} if name in by_unit else {}


def _dense(half: Half) -> Tensor:
    return half if isinstance(half, Tensor) else half.dense()[None]


def _packed(half: Half, scratch: Scratch) -> Half:
    """Keep a large matrix in 16 bits."""
    return half.packed(scratch.moved) if isinstance(half, Symmetric) else half


Moments = tuple[Half, Half, Tensor | None]
"""`first`, `second` and `means` of a curvature."""


def _curvatures(
    units: Units,
    pairs: Mapping[str, Sequence[Pair]],
    sums: Sums,
    n: int,
    draws: int,
    scratch: Scratch,
) -> Curvatures:
    """Curvature of every unit; uses that share an input go on sharing its moment."""
    for columns in _distinct(pairs):
        columns.moment.div_(columns.mass or 1.0)
        columns.total.div_(columns.mass or 1.0)
    done: dict[tuple[int, bool], Moments] = {}

    def of_unit(unit: Unit) -> tuple[Kept, ...]:
        return tuple(
            _curvature(
                pair, sums, n, draws, _moments(pair, bool(unit.bias), done, scratch), scratch
            )
            for pair in pairs[unit.name]
        )

    return Curvatures({unit.name: of_unit(unit) for unit in units})


def _distinct(pairs: Mapping[str, Sequence[Pair]]) -> Iterable[Columns]:
    uses = (use for of in pairs.values() for pair in of for use in pair if use is not None)
    return {id(use.columns): use.columns for use in uses}.values()


def _curvature(
    pair: Pair, sums: Sums, n: int, draws: int, moments: Moments, scratch: Scratch
) -> Kept:
    """Normalise one use so that damage comes out in nats per prediction."""
    use, other = pair
    first, second, means = moments
    rows: Any = use.rows
    positions = use.columns.positions
    diagonal = isinstance(rows, Tensor) and rows.dim() == 1
    exact = use.is_answer and diagonal and sums.spread is not None
    rows_first = None
    if other is not None:
        if use.operation != "embedding" and not exact:
            # Each stream saw half of the predictions.
            rows_first = _packed(deepcopy(rows).div_(0.5 * n * draws), scratch)
        rows, positions = rows.add_(other.rows), positions + other.columns.positions
    if use.operation == "embedding":
        # The one-hot input is the frequency; gradients are what the columns meet.
        return token_frequency(rows, sums.answers) * (positions / n), first, second, None, None
    if exact:
        assert sums.spread is not None
        return hedged(sums.spread / n), first, second, None, means
    return _packed(rows.div_(n * draws), scratch), first, second, rows_first, means


def _moments(
    pair: Pair, biased: bool, done: dict[tuple[int, bool], Moments], scratch: Scratch
) -> Moments:
    """C of both halves, about the mean where a bias takes the mean error away.

    What was rounded on the first half moves the bias by the mean of the first half. So C of the
    second, which prices it, is about that mean too: the two halves' means differ by chance. And
    the mean of other data by more than chance: a part of its square stays in C.
    """
    seen = [use.columns for use in pair if use is not None]
    key = (id(seen[0]), biased)
    if key not in done:
        means = torch.stack([seen[0].total, seen[-1].total]) if biased else None
        halves = [_packed(_about(columns, means), scratch) for columns in seen]
        # A single piece of data stands for both halves.
        done[key] = halves[0], halves[-1], means
    return done[key]


def _about(columns: Columns, means: Tensor | None) -> Tensor | Symmetric:
    """Second moment about the first half's mean; about zero where there is none."""
    if means is None:
        return columns.moment
    moment, own = deepcopy(columns.moment), columns.total
    for shift, times in ((own, -1.0), (own - means[0], 1.0), (means[0], MEAN_HEDGE)):
        add_second_moment(moment, _as_value(moment, shift), times)
    if isinstance(moment, Tensor):  # one that is packed is cut off there
        diagonal = moment if moment.dim() == 1 else moment.diagonal(dim1=1, dim2=2)
        diagonal.clamp_(min=0)  # a column that never moves may come out below by rounding
    return moment


def _as_value(moment: Tensor | Symmetric, mean: Tensor) -> Tensor:
    """Bring a mean to the layout of one input, `1 groups 1 columns`."""
    groups = len(moment) if isinstance(moment, Tensor) and moment.dim() == 3 else 1
    return mean.reshape(1, groups, 1, -1)


def statistics_bytes(units: Units) -> int:
    """Bytes of every R and C before weights that read one input share theirs, and of the sums."""
    numbers = 0
    for unit in units:
        for use in unit.uses:
            rows, columns = curvature_shapes(unit, use)
            # And relevance, activation and Taylor sums of each channel.
            numbers += STREAMS * (kept_numbers(rows) + kept_numbers(columns) + 4 * unit.rows)
    return numbers * torch.float32.itemsize


def _power(unit: Unit, pairs: Sequence[Pair]) -> Tensor | None:
    """E[x²] per column in the first use that has inputs, mean over groups; None if none has."""
    for pair in pairs:
        if pair[0].operation != "embedding":
            seen = [use.columns for use in pair if use is not None]
            total = torch.stack([columns.power for columns in seen]).sum(0)
            mean = total / sum(columns.positions for columns in seen)
            return mean.reshape(unit.groups, -1).mean(0)
    return None
