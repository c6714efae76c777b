"""Multiple choice for language models: which ending, or which sentence, is likelier.

Seeded samples of BLiMP, HellaSwag, ARC-Easy and PIQA. A choice is the sum of log p of its tokens
after the context, divided by its characters where choices differ in length (BLiMP's do not).
"""

from __future__ import annotations

import bz2
import json
import random
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

SEED = 0
# Items of each task: HellaSwag's are the longest, with four endings each.
COUNTS: Mapping[str, int] = {"blimp": 200, "hellaswag": 100, "arc_easy": 200, "piqa": 200}


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        context: "" where whole sentences are compared.
        right: Place of the right one of `choices`.
    """

    context: str
    choices: tuple[str, ...]
    right: int


def items_of(task: str, data: Path, n: int) -> list[Item]:
    """Draw items of one task, always the same ones."""
    readers = {"blimp": _blimp, "hellaswag": _hellaswag, "arc_easy": _arc_easy, "piqa": _piqa}
    found = list(readers[task](data))
    return random.Random(f"{task} {SEED}").sample(found, n)


def _blimp(data: Path) -> Iterator[Item]:
    with tarfile.open(data / "blimp" / "blimp.tar.gz") as packed:
        for member in sorted(packed.getnames()):
            file = packed.extractfile(member) if member.endswith(".jsonl") else None
            for line in file or ():
                pair = json.loads(line)
                yield Item("", (pair["sentence_good"], pair["sentence_bad"]), 0)


def _hellaswag(data: Path) -> Iterator[Item]:
    lines = bz2.decompress((data / "lm-eval" / "hellaswag_val_full.txt.bz2").read_bytes())
    rows = lines.decode().splitlines()
    for start in range(0, len(rows) - 5, 6):
        context, label, *endings = rows[start : start + 6]
        yield Item(context, tuple(f" {ending}" for ending in endings), int(label))


def _arc_easy(data: Path) -> Iterator[Item]:
    for line in (data / "lm-eval" / "arc_easy_test.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        choices = tuple(f" {choice['text']}" for choice in row["question"]["choices"])
        context = f"Question: {row['question']['stem']}\nAnswer:"
        # Some rows number their choices, and still name the right one by its letter.
        yield Item(context, choices, _place(row["answerKey"]))


def _place(key: str) -> int:
    return int(key) - 1 if key.isdigit() else ord(key) - ord("A")


def _piqa(data: Path) -> Iterator[Item]:
    lines = (data / "lm-eval" / "piqa_dev.jsonl").read_text("utf-8").splitlines()
    labels = (data / "lm-eval" / "piqa_dev-labels.lst").read_text("utf-8").split()
    for line, label in zip(lines, labels, strict=True):
        row = json.loads(line)
        context = f"Question: {row['goal']}\nAnswer:"
        yield Item(context, (f" {row['sol1']}", f" {row['sol2']}"), int(label))


def answers(
    module: nn.Module, tokenizer: Tokenizer, start: int, items: Sequence[Item]
) -> list[int]:
    """Which choice the model finds likeliest, for each item.

    Args:
        start: Token that texts begin with.
    """
    with torch.no_grad():
        return [_answer(module, tokenizer, start, item) for item in items]


def _answer(module: nn.Module, tokenizer: Tokenizer, start: int, item: Item) -> int:
    context = [start, *tokenizer.encode(item.context, add_special_tokens=False).ids]
    endings = [tokenizer.encode(c, add_special_tokens=False).ids for c in item.choices]
    rows = [torch.tensor(context + ending) for ending in endings]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    kept = len(context) - 1  # the position that predicts the first token of the ending
    logits = module(batch, use_cache=False).logits[:, kept:-1]
    logs = logits.log_softmax(-1).gather(2, batch[:, kept + 1 :, None])[..., 0]
    scores = []
    for row, (ending, choice) in zip(logs, zip(endings, item.choices, strict=True), strict=True):
        characters = len(choice.strip()) if item.context else 1
        scores.append(float(row[: len(ending)].sum()) / characters)
    return scores.index(max(scores))
