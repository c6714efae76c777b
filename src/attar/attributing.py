"""Which units' changes made the divergence, and what giving some of them more bits would return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attar.audit.fidelity import Measured, bootstrap, measure
from attar.errors import DataError
from attar.explain.attribution import POINTS, shares_of, slopes_at
from attar.explain.concentration import where
from attar.explain.probe import Changes, probe
from attar.load.fold import fold_batch_norm
from attar.load.folder import is_attar_folder, read_description
from attar.matching import LABELS, number_tokens_otherwise
from attar.records import Batch, Model, Responsible, Rollback, Unit, Verdict
from attar.session import Session
from attar.sites import substituted

# Samples that responsibility is found on, at most, and predictions that are enough.
SAMPLES, PREDICTIONS, LEAST_SAMPLES = 64, 2048, 4
# Units for which what is returned is measured too: those that return most.
TRIED = 5
# Points of the path where those that do mostly leave more than this share unexplained.
MORE_POINTS, LARGEST_GAP = 12, 0.1
# What is left of a unit's error with one bit more.
LEFT = 0.5
# Units that would return less than this share of the damage are no way back.
LEAST_RETURNED = 0.005
BITS_PER_BYTE = 8
LEAVE_OUT = "leave --attribute out; it follows weights of the same names and shapes."


def with_attribution(
    session: Session, other: Model, verdict: Verdict, treatments: Mapping[str, str]
) -> Verdict:
    """Add who is responsible, most first, to a verdict.

    Args:
        treatments: Unit name to what was done to it, where that is known.

    Raises:
        DataError: No unit of the original has a counterpart of the same shape that differs.
    """
    with session.timed("attribute"):
        _check_alike(session, other)
        changes = _changes(session, _folded(other))
        batches, once = _batches(session, verdict), session.finished.once
        there = once("changes", partial(_measured, session, changes, batches))
        now = there.mean_divergence
        counts = np.bincount(there.sample, minlength=_n_samples(batches))
        whole = int(counts.sum())
        shares = once("shares", partial(_shares, session, changes, batches, now * whole))
        returned = once("returned", partial(_returned, session, changes, batches, whole))
        found = [
            replace(
                _responsible(session, session.units.named(name), own, counts, now, returned[name]),
                where=_where(session.units.named(name), changes),
                treatment=treatments.get(name, ""),
            )
            for name, own in shares.items()
        ]
        found = _tried(session, changes, batches, now, found)
        rollbacks = _together(session, changes, batches, now, found)
    explained = sum(one.damage.value for one in found)
    return replace(
        verdict,
        responsible=tuple(sorted(found, key=lambda one: -one.damage.value)),
        unattributed=1 - explained / now if now > 0 else 0.0,
        rollbacks=rollbacks,
    )


def treatments_of(folder: Path) -> dict[str, str]:
    """Unit name to what was done to it, of a folder that Attar wrote; nothing of any other."""
    if not is_attar_folder(folder):
        return {}
    units = read_description(folder)["units"]
    return {name: _in_few_words(line) for name, line in units.items()}


def _in_few_words(line: Mapping[str, Any]) -> str:
    bits = line.get("bits")
    return str(line["treatment"]) + ("" if bits is None else f", {round(bits)} bits")


def _check_alike(session: Session, other: Model) -> None:
    """Refuse a model that has no weights by the names of the original's, or other labels."""
    labels = [m.files.get(LABELS) for m in (session.model, other)]
    if None not in labels and labels[0] != labels[1]:
        raise DataError("the labels differ, so the last layers do too.", hint=LEAVE_OUT)
    theirs = {name for name, _ in other.module.named_parameters()}
    if not any(f"{unit.name}.weight" in theirs for unit in session.units):
        raise DataError(
            "no layer of the compressed model has the name of one of the original.", hint=LEAVE_OUT
        )
    if number_tokens_otherwise(session.model, other):
        raise DataError("the tokenizers differ, so weights of tokens do too.", hint=LEAVE_OUT)


