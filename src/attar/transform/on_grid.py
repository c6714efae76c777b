"""Open what is stored of a weight into whole numbers on a grid, and store other numbers there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from attar.transform import coded, groups
from attar.transform.apply import Treated
from attar.transform.quantize_entropy import QuantizeEntropy
from attar.transform.quantize_feedback import QuantizeFeedback
from attar.transform.quantize_rtn import QuantizeRtn


@dataclass(frozen=True)
class OpenGrid:
    """A weight on a grid.

    Attributes:
        levels: Whole numbers, 0 for a weight of 0.
        step: Of each weight.
        lowest: Level of each weight, or of all.
        highest: The same.
        is_coded: Whether what levels take depends on which they are; then they must `fits`.
    """

    levels: Float32[Tensor, "rows columns"]
    step: Float32[Tensor, "rows columns"]
    lowest: Tensor
    highest: Tensor
    is_coded: bool = False


def opened(treated: Treated) -> OpenGrid | None:
    """Read the levels of a weight; None where it is on no grid that other levels may be put on."""
    transform = treated.transform
    if isinstance(transform, QuantizeEntropy) and not transform.trellis:
        codes = _codes(treated)
        table = coded.factor_table()
        column = table[codes.factors.columns.long()] * codes.step
        step = table[codes.factors.rows.long()][:, None] * column
        levels = codes.levels().float()
        ends = torch.tensor(-float(coded.MIDDLE)), torch.tensor(coded.MIDDLE - 1.0)
        return OpenGrid(levels, step, *ends, is_coded=True)
    if isinstance(transform, QuantizeFeedback | QuantizeRtn):
        found, scale, zero_point = _of_groups(treated, transform)
        width = found.shape[1] // scale.shape[1]
        zero = zero_point.float().repeat_interleave(width, 1)
        step = scale.float().repeat_interleave(width, 1)
        return OpenGrid(found.float() - zero, step, -zero, 2**transform.bits - 1 - zero)
    return None


def _codes(treated: Treated) -> coded.Codes:
    if isinstance(treated.unpacked, coded.Codes):
        return treated.unpacked
    stored = treated.tensors["coded"].numpy()
    return coded.from_bytes(stored, treated.unit.rows, treated.unit.columns)


def _of_groups(
    treated: Treated, transform: QuantizeFeedback | QuantizeRtn
) -> tuple[Tensor, Tensor, Tensor]:
    size = (treated.unit.rows, treated.unit.columns, transform.group_size)
    return groups.load_stored(treated.tensors, transform.bits, *size, transform.symmetric)


def with_levels(treated: Treated, levels: Float[Tensor, "rows columns"]) -> Treated:
    """Store other levels with the same steps.

    Args:
        levels: Whole numbers within the ends; entropy-coded ones must fit.
    """
    transform = treated.transform
    if isinstance(transform, QuantizeEntropy):
        made = replace(_codes(treated), codes=_shifted(levels))
        frequencies, _ = coded.learn(made.codes, torch.ones(len(levels)))
        stored = coded.to_bytes(made, frequencies)
        room = np.zeros(transform.allowed(levels.numel()) - len(stored), np.uint8)
        tensors = {"coded": torch.from_numpy(np.concatenate([stored, room]))}
        return replace(treated, tensors=tensors, unpacked=None)
    assert isinstance(transform, QuantizeFeedback | QuantizeRtn)
    _, scale, zero_point = _of_groups(treated, transform)
    width = levels.shape[1] // scale.shape[1]
    codes = (levels + zero_point.float().repeat_interleave(width, 1)).to(torch.uint8)
    stored_groups: Mapping[str, Tensor] = groups.store(
        codes, scale, zero_point, transform.bits, transform.symmetric
    )
    return replace(treated, tensors=stored_groups, unpacked=None)


def _shifted(levels: Tensor) -> Tensor:
    return levels.round().to(torch.int16).add_(coded.MIDDLE)


def fits(treated: Treated, levels: Float[Tensor, "rows columns"]) -> bool:
    """Whether levels of an entropy-coded weight take no more bytes than it has."""
    assert isinstance(treated.transform, QuantizeEntropy)
    codes = _shifted(levels)
    learnt, bits = coded.learn(codes, torch.ones(len(codes)))
    rows, columns = codes.shape
    needed = coded.estimated_bytes(rows, columns, learnt, bits)
    return needed <= treated.transform.allowed(rows * columns)
