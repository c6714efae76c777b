"""Integer codes as bytes: a step, factors of rows and columns, and range-coded codes.

    weight[i, j] = level(code[i, j] − 1024) · step · row[i] · column[j]

A level is the code itself or, along a trellis (`kernels/trellis.py`), twice that or one less. How
often a code occurs is told for each of 16 contexts. The context of a code is the sum of a class of
its row and a class of its column, by how large the codes in them are, so that one table need not
serve quiet and loud ones alike; along a trellis the even and the odd grid have 16 each. Everything
lies in one run of bytes:

    step               float32
    row, column        factors, 6 bits each: powers of two in steps of a third
    row, column        classes, 4 bits each
    frequencies        for every context the first and last code, 16 bits each (first > last: none),
                       then for each code between them one byte: a power of two in sixteenths
    codes              see `kernels/rans.py`; zeros behind them fill up what was promised
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float32, Int16, Integer, UInt8
from torch import Tensor

from attar.disk import give_back
from attar.kernels import bitpack, rans, trellis
from attar.transform.groups import damaged, row_chunks

MIDDLE, SYMBOLS = 1024, 2048
FACTOR_BITS, FACTORS_PER_DOUBLING, FACTOR_OF_ONE = 6, 3, 32
CLASS_BITS, CLASSES = 4, 16
# Which class, and which context, a mean square of 1 has; the next class has twice that.
ROW_CLASS_OF_ONE, COLUMN_CLASS_OF_ONE, CONTEXT_OF_ONE = 6, 8, 6
SHIFT = ROW_CLASS_OF_ONE + COLUMN_CLASS_OF_ONE - CONTEXT_OF_ONE
STEP_BYTES, RANGE_BYTES = 4, 2 * 2  # float32; the first and last code of one context
SMALLEST_POWER = 2.0**-20
# The frequency, of `rans.TOTAL`, that prices a code which did not occur.
NEVER_SEEN = 0.25
# Stored frequencies: 0, and the powers of two in sixteenths. No power comes so close to a half that
# it could be rounded differently elsewhere.
LEVELS = np.array([0] + [round(2 ** (k / 16)) for k in range(16 * rans.PRECISION + 1)])


@dataclass(frozen=True)
class Factors:
    """What the step of each weight is made of.

    Attributes:
        rows: `rows`, places in `factor_table`.
        columns: `columns`.
    """

    rows: UInt8[Tensor, " rows"]
    columns: UInt8[Tensor, " columns"]


@dataclass(frozen=True)
class Codes:
    """A weight as codes, which are no longer range coded.

    Attributes:
        codes: With MIDDLE for 0; or, in 8 bits, levels, with 0 for 0.
        along: Whether a trellis says what codes stand for.
    """

    codes: Integer[Tensor, "rows columns"]
    step: float
    factors: Factors
    along: bool = False

    def dense(self) -> Float32[Tensor, "rows columns"]:
        """Turn codes into weights."""
        table = factor_table()
        column = table[self.factors.columns.long()] * self.step
        row = table[self.factors.rows.long()]
        dense = self.levels().float().mul_(column).mul_(row[:, None])
        give_back(self.codes)
        return dense

    def moved(self, move: Callable[[Tensor], Tensor]) -> Codes:
        """The same with the codes where `move` puts them."""
        return replace(self, codes=move(self.codes))

    def levels(self) -> Integer[Tensor, "rows columns"]:
        """Turn codes into steps, with 0 for 0."""
        if self.codes.dtype == torch.int8:
            return self.codes
        if not self.along:
            return self.codes - MIDDLE
        codes = (self.codes - MIDDLE).numpy()
        return torch.from_numpy(trellis.levels(codes, trellis.quantizers(codes)))

    def small(self) -> Codes:
        """The same in 8 bits, where they fit."""
        levels = self.levels()
        low, high = (int(end) for end in torch.aminmax(levels))
        if low < -128 or high > 127:
            return self
        return replace(self, codes=levels.to(torch.int8))


@dataclass(frozen=True)
class Frequencies:
    """How often each code occurs where: what the range coder needs.

    Attributes:
        row_class: `rows`.
        column_class: `columns`.
        levels: Places in LEVELS, `contexts symbols`.
    """

    row_class: UInt8[Tensor, " rows"]
    column_class: UInt8[Tensor, " columns"]
    levels: UInt8[np.ndarray, "contexts symbols"]

    @property
    def table(self) -> rans.Frequencies:
        """Of each code in each context."""
        return rans.normalised(LEVELS[self.levels])

    @property
    def contexts(self) -> UInt8[np.ndarray, " codes"]:
        """Of each code, row after row, in the even grid."""
        found: UInt8[np.ndarray, " codes"] = contexts(self.row_class, self.column_class).numpy()
        return found.ravel()

    def rates(self, per_bit: float) -> trellis.Rates:
        """What codes cost along a trellis; one that did not occur costs more than any that did."""
        bits = np.log2(rans.TOTAL / np.maximum(self.table, NEVER_SEEN))
        by_grid = bits.astype(np.float32).reshape(2, CLASSES, SYMBOLS)
        row = self.row_class.numpy().astype(np.int64) - SHIFT
        return trellis.Rates(by_grid, row, self.column_class.numpy().astype(np.int64), per_bit)


def factor_table() -> Float32[Tensor, " factors"]:
    """All factors of a row or a column."""
    exponents = (torch.arange(1 << FACTOR_BITS) - FACTOR_OF_ONE) / FACTORS_PER_DOUBLING
    return torch.exp2(exponents.double()).float()


def nearest_factor(factor: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Find the place of the nearest factor in the table."""
    return _place(factor).round_().clamp_(0, (1 << FACTOR_BITS) - 1).to(torch.uint8)


