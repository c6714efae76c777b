"""Median and quartiles of what was measured, and what may be said of two of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attar.records import Spread

# Quartiles further apart than this share of the median say more of what else ran on the machine.
WIDEST = 0.25
# Rounds that must all agree: by chance alone, 4 do so in 1 of 8 cases and 5 in 1 of 16.
FEWEST_ROUNDS = 5


def spread(values: Sequence[int | float]) -> Spread:
    """Median and quartiles (linear between neighbours) of one value or more."""
    low, median, high = np.quantile(np.asarray(values, dtype=np.float64), (0.25, 0.5, 0.75))
    return Spread(float(median), float(low), float(high), tuple(float(x) for x in values))


def is_wide(found: Spread) -> bool:
    """Whether the quartiles lie so far apart that the median is no figure to go by."""
    return bool(found.high - found.low > WIDEST * abs(found.median))


def ratio(first: Spread, second: Spread) -> Spread:
    """`first` over `second`, round by round: what slowed both down in a round cancels."""
    return spread([a / b for a, b in zip(first.values, second.values, strict=True) if b > 0])


def is_settled(found: Spread) -> bool:
    """Whether a ratio may be called faster or slower: enough rounds, and all on one side of 1."""
    sides = {value < 1 for value in found.values if value != 1}
    return len(found.values) >= FEWEST_ROUNDS and len(sides) == 1 and not is_wide(found)
