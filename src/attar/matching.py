"""Whether two models can be compared, in what part, and how they differ where they cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attar.audit.fidelity import Forward, Measured
from attar.errors import DataError
from attar.inputs import read_tokenizer
from attar.records import Batch, Model
from attar.session import Session

TOKENIZER, LABELS = "tokenizer.json", "labels.txt"
TEXT_TASKS = ("language", "transcribe")
TOKEN_INPUTS = ("tokens", "decoder_tokens")
# Differences that are named one by one.
NAMED = 3
FEWEST_SHARED = 2


@dataclass(frozen=True)
class Matched:
    """Which outputs of two models mean the same.

    Attributes:
        own: Places among the original's outputs; None for all.
        theirs: Places among the other's, in the same order.
        notes: What could not be compared.
        renumbering: Number of each of the original's tokens in the other's tokenizer; None where
            the numbers are the same.
    """

    own: Tensor | None = None
    theirs: Tensor | None = None
    notes: tuple[str, ...] = ()
    renumbering: Tensor | None = None

    def before(self, model: Model) -> Model:
        """The original with the shared outputs alone."""
        return model if self.own is None else _narrowed(model, self.own)

    def after(self, model: Model) -> Forward:
        """Outputs of the other model that the original shares."""
        narrowed = model if self.theirs is None else _narrowed(model, self.theirs)
        return lambda batch: narrowed.task.forward(narrowed.module, self._in_their_numbers(batch))

    def by_number(self) -> Matched:
        """The same with tokens of one number taken for one token, whatever they are called."""
        return replace(self, theirs=self.own, renumbering=None)

    def _in_their_numbers(self, batch: Batch) -> Batch:
        if self.renumbering is None:
            return batch
        given = {name: self.renumbering[batch[name]] for name in TOKEN_INPUTS if name in batch}
        return {**batch, **given}

    def answers(self, answers: Sequence[int]) -> Sequence[int]:
        """True answers by their places among the shared outputs; -1 for one that is not shared."""
        if self.own is None:
            return answers
        place = {number: at for at, number in enumerate(self.own.tolist())}
        return [place.get(answer, -1) for answer in answers]

    def in_places(self, measured: Measured) -> Measured:
        """Answers by the original's own numbers again."""
        if self.own is None or not len(measured.answer_before):
            return measured
        own = self.own.numpy()
        return replace(
            measured,
            answer_before=own[measured.answer_before],
            answer_after=own[measured.answer_after],
            truth=own[measured.truth],
        )


def _narrowed(model: Model, places: Tensor) -> Model:
    forward = model.task.forward

    def some(module: nn.Module, batch: Batch) -> Tensor:
        return forward(module, batch).index_select(-1, places)

    return replace(model, task=replace(model.task, forward=some))


def match(session: Session, other: Model) -> Matched:
    """Find the outputs of two models that mean the same.

    Raises:
        DataError: They answer different questions, read different inputs, or share too little.
    """
    original = session.model
    if original.task.name != other.task.name:
        raise DataError(
            f"{original.name} answers {original.task.name} and {other.name} {other.task.name}.",
            hint="compare two models of the same task.",
        )
    widths = _width(original, original.examples), _width(other, other.examples)
    matched = Matched()
    if original.task.name in TEXT_TASKS:
        matched = _same_tokens(original, other, widths)
        _check_tokens(session, matched)
    elif original.task.name == "classify" and _labels(original) and _labels(other):
        matched = _same_labels(original, other, widths)
    elif widths[0] != widths[1]:
        raise DataError(
            f"{original.name} gives {widths[0]:,} numbers and {other.name} {widths[1]:,}, and "
            "nothing names them.",
            hint="compare models with the same outputs, or put a labels.txt beside both.",
        )
    elif "tokens" in original.examples:
        matched = _same_reading(session, other)
    _check_inputs(session, other)
    return replace(matched, notes=(*_pictures(original, other), *matched.notes))


def _width(model: Model, batch: Batch) -> int:
    with torch.no_grad():
        return int(model.task.forward(model.module, batch).shape[-1])


# ---------------------------------------------------------------------------------------------
# tokens