def smallest_factor(factor: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Find the place of the smallest factor in the table that is not below; the largest if none."""
    return _place(factor).ceil_().clamp_(0, (1 << FACTOR_BITS) - 1).to(torch.uint8)


def _place(factor: Tensor) -> Tensor:
    return torch.log2(factor.double()) * FACTORS_PER_DOUBLING + FACTOR_OF_ONE


def learn(
    codes: Int16[Tensor, "rows columns"],
    counts: Float[Tensor, " rows"],
    odd: UInt8[np.ndarray, "rows columns"] | None = None,
) -> tuple[Frequencies, float]:
    """Learn classes and frequencies from codes, and how many bits the codes take with them.

    Args:
        counts: How many rows each stands for.
        odd: The grid of each code along a trellis.
    """
    n_contexts = CLASSES if odd is None else 2 * CLASSES
    power = torch.empty(len(codes))
    column_power = torch.zeros(codes.shape[1])
    share = counts / counts.sum()
    for part in row_chunks(*codes.shape):
        square = (codes[part].float() - MIDDLE).square_()
        power[part] = square.mean(1)
        column_power += share[part] / power[part].clamp(min=SMALLEST_POWER) @ square
    row_class = _class_of(power, ROW_CLASS_OF_ONE)
    column_class = _class_of(column_power, COLUMN_CLASS_OF_ONE)
    seen = torch.zeros(n_contexts * SYMBOLS, dtype=torch.float64)
    for part in row_chunks(*codes.shape):
        own = contexts(row_class[part], column_class)
        if odd is not None:
            own += torch.from_numpy(odd[part]) * CLASSES
        cells = own.to(torch.int32) * SYMBOLS + codes[part]
        times = counts[part].double().repeat_interleave(codes.shape[1])
        seen += torch.bincount(cells.flatten(), times, len(seen))
    occurs = seen.view(n_contexts, SYMBOLS).numpy()
    scaled = np.maximum(rans.normalised(np.ceil(occurs)), 1)
    levels = np.where(occurs > 0, 1 + np.rint(16 * np.log2(scaled)), 0).astype(np.uint8)
    found = Frequencies(row_class, column_class, levels)
    bits = rans.PRECISION - np.log2(np.maximum(found.table, 1))
    return found, float((occurs * bits).sum())


def contexts(
    row_class: UInt8[Tensor, " rows"], column_class: UInt8[Tensor, " columns"]
) -> UInt8[Tensor, "rows columns"]:
    """Context of each code."""
    context = row_class[:, None].to(torch.int16) + (column_class.to(torch.int16) - SHIFT)
    return context.clamp_(0, CLASSES - 1).to(torch.uint8)


def _class_of(mean_square: Tensor, of_one: int) -> UInt8[Tensor, "*shape"]:
    place = torch.log2(mean_square.clamp(min=SMALLEST_POWER)).round_() + of_one
    return place.clamp_(0, CLASSES - 1).to(torch.uint8)


def head_bytes(rows: int, columns: int) -> float:
    """Bytes before ranges and frequencies, at most."""
    return STEP_BYTES + (rows + columns) * (FACTOR_BITS + CLASS_BITS) / 8 + 4


def estimated_bytes(rows: int, columns: int, frequencies: Frequencies, bits: float) -> float:
    """All bytes of a weight whose codes take `bits`; never less than `to_bytes` makes."""
    first, last = _ranges(frequencies.levels)
    head = head_bytes(rows, columns) + int((RANGE_BYTES + last - first + 1).sum())
    return head + rans.estimated_bytes(rows * columns, bits)


def to_bytes(made: Codes, frequencies: Frequencies) -> UInt8[np.ndarray, " bytes"]:
    """Lay out everything that is stored."""
    first, last = _ranges(frequencies.levels)
    places = np.arange(SYMBOLS)
    inside = (places >= first[:, None]) & (places <= last[:, None])
    contexts = frequencies.contexts
    if made.along:
        contexts = contexts + CLASSES * trellis.quantizers((made.codes - MIDDLE).numpy()).ravel()
    coded = rans.encode(made.codes.flatten().numpy().astype(np.uint16), contexts, frequencies.table)
    return np.concatenate(
        [
            np.array([made.step], "<f4").view(np.uint8),
            _packed(made.factors.rows, FACTOR_BITS),
            _packed(made.factors.columns, FACTOR_BITS),
            _packed(frequencies.row_class, CLASS_BITS),
            _packed(frequencies.column_class, CLASS_BITS),
            np.stack([first, last], 1).astype("<u2").view(np.uint8).ravel(),
            frequencies.levels[inside],
            coded,
        ]
    )


def _packed(values: UInt8[Tensor, "*shape"], bits: int) -> UInt8[np.ndarray, " bytes"]:
    packed: UInt8[np.ndarray, " bytes"] = bitpack.pack(values.flatten(), bits).numpy()
    return packed


def _ranges(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last code of each context; first 1 and last 0 where there is none."""
    used = levels > 0
    some = used.any(1)
    first = np.where(some, used.argmax(1), 1)
    last = np.where(some, SYMBOLS - 1 - used[:, ::-1].argmax(1), 0)
    return first, last


class _Reader:
    """Takes bytes from the front; asking for more than there are is damage."""

    def __init__(self, stored: np.ndarray) -> None:
        self._stored, self._at = stored, 0

    def take(self, n: int) -> np.ndarray:
        if self._at + n > len(self._stored):
            raise damaged("its bytes end too early.")
        self._at += n
        return self._stored[self._at - n : self._at]

    def packed(self, width: int, n: int) -> Tensor:
        packed = torch.from_numpy(self.take(bitpack.packed_bytes(n, width)).copy())
        return bitpack.unpack(packed, width, n)

    def rest(self) -> np.ndarray:
        return self._stored[self._at :]


def from_bytes(
    stored: UInt8[np.ndarray, " bytes"], rows: int, columns: int, *, along: bool = False
) -> Codes:
    """Undo `to_bytes`.

    Args:
        along: Whether codes were chosen along a trellis.

    Raises:
        ModelError: These bytes cannot have been made by `to_bytes`.
    """
    reader = _Reader(stored)
    step = float(reader.take(STEP_BYTES).copy().view("<f4")[0])
    if not 0 < step < float("inf"):
        raise damaged("its step is not a number above 0.")
    row, column = (reader.packed(FACTOR_BITS, n) for n in (rows, columns))
    row_class, column_class = (reader.packed(CLASS_BITS, n) for n in (rows, columns))
    levels = np.zeros(((1 + along) * CLASSES, SYMBOLS), np.uint8)
    ranges = reader.take(len(levels) * RANGE_BYTES).copy().view("<u2").reshape(-1, 2).astype(int)
    if int(ranges.max()) >= SYMBOLS:
        raise damaged("a code is too large.")
    for context, (first, last) in enumerate(ranges.tolist()):
        levels[context, first : last + 1] = reader.take(max(0, last - first + 1))
    if int(levels.max()) >= len(LEVELS):
        raise damaged("a frequency is too large.")
    found = Frequencies(row_class, column_class, levels)
    walk = rans.STILL
    if along:
        walk = rans.Walk(trellis.NEXT, CLASSES * trellis.ODD, columns)
    codes = rans.decode(reader.rest(), found.contexts, found.table, walk).astype(np.int16)
    made = torch.from_numpy(codes).view(rows, columns)
    return Codes(made, step, Factors(row, column), along)
