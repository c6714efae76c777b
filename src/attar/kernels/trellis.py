"""Rounding along a trellis, with error feedback: two grids of even and odd steps take turns.

A code k stands for 2k steps in the even grid and for 2k − sign(k) in the odd one. Down every
column, starting in state 0, the state says which grid is next, and the code's parity which state
follows (NEXT, ODD). Each grid alone is as coarse as two steps, so codes are as few as if the step
were twice as large; the path through the states is chosen so that the error is not.

The path of least Σ (error / step)² + price of a bit · bits is found by the Viterbi algorithm, one
column after the other. Every path that survives carries the errors of its own rows, of which later
rows of the tile make good their share; columns and earlier tiles are fed back as in `feedback.py`.
A path is decided at the end of a tile. `reference_round` is that, read off; `round_along` agrees
with it to float32 rounding.

Source: Marcellin and Fischer 1990, Trellis coded quantization of memoryless and Gauss-Markov
sources, https://doi.org/10.1109/26.46532; with entropy coding, Fischer and Wang 1992,
https://doi.org/10.1109/18.119686; the two grids and the states are those of Versatile Video Coding
(Schwarz et al. 2021, Quantization and entropy coding in the versatile video coding standard,
https://doi.org/10.1109/TCSVT.2021.3072202, section III). QTIP (Tseng et al. 2024,
https://arxiv.org/abs/2406.11235) rounds blocks of weights along a trellis of fixed width, without
feedback inside a block; here rows may be of any number and nothing is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int16, Int64, UInt8
from torch import Tensor

from attar.kernels.compiled import compiled

# State and parity of the code to the next state; and which states use the odd grid.
NEXT = np.array([[0, 2], [5, 7], [1, 3], [6, 4], [2, 0], [4, 6], [3, 1], [7, 5]])
ODD = np.array([0, 1, 0, 1, 0, 1, 0, 1])
# The two ways into every state: twice the state before, and the parity of the code.
BEFORE = np.array([np.flatnonzero(NEXT.ravel() == state) for state in range(len(NEXT))])
# Rows of a tile: where rows depend on each other, survivors carry so many errors.
TILE, ROWS_APART, COLUMNS = 32, 256, 32
NEVER = np.float32(1e30)


@dataclass(frozen=True)
class Rates:
    """What codes cost.

    Attributes:
        bits: Of each code, from the lowest to the highest, in either grid and every context.
        row: Part of each row in the context of its codes.
        column: Part of each column. The context is the sum, cut off at the first and the last.
        per_bit: Squared steps that a bit is worth.
    """

    bits: Float32[np.ndarray, "two contexts symbols"]
    row: Int64[np.ndarray, " rows"]
    column: Int64[np.ndarray, " columns"]
    per_bit: float


class Steps(NamedTuple):
    """A weight's step is the product of its row's and its column's; a row of 0 is all zeros."""

    row: np.ndarray
    column: np.ndarray


def quantizers(codes: Int16[np.ndarray, "rows columns"]) -> UInt8[np.ndarray, "rows columns"]:
    """Say which grid each code belongs to: 1 is the odd one."""
    found = np.empty(codes.shape, np.uint8)
    _walk(codes, NEXT, ODD, found)
    return found


def levels(
    codes: Int16[np.ndarray, "rows columns"], odd: UInt8[np.ndarray, "rows columns"]
) -> Int16[np.ndarray, "rows columns"]:
    """Turn codes into steps."""
    found: Int16[np.ndarray, "rows columns"] = 2 * codes - np.sign(codes) * odd.astype(np.int16)
    return found


