"""Integer codes with error feedback: what rounding one column loses, the next columns make good.

Minimises trace(dW C dWᵀ), C the second moment on the column side, by rounding one column after the
other and moving the error of each onto the columns not yet rounded.

Source: Frantar et al. 2023, GPTQ, https://arxiv.org/abs/2210.17323, eq. 2 and algorithm 1.
We differ in four ways. Columns are rounded in order of falling C[i, i], so that the dearest round
while there are most left to make good for them. The ranges of all groups are fixed beforehand on
the original weight and searched for the least weighted error (`groups.find_scales`), so that the
order does not change what is stored. C may be one matrix per group of rows (convolutions). Several
settings of one group size are rounded in one pass over the columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float, Int, Integer, UInt8
from torch import Tensor

from attar.records import Cost, Replacement, RowWeights, Unit
from attar.transform import groups, settings

# Added to C's diagonal, as a share of its mean: directions that the calibration data never showed.
# With 4k tokens of a language model, what held-out tokens lose is least at 0.03 to 0.1.
DAMPING_FRACTION = 0.03
# At least this share of a column's worth lasts: what seems to be all made good is seen too well.
SMALLEST_LASTING = 0.01
# Columns rounded before their errors are moved to the far ones by one matrix product.
BLOCK = 32
# Weights rounded at once, all settings together: 16 MB for each of a few buffers.
CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class QuantizeFeedback:
    """Store each weight as a `bits`-wide integer, chosen with error feedback.

    Attributes:
        bits: Width of a stored weight, 2 to 8.
        group_size: Columns that share one scale and zero point; 0 = the whole row.
        symmetric: Leave the zero point out; it is the middle code.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        settings.check_choice("quantize_feedback", "bits", self.bits, settings.WIDTHS, 4)
        settings.check_group_size("quantize_feedback", self.group_size)
        settings.check_flag("quantize_feedback", "symmetric", self.symmetric)

    def label(self) -> str:
        """Say the setting in words for a report."""
        per = f"groups of {self.group_size}" if self.group_size else "one scale per row"
        return f"{self.bits} bit, {per}" + (", symmetric" if self.symmetric else "")

    def rejects(self, unit: Unit) -> str | None:
        return groups.refuse_groups(unit.columns, self.group_size)

    def cost(self, unit: Unit) -> Cost:
        stored = groups.stored_bytes(
            unit.rows, unit.columns, self.bits, self.group_size, self.symmetric
        )
        return Cost(weight_bytes=stored, macs=unit.macs)

    def apply(
        self,
        weight: Tensor,
        moment: Tensor | None,
        rows: RowWeights | None = None,  # noqa: ARG002
    ) -> Replacement:
        return next(quantize_all(weight, moment, [self]))

    def decode(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        codes, scale, zero_point = groups.load_stored(
            tensors, self.bits, rows, columns, self.group_size, self.symmetric
        )
        return groups.decode_codes(codes, scale, zero_point, self.group_size)


def quantize_all(
    weight: Float[Tensor, "rows columns"],
    moment: Tensor | None,
    transforms: Sequence[QuantizeFeedback],
) -> Iterator[Replacement]:
    """Apply several settings to one weight; neighbours of one group size share a pass.

    Args:
        moment: `groups columns columns`, or its diagonal, or None; without a full matrix there is
            nothing to feed back along, and every weight is rounded to the nearest code.
    """
    importance = groups.column_weights(moment)
    order = None if moment is None or moment.dim() == 1 else rounding_order(moment)
    for some in passes(transforms, weight.numel()):
        scales = [
            groups.find_scales(weight, t.bits, t.group_size, t.symmetric, importance, search=True)
            for t in some
        ]
        if order is None:
            codes = [
                groups.encode(weight, scale, zero_point, t.bits, t.group_size)
                for t, (scale, zero_point) in zip(some, scales, strict=True)
            ]
        else:
            codes = feed_back(weight, order, some, scales)
        for t, code, (scale, zero_point) in zip(some, codes, scales, strict=True):
            yield Replacement(
                tensors=groups.store(code, scale, zero_point, t.bits, t.symmetric),
                dense=groups.decode_codes(code, scale, zero_point, t.group_size),
            )


def passes(
    transforms: Sequence[QuantizeFeedback], n_weights: int
) -> Iterator[list[QuantizeFeedback]]:
    """Cut settings into runs of one group size, few enough that what they make is small."""
    most = max(1, CHUNK_WEIGHTS // n_weights)
    for _, run in groupby(transforms, key=lambda t: t.group_size):
        together = list(run)
        for start in range(0, len(together), most):
            yield together[start : start + most]


@dataclass(frozen=True)
class Order:
    """In which order columns are rounded, and where their errors go: the same for every setting.

    Attributes:
        columns: The column that is rounded first, second, and so on.
        feedback: See `feedback_factor`; rows and columns in that order.
        lasting: What is left of a column's error of 1 when all later columns have made good what
            they can, in square roots of the moment's unit; in that order.
    """

    columns: Int[Tensor, " columns"]
    feedback: Float[Tensor, "groups columns columns"]
    lasting: Float[Tensor, "groups columns"]


def rounding_order(moment: Float[Tensor, "groups columns columns"]) -> Order:
    """Dearest column first."""
    dear = moment.diagonal(dim1=1, dim2=2).sum(0)
    order = torch.argsort(dear, descending=True, stable=True)
    return Order(order, *feedback_factor(moment[:, order][:, :, order]))


def feed_back(
    weight: Float[Tensor, "rows columns"],
    order: Order,
    transforms: Sequence[QuantizeFeedback],
    scales: Sequence[groups.Scales],
) -> list[UInt8[Tensor, "rows columns"]]:
    """Round settings of one group size, a few rows at a time; rows do not depend on each other."""
    row_groups, columns = order.feedback.shape[:2]
    rows_in_group = len(weight) // row_groups
    step = max(1, CHUNK_WEIGHTS // (columns * len(transforms) * row_groups))
    by_group = weight.reshape(row_groups, rows_in_group, columns)
    # One run of memory for each group of columns, as they are read column after column.
    scale, zero_point = (
        torch.stack([s[part].view(row_groups, rows_in_group, -1) for s in scales]).movedim(-1, 0)
        for part in range(2)
    )
    width = groups.group_width(columns, transforms[0].group_size)
    codes = [torch.empty(by_group.shape, dtype=torch.uint8) for _ in transforms]
    top = torch.tensor([2.0**t.bits - 1 for t in transforms])
    back = torch.argsort(order.columns)
    for start in range(0, rows_in_group, step):
        rows = slice(start, start + step)
        found = round_with_feedback(
            by_group[:, rows].float()[..., order.columns],
            order.feedback,
            scale[..., rows].float().contiguous(),
            zero_point[..., rows].float().contiguous(),
            order.columns // width,
            top,
        )
        for setting, code in enumerate(codes):
            code[:, rows] = found[back, setting].movedim(0, -1)
    return [code.reshape(weight.shape) for code in codes]


def feedback_factor(
    moment: Float[Tensor, "groups columns columns"],
) -> tuple[Float[Tensor, "groups columns columns"], Float[Tensor, "groups columns"]]:
    """Upper Cholesky factor of the inverse of the damped moment, each row over its diagonal.

    Row i, right of the diagonal, says how much of column i's error each later column takes. It is
    the inverse of U where U Uᵀ is the damped moment, and U comes from the Cholesky factor of the
    moment with its rows and columns in reverse. U's diagonal, squared and without the damping, is
    the worth of what lasts of a column's error.
    """
    exact = moment.double()
    power = exact.diagonal(dim1=1, dim2=2)
    mean = power.mean(1, keepdim=True)
    # A group that never saw an input has a moment of zeros: there is nothing to feed back.
    ridge = torch.where(mean > 0, DAMPING_FRACTION * mean, torch.ones_like(mean))
    damped = exact + torch.diag_embed(ridge.expand(power.shape))
    root = torch.linalg.cholesky(damped.flip(1, 2)).flip(1, 2)
    one = torch.eye(damped.shape[1], dtype=torch.float64)
    upper: Tensor = torch.linalg.solve_triangular(root, one, upper=True)
    factor: Tensor = upper / upper.diagonal(dim1=1, dim2=2)[..., None]
    left = root.diagonal(dim1=1, dim2=2).square() - ridge
    lasting = torch.maximum(left, SMALLEST_LASTING * power.clamp(min=1e-9 * ridge))
    return factor.float(), lasting.sqrt().float()


def round_with_feedback(
    weight: Float[Tensor, "groups rows columns"],
    feedback: Float[Tensor, "groups columns columns"],
    scale: Float[Tensor, "column_groups settings groups _"],
    zero_point: Float[Tensor, "column_groups _ _ _"],
    group_of: Int[Tensor, " columns"],
    top: Float[Tensor, " settings"],
    dtype: torch.dtype = torch.uint8,
) -> Integer[Tensor, "columns settings groups rows"]:
    """Round column after column, moving each error onto the columns to its right.

    Args:
        feedback: See `feedback_factor`.
        scale: Weight units per code step, > 0, for every row or one for all.
        zero_point: The code that stands for 0.0, for every setting, group and row or one for all.
        group_of: Where each column's scale and zero point lie.
        top: Largest code of each setting.
        dtype: Of the codes.
    """
    columns = weight.shape[-1]
    # Column first, so that one column of every row is one run of memory.
    left = weight.expand(len(top), *weight.shape).movedim(-1, 0).contiguous()
    lowest, highest = -zero_point, top[:, None, None] - zero_point
    codes = torch.empty(left.shape, dtype=dtype)
    errors = torch.empty(min(BLOCK, columns), *left.shape[1:])
    of = group_of.tolist()
    for start in range(0, columns, BLOCK):
        end = min(columns, start + BLOCK)
        for column in range(start, end):
            own = of[column]
            steps = (left[column] / scale[own]).round_()
            steps = torch.clamp(steps, lowest[own], highest[own])
            codes[column] = steps + zero_point[own]
            error = errors[column - start]
            torch.addcmul(left[column], steps, scale[own], value=-1, out=error)
            if column + 1 < end:
                share = feedback[:, column, column + 1 : end].T[:, None, :, None]
                left[column + 1 : end].addcmul_(error, share, value=-1)
        if end < columns:
            share = feedback[:, start:end, end:]
            left[end:] -= torch.einsum("bkgr,gbc->ckgr", errors[: end - start], share)
    return codes
