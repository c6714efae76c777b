"""Slices of the data that may lose only so much: what was asked, what it takes, what was measured.

What a change of a unit costs on one slice is taken to be its price times how much more the unit is
worth there than on all data. That is one line of the integer program for each slice; what the plan
then measures on the slice corrects the line, as it corrects the prices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from attar import concept_slices
from attar.audit.fidelity import Measured
from attar.audit.policy import OUTCOMES, check, reason_of
from attar.concept_slices import CONCEPT
from attar.errors import DataError, SettingError
from attar.explain.gatherer import ALL
from attar.export.run import class_names
from attar.parallel import in_order
from attar.plan.solve import slice_damage
from attar.records import Batch, Candidate, Protected, Recipe, Round, Statistics, Verdict
from attar.session import Session

CLASS = "class="
# Labels that are named in a hint.
NAMED = 8
# Measured over predicted, at most: a slice of few samples must not make all sizes too small.
LARGEST_CORRECTION = 10.0


def asked(recipe: Recipe) -> list[tuple[str, float]]:
    """Slices and the nats each may lose, as typed.

    Raises:
        SettingError: Not a slice and a number, a decider that knows no slices, or a cut.
    """
    found = []
    for line in recipe.protect:
        label, _, number = line.rpartition(":")
        try:
            nats = float(number)
        except ValueError:
            nats = math.nan
        if not label or not 0 < nats < math.inf:
            raise SettingError(
                f"--protect {line} is not a slice and the nats it may lose.",
                hint="type SLICE:NATS, such as --protect de:0.02 or --protect class=7:0.01",
            )
        found.append((label, nats))
    if found and recipe.decide != "price":
        raise SettingError(
            f"--decide {recipe.decide} knows no slices.", hint="use --decide price with --protect."
        )
    if found and recipe.cut != "off":
        raise SettingError(
            "what a cut costs a slice is not known before it is made.",
            hint="leave --cut out, or protect no slice.",
        )
    if len({_kind(label) for label, _ in found}) > 1:
        raise SettingError(
            "two of classes, concepts and other slices are protected together.",
            hint="protect those of one kind in a run; a sample has one label.",
        )
    for label, _ in found:
        if _kind(label) == CONCEPT:
            concept_slices.parts(label)
    return found


def _kind(label: str) -> str:
    return next((kind for kind in (CLASS, CONCEPT) if label.startswith(kind)), "")


def labelled(session: Session) -> Session:
    """Label samples by what the original answers, or by concept, where those are protected.

    Raises:
        SettingError: See `asked`.
        DataError: A slice of which there are no samples, or classes of what answers none.
    """
    wishes = asked(session.recipe)
    if any(label.startswith(CLASS) for label, _ in wishes):
        if session.model.task.name != "classify":
            raise DataError(
                f"{session.model.name} answers {session.model.task.name}, and no classes.",
                hint="protect labels of the data, with --slices.",
            )
        data = session.data
        slices = [[*_answered(session, [batch])] for batch in data.calibration]
        recovery = _answered(session, data.recovery)
        data = replace(data, slices=slices, recovery_slices=recovery)
        session = replace(session, data=data)
    elif any(label.startswith(CONCEPT) for label, _ in wishes):
        session = _with_concepts(session, [label for label, _ in wishes])
    for label, _ in wishes:
        _resolved(session, label)
    return session


def _with_concepts(session: Session, labels: Sequence[str]) -> Session:
    """Label all samples by the concepts, in place of what the data calls them."""
    data = session.data
    batches = [*data.calibration, *data.recovery, *data.audit]
    own = iter(concept_slices.label_samples(session, labels, batches))

    def take(batches: Sequence[Batch]) -> list[list[str]]:
        return [[next(own) for _ in range(concept_slices.size(batch))] for batch in batches]

    slices, recovery, audit = take(data.calibration), take(data.recovery), take(data.audit)
    return replace(
        session,
        data=replace(
            data,
            slices=slices,
            recovery_slices=[label for labels in recovery for label in labels],
            audit_slices=[label for labels in audit for label in labels],
        ),
    )


def _answered(session: Session, batches: Sequence[Batch]) -> list[str]:
    """Name of the class that the original answers to each sample."""
    model = session.model

    def answer(batch: Batch) -> Tensor:
        with torch.no_grad():
            return model.task.forward(model.module, batch)[:, 0]

    outputs = torch.cat(list(in_order(answer, batches)))
    names = class_names(model.files, outputs.shape[-1])
    return [names[number] for number in outputs.argmax(-1).tolist()]


def _resolved(session: Session, typed: str) -> str:
    """The label of samples that is meant: as it is, after "class=", or after a column's name."""
    data = session.data
    there = {label for labels in data.slices for label in labels} & set(data.recovery_slices)
    named = typed.partition("=")[2]
    if typed.startswith(CLASS) and named.isdecimal() and named not in there:
        with torch.no_grad():
            width = session.model.task.forward(session.model.module, session.model.examples)
        names = class_names(session.model.files, width.shape[-1])
        named = names[int(named)] if int(named) < len(names) else named
    for label in (typed, named):
        if label in there:
            return label
    if not there:
        raise DataError(
            f"--protect {typed}: the data has no labels.",
            hint="give --data with labels and --slices, or protect class=NUMBER of a classifier.",
        )
    some = sorted(there)
    more = f" and {len(some) - NAMED} more" if len(some) > NAMED else ""
    raise DataError(
        f"--protect {typed}: no sample of both calibration and recovery data is of that slice.",
        hint=f"there are {', '.join(some[:NAMED])}{more}; more --calibration may hold others.",
    )


