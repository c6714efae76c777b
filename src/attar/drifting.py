"""Whether two models give the same reasons for their answers, between a floor and a ceiling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attar import concept_slices, concepts
from attar.asking import Prediction, choose, method_of, name_of, way_of
from attar.attribute.faithfulness import reordered
from attar.attribute.integrated_gradients import integrated_gradients
from attar.attribute.question import Asked, Explained, Question, explained_input
from attar.attribute.units import unit_relevance
from attar.audit.drift import compare, means, stratified
from attar.audit.fidelity import Measured
from attar.audit.policy import Policy
from attar.errors import DataError, SettingError
from attar.export.run import class_names
from attar.inputs import read_tokenizer
from attar.load.fold import fold_batch_norm
from attar.load.folder import is_attar_folder
from attar.matching import Matched, match
from attar.memory import release
from attar.parallel import in_order
from attar.records import (
    Batch,
    Drift,
    DriftRow,
    Model,
    Recipe,
    SideBySide,
    Unit,
    UnitShare,
    Verdict,
)
from attar.session import Session
from attar.transform.quantize_rtn import QuantizeRtn

# Explanations put side by side, and the cells of a side of their maps, at most.
SHOWN, CELLS = 4, 32
FLOOR = "the original in 8 bits"
CEILING = "the original, each weight's numbers shuffled"
LEAVE_OUT_OTHER = "leave --drift out; it explains the same answers of both."
LEAVE_OUT = "leave --drift out; it explains answers by their gradients."


def recipe_of(reference: str, like: Recipe) -> Recipe:
    """Ask for the reference as for the compressed model."""
    factory = like.factory if is_attar_folder(Path(reference)) else None
    return replace(like, model=reference, factory=factory)


def check_asked(policy: Policy | None, *, drift: bool, reference: bool) -> None:
    """Refuse what needs drift where it was not asked for.

    Raises:
        SettingError: A reference, or a limit of the policy.
    """
    if drift:
        return
    if reference:
        raise SettingError(
            "a reference is shown beside the drift, and no drift was asked for.",
            hint="add --drift.",
        )
    if policy is not None and "drift" in policy.limits:
        raise SettingError(
            f"{policy.name} limits drift, and no drift was asked for.", hint="add --drift."
        )


def check_models(session: Session, other: Model, reference: Model | None) -> None:
    """Refuse models that cannot be explained or compared, before long work.

    Raises:
        DataError: A graph without gradients, or a reference that answers another question.
    """
    for model in (session.model, other, reference):
        if model is not None and model.architecture.builder == "onnx":
            raise DataError(
                f"{model.name} is a graph of ONNX or OpenVINO: no gradients to explain answers by.",
                hint="audit the folder that Attar writes with --to attar, or leave --drift out.",
            )
        matched = Matched() if model is None else match(session, model)
        if model is not None and matched.renumbering is not None:
            raise DataError(
                f"the tokenizers of {session.model.name} and {model.name} differ.",
                hint=LEAVE_OUT_OTHER,
            )
        if model is not None and matched.own is not None:
            raise DataError(
                f"{model.name} shares some of the answers of {session.model.name} alone.",
                hint=LEAVE_OUT_OTHER,
            )


def with_drift(
    session: Session,
    other: Model,
    verdict: Verdict,
    reference: Model | None = None,
    measured: Measured | None = None,
) -> Verdict:
    """Add how far the explanations moved to a verdict; nothing where an answer is no number.

    Args:
        measured: What was measured on the audit data, to say what samples with a concept lost.

    Raises:
        DataError: No gradient reaches the input, or one is not finite.
    """
    if not np.isfinite(verdict.divergence.value):
        session.progress.note("drift is left out: some answers of the compressed model are NaN.")
        return verdict
    with session.timed("drift"):
        module = fold_batch_norm(other.module, other.examples, other.task.forward)[0]
        compressed = Explained(other.name, session.model.task, module.requires_grad_(False))
        predictions, share_changed = choose(session, compressed.module)
        before = _explained(session, _original(session), predictions, "original")
        changed = np.array([one.changed for one in predictions])
        rows, after = [], before
        places = concepts.find_places(session, _original(session))
        met = []
        for role, model in _models(session, compressed, reference):
            found = _explained(session, model, predictions, role)
            pairs = _compared(session, before, found)
            rows.append(_row(role, model.name, pairs, changed, share_changed, session.recipe.seed))
            if role == "compressed":
                after = found
            if role != "reference":  # another training has directions of its own
                met.append(concepts.met(session, places, role, model))
        drift = Drift(
            method=method_of(session),
            n_stayed=int((~changed).sum()),
            n_changed=int(changed.sum()) if session.model.task.family == "categorical" else None,
            share_changed=share_changed,
            completeness_gap=session.finished.once(
                "completeness", partial(_gap, session, predictions, before)
            ),
            rows=tuple(rows),
            units=_units(session, compressed, predictions),
            shown=_shown(session, predictions, before, after),
            concepts=tuple(concepts.compared(session, places, met, measured)),
            dictionaries=concept_slices.to_file(concepts.known(session, places)),
        )
    return replace(verdict, drift=drift)


def _original(session: Session) -> Explained:
    return Explained(session.model.name, session.model.task, session.model.module)


def _models(
    session: Session, compressed: Explained, reference: Model | None
) -> Iterator[tuple[str, Explained]]:
    """What the original is compared with, each made when it is asked for."""
    original = _original(session)
    yield "floor", replace(original, name=FLOOR, weights=_stand_ins(session, _rounded))
    yield "compressed", compressed
    if reference is not None:
        yield "reference", Explained(reference.name, reference.task, reference.module)
    draws = torch.Generator().manual_seed(session.recipe.seed)
    seeds = torch.randint(2**31, (len(session.units.units),), generator=draws).tolist()
    own = dict(zip((unit.name for unit in session.units), seeds, strict=True))
    shuffled = partial(_shuffled, seeds=own)
    yield "ceiling", replace(original, name=CEILING, weights=_stand_ins(session, shuffled))


def _stand_ins(
    session: Session, make: Callable[[Session, Unit], Tensor]
) -> Mapping[str, Callable[[], Tensor]]:
    """Other weights of all units: held, or where the original lies on disk, made at each use."""
    found = {}
    for unit in session.units:
        build = partial(make, session, unit)
        found[f"{unit.name}.weight"] = build if session.on_disk else _held(build())
    return found


def _held(weight: Tensor) -> Callable[[], Tensor]:
    return lambda: weight


def _rounded(session: Session, unit: Unit) -> Tensor:
    treatment = QuantizeRtn(bits=8, group_size=0, search=False)
    return treatment.apply(session.weight(unit), None).dense.reshape(unit.shape)


def _shuffled(session: Session, unit: Unit, seeds: Mapping[str, int]) -> Tensor:
    return reordered(session.weight(unit), seeds[unit.name]).reshape(unit.shape)


def _explained(
    session: Session, model: Explained, predictions: Sequence[Prediction], role: str
) -> list[np.ndarray]:
    """Explain each prediction; pictures as a map, summed over their channels."""
    way, once = way_of(session), session.finished.once

    def explain(one: Prediction) -> np.ndarray:
        parts = integrated_gradients(model, one.inputs, one.asked, way).double()
        if not bool(parts.isfinite().all()):
            raise DataError(
                f"the explanation of {name_of(session, one)} by {model.name} is not finite.",
                hint=LEAVE_OUT,
            )
        is_picture = one.inputs[explained_input(one.inputs)].dim() == 4
        if not is_picture and session.model.task.name != "transcribe":  # a spectrogram is a map
            parts = parts.flatten()
        release()
        return parts.numpy()

    found = []
    with session.progress.stage(f"explain {model.name}", len(predictions)) as advance:
        steps = [
            partial(once, f"prediction {number} explained by {role}", partial(explain, one))
            for number, one in enumerate(predictions)
        ]
        for one in in_order(lambda step: step(), steps):
            found.append(one)
            advance(1)
    return found


def _compared(
    session: Session, before: Sequence[np.ndarray], after: Sequence[np.ndarray]
) -> list[dict[str, float]]:
    """Hold explanations against each other; what the path leaves as it is has no part in them."""
    kept = way_of(session).kept
    return [compare(one[kept:], two[kept:]) for one, two in zip(before, after, strict=True)]


def _gap(
    session: Session, predictions: Sequence[Prediction], before: Sequence[np.ndarray]
) -> float:
    """How far the original's parts are from summing to what they should."""
    original, way = _original(session), way_of(session)

    def change(one: Prediction) -> float:
        return Question(original, one.inputs, one.asked, way).whole_change()

    whole = np.array(list(in_order(change, predictions)))
    sums = np.array([parts.sum() for parts in before])
    size = float(np.abs(whole).mean())
    return float(np.abs(sums - whole).mean()) / size if size > 0 else 0.0


