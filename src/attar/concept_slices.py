"""A concept as a slice of the data: the samples in which the original meets it most.

An audit finds concepts in one pass over its own data. So that another run can protect one, the
dictionary is written beside the report, with how strong each concept is in the samples that have
it: a tenth of those of the audit, by their strongest place. Samples of other data are held to that.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attar.attribute.question import Explained
from attar.errors import DataError, SettingError
from attar.explain.dictionary import Dictionary
from attar.records import Batch
from attar.session import Session, state_hash
from attar.sites import Call, substituted, watched

CONCEPT = "concept="
FILE_NAME = "concepts.npz"
# Share of the audit's samples that have a concept: as few as still are a slice.
SHARE = 0.1
# What samples are called that have none of the concepts that were asked for.
REST = "no protected concept"
LINE = "concept=FOLDER:UNIT:NUMBER:NATS, as the page of attar audit --drift --report FOLDER says it"


@dataclass(frozen=True)
class Vectors:
    """Activations, `vectors features`, and the sample and position of each."""

    values: np.ndarray
    where: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Known:
    """Concepts of what enters one unit, as they were written.

    Attributes:
        least: Strength from which on a sample has each concept; > 0, infinite where none has it.
        most: Positions of a sample that are looked at.
        model: Hash of the original's weights.
    """

    unit: str
    dictionary: Dictionary
    least: np.ndarray
    most: int
    model: str


def activations(
    session: Session, model: Explained, units: Sequence[str], batches: Sequence[Batch], most: int
) -> dict[str, Vectors]:
    """What enters each unit, at no more than `most` positions of every sample."""
    found: dict[str, list[Vectors]] = {name: [] for name in units}
    now: list[tuple[Batch, int]] = []

    def visit(call: Call) -> Tensor:
        name = call.name.removesuffix(".weight")
        if name in found and call.operation != "embedding":
            found[name].append(_at_some(call, *now[-1], most))
        return call.run()

    stage = session.progress.stage(f"concepts of {model.name}", len(batches))
    with (
        torch.no_grad(),
        stage as advance,
        substituted(model.module, model.weights),
        watched(model.module, visit),
    ):
        first = 0
        for batch in batches:
            now.append((batch, first))
            model.task.forward(model.module, batch)
            first += size(batch)
            advance(1)
    return {name: _joined(parts) for name, parts in found.items() if parts}


def size(batch: Batch) -> int:
    """Samples of a batch."""
    return len(next(iter(batch.values())))


def _at_some(call: Call, batch: Batch, first: int, most: int) -> Vectors:
    """Vectors at evenly spread positions of each sample, but for those that are filled up."""
    x = call.input.detach()
    if call.operation == "convolution":
        x = x.flatten(2).transpose(1, 2)
    samples = size(batch)
    x = x.reshape(samples, -1, x.shape[-1]) if x.numel() % samples == 0 else x[:0]
    filled = batch.get("attention")
    places = []
    for sample in range(len(x)):
        positions = torch.arange(x.shape[1])
        if filled is not None and filled.shape == x.shape[:2]:
            positions = positions[filled[sample] != 0]
        step = max(1, -(-len(positions) // most))
        places += [(sample, int(position)) for position in positions[::step]]
    chosen = [x[place] for place in places]
    values = torch.stack(chosen) if chosen else x.new_zeros(0, x.shape[-1])
    return Vectors(values.double().numpy(), [(first + n, at) for n, at in places])


def _joined(parts: Sequence[Vectors]) -> Vectors:
    values = np.concatenate([part.values for part in parts])
    return Vectors(values, [place for part in parts for place in part.where])


def strongest(
    strengths: np.ndarray, where: Sequence[tuple[int, int]], n_samples: int
) -> np.ndarray:
    """How strong each concept is at the strongest place of each sample, `samples concepts`."""
    found = np.zeros((n_samples, strengths.shape[1]))
    np.maximum.at(found, np.array([sample for sample, _ in where], dtype=int), strengths)
    return found


def least_of(peaks: np.ndarray) -> np.ndarray:
    """Strength that a tenth of the samples reach, of each concept; never 0.

    Args:
        peaks: From `strongest`.
    """
    count = max(1, round(SHARE * len(peaks)))
    least = -np.sort(-peaks, axis=0)[count - 1]
    # Met in fewer: in all those that meet it.
    smallest = np.where(peaks > 0, peaks, np.inf).min(0)
    return np.asarray(np.where(least > 0, least, smallest))


# --- the file


def to_file(places: Sequence[Known]) -> bytes:
    """The same bytes for the same concepts."""
    arrays: dict[str, np.ndarray] = {}
    for number, one in enumerate(places):
        words = {"unit": np.array(one.unit), "model": np.array(one.model)}
        own = vars(one.dictionary) | words | {"least": one.least, "most": np.array(one.most)}
        arrays |= {f"{number}.{name}": np.asarray(value) for name, value in own.items()}
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **arrays)
    return file.getvalue()


def read_file(folder: str) -> list[Known]:
    """Read what an audit wrote beside its report.

    Raises:
        DataError: It is not there, or something else.
    """
    path = Path(folder) / FILE_NAME
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            count = len({name.partition(".")[0] for name in held})
            return [_known(held, number) for number in range(count)]
    except FileNotFoundError:
        problem = f"there is no {path}, which says what the concepts are."
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        AttributeError,
        TypeError,
        zipfile.BadZipFile,
    ) as error:
        problem = f"{path} cannot be read: {error}."
    hint = f"type attar audit ORIGINAL COMPRESSED --drift --report {folder}"
    raise DataError(problem, hint=hint)


def _known(held: Mapping[str, np.ndarray], number: int) -> Known:
    own = {
        name: held[f"{number}.{name}"]
        for name in ("unit", "model", "spread", "offset", "directions", "least", "most")
    }
    dictionary = Dictionary(own["spread"], own["offset"], own["directions"])
    if own["directions"].shape != (len(own["least"]), len(own["spread"])):
        raise ValueError("its parts do not fit together")
    return Known(str(own["unit"]), dictionary, own["least"], int(own["most"]), str(own["model"]))


# --- samples of other data


def parts(label: str) -> tuple[str, str, int]:
    """Folder, unit and number of a label "concept=FOLDER:UNIT:NUMBER".

    Raises:
        SettingError: It is none.
    """
    folder, unit, number = ("", *label.removeprefix(CONCEPT).rsplit(":", 2))[-3:]
    if not folder or not unit or not number.isdecimal():
        raise SettingError(f"{label} names no concept.", hint=f"type --protect {LINE}.")
    return folder, unit, int(number)


def label_samples(session: Session, labels: Sequence[str], batches: Sequence[Batch]) -> list[str]:
    """Label each sample by the concept, of those that are asked for, that it exceeds most.

    Raises:
        DataError: The file is not of this model, or has no such concept.
    """
    original = Explained(session.model.name, session.model.task, session.model.module)
    known = [_asked_for(session, label) for label in labels]
    ratios = []
    for place, number in known:
        found = activations(session, original, [place.unit], batches, place.most)[place.unit]
        strengths = place.dictionary.strengths(found.values)
        peaks = strongest(strengths, found.where, sum(size(batch) for batch in batches))
        ratios.append(peaks[:, number] / place.least[number])
    order = np.array(ratios)
    best = order.argmax(0)
    return [labels[k] if order[k, n] >= 1 else REST for n, k in enumerate(best.tolist())]


def _asked_for(session: Session, label: str) -> tuple[Known, int]:
    folder, unit, number = parts(label)
    places = {one.unit: one for one in read_file(folder)}
    if unit not in places:
        raise DataError(
            f"{folder} has no concepts of what enters {unit}.",
            hint=f"there are those of {', '.join(places) or 'nothing'}.",
        )
    place = places[unit]
    if place.model != state_hash(session.model.module):
        raise DataError(
            f"the concepts in {folder} are those of another model than {session.model.name}.",
            hint=f"type attar audit {session.recipe.model} COMPRESSED --drift --report {folder}",
        )
    if number >= len(place.least) or not np.isfinite(place.least[number]):
        raise DataError(
            f"{folder} has no concept {number} of what enters {unit}.",
            hint=f"they are numbered from 0 to {len(place.least) - 1}.",
        )
    return place, number
