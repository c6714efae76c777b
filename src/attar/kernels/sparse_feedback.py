"""Zeroing with error feedback: what a zeroed weight did, later columns make good.

As in `feedback.py`, E = e F and trace(E C Eᵀ) = Σ e[i, j]² worth[j], for every row by itself: e is
what zeroing or rounding loses of a weight as the columns before have left it. A weight is chosen by
that loss, e² · worth, when its turn comes: those before it have then been compensated.
`reference_zero` is that, read off the formula.

Source: Frantar and Alistarh 2023, SparseGPT, https://arxiv.org/abs/2301.00774, section 3 and
algorithm 1, which takes the loss of the optimal brain surgeon (Hassibi and Stork 1992, eq. 5) with
columns in a fixed order: w² / [H⁻¹]ⱼⱼ of the columns not yet done, which is our worth. We differ in
that a weight is chosen when its turn comes, where they choose for 128 columns at once (but for
n:m), so that dear columns may keep more than cheap ones.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from attar.kernels.compiled import compiled
from attar.kernels.feedback import ROWS_APART, TILE


class Choice(NamedTuple):
    """Which weights are kept.

    Attributes:
        kept: Given beforehand, `rows columns`; or chosen, and written.
        least: Loss above which a weight is kept, `rows`; None where that does not decide.
        n_kept: Of every m consecutive columns, those of the largest loss are kept.
        m: 0: no such pattern.
    """

    kept: Bool[Tensor, "rows columns"]
    least: Float32[Tensor, " rows"] | None = None
    n_kept: int = 0
    m: int = 0


class Zeroed(NamedTuple):
    """What became of a weight.

    Attributes:
        values: Zero where a weight is not kept.
        losses: What zeroing each weight would lose, when its turn came.
    """

    values: Float32[Tensor, "rows columns"]
    losses: Float32[Tensor, "rows columns"]


def reference_zero(
    weight: Float32[Tensor, "rows columns"],
    columns: Float32[Tensor, "columns columns"],
    worth: Float32[Tensor, " columns"],
    choice: Choice,
    steps: Float32[Tensor, "rows columns"] | None = None,
    top: int = 0,
) -> Zeroed:
    """Zero one weight after the other, straight from the formula. Slow and obvious."""
    exact, left = weight.double(), columns.double()
    errors, made, losses = (torch.zeros_like(exact) for _ in range(3))
    n_columns = weight.shape[1]
    for i, j in np.ndindex(*weight.shape):
        target = exact[i] - errors[i] @ (left - torch.eye(n_columns))
        losses[i, j] = target[j] ** 2 * worth[j]
        if choice.m and j % choice.m == 0:
            group = (target[j : j + choice.m] ** 2 * worth[j : j + choice.m]).tolist()
            best = sorted(range(choice.m), key=lambda k: -group[k])[: choice.n_kept]
            for k in range(choice.m):
                choice.kept[i, j + k] = k in best
        elif choice.least is not None:
            choice.kept[i, j] = losses[i, j] > choice.least[i]
        if choice.kept[i, j]:
            made[i, j] = target[j]
            if steps is not None:
                level = (target[j] / steps[i, j]).round().clamp(-top, top - 1)
                made[i, j] = level * steps[i, j]
        errors[i, j] = target[j] - made[i, j]
    return Zeroed(made.float(), losses.float())


def zero(
    weight: Float32[Tensor, "rows columns"],
    columns: Float32[Tensor, "columns columns"],
    worth: Float32[Tensor, " columns"],
    choice: Choice,
    steps: Float32[Tensor, "rows columns"] | None = None,
    top: int = 0,
) -> Zeroed:
    """Zero a weight whose columns are in the order of zeroing; round what is kept.

    Args:
        columns: How much of its error each later column takes: F, as for `feedback.round_both`.
        worth: How much a squared error in each column counts that nothing later makes good.
        steps: Of each weight, where kept ones are rounded: whole numbers of steps.
        top: Of these, from −top to top − 1.
    """
    values, losses = torch.empty_like(weight), torch.empty_like(weight)
    side = TILE // choice.m * choice.m if choice.m else TILE
    nothing = np.empty((0, 0), np.float32)
    for start in range(0, len(weight), ROWS_APART):
        own = slice(start, start + ROWS_APART)
        target, errors = weight[own].clone(), torch.empty_like(weight[own])
        least = nothing.ravel() if choice.least is None else choice.least[own].numpy()
        parts = tuple(part[own].numpy() for part in (values, losses, choice.kept))
        rows_steps = nothing if steps is None else steps[own].numpy()
        for first in range(0, weight.shape[1], side):
            last = min(weight.shape[1], first + side)
            inside = columns[first:last, first:last].contiguous().numpy()
            rule = (least, choice.n_kept, choice.m, top)
            lines = (target.numpy(), errors.numpy(), *parts)
            _zero_tile(lines, rows_steps, worth.numpy(), inside, rule, first, last)
            if last < weight.shape[1]:
                target[:, last:] -= errors[:, first:last] @ columns[first:last, last:]
    return Zeroed(values, losses)


@compiled
def _zero_tile(
    lines: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    steps: np.ndarray,
    worth: np.ndarray,
    inside: np.ndarray,
    rule: tuple[np.ndarray, int, int, int],
    first: int,
    last: int,
) -> None:
    """Zero the columns from `first` to `last`; what errors do inside the tile is done at once."""
    target, errors, values, losses, kept = lines
    least, n_kept, m, top = rule
    for i in range(target.shape[0]):
        for j in range(first, last):
            if m > 0 and (j - first) % m == 0:
                for k in range(j, j + m):
                    own, before = target[i, k] * target[i, k] * worth[k], 0
                    for other in range(j, j + m):
                        loss = target[i, other] * target[i, other] * worth[other]
                        if loss > own or (loss == own and other < k):
                            before += 1
                    kept[i, k] = before < n_kept
            exact = target[i, j]
            losses[i, j] = exact * exact * worth[j]
            if m == 0 and least.shape[0] > 0:
                kept[i, j] = losses[i, j] > least[i]
            made = np.float32(0)
            if kept[i, j]:
                made = exact
                if steps.shape[0] > 0:
                    made = min(max(np.rint(exact / steps[i, j]), -top), top - 1) * steps[i, j]
            values[i, j] = made
            error = exact - made
            errors[i, j] = error
            for k in range(j + 1, last):
                target[i, k] -= error * inside[j - first, k - first]