def _same_tokens(original: Model, other: Model, widths: tuple[int, int]) -> Matched:
    """Take what both vocabularies begin with, where one is the other with more after it."""
    known = [_vocabulary(model) for model in (original, other)]
    shared = min(widths)
    if known[0] is not None and known[1] is not None:
        renumbered = _renumbered(original, other, known[0], known[1], widths)
        if renumbered is not None:
            return renumbered
        if len(known[0]) != len(known[1]):
            shared = min(shared, len(known[0]), len(known[1]))
    elif widths[0] != widths[1]:
        raise DataError(
            f"{original.name} has {widths[0]:,} tokens and {other.name} {widths[1]:,}, and not "
            "both come with a tokenizer.json that names them.",
            hint="put each model's tokenizer.json beside it.",
        )
    if (shared, shared) == widths:
        return Matched()
    places = torch.arange(shared)
    note = (
        f"{original.name} has {widths[0]:,} outputs and {other.name} {widths[1]:,}: compared on "
        f"the first {shared:,}, which stand for the same tokens in both"
    )
    return Matched(places, places, (note,))


def _same_reading(session: Session, other: Model) -> Matched:
    """Pair the tokens that two models read, and do not answer with, by their names.

    Raises:
        DataError: The audit data holds tokens that the other does not know.
    """
    original = session.model
    one, two = _vocabulary(original), _vocabulary(other)
    if one is None or two is None:
        return Matched()
    names = {number: token for token, number in one.items()}
    if not _apart(names, {number: token for token, number in two.items()}):
        return Matched()
    how = _how_tokens_differ(original, other, one, two)
    seen = sorted({n for batch in session.data.audit for n in batch["tokens"].flatten().tolist()})
    missing = [names.get(number, str(number)) for number in seen if names.get(number) not in two]
    if missing:
        raise DataError(
            f"{how}; the audit data holds {len(missing):,} that only {original.name} knows, first "
            f"{', '.join(map(repr, missing[:NAMED]))}.",
            hint="compare models whose tokenizers know the same tokens.",
        )
    theirs = torch.tensor([two.get(names.get(n, ""), -1) for n in range(max(names) + 1)])
    return Matched(notes=(_compared_by_name(how, original),), renumbering=theirs)


def number_tokens_otherwise(original: Model, other: Model) -> bool:
    """Whether a number stands for different tokens in two models; runs neither."""
    known = [_vocabulary(model) for model in (original, other)]
    if known[0] is None or known[1] is None:
        return False
    names = [{number: token for token, number in (one or {}).items()} for one in known]
    return bool(_apart(names[0], names[1]))


def _vocabulary(model: Model) -> Mapping[str, int] | None:
    return read_tokenizer(model.files).get_vocab() if model.files.get(TOKENIZER) else None


def _apart(one: Mapping[int, str], two: Mapping[int, str]) -> list[int]:
    """Numbers that stand for different tokens."""
    return [number for number in sorted(one.keys() & two.keys()) if one[number] != two[number]]


def _renumbered(
    original: Model,
    other: Model,
    one: Mapping[str, int],
    two: Mapping[str, int],
    widths: tuple[int, int],
) -> Matched | None:
    """Pair tokens by their names where a number stands for different ones; None where none does.

    Raises:
        DataError: The other does not know all tokens of the original.
    """
    names = [{number: token for token, number in known.items()} for known in (one, two)]
    if not _apart(names[0], names[1]):
        return None
    how = _how_tokens_differ(original, other, one, two)
    theirs = [two.get(names[0].get(number, ""), -1) for number in range(len(one))]
    if len(one) > widths[0] or min(theirs) < 0 or max(theirs) >= widths[1]:
        raise DataError(f"{how}.", hint="compare models whose tokenizers know the same tokens.")
    places = torch.tensor(theirs)
    return Matched(
        None if len(one) == widths[0] else torch.arange(len(one)),
        places,
        (_compared_by_name(how, original),),
        renumbering=places,
    )


def _compared_by_name(how: str, original: Model) -> str:
    return f"{how}: compared by the names of tokens, in texts cut as {original.name} cuts them"


def _how_tokens_differ(
    original: Model, other: Model, one: Mapping[str, int], two: Mapping[str, int]
) -> str:
    names = [{number: token for token, number in known.items()} for known in (one, two)]
    apart = _apart(names[0], names[1])
    examples = ", ".join(
        f"{number} is {names[0][number]!r} and {names[1][number]!r}" for number in apart[:NAMED]
    )
    return (
        f"the tokenizers differ: {original.name} has {len(one):,} tokens and {other.name} "
        f"{len(two):,}, and {len(apart):,} numbers stand for different ones, first {examples}"
    )


