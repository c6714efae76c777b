"""Choose how many units of each group go: those whose bytes are worth more elsewhere.

A unit goes where cutting it costs less than its bytes return when they are spent on the weights
that stay. All groups are compared by that ratio, cost over worth; none has a share of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Offer:
    """Units of one group in the order in which they would go.

    Attributes:
        group: Its name.
        units: Their numbers.
        added: What each adds when it goes after those before it, nats per prediction.
        worth: What each returns, in nats or in bytes; above zero.
    """

    group: str
    units: tuple[int, ...]
    added: tuple[float, ...]
    worth: float

    def ratios(self) -> list[float]:
        """Cost over worth of each; one after a dearer one is as dear, because it waits for it."""
        found: list[float] = []
        for nats in self.added:
            found.append(max(nats / self.worth, found[-1] if found else 0.0))
        return found


def choose(
    offers: Sequence[Offer], *, at_most: float, enough: float = float("inf")
) -> dict[str, tuple[int, ...]]:
    """Take the units of the lowest cost over worth.

    Args:
        at_most: Highest cost over worth that is taken.
        enough: Worth of all that goes from which on no more is taken.

    Returns:
        Group to the numbers of its units, ascending; without groups of which none goes.
    """
    ranked = sorted(
        (ratio, place, number)
        for place, offer in enumerate(offers)
        for number, ratio in enumerate(offer.ratios())
        if ratio <= at_most
    )
    counts, total = [0] * len(offers), 0.0
    for _, place, _ in ranked:
        if total >= enough:
            break
        counts[place] += 1
        total += offers[place].worth
    return {
        offer.group: tuple(sorted(offer.units[:count]))
        for offer, count in zip(offers, counts, strict=True)
        if count
    }
