"""Limits that somebody wrote down before they saw the numbers.

A policy is a YAML file: names of what is measured, each with the most it may be.

    divergence: 0.05            # nats per prediction, mean
    negative_flips: 2%          # right before, wrong now
    any_slice:
      divergence: 0.1           # of the worst label
    any_choices:
      lost_accuracy: 1%         # of each file of questions
    first_divergent_token: 20   # the least that it may be
    size: 60MB

Each limit is a check: passed where the whole 95% interval lies at or below it, failed where all of
it lies above, else undecided; the reverse for the few in AT_LEAST, where more is better. What the
data cannot say (no true answers, no labels) is undecided too. The outcome of the verdict is the
worst of all checks, its own rule's among them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from attar.errors import SettingError
from attar.records import Check, ChoicesFound, Drift, Estimate, SliceFound, Truth, Verdict

OUTCOMES = ("passed", "undecided", "failed")
ANY_SLICE, ANY_CHOICES, SIZE = "any_slice", "any_choices", "size"
# Of a whole verdict, and of one slice: name in a policy to what is found; None where nothing is.
Found = Estimate | None


def _exactly(value: float | None) -> Found:
    return None if value is None else Estimate(value, value, value)


def _lost_accuracy(truth: Truth | None) -> Found:
    if truth is None:
        return None
    change = truth.accuracy_change
    return Estimate(0.0 - change.value, 0.0 - change.high, 0.0 - change.low)  # without a -0


def _lost_agreement(drift: Drift | None) -> Found:
    """1 minus the mean rank correlation of the explanations, so that less is better."""
    if drift is None:
        return None
    found = drift.row("compressed").every["rank_correlation"]
    return Estimate(1 - found.value, 1 - found.high, 1 - found.low)


LIMITS: Mapping[str, Callable[[Verdict], Found]] = {
    "divergence": lambda v: v.divergence,
    "divergence_p95": lambda v: _exactly(v.divergence_p95),
    "divergence_p99": lambda v: _exactly(v.divergence_p99),
    "jensen_shannon": lambda v: v.jensen_shannon,
    "changed_predictions": lambda v: v.flips,
    "negative_flips": lambda v: v.truth.negative_flips if v.truth else None,
    "lost_accuracy": lambda v: _lost_accuracy(v.truth),
    "perplexity_ratio": lambda v: v.perplexity_ratio,
    "calibration_error": lambda v: (
        _exactly(v.truth.calibration_after.ece) if v.truth and v.truth.calibration_after else None
    ),
    "first_divergent_token": lambda v: v.generation.first_divergent_token if v.generation else None,
    "equal_tokens": lambda v: v.generation.equal_tokens if v.generation else None,
    "repetition_increase": lambda v: v.generation.repetition_change if v.generation else None,
    "drift": lambda v: _lost_agreement(v.drift),
}
# Limits that are the least that may be.
AT_LEAST = frozenset({"first_divergent_token", "equal_tokens"})
SLICE_LIMITS: Mapping[str, Callable[[SliceFound], Found]] = {
    "divergence": lambda s: s.divergence,
    "changed_predictions": lambda s: s.flips,
    "negative_flips": lambda s: s.truth.negative_flips if s.truth else None,
    "lost_accuracy": lambda s: _lost_accuracy(s.truth),
}
CHOICES_LIMITS: Mapping[str, Callable[[ChoicesFound], Found]] = {
    "lost_accuracy": lambda c: _lost_accuracy(c.plain),
    "lost_accuracy_normalised": lambda c: _lost_accuracy(c.normalised),
    "negative_flips": lambda c: c.plain.negative_flips,
}
SECTIONS: Mapping[str, tuple[str, ...]] = {
    ANY_SLICE: tuple(SLICE_LIMITS),
    ANY_CHOICES: tuple(CHOICES_LIMITS),
}


@dataclass(frozen=True)
class Policy:
    """Limits as they were read.

    Attributes:
        name: Of the file.
        sha256: Of what it says, however it is laid out.
        limits: Of the whole: name to the most it may be.
        slices: Of every slice.
        choices: Of every file of questions.
        text: The file as it was read.
        size: Bytes of every file that the compressed model needs; None for no limit.
    """

    name: str
    sha256: str
    limits: Mapping[str, float]
    slices: Mapping[str, float]
    text: bytes
    size: int | None = None
    choices: Mapping[str, float] = field(default_factory=dict)


def read_policy(path: Path, parse_size: Callable[[str], int]) -> Policy:
    """Read a policy.

    Raises:
        SettingError: No such file, no YAML, an unknown name, or a limit that is no number.
    """
    try:
        content = path.read_bytes()
        said = yaml.safe_load(content.decode("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as fault:
        line = " ".join(str(fault).split())
        raise SettingError(
            f"the policy {path} cannot be read: {line}.",
            hint="write lines such as divergence: 0.05",
        ) from fault
    if not isinstance(said, dict) or not said:
        raise SettingError(
            f"the policy {path} holds no limits.", hint="write lines such as divergence: 0.05"
        )
    inside = {name: _section(said, name, path) for name in SECTIONS}
    whole = {name: value for name, value in said.items() if name not in (*SECTIONS, SIZE)}
    limits = _limits(whole, (*LIMITS, *SECTIONS, SIZE), path)
    size = parse_size(str(said[SIZE])) if SIZE in said else None
    facts = {"limits": limits, ANY_SLICE: inside[ANY_SLICE], SIZE: size}
    # Left out where there are none, so that older policies keep their hash.
    facts |= {ANY_CHOICES: inside[ANY_CHOICES]} if inside[ANY_CHOICES] else {}
    sha256 = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Policy(path.name, sha256, limits, inside[ANY_SLICE], content, size, inside[ANY_CHOICES])


def _section(said: Mapping[Any, Any], name: str, path: Path) -> dict[str, float]:
    """Limits that stand below a name."""
    below = said.get(name, {})
    if not isinstance(below, dict):
        raise SettingError(
            f"{name} of {path} holds no limits.",
            hint=f"indent lines such as {SECTIONS[name][0]}: 0.1",
        )
    return _limits(below, SECTIONS[name], path)


def _limits(said: Mapping[Any, Any], known: tuple[str, ...], path: Path) -> dict[str, float]:
    found = {}
    for name, value in said.items():
        if name not in known:
            near = get_close_matches(str(name), known, n=3, cutoff=0.4) or list(known)
            raise SettingError(
                f"{path} limits {name!r}, which is not measured.", hint=f"limit {', '.join(near)}"
            )
        found[name] = _number(name, value, path)
    return found


def _number(name: str, value: Any, path: Path) -> float:
    """A number, or a share written with a percent sign."""
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not 0 <= number < math.inf:
        raise SettingError(
            f"the limit of {name} in {path} is {value!r}.",
            hint=f"give a number from 0 on, such as {name}: 0.05, or a share such as 2%",
        )
    return number


def with_policy(verdict: Verdict, policy: Policy, weight_bytes: int) -> Verdict:
    """Add the policy's checks to a verdict; the worst of all is the outcome.

    Args:
        weight_bytes: Of every file that the compressed model needs.
    """
    checks = list(_checks(verdict, policy, weight_bytes))
    outcomes = [verdict.outcome, *(check.outcome for check in checks)]
    return replace(
        verdict,
        outcome=max(outcomes, key=OUTCOMES.index),
        reasons=(*verdict.reasons, *(reason_of(check) for check in checks)),
        checks=(*verdict.checks, *checks),
        policy=policy.name,
        policy_sha256=policy.sha256,
    )


def _checks(verdict: Verdict, policy: Policy, weight_bytes: int) -> Iterator[Check]:
    for name, limit in policy.limits.items():
        yield check(name, LIMITS[name](verdict), limit, at_least=name in AT_LEAST)
    for name, limit in policy.slices.items():
        if not verdict.slices:
            yield check(f"any slice: {name}", None, limit)
        for one in verdict.slices:
            yield check(f"slice {one.label}: {name}", SLICE_LIMITS[name](one), limit)
    for name, limit in policy.choices.items():
        if not verdict.choices:
            yield check(f"any choices: {name}", None, limit)
        for asked in verdict.choices:
            yield check(f"choices {asked.name}: {name}", CHOICES_LIMITS[name](asked), limit)
    if policy.size is not None:
        yield check(SIZE, _exactly(float(weight_bytes)), float(policy.size))


def check(name: str, found: Found, limit: float, *, at_least: bool = False) -> Check:
    """Hold an interval against a limit.

    Args:
        at_least: Whether the limit is the least that may be, and not the most.
    """
    if found is None or math.isnan(found.value):
        return Check(name, None, limit, "undecided", at_least)
    outcome = "passed"
    within, beyond = found.high <= limit, found.low > limit
    if at_least:
        within, beyond = found.low >= limit, found.high < limit
    if not within:
        outcome = "failed" if beyond else "undecided"
    return Check(name, found, limit, outcome, at_least)


def reason_of(one: Check) -> str:
    """A check as one line."""
    least = "at least " if one.at_least else ""
    if one.found is None:
        return f"{one.name}: the data cannot say; the limit is {least}{one.limit:g}: undecided"
    value, low, high = one.found.value, one.found.low, one.found.high
    between = "" if low == high else f" ({low:.3g} to {high:.3g})"
    shown = f"{value:,.0f}" if one.name == SIZE else f"{value:.3g}"
    limit = f"{one.limit:,.0f}" if one.name == SIZE else f"{one.limit:g}"
    return f"{one.name}: {shown}{between}; the limit is {least}{limit}: {one.outcome}"
