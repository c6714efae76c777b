"""Signs and powers of two: a weight is a sum of a few sizes, each with its sign.

    weight = Σ over k of ± 2^exponent[row, group, k]

One bit is stored for each sign, and for each group of columns the exponents in bytes, largest
first. Multiplying by such a weight takes shifts and additions alone.

The sizes of a group start as those of binary coding, turn by turn the least-squares sizes for the
signs and the nearest signs for the sizes. They become powers of two, and all that are up to one
exponent away are tried for the least weighted squared error. Then each weight is rounded to the
sums its group can make, with feedback between columns and rows (`kernels/feedback.py`).

Source: You et al. 2024, ShiftAddLLM, https://arxiv.org/abs/2406.05981, section 4.1 (binary coding
with powers of two, after Xu et al. 2018, https://arxiv.org/abs/1802.00150, algorithm 2) and 4.2
(errors of weights and of outputs together). We differ in three ways. Exponents of a group are all
different: then codes rise with the values they stand for, and nothing is lost, since two equal
sizes make no more sums than one more sign does. Errors are weighed by the price, both sides at
once, where the paper balances two objectives. Which unit gets how many bits is the planner's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from attar import settings
from attar.kernels import bitpack
from attar.kernels.feedback import Grid
from attar.records import Cost, Replacement, RowWeights, Unit
from attar.transform import groups
from attar.transform.quantize_feedback import round_turns, turns

# An exponent as stored: with this added, as in float32; 0 is the size 0, that of a group of zeros.
EXPONENT_BIAS, LARGEST_EXPONENT = 127, 254
FITTING_TURNS = 5
# Of the normal equations of the sizes, whose signs may be the same throughout a group.
RIDGE = 1e-6


@dataclass(frozen=True)
class QuantizeBinary:
    """Store each weight as the signs of a few powers of two.

    Attributes:
        bits: Signs of each weight, 1 to 4.
        group_size: Columns that share their sizes; 0 = the whole row.
    """

    bits: int = 3
    group_size: int = 64

    def __post_init__(self) -> None:
        settings.check_choice("quantize_binary", "bits", self.bits, range(1, 5), 3)
        settings.check_group_size("quantize_binary", self.group_size)

    def label(self) -> str:
        """Say the setting in words for a report."""
        per = f"groups of {self.group_size}" if self.group_size else "one set per row"
        return f"{self.bits} signs of powers of two, {per}"

    def rejects(self, unit: Unit) -> str | None:
        return groups.refuse_groups(unit.columns, self.group_size)

    def cost(self, unit: Unit) -> Cost:
        n_groups = unit.rows * (unit.columns // groups.group_width(unit.columns, self.group_size))
        codes = bitpack.packed_bytes(unit.n_weights, self.bits)
        return Cost(weight_bytes=codes + n_groups * self.bits, macs=unit.macs)

    def apply(
        self, weight: Tensor, moment: Tensor | None, rows: RowWeights | None = None
    ) -> Replacement:
        importance = groups.column_weights(moment)
        columns = weight.shape[1]
        width = groups.group_width(columns, self.group_size)
        parts = []
        for chunk in groups.row_chunks(*weight.shape):
            spread = groups.spread_rows(importance, len(weight), chunk)
            x = weight[chunk].float().reshape(-1, columns // width, width)
            share = torch.ones_like(x) if spread is None else spread.float().reshape(x.shape)
            parts.append(fitted_exponents(x, share, self.bits))
        exponent = torch.cat(parts)
        low = torch.zeros(exponent.shape[:2])
        grid = Grid(
            scale=torch.ones_like(low),
            column_scale=torch.ones(columns),
            group_of=torch.arange(columns) // width,
            lowest=low,
            highest=low + (2**self.bits - 1),
            levels=sums_of(exponent),
        )
        codes = round_turns(weight, turns(moment, rows, *weight.shape), grid)
        packed = bitpack.pack(codes.flatten().to(torch.uint8), self.bits)
        stored = (exponent + EXPONENT_BIAS).to(torch.uint8)
        tensors = {"codes": packed, "exponent": stored}
        return Replacement(tensors, self.decode(tensors, *weight.shape))

    def decode(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        codes = groups.unpack_stored(tensors, "codes", self.bits, (rows, columns))
        n_groups = columns // groups.group_width(columns, self.group_size)
        shape = (rows, n_groups, self.bits)
        stored = groups.take_stored(tensors, "exponent", torch.uint8, shape)
        if stored.numel() and int(stored.max()) > LARGEST_EXPONENT:
            raise groups.damaged("an exponent is that of no number.")
        dense = torch.empty(rows, columns)
        for chunk in groups.row_chunks(rows, columns):
            sums = sums_of(stored[chunk].int() - EXPONENT_BIAS)
            own = codes[chunk].long().view(len(sums), n_groups, -1)
            dense[chunk] = sums.gather(2, own).view(len(sums), columns)
        return dense


def sums_of(exponent: Int[Tensor, "rows groups bits"]) -> Float32[Tensor, "rows groups codes"]:
    """Every sum that the sizes can make; a code's highest bit is the sign of the largest."""
    size = torch.where(exponent > -EXPONENT_BIAS, torch.exp2(exponent.float()), 0.0)
    return size @ _signs(exponent.shape[-1]).T


