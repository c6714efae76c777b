"""Integer codes with error feedback: what rounding one column loses, the next columns make good.

Minimises trace(dW C dWᵀ), C the second moment on the column side, by rounding one column after the
other and moving the error of each onto the columns not yet rounded.

Source: Frantar et al. 2023, GPTQ, https://arxiv.org/abs/2210.17323, eq. 2 and algorithm 1.
We differ in four ways. Columns are rounded in order of falling C[i, i], so that the dearest round
while there are most left to make good for them. The ranges of all groups are fixed beforehand on
the original weight and searched for the least weighted error (`groups.find_scales`), so that the
order does not change what is stored. C may be one matrix per group of rows (convolutions). Several
settings are rounded in one pass over the columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from attar.records import Cost, Replacement, Unit
from attar.transform import groups, settings

# Added to C's diagonal, as a share of its mean: directions that the calibration data never showed.
DAMPING_FRACTION = 0.01
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

    def apply(self, weight: Tensor, moment: Tensor | None) -> Replacement:
        return quantize_all(weight, moment, [self])[0]

    def decode(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        codes, scale, zero_point = groups.load_stored(
            tensors, self.bits, rows, columns, self.group_size, self.symmetric
        )
        return groups.decode_codes(codes, scale, zero_point, self.group_size)


def quantize_all(
    weight: Float[Tensor, "rows columns"],
    moment: Tensor | None,
    transforms: Sequence[QuantizeFeedback],
) -> list[Replacement]:
    """Apply several settings to one weight in one pass over its columns.

    Args:
        moment: `groups columns columns`, or its diagonal, or None; without a full matrix there is
            nothing to feed back along, and every weight is rounded to the nearest code.
    """
    importance = groups.column_weights(moment)
    scales = [
        groups.find_scales(weight, t.bits, t.group_size, t.symmetric, importance, search=True)
        for t in transforms
    ]
    if moment is None or moment.dim() == 1:
        codes = [
            groups.encode(weight, scale, zero_point, t.bits, t.group_size)
            for t, (scale, zero_point) in zip(transforms, scales, strict=True)
        ]
    else:
        codes = _feed_back(weight, moment, transforms, scales)
    return [
        Replacement(
            tensors=groups.store(code, scale, zero_point, t.bits, t.symmetric),
            dense=groups.decode_codes(code, scale, zero_point, t.group_size),
        )
        for t, code, (scale, zero_point) in zip(transforms, codes, scales, strict=True)
    ]


def _feed_back(
    weight: Tensor,
    moment: Tensor,
    transforms: Sequence[QuantizeFeedback],
    scales: Sequence[groups.Scales],
) -> list[Tensor]:
    """Round all settings, a few rows at a time; rows do not depend on each other."""
    row_groups, columns, _ = moment.shape
    order = torch.argsort(moment.diagonal(dim1=1, dim2=2).sum(0), descending=True, stable=True)
    feedback = feedback_factor(moment[:, order][:, :, order])
    back = torch.argsort(order)
    rows_in_group = len(weight) // row_groups
    step = max(1, CHUNK_WEIGHTS // (columns * len(transforms) * row_groups))
    by_group = weight.reshape(row_groups, rows_in_group, columns)
    codes = [torch.empty(by_group.shape, dtype=torch.uint8) for _ in transforms]
    top = torch.tensor([2.0**t.bits - 1 for t in transforms])
    for start in range(0, rows_in_group, step):
        rows = slice(start, start + step)
        spread = [
            _per_column(s, t, by_group.shape, rows) for t, s in zip(transforms, scales, strict=True)
        ]
        scale = torch.stack([s for s, _ in spread])[..., order]
        zero_point = torch.stack([z for _, z in spread])[..., order]
        chunk = by_group[:, rows][..., order].float()
        found = round_with_feedback(chunk, feedback, scale, zero_point, top)
        for code, one in zip(codes, found[..., back], strict=True):
            code[:, rows] = one
    return [code.reshape(weight.shape) for code in codes]


def _per_column(
    scales: groups.Scales, transform: QuantizeFeedback, shape: torch.Size, rows: slice
) -> tuple[Tensor, Tensor]:
    """Spread scale and zero point over the columns they belong to, `groups rows columns`."""
    width = groups.group_width(shape[-1], transform.group_size)
    return tuple(  # type: ignore[return-value]
        part.view(*shape[:2], -1)[:, rows].float().repeat_interleave(width, dim=-1)
        for part in scales
    )


def feedback_factor(
    moment: Float[Tensor, "groups columns columns"],
) -> Float[Tensor, "groups columns columns"]:
    """Upper Cholesky factor of the inverse of the damped moment, each row over its diagonal.

    Row i, right of the diagonal, says how much of column i's error each later column takes.
    """
    damped = moment.double()
    mean = damped.diagonal(dim1=1, dim2=2).mean(1)
    # A group that never saw an input has a moment of zeros: there is nothing to feed back.
    ridge = torch.where(mean > 0, DAMPING_FRACTION * mean, torch.ones_like(mean))
    damped = damped + torch.diag_embed(ridge[:, None].expand(damped.shape[:2]))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    factor: Tensor = upper / upper.diagonal(dim1=1, dim2=2)[..., None]
    return factor.float()


def round_with_feedback(
    weight: Float[Tensor, "groups rows columns"],
    feedback: Float[Tensor, "groups columns columns"],
    scale: Float[Tensor, "settings groups rows columns"],
    zero_point: Float[Tensor, "settings groups rows columns"],
    top: Float[Tensor, " settings"],
) -> UInt8[Tensor, "settings groups rows columns"]:
    """Round column after column, moving each error onto the columns to its right.

    Args:
        feedback: See `feedback_factor`.
        scale: Weight units per code step, > 0.
        zero_point: The code that stands for 0.0.
        top: Largest code of each setting.
    """
    columns = weight.shape[-1]
    # Column first, so that one column of every row is one run of memory.
    left = weight.expand(len(top), *weight.shape).movedim(-1, 0).contiguous()
    scale, zero_point = scale.movedim(-1, 0).contiguous(), zero_point.movedim(-1, 0).contiguous()
    limit = top[:, None, None]
    codes = torch.empty(left.shape, dtype=torch.uint8)
    for start in range(0, columns, BLOCK):
        end = min(columns, start + BLOCK)
        errors = torch.empty(end - start, *left.shape[1:])
        for column in range(start, end):
            steps = (left[column] / scale[column]).round_().add_(zero_point[column])
            steps = torch.minimum(steps.clamp_(min=0), limit)
            codes[column] = steps
            error = left[column] - steps.sub_(zero_point[column]).mul_(scale[column])
            errors[column - start] = error
            if column + 1 < end:
                share = feedback[:, column, column + 1 : end].T[:, None, :, None]
                left[column + 1 : end].addcmul_(error, share, value=-1)
        if end < columns:
            share = feedback[:, start:end, end:]
            left[end:] -= torch.einsum("bkgr,gbc->ckgr", errors, share)
    return codes.movedim(0, -1)
