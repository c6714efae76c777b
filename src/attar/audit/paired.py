"""Tests of paired results, corrections for many tests, and what so much data could have shown."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

# Of the sampled tests: the smallest p they can give is one over this and one more.
N_RESAMPLES = 4999
RESAMPLES_AT_ONCE = 500
DRAWN_AT_ONCE = 100_000  # slices of samples, one number each
# Standard errors from 0 to what a two-sided test at 5% finds four times in five.
ERRORS_TO_SHOW = float(stats.norm.ppf(0.975) + stats.norm.ppf(0.8))


def mcnemar_exact(worse: int, better: int) -> float:
    """P of pairs so unevenly discordant if neither direction were likelier, two-sided.

    Source: McNemar 1947, https://doi.org/10.1007/BF02295996, with the exact binomial in place of
    its approximation.
    """
    return 1.0 if worse + better == 0 else float(stats.binomtest(worse, worse + better).pvalue)


def sign_flip(differences: Float[np.ndarray, " samples"], seed: int) -> float:
    """P of a mean so far from 0 if each sample's difference were as likely with the other sign.

    For samples that hold many predictions, which hang together.

    Source: Fisher 1935, The design of experiments, section 21; signs sampled, and what was found
    counted among them (Phipson and Smyth 2010, https://doi.org/10.2202/1544-6115.1585).
    """
    found = abs(float(differences.sum()))
    if found == 0:
        return 1.0
    draws = np.random.default_rng(seed)
    as_far = 0
    for start in range(0, N_RESAMPLES, RESAMPLES_AT_ONCE):
        n = min(RESAMPLES_AT_ONCE, N_RESAMPLES - start)
        signs = 2.0 * draws.integers(0, 2, (n, len(differences))) - 1.0
        as_far += int((np.abs(signs @ differences) >= found * (1 - 1e-12)).sum())
    return (as_far + 1) / (N_RESAMPLES + 1)


def larger_than_the_rest(
    sums: Float[np.ndarray, " samples"],
    counts: Int[np.ndarray, " samples"],
    slices: Int[np.ndarray, " samples"],
    seed: int,
) -> Float[np.ndarray, " slices"]:
    """P of a slice's mean so far above the rest's if its samples were chosen at random, one-sided.

    The difference is divided by its standard error, without which one slice's rare large values
    hide what happened to all of another.

    Args:
        sums: Of the values of each sample's predictions.
        counts: Predictions of each sample.
        slices: Number of each sample's slice, from 0 on.

    Source: Pitman 1937, https://doi.org/10.2307/2984124 (permutation test), studentised as in
    Janssen 1997, https://doi.org/10.1016/S0167-7152(97)00043-6; sampled as above, one draw for all
    slices.
    """
    n_slices = int(slices.max()) + 1
    (found,) = _studentised(sums, counts, slices[None], n_slices)
    # What is equal but for the order of a sum counts as as far.
    least = found - 1e-12 * np.minimum(np.abs(found), 1.0e300)
    draws, as_far = np.random.default_rng(seed), np.zeros(n_slices)
    at_once = max(1, DRAWN_AT_ONCE // len(slices))
    for start in range(0, N_RESAMPLES, at_once):
        n = min(at_once, N_RESAMPLES - start)
        drawn = np.stack([draws.permutation(slices) for _ in range(n)])
        as_far += (_studentised(sums, counts, drawn, n_slices) >= least).sum(0)
    return (as_far + 1) / (N_RESAMPLES + 1)


def _studentised(
    sums: np.ndarray, counts: np.ndarray, slices: Int[np.ndarray, "draws samples"], n_slices: int
) -> Float[np.ndarray, "draws slices"]:
    """Mean of each slice less that of the rest, in standard errors; samples are what is drawn."""
    powers = (np.ones(len(sums)), sums, counts, sums * sums, sums * counts, counts * counts)
    places = (slices + n_slices * np.arange(len(slices))[:, None]).ravel()
    n_places = len(slices) * n_slices
    own = np.stack([np.bincount(places, np.tile(p, len(slices)), n_places) for p in powers])
    own = own.reshape(len(powers), len(slices), n_slices)
    rest = own.sum(2, keepdims=True) - own
    means, variances = [], 0.0
    for n, s, c, ss, sc, cc in (own, rest):
        inside = np.maximum(c, 1)
        mean = s / inside
        # A mean over predictions is a ratio of sums over samples; this is its linearised variance.
        squares = np.maximum(ss - 2 * mean * sc + mean * mean * cc, 0.0)
        variances = variances + squares / inside**2 * n / np.maximum(n - 1, 1)
        means.append(mean)
    apart = np.where((own[0] > 0) & (rest[0] > 0), means[0] - means[1], 0.0)
    # Without any spread a difference is beyond chance, and none is none.
    surely = np.where(apart == 0, 0.0, np.copysign(np.inf, apart))
    errors = np.sqrt(variances)
    return np.where(errors > 0, apart / np.where(errors > 0, errors, 1.0), surely)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values so that any of them below 5% by chance is itself a 5% chance.

    Source: Holm 1979, https://www.jstor.org/stable/4615733.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [1.0] * len(order), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[i]))
        adjusted[int(i)] = largest
    return adjusted


def smallest_shown(values: Float[np.ndarray, " samples"]) -> float:
    """Mean that a two-sided test at 5% would find four times in five, from so many such samples.

    Where all are 0, the share of samples of which one would have shown 19 times in 20.
    """
    n = len(values)
    if not values.any():
        return float(1 - 0.05 ** (1 / n))
    if n < 2:
        return math.inf
    return ERRORS_TO_SHOW * float(values.std(ddof=1)) / math.sqrt(n)


def expected_calibration_error(
    confidence: Float[np.ndarray, " predictions"],
    right: Bool[np.ndarray, " predictions"],
    bins: int = 15,
) -> float:
    """Mean gap between confidence and share of right answers over bins of equal width.

    Source: Guo et al. 2017, https://arxiv.org/abs/1706.04599, eq. 3.
    """
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    sums = np.bincount(place, confidence - right, bins)
    return float(np.abs(sums).sum() / len(confidence))
