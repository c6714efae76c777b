"""Integer codes with error feedback, and a few weights kept in 16 bits.

    weight = value where one is kept, else as in `quantize_feedback`

Kept are the weights whose rounding to the nearest code, in the range that is usual in their group,
would cost most: error² · R's diagonal · C's diagonal. Scales are then fitted to the others only,
whose range is narrower without them. Kept weights have no part in rounding, but they are not exact
either: each is stored with what feedback moved onto it, so that it makes good, free of charge, what
was lost before it.

Source: Shao et al. 2024, GWQ, https://arxiv.org/abs/2411.00850, section 3.2 (the 1% of weights with
the largest gradients stay in 16 bits). OPAL (Koo et al. 2024, https://arxiv.org/abs/2409.05902)
keeps a few of every block. We differ in two ways. What counts is what rounding would cost in nats,
which has the gradient in it (R) and the input (C), not the gradient alone; and all others are
rounded with error feedback, where GWQ rounds to nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Float16, Float32, Int, UInt8
from torch import Tensor

from attar import settings
from attar.kernels.feedback import Grid
from attar.records import Cost, Replacement, RowWeights, Unit
from attar.transform import groups
from attar.transform.keep_float import to_float
from attar.transform.quantize_feedback import QuantizeFeedback, round_turns, turns

FLOAT_BYTES = 2
# Usual weights lie within so many mean sizes: three standard deviations of Gaussian ones.
USUAL_RANGE = 3.76
# A kept weight is found by how many lie between it and the one before, in so many bits; where there
# would be more, another one between them is kept too.
GAP_BITS = 8


@dataclass(frozen=True)
class QuantizeOutliers:
    """Store a few weights in 16 bits, and each other one as a `bits`-wide integer.

    Attributes:
        bits: Width of a stored weight, 2 to 8.
        group_size: Columns that share one scale and zero point; 0 = the whole row.
        outlier_fraction: Share of the weights kept in 16 bits.
    """

    bits: int = 4
    group_size: int = 64
    outlier_fraction: float = 0.01

    def __post_init__(self) -> None:
        settings.check_choice("quantize_outliers", "bits", self.bits, settings.WIDTHS, 4)
        settings.check_group_size("quantize_outliers", self.group_size)
        settings.check_fraction("quantize_outliers", "outlier_fraction", self.outlier_fraction)

    def label(self) -> str:
        """Say the setting in words for a report."""
        return f"{self.bits} bit, {100 * self.outlier_fraction:g}% kept in float16"

    def rejects(self, unit: Unit) -> str | None:
        return self._codes.rejects(unit)

    def cost(self, unit: Unit) -> Cost:
        kept = self._kept(unit.n_weights) * (FLOAT_BYTES + GAP_BITS // 8)
        plain = self._codes.cost(unit)
        return replace(plain, weight_bytes=plain.weight_bytes + kept)

    @property
    def _codes(self) -> QuantizeFeedback:
        return QuantizeFeedback(self.bits, self.group_size)

    def _kept(self, n_weights: int) -> int:
        """Kept weights, with as many as bridging gaps may need."""
        return min(
            n_weights, max(1, round(self.outlier_fraction * n_weights)) + (n_weights >> GAP_BITS)
        )

    def apply(
        self, weight: Tensor, moment: Tensor | None, rows: RowWeights | None = None
    ) -> Replacement:
        to_float(weight, torch.float16)  # what is kept must fit
        n_kept = self._kept(weight.numel())
        places = _places(self._worth(weight, moment, rows), n_kept)
        kept = torch.zeros(weight.numel(), dtype=torch.bool)
        kept[places] = True
        kept = kept.view(weight.shape)
        scales = groups.find_scales(
            weight.masked_fill(kept, 0.0), self.bits, self.group_size, False,
            groups.column_weights(moment),
        )  # fmt: skip
        codes, values = self._rounded(weight, moment, rows, scales, kept)
        tensors = {
            **groups.store(codes, *scales, self.bits, symmetric=False),
            "gaps": _gaps(places),
            "values": values,
        }
        return Replacement(tensors, self.decode(tensors, *weight.shape))

    def decode(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        plain = {name: t for name, t in tensors.items() if name not in ("gaps", "values")}
        dense = self._codes.decode(plain, rows, columns)
        shape = (self._kept(rows * columns),)
        gaps = groups.take_stored(tensors, "gaps", torch.uint8, shape)
        values = groups.take_stored(tensors, "values", torch.float16, shape)
        places = gaps.long().add_(1).cumsum(0) - 1
        if int(places[-1]) >= dense.numel() or not bool(values.isfinite().all()):
            raise groups.damaged("a kept weight lies outside, or is not a number.")
        dense.view(-1)[places] = values.float()
        return dense

    def _worth(
        self, weight: Tensor, moment: Tensor | None, rows: RowWeights | None
    ) -> Float32[Tensor, "rows columns"]:
        """What rounding each weight would cost with the range that most of its group have."""
        importance = groups.column_weights(moment)
        width = groups.group_width(weight.shape[1], self.group_size)
        by_group = weight.float().reshape(len(weight), -1, width)
        limit = USUAL_RANGE * by_group.abs().mean(-1, keepdim=True)
        usual = by_group.clamp(-limit, limit).view(weight.shape)
        scales = groups.find_scales(usual, self.bits, self.group_size, False, importance)
        codes = groups.encode(weight, *scales, self.bits, self.group_size)
        error = groups.decode_codes(codes, *scales, self.group_size).sub_(weight).square_()
        spread = groups.spread_rows(importance, len(weight), slice(None))
        if spread is not None:
            error.mul_(spread)
        return error if rows is None else error.mul_(rows.importance[:, None])

    def _rounded(
        self,
        weight: Tensor,
        moment: Tensor | None,
        rows: RowWeights | None,
        scales: groups.Scales,
        kept: Bool[Tensor, "rows columns"],
    ) -> tuple[UInt8[Tensor, "rows columns"], Float16[Tensor, " kept"]]:
        """Codes of all weights (the middle one where a weight is kept), and the kept ones."""
        scale, zero_point = (part.float() for part in scales)
        columns = weight.shape[1]
        grid = Grid(
            scale,
            torch.ones(columns),
            torch.arange(columns) // groups.group_width(columns, self.group_size),
            -zero_point,
            2.0**self.bits - 1 - zero_point,
            kept=kept,
            free=torch.zeros_like(weight, dtype=torch.float32),
        )
        codes = round_turns(weight, turns(moment, rows, *weight.shape), grid)
        whole = (codes + zero_point[:, grid.group_of]).to(torch.uint8)
        assert grid.free is not None
        return whole.masked_fill_(kept, 0), to_float(grid.free[kept][None], torch.float16)[0]


def _places(worth: Float[Tensor, "rows columns"], n_kept: int) -> Int[Tensor, " kept"]:
    """Choose the weights to keep: the dearest, and such that none lies too far behind another."""
    flat = worth.flatten()
    n_bridges = min(n_kept - 1, len(flat) >> GAP_BITS)
    order = torch.argsort(flat, descending=True, stable=True)
    chosen = order[: n_kept - n_bridges].sort().values
    before = torch.cat([torch.full((1,), -1), chosen[:-1]])
    needed = (chosen - before - 1) >> GAP_BITS
    number = torch.arange(int(needed.sum())) - (needed.cumsum(0) - needed).repeat_interleave(needed)
    bridges = before.repeat_interleave(needed) + (number + 1 << GAP_BITS)
    taken = torch.zeros(len(flat), dtype=torch.bool)
    taken[chosen] = True
    taken[bridges] = True
    # What is left of them goes to the next dearest that open no new gap.
    last = int(chosen[-1])
    inside = order[~taken[order] & (order < last)]
    left = torch.cat([inside, torch.arange(last + 1, len(flat))])
    taken[left[: n_kept - int(taken.sum())]] = True
    return taken.nonzero()[:, 0]


def _gaps(places: Int[Tensor, " kept"]) -> UInt8[Tensor, " kept"]:
    """How many weights lie between each kept one and the one before."""
    before = torch.cat([torch.full((1,), -1), places[:-1]])
    return (places - before - 1).to(torch.uint8)
