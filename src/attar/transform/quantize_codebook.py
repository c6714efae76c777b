"""Codes for a table of values that is learned from the weight itself, rounded with feedback.

    weight = scale[row, group] · table[code]

One table serves all rows; 0 need not be in it, and a group of zeros has the scale 0. Groups are
brought to one size by their scale; the table is the one of least Σ R[i, i] · C[j, j] · error²
(Lloyd's algorithm over a histogram), then scales are searched for that table, and the table is
learned once more. Each weight is rounded to it with feedback between columns and rows
(`kernels/feedback.py`).

Source: Kim et al. 2023, SqueezeLLM, https://arxiv.org/abs/2306.07629, eq. 3 (k-means weighted by
the diagonal of the Fisher information); Lloyd 1982, https://doi.org/10.1109/TIT.1982.1056489. We
differ in three ways. They have one table for each row and no scales: here one table for all leaves
room for scales of groups. The weight of an error is the price's diagonal, R times C. And codes are
chosen with error feedback, where they take the nearest value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Float64
from torch import Tensor

from attar import settings
from attar.errors import SettingError
from attar.kernels import bitpack
from attar.kernels.feedback import Grid
from attar.records import Cost, Replacement, RowWeights, Unit
from attar.transform import groups
from attar.transform.quantize_feedback import round_turns, turns

FLOAT_BYTES = 2
# The histogram a table is learned from: so many cells from −WIDEST to WIDEST root mean squares.
CELLS, WIDEST = 4096, 6.0
LLOYD_TURNS = 60
# In place of a scale of 0, by which nothing can be divided.
TINY = 1e-30
# Shares of the root mean square that are tried as the scale of a group once there is a table.
SHARES = tuple(round(0.7 + 0.05 * k, 2) for k in range(13))


@dataclass(frozen=True)
class QuantizeCodebook:
    """Store each weight as a code for one of 2**bits learned values.

    Attributes:
        bits: Width of a stored weight, 2 to 4.
        group_size: Columns that share one scale; 0 = the whole row.
    """

    bits: int = 3
    group_size: int = 64

    def __post_init__(self) -> None:
        settings.check_choice("quantize_codebook", "bits", self.bits, range(2, 5), 3)
        settings.check_group_size("quantize_codebook", self.group_size)

    def label(self) -> str:
        """Say the setting in words for a report."""
        per = f"groups of {self.group_size}" if self.group_size else "one scale per row"
        return f"{self.bits} bit, learned values, {per}"

    def rejects(self, unit: Unit) -> str | None:
        return groups.refuse_groups(unit.columns, self.group_size)

    def cost(self, unit: Unit) -> Cost:
        n_scales = unit.rows * (unit.columns // groups.group_width(unit.columns, self.group_size))
        codes = bitpack.packed_bytes(unit.n_weights, self.bits)
        table = FLOAT_BYTES << self.bits
        return Cost(weight_bytes=codes + groups.SCALE_BYTES * n_scales + table, macs=unit.macs)

    def apply(
        self, weight: Tensor, moment: Tensor | None, rows: RowWeights | None = None
    ) -> Replacement:
        columns = weight.shape[1]
        width = groups.group_width(columns, self.group_size)
        share = _share(weight, moment, rows).reshape(len(weight), -1, width)
        x = weight.float().reshape(len(weight), -1, width)
        size = x.square().mean(-1).sqrt()
        scale = _stored(size)
        table = self._table(x, share, scale)
        scale = _best_scales(x, share, size, table.float())
        table = self._table(x, share, scale)
        low = torch.zeros_like(scale, dtype=torch.float32)
        grid = Grid(
            scale=torch.where(scale == 0, TINY, scale.float()),
            column_scale=torch.ones(columns),
            group_of=torch.arange(columns) // width,
            lowest=low,
            highest=low + (len(table) - 1),
            levels=table.float(),
        )
        codes = round_turns(weight, turns(moment, rows, *weight.shape), grid)
        packed = bitpack.pack(codes.flatten().to(torch.uint8), self.bits)
        tensors = {"codes": packed, "scale": scale, "table": table}
        return Replacement(tensors, self.decode(tensors, *weight.shape))

    def _table(self, x: Tensor, share: Tensor, scale: Tensor) -> Float16[Tensor, " values"]:
        step = scale.float()[..., None]
        return learn_table(x / torch.where(step == 0, 1.0, step), share * step**2, self.bits)

    def decode(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        codes = groups.unpack_stored(tensors, "codes", self.bits, (rows, columns))
        width = groups.group_width(columns, self.group_size)
        shape = (rows, columns // width)
        scale = groups.take_stored(tensors, "scale", torch.float16, shape).float()
        table = groups.take_stored(tensors, "table", torch.float16, (1 << self.bits,)).float()
        if not bool(table.isfinite().all() and scale.isfinite().all()):
            raise groups.damaged("a stored value or scale is not a number.")
        dense = torch.empty(rows, columns)
        for chunk in groups.row_chunks(rows, columns):
            values = table[codes[chunk].long()].view(-1, columns // width, width)
            dense[chunk] = values.mul_(scale[chunk][..., None]).view(-1, columns)
        return dense


def _share(
    weight: Float[Tensor, "rows columns"], moment: Tensor | None, rows: RowWeights | None
) -> Float32[Tensor, "rows columns"]:
    """How much a squared error of each weight counts: the price's diagonal."""
    spread = groups.spread_rows(groups.column_weights(moment), len(weight), slice(None))
    share = torch.ones(weight.shape) if spread is None else spread.clone()
    if rows is not None and bool((rows.importance > 0).any()):
        share *= (rows.importance / rows.importance.max())[:, None]
    return share