def reference_round(
    weight: Float32[Tensor, "rows columns"],
    rows: Float32[Tensor, "rows rows"] | None,
    columns: Float32[Tensor, "columns columns"],
    steps: Steps,
    rates: Rates,
) -> Int16[np.ndarray, "rows columns"]:
    """Round column after column, tile after tile, straight from the formulas. Slow and obvious."""
    n_rows, n_columns = weight.shape
    exact, left = weight.double().numpy(), columns.double().numpy()
    above = np.eye(n_rows) if rows is None else rows.double().numpy()
    errors, codes = np.zeros_like(exact), np.zeros(exact.shape, np.int16)
    state = [0] * n_columns
    height = ROWS_APART if rows is None else TILE
    for top in range(0, n_rows, height):
        bottom = min(n_rows, top + height)
        for j in range(n_columns):
            # State to cost, codes and errors of the best path.
            paths: dict[int, tuple[float, list[int], list[float]]] = {state[j]: (0.0, [], [])}
            for i in range(top, bottom):
                survivors: dict[int, tuple[float, list[int], list[float]]] = {}
                known = errors[:i].copy()
                for now, (cost, chosen, lost) in paths.items():
                    known[top:i, j] = lost
                    target = exact[i, j] - above[:i, i] @ known @ left[:, j]
                    target -= errors[i, :j] @ left[:j, j]
                    for code, level, more in _choices(target, i, j, steps, rates, int(ODD[now])):
                        follows, total = int(NEXT[now, code & 1]), cost + more
                        if follows not in survivors or total < survivors[follows][0]:
                            error = target - level * float(steps.row[i]) * float(steps.column[j])
                            survivors[follows] = (total, [*chosen, code], [*lost, error])
                paths = survivors
            state[j] = min(paths, key=lambda s: paths[s][0])
            _, codes[top:bottom, j], errors[top:bottom, j] = paths[state[j]]
    return codes


def _choices(
    target: float, i: int, j: int, steps: Steps, rates: Rates, odd: int
) -> list[tuple[int, int, float]]:
    """Code, level and cost of every code there is."""
    half = rates.bits.shape[2] // 2
    context = min(max(int(rates.row[i] + rates.column[j]), 0), rates.bits.shape[1] - 1)
    step = float(steps.row[i]) * float(steps.column[j])
    if step == 0:
        return [(0, 0, 0.0)]
    found = []
    for code in range(1 - half, half):
        level = 2 * code - odd * int(np.sign(code))
        bits = float(rates.bits[odd, context, code + half])
        found.append((code, level, (target / step - level) ** 2 + rates.per_bit * bits))
    return found


def round_along(
    weight: Float32[Tensor, "rows columns"],
    rows: Float32[Tensor, "rows rows"] | None,
    columns: Float32[Tensor, "columns columns"],
    steps: Steps,
    rates: Rates,
) -> Int16[np.ndarray, "rows columns"]:
    """Round a weight whose columns are in the order of rounding; rows stay as they are.

    Args:
        rows: F of the row side, as in `feedback.round_both`. None: rows do not depend on each
            other.
        columns: The same of the column side.
    """
    codes = np.empty(weight.shape, np.int16)
    height = ROWS_APART if rows is None else TILE
    errors = torch.empty(height if rows is None else len(weight), weight.shape[1])
    state = np.zeros(weight.shape[1], np.int64)
    for top in range(0, len(weight), height):
        own = slice(top, top + height)
        target, among = weight[own].clone(), torch.empty(0, 0)
        lost = errors[: len(target)]
        if rows is not None:
            among, lost = rows[own, own].contiguous(), errors[own]
            target -= rows[:top, own].T @ errors[:top] @ columns
        moved = torch.zeros_like(target)
        lines = _Lines(target.numpy(), moved.numpy(), lost.numpy(), codes[own], state)
        prices = _Prices(rates.bits * np.float32(rates.per_bit), rates.row[own], rates.column)
        part = Steps(steps.row[own], steps.column)
        for start in range(0, target.shape[1], COLUMNS):
            end = min(target.shape[1], start + COLUMNS)
            inside = columns[start:end, start:end].contiguous().numpy()
            _round_tile(lines, part, prices, among.numpy(), inside, start, end)
            if end < target.shape[1]:
                far = lost[:, start:end] @ columns[start:end, end:]
                target[:, end:] -= far
                if rows is not None:
                    moved[:, end:] += far
    return codes


class _Lines(NamedTuple):
    """A tile of rows; `moved` is what errors to the left in the same rows add up to."""

    target: np.ndarray
    moved: np.ndarray
    errors: np.ndarray
    codes: np.ndarray
    state: np.ndarray


class _Prices(NamedTuple):
    """Rates in squared steps."""

    of_code: np.ndarray
    row: np.ndarray
    column: np.ndarray


@compiled
def _walk(codes: np.ndarray, follows: np.ndarray, odd: np.ndarray, found: np.ndarray) -> None:
    state = np.zeros(codes.shape[1], np.int64)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            found[i, j] = odd[state[j]]
            state[j] = follows[state[j], codes[i, j] & 1]


