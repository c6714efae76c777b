"""Turn what was measured into a verdict, by a rule that is written down.

The rule (docs/verdict.md): a compressed model is ruined when it lost more than half of what the
original's answers know about their inputs (divergence over the blind divergence), or when more than
half of its predictions changed. Failed: the whole interval lies beyond a limit. Undecided: the
interval straddles one. Passed: otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from attar.audit.behaviour import against_truth, by_class, by_slice, with_calibration
from attar.audit.fidelity import Measured, bootstrap
from attar.audit.policy import OUTCOMES, check
from attar.records import Changed, Check, Estimate, GroupClaim, Verdict

LOST_INFORMATION_LIMIT = 0.5
CHANGED_PREDICTIONS_LIMIT = 0.5


def judge(
    measured: Measured,
    *,
    family: str,
    predicted_damage: float,
    seed: int,
    slices: Sequence[str] = (),
    classes: Sequence[str] = (),
    labelled: bool = False,
) -> Verdict:
    """Apply the rule to one comparison.

    Args:
        slices: Label of each sample, or empty.
        classes: Names of the answers, where each sample gets one; or empty.
        labelled: Whether true answers are labels, and not the text itself.
    """
    if not np.isfinite(measured.divergence).all():
        return _broken(measured, predicted_damage)
    divergence = bootstrap(measured.divergence, measured.sample, seed=seed)
    flips = _flips(measured, seed) if family == "categorical" else None
    outcome, reasons, checks = _apply_rule(divergence, measured.blind_divergence, flips)
    return Verdict(
        outcome=outcome,
        reasons=reasons,
        n_predictions=len(measured.divergence),
        n_samples=len(np.unique(measured.sample)),
        divergence=divergence,
        divergence_p99=float(np.quantile(measured.divergence, 0.99)),
        divergence_median=float(np.median(measured.divergence)),
        predicted_damage=predicted_damage,
        flips=flips,
        perplexity_ratio=None if labelled else _perplexity_ratio(measured, seed),
        cosine=_mean(measured.cosine, measured, seed) if family == "gaussian" else None,
        original_entropy=measured.entropy if family == "categorical" else None,
        divergence_p95=float(np.quantile(measured.divergence, 0.95)),
        jensen_shannon=_mean(measured.jensen_shannon, measured, seed),
        truth=with_calibration(against_truth(measured, seed), measured),
        slices=by_slice(measured, slices, family=family, seed=seed),
        classes=by_class(measured, classes, seed=seed),
        checks=checks,
        sample_divergence=_of_samples(measured),
    )


def _of_samples(measured: Measured) -> tuple[float, ...]:
    sums = np.bincount(measured.sample, measured.divergence)
    counts = np.bincount(measured.sample)
    return tuple(float(mean) for mean in sums / np.maximum(counts, 1))


def _mean(values: np.ndarray, measured: Measured, seed: int) -> Estimate | None:
    """Of a number for each prediction; None where there are none."""
    return bootstrap(values, measured.sample, seed=seed) if len(values) else None


def _flips(measured: Measured, seed: int) -> Estimate | None:
    return _mean((measured.answer_before != measured.answer_after).astype(float), measured, seed)


def _perplexity_ratio(measured: Measured, seed: int) -> Estimate | None:
    if not len(measured.surprise_before):
        return None
    worse = measured.surprise_after - measured.surprise_before
    return bootstrap(worse, measured.surprise_sample, seed=seed, of=np.exp)


def _broken(measured: Measured, predicted_damage: float) -> Verdict:
    finite = np.isfinite(measured.divergence)
    bad, n_bad = int(np.argmin(finite)), float((~finite).sum())
    place = f"sample {measured.sample[bad]}, position {measured.position[bad]}"
    nothing = Estimate(float("inf"), float("inf"), float("inf"))
    return Verdict(
        outcome="failed",
        reasons=(f"the compressed model answers NaN or infinity, first at {place}",),
        n_predictions=len(measured.divergence),
        n_samples=len(np.unique(measured.sample)),
        divergence=nothing,
        divergence_p99=float("inf"),
        divergence_median=float("inf"),
        predicted_damage=predicted_damage,
        flips=None,
        perplexity_ratio=None,
        cosine=None,
        original_entropy=None,
        checks=(check("answers that are no numbers", Estimate(n_bad, n_bad, n_bad), 0.0),),
    )


def _apply_rule(
    divergence: Estimate, blind: float, flips: Estimate | None
) -> tuple[str, tuple[str, ...], tuple[Check, ...]]:
    """Compare each interval with its limit; the worst result is the outcome."""
    limits = []
    if blind > 0:
        share = Estimate(*(v / blind for v in (divergence.value, divergence.low, divergence.high)))
        what = "of what the answers say about the inputs was lost"
        limits.append(("lost information", what, share, LOST_INFORMATION_LIMIT))
    if flips is not None:
        what = "of the predictions changed"
        limits.append(("changed predictions", what, flips, CHANGED_PREDICTIONS_LIMIT))
    checks, reasons = [], []
    for name, what, found, limit in limits:
        checks.append(check(name, found, limit))
        reasons.append(
            f"{found.value:.1%} ({found.low:.1%} to {found.high:.1%}) {what}; "
            f"the limit is {limit:.0%}: {checks[-1].outcome}"
        )
    worst = max(["passed", *(one.outcome for one in checks)], key=OUTCOMES.index)
    return worst, tuple(reasons), tuple(checks)


def with_details(
    verdict: Verdict,
    *,
    groups: Sequence[GroupClaim] = (),
    changed: Sequence[Changed] = (),
    continuations: Sequence[tuple[str, str, str]] = (),
    token_divergence: Sequence[tuple[str, float]] = (),
) -> Verdict:
    """Add what a report shows beside the numbers."""
    return replace(
        verdict,
        groups=tuple(groups),
        changed=tuple(changed),
        continuations=tuple(continuations),
        token_divergence=tuple(token_divergence),
    )
