"""The rule: passed, undecided or failed."""

from dataclasses import replace

import numpy as np
import pytest

from attar.audit.fidelity import Measured
from attar.audit.verdict import judge, with_details
from attar.records import Changed, GroupClaim


def measured(divergence, *, blind=1.0, flips=0.0, surprise=None, samples=None):
    """One prediction a sample; a share of `flips` of them changed."""
    divergence = np.asarray(divergence, float)
    n = len(divergence)
    after = np.zeros(n, int)
    after[: round(flips * n)] = 1
    surprise = np.zeros((0, 2)) if surprise is None else np.asarray(surprise, float)
    return Measured(
        sample=np.arange(n) if samples is None else np.asarray(samples),
        position=np.arange(n) * 2,
        divergence=divergence,
        answer_before=np.zeros(n, int),
        answer_after=after,
        probability_before=np.ones(n),
        probability_after=np.ones(n),
        surprise_before=surprise[:, 0],
        surprise_after=surprise[:, 1],
        surprise_sample=np.arange(len(surprise)),
        cosine=np.linspace(0.9, 1.0, n),
        blind_divergence=blind,
        entropy=1.5,
    )


def judged(found, family="categorical"):
    return judge(found, family=family, predicted_damage=0.125, seed=0)


@pytest.mark.parametrize(
    "divergence, blind, outcome",
    [
        ([0.1] * 40, 1.0, "passed"),
        ([0.5] * 40, 1.0, "passed"),  # the limit itself is allowed
        ([0.51] * 40, 1.0, "failed"),
        ([0.1] * 40, 0.15, "failed"),
        ([0.0, 1.1] * 20, 1.0, "undecided"),
        ([0.0, 1.1] * 20, 5.0, "passed"),
        ([0.0, 1.1] * 20, 0.5, "failed"),
        ([0.0] * 40, 0.0, "passed"),
    ],
)
def test_losing_more_than_half_of_what_answers_know_fails(divergence, blind, outcome):
    assert judged(measured(divergence, blind=blind)).outcome == outcome


@pytest.mark.parametrize(
    "flips, outcome", [(0.0, "passed"), (0.2, "passed"), (0.5, "undecided"), (0.9, "failed")]
)
def test_changing_more_than_half_of_the_predictions_fails(flips, outcome):
    found = judged(measured([0.01] * 40, flips=flips))
    assert found.outcome == outcome
    assert found.flips.value == pytest.approx(flips)
    assert found.flips.low <= flips <= found.flips.high


def test_the_worst_rule_decides_and_each_says_why():
    found = judged(measured([0.01] * 40, flips=0.9))
    lost, changed = found.reasons
    assert "1.0%" in lost and lost.endswith("passed")
    assert "90.0%" in changed and "50%" in changed and changed.endswith("failed")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_answer_that_is_not_finite_fails_and_is_placed(bad):
    found = judged(measured([0.1, 0.1, bad, bad], samples=[0, 0, 1, 1]))
    assert found.outcome == "failed"
    assert "sample 1, position 4" in found.reasons[0]
    assert found.divergence.value == float("inf") and found.n_samples == 2


def test_numbers_are_those_of_the_predictions():
    values = np.linspace(0, 0.2, 101)
    found = judged(measured(values, samples=np.arange(101) // 2))
    assert found.divergence.value == pytest.approx(0.1)
    assert found.divergence_median == pytest.approx(0.1)
    assert found.divergence_p99 == pytest.approx(0.198)
    assert (found.n_predictions, found.n_samples) == (101, 51)
    assert found.predicted_damage == 0.125 and found.original_entropy == 1.5


def test_perplexity_of_identical_models_does_not_change():
    same = judged(measured([0.0] * 5, surprise=[[2.0, 2.0], [0.5, 0.5]])).perplexity_ratio
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)
    worse = judged(measured([0.0] * 5, surprise=[[2.0, 2.2], [0.5, 0.7]])).perplexity_ratio
    assert worse.value == pytest.approx(np.exp(0.2))
    assert judged(measured([0.0] * 5)).perplexity_ratio is None


def test_means_have_a_cosine_and_no_flips():
    found = judged(measured([0.1] * 5, flips=1.0), family="gaussian")
    assert found.flips is None and found.original_entropy is None
    assert found.cosine.value == pytest.approx(0.95) and found.outcome == "passed"
    assert judged(measured([0.1] * 5)).cosine is None


def test_details_change_nothing_else():
    found = judged(measured([0.1] * 5))
    claim = GroupClaim("q", ("q",), 0.1, 0.2, 5, 3)
    changed = Changed("sample 0", "", "a", "b", 0.5)
    more = with_details(
        found, groups=[claim], changed=[changed], continuations=[("a", "b", "c")],
        token_divergence=[("x", 0.1)],
    )  # fmt: skip
    assert more.groups == (claim,) and more.changed == (changed,)
    assert replace(more, groups=(), changed=(), continuations=(), token_divergence=()) == found
