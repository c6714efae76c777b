"""What is known of a link's channels, from the statistics of the units that read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attar.links import COLUMNS, GAIN, ROWS, Change, Link, Mix, Reader, on_features
from attar.records import MEAN_HEDGE, Batch, Curvature, Statistics, Unit
from attar.sites import Call, watched

TINY = 1e-30


@dataclass(frozen=True)
class Facts:
    """Of the channels of one link, as its readers meet them.

    Attributes:
        power: E[x²], each input counted by what it matters, summed over readers.
        moment: E[x xᵀ] of each block of the link, `blocks width width`; None without blocks.
        sizes: Root mean square of what each channel meets in the readers, weight units.
        mean: E[x]; None where it is not known.
        low: Least value seen; None where it is not known.
        high: Largest value seen; None where it is not known.
        written: Rows that write the channels, with their biases, `channels numbers`; None where
            the writer has none, or a channel is read more than once.
        read: What reads them, `channels numbers`.
    """

    power: Float[Tensor, " channels"]
    moment: Tensor | None
    sizes: Float[Tensor, " channels"]
    mean: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    written: Tensor | None = None
    read: Tensor | None = None


@runtime_checkable
class Fold(Protocol):
    """A method with its settings: a frozen dataclass; one file `fold_*.py` each."""

    def refuses(self, link: Link) -> str | None:
        """Say why this link cannot have this change; None where it can."""

    def change(self, link: Link, facts: Facts) -> Change:
        """Work out the change; the same facts give the same change."""


def facts_of(
    link: Link,
    state: Mapping[str, Tensor],
    units: Mapping[str, Unit],
    statistics: Statistics,
    ranges: Mapping[str, tuple[Tensor, Tensor]],
) -> Facts:
    """Put together what is known of a link.

    Args:
        units: By the parameter name of their weight.
        ranges: Link name to the least and largest value of each channel.
    """
    power = torch.zeros(link.channels, dtype=torch.float64)
    moment = None if link.blocks is None else torch.zeros(*link.blocks.shape, link.blocks.shape[1])
    squares, means = torch.zeros_like(power), []
    for reader in link.readers:
        unit = units[reader.weight]
        curvature = statistics.curvatures[unit.name][-1]
        columns = curvature.columns.double() * curvature.rows_mean
        diagonal = columns if columns.dim() == 1 else columns.diagonal(dim1=1, dim2=2).flatten()
        power += _on_channels(diagonal.reshape(len(reader.reached), -1).sum(1), reader, link)
        weight = state[reader.weight].double()
        by_feature = weight.reshape(reader.groups, -1, weight.shape[1], weight[0, 0].numel())
        squares += _on_channels(by_feature.square().sum((1, 3)).flatten(), reader, link)
        if curvature.means is not None and len(curvature.means[0]) == len(reader.reached):
            mean = curvature.means.mean(0)
            counts = torch.bincount(reader.reached.clamp(min=0), minlength=link.channels)
            means.append(_on_channels(mean, reader, link) / counts.clamp(min=1))
        if moment is not None and columns.dim() == 3 and link.blocks is not None:
            moment = moment + _block_moments(columns[0], reader, link.blocks)
    low, high = ranges.get(link.name, (None, None))
    return Facts(
        power=power.clamp(min=TINY),
        moment=moment,
        sizes=squares.sqrt().clamp(min=TINY),
        mean=torch.stack(means).mean(0) if means else None,
        low=low,
        high=high,
        **_matrices(link, state),
    )


def _matrices(link: Link, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Show what writes and reads each channel, where every channel is read once."""
    one_each = all(
        r.groups == 1 and torch.equal(r.reached.sort().values, torch.arange(link.channels))
        for r in link.readers
    )
    if not one_each or any(writer.side != ROWS for writer in link.writers):
        return {}
    written = [state[w.weight].double().flatten(1) for w in link.writers]
    written += [state[w.bias].double()[:, None] for w in link.writers if w.bias is not None]
    read = [state[r.weight].double()[:, r.reached.argsort()] for r in link.readers]
    return {
        "written": torch.cat(written, 1),
        "read": torch.cat([one.transpose(0, 1).flatten(1) for one in read], 1),
    }


def _on_channels(of_features: Tensor, reader: Reader, link: Link) -> Tensor:
    """Add up what belongs to each channel."""
    known = reader.reached >= 0
    total = torch.zeros(link.channels, dtype=torch.float64)
    return total.index_add_(0, reader.reached[known], of_features.double()[known])


def _block_moments(columns: Tensor, reader: Reader, blocks: Tensor) -> Tensor:
    """Sum the moment of every place where a block of channels comes."""
    eye = torch.arange(len(blocks), dtype=torch.float64)[:, None, None].expand(*blocks.shape, 1)
    spread = on_features(reader, Mix(eye, blocks))
    assert spread.places is not None
    total = torch.zeros(*blocks.shape, blocks.shape[1], dtype=torch.float64)
    for place, number in zip(spread.places, spread.by[:, 0, 0], strict=True):
        total[int(number)] += columns[place][:, place]
    return total


# ---------------------------------------------------------------------------------------------
# statistics after a change