def _row(
    role: str,
    model: str,
    pairs: Sequence[Mapping[str, float]],
    changed: np.ndarray,
    share_changed: float,
    seed: int,
) -> DriftRow:
    stayed, moved = (
        [pair for pair, own in zip(pairs, changed, strict=True) if own == wanted]
        for wanted in (False, True)
    )
    every = stratified(pairs, changed, share_changed, seed)
    return DriftRow(role, model, every, means(stayed, seed), means(moved, seed))


def _units(
    session: Session, compressed: Explained, predictions: Sequence[Prediction]
) -> tuple[UnitShare, ...]:
    """Share of the relevance of each unit in both models, those that fell most first."""
    theirs = {name for name, _ in compressed.module.named_parameters()}
    names = [unit.name for unit in session.units if f"{unit.name}.weight" in theirs]
    if len(names) < len(session.units.units):
        session.progress.note(
            f"{len(session.units.units) - len(names)} layers have no counterpart of their name in "
            "the compressed model: shares of relevance leave them out."
        )
    shares = []
    for role, model in (("original", _original(session)), ("compressed", compressed)):
        make = partial(_relevance, model, names, predictions)
        sums = session.finished.once(f"relevance of units in the {role}", make)
        shares.append(sums / sums.sum() if sums.any() else sums)
    found = [UnitShare(n, float(b), float(a)) for n, b, a in zip(names, *shares, strict=True)]
    return tuple(sorted(found, key=lambda one: one.after - one.before))