def fitted_exponents(
    x: Float32[Tensor, "rows groups width"], share: Float32[Tensor, "rows groups width"], bits: int
) -> Int[Tensor, "rows groups bits"]:
    """Find the exponents of each group, falling, of least Σ share · error²."""
    size = _binary_coding(x, share, bits)
    start = torch.log2(size.clamp(min=2.0**-EXPONENT_BIAS)).round().int()
    best, least = _falling(start), torch.full(x.shape[:2], torch.inf)
    for step in product((0, -1, 1), repeat=bits):
        tried = _falling(start + torch.tensor(step, dtype=torch.int32))
        error = _coding_error(x, share, sums_of(tried))
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better[..., None], tried, best)
    return torch.where((x != 0).any(-1)[..., None], best, -EXPONENT_BIAS)


def _binary_coding(x: Tensor, share: Tensor, bits: int) -> Float32[Tensor, "rows groups bits"]:
    """Sizes of any value, largest first: greedy, then signs and sizes in turn."""
    sizes, left = [], x
    for _ in range(bits):
        size = (share * left.abs()).sum(-1) / share.sum(-1).clamp(min=1e-30)
        left = left - size[..., None] * torch.where(left >= 0, 1.0, -1.0)
        sizes.append(size)
    size = torch.stack(sizes, -1)
    signs = _signs(bits)
    for _ in range(FITTING_TURNS):
        sums = size @ signs.T
        chosen = signs[_nearest(x, sums)]  # rows groups width bits
        weighed = chosen * share[..., None]
        normal = chosen.mT @ weighed
        trace = normal.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-30)
        normal = normal + RIDGE * trace * torch.eye(bits)
        target = (weighed * x[..., None]).sum(-2)
        size = torch.linalg.solve(normal, target).abs().sort(-1, descending=True).values
    return size


def _nearest(x: Tensor, sums: Float32[Tensor, "rows groups codes"]) -> Tensor:
    """Code of the nearest sum; `sums` may be in any order."""
    return (x[..., None] - sums[:, :, None]).abs_().argmin(-1)


def _coding_error(x: Tensor, share: Tensor, sums: Tensor) -> Float32[Tensor, "rows groups"]:
    """Weighted squared error where every weight takes its nearest sum; `sums` rise."""
    place = torch.searchsorted(0.5 * (sums[..., 1:] + sums[..., :-1]).contiguous(), x)
    return (sums.gather(2, place) - x).square_().mul_(share).sum(-1)


def _falling(exponent: Int[Tensor, "rows groups bits"]) -> Int[Tensor, "rows groups bits"]:
    """Make each exponent less than the one before it, and all of them such as are stored."""
    bits = exponent.shape[-1]
    falling = [exponent[..., 0].clamp(bits - EXPONENT_BIAS, LARGEST_EXPONENT - EXPONENT_BIAS)]
    for k in range(1, bits):
        least = bits - k - EXPONENT_BIAS
        falling.append(exponent[..., k].clamp(min=least).minimum(falling[-1] - 1))
    return torch.stack(falling, -1)


def _signs(bits: int) -> Float32[Tensor, "codes bits"]:
    """Signs that each code stands for, the largest size first."""
    codes = torch.arange(2**bits)[:, None] >> torch.arange(bits - 1, -1, -1)
    return 2.0 * (codes & 1) - 1.0
