"""Calibration, recovery and audit data that never overlap, in batches of bounded output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attar.errors import DataError, SettingError
from attar.load.pictures import picture_splits
from attar.load.sound import sound_splits
from attar.load.splits import Counts, Splits, into_batches
from attar.load.tensors import TENSOR_SUFFIXES, tensor_splits
from attar.load.text import language_splits, sentence_splits
from attar.records import Data

if TYPE_CHECKING:
    from attar.records import Model, Progress

OUTPUTS_PER_BATCH_BYTES = 64 * 2**20  # of float32 outputs: several copies of them live at once
FLOAT_BYTES = 4
# Samples per batch at most, so that activations stay small too.
MOST_SAMPLES: Mapping[str, int] = {"language": 8, "transcribe": 2, "classify": 8, "embed": 32}
MOST_SAMPLES_OTHERWISE = 32
DEFAULT_COUNTS: Mapping[str, Counts] = {
    "language": Counts(16_384, 4_096, 8_192),  # tokens
    "classify": Counts(64, 32, 64),  # pictures
    "embed": Counts(256, 64, 128),  # sentences
}


@dataclass(frozen=True)
class DataSizes:
    """How much data is used. Left out: the default of the task.

    Attributes:
        calibration: Tokens of a language model, samples of any other; > 0.
        recovery: The same.
        audit: The same.
        sequence_length: Tokens per sequence of a language model, >= 8.
        more: Of what is in none of the three, at most: to learn from.
    """

    calibration: int | None = None
    recovery: int | None = None
    audit: int | None = None
    sequence_length: int = 256
    more: int = 0

    def __post_init__(self) -> None:
        if self.sequence_length < 8:
            raise SettingError(
                f"sequence_length is {self.sequence_length}; sequences have 8 tokens or more.",
                hint="leave sequence_length at 256",
            )

    def counts(self, task: str, default: Counts | None) -> Counts | None:
        """Counts for a task; None where the task takes what there is.

        Raises:
            SettingError: Some counts are given and some not, for a task without defaults.
        """
        given = (self.calibration, self.recovery, self.audit)
        if given == (None, None, None):
            return None if default is None else replace(default, more=self.more)
        presets = default.as_tuple() if default is not None else (None, None, None)
        calibration, recovery, audit = (
            preset if count is None else count for count, preset in zip(given, presets, strict=True)
        )
        if calibration is None or recovery is None or audit is None:
            raise SettingError(
                f"a {task} model needs the sizes of calibration, recovery and audit, or none.",
                hint="give all three, or leave all three out",
            )
        return Counts(calibration, recovery, audit, self.more)


def load_data(
    model: Model,
    source: str | Mapping[str, Any] | None,
    *,
    seed: int,
    sizes: DataSizes,
    slices: str | None = None,
    progress: Progress,
    outputs_per_batch_bytes: int = OUTPUTS_PER_BATCH_BYTES,
) -> Data:
    """Gather data for a model, split it three ways, and batch it.

    Args:
        model: Its task and files decide what fits.
        source: A file or folder as typed; arrays by the names of the model's inputs, their first
            dimension the sample; None for the default of the task.
        seed: The same seed gives the same data.
        sizes: Of the splits.
        slices: A two-column .tsv (sample, label), or a column of the table `source`.
        progress: Told of long steps.
        outputs_per_batch_bytes: Of float32 outputs of one batch, at most (one sample at least).

    Raises:
        DataError: Data that is missing, too little, unreadable, or does not fit the model.
        SettingError: Sizes out of range.
    """
    splits = _gather(model, source, seed, sizes, slices, progress)
    calibration, recovery, audit = splits.samples
    per_batch = _samples_per_batch(model, splits, outputs_per_batch_bytes)
    labels = [sample.label for sample in calibration]
    if any(labels) and not all(labels):
        raise DataError(
            f"{labels.count('')} of {len(labels)} calibration samples have no label.",
            hint="give every sample a label, or none",
        )
    starts = range(0, len(labels), per_batch)
    return Data(
        calibration=into_batches(calibration, per_batch),
        recovery=into_batches(recovery, per_batch),
        audit=into_batches(audit, per_batch),
        more=into_batches(splits.more, per_batch),
        origin=splits.origin,
        slices=[labels[at : at + per_batch] for at in starts] if any(labels) else (),
        shown=[sample.shown for sample in audit] if any(s.shown for s in audit) else (),
        audit_slices=[s.label for s in audit] if all(s.label for s in audit) else (),
        recovery_slices=[s.label for s in recovery] if all(s.label for s in recovery) else (),
        answers=[s.answer for s in audit] if any(s.answer >= 0 for s in audit) else (),
    )


def _gather(
    model: Model,
    source: str | Mapping[str, Any] | None,
    seed: int,
    sizes: DataSizes,
    slices: str | None,
    progress: Progress,
) -> Splits:
    task = model.task.name
    counts = sizes.counts(task, DEFAULT_COUNTS.get(task))
    has_tokenizer = "tokenizer.json" in model.files
    if isinstance(source, Mapping):
        return tensor_splits(model, source, sizes.counts(task, None), seed=seed, slices=slices)
    as_tensors = source is not None and Path(source).suffix.lower() in TENSOR_SUFFIXES
    if not as_tensors and task == "classify" and "picture" in model.architecture.config:
        assert counts is not None
        return picture_splits(model, source, counts, seed=seed, slices=slices, progress=progress)
    if not as_tensors and has_tokenizer and task == "transcribe":
        return sound_splits(model, source, counts, seed=seed, slices=slices, progress=progress)
    if not as_tensors and has_tokenizer and task == "embed":
        assert counts is not None
        return sentence_splits(model, source, counts, seed=seed, slices=slices)
    if not as_tensors and has_tokenizer and task == "language":
        assert counts is not None
        length = sizes.sequence_length
        return language_splits(
            model,
            source,
            counts,
            length=length,
            seed=seed,
            slices=slices,
            progress=progress,
        )
    # what the arrays hold decides, unless the user said otherwise: tokens are not samples here
    return tensor_splits(model, source, sizes.counts(task, None), seed=seed, slices=slices)


def _samples_per_batch(model: Model, splits: Splits, outputs_bytes: int) -> int:
    """As many samples as keep the outputs, and by rule of thumb the activations, small."""
    with torch.no_grad():
        outputs = model.task.forward(model.module, model.examples)
    samples = [sample.tensors for split in splits.samples for sample in split]
    predictions = outputs.shape[1]
    for name in ("decoder_tokens", "tokens"):
        if outputs.shape[1] > 1 and name in samples[0]:
            predictions = max(len(tensors[name]) for tensors in samples)
            break
    bytes_per_sample = predictions * outputs.shape[2] * FLOAT_BYTES
    most = MOST_SAMPLES.get(model.task.name, MOST_SAMPLES_OTHERWISE)
    return max(1, min(most, outputs_bytes // bytes_per_sample))