def protected(session: Session, statistics: Statistics) -> tuple[Protected, ...]:
    """What the solver is told of each slice; of a session from `labelled`."""
    found = []
    for typed, nats in asked(session.recipe):
        label = _resolved(session, typed)
        there, everywhere = statistics.unit_relevance[label], statistics.unit_relevance[ALL]
        found.append(Protected(label, nats, dict(there), dict(everywhere)))
    return tuple(found)


def of_slices(session: Session, measured: Measured) -> dict[str, float]:
    """Mean nats of each protected slice on recovery data, by label."""
    labels = {_resolved(session, typed) for typed, _ in asked(session.recipe)}
    own = np.array(session.data.recovery_slices or [""])
    return {
        label: float(measured.divergence[own[measured.sample] == label].mean())
        for label in sorted(labels)
    }


def corrected(
    slices: Sequence[Protected], choices: Mapping[str, Candidate], done: Round
) -> tuple[Protected, ...]:
    """Hold each slice to what was measured over what was predicted there."""
    found = []
    for one in slices:
        predicted, measured = slice_damage(one, choices), done.slices[one.label]
        ratio = measured / predicted if predicted > 0 else 1.0
        found.append(replace(one, correction=min(max(ratio, 0.0), LARGEST_CORRECTION)))
    return tuple(found)


def excess(slices: Sequence[Protected], done: Round) -> float:
    """By how much a plan measured more than its slices may lose, as shares; 0 for none."""
    return sum((max(0.0, done.slices[one.label] / one.nats - 1) for one in slices), 0.0)


def notes(
    slices: Sequence[Protected], choices: Mapping[str, Candidate], done: Round
) -> tuple[str, ...]:
    """Say what each slice may lose, and what it was predicted and measured to."""
    return tuple(
        f"protected {one.label}: it may lose {one.nats:g} nats; "
        f"{slice_damage(one, choices):.3g} predicted by its share, {done.slices[one.label]:.3g} "
        "measured on recovery data"
        for one in slices
    )


def checked(session: Session, verdict: Verdict) -> Verdict:
    """Hold each protected slice to its limit on audit data; the worst of all is the outcome."""
    checks = []
    for typed, nats in asked(session.recipe):
        label = _resolved(session, typed)
        rows = verdict.classes if typed.startswith(CLASS) else verdict.slices
        found = next((one.divergence for one in rows if one.label == label), None)
        checks.append(check(f"protected {label}: divergence", found, nats))
    outcomes = [verdict.outcome, *(one.outcome for one in checks)]
    return replace(
        verdict,
        outcome=max(outcomes, key=OUTCOMES.index),
        reasons=(*verdict.reasons, *(reason_of(one) for one in checks)),
        checks=(*verdict.checks, *checks),
    )