@dataclass(frozen=True)
class Side:
    """What one change does to one factor of a unit's curvature.

    Attributes:
        is_rows: Whether to R; else to C.
        mix: M of M C Mᵀ.
        shift: What was taken off each column before. C is about the mean wherever a bias can take
            a constant up, so only the means change.
    """

    is_rows: bool
    mix: Mix
    shift: Tensor | None = None


def sides(link: Link, change: Change, units: Mapping[str, Unit]) -> Iterator[tuple[str, Side]]:
    """Say what a change does to the curvature of each unit, by name.

    Inputs x become G x, so A becomes G A Gᵀ; gradients g at what is written become Hᵀ g. How each
    input counts in A changes a little with g where g is scaled; that is left as it was.
    """
    done = set()
    for reader in link.readers:
        unit, mix, shift = units[reader.weight], on_features(reader, change.write), None
        mix = _on_columns(mix, unit.columns * unit.groups // len(reader.reached))
        if change.shift is not None:
            taken = torch.cat([change.shift.double(), torch.zeros(1, dtype=torch.float64)])
            shift = taken[reader.reached]
        done.add(reader.weight)
        yield unit.name, Side(False, mix, shift)
    for writer in link.writers:
        if writer.side == GAIN or writer.weight in done:
            continue
        yield units[writer.weight].name, Side(writer.side != COLUMNS, change.read.transposed())


def _on_columns(mix: Mix, kernel: int) -> Mix:
    """Spread what holds for input features over the columns of a convolution."""
    if kernel == 1:
        return mix
    if mix.places is None:
        return Mix(mix.by.repeat_interleave(kernel))
    inside = torch.arange(kernel)
    places = (mix.places[..., None] * kernel + inside).flatten(1)
    eye = torch.eye(kernel, dtype=mix.by.dtype)
    return Mix(torch.stack([torch.kron(one, eye) for one in mix.by]), places)


class ChangedCurvatures(Mapping[str, tuple[Curvature, ...]]):
    """Curvatures after changes; worked out each time one is asked for, so that none is kept."""

    def __init__(
        self,
        before: Mapping[str, tuple[Curvature, ...]],
        changed: Mapping[str, Sequence[Side]],
    ) -> None:
        self._before, self._changed = before, changed

    def __getitem__(self, name: str) -> tuple[Curvature, ...]:
        found = self._before[name]
        for side in self._changed.get(name, ()):
            found = tuple(changed_curvature(one, side) for one in found)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._before)

    def __len__(self) -> int:
        return len(self._before)


def changed_curvature(curvature: Curvature, side: Side) -> Curvature:
    """Curvature of a unit after one side of a change."""
    both: Callable[[Tensor], Tensor] = lambda factor: _both(factor, side.mix)  # noqa: E731
    if side.is_rows:
        first = None if curvature.rows_first is None else both(curvature.rows_first)
        return replace(curvature, rows=both(curvature.rows), rows_first=first)
    means, halves = curvature.means, (both(curvature.first), both(curvature.second))
    if means is not None:
        before = side.mix.rows(means.double().T).T.float()
        taken = 0.0 if side.shift is None else side.shift
        means = side.mix.rows((means.double() - taken).T).T.float()
        first, second = (_about(half, before[0], means[0]) for half in halves)
        halves = first, second
    return replace(curvature, first=halves[0], second=halves[1], means=means)


def _about(factor: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """C holds a part of the mean's square, and that is another one now."""
    if factor.dim() == 1:
        return factor + MEAN_HEDGE * (after.square() - before.square())
    old, new = (mean.reshape(len(factor), -1, 1) for mean in (before, after))
    return factor + MEAN_HEDGE * (new @ new.transpose(1, 2) - old @ old.transpose(1, 2))


def _both(factor: Tensor, mix: Mix) -> Tensor:
    """M C Mᵀ of a diagonal, one matrix, or one matrix per group."""
    if factor.dim() == 1:
        return mix.both(factor).float()
    if len(factor) == 1:
        return mix.both(factor[0])[None].float()
    by = mix.by.reshape(len(factor), -1)
    return (factor.double() * by[:, :, None] * by[:, None, :]).float()


# ---------------------------------------------------------------------------------------------
# ranges


def channel_ranges(
    module: nn.Module,
    run: Callable[[Batch], Tensor],
    batches: Sequence[Batch],
    links: Sequence[Link],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Run the model and keep the least and the largest value of every channel."""
    wanted: dict[str, list[Link]] = {}
    for link in links:
        wanted.setdefault(link.readers[0].weight, []).append(link)
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def visit(call: Call) -> Tensor:
        for link in wanted.get(call.name, ()):
            x = call.input.detach().movedim(1 if call.operation == "convolution" else -1, 0)
            flat, reached = x.flatten(1), link.readers[0].reached
            known = reached >= 0
            low, high = found.get(link.name, (torch.full((link.channels,), torch.inf), -torch.inf))
            seen = reached[known]
            low = low.scatter_reduce(0, seen, flat.amin(1)[known], "amin")
            high = torch.as_tensor(high).expand(link.channels)
            high = high.scatter_reduce(0, seen, flat.amax(1)[known], "amax")
            found[link.name] = low, high
        return call.run()

    with torch.no_grad(), watched(module, visit):
        for batch in batches:
            run(batch)
    return found
