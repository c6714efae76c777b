"""Whether a compressed model loses more than the original where inputs are a little corrupted."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from attar.audit.behaviour import against_truth
from attar.audit.corruptions import PICTURES, SHARES, TEXTS, shift_numbers
from attar.audit.fidelity import Measured, bootstrap, measure
from attar.audit.intervals import bounded, certified_radius
from attar.audit.paired import holm, sign_flip
from attar.errors import DataError
from attar.inputs import leading_tokens, picture_settings, read_tokenizer
from attar.matching import Matched, match
from attar.records import Batch, Certified, CorruptionFound, Model, Verdict
from attar.session import Session

# Samples that are corrupted, at most: each corruption runs both models over them once more.
MOST_SAMPLES = 512
# Parameters of a network whose radius is certified, and samples at once: each is run 44 times, in
# float64.
MOST_CERTIFIED, CERTIFIED_AT_ONCE = 5_000_000, 64
LEAVE_OUT = "leave --corruptions out; it corrupts pictures, texts and arrays of numbers."

Corrupt = Callable[[Batch, int], Batch]
"""A batch and its number to the same batch corrupted."""


def check_asked(model: Model) -> None:
    """Refuse a model whose inputs are none of those that can be corrupted.

    Raises:
        DataError: Sound, tokens without a tokenizer, or whole numbers.
    """
    text = "tokens" in model.examples and "tokenizer.json" in model.files
    if text or _numbers(model):
        return
    read = ", ".join(sorted(model.examples))
    raise DataError(f"{model.name} reads {read}, which cannot be corrupted.", hint=LEAVE_OUT)


def _numbers(model: Model) -> str:
    """Name of the pixels or of the real numbers that a model reads; "" where there are none."""
    for name in ("pixels", "inputs"):
        if name in model.examples and model.examples[name].is_floating_point():
            return name
    return ""


def with_corruptions(session: Session, other: Model, verdict: Verdict) -> Verdict:
    """Add what both answer to corrupted audit data to a verdict; nothing where there is NaN."""
    if not np.isfinite(verdict.divergence.value):
        return verdict
    with session.timed("corruptions"):
        matched, batches = match(session, other), _batches(session)
        found, p_values = [], []
        for (name, strength), corrupt in _corruptions(session, batches):
            measured = session.finished.once(
                f"corruption {name}, {strength}",
                partial(
                    _measured, session, other, matched, batches, corrupt, f"{name}, {strength}"
                ),
            )
            if not np.isfinite(measured.divergence).all():
                note = f"with {name} ({strength}) it answers NaN or infinity"
                verdict = replace(verdict, notes=(*verdict.notes, note))
                continue
            one, p_value = _found(session, verdict, measured, name, strength)
            found.append(one)
            p_values.append(p_value)
        certified = _certified(session, other, matched, batches)
    adjusted = [replace(one, p_added=p) for one, p in zip(found, holm(p_values), strict=True)]
    return replace(verdict, corruptions=tuple(adjusted), certified=certified)


def _batches(session: Session) -> list[Batch]:
    """First batches of the audit data, of so many samples."""
    chosen, count = [], 0
    for batch in session.data.audit:
        if count >= MOST_SAMPLES:
            break
        chosen.append(batch)
        count += len(next(iter(batch.values())))
    return chosen


def _measured(
    session: Session,
    other: Model,
    matched: Matched,
    batches: Sequence[Batch],
    corrupt: Corrupt,
    stage: str,
) -> Measured:
    """Compare both on the corrupted batches."""
    batches = [corrupt(batch, number) for number, batch in enumerate(batches)]
    found = measure(
        matched.before(session.model),
        matched.after(other),
        batches,
        session.divergence,
        progress=session.progress,
        stage=stage,
        answers=matched.answers(session.data.answers),
    )
    return matched.in_places(found)


def _found(
    session: Session, verdict: Verdict, measured: Measured, name: str, strength: str
) -> tuple[CorruptionFound, float]:
    """Describe one corruption, and give P of what it adds before any correction."""
    seed, counts = session.recipe.seed, np.bincount(measured.sample)
    own = np.bincount(measured.sample, measured.divergence) / np.maximum(counts, 1)
    added = own - np.asarray(verdict.sample_divergence[: len(own)])
    flips = None
    if session.divergence.family == "categorical":
        changed = (measured.answer_before != measured.answer_after).astype(float)
        flips = bootstrap(changed, measured.sample, seed=seed)
    found = CorruptionFound(
        name=name,
        strength=strength,
        n_samples=len(own),
        divergence=bootstrap(measured.divergence, measured.sample, seed=seed),
        added=bootstrap(added, np.arange(len(own)), seed=seed),
        p_added=1.0,
        flips=flips,
        truth=against_truth(measured, seed),
    )
    return found, sign_flip(added, seed)


# ---------------------------------------------------------------------------------------------
# what can be corrupted


def _corruptions(
    session: Session, batches: Sequence[Batch]
) -> Iterator[tuple[tuple[str, str], Corrupt]]:
    """Name and strength, and the corruption, for what the model reads."""
    model, seed = session.model, session.recipe.seed
    if "pixels" in model.examples and "picture" in model.architecture.config:
        for called, change in PICTURES.items():
            yield called, partial(_of_pictures, model, change, seed)
    elif "tokens" in model.examples:
        for called, rewrite in TEXTS.items():
            yield called, partial(_of_texts, model, rewrite, seed)
    else:
        name = _numbers(model)
        spreads = torch.cat([batch[name] for batch in batches]).std(0, correction=0)
        for share in SHARES:
            called = ("noise", f"{share:.0%} of each number's spread")
            yield called, partial(_of_numbers, name, spreads, share, seed)


def _certified(
    session: Session, other: Model, matched: Matched, batches: Sequence[Batch]
) -> Certified | None:
    """Radii of both models around the same samples; None where bounds cannot be followed."""
    model, name = session.model, _numbers(session.model)
    same = matched.own is None and matched.theirs is None
    if model.task.name != "classify" or not (name and same) or len(model.examples) > 1:
        return None
    if session.n_parameters > MOST_CERTIFIED:
        return None
    before, after = (bounded(one.module) for one in (model, other))
    if before is None or after is None:
        return None
    inputs = torch.cat([batch[name] for batch in batches])
    unit, called = _radius_unit(model, inputs)
    radii: list[list[Tensor]] = [[], []]
    for part in torch.split(inputs, CERTIFIED_AT_ONCE):
        with torch.no_grad():
            logits = model.task.forward(model.module, {name: part})[:, 0]
        for side, traced in zip(radii, (before, after), strict=True):
            side.append(certified_radius(traced, part, unit, logits.argmax(1)))
    found = [torch.cat(side).numpy() for side in radii]
    places, seed = np.arange(len(inputs)), session.recipe.seed
    return Certified(
        len(inputs),
        called,
        *(bootstrap(one, places, seed=seed) for one in (*found, found[1] - found[0])),
    )


def _radius_unit(model: Model, inputs: Tensor) -> tuple[Tensor, str]:
    """What a radius of 1 moves each number of a sample by, and its name."""
    if "picture" in model.architecture.config:
        std = torch.tensor(picture_settings(model.architecture.config).std)
        return 1 / std[:, None, None], "black to white"
    return inputs.std(0, correction=0), "each number's spread"


def _draws(seed: int, number: int) -> torch.Generator:
    # One stream for each batch, whatever thread or order it is done in.
    return torch.Generator().manual_seed(1_000_003 * seed + number)


def _of_pictures(
    model: Model,
    change: Callable[[Tensor, torch.Generator], Tensor],
    seed: int,
    batch: Batch,
    number: int,
) -> Batch:
    settings = picture_settings(model.architecture.config)
    mean, std = (torch.tensor(one)[:, None, None] for one in (settings.mean, settings.std))
    seen = (batch["pixels"] * std + mean).clamp(0, 1)
    return {**batch, "pixels": (change(seen, _draws(seed, number)) - mean) / std}


def _of_numbers(
    name: str, spreads: Tensor, share: float, seed: int, batch: Batch, number: int
) -> Batch:
    return {**batch, name: shift_numbers(batch[name], spreads, share, _draws(seed, number))}


def _of_texts(
    model: Model,
    rewrite: Callable[[str, random.Random], str],
    seed: int,
    batch: Batch,
    number: int,
) -> Batch:
    """Read each text, corrupted, again; what has become longer is cut, what is shorter filled."""
    tokenizer = read_tokenizer(model.files)
    draws = random.Random(f"{seed} {number}")
    lead = [] if "attention" in batch else leading_tokens(tokenizer)
    width, rows = batch["tokens"].shape[1], []
    there = batch.get("attention", torch.ones_like(batch["tokens"]))
    for ids, known in zip(batch["tokens"], there, strict=True):
        text = rewrite(tokenizer.decode(ids[known.bool()].tolist()), draws)
        own = tokenizer.encode(text, add_special_tokens="attention" in batch).ids
        end = own[-1:] if "attention" in batch and len(own) > width else []
        rows.append((lead + own)[: width - len(end)] + end or ids[:1].tolist())
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    known = torch.zeros(len(rows), width, dtype=torch.int64)
    for at, row in enumerate(rows):
        tokens[at, : len(row)], known[at, : len(row)] = torch.tensor(row), 1
    if "attention" in batch:
        return {**batch, "tokens": tokens, "attention": known}
    return {**batch, "tokens": tokens, "mask": known.bool()}
