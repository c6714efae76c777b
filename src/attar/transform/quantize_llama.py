"""The number formats of llama.cpp, rounded with error feedback: a GGUF file holds what was priced.

First the scales and minima of every block are chosen for the least weighted squared error and put
into the few bits the type has for them; then each weight is rounded to the grid that they leave,
with feedback between columns and rows (`kernels/feedback.py`).

Source: the formats are those of llama.cpp (`llama_blocks.py`); its own quantizer rounds each weight
by itself, with scales fitted by weighted least squares. We search among ranges, move each
scale by one step up and down, and let feedback do the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int16
from torch import Tensor

from attar.errors import SettingError
from attar.kernels import feedback
from attar.kernels.feedback import Grid
from attar.records import Cost, Replacement, RowWeights, Unit
from attar.transform import groups
from attar.transform.llama_blocks import TYPES, Blocks, BlockType
from attar.transform.quantize_feedback import round_turns, turns

# Shares of the full range that are tried as the range of a part of a block, and steps tried around
# the best; where steps are small, cutting off much of a range never pays.
RANGE_FACTORS = tuple(round(1.05 - 0.06 * k, 2) for k in range(8))
FINE_STEPS = (-0.03, 0.03)
FEW_FACTORS, FEW_FROM_BITS = 3, 6
# Shares of the scale with which sizes are on average those of the list; then that many steps more,
# up to the scale with which the largest weight has the largest size: one weight far from the others
# may be worth all of them.
VECTOR_FACTORS = (0.9, 1.1)
WIDER_STEPS = 3
# In place of a step of 0, by which nothing can be divided.
TINY = 1e-30


@dataclass(frozen=True)
class QuantizeLlama:
    """Store each weight as llama.cpp does.

    Attributes:
        type: llama.cpp's name of the type, such as Q4_K.
    """

    type: str = "Q4_K"

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise SettingError(
                f"type is {self.type!r}, but quantize_llama takes one of {', '.join(TYPES)}.",
                hint="set type to Q4_K.",
            )

    def label(self) -> str:
        """Say the setting in words for a report."""
        return f"llama.cpp {self.type}"

    @property
    def _format(self) -> BlockType:
        return TYPES[self.type]

    def rejects(self, unit: Unit) -> str | None:
        if unit.kind == "convolution":
            return "is a convolution, which llama.cpp keeps in 16 bits"
        if unit.columns % self._format.columns:
            return f"has {unit.columns} columns, not a multiple of {self._format.columns}"
        return None

    def cost(self, unit: Unit) -> Cost:
        n_blocks = unit.n_weights // self._format.columns
        return Cost(weight_bytes=n_blocks * self._format.block_bytes, macs=unit.macs)

    def apply(
        self, weight: Tensor, moment: Tensor | None, rows: RowWeights | None = None
    ) -> Replacement:
        form, importance = self._format, groups.column_weights(moment)
        fitted = [
            fit(weight[chunk], groups.spread_rows(importance, len(weight), chunk), form)
            for chunk in groups.row_chunks(*weight.shape)
        ]
        fields = zip(*(tuple(vars(one).values()) for one in fitted), strict=True)
        blocks = Blocks(*(np.concatenate(field) for field in fields))
        codes = _rounded(weight, moment, rows, blocks, form)
        made = replace(blocks, codes=codes.numpy().astype(np.int64).reshape(-1, form.columns))
        stored = torch.from_numpy(form.pack(made)).view(len(weight), -1)
        return Replacement({"blocks": stored}, self.decode({"blocks": stored}, *weight.shape))

    def decode(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        form = self._format
        shape = (rows, columns // form.columns * form.block_bytes)
        stored = groups.take_stored(tensors, "blocks", torch.uint8, shape)
        dense = torch.empty(rows, columns)
        for chunk in groups.row_chunks(rows, columns):
            part = stored[chunk].contiguous()
            blocks = form.unpack(part.view(-1, form.block_bytes).numpy())
            if not (np.isfinite(blocks.d).all() and np.isfinite(blocks.dmin).all()):
                raise groups.damaged("a stored scale is not a number.")
            codes = torch.from_numpy(blocks.codes.astype(np.int16)).view(len(part), -1)
            grid = grid_of(blocks, form, len(part))
            dense[chunk] = grid.values(codes if form.levels else codes - form.zero)
        return dense


def grid_of(blocks: Blocks, form: BlockType, rows: int) -> Grid:
    """Values that the weights of these blocks can have, blocks row after row, columns in order."""

    def product(halves: np.ndarray, whole: np.ndarray) -> Float32[Tensor, "rows parts"]:
        # One rounding to float32, as in llama.cpp.
        exact = halves.astype(np.float32)[:, None] * whole.astype(np.float32)
        return torch.from_numpy(exact).view(rows, -1)

    scale = product(blocks.d, blocks.scales) * form.unit
    parts, width = scale.shape[1], form.columns // form.parts
    lowest = torch.full_like(scale, 0.0 if form.levels else -form.zero)
    return Grid(
        scale=scale,
        column_scale=torch.ones(parts * width),
        group_of=torch.arange(parts * width) // width,
        lowest=lowest,
        highest=lowest + (2**form.bits - 1),
        offset=-product(blocks.dmin, blocks.mins) if form.has_minimum else None,
        levels=torch.tensor(form.levels, dtype=torch.float32) if form.levels else None,
        vectors=torch.from_numpy(form.vectors()) if form.vectors else None,
    )


def _rounded(
    weight: Tensor, moment: Tensor | None, rows: RowWeights | None, blocks: Blocks, form: BlockType
) -> Int16[Tensor, "rows columns"]:
    """Codes of every weight, from 0."""
    grid = grid_of(blocks, form, len(weight))
    # Where a part is all zeros, any code is right, but its step must be a number.
    grid = replace(grid, scale=torch.where(grid.scale == 0, TINY, grid.scale))
    together = 1 if grid.vectors is None else grid.vectors.shape[1]
    some = turns(moment, rows, len(weight), weight.shape[1], together)
    codes = round_turns(weight, some, grid)
    return codes if form.levels else codes + form.zero


def fit(
    weight: Float[Tensor, "rows columns"],
    importance: Float[Tensor, "rows columns"] | None,
    form: BlockType,
) -> Blocks:
    """Choose scales and minima of every block; codes are still 0.

    Raises:
        SettingError: The weights are too large for float16 scales.
    """
    width = form.columns // form.parts
    x = weight.float().reshape(-1, form.parts, width)
    share = torch.ones_like(x) if importance is None else importance.float().reshape(x.shape)
    if form.vectors:
        return _fit_vectors(x, share, form, torch.from_numpy(form.vectors()))
    scale, minimum = _best_range(x, share, form)
    d, scales = _shared(scale, form.scale_limits)
    dmin, mins = _shared(minimum, (0, form.largest_min))
    if form.parts > 1:
        scales, mins = _stepped(x, share, form, (d, scales), (dmin, mins))
    return Blocks(
        d.numpy(), dmin.numpy(), scales.long().numpy(), mins.long().numpy(),
        np.zeros((len(x), form.columns), np.int64),
    )  # fmt: skip


def _fit_vectors(x: Parts, share: Parts, form: BlockType, sizes: Tensor) -> Blocks:
    """Choose scales of a type whose neighbours have sizes of a list together; all are odd."""
    best = _best_vector_scale(x, share, sizes)
    d, _ = _shared(best / form.unit, form.scale_limits)
    unit = (d.float() * form.unit)[:, None]
    divisor = torch.where(unit == 0, torch.inf, unit)
    highest = form.scale_limits[1] // 2
    half = ((best / divisor - 1) / 2).round().clamp(0, highest)
    least = _vector_error(x, share, unit * (2 * half + 1), sizes)
    nearest = half
    for step in (-1, 1):  # the nearest of few scales is not always the best
        moved = (nearest + step).clamp(0, highest)
        error = _vector_error(x, share, unit * (2 * moved + 1), sizes)
        half, least = torch.where(error < least, moved, half), torch.minimum(error, least)
    odd = (2 * half + 1).long().numpy()
    return Blocks(
        d.numpy(), torch.zeros_like(d).numpy(), odd, np.zeros_like(odd),
        np.zeros((len(x), form.columns), np.int64),
    )  # fmt: skip


def _best_vector_scale(x: Parts, share: Parts, sizes: Tensor) -> OfParts:
    """Scale of each part of the least weighted squared error, as a real number."""
    even = x.square().mean(-1).sqrt() / float(sizes.square().mean().sqrt())
    tried = torch.stack([even * factor for factor in VECTOR_FACTORS])
    error = torch.stack([_vector_error(x, share, scale, sizes) for scale in tried])
    least, place = error.min(0)
    best = tried.gather(0, place[None])[0]
    # Where that does not reach the largest weight, up to a scale that does.
    reach = x.abs().amax(-1) / float(sizes.max())
    far = reach > tried[-1]
    low, high, x, share = tried[-1][far], reach[far], x[far], share[far]
    for step in range(1, WIDER_STEPS + 1):
        scale = low * (high / low) ** (step / WIDER_STEPS)
        found = _vector_error(x, share, scale, sizes)
        best[far] = torch.where(found < least[far], scale, best[far])
        least[far] = torch.minimum(found, least[far])
    return best


def _vector_error(
    x: Float32[Tensor, "*parts width"],
    share: Float32[Tensor, "*parts width"],
    scale: Float32[Tensor, "*parts"],
    sizes: Tensor,
) -> Float32[Tensor, "*parts"]:
    error = torch.empty(scale.numel())
    flat = (t.reshape(-1, x.shape[-1]).numpy() for t in (x, share))
    feedback.vector_error(*flat, scale.flatten().numpy(), sizes.numpy(), error.numpy())
    return error.view_as(scale)


Parts = Float32[Tensor, "blocks parts width"]
OfParts = Float32[Tensor, "blocks parts"]


def _best_range(x: Parts, share: Parts, form: BlockType) -> tuple[OfParts, OfParts]:
    """Scale and minimum of each part, as real numbers, of the least weighted squared error."""
    top = 2**form.bits - 1
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    if form.has_minimum:
        ends = [((high - low) / top, -low)]
    else:
        extreme, zero = torch.where(high > -low, high, low), torch.zeros_like(low)
        levels = (form.levels[0], form.levels[-1]) if form.levels else (-form.zero, top - form.zero)
        ends = [(extreme / end, zero) for end in levels]
    factor, best, least = torch.ones_like(low), ends[0], torch.full_like(low, torch.inf)
    coarse = RANGE_FACTORS[: FEW_FACTORS if form.bits >= FEW_FROM_BITS else None]
    for tried in (*coarse, *FINE_STEPS):
        shares = torch.full_like(low, tried) if tried in coarse else factor + tried
        for scale, minimum in ends:
            found = scale * shares, minimum * shares
            error = _error(x, share, *found, form)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, found[0], best[0]), torch.where(better, found[1], best[1])
            if tried in coarse:
                factor = torch.where(better, shares, factor)
    return best


def _error(x: Parts, share: Parts, scale: OfParts, minimum: OfParts, form: BlockType) -> OfParts:
    step = torch.where(scale == 0, TINY, scale)[..., None]
    exact = (x + minimum[..., None]) / step
    if form.levels:
        levels = torch.tensor(form.levels, dtype=torch.float32)
        level = levels[torch.bucketize(exact, 0.5 * (levels[1:] + levels[:-1]))]
    else:
        level = exact.round().clamp_(-form.zero, 2**form.bits - 1 - form.zero)
    return (level.sub_(exact).mul_(step).square_().mul_(share)).sum(-1)


def _shared(values: OfParts, limits: tuple[int, int]) -> tuple[Float16[Tensor, " blocks"], OfParts]:
    """Write values as a float16 of the block times a whole number of each part."""
    low, high = limits
    largest = values.gather(1, values.abs().argmax(1, keepdim=True))[:, 0]
    end = low if low < 0 else high
    exact = largest / end if end else torch.zeros_like(largest)
    if not bool(exact.abs().max() <= groups.LARGEST_SCALE):
        raise SettingError(
            f"a block of weights needs a scale of {float(exact.abs().max()):.3g}; float16 ends at "
            "65504.",
            hint="keep this unit in 16 bits.",
        )
    if 0 < float(exact.abs().max()) < groups.SMALLEST_SCALE:
        raise SettingError(
            f"the weights are so small that their largest scale is {float(exact.abs().max()):.3g}; "
            f"float16 begins at {groups.SMALLEST_SCALE:.3g}.",
            hint="keep this unit in 32 bits.",
        )
    shared = exact.half()
    divisor = torch.where(shared == 0, torch.inf, shared.float())
    whole = (values / divisor[:, None]).round().clamp(low, high)
    return shared, torch.ones_like(whole) if low == high else whole


def _stepped(
    x: Parts,
    share: Parts,
    form: BlockType,
    scale: tuple[Tensor, OfParts],
    minimum: tuple[Tensor, OfParts],
) -> tuple[OfParts, OfParts]:
    """Move each sub-scale and sub-minimum by one step where that lowers the error."""
    (d, scales), (dmin, mins) = scale, minimum
    best, least = (scales, mins), torch.full_like(scales, torch.inf)
    steps = ((0, 0), *((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b))
    for more, higher in steps:
        if higher and not form.has_minimum:
            continue
        one = (scales + more).clamp(*form.scale_limits)
        two = (mins + higher).clamp(0, form.largest_min)
        error = _error(x, share, d.float()[:, None] * one, dmin.float()[:, None] * two, form)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, one, best[0]), torch.where(better, two, best[1])
    return best
