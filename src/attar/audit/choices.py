"""Multiple choice for language models: which choice is likelier after a context, before and after.

Source: the measures `acc` and `acc_norm` of lm-evaluation-harness,
https://github.com/EleutherAI/lm-evaluation-harness (lm_eval/api/task.py, multiple_choice): log p of
a choice given its context, as it is and over the length of the choice. We differ in two ways: the
length is in bytes of UTF-8 and not in characters, and a choice is encoded apart from its context
and not together with it, so that all choices of an item read the same tokens before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from attar.audit import paired
from attar.audit.behaviour import against_truth
from attar.audit.fidelity import Measured
from attar.errors import DataError
from attar.parallel import in_order
from attar.records import ChoiceItem, ChoicesFound, Truth

# Tokens read at once: 49,152 logits of each fit in 50 MB.
TOKENS_AT_ONCE = 256
# Of a context and a choice; a longer context loses its beginning.
MOST_TOKENS = 1024

Row = tuple[list[int], int]
"""Tokens of a context with one choice, and where the choice begins, >= 1."""


def rows_of(
    item: ChoiceItem,
    encode: Callable[[str], list[int]],
    start: Sequence[int],
    begin: Sequence[int] = (),
) -> list[Row]:
    """Encode an item, one row for each choice.

    Args:
        start: Tokens before every text.
        begin: Tokens that stand before a choice without context where `start` is empty.

    Raises:
        DataError: Nothing stands before the choices, so their first token has no probability.
    """
    context = item.context.rstrip()
    # As there: white space at the end of a context belongs to the first word of the choice.
    spaces = item.context[len(context) :]
    lead = [*start, *encode(context)] or list(begin)
    if not lead:
        raise DataError(
            f"nothing stands before {item.choices[0][:40]!r}, and the model names no token that "
            "begins a text.",
            hint='give every question a "context"',
        )
    rows = []
    for choice in item.choices:
        own = encode(spaces + choice)[: MOST_TOKENS - 1]
        kept = lead[max(0, len(lead) + len(own) - MOST_TOKENS) :]
        rows.append((kept + own, len(kept)))
    return rows


def log_likelihoods(
    forward: Callable[[Tensor], Tensor],
    rows: Sequence[Row],
    advance: Callable[[int], None] = lambda _rows: None,
) -> np.ndarray:
    """Log-probability of the choice in each row, nats.

    Args:
        forward: Tokens `rows tokens` to logits `rows tokens width`. What stands after a row's end
            must not change it, which holds where a token reads only those before it.
        advance: Told how many rows are done.
    """
    batches = _batches(rows)

    def read(batch: list[int]) -> list[float]:
        tokens = [torch.tensor(rows[number][0]) for number in batch]
        with torch.no_grad():
            logits = forward(torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True))
            return [
                _sum_of_logs(own, one, rows[number][1])
                for own, one, number in zip(logits, tokens, batch, strict=True)
            ]

    found = np.zeros(len(rows))
    for batch, values in zip(batches, in_order(read, batches), strict=True):
        found[batch] = values
        advance(len(batch))
    return found


def _sum_of_logs(logits: Tensor, tokens: Tensor, begin: int) -> float:
    """Sum over the choice's tokens; each is predicted at the position before it."""
    logs = logits[begin - 1 : len(tokens) - 1].log_softmax(-1)
    return float(logs.gather(1, tokens[begin:, None]).double().sum())


def _batches(rows: Sequence[Row]) -> list[list[int]]:
    """Rows of about the same length together, of TOKENS_AT_ONCE tokens or one row."""
    batches: list[list[int]] = []
    for number in sorted(range(len(rows)), key=lambda n: len(rows[n][0])):
        length = len(rows[number][0])
        if batches and length * (len(batches[-1]) + 1) <= TOKENS_AT_ONCE:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def bytes_of(choice: str) -> int:
    """Length of a choice by which its log-probability is divided, without spaces around it."""
    return max(1, len(choice.strip().encode()))


def chosen(item: ChoiceItem, logs: np.ndarray, *, normalised: bool) -> int:
    """Which choice a model takes; the first of several alike.

    Args:
        logs: Log-probability of each choice.
    """
    lengths = [bytes_of(choice) if normalised else 1 for choice in item.choices]
    return int(np.argmax(logs / np.array(lengths)))


def compare_choices(
    name: str,
    items: Sequence[ChoiceItem],
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
    seed: int,
) -> ChoicesFound:
    """Compare both models' answers with the true ones, as a whole and by group.

    Args:
        before: Of the original: for each item, the log-probability of each choice.
        after: Of the compressed model, likewise.
    """
    both = [_measured(items, before, after, normalised=way) for way in (False, True)]
    labels = np.array([item.group for item in items])
    names = sorted(set(labels.tolist()))
    groups = []
    for label in names if len(names) > 1 else ():
        groups.append(_found(label, both, seed, np.flatnonzero(labels == label)))
    plain = paired.holm([one.p_plain for one in groups])
    normalised = paired.holm([one.p_normalised for one in groups])
    adjusted = [
        ChoicesFound(one.name, one.plain, one.normalised, plain[i], normalised[i])
        for i, one in enumerate(groups)
    ]
    adjusted.sort(key=lambda one: one.plain.accuracy_change.value)
    whole = _found(name, both, seed, None)
    return ChoicesFound(
        name,
        whole.plain,
        whole.normalised,
        whole.p_plain,
        whole.p_normalised,
        tuple(adjusted),
    )


def _found(
    name: str, both: Sequence[Measured], seed: int, places: np.ndarray | None
) -> ChoicesFound:
    plain, normalised = (_truth(one, seed, places) for one in both)
    return ChoicesFound(name, plain, normalised, plain.p_value, normalised.p_value)


def _truth(measured: Measured, seed: int, places: np.ndarray | None) -> Truth:
    found = against_truth(measured, seed, places)
    assert found is not None  # every item has a true answer
    return found


def _measured(
    items: Sequence[ChoiceItem],
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
    *,
    normalised: bool,
) -> Measured:
    """One prediction for each item: which of its choices.

    The probability of the true one is that among the choices, of their log-probabilities as they
    are.
    """
    n, zeros = len(items), np.zeros(len(items))
    truth = np.array([item.answer for item in items])
    found = {}
    for side, logs in (("before", before), ("after", after)):
        shares = [own - np.logaddexp.reduce(own) for own in logs]
        answers = [
            chosen(i, own, normalised=normalised) for i, own in zip(items, logs, strict=True)
        ]
        pairs = list(zip(shares, answers, truth, strict=True))
        found[f"answer_{side}"] = np.array(answers)
        found[f"probability_{side}"] = np.array([np.exp(own[a]) for own, a, _ in pairs])
        found[f"surprise_{side}"] = np.array([-own[right] for own, _, right in pairs])
    return Measured(
        sample=np.arange(n),
        position=np.zeros(n, int),
        divergence=zeros,
        surprise_sample=np.arange(n),
        surprise_at=np.arange(n),
        truth=truth,
        cosine=zeros,
        blind_divergence=0.0,
        entropy=0.0,
        **found,
    )
