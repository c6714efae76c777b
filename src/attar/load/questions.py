"""Prompts and multiple-choice questions from files, one a line.

A line of a file of questions is a JSON object, of one of two forms:

    {"context": "Question: ...\\nAnswer:", "choices": [" one", " two"], "answer": 0, "group": "g"}
    {"sentence_good": "...", "sentence_bad": "...", "linguistics_term": "..."}

The second is BLiMP's (Warstadt et al. 2020, https://arxiv.org/abs/1912.00582): whole sentences, of
which the good one is the true answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attar.errors import DataError
from attar.records import ChoiceItem

LARGEST_FILE_BYTES = 64 * 2**20
MOST_LINES = 100_000
# As many letters as an examination has for its choices.
MOST_CHOICES = 26
MOST_CHARACTERS = 100_000
EXAMPLE = '{"context": "2 + 2 =", "choices": [" 3", " 4"], "answer": 1}'
HINT = f"write lines such as {EXAMPLE}"


def read_questions(path: Path) -> tuple[ChoiceItem, ...]:
    """Read a file of multiple-choice questions.

    Raises:
        DataError: No such file, too large, or a line that is no question; lines count from 1.
    """
    items = []
    for number, line in enumerate(_lines(path, HINT), start=1):
        if line.strip():
            items.append(_question(line, f"line {number} of {path}"))
    if not items:
        raise DataError(f"{path} holds no questions.", hint=HINT)
    labelled = sum(bool(item.group) for item in items)
    if labelled not in (0, len(items)):
        raise DataError(
            f"{len(items) - labelled} of {len(items)} questions of {path} have no group.",
            hint="give every question a group, or none",
        )
    return tuple(items)


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read a file with one prompt a line; empty lines do not count.

    Raises:
        DataError: No such file, too large, or without prompts.
    """
    prompts = tuple(line.strip() for line in _lines(path, "write one prompt a line"))
    if not any(prompts):
        raise DataError(f"{path} holds no prompts.", hint="write one prompt a line")
    return tuple(prompt for prompt in prompts if prompt)


def _lines(path: Path, hint: str) -> list[str]:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE_BYTES + 1)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        said = " ".join(str(fault).split())
        raise DataError(f"{path} cannot be read as text: {said}.", hint=hint) from fault
    lines = text.split("\n")  # not splitlines, for which a JSON string may hold ends of lines
    if len(content) > LARGEST_FILE_BYTES or len(lines) > MOST_LINES:
        raise DataError(
            f"{path} holds more than {LARGEST_FILE_BYTES // 2**20} MiB or {MOST_LINES:,} lines.",
            hint="give a part of it",
        )
    return lines


def _question(line: str, where: str) -> ChoiceItem:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as fault:
        raise DataError(f"{where} is no JSON: {fault}.", hint=HINT) from fault
    if not isinstance(row, dict):
        raise _wrong(where, "is no JSON object")
    if len(line) > MOST_CHARACTERS:
        raise _wrong(where, f"has more than {MOST_CHARACTERS:,} characters")
    if "sentence_good" in row or "sentence_bad" in row:
        return _pair(row, where)
    context, choices, answer = row.get("context", ""), row.get("choices"), row.get("answer")
    if not isinstance(context, str):
        raise _wrong(where, "has a context that is no text")
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise _wrong(where, "has no list of choices, each a text")
    if not 2 <= len(choices) <= MOST_CHOICES:
        raise _wrong(where, f"has {len(choices)} choices, and 2 to {MOST_CHOICES} are allowed")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise _wrong(where, f"has the answer {answer!r}, which is no place among its choices")
    return ChoiceItem(context, tuple(choices), answer, _label(row.get("group"), where))


def _pair(row: Mapping[str, Any], where: str) -> ChoiceItem:
    sentences = row.get("sentence_good"), row.get("sentence_bad")
    if not all(isinstance(one, str) and one for one in sentences):
        raise _wrong(where, "lacks one of sentence_good and sentence_bad")
    label = row.get("group", row.get("linguistics_term"))
    return ChoiceItem("", (str(sentences[0]), str(sentences[1])), 0, _label(label, where))


def _label(label: Any, where: str) -> str:
    if label is None:
        return ""
    if not isinstance(label, str):
        raise _wrong(where, "has a group that is no text")
    return label


def _wrong(where: str, found: str) -> DataError:
    return DataError(f"{where} {found}.", hint=HINT)
