"""What a change of a weight costs, in nats per prediction. The currency of every decision.

damage(dW) = 1/2 · trace(R dW C dWᵀ), summed over the uses of the weight, where R ⊗ C is the
Kronecker-factored Fisher information (see `Curvature`).

Source: second-order expansion of the KL divergence, as in LeCun, Denker and Solla 1989, Optimal
Brain Damage, eq. 1, with the Fisher information for the Hessian (Martens 2020,
https://arxiv.org/abs/1412.1193, section 6).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from attar.records import Curvature, Model, Scores, Statistics, Units
from attar.explain.statistics import ALL


def damage(change: Float[Tensor, "rows columns"], curvatures: Sequence[Curvature]) -> float:
    """Nats per prediction lost by adding `change` to a weight; 0 or more."""
    return float(row_damage(change, curvatures).double().sum())


def row_damage(
    change: Float[Tensor, "rows columns"], curvatures: Sequence[Curvature]
) -> Float[Tensor, "rows"]:
    """Share of each row in the damage of the whole change; the shares sum to it.

    With a full row factor a share holds the row's part of the cross terms, and may be below zero.
    """
    total = torch.zeros(len(change))
    for curvature in curvatures:
        through = _times_columns(change, curvature.columns)
        total += 0.5 * (_times_rows(curvature.rows, through) * change).sum(1)
    return total


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


def rounding_moment(curvatures: Sequence[Curvature]) -> Tensor:
    """Join the uses of a weight into the one column factor that rounding works against.

    Returns:
        `groups columns columns`, or `groups*columns` where a use has only the diagonal.
    """
    terms = [curvature.columns * curvature.rows_mean for curvature in curvatures]
    if any(term.dim() == 1 for term in terms):
        terms = [t if t.dim() == 1 else t.diagonal(dim1=1, dim2=2).flatten() for t in terms]
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


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
