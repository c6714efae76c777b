"""Integers of no fixed width: every weight gets the step it deserves, and codes are range coded.

A code that is rare costs many bits and one that is frequent few, so that the range of codes need
not be cut off. Rounded with error feedback, as in `quantize_feedback`. All weights have one step,
or, with `by_worth`, that step times a factor of their row and one of their column:

    row     ∝ 1 / sqrt(how much an error in the row counts)
    column  ∝ 1 / (what of an error in the column lasts, after feedback)

so that every weight's error does the same damage: where a bit can be cut in parts, no other way to
spend bits does less (reverse water-filling). The worth must be known well for that. It is, from
thousands of tokens; of dozens of pictures, one may need a channel or a class that no other had, and
what was rounded by worth lost several times more. The step is searched for which everything stored
takes the bytes that `bits` allows.

With `trellis` codes are chosen along one (`kernels/trellis.py`), with what they cost in bits: at
equal bytes a fifth of the squared error is saved at 3 bits and more, and a quarter at 2. It is for
plans written by hand: what is cheap is small, so that every weight is drawn towards 0 a little, and
over the layers of a network that adds up. EfficientNet-Lite0 at 3 bits loses half as much again as
with plain codes (0.088 against 0.057 nats), where prices, which add up layers, say a sixth less.

Source: Gish and Pierce 1968, Asymptotically efficient quantizing,
https://doi.org/10.1109/TIT.1968.1054193 (uniform steps with entropy coding lie 0.25 bits above what
is possible at all); error feedback as in Frantar et al. 2023, https://arxiv.org/abs/2210.17323,
algorithm 1; water-filling as in Cover and Thomas 2006, Elements of Information Theory, section
10.3.3. To spend a named size by rate and distortion is also the aim of CVXQ (Young 2024,
https://arxiv.org/abs/2409.02026); there groups get whole bits and the size is met by dual ascent,
here steps are of any size, codes are range coded, and sizes are searched and weighed. The stored
form is in `coded.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float, Float64, Int16
from torch import Tensor

from attar import settings
from attar.errors import SettingError
from attar.kernels import trellis
from attar.kernels.feedback import Grid
from attar.records import Cost, Replacement, RowWeights, Unit
from attar.transform import coded, groups
from attar.transform.quantize_feedback import (
    Order,
    Turn,
    order_of_rows,
    round_turns,
    rounding_order,
)

FEWEST_WEIGHTS, FEWEST_IN_LINE = 16_384, 32
# A row's importance is an estimate; it is taken to lie within this factor of the mean.
IMPORTANCE_RANGE = 256.0
# A weight may have this code; feedback may still make it a little larger.
LARGEST_CODE = 0.9 * coded.MIDDLE
# A search for a step ends when at most this share of the bytes allowed is left over.
TOLERANCE, TRIES = 0.001, 10
# Tries after which what codes cost along a trellis is left as it is.
TURNS_TO_SETTLE = 3
# Turns of a search that only wants the price, which may end so many bits off: a bit less is twice
# the step and twice the error, nearly.
TURNS_TO_PRICE, OFF_TO_PRICE = 3, 0.15
# Along a trellis codes stand for two steps each, and those that cost less are taken a little more.
SAVED_ALONG = 0.9
# Bits, and damage along a trellis over that without one in the same bytes, with feedback.
LEFT_ALONG = (1, 3, 7), (0.80, 0.83, 0.91)
# The slope at which a squared step is worth a bit: 2 ln 2 times the mean squared error, in steps.
SQUARED_STEPS_PER_BIT = 0.3
# Bits that coded Gaussian numbers take with a step of one standard deviation.
BITS_OF_GAUSSIAN = 0.5 * math.log2(2 * math.pi * math.e)


@dataclass(frozen=True)
class QuantizeEntropy:
    """Store each weight as a range-coded integer.

    Attributes:
        bits: Bits per weight of everything stored for the unit, on average; 1 to 7.
        by_worth: Let steps follow what rows and columns are worth.
        trellis: Choose codes along a trellis.
    """

    bits: int | float = 3
    by_worth: bool = False
    trellis: bool = False

    def __post_init__(self) -> None:
        settings.check_between("quantize_entropy", "bits", self.bits, 1, 7, 3)
        settings.check_flag("quantize_entropy", "by_worth", self.by_worth)
        settings.check_flag("quantize_entropy", "trellis", self.trellis)

    def label(self) -> str:
        """Say the setting in words for a report."""
        how = "trellis coded" if self.trellis else "range coded"
        return f"{self.bits:g} bits on average, {how}"

    def rejects(self, unit: Unit) -> str | None:
        if unit.n_weights < FEWEST_WEIGHTS:
            return f"has fewer than {FEWEST_WEIGHTS:,} weights, too few to learn from"
        if min(unit.columns, unit.rows) < FEWEST_IN_LINE:
            return f"has rows or columns of fewer than {FEWEST_IN_LINE} weights"
        if unit.groups > 1:
            return "is a convolution in groups, whose rows do not share columns"
        return None

    def allowed(self, n_weights: int) -> int:
        """Bytes that so many weights take."""
        return int(self.bits * n_weights / 8)

    def cost(self, unit: Unit) -> Cost:
        return Cost(weight_bytes=self.allowed(unit.n_weights), macs=unit.macs)

    def apply(
        self, weight: Tensor, moment: Tensor | None, rows: RowWeights | None = None
    ) -> Replacement:
        allowed = self.allowed(weight.numel())
        codes, frequencies = search(Rounding.of(weight, moment, rows, self), allowed)
        stored = coded.to_bytes(codes, frequencies)
        stored = np.concatenate([stored, np.zeros(allowed - len(stored), np.uint8)])
        return Replacement({"coded": torch.from_numpy(stored)}, codes.dense(), codes.small())

    def decode(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        stored = groups.take_stored(tensors, "coded", torch.uint8, (self.allowed(rows * columns),))
        return coded.from_bytes(stored.numpy(), rows, columns, along=self.trellis).dense()


@dataclass(frozen=True)
class Rounding:
    """A weight made ready to be rounded with any step.

    Attributes:
        weight: `rows columns`.
        counts: How many rows each stands for, `rows`.
        factors: Columns are before `factors_at`.
        order: Of the columns; None where nothing is fed back.
        row_order: None where rows do not depend on each other.
        largest: Of each column over the rows' factors, `columns`.
        power: Its mean square.
        along: Whether codes are chosen along a trellis.
    """

    weight: Float[Tensor, "rows columns"]
    counts: Float[Tensor, " rows"]
    factors: coded.Factors
    order: Order | None
    row_order: Order | None
    largest: Float[Tensor, " columns"]
    power: Float64[Tensor, " columns"]
    along: bool

    @staticmethod
    def of(
        weight: Tensor, moment: Tensor | None, rows: RowWeights | None, how: QuantizeEntropy
    ) -> Rounding:
        """Choose factors and order.

        Args:
            moment: As for `Transform.apply`, of one group.
            rows: None: all rows count alike.
            how: Its bits do not matter.
        """
        if rows is None:
            rows = RowWeights(torch.ones(len(weight)), torch.ones(len(weight)))
        order = None if moment is None or moment.dim() == 1 else rounding_order(moment)
        row_order = None if order is None else order_of_rows(rows, in_place=how.trellis)
        row, column = torch.ones(len(weight)), torch.ones(weight.shape[1])
        if how.by_worth:
            row = _row_factor(rows, row_order)
            column = _column_factor(moment, order, weight.shape[1])
        factors = coded.Factors(coded.nearest_factor(row), coded.nearest_factor(column))
        largest, power = _extents(weight, coded.factor_table()[factors.rows.long()], rows.counts)
        return Rounding(weight, rows.counts, factors, order, row_order, largest, power, how.trellis)

    def factors_at(self, step: float) -> coded.Factors:
        """Factors with this step: a column must not be so fine that its codes get too large."""
        finest = coded.smallest_factor(self.largest / (LARGEST_CODE * step))
        return replace(self.factors, columns=torch.maximum(self.factors.columns, finest))

    @property
    def n_rows(self) -> int:
        """How many rows this stands for."""
        return round(float(self.counts.double().sum()))

    @property
    def n_weights(self) -> int:
        """How many weights this stands for."""
        return self.n_rows * self.weight.shape[1]

    def first_step(self, allowed: int) -> float:
        """Guess the step with which everything takes so many bytes.

        Weights are taken as Gaussian, and then once as they are, each rounded to its nearest code.
        """
        columns = self.weight.shape[1]
        bits = 8 * (allowed - coded.head_bytes(self.n_rows, columns)) / self.n_weights
        spread = self.power.sqrt() / coded.factor_table()[self.factors.columns.long()]
        if not bool((spread > 0).any()):
            return 1.0
        mean = float(spread[spread > 0].double().log2().mean())
        saved = SAVED_ALONG if self.along else 0.0
        aim = mean + BITS_OF_GAUSSIAN - saved - bits
        if self.order is None or self.along:
            return float(2.0**aim)
        factors, table = self.factors_at(2.0**aim), coded.factor_table()
        steps = table[factors.columns.long()] * 2.0**aim
        needed = self.learn(self._nearest(table[factors.rows.long()], steps))[1]
        return float(2.0 ** (aim + 8 * (needed - allowed) / self.n_weights))

    def codes(
        self, step: float, known: coded.Frequencies | None = None
    ) -> Int16[Tensor, "rows columns"]:
        """Round with this step.

        Args:
            known: From a try before; what codes cost along a trellis.
        """
        factors, table = self.factors_at(step), coded.factor_table()
        row, column = table[factors.rows.long()], table[factors.columns.long()] * step
        if self.along:
            return self._along(row, column, known or self._guess(row, column))
        if self.order is None:
            return self._nearest(row, column)
        lowest = torch.full((len(row), 1), -float(coded.MIDDLE))
        highest = lowest + (coded.SYMBOLS - 1)
        group_of = torch.zeros(len(column), dtype=torch.int64)
        grid = Grid(row[:, None], column, group_of, lowest, highest)
        rows = torch.arange(len(row)) if self.row_order is None else self.row_order.places
        turn = Turn(rows, self.order, self.row_order, self.order.feedback[0])
        return round_turns(self.weight, [turn], grid).add_(coded.MIDDLE)

    def _along(
        self, row: Tensor, column: Tensor, known: coded.Frequencies
    ) -> Int16[Tensor, "rows columns"]:
        """Round along a trellis; rows stay in place, because its states follow them."""
        places = torch.arange(len(column)) if self.order is None else self.order.places
        back = torch.eye(len(column)) if self.order is None else self.order.feedback[0]
        rates = known.rates(SQUARED_STEPS_PER_BIT)
        ordered = replace(rates, column=rates.column[places.numpy()])
        zeros = self.weight.abs().amax(1) == 0
        steps = trellis.Steps((row * ~zeros).numpy(), column[places].numpy())
        made = trellis.round_along(
            self.weight[:, places].float(),
            None if self.row_order is None else self.row_order.feedback[0],
            back,
            steps,
            ordered,
        )
        codes = torch.from_numpy(made)[:, torch.argsort(places)]
        return codes.add_(coded.MIDDLE)

    def _guess(self, row: Tensor, column: Tensor) -> coded.Frequencies:
        """Frequencies as they are without feedback."""
        learnt = coded.learn(self._nearest(row, 2 * column), self.counts)[0]
        return replace(learnt, levels=np.tile(learnt.levels, (2, 1)))

    def _nearest(self, row: Tensor, column: Tensor) -> Int16[Tensor, "rows columns"]:
        codes = torch.empty(self.weight.shape, dtype=torch.int16)
        for part in groups.row_chunks(*self.weight.shape):
            exact = self.weight[part].float() / (row[part, None] * column)
            codes[part] = exact.round_().add_(coded.MIDDLE).clamp_(0, coded.SYMBOLS - 1).short()
        return codes

    def made(self, codes: Tensor, step: float) -> coded.Codes:
        """Say what codes stand for, with the step as it is stored."""
        stored = float(torch.tensor(step))
        if not 0 < stored < math.inf:
            raise SettingError(
                f"the weights need a step of {step:.3g}, which float32 cannot hold.",
                hint="keep this unit in 32 bits.",
            )
        return coded.Codes(codes, stored, self.factors_at(step), self.along)

    def learn(self, codes: Tensor) -> tuple[coded.Frequencies, float]:
        """Learn how often codes occur, and estimate the bytes of all that they stand for."""
        odd = trellis.quantizers((codes - coded.MIDDLE).numpy()) if self.along else None
        learnt, bits = coded.learn(codes, self.counts, odd)
        return learnt, coded.estimated_bytes(self.n_rows, codes.shape[1], learnt, bits)


def _extents(
    weight: Float[Tensor, "rows columns"], row: Float[Tensor, " rows"], counts: Tensor
) -> tuple[Float[Tensor, " columns"], Float64[Tensor, " columns"]]:
    """Largest and mean square of each column, with rows over their factors."""
    largest, power = torch.zeros(weight.shape[1]), torch.zeros(weight.shape[1], dtype=torch.float64)
    for part in groups.row_chunks(*weight.shape):
        scaled = weight[part].float() / row[part, None]
        largest = torch.maximum(largest, scaled.abs().amax(0))
        power += counts[part].double() @ scaled.double().square_() / counts.double().sum()
    return largest, power


def _row_factor(rows: RowWeights, order: Order | None) -> Float[Tensor, " rows"]:
    if order is not None:
        lasting = torch.empty(len(rows.importance))
        lasting[order.places] = order.lasting[0]
        mean = lasting.double().log2().mean().exp2().float()
        share = lasting / mean
        return 1 / share.clamp(IMPORTANCE_RANGE**-0.5, IMPORTANCE_RANGE**0.5)
    mean = (rows.importance * rows.counts).sum() / rows.counts.sum()
    if not bool(mean > 0):
        return torch.ones_like(rows.importance)
    share = rows.importance / mean
    return share.clamp(1 / IMPORTANCE_RANGE, IMPORTANCE_RANGE).rsqrt()


def _column_factor(
    moment: Tensor | None, order: Order | None, columns: int
) -> Float[Tensor, " columns"]:
    """One over what of each column's error lasts; all alike where nothing is known."""
    if moment is None or not bool((moment > 0).any()):
        return torch.ones(columns)
    if order is None:
        lasting = moment.clamp(min=1e-6 * float(moment.mean())).sqrt()
    else:
        lasting = torch.empty(columns)
        lasting[order.places] = order.lasting[0]
    return lasting.double().log2().mean().exp2().float() / lasting


