"""Tests of paired results against scipy, and against what they promise on data made for it."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from attar.audit import paired


@pytest.mark.parametrize("worse, better", [(0, 0), (5, 5), (9, 2), (0, 6), (31, 48)])
def test_mcnemar_is_twice_the_smaller_tail(worse, better):
    n = worse + better
    tail = sum(math.comb(n, k) for k in range(min(worse, better) + 1)) / 2**n
    assert paired.mcnemar_exact(worse, better) == pytest.approx(min(1.0, 2 * tail))


def test_sign_flip_agrees_with_every_sign_tried():
    differences = np.array([0.5, 1.5, -0.25, 2.0, 0.75, 0.1, -1.0, 1.25])
    exact = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert paired.sign_flip(differences, 0) == pytest.approx(exact, abs=0.025)
    assert paired.sign_flip(-differences, 0) == pytest.approx(exact, abs=0.025)
    assert paired.sign_flip(np.zeros(4), 0) == 1.0


def in_errors(sums, counts, chosen):
    """Difference of the two means over predictions, in standard errors, by loops."""
    means, variance = [], 0.0
    for side in (True, False):
        own = [i for i in range(len(sums)) if bool(chosen[i]) is side]
        inside = sum(counts[i] for i in own)
        mean = sum(sums[i] for i in own) / inside
        squares = sum((sums[i] - mean * counts[i]) ** 2 for i in own)
        variance += len(own) / (len(own) - 1) * squares / inside**2
        means.append(mean)
    return (means[0] - means[1]) / math.sqrt(variance)


@pytest.mark.parametrize("counts", [[1] * 9, [1, 4, 2, 7, 3, 1, 5, 2, 2]])
def test_larger_than_the_rest_agrees_with_every_choice_tried(counts):
    counts = np.array(counts)
    sums = np.array([3.0, 2.5, 0.5, 1.0, 0.7, 2.0, 0.2, 0.1, 1.3]) * counts
    chosen = (0, 1, 5, 7)
    inside = np.isin(np.arange(9), chosen)
    found = in_errors(sums, counts, inside)
    tried = [
        in_errors(sums, counts, np.isin(np.arange(9), other)) for other in combinations(range(9), 4)
    ]
    exact = np.mean([one >= found - 1e-9 for one in tried])
    both = paired.larger_than_the_rest(sums, counts, (~inside).astype(int), 0)
    # 4,999 draws of a share of about 0.1 have a standard error of 0.004.
    assert both[0] == pytest.approx(exact, abs=0.015)
    low = np.mean([one <= found + 1e-9 for one in tried])
    assert both[1] == pytest.approx(low, abs=0.015)


def test_one_rare_large_value_does_not_hide_what_happened_to_all_of_a_slice():
    draws = np.random.default_rng(5)
    slices = np.repeat([0, 1, 2], 30)
    values = draws.exponential(0.01, 90) + 0.05 * (slices == 1)
    values[3] = 3.0  # of slice 0, whose mean is now the largest
    p_values = paired.larger_than_the_rest(values, np.ones(90, int), slices, 0)
    assert values[slices == 0].mean() > values[slices == 1].mean()
    assert p_values[0] > 0.2 and p_values[2] > 0.5
    values[3] = 0.0
    assert paired.larger_than_the_rest(values, np.ones(90, int), slices, 0)[1] < 0.001


def test_a_slice_that_is_everything_or_nothing_is_not_worse():
    sums, counts = np.arange(4.0), np.ones(4, int)
    assert paired.larger_than_the_rest(sums, counts, np.zeros(4, int), 0).tolist() == [1.0]
    assert paired.larger_than_the_rest(sums, counts, np.full(4, 1), 0).tolist() == [1.0, 1.0]


def test_a_difference_without_any_spread_is_beyond_chance_and_none_is_none():
    slices, counts = np.array([0] * 10 + [1] * 10), np.ones(20, int)
    apart = paired.larger_than_the_rest(np.where(slices == 0, 1.0, 0.0), counts, slices, 0)
    assert apart[0] < 0.001 and apart[1] == 1.0
    assert paired.larger_than_the_rest(np.ones(20), counts, slices, 0).tolist() == [1.0, 1.0]


def test_samples_without_a_difference_give_false_alarms_as_often_as_said():
    draws = np.random.default_rng(3)
    small = 0
    for seed in range(60):
        values = draws.exponential(1.0, 40)
        slices = (np.arange(40) >= 12).astype(int)
        small += paired.larger_than_the_rest(values, np.ones(40, int), slices, seed)[0] <= 0.1
    assert small <= stats.binom.ppf(0.999, 60, 0.1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_steps_down(p_values):
    found = paired.holm(p_values)
    for i, p in enumerate(p_values):
        # The largest, over all p not above this one, of p times how many are not below it.
        expected = 0.0
        for q in sorted(x for x in p_values if x <= p):
            expected = max(expected, q * sum(1 for x in p_values if x >= q))
        assert found[i] == pytest.approx(min(1.0, expected))


def test_the_smallest_shown_mean_is_found_four_times_in_five():
    draws = np.random.default_rng(0)
    n, spread = 60, 2.0
    effect = paired.smallest_shown(draws.normal(0, spread, 20_000)) * math.sqrt(20_000 / n)
    found = [
        stats.ttest_1samp(draws.normal(effect, spread, n), 0).pvalue < 0.05 for _ in range(800)
    ]
    assert np.mean(found) == pytest.approx(0.8, abs=0.05)


def test_where_nothing_happened_a_rare_thing_could_have_been_missed():
    share = paired.smallest_shown(np.zeros(100))
    assert (1 - share) ** 100 == pytest.approx(0.05)
    assert paired.smallest_shown(np.array([0.3])) == math.inf


def test_calibration_error_is_the_gap_in_each_bin():
    confidence = np.array([0.05, 0.95, 0.93, 0.5, 0.52, 1.0])
    right = np.array([False, True, False, True, True, True])
    edges, expected = np.linspace(0, 1, 16), 0.0
    for low, high in pairwise(edges):
        own = (confidence > low) & (confidence <= high)
        if own.any():
            expected += own.mean() * abs(confidence[own].mean() - right[own].mean())
    assert paired.expected_calibration_error(confidence, right) == pytest.approx(expected)
