"""Sums over positions that curvature and relevance are made of. Tensors in, tensors out.

Every operation is brought to one layout: `samples groups positions features`, where features are
the columns of the weight on the input side and its rows on the output side. A linear map has one
group; an embedding is a linear map with a one-hot input, never built.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attar.kernels.symmetric import Symmetric
from attar.records import Unit
from attar.sites import Call, patches

# Numbers of an output taken at once where all are: those of a language model's answers are many.
NUMBERS_AT_ONCE = 2**21
# Positions of one picture that second moments are taken over. Neighbours say nearly the same, and
# with hundreds of pictures there are far more of them than columns.
POSITIONS_AT_MOST = 196
# Share of the tokens to come that may be of another kind than the data. With a quarter, SmolLM2's
# table, priced on one text, errs a tenth more on the same text and 20 to 30% less on four others.
HEDGE = 0.25


def inputs_of(
    call: Call, samples: int, positions: int | None = None
) -> Float[Tensor, "samples groups positions columns"]:
    """Bring the input of a linear map or a convolution to the common layout.

    Args:
        positions: Of a convolution, take this many at most, evenly spread.
    """
    if call.operation == "convolution":
        return patches(call, positions)
    return _by_sample(call.input, samples)


def outputs_of(
    unit: Unit, output: Tensor, samples: int
) -> Float[Tensor, "samples groups positions rows"]:
    """Bring an output, or a gradient at it, to the common layout; rows are those of one group."""
    if unit.kind != "convolution":
        return _by_sample(output, samples)
    by_group = output.reshape(output.shape[0], unit.groups, output.shape[1] // unit.groups, -1)
    return by_group.transpose(2, 3)


def thinned(
    values: Float[Tensor, "samples groups positions features"], positions: int
) -> Float[Tensor, "samples groups fewer features"]:
    """Take at most this many positions, evenly spread."""
    return values[:, :, :: -(-values.shape[2] // positions)]


def _by_sample(tensor: Tensor, samples: int) -> Tensor:
    """Rows that do not divide over the samples (a shared query, say) each count as a sample."""
    rows = tensor.numel() // tensor.shape[-1]
    count = samples if rows % samples == 0 else rows
    return tensor.reshape(count, 1, -1, tensor.shape[-1])


def add_second_moment(total: Tensor | Symmetric, values: Tensor, times: float = 1.0) -> None:
    """Add the sum of outer products over samples and positions, in place.

    Args:
        total: `groups features features`, or `features` for the diagonal (then groups are joined),
            or what keeps half of one large matrix.
        values: `samples groups positions features`.
        times: How often each value counts.
    """
    if isinstance(total, Symmetric):
        total.add_outer(values.reshape(-1, values.shape[-1]), times)
        return
    if total.dim() == 1:
        total += times * values.square().sum((0, 2)).flatten()
        return
    if values.shape[1] == 1:
        flat = values.reshape(-1, values.shape[-1])
        total[0].addmm_(flat.T, flat, alpha=times)
        return
    for own in values:  # of one sample each, because groups before samples would be a copy
        total.baddbmm_(own.transpose(1, 2), own, alpha=times)


def diagonal_of(total: Tensor | Symmetric) -> Float[Tensor, " features"]:
    """Copy the diagonal of what `add_second_moment` adds to, groups joined."""
    if isinstance(total, Symmetric):
        return total.diagonal()
    return (total if total.dim() == 1 else total.diagonal(dim1=1, dim2=2)).flatten().clone()


def channel_products(
    unit: Unit, value: Tensor, gradient: Tensor, samples: int
) -> Float[Tensor, "samples all_rows"]:
    """Sum g·y over the positions of one sample: minus the slope of muting each channel.

    Args:
        value: What the unit answers, as the module shapes it; `gradient` likewise.
    """
    if unit.kind == "convolution":
        return (value * gradient).flatten(2).sum(2)
    pairs = zip(*(parts_of(_by_sample(t, samples)) for t in (value, gradient)), strict=True)
    return torch.stack([(y * g).sum((1, 2)) for y, g in pairs]).sum(0)


def channel_sizes(unit: Unit, value: Tensor, samples: int) -> Float[Tensor, " all_rows"]:
    """Sum the sizes of what a unit answers over samples and positions."""
    if unit.kind == "convolution":
        return value.abs().flatten(2).sum((0, 2))
    parts = parts_of(_by_sample(value, samples))
    return torch.stack([part.abs().sum((0, 1, 2)) for part in parts]).sum(0)


def parts_of(values: Float[Tensor, "samples one positions rows"]) -> tuple[Tensor, ...]:
    """Cut along positions, so that what is made of a language model's answers stays small."""
    width = values.shape[0] * values.shape[-1]
    return torch.split(values, max(1, NUMBERS_AT_ONCE // width), dim=2)


def token_products(
    tokens: Int[Tensor, "samples positions"],
    products: Float[Tensor, "samples positions"],
    n_tokens: int,
) -> Float[Tensor, " n_tokens"]:
    """Sum over samples of (sum over a token's positions of g·y) squared."""
    total = torch.zeros(n_tokens)
    for sample_tokens, sample_products in zip(tokens, products, strict=True):
        seen, place = sample_tokens.unique(return_inverse=True)
        sums = torch.zeros(len(seen)).index_add_(0, place, sample_products)
        total[seen] += sums.square()
    return total


def head_products(
    x: Float[Tensor, "samples one positions columns"],
    gradient: Float[Tensor, "samples one positions rows"],
    weight: Float[Tensor, "rows columns"],
    heads: int,
) -> Float[Tensor, "samples heads"]:
    """Sum, over positions and the columns of each head, of the input times its gradient."""
    slope = gradient @ weight
    products = (slope * x).sum((1, 2))
    return products.reshape(len(products), heads, -1).sum(-1)


def hedged(frequency: Float[Tensor, " n_tokens"]) -> Float[Tensor, " n_tokens"]:
    """Take a part of what will be read or written to be of another kind than the data.

    A third of the words of another text may be none of the few thousand that calibration held; told
    that they hardly occur, rounding would spoil them. The other kind is the same list with its
    differences cut to their roots; the sum stays.
    """
    flat = frequency.clamp(min=0).sqrt()
    return (1 - HEDGE) * frequency + HEDGE * frequency.sum() * flat / flat.sum().clamp(min=1e-30)


def token_frequency(
    counts: Float[Tensor, " n_tokens"], answers: Float[Tensor, " width"] | None
) -> Float[Tensor, " n_tokens"]:
    """Estimate how often each token is met: half what was counted, half what the model expects.

    A token never counted still has a frequency, because the model gives it some probability;
    without such answers, Good-Turing: what was seen once stands for what was not seen at all.
    """
    share = counts / counts.sum().clamp(min=1)
    if answers is not None and answers.shape == counts.shape:
        return hedged(0.5 * (share + answers / answers.sum()))
    unseen = counts == 0
    missing = float((counts == 1).sum()) / max(1.0, float(counts.sum()))
    missing = min(0.5, missing) if unseen.any() else 0.0
    share = share * (1 - missing)
    share[unseen] = missing / max(1, int(unseen.sum()))
    return hedged(share)