def search(rounding: Rounding, allowed: int) -> tuple[coded.Codes, coded.Frequencies]:
    """Find the smallest step, nearly, whose bytes are allowed.

    Raises:
        SettingError: No step takes so few bytes.
    """
    needed: dict[float, float] = {}  # bytes by log2 of the step
    best: tuple[float, Tensor, coded.Frequencies] | None = None
    known: coded.Frequencies | None = None
    aim = math.log2(rounding.first_step(allowed))
    for turn in range(TRIES):
        codes = rounding.codes(2.0**aim, known)
        learnt, needed[aim] = rounding.learn(codes)
        if rounding.along and turn < TURNS_TO_SETTLE:
            # Codes follow what they cost, and what they cost follows the codes.
            known, needed = learnt, {aim: needed[aim]}
        if needed[aim] <= allowed and (best is None or aim < best[0]):
            best = (aim, codes, learnt)
        if (1 - TOLERANCE) * allowed <= needed[aim] <= allowed:
            break
        aim = _aim(needed, allowed, rounding.n_weights)
    if best is None:
        raise SettingError(
            f"no step brings these weights down to {allowed:,} bytes.",
            hint="give this unit more bits, or keep it in 32 bits.",
        )
    log_step, codes, learnt = best
    return rounding.made(codes, 2.0**log_step), learnt