def learn_table(
    x: Float32[Tensor, "rows groups width"], worth: Float32[Tensor, "rows groups width"], bits: int
) -> Float16[Tensor, " values"]:
    """Find the values of least Σ worth · error², rising.

    Args:
        x: Weights over their scale; beyond ±WIDEST they count as that.
    """
    place = ((x / WIDEST + 1) * (CELLS / 2)).long().clamp_(0, CELLS - 1).flatten().numpy()
    flat = worth.double().flatten().numpy()
    mass = np.bincount(place, flat, CELLS)
    if not mass.sum() > 0:  # nothing is known to count
        mass = np.bincount(place, minlength=CELLS).astype(np.float64)
    middle = (np.arange(CELLS) + 0.5) * (2 * WIDEST / CELLS) - WIDEST
    table = _lloyd(middle, mass, _first_table(middle, mass, bits))
    found: Float16[Tensor, " values"] = torch.from_numpy(table).half()
    return found


def _first_table(
    middle: Float64[np.ndarray, " cells"], mass: Float64[np.ndarray, " cells"], bits: int
) -> Float64[np.ndarray, " values"]:
    """Start with values of equal cubic-root mass: the density of values that are the best of many.

    Source: Panter and Dite 1951, Quantization distortion in pulse-count modulation, eq. 16.
    """
    smooth = np.cbrt(np.convolve(mass, np.ones(33) / 33, "same")) + 1e-12
    share = np.cumsum(smooth) / smooth.sum()
    wanted = (np.arange(1 << bits) + 0.5) / (1 << bits)
    found: Float64[np.ndarray, " values"] = middle[np.searchsorted(share, wanted)]
    return found


def _lloyd(
    middle: Float64[np.ndarray, " cells"],
    mass: Float64[np.ndarray, " cells"],
    table: Float64[np.ndarray, " values"],
) -> Float64[np.ndarray, " values"]:
    """Move every value to the mean of the cells that are nearest to it."""
    total = np.concatenate([[0.0], np.cumsum(mass)])
    moment = np.concatenate([[0.0], np.cumsum(mass * middle)])
    for _ in range(LLOYD_TURNS):
        edges = np.searchsorted(middle, 0.5 * (table[1:] + table[:-1]))
        ends = np.concatenate([[0], edges, [len(middle)]])
        own = np.diff(total[ends])
        mean = np.diff(moment[ends]) / np.where(own > 0, own, 1.0)
        table = np.sort(np.where(own > 0, mean, table))
    return table


def _best_scales(
    x: Float32[Tensor, "rows groups width"],
    share: Float32[Tensor, "rows groups width"],
    size: Float32[Tensor, "rows groups"],
    table: Float32[Tensor, " values"],
) -> Float16[Tensor, "rows groups"]:
    """Search every group's scale for the least weighted squared error."""
    best, least = _stored(size), torch.full_like(size, torch.inf)
    middles = 0.5 * (table[1:] + table[:-1])
    for part in SHARES:
        stored = _stored(size * part)
        step = stored.float()[..., None]
        value = table[torch.bucketize(x / torch.where(step == 0, 1.0, step), middles)]
        error = value.mul_(step).sub_(x).square_().mul_(share).sum(-1)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, stored, best)
    return best


def _stored(scale: Float32[Tensor, "rows groups"]) -> Float16[Tensor, "rows groups"]:
    largest = float(scale.max())
    if not largest <= groups.LARGEST_SCALE or 0 < largest < groups.SMALLEST_SCALE:
        raise SettingError(
            f"a group of weights needs a scale of {largest:.3g}, which is outside the range of "
            "float16.",
            hint="keep this unit in 32 bits.",
        )
    return scale.half()
