"""How two language models behave in use: going on with prompts, and answering questions."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from attar.audit.choices import Row, compare_choices, log_likelihoods, rows_of
from attar.audit.fidelity import Forward
from attar.audit.generation import compare_continuations, earliest
from attar.decode import continue_greedily, language_step
from attar.errors import DataError
from attar.export.run import end_tokens
from attar.inputs import leading_tokens, read_tokenizer
from attar.load.questions import read_prompts, read_questions
from attar.matching import Matched, match, number_tokens_otherwise
from attar.parallel import in_order
from attar.records import (
    Behaviours,
    ChoiceItem,
    ChoicesFound,
    Generation,
    Model,
    Verdict,
)
from attar.session import Session

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WRITTEN_TOKENS = 48
# Of an audit sequence: its first tokens, half of a shorter one.
OPENING_TOKENS = 32
# Of a prompt that was typed.
MOST_PROMPT_TOKENS = 1024
# Prompts continued together: a step reads all weights once for all of them.
ROWS_AT_ONCE = 16
READS_OTHERWISE = "the tokenizers differ, so it was neither let write nor asked questions"
CANNOT_BE_READ = "it answers NaN or infinity, so it was neither let write nor asked questions"

Prompt = list[int]
Read = tuple[Sequence[str], Sequence[tuple[str, Sequence[ChoiceItem]]]]


def read_asked(asked: Behaviours) -> Read:
    """Read prompts and questions, before long work; questions with the names of their files.

    Raises:
        DataError: A file that cannot be read.
    """
    prompts = () if asked.prompts is None else read_prompts(asked.prompts)
    if asked.generate:
        prompts = prompts[: asked.generate]
    return prompts, [(file.name, read_questions(file)) for file in asked.choices]


def check_asked(model: Model, asked: Behaviours) -> None:
    """Refuse to let anything else than a language model write.

    Raises:
        DataError: It is none, or has no tokenizer.
    """
    if asked == Behaviours():
        return
    if model.task.name != "language":
        raise DataError(
            f"{model.name} answers {model.task.name}; only a language model goes on with prompts "
            "and answers questions in text.",
            hint="leave --generate, --prompts and --choices out.",
        )
    read_tokenizer(model.files)


def with_behaviours(
    session: Session, other: Model, verdict: Verdict, asked: Behaviours, read: Read
) -> Verdict:
    """Add how both models write and answer to a verdict.

    Args:
        read: From `read_asked`.
    """
    if asked == Behaviours():
        return verdict
    if not math.isfinite(verdict.divergence.value):
        return replace(verdict, notes=(*verdict.notes, CANNOT_BE_READ))
    if number_tokens_otherwise(session.model, other):
        return replace(verdict, notes=(*verdict.notes, READS_OTHERWISE))
    prompts, questions = read
    with session.timed("behaviour"):
        generation = None
        if asked.generate or asked.prompts is not None:
            generation = _generation(session, other, asked.generate, prompts)
        choices = tuple(_choices(session, other, name, items) for name, items in questions)
    return replace(verdict, generation=generation, choices=choices)


# ---------------------------------------------------------------------------------------------
# prompts


def _generation(session: Session, other: Model, count: int, typed: Sequence[str]) -> Generation:
    tokenizer = read_tokenizer(session.model.files)
    prompts = _typed(typed, tokenizer) if typed else _openings(session, count)
    ends = end_tokens(session.model, tokenizer)
    # Both choose among the same tokens, where one has outputs that the other lacks.
    shared = match(session, other).own
    n_known = tokenizer.get_vocab_size() if shared is None else len(shared)
    about = f"prompts {_digest(prompts)}"
    before, after = (
        session.finished.once(
            f"{about} continued by {role}",
            partial(_continued, session, model, prompts, ends, n_known),
        )
        for role, model in (("original", session.model), ("compressed", other))
    )
    return compare_continuations(
        before,
        after,
        ends=ends,
        most_tokens=WRITTEN_TOKENS,
        seed=session.recipe.seed,
        examples=earliest(prompts, before, after, tokenizer.decode, ends),
    )


def _typed(prompts: Sequence[str], tokenizer: Tokenizer) -> list[Prompt]:
    lead = leading_tokens(tokenizer)
    found = []
    for prompt in prompts:
        own = tokenizer.encode(prompt, add_special_tokens=False).ids
        if len(own) > MOST_PROMPT_TOKENS:
            raise DataError(
                f"the prompt {prompt[:40]!r}… has {len(own):,} tokens.",
                hint=f"give prompts of at most {MOST_PROMPT_TOKENS:,}",
            )
        found.append(lead + own)
    return found


def _openings(session: Session, count: int) -> list[Prompt]:
    """The first tokens of audit sequences."""
    rows = [row.tolist() for batch in session.data.audit for row in batch["tokens"]]
    if count > len(rows):
        session.progress.note(
            f"the audit data has {len(rows)} sequences, so {len(rows)} prompts are continued and "
            f"not {count}; --audit N takes more data."
        )
    return [row[: max(1, min(OPENING_TOKENS, len(row) // 2))] for row in rows[:count]]


def _continued(
    session: Session,
    model: Model,
    prompts: Sequence[Prompt],
    ends: frozenset[int],
    n_known: int,
) -> list[list[int]]:
    """Go on with each prompt; those of one length together, so that none is padded."""
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(number)
    groups = [
        same[at : at + ROWS_AT_ONCE]
        for same in by_length.values()
        for at in range(0, len(same), ROWS_AT_ONCE)
    ]

    def write(group: list[int]) -> list[list[int]]:
        starts = torch.tensor([prompts[number] for number in group])
        return continue_greedily(
            language_step(model), starts, most_tokens=WRITTEN_TOKENS, ends=ends, n_known=n_known
        )

    written: list[list[int]] = [[] for _ in prompts]
    with session.progress.stage(f"write with {model.name}", len(prompts)) as advance:
        for group, texts in zip(groups, in_order(write, groups), strict=True):
            for number, text in zip(group, texts, strict=True):
                written[number] = text
            advance(len(group))
    return written


# ---------------------------------------------------------------------------------------------
# questions


def _choices(
    session: Session, other: Model, name: str, items: Sequence[ChoiceItem]
) -> ChoicesFound:
    tokenizer = read_tokenizer(session.model.files)
    encode, lead, begin = _encoder(tokenizer), leading_tokens(tokenizer), _begin(session.model)
    rows = [rows_of(item, encode, lead, begin) for item in items]
    flat = [row for own in rows for row in own]
    cuts = np.cumsum([len(own) for own in rows])[:-1]
    matched = match(session, other)
    _check_known(session.model, matched, name, flat)
    own = matched.before(session.model)
    sides = (
        ("original", session.model.name, partial(own.task.forward, own.module)),
        ("compressed", other.name, matched.after(other)),
    )
    about = f"questions {_digest(flat)}"
    before, after = (
        np.split(
            session.finished.once(
                f"{about} answered by {role}", partial(_answered, session, model, forward, flat)
            ),
            cuts,
        )
        for role, model, forward in sides
    )
    return compare_choices(name, items, before, after, session.recipe.seed)


def _answered(session: Session, model: str, forward: Forward, rows: Sequence[Row]) -> np.ndarray:
    with session.progress.stage(f"questions to {model}", len(rows)) as advance:
        return log_likelihoods(lambda tokens: forward({"tokens": tokens}), rows, advance)


def _check_known(model: Model, matched: Matched, file: str, rows: Sequence[Row]) -> None:
    """Refuse choices with tokens that one model alone has outputs for."""
    if matched.own is None:
        return
    highest = max(max(tokens[begin:]) for tokens, begin in rows)
    if highest >= len(matched.own):
        raise DataError(
            f"a choice in {file} holds the token {highest:,}, and both models know "
            f"{len(matched.own):,} of those of {model.name}.",
            hint="leave questions with special tokens out.",
        )


def _digest(asked: object) -> str:
    """Tell what models were asked from anything else, in few letters."""
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def _begin(model: Model) -> list[int]:
    """Token before a text that nothing else stands before; empty where the model names none.

    As in lm-evaluation-harness (`prefix_token_id`): the token that begins a text, else the one that
    ends it.
    """
    config = model.architecture.config
    named = [config.get(name) for name in ("bos_token_id", "eos_token_id")]
    numbers = [one[0] if isinstance(one, list) and one else one for one in named]
    return [one for one in numbers if isinstance(one, int)][:1]
