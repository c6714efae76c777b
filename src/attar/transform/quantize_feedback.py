"""Integer codes with error feedback: what rounding one weight loses, later ones make good.

Minimises trace(R dW C dWᵀ), C the second moment on the column side and R that on the row side, by
rounding one weight after the other and moving its error onto those not yet rounded
(`kernels/feedback.py`); where R is not known, rows do not depend on each other.

Source: Frantar et al. 2023, GPTQ, https://arxiv.org/abs/2210.17323, eq. 2 and algorithm 1; both
sides as in Tseng et al. 2025, https://arxiv.org/abs/2505.22988.
We differ in three ways. Columns and rows are rounded in order of a falling diagonal, so that the
dearest round while there are most left to make good for them. The ranges of all groups are fixed
beforehand on the original weight and searched for the least weighted error (`groups.find_scales`),
so that the order does not change what is stored. C may be one matrix per group of rows
(convolutions); then there is no feedback between rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int16, UInt8
from torch import Tensor

from attar import settings
from attar.kernels.feedback import Grid, round_both
from attar.records import Cost, Replacement, RowWeights, Unit
from attar.transform import groups

# Added to C's diagonal, as a share of its mean: directions that the calibration data never showed.
# With 4k tokens of a language model, what held-out tokens lose is least at 0.03 to 0.1.
DAMPING_FRACTION = 0.03
# At least this share of a column's worth lasts: what seems to be all made good is seen too well.
SMALLEST_LASTING = 0.01
# The same for rows: of 0.01 to 1, held-out tokens of a language model lose least at 0.1.
ROW_DAMPING_FRACTION = 0.1
# Weights rounded at once where rows do not depend on each other: 16 MB for each of a few buffers.
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
        rows: RowWeights | None = None,
    ) -> Replacement:
        return next(quantize_all(weight, moment, [self], rows))

    def decode(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        codes, scale, zero_point = groups.load_stored(
            tensors, self.bits, rows, columns, self.group_size, self.symmetric
        )
        return groups.decode_codes(codes, scale, zero_point, self.group_size)


def quantize_all(
    weight: Float[Tensor, "rows columns"],
    moment: Tensor | None,
    transforms: Sequence[QuantizeFeedback],
    rows: RowWeights | None = None,
) -> Iterator[Replacement]:
    """Apply several settings to one weight.

    Args:
        moment: `groups columns columns`, or its diagonal, or None; without a full matrix there is
            nothing to feed back along, and every weight is rounded to the nearest code.
    """
    importance = groups.column_weights(moment)
    fed_back = moment is not None and moment.dim() > 1
    some = turns(moment, rows, *weight.shape) if fed_back else []
    for t in transforms:
        scales = groups.find_scales(weight, t.bits, t.group_size, t.symmetric, importance)
        if fed_back:
            codes = feed_back(weight, some, t, scales)
        else:
            codes = groups.encode(weight, *scales, t.bits, t.group_size)
        yield Replacement(
            tensors=groups.store(codes, *scales, t.bits, t.symmetric),
            dense=groups.decode_codes(codes, *scales, t.group_size),
        )


@dataclass(frozen=True)
class Order:
    """In which order columns or rows are rounded, and where their errors go.

    Attributes:
        places: The one that is rounded first, second, and so on.
        feedback: See `feedback_factor`; in that order.
        lasting: What is left of an error of 1 when all later ones have made good what they can, in
            square roots of the moment's unit; in that order.
    """

    places: Int[Tensor, " side"]
    feedback: Float[Tensor, "groups side side"]
    lasting: Float[Tensor, "groups side"]


def rounding_order(
    moment: Float[Tensor, "groups side side"],
    damping_fraction: float = DAMPING_FRACTION,
    *,
    in_place: bool = False,
    together: int = 1,
) -> Order:
    """Dearest first, so many neighbours together; or all in place."""
    dear = moment.diagonal(dim1=1, dim2=2).sum(0)
    if in_place:
        order = torch.arange(len(dear))
    else:
        blocks = torch.argsort(dear.view(-1, together).sum(1), descending=True, stable=True)
        order = (blocks[:, None] * together + torch.arange(together)).flatten()
    return Order(order, *feedback_factor(moment[:, order][:, :, order], damping_fraction))


def order_of_rows(rows: RowWeights | None, *, in_place: bool = False) -> Order | None:
    """Order in which rows are rounded; None where they do not depend on each other."""
    if rows is None or rows.moment is None:
        return None
    return rounding_order(rows.moment[None], ROW_DAMPING_FRACTION, in_place=in_place)


class Turn(NamedTuple):
    """Rows that are rounded together.

    Attributes:
        rows: Which, in the order of rounding.
        order: Of the columns.
        row_order: None where these rows do not depend on each other.
        feedback: Of the columns, for these rows.
    """

    rows: Int[Tensor, " rows"]
    order: Order
    row_order: Order | None
    feedback: Float[Tensor, "columns columns"]


def turns(
    moment: Tensor | None, rows: RowWeights | None, n_rows: int, columns: int, together: int = 1
) -> list[Turn]:
    """Cut the rows into groups of one moment each.

    Without a full moment columns stay in place, and nothing is fed back.

    Args:
        together: Columns that are rounded as one.
    """
    if moment is None or moment.dim() == 1:
        places, nothing = torch.arange(columns), torch.eye(columns)[None]
        order, row_order = Order(places, nothing, torch.ones(1, columns)), None
    else:
        order, row_order = rounding_order(moment, together=together), order_of_rows(rows)
    each = n_rows // len(order.feedback)
    found = []
    for number, feedback in enumerate(order.feedback):
        own = torch.arange(each) + number * each if row_order is None else row_order.places
        found.append(Turn(own, order, row_order, feedback))
    return found


def feed_back(
    weight: Float[Tensor, "rows columns"],
    some: Sequence[Turn],
    transform: QuantizeFeedback,
    scales: groups.Scales,
) -> UInt8[Tensor, "rows columns"]:
    """Round every weight."""
    scale, zero_point = (part.float() for part in scales)
    top = 2.0**transform.bits - 1
    width = groups.group_width(weight.shape[1], transform.group_size)
    grid = Grid(
        scale,
        torch.ones(weight.shape[1]),
        torch.arange(weight.shape[1]) // width,
        -zero_point,
        top - zero_point,
    )
    codes = round_turns(weight, some, grid)
    return (codes + zero_point[:, grid.group_of]).to(torch.uint8)


def round_turns(
    weight: Float[Tensor, "rows columns"], some: Sequence[Turn], grid: Grid
) -> Int16[Tensor, "rows columns"]:
    """Round a weight to a grid; rows and columns of both as they stand."""
    codes = torch.empty(weight.shape, dtype=torch.int16)
    for number, (own, order, row_order, feedback) in enumerate(some):
        part = grid.of_rows(own).of_columns(order.places, order.lasting[number].square())
        made = feed_rows(weight, own, order.places, feedback, row_order, part)
        back = torch.argsort(order.places)
        codes[own] = made[:, back]
        if grid.free is not None and part.free is not None:
            grid.free[own] = part.free[:, back]
    return codes


def feed_rows(
    weight: Float[Tensor, "all_rows columns"],
    rows: Int[Tensor, " rows"],
    columns: Int[Tensor, " columns"],
    feedback: Float[Tensor, "columns columns"],
    row_order: Order | None,
    grid: Grid,
) -> Int16[Tensor, "rows columns"]:
    """Round these rows to a grid, all in the order given; a few at a time where that is allowed."""
    if row_order is not None:
        chosen = weight[rows][:, columns].float()
        return round_both(chosen, row_order.feedback[0], feedback, grid)
    codes = torch.empty(len(rows), len(columns), dtype=torch.int16)
    for part in groups.row_chunks(len(rows), len(columns), CHUNK_WEIGHTS):
        chosen = weight[rows[part]][:, columns].float()
        codes[part] = round_both(chosen, None, feedback, grid.of_rows(part))
    return codes


def feedback_factor(
    moment: Float[Tensor, "groups columns columns"],
    damping_fraction: float = DAMPING_FRACTION,
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
    ridge = torch.where(mean > 0, damping_fraction * mean, torch.ones_like(mean))
    root, ridge = _root(exact, ridge)
    one = torch.eye(exact.shape[1], dtype=torch.float64)
    upper: Tensor = torch.linalg.solve_triangular(root, one, upper=True)
    factor: Tensor = upper / upper.diagonal(dim1=1, dim2=2)[..., None]
    left = root.diagonal(dim1=1, dim2=2).square() - ridge
    lasting = torch.maximum(left, SMALLEST_LASTING * power.clamp(min=1e-9 * ridge))
    return factor.float(), lasting.sqrt().float()


def _root(exact: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """U where U Uᵀ is the moment with a ridge, and the ridge of each group.

    A moment of a few samples, kept in 16 bits, may by its rounding lack what makes it positive:
    then its ridge grows.
    """
    if not exact.isfinite().all():  # no ridge would help
        raise ValueError("a moment has numbers that are not finite")
    while True:
        damped = exact + torch.diag_embed(ridge.expand(exact.shape[:2]))
        root, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))
        if not failed.any():
            return root.flip(1, 2), ridge
        ridge = torch.where(failed[:, None] > 0, 10 * ridge, ridge)
