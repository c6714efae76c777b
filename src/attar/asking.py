"""Which predictions are explained to compare two models' reasons, and along which path."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from attar.attribute.question import TEXT_STEPS, Asked, Way, explained_input
from attar.audit.fidelity import Measured, measure
from attar.records import Batch
from attar.session import Session

# Predictions explained, at most: one of a text or a recording is much more work than a picture's.
MOST = {"language": 16, "transcribe": 8}
MOST_OTHERWISE = 64
# Of a text, a prediction is explained by at least so many tokens and at most so many.
FEWEST_TOKENS, MOST_TOKENS = 8, 64


@dataclass(frozen=True)
class Prediction:
    """One that is explained.

    Attributes:
        sample: Number in the audit data.
        inputs: A batch of one, up to the prediction.
    """

    sample: int
    inputs: Batch
    asked: Asked
    changed: bool


def choose(session: Session, compressed: nn.Module) -> tuple[list[Prediction], float]:
    """Choose predictions, at most one of a sample, half of them changed ones where there are.

    Returns:
        predictions: In the order of their samples.
        share_changed: Of all that could have been chosen.
    """
    batches = [_beginning(session, batch) for batch in session.data.audit]
    task = session.model.task
    measured = measure(
        session.model,
        lambda batch: task.forward(compressed, batch),
        batches,
        session.divergence,
        progress=session.progress,
        stage="drift: answers",
    )
    places = _eligible(session, measured)
    changed = measured.answer_before != measured.answer_after
    most = MOST.get(task.name, MOST_OTHERWISE)
    chosen = _dealt(measured.sample, changed, places, most, session.recipe.seed)
    samples = [{name: t[n : n + 1] for name, t in b.items()} for b in batches for n in _rows(b)]
    return [
        _prediction(
            session,
            samples[measured.sample[i]],
            int(measured.sample[i]),
            int(measured.position[i]),
            bool(changed[i]),
        )
        for i in chosen
    ], float(changed[places].mean())


def _rows(batch: Batch) -> range:
    return range(len(next(iter(batch.values()))))


def _beginning(session: Session, batch: Batch) -> Batch:
    """Of texts the first tokens: a prediction does not depend on those after it."""
    if session.model.task.name != "language":
        return batch
    return {name: tensor[:, :MOST_TOKENS] for name, tensor in batch.items()}


def _eligible(session: Session, measured: Measured) -> np.ndarray:
    """Places of the predictions that have enough before them to be explained by."""
    if session.model.task.name != "language":
        return np.arange(len(measured.sample))
    first = min(FEWEST_TOKENS - 1, int(measured.position.max()))
    return np.flatnonzero(measured.position >= first)


def _dealt(
    sample: np.ndarray, changed: np.ndarray, places: np.ndarray, most: int, seed: int
) -> list[int]:
    """Changed predictions for half of the samples, others for the rest, and what is left over."""
    order = np.random.default_rng(seed).permutation(places)
    most = min(most, len(np.unique(sample[places])))
    taken: dict[int, int] = {}
    halves = ((changed, max(1, most // 2)), (~changed, most), (changed, most))
    for wanted, up_to in halves:
        for i in order[wanted[order]].tolist():
            if len(taken) >= up_to:
                break
            taken.setdefault(int(sample[i]), i)
    return [taken[number] for number in sorted(taken)]


def _prediction(
    session: Session, inputs: Batch, sample: int, position: int, changed: bool
) -> Prediction:
    if session.model.task.name == "language":
        inputs = {"tokens": inputs["tokens"][:, : position + 1]}
    elif "attention" in inputs:  # without what fills a sentence up to the longest
        attention = inputs["attention"][0] > 0
        n = int(attention.sum())
        if n and bool(attention[:n].all()):
            inputs = {name: tensor[:, :n] for name, tensor in inputs.items()}
    with torch.no_grad():
        own = session.model.task.forward(session.model.module, inputs)[0, position]
    asked = Asked(position, -1, normalize(own, dim=0))
    if session.divergence.family == "categorical":
        asked = Asked(position, int(own.argmax()))
    return Prediction(sample, inputs, asked, changed)


def name_of(session: Session, one: Prediction) -> str:
    """Name a prediction for people."""
    names = session.data.shown
    if session.model.task.name == "classify" and one.sample < len(names):
        return names[one.sample]
    token = f", token {one.asked.position}" if session.predicts_everywhere else ""
    return f"sample {one.sample}{token}"


def way_of(session: Session) -> Way:
    """Choose where explanations start: of tables at the means of the columns, else at zeros."""
    if session.model.task.name == "language":
        return Way(kept=1, steps=TEXT_STEPS)
    if not _is_table(session):
        return Way()
    name = explained_input(session.data.audit[0])
    return Way(torch.cat([batch[name] for batch in session.data.calibration]).mean(0))


def _is_table(session: Session) -> bool:
    first = session.data.audit[0][explained_input(session.data.audit[0])]
    return first.dim() == 2 and first.is_floating_point()


def method_of(session: Session) -> str:
    """Say what is explained and how."""
    first = session.data.audit[0][explained_input(session.data.audit[0])]
    path = "over the numbers of the input, from zeros"
    if not first.is_floating_point():
        path = "over the vectors of the tokens, summed for each token, from zeros"
        if way_of(session).kept:
            path += " (but the first token, on which attention rests, stays)"
    elif _is_table(session):
        path = "over the columns, from their means in the calibration data"
    elif first.dim() == 4:
        path = "over the pixels, summed over channels, from a picture of zeros (grey)"
    what = "the output, along the original's own"
    if session.divergence.family == "categorical":
        what = "the log-probability of the original's most likely answer"
    return f"integrated gradients of {what}, {path}, {way_of(session).steps} steps"
