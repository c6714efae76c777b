"""What a change of a weight costs, in nats per prediction. The currency of every decision.

damage(dW) = 1/2 · trace(R dW C dWᵀ), summed over the uses of the weight, where R ⊗ C is the
Kronecker-factored Fisher information (see `Curvature`).

Source: second-order expansion of the KL divergence, as in LeCun, Denker and Solla 1989, Optimal
Brain Damage, eq. 1, with the Fisher information for the Hessian (Martens 2020,
https://arxiv.org/abs/1412.1193, section 6).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attar.explain.gatherer import ALL
from attar.records import Curvature, Model, RowWeights, Scores, Statistics, Units

ROWS_AT_ONCE = 4096
# Rows that a large weight is priced by: this many weights of it, but not fewer rows, and no row
# stands for more than so many (a vocabulary's rows differ widely); no sample where it saves little.
SAMPLED_WEIGHTS = 1 << 18
FEWEST_ROWS = 256
MOST_ROWS_PER_SAMPLED = 12
LARGEST_SHARE = 0.8


def damage(
    change: Float[Tensor, "rows columns"],
    curvatures: Sequence[Curvature],
    *,
    held_out: bool = False,
) -> float:
    """Nats per prediction lost by adding `change` to a weight; 0 or more.

    Args:
        held_out: Take R and C from their second halves: for a change rounded on the first.
    """
    return float(row_damage(change, curvatures, held_out=held_out).double().sum())


def row_damage(
    change: Float[Tensor, "rows columns"],
    curvatures: Sequence[Curvature],
    *,
    held_out: bool = False,
) -> Float[Tensor, " rows"]:
    """Share of each row in the damage of the whole change; the shares sum to it.

    With a full row factor a share holds the row's part of the cross terms, and may be below zero.
    """
    total = torch.zeros(len(change))
    for curvature in curvatures:
        columns = curvature.second if held_out else curvature.columns
        row_factor = curvature.rows_second if held_out else curvature.rows
        if row_factor.dim() == 1 and columns.dim() == 3 and len(columns) == 1:
            # Rows do not depend on each other: a few at a time need little memory.
            for rows in _slices(len(change)):
                through = (change[rows] @ columns[0]).mul_(change[rows])
                total[rows] += 0.5 * row_factor[rows] * through.sum(1)
            continue
        through = _times_columns(change, columns)
        total += 0.5 * (_times_rows(row_factor, through) * change).sum(1)
    return total


def _slices(n_rows: int) -> Iterator[slice]:
    return (slice(start, start + ROWS_AT_ONCE) for start in range(0, n_rows, ROWS_AT_ONCE))


def _times_columns(change: Tensor, columns: Tensor) -> Tensor:
    """Multiply each row by the column factor of its group."""
    if columns.dim() == 1:
        groups = columns.numel() // change.shape[1]
        by_group = change.reshape(groups, -1, change.shape[1])
        return (by_group * columns.reshape(groups, 1, -1)).reshape(change.shape)
    by_group = change.reshape(len(columns), -1, change.shape[1])
    return (by_group @ columns).reshape(change.shape)


def _times_rows(rows: Tensor, change: Tensor) -> Tensor:
    """Multiply by the row factor, block by block where there are groups."""
    if rows.dim() == 1:
        return rows[:, None] * change
    by_group = change.reshape(len(rows), -1, change.shape[1])
    return (rows @ by_group).reshape(change.shape)


def bias_change(
    change: Float[Tensor, "rows columns"],
    curvatures: Sequence[Curvature],
    *,
    held_out: bool = False,
) -> Float[Tensor, " rows"]:
    """What to add to the bias so that a change of the weight leaves the mean output as it was.

    db = −dW E[x] is the least of trace(R E[(dW x + db)(dW x + db)ᵀ]) whatever R is.
    Source: Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias
    Correction, https://arxiv.org/abs/1906.04721, eq. 16. We differ in that E[x] is measured, and
    that an input of a linear map counts by the squared gradient that answers it, as in C.

    Args:
        held_out: Take the mean of the first half: for a change that is priced on the second.
    """
    (curvature,) = curvatures
    assert curvature.means is not None
    mean = curvature.means[0] if held_out else curvature.means.mean(0)
    groups = mean.numel() // change.shape[1]
    by_group = change.reshape(groups, -1, change.shape[1])
    return -(by_group @ mean.reshape(groups, -1, 1)).flatten()


@dataclass(frozen=True)
class RowSample:
    """Some rows of a weight that stand for all.

    Attributes:
        rows: Which.
        counts: How many rows each stands for; 1 for those that are taken for sure.
    """

    rows: Int[Tensor, " sampled"]
    counts: Float[Tensor, " sampled"]


def sample_rows(
    weight: Float[Tensor, "rows columns"], curvatures: Sequence[Curvature]
) -> RowSample | None:
    """Choose rows to price a large weight by; None where it is small enough to price whole.

    Rows are put in order of how much they matter. The first quarter of the sample are the rows that
    matter most; the others are taken evenly from the rest, so that each stands for its like. With
    256 rows, a sum over rows errs by two or three percent.
    """
    n_rows, columns = weight.shape
    n = max(FEWEST_ROWS, n_rows // MOST_ROWS_PER_SAMPLED, SAMPLED_WEIGHTS // columns)
    if n > LARGEST_SHARE * n_rows:
        return None
    importance = row_weights(curvatures).importance
    order = torch.argsort(importance * weight.square().sum(1), descending=True, stable=True)
    sure = n // 4
    stride = (n_rows - sure) / (n - sure)
    spread = sure + ((torch.arange(n - sure) + 0.5) * stride).long()
    counts = torch.cat([torch.ones(sure), torch.full((n - sure,), stride)])
    return RowSample(order[torch.cat([torch.arange(sure), spread])], counts)


def of_rows(curvatures: Sequence[Curvature], sample: RowSample) -> tuple[Curvature, ...]:
    """Curvature of the sampled rows, scaled so that their damage estimates that of all rows."""
    counts = sample.counts

    def chosen(rows: Tensor) -> Tensor:
        if rows.dim() == 1:
            return rows[sample.rows] * counts
        # Two rows stand for as many pairs as the product of their counts.
        some = rows[:, sample.rows][..., sample.rows] * counts * counts[:, None]
        some.diagonal(dim1=1, dim2=2).div_(counts)
        return some

    return tuple(
        Curvature(
            chosen(c.rows),
            c.first,
            c.second,
            None if c.rows_first is None else chosen(c.rows_first),
            c.means,
        )
        for c in curvatures
    )


def rounding_moment(curvatures: Sequence[Curvature], *, held_out: bool = False) -> Tensor:
    """Join the uses of a weight into the one column factor that rounding works against.

    What is not on the diagonal is shrunk by the share of it that is noise, so that rounding does
    not follow chance correlations of little data.

    Args:
        held_out: Use the first half only, so that the change can be priced on the second.

    Returns:
        `groups columns columns`, or `groups*columns` where a use has only the diagonal.
    """
    terms = []
    for curvature in curvatures:
        columns = curvature.first.clone() if held_out else curvature.columns
        if columns.dim() == 3:
            share = _noise(curvature.first, curvature.second, held_out=held_out)
            columns = _shrunk(columns, share)
        terms.append(columns.mul_(curvature.rows_mean))
    if any(term.dim() == 1 for term in terms):
        terms = [t if t.dim() == 1 else t.diagonal(dim1=1, dim2=2).flatten() for t in terms]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def row_weights(
    curvatures: Sequence[Curvature], sample: RowSample | None = None, *, held_out: bool = False
) -> RowWeights:
    """How much a squared error in each row counts, over the uses of the weight.

    Args:
        sample: Give the rows of this sample only.
        held_out: Use the first half only, so that the change can be priced on the second.
    """
    total = torch.zeros(())
    for curvature in curvatures:
        rows = _rows_of(curvature, held_out=held_out)
        diagonal = rows if rows.dim() == 1 else rows.diagonal(dim1=1, dim2=2).flatten()
        total = total + diagonal * curvature.columns_mean
    if sample is not None:
        return RowWeights(total[sample.rows], sample.counts)
    return RowWeights(total, torch.ones_like(total), _row_moment(curvatures, held_out=held_out))


def _row_moment(curvatures: Sequence[Curvature], *, held_out: bool) -> Tensor | None:
    """R, shrunk as C is in `rounding_moment`; None where it is not one matrix known in halves."""
    first = curvatures[0].rows_first
    if len(curvatures) > 1 or first is None or first.dim() == 1 or len(first) > 1:
        return None
    rows, second = _rows_of(curvatures[0], held_out=held_out), curvatures[0].rows_second
    return _shrunk(rows.clone(), _noise(first, second, held_out=held_out))[0]


def _rows_of(curvature: Curvature, *, held_out: bool) -> Tensor:
    first = curvature.rows_first
    return first if held_out and first is not None else curvature.rows


def _noise(first: Tensor, second: Tensor, *, held_out: bool) -> float:
    """Share of a factor's off-diagonal power that is sampling noise, 0 to 1.

    The halves have the same mean, so half their squared difference is the variance of one half and
    a quarter that of their mean.
    Source: the ratio is the shrinkage intensity of Ledoit and Wolf 2004, A well-conditioned
    estimator for large-dimensional covariance matrices, eq. 14, with the diagonal as the target
    and the variance from two halves instead of from single samples, which hang together.
    """
    if first is second:
        return 0.0
    difference = _off_diagonal_power(first - second)
    if held_out:
        return _ratio(difference / 2, _off_diagonal_power(first))
    return _ratio(difference / 4, _off_diagonal_power(0.5 * (first + second)))


def _ratio(noise: float, power: float) -> float:
    return min(1.0, noise / power) if power > 0 else 0.0


def _off_diagonal_power(matrices: Tensor) -> float:
    diagonal = matrices.diagonal(dim1=1, dim2=2)
    return float(matrices.square().sum().double() - diagonal.square().sum().double())


def _shrunk(columns: Tensor, share: float) -> Tensor:
    """Scale what is off the diagonal by 1 - share, in place."""
    diagonal = columns.diagonal(dim1=1, dim2=2).clone()
    columns.mul_(1 - share).diagonal(dim1=1, dim2=2).copy_(diagonal)
    return columns


def score(model: Model, units: Units, statistics: Statistics) -> Scores:
    """Relevance of each output channel: nats per prediction lost when it is set to zero.

    Measured per sample as 1/2 · E[(Σ over positions of g·y)²], so that positions of one sample
    that pull together count together; the Kronecker price takes them as independent.
    """
    del model
    return Scores(
        criterion="price",
        nats=True,
        channels={unit.name: statistics.channel_relevance[ALL][unit.name] for unit in units},
        totals={unit.name: statistics.unit_relevance[ALL][unit.name] for unit in units},
    )