def _folded(other: Model) -> nn.Module:
    """The other with its norms folded as the original's are."""
    return fold_batch_norm(other.module, other.examples, other.task.forward)[0]


def _changes(session: Session, other: nn.Module) -> Changes:
    """Parameter name to its change, for all that changed."""
    theirs = dict(other.named_parameters())
    names = [f"{unit.name}.weight" for unit in session.units]
    names += [unit.bias for unit in session.units if unit.bias]
    changes: dict[str, Callable[[], Tensor]] = {}
    apart = []
    for name in names:
        own = session.model.module.get_parameter(name)
        if name not in theirs or theirs[name].shape != own.shape:
            apart.append(name)
            continue
        change = partial(_change, session, name, theirs[name])
        if bool(change().any()):
            changes[name] = change
    if not any(name.endswith(".weight") for name in changes):
        raise DataError(
            "no layer of the compressed model has a counterpart in the original that differs.",
            hint=LEAVE_OUT,
        )
    if apart:
        session.progress.note(
            f"{len(apart)} weights, such as {apart[0]}, have no counterpart of their shape: what "
            "they changed is not attributed."
        )
    return changes


def _change(session: Session, name: str, theirs: Tensor) -> Tensor:
    return (theirs.detach().float() - session.parameter(name)).reshape(theirs.shape)


