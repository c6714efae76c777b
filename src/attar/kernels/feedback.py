"""Rounding with error feedback in both directions: later columns and later rows make errors good.

Minimises trace(R E C Eᵀ) over the error E = weight − grid value, one weight after the other. With
R = Uᵣ Uᵣᵀ and C = U꜀ U꜀ᵀ (U upper triangular), and F the inverse of U, each row over its diagonal,

    E = Fᵣᵀ e F꜀        trace(R E C Eᵀ) = Σ Uᵣ[i, i]² e[i, j]² U꜀[j, j]²

where e[i, j] is what rounding loses of the weight less the shares it takes of all errors above and
to the left of it. `reference_round` is that, read off the formula; `round_both` agrees with it to
float32 rounding. It does one tile after the other, whose far effects are matrix products.

Source: Babai 1986, On Lovász' lattice reduction and the nearest lattice point problem,
https://doi.org/10.1007/BF02579403, whose nearest plane this is for the lattice of R ⊗ C; with C
alone it is GPTQ (Frantar et al. 2023, https://arxiv.org/abs/2210.17323, algorithm 1). Both sides at
once as in Tseng et al. 2025, Model-preserving adaptive rounding, https://arxiv.org/abs/2505.22988.
They round blocks, by a trellis; we round single weights, to any grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int, Int16
from torch import Tensor

from attar.kernels.compiled import compiled

# Side of a tile: 32 rows of 32 weights stay in the first cache with what they are multiplied by.
TILE = 32
# Rows of a tile where rows do not depend on each other: few and large matrix products.
ROWS_APART = 256


@dataclass(frozen=True)
class Grid:
    """Values that weights may take: step · level + offset, a level being a whole number or listed.

    Attributes:
        scale: Step of each row in each group of columns, not 0.
        column_scale: Factor of each column's step, > 0.
        group_of: Group of each column.
        lowest: Smallest code of each row and group.
        highest: Largest.
        offset: Of each row and group; None: 0.
        levels: Level of each code from 0 on, rising, for all, or for each row and group; None: a
            code is its own level.
        vectors: Where several columns are rounded together: the sizes that their levels may have,
            above 0, signs being free; a code is its own level. None: every column by itself.
        worth: With vectors: how much a squared error in each column counts that nothing later
            makes good.
        kept: Weights that are not rounded: each takes up what is fed to it, and has no error.
        free: What kept weights become; written.
    """

    scale: Float32[Tensor, "rows groups"]
    column_scale: Float32[Tensor, " columns"]
    group_of: Int[Tensor, " columns"]
    lowest: Float32[Tensor, "rows groups"]
    highest: Float32[Tensor, "rows groups"]
    offset: Float32[Tensor, "rows groups"] | None = None
    levels: Float32[Tensor, " codes"] | Float32[Tensor, "rows groups codes"] | None = None
    vectors: Float32[Tensor, "vectors width"] | None = None
    worth: Float32[Tensor, " columns"] | None = None
    kept: Bool[Tensor, "rows columns"] | None = None
    free: Float32[Tensor, "rows columns"] | None = None

    def values(self, codes: Int16[Tensor, "rows columns"]) -> Float32[Tensor, "rows columns"]:
        """Turn codes into weights."""
        level = self._levels_of(codes)
        value = level * (self.scale[:, self.group_of] * self.column_scale)
        return value if self.offset is None else value + self.offset[:, self.group_of]

    def _levels_of(self, codes: Int16[Tensor, "rows columns"]) -> Float32[Tensor, "rows columns"]:
        if self.levels is None:
            return codes.float()
        if self.levels.dim() == 1:
            return self.levels[codes.long()]
        return self.levels[torch.arange(len(codes))[:, None], self.group_of, codes.long()]

    def of_rows(self, rows: slice | Int[Tensor, " some"]) -> Grid:
        """The grid of some rows."""
        offset = None if self.offset is None else self.offset[rows].contiguous()
        parts = (t[rows].contiguous() for t in (self.scale, self.lowest, self.highest))
        scale, lowest, highest = parts
        kept = None if self.kept is None else self.kept[rows]
        free = None if self.free is None else self.free[rows]
        levels = self.levels
        if levels is not None and levels.dim() > 1:
            levels = levels[rows].contiguous()
        return replace(
            self,
            scale=scale,
            lowest=lowest,
            highest=highest,
            offset=offset,
            levels=levels,
            kept=kept,
            free=free,
        )

    def of_columns(self, columns: Int[Tensor, " columns"], worth: Tensor) -> Grid:
        """The same with columns in another order, in which `worth` is already."""
        return replace(
            self,
            group_of=self.group_of[columns],
            column_scale=self.column_scale[columns],
            worth=worth,
            kept=None if self.kept is None else self.kept[:, columns],
            free=None if self.free is None else self.free[:, columns],
        )


def reference_round(
    weight: Float32[Tensor, "rows columns"],
    rows: Float32[Tensor, "rows rows"],
    columns: Float32[Tensor, "columns columns"],
    grid: Grid,
) -> Int16[Tensor, "rows columns"]:
    """Round one weight after the other, straight from the formula. Slow and obvious."""
    exact, left, above = weight.double(), columns.double(), rows.double()
    errors, codes = torch.zeros_like(exact), torch.zeros(weight.shape, dtype=torch.int16)
    for i, j in np.ndindex(*weight.shape):
        target = exact[i, j] - above[:, i] @ errors @ left[:, j]
        if grid.kept is not None and grid.kept[i, j]:
            assert grid.free is not None
            grid.free[i, j], codes[i, j] = target, 0
            continue
        group = grid.group_of[j]
        choices = torch.arange(int(grid.lowest[i, group]), int(grid.highest[i, group]) + 1)
        levels = grid.levels
        if levels is not None and levels.dim() == 3:
            levels = levels[i, group]
        level = choices if levels is None else levels[choices]
        values = level * (grid.scale[i, group] * grid.column_scale[j]).double()
        if grid.offset is not None:
            values = values + grid.offset[i, group]
        best = int((values - target).abs().argmin())
        errors[i, j] = target - values[best]
        codes[i, j] = choices[best]
    return codes


def reference_vectors(
    weight: Float32[Tensor, "rows columns"],
    rows: Float32[Tensor, "rows rows"],
    columns: Float32[Tensor, "columns columns"],
    grid: Grid,
) -> Int16[Tensor, "rows columns"]:
    """Round one vector after the other, straight from the formula. Slow and obvious."""
    assert grid.vectors is not None and grid.worth is not None
    exact, left, above = weight.double(), columns.double(), rows.double()
    errors, codes = torch.zeros_like(exact), torch.zeros(weight.shape, dtype=torch.int16)
    width = grid.vectors.shape[1]
    for i in range(len(weight)):
        for j in range(0, weight.shape[1], width):
            least = np.inf
            for vector in grid.vectors:
                tried, lost, total = errors.clone(), torch.zeros(width), 0.0
                levels = torch.zeros(width, dtype=torch.int16)
                for k, size in enumerate(vector.tolist()):
                    target = float(exact[i, j + k] - above[:, i] @ tried @ left[:, j + k])
                    step = float(grid.scale[i, grid.group_of[j + k]] * grid.column_scale[j + k])
                    levels[k] = int(size if target * step >= 0 else -size)
                    tried[i, j + k] = target - int(levels[k]) * step
                    total += float(tried[i, j + k]) ** 2 * float(grid.worth[j + k])
                if total < least:
                    least, lost = total, tried[i, j : j + width].clone()
                    codes[i, j : j + width], kept = levels, lost
            errors[i, j : j + width] = kept
    return codes


def round_both(
    weight: Float32[Tensor, "rows columns"],
    rows: Float32[Tensor, "rows rows"] | None,
    columns: Float32[Tensor, "columns columns"],
    grid: Grid,
) -> Int16[Tensor, "rows columns"]:
    """Round a weight whose rows and columns are in the order of rounding.

    Args:
        rows: F of the row side: row i, right of the diagonal, says how much of its error each later
            row takes; 1 on the diagonal, 0 to the left. None: rows do not depend on each other.
        columns: The same of the column side.
    """
    codes = torch.empty(weight.shape, dtype=torch.int16)
    step = ROWS_APART if rows is None else TILE
    errors = torch.empty(step if rows is None else len(weight), weight.shape[1])
    for start in range(0, len(weight), step):
        own = slice(start, start + step)
        target, among = weight[own].clone(), torch.empty(0, 0)
        lost = errors[: len(target)]
        if rows is not None:
            among, lost = rows[own, own].contiguous(), errors[own]
            target -= rows[:start, own].T @ errors[:start] @ columns
        _round_rows(target, among.numpy(), columns, grid.of_rows(own), codes[own], lost)
    return codes


def _round_rows(
    target: Tensor, among: np.ndarray, columns: Tensor, grid: Grid, codes: Tensor, errors: Tensor
) -> None:
    """Round a few rows, which know the shares of all rows above."""
    lines = _Lines(target.numpy(), torch.zeros_like(target).numpy(), errors.numpy(), codes.numpy())
    steps = _Steps(
        grid.scale.numpy(),
        grid.column_scale.numpy(),
        grid.lowest.numpy(),
        grid.highest.numpy(),
        (torch.zeros_like(grid.scale) if grid.offset is None else grid.offset).numpy(),
        _three_sides(grid.levels).numpy(),
        grid.group_of.to(torch.int64).numpy(),
        (torch.empty(0, 0, dtype=torch.bool) if grid.kept is None else grid.kept).numpy(),
        (torch.empty(0, 0) if grid.free is None else grid.free).numpy(),
    )
    moved = torch.from_numpy(lines.moved)
    for start in range(0, target.shape[1], TILE):
        end = min(target.shape[1], start + TILE)
        inside = columns[start:end, start:end].contiguous().numpy()
        if grid.vectors is None:
            _round_tile(lines, steps, among, inside, start, end)
        else:
            assert grid.worth is not None
            vectors = grid.vectors.numpy(), grid.worth.numpy()
            _round_vectors(lines, steps, vectors, among, inside, start, end)
        if end < target.shape[1]:
            far = errors[:, start:end] @ columns[start:end, end:]
            target[:, end:] -= far
            if len(among):
                moved[:, end:] += far


def _three_sides(levels: Tensor | None) -> Tensor:
    """Levels as `rows groups codes`; one row and one group where all share them."""
    if levels is None:
        return torch.empty(1, 1, 0)
    return levels[None, None] if levels.dim() == 1 else levels


class _Lines(NamedTuple):
    """A few rows; `moved` is what errors to the left in the same rows add up to."""

    target: np.ndarray
    moved: np.ndarray
    errors: np.ndarray
    codes: np.ndarray


class _Steps(NamedTuple):
    """The grid of these rows."""

    scale: np.ndarray
    column_scale: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    offset: np.ndarray
    levels: np.ndarray
    group_of: np.ndarray
    kept: np.ndarray
    free: np.ndarray


@compiled
def _round_tile(
    lines: _Lines, steps: _Steps, among: np.ndarray, inside: np.ndarray, start: int, end: int
) -> None:
    """Round the columns from `start` to `end`; what errors do inside the tile is done at once."""
    target, moved, errors, codes = lines
    scale, column_scale, lowest, highest, offset, levels, group_of, kept, free = steps
    both, some_kept = among.shape[0] > 0, kept.shape[0] > 0
    last_row, last_group, n_levels = levels.shape[0] - 1, levels.shape[1] - 1, levels.shape[2]
    for i in range(target.shape[0]):
        for j in range(start, end):
            if some_kept and kept[i, j]:
                free[i, j], codes[i, j], errors[i, j] = target[i, j], 0, 0
                continue
            group = group_of[j]
            step = scale[i, group] * column_scale[j]
            exact = (target[i, j] - offset[i, group]) / step
            if n_levels > 0:
                own, code = levels[min(i, last_row), min(group, last_group)], 0
                while code + 1 < n_levels and exact > 0.5 * (own[code] + own[code + 1]):
                    code += 1
                level = own[code]
                codes[i, j] = np.int16(code)
            else:
                level = min(max(np.rint(exact), lowest[i, group]), highest[i, group])
                codes[i, j] = np.int16(level)
            error = target[i, j] - (level * step + offset[i, group])
            errors[i, j] = error
            for k in range(j + 1, end):
                share = error * inside[j - start, k - start]
                target[i, k] -= share
                if both:
                    moved[i, k] += share
        if both:
            for other in range(i + 1, target.shape[0]):
                share = among[i, other]
                for k in range(start, end):
                    target[other, k] -= share * (errors[i, k] + moved[i, k])


@compiled
def _round_vectors(
    lines: _Lines,
    steps: _Steps,
    vectors: tuple[np.ndarray, np.ndarray],
    among: np.ndarray,
    inside: np.ndarray,
    start: int,
    end: int,
) -> None:
    """Round the columns from `start` to `end`, as many together as a vector has."""
    target, moved, errors, codes = lines
    scale, column_scale, group_of = steps.scale, steps.column_scale, steps.group_of
    sizes, worth = vectors
    both, width = among.shape[0] > 0, sizes.shape[1]
    tried, signs = np.empty(width, np.float32), np.empty(width, np.float32)
    for i in range(target.shape[0]):
        for j in range(start, end, width):
            least, best = np.float32(np.inf), 0
            for number in range(len(sizes) + 1):
                # Once more for the best, whose errors are then kept.
                vector = number if number < len(sizes) else best
                total = np.float32(0)
                for k in range(width):
                    exact = target[i, j + k]
                    for before in range(k):
                        exact -= tried[before] * inside[j + before - start, j + k - start]
                    step = scale[i, group_of[j + k]] * column_scale[j + k]
                    signs[k] = 1 if (exact >= 0) == (step >= 0) else -1
                    tried[k] = exact - signs[k] * sizes[vector, k] * step
                    total += tried[k] * tried[k] * worth[j + k]
                    if total >= least and number < len(sizes):
                        break
                if total < least:
                    least, best = total, vector
            for k in range(width):
                codes[i, j + k] = np.int16(signs[k] * sizes[best, k])
                errors[i, j + k] = tried[k]
                for later in range(j + width, end):
                    share = tried[k] * inside[j + k - start, later - start]
                    target[i, later] -= share
            if both:
                for later in range(j, end):
                    for k in range(min(width, later - j)):
                        moved[i, later] += tried[k] * inside[j + k - start, later - start]
        if both:
            for other in range(i + 1, target.shape[0]):
                share = among[i, other]
                for k in range(start, end):
                    target[other, k] -= share * (errors[i, k] + moved[i, k])


@compiled
def vector_error(
    x: np.ndarray, share: np.ndarray, scale: np.ndarray, sizes: np.ndarray, error: np.ndarray
) -> None:
    """Sum, in each part, the weighted squared error of the nearest vectors; signs are free.

    Args:
        x: `parts width`, of whole vectors.
        share: How much each squared error counts.
        scale: Of each part, above 0.
        error: Of each part; written.
    """
    width = sizes.shape[1]
    for part in range(len(x)):
        error[part] = 0
        for j in range(0, x.shape[1], width):
            least = np.float32(np.inf)
            for vector in range(len(sizes)):
                total = np.float32(0)
                for k in range(width):
                    apart = abs(x[part, j + k]) - scale[part] * sizes[vector, k]
                    total += apart * apart * share[part, j + k]
                    if total >= least:
                        break
                least = min(least, total)
            error[part] += least