def _check_tokens(session: Session, matched: Matched) -> None:
    """Refuse audit data with tokens that only one of the two knows."""
    if matched.own is None:
        return
    name = "tokens" if session.model.task.name == "language" else "decoder_tokens"
    highest = max(int(batch[name].max()) for batch in session.data.audit)
    if highest >= len(matched.own):
        raise DataError(
            f"the audit data holds the token {highest:,}, which only {session.model.name} knows: "
            f"both know {len(matched.own):,}.",
            hint="give a text without special tokens with --data, or exchange the two models.",
        )


# ---------------------------------------------------------------------------------------------
# labels


def _labels(model: Model) -> list[str]:
    return model.files.get(LABELS, b"").decode("utf-8", errors="replace").splitlines()


def _same_labels(original: Model, other: Model, widths: tuple[int, int]) -> Matched:
    """Pair the outputs by their names where the names are not the same."""
    one, two = _labels(original), _labels(other)
    named = (len(one), len(two)) == widths
    if widths[0] == widths[1] and (one == two or not named):
        return Matched()
    if not named:
        raise DataError(
            f"{original.name} has {widths[0]:,} classes and {other.name} {widths[1]:,}, and their "
            f"{LABELS} name {len(one):,} and {len(two):,}.",
            hint=f"put the right {LABELS} beside each, one name a line.",
        )
    place = {name: at for at, name in enumerate(two) if two.count(name) == 1}
    shared = [(at, place[n]) for at, n in enumerate(one) if n in place and one.count(n) == 1]
    how = _how_labels_differ(original, other, one, two)
    if len(shared) < FEWEST_SHARED:
        raise DataError(
            f"{how}; they share {len(shared)}.", hint="compare models of one label set."
        )
    own, theirs = torch.tensor(shared).unbind(1)
    left = "" if len(shared) == len(one) == len(two) else ", and the rest is left out"
    return Matched(own, theirs, (f"{how}: compared by name on {len(shared):,} labels{left}",))


def _how_labels_differ(original: Model, other: Model, one: list[str], two: list[str]) -> str:
    apart = [(at, *pair) for at, pair in enumerate(zip(one, two, strict=False)) if len({*pair}) > 1]
    examples = ", ".join(f"class {at} is {a!r} and {b!r}" for at, a, b in apart[:NAMED])
    first = f", first {examples}" if examples else ""
    return (
        f"the labels differ: {original.name} has {len(one):,} and {other.name} {len(two):,}{first}"
    )


# ---------------------------------------------------------------------------------------------
# inputs


def _check_inputs(session: Session, other: Model) -> None:
    """Refuse a model that cannot read what the original reads."""
    first = {name: tensor[:1] for name, tensor in session.data.audit[0].items()}
    try:
        _width(other, first)
    except MemoryError:
        raise
    except Exception as fault:  # whatever a module raises that reads something else
        shapes = [_shapes(model.examples) for model in (session.model, other)]
        reason = (str(fault).splitlines() or [""])[0]
        raise DataError(
            f"{session.model.name} reads {shapes[0]} and {other.name} {shapes[1]}, which cannot "
            f"read the same data: {type(fault).__name__}: {reason[:200]}",
            hint="compare models that read inputs of the same names and sizes.",
        ) from fault


def _shapes(batch: Batch) -> str:
    """Names and sizes of one sample's inputs."""
    sides = {name: " × ".join(map(str, tensor.shape[1:])) for name, tensor in batch.items()}
    return ", ".join(f"{name} of {side or 1}" for name, side in sides.items())


def _pictures(original: Model, other: Model) -> tuple[str, ...]:
    """Say that pictures are scaled as the original wants them, where the other wants otherwise."""
    one, two = (m.architecture.config.get("picture") for m in (original, other))
    if not isinstance(one, Mapping) or not isinstance(two, Mapping):
        return ()
    apart = [name for name in one if name in two and _plain(one[name]) != _plain(two[name])]
    said = ", ".join(f"{name} {one[name]} and {two[name]}" for name in apart)
    if not apart:
        return ()
    return (
        f"{original.name} and {other.name} want pictures otherwise ({said}): both were given them "
        f"as {original.name} wants them",
    )


def _plain(value: object) -> object:
    """A setting so that a tuple and a list of the same numbers are alike."""
    return list(value) if isinstance(value, list | tuple) else value
