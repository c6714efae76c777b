"""Codes for a fixed list of values: small floats, NormalFloat and ternary, rounded with feedback.

    weight = scale[row, group] · level[code]

    fp8     E4M3: 8 bits, to ±448
    fp4     E2M1: ±0, 0.5, 1, 1.5, 2, 3, 4, 6
    fp4_e1m2, fp4_e3m0
            the two other ways to spend three bits on exponent and fraction: even steps, and powers
            of two; which of the three a unit gets, the planner or a plan says
    mxfp4   fp4 in groups of 32 columns whose scale is a power of two, in 8 bits
    nf4     16 quantiles of a normal distribution
    ternary −1, 0 and 1, five in a byte

Scales are searched among shares of the one that just covers the group, for the least weighted
squared error; then each weight is rounded with feedback between columns and rows
(`kernels/feedback.py`).

Source: Micikevicius et al. 2022, FP8 formats for deep learning, https://arxiv.org/abs/2209.05433,
table 1; OCP Microscaling Formats specification 1.0, sections 5.2 and 5.3 (E2M1, scales E8M0);
Liu et al. 2023, LLM-FP4, https://arxiv.org/abs/2310.16836, eq. 3 to 9 (formats of four bits and
their bias, searched; the bias is in our scale);
Dettmers et al. 2023, QLoRA, https://arxiv.org/abs/2305.14314, eq. 4 and appendix E (NF4); Ma et al.
2024, https://arxiv.org/abs/2402.17764, eq. 1 to 3 (ternary). We differ in the search for the scale,
and in rounding with error feedback where all of them take the nearest value. Groups, but for
mxfp4's, are free, and their scales float16, not quantized a second time as QLoRA does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int16, UInt8
from torch import Tensor

from attar import settings
from attar.errors import SettingError
from attar.kernels import bitpack
from attar.kernels.feedback import Grid
from attar.records import Cost, Replacement, RowWeights, Unit
from attar.transform import groups
from attar.transform.quantize_feedback import round_turns, turns

# Shares of the scale that covers the whole group: with few levels, cutting off its ends pays. The
# first is for powers of two, the nearest of which may not cover it.
SHARES = (1.42, *(round(1.0 - 0.05 * k, 2) for k in range(13)))
MX_GROUP = 32
# A power of two as stored: its exponent and this, as in float32.
EXPONENT_BIAS = 127
TRITS_PER_BYTE = 5


def _e4m3() -> tuple[float, ...]:
    """All finite numbers of sign, four bits of exponent (bias 7) and three of fraction."""
    codes = range(1 << 7)
    positive = {_small_float(code >> 3, code & 7, 8, 7) for code in codes if code != 0x7F}
    return tuple(sorted(positive | {-value for value in positive}))


def _small_float(exponent: int, fraction: int, parts: int, bias: int) -> float:
    if exponent == 0:
        return fraction / parts * 2.0 ** (1 - bias)
    return (1 + fraction / parts) * 2.0 ** (exponent - bias)


_E2M1 = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


# All of one bit of exponent and two of fraction, and of three bits of exponent and no fraction.
_E1M2 = tuple(0.25 * k for k in range(1, 8))
_E3M0 = tuple(2.0 ** (k - 3) for k in range(1, 8))


def _signed(sizes: tuple[float, ...]) -> tuple[float, ...]:
    return (*(-size for size in reversed(sizes)), 0.0, *sizes)


def _normal_float(bits: int = 4) -> tuple[float, ...]:
    """Quantiles of a normal distribution, 0 among them, over the largest: eq. 4, both halves."""
    half = 2 ** (bits - 1)
    # The outermost quantile: half way between the last of 15 and of 16 equal parts.
    edge = 1 - 0.5 * (1 / 32 + 1 / 30)

    def quantiles(n: int) -> list[float]:
        probability = torch.linspace(edge, 0.5, n + 1, dtype=torch.float64)[:-1]
        found: list[float] = torch.special.ndtri(probability).tolist()
        return found

    raw = [*(-value for value in quantiles(half - 1)), 0.0, *reversed(quantiles(half))]
    return tuple(value / max(raw) for value in raw)


LEVELS: dict[str, tuple[float, ...]] = {
    "fp8": _e4m3(),
    "fp4": _signed(_E2M1),
    "fp4_e1m2": _signed(_E1M2),
    "fp4_e3m0": _signed(_E3M0),
    "mxfp4": _signed(_E2M1),
    "nf4": _normal_float(),
    "ternary": (-1.0, 0.0, 1.0),
}


@dataclass(frozen=True)
class QuantizeLevels:
    """Store each weight as a code for one of a few values.

    Attributes:
        levels: Name of the list.
        group_size: Columns that share one scale; 0 = the whole row. mxfp4 has 32.
    """

    levels: str = "nf4"
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.levels not in LEVELS:
            raise SettingError(
                f"levels is {self.levels!r}, but quantize_levels takes one of {', '.join(LEVELS)}.",
                hint="set levels to nf4.",
            )
        settings.check_group_size("quantize_levels", self.group_size)
        if self.levels == "mxfp4" and self.group_size != MX_GROUP:
            raise SettingError(
                f"group_size is {self.group_size}, but mxfp4 has groups of {MX_GROUP}.",
                hint=f"set group_size to {MX_GROUP}.",
            )

    def label(self) -> str:
        """Say the setting in words for a report."""
        per = f"groups of {self.group_size}" if self.group_size else "one scale per row"
        return f"{self.levels}, {per}"

    def rejects(self, unit: Unit) -> str | None:
        return groups.refuse_groups(unit.columns, self.group_size)

    def cost(self, unit: Unit) -> Cost:
        n_scales = unit.rows * (unit.columns // groups.group_width(unit.columns, self.group_size))
        scale_bytes = n_scales * (1 if self.levels == "mxfp4" else groups.SCALE_BYTES)
        return Cost(weight_bytes=self._code_bytes(unit.n_weights) + scale_bytes, macs=unit.macs)

    def apply(
        self, weight: Tensor, moment: Tensor | None, rows: RowWeights | None = None
    ) -> Replacement:
        importance = groups.column_weights(moment)
        width = groups.group_width(weight.shape[1], self.group_size)
        stored = torch.cat(
            [
                self._fitted(weight[c], groups.spread_rows(importance, len(weight), c), width)
                for c in groups.row_chunks(*weight.shape)
            ]
        )
        scale = self._scale(stored)
        low = torch.zeros_like(scale)
        columns = weight.shape[1]
        grid = Grid(
            scale=scale,
            column_scale=torch.ones(columns),
            group_of=torch.arange(columns) // width,
            lowest=low,
            highest=low + (self._n_levels - 1),
            levels=self._levels,
        )
        codes = round_turns(weight, turns(moment, rows, *weight.shape), grid)
        tensors = {"codes": self._pack(codes), "scale": stored}
        return Replacement(tensors, self.decode(tensors, *weight.shape))

    def decode(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        width = groups.group_width(columns, self.group_size)
        if self.levels == "mxfp4":
            shape = (rows, columns // width)
            scale = self._scale(groups.take_stored(tensors, "scale", torch.uint8, shape))
        else:
            scale = groups.load_scale(tensors, rows, columns, self.group_size).float()
        size = (self._code_bytes(rows * columns),)
        packed = groups.take_stored(tensors, "codes", torch.uint8, size)
        codes = self._unpack(packed, rows * columns).view(rows, columns)
        dense = torch.empty(rows, columns)
        for chunk in groups.row_chunks(rows, columns):
            level = self._levels[codes[chunk].long()].view(-1, columns // width, width)
            dense[chunk] = level.mul_(scale[chunk][..., None]).view(-1, columns)
        return dense

    @property
    def _levels(self) -> Float32[Tensor, " levels"]:
        return torch.tensor(LEVELS[self.levels], dtype=torch.float32)

    @property
    def _n_levels(self) -> int:
        return len(LEVELS[self.levels])

    @property
    def _bits(self) -> int:
        return (self._n_levels - 1).bit_length()

    def _code_bytes(self, n: int) -> int:
        if self.levels == "ternary":
            return -(-n // TRITS_PER_BYTE)
        return bitpack.packed_bytes(n, self._bits)

    def _pack(self, codes: Int16[Tensor, "rows columns"]) -> UInt8[Tensor, " bytes"]:
        flat = codes.flatten()
        if self.levels != "ternary":
            return bitpack.pack(flat.to(torch.uint8), self._bits)
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % TRITS_PER_BYTE))
        places = 3 ** torch.arange(TRITS_PER_BYTE, dtype=torch.int16)
        return (padded.view(-1, TRITS_PER_BYTE) * places).sum(1).to(torch.uint8)

    def _unpack(self, packed: UInt8[Tensor, " bytes"], n: int) -> UInt8[Tensor, " n"]:
        if self.levels != "ternary":
            codes = bitpack.unpack(packed, self._bits, n)
        else:
            places = 3 ** torch.arange(TRITS_PER_BYTE, dtype=torch.int16)
            codes = (packed[:, None].short() // places % 3).to(torch.uint8).flatten()[:n]
        if n and int(codes.max()) >= self._n_levels:
            raise groups.damaged(f"a code is not one of {self._n_levels}.")
        return codes

    def _scale(self, stored: Tensor) -> Float32[Tensor, "rows groups"]:
        if self.levels == "mxfp4":
            return torch.exp2(stored.float() - EXPONENT_BIAS)
        return stored.float()

    def _fitted(
        self,
        weight: Float[Tensor, "rows columns"],
        importance: Float[Tensor, "rows columns"] | None,
        width: int,
    ) -> Tensor:
        """Choose the scale of each group, as it is stored."""
        x = weight.float().reshape(len(weight), -1, width)
        share = torch.ones_like(x) if importance is None else importance.float().reshape(x.shape)
        levels = self._levels
        middles = 0.5 * (levels[1:] + levels[:-1])
        cover = x.abs().amax(-1) / float(levels[-1])
        best, least = self._stored(cover), torch.full_like(cover, torch.inf)
        for part in SHARES:
            stored = self._stored(cover * part)
            step = self._scale(stored)[..., None]
            level = levels[torch.bucketize(x / step, middles)]
            error = level.mul_(step).sub_(x).square_().mul_(share).sum(-1)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, stored, best)
        return best

    def _stored(self, scale: Float32[Tensor, "rows groups"]) -> Tensor:
        largest = float(scale.max())
        if self.levels == "mxfp4":
            exponent = torch.log2(scale.clamp(min=2.0**-126)).round() + EXPONENT_BIAS
            return exponent.clamp(1, 254).to(torch.uint8)
        if not largest <= groups.LARGEST_SCALE or 0 < largest < groups.SMALLEST_SCALE:
            raise SettingError(
                f"a group of weights needs a scale of {largest:.3g}, which is outside the range of "
                "float16.",
                hint="keep this unit in 32 bits.",
            )
        return torch.where(scale > 0, scale, 1.0).half().clamp(min=groups.SMALLEST_SCALE)
