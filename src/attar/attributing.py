"""Which units' changes made the divergence, and what giving some of them more bits would return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from attar.audit.fidelity import bootstrap, measure
from attar.errors import DataError
from attar.explain.attribution import shares_of, slopes_at
from attar.explain.probe import Changes, probe
from attar.load.fold import fold_batch_norm
from attar.records import Batch, Model, Responsible, Unit, Verdict
from attar.session import Session
from attar.sites import substituted

# Samples that responsibility is found on, at most; of a language model, sequences.
SAMPLES, SEQUENCES = 64, 4
# Units for which what is returned is measured too: those that return most.
TRIED = 5
# What is left of a unit's error with one bit more.
LEFT = 0.5
BITS_PER_BYTE = 8


def with_attribution(session: Session, other: Model, verdict: Verdict) -> Verdict:
    """Add who is responsible, most first, to a verdict.

    Raises:
        DataError: No unit of the original has a counterpart of the same shape that differs.
    """
    with session.timed("attribute"):
        changes = _changes(session, _folded(other))
        batches = _batches(session)
        shares = shares_of(
            session.model, changes, batches, session.divergence, progress=session.progress
        )
        now = _divergence(session, changes, batches)
        predictions = _predictions(session, batches)
        returned = _returned(session, changes, batches, sum(predictions))
        found = [
            _responsible(session, session.units.named(name), own, predictions, now, returned[name])
            for name, own in shares.items()
        ]
        found = _tried(session, changes, batches, now, found)
    explained = sum(one.damage.value for one in found)
    return replace(
        verdict,
        responsible=tuple(sorted(found, key=lambda one: -one.damage.value)),
        unattributed=1 - explained / now if now > 0 else 0.0,
    )


def _folded(other: Model) -> nn.Module:
    """The other with its norms folded as the original's are; its own weights where none can be."""
    return fold_batch_norm(other.module, other.examples, other.task.forward)[0]


def _changes(session: Session, other: nn.Module) -> Changes:
    """Parameter name to its change, for all that changed."""
    theirs = dict(other.named_parameters())
    names = [f"{unit.name}.weight" for unit in session.units]
    names += [unit.bias for unit in session.units if unit.bias]
    changes: dict[str, Callable[[], Tensor]] = {}
    for name in names:
        own = session.model.module.get_parameter(name)
        if name in theirs and theirs[name].shape == own.shape:
            change = partial(_change, session, name, theirs[name])
            if bool(change().any()):
                changes[name] = change
    if not any(name.endswith(".weight") for name in changes):
        raise DataError(
            "no layer of the compressed model has a counterpart in the original that differs.",
            hint="leave --attribute out; it follows weights of the same names and shapes.",
        )
    return changes


def _change(session: Session, name: str, theirs: Tensor) -> Tensor:
    return (theirs.detach().float() - session.parameter(name)).reshape(theirs.shape)


def _batches(session: Session) -> Sequence[Batch]:
    """The first few samples of the audit data."""
    left = SEQUENCES if session.predicts_everywhere else SAMPLES
    chosen: list[Batch] = []
    for batch in session.data.audit:
        if left <= 0:
            break
        chosen.append({name: tensor[:left] for name, tensor in batch.items()})
        left -= len(next(iter(batch.values())))
    return chosen


def _predictions(session: Session, batches: Sequence[Batch]) -> list[int]:
    """How many each sample has."""
    counts: list[int] = []
    for batch in batches:
        if "mask" in batch:
            counts += batch["mask"].sum(1).tolist()
        else:
            with torch.no_grad():
                shape = session.model.task.forward(session.model.module, batch).shape
            counts += [shape[1]] * shape[0]
    return counts


def _divergence(session: Session, changes: Changes, batches: Sequence[Batch]) -> float:
    """Of the model with these changes made."""
    model, weights = session.model, _weights(session, changes)

    def changed(batch: Batch) -> Tensor:
        with substituted(model.module, weights):
            return model.task.forward(model.module, batch)

    found = measure(
        model, changed, batches, session.divergence, progress=session.progress, stage="measure"
    )
    return found.mean_divergence


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
    predictions: Sequence[int],
    now: float,
    returned: float,
) -> Responsible:
    """Resampled over samples, each with its mean over its predictions."""
    counts = torch.tensor(predictions, dtype=torch.float64)
    per_prediction = (own / counts.mean()).numpy()
    place = torch.arange(len(predictions)).numpy()
    damage = bootstrap(per_prediction, place, seed=session.recipe.seed)
    return Responsible(
        unit=unit.name,
        damage=damage,
        share=damage.value / now if now > 0 else 0.0,
        returned=returned,
        cost_bytes=-(-unit.n_weights // BITS_PER_BYTE),
    )


def _tried(
    session: Session,
    changes: Changes,
    batches: Sequence[Batch],
    now: float,
    found: Sequence[Responsible],
) -> list[Responsible]:
    """Halve the error of those that return most, one at a time, and measure."""
    ranked = sorted(found, key=lambda one: -one.returned)
    measured = {}
    for one in ranked[:TRIED]:
        weight, bias = f"{one.unit}.weight", session.units.named(one.unit).bias
        halved = {
            name: partial(_half, change) if name in (weight, bias) else change
            for name, change in changes.items()
        }
        measured[one.unit] = now - _divergence(session, halved, batches)
    return [replace(one, measured=measured.get(one.unit)) for one in found]


def _half(change: Callable[[], Tensor]) -> Tensor:
    return LEFT * change()