def _relevance(
    model: Explained, names: Sequence[str], predictions: Sequence[Prediction]
) -> np.ndarray:
    found = np.array(list(in_order(partial(_relevance_of, model, names), predictions)))
    return np.asarray(found.sum(0))


def _relevance_of(model: Explained, names: Sequence[str], one: Prediction) -> list[float]:
    found = unit_relevance(model, one.inputs, one.asked, set(names))
    release()
    return [found.get(name, 0.0) for name in names]


# --- side by side


def _shown(
    session: Session,
    predictions: Sequence[Prediction],
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
) -> tuple[SideBySide, ...]:
    """Texts and pictures; changed predictions first, then those whose reasons moved most."""
    first = session.data.audit[0][explained_input(session.data.audit[0])]
    if first.is_floating_point() and first.dim() != 4:
        return ()
    alike = [one["rank_correlation"] for one in _compared(session, before, after)]
    order = sorted(range(len(alike)), key=lambda i: (not predictions[i].changed, alike[i]))
    return tuple(
        SideBySide(
            sample=name_of(session, predictions[i]),
            answer=_answer(session, predictions[i].asked),
            changed=predictions[i].changed,
            rank_correlation=alike[i],
            tokens=_tokens(session, predictions[i].inputs),
            before=_coarse(before[i]),
            after=_coarse(after[i]),
        )
        for i in order[:SHOWN]
    )


def _answer(session: Session, asked: Asked) -> str:
    if asked.direction is not None:
        return "the original's own output"
    files = session.model.files
    if session.model.task.name == "language":
        if "tokenizer.json" not in files:
            return f"token {asked.answer}"
        return read_tokenizer(files).decode([asked.answer])
    with torch.no_grad():
        width = session.model.task.forward(session.model.module, session.model.examples).shape[-1]
    return class_names(files, width)[asked.answer]


def _tokens(session: Session, inputs: Batch) -> tuple[str, ...]:
    tokens = inputs[explained_input(inputs)]
    if tokens.is_floating_point():
        return ()
    if "tokenizer.json" not in session.model.files:
        return tuple(f"{token} " for token in tokens[0].tolist())
    tokenizer = read_tokenizer(session.model.files)
    return tuple(tokenizer.decode([token]) for token in tokens[0].tolist())


def _coarse(parts: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Parts as shares of their size, a map summed into few cells."""
    shares = parts / (np.abs(parts).sum() or 1.0)
    if shares.ndim == 2:
        block = -(-max(shares.shape) // CELLS)
        edges = [(0, -side % block) for side in shares.shape]
        rows, columns = (-(-side // block) for side in shares.shape)
        shares = np.pad(shares, edges).reshape(rows, block, columns, block).sum((1, 3))
    return tuple(tuple(float(f"{v:.5g}") for v in row) for row in np.atleast_2d(shares))
