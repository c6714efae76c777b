"""What two models have concepts of: one dictionary of the original's activations, used for both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from attar import concept_slices
from attar.attribute.question import Explained, explained_input
from attar.audit import concepts as checks
from attar.audit.fidelity import Measured
from attar.concept_slices import Known, size
from attar.explain.dictionary import Dictionary, learn
from attar.inputs import read_tokenizer
from attar.records import Concept, ConceptRow, Concepts, Unit
from attar.session import Session, state_hash

# Concepts looked for, and vectors to each at least, so that they are not of one sample alone.
MOST_CONCEPTS, VECTORS_EACH = 32, 8
# Vectors that are taken apart in all, and of one sample.
MOST_VECTORS, EACH_SAMPLE = 4096, 64
# A place has at least so many features.
FEWEST_FEATURES = 8
# Concepts told of, those that changed most, and where each is met most.
SHOWN, EXAMPLES = 6, 4


@dataclass(frozen=True)
class Place:
    """Activations that enter a unit, taken apart.

    Attributes:
        before: Strengths in the original, `vectors concepts`.
        where: Sample and position of each vector.
    """

    unit: Unit
    dictionary: Dictionary
    before: np.ndarray
    where: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Met:
    """Strengths of the concepts of each place in one model; None where it has no such place."""

    role: str
    model: str
    after: tuple[np.ndarray | None, ...]


def find_places(session: Session, original: Explained) -> list[Place]:
    """Learn what is met half-way through the network and where its answer is read from."""
    found = session.finished.once(
        "concepts", lambda: [tuple(vars(one).values()) for one in _places(session, original)]
    )
    return [Place(*one) for one in found]


def _places(session: Session, original: Explained) -> list[Place]:
    units = [unit for unit in session.units if _is_place(unit)]
    chosen = {unit.name: unit for unit in (units[len(units) // 2 :][:1] + units[-1:])}
    found = []
    for name, vectors in _vectors(session, original, chosen).items():
        n = min(MOST_CONCEPTS, len(vectors.where) // VECTORS_EACH)
        if n >= 2:
            dictionary = learn(vectors.values, n, session.recipe.seed)
            met = dictionary.strengths(vectors.values).any(0)
            dictionary = replace(dictionary, directions=dictionary.directions[met])
            before = dictionary.strengths(vectors.values)
            found.append(Place(chosen[name], dictionary, before, vectors.where))
    return found


def _is_place(unit: Unit) -> bool:
    """Whether what enters a unit is a vector at each position."""
    dense = "linear" in unit.uses or (unit.kind == "convolution" and unit.groups == 1)
    return dense and unit.shape[1] >= FEWEST_FEATURES


def met(session: Session, places: Sequence[Place], role: str, model: Explained) -> Met:
    """Ask another model for the same concepts."""
    theirs = dict(model.module.named_parameters())
    same = {
        place.unit.name: place.unit
        for place in places
        if (weight := theirs.get(f"{place.unit.name}.weight")) is not None
        and weight.shape[1] == place.unit.shape[1]
    }
    after = session.finished.once(
        f"concepts of {role}", partial(_strengths, session, places, model, same)
    )
    return Met(role, model.name, after)


def _strengths(
    session: Session, places: Sequence[Place], model: Explained, same: Mapping[str, Unit]
) -> tuple[np.ndarray | None, ...]:
    found = _vectors(session, model, same)
    return tuple(
        place.dictionary.strengths(found[place.unit.name].values)
        if place.unit.name in found and found[place.unit.name].where == place.where
        else None
        for place in places
    )


def known(session: Session, places: Sequence[Place]) -> list[Known]:
    """What another run needs to find the samples that have a concept."""
    model, n = state_hash(session.model.module), _n_samples(session)
    return [
        Known(
            place.unit.name,
            place.dictionary,
            concept_slices.least_of(concept_slices.strongest(place.before, place.where, n)),
            _most(session),
            model,
        )
        for place in places
    ]


def compared(
    session: Session, places: Sequence[Place], models: Sequence[Met], measured: Measured | None
) -> list[Concepts]:
    """Say for each place what became of its concepts, in rows from the floor to the ceiling."""
    found = []
    for number, place in enumerate(places):
        rows = []
        own: np.ndarray | None = None
        for model in models:
            after = model.after[number]
            if after is not None:
                rows.append(_row(place.before, after, model))
                own = after if model.role == "compressed" else own
        if own is not None:
            found.append(_concepts(session, place, own, rows, measured))
    return found


def _row(before: np.ndarray, after: np.ndarray, model: Met) -> ConceptRow:
    return ConceptRow(
        role=model.role,
        model=model.model,
        kept=float(np.clip(checks.kept(before, after), 0.0, 1.0).mean()),
        n_lost=int(checks.lost(before, after).sum()),
        n_merged=len(checks.merged(before, after)),
    )


def _concepts(
    session: Session,
    place: Place,
    after: np.ndarray,
    rows: Sequence[ConceptRow],
    measured: Measured | None,
) -> Concepts:
    before = place.before
    peaks = concept_slices.strongest(before, place.where, _n_samples(session))
    has = peaks >= concept_slices.least_of(peaks)
    kept, ratio = checks.kept(before, after), checks.strength_ratio(before, after)
    gone = checks.lost(before, after)
    pairs = checks.merged(before, after)[:SHOWN]
    told = sorted(range(len(kept)), key=lambda k: float(kept[k]))[:SHOWN]
    named = {k: _examples(session, place, k) for k in {*told, *(k for pair in pairs for k in pair)}}
    return Concepts(
        unit=place.unit.name,
        n_concepts=len(kept),
        n_vectors=len(before),
        rows=tuple(rows),
        moved=tuple(
            Concept(
                k,
                named[k],
                float(max(0.0, kept[k])),
                float(ratio[k]),
                bool(gone[k]),
                n_samples=int(has[:, k].sum()),
                divergence=_lost_there(measured, has[:, k]),
            )
            for k in told
        ),
        merged=tuple((named[i], named[j]) for i, j in pairs),
    )


def _lost_there(measured: Measured | None, has: np.ndarray) -> float | None:
    """Mean nats of the predictions of some samples."""
    return None if measured is None else float(measured.divergence[has[measured.sample]].mean())


def _vectors(
    session: Session, model: Explained, units: Mapping[str, Unit]
) -> dict[str, concept_slices.Vectors]:
    """What enters each unit, at some positions of every audit sample."""
    batches = session.data.audit
    return concept_slices.activations(session, model, list(units), batches, _most(session))


def _most(session: Session) -> int:
    """Positions of each sample that are looked at."""
    return max(1, min(EACH_SAMPLE, MOST_VECTORS // _n_samples(session)))


def _n_samples(session: Session) -> int:
    return sum(size(batch) for batch in session.data.audit)


def _examples(session: Session, place: Place, concept: int) -> tuple[str, ...]:
    """Where a concept is met most: words of texts, else names of samples."""
    strengths = place.before[:, concept]
    order = np.argsort(-strengths, kind="stable")[: 4 * EXAMPLES]
    words = (_word(session, *place.where[i]) for i in order if strengths[i] > 0)
    return tuple(word for word, _ in Counter(words).most_common(EXAMPLES))


def _word(session: Session, sample: int, position: int) -> str:
    """Name a place for people: the token read there, or the sample."""
    files, names = session.model.files, session.data.shown
    samples = [(batch, n) for batch in session.data.audit for n in range(size(batch))]
    batch, own = samples[sample]
    tokens = batch[explained_input(batch)]
    if not tokens.is_floating_point() and tokens.dim() == 2 and position < tokens.shape[1]:
        token = int(tokens[own, position])
        known = "tokenizer.json" in files
        return read_tokenizer(files).decode([token]) if known else f"token {token}"
    return names[sample] if sample < len(names) else f"sample {sample}"
