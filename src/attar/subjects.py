"""What a person asks to have explained: a text, pictures, sounds, or rows of a file of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from attar.attribute.question import TEXT_STEPS, Asked, Way
from attar.decode import transcribe_windows
from attar.errors import DataError
from attar.export.run import class_names, prompt_tokens, sentence_batch
from attar.inputs import (
    open_picture,
    picture_settings,
    picture_to_pixels,
    read_tokenizer,
    sound_to_windows,
    special_tokens,
)
from attar.load.mel import log_mel
from attar.load.tensors import read_rows

if TYPE_CHECKING:
    from attar.records import Batch, Model

SPOKEN = 32  # tokens that are written down of a sound, to ask for one of them


@dataclass(frozen=True)
class Subject:
    """One input and the answer that is to be explained.

    Attributes:
        name: The text, the file, or the row.
        kind: "text", "picture", "sound" or "row".
        sample: A batch of one.
        target: The answer, for people.
        parts: Tokens of a text, or names of the columns.
    """

    name: str
    kind: str
    sample: Batch
    asked: Asked
    target: str
    way: Way
    parts: tuple[str, ...] = ()


def find_subjects(
    model: Model, inputs: Sequence[str], *, target: str | None = None, data: str | None = None
) -> Iterator[Subject]:
    """Read what was typed.

    Args:
        inputs: A prompt; texts; files; or numbers of rows of `data`.
        target: A class, token, or number of an output; the model's own answer where left out.

    Raises:
        DataError: Nothing to explain, or a target that there is not.
    """
    if not inputs:
        raise DataError("there is nothing to explain.", hint="give a text, files, or row numbers.")
    task = model.task.name
    if task == "language":
        yield _of_text(model, " ".join(inputs), target)
        return
    for one in inputs:
        if task == "embed":
            yield _of_sentence(model, one, target)
        elif task == "transcribe":
            yield _of_sound(model, one, target)
        elif "pixels" in model.examples:
            yield _of_picture(model, one, target)
        else:
            yield _of_row(model, one, target, data)


def _of_text(model: Model, text: str, target: str | None) -> Subject:
    tokenizer = read_tokenizer(model.files)
    ids = prompt_tokens(tokenizer, text)
    if len(ids) < 2:
        raise DataError(f"{text!r} is one token or none.", hint="give a longer text.")
    sample = {"tokens": torch.tensor([ids])}
    position = len(ids) - 1
    answer = _answer(model, sample, position)
    if target is not None:
        answer = _token(tokenizer.encode(target, add_special_tokens=False).ids, target)
    parts = tuple(tokenizer.decode([one], skip_special_tokens=False) for one in ids)
    way = Way(kept=1, steps=TEXT_STEPS)
    return Subject(
        text, "text", sample, Asked(position, answer), tokenizer.decode([answer]), way, parts
    )


def _token(ids: Sequence[int], target: str) -> int:
    if len(ids) != 1:
        raise DataError(
            f"the target {target!r} is {len(ids)} tokens; one is explained.",
            hint="give one word, with the space before it: --target ' Paris'.",
        )
    return ids[0]


def _of_sentence(model: Model, text: str, target: str | None) -> Subject:
    """Explain how near a text is to another, or what its own vector rests on."""
    tokenizer = read_tokenizer(model.files)
    sample = sentence_batch(tokenizer, text)
    other = sample if target is None else sentence_batch(tokenizer, target)
    with torch.no_grad():
        own = model.task.forward(model.module, other)[0, 0]
    ids = sample["tokens"][0].tolist()
    parts = tuple(tokenizer.decode([one], skip_special_tokens=False) for one in ids)
    wanted = "its own vector" if target is None else f"nearness to {target!r}"
    asked = Asked(0, -1, normalize(own, dim=0))
    return Subject(text, "text", sample, asked, wanted, Way(steps=TEXT_STEPS), parts)


def _of_sound(model: Model, file: str, target: str | None) -> Subject:
    """Explain one word of what is heard, the first where none is named."""
    window = next(iter(sound_to_windows(Path(file))))
    features = log_mel(window, int(model.examples["features"].shape[1]))[None]
    tokenizer = read_tokenizer(model.files)
    prompts, texts = transcribe_windows(model, tokenizer, features, max_tokens=SPOKEN)
    heard = texts[0]
    if not heard:
        raise DataError(f"no word is heard in {file}.", hint="give a recording with speech.")
    words = [tokenizer.decode([one]) for one in heard]
    place = 0
    if target is not None:
        alike = [n for n, word in enumerate(words) if word.strip() == target.strip()]
        if not alike:
            raise DataError(
                f"{target!r} is none of the tokens heard.",
                hint=f"take one of {', '.join(map(repr, words))}.",
            )
        place = alike[0]
    opening = prompts[0].tolist()
    sample = {
        "features": features,
        "decoder_tokens": torch.tensor([[*opening, *heard[:place]]]),
    }
    asked = Asked(len(opening) + place - 1, heard[place])
    return Subject(file, "sound", sample, asked, words[place], Way())


def _of_picture(model: Model, file: str, target: str | None) -> Subject:
    settings = picture_settings(model.architecture.config)
    sample = {"pixels": picture_to_pixels(open_picture(Path(file)), settings)[None]}
    answer, name = _class(model, sample, target)
    return Subject(file, "picture", sample, Asked(0, answer), name, Way())


def _of_row(model: Model, number: str, target: str | None, data: str | None) -> Subject:
    if data is None:
        raise DataError(
            f"{model.name} reads numbers, and {number!r} is no file of them.",
            hint="give a file and rows of it: attar explain MODEL 0 --data d.npz.",
        )
    rows = read_rows(model, Path(data))
    count = len(next(iter(rows.values())))
    if not number.isdecimal() or int(number) >= count:
        raise DataError(
            f"{data} has no row {number!r}.", hint=f"give a number from 0 to {count - 1}."
        )
    sample = {name: tensor[int(number)][None] for name, tensor in rows.items()}
    x = next(iter(rows.values()))
    is_table = x.dim() == 2
    way = Way(x.mean(0) if is_table else None)
    parts = tuple(f"column {n}" for n in range(x.shape[1])) if is_table else ()
    kind = "row" if is_table else "picture" if x.dim() == 4 else "map"
    name = f"row {number} of {data}"
    if model.task.family == "categorical":
        answer, label = _class(model, sample, target)
        return Subject(name, kind, sample, Asked(0, answer), label, way, parts)
    with torch.no_grad():
        own = model.task.forward(model.module, sample)[0, 0]
    direction, label = _output(own, target)
    return Subject(name, kind, sample, Asked(0, -1, direction), label, way, parts)


def _output(own: Tensor, target: str | None) -> tuple[Tensor, str]:
    if target is None:
        return normalize(own, dim=0), "the output, along its own direction"
    if not target.isdecimal() or int(target) >= len(own):
        raise DataError(
            f"there is no output {target!r}.", hint=f"give a number from 0 to {len(own) - 1}."
        )
    return one_hot(torch.tensor(int(target)), len(own)).to(own), f"output {target}"


def _class(model: Model, sample: Batch, target: str | None) -> tuple[int, str]:
    with torch.no_grad():
        logits = model.task.forward(model.module, sample)[0, 0]
    names = class_names(model.files, len(logits))
    if target is None:
        answer = int(logits.argmax())
        return answer, names[answer]
    if target.isdecimal() and int(target) < len(names):
        return int(target), names[int(target)]
    alike = [n for n, name in enumerate(names) if name.lower() == target.lower()]
    if alike:
        return alike[0], names[alike[0]]
    near = get_close_matches(target, names, 3) or [n for n in names if target.lower() in n.lower()]
    raise DataError(
        f"there is no class {target!r}.",
        hint=f"give one of {', '.join(map(repr, near[:3]))}"
        if near
        else f"give its name or a number from 0 to {len(names) - 1}.",
    )


def _answer(model: Model, sample: Batch, position: int) -> int:
    with torch.no_grad():
        outputs = model.task.forward(model.module, sample)[0, position]
    tokenizer = read_tokenizer(model.files)
    silent = [one for one in special_tokens(tokenizer) if one < len(outputs)]
    return int(outputs.index_fill(0, torch.tensor(silent, dtype=torch.long), -torch.inf).argmax())
