"""Sound for speech models: windows of 30 seconds with the model's own transcript as context."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attar.decode import transcribe_windows
from attar.errors import DataError
from attar.inputs import SOUND_SUFFIXES, read_tokenizer, sound_to_windows
from attar.load.mel import log_mel
from attar.load.sources import read_entries
from attar.load.splits import Counts, Dealer, Sample, Splits

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from attar.load.sources import Entry
    from attar.records import Model, Progress

WANTED = "a folder of sound files (.wav or .flac), or a .tsv table with a column path"
PARTS = Counts(2, 1, 2)  # shares of the splits where no counts are given


def sound_splits(
    model: Model,
    source: str | None,
    counts: Counts | None,
    *,
    seed: int,
    slices: str | None,
    progress: Progress,
) -> Splits:
    """Windows of sound files; all windows of one file are in one split.

    No labels are needed: the decoder is fed the model's own greedy transcript, and predicts each
    of its tokens and the end.

    Args:
        model: Whisper.
        source: As typed; a speech model has no default sound.
        counts: Windows; None for all there are, two fifths for calibration and audit each.
        seed: Of the order of files.
        slices: As typed.
        progress: Told of windows transcribed.

    Raises:
        DataError: No sound, too little, unreadable, or labels that do not fit.
    """
    if source is None:
        raise DataError(
            "a speech model has no default sound.",
            hint="give --data FOLDER of .wav or .flac files",
        )
    entries, note = read_entries(source, SOUND_SUFFIXES, WANTED, slices)
    random.Random(f"sound {seed}").shuffle(entries)
    dealt = _deal_windows(entries, counts, source)
    tokenizer = read_tokenizer(model.files)
    samples = []
    with progress.stage("transcribe sound with the model", float(sum(map(len, dealt)))) as advance:
        for heard in dealt:
            split_samples = []
            for entry, number, window in heard:
                split_samples.append(_hear(model, tokenizer, entry, number, window))
                advance(1)
            samples.append(tuple(split_samples))
    n_windows = sum(map(len, samples))
    origin = f"sound from {source}: {n_windows} windows" + (f" ({note})" if note else "")
    return Splits((samples[0], samples[1], samples[2]), origin)


def _deal_windows(
    entries: list[Entry], counts: Counts | None, source: str
) -> list[list[tuple[Entry, int, Tensor]]]:
    """Windows of each split with their file and number."""
    dealer = Dealer((counts or PARTS).as_tuple())
    dealt: list[list[tuple[Entry, int, Tensor]]] = [[], [], []]
    for entry in entries:
        if counts is not None and dealer.filled():
            break
        assert entry.path is not None
        windows = sound_to_windows(entry.path)
        split = dealt[dealer.deal(len(windows))]
        split += [(entry, number, window) for number, window in enumerate(windows)]
    if counts is not None:
        dealt = [windows[:n] for windows, n in zip(dealt, counts.as_tuple(), strict=True)]
    found, needed = sum(map(len, dealt)), sum(counts.as_tuple()) if counts else 3
    if found < needed or not all(dealt):
        raise DataError(
            f"{source} holds {found} windows of 30 seconds in {len(entries)} files; {needed} are "
            "needed, in three files or more, because the splits share no file.",
            hint="add sound files to the folder",
        )
    return dealt


def _hear(model: Model, tokenizer: Tokenizer, entry: Entry, number: int, window: Tensor) -> Sample:
    features = log_mel(window, int(model.architecture.config.get("num_mel_bins", 80)))
    prompts, texts = transcribe_windows(model, tokenizer, features[None])
    tokens = torch.cat([prompts[0], torch.tensor(texts[0], dtype=torch.int64)])
    # The opening is given, not predicted; its last token predicts the first of the text.
    mask = torch.arange(len(tokens)) >= prompts.shape[1] - 1
    shown = entry.name if number == 0 else f"{entry.name}, window {number}"
    # features do not vary in length, the other two are filled up by `into_batches`
    return Sample(
        {"features": features, "decoder_tokens": tokens, "mask": mask}, entry.label, shown
    )
