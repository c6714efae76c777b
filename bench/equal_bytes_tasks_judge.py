"""Child of `equal_bytes_tasks.py` that needs torch: WEIGHTS FACTS DATA; prints one line of JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from choices import COUNTS, answers, items_of
from equal_bytes_job import opened
from equal_bytes_judge import other_module
from tokenizers import Tokenizer

from attar.records import ChoiceItem

QUICK_ITEMS = 4


def judged(weights: str, facts: Mapping[str, Any], data: Path) -> dict[str, float]:
    session = opened(facts)
    tokenizer = Tokenizer.from_str(session.model.files["tokenizer.json"].decode())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    start = int(session.model.architecture.config["bos_token_id"])
    other = other_module(session, weights, facts)
    found: dict[str, float] = {}
    for task, count in COUNTS.items():
        items = items_of(task, data, QUICK_ITEMS if facts["quick"] else count)
        before = np.array(answers(session.model.module, tokenizer, start, items))
        after = np.array(answers(other, tokenizer, start, items))
        found |= compared(task, items, before, after)
    return found


def compared(
    task: str, items: list[ChoiceItem], before: np.ndarray, after: np.ndarray
) -> dict[str, float]:
    """Shares, with the standard error of the paired difference of accuracies."""
    right = np.array([item.answer for item in items])
    difference = (after == right).astype(float) - (before == right)
    return {
        f"{task}_items": len(items),
        f"{task}_original": float((before == right).mean()),
        f"{task}_accuracy": float((after == right).mean()),
        f"{task}_difference_error": float(difference.std() / len(items) ** 0.5),
        f"{task}_flips": float((before != after).mean()),
    }


if __name__ == "__main__":
    where, typed, shared = sys.argv[1:]
    print(json.dumps(judged(where, json.loads(typed), Path(shared))))
