"""How far two explanations of the same prediction lie apart.

An explanation is an array of signed numbers, one a feature: a pixel, a token, a column. Functions
take two of them in the same order, the original's first. Where a measure has no value because an
explanation is the same number everywhere, it is that of no agreement, unless both are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy.ndimage import correlate1d
from scipy.stats import rankdata

from attar.audit.fidelity import N_RESAMPLES, bootstrap
from attar.records import Estimate

TOP_SHARE = 0.1
# Wang et al.'s constants: side of the window and its spread in pixels, and K1 and K2.
WINDOW, SPREAD, K1, K2 = 11, 1.5, 0.01, 0.03

Features = Float[np.ndarray, "..."]


def rank_correlation(one: Features, other: Features) -> float:
    """Spearman's: 1 the same order, 0 no relation, -1 reversed; equal numbers share a rank.

    Source: Spearman 1904, https://www.jstor.org/stable/1412159; ties as in scipy's spearmanr.
    """
    if np.array_equal(one, other):
        return 1.0
    ranks = [rankdata(e.ravel()) for e in (one, other)]
    return _cosine(*(r - r.mean() for r in ranks))


def top(values: Features) -> Bool[np.ndarray, " features"]:
    """A tenth of the features, at least one: the largest by size, the earlier where equal."""
    flat = np.abs(values.ravel())
    n = max(1, int(TOP_SHARE * len(flat)))
    chosen = np.zeros(len(flat), bool)
    chosen[np.argsort(-flat, kind="stable")[:n]] = True
    return chosen


def top_agreement(one: Features, other: Features) -> float:
    """Share of the original's top features that are the other's too, 0 to 1."""
    first, second = top(one), top(other)
    return float((first & second).sum() / first.sum())


def sign_agreement(one: Features, other: Features) -> float:
    """Share of the features at the top of either that have the same sign in both, 0 to 1."""
    either = top(one) | top(other)
    return float((np.sign(one.ravel()) == np.sign(other.ravel()))[either].mean())


def cosine(one: Features, other: Features) -> float:
    """Cosine of the angle between the two, -1 to 1."""
    return 1.0 if np.array_equal(one, other) else _cosine(one.ravel(), other.ravel())


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    # Each by its largest first: squares of very small numbers are 0.
    sizes = [float(np.abs(e).max()) for e in (one, other)]
    if not all(sizes):
        return 0.0
    first, second = one / sizes[0], other / sizes[1]
    lengths = np.linalg.norm(first) * np.linalg.norm(second)
    return float(np.clip(first @ second / lengths, -1.0, 1.0))


def mass_moved(one: Features, other: Features) -> float:
    """Share of the relevance, by size alone, that lies on other features, 0 to 1."""
    if np.array_equal(one, other):
        return 0.0
    sizes = [np.abs(e.ravel()) for e in (one, other)]
    if not all(size.any() for size in sizes):
        return 1.0
    first, second = (size / size.max() / (size / size.max()).sum() for size in sizes)
    return float(min(1.0, 0.5 * np.abs(first - second).sum()))


def structural_similarity(
    one: Float[np.ndarray, "height width"], other: Float[np.ndarray, "height width"]
) -> float:
    """SSIM of two maps, 1 for the same, averaged over every place where the window fits.

    Source: Wang, Bovik, Sheikh and Simoncelli 2004, Image quality assessment: from error visibility
    to structural similarity, https://doi.org/10.1109/TIP.2003.819861, eq. 13, with the Gaussian
    window of section III.C. The range L of the pixels is that of the original's map. In a map
    that is smaller than the window, the window has the largest odd side that fits.
    """
    if np.array_equal(one, other):
        return 1.0
    span = float(one.max() - one.min())
    if span == 0:
        return 0.0
    side = min(WINDOW, *(n - 1 + n % 2 for n in one.shape))
    place = np.arange(side) - side // 2
    window = np.exp(-0.5 * (place / SPREAD) ** 2)
    window /= window.sum()

    def local(values: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            values = correlate1d(values, window, axis)
        cut = slice(side // 2, None if side == 1 else -(side // 2))
        return values[cut, cut]

    x, y = ((e / span).astype(np.float64) for e in (one, other))  # so that L is 1
    mean_x, mean_y = local(x), local(y)
    var_x, var_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    both = local(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    top_part = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    return float((top_part / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


MEASURES: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "rank_correlation": rank_correlation,
    "top_agreement": top_agreement,
    "sign_agreement": sign_agreement,
    "cosine": cosine,
    "structural_similarity": structural_similarity,
    "mass_moved": mass_moved,
}


def compare(one: Features, other: Features) -> dict[str, float]:
    """Every measure of one pair; structural similarity for maps only."""
    return {
        name: measure(one, other)
        for name, measure in MEASURES.items()
        if one.ndim == 2 or name != "structural_similarity"
    }


def means(found: Sequence[Mapping[str, float]], seed: int) -> dict[str, Estimate] | None:
    """Mean of each measure over samples, by resampling them; None where there is none.

    The same samples are drawn for each measure and each model, so that intervals are paired.
    """
    if not found:
        return None
    sample = np.arange(len(found))
    return {
        name: bootstrap(np.array([one[name] for one in found]), sample, seed=seed)
        for name in found[0]
    }


def stratified(
    found: Sequence[Mapping[str, float]],
    changed: Bool[np.ndarray, " samples"],
    share_changed: float,
    seed: int,
) -> dict[str, Estimate]:
    """Mean over all predictions, from samples of which too many may have a changed prediction.

    Each of the two groups is resampled for itself and counts by its share.

    Args:
        share_changed: Of all predictions.

    Source: Cochran 1977, Sampling techniques, 3rd edition, eq. 5.1 (stratified mean).
    """
    groups = [(~changed, 1 - share_changed), (changed, share_changed)]
    kept = [(np.flatnonzero(chosen), share) for chosen, share in groups if chosen.any()]
    whole = sum(share for _, share in kept)
    estimates = {}
    for name in found[0]:
        values = np.array([one[name] for one in found])
        draws, mean = np.random.default_rng(seed), 0.0
        resampled = np.zeros(N_RESAMPLES)
        for places, share in kept:
            weight = share / whole if whole > 0 else 1 / len(kept)
            drawn = draws.integers(0, len(places), (N_RESAMPLES, len(places)))
            resampled += weight * values[places][drawn].mean(1)
            mean += weight * float(values[places].mean())
        low, high = np.quantile(resampled, [0.025, 0.975])
        estimates[name] = Estimate(mean, float(low), float(high))
    return estimates
