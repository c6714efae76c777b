"""Places where channels can be changed without changing what the model answers, and the change.

What a writer makes (rows of a linear map or convolution, the gain of a norm) reaches readers
(columns of linear maps and convolutions) only through operations that a change of channels passes
unchanged. With G W_writer, and W_reader H, the answer stays the same wherever H G x = x:

    scale       H = diag(s), G = 1/H                        any sign-keeping path (s > 0)
    rotation    H = Q, G = Qᵀ, block by block               a linear path that mixes whole blocks
    reassembly  H and G not square roots of one, but H G x = x for every x that can occur
    shift       x - z before G; W_reader z joins the reader's bias

Source: Nagel et al. 2019, Data-free quantization through weight equalization and bias correction,
https://arxiv.org/abs/1906.04721, section 4.1 (scale through a positively homogeneous
activation); for rotation Ashkboos et al. 2024, QuaRot, https://arxiv.org/abs/2404.00456, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ROWS, GAIN, COLUMNS = "rows", "gain", "columns"


@dataclass(frozen=True)
class Writer:
    """A parameter that makes channels.

    Attributes:
        weight: Parameter name.
        side: "rows" of a matrix, "gain" of a norm, or "columns" of an embedding.
        bias: Parameter name of what is added after it, or None.
        offset: What is added to a stored gain to get the real one.
    """

    weight: str
    side: str = ROWS
    bias: str | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class Reader:
    """A parameter whose columns meet channels.

    Attributes:
        weight: Parameter name.
        reached: Channel that meets each input feature, -1 where none of this link does.
        bias: Parameter name, or None.
        groups: Of a convolution.
    """

    weight: str
    reached: Int[Tensor, " features"]
    bias: str | None = None
    groups: int = 1


@dataclass(frozen=True)
class Link:
    """Writers and readers of the same channels.

    Attributes:
        name: Of the module that writes.
        kind: "norm", "values", "product", "linear", "convolution" or "stream", for people.
        channels: How many.
        free: Which of them may change; the others also go where a change would show.
        blocks: Channels that may be mixed with each other, `blocks width`; None where none may.
        can_shift: Whether a constant may be taken off: it passes the path, and biases take it up.
    """

    name: str
    kind: str
    writers: tuple[Writer, ...]
    readers: tuple[Reader, ...]
    channels: int
    free: Bool[Tensor, " channels"]
    blocks: Int[Tensor, "blocks width"] | None = None
    can_shift: bool = False

    @property
    def weights(self) -> tuple[str, ...]:
        """Every matrix that a change touches, once."""
        matrices = [one.weight for one in self.writers if one.side != GAIN]
        return tuple(dict.fromkeys([*matrices, *(one.weight for one in self.readers)]))


@dataclass(frozen=True)
class Mix:
    """One side of a change: what multiplies channels.

    Attributes:
        by: `size` to multiply each by a number, or one matrix per block, `blocks width width`.
        places: Where each block's channels lie, `blocks width`; None for a vector.
    """

    by: Tensor
    places: Tensor | None = None

    def rows(self, tensor: Tensor) -> Tensor:
        """Multiply the first dimension from the left, in float64."""
        flat = tensor.double().reshape(len(tensor), -1)
        if self.places is None:
            return (flat * self.by[:, None]).reshape(tensor.shape)
        new = flat.clone()
        for place, matrix in zip(self.places, self.by, strict=True):
            new[place] = matrix @ flat[place]
        return new.reshape(tensor.shape)

    def columns(self, tensor: Tensor) -> Tensor:
        """Multiply the second dimension from the right, in float64."""
        return self.transposed().rows(tensor.transpose(0, 1)).transpose(0, 1)

    def both(self, moment: Tensor) -> Tensor:
        """Give M A Mᵀ of a square matrix A, in float64; of a diagonal, its own."""
        if moment.dim() == 1:
            squared = Mix(self.by.square(), self.places)  # exact but for what is not known
            return squared.rows(moment)
        return self.transposed().columns(self.rows(moment))

    def transposed(self) -> Mix:
        """The same with each matrix transposed."""
        return self if self.places is None else Mix(self.by.transpose(1, 2), self.places)


@dataclass(frozen=True)
class Change:
    """What is done to the channels of a link.

    Attributes:
        write: G, which the writers' rows are multiplied by.
        read: H, which the readers' columns are multiplied by.
        shift: z, taken off each channel before G; None for none.
    """

    write: Mix
    read: Mix
    shift: Float[Tensor, " channels"] | None = None


def scaling(factors: Float[Tensor, " channels"], shift: Tensor | None = None) -> Change:
    """Divide channels by factors, and multiply what reads them."""
    factors = factors.double()
    return Change(Mix(1 / factors), Mix(factors), shift)


def rotation(link: Link, matrices: Float[Tensor, "blocks width width"]) -> Change:
    """Turn the blocks of a link; `matrices` are orthogonal."""
    assert link.blocks is not None
    read = Mix(matrices.double(), link.blocks)
    return Change(read.transposed(), read)


def on_features(reader: Reader, mix: Mix) -> Mix:
    """Spread one side of a change over the features of a reader, where channels may come often."""
    reached = reader.reached
    if mix.places is None:
        known = torch.cat([mix.by, mix.by.new_ones(1)])  # the last one: of no channel
        return Mix(known[reached])
    order = torch.argsort(reached, stable=True)
    order = order[reached[order] >= 0]
    times = torch.bincount(reached[order], minlength=int(mix.places.max()) + 1)
    starts = torch.cat([times.new_zeros(1), times.cumsum(0)[:-1]])
    places, matrices = [], []
    for place, matrix in zip(mix.places, mix.by, strict=True):
        for copy in range(int(times[place[0]])):
            places.append(order[starts[place] + copy])
            matrices.append(matrix)
    return Mix(torch.stack(matrices), torch.stack(places))


def comes_whole(reader: Reader, blocks: Int[Tensor, "blocks width"]) -> bool:
    """Say whether every channel of a block reaches a reader equally often."""
    counts = torch.bincount(reader.reached.clamp(min=-1) + 1, minlength=int(blocks.max()) + 2)[1:]
    times = counts[blocks]
    return reader.groups == 1 and bool((times == times[:, :1]).all())


def folded(link: Link, change: Change, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make the parameters that a change of a link changes.

    Args:
        state: Parameter name to tensor; left as it is.

    Returns:
        Changed ones only, computed in float64 and rounded once to the dtype they had.
    """
    new: dict[str, Tensor] = {}
    for reader in link.readers:
        weight = state[reader.weight]
        if change.shift is not None:
            assert reader.bias is not None
            known = torch.cat([change.shift.double(), torch.zeros(1, dtype=torch.float64)])
            added = weight.double() @ known[reader.reached]
            new[reader.bias] = new.get(reader.bias, state[reader.bias]).double() + added
        new[reader.weight] = _read(weight, on_features(reader, change.read), reader.groups)
    for writer in link.writers:
        if writer.weight in new:
            continue  # a tied table: what it reads is what it writes
        weight, write = state[writer.weight], change.write
        if writer.side == COLUMNS:
            new[writer.weight] = write.transposed().columns(weight)
        else:
            new[writer.weight] = write.rows(weight.double() + writer.offset) - writer.offset
        if writer.bias is not None:
            shift = 0.0 if change.shift is None else change.shift
            new[writer.bias] = write.rows(state[writer.bias].double() - shift)
    return {name: tensor.to(state[name].dtype).contiguous() for name, tensor in new.items()}


def _read(weight: Tensor, mix: Mix, groups: int) -> Tensor:
    """Multiply the columns of a weight; those of each group of a convolution by its own."""
    if groups == 1:
        return mix.columns(weight)
    assert mix.places is None
    by_group = weight.double().reshape(groups, len(weight) // groups, weight.shape[1], -1)
    return (by_group * mix.by.reshape(groups, 1, -1, 1)).reshape(weight.shape)


@dataclass(frozen=True)
class Stream:
    """The residual stream as a whole: what every layer adds to and every norm reads.

    Attributes:
        link: All that writes to it, and all that reads a norm of it.
        norms: Links of those norms' gains, which must go before the stream can be turned.
        gains: The gain of each, `channels`.
    """

    link: Link
    norms: tuple[Link, ...]
    gains: tuple[Tensor, ...]


@dataclass(frozen=True)
class Found:
    """What was found in a model.

    Attributes:
        links: That were verified.
        stream: The residual stream, if it can be turned.
        refused: Module name to the reason why a change would show.
    """

    links: tuple[Link, ...]
    stream: Stream | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