@compiled
def _round_tile(
    lines: _Lines,
    steps: Steps,
    prices: _Prices,
    among: np.ndarray,
    inside: np.ndarray,
    start: int,
    end: int,
) -> None:
    """Round the columns from `start` to `end` of a tile; errors inside it are fed back at once.

    In either parity only the nearest code, the next smaller one and 0 can be best: codes of one
    parity lie four steps apart, and smaller ones are cheaper.
    """
    target, moved, errors, codes, state = lines
    of_code, row_context, column_context = prices
    n, both = target.shape[0], among.shape[0] > 0
    n_states, half, last = len(ODD), of_code.shape[2] // 2, of_code.shape[1] - 1
    cost, next_cost = np.empty(n_states, np.float32), np.empty(n_states, np.float32)
    # What the rows below owe for errors of a path, which is all that its past does to its future.
    owed = np.zeros((n_states, n), np.float32)
    next_owed = np.zeros((n_states, n), np.float32)
    # Paths with one past differ in their grid only; without shares among rows all have one past.
    sources = n_states if both else 2
    best = np.empty(2 * sources, np.float32)
    code = np.empty((n, 2 * sources), np.int16)
    lost = np.empty((n, 2 * sources), np.float32)
    way = np.empty((n, n_states), np.int64)
    base = np.empty(n, np.float32)
    for j in range(start, end):
        base[:] = target[:, j]
        if both:
            for i in range(n):
                for k in range(i + 1, n):
                    base[k] -= among[i, k] * moved[i, j]
            owed[:] = 0
        cost[:] = NEVER
        cost[state[j]] = 0
        for i in range(n):
            step = steps.row[i] * steps.column[j]
            context = min(max(row_context[i] + column_context[j], 0), last)
            for source in range(sources):
                grid = ODD[source] if both else source
                exact = base[i] - owed[source, i] if both else base[i]
                at = 2 * source
                if step == 0:
                    best[at], best[at + 1] = np.float32(0), NEVER
                    code[i, at], code[i, at + 1] = 0, 0
                    lost[i, at], lost[i, at + 1] = exact, exact
                    continue
                sign = 1 if exact >= 0 else -1
                size = abs(exact) / step
                k = min(int((size + np.float32(grid)) * np.float32(0.5)), half - 2)
                # The nearest of all.
                near = size - np.float32(2 * k - (grid if k > 0 else 0))
                total = near * near + of_code[grid, context, half + sign * k]
                # The nearest of the other parity, or a smaller one.
                other, far = k + 1, size - np.float32(2 * (k + 1) - grid)
                more = far * far + of_code[grid, context, half + sign * (k + 1)]
                if k > 0:
                    lower = size - np.float32(2 * (k - 1) - (grid if k > 1 else 0))
                    tried = lower * lower + of_code[grid, context, half + sign * (k - 1)]
                    if tried < more:
                        other, far, more = k - 1, lower, tried
                own = at + (k & 1)
                best[own], code[i, own], lost[i, own] = total, sign * k, sign * near * step
                own = at + (other & 1)
                best[own], code[i, own], lost[i, own] = more, sign * other, sign * far * step
                total = size * size + of_code[grid, context, half]
                if total < best[at]:
                    best[at], code[i, at], lost[i, at] = total, 0, exact
            for after in range(n_states):
                first, second = BEFORE[after, 0], BEFORE[after, 1]
                if both:
                    one, two = cost[first >> 1] + best[first], cost[second >> 1] + best[second]
                else:
                    one = cost[first >> 1] + best[2 * ODD[first >> 1] + (first & 1)]
                    two = cost[second >> 1] + best[2 * ODD[second >> 1] + (second & 1)]
                way[i, after] = first if one <= two else second
                next_cost[after] = min(one, two)
            if both:
                for after in range(n_states):
                    path, error = way[i, after] >> 1, lost[i, way[i, after]]
                    for k in range(i + 1, n):
                        next_owed[after, k] = owed[path, k] + among[i, k] * error
                owed, next_owed = next_owed, owed
            cost, next_cost = next_cost, cost
        now = np.argmin(cost)
        state[j] = now
        for i in range(n - 1, -1, -1):
            path = way[i, now]
            now = path >> 1
            place = path if both else 2 * ODD[now] + (path & 1)
            codes[i, j], errors[i, j] = code[i, place], lost[i, place]
        for i in range(n):
            error = errors[i, j]
            for k in range(j + 1, end):
                share = error * inside[j - start, k - start]
                target[i, k] -= share
                if both:
                    moved[i, k] += share