def _aim(needed: Mapping[float, float], allowed: int, n_weights: int) -> float:
    """Say which step to try next, as a power of two."""
    wanted = allowed * (1 - TOLERANCE / 2)
    too_small = max((step for step, n in needed.items() if n > allowed), default=None)
    enough = min((step for step, n in needed.items() if n <= allowed), default=None)
    if too_small is None or enough is None or enough < too_small:
        # Twice the step saves a bit of each code, or less where most codes are 0.
        nearest = max(needed) if enough is None else min(needed)
        return nearest + 8 * (needed[nearest] - wanted) / n_weights
    share = (needed[too_small] - wanted) / (needed[too_small] - needed[enough])
    return too_small + min(0.98, max(0.02, share)) * (enough - too_small)


def trials(
    weight: Float[Tensor, "rows columns"],
    moment: Tensor | None,
    rows: RowWeights | None,
    transforms: Sequence[QuantizeEntropy],
) -> Iterator[Replacement]:
    """Round one weight with several settings, for their prices: bytes are met only nearly.

    Args:
        rows: May be a sample; then the bytes are those of the rows it stands for.
    """
    for how, run in groupby(transforms, key=lambda t: replace(t, bits=1, trellis=False)):
        rounding = Rounding.of(weight, moment, rows, how)
        yield from _tried(rounding, list(run))


def _tried(rounding: Rounding, settings: Sequence[QuantizeEntropy]) -> Iterator[Replacement]:
    """Round to each of these bytes, nearly; a trellis, which takes time, is taken at its word."""
    for how in settings:
        allowed = how.allowed(rounding.n_weights)
        aim, off = math.log2(rounding.first_step(allowed)), 0.0
        for _ in range(TURNS_TO_PRICE):
            aim += off
            codes = rounding.codes(2.0**aim)
            off = 8 * (rounding.learn(codes)[1] - allowed) / rounding.n_weights
            if abs(off) < OFF_TO_PRICE:
                break
        left = float(np.interp(how.bits, *LEFT_ALONG)) if how.trellis else 1.0
        made = rounding.made(codes, 2.0**aim).dense()
        yield Replacement({}, torch.lerp(rounding.weight.float(), made, left**0.5 * 2.0**off))
