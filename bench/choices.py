"""Multiple choice for language models: which ending, or which sentence, is likelier.

Seeded samples of BLiMP, HellaSwag, ARC-Easy and PIQA. A choice is the sum of log p of its tokens
after the context, divided by its bytes where choices differ in length (BLiMP's do not).
"""

from __future__ import annotations

import bz2
import json
import random
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from torch import nn

from attar.audit.choices import chosen, log_likelihoods, rows_of
from attar.records import ChoiceItem

SEED = 0
# Items of each task: HellaSwag's are the longest, with four endings each.
COUNTS: Mapping[str, int] = {"blimp": 200, "hellaswag": 100, "arc_easy": 200, "piqa": 200}


def items_of(task: str, data: Path, n: int) -> list[ChoiceItem]:
    """Draw items of one task, always the same ones."""
    readers = {"blimp": _blimp, "hellaswag": _hellaswag, "arc_easy": _arc_easy, "piqa": _piqa}
    found = list(readers[task](data))
    return random.Random(f"{task} {SEED}").sample(found, n)


def _blimp(data: Path) -> Iterator[ChoiceItem]:
    with tarfile.open(data / "blimp" / "blimp.tar.gz") as packed:
        for member in sorted(packed.getnames()):
            file = packed.extractfile(member) if member.endswith(".jsonl") else None
            for line in file or ():
                pair = json.loads(line)
                yield ChoiceItem("", (pair["sentence_good"], pair["sentence_bad"]), 0)


def _hellaswag(data: Path) -> Iterator[ChoiceItem]:
    lines = bz2.decompress((data / "lm-eval" / "hellaswag_val_full.txt.bz2").read_bytes())
    rows = lines.decode().splitlines()
    for start in range(0, len(rows) - 5, 6):
        context, label, *endings = rows[start : start + 6]
        yield ChoiceItem(context, tuple(f" {ending}" for ending in endings), int(label))


def _arc_easy(data: Path) -> Iterator[ChoiceItem]:
    for line in (data / "lm-eval" / "arc_easy_test.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        choices = tuple(f" {choice['text']}" for choice in row["question"]["choices"])
        context = f"Question: {row['question']['stem']}\nAnswer:"
        # Some rows number their choices, and still name the right one by its letter.
        yield ChoiceItem(context, choices, _place(row["answerKey"]))


def _place(key: str) -> int:
    return int(key) - 1 if key.isdigit() else ord(key) - ord("A")


def _piqa(data: Path) -> Iterator[ChoiceItem]:
    lines = (data / "lm-eval" / "piqa_dev.jsonl").read_text("utf-8").splitlines()
    labels = (data / "lm-eval" / "piqa_dev-labels.lst").read_text("utf-8").split()
    for line, label in zip(lines, labels, strict=True):
        row = json.loads(line)
        context = f"Question: {row['goal']}\nAnswer:"
        yield ChoiceItem(context, (f" {row['sol1']}", f" {row['sol2']}"), int(label))


def answers(
    module: nn.Module, tokenizer: Tokenizer, start: int, items: Sequence[ChoiceItem]
) -> list[int]:
    """Which choice the model finds likeliest, for each item.

    Args:
        start: Token that texts begin with.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    rows = [rows_of(item, encode, [start]) for item in items]
    logs = log_likelihoods(
        lambda tokens: module(tokens, use_cache=False).logits, [row for own in rows for row in own]
    )
    own = np.split(logs, np.cumsum([len(one) for one in rows])[:-1])
    return [
        chosen(item, one, normalised=bool(item.context))
        for item, one in zip(items, own, strict=True)
    ]
