"""Against true answers and by slice: whether what changed is for the worse, and for whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from attar.audit import paired
from attar.audit.fidelity import TEMPERATURES, Measured, bootstrap
from attar.records import Calibration, Estimate, SliceFound, Truth

# Nats: float32 gives so much for two answers that are equal but for rounding.
NO_DIVERGENCE = 2.0**-20
# An answer that the original gives less often is no class of its own.
LEAST_PREDICTIONS = 5
RARER = "rarer classes"


def against_truth(measured: Measured, seed: int, chosen: np.ndarray | None = None) -> Truth | None:
    """Compare both models with the true answers.

    Args:
        chosen: Samples that count, by their number; None: all.

    Returns:
        None where no true answer is known.
    """
    kept = np.ones(len(measured.truth), bool)
    if chosen is not None:
        kept = np.isin(measured.surprise_sample, chosen)
    if not kept.any():
        return None
    at, sample = measured.surprise_at[kept], measured.surprise_sample[kept]
    truth = measured.truth[kept]
    before, after = measured.answer_before[at] == truth, measured.answer_after[at] == truth
    both_wrong = ~before & ~after
    other = both_wrong & (measured.answer_before[at] != measured.answer_after[at])
    change = after.astype(float) - before
    by_sample = np.bincount(np.unique(sample, return_inverse=True)[1], change)
    gain = measured.surprise_before[kept] - measured.surprise_after[kept]

    def share(values: np.ndarray) -> Estimate:
        return bootstrap(values.astype(float), sample, seed=seed)

    return Truth(
        n_predictions=len(truth),
        accuracy_before=share(before),
        accuracy_after=share(after),
        negative_flips=share(before & ~after),
        positive_flips=share(~before & after),
        other_flips=float(other.mean()),
        probability_ratio=bootstrap(gain, sample, seed=seed, of=np.exp),
        accuracy_change=share(change),
        p_value=_p_of_change(change, by_sample, seed),
        smallest_shown=paired.smallest_shown(by_sample) * len(by_sample) / len(truth),
    )


def with_calibration(truth: Truth | None, measured: Measured) -> Truth | None:
    """Add how far confidence is from being right, of both models, where that was looked at."""
    if truth is None or not len(measured.tempered_before):
        return truth
    at = measured.surprise_at
    sides = {}
    for name in ("before", "after"):
        confidence = getattr(measured, f"probability_{name}")[at]
        right = getattr(measured, f"answer_{name}")[at] == measured.truth
        tempered = getattr(measured, f"tempered_{name}")
        best = int(tempered[:, :, 0].mean(0).argmin())
        sides[name] = Calibration(
            ece=paired.expected_calibration_error(confidence, right),
            brier=float(getattr(measured, f"brier_{name}").mean()),
            temperature=TEMPERATURES[best],
            ece_refitted=paired.expected_calibration_error(
                tempered[:, best, 1], tempered[:, best, 2].astype(bool)
            ),
        )
    return replace(truth, calibration_before=sides["before"], calibration_after=sides["after"])


def by_slice(
    measured: Measured, labels: Sequence[str], *, family: str, seed: int
) -> tuple[SliceFound, ...]:
    """What each slice lost, those that lost most first.

    Args:
        labels: Of each sample; empty for no slices.
    """
    names = sorted(set(labels))
    if len(names) < 2:
        return ()
    own = np.asarray(labels)
    chances = _chances_of_worse(measured, np.searchsorted(names, own), seed)
    found = [
        _one(measured, own, name, family, seed, float(chance))
        for name, chance in zip(names, chances, strict=True)
    ]
    worse = paired.holm([one.p_worse for one in found])
    judged = [i for i, one in enumerate(found) if one.truth is not None]
    accuracy = dict(zip(judged, paired.holm([_p_of(found[i]) for i in judged]), strict=True))
    adjusted = [
        replace(one, p_worse=worse[i], p_accuracy=accuracy.get(i)) for i, one in enumerate(found)
    ]
    return tuple(sorted(adjusted, key=lambda one: -one.divergence.value))


def by_class(measured: Measured, names: Sequence[str], *, seed: int) -> tuple[SliceFound, ...]:
    """What the original's predictions of each class lost, those that lost most first.

    A fault in what tells one class from others shows here and not in the labels: it also spoils
    the samples of other labels that the original takes for this class.

    Args:
        names: Of all classes; empty for none. Those that the original answers less than
            LEAST_PREDICTIONS times are one slice, "rarer classes".
    """
    answers = measured.answer_before
    if not names or len(np.unique(measured.sample)) < len(answers):
        return ()
    often = np.bincount(answers, minlength=len(names)) >= LEAST_PREDICTIONS
    labels = [""] * (int(measured.sample.max()) + 1)
    for sample, answer in zip(measured.sample, answers, strict=True):
        labels[sample] = names[answer] if often[answer] else RARER
    return by_slice(measured, labels, family="categorical", seed=seed)


def _chances_of_worse(measured: Measured, slices: np.ndarray, seed: int) -> np.ndarray:
    """P of each slice's divergence beyond the rest, before any correction."""
    beyond = np.where(measured.divergence < NO_DIVERGENCE, 0.0, measured.divergence)
    n_samples = len(slices)
    sums = np.bincount(measured.sample, beyond, n_samples)
    counts = np.bincount(measured.sample, minlength=n_samples)
    return paired.larger_than_the_rest(sums, counts, slices, seed)


def _one(
    measured: Measured, labels: np.ndarray, name: str, family: str, seed: int, p_worse: float
) -> SliceFound:
    chosen = np.flatnonzero(labels == name)
    inside = np.isin(measured.sample, chosen)
    values, sample = measured.divergence[inside], measured.sample[inside]
    present, place = np.unique(measured.sample, return_inverse=True)
    sums, counts = np.bincount(place, measured.divergence), np.bincount(place)
    is_own = labels[present] == name
    rest = measured.divergence[~inside].mean() if (~inside).any() else 0.0
    flips = None
    if family == "categorical":
        changed = measured.answer_before[inside] != measured.answer_after[inside]
        flips = bootstrap(changed.astype(float), sample, seed=seed)
    return SliceFound(
        label=name,
        n_samples=len(chosen),
        n_predictions=len(values),
        divergence=bootstrap(values, sample, seed=seed),
        flips=flips,
        truth=against_truth(measured, seed, chosen),
        p_worse=p_worse,
        p_accuracy=None,
        smallest_shown=paired.smallest_shown(sums[is_own] / counts[is_own] - rest),
    )


def _p_of(found: SliceFound) -> float:
    assert found.truth is not None
    return found.truth.p_value


def _p_of_change(change: np.ndarray, by_sample: np.ndarray, seed: int) -> float:
    """McNemar's test where samples have one prediction each, else by samples."""
    if len(by_sample) == len(change):
        return paired.mcnemar_exact(int((change < 0).sum()), int((change > 0).sum()))
    return paired.sign_flip(by_sample, seed)
