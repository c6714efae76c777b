"""Predictions that changed, shown so that a person can judge them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from attar.audit.fidelity import Measured
from attar.records import Changed

MOST_SHOWN = 24
CONTEXT_TOKENS = 24
TEXT_TOKENS = 120


def changed_predictions(
    measured: Measured,
    name_of: Callable[[int], str],
    shown: Sequence[Any],
    decode: Callable[[list[int]], str] | None,
) -> list[Changed]:
    """Pick the changed predictions with the largest divergence.

    Args:
        name_of: Number of an answer to its name.
        shown: By sample: token ids (with `decode`), or the name of the sample.
    """
    flipped = np.flatnonzero(measured.answer_before != measured.answer_after)
    worst = flipped[np.argsort(-measured.divergence[flipped], kind="stable")][:MOST_SHOWN]
    return [_changed(measured, int(i), name_of, shown, decode) for i in worst]


def _changed(
    measured: Measured,
    i: int,
    name_of: Callable[[int], str],
    shown: Sequence[Any],
    decode: Callable[[list[int]], str] | None,
) -> Changed:
    where, text = place_of(measured, i, shown, decode)
    before, after = int(measured.answer_before[i]), int(measured.answer_after[i])
    return Changed(
        sample=where,
        shown=text,
        before=f"{name_of(before)} ({measured.probability_before[i]:.0%})",
        after=f"{name_of(after)} ({measured.probability_after[i]:.0%})",
        divergence=float(measured.divergence[i]),
    )


def place_of(
    measured: Measured,
    i: int,
    shown: Sequence[Any],
    decode: Callable[[list[int]], str] | None,
) -> tuple[str, str]:
    """Where a prediction stands, and what was read before it."""
    sample, position = int(measured.sample[i]), int(measured.position[i])
    if decode is not None:
        start = max(0, position + 1 - CONTEXT_TOKENS)
        text = decode(shown[sample][start : position + 1].tolist())
        return f"sample {sample}, token {position}", text
    return f"sample {sample}", str(shown[sample]) if sample < len(shown) else ""


def token_divergence(
    measured: Measured, texts: Sequence[Any], name_of: Callable[[int], str]
) -> list[tuple[str, float]]:
    """Tokens of the first audit text, each with the nats lost in predicting it."""
    if not len(texts):
        return []
    first = measured.sample == 0
    at = dict(
        zip(measured.position[first].tolist(), measured.divergence[first].tolist(), strict=True)
    )
    tokens = texts[0][:TEXT_TOKENS].tolist()
    # A token is predicted at the position before it.
    return [(name_of(token), at.get(place - 1, 0.0)) for place, token in enumerate(tokens)]
