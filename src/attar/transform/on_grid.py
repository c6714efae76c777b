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

# A dead zone is searched for between none and nearly a whole step, in halves.
WIDEST, HALVINGS = 0.499, 8


@dataclass(frozen=True)
class OpenGrid:
    """A weight on a grid.

    Attributes:
        levels: Whole numbers, 0 for a weight of 0.
        step: Of each weight.
        lowest: Of each weight.
        highest: The same.
    """

    levels: Float32[Tensor, "rows columns"]
    step: Float32[Tensor, "rows columns"]
    lowest: Float32[Tensor, "rows columns"]
    highest: Float32[Tensor, "rows columns"]


def opened(treated: Treated) -> OpenGrid | None:
    """Read the levels of a weight; None where it is on no grid that other levels may be put on."""
    transform = treated.transform
    if isinstance(transform, QuantizeEntropy) and not transform.trellis:
        codes = _codes(treated)
        table = coded.factor_table()
        column = table[codes.factors.columns.long()] * codes.step
        step = table[codes.factors.rows.long()][:, None] * column
        levels = codes.levels().float()
        ends = torch.full_like(step, -coded.MIDDLE), torch.full_like(step, coded.MIDDLE - 1)
        return OpenGrid(levels, step, *ends)
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
        levels: Whole numbers within the ends. Of entropy-coded ones, such as `dead_zone` allows.
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


def dead_zone(treated: Treated, behind: Float[Tensor, "rows columns"]) -> float:
    """Find the least dead zone with which what is stored takes the bytes there are.

    Args:
        behind: Numbers that are rounded to levels.

    Returns:
        Steps; 0 where levels of any kind take as many bytes.
    """
    transform = treated.transform
    if not isinstance(transform, QuantizeEntropy):
        return 0.0
    allowed = transform.allowed(behind.numel())

    def fits(zone: float) -> bool:
        away = behind.sign() * (behind.abs() + (0.5 - zone)).floor()
        codes = _shifted(away.clamp(-coded.MIDDLE, coded.MIDDLE - 1))
        learnt, bits = coded.learn(codes, torch.ones(len(codes)))
        rows, columns = codes.shape
        return coded.estimated_bytes(rows, columns, learnt, bits) <= allowed

    if fits(0.0):
        return 0.0
    low, high = 0.0, WIDEST
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