def _batches(session: Session, verdict: Verdict) -> Sequence[Batch]:
    """A few samples of the audit data, from those that lost least to those that lost most.

    Ranked by what each lost, they are taken at even distances, so that damage that few samples
    have is there in its proportion.
    """
    sizes = [len(next(iter(batch.values()))) for batch in session.data.audit]
    total = sum(sizes)
    lost = np.asarray(verdict.sample_divergence or [0.0] * total)
    per_sample = max(1, verdict.n_predictions // max(1, verdict.n_samples))
    count = min(total, SAMPLES, max(LEAST_SAMPLES, -(-PREDICTIONS // per_sample)))
    places = ((np.arange(count) + 0.5) * total / count).astype(int)
    chosen = np.zeros(total, bool)
    chosen[np.argsort(lost, kind="stable")[places]] = True
    batches = []
    for batch, own in zip(session.data.audit, np.split(chosen, np.cumsum(sizes)[:-1]), strict=True):
        if own.any():
            rows = torch.from_numpy(own.nonzero()[0])
            batches.append({name: tensor[rows] for name, tensor in batch.items()})
    return batches


def _n_samples(batches: Sequence[Batch]) -> int:
    return sum(len(next(iter(batch.values()))) for batch in batches)


def _shares(
    session: Session, changes: Changes, batches: Sequence[Batch], whole: float
) -> dict[str, Tensor]:
    """Split the divergence; on a finer path where the parts do not sum to the whole."""
    shares: dict[str, Tensor] = {}
    for points in (POINTS, MORE_POINTS):
        shares = shares_of(
            session.model,
            changes,
            batches,
            session.divergence,
            progress=session.progress,
            points=points,
        )
        gap = whole - float(sum(own.sum() for own in shares.values()))
        if abs(gap) <= LARGEST_GAP * whole:
            break
    return shares


def _measured(session: Session, changes: Changes, batches: Sequence[Batch]) -> Measured:
    """Compare the model with these changes made."""
    model, weights = session.model, _weights(session, changes)

    def changed(batch: Batch) -> Tensor:
        with substituted(model.module, weights):
            return model.task.forward(model.module, batch)

    return measure(
        model, changed, batches, session.divergence, progress=session.progress, stage="measure"
    )


def _weights(session: Session, changes: Changes) -> Changes:
    """What stands in for the original's weights where these changes are made."""
    return {name: partial(_with, session, name, change) for name, change in changes.items()}


def _with(session: Session, name: str, change: Callable[[], Tensor]) -> Tensor:
    return session.parameter(name) + change()


def _returned(
    session: Session,
    changes: Changes,
    batches: Sequence[Batch],
    predictions: int,
) -> dict[str, float]:
    """What halving each unit's error would return, by slope and curvature at the changed model."""
    model = session.model
    slopes = slopes_at(model, changes, 1.0, batches, session.divergence, progress=session.progress)
    (bent,) = probe(
        model,
        [changes],
        batches,
        session.divergence,
        seed=session.recipe.seed,
        draws=session.draws,
        progress=session.progress,
        weights=_weights(session, changes),
    )
    everywhere = session.predicts_everywhere
    taken = 1 - LEFT
    found = {}
    for name, slope in slopes.items():
        half = bent[name].independent if everywhere else bent[name].coherent
        found[name] = taken * float(slope.sum()) / predictions - taken**2 * half
    return found


def _responsible(
    session: Session,
    unit: Unit,
    own: Tensor,
    counts: np.ndarray,
    now: float,
    returned: float,
) -> Responsible:
    """Resampled over samples.

    Args:
        own: The unit's share of each sample's divergence, summed over its predictions.
        counts: Predictions of each sample.
    """
    per_prediction = own.numpy() / counts.mean()
    damage = bootstrap(per_prediction, np.arange(len(counts)), seed=session.recipe.seed)
    return Responsible(
        unit=unit.name,
        damage=damage,
        share=damage.value / now if now > 0 else 0.0,
        returned=returned,
        cost_bytes=-(-unit.n_weights // BITS_PER_BYTE),
    )


def _where(unit: Unit, changes: Changes) -> str:
    """Say in which head or rows of a unit its change lies."""
    change = changes[f"{unit.name}.weight"]()
    return where(change.reshape(unit.rows, unit.columns), unit.heads)


def _tried(
    session: Session,
    changes: Changes,
    batches: Sequence[Batch],
    now: float,
    found: Sequence[Responsible],
) -> list[Responsible]:
    """Halve the error of those that return most, one at a time, and measure."""
    ranked = sorted(found, key=lambda one: -one.returned)
    measured = {
        one.unit: _halved(session, changes, batches, now, [one.unit]) for one in ranked[:TRIED]
    }
    return [replace(one, measured=measured.get(one.unit)) for one in found]


def _together(
    session: Session,
    changes: Changes,
    batches: Sequence[Batch],
    now: float,
    found: Sequence[Responsible],
) -> tuple[Rollback, ...]:
    """Halve the errors of one, two, and more units together: those that return most per byte."""
    worth = [one for one in found if one.returned >= LEAST_RETURNED * now]
    ranked = sorted(worth, key=lambda one: -one.returned / one.cost_bytes)[:TRIED]
    rollbacks = []
    for count in range(1, len(ranked) + 1):
        chosen = ranked[:count]
        names = [one.unit for one in chosen]
        alone = chosen[0].measured if count == 1 else None
        rollbacks.append(
            Rollback(
                units=tuple(names),
                cost_bytes=sum(one.cost_bytes for one in chosen),
                predicted=sum(one.returned for one in chosen),
                measured=_halved(session, changes, batches, now, names) if alone is None else alone,
            )
        )
    return tuple(rollbacks)


def _halved(
    session: Session,
    changes: Changes,
    batches: Sequence[Batch],
    now: float,
    units: Sequence[str],
) -> float:
    """Measure what halving the errors of some units returns."""
    return session.finished.once(
        f"halved {' '.join(units)}",
        lambda: now - _measured_halved(session, changes, batches, units).mean_divergence,
    )


def _measured_halved(
    session: Session, changes: Changes, batches: Sequence[Batch], units: Sequence[str]
) -> Measured:
    names = {f"{unit}.weight" for unit in units}
    names |= {bias for unit in units if (bias := session.units.named(unit).bias)}
    halved = {
        name: partial(_half, change) if name in names else change
        for name, change in changes.items()
    }
    return _measured(session, halved, batches)


def _half(change: Callable[[], Tensor]) -> Tensor:
    return LEFT * change()
