"""What tools of `equal_bytes.py` are calibrated on, and what they are judged on: never the same.

Text: WikiText-2's validation text against its test text, and sentences of news; as arrays of tokens
for an encoder of one's own. Pictures: one half against the other. Speech: six speakers against four
others, and spoken digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from results_file import Options

CALIBRATION_SPEAKERS = 6
# Every so many-th digit, so that all digits and speakers are heard.
DIGIT_STEP = 11
# Of an encoder of one's own: sentences of a text, tokens of each, and characters at least.
SENTENCES, LENGTH, SHORTEST = 520, 64, 20


@dataclass(frozen=True)
class Apart:
    """Files or folders that share nothing.

    Attributes:
        calibration: What `--data` is given.
        judged: By what the columns of the results are called after the figure's own name.
    """

    calibration: Path
    judged: dict[str, Path]


def held_apart(kind: str, options: Options, folder: Path, tokenizer: Path | None = None) -> Apart:
    """Data of one kind of model.

    Args:
        folder: What is made of the data is written there.
        tokenizer: Text is given as tokens of it, where it is given.
    """
    if kind == "vision":
        return _pictures(options.data / "imagenet-sample-500", folder)
    if kind == "speech":
        return _speech(options.data / "speech", folder)
    judged = {"": options.wikitext / "wiki.test.raw", "_news": folder / "news.txt"}
    _news(options.data / "multilingual-pud" / "en.tsv", judged["_news"])
    apart = Apart(options.wikitext / "valid.txt", judged)
    return apart if tokenizer is None else _as_arrays(apart, tokenizer, folder)


def _pictures(source: Path, folder: Path) -> Apart:
    """Every other class."""
    found = sorted(source.glob("*.JPEG"))
    return Apart(
        _table(folder / "pictures.tsv", found[::2]),
        {"": _table(folder / "pictures-judged.tsv", found[1::2])},
    )


def _speech(source: Path, folder: Path) -> Apart:
    clips = sorted((source / "librispeech_test-other").glob("*.flac"))
    speakers = sorted({clip.name.partition("__")[0] for clip in clips})[:CALIBRATION_SPEAKERS]
    heard = [clip for clip in clips if clip.name.partition("__")[0] in speakers]
    digits = sorted((source / "fsdd").glob("*.wav"))[::DIGIT_STEP]
    others = [clip for clip in clips if clip not in heard]
    return Apart(
        _table(folder / "speech.tsv", heard),
        {
            "": _table(folder / "speech-judged.tsv", others),
            "_digits": _table(folder / "digits.tsv", digits),
        },
    )


def _news(source: Path, target: Path) -> None:
    """Write sentences of news as one plain text."""
    lines = source.read_text("utf-8").splitlines()
    target.write_text("\n".join(line.partition("\t")[2] for line in lines), "utf-8")


def _as_arrays(apart: Apart, tokenizer: Path, folder: Path) -> Apart:
    """The same text, a few of its sentences, as the model reads it."""
    return Apart(
        _sentences(apart.calibration, tokenizer, folder / "calibration.npz"),
        {
            column: _sentences(path, tokenizer, folder / f"judged{column}.npz")
            for column, path in apart.judged.items()
        },
    )


def _sentences(source: Path, tokenizer: Path, target: Path) -> Path:
    from tokenizers import Tokenizer

    pieces = re.split(r"(?<=[.!?])\s+|\n", source.read_text("utf-8"))
    found = [piece.strip() for piece in pieces if len(piece.strip()) >= SHORTEST]
    chosen = found[:: max(1, len(found) // SENTENCES)][:SENTENCES]
    read = Tokenizer.from_file(str(tokenizer))
    read.enable_truncation(LENGTH)
    read.enable_padding(length=LENGTH, pad_id=read.token_to_id("<pad>"), pad_token="<pad>")
    encoded = read.encode_batch(chosen)
    np.savez(
        target,
        tokens=np.array([one.ids for one in encoded], np.int64),
        attention=np.array([one.attention_mask for one in encoded], np.int64),
    )
    return target


def _table(path: Path, files: Iterable[Path]) -> Path:
    path.write_text("\n".join(["path", *map(str, files), ""]), "utf-8")
    return path
