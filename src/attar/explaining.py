"""What an answer of a model rests on in its input, with checks of how far that can be trusted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attar.attribute import METHODS, Method
from attar.attribute.faithfulness import (
    LARGEST_AGREEMENT,
    LARGEST_GAP,
    LARGEST_P,
    Curves,
    agreement,
    chance_areas,
    curves_of,
    reordered,
    sparsity,
)
from attar.attribute.question import Explained, Question
from attar.disk import lies_on_disk
from attar.errors import DataError
from attar.records import Model, Progress
from attar.session import state_hash
from attar.subjects import Subject, find_subjects
from attar.tables import build, check_name

# What is told where nothing else is asked for, by the kind of the subject.
DEFAULTS = {"picture": "kernel_shap", "text": "integrated_gradients"}
DEFAULT = "integrated_gradients"
EVERY = "all"
ONLY_PICTURES = {"grad_cam"}


@dataclass(frozen=True)
class Wish:
    """What is to be explained, and how.

    Attributes:
        inputs: A prompt; texts; files; or numbers of rows of `data`.
        methods: Names in `attribute.METHODS`, or "all"; none: what suits the input.
        target: A class, a token, or the number of an output; None: the model's own answer.
        data: File of arrays, for a model that reads numbers.
        check: Whether to test what each method says.
    """

    inputs: Sequence[str]
    methods: Sequence[str] = ()
    target: str | None = None
    data: str | None = None
    seed: int = 0
    check: bool = True


@dataclass(frozen=True)
class Explanation:
    """What one answer rests on, by one method.

    Attributes:
        model: Its name.
        sha256: Of its weights.
        method: Name in `attribute.METHODS`.
        settings: Of the method.
        answer: f(x): log-probability of the target in nats, or the output asked for.
        baseline_answer: f(x'), where the input says nothing.
        baseline: What x' is, for people.
        values: Nats, or output units, of each place; in the shape of tokens, columns, or a map.
        features: Number of each place's feature; -1 for one that stays.
        gap: |sum of values − (f(x) − f(x'))| over the latter; None where they need not agree.
        curves: The answer while features are taken away; None where nothing was checked.
        agreement: Rank correlation with what a network of shuffled weights gets; None as above.
        sparsity: Gini coefficient of the sizes of the values.
        problems: What a reader must know before trusting it.
    """

    model: str
    sha256: str
    subject: Subject
    method: str
    settings: Mapping[str, Any]
    seed: int
    answer: float
    baseline_answer: float
    baseline: str
    values: Tensor
    features: Tensor
    gap: float | None
    curves: Curves | None
    agreement: float | None
    sparsity: float
    seconds: float
    problems: tuple[str, ...]


def check_methods(names: Sequence[str]) -> None:
    """Refuse a method that there is not.

    Raises:
        SettingError: With those that are.
    """
    for name in names:
        check_name([*METHODS, EVERY], "method", name)


def explain_inputs(model: Model, wish: Wish, progress: Progress) -> list[Explanation]:
    """Explain every input by every method that was asked for.

    Raises:
        SettingError: A method that there is not.
        DataError: Nothing to explain, a target that there is not, or a method that finds no
            gradient, or numbers that are not finite.
    """
    check_methods(wish.methods)
    shown = Explained(model.name, model.task, model.module)
    subjects = list(find_subjects(model, wish.inputs, target=wish.target, data=wish.data))
    noise = replace(shown, weights=_shuffled(model, wish.seed)) if wish.check else None
    sha256, found = state_hash(model.module), []
    for subject in subjects:
        names = list(_chosen(subject, wish.methods))
        with progress.stage(f"explain {subject.name[:40]}", len(names) + wish.check) as advance:
            case = _opened(shown, noise, sha256, subject, wish.seed)
            advance(int(wish.check))
            for name in names:
                found.append(_explained(case, name))
                advance(1)
    return found


@dataclass(frozen=True)
class _Case:
    """A subject with what all methods share."""

    subject: Subject
    sha256: str
    question: Question
    ends: tuple[float, float]
    chance: tuple[float, ...] | None
    of_noise: Question | None


def _opened(
    shown: Explained, noise: Explained | None, sha256: str, subject: Subject, seed: int
) -> _Case:
    def asked(model: Explained) -> Question:
        return Question(model, subject.sample, subject.asked, subject.way, seed)

    question = asked(shown)
    before, after = question.answers(torch.cat([question.baseline, question.point])).tolist()
    ends = before, after
    if noise is None:
        return _Case(subject, sha256, question, ends, None, None)
    return _Case(subject, sha256, question, ends, chance_areas(question), asked(noise))


def _chosen(subject: Subject, methods: Sequence[str]) -> Iterator[str]:
    if not methods:
        yield DEFAULTS.get(subject.kind, DEFAULT)
        return
    for name in methods:
        if name != EVERY:
            yield name
            continue
        yield from (n for n in METHODS if n not in ONLY_PICTURES or subject.kind == "picture")


def _timed(method: Method, question: Question, name: str) -> tuple[Tensor, float]:
    start = time.perf_counter()
    values = method(question).detach().double()
    seconds = time.perf_counter() - start
    if not bool(values.isfinite().all()):
        wrong = int((~values.isfinite()).sum())
        raise DataError(
            f"{name} gives {wrong} of {values.numel()} numbers that are not finite for "
            f"{question.model.name}.",
            hint="explain by occlusion, which takes no gradients.",
        )
    return values, seconds


def _explained(case: _Case, name: str) -> Explanation:
    question, (before, after) = case.question, case.ends
    method: Method = build(METHODS, "method", name, {})
    values, seconds = _timed(method, question, name)
    curves = alike = None
    if case.chance is not None and case.of_noise is not None:
        curves = curves_of(question, values, case.chance)
        alike = agreement(values, method(case.of_noise))
    gap = None
    if method.complete:
        gap = abs(float(values.sum()) - (after - before)) / max(abs(after - before), 1e-12)
    made = Explanation(
        model=question.model.name,
        sha256=case.sha256,
        subject=case.subject,
        method=name,
        settings=vars(method),
        seed=question.seed,
        answer=after,
        baseline_answer=before,
        baseline=_baseline(case.subject),
        values=values,
        features=question.features,
        gap=gap,
        curves=curves,
        agreement=alike,
        sparsity=sparsity(values),
        seconds=seconds,
        problems=(),
    )
    return replace(made, problems=tuple(_problems(made)))


def _baseline(subject: Subject) -> str:
    if subject.kind == "text":
        kept = " (the first, on which attention rests, stays)" if subject.way.kept else ""
        return f"a vector of zeros for every token{kept}"
    if subject.way.baseline is not None:
        return "the mean of each column"
    return {"picture": "a grey picture of zeros"}.get(subject.kind, "zeros")


def _problems(made: Explanation) -> Iterator[str]:
    if not bool(made.values.any()):
        yield "every part is zero: no gradient reaches the input, or nothing of it matters."
        return
    if made.gap is not None and made.gap > LARGEST_GAP:
        total, whole = float(made.values.sum()), made.answer - made.baseline_answer
        yield f"the parts sum to {total:.3g}; the whole input changed the answer by {whole:.3g}."
    if made.curves is not None and made.curves.p > LARGEST_P:
        yield (
            "taking away what it names first lowers the answer no more than a random order may "
            f"(p {made.curves.p:.2f})."
        )
    if made.agreement is not None and made.agreement > LARGEST_AGREEMENT:
        yield (
            "a network of shuffled weights gets nearly the same (rank correlation "
            f"{made.agreement:.2f}): it may show the input and not the model."
        )


def _shuffled(model: Model, seed: int) -> dict[str, Callable[[], Tensor]]:
    """Each weight's own numbers in another order."""
    draws = torch.Generator().manual_seed(seed)
    found: dict[str, Callable[[], Tensor]] = {}
    for name, parameter in model.module.named_parameters():
        if parameter.dim() > 1:
            seeds = int(torch.randint(2**31, (), generator=draws))
            make = partial(reordered, parameter, seeds)
            found[name] = make if lies_on_disk(model.module) else _held(make())
    return found


def _held(weight: Tensor) -> Callable[[], Tensor]:
    return lambda: weight
