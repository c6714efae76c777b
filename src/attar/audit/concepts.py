"""Which concepts a compressed model lost or merged, by how strongly each is met in both models."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

# A concept is lost where less than this share of how its strength varies is left, ...
KEPT = 0.5
# ... and two are merged where they rise and fall together now and did not before: correlations.
TOGETHER, APART = 0.8, 0.5

Strengths = Float[np.ndarray, "vectors concepts"]
ByConcept = Float[np.ndarray, " concepts"]


def kept(before: Strengths, after: Strengths) -> ByConcept:
    """Share of each strength's variance that is left: 1 nothing changed, 0 and less all is gone.

    1 − Σ(after − before)² / Σ(before − mean)²; a concept that never varied is kept as long as
    nothing changed.
    """
    off = ((after - before) ** 2).sum(0)
    whole = ((before - before.mean(0)) ** 2).sum(0)
    safe = np.where(whole > 0, whole, 1.0)
    return np.where(whole > 0, 1.0 - off / safe, np.where(off > 0, 0.0, 1.0))


def strength_ratio(before: Strengths, after: Strengths) -> ByConcept:
    """Mean strength after over that before; 1 where it was 0 and is."""
    first, second = before.mean(0), after.mean(0)
    safe = np.where(first > 0, first, 1.0)
    return np.where(first > 0, second / safe, np.where(second > 0, np.inf, 1.0))


def lost(before: Strengths, after: Strengths) -> Bool[np.ndarray, " concepts"]:
    """Which concepts are no longer met where they were."""
    return kept(before, after) < KEPT


def merged(before: Strengths, after: Strengths) -> list[tuple[int, int]]:
    """Pairs that the model no longer tells apart, the most alike first; lost ones are not told."""
    first, second = _correlations(before), _correlations(after)
    gone = after.std(0) == 0
    pairs = [
        (i, j)
        for i in range(len(first))
        for j in range(i + 1, len(first))
        if second[i, j] >= TOGETHER and first[i, j] <= APART and not (gone[i] or gone[j])
    ]
    return sorted(pairs, key=lambda pair: (-second[pair], pair))


def _correlations(strengths: Strengths) -> np.ndarray:
    """Pearson's, of every two concepts; 0 where one never varies."""
    centred = strengths - strengths.mean(0)
    lengths = np.linalg.norm(centred, axis=0)
    scaled = centred / np.where(lengths > 0, lengths, 1.0)
    found: np.ndarray = scaled.T @ scaled
    return found
